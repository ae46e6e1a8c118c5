"""Gather the selected rows of query, key and value into dense buffers, in one launch.

    q^[b, h, j] = query[b, h,            indices[b, h // (H / Hs), j]]     j < count[b]
    k^[b, s, j] = key  [b, s * G // Hs,  indices[b, s, j]]                 v^ likewise

    query [B, H, L, D], key [B, G, L, D], value [B, G, L, Dv], any strides; indices int32 [B, Hs, C]; count int32 [B] or
    None (every slot is real); Hs = H, or G when a group shares its selection
    ->  q^ [B, H, C, D], k^ [B, Hs, C, D], v^ [B, Hs, C, Dv], contiguous

Slots from count on: at least the next FILLER_ROWS (and so all up to the next multiple of 256) are zeros, because an
attention kernel's last tile may multiply them by probabilities of 0; on CUDA the rest is left unwritten. Nothing
synchronises.

Rows are read where the model left them, so a transposed [B, L, H, D] buffer costs no copy and shared key heads are not
repeated before they are gathered. The heads of one position range run side by side: they share k and v rows in L2 and,
in [B, L, H, D] layouts, DRAM pages. With n = count and e bytes per element, B n e (2 H D + (Hs + G') (D + Dv)) bytes
move, G' between G (the heads of a group find each other's rows in L2) and Hs. At H = 32, G = 8, D = 128, bfloat16,
n = 64K of 128K, Hs = H: 2.2 to 3.0 GiB, 0.6 to 0.8 ms at 4.2 TB/s.

Method: Token Sparse Attention, arXiv 2602.03216, section 3 ("compression").
"""

import torch
from torch import Tensor

from tsa_compile.kernels._aten import repeat_heads, slots_below, take_rows
from tsa_compile.kernels.define import define
from tsa_compile.kernels.launch import by_device, cdiv, launch, next_power_of_2, tl, triton
from tsa_compile.kernels.tiles import (
    at_head,
    count_of,
    gather_rows,
    lower_bound,
    row_alignment,
    row_strides,
    rows_contiguous,
    stride_names,
)

FILLER_ROWS = 256
"""How many rows behind count are zeros: the widest key tile of an attention kernel, wherever it begins."""

_TILE_BYTES = 16 * 1024


