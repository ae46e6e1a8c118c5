"""Causal attention whose work follows a count on the device: FlashAttention-2 in Triton, nothing read on the host.

    out[b, h, i] = sum_{j <= i} softmax_j(scale * <query[b, h, i], key[b, g, j]>) value[b, g, j]     i < count[b]

    query [B, H, C, D], key [B, Hk, C, D], value [B, Hk, C, Dv], g = h // (H / Hk), strides free but for the last, 1;
    float16 | bfloat16 | float32 (float32 exactly, without TF32, and slowly); D, Dv <= 512, padded to powers of two;
    count int32 [B] or None (= C)
    ->  out [B, H, C, Dv], contiguous; rows from `count` on are left unwritten

Rows of query, key and value from `count` on may hold anything, NaN too: they are never read.

Queries may be the last ones of a selection, or of a prompt behind a cache: query [B, H, M, D], and row r is slot
s(r) = count[b] - M + r, which sees the keys up to itself. How many of a chunk's rows were selected differs from head to
head. So rows have room for M of them, aligned at the end, and of a head those from `first` int32 [B, Hk] on have queries
(None: all): programs whose rows are all before it leave at once, and the others hold anything. With m = M - first rows and
n = count keys, 4 m (n - m / 2) H D flops.

One program computes BLOCK_M rows. Tiles of BLOCK_N keys before its diagonal need no mask; the diagonal's own are masked,
and loaded only up to `count`. Query blocks are numbered back from the last real one, so that the longest start first
whatever the count, and programs without a block leave at once: a captured CUDA graph with room for C rows costs what
count rows cost and hardly more.

On Hopper the tensor cores work while a program exponentiates: the product with the values lags one tile behind
(`tiles.attend_tile`), so that it is in flight during the next tile's softmax. Key and value tiles come by TMA where strides
allow it. With n = count: 2 n^2 H (D + Dv) / 2 flops a batch item, n^2 H / 2 exponentials, and n e (H D + H Dv + Hk D +
Hk Dv) bytes of DRAM at best (e bytes an element); query blocks of a head run side by side and share its keys in L2. At
H = 32, D = Dv = 128, n = 64K: 35 TFLOP.

Method: FlashAttention-2, arXiv 2307.08691; the lag is FlashAttention-3's pipelining within a warpgroup, arXiv 2407.08608.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsa_compile.kernels.interface import MAX_HEAD_DIM, AttentionKernel, KernelRequest
from tsa_compile.kernels.launch import HAS_TRITON, cdiv, launch, tl, triton
from tsa_compile.kernels.tiles import (
    POINTER,
    STRIDE,
    Tiles,
    add_values,
    aligned_rows,
    at_head,
    count_of,
    descriptors,
    diagonal,
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

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit(do_not_specialize=[*stride_names("qkvo"), "capacity", "rows", "heads_per_kv"])
def _flash_kernel(
    p_query, p_key, p_value, p_out, p_lse, p_count, p_first, desc_key, desc_value,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ob, stride_oh, stride_ol, capacity, rows, heads_per_kv, scale_log2, BEHIND: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LAG: tl.constexpr, HEADS_INNER: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head. With BEHIND they are of the last slots, else of the first."""
    scale_log2 = tl.cast(scale_log2, tl.float32)  # Inductor hands a Python float on as a double
    head = tl.program_id(0 if HEADS_INNER else 1)
    item = tl.program_id(2)
    heads = tl.num_programs(0 if HEADS_INNER else 1)
    kv_head = head // heads_per_kv
    count = count_of(p_count, item, capacity)
    stop = rows if BEHIND else count
    block = tl.cdiv(stop, BLOCK_M) - 1 - tl.program_id(1 if HEADS_INNER else 0)
    if block < 0:
        return
    start_m = block * BLOCK_M
    if p_first is not None:
        nobody = start_m + BLOCK_M <= tl.load(p_first + item * (heads // heads_per_kv) + kv_head)
        if nobody:
            return
    p_query = at_head(p_query, stride_qb, stride_qh, item, head, ALIGN)
    key = (desc_key, at_head(p_key, stride_kb, stride_kh, item, kv_head, ALIGN), stride_kl, item, kv_head)
    value = (desc_value, at_head(p_value, stride_vb, stride_vh, item, kv_head, ALIGN), stride_vl, item, kv_head)

    b_query = load_rows(p_query, stride_ql, start_m, stop, True, BLOCK_M, DIM, BLOCK_D, ALIGN)  # [BLOCK_M, BLOCK_D]
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    start = start_m + (count - rows if BEHIND else 0)  # the slot of the first row
    seen_by_all = tl.maximum(start + 1, 0) // BLOCK_N * BLOCK_N if BEHIND else start_m
    b_acc, b_max, b_sum = full_tiles(
        b_query, b_acc, b_max, b_sum, key, value, seen_by_all, scale_log2, DIM, VALUE_DIM, ALIGN, BLOCK_N, LAG
    )
    if BEHIND:
        for tile in tl.range(seen_by_all, tl.minimum(start + BLOCK_M, count), BLOCK_N):
            b_key = load_rows(key[POINTER], key[STRIDE], tile, count, True, BLOCK_N, DIM, BLOCK_D, ALIGN)
            b_weights, b_keep, b_max, b_sum = diagonal_tile(b_query, b_key, b_max, b_sum, start, tile, scale_log2)
            b_value = load_rows(value[POINTER], value[STRIDE], tile, count, True, BLOCK_N, VALUE_DIM, BLOCK_DV, ALIGN)
            b_acc = add_values(b_acc, b_keep, b_weights, b_value)
    else:
        b_acc, b_max, b_sum = diagonal(
            b_query, b_acc, b_max, b_sum, key, value, start_m, count, scale_log2, DIM, VALUE_DIM, ALIGN, BLOCK_N
        )
    p_out = at_head(p_out, stride_ob, stride_oh, item, head, ALIGN)
    store_rows(p_out, stride_ol, b_acc / b_sum[:, None], start_m, stop, BLOCK_M, VALUE_DIM, BLOCK_DV, ALIGN)
    store_lse(p_lse, item * heads + head, rows, b_max, b_sum, start_m, stop)


def flash_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    count: Tensor | None = None,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    tiles: Tiles | None = None,
    first: Tensor | None = None,
    behind: bool = False,
) -> Tensor:
    """Launch the kernel; also runs on CPU tensors in the Triton interpreter. See the module's docstring.

    out: where to write, [B, H, C, Dv] of any strides with the last 1; by default a new contiguous tensor.
    lse: where to write the log-sum-exp of each row's scaled logits, natural: float32 [B, H, C], contiguous.
    behind, first: queries are the last ones, and from which row on there are any.
    """
    query, key, value = aligned_rows(query), aligned_rows(key), aligned_rows(value)
    if out is None:
        out = query.new_empty(*query.shape[:3], value.shape[3])
    if out.numel() == 0:
        return out
    query, scale_log2 = positive_scale(query, scale)
    tiles = tiles_for(query, key, value, tiles=tiles)
    batch, heads, rows, _ = query.shape
    align = row_alignment(query, key, value, out)
    blocks = cdiv(rows, tiles.block_m)
    launch(
        _flash_kernel,
        (heads, blocks, batch) if tiles.heads_inner else (blocks, heads, batch),
        (query, key, value, out, lse, None if count is None else count.contiguous(), first),
        (*row_strides(align, query, key, value, out), key.shape[2], rows, heads // key.shape[1], scale_log2),
        descriptors=descriptors(tiles, key, value),
        BEHIND=behind,
        **tile_options(tiles, key, value, align),
        LAG=tiles.lag,
        HEADS_INNER=tiles.heads_inner,
    )
    return out


def behind_triton(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, first: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Of queries that are the last ones: [B, H, M, Dv], and the log-sum-exp, float32 [B, H, M]."""
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return flash_triton(query, key, value, scale, count, lse=lse, first=first, behind=True), lse


def run(query: Tensor, key: Tensor, value: Tensor, scale: float, count: Tensor | None) -> Tensor:
    """The kernel as `attend` calls it."""
    with torch.cuda.device_of(query):
        return flash_triton(query, key, value, scale, count)


def run_lse(query: Tensor, key: Tensor, value: Tensor, scale: float, count: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `run`, with the log-sum-exp of each row."""
    with torch.cuda.device_of(query):
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        return flash_triton(query, key, value, scale, count, lse=lse), lse


def run_behind(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As the registry has it: every row is a query."""
    with torch.cuda.device_of(query):
        return behind_triton(query, key, value, None, None, scale)


def supports(request: KernelRequest) -> str | None:
    """Why the kernel cannot run a request, or None."""
    if request.device_type != "cuda":
        return f"runs on CUDA devices only, not on {request.device_type}"
    if not HAS_TRITON:
        return "needs Triton, which is not installed"
    if request.capability is not None and request.capability < (8, 0):
        return f"needs compute capability 8.0, not {request.capability[0]}.{request.capability[1]}"
    if request.dtype not in _DTYPES:
        return f"takes float16, bfloat16 and float32, not {request.dtype}"
    if max(request.head_dim, request.value_head_dim) > MAX_HEAD_DIM:
        return f"takes heads of at most {MAX_HEAD_DIM}, not {request.head_dim} and {request.value_head_dim}"
    return None


# Behind the others, which are faster where the host knows the count; what "auto" captures in a CUDA graph.
KERNEL = AttentionKernel(
    "triton",
    run=run,
    run_lse=run_lse,
    run_behind=run_behind,
    supports=supports,
    priority=-10,
    device_count=True,
)
