"""A number in each softmax's denominator: every op with `sink_logits` equals attention with a further key of no value."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.kernels import cached, padded, reference, sliding
from tsa_compile.kernels.attend import attend_lse
from tsa_compile.kernels.attend_floor import attend_floor, attend_floor_aten
from tsa_compile.kernels.floor import merge_floor, merge_floor_aten, merge_floor_triton, near_triton
from tsa_compile.kernels.forms import FORMS
from tsa_compile.kernels.padded import valid_ranges
from tsa_compile.kernels.score import score, score_aten, score_triton
from tsa_compile.kernels.sink import with_sink

from . import layers
from .layers import OPTIONS
from .support import FAULTS, PADDINGS, TOLERANCE, choose_tokens, close, damaged, make_padding, qkv

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|All-NaN slice):RuntimeWarning")

L, SCALE = 45, 0.2
operands = functools.partial(qkv, seq_len=L)
tsa = torch.ops.tsa
LAYERS = ["keep_ratio", "coverage", "group", "keep_all", "floor", "floor_coverage", "floor_group"]


def sink_of(query, dtype=None):
    """From hardly any share of the weights to almost all."""
    return torch.linspace(-4, 6, query.shape[1]).to(query.device, dtype or query.dtype)


def dense(inputs, padding, sink_logits, **options):
    wide = (tensor.cpu().double() for tensor in inputs)
    padding = None if padding is None else padding.cpu()
    return reference.padded_attention(*wide, padding, SCALE, sink_logits=sink_logits.cpu().double(), **options)


class TestDenseOps:
    @pytest.mark.parametrize("rows", [1, 7, L])
    @pytest.mark.parametrize("kind", PADDINGS)
    def test_queries_behind_a_cache(self, device, rows, kind, monkeypatch):
        monkeypatch.setattr(cached, "ROWS", 8)
        query, key, value = operands(device=device)
        inputs, padding = (query[:, :, L - rows :], key, value), make_padding(kind, 2, L, device)
        sink, wanted = sink_of(query), dense((query[:, :, L - rows :], key, value), padding, sink_of(query))
        if padding is None:
            out = [tsa.cached_attention(*inputs, SCALE, sink), cached.cached_attention_aten(*inputs, SCALE, sink)]
        else:
            masks = (padding, valid_ranges(padding))
            out = [tsa.padded_attention(*inputs, *masks, SCALE, False, sink)]
            out.append(padded.padded_attention_aten(*inputs, padding, None, SCALE, False, sink))
        for each in out:
            assert each.transpose(1, 2).is_contiguous()
            close(each.cpu(), wanted)

    @pytest.mark.parametrize("kind", [None, "left", "holes"])
    @pytest.mark.parametrize("positions", [range(20, 30), (3, 9, 9, 30)], ids=["consecutive", "any"])
    def test_a_cache_of_a_fixed_size(self, device, kind, positions):
        query, key, value = operands(device=device)
        padding, at = make_padding(kind, 2, L, device), torch.tensor([*positions], device=device)
        query = query[:, :, : len(at)]
        masks = (None, None) if padding is None else (padding, valid_ranges(padding))
        out = tsa.filled_attention(query, key, value, *masks, at, tsa.filled(at), SCALE, False, sink_of(query))
        for row, position in enumerate(at.tolist()):
            seen = (query[:, :, row : row + 1], key[:, :, : position + 1], value[:, :, : position + 1])
            wanted = dense(seen, None if padding is None else padding[:, : position + 1], sink_of(query))
            close(out[:, :, row : row + 1].cpu(), wanted)

    @pytest.mark.parametrize("window", [1, 9, 200])
    @pytest.mark.parametrize("kind", PADDINGS)
    def test_a_sliding_window(self, device, window, kind, monkeypatch):
        monkeypatch.setattr(sliding, "ROWS", 8)
        monkeypatch.setattr(sliding, "LEAST_BLOCK", 8)
        inputs, padding = operands(device=device), make_padding(kind, 2, L, device)
        sink = sink_of(inputs[0])
        wanted = dense(inputs, padding, sink, window=window)
        if padding is None:
            forms = (tsa.sliding_attention, sliding.sliding_attention_aten)
            found = [form(*inputs, SCALE, window, sink) for form in forms]
        else:
            ranges = valid_ranges(padding)
            found = (
                tsa.padded_sliding_attention(*inputs, padding, ranges, SCALE, window, False, sink),
                sliding.padded_sliding_attention_aten(*inputs, padding, None, SCALE, window, False, sink),
            )
        for each in found:
            close(each.cpu(), wanted)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("least", [float("-inf"), -3.39e38, -1e30])
    def test_a_sink_without_weight_in_a_further_key(self, dtype, least):
        inputs = operands(dtype=dtype)
        found = sliding.sliding_attention_aten(*inputs, SCALE, 5, torch.full((inputs[0].shape[1],), least))
        close(found, sliding.sliding_attention(*inputs, SCALE, 5), dtype)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
    def test_dtypes(self, device, dtype, of):
        inputs = operands(2, 8, 2, dim=64, dtype=dtype, device=device)
        sink = sink_of(inputs[0], of)
        for window in (None, 9):
            scalars = (SCALE,) if window is None else (SCALE, window)
            op = tsa.cached_attention if window is None else tsa.sliding_attention
            out = op(*inputs, *scalars, sink)
            assert out.dtype == dtype
            close(out.cpu(), dense(inputs, None, sink, window=window), dtype)


def test_the_window_kernel(triton_device):
    inputs = operands(device=triton_device, value_dim=48)
    sink = sink_of(inputs[0])
    close(near_triton(*inputs, SCALE, 9, sink).cpu(), dense(inputs, None, sink, window=9))


def test_a_sink_of_any_size_takes_its_share(triton_device):
    inputs = operands(device=triton_device)
    for size in (-1e4, -80.0, 0.0, 80.0, 1e4):
        sink = torch.full((4,), size, device=triton_device)
        out = near_triton(*inputs, SCALE, 9, sink).cpu()
        close(out, dense(inputs, None, sink, window=9))
        assert size < 1e4 or not out.any()


class TestScores:
    @pytest.mark.parametrize("reduce", ["mean", "max"])
    @pytest.mark.parametrize("kind", [None, "left", "holes", "none valid"])
    def test_every_form_equals_the_reference(self, triton_device, reduce, kind):
        query, key, _ = operands(device=triton_device)
        padding, sink = make_padding(kind, 2, L, triton_device), sink_of(query)
        there = None if padding is None else padding.cpu()
        wanted = reference.score(
            query.cpu().double(), key.cpu().double(), there, SCALE, 9, 3, reduce, sink_logits=sink.cpu()
        )
        for form in (score_triton, score_aten, score):
            close(form(query, key, padding, SCALE, 9, 3, reduce, sink).cpu(), wanted)

    @pytest.mark.parametrize("fault", FAULTS)
    def test_faulty_numbers(self, fault):
        query, key, _ = qkv(1, seq_len=90)
        query, key = damaged(fault, query, key)
        sink = sink_of(query)
        wanted = reference.score(query.double(), key.double(), None, SCALE, 20, 7, sink_logits=sink)
        for form in (score_triton, score_aten):
            close(form(query, key, None, SCALE, 20, 7, "mean", sink), wanted, equal_nan=True)


class TestTheFloor:
    def wanted(self, inputs, padding, indices, count, sink, window=6, sinks=2):
        heads, seq_len = inputs[0].shape[1:3]
        chosen = reference.is_selected(indices.cpu(), count.cpu(), heads, seq_len)
        mask = reference.floor_mask(None if padding is None else padding.cpu(), chosen, window, sinks)
        wide = (tensor.cpu().double() for tensor in inputs)
        return reference.attention_under(mask, *wide, SCALE, sink.cpu().double())

    @pytest.mark.parametrize("kind", [None, "left", "right"])
    def test_every_form_equals_dense_attention_under_the_mask(self, triton_device, kind):
        inputs, padding = operands(device=triton_device), make_padding(kind, 2, L, triton_device)
        sink, (indices, count) = sink_of(inputs[0]), choose_tokens([7, 5], 4, 15, 9, triton_device)
        indices += 15  # valid under every padding here
        rows = reference.compress(*inputs, indices, count)
        out, lse = attend_lse(*rows, count, SCALE, "auto")
        arguments = (*inputs, out, lse, indices, count, padding, SCALE, 6, 2, sink)
        wanted = self.wanted(inputs, padding, indices, count, sink)
        for form in (merge_floor_triton, merge_floor_aten, merge_floor):
            close(form(*arguments).cpu(), wanted)
        joined = (*inputs, *rows, indices, count, padding, SCALE, "auto", 6, 2, sink)
        for form in (attend_floor, attend_floor_aten):
            close(form(*joined).cpu(), wanted)


class TestTheWholeLayer:
    def expected(self, inputs, padding, options, sink):
        return layers.expected(*inputs, padding, options, sink_logits=sink.cpu().double())

    @pytest.mark.parametrize(
        "name", ["keep_ratio", "coverage", "group", "keep_all", "floor", "floor_coverage", "floor_group"]
    )
    @pytest.mark.parametrize("kind", [None, "all valid", "left", "holes"])
    @pytest.mark.parametrize("rows", [50, 24])
    def test_equals_the_reference_layer(self, device, name, kind, rows):
        query, key, value = qkv(3, 4, 2, 50, 32, 48, device=device)
        inputs, options, sink = (query[:, :, 50 - rows :], key, value), OPTIONS[name], sink_of(query)
        scalars, padding = options.arguments(), make_padding(kind, 3, 50, device)
        if padding is None:
            out = tsa.sparse_attention(*inputs, *scalars, sink_logits=sink)
        else:
            out = tsa.padded_sparse_attention(*inputs, padding, valid_ranges(padding), *scalars, sink_logits=sink)
        close(out.cpu(), self.expected(inputs, None if padding is None else padding.cpu(), options, sink))

    @pytest.mark.parametrize("name", ["keep_ratio", "floor", "floor_coverage", "keep_all"])
    @pytest.mark.parametrize("kind", [None, "left"])
    def test_launched_steps(self, triton_device, name, kind, monkeypatch):
        from tsa_compile.kernels import fused

        monkeypatch.setattr(fused, "STREAM_BYTES", 1)  # a key head at a time, and each with its own part of the sink
        inputs, options = qkv(3, 4, 2, 50, 32, 32, device=triton_device), OPTIONS[name]
        sink, padding = sink_of(inputs[0]), make_padding(kind, 3, 50, triton_device)
        if padding is None:
            out = fused.sparse_triton(*inputs, options, sink)
        else:
            out = fused.padded_sparse_triton(*inputs, padding, valid_ranges(padding), options, sink)
        close(out.cpu(), self.expected(inputs, None if padding is None else padding.cpu(), options, sink))

    @pytest.mark.parametrize("name", ["keep_ratio", "floor"])
    def test_a_cache_of_a_fixed_size(self, device, name):
        query, key, value = qkv(3, 4, 2, 50, 32, 32, device=device)
        at, sink = torch.arange(10, 40, device=device), sink_of(query)
        query = query[:, :, :30]
        ops = (None, None, at, tsa.filled(at), *OPTIONS[name].arguments())
        out = tsa.filled_sparse_attention(query, key, value, *ops, sink_logits=sink)
        close(out.cpu(), self.expected((query, key[:, :, :40], value[:, :, :40]), None, OPTIONS[name], sink))


@given(st.integers(1, 60), st.sampled_from(PADDINGS), st.floats(-20, 20))
@settings(max_examples=25)
def test_it_is_a_further_key_without_a_value(length, kind, size):
    """The definition, with a head of one more number: the further key's logit is the sink, its value is 0."""
    query, key, value = qkv(2, 2, 2, length, dim=8)
    padding, sink = make_padding(kind, 2, length), torch.tensor([size, -size])
    masks = padding if padding is not None else torch.ones(2, length, dtype=torch.bool)
    further = torch.cat((query, (sink / SCALE)[None, :, None, None].expand(2, 2, length, 1)), 3)
    key_of_it = torch.cat((torch.zeros(2, 2, 1, 8), torch.ones(2, 2, 1, 1)), 3)
    keys = torch.cat((key_of_it, torch.cat((key, torch.zeros(2, 2, length, 1)), 3)), 2)
    values = torch.cat((torch.zeros(2, 2, 1, 8), value), 2)
    allowed = torch.cat((torch.ones(2, 1, dtype=torch.bool), masks), 1)
    wanted = reference.padded_attention(further.double(), keys.double(), values.double(), allowed, SCALE)
    close(tsa.padded_attention(query, key, value, masks, valid_ranges(masks), SCALE, False, sink), wanted)


