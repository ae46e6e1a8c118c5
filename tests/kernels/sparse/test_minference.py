"""MInference's lists equal the reference's mask, and attention over lists equals SDPA under it, whatever the count."""

import pytest
import torch

from tsa_compile.kernels import attend, fused, reference, reference_sparse, registry
from tsa_compile.kernels.sparse import block_sparse
from tsa_compile.kernels.sparse.last_rows import Splitting
from tsa_compile.kernels.sparse.minference import a_shape_lists, minference_aten, minference_lists, minference_triton
from tsa_compile.kernels.sparse.vertical_slash import (
    NONE,
    VerticalSlash,
    _attend_kernel,
    _fitting,
    vertical_slash_aten,
    vertical_slash_attention,
    vertical_slash_density,
    vertical_slash_mask,
    vertical_slash_triton,
)
from tsa_compile.kernels.tiles import Tiles

from ..support import counts_of
from .support import compare, log_sums, poisoned, query_and_key

SMALL = dict(sinks=3, near=6, last=16, block=16)
CUT = {**SMALL, "splitting": Splitting(span=4, dims=16, num_warps=4)}
HEADS = dict(vertical=[5, 20], slash=[12, 4])
NARROW = dict(vertical=40, slash=[60, 60, 100, 100])
BLOCK = 32
TILES = Tiles(16, 16, 4, 2)
VARIANTS = {
    "halves": TILES,
    "whole blocks, lag": Tiles(32, 32, 4, 2, lag=True),
    "lag, tma": Tiles(32, 16, 4, 2, use_tma=True, lag=True),
}


def tensors(capacity=150, batch=2, heads=2, kv_heads=1, dim=16, value_dim=24, dtype=torch.float32, device="cpu"):
    query, key = query_and_key(batch, heads, kv_heads, capacity, dim, dtype, device)
    return query, key, torch.randn(batch, kv_heads, capacity, value_dim, device=device).to(dtype)


