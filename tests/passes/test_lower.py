"""The ATen forms of ops that look at the host, and the checks of the lowering; whole models are in tests/export."""

import pytest
import torch

from tsa_compile import ConfigError, Coverage, Decision, Floor, KeepRatio, RewriteError, TSAConfig
from tsa_compile.export import export_program
from tsa_compile.export import onnx as tsa_onnx
from tsa_compile.kernels import reference
from tsa_compile.kernels.forms import FORMS
from tsa_compile.kernels.padded import padded_attention, padded_attention_aten, valid_ranges, valid_ranges_aten
from tsa_compile.kernels.registry import AttentionKernel, names, register, unregister
from tsa_compile.passes.graph import fake
from tsa_compile.passes.lower import lower_program, with_joined_floors
from tsa_compile.pipeline import run_passes
from tsa_compile.testing import count_ops

from ..support import Attention, Stack, exhaustive_but, heads

tsa = torch.ops.tsa
PADDINGS = {
    "none": [(0, 12), (0, 12)],
    "left-right": [(5, 12), (0, 9)],
    "both": [(2, 7), (0, 12)],
    "one token": [(11, 12), (0, 1)],
    "nothing": [(0, 0), (3, 12)],
}


def padding_of(name):
    padding = torch.zeros(2, 12, dtype=torch.bool)
    for row, (start, stop) in zip(padding, PADDINGS[name], strict=True):
        row[start:stop] = True
    return padding


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", PADDINGS)
def test_padded_attention_without_the_host(name, holes):
    padding = padding_of(name)
    if holes:
        padding[:, 5] = False
    assert torch.equal(valid_ranges_aten(padding), valid_ranges(padding))
    query, key, value = heads(length=12)
    for mean_rows, rows in ((False, 12), (True, 12), (False, 7), (True, 7)):
        operands = (query[:, :, 12 - rows :], key, value, padding)
        expected = padded_attention(*operands, valid_ranges(padding), 0.3, mean_rows)
        actual = padded_attention_aten(*operands, None, 0.3, mean_rows)
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()


