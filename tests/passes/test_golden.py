"""Whole graphs before and after the passes, and what both compute.

The expected graphs are rewritten by `EXPECTTEST_ACCEPT=1 pytest tests/passes/test_golden.py`; read the difference.
"""

# ruff: noqa: E501  (a node is a line)

import re

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from tsa_compile.config import Coverage, Floor, KeepRatio
from tsa_compile.kernels import reference
from tsa_compile.pipeline import run_passes
from tsa_compile.reasons import Decision, Reason
from tsa_compile.testing import count_ops, graph_text, widest_elements

from .support import (
    EXACT,
    SPARSE,
    B,
    D,
    H,
    Rewritten,
    calls,
    causal,
    causal_attention,
    inputs,
    merge_heads,
    padded_attention,
    padding,
    written_out,
)

pytestmark = pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse")


def windowed(q, k, v, pad):
    i = torch.arange(q.shape[2])
    mask = (i <= i[:, None]) & (i > i[:, None] - 5) & (pad != 0)[:, None, None]
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))


class TestDense:
    def test_causal(self):
        rewritten = Rewritten(causal_attention, *inputs(), config=EXACT)
        assert_expected_inline(
            graph_text(rewritten.before),
            """\
l_q_: float32[2, 4, 12, 8]
l_k_: float32[2, 2, 12, 8]
l_v_: float32[2, 2, 12, 8]
positions: int64[12] = arange(12)
getitem: int64[1, 12] = getitem(positions, (None, :))
getitem_1: int64[12, 1] = getitem(positions, (:, None))
mask: bool[12, 12] = le(getitem, getitem_1)
getitem_2: float32[2, 2, 1, 12, 8] = getitem(l_k_, (:, :, None))
expand: float32[2, 2, 2, 12, 8] = expand(getitem_2, 2, 2, 2, -1, 8)
reshape: float32[2, 4, 12, 8] = reshape(expand, 2, 4, -1, 8)
getitem_3: float32[2, 2, 1, 12, 8] = getitem(l_v_, (:, :, None))
expand_1: float32[2, 2, 2, 12, 8] = expand(getitem_3, 2, 2, 2, -1, 8)
reshape_1: float32[2, 4, 12, 8] = reshape(expand_1, 2, 4, -1, 8)
scaled_dot_product_attention: float32[2, 4, 12, 8] = scaled_dot_product_attention(l_q_, reshape, reshape_1, attn_mask=mask)
transpose: float32[2, 12, 4, 8] = transpose(scaled_dot_product_attention, 1, 2)
reshape_2: float32[2, 12, 32] = reshape(transpose, 2, -1, 32)
return (reshape_2)""",
        )
        assert_expected_inline(
            graph_text(rewritten.after),
            """\
l_q_: float32[2, 4, 12, 8]
l_k_: float32[2, 2, 12, 8]
l_v_: float32[2, 2, 12, 8]
scaled_dot_product_attention_1: float32[2, 4, 12, 8] = scaled_dot_product_attention(l_q_, l_k_, l_v_, is_causal=True, scale=0.353553, enable_gqa=True)
transpose: float32[2, 12, 4, 8] = transpose(scaled_dot_product_attention_1, 1, 2)
reshape_2: float32[2, 12, 32] = reshape(transpose, 2, -1, 32)
return (reshape_2)""",
        )
        rewritten.check_same()

    def test_causal_and_padding(self):
        rewritten = Rewritten(padded_attention, *inputs(), padding(), config=EXACT)
        assert_expected_inline(
            calls(rewritten.before),
            """\
positions: int64[12] = arange(12)
getitem: int64[1, 12] = getitem(positions, (None, :))
getitem_1: int64[12, 1] = getitem(positions, (:, None))
le: bool[12, 12] = le(getitem, getitem_1)
bool_1: bool[2, 12] = bool(l_pad_)
getitem_2: bool[2, 1, 1, 12] = getitem(bool_1, (:, None, None, :))
mask: bool[2, 1, 12, 12] = and(le, getitem_2)
scaled_dot_product_attention: float32[2, 4, 12, 8] = scaled_dot_product_attention(l_q_, l_k_, l_v_, attn_mask=mask, enable_gqa=True)""",
        )
        assert_expected_inline(
            calls(rewritten.after),
            """\
eq: bool[2, 12] = eq(l_pad_, 0)
logical_not: bool[2, 12] = not(eq)
expand: bool[2, 12] = expand(logical_not, 2, 12)
valid_ranges_default: int64[2, 3] = valid_ranges(expand)
padded_attention_default: float32[2, 4, 12, 8] = padded_attention(l_q_, l_k_, l_v_, expand, valid_ranges_default, 0.353553, False)""",
        )
        rewritten.check_same()

    def test_window_and_padding(self):
        rewritten = Rewritten(windowed, *inputs(), padding(), config=EXACT)
        assert_expected_inline(
            calls(rewritten.before),
            """\
i: int64[12] = arange(12)
getitem: int64[12, 1] = getitem(i, (:, None))
le: bool[12, 12] = le(i, getitem)
getitem_1: int64[12, 1] = getitem(i, (:, None))
sub: int64[12, 1] = sub(getitem_1, 5)
gt: bool[12, 12] = gt(i, sub)
and_: bool[12, 12] = and(le, gt)
ne: bool[2, 12] = ne(l_pad_, 0)
getitem_2: bool[2, 1, 1, 12] = getitem(ne, (:, None, None))
mask: bool[2, 1, 12, 12] = and(and_, getitem_2)
scaled_dot_product_attention: float32[2, 4, 12, 8] = scaled_dot_product_attention(l_q_, l_k_, l_v_, attn_mask=mask, enable_gqa=True)""",
        )
        assert_expected_inline(
            calls(rewritten.after),
            """\
eq: bool[2, 12] = eq(l_pad_, 0)
logical_not: bool[2, 12] = not(eq)
expand: bool[2, 12] = expand(logical_not, 2, 12)
valid_ranges_default: int64[2, 3] = valid_ranges(expand)
padded_sliding_attention_default: float32[2, 4, 12, 8] = padded_sliding_attention(l_q_, l_k_, l_v_, expand, valid_ranges_default, 0.353553, 5, False)""",
        )
        rewritten.check_same()

    def test_written_out(self):
        rewritten = Rewritten(written_out, *inputs(), padding(), config=EXACT)
        assert_expected_inline(
            calls(rewritten.before),
            """\
positions: int64[12] = arange(12)
getitem: int64[1, 12] = getitem(positions, (None, :))
getitem_1: int64[12, 1] = getitem(positions, (:, None))
le: bool[12, 12] = le(getitem, getitem_1)
bool_1: bool[2, 12] = bool(l_pad_)
getitem_2: bool[2, 1, 1, 12] = getitem(bool_1, (:, None, None, :))
mask: bool[2, 1, 12, 12] = and(le, getitem_2)
bias: float32[2, 1, 12, 12] = where(mask, 0, -3.40282e+38)
getitem_3: float32[2, 2, 1, 12, 8] = getitem(l_k_, (:, :, None))
expand: float32[2, 2, 2, 12, 8] = expand(getitem_3, 2, 2, 2, -1, 8)
reshape: float32[2, 4, 12, 8] = reshape(expand, 2, 4, -1, 8)
transpose: float32[2, 4, 8, 12] = transpose(reshape, 2, 3)
matmul: float32[2, 4, 12, 12] = matmul(l_q_, transpose)
mul: float32[2, 4, 12, 12] = mul(matmul, 0.5)
scores: float32[2, 4, 12, 12] = add(mul, bias)
softmax: float32[2, 4, 12, 12] = softmax(scores, dim=-1, dtype=torch.float32)
to: float32[2, 4, 12, 12] = to(softmax, torch.float32)
getitem_4: float32[2, 2, 1, 12, 8] = getitem(l_v_, (:, :, None))
expand_1: float32[2, 2, 2, 12, 8] = expand(getitem_4, 2, 2, 2, -1, 8)
reshape_1: float32[2, 4, 12, 8] = reshape(expand_1, 2, 4, -1, 8)
matmul_1: float32[2, 4, 12, 8] = matmul(to, reshape_1)""",
        )
        assert_expected_inline(
            calls(rewritten.after),
            """\
eq: bool[2, 12] = eq(l_pad_, 0)
logical_not: bool[2, 12] = not(eq)
expand_2: bool[2, 12] = expand(logical_not, 2, 12)
valid_ranges_default: int64[2, 3] = valid_ranges(expand_2)
padded_attention_default: float32[2, 4, 12, 8] = padded_attention(l_q_, l_k_, l_v_, expand_2, valid_ranges_default, 0.5, True)""",
        )
        rewritten.check_same()

    def test_two_calls_share_their_padding(self):
        def two(q, k, v, pad):
            mask = causal(q.shape[2]) & pad.bool()[:, None, None, :]
            q = q + F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))

        rewritten = Rewritten(two, *inputs(), padding(), config=EXACT)
        assert count_ops(rewritten.after, "valid_ranges", "padded_attention") == {"valid_ranges": 1, "padded_attention": 2}
        rewritten.check_same()

    def test_symbolic_length(self):
        q, k, v = inputs()
        for tensor in (q, k, v):
            torch._dynamo.mark_dynamic(tensor, 2)
        rewritten = Rewritten(causal_attention, q, k, v, config=EXACT)
        assert [row.reason for row in rewritten.report] == [Reason.NOT_SELF_ATTENTION]  # k may be longer than q
        rewritten.check_same()

    def test_exported(self):
        class Module(torch.nn.Module):
            def forward(self, q, k, v, pad):
                return padded_attention(q, k, v, pad) + causal_attention(q, k, v)

        arguments = (*inputs(), padding())
        program = torch.export.export(Module(), arguments)
        expected = program.module()(*arguments)
        run_passes(program.graph_module, EXACT)
        assert_expected_inline(
            calls(program.graph_module),
            """\
_assert_tensor_metadata_default: NoneType = _assert_tensor_metadata(pad, dtype=torch.int64, device=cpu, layout=torch.strided)
eq: bool[2, 12] = eq(pad, 0)
logical_not: bool[2, 12] = not(eq)
expand_2: bool[2, 12] = expand(logical_not, 2, 12)
valid_ranges_default: int64[2, 3] = valid_ranges(expand_2)
padded_attention_default: float32[2, 4, 12, 8] = padded_attention(q, k, v, expand_2, valid_ranges_default, 0.353553, False)
transpose: float32[2, 12, 4, 8] = transpose(padded_attention_default, 1, 2)
reshape: float32[2, 12, 32] = reshape(transpose, (2, -1, 32))
scaled_dot_product_attention_default: float32[2, 4, 12, 8] = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.353553, enable_gqa=True)
transpose_1: float32[2, 12, 4, 8] = transpose(scaled_dot_product_attention_default, 1, 2)
reshape_3: float32[2, 12, 32] = reshape(transpose_1, (2, -1, 32))
add: float32[2, 12, 32] = add(reshape, reshape_3)
return (add)""",
        )
        (actual,) = program.graph_module(*arguments)
        torch.testing.assert_close(actual, expected)


