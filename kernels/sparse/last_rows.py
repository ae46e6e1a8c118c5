"""The attention of the last rows to all keys, summed along columns and along diagonals, without storing it.

    A[b,h,r,c]            = softmax over c <= p_r of scale * <query[b, h, p_r], key[b, g, c]>,  p_r = n - 128 + r >= 0
    columns[b,h,c]        = sum over r of A[r, c]
    diagonals[b,h,d]      = sum over r of A[r, p_r - d]                                         d = 0: the main diagonal
    blocks[b,h,j]         = sum of columns[c] over the columns c < n of block j

    query [B, H, C, D], key [B, Hk, C, D], strides and dtypes as in flash.py; count int32 [B] or None; n = count[b] or C
    -> sums float32 [B, H, 2, C], columns and diagonals, unwritten from n on; bands float32 [B, H, 2, Q], of which blocks
       go to bands[:, :, 0], unwritten behind n; Q = ceil(C / 128)

Two launches, for the sums need every row's norm. In both, a program takes a split of `span` blocks of keys:

    _norm     the logarithm to base 2 of each row's sum of exp over the split                       [B, H, Q / span, 128]
    _sums     all splits' norms, then the tiles once more, with their weights

Diagonals are numbered by e = c - r + 127 = n - 1 - d, so that those of a tile of 64 columns begin with e = c for its last
row. A gather turns row r by r + 1 places, modulo 64, so that diagonals become columns: column j then holds those that are j,
j + 64 and j + 128 after the tile's first column, and which of them is (j + r + 1) // 64. The second and third are those of
the next two tiles, which pick them up. So each diagonal is written once, by the program that owns it, and the same bit for
bit in every run; a program first computes the block before its own, for what that one leaves over.

Each launch: 2 * 128 * n * H * D flops, 128 * n * H exponentials, key once from memory as the heads of a group run side by
side. At H = 32, G = 8, D = 128, n = 128K: 137 GFLOP, 0.54 G exponentials, 0.27 GB: about 0.4 and 0.9 ms of an H200's time,
bound by the softmax and by the turning through shared memory; sums have 34 MB.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsa_compile.kernels.launch import cdiv, launch, tl, triton
from tsa_compile.kernels.tiles import (
    at_head,
    block_dim,
    count_of,
    gather_rows,
    log_sum,
    row_alignment,
    row_strides,
    stride_names,
)


class Splitting(NamedTuple):
    """How the launches are cut, for tuning."""

    span: int = 8
    """Blocks of keys of a program."""
    columns: int = 64
    """Keys of a tile: a block's, or half of them."""
    dims: int = 128
    """Of the head size, in a step of the product."""
    num_warps: int = 8
    num_stages: int = 2


