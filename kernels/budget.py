"""Budget: how many tokens each batch item keeps, without sorting and without the host.

    g[b,t]    = mean_h scores[b,h,t], normalised to sum 1 over the candidates (the entries that are not infinite)
    drop[b]   = #(cumulated ascending g < coverage), and one more if there are any
    keep[b]   = max(min_tokens, candidates - drop), at most the candidates        (coverage)
                max(min_tokens, ceil(keep_ratio * candidates)), at most them      (keep ratio: exact integer arithmetic)
    count[b]  = keep + W_b, W_b the window's tokens (the entries that are +inf)

Where a candidate's score is NaN, the mass to be covered is unknown: under a coverage the item keeps everything.

    scores float32 [B,Hs,L], contiguous -> count int32 [B]

Coverage on CUDA is a weighted radix select. Masses are integers, shares of 2^60, so that sums are exact in any order
and atomics reproduce bit for bit. The bits of a nonnegative float32 order like the float; so a histogram of mass and
count over the leading 11 bits says in which bin the cumulated mass crosses the coverage, two more over the next 11 and
10 bits narrow it to one exact value, and the tokens that share this value contribute equal steps: a division counts
them.

    _mass            mean over heads, per-tile sums, candidates and window counted      scores -> mass [B,L]
    _histogram x 3   mass and count per digit, among tokens that agree with the leading digits found so far
    _count           the last digit, the ties, and spec's arithmetic                    -> count [B]

Bytes at L = 128K, H = 32: one read of scores (16 MB), three of mass (512 KB each, from L2).

Radix select as in Alabi et al., "Fast k-selection algorithms for graphics processing units", JEA 2012.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsa_compile.config import KeepRatio
from tsa_compile.kernels._aten import at_least
from tsa_compile.kernels.define import define
from tsa_compile.kernels.kept import at_least_and_most, at_least_and_most_triton, kept_candidates
from tsa_compile.kernels.launch import by_device, cdiv, launch, tl, triton

WHOLE = 2**60  # the mass of all candidates
STEPS = 3
BINS = 2048
STATE = 2 + STEPS * 2 * BINS  # per item: candidates, window, then mass and count per bin of each step

# Triton reads a global only if it is a constexpr.
_WHOLE = tl.constexpr(WHOLE)
_STEPS = tl.constexpr(STEPS)
_BINS = tl.constexpr(BINS)
_STATE = tl.constexpr(STATE)


@triton.jit(do_not_specialize=["seq_len", "tiles"])
def _mass_kernel(p_scores, p_mass, p_sums, p_state, heads, seq_len, tiles, BLOCK: tl.constexpr):
    """mass[b,t] = mean over heads, -1 where t is no candidate; one float64 sum per tile; the tally of the item.

    A NaN among the scores makes its mass NaN, and so the item's sum.
    """
    tile = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    positions = tile * BLOCK + tl.arange(0, BLOCK)
    inside = positions < seq_len
    p_scores += b * heads * seq_len + positions
    first = tl.load(p_scores, mask=inside, other=float("-inf"))
    candidate = tl.abs(first) != float("inf")
    total = tl.zeros([BLOCK], tl.float32)
    for head in range(heads):
        total += tl.load(p_scores + tl.cast(head, tl.int64) * seq_len, mask=candidate, other=0.0)
    # Nonnegative and never -0, so that its bits order like its value.
    mass = tl.where(total <= 0, 0.0, total / heads)  # [BLOCK]
    tl.store(p_mass + b * seq_len + positions, tl.where(candidate, mass, -1.0), mask=inside)
    tl.store(p_sums + b * tiles + tile, tl.sum(tl.where(candidate, mass, 0.0).to(tl.float64), axis=0))
    tl.atomic_add(p_state + b * _STATE, tl.sum(candidate.to(tl.int64), axis=0), sem="relaxed")
    tl.atomic_add(p_state + b * _STATE + 1, tl.sum((first == float("inf")).to(tl.int64), axis=0), sem="relaxed")


@triton.jit
def _shares_per_mass(p_sums, b, tiles):
    """What turns a mass into its share of the whole; 0 if there is no mass at all, or NaN. The sum's order is fixed."""
    offsets = tl.arange(0, 256)
    sums = tl.zeros([256], tl.float64)
    for start in range(0, tiles, 256):
        sums += tl.load(p_sums + b * tiles + start + offsets, mask=start + offsets < tiles, other=0.0)
    total = tl.sum(sums, axis=0)
    return tl.where(total > 0, tl.full([], _WHOLE, tl.float64) / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def _shift(STEP: tl.constexpr):
    """Lowest bit of the step's digit: 21, 10, 0."""
    return 21 - 11 * STEP if STEP < 2 else 0


@triton.jit
def _descend(p_state, target, STEP: tl.constexpr):
    """Follows the digits of the first STEP histograms to where the cumulated mass reaches the target.

    Returns the digits found (as the leading bits of a key), the mass still missing below the target, how many tokens
    lie lower, and how many share the digits.
    """
    bins = tl.arange(0, _BINS)
    prefix = tl.zeros([], tl.uint32)
    lower = tl.zeros([], tl.int64)
    equal = tl.zeros([], tl.int64)
    for step in tl.static_range(STEP):
        p_histogram = p_state + 2 + step * 2 * _BINS
        mass = tl.load(p_histogram + bins)  # [_BINS]
        count = tl.load(p_histogram + _BINS + bins)
        # With a coverage next to 1, rounding may leave no crossing: then the last bin, which is always empty.
        digit = tl.minimum(tl.sum((tl.cumsum(mass, axis=0) < target).to(tl.int32), axis=0), _BINS - 1)
        target -= tl.sum(tl.where(bins < digit, mass, 0), axis=0)
        lower += tl.sum(tl.where(bins < digit, count, 0), axis=0)
        equal = tl.sum(tl.where(bins == digit, count, 0), axis=0)
        prefix = prefix | (digit.to(tl.uint32) << _shift(step))
    return prefix, target, lower, equal


@triton.jit(do_not_specialize=["seq_len", "tiles", "target"])
def _histogram_kernel(p_mass, p_sums, p_state, target, seq_len, tiles, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Mass and count per digit of this step, among the tokens whose earlier digits are those of the crossing."""
    b = tl.program_id(1).to(tl.int64)
    positions = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p_state += b * _STATE
    prefix, _, _, _ = _descend(p_state, target, STEP)
    mass = tl.load(p_mass + b * seq_len + positions, mask=positions < seq_len, other=-1.0)
    keys = mass.to(tl.uint32, bitcast=True)  # [BLOCK]
    member = mass >= 0
    if STEP > 0:
        member = member & (keys >> _shift(STEP - 1) == prefix >> _shift(STEP - 1))
    digit = ((keys >> _shift(STEP)) & (_BINS - 1 if STEP < 2 else _BINS // 2 - 1)).to(tl.int32)
    shares = (mass.to(tl.float64) * _shares_per_mass(p_sums, b, tiles)).to(tl.int64)
    p_histogram = p_state + 2 + STEP * 2 * _BINS + digit
    tl.atomic_add(p_histogram, shares, mask=member, sem="relaxed")
    tl.atomic_add(p_histogram + _BINS, tl.full([BLOCK], 1, tl.int64), mask=member, sem="relaxed")


@triton.jit(do_not_specialize=["min_tokens", "tiles", "target"])
def _count_kernel(p_sums, p_state, p_count, target, min_tokens, tiles):
    """count[b]: tokens below the crossing, those of the ties there that still fit, and the rules of the budget."""
    b = tl.program_id(0).to(tl.int64)
    p_state += b * _STATE
    candidates, window = tl.load(p_state), tl.load(p_state + 1)
    key, missing, lower, equal = _descend(p_state, target, _STEPS)
    shares_per_mass = _shares_per_mass(p_sums, b, tiles)
    share = (key.to(tl.float32, bitcast=True).to(tl.float64) * shares_per_mass).to(tl.int64)
    drop = lower + tl.minimum(equal, (missing - 1) // tl.maximum(share, 1))
    drop = tl.where((drop > 0) & (shares_per_mass > 0), drop + 1, 0)
    keep = at_least_and_most_triton(candidates - drop, candidates, min_tokens)
    tl.store(p_count + b, (keep + window).to(tl.int32))


def coverage_triton(scores: Tensor, coverage: float, min_tokens: int) -> Tensor:
    """Launches the kernels for a coverage above 0."""
    batch, heads, seq_len = scores.shape
    scores = scores.contiguous()
    tiles = cdiv(seq_len, 1024)
    mass = scores.new_empty((batch, seq_len))
    # Room for one more than there are: whoever traces this with a symbolic length would ask whether there is only one.
    sums = scores.new_empty((batch, tiles + 1), dtype=torch.float64)
    state = scores.new_zeros((batch, STATE), dtype=torch.int64)
    count = scores.new_empty((batch,), dtype=torch.int32)
    target = max(1, math.ceil(coverage * WHOLE))
    launch(_mass_kernel, (tiles, batch), (scores, mass, sums, state), (heads, seq_len, tiles), BLOCK=1024)
    for step in range(STEPS):
        launch(_histogram_kernel, (tiles, batch), (mass, sums, state), (target, seq_len, tiles), STEP=step, BLOCK=1024)
    launch(_count_kernel, (batch,), (sums, state, count), (target, min_tokens, tiles))
    return count


def budget_cuda(scores: Tensor, coverage: float | None, keep_ratio: float | None, min_tokens: int) -> Tensor:
    """By the kernels for a coverage; a keep ratio is a few ATen ops on [B]."""
    if coverage:
        return coverage_triton(scores, coverage, min_tokens)
    return budget_aten(scores, coverage, keep_ratio, min_tokens)


@define(lambda scores, *others: scores.new_empty(scores.shape[:1], dtype=torch.int32))
def budget(scores: Tensor, coverage: float | None, keep_ratio: float | None, min_tokens: int) -> Tensor:
    """Count [B] int32 of tokens to keep, the window included; ValueError unless exactly one budget is given."""
    if scores.dim() != 3 or scores.dtype != torch.float32:
        raise ValueError(f"tsa::budget: scores is {scores.dtype} {tuple(scores.shape)}; expected float32 [B,Hs,L]")
    check_numbers("budget", coverage, keep_ratio, min_tokens)
    return _compute(scores, coverage, keep_ratio, min_tokens)


def check_numbers(op: str, coverage: float | None, keep_ratio: float | None, min_tokens: int) -> None:
    """ValueError where an op is told no budget, two of them, or one that is not allowed."""
    if (coverage is None) == (keep_ratio is None):
        raise ValueError(f"tsa::{op}: coverage {coverage} and keep_ratio {keep_ratio}; expected exactly one of them")
    if coverage is not None and not 0 <= coverage < 1:
        raise ValueError(f"tsa::{op}: coverage is {coverage}; expected 0 <= coverage < 1")
    if keep_ratio is not None and not 0 <= keep_ratio <= 1:
        raise ValueError(f"tsa::{op}: keep_ratio is {keep_ratio}; expected 0 <= keep_ratio <= 1")
    if min_tokens < 0:
        raise ValueError(f"tsa::{op}: min_tokens is {min_tokens}; expected at least 0")


def budget_aten(scores: Tensor, coverage: float | None, keep_ratio: float | None, min_tokens: int) -> Tensor:
    """The same in ATen ops, on any device."""
    first = scores[:, 0]
    is_candidate = first.abs() != math.inf
    candidates = is_candidate.sum(dim=1)
    if keep_ratio is not None:
        keep = kept_candidates(candidates, KeepRatio(keep_ratio).fraction, min_tokens, torch.minimum, at_least)
    else:
        keep = candidates - _dropped(scores, is_candidate, coverage) if coverage else candidates
        keep = at_least_and_most(keep, candidates, min_tokens, torch.minimum, at_least)
    return (keep + (first == math.inf).sum(dim=1)).to(torch.int32)


def _dropped(scores: Tensor, is_candidate: Tensor, coverage: float) -> Tensor:
    """The spec's drop [B], without a sort: 12 times the one of 16 intervals is kept in which the mass reaches `coverage`.

    Masses are float64, the last interval is 2^-47 of the whole: what it holds counts as equal. TensorRT makes float32 of
    float64; no step relies on how an interval's bounds are rounded.
    """
    mass = torch.where(is_candidate, scores.mean(dim=1, dtype=torch.float64), 0.0)
    total = mass.sum(dim=1, keepdim=True)
    share = (mass / total)[:, None]  # NaN if there is no mass, or if it is NaN: then nothing is dropped

    def lighter(bounds: Tensor) -> Tensor:
        """The mass [B, N] of the tokens below each of the bounds."""
        return torch.where(share < bounds[..., None], share, 0.0).sum(dim=2)

    low, high = torch.zeros_like(total), torch.full_like(total, 2.0)
    parts = torch.arange(1, 16, dtype=total.dtype, device=total.device) / 16
    for _ in range(12):
        bounds = low + (high - low) * parts
        fits = lighter(bounds) < coverage
        low, high = (
            torch.where(fits, bounds, low).amax(dim=1, keepdim=True),
            torch.where(fits, high, bounds).amin(dim=1, keepdim=True),
        )
    mine = is_candidate & (share[:, 0] >= low) & (share[:, 0] < high)
    below, equal = (is_candidate & (share[:, 0] < low)).sum(dim=1), mine.sum(dim=1)
    below_mass = lighter(low)[:, 0]
    each = torch.where(mine, share[:, 0], 0.0).sum(dim=1) / at_least(equal, 1).to(total.dtype)
    steps = torch.where(each > 0, torch.ceil((coverage - below_mass) / each) - 1, 0.0)
    drop = below + torch.minimum(equal, steps.clamp(min=0.0, max=2.0**24).to(torch.int64))
    return torch.where((drop > 0) & (total[:, 0] > 0), drop + 1, 0)


_compute = by_device(budget_cuda, budget_aten)
