"""FlashPrefill's choice of blocks: those whose mean key gets enough attention, relative to the best of the row.

    mean[b, g, j]   = mean of key[b, g, t] over the rows t < count of block j, in the dtype of key
    S[b, h, i, j]   = sum over the rows r < count of block i of exp(scale * <query[b, h, r], mean[b, g, j]>)      j <= i
    list of i       = {j : S[i, j] >= alpha * max_j S[i, j]}, the `sinks` first blocks, the `window` last ones up to i;
                      every block, for the `last` query blocks before the count

    query [B, H, C, D], key [B, Hk, C, D], strides and dtypes as in flash.py; count int32 [B] or None
    -> kv_num_blocks int32 [B, H, Q], kv_indices int32 [B, H, Q, Q], Q = ceil(C / 128); empty lists behind count

S spans more than float32 does, so its logarithm to base 2 is kept: E[i, j] = log2 S. Three launches, none of them read back:

    _mean      a program per block of keys                          one read of key
    _energy    a program per block of queries                       one read of query; E, 4 bytes per causal pair of blocks
    _choose    a program per block of queries: maximum, list        one read of E

The product is taken as mean * query^T, so that the sum over queries runs along a row, which one quarter of a warp holds.
At H = 32, D = 128, n = 128K: 0.55 TFLOP, 2.1 G exponentials, 1.5 GB: about 2 ms of an H200's time.

FlashPrefill V2, arXiv 2608.19758, sections 3.2 and 3.4, with its defaults: alpha 0.1, 2 sinks, a window of 4 blocks, 256
last rows. There the heads of a group share a list, of 128 / (H / Hk) positions by as many heads; here each head has its own,
of 128 positions, as in the first version. The correction for the blocks left out is not there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsa_compile.kernels._aten import block_means_aten, repeat_heads, whole_blocks
from tsa_compile.kernels.launch import by_device, cdiv, launch, tl, triton
from tsa_compile.kernels.sparse.blocks import BLOCK
from tsa_compile.kernels.sparse.lists import CHUNK, Lists, empty_lists, forced, lists_of, real_blocks, write_list
from tsa_compile.kernels.tiles import (
    aligned_rows,
    at_head,
    block_dim,
    count_of,
    load_rows,
    row_alignment,
    row_strides,
    scores,
    stride_names,
)

ALPHA, SINKS, WINDOW, LAST = 0.1, 2, 4, 2


@triton.jit(do_not_specialize=[*stride_names("k"), "capacity", "blocks"])
def _mean_kernel(
    p_key, p_count, p_mean, stride_kb, stride_kh, stride_kl, capacity, blocks,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mean of one block of keys; nothing behind the count."""
    block, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = count_of(p_count, item, capacity)
    if block * BLOCK >= count:
        return
    p_key = at_head(p_key, stride_kb, stride_kh, item, head, ALIGN)
    b_key = load_rows(p_key, stride_kl, block * BLOCK, count, True, BLOCK, DIM, BLOCK_D, ALIGN)
    b_mean = tl.sum(b_key.to(tl.float32), axis=0) / tl.minimum(count - block * BLOCK, BLOCK).to(tl.float32)
    dims = tl.arange(0, BLOCK_D)
    p_mean += ((item * tl.num_programs(1) + head).to(tl.int64) * blocks + block) * DIM
    tl.store(p_mean + dims, b_mean.to(p_mean.dtype.element_ty), mask=dims < DIM)


