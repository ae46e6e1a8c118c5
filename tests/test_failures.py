"""Failures stay visible and harmless: a warning that names the call, the model's own graph, an error under `strict`."""

import copy
import functools

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from tsa_compile import (
    Coverage,
    Decision,
    KeepRatio,
    Reason,
    RewriteError,
    TSAConfig,
    TSAWarning,
    explain,
    reports,
    tsa_backend,
)
from tsa_compile.passes import canonicalize, rewrite
from tsa_compile.passes.canonicalize import CanonicalizeDense
from tsa_compile.passes.cleanup import RemoveDeadMasks
from tsa_compile.passes.masks.infer import InferMasks
from tsa_compile.passes.plan import PlanCalls
from tsa_compile.passes.rewrite import RewriteSparse
from tsa_compile.passes.verify import Verify
from tsa_compile.testing import capture_all, count_ops

from .support import Attention, Stack, difference, exhaustive_but, heads, mixed_padding, tiny, tokens

pytestmark = pytest.mark.usefixtures("fresh")

CONFIG = TSAConfig(budget=Coverage(0), window=4, min_tokens=4, layers=[0, 2], compiler="eager")
SDPA = "scaled_dot_product_attention"
SPARSE = ("score", "budget", "select", "compress", "attend_lse", "merge_floor")
OPS = (*SPARSE, "padded_attention", "valid_ranges", SDPA)
ATOL = 1e-5


class Keeper:
    """A compiler that keeps the graph it is given."""

    def __call__(self, graph_module, example_inputs):
        self.graph_module = graph_module
        return graph_module.forward


def failing(monkeypatch, owner, name, at=0):
    """From its call number `at` on, a function does its work and then raises: the worst moment."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(None)
        if len(calls) > at:
            raise ZeroDivisionError("planted")
        return result

    monkeypatch.setattr(owner, name, call)


@functools.cache
def traced(name, form):
    """A model's graph for a padded batch, its inputs and what it should compute; Dynamo traces each model once."""
    model = tiny(name, form)
    captured = capture_all(model, input_ids=tokens(3, 40), attention_mask=mixed_padding(40), use_cache=False)
    (graph,), (inputs,) = captured.graphs, captured.inputs
    with torch.no_grad():
        return graph, inputs, model(input_ids=tokens(3, 40), attention_mask=mixed_padding(40), use_cache=False).logits


def run(name="llama", form="sdpa", config=CONFIG, **changes):
    """Logits for a padded batch, and the graph that the compiler was given."""
    graph, inputs, wanted = traced(name, form)
    keeper = Keeper()
    with torch.no_grad():
        options = {"config": config, "compiler": keeper, **changes}
        (logits,) = tsa_backend(copy.deepcopy(graph), inputs, options=options)(*inputs)
    return logits, wanted, keeper.graph_module


def present(graph_module):
    return {name: count for name, count in count_ops(graph_module, *OPS).items() if count}


@pytest.mark.parametrize("form", exhaustive_but(["sdpa", "eager"], "sdpa"))
@pytest.mark.parametrize(("owner", "name"), [(rewrite, "scale_of"), (RewriteSparse, "_sparse")], ids=["before", "after"])
def test_one_call_fails_in_the_sparse_rewriting(monkeypatch, owner, name, form):
    """The second of two calls: the first stays sparse, the failed one is the model's, and no node is left behind."""
    failing(monkeypatch, owner, name, at=1)
    with pytest.warns(TSAWarning, match=r"model\.layers\.2\.self_attn.*planted"):
        logits, wanted, graph = run(form=form)
    assert difference(logits, wanted, mixed_padding(40)) < ATOL
    left = {SDPA: 1} if form == "sdpa" else {}
    # The ranges are computed once, for the dense layer between the two.
    assert present(graph) == {**dict.fromkeys(SPARSE, 1), "padded_attention": 1, "valid_ranges": 1, **left}
    rows = reports()[-1].rows
    assert [row.reason for row in rows] == [Reason.SPARSE, Reason.LAYER_NOT_SELECTED, Reason.PASS_FAILED]
    assert "planted" in rows[2].detail and rows[2].decision is Decision.UNCHANGED


