"""Causal attention whose work follows a count on the device: FlashAttention-2 in Triton, nothing read on the host.

    out[b, h, i] = sum_{j <= i} softmax_j(scale * <query[b, h, i], key[b, g, j]>) value[b, g, j]     i < count[b]

    query [B, H, C, D], key [B, Hk, C, D], value [B, Hk, C, Dv], g = h // (H / Hk), strides free but for the last, 1;
    float16 | bfloat16 | float32 (float32 exactly, without TF32, and slowly); D, Dv <= 256, padded to powers of two;
    count int32 [B] or None (= C)
    ->  out [B, H, C, Dv], contiguous; rows from `count` on are left unwritten

Rows of query, key and value from `count` on may hold anything, NaN too: they are never read.

One program computes BLOCK_M rows. Tiles of BLOCK_N keys before its diagonal need no mask; the diagonal's own are masked,
and loaded only up to `count`. Query blocks are numbered back from the last real one, so that the longest start first
whatever the count, and programs without a block leave at once: a captured CUDA graph with room for C rows costs what
count rows cost and hardly more.

On Hopper the tensor cores work while a program exponentiates: the product with the values lags one tile behind
(`_full_tiles`), so that it is in flight during the next tile's softmax. Key and value tiles come by TMA where strides
allow it. With n = count: 2 n^2 H (D + Dv) / 2 flops a batch item, n^2 H / 2 exponentials, and n e (H D + H Dv + Hk D +
Hk Dv) bytes of DRAM at best (e bytes an element); query blocks of a head run side by side and share its keys in L2. At
H = 32, D = Dv = 128, n = 64K: 35 TFLOP.

Method: FlashAttention-2, arXiv 2307.08691; the lag is FlashAttention-3's pipelining within a warpgroup, arXiv 2407.08608.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tsa_compile.kernels.compress import row_alignment
from tsa_compile.kernels.interface import AttentionKernel, KernelRequest
from tsa_compile.kernels.launch import HAS_TRITON, cdiv, next_power_of_2, tl, triton

MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Tiles(NamedTuple):
    """How a launch is cut: what `_tiles` chooses, and what a tuning script overrides."""

    block_m: int
    """Query rows of a program; a multiple of block_n."""
    block_n: int
    """Keys of a step."""
    num_warps: int
    num_stages: int
    use_tma: bool = False
    """Key and value tiles by TMA, if strides allow it."""
    lag: bool = False
    """The product with the values one tile behind the scores: more registers, less waiting for tensor cores."""
    heads_inner: bool = False
    """Launch order: all heads of a query block, instead of all query blocks of a head."""


@triton.jit
def _load_rows(
    p_rows, stride_row, start, stop, MASKED: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows [ROWS, BLOCK_D] from `start`; with MASKED zeros from `stop` on. Zeros beyond the head size."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    p_tile = p_rows + tl.cast(start, tl.int64) * stride_row * ALIGN
    pointers = p_tile + rows[:, None] * stride_row * ALIGN + dims[None, :]
    b_real = (start + rows < stop)[:, None]
    b_inside = (dims < DIM)[None, :]
    if MASKED and DIM == BLOCK_D:
        return tl.load(pointers, mask=b_real, other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=b_real & b_inside, other=0.0)
    elif DIM == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=b_inside, other=0.0)


@triton.jit
def _load_tile(
    descriptor, p_rows, stride_row, item, head, start, USE_TMA: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A tile of real rows: by TMA from the whole tensor, or by pointers from the head's first row."""
    if USE_TMA:
        return tl.reshape(descriptor.load([item, head, start, 0]), [ROWS, BLOCK_D])
    else:
        return _load_rows(p_rows, stride_row, start, 0, False, ROWS, DIM, BLOCK_D, ALIGN)


@triton.jit
def _scores(b_query, b_key):
    return tl.dot(b_query, tl.trans(b_key), input_precision="ieee")


@triton.jit
def _weigh(b_scores, b_max, b_sum, scale_log2):
    """A tile joins the running maximum and sum of each row: its weights, and what the rows keep of earlier tiles.

    The maximum is that of scale_log2 * score, which takes scale_log2 > 0.
    """
    b_new_max = tl.maximum(b_max, tl.max(b_scores, axis=1) * scale_log2)
    b_keep = tl.exp2(b_max - b_new_max)
    b_weights = tl.exp2(tl.fma(b_scores, scale_log2, -b_new_max[:, None]))
    return b_weights, b_keep, b_new_max, b_sum * b_keep + tl.sum(b_weights, axis=1)


