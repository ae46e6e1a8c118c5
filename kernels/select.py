"""Select: the best tokens of every row, in ascending order, without sorting.

    indices[b,h,:count[b]] = ascending positions of the count[b] highest scores[b,h]; equal scores: lower position first

    scores float32 [B,Hs,L], contiguous; count int32 [B] or None (every slot is a token)
    -> indices int32 [B,Hs,C], contiguous; slots from min(count, C, L) on are filler and hold L - 1

A float's bits, with the sign folded in, are an unsigned integer of the same order. So on CUDA one program per row finds
the key of its count-th best token digit by digit, from the most significant (radix select): a histogram of the next 8
bits among the tokens that agree so far says which digit the sought key has. Four such passes give the threshold and how
many of the tokens that equal it are needed; a last pass writes every token above it and the first of the equal ones, at
slots that a running count and a prefix sum within the tile assign. Ascending by construction, bit for bit reproducible:
no order of execution enters anywhere.

Bytes: 5 reads of scores (the row, 512 KB at 128K, stays in the L2 cache) and one write of indices; at L = 128K, H = 32
16 MB from memory, 84 MB from L2, 16 MB written.

Radix select as in Alabi et al., "Fast k-selection algorithms for graphics processing units", JEA 2012.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsa_compile.kernels._triton import tl, triton


@triton.jit
def _load_keys(p_row, positions, seq_len):
    """Scores as uint32 keys of the same order; 0, below every score, beyond the row."""
    inside = positions < seq_len
    scores = tl.load(p_row + positions, mask=inside, other=0.0)
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.uint32, bitcast=True)  # -0 and +0 are one score
    keys = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return tl.where(inside, keys, 0), inside


@triton.jit(do_not_specialize=["seq_len", "capacity"])
def _select_kernel(
    p_scores, p_count, p_indices, heads, seq_len, capacity, HAS_COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: threshold by radix select, then ordered compaction, then filler."""
    row = tl.program_id(0).to(tl.int64)
    p_scores += row * seq_len
    p_indices += row * capacity
    kept = tl.minimum(capacity, seq_len)
    if HAS_COUNT:
        kept = tl.maximum(tl.minimum(kept, tl.load(p_count + row // heads)), 0)
    offsets = tl.arange(0, BLOCK)

    # The threshold, digit by digit: the kept-th highest key lies among those that share its leading digits.
    digits = tl.arange(0, 256)
    threshold = tl.zeros([], tl.uint32)
    missing = tl.maximum(kept, 1)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, seq_len, BLOCK):
            keys, inside = _load_keys(p_scores, start + offsets, seq_len)
            if step > 0:
                inside = inside & (keys >> (shift + 8) == threshold >> (shift + 8))
            histogram += tl.histogram(((keys >> shift) & 0xFF).to(tl.int32), 256, mask=inside)
        higher = tl.cumsum(histogram, axis=0, reverse=True) - histogram  # tokens whose digit is larger
        digit = tl.sum((higher >= missing).to(tl.int32), axis=0)
        missing -= tl.sum(tl.where(digits == digit, higher, 0), axis=0)
        threshold = threshold | (digit.to(tl.uint32) << shift)

    # Everything above the threshold, and the first `missing` of those that equal it.
    slot, equal_seen = 0, 0
    for start in range(0, seq_len, BLOCK):
        keys, inside = _load_keys(p_scores, start + offsets, seq_len)
        equal = (inside & (keys == threshold)).to(tl.int32)
        early = equal_seen + tl.cumsum(equal, axis=0) <= missing
        chosen = (inside & ((keys > threshold) | ((equal != 0) & early))).to(tl.int32)
        slots = slot + tl.cumsum(chosen, axis=0) - 1
        tl.store(p_indices + slots, start + offsets, mask=(chosen != 0) & (slots < kept))
        equal_seen += tl.sum(equal, axis=0)
        slot += tl.sum(chosen, axis=0)

    for start in range(kept, capacity, BLOCK):
        slots = start + offsets
        tl.store(p_indices + slots, tl.zeros([BLOCK], tl.int32) + seq_len - 1, mask=slots < capacity)


def select_triton(scores: Tensor, count: Tensor | None, capacity: int, block: int = 4096) -> Tensor:
    """Launches the kernel, one program per row."""
    batch, heads, seq_len = scores.shape
    indices = torch.empty((batch, heads, capacity), dtype=torch.int32, device=scores.device)
    has_count = count is not None
    _select_kernel[(batch * heads,)](
        scores.contiguous(), count if has_count else indices, indices, heads, seq_len, capacity,
        HAS_COUNT=has_count, BLOCK=block, num_warps=16,
    )  # fmt: skip
    return indices


@torch.library.custom_op("tsa::select", mutates_args=())
def select(scores: Tensor, count: Tensor | None, capacity: int) -> Tensor:
    """Indices [B,Hs,C] int32 of each row's best tokens, ascending; ValueError where shapes or dtypes do not fit."""
    _check(scores, count, capacity)
    return select_aten(scores, count, capacity)


@select.register_kernel("cuda")
def _(scores: Tensor, count: Tensor | None, capacity: int) -> Tensor:
    _check(scores, count, capacity)
    return select_triton(scores, count, capacity)


@select.register_fake
def _(scores: Tensor, count: Tensor | None, capacity: int) -> Tensor:
    return scores.new_empty((*scores.shape[:2], capacity), dtype=torch.int32)


def _check(scores: Tensor, count: Tensor | None, capacity: int) -> None:
    if scores.dim() != 3 or scores.dtype != torch.float32:
        raise ValueError(f"tsa::select: scores is {scores.dtype} {tuple(scores.shape)}; expected float32 [B,Hs,L]")
    if count is not None and (count.dtype != torch.int32 or count.shape != scores.shape[:1]):
        raise ValueError(
            f"tsa::select: count is {count.dtype} {tuple(count.shape)}; expected int32 {tuple(scores.shape[:1])}"
        )
    if capacity < 0:
        raise ValueError(f"tsa::select: capacity is {capacity}; expected at least 0")


def select_aten(scores: Tensor, count: Tensor | None, capacity: int) -> Tensor:
    """The same in ATen ops alone, on any device, traceable: no shape and no branch depends on data.

    A stable sort by score puts the lower position first among equals; a second sort restores the original order.
    """
    seq_len = scores.shape[2]
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :capacity]
    if count is not None:
        slots = torch.arange(order.shape[-1], device=scores.device)
        order = order.masked_fill(slots >= count[:, None, None], seq_len)
    indices = order.sort(dim=-1).values.clamp(max=seq_len - 1).to(torch.int32)
    return torch.nn.functional.pad(indices, (0, capacity - order.shape[-1]), value=seq_len - 1)
