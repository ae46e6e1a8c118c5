"""XAttention's lists equal the reference's, whatever the count and the tiling."""

import math

import pytest
import torch

from tsa_compile.kernels import reference_sparse
from tsa_compile.kernels.launch import tl, triton
from tsa_compile.kernels.sparse.antidiagonals import Tiling, _place, _tiling, strided_logits, sums_triton
from tsa_compile.kernels.sparse.lists import density
from tsa_compile.kernels.sparse.xattention import xattention_aten, xattention_lists, xattention_triton

from ..support import counts_of
from .support import mask_of, poisoned, query_and_key

# The logarithm of the weight of a block that a row does not see at all.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")

OPTIONS = dict(stride=8, mass=0.6, block=32)
TILINGS = {
    "plain": Tiling(16, 16, 16, 4, 1),
    "wide": Tiling(16, 32, 16, 4, 1),
    "tma": Tiling(16, 16, 16, 4, 1, use_tma=True),
    "wide, tma": Tiling(4, 8, 16, 4, 1, use_tma=True, units=1),
}


@pytest.mark.parametrize("counts", [None, [150, 33], [0, 128]])
@pytest.mark.parametrize("options", [OPTIONS, {**OPTIONS, "stride": 4}, {**OPTIONS, "mass": 0.3}])
def test_the_aten_version_equals_the_reference(counts, options):
    inputs, count = query_and_key(), counts_of(counts)
    found = xattention_aten(*poisoned(inputs, counts), 0.5, count, **options)
    assert torch.equal(mask_of(found), reference_sparse.xattention(*inputs, 0.5, count, **options))


@pytest.mark.parametrize("counts, tiling", [([0, 128], "plain"), ([150, 35], "wide"), ([150, 35], "tma"), (None, "tma")])
def test_triton_equals_aten(triton_device, counts, tiling):
    inputs, count = query_and_key(device=triton_device), counts_of(counts, triton_device)
    expected = xattention_aten(*inputs, 0.5, count, **OPTIONS)
    found = xattention_triton(*poisoned(inputs, counts), 0.5, count, tiling=TILINGS[tiling], chunk=2, **OPTIONS)
    densities = density(expected, count, 150, 32)
    assert densities.max() > 0.3 and densities.min() < 0.9
    assert torch.equal(mask_of(found), mask_of(expected))


def test_a_peak_far_above_other_blocks(triton_device):
    """A tile has one peak a row: of blocks far below it nothing is left, in the sums as in the softmax."""
    query, key = (t[:, :1] for t in query_and_key(1, 1, capacity=150, device=triton_device))
    key = key.clone()
    key[:, :, 32:64] = query.mean(dim=2, keepdim=True).sign() * 100  # a block that takes all or nothing of a row
    expected = xattention_aten(query, key, 1.0, **OPTIONS)
    for tiling in TILINGS.values():
        assert torch.equal(mask_of(xattention_triton(query, key, 1.0, tiling=tiling, **OPTIONS)), mask_of(expected))


def test_few_dims_and_large_logits(triton_device):
    query, key = query_and_key(1, capacity=100, dim=24, device=triton_device)
    for scale in (5.0, 0.0, -2.0):
        expected = xattention_aten(query, key, scale, **OPTIONS)
        found = xattention_triton(query, key, scale, tiling=TILINGS["plain"], **OPTIONS)
        assert torch.equal(mask_of(found), mask_of(expected)), scale


