"""Attention along diagonals and at single columns: lists of tiles by distance, the same for every block of queries.

    out[b, h, i] = sum_j softmax_j(scale * <query[b, h, i], key[b, g, j]>) value[b, g, j]     i < count[b], g = h // (H / Hk)
                   over j <= i with j in columns[b, h], or a t in starts[b, h] such that t < e - j <= t + 64,
                   where e = 64 (i // 64 + 1) is the end of i's block

    query [B, H, C, D], key [B, Hk, C, D], value [B, Hk, C, Dv], strides and dtypes as in flash.py; count int32 [B] or None
    starts int32 [B, H, S]: ascending, the first is 0, each at least 64 more than the one before, NONE behind the last
    columns int32 [B, H, N]: ascending without repetitions, C - 1 or more behind the last
    ->  out [B, H, C, Dv], contiguous; rows from `count` on are left unwritten on CUDA, zeros elsewhere
        lse float32 [B, H, C], where asked for: log sum_j exp(scale * <query[b, h, i], key[b, g, j]>), over the same j

A diagonal at distance s meets a block of 64 queries in 64 keys, which end s before the block does. So tiles that cover some
diagonals lie at the same distances from every block of queries, but need not start at multiples of 64; and one list a head
serves all, of which a block reads as many tiles as it has keys before it. Its own tile, at distance 0, is the only one that
it sees in part; the tile that key 0 cuts off is masked. A column counts once: those in the unbroken run of tiles at the
diagonal are left out, those that lie in one of the others are masked, by a table of where tiles start in each stretch of 64
distances.

    _gather    keys and values at the columns become dense, zeros from `count` on   -> [B, H, N, D], [B, H, N, Dv]
    _attend    a program per 64 queries: tiles, then columns in tiles of 64, then the diagonal

Nothing is read on the host and no length is a constant of the kernel. Lists of blocks of 128, which blocks.py takes,
would make such patterns dense: on planted inputs (benchmarks/sparse_inputs.py) 1000 columns and 6096 diagonals are 0.14 of
the causal keys at 128K in this form (columns: 0.007), 0.26 to 0.33 in blocks of 128; at 32K 0.61 and 0.85 to 0.96. 3500
columns and 100 diagonals at 128K: 0.028 and 0.13 to 0.24. At H = 32, D = 128, n = 128K, 0.13: 18 TFLOP; the columns take
16 MB.

Method: the vertical-slash kernel of MInference, arXiv 2407.02490. It lists tiles for each block of queries, from the
farthest diagonal on; from the nearest on, it takes as many, and they can be shared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tsa_compile.kernels.launch import by_device, cdiv, launch, tl, triton
from tsa_compile.kernels.sparse.blocks import attention_under, listed_tiles
from tsa_compile.kernels.tiles import (
    POINTER,
    STRIDE,
    Tiles,
    add_tile,
    add_values,
    aligned_rows,
    at_head,
    block_dim,
    count_of,
    descriptors,
    diagonal,
    gather_rows,
    load_rows,
    load_tile,
    positive_scale,
    row_alignment,
    row_strides,
    store_lse,
    store_rows,
    stride_names,
    tile_options,
    tiles_for,
    weigh_seen,
)

BLOCK = 64
"""Queries that share their tiles, and keys of a tile."""
NONE = 1 << 30
"""The distance of a tile that is not there."""

# Below every logit, yet finite: a tile that is masked altogether must not make NaN of a row that has seen nothing.
_LOWEST = tl.constexpr(-3.0e38)


class VerticalSlash(NamedTuple):
    """Tiles by their distance from the queries, and single columns, of every head."""

    starts: Tensor
    columns: Tensor


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_l", "capacity", "width"])
def _gather_kernel(
    p_rows, p_columns, p_count, p_out, stride_b, stride_h, stride_l, capacity, width, heads_per_kv,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[b, h, n] = rows[b, g, columns[b, h, n]]; zeros for columns that are not there."""
    head, item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    line = item * tl.num_programs(1) + head
    count = count_of(p_count, item, capacity)
    slots = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b_columns = tl.load(p_columns + line * width + slots, mask=slots < width, other=capacity)
    p_rows = at_head(p_rows, stride_b, stride_h, item, head // heads_per_kv, ALIGN)
    b_rows = gather_rows(p_rows, b_columns.to(tl.int64) * stride_l * ALIGN, b_columns < count, 0, DIM, BLOCK_D)
    dims = tl.arange(0, BLOCK_D)
    p_out += (line * tl.num_programs(0) * ROWS + slots)[:, None] * DIM
    tl.store(p_out + dims[None, :], b_rows, mask=(dims < DIM)[None, :])


@triton.jit
def _edge_tile(
    b_query, b_acc, b_max, b_sum, key, value, stop, scale_log2,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys [0, stop), what is left of the tile that key 0 cuts off."""
    for start in tl.range(0, stop, BLOCK_N, num_stages=1):
        b_key = load_rows(key[POINTER], key[STRIDE], start, stop, True, BLOCK_N, DIM, b_query.shape[1], ALIGN)
        b_seen = (start + tl.arange(0, BLOCK_N) < stop)[None, :]
        b_weights, b_keep, b_max, b_sum = weigh_seen(b_query, b_key, b_seen, b_max, b_sum, scale_log2)
        b_value = load_rows(value[POINTER], value[STRIDE], start, stop, True, BLOCK_N, VALUE_DIM, b_acc.shape[1], ALIGN)
        b_acc = add_values(b_acc, b_keep, b_weights, b_value)
    return b_acc, b_max, b_sum


@triton.jit
def _column_tiles(
    b_query, b_acc, b_max, b_sum, key, value, p_columns, p_table, before, end, scale_log2,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first `before` columns, all before the queries' own block, but for those that lie in a tile."""
    for start in tl.range(0, before, BLOCK_N):
        b_key = load_tile(key, start, BLOCK_N, DIM, b_query.shape[1], ALIGN)
        slots = start + tl.arange(0, BLOCK_N)
        distance = end - 1 - tl.load(p_columns + slots, mask=slots < before, other=0)
        # A tile that holds this distance starts in the same stretch or in the one before it.
        near = distance - tl.load(p_table + distance // BLOCK)
        far = distance - tl.load(p_table + distance // BLOCK - 1)
        b_new = (slots < before) & ((near < 0) | (near >= BLOCK)) & ((far < 0) | (far >= BLOCK))
        b_weights, b_keep, b_max, b_sum = weigh_seen(b_query, b_key, b_new[None, :], b_max, b_sum, scale_log2)
        b_acc = add_tile(b_acc, b_keep, b_weights, value, start, VALUE_DIM, ALIGN, BLOCK_N)
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=[*stride_names("qkvo"), "capacity", "heads_per_kv", "query_blocks", "slots", "width", "room"])
def _attend_kernel(
    p_query, p_key, p_value, p_out, p_lse, p_count, p_starts, p_columns, p_table, p_tiles, p_before,
    p_column_key, p_column_value, desc_key, desc_value, desc_column_key, desc_column_value,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ob, stride_oh, stride_ol, capacity, heads_per_kv, query_blocks, slots, width, room, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LAG: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of a block of one head, those that see most first."""
    head, item = tl.program_id(1), tl.program_id(2)
    count = count_of(p_count, item, capacity)
    own = tl.cdiv(count, BLOCK) - 1 - tl.program_id(0) // (BLOCK // BLOCK_M)
    start_own = own * BLOCK
    start_m = start_own + BLOCK - (tl.program_id(0) % (BLOCK // BLOCK_M) + 1) * BLOCK_M
    if (own < 0) | (start_m >= count):
        return
    kv_head = head // heads_per_kv
    line = item.to(tl.int64) * tl.num_programs(1) + head.to(tl.int64)
    p_query = at_head(p_query, stride_qb, stride_qh, item, head, ALIGN)
    key = (desc_key, at_head(p_key, stride_kb, stride_kh, item, kv_head, ALIGN), stride_kl, item, kv_head)
    value = (desc_value, at_head(p_value, stride_vb, stride_vh, item, kv_head, ALIGN), stride_vl, item, kv_head)
    column_key = (desc_column_key, p_column_key + line * room * DIM, DIM // ALIGN, item, head)
    column_value = (desc_column_value, p_column_value + line * room * VALUE_DIM, VALUE_DIM // ALIGN, item, head)
    p_table += line * (query_blocks + 1)
    tiles = tl.load(p_tiles + line * query_blocks + own) - 1
    before = tl.load(p_before + line * query_blocks + own)
    cut = tl.load(p_table + own)
    stop = tl.where(cut > start_own, start_own + BLOCK - cut, 0)

    b_query = load_rows(p_query, stride_ql, start_m, count, True, BLOCK_M, DIM, BLOCK_D, ALIGN)  # [BLOCK_M, BLOCK_D]
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_max = tl.full([BLOCK_M], _LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    steps = tiles * (BLOCK // BLOCK_N) + (start_m - start_own) // BLOCK_N
    b_acc, b_max, b_sum = listed_tiles(  # by their distance: back from the queries' own
        b_query, b_acc, b_max, b_sum, key, value, p_starts + line * slots + 1, tiles, start_own, start_own, steps,
        scale_log2, -1, DIM, VALUE_DIM, ALIGN, BLOCK, BLOCK_N, LAG,
    )  # fmt: skip
    b_acc, b_max, b_sum = _edge_tile(
        b_query, b_acc, b_max, b_sum, key, value, stop, scale_log2, DIM, VALUE_DIM, ALIGN, BLOCK_N
    )
    b_acc, b_max, b_sum = _column_tiles(
        b_query, b_acc, b_max, b_sum, column_key, column_value, p_columns + line * width, p_table, before,
        start_own + BLOCK, scale_log2, DIM, VALUE_DIM, ALIGN, BLOCK, BLOCK_N,
    )  # fmt: skip
    b_acc, b_max, b_sum = diagonal(
        b_query, b_acc, b_max, b_sum, key, value, start_m, count, scale_log2, DIM, VALUE_DIM, ALIGN, BLOCK_N
    )
    p_out = at_head(p_out, stride_ob, stride_oh, item, head, ALIGN)
    store_rows(p_out, stride_ol, b_acc / b_sum[:, None], start_m, count, BLOCK_M, VALUE_DIM, BLOCK_DV, ALIGN)
    store_lse(p_lse, line, capacity, b_max, b_sum, start_m, count)


def start_table(starts: Tensor, blocks: int, block: int = BLOCK) -> Tensor:
    """Where a tile starts in each stretch of `block` distances, int32 [B, H, blocks + 1]; NONE where none does."""
    stretches = (starts // block).clamp(max=blocks).long()
    # Tiles beyond the last stretch, and those that are not there, share a slot that nobody reads.
    table = torch.full((*starts.shape[:2], blocks + 1), NONE, dtype=torch.int32, device=starts.device)
    return table.scatter_(2, stretches, starts)


def _bounds(lists: VerticalSlash, blocks: int, block: int) -> tuple[Tensor, Tensor]:
    """How many tiles each block of queries has at keys from 0 on, and how many columns before its run of tiles.

    Both int32 [B, H, blocks]. The run is that of tiles without a gap which ends with the block's own.
    """
    slots = lists.starts.shape[2]
    places = block * torch.arange(max(blocks, slots), dtype=torch.int32, device=lists.starts.device)
    run = (lists.starts == places[:slots]).sum(dim=2, keepdim=True, dtype=torch.int32)
    firsts = places[:blocks].expand(*lists.starts.shape[:2], -1).contiguous()
    tiles = torch.searchsorted(lists.starts, firsts, right=True, out_int32=True)
    return tiles, torch.searchsorted(lists.columns, firsts - (run - 1) * block, out_int32=True)


def _column_rows(rows: Tensor, columns: Tensor, count: Tensor | None, room: int) -> Tensor:
    """Keys or values at the columns, [B, H, room, D]; room is a multiple of 16."""
    (batch, heads, width), (capacity, dim), align = columns.shape, rows.shape[2:], row_alignment(rows)
    out = rows.new_empty(batch, heads, room, dim)
    if out.numel() > 0:
        launch(
            _gather_kernel, (room // 16, heads, batch), (rows, columns, count, out),
            (*row_strides(align, rows), capacity, width, heads // rows.shape[1]),
            DIM=dim, BLOCK_D=block_dim(dim), ALIGN=align, ROWS=16, num_warps=4,
        )  # fmt: skip
    return out


def vertical_slash_triton(
    query: Tensor, key: Tensor, value: Tensor, scale: float, starts: Tensor, columns: Tensor, count: Tensor | None = None, *,
    lse: Tensor | None = None, tiles: Tiles | None = None, block: int = BLOCK,
) -> Tensor:  # fmt: skip
    """Launch the kernels; also runs on CPU tensors in the Triton interpreter. See the module's docstring.

    lse: where to write the log-sum-exp, float32 [B, H, C], contiguous; rows from `count` on are left as they are.
    tiles: block_n divides block_m, and block_m divides `block`.
    """
    _check(query, starts, columns)
    query, key, value = aligned_rows(query), aligned_rows(key), aligned_rows(value)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    if out.numel() == 0:
        return out
    query, scale_log2 = positive_scale(query, scale)
    lists = VerticalSlash(starts.contiguous(), columns.contiguous())
    count = None if count is None else count.contiguous()
    (batch, heads, capacity, _), blocks = query.shape, cdiv(query.shape[2], block)
    room = cdiv(max(columns.shape[2], 1), 128) * 128
    dense = tuple(_column_rows(rows, lists.columns, count, room) for rows in (key, value))
    chosen = tiles_for(query, key, value, *dense, tiles=tiles)
    tiles = chosen if tiles is not None else _fitting(chosen, block)
    align = row_alignment(query, key, value, out, *dense)
    table, bounds = start_table(lists.starts, blocks, block), _bounds(lists, blocks, block)
    launch(
        _attend_kernel,
        (blocks * (block // tiles.block_m), heads, batch),
        (query, key, value, out, lse, count, *lists, table, *bounds, *dense),
        (
            *row_strides(align, query, key, value, out),
            *(capacity, heads // key.shape[1], blocks, starts.shape[2], columns.shape[2], room, scale_log2),
        ),
        descriptors=descriptors(tiles, key, value, *dense),
        **tile_options(tiles, key, value, align),
        LAG=tiles.lag,
        BLOCK=block,
    )
    return out


def _fitting(tiles: Tiles, block: int) -> Tiles:
    """The same tiles with at most `block` rows, and as many rows a warp as before."""
    shrunk = max(tiles.block_m // block, 1)
    return tiles._replace(block_m=tiles.block_m // shrunk, num_warps=max(tiles.num_warps // shrunk, 4))


def _check(query: Tensor, starts: Tensor, columns: Tensor) -> None:
    if {tuple(starts.shape[:-1]), tuple(columns.shape[:-1])} != {tuple(query.shape[:2])}:
        raise ValueError(
            f"vertical-slash attention: starts {tuple(starts.shape)} and columns {tuple(columns.shape)} do not fit query "
            f"{tuple(query.shape)}; expected {(*query.shape[:2], 'S')} and {(*query.shape[:2], 'N')}"
        )
    if starts.dtype != torch.int32 or columns.dtype != torch.int32:
        raise ValueError(f"vertical-slash attention: lists are {starts.dtype}, {columns.dtype}; expected int32")


def vertical_slash_mask(lists: VerticalSlash, capacity: int, rows: Tensor | None = None, block: int = BLOCK) -> Tensor:
    """Which keys each row sees, bool [B, H, C, C]; with rows [n] only these, [B, H, n, C]."""
    keys, blocks = torch.arange(capacity, device=lists.starts.device), cdiv(capacity, block)
    rows = keys if rows is None else rows
    distances = torch.arange(blocks * block, device=keys.device)
    # In front stands a stretch without a tile, the one before the first.
    table = F.pad(start_table(lists.starts, blocks, block), (1, 0), value=NONE)
    within = [distances - table[..., distances // block + shift] for shift in (0, 1)]
    in_tile = ((within[0] >= 0) & (within[0] < block)) | ((within[1] >= 0) & (within[1] < block))
    apart = ((rows // block + 1) * block - 1)[:, None] - keys
    column = torch.zeros(*lists.columns.shape[:2], capacity + 1, dtype=torch.bool, device=keys.device)
    column.scatter_(2, lists.columns.clamp(max=capacity).long(), True)
    return (in_tile[..., apart.clamp(min=0)] | column[..., None, :-1]) & (keys <= rows[:, None])


def vertical_slash_aten(
    query: Tensor, key: Tensor, value: Tensor, scale: float, starts: Tensor, columns: Tensor, count: Tensor | None = None, *,
    lse: Tensor | None = None, block: int = BLOCK,
) -> Tensor:  # fmt: skip
    """The same in ATen ops alone, on any device: attention with the lists expanded to a mask [B, H, C, C]."""
    _check(query, starts, columns)
    mask = vertical_slash_mask(VerticalSlash(starts, columns), query.shape[2], block=block)
    return attention_under(mask, query, key, value, scale, count, lse)


vertical_slash_attention = by_device(vertical_slash_triton, vertical_slash_aten)


def vertical_slash_density(lists: VerticalSlash, capacity: int, block: int = BLOCK) -> Tensor:
    """The share of the keys up to the end of each block of queries that the kernel computes, [B]."""
    blocks = cdiv(capacity, block)
    tiles, columns = _bounds(VerticalSlash(lists.starts.contiguous(), lists.columns.contiguous()), blocks, block)
    computed = (tiles * block + columns).sum(dim=(1, 2), dtype=torch.int64)
    return computed / (lists.starts.shape[1] * block * blocks * (blocks + 1) / 2)
