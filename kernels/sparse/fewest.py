"""The fewest numbers of a line that hold a share of its sum, without sorting: how small the smallest of them is.

    threshold(x, share) = the largest t with   sum of x[i] over x[i] >= t   >=   share * sum of x               x >= 0

x >= t are then the fewest that hold the share, with all that equal the smallest of them. A share of 0 or less takes none (t
is a NaN), one above 1 all (t = 0).

A number that is not negative has bits that are an integer of the same order. So t is found four bits at a time, from the
highest, in eight launches: each adds up what the 15 candidates for the next digit would hold, over (line, split), and the
launch after it, before anything else, reads off the digit from its splits' sums. Every sum is over the whole line, in the
same order each time: bit for bit reproducible, with no atomics.

    state float32 [lines, 2, splits + 1, 16]: in turns, the sums of each split; then what was found so far: the digits, as
    bits, and the sum that is wanted

Each launch reads a line once. Here there are three of them to a head (flexprefill.py): columns and diagonals of the last
rows' attention, [C] each, and the causal half of the pairs of blocks, [Q, Q]; a query-aware head uses the third, any other
the first two. At H = 32, n = 128K: 8 times 67 MB, mostly from L2, and 15 comparisons and additions for each number: 0.3 ms
of an H200's time if all heads are query-aware, half as much if none is.

Radix select as in Alabi et al., "Fast k-selection algorithms for graphics processing units", JEA 2012, by weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsa_compile.kernels.launch import cdiv, launch, tl, triton
from tsa_compile.kernels.tiles import count_of

STEPS, DIGITS = 8, 16

# Triton reads a global only if it is a constexpr.
_STEPS = tl.constexpr(STEPS)
_DIGITS = tl.constexpr(DIGITS)


class Search(NamedTuple):
    """How a launch is cut, for tuning."""

    splits: int = 64
    """Programs to a long line; a power of two."""
    chunk: int = 1024
    """Numbers that a program looks at together."""
    num_warps: int = 8


@triton.jit
def _found(p_state, step, share, used, SPLITS: tl.constexpr):
    """The digits, as bits, that the launches before `step` found, and the sum that is wanted."""
    digits = tl.zeros([], tl.int32)
    wanted = tl.zeros([], tl.float32)
    if step > 0:
        p_state += (step - 1) % 2 * (SPLITS + 1) * _DIGITS
        splits, places = tl.arange(0, SPLITS), tl.arange(0, _DIGITS)
        p_held = p_state + splits[:, None] * _DIGITS + places[None, :]
        b_held = tl.sum(tl.load(p_held, mask=(splits < used)[:, None], other=0.0), axis=0)  # [_DIGITS]
        digits = tl.load(p_state + SPLITS * _DIGITS).to(tl.int32, bitcast=True)
        wanted = tl.load(p_state + SPLITS * _DIGITS + 1)
        if step == 1:
            wanted = tl.sum(tl.where(places == 0, b_held, 0.0), axis=0) * share
        # The first digit has three bits: numbers have no sign.
        possible = (places > 0) & (places < tl.where(step > 1, _DIGITS, _DIGITS // 2))
        digits = digits << 4 | tl.sum(((b_held >= wanted) & possible).to(tl.int32), axis=0)
    return digits, wanted


@triton.jit
def threshold_of(p_state, line, share, used, SPLITS: tl.constexpr):
    """The threshold's bits after all launches, and the sum that is wanted."""
    return _found(p_state + line * (2 * (SPLITS + 1) * _DIGITS), _STEPS, share, used, SPLITS)


@triton.jit
def fewest(p_sums, bits, wanted, count, CHUNK: tl.constexpr):
    """How many of a line's numbers hold the sum that is wanted, given the bits of the smallest of them."""
    b_above = tl.zeros([CHUNK], tl.int32)
    b_equal = tl.zeros([CHUNK], tl.int32)
    b_held = tl.zeros([CHUNK], tl.float32)
    for start in range(0, count, CHUNK):
        positions = start + tl.arange(0, CHUNK)
        b_sums = tl.load(p_sums + positions, mask=positions < count, other=0.0)
        b_bits = b_sums.to(tl.int32, bitcast=True)  # [CHUNK]
        b_above += (b_bits > bits).to(tl.int32)
        b_equal += ((b_bits == bits) & (positions < count)).to(tl.int32)
        b_held += tl.where(b_bits > bits, b_sums, 0.0)
    equal = tl.sum(b_equal, axis=0)
    missing = tl.maximum(wanted - tl.sum(b_held, axis=0), 0.0)
    # The threshold is a NaN if none is wanted, and 0 if more is wanted than there is.
    smallest = tl.where(bits < 0x7F800000, tl.maximum(bits.to(tl.float32, bitcast=True), 1e-30), 1.0)
    return tl.sum(b_above, axis=0) + tl.minimum(tl.ceil(tl.minimum(missing / smallest, 1e9)).to(tl.int32), equal)


