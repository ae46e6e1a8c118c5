"""Causal attention of the last rows of a selection: FlashAttention-2 in Triton, aligned lower right, counts on the device.

    out[b, h, r] = sum_{j <= s(r)} softmax_j(scale * <query[b, h, r], key[b, g, j]>) value[b, g, j]   s(r) = count[b] - M + r
    lse[b, h, r] = log sum_{j <= s(r)} exp(scale * <query[b, h, r], key[b, g, j]>)                    first[b, g] <= r < M

    query [B, H, M, D], key [B, Hk, C, D], value [B, Hk, C, Dv], g = h // (H / Hk), dtypes and strides as in flash.py;
    count int32 [B] or None (= C); first int32 [B, Hk] or None (= 0): from which row on a head has queries
    ->  out [B, H, M, Dv] and lse float32 [B, H, M], contiguous; rows before `first` hold anything

Of a chunk of a prompt, the selected rows are the last ones among all that a head selected, and how many they are differs
from head to head. So rows have room for M of them, aligned at the end, and programs whose rows are all before `first` leave
at once: the work is what the selected rows of the chunk need, and nothing is read on the host. Without `first` it is a
chunk's dense attention behind a cache.

One program computes BLOCK_M rows, as in flash.py, but its diagonal begins at any key. With m = M - first rows and n = count
keys, 4 m (n - m / 2) H D flops. At H = 32, D = 128, m = 2.4K, n = 20K (8K of 64K tokens, 0.3 kept): 0.7 TFLOP.

Method: FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsa_compile.kernels.launch import cdiv, launch, tl, triton
from tsa_compile.kernels.tiles import (
    POINTER,
    STRIDE,
    add_values,
    aligned_rows,
    at_head,
    count_of,
    descriptors,
    diagonal_tile,
    full_tiles,
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


@triton.jit(do_not_specialize=[*stride_names("qkvo"), "capacity", "rows", "heads_per_kv"])
def _behind_kernel(
    p_query, p_key, p_value, p_out, p_lse, p_count, p_first, desc_key, desc_value,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ob, stride_oh, stride_ol, capacity, rows, heads_per_kv, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LAG: tl.constexpr, HEADS_INNER: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head, the last ones first."""
    scale_log2 = tl.cast(scale_log2, tl.float32)
    head = tl.program_id(0 if HEADS_INNER else 1)
    item = tl.program_id(2)
    kv_head = head // heads_per_kv
    start_m = (tl.cdiv(rows, BLOCK_M) - 1 - tl.program_id(1 if HEADS_INNER else 0)) * BLOCK_M
    heads = tl.num_programs(0 if HEADS_INNER else 1)
    if p_first is not None:
        nobody = start_m + BLOCK_M <= tl.load(p_first + item * (heads // heads_per_kv) + kv_head)
        if nobody:
            return
    count = count_of(p_count, item, capacity)
    start = count - rows + start_m  # the slot of the first row
    p_query = at_head(p_query, stride_qb, stride_qh, item, head, ALIGN)
    key = (desc_key, at_head(p_key, stride_kb, stride_kh, item, kv_head, ALIGN), stride_kl, item, kv_head)
    value = (desc_value, at_head(p_value, stride_vb, stride_vh, item, kv_head, ALIGN), stride_vl, item, kv_head)

    b_query = load_rows(p_query, stride_ql, start_m, rows, True, BLOCK_M, DIM, BLOCK_D, ALIGN)  # [BLOCK_M, BLOCK_D]
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    seen_by_all = tl.maximum(start + 1, 0) // BLOCK_N * BLOCK_N
    b_acc, b_max, b_sum = full_tiles(
        b_query, b_acc, b_max, b_sum, key, value, seen_by_all, scale_log2, DIM, VALUE_DIM, ALIGN, BLOCK_N, LAG
    )
    for tile in tl.range(seen_by_all, tl.minimum(start + BLOCK_M, count), BLOCK_N):
        b_key = load_rows(key[POINTER], key[STRIDE], tile, count, True, BLOCK_N, DIM, BLOCK_D, ALIGN)
        b_weights, b_keep, b_max, b_sum = diagonal_tile(b_query, b_key, b_max, b_sum, start, tile, scale_log2)
        b_value = load_rows(value[POINTER], value[STRIDE], tile, count, True, BLOCK_N, VALUE_DIM, BLOCK_DV, ALIGN)
        b_acc = add_values(b_acc, b_keep, b_weights, b_value)
    p_out = at_head(p_out, stride_ob, stride_oh, item, head, ALIGN)
    store_rows(p_out, stride_ol, b_acc / b_sum[:, None], start_m, rows, BLOCK_M, VALUE_DIM, BLOCK_DV, ALIGN)
    store_lse(p_lse, item * heads + head, rows, b_max, b_sum, start_m, rows)


def behind_triton(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, first: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Launches the kernel; also runs on CPU tensors in the Triton interpreter. See the module's docstring."""
    query, key, value = aligned_rows(query), aligned_rows(key), aligned_rows(value)
    batch, heads, rows, _ = query.shape
    out = query.new_empty(batch, heads, rows, value.shape[3])
    lse = query.new_empty((batch, heads, rows), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    query, scale_log2 = positive_scale(query, scale)
    tiles = tiles_for(query, key, value)
    align = row_alignment(query, key, value, out)
    blocks = cdiv(rows, tiles.block_m)
    launch(
        _behind_kernel,
        (heads, blocks, batch) if tiles.heads_inner else (blocks, heads, batch),
        (query, key, value, out, lse, count, first),
        (*row_strides(align, query, key, value, out), key.shape[2], rows, heads // key.shape[1], scale_log2),
        descriptors=descriptors(tiles, key, value),
        **tile_options(tiles, key, value, align),
        LAG=tiles.lag,
        HEADS_INNER=tiles.heads_inner,
    )
    return out, lse


def run_behind(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel as the registry has it: every row is a query."""
    with torch.cuda.device_of(query):
        return behind_triton(query, key, value, None, None, scale)