@pytest.mark.parametrize(("owner", "name"), [(CanonicalizeDense, "_dense"), (canonicalize, "scale_of")])
def test_one_call_fails_in_the_dense_rewriting(monkeypatch, owner, name):
    failing(monkeypatch, owner, name, at=1)
    with pytest.warns(TSAWarning, match=r"model\.layers\.1\.self_attn.*planted"):
        logits, wanted, graph = run(layers=[])
    assert difference(logits, wanted) < ATOL
    assert present(graph) == {"valid_ranges": 1, "padded_attention": 1, SDPA: 2}
    assert reports()[-1].count(Decision.UNCHANGED) == 2


def test_the_only_user_of_a_shared_node_fails(monkeypatch):
    """The padding tensor made for a failed call must not be used by a later one, nor stay in the graph."""
    failing(monkeypatch, RewriteSparse, "_sparse", at=0)
    monkeypatch.setattr(CanonicalizeDense, "_dense", lambda *args: 1 / 0)
    with pytest.warns(TSAWarning, match="planted"):
        logits, wanted, graph = run()
    assert torch.equal(logits, wanted)
    assert present(graph) == {SDPA: 3}


def test_a_failure_at_the_first_call_leaves_the_next_ones_whole(monkeypatch):
    """Calls share the padding tensor; the one that made it fails, the next needs it again."""
    calls = []
    original = RewriteSparse._sparse

    def first_fails(*args):
        node = original(*args)
        calls.append(None)
        if len(calls) == 1:
            raise ZeroDivisionError("planted")
        return node

    monkeypatch.setattr(RewriteSparse, "_sparse", first_fails)
    with pytest.warns(TSAWarning, match=r"model\.layers\.0\.self_attn.*planted"):
        logits, wanted, graph = run()
    assert difference(logits, wanted, mixed_padding(40)) < ATOL
    assert [row.reason for row in reports()[-1]] == [Reason.PASS_FAILED, Reason.LAYER_NOT_SELECTED, Reason.SPARSE]
    assert present(graph)["score"] == 1


@pytest.mark.parametrize("kind", [InferMasks, PlanCalls, RemoveDeadMasks, Verify], ids=lambda kind: kind.__name__)
def test_a_whole_pass_fails(monkeypatch, kind):
    """The graph is compiled as the model wrote it, whatever earlier passes had done to it."""
    failing(monkeypatch, kind, "call")
    with pytest.warns(TSAWarning, match=f"{kind.__name__} failed.*planted"):
        logits, wanted, graph = run()
    assert torch.equal(logits, wanted)
    assert present(graph) == {SDPA: 3}
    assert [row.reason for row in reports()[-1]] == [Reason.PASS_FAILED] * 3
    assert any("planted" in note for note in reports()[-1].notes)


@pytest.mark.parametrize(
    "owner, name",
    [(RewriteSparse, "_sparse"), (CanonicalizeDense, "_dense"), (RemoveDeadMasks, "call"), (Verify, "call")],
    ids=["sparse call", "dense call", "clean-up", "verification"],
)
def test_strict_raises(monkeypatch, owner, name):
    failing(monkeypatch, owner, name)
    with pytest.raises(RewriteError, match=r"planted.*strict=True"):
        run(strict=True)


def test_strict_is_content_where_all_goes_well():
    logits, wanted, _ = run(strict=True)
    assert difference(logits, wanted, mixed_padding(40)) < ATOL


def test_a_compiler_that_fails_on_the_rewritten_graph():
    """The model's own graph is compiled instead."""

    def picky(graph_module, example_inputs):
        if present(graph_module).get("score"):
            raise NotImplementedError("no tsa ops here")
        return graph_module.forward

    inputs = heads()
    options = {"config": CONFIG, "layers": [0], "compiler": picky}
    with torch.no_grad(), pytest.warns(TSAWarning, match="no tsa ops here"):
        out = torch.compile(Attention(), backend="tsa", options=options)(*inputs)
    assert torch.equal(out, Attention()(*inputs))
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="no tsa ops here"):
        torch.compile(Attention(), backend="tsa", options={**options, "strict": True})(*inputs)


