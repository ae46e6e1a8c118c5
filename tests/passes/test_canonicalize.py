"""Dense calls with a proven mask: what each is replaced by, and which calls are left as they are."""

import math

import pytest
import torch
import torch.nn.functional as F

from tsa_compile.passes.base import GraphState
from tsa_compile.passes.canonicalize import CanonicalizeDense
from tsa_compile.passes.emit_padding import EmitPadding
from tsa_compile.pipeline import run_passes
from tsa_compile.reasons import Decision, Reason
from tsa_compile.testing import capture_all, graph_text

from .support import (
    EXACT,
    SPARSE,
    D,
    H,
    Rewritten,
    causal,
    causal_attention,
    inputs,
    merge_heads,
    padded_attention,
    padding,
    passed,
    repeat_kv,
    written_out,
)  # fmt: skip

SDPA = F.scaled_dot_product_attention
DEFAULT_SCALE = 1.0 / math.sqrt(D)
PADDED = torch.ops.tsa.padded_attention.default
CACHED = torch.ops.tsa.cached_attention.default
SLIDING = torch.ops.tsa.sliding_attention.default
PADDED_SLIDING = torch.ops.tsa.padded_sliding_attention.default
OPS = (SDPA, PADDED, CACHED, SLIDING, PADDED_SLIDING)


def replacement(function, *arguments, config=EXACT):
    """The call that stands for the only attention of a function; what the graph computes is held against it."""
    graph, state, given = passed(CanonicalizeDense, function, *arguments, config=config)
    torch.testing.assert_close(graph(*given)[0], function(*arguments))
    (plan,) = state.plans
    (new,) = (node for node in graph.graph.nodes if node.target in OPS and node.users)
    assert plan.call.node in state.detached and not plan.call.node.users
    return new, plan.call


def test_a_causal_mask_becomes_a_flag_and_heads_are_not_repeated():
    new, call = replacement(causal_attention, *inputs())
    assert new.args == (call.query, call.key, call.value) and {node.op for node in new.args} == {"placeholder"}
    assert new.kwargs == {"is_causal": True, "scale": DEFAULT_SCALE, "enable_gqa": True}


def behind_a_cache(q, k, v):
    """The last positions of all: q is cut from more rows."""
    q = q[:, :, 6:]
    mask = torch.arange(k.shape[2]) <= (torch.arange(q.shape[2]) + 6)[:, None]
    return merge_heads(SDPA(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True))


def behind_a_cache_with_padding(q, k, v, pad):
    q = q[:, :, 6:]
    mask = torch.arange(k.shape[2]) <= (torch.arange(q.shape[2]) + 6)[:, None]
    return merge_heads(SDPA(q, k, v, attn_mask=mask & (pad != 0)[:, None, None], enable_gqa=True))


def test_queries_behind_a_cache_have_an_op():
    new, call = replacement(behind_a_cache, *inputs(40))
    assert new.target is CACHED and new.args == (call.query, call.key, call.value, 0.3)


def test_queries_behind_a_cache_with_padding():
    new, call = replacement(behind_a_cache_with_padding, *inputs(40), padding(40))
    assert new.target is PADDED and new.args[:3] == (call.query, call.key, call.value)


def windowed(q, k, v):
    i = torch.arange(q.shape[2])
    return merge_heads(SDPA(q, k, v, attn_mask=(i <= i[:, None]) & (i > i[:, None] - 5), scale=0.3, enable_gqa=True))


def windowed_with_padding(q, k, v, pad):
    i = torch.arange(q.shape[2])
    mask = (i <= i[:, None]) & (i > i[:, None] - 5) & (pad != 0)[:, None, None]
    return merge_heads(SDPA(q, k, v, attn_mask=mask, enable_gqa=True))


def windowed_and_written_out(q, k, v, pad):
    i = torch.arange(q.shape[2])
    mask = (i <= i[:, None]) & (i > i[:, None] - 5) & (pad != 0)[:, None, None]
    scores = (q @ repeat_kv(k).mT * 0.5).masked_fill(~mask, torch.finfo(q.dtype).min)
    return merge_heads(scores.softmax(-1) @ repeat_kv(v))


def test_a_window_becomes_a_number():
    new, call = replacement(windowed, *inputs())
    assert new.target is SLIDING and new.args == (call.query, call.key, call.value, 0.3, 5)