@triton.jit
def _copy_rows(
    p_source, p_target, stride_row, positions, slots, capacity, b_real,
    DIM: tl.constexpr, DIM_POW2: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """target[slots] = source[positions] where b_real, else zeros."""
    b_rows = gather_rows(p_source, positions * stride_row * ALIGN, b_real, 0, DIM, DIM_POW2)  # [BLOCK, DIM_POW2]
    dims = tl.arange(0, DIM_POW2)
    target = p_target + (slots.to(tl.int64) * DIM)[:, None] + dims[None, :]
    tl.store(target, b_rows, mask=(slots < capacity)[:, None] & (dims < DIM)[None, :])


@triton.jit(do_not_specialize=[*stride_names("qkv"), "stride_ib", "stride_is", "capacity", "past", "rows"])
def _compress_kernel(
    p_query, p_key, p_value, p_indices, p_count, p_query_out, p_key_out, p_value_out, p_first,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ib, stride_is, capacity, past, rows,
    HEADS: tl.constexpr, HEADS_PER_SELECTION: tl.constexpr, HEADS_PER_KV: tl.constexpr,
    DIM: tl.constexpr, DIM_POW2: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_DIM_POW2: tl.constexpr,
    ALIGN: tl.constexpr, FILLER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK slots of one query head, and of its key and value head where it is the first to share them.

    With `p_first` queries are a chunk's, from position `past` on, and have the last `rows` slots.
    """
    head = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    item = tl.program_id(2).to(tl.int64)
    count = count_of(p_count, item, capacity)
    if p_count is not None:  # without one, every program has rows
        nothing = start >= count + FILLER
        if nothing:
            return
    selection = head // HEADS_PER_SELECTION
    kv_head = head // HEADS_PER_KV
    slots = start + tl.arange(0, BLOCK)
    b_real = slots < count
    p_indices += item * stride_ib + selection.to(tl.int64) * stride_is
    positions = tl.load(p_indices + slots, mask=b_real, other=0).to(tl.int64)

    p_query = at_head(p_query, stride_qb, stride_qh, item, head, ALIGN)
    p_query_out += (item * HEADS + head) * rows * DIM
    if p_first is None:
        _copy_rows(p_query, p_query_out, stride_ql, positions, slots, capacity, b_real, DIM, DIM_POW2, ALIGN)
    else:
        b_asks = b_real & (positions >= past)
        targets = tl.where(b_asks, slots - (count - rows), rows)
        _copy_rows(p_query, p_query_out, stride_ql, positions - past, targets, rows, b_asks, DIM, DIM_POW2, ALIGN)
        leads = (start == 0) & (head % HEADS_PER_SELECTION == 0)
        if leads:
            before = lower_bound(p_indices, past, count, 32)
            tl.store(p_first + item * (HEADS // HEADS_PER_SELECTION) + selection, before - (count - rows))
    if head % HEADS_PER_SELECTION == 0:
        target = (item * (HEADS // HEADS_PER_SELECTION) + selection) * capacity
        p_key = at_head(p_key, stride_kb, stride_kh, item, kv_head, ALIGN)
        p_key_out += target * DIM
        _copy_rows(p_key, p_key_out, stride_kl, positions, slots, capacity, b_real, DIM, DIM_POW2, ALIGN)
        p_value = at_head(p_value, stride_vb, stride_vh, item, kv_head, ALIGN)
        p_value_out += target * VALUE_DIM
        _copy_rows(p_value, p_value_out, stride_vl, positions, slots, capacity, b_real, VALUE_DIM, VALUE_DIM_POW2, ALIGN)


def block_rows(head_dim: int, element_size: int, at_most: int = 256) -> int:
    """Rows of a tile of about 16 KiB, a power of two (which therefore divides 256)."""
    return max(16, min(at_most, _TILE_BYTES // (next_power_of_2(head_dim) * element_size)))


def compress_triton(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel; also runs on CPU tensors in the Triton interpreter."""
    outputs = _allocate(query, key, value, indices)
    _launch(query, key, value, indices, count, outputs, None, 0)
    return outputs


def compress_behind_triton(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `compress_triton`, of a chunk's queries [B, H, Lq, D] and of all keys [B, G, L, D], selected among L positions.

    Returns:
        q^ [B, H, M, D] for the last M = min(C, Lq) of the count slots, unwritten where a slot's position is before the
        chunk, k^, v^ as there, and from which row of q^ on there are queries: int32 [B, Hs].
    """
    rows = min(indices.shape[2], query.shape[2])
    outputs = _allocate(query, key, value, indices)
    outputs = (query.new_empty(*query.shape[:2], rows, query.shape[3]), *outputs[1:])
    first = indices.new_empty(indices.shape[:2])
    _launch(query, key, value, indices, count, outputs, first, key.shape[2] - query.shape[2])
    return (*outputs, first)


def _launch(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor | None, outputs: tuple[Tensor, Tensor, Tensor],
    first: Tensor | None, past: int,
) -> None:  # fmt: skip
    query, key, value = rows_contiguous(query), rows_contiguous(key), rows_contiguous(value)
    indices = rows_contiguous(indices)
    batch, heads, rows, dim = outputs[0].shape
    capacity = indices.shape[2]
    if outputs[0].numel() == 0:
        return
    value_dim = value.shape[3]
    align = row_alignment(query, key, value)
    block = block_rows(max(dim, value_dim), query.element_size())
    launch(
        _compress_kernel,
        (heads, cdiv(capacity, block), batch),
        (query, key, value, indices, count, *outputs, first),
        (*row_strides(align, query, key, value), *indices.stride()[:2], capacity, past, rows),
        HEADS=heads,
        HEADS_PER_SELECTION=heads // indices.shape[1],
        HEADS_PER_KV=heads // key.shape[1],
        DIM=dim,
        DIM_POW2=next_power_of_2(dim),
        VALUE_DIM=value_dim,
        VALUE_DIM_POW2=next_power_of_2(value_dim),
        ALIGN=align,
        FILLER=FILLER_ROWS,
        BLOCK=block,
        num_warps=4,
    )


def _allocate(query: Tensor, key: Tensor, value: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, selections, capacity = indices.shape
    return (
        query.new_empty(batch, query.shape[1], capacity, query.shape[3]),
        key.new_empty(batch, selections, capacity, key.shape[3]),
        value.new_empty(batch, selections, capacity, value.shape[3]),
    )


@define(lambda query, key, value, indices, count: _allocate(query, key, value, indices))
def compress(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The selected rows of query, key and value; ValueError where shapes do not fit. See the module's docstring."""
    _check(query, key, value, indices, count)
    return _compute(query, key, value, indices, count)


def _check(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor | None) -> None:
    batch, heads, seq_len, dim = query.shape
    kv_heads, selections = key.shape[1], indices.shape[1]
    if key.shape != (batch, kv_heads, seq_len, dim) or value.shape[:3] != key.shape[:3] or heads % kv_heads != 0:
        raise ValueError(
            f"tsa::compress: key {tuple(key.shape)} and value {tuple(value.shape)} do not fit query "
            f"{tuple(query.shape)}; expected [B,G,L,D] and [B,G,L,Dv] with the query's heads a multiple of G"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"tsa::compress: query, key, value are {query.dtype}, {key.dtype}, {value.dtype}, not alike")
    if indices.shape[0] != batch or selections not in (heads, kv_heads):
        raise ValueError(
            f"tsa::compress: indices {tuple(indices.shape)}; expected [{batch},{heads},C], or [{batch},{kv_heads},C] "
            "where the heads of a group share a selection"
        )
    if count is not None and count.shape != (batch,):
        raise ValueError(f"tsa::compress: count {tuple(count.shape)}; expected {(batch,)}")


def compress_aten(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in ATen ops, on any device; every filler row is zero."""
    real = None if count is None else slots_below(count, indices.shape[2])[..., None]

    def rows(source: Tensor, chosen: Tensor) -> Tensor:
        taken = take_rows(source, chosen)
        return taken if real is None else torch.where(real, taken, 0.0)

    return rows(query, repeat_heads(indices, query.shape[1])), rows(key, indices), rows(value, indices)


_compute = by_device(compress_triton, compress_aten)