class Chunk(torch.nn.Module):
    """A chunk's attention behind a cache of another length."""

    def forward(self, query, key, value, past_key, past_value, attention_mask=None):
        key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        positions = past_key.shape[2] + torch.arange(query.shape[2])
        mask = (torch.arange(key.shape[2]) <= positions[:, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def chunk_inputs(rows, past, padded):
    query, key, value = heads(length=rows)
    _, past_key, past_value = heads(length=past)
    inputs = (query, key, value, past_key, past_value)
    return (*inputs, torch.ones(2, rows + past).index_fill(1, torch.arange(3), 0)) if padded else inputs


def exported_chunk(padded):
    """One program for any lengths of both."""
    rows, past = torch.export.Dim("rows", min=32, max=500), torch.export.Dim("past", min=2, max=500)
    shapes = ({2: rows},) * 3 + ({2: past},) * 2 + (({1: torch.export.Dim.AUTO},) if padded else ())
    return torch.export.export(Chunk(), chunk_inputs(40, 60, padded), dynamic_shapes=shapes)


@pytest.mark.parametrize("padded", [False, True])
def test_a_chunk_behind_a_cache_becomes_aten(padded):
    traced = exported_chunk(padded)
    report = run_passes(traced.graph_module, TSAConfig(layers=[]))
    assert report.rows[0].decision is (Decision.DENSE_PADDED if padded else Decision.DENSE)
    lowered = lower_program(traced)
    assert not any("tsa" in str(node.target) for node in lowered.graph.nodes)
    for sizes in ((40, 60), (33, 3), (37, 300)):
        inputs = chunk_inputs(*sizes, padded)
        torch.testing.assert_close(lowered.module()(*inputs), Chunk()(*inputs))


@pytest.mark.exhaustive
@pytest.mark.parametrize("padded", exhaustive_but([False, True], True))
def test_a_sparse_chunk_becomes_aten_for_all_lengths(padded):
    traced = exported_chunk(padded)
    floor = {"floor_window": 5, "floor_sinks": 2}
    config = TSAConfig(KeepRatio(0.4), 20, Floor(5, 2), min_tokens=3, min_length=1, layers=[0])
    assert run_passes(traced.graph_module, config).rows[0].decision is Decision.SPARSE
    lowered = lower_program(traced)
    assert not any("tsa" in str(node.target) for node in lowered.graph.nodes)
    for sizes in ((40, 60), (33, 3), (37, 90)):
        query, key, value, past_key, past_value, *mask = inputs = chunk_inputs(*sizes, padded)
        key, value = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
        options = {"keep_ratio": 0.4, "window": 20, "min_tokens": 3, "reduce": "max", **floor}
        padding = mask[0].bool() if mask else None
        expected = reference.token_sparse_attention(query, key, value, padding, **options)
        torch.testing.assert_close(lowered.module()(*inputs), expected, rtol=1e-4, atol=1e-5)


def export(**options):
    config = TSAConfig(**{"budget": KeepRatio(0.5), "window": 4, "min_tokens": 3, "layers": (0,), "floor": None, **options})
    return export_program(Attention().eval(), heads(length=40), config, dynamic_lengths=(16, 200), lower=None)


def long_dimensions(program):
    """How many dimensions of a tensor of the program grow with the length, at most."""
    values = (fake(node) for node in program.graph.nodes)
    return max(sum(not isinstance(size, int) for size in x.shape) for x in values if isinstance(x, torch.Tensor))


def test_the_steps_become_aten():
    program = lower_program(export())
    assert long_dimensions(program) == 1
    assert not any("tsa" in str(node.target) for node in program.graph.nodes)
    assert count_ops(program.graph_module, "scaled_dot_product_attention", "sort") == {
        "scaled_dot_product_attention": 1, "sort": 2,
    }  # fmt: skip


FLOORED = {"attend_lse": 1, "merge_floor": 1, "attend_floor": 0}


@pytest.mark.parametrize("budget", exhaustive_but([KeepRatio(0.5), Coverage(0.3)], KeepRatio(0.5)), ids=str)
def test_the_steps_of_a_floor_are_taken_in_one(budget):
    program = export(budget=budget, floor=Floor(5, 2))
    assert count_ops(program.graph_module, *FLOORED) == FLOORED
    joined = with_joined_floors(program)
    assert count_ops(joined.graph_module, *FLOORED) == {"attend_lse": 0, "merge_floor": 0, "attend_floor": 1}
    assert count_ops(program.graph_module, *FLOORED) == FLOORED, "the program is as it was"
    lowered = lower_program(program)
    assert not any("tsa" in str(node.target) for node in lowered.graph.nodes)
    assert count_ops(lowered.graph_module, "scaled_dot_product_attention") == {"scaled_dot_product_attention": 1}
    assert long_dimensions(lowered) == 1
    for length in (16, 40, 133):
        inputs = heads(length=length)
        expected = program.module()(*inputs)
        for other in (joined, lowered):
            torch.testing.assert_close(other.module()(*inputs), expected)


class Floored(torch.nn.Module):
    """The two steps of a floor, called with options of their own; `read` returns what is between them as well."""

    def __init__(self, scale=0.25, counted=True, read=False):
        super().__init__()
        self.scale, self.counted, self.read = scale, counted, read

    def forward(self, query, key, value, indices, count):
        rows = tsa.compress(query, key, value, indices, count)
        between = tsa.attend_lse(*rows, count, self.scale, "auto")
        counted = count if self.counted else count - 1
        out = tsa.merge_floor(query, key, value, *between, indices, counted, None, 0.25, 5, 2)
        return (out, *between) if self.read else (out,)


@pytest.mark.parametrize(
    ("options", "left"),
    [({}, {"attend_floor": 1}), ({"read": True}, {"attend_lse": 1, "attend_floor": 1})]
    + [(options, {"attend_lse": 1, "merge_floor": 1}) for options in ({"scale": 0.5}, {"counted": False})],
    ids=str,
)
def test_only_steps_that_belong_together_are_taken_in_one(options, left):
    query, key, value = heads(length=40)
    chosen = torch.rand(2, 4, 40, generator=torch.Generator().manual_seed(0)).topk(20).indices.sort().values
    inputs = (query, key, value, chosen.to(torch.int32), torch.tensor([20, 9], dtype=torch.int32))
    program = torch.export.export(Floored(**options).eval(), inputs)
    joined = with_joined_floors(program)
    assert count_ops(joined.graph_module, *FLOORED) == {**dict.fromkeys(FLOORED, 0), **left}
    with torch.no_grad():
        torch.testing.assert_close(joined.module()(*inputs), program.module()(*inputs))
        torch.testing.assert_close(lower_program(program).module()(*inputs)[0], program.module()(*inputs)[0])


@pytest.fixture
def foreign():
    """A kernel as a third party registers it."""
    kernel = AttentionKernel("foreign", run=lambda q, k, v, scale: q, supports=lambda request: None, priority=-99)
    yield register(kernel).name
    if "foreign" in names():
        unregister("foreign")


REFUSED = [
    ("flashprefill", "it leaves attention out, as its selector says"),
    ("foreign", "it is no part of this package"),
    ("gone", "it is not registered here"),
]


@pytest.mark.parametrize(("kernel", "why"), REFUSED)
def test_a_kernel_without_a_form_is_refused_by_layer(kernel, why, foreign):
    name = foreign if kernel == "gone" else kernel
    config = TSAConfig(budget=KeepRatio(0.5), window=4, min_tokens=3, layers=("layers.1",), kernel=name, floor=None)
    program = export_program(Stack(2).eval(), heads(length=40), config, dynamic_lengths=(16, 200))
    if kernel == "gone":
        unregister(foreign)
    with pytest.raises(
        ConfigError, match=rf"^layers\.1: kernel='{name}' has no form for lower='aten': {why}.*'sdpa'.*lower=None"
    ):
        lower_program(program)


def test_the_packages_own_causal_kernels_are_lowered():
    lower_program(export(kernel="sdpa"))


def specialised(scores, count, capacity):
    """A form of tsa.select for one length."""
    assert scores.shape[2] == 40
    return torch.zeros(*scores.shape[:2], capacity, dtype=torch.int32)


@pytest.mark.parametrize("floor", exhaustive_but([None, Floor(5, 2)], None), ids=str)
def test_an_answer_that_does_not_hold_for_all_lengths_is_refused_each_time(floor, monkeypatch):
    """Also behind a trace of torch's own that got the same answer; and the program is as it was."""
    program, select = export(floor=floor), tsa.select.default
    for form in ("aten", "standard"):
        monkeypatch.setitem(FORMS[form], select, specialised)
    program.run_decompositions({select: specialised})
    for lower in (lower_program, lower_program, tsa_onnx.to_portable, lower_program):
        with pytest.raises(RewriteError, match="would hold for some lengths alone"):
            lower(program)
    monkeypatch.undo()
    for lowered in (lower_program(program), tsa_onnx.to_portable(program)):
        torch.testing.assert_close(lowered.module()(*heads(length=77)), program.module()(*heads(length=77)))


@pytest.mark.parametrize("floor", exhaustive_but([None, Floor(5, 2)], None), ids=str)
def test_a_range_that_begins_below_the_window_is_lowered_in_any_order(floor):
    """The program's own guards hold min(8, length), and Python's min() asked whether the length is at least 8."""
    config = TSAConfig(KeepRatio(0.4), 8, floor, min_tokens=3, min_length=1, layers=(0,))
    program, aten = (
        export_program(Attention().eval(), heads(length=40), config, dynamic_lengths=(2, 90), lower=lower)
        for lower in (None, "aten")
    )
    forms = [aten, lower_program(program), tsa_onnx.to_portable(program), lower_program(program)]
    for inputs in (heads(length=length) for length in (2, 5, 8, 31)):
        for lowered in forms:
            torch.testing.assert_close(lowered.module()(*inputs), program.module()(*inputs))


class Chosen(torch.nn.Module):
    """Has a size that depends on data, which each trace gives a symbol of its own."""

    def forward(self, x):
        return torch.nn.functional.silu(x[x[:, 0].nonzero()[:, 0]]) * x.shape[0]


def test_sizes_that_depend_on_data_stay_known():
    x = torch.eye(6)[:, :3]
    program = torch.export.export(Chosen().eval(), (x,), dynamic_shapes=({0: torch.export.Dim("length", min=2, max=64)},))
    again = lower_program(lower_program(program))
    torch.testing.assert_close(again.module()(x[:4]), Chosen()(x[:4]))


class Whole(torch.nn.Module):
    """A layer that is not opened."""

    def __init__(self, static_cache):
        super().__init__()
        self.static_cache = static_cache

    def forward(self, query, key, value):
        options = (0.25, 4, 7, None, 0.5, 3, None, False, "auto")
        if not self.static_cache:
            return tsa.sparse_attention(query, key, value, *options)
        positions = torch.arange(query.shape[2])
        return tsa.filled_sparse_attention(query, key, value, None, None, positions, tsa.filled(positions), *options)


@pytest.mark.parametrize("static_cache, why", [(False, "Decompose was left out"), (True, "into a static cache")])
def test_a_layer_that_is_one_op_still_has_no_form(static_cache, why, tmp_path):
    program = torch.export.export(Whole(static_cache), heads(length=40))
    with pytest.raises(ConfigError, match=rf"has no form for lower='aten': .*{why}"):
        lower_program(program)
    pytest.importorskip("onnxscript")
    for domain in (None, "tsa"):
        with pytest.raises(ConfigError, match=rf"has no form for ONNX: .*{why}"):
            tsa_onnx.save(program, tmp_path / "model.onnx", domain=domain)
