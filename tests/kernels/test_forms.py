"""The forms of every op against the oracle: the same selections, ties, padding and groups.

The triton_ops compute what the opaque ops compute; that a compiler can open them is shown in tests/export.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.kernels import reference
from tsa_compile.kernels.forms import FORMS
from tsa_compile.kernels.launch import HAS_TRITON
from tsa_compile.kernels.padded import padded_attention, valid_ranges
from tsa_compile.kernels.select import select_by_bisection, select_by_sorting

from ..support import without_interpreter
from .support import FAULTS, damaged, qkv

tsa = torch.ops.tsa
SCALE = 0.25
STANDARD, TRITON = ({str(op).split(".")[1]: form for op, form in FORMS[name].items()} for name in ("standard", "triton"))


def make_scores(kind, batch=2, heads=3, seq_len=151, window=5):
    """What tsa::score hands over: candidates, +inf in the window, -inf where padded."""
    torch.manual_seed(0)
    scores = torch.rand(batch, heads, seq_len)
    if kind == "denormal":
        scores = 10.0 ** (-45 + 10 * scores)
    elif kind == "every exponent":
        scores = 2.0 ** (276 * scores - 149)
    elif kind == "few values":
        scores = (scores * 4).floor() / 4
    elif kind == "neighbours":
        scores = 0.1 + (scores * 8).floor() * 2.0**-27  # adjacent floats
    elif kind == "signed zeros":
        scores = torch.where(scores < 0.5, 0.0, -0.0)
    elif kind == "faulty":
        scores[0, 0] = math.nan
        scores[1, 1:, 4::9] = -math.nan
    scores[..., seq_len - window :] = math.inf
    if kind == "padded":
        scores[0, :, : seq_len // 3] = -math.inf
        scores[-1, :, 3::2] = -math.inf
    elif kind == "nothing valid":
        scores[0] = -math.inf
    return scores


KINDS = ["smooth", "denormal", "every exponent", "few values", "neighbours", "signed zeros", "padded", "nothing valid"]
KINDS += ["faulty"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count, capacity", [(None, 60), ([60, 3], 151), ([0, 151], 151), ([200, 1], 170), ([9, 80], 40)])
def test_select_equals_reference(kind, count, capacity):
    scores = make_scores(kind)
    count = None if count is None else torch.tensor(count, dtype=torch.int32)
    assert torch.equal(select_by_bisection(scores, count, capacity), reference.select(scores, count, capacity))


def test_select_where_denormal_numbers_are_flushed():
    scores = make_scores("denormal")
    count = torch.tensor([70, 20], dtype=torch.int32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormal numbers")
    try:
        got = select_by_bisection(scores, count, 80)
    finally:
        torch.set_flush_denormal(False)
    flushed = torch.where(scores < 2.0**-126, 0.0, scores)
    assert torch.equal(got, reference.select(flushed, count, 80))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, math.inf, width=32), min_size=1, max_size=30), st.integers(0, 35))
def test_select_any_scores(values, capacity):
    scores = torch.tensor(values)[None, None]
    assert torch.equal(select_by_bisection(scores, None, capacity), select_by_sorting(scores, None, capacity))


@pytest.mark.parametrize(
    "budget", [(None, 0.3, 4), (None, 0.675, 40), (None, 0.0, 4), *((tau, None, 4) for tau in (0.05, 0.4, 0.0))]
)
@pytest.mark.parametrize("kind", ["smooth", "few values", "padded", "nothing valid", "faulty"])
def test_budget(kind, budget):
    scores = make_scores(kind)
    got = STANDARD["budget"](scores, *budget)
    assert torch.equal(got, torch.ops.tsa.budget(scores, *budget)) and got.dtype == torch.int32
    assert torch.equal(got, reference.budget(scores, *budget))


@pytest.mark.parametrize("coverage", [1e-6, 0.05, 0.4, 0.999])
@pytest.mark.parametrize("kind", ["smooth", "denormal", "few values", "padded", "nothing valid", "faulty"])
def test_budget_where_float64_is_float32(kind, coverage, monkeypatch):
    scores = make_scores(kind)
    want = reference.budget(scores, coverage, None, 4)
    monkeypatch.setattr(torch, "float64", torch.float32)
    # Its sums may tip one token at the crossing.
    assert (STANDARD["budget"](scores, coverage, None, 4) - want).abs().max() <= 1


def paddings(batch, seq_len):
    """None, left, right, scattered with an item that is all padding."""
    left, right = torch.ones(2, batch, seq_len, dtype=torch.bool)
    left[0, : seq_len // 3] = False
    right[-1, seq_len - 7 :] = False
    apart = torch.rand(batch, seq_len, generator=torch.Generator().manual_seed(0)) < 0.6
    apart[0] = False
    return {"none": None, "left": left, "right": right, "apart": apart}


@pytest.mark.parametrize("padding", ["none", "left", "right", "apart"])
@pytest.mark.parametrize("seq_len, window", [(61, 8), (61, 40), (5, 8)])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_score(padding, seq_len, window, reduce):
    query, key, _ = qkv(2, 4, 2, seq_len, 16, 24)
    padding = paddings(2, seq_len)[padding]
    got = STANDARD["score"](query, key, padding, 0.25, window, 7, reduce)
    torch.testing.assert_close(got, reference.score(query, key, padding, 0.25, window, 7, reduce), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("padding", ["none", "left", "right", "apart"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("window", [8, 40])
def test_score_with_faulty_numbers(padding, fault, window):
    query, key = damaged(fault, *qkv(2, 4, 2, 61, 16, 24)[:2], window=8)
    padding = paddings(2, 61)[padding]
    want = reference.score(query, key, padding, 0.25, window, 7)
    got = STANDARD["score"](query, key, padding, 0.25, window, 7)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("padding", ["none", "left", "right", "apart"])
@pytest.mark.parametrize("granularity", ["head", "group"])
def test_layer(padding, granularity):
    query, key, value = qkv(2, 4, 2, 61, 16, 24)
    padding = paddings(2, 61)[padding]
    scores = STANDARD["score"](query, key, padding, 0.25, 4, 7)
    if granularity == "group":
        scores = scores.unflatten(1, (2, -1)).mean(2)
    count = STANDARD["budget"](scores, None, 0.5, 3)
    indices = select_by_bisection(scores, count, 40)
    rows = STANDARD["compress"](query, key, value, indices, count)
    for got, expected in zip(rows, reference.compress(query, key, value, indices, count)):
        assert torch.equal(got, expected)
    out = STANDARD["decompress"](STANDARD["attend"](*rows, count, 0.25, "auto"), indices, count, 61)
    wide = (tensor.double() for tensor in (query, key, value))
    options = {"scale": 0.25, "keep_ratio": 0.5, "window": 4, "min_tokens": 3, "granularity": granularity}
    expected = reference.token_sparse_attention(*wide, padding, **options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mean_rows", [False, True])
@pytest.mark.parametrize("padding", ["left", "right", "apart"])
def test_padded_attention(padding, mean_rows):
    inputs = qkv(2, 4, 2, 29, 16, 24)
    padding = paddings(2, 29)[padding]
    got = STANDARD["padded_attention"](*inputs, padding, STANDARD["valid_ranges"](padding), 0.25, mean_rows)
    expected = reference.padded_attention(*inputs, padding, 0.25, mean_rows)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def make_padded(device, length=70):
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[0, :9] = False
    padding[1, 20:22] = False
    padding[1, -5:] = False
    return *qkv(seq_len=length, dim=16, device=device, layout="BHLD"), padding.to(device)


@pytest.mark.parametrize("budget", [(0.2, None), (None, 0.5)], ids=["coverage", "keep ratio"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_the_triton_ops(device, budget, padded):
    query, key, value, padding = make_padded(device)
    length, padding = query.shape[2], padding if padded else None
    scores = tsa.score(query, key, padding, SCALE, 4, 7)
    torch.testing.assert_close(TRITON["score"](query, key, padding, SCALE, 4, 7), scores)
    count = tsa.budget(scores, *budget, 3)
    torch.testing.assert_close(TRITON["budget"](scores, *budget, 3), count)
    indices = tsa.select(scores, count, length)
    assert torch.equal(TRITON["select"](scores, count, length), indices)
    rows = tsa.compress(query, key, value, indices, count)
    opened = TRITON["compress"](query, key, value, indices, count)
    out = TRITON["attend"](*opened, count, SCALE, "auto")
    out = TRITON["decompress"](out, indices, count, length)
    expected = tsa.decompress(tsa.attend(*rows, count, SCALE, "auto"), indices, count, length)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert out.stride() == expected.stride()
    near = (indices, count, padding, SCALE, 9, 2)
    out = TRITON["merge_floor"](query, key, value, *TRITON["attend_lse"](*opened, count, SCALE, "auto"), *near)
    expected = tsa.merge_floor(query, key, value, *tsa.attend_lse(*rows, count, SCALE, "auto"), *near)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert out.stride() == expected.stride()


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_padded_attention_at_valid_tokens(device):
    query, key, value, padding = make_padded(device)
    expected = padded_attention(query, key, value, padding, valid_ranges(padding), SCALE, True)
    actual = TRITON["padded_attention"](query, key, value, padding, None, SCALE, True)
    torch.testing.assert_close(actual, expected.masked_fill(~padding[:, None, :, None], 0), rtol=1e-4, atol=1e-4)
    assert actual.stride() == expected.stride()


@pytest.mark.exhaustive
def test_inductor_finds_all_that_a_kernel_names():
    """It copies a kernel's functions and constants into a CUDA package, and leaves everything else out, classes too."""
    printed = without_interpreter(
        """
        import ast, builtins
        from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as closure
        from tsa_compile.kernels import budget, compress, decompress, flash, floor, score, select
        from tsa_compile.kernels.launch import triton

        for module in (budget, compress, decompress, flash, floor, score, select):
            for name, kernel in vars(module).items():
                if not isinstance(kernel, triton.JITFunction) or not name.endswith("_kernel"):
                    continue
                tree = ast.parse(closure(kernel))
                names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
                known = {"tl", "triton", *vars(builtins)}
                known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
                known |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
                known |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
                print(name, *sorted({node.id for node in names} - known))
        """
    )
    lines = printed.splitlines()
    assert len(lines) >= 10 and all(" " not in line for line in lines)
