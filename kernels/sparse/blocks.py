"""Block-sparse causal attention: every block of queries sees its own block up to the diagonal, and the blocks of a list.

    out[b, h, i] = sum_j softmax_j(scale * <query[b, h, i], key[b, g, j]>) value[b, g, j]
                   over j <= i whose block j // 128 is i // 128 or listed for i // 128;  i < count[b], g = h // (H / Hk)

    query [B, H, C, D], key [B, Hk, C, D], value [B, Hk, C, Dv], strides and dtypes as in flash.py; count int32 [B] or None
    kv_num_blocks int32 [B, H, Q], kv_indices int32 [B, H, Q, N], Q = ceil(C / 128), contiguous
    ->  out [B, H, C, Dv], contiguous; rows from `count` on are left unwritten on CUDA, zeros elsewhere
        lse float32 [B, H, C], where asked for: log sum_j exp(scale * <query[b, h, i], key[b, g, j]>), over the same j

A list is the first kv_num_blocks entries of its row, ascending and without repetitions. Its own block, the diagonal, is the
only one that a query block sees in part; it may end the list or be left out of it, and is seen in both cases. Blocks after
the diagonal are not allowed. Lists of query blocks behind `count` are not read; nor are rows of query, key and value, which
may hold anything there. Every row sees itself at least, so its log-sum-exp is that of a sum which is not empty.

Nothing is read on the host and no length is a constant of the kernel. A program computes BLOCK_M rows of a query block and
goes through its list in steps of BLOCK_N keys; the list's entry is loaded where the tile is, so that the compiler prefetches
both together. Long lists start first (`longest_first`): a query block that sees everything takes as long as a hundred that
see what a selector leaves, and would otherwise run alone at the end. With K = sum of list lengths: 4 * 128^2 * K * D flops
and 128^2 * K exponentials; each 64-row program reads its blocks from L2, 64 flops a byte. At H = 32, D = 128, n = 128K,
a density of 10 %: 14 TFLOP.

Method: FlashAttention-2, arXiv 2307.08691, over lists of blocks as FlexAttention's, arXiv 2412.05496.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsa_compile.kernels._aten import repeat_heads, torch_attention
from tsa_compile.kernels.launch import by_device, cdiv, launch, tl, triton
from tsa_compile.kernels.tiles import (
    Tiles,
    add_tile,
    aligned_rows,
    at_head,
    attend_tile,
    count_of,
    descriptors,
    diagonal,
    load_rows,
    positive_scale,
    row_alignment,
    row_strides,
    store_lse,
    store_rows,
    stride_names,
    tile_options,
    tiles_for,
)

BLOCK = 128
"""Rows of a block, of queries and of keys."""
_ROWS = 512
"""How many rows of logits are written out at a time."""


@triton.jit
def _step_start(p_list, step, listed, origin, own, UNIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of a step: through the listed tiles, `UNIT` keys from `origin` a number, then on from key `own`."""
    slot = step // (BLOCK // BLOCK_N)
    listed_start = origin + tl.load(p_list + slot, mask=slot < listed, other=0) * UNIT
    return tl.where(slot < listed, listed_start, own) + step % (BLOCK // BLOCK_N) * BLOCK_N


@triton.jit
def listed_tiles(
    b_query, b_acc, b_max, b_sum, key, value, p_list, listed, origin, own, steps, scale_log2, UNIT: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    LAG: tl.constexpr,
):  # fmt: skip
    """All tiles before the diagonal's, every key of which every row sees.

    The diagonal's tiles would be prefetched in this loop; but a branch in it costs more than that wins: 3 % at 128K.
    """
    before = _step_start(p_list, 0, listed, origin, own, UNIT, BLOCK, BLOCK_N)
    b_keep = tl.full([b_query.shape[0]], 1.0, tl.float32)
    b_weights = tl.zeros([b_query.shape[0], BLOCK_N], tl.float32)
    for step in tl.range(0, steps):
        start = _step_start(p_list, step, listed, origin, own, UNIT, BLOCK, BLOCK_N)
        b_acc, b_keep, b_weights, b_max, b_sum = attend_tile(
            b_query, b_acc, b_keep, b_weights, b_max, b_sum, key, value, start, before, scale_log2,
            DIM, VALUE_DIM, ALIGN, BLOCK_N, LAG,
        )  # fmt: skip
        before = start
    if LAG and steps > 0:
        b_acc = add_tile(b_acc, b_keep, b_weights, value, before, VALUE_DIM, ALIGN, BLOCK_N)
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=[*stride_names("qkvo"), "capacity", "heads", "heads_per_kv", "query_blocks", "slots"])
def _blocks_kernel(
    p_query, p_key, p_value, p_out, p_lse, p_count, p_indices, p_order, p_listed, desc_key, desc_value,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ob, stride_oh, stride_ol, capacity, heads, heads_per_kv, query_blocks, slots, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LAG: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of a query block of one head."""
    place = tl.program_id(0) // (BLOCK // BLOCK_M)
    row = tl.load(p_order + place)
    listed = tl.load(p_listed + place)
    own, head, item = row % query_blocks, row // query_blocks % heads, row // query_blocks // heads
    count = count_of(p_count, item, capacity)
    start_m = (own + 1) * BLOCK - (tl.program_id(0) % (BLOCK // BLOCK_M) + 1) * BLOCK_M
    if start_m >= count:
        return

    kv_head = head // heads_per_kv
    p_query = at_head(p_query, stride_qb, stride_qh, item, head, ALIGN)
    key = (desc_key, at_head(p_key, stride_kb, stride_kh, item, kv_head, ALIGN), stride_kl, item, kv_head)
    value = (desc_value, at_head(p_value, stride_vb, stride_vh, item, kv_head, ALIGN), stride_vl, item, kv_head)
    b_query = load_rows(p_query, stride_ql, start_m, count, True, BLOCK_M, DIM, BLOCK_D, ALIGN)  # [BLOCK_M, BLOCK_D]
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    steps = listed * (BLOCK // BLOCK_N) + (start_m - own * BLOCK) // BLOCK_N
    b_acc, b_max, b_sum = listed_tiles(
        b_query, b_acc, b_max, b_sum, key, value, p_indices + row.to(tl.int64) * slots, listed, 0, own * BLOCK, steps,
        scale_log2, BLOCK, DIM, VALUE_DIM, ALIGN, BLOCK, BLOCK_N, LAG,
    )  # fmt: skip
    b_acc, b_max, b_sum = diagonal(
        b_query, b_acc, b_max, b_sum, key, value, start_m, count, scale_log2, DIM, VALUE_DIM, ALIGN, BLOCK_N
    )
    p_out = at_head(p_out, stride_ob, stride_oh, item, head, ALIGN)
    store_rows(p_out, stride_ol, b_acc / b_sum[:, None], start_m, count, BLOCK_M, VALUE_DIM, BLOCK_DV, ALIGN)
    store_lse(p_lse, row // query_blocks, capacity, b_max, b_sum, start_m, count)


LONG = 4
"""A list is long from this many times the mean length on."""


@triton.jit
def _lengths(p_num_blocks, start, rows, CHUNK: tl.constexpr):
    places = start + tl.arange(0, CHUNK)
    return tl.load(p_num_blocks + places, mask=places < rows, other=0)


@triton.jit(do_not_specialize=["blocks", "slots"])
def _order_kernel(p_num_blocks, p_indices, p_order, p_listed, blocks, slots, LONG: tl.constexpr, CHUNK: tl.constexpr):
    """One program: where the query blocks of a head start. Each counts the long lists of all heads, in the L2 cache."""
    rows, first = tl.num_programs(0) * blocks, tl.program_id(0) * blocks
    b_total = tl.zeros([CHUNK], tl.float32)
    for start in range(0, rows, CHUNK):
        b_total += _lengths(p_num_blocks, start, rows, CHUNK)
    limit = LONG * tl.sum(b_total, axis=0) / rows
    b_all, b_before = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32)
    for start in range(0, rows, CHUNK):
        b_long = _lengths(p_num_blocks, start, rows, CHUNK) > limit
        b_all += b_long.to(tl.int32)
        b_before += (b_long & (start + tl.arange(0, CHUNK) < first)).to(tl.int32)
    to_long = tl.sum(b_before, axis=0)
    to_short = tl.sum(b_all, axis=0) + first - to_long
    for start in range(0, blocks, CHUNK):
        places = tl.arange(0, CHUNK)
        own = blocks - 1 - start - places
        row = (first + own).to(tl.int64)
        b_num = tl.load(p_num_blocks + row, mask=own >= 0, other=0)
        b_listed = tl.minimum(b_num, slots)
        b_last = tl.load(p_indices + row * slots + b_listed - 1, mask=(own >= 0) & (b_listed > 0), other=-1)
        b_long = ((b_num > limit) & (own >= 0)).to(tl.int32)
        rank = tl.cumsum(b_long, axis=0)
        target = tl.where(b_long > 0, to_long + rank - 1, to_short + places - rank)
        tl.store(p_order + target, row.to(tl.int32), mask=own >= 0)
        tl.store(p_listed + target, b_listed - (b_last >= own).to(tl.int32), mask=own >= 0)
        longs = tl.sum(b_long, axis=0)
        to_long += longs
        to_short += CHUNK - longs


def longest_first(kv_num_blocks: Tensor, kv_indices: Tensor, *, chunk: int = 2048) -> Tensor:
    """The order in which query blocks start, long lists first, int32 [2, B * H * Q]: flat positions; blocks on their lists.

    Both parts go head after head, from the last query block on: what runs together then reads the keys of one head, and
    finds them in the L2 cache. Long lists are few; sorted by length as well, all heads would share the cache at once.
    The diagonal is not counted, so that a program knows its tiles after one read.
    """
    batch, heads, blocks = kv_num_blocks.shape
    order = kv_num_blocks.new_empty(2, kv_num_blocks.numel())
    launch(
        _order_kernel, (batch * heads,), (kv_num_blocks, kv_indices, *order), (blocks, kv_indices.shape[3]),
        LONG=LONG, CHUNK=chunk, num_warps=8,
    )  # fmt: skip
    return order


def blocks_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    count: Tensor | None = None,
    *,
    lse: Tensor | None = None,
    tiles: Tiles | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Launch the kernel; also runs on CPU tensors in the Triton interpreter. See the module's docstring.

    lse: where to write the log-sum-exp, float32 [B, H, C], contiguous; rows from `count` on are left as they are.
    tiles: block_n divides block_m, and block_m divides `block`.
    """
    _check(query, kv_num_blocks, kv_indices, block)
    query, key, value = aligned_rows(query), aligned_rows(key), aligned_rows(value)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    if out.numel() == 0:
        return out
    query, scale_log2 = positive_scale(query, scale)
    tiles = tiles_for(query, key, value, tiles=tiles)
    kv_num_blocks, kv_indices = kv_num_blocks.contiguous(), kv_indices.contiguous()
    (batch, heads, capacity, _), align = query.shape, row_alignment(query, key, value, out)
    query_blocks = cdiv(capacity, block)
    launch(
        _blocks_kernel,
        (batch * heads * query_blocks * (block // tiles.block_m),),
        (
            *(query, key, value, out, lse, None if count is None else count.contiguous(), kv_indices),
            *longest_first(kv_num_blocks, kv_indices),
        ),
        (
            *row_strides(align, query, key, value, out),
            *(capacity, heads, heads // key.shape[1], query_blocks, kv_indices.shape[3], scale_log2),
        ),
        descriptors=descriptors(tiles, key, value),
        **tile_options(tiles, key, value, align),
        LAG=tiles.lag,
        BLOCK=block,
    )
    return out


def _check(query: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, block: int) -> None:
    batch, heads, capacity, _ = query.shape
    wanted = (batch, heads, -(-capacity // block))
    if kv_num_blocks.shape != wanted or kv_indices.shape[:3] != wanted or kv_indices.dim() != 4:
        raise ValueError(
            f"block-sparse attention: kv_num_blocks {tuple(kv_num_blocks.shape)} and kv_indices {tuple(kv_indices.shape)} "
            f"do not fit query {tuple(query.shape)}; expected {wanted} and {wanted} with a width"
        )
    if kv_num_blocks.dtype != torch.int32 or kv_indices.dtype != torch.int32:
        raise ValueError(f"block-sparse attention: lists are {kv_num_blocks.dtype}, {kv_indices.dtype}; expected int32")


def blocks_mask(kv_num_blocks: Tensor, kv_indices: Tensor) -> Tensor:
    """Which blocks each query block sees, bool [B, H, Q, Q]: its list, and the diagonal."""
    blocks = torch.arange(kv_num_blocks.shape[2], device=kv_indices.device)
    listed = torch.arange(kv_indices.shape[3], device=kv_indices.device) < kv_num_blocks[..., None]
    mask = kv_indices.new_zeros(*kv_num_blocks.shape, len(blocks) + 1, dtype=torch.bool)
    # What is not listed goes to a column of its own, which is cut off.
    mask.scatter_(3, torch.where(listed, kv_indices, len(blocks)).long(), True)
    return mask[..., :-1] & (blocks < blocks[:, None]) | (blocks == blocks[:, None])


def blocks_aten(
    query: Tensor, key: Tensor, value: Tensor, scale: float, kv_num_blocks: Tensor, kv_indices: Tensor,
    count: Tensor | None = None, *, lse: Tensor | None = None, block: int = BLOCK,
) -> Tensor:  # fmt: skip
    """The same in ATen ops alone, on any device: attention with the lists expanded to a mask [B, H, C, C]."""
    _check(query, kv_num_blocks, kv_indices, block)
    rows = torch.arange(query.shape[2], device=query.device)
    mask = blocks_mask(kv_num_blocks, kv_indices).repeat_interleave(block, 2).repeat_interleave(block, 3)
    mask = mask[:, :, : len(rows), : len(rows)] & (rows <= rows[:, None])
    return attention_under(mask, query, key, value, scale, count, lse)


def attention_under(
    mask: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, count: Tensor | None, lse: Tensor | None
) -> Tensor:
    """SDPA under a mask [B, H, C, C], zeros from `count` on; the log-sum-exp is written out, some rows at a time."""
    if count is not None:
        filler = (torch.arange(query.shape[2], device=query.device) >= count[:, None])[:, None, :, None]
        query, key, value = (tensor.masked_fill(filler, 0) for tensor in (query, key, value))
    out = torch_attention(query, key, value, scale, mask)
    if lse is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key = query.to(wide), repeat_heads(key, query.shape[1]).to(wide)
        for rows, seen, part in zip(*(x.split(_ROWS, 2) for x in (query, mask, lse)), strict=True):
            part.copy_((scale * rows @ key.mT).masked_fill(~seen, -math.inf).logsumexp(-1))
    return (out if count is None else out.masked_fill(filler, 0)).contiguous()


block_sparse_attention = by_device(blocks_triton, blocks_aten)
