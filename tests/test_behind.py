"""Queries behind caches, adversarially: numbers and positions of any value, padding with holes, lengths by chance."""

import pytest
import torch
import torch.nn.functional as F

from tsa_compile import Decision, KeepRatio, TSAConfig, reports, tsa_backend

from .support import heads

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("ignore::tsa_compile.TSAWarning")]

EXACT = TSAConfig(layers=(), compiler="eager")
KEEP_ALL = TSAConfig(budget=KeepRatio(1.0), layers=["*"], window=3, min_tokens=1, min_length=1, compiler="eager")
LQ, LK = 34, 60
HOLES = torch.rand(2, LK, generator=torch.Generator().manual_seed(1)) < 0.6
HOLES[0, :20] = False


def operands(queries=LQ, keys=LK):
    query, key, value = heads(length=max(queries, keys), head_dim=16)
    return query[:, :, :queries].clone(), key[:, :, :keys].clone(), value[:, :, :keys].clone()


def attend(query, key, value, allowed, additive):
    if additive:
        allowed = torch.where(allowed, 0.0, torch.finfo(query.dtype).min)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True)


def same(function, calls, config, valid=None, **options):
    """All calls of one compiled function equal the function itself; on valid rows, where others are promised nothing."""
    compiled = torch.compile(function, backend=tsa_backend, options={"config": config}, **options)
    for arguments in calls:
        with torch.no_grad():
            found, expected = compiled(*arguments), function(*arguments)
        rows = slice(None) if valid is None else valid(*arguments)
        torch.testing.assert_close(found[rows], expected[rows], atol=3e-6, rtol=1e-5)


NUMBERS = (LK - LQ, 3, 0, LK - LQ + 1, LK, -1, -LQ, -LK, 10**9)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config", [EXACT, KEEP_ALL], ids=["exact", "sparse"])
def test_queries_from_any_number_on(additive, padded, config):
    """kv <= q + a number of each call: a cache's, one too small or too large, one that lets queries see nothing.

    In sparse layers rows that see nothing are 0, as those of pad tokens are, whatever the model has there.
    """

    def function(query, key, value, first):
        allowed = (torch.arange(LK) <= torch.arange(LQ)[:, None] + first)[None, None]
        return attend(query, key, value, allowed & HOLES[:, None, None] if padded else allowed, additive)

    def sees(query, key, value, first):
        allowed = (torch.arange(LK) <= torch.arange(LQ)[:, None] + first)[None, None]
        allowed = allowed & HOLES[:, None, None] if padded else allowed
        own = HOLES[:, (torch.arange(LQ) + first).clamp(0, LK - 1)] if padded else torch.ones(2, LQ, dtype=torch.bool)
        return (allowed.any(-1) & own[:, None]).expand(2, 4, LQ)

    valid = sees if config is KEEP_ALL else None
    same(function, [(*operands(), first) for first in (1, 2, *NUMBERS)], config, valid)
    assert any(row.decision is not Decision.UNCHANGED for report in reports() for row in report)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_positions_that_may_be_anything(additive, padded):
    """kv <= positions[q], as a static cache has it: in order, not in order, before the first key and behind the last."""

    def function(query, key, value, positions):
        allowed = (torch.arange(LK) <= positions[:, None])[None, None]
        return attend(query, key, value, allowed & HOLES[:, None, None] if padded else allowed, additive)

    at = torch.arange(LQ)
    several = (at, at + 7, at + LK - LQ, at + LK, at - 5, at.flip(0), at * 2, at * 0 - 1, at - 2**62, at + 2**62)
    same(function, [(*operands(), positions) for positions in several], EXACT)


@pytest.mark.parametrize("config", [EXACT, KEEP_ALL], ids=["exact", "sparse"])
def test_as_many_queries_as_keys_by_chance(config):
    """Two symbols that are equal in one call alone: upper left and lower right are one there, and nowhere else."""

    def upper_left(query, key, value):
        allowed = torch.arange(key.shape[2]) <= torch.arange(query.shape[2])[:, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True)

    def by_flag(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def lower_right(query, key, value):
        past = key.shape[2] - query.shape[2]
        allowed = torch.arange(key.shape[2]) <= torch.arange(query.shape[2])[:, None] + past
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True)

    for function in (upper_left, by_flag, lower_right):
        torch._dynamo.reset()
        calls = [operands(*lengths) for lengths in ((40, 40), (40, 56), (56, 56), (47, 49), (36, 37))]
        for call in calls:
            for tensor in call:
                torch._dynamo.mark_dynamic(tensor, 2)
        same(function, calls, config)


def test_a_cache_that_is_longer_than_the_mask_says():
    """Keys behind a slice that the mask is made for, and values of another length, as caches are cut."""

    def function(query, key, value, used):
        key, value = key[:, :, :used], value[:, :, :used]
        allowed = torch.arange(used) <= torch.arange(LQ)[:, None] + (used - LQ)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True)

    same(function, [(*operands(), used) for used in (LK, LK - 1, 50, 45, LQ, 36)], EXACT)


def test_a_mask_of_more_keys_that_is_cut():
    """The mask of a whole buffer, of which a chunk's rows and columns are taken."""

    def function(query, key, value, start):
        whole = torch.ones(80, 80, dtype=torch.bool).tril()
        allowed = whole[start : start + LQ, :LK]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True)

    same(function, [(*operands(), start) for start in (LK - LQ, 3, 0, 30, 46)], EXACT)
