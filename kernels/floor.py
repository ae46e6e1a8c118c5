"""The floor: every row sees its neighbourhood, and a selected row sees the selected tokens as well, in one softmax.

    N(i)   = valid j <= i with rank(i) - rank(j) < window  or  rank(j) < sinks            what every row sees
    A(i)   = N(i), and for a selected row also the selected tokens up to i
    out[i] = sum_{j in A(i)} softmax_j(scale * <query[i], key[j]>) value[j]

    rank(t) is the number of valid tokens before t in its item, so that padding changes nothing. Given the attention over the
    selected tokens alone, o^ and its log-sum-exp l^, and (o', l') over N(i) without the selected tokens of a selected row,

    out[i] = (exp(l^) o^ + exp(l') o') / (exp(l^) + exp(l'))                               nothing is counted twice

    query [B, H, L, D], key [B, G, L, D], value [B, G, L, Dv], any strides but for the last, 1; the launcher also takes a
    chunk's queries [B, H, Lq, D], those of the last Lq positions, and gives their rows
    compressed [B, H, C, Dv] with lse float32 [B, H, C], natural logarithms, of the rows `indices` int32 [B, Hs, C],
    ascending up to `count` int32 [B] (None: all C); padding bool [B, L] (True = valid) or None
    ->  out [B, H, L, Dv] in the memory layout [B, L, H, Dv]; rows of invalid tokens are 0

With sink_logits [H] each softmax has a further logit without a value (sink.py), in both parts once.

One kernel takes the place of `decompress`: a program computes BLOCK_M rows of a head over their band of window + BLOCK_M
keys and the sinks, beginning with the compressed row where there is one, and writes every row once. Nothing of size
L x window exists, nothing synchronises. Slots from count on and rows of invalid tokens are never read. A compressed row with
a log-sum-exp of -inf or -1e30 saw nothing, and has no weight.

At H = 32, D = Dv = 128, L = 128K, window 256, sinks 16, tiles of 64 rows and 32 keys: 4 H L (256 + 64 + 32) D = 0.76 TFLOP,
1.5 ms at 500 TFLOP/s; query and output 2 GiB and the compressed rows at most 1 GiB more, 0.8 ms at 4 TB/s; keys and values
from L2, 11 GiB, 2.1 ms at 5.5 TB/s. Measured 2.7 ms.

Method: the sinks and the window are StreamingLLM's, arXiv 2309.17453; that unselected rows keep them is this project's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tsa_compile.kernels._aten import at_least, keys_before, take_rows
from tsa_compile.kernels.decompress import attention_output
from tsa_compile.kernels.define import define
from tsa_compile.kernels.launch import by_device, cdiv, launch, tl, triton
from tsa_compile.kernels.neighbourhood import LOWEST_LOGIT, near_aten, placed_aten
from tsa_compile.kernels.sink import check_sink
from tsa_compile.kernels.tiles import (
    DESCRIPTOR,
    LOG2_E,
    POINTER,
    STRIDE,
    Tiles,
    add_values,
    at_head,
    block_dim,
    choose_tiles,
    count_of,
    descriptors,
    gather_rows,
    load_tile,
    on_hopper,
    positive_scale,
    row_alignment,
    row_strides,
    rows_contiguous,
    scores,
    stride_names,
    tile_options,
    tma_fits,
    weigh,
)

_LOWEST = tl.constexpr(LOWEST_LOGIT)
_BEHIND_ALL = tl.constexpr(2**31 - 1)
"""A rank that no row has, nor any distance between two."""


@triton.jit(do_not_specialize=["stride_ib", "stride_is", "capacity"])
def _slots_kernel(p_indices, p_count, p_slots, stride_ib, stride_is, stride_slots, capacity, BLOCK: tl.constexpr):
    """slots[b, s, indices[b, s, j]] = j + 1 for j < count[b]."""
    selection, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    real = slots < count_of(p_count, item, capacity)
    positions = tl.load(p_indices + item * stride_ib + selection * stride_is + slots, mask=real, other=0)
    tl.store(p_slots + (item * tl.num_programs(1) + selection) * stride_slots + positions, slots + 1, mask=real)


@triton.jit
def _key_tile(p_slots, p_order, number, fronts, band, valid, sinks, BLOCK_N: tl.constexpr):
    """The tile of this number: its first rank, the ranks and positions [BLOCK_N], and the penalty of selected keys.

    The sinks come first, in `fronts` tiles, and then the band; keys of the other kind have a rank behind all rows. Numbers
    past the last key have some key's position, and a rank behind those of valid rows. Without slots no key is selected.
    """
    front = number < fronts
    start = tl.where(front, number * BLOCK_N, band + (number - fronts) * BLOCK_N)
    start = tl.multiple_of(start, BLOCK_N)
    ranks = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    keys = tl.minimum(ranks, tl.maximum(valid - 1, 0))
    if p_order is not None:
        keys = tl.load(p_order + keys)
    b_penalty = tl.zeros([BLOCK_N], tl.float32)
    if p_slots is not None:
        slots = tl.load(p_slots + (ranks if p_order is None else keys))
        b_penalty = tl.where(slots > 0, -1e38, 0.0)
    return start, tl.where((ranks < sinks) == front, ranks, _BEHIND_ALL), keys, b_penalty


@triton.jit
def _rows_at(rows, start, positions, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """A tile of keys or values: by TMA from `start` on, with zeros past the end, or at the positions."""
    if rows[DESCRIPTOR] is not None:
        return load_tile(rows, start, positions.shape[0], DIM, BLOCK_D, ALIGN)
    else:
        return gather_rows(rows[POINTER], positions.to(tl.int64) * rows[STRIDE] * ALIGN, None, 0, DIM, BLOCK_D)


@triton.jit
def _near(
    b_query, b_acc, b_max, b_sum, b_selected, key, value, p_slots, p_order, first, ranks, valid, window, sinks, scale_log2,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys of the sinks and of the band join the sums of FlashAttention-2, selected ones not in selected rows.

    One loop over all tiles, so that the next one is on its way while this one is computed, with their selected keys read
    one tile ahead. Whether a row sees a key takes one comparison: as unsigned numbers, those before 0 are large.
    """
    sinks = tl.minimum(sinks, valid)
    fronts = tl.cdiv(sinks, BLOCK_N)
    band = tl.maximum(tl.maximum(first - window + 1, 0), sinks) // BLOCK_N * BLOCK_N
    tiles = fronts + tl.maximum(tl.cdiv(tl.minimum(first + b_query.shape[0], valid) - band, BLOCK_N), 0)
    start, key_ranks, keys, b_penalty = _key_tile(p_slots, p_order, 0, fronts, band, valid, sinks, BLOCK_N)
    for number in tl.range(0, tiles):
        b_key = _rows_at(key, start, keys, DIM, b_query.shape[1], ALIGN)  # [BLOCK_N, BLOCK_D]
        b_value = _rows_at(value, start, keys, VALUE_DIM, b_acc.shape[1], ALIGN)  # [BLOCK_N, BLOCK_DV]
        b_scores = scores(b_query, b_key)  # [BLOCK_M, BLOCK_N]
        if (start < tl.maximum(first + b_query.shape[0] - window, sinks)) | (start + BLOCK_N > first):
            reach = tl.where(number < fronts, _BEHIND_ALL, window).to(tl.uint32)
            behind = (ranks[:, None] - key_ranks[None, :]).to(tl.uint32, bitcast=True)
            b_scores = tl.where(behind < reach, b_scores, float("-inf"))
        if p_slots is not None:
            b_scores = tl.fma(b_selected[:, None], b_penalty[None, :], b_scores)
        start, key_ranks, keys, b_penalty = _key_tile(p_slots, p_order, number + 1, fronts, band, valid, sinks, BLOCK_N)
        b_weights, b_keep, b_max, b_sum = weigh(b_scores, b_max, b_sum, scale_log2)
        b_acc = add_values(b_acc, b_keep, b_weights, b_value)
    return b_acc, b_max, b_sum


