"""XAttention's scores: how much a row of a strided query, folded along antidiagonals, sees of each block of keys.

    x[b,h,r,c]      = scale / s * sum over u < s of <query[b, h, r s + s - 1 - u], key[b, g, c s + u]> * log2(e)      c <= r
    peaks[b,h,r,t]  = the largest x over the columns of tile t, which has `span` blocks; -inf where nothing is seen
    sums[b,h,r,j]   = sum of 2^(x - peaks[b, h, r, j // span]) over the columns c of block j, block / s of them       c <= r

    query [B, H, C, D], key [B, Hk, C, D], strides and dtypes as in flash.py; count int32 [B] or None; s = `stride`, 8 or 16
    -> sums float32 [B, H, Q * block / s, Q], Q = ceil(C / block), peaks float32 [B, H, Q * block / s, ceil(Q / span)]

Rows from `count` on are zeros in x; a group of s rows takes part if its first row does. What lies above the diagonal or
behind the count is not written, or anything. x itself, block / s times as large as the sums, never leaves the chip. Two
launches:

    _whole     tiles of x which lie before the count with all rows and columns: by TMA, a program per processor
    _rest      the other tiles, a program each, by pointers; all of them where strides or the GPU rule TMA out

n^2 / s * H * D flops and n^2 / s^2 * H / 2 exponentials. At H = 32, D = 128, n = 128K and stride 16: 4.4 TFLOP, and the
sums have 0.5 GB. A tile of 128 rows and 256 columns reads 1.5 MB for its 134 MFLOP: too much for the memory (10 ms) unless
tiles that run together are neighbours (`_place`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsa_compile.kernels._aten import repeat_heads, whole_blocks
from tsa_compile.kernels.launch import cdiv, launch, tl, triton
from tsa_compile.kernels.tiles import (
    aligned_rows,
    at_head,
    block_dim,
    count_of,
    gather_rows,
    on_hopper,
    positive_scale,
    row_alignment,
    row_strides,
    stride_names,
    tma_fits,
)


class Sums(NamedTuple):
    """What rows see of blocks, each tile of blocks against a peak of its own. See the module's docstring."""

    sums: Tensor
    peaks: Tensor
    span: int


class Tiling(NamedTuple):
    """How x is cut, for tuning."""

    rows: int = 128
    """Rows of a tile; a multiple of a block's, and a divisor of `columns` where TMA is used."""
    columns: int = 128
    """Columns of a tile; a multiple of a block's."""
    dims: int = 64
    """Of the head size, in a step of the product."""
    num_warps: int = 4
    num_stages: int = 2
    use_tma: bool = False
    """Whole tiles by TMA, if strides allow it."""
    units: int = 4
    """Units of `columns` rows, of which programs that run together take the same columns."""


