"""blocks_triton: rows before the count equal SDPA under the expanded lists, whatever the lists, tiles and counts."""

import functools

import pytest
import torch

from tsa_compile.kernels import reference
from tsa_compile.kernels.sparse.blocks import (
    _blocks_kernel,
    block_sparse_attention,
    blocks_aten,
    blocks_mask,
    blocks_triton,
    longest_first,
)
from tsa_compile.kernels.tiles import Tiles

from ..support import poison_behind, qkv
from .support import compare, log_sums

BLOCK = 32
HALVES = Tiles(16, 16, 4, 2)
VARIANTS = {
    "halves": HALVES,
    "whole blocks": Tiles(32, 32, 4, 2),
    "lag": HALVES._replace(lag=True),
    "lag, tma": Tiles(32, 16, 4, 2, use_tma=True, lag=True),
}


operands = functools.partial(qkv, heads=2, kv_heads=1, seq_len=150, dim=16, value_dim=24, layout="BHLD")


def lists_of(mask):
    """Lists of the blocks before the diagonal that a mask [B, H, Q, Q] has, ascending; filler is out of range."""
    mask = mask.tril(-1)
    blocks = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    indices = torch.where(mask, blocks, 10**6).sort(dim=-1).values
    return mask.sum(-1).to(torch.int32), indices.to(torch.int32)


def random_lists(batch, heads, blocks, density=0.5, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return lists_of((torch.rand(batch, heads, blocks, blocks, generator=generator) < density).to(device))


def check(inputs, lists, counts=None, block=BLOCK, tolerance=2e-5, **options):
    """Filler is NaN on the way in, and what is behind the count may be anything on the way out."""
    query = inputs[0]
    count = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=query.device)
    lse, wanted = log_sums(query), log_sums(query)
    expected = blocks_aten(*(t.double() for t in inputs), 0.3, *lists, count, lse=wanted, block=block)
    poisoned = (poison_behind(t, counts) for t in inputs)
    out = blocks_triton(*poisoned, 0.3, *lists, count, lse=lse, block=block, **options)
    compare((out, lse), (expected, wanted), counts, tolerance)


def test_every_block_is_dense_attention():
    inputs = operands()
    lists = lists_of(torch.ones(2, 2, 5, 5, dtype=torch.bool))
    count = torch.tensor([150, 70], dtype=torch.int32)
    out = blocks_aten(*inputs, 0.3, *lists, count, block=BLOCK)
    torch.testing.assert_close(out, reference.attend(*inputs, count, 0.3))


def test_mask_of_lists():
    indices = torch.tensor([[[[9, 9, 9], [0, 1, 9], [0, 1, 2]]]], dtype=torch.int32)
    num = torch.tensor([[[0, 2, 1]]], dtype=torch.int32)
    assert blocks_mask(num, indices)[0, 0].tolist() == [[True, False, False], [True, True, False], [True, False, True]]


