"""What the kernels have in common: tiles of rows, scores, the running softmax, products with values; how launches are cut.

A head's rows are [L, D] with a dense last dimension, padded to BLOCK_D. Kernels get strides in units of ALIGN elements and
multiply by it, a constant: so the compiler sees that rows allow 16-byte accesses although it knows no stride. Strides stay
single arguments of the kernels: Triton specializes on the numbers in a tuple whatever `do_not_specialize` says, which would
compile a kernel anew for a new length, and Inductor takes no tuples into its graphs. Inside they travel together, as tuples.

Attention is FlashAttention-2's (arXiv 2307.08691): of each row the running maximum `b_max` of its scores to base 2, the sum
`b_sum` of its weights, and the weighted values `b_acc` [BLOCK_M, BLOCK_DV].
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tsa_compile.kernels.launch import next_power_of_2, tl, triton

# Where a kernel finds the rows of a head: TMA's view of all heads or None, the head's first row, the stride from row to row
# in units of ALIGN, the item, the head. No class: Inductor copies a kernel's functions and constants into packages alone.
DESCRIPTOR, POINTER, STRIDE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ITEM, HEAD = tl.constexpr(3), tl.constexpr(4)
LOG2_E = tl.constexpr(math.log2(math.e))


class Tiles(NamedTuple):
    """How a launch of an attention kernel is cut: what `choose_tiles` chooses, and what a tuning script overrides."""

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


def stride_names(tensors: str) -> list[str]:
    """The parameters for strides of tensors named by a letter each: "qk" has stride_qb, stride_qh, stride_ql, stride_kb, ...

    For `do_not_specialize`: strides and lengths vary from call to call, and none of their values may compile a kernel anew.
    """
    return [f"stride_{tensor}{dimension}" for tensor in tensors for dimension in "bhl"]


@triton.jit
def count_of(p_count, item, capacity):
    """How many rows of an item are real: all without a count."""
    count = capacity
    if p_count is not None:
        count = tl.minimum(tl.load(p_count + item), capacity)
    return count


@triton.jit
def at_head(p_rows, stride_b, stride_h, item, head, ALIGN: tl.constexpr):
    """The first row of a head."""
    return p_rows + (item.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h) * ALIGN


@triton.jit
def load_rows(
    p_rows, stride_row, start, stop, MASKED: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows [ROWS, BLOCK_D] from `start`; with MASKED zeros from `stop` on. Zeros beyond the head size."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    p_tile = p_rows + tl.cast(start, tl.int64) * stride_row * ALIGN
    pointers = p_tile + rows[:, None] * stride_row * ALIGN + dims[None, :]  # [ROWS, BLOCK_D]
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
def load_tile(rows, start, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """A tile [ROWS, BLOCK_D] of real rows: by TMA where there is a descriptor, else by pointers."""
    if rows[DESCRIPTOR] is not None:
        return tl.reshape(rows[DESCRIPTOR].load([rows[ITEM], rows[HEAD], start, 0]), [ROWS, BLOCK_D])
    else:
        return load_rows(rows[POINTER], rows[STRIDE], start, 0, False, ROWS, DIM, BLOCK_D, ALIGN)


@triton.jit
def gather_rows(p_rows, b_offsets, b_real, start_d, DIM: tl.constexpr, DIMS: tl.constexpr):
    """Rows at offsets [N], their dimensions from `start_d` on: [N, DIMS]. Zeros where not real, and beyond the head size.

    b_real: which rows are; None: all.
    """
    dims = start_d + tl.arange(0, DIMS)
    pointers = p_rows + b_offsets[:, None] + dims[None, :]
    if b_real is not None:
        return tl.load(pointers, mask=b_real[:, None] & (dims < DIM)[None, :], other=0.0)
    elif DIM == DIMS:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(
    p_rows, stride_row, b_rows, start, stop,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Writes the rows [start, start + ROWS) up to `stop`; the counterpart of `load_rows`."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    pointers = p_rows + start.to(tl.int64) * stride_row * ALIGN + rows[:, None] * stride_row * ALIGN + dims[None, :]
    b_inside = (start + rows < stop)[:, None] & (dims < DIM)[None, :]
    tl.store(pointers, b_rows.to(p_rows.dtype.element_ty), mask=b_inside)


@triton.jit
def store_lse(p_lse, line, capacity, b_max, b_sum, start, stop):
    """Writes the natural log-sum-exp of the rows [start, start + ROWS) up to `stop`, of [lines, capacity]; None: nothing."""
    if p_lse is not None:
        rows = start + tl.arange(0, b_max.shape[0])
        p_lse += tl.cast(line, tl.int64) * capacity + rows
        tl.store(p_lse, (b_max + tl.log2(b_sum)) * 0.6931471805599453, mask=rows < stop)  # ln 2


@triton.jit
def scores(b_query, b_key):
    """[BLOCK_M, BLOCK_N] in float32, without TF32."""
    return tl.dot(b_query, tl.trans(b_key), input_precision="ieee")


@triton.jit
def weigh(b_scores, b_max, b_sum, scale_log2):
    """A tile joins the running maximum and sum of each row: its weights, and what the rows keep of earlier tiles.

    The maximum is that of scale_log2 * score, which takes scale_log2 > 0.
    """
    b_new_max = tl.maximum(b_max, tl.max(b_scores, axis=1) * scale_log2)  # [BLOCK_M]
    b_keep = tl.exp2(b_max - b_new_max)
    b_weights = tl.exp2(tl.fma(b_scores, scale_log2, -b_new_max[:, None]))  # [BLOCK_M, BLOCK_N]
    return b_weights, b_keep, b_new_max, b_sum * b_keep + tl.sum(b_weights, axis=1)


@triton.jit
def weigh_seen(b_query, b_key, b_seen, b_max, b_sum, scale_log2):
    """As `weigh`, of a tile of keys that a row may see or not: b_seen [BLOCK_M or 1, BLOCK_N]."""
    return weigh(tl.where(b_seen, scores(b_query, b_key), float("-inf")), b_max, b_sum, scale_log2)


@triton.jit
def log_sum(b_logits, b_max, b_sum, AXIS: tl.constexpr):
    """A tile joins the running maximum, and the sum of 2^(logit - maximum), of each line along AXIS.

    A line that has seen no key yet has the maximum -inf; -inf - (-inf) must not become NaN.
    """
    b_new_max = tl.maximum(b_max, tl.max(b_logits, axis=AXIS))
    b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_logits - tl.expand_dims(b_shift, AXIS)), axis=AXIS)
    return b_new_max, b_sum


@triton.jit
def add_values(b_acc, b_keep, b_weights, b_value):
    """Weighted values [BLOCK_M, BLOCK_DV], a tile of them added to what the rows keep."""
    return tl.dot(b_weights.to(b_value.dtype), b_value, b_acc * b_keep[:, None], input_precision="ieee")


@triton.jit
def add_tile(
    b_acc, b_keep, b_weights, value, start,
    VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As `add_values`, of the tile from `start` on."""
    return add_values(b_acc, b_keep, b_weights, load_tile(value, start, BLOCK_N, VALUE_DIM, b_acc.shape[1], ALIGN))


