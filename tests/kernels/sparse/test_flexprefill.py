"""FlexPrefill's lists equal the reference's, whatever the count, and for heads of both kinds."""

import pytest
import torch

from tsa_compile.kernels import reference_sparse
from tsa_compile.kernels.sparse.fewest import Search, search, threshold_aten
from tsa_compile.kernels.sparse.flexprefill import flexprefill_aten, flexprefill_lists, flexprefill_triton
from tsa_compile.kernels.sparse.last_rows import Splitting, last_rows_sums, last_rows_sums_aten
from tsa_compile.kernels.sparse.lists import density

from ..support import counts_of
from .support import mask_of, poisoned, query_and_key

OPTIONS = dict(gamma=0.6, tau=0.25, min_budget=16, block=16)
SMALL = dict(splitting=Splitting(2, 16, 16, 4, 1), cut=Search(2, 128, 4), means=64)
COUNTS = [None, [150, 33], [0, 128], [1, 17]]


def make_both(heads=4, kv_heads=2, device="cpu", **options):
    """Inputs whose even heads foretell their attention, with queries that hardly differ, and whose odd ones do not."""
    query, key = query_and_key(heads=heads, kv_heads=kv_heads, device=device, **options)
    query[:, ::2] = 0.1 * query[:, ::2] + 0.7 * query[:, ::2, -1:]
    query[:, 1::2] *= 3
    return query, key


def aware(inputs, count, options, scale=0.3):
    """Which heads [B, H] the query-aware pattern takes, seen from outside: tau decides nothing else."""
    ever, never = (reference_sparse.flexprefill_mask(*inputs, scale, count, **{**options, "tau": tau}) for tau in (2, -1))
    found = reference_sparse.flexprefill_mask(*inputs, scale, count, **options)
    assert not torch.equal(ever, never)
    same = [(found == mask).flatten(2).all(dim=2) for mask in (ever, never)]
    assert (same[0] | same[1]).all()
    return same[0] & ~same[1], same[1] & ~same[0]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"gamma": 0.95}, {"gamma": 0.0}, {"gamma": 1.5}, {"tau": 0.0}, {"tau": 2.0}, {"min_budget": 0}, {"min_budget": 70}],
)
def test_the_aten_version_equals_the_reference(counts, changes):
    inputs, count, options = make_both(), counts_of(counts), {**OPTIONS, **changes}
    found = flexprefill_aten(*poisoned(inputs, counts), 0.3, count, **options)
    assert torch.equal(mask_of(found), reference_sparse.flexprefill_mask(*inputs, 0.3, count, **options))


@pytest.mark.parametrize("batch, heads, kv_heads, capacity", [(2, 4, 2, 150), (1, 2, 2, 110), (2, 2, 1, 110)])
def test_heads_of_both_kinds(batch, heads, kv_heads, capacity):
    """Those that the other tests compare are of both."""
    inputs = make_both(heads, kv_heads, batch=batch, capacity=capacity)
    pairs, structure = aware(inputs, None, OPTIONS)
    assert pairs[:, ::2].all() and structure[:, 1::2].all()


