"""Select: the best tokens of every row, in ascending order, without sorting.

    indices[b,h,:count[b]] = ascending positions of the count[b] highest scores[b,h]; equal scores: lower position first;
                             NaN counts as the largest finite number: below the window (+inf), above all other candidates

    scores float32 [B,Hs,L], contiguous; count int32 [B] or None (every slot is a token)
    -> indices int32 [B,Hs,C], contiguous; slots from min(count, C, L) on are filler and hold L - 1

A float's bits, with the sign folded in, are an unsigned integer (the key) of the same order. So on CUDA the key of the
count-th best token, the threshold, is found digit by digit, from the most significant; then every token above it is
written, and the first of those that equal it, at slots that a prefix sum assigns. Ascending by construction, bit for
bit reproducible: integers are added in a fixed order, and there are no atomics.

Rows up to 8192 tokens: one launch, a program per row. The row stays in registers, so a digit is one bit: 32 counts.

    _row             threshold, tokens, filler                                       scores, count -> indices

Longer rows: five launches, each over (row, split); a split is one of at most 16 stretches of the row. A digit is 8 bits.
Each launch first adds up the histograms that the one before left, which gives one more digit of the threshold.

    _histogram x 4   per split, how many tokens have which digit, among those that share the digits found so far
                     -> state int32 [B*Hs,2,17,256]: two copies, used in turns, each of 16 histograms (one a split) and
                        one line with how many tokens of each split have higher digits, and the digits found so far
    _write           tokens of the split, at slots after those of the splits before it; filler              -> indices

Bytes: one read of scores (five of the longer rows, four of them from the L2 cache), one write of indices, and 16 KB of
histograms per program of each launch, also from L2. At L = 128K, H = 32: 16 MB from memory, 64 + 34 MB from L2, 16 MB
written; the state has 1 MB.

Radix select as in Alabi et al., "Fast k-selection algorithms for graphics processing units", JEA 2012.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tsa_compile.kernels._aten import at_least, running_count
from tsa_compile.kernels.define import define
from tsa_compile.kernels.launch import by_device, cdiv, launch, tl, triton

STEPS = 4
BINS = 256
NAN_SCORE = torch.finfo(torch.float32).max
"""What a NaN counts as."""

# Triton reads a global only if it is a constexpr.
_STEPS = tl.constexpr(STEPS)
_BINS = tl.constexpr(BINS)
_NAN_SCORE = tl.constexpr(NAN_SCORE)


@triton.jit
def _kept(p_count, row, heads, seq_len, capacity):
    """How many tokens of the row are wanted."""
    kept = tl.minimum(capacity, seq_len)
    if p_count is not None:
        kept = tl.maximum(tl.minimum(kept, tl.load(p_count + row // heads)), 0)
    return kept


@triton.jit
def _load_keys(p_row, positions, stop):
    """Scores as uint32 keys of the same order; 0, below the key of every score, from position `stop` on."""
    inside = positions < stop
    scores = tl.load(p_row + positions, mask=inside, other=0.0)
    scores = tl.where(scores == scores, scores, _NAN_SCORE)  # whose bits would lie beyond those of both infinities
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.uint32, bitcast=True)  # -0 and +0 are one score
    keys = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return tl.where(inside, keys, 0)


@triton.jit
def _write_tokens(p_indices, keys, positions, threshold, missing, above, equal, BLOCK: tl.constexpr):
    """Writes what is chosen of one block, given how many tokens before it lie above and equal the threshold.

    `missing` of those that equal it are needed. Returns both numbers for the next block.
    """
    is_above, is_equal = keys > threshold, keys == threshold
    # One scan for both: a block has at most 2^14 tokens, so that each number fits into its half.
    both = is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16)
    # In lines of one warp's width: a scan of the whole block would add up partial sums of all warps in every thread.
    lines = tl.reshape(both, [BLOCK // 32, 32])
    line_sums = tl.sum(lines, axis=1)
    line_starts = tl.cumsum(line_sums, axis=0) - line_sums
    ranks = tl.reshape(tl.cumsum(lines, axis=1) + line_starts[:, None], [BLOCK])
    above_rank, equal_rank = above + (ranks & 0xFFFF), equal + (ranks >> 16)
    slots = above_rank + tl.minimum(equal_rank, missing) - 1
    tl.store(p_indices + slots, positions, mask=is_above | (is_equal & (equal_rank <= missing)))
    total = tl.sum(both, axis=0)
    return above + (total & 0xFFFF), equal + (total >> 16)


@triton.jit
def _write_filler(p_indices, first, stride, seq_len, capacity, BLOCK: tl.constexpr):
    """Blocks of filler, `stride` slots apart, from slot `first` on."""
    for start in range(first, capacity, stride):
        slots = start + tl.arange(0, BLOCK)
        tl.store(p_indices + slots, tl.zeros([BLOCK], tl.int32) + seq_len - 1, mask=slots < capacity)


@triton.jit(do_not_specialize=["seq_len", "capacity"])
def _row_kernel(p_scores, p_count, p_indices, heads, seq_len, capacity, BLOCK: tl.constexpr):
    """A whole row of at most BLOCK tokens."""
    row = tl.program_id(0).to(tl.int64)
    p_indices += row * capacity
    kept = _kept(p_count, row, heads, seq_len, capacity)
    positions = tl.arange(0, BLOCK)
    keys = _load_keys(p_scores + row * seq_len, positions, seq_len)

    # The threshold is the largest number that at least `kept` keys reach.
    threshold = tl.zeros([], tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        reached = tl.sum((keys >= (threshold | bit)).to(tl.int32), axis=0)
        threshold = tl.where(reached >= tl.maximum(kept, 1), threshold | bit, threshold)
        bit = bit >> 1

    missing = kept - tl.sum((keys > threshold).to(tl.int32), axis=0)
    _write_tokens(p_indices, keys, positions, threshold, missing, 0, 0, BLOCK)
    _write_filler(p_indices, kept, BLOCK, seq_len, capacity, BLOCK)


@triton.jit
def _descend(p_state, kept, STEP: tl.constexpr, SPLITS: tl.constexpr):
    """What the histograms of the step before say, with what that step itself started from.

    Returns the first STEP digits of the threshold; per split, how many tokens have higher ones, and how many the same.
    """
    splits, bins = tl.arange(0, SPLITS), tl.arange(0, _BINS)
    p_state += (STEP - 1) % 2 * (SPLITS + 1) * _BINS
    p_found = p_state + SPLITS * _BINS
    above = tl.load(p_found + splits)  # [SPLITS]
    digits = tl.load(p_found + _BINS - 1).to(tl.uint32, bitcast=True)
    there = splits < tl.num_programs(1)
    histograms = tl.load(p_state + splits[:, None] * _BINS + bins[None, :], mask=there[:, None], other=0)

    missing = tl.maximum(kept, 1) - tl.sum(above, axis=0)
    total = tl.sum(histograms, axis=0)  # [_BINS], of [SPLITS, _BINS]
    higher = tl.cumsum(total, axis=0, reverse=True) - total  # tokens whose digit is larger
    digit = tl.sum((higher >= missing).to(tl.int32), axis=0)
    above += tl.sum(tl.where(bins[None, :] > digit, histograms, 0), axis=1)
    equal = tl.sum(tl.where(bins[None, :] == digit, histograms, 0), axis=1)
    return digits << 8 | digit.to(tl.uint32), above, equal


@triton.jit(do_not_specialize=["seq_len", "capacity", "span"])
def _histogram_kernel(
    p_scores, p_count, p_state, heads, seq_len, capacity, span,
    STEP: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many tokens of the split have which digit, among those whose earlier digits are the threshold's."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_state += row * (2 * (SPLITS + 1) * _BINS)
    digits = tl.zeros([], tl.uint32)
    above = tl.zeros([SPLITS], tl.int32)
    if STEP > 0:
        kept = _kept(p_count, row, heads, seq_len, capacity)
        digits, above, _ = _descend(p_state, kept, STEP, SPLITS)

    histogram = tl.zeros([_BINS], tl.int32)
    stop = tl.minimum((split + 1) * span, seq_len)
    for start in range(split * span, stop, BLOCK):
        keys = _load_keys(p_scores + row * seq_len, start + tl.arange(0, BLOCK), stop)  # [BLOCK]
        member = keys != 0
        if STEP > 0:
            member = member & (keys >> (32 - 8 * STEP) == digits)
        # A histogram costs as much without members, and in the last step few blocks have one.
        if tl.sum(member.to(tl.int32), axis=0) > 0:
            histogram += tl.histogram(((keys >> (24 - 8 * STEP)) & 0xFF).to(tl.int32), _BINS, mask=member)

    p_state += STEP % 2 * (SPLITS + 1) * _BINS
    tl.store(p_state + split * _BINS + tl.arange(0, _BINS), histogram)
    if split == 0:
        p_found = p_state + SPLITS * _BINS
        tl.store(p_found + tl.arange(0, SPLITS), above)
        tl.store(p_found + _BINS - 1, digits.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["seq_len", "capacity", "span"])
def _write_kernel(
    p_scores, p_count, p_state, p_indices, heads, seq_len, capacity, span,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The chosen tokens of the split, and its share of the filler."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_indices += row * capacity
    kept = _kept(p_count, row, heads, seq_len, capacity)
    threshold, above, equal = _descend(p_state + row * (2 * (SPLITS + 1) * _BINS), kept, _STEPS, SPLITS)
    missing = kept - tl.sum(above, axis=0)
    before = tl.arange(0, SPLITS) < split
    above_seen = tl.sum(tl.where(before, above, 0), axis=0)
    equal_seen = tl.sum(tl.where(before, equal, 0), axis=0)
    stop = tl.minimum((split + 1) * span, seq_len)
    for start in range(split * span, stop, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        keys = _load_keys(p_scores + row * seq_len, positions, stop)
        above_seen, equal_seen = _write_tokens(p_indices, keys, positions, threshold, missing, above_seen, equal_seen, BLOCK)
    _write_filler(p_indices, kept + split * BLOCK, tl.num_programs(1) * BLOCK, seq_len, capacity, BLOCK)


def select_triton(
    scores: Tensor, count: Tensor | None, capacity: int, short: int = 8192, splits: int = 16, block: int = 2048
) -> Tensor:
    """Launches one program per row of at most `short` tokens; for longer rows, five times one per row and split.

    `short` and `block` are powers of two from 32 to 2^14, `splits` one up to 64. `short=0` splits every row.
    """
    batch, heads, seq_len = scores.shape
    rows = batch * heads
    scores = scores.contiguous()
    indices = torch.empty((batch, heads, capacity), dtype=torch.int32, device=scores.device)
    if seq_len <= short:
        launch(_row_kernel, (rows,),
            (scores, count, indices), (heads, seq_len, capacity),
            BLOCK=short, num_warps=min(max(short // 512, 1), 32),
        )  # fmt: skip
        return indices

    span = cdiv(seq_len, splits * block) * block
    grid = (rows, cdiv(seq_len, span))
    state = torch.empty((rows, 2, splits + 1, BINS), dtype=torch.int32, device=scores.device)
    options: dict[str, Any] = {"SPLITS": splits, "BLOCK": block, "num_warps": 8}
    for step in range(STEPS):
        launch(_histogram_kernel, grid, (scores, count, state), (heads, seq_len, capacity, span), STEP=step, **options)
    launch(_write_kernel, grid, (scores, count, state, indices), (heads, seq_len, capacity, span), **options)
    return indices


@define(lambda scores, count, capacity: scores.new_empty((*scores.shape[:2], capacity), dtype=torch.int32))
def select(scores: Tensor, count: Tensor | None, capacity: int) -> Tensor:
    """Indices [B,Hs,C] int32 of each row's best tokens, ascending; ValueError where shapes or dtypes do not fit."""
    _check(scores, count, capacity)
    return _compute(scores, count, capacity)