@triton.jit
def attend_tile(
    b_query, b_acc, b_keep, b_weights, b_max, b_sum, key, value, start, value_start, scale_log2,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, LAG: tl.constexpr,
):  # fmt: skip
    """A step of a loop over tiles, every key of which every row sees.

    With LAG: wait for this tile's scores, launch the product of the previous tile's weights with the values at
    `value_start`, and take this tile's softmax meanwhile. The compiler leaves that product in flight because nothing in the
    loop reads `b_acc` between a step's wait for scores and the next one's. Weights are carried in float32: 16-bit ones would
    pass through shared memory on their way to the tensor cores. The first step adds 0 times a tile, and the last tile's
    values are left over (`add_tile`).
    """
    b_key = load_tile(key, start, BLOCK_N, DIM, b_query.shape[1], ALIGN)  # [BLOCK_N, BLOCK_D]
    b_scores = scores(b_query, b_key)  # [BLOCK_M, BLOCK_N]
    if not LAG:
        b_weights, b_keep, b_max, b_sum = weigh(b_scores, b_max, b_sum, scale_log2)
    b_acc = add_tile(b_acc, b_keep, b_weights, value, value_start if LAG else start, VALUE_DIM, ALIGN, BLOCK_N)
    if LAG:
        b_weights, b_keep, b_max, b_sum = weigh(b_scores, b_max, b_sum, scale_log2)
    return b_acc, b_keep, b_weights, b_max, b_sum


@triton.jit
def diagonal_tile(b_query, b_key, b_max, b_sum, start_m, start, scale_log2):
    """As `weigh`: the keys from `start` on and the rows from `start_m` on, each of which sees keys up to itself."""
    rows, keys = start_m + tl.arange(0, b_query.shape[0]), start + tl.arange(0, b_key.shape[0])
    return weigh_seen(b_query, b_key, rows[:, None] >= keys[None, :], b_max, b_sum, scale_log2)


