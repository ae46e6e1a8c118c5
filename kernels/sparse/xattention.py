"""XAttention's choice of blocks: the fewest that hold most of the attention, judged by sums along antidiagonals.

    x[b,h,r,c]     = scale / s * sum over u < s of <query[b, h, r s + s - 1 - u], key[b, g, c s + u]>         c <= r
    w[b,h,r,c]     = softmax over c of x[b,h,r,c]
    S[b,h,i,j]     = sum of w over the rows of block i and the columns of block j, 128 / s of each            j <= i
    list of i      = block 0, block i, and of the others the fewest, so that their S adds up to `mass` of row i's

    query [B, H, C, D], key [B, Hk, C, D], strides and dtypes as in flash.py; count int32 [B] or None; s = `stride`, 8 or 16
    -> kv_num_blocks int32 [B, H, Q], kv_indices int32 [B, H, Q, Q], Q = ceil(C / 128); empty lists behind count

Rows from `count` on are zeros in x; a group of s rows takes part if its first row does. Blocks of equal S are chosen
together. Two or three launches, none of them read back:

    antidiagonals.py   the sum of exp(x) over the columns of each block, float32 [B, H, C / s, Q], against peaks of x
    _choose            a program per query block: the rows' normalisation, S, the smallest S on the list, and the list

The smallest S on the list is found bit by bit, as select.py does: the largest number such that the blocks that reach it hold
the mass. The S of a row stay in the registers of one warp, so that each bit's sum is a few shuffles and no barrier.

At H = 32, D = 128, n = 128K and stride 16 the first takes 4.4 TFLOP, 1/32 of dense attention: at its rate 3 % of its time,
at stride 8 twice that; `_choose` reads 0.5 GB.

XAttention, arXiv 2503.16428, with the defaults of its published code: stride 16, mass 0.9.
"""

from __future__ import annotations

import math

from torch import Tensor

from tsa_compile.kernels.launch import by_device, launch, tl, triton
from tsa_compile.kernels.sparse.antidiagonals import Tiling, strided_logits, sums_triton
from tsa_compile.kernels.sparse.blocks import BLOCK
from tsa_compile.kernels.sparse.lists import Lists, empty_lists, forced, lists_of, real_blocks, write_list
from tsa_compile.kernels.tiles import count_of

STRIDE, MASS = 16, 0.9
MOST_BLOCKS = 4096
"""Of a row, as many are in registers; longer rows are read again for each bit."""