def _check(scores: Tensor, count: Tensor | None, capacity: int) -> None:
    if scores.dim() != 3 or scores.dtype != torch.float32:
        raise ValueError(f"tsa::select: scores is {scores.dtype} {tuple(scores.shape)}; expected float32 [B,Hs,L]")
    if count is not None and (count.dtype != torch.int32 or count.shape != scores.shape[:1]):
        raise ValueError(
            f"tsa::select: count is {count.dtype} {tuple(count.shape)}; expected int32 {tuple(scores.shape[:1])}"
        )
    if capacity < 0:
        raise ValueError(f"tsa::select: capacity is {capacity}; expected at least 0")


def select_by_sorting(scores: Tensor, count: Tensor | None, capacity: int) -> Tensor:
    """The same in ATen ops, on any device, for any scores, in a few operators: the CPU's form.

    A stable sort by score puts the lower position first among equals; a second sort restores the original order.
    """
    seq_len = scores.shape[2]
    slots = torch.arange(capacity, device=scores.device)
    scores = scores.masked_fill(scores.isnan(), NAN_SCORE)
    # Gathered, not sliced or padded: how C compares with L is nothing that a trace may rely on.
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., slots.clamp(max=seq_len - 1)]
    order = order.masked_fill(slots >= seq_len, seq_len)
    if count is not None:
        order = order.masked_fill(slots >= count[:, None, None], seq_len)
    return order.sort(dim=-1).values.clamp(max=seq_len - 1).to(torch.int32)


