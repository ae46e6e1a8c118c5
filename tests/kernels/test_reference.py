"""The reference against what it must mean: formulas written another way, and the method's invariants."""

import functools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tsa_compile.kernels import reference

from .support import qkv

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
seeds = st.integers(0, 2**31)
few = settings(max_examples=40)


operands = functools.partial(qkv, dim=8, value_dim=6, dtype=torch.float64)


def random_padding(seed, batch, seq_len):
    """Left, right and scattered padding, and now and then an item without a valid token."""
    generator = torch.Generator().manual_seed(seed)
    padding = torch.rand(batch, seq_len, generator=generator) < torch.rand(batch, 1, generator=generator) * 1.5
    edges = torch.randint(0, seq_len // 2, (batch, 2), generator=generator)
    positions = torch.arange(seq_len)
    return padding & (positions >= edges[:, :1]) & (positions < seq_len - edges[:, 1:])


def dense(query, key, value, allowed=None, scale=None):
    """torch's own attention; rows that may attend to no token are 0."""
    if allowed is None:
        return sdpa(query, key, value, is_causal=True, enable_gqa=True, scale=scale)
    return sdpa(query, key, value, attn_mask=allowed, enable_gqa=True, scale=scale).nan_to_num(0.0)


@few
@given(seed=seeds, window=st.integers(1, 50), pool=st.sampled_from([1, 3, 7]), padded=st.booleans())
def test_scores_are_pooled_column_means_of_the_attention_matrix(seed, window, pool, padded):
    query, key, _ = operands(seed=seed)
    padding = random_padding(seed, 2, 40) if padded else None
    scores = reference.score(query, key, padding, 0.3, window, pool)
    valid = torch.ones(2, 40, dtype=torch.bool) if padding is None else padding
    logits = 0.3 * query @ key.repeat_interleave(2, dim=1).transpose(2, 3)
    allowed = torch.ones(40, 40, dtype=torch.bool).tril() & valid[:, None, None, :]
    attention = logits.masked_fill(~allowed, -math.inf).softmax(dim=-1)
    for b in range(2):
        tokens = valid[b].nonzero().flatten()
        candidates, rows = tokens[:-window], tokens[-window:]
        raw = attention[b][:, rows][:, :, candidates].mean(dim=1) if len(rows) else torch.zeros(4, 0)
        for i, t in enumerate(candidates):
            around = raw[:, max(i - pool // 2, 0) : i + pool // 2 + 1]
            torch.testing.assert_close(scores[b, :, t], around.sum(dim=-1) / pool, **CLOSE)
        assert torch.equal(scores[b].isposinf().any(dim=0).nonzero().flatten(), rows)
        assert scores[b, :, ~valid[b]].isneginf().all()


@given(seed=seeds, coverage=st.floats(0.001, 0.999), min_tokens=st.integers(0, 60), candidates=st.integers(0, 40))
def test_coverage_drops_the_smallest_set_that_reaches_it(seed, coverage, min_tokens, candidates):
    scores = torch.full((1, 3, 45), -math.inf)
    generator = torch.Generator().manual_seed(seed)
    scores[..., :candidates] = torch.rand(3, candidates, generator=generator) ** 4
    scores[..., 42:] = math.inf
    mass = scores[0, :, :candidates].double().mean(dim=0).sort().values
    mass = mass / mass.sum()
    dropped = next((n for n in range(candidates + 1) if mass[:n].sum() >= coverage), candidates)
    # If the least token alone reaches the coverage, nothing is dropped.
    keep = candidates if dropped <= 1 else candidates - dropped
    expected = min(max(keep, min_tokens), candidates) + 3
    assert reference.budget(scores, coverage, None, min_tokens).tolist() == [expected]


@given(ratio=st.floats(0.001, 1.0), min_tokens=st.integers(0, 60), candidates=st.integers(0, 40))
def test_keep_ratio_is_exact(ratio, min_tokens, candidates):
    scores = torch.full((1, 2, 45), -math.inf)
    scores[..., :candidates], scores[..., 42:] = 0.5, math.inf
    keep = math.ceil(Fraction(str(ratio)) * candidates)
    expected = min(max(keep, min_tokens), candidates) + 3
    assert reference.budget(scores, None, ratio, min_tokens).tolist() == [expected]


def test_coverage_of_a_worked_example():
    window, pad = math.inf, -math.inf
    scores = torch.tensor([[[pad, 0.4, 0.1, 0.3, 0.2, window]], [[0.25, 0.25, 0.25, 0.25, window, window]]])
    # Ascending .1 .3 .6 1: two lie below .35, and the third crosses it. Equal quarters: .25 .5 .75 1, and one below.
    assert reference.budget(scores, 0.35, None, 0).tolist() == [2, 4]
    assert reference.budget(scores, 0.05, None, 0).tolist() == [5, 6]
    assert reference.budget(scores, 0.35, None, 3).tolist() == [4, 5]
    assert reference.budget(scores, 0.0, None, 0).tolist() == [5, 6]
    assert reference.budget(torch.full((1, 2, 4), pad), 0.5, None, 7).tolist() == [0]


def test_selection_of_a_worked_example():
    scores = torch.tensor([[[2.0, 5.0, 2.0, -math.inf, 2.0, math.inf]]])
    count = torch.tensor([4], dtype=torch.int32)
    assert reference.select(scores, count, 6).tolist() == [[[0, 1, 2, 5, 5, 5]]]
    assert reference.select(scores, None, 3).tolist() == [[[0, 1, 5]]]
    assert reference.select(scores, count, 2).tolist() == [[[1, 5]]]


@few
@given(seed=seeds, kept=st.integers(0, 40), selections=st.sampled_from([4, 2]))
def test_any_selection_is_dense_attention_restricted_to_it(seed, kept, selections):
    query, key, value = operands(seed=seed)
    count = torch.tensor([kept, 40 - kept], dtype=torch.int32)
    scores = torch.rand(2, selections, 40, generator=torch.Generator().manual_seed(seed))
    indices = reference.select(scores, count, 40)
    rows = reference.compress(query, key, value, indices, count)
    out = reference.decompress(reference.attend(*rows, count, 0.3), indices, count, 40)
    for b in range(2):
        for h in range(4):
            chosen = torch.zeros(40, dtype=torch.bool)
            chosen[indices[b, h * selections // 4, : count[b]].long()] = True
            allowed = torch.ones(40, 40, dtype=torch.bool).tril() & chosen & chosen[:, None]
            kv = slice(h // 2, h // 2 + 1)
            expected = dense(query[b : b + 1, h : h + 1], key[b : b + 1, kv], value[b : b + 1, kv], allowed, 0.3)
            torch.testing.assert_close(out[b, h], expected[0, 0], **CLOSE)
            assert (out[b, h, ~chosen] == 0).all()


@pytest.mark.parametrize("granularity", ["head", "group"])
@pytest.mark.parametrize("options", [{"coverage": 0.0}, {"keep_ratio": 1.0}, {"min_tokens": 36}, {"window": 40}])
def test_keeping_everything_is_dense_attention(options, granularity):
    query, key, value = operands()
    options = {"window": 4, "min_tokens": 0, "granularity": granularity} | options
    out = reference.token_sparse_attention(query, key, value, **options)
    torch.testing.assert_close(out, dense(query, key, value), **CLOSE)


layer_options = st.fixed_dictionaries(
    {
        "window": st.integers(1, 12),
        "min_tokens": st.integers(0, 20),
        "coverage": st.sampled_from([0.0, 0.1, 0.3, 0.6]),
        "granularity": st.sampled_from(["head", "group"]),
    }
)


@few
@given(seed=seeds, options=layer_options)
def test_a_padded_batch_equals_its_items_alone_and_unpadded(seed, options):
    query, key, value = operands(seed=seed)
    padding = random_padding(seed, 2, 40)
    poisoned = [t.masked_fill(~padding[:, None, :, None], math.nan) for t in (query, key, value)]
    out = reference.token_sparse_attention(*poisoned, padding, **options)
    for b in range(2):
        valid = padding[b]
        assert (out[b][:, ~valid] == 0).all()
        if valid.any():
            alone = [t[b : b + 1, :, valid] for t in (query, key, value)]
            expected = reference.token_sparse_attention(*alone, **options)
            torch.testing.assert_close(out[b : b + 1, :, valid], expected, **CLOSE)


@few
@given(seed=seeds, mean_rows=st.booleans())
def test_padded_attention_is_sdpa_under_its_mask(seed, mean_rows):
    query, key, value = operands(seed=seed)
    padding = random_padding(seed, 2, 40)
    allowed = torch.ones(40, 40, dtype=torch.bool).tril() & padding[:, None, None, :]
    if mean_rows:  # as models spell it: a finite number, which a fully masked row sees everywhere
        mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
        # In a partly masked row the finite number underflows to weight 0, as -inf does.
        expected = sdpa(query, key, value, attn_mask=mask, enable_gqa=True, scale=0.3)
    else:
        expected = dense(query, key, value, allowed, 0.3)
    torch.testing.assert_close(
        reference.padded_attention(query, key, value, padding, 0.3, mean_rows), expected, rtol=1e-9, atol=1e-9
    )


def test_a_capacity_below_the_count_keeps_the_best_tokens():
    query, key, value = operands(1, seed=3)
    out = reference.token_sparse_attention(query, key, value, coverage=0.0, window=4, min_tokens=0, capacity=10)
    assert ((out != 0).any(dim=-1).sum(dim=-1) == 10).all()
    assert (out[:, :, -4:] != 0).any(dim=-1).all()


def test_group_granularity_is_head_granularity_where_heads_agree():
    query, key, value = operands(seed=1)
    query = query[:, ::2].repeat_interleave(2, dim=1)
    options = {"coverage": 0.3, "window": 4, "min_tokens": 0}
    by_head = reference.token_sparse_attention(query, key, value, **options)
    by_group = reference.token_sparse_attention(query, key, value, granularity="group", **options)
    torch.testing.assert_close(by_group, by_head, **CLOSE)
    assert (by_head == 0).all(dim=-1).any()