@triton.jit
def _load_parts(
    p_sums, p_peaks, blocks, tiles, own, start, real_rows,
    PER_BLOCK: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of the rows of query block `own`: sums [PER_BLOCK, CHUNK / SPAN, SPAN], and a peak for each last dimension of them."""
    rows, across = tl.arange(0, PER_BLOCK), start // SPAN + tl.arange(0, CHUNK // SPAN)
    keys = across[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    b_real = (rows < real_rows)[:, None]
    mask = b_real[:, :, None] & (keys <= own)[None, :, :]
    b_sums = tl.load(p_sums + (rows * blocks)[:, None, None] + keys[None, :, :], mask=mask, other=0.0)
    mask = b_real & (across * SPAN <= own)[None, :]
    b_peaks = tl.load(p_peaks + (rows * tiles)[:, None] + across[None, :], mask=mask, other=float("-inf"))
    return b_sums, b_peaks


@triton.jit
def _block_sums(
    p_sums, p_peaks, blocks, tiles, own, real_rows, PER_BLOCK: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr
):
    """Writes S where the sums of the block's first row were."""
    b_max = tl.full([PER_BLOCK], float("-inf"), tl.float32)
    b_total = tl.zeros([PER_BLOCK], tl.float32)
    for start in range(0, own + 1, CHUNK):
        b_sums, b_peaks = _load_parts(p_sums, p_peaks, blocks, tiles, own, start, real_rows, PER_BLOCK, SPAN, CHUNK)
        b_new_max = tl.maximum(b_max, tl.max(b_peaks, axis=1))
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)  # a row behind the count
        # [PER_BLOCK, SPAN], of [PER_BLOCK, CHUNK / SPAN, SPAN]
        b_weights = tl.sum(b_sums * tl.exp2(b_peaks - b_shift[:, None])[:, :, None], axis=1)
        b_total = b_total * tl.exp2(b_max - b_shift) + tl.sum(b_weights, axis=1)
        b_max = b_new_max
    b_norm = tl.where(b_max == float("-inf"), 0.0, b_max + tl.log2(b_total))
    for start in range(0, own + 1, CHUNK):
        b_sums, b_peaks = _load_parts(p_sums, p_peaks, blocks, tiles, own, start, real_rows, PER_BLOCK, SPAN, CHUNK)
        # [CHUNK / SPAN, SPAN]
        b_shares = tl.sum(b_sums * tl.exp2(b_peaks - b_norm[:, None])[:, :, None], axis=0)
        keys = (start + tl.arange(0, CHUNK // SPAN) * SPAN)[:, None] + tl.arange(0, SPAN)[None, :]
        tl.store(p_sums + keys, b_shares, mask=keys <= own)


@triton.jit
def _load_sums(p_sums, own, start, CHUNK: tl.constexpr):
    """S of the blocks between the first and the diagonal, 0 in the place of any other: [CHUNK]."""
    keys = start + tl.arange(0, CHUNK)
    return tl.load(p_sums + keys, mask=(keys > 0) & (keys < own), other=0.0)


@triton.jit
def _held(b_sums, at_least):
    """What those hold whose S has at least these bits."""
    return tl.where(b_sums.to(tl.int32, bitcast=True) >= at_least, b_sums, 0.0)


@triton.jit
def _others(p_sums, b_first, own, at_least, CHUNK: tl.constexpr, ONCE: tl.constexpr):
    """What all blocks between the first and the diagonal hold, of those whose S has at least these bits."""
    b_held = _held(b_first, at_least)
    if not ONCE:
        for start in range(CHUNK, own, CHUNK):
            b_held += _held(_load_sums(p_sums, own, start, CHUNK), at_least)
    return tl.sum(b_held, axis=0)


@triton.jit(do_not_specialize=["capacity", "blocks", "tiles"])
def _choose_kernel(
    p_sums, p_peaks, p_count, p_num, p_indices, capacity, blocks, tiles, mass, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    SPAN: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """The list of one query block, the longest first. S is not negative, so that its bits are integers of the same order."""
    PER_BLOCK: tl.constexpr = BLOCK // STRIDE
    own, item = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(2)
    row = (item * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * blocks + own
    count = count_of(p_count, item, capacity)
    if own * BLOCK >= count:
        tl.store(p_num + row, 0)
        return
    p_sums += row * PER_BLOCK * blocks
    p_peaks += row * PER_BLOCK * tiles
    _block_sums(p_sums, p_peaks, blocks, tiles, own, tl.cdiv(count - own * BLOCK, STRIDE), PER_BLOCK, SPAN, PART)
    tl.debug_barrier()

    b_first = _load_sums(p_sums, own, 0, CHUNK)
    always = tl.load(p_sums) + tl.load(p_sums + own, mask=own > 0, other=0.0)
    wanted = (always + _others(p_sums, b_first, own, 0, CHUNK, ONCE)) * mass
    threshold = tl.zeros([], tl.int32)
    bit = tl.full([], 1 << 30, tl.int32)
    for _ in range(31):
        held = always + _others(p_sums, b_first, own, threshold | bit, CHUNK, ONCE)
        threshold = tl.where(held >= wanted, threshold | bit, threshold)
        bit = bit >> 1
    # If the two blocks that are always chosen hold the mass, the threshold is a NaN, which no block reaches.
    reach = threshold.to(tl.float32, bitcast=True)
    write_list(p_sums, p_indices + row * blocks, p_num + row, own, reach, 1, 1, CHUNK)


def xattention_triton(
    query: Tensor,
    key: Tensor,
    scale: float,
    count: Tensor | None = None,
    *,
    stride: int = STRIDE,
    mass: float = MASS,
    block: int = BLOCK,
    tiling: Tiling | None = None,
    chunk: int | None = None,
) -> Lists:
    """Launch the kernels; also runs on CPU tensors in the Triton interpreter.

    tiling: see Tiling. chunk: a power of two, the blocks of a row that are in registers; by default all up to MOST_BLOCKS.
    """
    count = None if count is None else count.contiguous()
    sums, peaks, span = sums_triton(query, key, scale, count, stride=stride, block=block, tiling=tiling)
    batch, heads, _, blocks = sums.shape
    lists = empty_lists(batch, heads, blocks, query.device)
    if sums.numel() == 0:
        return lists
    if chunk is None:  # of few sizes, as each is another kernel
        chunk = 1024 if blocks <= 1024 else MOST_BLOCKS
    part = max(span, min(chunk, 2048 * stride // block))
    launch(
        _choose_kernel, (blocks, heads, batch), (sums, peaks, count, *lists), (query.shape[2], blocks, peaks.shape[3], mass),
        STRIDE=stride, BLOCK=block, SPAN=span, PART=part, CHUNK=chunk, ONCE=blocks <= chunk,
        num_warps=max(1, chunk // 2048),
    )  # fmt: skip
    return lists


def xattention_aten(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None = None, *,
    stride: int = STRIDE, mass: float = MASS, block: int = BLOCK,
) -> Lists:  # fmt: skip
    """The same in ATen ops alone, on any device: x is in memory."""
    blocks = -(-query.shape[2] // block)
    real = real_blocks(count, query.shape[2], block, query.device)
    x, behind = strided_logits(query, key, scale, count, stride, block)
    weights = x.softmax(dim=3).masked_fill(behind[..., None], 0)
    sums = weights.unflatten(3, (blocks, -1)).sum(dim=4).unflatten(2, (blocks, -1)).sum(dim=3)
    candidates, always = forced(blocks, real, sinks=1, window=1)
    others = sums.masked_fill(~candidates | always, 0).sort(dim=3, descending=True).values
    held = (sums * always).sum(dim=3, keepdim=True)
    needed = held + others.cumsum(dim=3) - others < mass * (held + others.sum(dim=3, keepdim=True))
    smallest = others.masked_fill(~needed, math.inf).amin(dim=3, keepdim=True)
    return lists_of(candidates & ((sums >= smallest) | always))


def stride_fault(*, stride: int = STRIDE, block: int = BLOCK, **_: object) -> str | None:
    """Why a stride cannot be used; None if it can."""
    if isinstance(stride, int) and stride > 0 and block % stride == 0:
        return None
    return f"stride={stride!r} is not allowed: it must divide the block of {block} rows, as 8 and 16 do"


xattention_lists = by_device(xattention_triton, xattention_aten)