@triton.jit
def diagonal(
    b_query, b_acc, b_max, b_sum, key, value, start_m, count, scale_log2,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tiles of the rows' own block: row i sees keys up to i, and no row sees keys from `count` on.

    If `count` cuts them, by pointers, because TMA would fetch what lies behind it: a weight of 0 times NaN is NaN.
    """
    BLOCK_M: tl.constexpr = b_query.shape[0]
    BLOCK_D: tl.constexpr = b_query.shape[1]
    BLOCK_DV: tl.constexpr = b_acc.shape[1]
    stop = tl.minimum(start_m + BLOCK_M, count)
    if key[DESCRIPTOR] is not None:
        whole = stop == start_m + BLOCK_M
        if whole:
            for start in tl.range(start_m, start_m + BLOCK_M, BLOCK_N, num_stages=1):
                b_key = load_tile(key, start, BLOCK_N, DIM, BLOCK_D, ALIGN)  # [BLOCK_N, BLOCK_D]
                b_value = load_tile(value, start, BLOCK_N, VALUE_DIM, BLOCK_DV, ALIGN)  # [BLOCK_N, BLOCK_DV]
                b_weights, b_keep, b_max, b_sum = diagonal_tile(b_query, b_key, b_max, b_sum, start_m, start, scale_log2)
                b_acc = add_values(b_acc, b_keep, b_weights, b_value)
            stop = start_m
    for start in tl.range(start_m, stop, BLOCK_N):
        b_key = load_rows(key[POINTER], key[STRIDE], start, count, True, BLOCK_N, DIM, BLOCK_D, ALIGN)
        b_weights, b_keep, b_max, b_sum = diagonal_tile(b_query, b_key, b_max, b_sum, start_m, start, scale_log2)
        b_value = load_rows(value[POINTER], value[STRIDE], start, count, True, BLOCK_N, VALUE_DIM, BLOCK_DV, ALIGN)
        b_acc = add_values(b_acc, b_keep, b_weights, b_value)
    return b_acc, b_max, b_sum


@triton.jit
def full_tiles(
    b_query, b_acc, b_max, b_sum, key, value, stop, scale_log2,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, LAG: tl.constexpr,
):  # fmt: skip
    """The tiles [0, stop), every key of which every row sees; stop is a multiple of BLOCK_N."""
    b_keep = tl.full([b_query.shape[0]], 1.0, tl.float32)
    b_weights = tl.zeros([b_query.shape[0], BLOCK_N], tl.float32)
    for start in tl.range(0, stop, BLOCK_N):
        b_acc, b_keep, b_weights, b_max, b_sum = attend_tile(
            b_query, b_acc, b_keep, b_weights, b_max, b_sum, key, value, start, tl.maximum(start - BLOCK_N, 0), scale_log2,
            DIM, VALUE_DIM, ALIGN, BLOCK_N, LAG,
        )  # fmt: skip
    if LAG and stop > 0:
        b_acc = add_tile(b_acc, b_keep, b_weights, value, stop - BLOCK_N, VALUE_DIM, ALIGN, BLOCK_N)
    return b_acc, b_max, b_sum


@triton.jit
def lower_bound(p_sorted, target, high, FAN: tl.constexpr):
    """How many of sorted[:high] are below target.

    Every round asks FAN evenly spaced elements at once: four dependent loads for 2^20 elements instead of twenty.
    """
    low = 0
    while low < high:
        step = tl.cdiv(high - low, FAN)
        probes = low + (tl.arange(0, FAN) + 1) * step - 1
        b_values = tl.load(p_sorted + probes, mask=probes < high, other=2147483647)
        low += tl.sum((b_values < target).to(tl.int32), axis=0) * step
        high = tl.minimum(high, low + step - 1)
    return low


def block_dim(size: int) -> int:
    """A head size as tiles have it: a power of two that tensor cores take."""
    return max(16, next_power_of_2(size))


def row_alignment(*tensors: Tensor) -> int:
    """Elements of 16 bytes if every row of every tensor starts that many elements from its base, else 1."""
    unit = 16 // tensors[0].element_size()
    for tensor in tensors:
        for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1]):
            aligned = stride % unit == 0
            if not isinstance(aligned, bool):  # of a symbolic stride, only what holds for every length
                aligned = statically_known_true(aligned)
            if not aligned and not (isinstance(size, int) and size <= 1):
                return 1
    return unit


def row_strides(align: int, *tensors: Tensor) -> tuple[int, ...]:
    """The strides of items, heads and rows, in units of `row_alignment`."""
    return tuple(stride // align for tensor in tensors for stride in tensor.stride()[:3])


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is dense, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def aligned_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are dense and start at steps of 16 bytes, else a contiguous copy.

    Loads of single elements, which remain for head sizes that are no multiple of 16 bytes, cost more than a copy.
    """
    return tensor if tensor.stride(-1) == 1 and row_alignment(tensor) > 1 else tensor.contiguous()


def positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The query and scale * log2 e, positive: kernels take the maximum of scale * score to be scale times the maximum.

    A scale of 0 becomes a small one: 0 times a mask's -inf would be NaN.
    """
    if scale < 0:
        query, scale = -query, -scale
    return query, max(scale, 1e-30) * math.log2(math.e)


def tma_fits(tensor: Tensor) -> bool:
    """Whether a TMA descriptor can describe the tensor: steps of 16 bytes, none of them 0."""
    strides = [s for s, size in zip(tensor.stride()[:3], tensor.shape[:3]) if size > 1]
    return tensor.data_ptr() % 16 == 0 and all(s > 0 and s * tensor.element_size() % 16 == 0 for s in strides)


def descriptor(tensor: Tensor, block_n: int):
    """TMA's view of [B, H, C, D] in tiles [1, 1, block_n, D].

    Made on the host: a CUDA graph captures it by value, and the kernel needs no allocator for scratch memory.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor  # here, as the package imports without Triton

    dim = tensor.shape[3]
    # The stride of a dimension of one element may be anything, TMA's may not.
    strides = [s if size > 1 else block_dim(dim) for s, size in zip(tensor.stride()[:3], tensor.shape[:3])]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, block_n, block_dim(dim)])


