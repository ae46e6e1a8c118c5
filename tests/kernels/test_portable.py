"""The ops in portable operators against the oracle: the same selections, ties, padding and groups."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.kernels import portable, reference
from tsa_compile.kernels.budget import budget_aten
from tsa_compile.kernels.select import select_aten

from .test_score import FAULTS, damaged


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
    assert torch.equal(portable.select(scores, count, capacity), reference.select(scores, count, capacity))


def test_select_where_denormal_numbers_are_flushed():
    scores = make_scores("denormal")
    count = torch.tensor([70, 20], dtype=torch.int32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormal numbers")
    try:
        got = portable.select(scores, count, 80)
    finally:
        torch.set_flush_denormal(False)
    flushed = torch.where(scores < 2.0**-126, 0.0, scores)
    assert torch.equal(got, reference.select(flushed, count, 80))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, math.inf, width=32), min_size=1, max_size=30), st.integers(0, 35))
def test_select_any_scores(values, capacity):
    scores = torch.tensor(values)[None, None]
    assert torch.equal(portable.select(scores, None, capacity), select_aten(scores, None, capacity))


@pytest.mark.parametrize("budget", [(None, 0.3, 4), (None, 0.675, 40), (0.05, None, 4), (0.4, None, 4), (0.0, None, 4)])
@pytest.mark.parametrize("kind", ["smooth", "few values", "padded", "nothing valid", "faulty"])
def test_budget(kind, budget):
    scores = make_scores(kind)
    got = portable.budget(scores, *budget)
    assert got.dtype == torch.int32
    # float32 masses, where the oracle has float64 ones, may tip one token at the crossing.
    assert (got - budget_aten(scores, *budget)).abs().max() <= (1 if budget[0] else 0)


def make(batch, kv_heads, group, seq_len, dim=16, value_dim=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (kv_heads * group, dim), (kv_heads, dim), (kv_heads, value_dim)
    tensors = (torch.randn(batch, seq_len, heads, size, generator=generator) for heads, size in sizes)
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


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
def test_score(padding, seq_len, window):
    query, key, _ = make(2, 2, 2, seq_len)
    padding = paddings(2, seq_len)[padding]
    got = portable.score(query, key, padding, 0.25, window, 7)
    torch.testing.assert_close(got, reference.score(query, key, padding, 0.25, window, 7), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("padding", ["none", "left", "right", "apart"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("window", [8, 40])
def test_score_with_faulty_numbers(padding, fault, window):
    query, key = damaged(fault, *make(2, 2, 2, 61)[:2], window=8)
    padding = paddings(2, 61)[padding]
    want = reference.score(query, key, padding, 0.25, window, 7)
    got = portable.score(query, key, padding, 0.25, window, 7)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("padding", ["none", "left", "right", "apart"])
@pytest.mark.parametrize("granularity", ["head", "group"])
def test_layer(padding, granularity):
    query, key, value = make(2, 2, 2, 61)
    padding = paddings(2, 61)[padding]
    scores = portable.score(query, key, padding, 0.25, 4, 7)
    if granularity == "group":
        scores = scores.unflatten(1, (2, -1)).mean(2)
    count = portable.budget(scores, None, 0.5, 3)
    indices = portable.select(scores, count, 40)
    rows = portable.compress(query, key, value, indices, count)
    for got, expected in zip(rows, reference.compress(query, key, value, indices, count)):
        assert torch.equal(got, expected)
    out = portable.decompress(portable.attend(*rows, count, 0.25, "auto"), indices, count, 61)
    wide = (tensor.double() for tensor in (query, key, value))
    options = {"scale": 0.25, "keep_ratio": 0.5, "window": 4, "min_tokens": 3, "granularity": granularity}
    expected = reference.token_sparse_attention(*wide, padding, **options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mean_rows", [False, True])
@pytest.mark.parametrize("padding", ["left", "right", "apart"])
def test_padded_attention(padding, mean_rows):
    inputs = make(2, 2, 2, 29)
    padding = paddings(2, 29)[padding]
    got = portable.padded_attention(*inputs, padding, portable.spans(padding), 0.25, mean_rows)
    expected = reference.padded_attention(*inputs, padding, 0.25, mean_rows)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