@pytest.mark.parametrize("tiles", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("counts", [[150, 33], [0, 128]])
def test_equals_sdpa(triton_device, tiles, counts):
    check(operands(device=triton_device), random_lists(2, 2, 5, device=triton_device), counts, tiles=tiles)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_block_and_every_block(triton_device, density):
    inputs, lists = operands(1, device=triton_device), random_lists(1, 2, 5, density, triton_device)
    check(inputs, lists, [147], tiles=VARIANTS["lag"])


def test_the_diagonal_may_end_the_list(triton_device):
    inputs, (num, indices) = operands(1, device=triton_device), random_lists(1, 2, 5, device=triton_device)
    own = torch.arange(5, dtype=torch.int32, device=triton_device).expand(1, 2, 5)
    longer = indices.scatter(3, num[..., None].long(), own[..., None])
    out = blocks_triton(*inputs, 0.3, num + 1, longer, block=BLOCK, tiles=HALVES)
    assert torch.equal(out, blocks_triton(*inputs, 0.3, num, indices, block=BLOCK, tiles=HALVES))


@pytest.mark.parametrize("capacity", [1, 31, 33])
def test_lengths(triton_device, capacity):
    inputs = operands(1, heads=2, kv_heads=2, seq_len=capacity, device=triton_device)
    check(inputs, random_lists(1, 2, -(-capacity // BLOCK), 1.0, triton_device), tiles=VARIANTS["lag"])


def test_half_precision_and_narrow_lists(triton_device):
    inputs = operands(1, heads=4, kv_heads=2, seq_len=150, dim=32, value_dim=32, dtype=torch.float16, device=triton_device)
    num, indices = random_lists(1, 4, 5, device=triton_device)
    check(inputs, (num, indices[..., : int(num.max())]), tiles=VARIANTS["lag, tma"], tolerance=4e-3)


def test_defaults(triton_device):
    inputs = operands(1, heads=1, kv_heads=1, seq_len=200, device=triton_device)
    check(inputs, random_lists(1, 1, 2, 1.0, triton_device), [190], block=128)


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_long_lists_start_first(triton_device, chunk):
    num = torch.tensor([[[0, 1, 2, 3], [99, 3, 8, 70]]], dtype=torch.int32, device=triton_device)
    indices = torch.arange(99, dtype=torch.int32, device=triton_device).expand(1, 2, 4, 99).contiguous()
    order, listed = longest_first(num, indices, chunk=chunk)
    assert order.tolist() == [4, 3, 2, 1, 0, 7, 6, 5]  # longer than 4 * 23.25 blocks: one
    assert listed.tolist() == [98, 3, 2, 1, 0, 69, 7, 2]  # without what ends a list at or behind the diagonal
    order, listed = longest_first(torch.zeros_like(num), indices, chunk=chunk)
    assert order.tolist() == [3, 2, 1, 0, 7, 6, 5, 4] and listed.tolist() == [0] * 8


def test_op_on_the_cpu_and_what_does_not_fit():
    inputs, (num, indices) = operands(1, seq_len=200), random_lists(1, 2, 2)
    out = block_sparse_attention(*inputs, 0.3, num, indices)
    torch.testing.assert_close(out, blocks_aten(*inputs, 0.3, num, indices))
    with pytest.raises(ValueError, match=r"expected \(1, 2, 2\)"):
        block_sparse_attention(*inputs, 0.3, num[..., :1], indices)
    with pytest.raises(ValueError, match="expected int32"):
        block_sparse_attention(*inputs, 0.3, num.long(), indices)


@pytest.mark.gpu
@pytest.mark.parametrize("dim, tiles", [(128, None), (64, None), (128, Tiles(128, 128, 8, 3, True, True))])
def test_on_the_gpu(dim, tiles):
    inputs = qkv(2, 8, 2, 3000, dim, dtype=torch.bfloat16, device="cuda", layout="BHLD")
    check(inputs, random_lists(2, 8, 24, 0.3, "cuda"), [3000, 1701], block=128, tolerance=3e-2, tiles=tiles)


@pytest.mark.gpu
def test_captured_graph_replays_with_other_lists_and_compiles_nothing():
    inputs = qkv(1, 8, 2, 2000, 128, dtype=torch.bfloat16, device="cuda", layout="BHLD")
    lists = random_lists(1, 8, 16, 0.3, "cuda")
    count = torch.tensor([2000], dtype=torch.int32, device="cuda")
    blocks_triton(*inputs, 0.1, *lists, count)
    compiled = sum(len(cache[0]) for cache in _blocks_kernel.device_caches.values())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = blocks_triton(*inputs, 0.1, *lists, count)
    count.fill_(1500)
    for tensor, other in zip(lists, random_lists(1, 8, 16, 0.7, "cuda"), strict=True):
        tensor.copy_(other)
    graph.replay()
    expected = blocks_aten(*(t.double() for t in inputs), 0.1, *lists, count)
    torch.testing.assert_close(out[:, :, :1500].double(), expected[:, :, :1500], rtol=3e-2, atol=3e-2)
    blocks_triton(*(t[:, :, :1000] for t in inputs), 0.1, *random_lists(1, 8, 8, 0.3, "cuda"))
    blocks_triton(*(t[:, :, :1000] for t in inputs), 0.1, *random_lists(1, 8, 8, 0.3, "cuda"), count)
    assert sum(len(cache[0]) for cache in _blocks_kernel.device_caches.values()) - compiled <= 1  # without a count