@triton.jit(
    do_not_specialize=[
        *stride_names("qkvco"),
        "stride_lb",
        "stride_lh",
        "seq_len",
        "past",
        "rows",
        "capacity",
        "slots_of",
        "heads_per_kv",
        "window",
        "sinks",
    ]
)
def _floor_kernel(
    p_query, p_key, p_value, p_compressed, p_lse, p_slots, p_order, p_valid, p_row_order, p_row_valid, p_count, p_sink,
    p_out,
    desc_query, desc_key, desc_value, desc_out,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_cb, stride_ch, stride_cl, stride_ob, stride_oh, stride_ol, stride_lb, stride_lh,
    seq_len, past, rows, capacity, stride_slots, slots_of, heads_per_kv, window, sinks, scale_log2, BEHIND: tl.constexpr,
    HEADS_PER_SELECTION: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the rows of BLOCK_M ranks of one head, of those from position `past` on.

    With BEHIND the compressed rows are `capacity` ones, of the last of `slots_of` slots.
    A selected row's sums begin with its compressed row: 2^b_max = exp(lse) is the weight of all that it has seen. Without
    slots no row is selected.
    """
    scale_log2 = tl.cast(scale_log2, tl.float32)
    head, item = tl.program_id(0), tl.program_id(2)
    first_row = tl.program_id(1) * BLOCK_M
    valid = count_of(p_valid, item, seq_len)
    first = first_row + valid - count_of(p_row_valid, item, rows)
    ranks = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    far = first_row + tl.arange(0, BLOCK_M)
    b_inside, b_real = far < rows, ranks < valid
    if p_order is not None:
        p_order += item.to(tl.int64) * seq_len
        far = tl.load(p_row_order + item.to(tl.int64) * rows + far, mask=b_inside, other=0)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_max = tl.full([BLOCK_M], _LOWEST * LOG2_E, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_selected = tl.zeros([BLOCK_M], tl.float32)
    if p_slots is not None:
        selections = tl.num_programs(0) // HEADS_PER_SELECTION
        p_slots += (item.to(tl.int64) * selections + head // HEADS_PER_SELECTION) * stride_slots
        slots = tl.load(p_slots + past + far, mask=b_real & b_inside, other=0) - 1
        places = slots
        if BEHIND:
            places -= count_of(p_count, item, slots_of) - capacity
        p_lse += item.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh
        b_lse = tl.load(p_lse + places, mask=slots >= 0, other=_LOWEST)
        b_chosen = b_lse > _LOWEST
        b_max = tl.maximum(b_lse, _LOWEST) * LOG2_E
        p_compressed = at_head(p_compressed, stride_cb, stride_ch, item, head, ALIGN)
        offsets = places.to(tl.int64) * stride_cl * ALIGN
        b_acc = gather_rows(p_compressed, offsets, b_chosen, 0, VALUE_DIM, BLOCK_DV).to(tl.float32)  # [BLOCK_M, BLOCK_DV]
        b_sum = b_chosen.to(tl.float32)
        b_selected = (slots >= 0).to(tl.float32)
    far = far.to(tl.int64)
    if desc_query is not None:
        b_query = tl.reshape(desc_query.load([item, head, first_row, 0]), [BLOCK_M, BLOCK_D])
    else:
        p_query = at_head(p_query, stride_qb, stride_qh, item, head, ALIGN)
        b_query = gather_rows(p_query, far * stride_ql * ALIGN, b_real & b_inside, 0, DIM, BLOCK_D)
    kv_head = head // heads_per_kv
    key = (desc_key, at_head(p_key, stride_kb, stride_kh, item, kv_head, ALIGN), stride_kl, item, kv_head)
    value = (desc_value, at_head(p_value, stride_vb, stride_vh, item, kv_head, ALIGN), stride_vl, item, kv_head)
    b_acc, b_max, b_sum = _near(
        b_query, b_acc, b_max, b_sum, b_selected, key, value, p_slots, p_order, first, ranks, valid, window, sinks,
        scale_log2, DIM, VALUE_DIM, ALIGN, BLOCK_N,
    )  # fmt: skip
    if p_sink is not None:  # a row that sees nothing has no weight beside it
        b_sum += tl.exp2(tl.load(p_sink + head).to(tl.float32) * LOG2_E - b_max)
    b_out = b_acc * (1.0 / tl.where(b_sum > 0, b_sum, 1.0))[:, None]
    if p_order is not None:
        b_out = tl.where(b_real[:, None], b_out, 0.0)
    b_out = b_out.to(p_out.dtype.element_ty)
    if desc_out is not None:
        desc_out.store([item, head, first_row, 0], tl.reshape(b_out, [1, 1, BLOCK_M, BLOCK_DV]))
    else:
        dims = tl.arange(0, BLOCK_DV)
        p_out = at_head(p_out, stride_ob, stride_oh, item, head, ALIGN)
        pointers = p_out + (far * stride_ol * ALIGN)[:, None] + dims[None, :]
        tl.store(pointers, b_out, mask=b_inside[:, None] & (dims < VALUE_DIM)[None, :])


def merge_floor_triton(
    query: Tensor, key: Tensor, value: Tensor, compressed: Tensor, lse: Tensor, indices: Tensor, count: Tensor | None,
    padding: Tensor | None, scale: float, window: int, sinks: int, sink_logits: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launches the kernels; also runs on CPU tensors in the Triton interpreter.

    Args:
        output: where to write, [B, H, L, Dv] with a dense last dimension: a part of a larger tensor, for example.
    """
    compressed, lse, indices = map(rows_contiguous, (compressed, lse, indices))
    tiles = _tiles(query, key, value, whole=padding is None)
    batch, selections, capacity = indices.shape
    # One more than the slot, 0 where there is none, up to where the kernel's tiles reach.
    slots = query.new_zeros((batch, selections, cdiv(key.shape[2], 64) * 64 + 4 * tiles.block_n), dtype=torch.int32)
    if capacity > 0:
        grid, numbers = (cdiv(capacity, 1024), selections, batch), (*indices.stride()[:2], slots.shape[2], capacity)
        launch(_slots_kernel, grid, (indices, count, slots), numbers, BLOCK=1024)
    rows = _Rows(compressed, lse, slots, count, capacity)
    return _launch(query, key, value, rows, padding, scale, window, sinks, sink_logits, output, tiles)


def near_triton(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, sink_logits: Tensor | None = None,
    output: Tensor | None = None, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """The neighbourhood alone: every row sees the last `window` tokens up to itself. Arguments as those of the floor."""
    tiles = tiles or _tiles(query, key, value, whole=True, window=window)
    return _launch(query, key, value, None, None, scale, window, 0, sink_logits, output, tiles)


class _Rows(NamedTuple):
    """The compressed rows, one more than the slot of each position, int32 [B, Hs, more than L], and how many are real."""

    compressed: Tensor
    lse: Tensor
    slots: Tensor
    real: Tensor | None
    capacity: int


def _launch(
    query: Tensor, key: Tensor, value: Tensor, rows: _Rows | None, padding: Tensor | None, scale: float, window: int,
    sinks: int, sink_logits: Tensor | None, output: Tensor | None, tiles: Tiles,
) -> Tensor:  # fmt: skip
    query, key, value = map(rows_contiguous, (query, key, value))
    query, scale_log2 = positive_scale(query, scale)
    batch, heads, queries, _ = query.shape
    seq_len, past = key.shape[2], keys_before(query, key)
    is_chunk = not (isinstance(past, int) and past == 0)
    if output is None:
        output = attention_output(query, key, value)
    if output.numel() == 0:
        return output
    order, valid = row_order, row_valid = (None, None) if padding is None else valid_first(padding)
    if padding is not None and is_chunk:
        row_order, row_valid = valid_first(padding[:, past:])
    several = (query, key, value, output) if rows is None else (query, key, value, rows.compressed, output)
    align = row_alignment(*several)
    strides = row_strides(align, *several)
    given: tuple[Tensor | None, ...] = (None, None, None)
    numbers = [0, 0, 0]
    if rows is None:
        strides = (*strides[:9], 0, 0, 0, *strides[9:], 0, 0)
    else:
        given, strides = rows[:3], (*strides, *rows.lse.stride()[:2])
        numbers = [rows.compressed.shape[2], rows.slots.shape[2], rows.capacity]
    tiles = tiles._replace(use_tma=tiles.use_tma and all(map(tma_fits, (query, key, value, output))))
    rows_tiles = tiles._replace(block_n=tiles.block_m)  # of what has a row for every row
    launch(
        _floor_kernel,
        (heads, cdiv(queries, tiles.block_m), batch),
        (query, key, value, *given, order, valid, row_order, row_valid, rows.real if rows else None, sink_logits, output),
        (*strides, seq_len, past, queries, *numbers, heads // key.shape[1], window, sinks, scale_log2),
        descriptors=(
            *descriptors(rows_tiles, query), *descriptors(tiles, key, value), *descriptors(rows_tiles, output),
        ),
        BEHIND=is_chunk,
        HEADS_PER_SELECTION=heads // rows.slots.shape[1] if rows else 1,
        **tile_options(tiles, key, value, align),
    )  # fmt: skip
    return output


def _tiles(query: Tensor, key: Tensor, value: Tensor, whole: bool, window: int = 0) -> Tiles:
    """The tiles of a launch; by TMA where rows lie in the order of their ranks (`whole`), on Hopper, if strides allow it.

    Measured on an H100 at 128K: 2.7 ms with 32 keys a step, when four programs fit a multiprocessor; 3.1 by pointers; 3.6
    with 64 keys; 3.0 with 128 rows, which read fewer keys. These win where a `window` alone is long: on an H200, 16 heads of
    256, 16K tokens and a window of 1,024, 0.59 ms against 0.72; heads of 128 and a window of 4,096, 1.05 against 1.12.
    """
    block_d = block_dim(max(key.shape[3], value.shape[3]))
    if query.dtype == torch.float32:
        return choose_tiles(query.dtype, block_d, hopper=False)
    if block_d > 256:
        tiles = choose_tiles(query.dtype, block_d, on_hopper(query))._replace(use_tma=False, lag=False)
    else:
        tiles = Tiles(64, 32 if block_d > 64 else 64, 4, 2)
        if whole and on_hopper(query) and window >= (1024 if block_d > 128 else 4096):
            tiles = Tiles(128, 64, 8, 2 if block_d > 128 else 3)
    if whole and type(query) is Tensor and on_hopper(query):
        tiles = tiles._replace(use_tma=True)
    return tiles


def merge_floor_aten(
    query: Tensor, key: Tensor, value: Tensor, compressed: Tensor, lse: Tensor, indices: Tensor, count: Tensor | None,
    padding: Tensor | None, scale: float, window: int, sinks: int, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in ATen ops, on any device. Holds [B, H, L, 2 window + sinks] logits."""
    operands = (query, key, value, indices, count, padding)
    near, near_lse, slots, rank = near_aten(*operands, scale, window, sinks, sink_logits)
    chosen = slots > 0
    picked = at_least(slots - 1, 0)
    far = take_rows(compressed, picked).to(near.dtype)
    far_lse = torch.where(chosen, lse.to(near.dtype).gather(2, picked.to(torch.int64)), -math.inf)
    top = torch.maximum(near_lse, far_lse)
    near_share, far_share = (near_lse - top).exp()[..., None], (far_lse - top).exp()[..., None]
    far = torch.where(chosen[..., None], far, 0.0)
    output = (near * near_share + far * far_share) / (near_share + far_share)
    return placed_aten(output.to(value.dtype), padding, rank)


def valid_first(padding: Tensor) -> tuple[Tensor, Tensor]:
    """Every item's positions, the valid ones first, ascending: int32 [B, L]; and how many are valid: int32 [B]."""
    order = (~padding).to(torch.uint8).sort(dim=1, stable=True).indices
    return order.to(torch.int32), padding.sum(dim=1, dtype=torch.int32)


@define(attention_output)
def merge_floor(
    query: Tensor, key: Tensor, value: Tensor, compressed: Tensor, lse: Tensor, indices: Tensor, count: Tensor | None,
    padding: Tensor | None, scale: float, window: int, sinks: int, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Every row in its place, with its floor; ValueError where shapes do not fit. See the module's docstring."""
    tensors = (query, key, value, compressed, lse, indices, count, padding)
    _check(*tensors, window, sinks)
    check_sink("merge_floor", query, sink_logits)
    return _compute(*tensors, scale, window, sinks, sink_logits)


def merge_floor_by_heads(
    query: Tensor, key: Tensor, value: Tensor, compressed: Tensor, lse: Tensor, indices: Tensor, count: Tensor | None,
    padding: Tensor | None, scale: float, window: int, sinks: int, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The ATen form for one key head at a time, so that the logits of all heads are not in memory at once."""
    output, groups = attention_output(query, key, value), key.shape[1]
    for g in range(groups):
        tensors = (query, key, value, compressed, lse, indices)
        parts = [x[:, g * x.shape[1] // groups : (g + 1) * x.shape[1] // groups] for x in (output, *tensors)]
        q, k, v, rows, sums, chosen = parts[1:]
        sink = None if sink_logits is None else sink_logits.unflatten(0, (groups, -1))[g]
        parts[0].copy_(merge_floor_aten(q, k, v, rows, sums, chosen, count, padding, scale, window, sinks, sink))
    return output


def _check(
    query: Tensor, key: Tensor, value: Tensor, compressed: Tensor, lse: Tensor, indices: Tensor, count: Tensor | None,
    padding: Tensor | None, window: int, sinks: int,
) -> None:  # fmt: skip
    batch, heads, seq_len, _ = query.shape
    capacity = compressed.shape[2]
    fits = compressed.shape[:2] == (batch, heads) and compressed.shape[3] == value.shape[3]
    fits = fits and lse.shape == compressed.shape[:3] and indices.shape == (batch, indices.shape[1], capacity)
    if not fits or heads % indices.shape[1] != 0 or heads % key.shape[1] != 0:
        raise ValueError(
            f"tsa::merge_floor: rows {tuple(compressed.shape)}, log-sum-exp {tuple(lse.shape)} and indices "
            f"{tuple(indices.shape)} do not fit query {tuple(query.shape)} and value {tuple(value.shape)}; expected "
            "[B,H,C,Dv], [B,H,C] and [B,Hs,C] with H a multiple of Hs"
        )
    if (count is not None and count.shape != (batch,)) or (padding is not None and padding.shape != (batch, seq_len)):
        raise ValueError(f"tsa::merge_floor: expected count {(batch,)} and padding {(batch, seq_len)}")
    if window < 1 or sinks < 0:
        raise ValueError(f"tsa::merge_floor: window {window} and sinks {sinks}; expected at least 1 and 0")


_compute = by_device(merge_floor_triton, merge_floor_by_heads)