@triton.jit(do_not_specialize=["capacity", "blocks", "step"])
def _digit_kernel(
    p_sums, p_pairs, p_aware, p_count, p_state, capacity, blocks, step, share,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What each candidate for the next digit would hold of one split of a line, three lines to a head."""
    split, line, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, kind = line // 3, line % 3
    heads = tl.num_programs(1) // 3
    count = count_of(p_count, item, capacity)
    row = (item * heads + head).to(tl.int64)
    if count <= 0:
        return
    if (tl.load(p_aware + row) != 0) != (kind == 2):
        return
    p_state += (row * 3 + kind) * (2 * (SPLITS + 1) * _DIGITS)
    digits, wanted = _found(p_state, step, share, tl.num_programs(0), SPLITS)
    places = tl.arange(0, _DIGITS)
    shift = 28 - 4 * step
    # A candidate above all numbers stands for those that the first digit cannot be.
    possible = places < tl.where(step > 0, _DIGITS, _DIGITS // 2)
    b_candidates = tl.where(possible, (digits << 4 | places) << shift, 0x7FFFFFFF)

    stop, beyond = count, capacity
    p_line = p_sums + (row * 2 + kind) * capacity
    if kind == 2:
        stop, beyond = tl.cdiv(count, BLOCK) * blocks, 0
        p_line = p_pairs + row * blocks * blocks
    span = tl.cdiv(stop, tl.num_programs(0) * CHUNK) * CHUNK
    b_held = tl.zeros([_DIGITS, CHUNK], tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, stop), CHUNK):
        positions = start + tl.arange(0, CHUNK)
        inside = (positions < stop) & (positions % blocks <= positions // blocks + beyond)
        b_numbers = tl.load(p_line + positions, mask=inside, other=0.0)
        b_bits = b_numbers.to(tl.int32, bitcast=True)
        b_held += tl.where(b_bits[None, :] >= b_candidates[:, None], b_numbers[None, :], 0.0)

    p_state += step % 2 * (SPLITS + 1) * _DIGITS
    tl.store(p_state + split * _DIGITS + places, tl.sum(b_held, axis=1))
    if split == 0:
        tl.store(p_state + SPLITS * _DIGITS, digits.to(tl.float32, bitcast=True))
        tl.store(p_state + SPLITS * _DIGITS + 1, wanted)


def search(
    sums: Tensor, pairs: Tensor, aware: Tensor, count: Tensor | None, share: float, block: int, cut: Search
) -> Tensor:
    """Launches the eight steps; the state, from which `threshold_of` reads what they found.

    Args:
        sums: float32 [B, H, 2, C], read before the count.
        pairs: float32 [B, H, Q, Q], of which the causal half before the count is read.
        aware: int32 [B, H], which heads look at their pairs instead of their sums.
    """
    (batch, heads, _, capacity), blocks = sums.shape, pairs.shape[3]
    state = torch.empty(batch, heads, 3, 2, cut.splits + 1, DIGITS, dtype=torch.float32, device=sums.device)
    used = splits_used(capacity, blocks, cut)
    for step in range(STEPS):
        launch(
            _digit_kernel, (used, 3 * heads, batch),
            (sums, pairs, aware, count, state), (capacity, blocks, step, share),
            BLOCK=block, SPLITS=cut.splits, CHUNK=cut.chunk, num_warps=cut.num_warps,
        )  # fmt: skip
    return state


def splits_used(capacity: int, blocks: int, cut: Search) -> int:
    """How many of the splits have something to do."""
    return min(cut.splits, cdiv(max(capacity, blocks * blocks), cut.chunk))


def threshold_aten(numbers: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """By sorting, along the last dimension, which keeps size 1: the smallest number that is taken, and how many are.

    All that equal the smallest are above the threshold, but only as many counted as are needed. With none taken the smallest
    is infinite.
    """
    ordered = numbers.sort(dim=-1, descending=True).values
    needed = ordered.cumsum(dim=-1) - ordered < share * ordered.sum(dim=-1, keepdim=True)
    smallest = ordered.masked_fill(~needed, torch.inf).amin(dim=-1, keepdim=True)
    return smallest, needed.sum(dim=-1, keepdim=True)