@triton.jit
def _store_sums(
    b_x, p_sums, p_peaks, start_m, start_n, count, blocks, tiles, scale_log2, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """From a tile of x, without its factor, which is positive, its rows' peaks and the sums of its blocks.

    WHOLE: it lies before the count. The tensor cores wait meanwhile: an instruction saved for each number of x is a
    hundredth of the kernel's time. So one peak serves all blocks of a row of the tile, and no logarithm is taken.
    """
    PER_BLOCK: tl.constexpr = BLOCK // STRIDE
    rows, columns = start_m + tl.arange(0, ROWS), start_n + tl.arange(0, COLUMNS)
    keys = start_n // PER_BLOCK + tl.arange(0, COLUMNS // PER_BLOCK)
    if WHOLE:
        if start_n + COLUMNS > start_m:
            b_x = tl.where(columns[None, :] <= rows[:, None], b_x, float("-inf"))
    else:
        b_x = tl.where((columns[None, :] <= rows[:, None]) & (columns * STRIDE < count)[None, :], b_x, float("-inf"))
    b_peaks = tl.max(b_x, axis=1) * scale_log2  # [ROWS]
    b_shift = tl.where(b_peaks == float("-inf"), 0.0, b_peaks)
    b_x = tl.exp2(b_x * scale_log2 - b_shift[:, None])  # [ROWS, COLUMNS]
    b_sums = tl.sum(tl.reshape(b_x, [ROWS, COLUMNS // PER_BLOCK, PER_BLOCK]), axis=2)  # [ROWS, COLUMNS // PER_BLOCK]
    p_sums += (rows.to(tl.int64) * blocks)[:, None] + keys[None, :]
    p_peaks += rows.to(tl.int64) * tiles + start_n // COLUMNS
    if WHOLE:
        tl.store(p_sums, b_sums)
        tl.store(p_peaks, b_peaks)
    else:
        b_real = rows * STRIDE < count
        tl.store(p_sums, b_sums, mask=b_real[:, None] & (keys < blocks)[None, :])
        tl.store(p_peaks, b_peaks, mask=b_real)


@triton.jit
def _root(number):
    """The largest p with p (p + 1) / 2 <= number."""
    p = (tl.sqrt(8.0 * number + 1.0) * 0.5 - 0.5).to(tl.int32)
    p -= (p * (p + 1) // 2 > number).to(tl.int32)  # a root may be rounded either way
    p += ((p + 1) * (p + 2) // 2 <= number).to(tl.int32)
    return p


@triton.jit
def _place(tile, units, PER_UNIT: tl.constexpr, TOGETHER: tl.constexpr):
    """Of a triangle of `units` units, each PER_UNIT tiles of rows that see one tile of columns more than the unit before:
    which tile of rows, and of columns, comes at place `tile`.

    TOGETHER units at a time: first, one tile of columns after the other, those that all of them see; then each its rest.
    """
    first = _root(tile // PER_UNIT) // TOGETHER * TOGETHER
    inside = tile - PER_UNIT * (first * (first + 1) // 2)
    across = tl.minimum(TOGETHER, units - first) * PER_UNIT
    corner = tl.maximum(inside - across * first, 0)
    unit = _root(corner // PER_UNIT)
    corner -= PER_UNIT * (unit * (unit + 1) // 2)
    shared = inside < across * first
    row = tl.where(shared, first * PER_UNIT + inside % across, (first + unit) * PER_UNIT + corner % PER_UNIT)
    return row, tl.where(shared, inside // across, first + corner // PER_UNIT)


@triton.jit
def _corner(stride_b, stride_h, stride_l, item, head, STRIDE: tl.constexpr, ALIGN: tl.constexpr):
    """Where a head begins in the view of `_groups`: its row and column."""
    offset, group = item.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h, STRIDE * stride_l
    return (offset // group).to(tl.int32), (offset % group).to(tl.int32) * ALIGN


@triton.jit(do_not_specialize=[*stride_names("qk"), "capacity", "blocks", "tiles_across", "heads", "heads_per_kv"])
def _whole_kernel(
    p_sums, p_peaks, p_count, desc_query, desc_key, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    capacity, blocks, tiles_across, heads, heads_per_kv, scale_log2,
    STRIDE: tl.constexpr, DIM: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One program: of the whole tiles of an item, head after head, every num_programs-th."""
    PER_UNIT: tl.constexpr = COLUMNS // ROWS
    item = tl.program_id(1)
    count = count_of(p_count, item, capacity)
    units = tl.maximum(count, 0) // (STRIDE * COLUMNS)
    tiles = PER_UNIT * (units * (units + 1) // 2)
    for place in tl.range(tl.program_id(0), tiles * heads, tl.num_programs(0)):
        head = place // tiles
        row, column = _place(place % tiles, units, PER_UNIT, TOGETHER)
        corner_query, column_query = _corner(stride_qb, stride_qh, stride_ql, item, head, STRIDE, ALIGN)
        corner_key, column_key = _corner(stride_kb, stride_kh, stride_kl, item, head // heads_per_kv, STRIDE, ALIGN)
        corner_query += row * ROWS
        corner_key += column * COLUMNS
        b_x = tl.zeros([ROWS, COLUMNS], tl.float32)
        for part in tl.range(0, STRIDE * (DIM // DIMS)):
            step, start_d = part // (DIM // DIMS), part % (DIM // DIMS) * DIMS
            b_query = desc_query.load([corner_query, column_query + (STRIDE - 1 - step) * stride_ql * ALIGN + start_d])
            b_key = desc_key.load([corner_key, column_key + step * stride_kl * ALIGN + start_d])
            # [ROWS, DIMS] by [DIMS, COLUMNS]
            b_x = tl.dot(b_query, tl.trans(b_key), b_x, input_precision="ieee")
        first_row = (item.to(tl.int64) * heads + head) * (BLOCK // STRIDE) * blocks
        _store_sums(
            b_x, p_sums + first_row * blocks, p_peaks + first_row * tiles_across, row * ROWS, column * COLUMNS,
            count, blocks, tiles_across, scale_log2, STRIDE, BLOCK, ROWS, COLUMNS, True,
        )  # fmt: skip


@triton.jit
def _load_groups(
    p_rows, stride_row, first, step, start_d, count,
    GROUPS: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Row `step` of each group from `first` on, [GROUPS, DIMS] of its dimensions; zeros behind the count."""
    rows = (first + tl.arange(0, GROUPS)) * STRIDE + step
    return gather_rows(p_rows, rows.to(tl.int64) * stride_row, rows < count, start_d, DIM, DIMS)


@triton.jit(do_not_specialize=[*stride_names("qk"), "capacity", "blocks", "tiles_across", "heads_per_kv"])
def _rest_kernel(
    p_query, p_key, p_count, p_sums, p_peaks,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, capacity, blocks, tiles_across, heads_per_kv,
    scale_log2, STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, AFTER_WHOLE: tl.constexpr,
):  # fmt: skip
    """One program: one tile of x, of the rows after the whole units if there are any."""
    head, item = tl.program_id(1), tl.program_id(2)
    count = count_of(p_count, item, capacity)
    start_m, start_n = tl.program_id(0) // tiles_across * ROWS, tl.program_id(0) % tiles_across * COLUMNS
    if AFTER_WHOLE:
        start_m += tl.maximum(count, 0) // (STRIDE * COLUMNS) * COLUMNS
    if (start_m * STRIDE >= count) | (start_n >= start_m + ROWS):
        return
    p_query = at_head(p_query, stride_qb, stride_qh, item, head, ALIGN)
    p_key = at_head(p_key, stride_kb, stride_kh, item, head // heads_per_kv, ALIGN)
    far_query, far_key = stride_ql * ALIGN, stride_kl * ALIGN
    first_row = (item.to(tl.int64) * tl.num_programs(1) + head.to(tl.int64)) * (BLOCK // STRIDE) * blocks
    b_x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part in tl.range(0, STRIDE * (BLOCK_D // DIMS)):
        step, start_d = part // (BLOCK_D // DIMS), part % (BLOCK_D // DIMS) * DIMS
        b_query = _load_groups(p_query, far_query, start_m, STRIDE - 1 - step, start_d, count, ROWS, STRIDE, DIM, DIMS)
        b_key = _load_groups(p_key, far_key, start_n, step, start_d, count, COLUMNS, STRIDE, DIM, DIMS)
        b_x = tl.dot(b_query, tl.trans(b_key), b_x, input_precision="ieee")
    _store_sums(
        b_x, p_sums + first_row * blocks, p_peaks + first_row * tiles_across, start_m, start_n,
        count, blocks, tiles_across, scale_log2, STRIDE, BLOCK, ROWS, COLUMNS, False,
    )  # fmt: skip


def sums_triton(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None = None, *,
    stride: int, block: int, tiling: Tiling | None = None,
) -> Sums:  # fmt: skip
    """Launches the kernels; also runs on CPU tensors in the Triton interpreter. See the module's docstring."""
    query, key = aligned_rows(query), aligned_rows(key)
    query, scale_log2 = positive_scale(query, scale / stride)
    (batch, heads, capacity, dim), kv_heads = query.shape, key.shape[1]
    tiling = _tiling(query, key, stride, tiling)
    found = _room(query, stride, block, tiling)
    if found.sums.numel() == 0:
        return found
    align, blocks, tiles_across = row_alignment(query, key), found.sums.shape[3], found.peaks.shape[3]
    strides, shape = row_strides(align, query, key), (capacity, blocks, tiles_across)
    constants: dict[str, Any] = {
        "STRIDE": stride, "DIM": dim, "ALIGN": align, "BLOCK": block, "ROWS": tiling.rows, "COLUMNS": tiling.columns,
        "DIMS": tiling.dims, "num_warps": tiling.num_warps, "num_stages": tiling.num_stages,
    }  # fmt: skip
    size = cdiv(capacity, stride)
    if tiling.use_tma and size >= tiling.columns:
        views = (_groups(query, stride, tiling.rows, tiling.dims), _groups(key, stride, tiling.columns, tiling.dims))
        launch(
            _whole_kernel, (_processors(query.device), batch), (*found[:2], count),
            (*strides, *shape, heads, heads // kv_heads, scale_log2),
            descriptors=views, TOGETHER=tiling.units, **constants,
        )  # fmt: skip
    if tiling.use_tma and count is None and capacity % (stride * tiling.columns) == 0:
        return found
    row_tiles = tiling.columns // tiling.rows if tiling.use_tma else cdiv(size, tiling.rows)
    launch(
        _rest_kernel, (row_tiles * tiles_across, heads, batch), (query, key, count, *found[:2]),
        (*strides, *shape, heads // kv_heads, scale_log2),
        BLOCK_D=block_dim(dim), AFTER_WHOLE=tiling.use_tma, **constants,
    )  # fmt: skip
    return found


def _room(query: Tensor, stride: int, block: int, tiling: Tiling) -> Sums:
    """Memory for the sums and peaks, not yet written."""
    blocks, span = cdiv(query.shape[2], block), tiling.columns * stride // block
    sums = torch.empty(*query.shape[:2], blocks * (block // stride), blocks, dtype=torch.float32, device=query.device)
    return Sums(sums, sums.new_empty(*sums.shape[:3], cdiv(blocks, span)), span)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tiling(query: Tensor, key: Tensor, stride: int, tiling: Tiling | None) -> Tiling:
    """What was asked for, or what fits the GPU, adapted to the head size and to strides."""
    use_tma = _groups_fit(query, stride) and _groups_fit(key, stride)
    if tiling is None and query.dtype == torch.float32:
        tiling = Tiling(32, 32, 32, 4, 1)
    elif tiling is None:
        tiling = Tiling(128, 256, 64, 8, 3, use_tma=True) if use_tma and on_hopper(query) else Tiling(128, 128, 32, 8, 2)
    return tiling._replace(dims=min(tiling.dims, block_dim(query.shape[3])), use_tma=tiling.use_tma and use_tma)


def _groups_fit(tensor: Tensor, stride: int) -> bool:
    """Whether `_groups` has a view of the tensor: a head's groups of rows are whole rows of it, or a range of columns."""
    (batch, heads, capacity, dim), (stride_b, stride_h, stride_l) = tensor.shape, tensor.stride()[:3]
    if capacity < stride or dim != block_dim(dim) or not tma_fits(tensor):
        return False  # columns behind the head size are no zeros, but the next head's
    group = stride * stride_l
    whole_items = batch == 1 or stride_b % group == 0
    whole_heads = heads == 1 or stride_h % group == 0 or (heads - 1) * stride_h + dim <= stride_l
    return whole_items and whole_heads


def _groups(tensor: Tensor, stride: int, groups: int, dims: int):
    """TMA's view of a tensor as a matrix, a group of `stride` tokens a row, in tiles of `groups` rows.

    A matrix, as a tile of more dimensions is reshaped in registers: then the query is an operand from registers, which
    Triton 3.6 overwrites while products of the step before still read it.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor  # here, as the package imports without Triton

    (batch, heads, capacity, _), (stride_b, stride_h, stride_l) = tensor.shape, tensor.stride()[:3]
    group = stride * stride_l
    rows = ((batch - 1) * stride_b + (heads - 1) * stride_h) // group + capacity // stride
    return TensorDescriptor(tensor, [rows, group], [group, 1], [groups, dims])


def strided_logits(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None, stride: int, block: int
) -> tuple[Tensor, Tensor]:
    """`x`, [B, H, n, n] with n = Q * block / stride, -inf where a row doesn't see; the rows behind the count, [B, 1, n]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    none, rows = whole_blocks(count, block, query.to(wide), repeat_heads(key, query.shape[1]).to(wide))
    query, key = (tensor.unflatten(2, (-1, stride)) for tensor in rows)
    x = scale / stride * (query.flip(3).flatten(3) @ key.flatten(3).transpose(2, 3))
    behind = none[:, None, ::stride]
    future = torch.ones(x.shape[2:], dtype=torch.bool, device=x.device).triu(1)
    return x.masked_fill(future | behind[:, :, None], -math.inf), behind