@triton.jit
def load_part(
    p_rows, stride_row, start, count, start_d,
    ROWS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows [ROWS, DIMS] from `start`, which may be negative; zeros where there is no row, and beyond the head size."""
    rows = start + tl.arange(0, ROWS)
    return gather_rows(p_rows, rows.to(tl.int64) * stride_row * ALIGN, (rows >= 0) & (rows < count), start_d, DIM, DIMS)


@triton.jit
def _logits(
    b_query, p_query, p_key, stride_ql, stride_kl, start, count, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 of the last rows and the tile of keys at `start`, and which of them count."""
    first = count - BLOCK
    if DIMS == BLOCK_D:
        b_key = load_part(p_key, stride_kl, start, count, 0, COLUMNS, DIM, DIMS, ALIGN)
        b_logits = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
    else:
        b_logits = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for start_d in tl.range(0, BLOCK_D, DIMS):
            b_part = load_part(p_query, stride_ql, first, count, start_d, BLOCK, DIM, DIMS, ALIGN)
            b_key = load_part(p_key, stride_kl, start, count, start_d, COLUMNS, DIM, DIMS, ALIGN)
            b_logits = tl.dot(b_part, tl.trans(b_key), b_logits, input_precision="ieee")
    rows, columns = first + tl.arange(0, BLOCK), start + tl.arange(0, COLUMNS)
    return b_logits * scale_log2, (rows >= 0)[:, None] & (columns[None, :] <= rows[:, None])


@triton.jit
def _last_rows(p_query, stride_ql, count, DIM: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """The first DIMS dimensions of the last rows: all of them, where a step takes all."""
    return load_part(p_query, stride_ql, count - BLOCK, count, 0, BLOCK, DIM, DIMS, ALIGN)


@triton.jit(do_not_specialize=[*stride_names("qk"), "capacity", "heads_per_kv", "span"])
def _norm_kernel(
    p_query, p_key, p_count, p_norm,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, capacity, heads_per_kv, span, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """What each row sums up to over one split; -inf where it sees none of it."""
    head, split, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = count_of(p_count, item, capacity)
    if split * span * BLOCK >= count:
        return
    p_query = at_head(p_query, stride_qb, stride_qh, item, head, ALIGN)
    p_key = at_head(p_key, stride_kb, stride_kh, item, head // heads_per_kv, ALIGN)
    b_query = _last_rows(p_query, stride_ql, count, DIM, DIMS, ALIGN, BLOCK)
    b_max = tl.full([BLOCK], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(split * span * BLOCK, tl.minimum((split + 1) * span * BLOCK, count), COLUMNS):
        b_logits, b_seen = _logits(
            b_query, p_query, p_key, stride_ql, stride_kl, start, count, scale_log2,
            DIM, BLOCK_D, DIMS, ALIGN, BLOCK, COLUMNS,
        )  # fmt: skip
        b_logits = tl.where(b_seen, b_logits, float("-inf"))
        b_max, b_sum = log_sum(b_logits, b_max, b_sum, 1)
    b_norm = tl.where(b_max == float("-inf"), b_max, b_max + tl.log2(tl.maximum(b_sum, 1.0)))
    row = (item * tl.num_programs(0) + head).to(tl.int64) * tl.num_programs(1) + split
    tl.store(p_norm + row * BLOCK + tl.arange(0, BLOCK), b_norm)


@triton.jit
def _norm_of_all(p_norm, splits, BLOCK: tl.constexpr):
    """Each row's norm over all splits; 0 for the rows that are none."""
    rows = tl.arange(0, BLOCK)
    b_max = tl.full([BLOCK], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits, 16):
        parts = start + tl.arange(0, 16)
        b_norm = tl.load(p_norm + parts[:, None] * BLOCK + rows, mask=(parts < splits)[:, None], other=float("-inf"))
        b_max, b_sum = log_sum(b_norm, b_max, b_sum, 0)
    return tl.where(b_max == float("-inf"), 0.0, b_max + tl.log2(tl.maximum(b_sum, 1.0)))


@triton.jit(do_not_specialize=[*stride_names("qk"), "capacity", "heads_per_kv", "span", "blocks"])
def _sums_kernel(
    p_query, p_key, p_count, p_norm, p_sums, p_bands,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, capacity, heads_per_kv, span, blocks, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The columns of one split, and as many diagonals."""
    head, split, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = count_of(p_count, item, capacity)
    if split * span * BLOCK >= count:
        return
    row = (item * tl.num_programs(0) + head).to(tl.int64)
    p_norm += row * tl.num_programs(1) * BLOCK
    p_sums += row * 2 * capacity
    p_bands += row * 2 * blocks
    p_query = at_head(p_query, stride_qb, stride_qh, item, head, ALIGN)
    p_key = at_head(p_key, stride_kb, stride_kh, item, head // heads_per_kv, ALIGN)
    b_norm = _norm_of_all(p_norm, tl.cdiv(count, span * BLOCK), BLOCK)
    b_query = _last_rows(p_query, stride_ql, count, DIM, DIMS, ALIGN, BLOCK)
    places = tl.arange(0, COLUMNS)
    b_turns = tl.arange(0, BLOCK)[:, None] + places[None, :] + 1
    b_further = BLOCK // COLUMNS - b_turns // COLUMNS  # in tiles
    b_next, b_after = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    held = tl.zeros([], tl.float32)
    first = split * span * BLOCK
    for start in tl.range(tl.maximum(first - BLOCK, 0), tl.minimum(first + span * BLOCK, count), COLUMNS):
        b_logits, b_seen = _logits(
            b_query, p_query, p_key, stride_ql, stride_kl, start, count, scale_log2,
            DIM, BLOCK_D, DIMS, ALIGN, BLOCK, COLUMNS,
        )  # fmt: skip
        b_weights = tl.where(b_seen, tl.exp2(b_logits - b_norm[:, None]), 0.0)  # [BLOCK, COLUMNS]
        b_turned = tl.gather(b_weights, b_turns % COLUMNS, 1)
        b_diagonals = tl.sum(tl.where(b_further == 0, b_turned, 0.0), axis=0) + b_next
        b_next = tl.sum(tl.where(b_further == 1, b_turned, 0.0), axis=0) + b_after
        if BLOCK != COLUMNS:
            b_after = tl.sum(tl.where(b_further == 2, b_turned, 0.0), axis=0)
        b_columns, columns = tl.sum(b_weights, axis=0), start + places
        b_owned = (columns >= first) & (columns < count)
        tl.store(p_sums + columns, b_columns, mask=b_owned)
        tl.store(p_sums + capacity + count - 1 - columns, b_diagonals, mask=b_owned)
        # Half a block is overwritten by the whole. The block before the first is the same wherever it comes from.
        held = tl.sum(b_columns, axis=0) + tl.where(start % BLOCK == 0, 0.0, held)
        tl.store(p_bands + start // BLOCK, held)


def last_rows_sums(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None, block: int, splitting: Splitting
) -> tuple[Tensor, Tensor]:
    """Launches the kernels on rows as `aligned_rows` leaves them: sums and bands as in the module's docstring."""
    (batch, heads, capacity, dim), kv_heads = query.shape, key.shape[1]
    blocks, block_d, align = cdiv(capacity, block), block_dim(dim), row_alignment(query, key)
    dims = min(splitting.dims, block_d, 32 if query.dtype == torch.float32 else block_d)
    splits = cdiv(blocks, splitting.span)
    sums = torch.empty(batch, heads, 2, capacity, dtype=torch.float32, device=query.device)
    bands, norm = sums.new_empty(batch, heads, 2, blocks), sums.new_empty(batch, heads, splits, block)
    strides = row_strides(align, query, key)
    columns = min(splitting.columns, block)
    if block // columns not in (1, 2) or block % columns:
        raise ValueError(f"last rows: tiles of {columns} keys do not fit blocks of {block}; expected one or two to a block")
    options: dict[str, Any] = {
        "DIM": dim, "BLOCK_D": block_d, "DIMS": dims, "ALIGN": align, "BLOCK": block, "COLUMNS": columns,
        "num_warps": splitting.num_warps, "num_stages": splitting.num_stages,
    }  # fmt: skip
    scale_log2 = scale * math.log2(math.e)
    numbers = (*strides, capacity, heads // kv_heads, splitting.span)
    grid = (heads, splits, batch)
    launch(_norm_kernel, grid, (query, key, count, norm), (*numbers, scale_log2), **options)
    launch(_sums_kernel, grid, (query, key, count, norm, sums, bands), (*numbers, blocks, scale_log2), **options)
    return sums, bands


def last_rows_sums_aten(query: Tensor, key: Tensor, scale: float, rows: Tensor, block: int) -> Tensor:
    """The same sums in ATen ops alone, in the dtype of query; zeros from n on.

    Args:
        query, key: [B, H, C, D], without NaN.
        rows: n of each item, int64 [B].
    """
    capacity = query.shape[2]
    columns = torch.arange(capacity, device=query.device)
    positions = rows[:, None] - block + torch.arange(block, device=query.device)
    there = (positions >= 0)[:, None, :, None]
    last = query.gather(2, positions.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    seen = there & (columns <= positions[..., None])[:, None]
    # Rows in front of the first token see the first key, so that their softmax is a number, not NaN.
    weights = (scale * last @ key.transpose(2, 3)).masked_fill(~(seen | (columns == 0)), -math.inf)
    weights = weights.softmax(dim=3).masked_fill(~seen, 0)
    crossed = (positions[..., None] - columns)[:, None]
    crosses = there & (crossed >= 0)
    diagonals = weights.gather(3, crossed.clamp(min=0).expand_as(weights)).masked_fill(~crosses, 0)
    return torch.stack([weights.sum(dim=2), diagonals.sum(dim=2)], dim=2)