_compute = by_device(select_triton, select_by_sorting)


def select_by_bisection(scores: Tensor, count: Tensor | None, capacity: int) -> Tensor:
    """The same, of scores none of which is negative and finite, for runtimes that cannot sort: a threshold, prefix sums.

    16 passes over the scores: at L = 128K, H = 32, 16 times 16 MB. A runtime that does not fuse a comparison with the sum
    over it holds 7 numbers a score besides.
    """
    batch, heads, seq_len = scores.shape
    scores = torch.where(scores.isnan(), NAN_SCORE, scores)
    kept = torch.full((batch,), torch.sym_min(capacity, seq_len), dtype=torch.int32, device=scores.device)
    if count is not None:
        kept = at_least(torch.minimum(count, kept), 0)
    wanted = kept[:, None, None].expand(batch, heads, 1)
    threshold = _threshold(scores, wanted)
    above, equal = scores > threshold, scores == threshold
    missing = wanted - above.to(torch.int32).sum(dim=2, keepdim=True, dtype=torch.int32)
    chosen = above | (equal & (running_count(equal) <= missing))
    positions = torch.arange(seq_len, device=scores.device)
    rank = running_count(chosen)
    slots = torch.where(chosen, rank - 1, positions - rank + capacity)
    indices = torch.full((batch, heads, capacity + seq_len), seq_len - 1, dtype=torch.int32, device=scores.device)
    indices = indices.scatter(2, slots, positions.to(torch.int32).expand(batch, heads, seq_len))
    return indices[:, :, :capacity].contiguous()