@triton.jit
def _add_values(b_acc, b_keep, b_weights, b_value):
    return tl.dot(b_weights.to(b_value.dtype), b_value, b_acc * b_keep[:, None], input_precision="ieee")


@triton.jit
def _full_tiles(
    b_query, b_acc, b_max, b_sum, desc_key, desc_value, p_key, p_value, stride_kl, stride_vl, item, kv_head, stop,
    scale_log2, DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr, LAG: tl.constexpr,
):  # fmt: skip
    """The tiles [0, stop), every key of which every row sees; stop is a multiple of BLOCK_N.

    A step with LAG: wait for this tile's scores, launch the previous tile's product with the values, and take this
    tile's softmax meanwhile. The compiler leaves that product in flight because nothing in the loop reads `b_acc`
    between a step's wait for scores and the next one's. Weights are carried in float32: 16-bit ones would pass through
    shared memory on their way to the tensor cores.
    """
    b_keep = tl.full([BLOCK_M], 1.0, tl.float32)
    b_weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, stop, BLOCK_N):
        b_key = _load_tile(desc_key, p_key, stride_kl, item, kv_head, start, USE_TMA, BLOCK_N, DIM, BLOCK_D, ALIGN)
        b_scores = _scores(b_query, b_key)
        if not LAG:
            b_weights, b_keep, b_max, b_sum = _weigh(b_scores, b_max, b_sum, scale_log2)
        # With LAG the first step adds 0 times the first tile.
        value_start = tl.maximum(start - BLOCK_N, 0) if LAG else start
        b_value = _load_tile(
            desc_value, p_value, stride_vl, item, kv_head, value_start, USE_TMA, BLOCK_N, VALUE_DIM, BLOCK_DV, ALIGN
        )
        b_acc = _add_values(b_acc, b_keep, b_weights, b_value)
        if LAG:
            b_weights, b_keep, b_max, b_sum = _weigh(b_scores, b_max, b_sum, scale_log2)
    if LAG and stop > 0:
        b_value = _load_tile(
            desc_value, p_value, stride_vl, item, kv_head, stop - BLOCK_N, USE_TMA,
            BLOCK_N, VALUE_DIM, BLOCK_DV, ALIGN,
        )  # fmt: skip
        b_acc = _add_values(b_acc, b_keep, b_weights, b_value)
    return b_acc, b_max, b_sum