@pytest.mark.parametrize("counts, columns", [([150, 33], 16), ([150, 31], 32), ([1, 128], 16)])
def test_sums_along_columns_and_diagonals(triton_device, counts, columns):
    query, key = query_and_key(heads=1, device=triton_device)
    rows, count = torch.tensor(counts, device=triton_device), counts_of(counts, triton_device)
    expected = last_rows_sums_aten(query.double(), key.double(), 0.3, rows, 32)
    for splitting in (Splitting(span, columns, 16, 4, 1) for span in (1, 3)):
        sums, bands = last_rows_sums(*poisoned((query, key), counts), 0.3, count, 32, splitting)
        for b, n in enumerate(counts):
            torch.testing.assert_close(sums[b, :, :, :n].double(), expected[b, :, :, :n], rtol=1e-5, atol=1e-6)
            in_blocks = torch.nn.functional.pad(expected[b, :, 0], (0, 10)).unflatten(1, (5, 32)).sum(dim=2)
            filled = -(-n // 32)
            torch.testing.assert_close(bands[b, :, 0, :filled].double(), in_blocks[:, :filled], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts, heads, kv_heads, chunk", [(None, 2, 2, 1024), ([110, 33], 2, 1, 1024), ([0, 97], 2, 1, 4)])
def test_triton_equals_aten(triton_device, counts, heads, kv_heads, chunk):
    inputs = make_both(heads, kv_heads, batch=len(counts or [1]), capacity=110, device=triton_device)
    count = counts_of(counts, triton_device)
    expected = flexprefill_aten(*inputs, 0.3, count, **OPTIONS)
    found = flexprefill_triton(*poisoned(inputs, counts), 0.3, count, **SMALL, **OPTIONS, chunk=chunk)
    densities = density(expected, count, 110, 16)
    assert densities.max() > 0.3 and densities.min() < 0.9
    assert torch.equal(mask_of(found), mask_of(expected))


@pytest.mark.parametrize(
    "changes", [{"gamma": 0.0, "tau": 2.0}, {"gamma": 1.5}, {"gamma": 0.9, "tau": -1.0, "min_budget": 0}, {"min_budget": 40}]
)
def test_extremes(triton_device, changes):
    inputs, options = make_both(2, batch=1, capacity=70, device=triton_device), OPTIONS | changes
    count = counts_of([67], triton_device)
    found = flexprefill_triton(*poisoned(inputs, [67]), 0.3, count, **SMALL, **options)
    expected = reference_sparse.flexprefill_mask(*inputs, 0.3, count, **options)
    assert torch.equal(mask_of(found), expected)
    assert expected[0].flatten(1).sum(dim=1).max() == 15 or changes.get("gamma") != 1.5


@pytest.mark.parametrize("scale", [0.0, -5.0])
def test_ties_and_large_logits(triton_device, scale):
    """Without a scale every pair of blocks of a row weighs the same: all or none of them."""
    inputs, options = make_both(2, batch=1, capacity=80, dim=24, device=triton_device), {**OPTIONS, "gamma": 0.55}
    expected = flexprefill_aten(*inputs, scale, **options)
    assert torch.equal(mask_of(expected), reference_sparse.flexprefill_mask(*inputs, scale, None, **options))
    assert torch.equal(mask_of(flexprefill_triton(*inputs, scale, **SMALL, **options)), mask_of(expected))


@pytest.mark.parametrize("capacity", [1, 5, 127, 129, 400])
def test_defaults_and_layout(triton_device, capacity):
    query, key = (
        t.transpose(1, 2).contiguous().transpose(1, 2)
        for t in make_both(2, batch=1, capacity=capacity, device=triton_device)
    )
    options = {} if capacity < 400 else {"min_budget": 0, "tau": 0.25, "gamma": 0.6}
    found, expected = (mask_of(f(query, key, 0.3, **options)) for f in (flexprefill_triton, flexprefill_aten))
    assert torch.equal(found, expected)
    assert bool(expected.tril().eq(torch.ones_like(expected).tril()).all()) == (capacity < 400)
    if triton_device == "cpu":
        assert torch.equal(mask_of(flexprefill_lists(query, key, 0.3, **options)), expected)


def test_nothing_to_do(triton_device):
    query, key = query_and_key(0, device=triton_device)
    assert flexprefill_triton(query, key, 1.0).kv_num_blocks.shape == (0, 2, 2)


def test_the_fewest_that_hold_a_share(triton_device):
    """Thresholds of columns, diagonals and pairs, for shares on both sides of every partial sum."""
    torch.manual_seed(0)
    sums = torch.rand(1, 2, 2, 90, device=triton_device).pow(8)
    sums[..., 5:20] = sums[..., 20:35]
    pairs = torch.rand(1, 2, 6, 6, device=triton_device).mul(8).floor() / 8
    heads_aware = torch.tensor([[0, 1]], dtype=torch.int32, device=triton_device)
    causal = pairs.tril().flatten(2)
    future = torch.ones(6, 6, dtype=torch.bool, device=triton_device).triu(1)
    for share in (0.0, 0.3, 0.999):
        state = search(sums, pairs.masked_fill(future, torch.nan), heads_aware, None, share, 16, Search(2, 64, 4))
        held = state[:, :, :, 1, :-1].sum(dim=3)
        digits = state[:, :, :, 1, -1, 0].view(torch.int32)
        wanted = state[:, :, :, 1, -1, 1]
        last = ((held >= wanted[..., None]) & (torch.arange(16, device=triton_device) > 0)).sum(dim=3)
        found = (digits << 4 | last.to(torch.int32)).view(torch.float32)
        lines = [(found[0, 0, 0], sums[0, 0, 0]), (found[0, 0, 1], sums[0, 0, 1]), (found[0, 1, 2], causal[0, 1])]
        for threshold, numbers in lines:
            smallest, needed = threshold_aten(numbers.double(), share)
            assert threshold == smallest.float() if share else threshold.isnan()
            assert (numbers >= threshold).sum() >= needed


@pytest.mark.gpu
def test_on_the_gpu():
    query, key = make_both(8, 2, capacity=5000, dim=128, device="cuda", dtype=torch.bfloat16)
    options = {"gamma": 0.7, "tau": 0.25, "min_budget": 256}
    for counts in ([5000, 3333], [4096, 0]):
        count = counts_of(counts, "cuda")
        inputs = poisoned((query, key), counts)
        found = flexprefill_triton(*inputs, 0.1, count, **options)
        expected = mask_of(flexprefill_aten(query, key, 0.1, count, **options))
        assert (mask_of(found) != expected).float().mean() < 5e-3  # sums differ in their last bits
        again = flexprefill_triton(*inputs, 0.1, count, **options)
        assert torch.equal(mask_of(found), mask_of(again))


@pytest.mark.gpu
def test_captured_with_a_count_on_the_device():
    inputs = make_both(8, 2, capacity=3000, dim=128, device="cuda", dtype=torch.bfloat16)
    count = counts_of([3000, 3000], "cuda")
    flexprefill_lists(*inputs, 0.1, count, min_budget=256)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists = flexprefill_lists(*inputs, 0.1, count, min_budget=256)
    for counts in ([3000, 2000], [1001, 0]):
        count.copy_(torch.tensor(counts, dtype=torch.int32))
        graph.replay()
        assert torch.equal(mask_of(lists), mask_of(flexprefill_lists(*inputs, 0.1, count, min_budget=256)))