class TestSparse:
    def check_against_reference(self, rewritten, q, k, v, pad=None, **settings):
        _, actual = rewritten.outputs()
        valid = None if pad is None else pad.bool()
        expected = reference.token_sparse_attention(q, k, v, valid, window=3, pool=3, min_tokens=2, **settings)
        torch.testing.assert_close(actual, merge_heads(expected))
        if "floor_window" not in settings:
            assert (expected == 0).all(-1).any(), "nothing was dropped"

    def test_floor(self):
        config = SPARSE.replace(budget=KeepRatio(0.5), floor=Floor(2, 1))
        rewritten = Rewritten(causal_attention, *inputs(), config=config)
        assert_expected_inline(
            calls(rewritten.after),
            """\
score_default: float32[2, 4, 12] = score(l_q_, l_k_, None, 0.353553, 3, 3, mean)
select_default: int32[2, 4, 8] = select(score_default, None, 8)
compress_default: tuple = compress(l_q_, l_k_, l_v_, select_default, None)
getitem_4: float32[2, 4, 8, 8] = getitem(compress_default, 0)
getitem_5: float32[2, 4, 8, 8] = getitem(compress_default, 1)
getitem_6: float32[2, 4, 8, 8] = getitem(compress_default, 2)
attend_lse_default: tuple = attend_lse(getitem_4, getitem_5, getitem_6, None, 0.353553, auto)
getitem_7: float32[2, 4, 8, 8] = getitem(attend_lse_default, 0)
getitem_8: float32[2, 4, 8] = getitem(attend_lse_default, 1)
merge_floor_default: float32[2, 4, 12, 8] = merge_floor(l_q_, l_k_, l_v_, getitem_7, getitem_8, select_default, None, None, 0.353553, 2, 1)""",
        )
        self.check_against_reference(rewritten, *inputs(), keep_ratio=0.5, floor_window=2, floor_sinks=1)

    def test_floor_and_padding(self):
        config = SPARSE.replace(budget=KeepRatio(0.5), floor=Floor(2, 1))
        rewritten = Rewritten(padded_attention, *inputs(), padding(), config=config)
        assert_expected_inline(
            calls(rewritten.after),
            """\
eq: bool[2, 12] = eq(l_pad_, 0)
logical_not: bool[2, 12] = not(eq)
expand: bool[2, 12] = expand(logical_not, 2, 12)
score_default: float32[2, 4, 12] = score(l_q_, l_k_, expand, 0.353553, 3, 3, mean)
budget_default: int32[2] = budget(score_default, None, 0.5, 2)
select_default: int32[2, 4, 8] = select(score_default, budget_default, 8)
compress_default: tuple = compress(l_q_, l_k_, l_v_, select_default, budget_default)
getitem_3: float32[2, 4, 8, 8] = getitem(compress_default, 0)
getitem_4: float32[2, 4, 8, 8] = getitem(compress_default, 1)
getitem_5: float32[2, 4, 8, 8] = getitem(compress_default, 2)
attend_lse_default: tuple = attend_lse(getitem_3, getitem_4, getitem_5, budget_default, 0.353553, auto)
getitem_6: float32[2, 4, 8, 8] = getitem(attend_lse_default, 0)
getitem_7: float32[2, 4, 8] = getitem(attend_lse_default, 1)
merge_floor_default: float32[2, 4, 12, 8] = merge_floor(l_q_, l_k_, l_v_, getitem_6, getitem_7, select_default, budget_default, expand, 0.353553, 2, 1)""",
        )
        near = {"floor_window": 2, "floor_sinks": 1}
        self.check_against_reference(rewritten, *inputs(), padding(), keep_ratio=0.5, **near)
        rewritten = Rewritten(causal_attention, *inputs(), config=config.replace(budget=Coverage(0.3), granularity="group"))
        self.check_against_reference(rewritten, *inputs(), coverage=0.3, granularity="group", **near)

    def test_keep_ratio(self):
        config = SPARSE.replace(budget=KeepRatio(0.5))
        rewritten = Rewritten(causal_attention, *inputs(), config=config)
        assert_expected_inline(
            calls(rewritten.after),
            """\
score_default: float32[2, 4, 12] = score(l_q_, l_k_, None, 0.353553, 3, 3, mean)
select_default: int32[2, 4, 8] = select(score_default, None, 8)
compress_default: tuple = compress(l_q_, l_k_, l_v_, select_default, None)
getitem_4: float32[2, 4, 8, 8] = getitem(compress_default, 0)
getitem_5: float32[2, 4, 8, 8] = getitem(compress_default, 1)
getitem_6: float32[2, 4, 8, 8] = getitem(compress_default, 2)
attend_default: float32[2, 4, 8, 8] = attend(getitem_4, getitem_5, getitem_6, None, 0.353553, auto)
decompress_default: float32[2, 4, 12, 8] = decompress(attend_default, select_default, None, 12)""",
        )
        self.check_against_reference(rewritten, *inputs(), keep_ratio=0.5)

    def test_coverage_and_padding(self):
        config = SPARSE.replace(budget=Coverage(0.3))
        rewritten = Rewritten(padded_attention, *inputs(), padding(), config=config)
        assert_expected_inline(
            calls(rewritten.after),
            """\
eq: bool[2, 12] = eq(l_pad_, 0)
logical_not: bool[2, 12] = not(eq)
expand: bool[2, 12] = expand(logical_not, 2, 12)
score_default: float32[2, 4, 12] = score(l_q_, l_k_, expand, 0.353553, 3, 3, mean)
budget_default: int32[2] = budget(score_default, 0.3, None, 2)
select_default: int32[2, 4, 12] = select(score_default, budget_default, 12)
compress_default: tuple = compress(l_q_, l_k_, l_v_, select_default, budget_default)
getitem_3: float32[2, 4, 12, 8] = getitem(compress_default, 0)
getitem_4: float32[2, 4, 12, 8] = getitem(compress_default, 1)
getitem_5: float32[2, 4, 12, 8] = getitem(compress_default, 2)
attend_default: float32[2, 4, 12, 8] = attend(getitem_3, getitem_4, getitem_5, budget_default, 0.353553, auto)
decompress_default: float32[2, 4, 12, 8] = decompress(attend_default, select_default, budget_default, 12)""",
        )
        self.check_against_reference(rewritten, *inputs(), padding(), coverage=0.3)

    def test_groups(self):
        config = SPARSE.replace(budget=Coverage(0.3), granularity="group")
        rewritten = Rewritten(causal_attention, *inputs(), config=config)
        assert_expected_inline(
            calls(rewritten.after),
            """\
score_default: float32[2, 4, 12] = score(l_q_, l_k_, None, 0.353553, 3, 3, mean)
unflatten: float32[2, 2, 2, 12] = unflatten(score_default, 1, (2, -1))
mean: float32[2, 2, 12] = mean(unflatten, 2)
budget_default: int32[2] = budget(mean, 0.3, None, 2)
select_default: int32[2, 2, 12] = select(mean, budget_default, 12)
compress_default: tuple = compress(l_q_, l_k_, l_v_, select_default, budget_default)
getitem_4: float32[2, 4, 12, 8] = getitem(compress_default, 0)
getitem_5: float32[2, 2, 12, 8] = getitem(compress_default, 1)
getitem_6: float32[2, 2, 12, 8] = getitem(compress_default, 2)
attend_default: float32[2, 4, 12, 8] = attend(getitem_4, getitem_5, getitem_6, budget_default, 0.353553, auto)
decompress_default: float32[2, 4, 12, 8] = decompress(attend_default, select_default, budget_default, 12)""",
        )
        self.check_against_reference(rewritten, *inputs(), coverage=0.3, granularity="group")

    def test_keep_ratio_of_a_symbolic_length(self):
        q = inputs()[0]
        torch._dynamo.mark_dynamic(q, 2)

        def attention(q):
            return merge_heads(F.scaled_dot_product_attention(q, q, q, attn_mask=causal(q.shape[2])))

        rewritten = Rewritten(attention, q, config=SPARSE.replace(budget=KeepRatio(0.5)))
        assert [row.decision for row in rewritten.report] == [Decision.SPARSE]
        assert_expected_inline(
            re.sub(r"\bs\d+\b", "L", calls(rewritten.after)),
            """\
sym_size_int: SymInt = sym_size(l_q_, 2)
sym_size_int_1: SymInt = sym_size(l_q_, 2)
score_default: float32[2, 4, L] = score(l_q_, l_q_, None, 0.353553, 3, 3, mean)
sub: SymInt = sub(sym_size_int_1, 3)
mul: SymInt = mul(sub, 1)
add: SymInt = add(mul, 1)
floordiv: SymInt = floor_divide(add, 2)
sym_min: SymInt = sym_min(sub, floordiv)
add_1: SymInt = add(sym_min, 3)
select_default: int32[2, 4, Min(L - 3, ((L//2)) - 1) + 3] = select(score_default, None, add_1)
compress_default: tuple = compress(l_q_, l_q_, l_q_, select_default, None)
getitem_6: float32[2, 4, Min(L - 3, ((L//2)) - 1) + 3, 8] = getitem(compress_default, 0)
getitem_7: float32[2, 4, Min(L - 3, ((L//2)) - 1) + 3, 8] = getitem(compress_default, 1)
getitem_8: float32[2, 4, Min(L - 3, ((L//2)) - 1) + 3, 8] = getitem(compress_default, 2)
attend_default: float32[2, 4, Min(L - 3, ((L//2)) - 1) + 3, 8] = attend(getitem_6, getitem_7, getitem_8, None, 0.353553, auto)
decompress_default: float32[2, 4, L, 8] = decompress(attend_default, select_default, None, sym_size_int_1)""",
        )
        self.check_against_reference(rewritten, q, q, q, keep_ratio=0.5)
        for length in (9, 31):
            rewritten.inputs = (length, inputs(length)[0])
            self.check_against_reference(rewritten, *rewritten.inputs[1:] * 3, keep_ratio=0.5)

    def test_written_out_and_padded(self):
        config = SPARSE.replace(budget=KeepRatio(0.5))
        rewritten = Rewritten(written_out, *inputs(), padding(), config=config)
        self.check_against_reference(rewritten, *inputs(), padding(), keep_ratio=0.5, scale=0.5)

    @pytest.mark.parametrize("budget", [Coverage(0), KeepRatio(1.0)], ids=str)
    @pytest.mark.parametrize("granularity", ["head", "group"])
    def test_keep_all_is_dense(self, budget, granularity):
        config = SPARSE.replace(budget=budget, granularity=granularity)
        rewritten = Rewritten(padded_attention, *inputs(), padding(), config=config)
        assert [row.decision for row in rewritten.report] == [Decision.SPARSE]
        before, after = rewritten.outputs()
        valid = padding().bool()
        torch.testing.assert_close(after[valid], before[valid])
        assert (after[~valid] == 0).all()

    def test_capacity(self):
        config = SPARSE.replace(budget=Coverage(0.1), capacity=5)
        rewritten = Rewritten(causal_attention, *inputs(), config=config)
        self.check_against_reference(rewritten, *inputs(), coverage=0.1, capacity=5)


@pytest.mark.parametrize("config", [EXACT, SPARSE.replace(budget=KeepRatio(0.5))], ids=["dense", "sparse"])
@pytest.mark.parametrize("function", [causal_attention, padded_attention, written_out])
def test_nothing_as_wide_as_the_mask_is_left(function, config):
    length = 64
    arguments = (*inputs(length), padding(length))[: 3 if function is causal_attention else 4]
    rewritten = Rewritten(function, *arguments, config=config)
    assert widest_elements(rewritten.before) >= length * length
    assert widest_elements(rewritten.after) <= B * H * length * D


def test_running_the_passes_again_changes_nothing():
    rewritten = Rewritten(causal_attention, *inputs(), config=EXACT)
    text = graph_text(rewritten.after)
    run_passes(rewritten.after, EXACT)
    assert graph_text(rewritten.after) == text