def assert_same_energies(query, key, count, stride, block, **options):
    """What a row sees of each block, as a logarithm; above the diagonal or behind the count may be anything."""
    x, _ = strided_logits(query, key, 0.3, count, stride, block)
    expected = x.unflatten(3, (-1, block // stride)).logsumexp(dim=4) * math.log2(math.e)
    sums, peaks, span = sums_triton(query, key, 0.3, count, stride=stride, block=block, **options)
    found = sums.log2() + peaks.repeat_interleave(span, 3)[..., : sums.shape[3]]
    rows, blocks = (torch.arange(size, device=query.device) for size in expected.shape[2:])
    live = torch.full_like(rows[:1], query.shape[2]) if count is None else count
    seen = (blocks <= (rows * stride // block)[:, None]) & (rows * stride < live[:, None])[:, None, :, None]
    assert (seen & expected.isfinite()).any()
    torch.testing.assert_close(*(t.where(seen, 0) for t in (found, expected)), rtol=1e-4, atol=1e-3)


def heads_inside(tensor):
    """The same [B, H, C, D], in memory [B, C, H, D]."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("layout", [lambda tensor: tensor, heads_inside], ids=["BHCD", "BCHD"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_sums_against_peaks(triton_device, tiling, layout):
    query, key = (layout(tensor) for tensor in query_and_key(capacity=152, device=triton_device))
    assert _tiling(query, key, 8, TILINGS[tiling]).use_tma == ("tma" in tiling)
    assert_same_energies(query, key, counts_of([150, 35], triton_device), 8, 32, tiling=TILINGS[tiling])


@triton.jit
def _places_kernel(p_out, units, PER_UNIT: tl.constexpr, TOGETHER: tl.constexpr):
    row, column = _place(tl.program_id(0), units, PER_UNIT, TOGETHER)
    tl.store(p_out + 2 * tl.program_id(0), row)
    tl.store(p_out + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize("units, per_unit, together", [(1, 2, 4), (7, 2, 4), (8, 1, 4), (9, 2, 1), (5, 3, 2)])
def test_places_are_the_tiles_up_to_the_diagonal(triton_device, units, per_unit, together):
    tiles = per_unit * units * (units + 1) // 2
    places = torch.empty(tiles, 2, dtype=torch.int32, device=triton_device)
    _places_kernel[(tiles,)](places, units, PER_UNIT=per_unit, TOGETHER=together)
    found = [tuple(place) for place in places.tolist()]
    assert set(found) == {(row, column) for row in range(per_unit * units) for column in range(row // per_unit + 1)}
    assert len(set(found)) == tiles
    first = (units - 1) // together * together  # the last ones that go together
    begin, across = per_unit * first * (first + 1) // 2, per_unit * (units - first)
    for column in range(first):
        neighbours = found[begin + column * across :][:across]
        assert neighbours == [(per_unit * first + row, column) for row in range(across)]


@pytest.mark.parametrize("near_miss", ["stride", "items", "heads", "head size", "steps"])
def test_tiles_by_tma_need_a_matrix_of_groups(near_miss):
    """A group of rows is a row of the matrix, so heads must begin with one, or lie side by side in it."""
    query, key = query_and_key(capacity=152)
    assert _tiling(query, key, 8, TILINGS["tma"]).use_tma
    if near_miss == "stride":
        assert not _tiling(query, key, 16, TILINGS["tma"]).use_tma
        return
    shapes = {"items": (2, 4, 151, 32), "heads": (1, 4, 150, 32), "head size": (2, 4, 152, 24), "steps": (2, 4, 152, 32)}
    other = torch.zeros(shapes[near_miss])
    if near_miss == "items":
        other = heads_inside(other)
        assert _tiling(other[:1], other[:1], 8, TILINGS["tma"]).use_tma
    if near_miss == "steps":
        other = torch.zeros(2, 4, 152, 33)[..., :32]
    assert not _tiling(other, key, 8, TILINGS["tma"]).use_tma and not _tiling(query, other, 8, TILINGS["tma"]).use_tma


@pytest.mark.parametrize("capacity", [1, 300])
def test_defaults_and_layout(triton_device, capacity):
    query, key = map(heads_inside, query_and_key(1, 1, capacity=capacity, device=triton_device))
    assert torch.equal(*(mask_of(f(query, key, 1.0)) for f in (xattention_aten, xattention_triton)))
    if triton_device == "cpu":
        assert torch.equal(mask_of(xattention_lists(query, key, 1.0)), mask_of(xattention_aten(query, key, 1.0)))


def test_nothing_to_do(triton_device):
    query, key = query_and_key(0, device=triton_device)
    assert xattention_triton(query, key, 1.0).kv_num_blocks.shape == (0, 2, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("layout", ["BHCD", "BCHD"])
def test_on_the_gpu(stride, layout):
    query, key = query_and_key(2, 8, 2, 5000, 128, torch.bfloat16, "cuda")
    if layout == "BCHD":
        query, key = heads_inside(query), heads_inside(key)
    for counts in ([5000, 3333], [4096, 0]):
        count = counts_of(counts, "cuda")
        inputs = poisoned((query, key), counts)
        found = mask_of(xattention_triton(*inputs, 0.3, count, stride=stride, chunk=16))
        expected = mask_of(xattention_aten(query, key, 0.3, count, stride=stride))
        assert_same_energies(*inputs, count, stride, 128)
        assert (found != expected).float().mean() < 5e-3  # sums differ in their last bits