@triton.jit
def _weigh_diagonal(b_query, b_key, b_max, b_sum, start_m, start, scale_log2, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """As `_weigh`: the keys from `start` on and the rows from `start_m` on, each of which sees keys up to itself."""
    rows, keys = start_m + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    b_scores = tl.where(rows[:, None] >= keys[None, :], _scores(b_query, b_key), float("-inf"))
    return _weigh(b_scores, b_max, b_sum, scale_log2)


@triton.jit
def _diagonal(
    b_query, b_acc, b_max, b_sum, desc_key, desc_value, p_key, p_value, stride_kl, stride_vl, item, kv_head, start_m, count,
    scale_log2, DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """The tiles [start_m, start_m + BLOCK_M): row i sees keys up to i, and nobody those from `count` on.

    If `count` cuts them, by pointers, because TMA would fetch what lies behind it: a weight of 0 times NaN is NaN.
    """
    stop = tl.minimum(start_m + BLOCK_M, count)
    if USE_TMA:  # a constant: without it there is no descriptor to compile a load from
        whole = stop == start_m + BLOCK_M
        if whole:
            for start in tl.range(start_m, start_m + BLOCK_M, BLOCK_N, num_stages=1):
                b_key = _load_tile(desc_key, p_key, stride_kl, item, kv_head, start, True, BLOCK_N, DIM, BLOCK_D, ALIGN)
                b_value = _load_tile(
                    desc_value, p_value, stride_vl, item, kv_head, start, True, BLOCK_N, VALUE_DIM, BLOCK_DV, ALIGN
                )
                b_weights, b_keep, b_max, b_sum = _weigh_diagonal(
                    b_query, b_key, b_max, b_sum, start_m, start, scale_log2, BLOCK_M, BLOCK_N
                )
                b_acc = _add_values(b_acc, b_keep, b_weights, b_value)
            stop = start_m
    for start in tl.range(start_m, stop, BLOCK_N):
        b_key = _load_rows(p_key, stride_kl, start, count, True, BLOCK_N, DIM, BLOCK_D, ALIGN)
        b_weights, b_keep, b_max, b_sum = _weigh_diagonal(
            b_query, b_key, b_max, b_sum, start_m, start, scale_log2, BLOCK_M, BLOCK_N
        )
        b_value = _load_rows(p_value, stride_vl, start, count, True, BLOCK_N, VALUE_DIM, BLOCK_DV, ALIGN)
        b_acc = _add_values(b_acc, b_keep, b_weights, b_value)
    return b_acc, b_sum


@triton.jit
def _store_rows(
    p_rows, stride_row, b_rows, start, stop,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Writes the rows [start, start + ROWS) up to `stop`; the counterpart of `_load_rows`."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    pointers = p_rows + start.to(tl.int64) * stride_row * ALIGN + rows[:, None] * stride_row * ALIGN + dims[None, :]
    b_inside = (start + rows < stop)[:, None] & (dims < DIM)[None, :]
    tl.store(pointers, b_rows.to(p_rows.dtype.element_ty), mask=b_inside)


# Lengths and strides vary from call to call: unspecialized, so that none of their values compiles the kernel anew.
@triton.jit(
    do_not_specialize=[
        *("stride_qb", "stride_qh", "stride_ql", "stride_kb", "stride_kh", "stride_kl"),
        *("stride_vb", "stride_vh", "stride_vl", "stride_ob", "stride_oh", "stride_ol", "capacity", "heads_per_kv"),
    ]
)
def _flash_kernel(
    p_query, p_key, p_value, p_out, p_count, desc_key, desc_value,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ob, stride_oh, stride_ol, capacity, heads_per_kv, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr, LAG: tl.constexpr,
    HEADS_INNER: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head."""
    scale_log2 = tl.cast(scale_log2, tl.float32)  # Inductor hands a Python float on as a double
    head = tl.program_id(0 if HEADS_INNER else 1)
    item = tl.program_id(2)
    count = capacity
    if p_count is not None:
        count = tl.minimum(tl.load(p_count + item), capacity)
    block = tl.cdiv(count, BLOCK_M) - 1 - tl.program_id(1 if HEADS_INNER else 0)
    if block < 0:
        return
    start_m = block * BLOCK_M
    kv_head = head // heads_per_kv
    far_item, far_head, far_kv_head = item.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    p_query += (far_item * stride_qb + far_head * stride_qh) * ALIGN
    p_key += (far_item * stride_kb + far_kv_head * stride_kh) * ALIGN
    p_value += (far_item * stride_vb + far_kv_head * stride_vh) * ALIGN

    b_query = _load_rows(p_query, stride_ql, start_m, count, True, BLOCK_M, DIM, BLOCK_D, ALIGN)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc, b_max, b_sum = _full_tiles(
        b_query, b_acc, b_max, b_sum, desc_key, desc_value, p_key, p_value, stride_kl, stride_vl, item, kv_head,
        start_m, scale_log2, DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, ALIGN, BLOCK_M, BLOCK_N, USE_TMA, LAG,
    )  # fmt: skip
    b_acc, b_sum = _diagonal(
        b_query, b_acc, b_max, b_sum, desc_key, desc_value, p_key, p_value, stride_kl, stride_vl, item, kv_head,
        start_m, count, scale_log2, DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, ALIGN, BLOCK_M, BLOCK_N, USE_TMA,
    )  # fmt: skip

    p_out += (far_item * stride_ob + far_head * stride_oh) * ALIGN
    _store_rows(p_out, stride_ol, b_acc / b_sum[:, None], start_m, count, BLOCK_M, VALUE_DIM, BLOCK_DV, ALIGN)


def _block_dim(size: int) -> int:
    return max(16, next_power_of_2(size))


def _tiles(dtype: torch.dtype, block_d: int, hopper: bool) -> Tiles:
    """The tiles for a padded head size (the larger of the two); hopper: on Hopper, with strides that TMA takes."""
    if dtype == torch.float32:
        return Tiles(16, 16, 4, 1) if block_d > 128 else Tiles(32, 16 if block_d > 64 else 32, 4, 1)
    if not hopper:  # fits the 99 KB of shared memory of the GPUs that have least
        return Tiles(64, 32 if block_d > 128 else 64, 4, 2)
    if block_d > 128:
        return Tiles(128, 64, 8, 2, use_tma=True, lag=True)
    if block_d > 64:
        return Tiles(64, 64, 4, 2, use_tma=True, lag=True)  # two programs a multiprocessor overlap each other's waits
    return Tiles(128, 64, 8, 3, use_tma=True)


def _tma_fits(tensor: Tensor) -> bool:
    """Whether a TMA descriptor can describe the tensor: steps of 16 bytes, none of them 0."""
    strides = [s for s, size in zip(tensor.stride()[:3], tensor.shape[:3]) if size > 1]
    return tensor.data_ptr() % 16 == 0 and all(s > 0 and s * tensor.element_size() % 16 == 0 for s in strides)


def _descriptor(tensor: Tensor, block_n: int):
    """TMA's view of [B, H, C, D] in tiles [1, 1, block_n, D].

    Made on the host: a CUDA graph captures it by value, and the kernel needs no allocator for scratch memory.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor  # here, as the package imports without Triton

    dim = tensor.shape[3]
    # The stride of a dimension of one element may be anything, TMA's may not.
    strides = [s if size > 1 else _block_dim(dim) for s, size in zip(tensor.stride()[:3], tensor.shape[:3])]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, block_n, _block_dim(dim)])


def _aligned_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are dense and start at steps of 16 bytes, else a contiguous copy.

    Loads of single elements, which remain for head sizes that are no multiple of 16 bytes, cost more than a copy.
    """
    return tensor if tensor.stride(-1) == 1 and row_alignment(tensor) > 1 else tensor.contiguous()


def flash_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    count: Tensor | None = None,
    *,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Launch the kernel; also runs on CPU tensors in the Triton interpreter. See the module's docstring.

    out: where to write, [B, H, C, Dv] of any strides with the last 1; by default a new contiguous tensor.
    """
    query, key, value = _aligned_rows(query), _aligned_rows(key), _aligned_rows(value)
    if out is None:
        out = query.new_empty(*query.shape[:3], value.shape[3])
    if out.numel() == 0:
        return out
    if scale < 0:  # the kernel takes the maximum of scale * score to be scale times the maximum
        query, scale = -query, -scale
    traced = type(query) is not torch.Tensor  # by a compiler, which knows no addresses and builds no descriptors
    use_tma = not traced and _tma_fits(key) and _tma_fits(value)
    if tiles is None:
        hopper = use_tma and query.is_cuda and torch.cuda.get_device_capability(query.device) == (9, 0)
        tiles = _tiles(query.dtype, _block_dim(max(query.shape[3], value.shape[3])), hopper)
    # A scale of 0 becomes a small one: 0 times the mask's -inf would be NaN.
    _launch(query, key, value, out, count, max(scale, 1e-30), tiles._replace(use_tma=tiles.use_tma and use_tma))
    return out


def _launch(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, count: Tensor | None, scale: float, tiles: Tiles
) -> None:
    batch, heads, capacity, dim = query.shape
    value_dim = value.shape[3]
    align = row_alignment(query, key, value, out)
    blocks = cdiv(capacity, tiles.block_m)
    kernel = _flash_kernel if type(query) is torch.Tensor else torch.library.wrap_triton(_flash_kernel)
    kernel[(heads, blocks, batch) if tiles.heads_inner else (blocks, heads, batch)](
        query,
        key,
        value,
        out,
        None if count is None else count.contiguous(),
        _descriptor(key, tiles.block_n) if tiles.use_tma else None,
        _descriptor(value, tiles.block_n) if tiles.use_tma else None,
        *(stride // align for tensor in (query, key, value, out) for stride in tensor.stride()[:3]),
        capacity,
        heads // key.shape[1],
        scale * math.log2(math.e),
        DIM=dim,
        BLOCK_D=_block_dim(dim),
        VALUE_DIM=value_dim,
        BLOCK_DV=_block_dim(value_dim),
        ALIGN=align,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        USE_TMA=tiles.use_tma,
        LAG=tiles.lag,
        HEADS_INNER=tiles.heads_inner,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def run(query: Tensor, key: Tensor, value: Tensor, scale: float, count: Tensor | None) -> Tensor:
    """The kernel as `attend` calls it."""
    with torch.cuda.device_of(query):
        return flash_triton(query, key, value, scale, count)


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
KERNEL = AttentionKernel("triton", run=run, supports=supports, priority=-10, device_count=True)