def test_rows_of_few_weights_keep_their_type_and_layout():
    out = torch.randn(1, 5, 2, 8, dtype=torch.bfloat16).transpose(1, 2)
    scaled = with_sink(out, torch.zeros(1, 2, 5), torch.zeros(2))
    assert scaled.dtype == torch.bfloat16 and scaled.stride() == out.stride()
    close(scaled, out / 2, torch.bfloat16)


OPS = [
    "sliding_attention", "padded_sliding_attention", "cached_attention", "padded_attention", "filled_attention", "attend",
    "score", "sparse_attention", "padded_sparse_attention",
]  # fmt: skip


def arguments_of(name, device="cpu"):
    """What an op takes besides a sink."""
    inputs, padding, at = operands(device=device), make_padding("left", 2, L, device), torch.arange(L, device=device)
    masks, layer = (padding, valid_ranges(padding)), OPTIONS["floor"].arguments()
    others = {
        "sliding_attention": (SCALE, 9), "padded_sliding_attention": (*masks, SCALE, 9, False),
        "cached_attention": (SCALE,), "padded_attention": (*masks, SCALE, False), "attend": (None, SCALE, "auto"),
        "filled_attention": (*masks, at, tsa.filled(at), SCALE, False), "score": (None, SCALE, 9, 3),
        "sparse_attention": layer, "padded_sparse_attention": (*masks, *layer),
    }[name]  # fmt: skip
    return *(inputs[:2] if name == "score" else inputs), *others


@pytest.mark.parametrize("name", OPS)
def test_opcheck(device, name):
    arguments = arguments_of(name, device)
    torch.library.opcheck(getattr(tsa, name).default, arguments, {"sink_logits": sink_of(arguments[0])})


@pytest.mark.parametrize("name", OPS)
def test_what_does_not_fit_is_refused(name):
    for wrong in (torch.zeros(3), torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4)):
        with pytest.raises(ValueError, match=rf"tsa::{name}: sink_logits .* for 4 heads; expected floating point \[4\]"):
            getattr(tsa, name)(*arguments_of(name), sink_logits=wrong)


def test_every_form_takes_a_sink():
    for table in FORMS.values():
        for op, form in table.items():
            if "sink_logits" in str(op._schema):
                schema = getattr(form, "_schema", None)
                names = str(schema) if schema is not None else form.__code__.co_varnames
                assert "sink_logits" in names, op