def random_lists(capacity, batch=2, heads=2, block=BLOCK, device="cpu"):
    """Tiles with gaps of many sizes and columns anywhere; what is behind them is what it may be."""
    generator = torch.Generator().manual_seed(1)
    blocks = -(-capacity // block)
    gaps = torch.randint(0, 2 * block, (batch, heads, blocks), generator=generator)
    starts = (block + gaps * (torch.rand(gaps.shape, generator=generator) < 0.7)).cumsum(2)
    starts = (starts - starts[..., :1]).masked_fill(starts >= capacity, NONE)
    columns = torch.where(torch.rand(batch, heads, capacity, generator=generator) < 0.2, torch.arange(capacity), 10**6)
    return VerticalSlash(*(t.sort(dim=2).values.to(device, torch.int32).contiguous() for t in (starts, columns)))


def mask_of(lists, capacity, count, block=BLOCK):
    """The mask of lists before the count; tiles are apart, columns ascend, nothing behind the count is listed."""
    starts = lists.starts.clamp(max=2 * capacity)
    assert ((starts.diff() >= block) | (lists.starts[..., 1:] == NONE)).all() and (lists.columns.diff() >= 0).all()
    mask = vertical_slash_mask(lists, capacity, block=block)
    if count is None:
        return mask
    real = torch.arange(capacity, device=count.device) < count[:, None]
    return mask & real[:, None, :, None]


def check(inputs, lists, counts=None, block=BLOCK, tolerance=2e-5, **options):
    """Filler is NaN on the way in, and what is behind the count may be anything on the way out."""
    count = counts_of(counts, inputs[0].device)
    lse, wanted = log_sums(inputs[0]), log_sums(inputs[0])
    expected = vertical_slash_aten(*(t.double() for t in inputs), 0.3, *lists, count, lse=wanted, block=block)
    out = vertical_slash_triton(*poisoned(inputs, counts), 0.3, *lists, count, lse=lse, block=block, **options)
    compare((out, lse), (expected, wanted), counts, tolerance)


@pytest.mark.parametrize("counts", [None, [150, 33], [0, 128], [5, 1]])
@pytest.mark.parametrize("options", [HEADS, {**HEADS, "a_shape": [False, True]}, dict(vertical=20, slash=0)])
def test_the_aten_version_equals_the_reference(counts, options):
    inputs, count = query_and_key(), counts_of(counts)
    lists = minference_aten(*poisoned(inputs, counts), 0.2, count, **options, **SMALL)
    per_head = {name: n if isinstance(n, list) else [n, n] for name, n in {"a_shape": False, **options}.items()}
    expected = reference_sparse.minference_mask(*inputs, 0.2, count, **per_head, **SMALL)
    assert torch.equal(mask_of(lists, 150, count, 16), expected)
    dense = torch.ones(150, 150, dtype=torch.bool).tril()
    assert 0.2 < float(expected[0, 0].sum() / dense.sum()) < 0.95 or counts in ([0, 128], [5, 1])


@pytest.mark.parametrize("counts, a_shape", [(None, None), ([80, 33], None), ([80, 71], [False, True]), ([0, 5], None)])
def test_triton_equals_aten(triton_device, counts, a_shape):
    inputs, count = query_and_key(capacity=80, device=triton_device), counts_of(counts, triton_device)
    expected = minference_aten(*inputs, 0.2, count, **HEADS, a_shape=a_shape, **SMALL)
    found = minference_triton(*poisoned(inputs, counts), 0.2, count, **HEADS, a_shape=a_shape, **CUT)
    assert torch.equal(mask_of(found, 80, count, 16), mask_of(expected, 80, count, 16))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("capacity", [1, 5, 63, 65, 129])
def test_very_short_inputs_with_the_defaults(triton_device, capacity):
    inputs = tensors(capacity, 2, 1, device=triton_device)
    lists, expected = (f(*inputs[:2], 0.2) for f in (minference_triton, minference_aten))
    assert all(torch.equal(a, b) for a, b in zip(lists, expected))
    numbers = dict(vertical=[1000], slash=[6096], a_shape=[False], sinks=30, near=100, last=64, block=64)
    mask = reference_sparse.minference_mask(*inputs[:2], 0.2, None, **numbers)
    assert torch.equal(mask_of(lists, capacity, None, 64), mask) and mask.sum() == capacity * (capacity + 1)
    check(inputs, lists, [capacity, capacity // 2], block=64)


@pytest.mark.parametrize("options", [dict(vertical=10**6, slash=0), dict(vertical=0, slash=[10**6, 150])])
def test_more_than_there_are_is_dense_attention(options):
    inputs, count = tensors(), counts_of([150, 70])
    lists = minference_aten(*inputs[:2], 0.3, count, **options, **SMALL)
    out = vertical_slash_aten(*inputs, 0.3, *lists, count, block=16)
    torch.testing.assert_close(out, reference.attend(*inputs, count, 0.3))


def test_numbers_in_all_their_forms(device):
    inputs, there = query_and_key(device=device), {"device": device, "dtype": torch.int64}
    forms = [HEADS, *({name: torch.tensor(n, **where) for name, n in HEADS.items()} for where in ({}, there))]
    masks = [mask_of(minference_aten(*inputs, 0.2, **form, **SMALL), 150, None, 16) for form in forms]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    for wrong in ([1, 2, 3], torch.tensor([[1, 2]]).expand(3, 2)):
        with pytest.raises(ValueError, match="one for each of 2"):
            minference_lists(*inputs, 0.2, vertical=wrong)


@pytest.mark.parametrize("counts", [None, [150, 33]])
def test_a_shape_is_the_nearest_and_the_first(counts):
    inputs, count = query_and_key(), counts_of(counts)
    numbers = [7, 20], [33, 60]
    found = mask_of(a_shape_lists(*inputs, 0.2, count, sinks=numbers[0], window=numbers[1], block=16), 150, count, 16)
    options = dict(vertical=numbers[0], slash=numbers[1], a_shape=[True, True])
    assert torch.equal(found, reference_sparse.minference_mask(*inputs, 0.2, count, **options, **SMALL))
    rows = torch.arange(150)
    for head, (sinks, window) in enumerate(zip(*numbers)):
        apart = rows[:, None] - rows
        asked = (apart >= 0) & ((apart < window) | (rows < sinks))
        wider = (apart >= 0) & ((apart < window + 2 * 15) | (rows < sinks))
        assert not (asked & ~found[0, head]).any() and not (found[0, head] & ~wider).any()


@pytest.mark.parametrize("tiles", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("counts", [[150, 33], [0, 111]])
def test_attention_equals_sdpa(triton_device, tiles, counts):
    lists = random_lists(150, heads=1, device=triton_device)
    assert 0.3 < vertical_slash_density(lists, 150, BLOCK).min() < 0.9
    check(tensors(heads=1, device=triton_device), lists, counts, tiles=tiles)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_half_precision_and_both_granularities(triton_device, kv_heads):
    inputs = tensors(110, 1, 2, kv_heads, 32, 32, torch.float16, triton_device)
    check(inputs, random_lists(110, 1, device=triton_device), tiles=VARIANTS["lag, tma"], tolerance=4e-3)


def test_a_column_counts_once(triton_device):
    """Whether or not a tile holds it, and at whichever end of the tile."""
    inputs, tiles = tensors(130, 1, 1, device=triton_device), VARIANTS["whole blocks, lag"]
    starts = torch.tensor([0, 32, 75, NONE], dtype=torch.int32, device=triton_device).expand(1, 1, 4)
    everywhere = torch.arange(130, dtype=torch.int32, device=triton_device).expand(1, 1, -1)
    out = vertical_slash_triton(*inputs, 0.3, starts, everywhere, block=BLOCK, tiles=tiles)
    torch.testing.assert_close(out, reference.attend(*inputs, None, 0.3), rtol=2e-5, atol=2e-5)
    check(inputs, (starts, everywhere[..., :0]), tiles=tiles)


def test_tiles_that_fit_a_block():
    assert _fitting(Tiles(128, 64, 8, 3), 64) == Tiles(64, 64, 4, 3) and _fitting(Tiles(32, 16, 4, 1), 64) == Tiles(
        32, 16, 4, 1
    )


def test_density_counts_what_is_computed():
    starts, columns = torch.tensor([[[0, 64, 200]]]), torch.tensor([[[0, 100, 299]]])
    lists = VerticalSlash(starts.int(), columns.int())
    # Keys of the five blocks: 64, 128, 128 and column 0, 128 and columns 0 and 100, 192 and columns 0 and 100.
    assert vertical_slash_density(lists, 300).tolist() == pytest.approx([(64 + 128 + 129 + 130 + 194) / (64 * 15)])
    nothing = VerticalSlash(starts.int()[..., :1], columns.int()[..., :0])
    assert vertical_slash_density(nothing, 300).tolist() == pytest.approx([5 / 15])


@pytest.fixture
def narrow():
    """MInference with few columns and diagonals, as a registered kernel."""
    yield block_sparse("narrow", minference_lists, **NARROW)
    registry.unregister("narrow")


def test_registered(narrow):
    inputs, count = tensors(200, 2, 4, 2, 16, 16), torch.tensor([200, 77], dtype=torch.int32)
    for name in ("minference", "a_shape"):
        assert not registry.get(name).exact and registry.get(name).device_count
        # With the defaults both are dense at this length.
        out = attend.attend(*inputs, count, 0.25, name)
        torch.testing.assert_close(out, reference.attend(*inputs, count, 0.25))
    out = attend.attend(*inputs, count, 0.25, "narrow")
    lists = minference_lists(*inputs[:2], 0.25, count, **NARROW)
    assert torch.equal(out, vertical_slash_attention(*inputs, 0.25, *lists, count))


def test_composed_with_token_selection(narrow):
    """The fused op equals its steps, with the same lists between them."""
    inputs = tensors(800, 2, 4, 2, 16, 16)
    found = fused.sparse_attention(*inputs, 0.25, 64, 7, None, 0.5, 256, None, False, "narrow")
    scores = torch.ops.tsa.score(inputs[0], inputs[1], None, 0.25, 64, 7)
    indices = torch.ops.tsa.select(scores, None, 368 + 64)
    rows = torch.ops.tsa.compress(*inputs, indices, None)
    out = attend.attend(*rows, None, 0.25, "narrow")
    torch.testing.assert_close(found, torch.ops.tsa.decompress(out, indices, None, 800))
    assert not torch.allclose(out, attend.attend(*rows, None, 0.25, "sdpa"), atol=1e-3)


def test_nothing_to_do_and_what_does_not_fit(triton_device):
    for f in (minference_triton, minference_aten):
        assert f(*query_and_key(0, device=triton_device), 1.0).starts.shape[:2] == (0, 2)
    inputs, (starts, columns) = tensors(1, 1), random_lists(1, 1)
    with pytest.raises(ValueError, match="do not fit query"):
        vertical_slash_attention(*inputs, 0.3, starts[:, :1], columns)
    with pytest.raises(ValueError, match="expected int32"):
        vertical_slash_attention(*inputs, 0.3, starts.long(), columns)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_on_the_gpu(dim):
    inputs, count = tensors(5000, 2, 8, 2, dim, dim, torch.bfloat16, "cuda"), counts_of([5000, 3333], "cuda")
    options = dict(vertical=[100, 30] * 4, slash=[150, 800] * 4)
    found, expected = (f(*inputs[:2], 0.3, count, **options) for f in (minference_triton, minference_aten))
    different = mask_of(found, 5000, count, 64) != mask_of(expected, 5000, count, 64)
    assert different.float().mean() < 5e-3  # a sum may lie on the threshold
    check(inputs, found, [5000, 3333], block=64, tolerance=3e-2)


@pytest.mark.gpu
def test_captured_graph_replays_with_another_count_and_compiles_nothing():
    inputs, count = tensors(3000, 1, 8, 2, 128, 128, torch.bfloat16, "cuda"), counts_of([3000], "cuda")
    kernel = block_sparse("narrow", minference_lists, vertical=[50] * 8, slash=200)
    registry.unregister("narrow")
    kernel.causal(*inputs, 0.1, count)
    compiled = sum(len(cache[0]) for cache in _attend_kernel.device_caches.values())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.causal(*inputs, 0.1, count)
    for n in (2000, 1001, 40):
        count.fill_(n)
        graph.replay()
        assert torch.equal(out[:, :, :n], kernel.causal(*inputs, 0.1, count)[:, :, :n])
    kernel.causal(*(t[:, :, :1000] for t in inputs), 0.1, count)
    assert sum(len(cache[0]) for cache in _attend_kernel.device_caches.values()) == compiled