def on_hopper(tensor: Tensor) -> bool:
    """Whether the tensor is on a GPU of the only kind for which tiles were tuned with TMA."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) == (9, 0)


def choose_tiles(dtype: torch.dtype, block_d: int, hopper: bool) -> Tiles:
    """The tiles for a padded head size (the larger of the two); hopper: on Hopper, with strides that TMA takes."""
    if dtype == torch.float32:
        return Tiles(16, 16, 4, 1) if block_d > 128 else Tiles(32, 16 if block_d > 64 else 32, 4, 1)
    if block_d > 256:  # 64 rows of outputs alone fill the registers of eight warps to the half
        return Tiles(64, 64, 8, 1, use_tma=True, lag=True) if hopper else Tiles(32, 16, 4, 1)
    if not hopper:  # fits the 99 KB of shared memory of the GPUs that have least
        return Tiles(64, 32 if block_d > 128 else 64, 4, 2)
    if block_d > 128:
        return Tiles(128, 64, 8, 2, use_tma=True, lag=True)
    if block_d > 64:
        return Tiles(64, 64, 4, 2, use_tma=True, lag=True)  # two programs a multiprocessor overlap each other's waits
    return Tiles(128, 64, 8, 3, use_tma=True)


def tiles_for(query: Tensor, *rows: Tensor, tiles: Tiles | None = None) -> Tiles:
    """The tiles that were asked for, or else chosen; by TMA only if it can read all of `rows`, what comes in tiles."""
    # A compiler that traces knows no addresses and builds no descriptors.
    use_tma = type(query) is Tensor and all(tma_fits(tensor) for tensor in rows)
    if tiles is None:
        largest = max(tensor.shape[3] for tensor in (query, *rows))
        tiles = choose_tiles(query.dtype, block_dim(largest), use_tma and on_hopper(query))
    return tiles._replace(use_tma=tiles.use_tma and use_tma)


def tile_options(tiles: Tiles, key: Tensor, value: Tensor, align: int) -> dict[str, Any]:
    """The constants and options of an attention kernel's launch."""
    dim, value_dim = key.shape[3], value.shape[3]
    return {
        "DIM": dim, "BLOCK_D": block_dim(dim), "VALUE_DIM": value_dim, "BLOCK_DV": block_dim(value_dim), "ALIGN": align,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
    }  # fmt: skip


def descriptors(tiles: Tiles, *rows: Tensor) -> tuple[Any, ...]:
    """For each tensor that comes in tiles TMA's view of it, or None."""
    return tuple(descriptor(tensor, tiles.block_n) if tiles.use_tma else None for tensor in rows)