@pytest.mark.parametrize(
    ("function", "scale", "mean_rows"),
    [(windowed_with_padding, DEFAULT_SCALE, False), (windowed_and_written_out, 0.5, True)],
)
def test_a_window_and_padding(function, scale, mean_rows):
    new, call = replacement(function, *inputs(), padding())
    assert new.target is PADDED_SLIDING and new.args[:3] == (call.query, call.key, call.value)
    assert new.args[5:] == (scale, 5, mean_rows)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [windowed, windowed_with_padding, windowed_and_written_out])
def test_nothing_reads_the_mask_of_a_window(function, dynamic):
    def attention(hidden, *pad):  # queries and keys are of one length for certain
        keys, values = hidden[:, ::2].chunk(2, -1)
        return function(hidden[..., :D], keys, values, *pad)

    hidden, pad = torch.cat(inputs(40, H)[:2], -1), [] if function is windowed else [padding(40)]
    if dynamic:
        for tensor, axis in zip((hidden, *pad), (2, 1), strict=False):
            torch._dynamo.mark_dynamic(tensor, axis)
    rewritten = Rewritten(attention, hidden, *pad, config=EXACT)
    (row,) = rewritten.report
    assert (row.decision, row.reason) == (Decision.WINDOW, Reason.SLIDING_WINDOW)
    rewritten.check_same()
    made = [node.meta.get("example_value") for node in rewritten.after.graph.nodes]
    assert not any(isinstance(value, torch.Tensor) and list(value.shape[-2:]) == [40, 40] for value in made)


def test_as_many_key_heads_as_query_heads_need_no_grouping():
    def attention(q, k, v):
        return merge_heads(SDPA(q, k, v, attn_mask=causal(q.shape[2]), scale=0.3))

    new, _ = replacement(attention, *inputs(kv_heads=H))
    assert new.kwargs == {"is_causal": True, "scale": 0.3}


@pytest.mark.parametrize(
    ("function", "scale", "mean_rows"), [(padded_attention, DEFAULT_SCALE, False), (written_out, 0.5, True)]
)
def test_padding_becomes_a_mask_of_tokens(function, scale, mean_rows):
    """A row without a key is zeros where the mask was boolean, the mean of all values where it was a finite number."""
    new, call = replacement(function, *inputs(), padding())
    query, key, value, valid, valid_ranges, *numbers = new.args
    assert (query, key, value) == (call.query, call.key, call.value) and numbers == [scale, mean_rows]
    assert valid_ranges.target is torch.ops.tsa.valid_ranges.default and valid_ranges.args == (valid,)
    assert valid.meta["example_value"].shape == (2, 12) and valid.meta["example_value"].dtype == torch.bool


def test_an_exported_graph_gets_recorded_operators():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return causal_attention(q, k, v)

    program = torch.export.export(Module(), inputs())
    run_passes(program.graph_module, EXACT)
    targets = [node.target for node in program.graph_module.graph.nodes]
    assert targets.count(torch.ops.aten.scaled_dot_product_attention.default) == 1 and SDPA not in targets


def canonical(q, k, v):
    return SDPA(q, k, v, is_causal=True, enable_gqa=True)


def shifted(q, k, v):
    positions = torch.arange(q.shape[2])
    return SDPA(q, k, v, attn_mask=positions <= positions[:, None] + 1, enable_gqa=True)


@pytest.mark.parametrize(
    ("function", "config", "decision"),
    [(canonical, EXACT, Decision.DENSE), (shifted, EXACT, Decision.UNCHANGED), (causal_attention, SPARSE, Decision.SPARSE)],
    ids=["canonical already", "another mask", "sparse"],
)
def test_others_are_left_alone(function, config, decision):
    graph, state, _ = passed(EmitPadding, function, *inputs(), config=config)
    before = graph_text(graph)
    step = CanonicalizeDense(state)
    assert not step(graph).modified and step.matched == 0
    assert [plan.decision for plan in state.plans] == [decision] and graph_text(graph) == before


def test_one_call_that_fails_leaves_the_others_rewritten(monkeypatch):
    def two(q, k, v, pad):
        return padded_attention(q, k, v, pad) + causal_attention(q, k, v)

    captured = capture_all(two, *inputs(), padding())
    (graph,) = captured.graphs
    monkeypatch.setattr(GraphState, "operands", lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match="dense rewriting failed"):
        report = run_passes(graph, EXACT)
    assert [row.decision for row in report] == [Decision.UNCHANGED, Decision.DENSE]
    torch.testing.assert_close(graph(*captured.inputs[0])[0], two(*inputs(), padding()))