def test_a_compiler_that_fails_always_fails():
    def broken(graph_module, example_inputs):
        raise NotImplementedError("nothing here")

    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="nothing here"):
        torch.compile(Attention(), backend="tsa", options={"layers": [], "compiler": broken})(*heads())


# No rewrite is silent


def masked(mask):
    """Inputs of a call under a mask that arrives as a tensor: nobody can prove what it says."""
    return (*heads(), mask)


OPAQUE = torch.ones(40, 40, dtype=torch.bool).tril()


def test_no_sparse_call_warns_with_the_reason():
    with torch.no_grad(), pytest.warns(TSAWarning, match="MASK_OPAQUE: The meaning of the mask could not be proven"):
        model = Attention(is_causal=False)
        out = torch.compile(model, backend="tsa", options={"config": CONFIG, "layers": [0]})(*masked(OPAQUE))
        assert torch.equal(out, model(*masked(OPAQUE)))
    assert reports()[-1].rows[0].reason is Reason.MASK_OPAQUE


def test_strict_raises_for_an_opaque_mask():
    options = {"config": CONFIG, "layers": [0], "strict": True}
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=r"RewriteError: .*MASK_OPAQUE.*strict=True"):
        torch.compile(Attention(is_causal=False), backend="tsa", options=options)(*masked(OPAQUE))


class OneOpaque(torch.nn.Module):
    """Two layers, of which the second has an opaque mask."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Attention(), Attention(is_causal=False)])

    def forward(self, query, key, value, mask):
        return self.layers[1](self.layers[0](query, key, value), key, value, mask)


def test_strict_raises_though_another_layer_became_sparse():
    options = {"config": CONFIG, "layers": [0, 1], "strict": True}
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="MASK_OPAQUE"):
        torch.compile(OneOpaque(), backend="tsa", options=options)(*masked(OPAQUE))


@pytest.mark.filterwarnings("error::tsa_compile.TSAWarning")
@pytest.mark.parametrize("layers", [[], [0]], ids=str)
def test_an_opaque_mask_in_a_layer_that_stays_dense_is_no_miss(layers):
    options = {"config": CONFIG, "layers": layers, "strict": True}
    with torch.no_grad():
        torch.compile(OneOpaque(), backend="tsa", options=options)(*masked(OPAQUE))


@pytest.mark.filterwarnings("error::tsa_compile.TSAWarning")
def test_nothing_is_said_where_nothing_was_asked_for():
    with torch.no_grad():
        torch.compile(Stack(), backend="tsa", options={"config": CONFIG, "layers": []})(*heads())
        torch.compile(torch.relu, backend="tsa", options={"config": CONFIG})(torch.ones(3))


@pytest.mark.filterwarnings("error::tsa_compile.TSAWarning")
def test_decode_steps_are_no_miss():
    query, key, value = heads()
    options = {"config": CONFIG, "layers": [0], "strict": True}
    with torch.no_grad():
        torch.compile(Attention(is_causal=False), backend="tsa", options=options)(query[:, :, -1:], key, value)


@pytest.mark.parametrize(
    "name", exhaustive_but(["gemma2 (soft capping)", "bloom (ALiBi)", "falcon (ALiBi)"], "bloom (ALiBi)")
)
def test_written_out_attention_of_another_form_is_reported(name):
    """Soft capping, slopes scaled with the scores: recognised, and a row says why nothing was done."""
    with pytest.warns(TSAWarning):
        report = explain(tiny(name, "eager"), input_ids=tokens(2, 40), config=CONFIG)
    assert len(report) == 3
    assert {row.reason for row in report} <= {Reason.UNSUPPORTED_FORM, Reason.SLIDING_WINDOW, Reason.MASK_OPAQUE}


def test_scores_divided_in_place_are_read():
    logits, wanted, graph_module = run("falcon", "eager", budget=KeepRatio(1.0))
    assert count_ops(graph_module, "attend_lse", "softmax") == {"attend_lse": 2, "softmax": 0}
    assert difference(logits, wanted, mixed_padding(40)) < ATOL


def test_keep_ratio_of_one_keeps_all():
    logits, wanted, _ = run(budget=KeepRatio(1.0))
    assert difference(logits, wanted, mixed_padding(40)) < ATOL