@triton.jit(do_not_specialize=[*stride_names("q"), "capacity", "blocks", "heads_per_kv", "last"])
def _energy_kernel(
    p_query, p_mean, p_count, p_energy, stride_qb, stride_qh, stride_ql, capacity, blocks, heads_per_kv, last, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The energies of one block of queries, those that see most first; none for the last blocks, which see all."""
    head, item = tl.program_id(1), tl.program_id(2)
    count = count_of(p_count, item, capacity)
    own = tl.cdiv(count, BLOCK) - 1 - last - tl.program_id(0)
    if own < 0:
        return
    heads = tl.num_programs(1)
    p_query = at_head(p_query, stride_qb, stride_qh, item, head, ALIGN)
    p_mean += (item * (heads // heads_per_kv) + head // heads_per_kv).to(tl.int64) * blocks * DIM
    p_energy += ((item * heads + head).to(tl.int64) * blocks + own) * blocks
    b_query = load_rows(p_query, stride_ql, own * BLOCK, count, True, BLOCK, DIM, BLOCK_D, ALIGN)  # [BLOCK, BLOCK_D]
    b_real = (own * BLOCK + tl.arange(0, BLOCK) < count)[None, :]
    for start in tl.range(0, own + 1, BLOCK_N):
        b_mean = load_rows(p_mean, DIM // ALIGN, start, own + 1, True, BLOCK_N, DIM, BLOCK_D, ALIGN)
        b_scores = scores(b_mean, b_query) * scale_log2  # [BLOCK_N, BLOCK]
        b_scores = tl.where(b_real, b_scores, float("-inf"))
        b_max = tl.max(b_scores, axis=1)
        b_energy = tl.log2(tl.sum(tl.exp2(b_scores - b_max[:, None]), axis=1)) + b_max
        keys = start + tl.arange(0, BLOCK_N)
        tl.store(p_energy + keys, b_energy, mask=keys <= own)


@triton.jit(do_not_specialize=["capacity", "blocks", "sinks", "window", "last"])
def _choose_kernel(
    p_energy, p_count, p_num, p_indices, capacity, blocks, sinks, window, last, log2_alpha,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The list of one block of queries."""
    own, item = tl.program_id(0), tl.program_id(2)
    row = (item * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * blocks + own
    count = count_of(p_count, item, capacity)
    real = tl.cdiv(count, BLOCK)
    if own >= real:
        tl.store(p_num + row, 0)
        return
    full = own >= real - last
    b_best = tl.full([CHUNK], float("-inf"), tl.float32)
    for start in range(0, tl.where(full, 0, own + 1), CHUNK):
        keys = start + tl.arange(0, CHUNK)
        b_best = tl.maximum(b_best, tl.load(p_energy + row * blocks + keys, mask=keys <= own, other=float("-inf")))
    threshold = tl.max(b_best, axis=0) + log2_alpha
    sinks = tl.where(full, blocks, sinks)
    write_list(p_energy + row * blocks, p_indices + row * blocks, p_num + row, own, threshold, sinks, window, CHUNK)


def block_means(key: Tensor, count: Tensor | None, block: int) -> Tensor:
    """The mean key of each block, [B, Hk, Q, D]; those behind the count are left unwritten."""
    batch, heads, capacity, dim = key.shape
    blocks, align = cdiv(capacity, block), row_alignment(key)
    mean = key.new_empty(batch, heads, blocks, dim)
    launch(
        _mean_kernel, (blocks, heads, batch), (key, count, mean), (*row_strides(align, key), capacity, blocks),
        DIM=dim, BLOCK_D=block_dim(dim), ALIGN=align, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return mean


def flashprefill_triton(
    query: Tensor,
    key: Tensor,
    scale: float,
    count: Tensor | None = None,
    *,
    alpha: float = ALPHA,
    sinks: int = SINKS,
    window: int = WINDOW,
    last: int = LAST,
    block: int = BLOCK,
    block_n: int = 64,
    num_warps: int = 4,
    num_stages: int = 2,
    chunk: int = CHUNK,
) -> Lists:
    """Launch the kernels; also runs on CPU tensors in the Triton interpreter.

    block_n, num_warps, num_stages: how `_energy` is cut. chunk: see lists.CHUNK.
    """
    query, key = aligned_rows(query), aligned_rows(key)
    (batch, heads, capacity, dim), kv_heads = query.shape, key.shape[1]
    blocks = cdiv(capacity, block)
    lists = empty_lists(batch, heads, blocks, query.device)
    if lists.kv_num_blocks.numel() == 0:
        return lists
    count = None if count is None else count.contiguous()
    mean = block_means(key, count, block)
    energy = torch.empty(batch, heads, blocks, blocks, dtype=torch.float32, device=query.device)
    align = row_alignment(query, mean)
    launch(
        _energy_kernel, (blocks, heads, batch), (query, mean, count, energy),
        (*row_strides(align, query), capacity, blocks, heads // kv_heads, last, scale * math.log2(math.e)),
        DIM=dim, BLOCK_D=block_dim(dim), ALIGN=align, BLOCK=block, BLOCK_N=block_n,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    launch(
        _choose_kernel, (blocks, heads, batch), (energy, count, *lists),
        (capacity, blocks, sinks, max(window, 1), last, _log2(alpha)), BLOCK=block, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return lists


def _log2(alpha: float) -> float:
    return math.log2(alpha) if alpha > 0 else -math.inf


def flashprefill_aten(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None = None, *,
    alpha: float = ALPHA, sinks: int = SINKS, window: int = WINDOW, last: int = LAST, block: int = BLOCK,
) -> Lists:  # fmt: skip
    """The same in ATen ops alone, on any device."""
    heads, capacity = query.shape[1:3]
    real = real_blocks(count, capacity, block, query.device)
    blocks = -(-capacity // block)
    none, (query, key) = whole_blocks(count, block, query, key)
    wide = torch.promote_types(query.dtype, torch.float32)
    mean = repeat_heads(block_means_aten(key.to(wide), none, block).to(key.dtype), heads)
    logits = scale * (query.to(wide) @ mean.to(wide).transpose(2, 3))
    energy = logits.masked_fill(none[:, None, :, None], -math.inf).unflatten(2, (blocks, block)).logsumexp(dim=3)
    candidates, kept = forced(blocks, real, sinks, max(window, 1), last)
    energy = energy.masked_fill(~candidates, -math.inf)
    best = energy.amax(dim=3, keepdim=True)
    return lists_of(candidates & ((energy >= best + _log2(alpha) * math.log(2)) | kept))


flashprefill_lists = by_device(flashprefill_triton, flashprefill_aten)