def _threshold(scores: Tensor, wanted: Tensor) -> Tensor:
    """The largest float32 that at least `wanted` [B,Hs,1] scores reach, exactly: the wanted-th largest score itself.

    Non-negative floats order like their bits, so it is found digit by digit; and because neither ONNX (below opset 26) nor
    TensorRT reinterprets bits, the bounds of a digit are built by arithmetic: 2^-126 times powers of two for the exponent
    (each product exact; an overflow is +inf, the window's own value), and that times m + d 2^-k for the mantissa (exact as
    well). That holds too where a runtime flushes denormal numbers to zero: it then compares them as zeros everywhere, and
    they tie.

    A digit has three bits, or two, because comparisons that wait for each other are what TensorRT's compiler cannot take:
    its time doubles with every two. 13 of them cost it 0.3 s; 33, a bit each, were not done in four minutes.
    """

    def reached(bounds: Tensor) -> Tensor:
        """Whether enough scores reach each of the bounds [B, Hs, N]."""
        hits = (scores[:, :, None] >= bounds[..., None]).to(torch.int32)
        return hits.sum(dim=3, dtype=torch.int32) >= wanted

    def largest(candidates: Tensor, bounds: Tensor, least: Tensor) -> Tensor:
        """The last of ascending candidates whose bound is reached, `least` if none is: [B, Hs, 1]."""
        return torch.where(reached(bounds), candidates, least).amax(dim=2, keepdim=True)

    def row(numbers: list[float]) -> Tensor:
        """A constant [N]; torch.tensor would be an input of the graph that is traced."""
        return torch.cat([torch.full((1,), number, dtype=scores.dtype, device=scores.device) for number in numbers])

    start = torch.zeros_like(scores[:, :, :1])
    unit = torch.full_like(start, 2.0**-126)
    mantissa = torch.where(reached(unit), 1.0, 0.0).to(start.dtype)
    # The exponent: 2 + 3 + 3 bits. The first digit's factors would be beyond float32; what they lead to is not.
    bounds = row([2.0 ** (64 * digit - 126) for digit in range(1, 4)]).expand(*start.shape[:2], 3)
    unit = largest(bounds, bounds, unit)
    for shift in (3, 0):
        bounds = unit * row([2.0 ** (digit << shift) for digit in range(1, 8)])
        unit = largest(bounds, bounds, unit)
    # The mantissa: 2 + 7 * 3 bits.
    for shift, size in ((21, 2), *((shift, 3) for shift in range(18, -1, -3))):
        larger = mantissa + row([digit * 2.0 ** (shift - 23) for digit in range(1, 1 << size)])
        mantissa = largest(larger, unit * larger, mantissa)
    return torch.where(reached(start), unit * mantissa, -math.inf)
