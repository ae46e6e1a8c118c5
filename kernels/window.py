"""The window and the candidates of `score`: where padding leaves them, which only the device knows.

    rank[b,t]     how many tokens of item b are valid up to and with t                                  int32 [B,L]
    rows[b,w]     the position of the w-th row of the window: the last min(window, n_b) valid tokens    int32 [B,W]

Candidates are the valid tokens before the window, numbered by `rank - 1`. Without padding nothing of this is in memory.
Where queries are a chunk's, `past` positions are before the first of them, and n_b counts the valid tokens of the chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsa_compile.kernels._aten import at_least, positions_by_slot, running_count
from tsa_compile.kernels.launch import cdiv, launch, tl, triton
from tsa_compile.kernels.tiles import gather_rows


@triton.jit(do_not_specialize=["seq_len", "past", "window"])
def _window_rows_kernel(p_padding, p_rank, p_rows, seq_len, past, window, BLOCK: tl.constexpr):
    """rows[b, w] = position of the w-th row of the window: the last min(window, n_b) valid tokens, ascending."""
    b = tl.program_id(1).to(tl.int64)
    positions = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = positions < seq_len
    valid = tl.load(p_padding + b * seq_len + positions, mask=inside, other=0) != 0
    rank = tl.load(p_rank + b * seq_len + positions, mask=inside, other=0)  # [BLOCK]
    candidates, _ = candidates_of(p_rank, b, seq_len, past, window, True)
    slots = rank - 1 - candidates
    tl.store(p_rows + b * window + slots, positions, mask=inside & valid & (slots >= 0))


@triton.jit
def candidates_of(p_rank, b, seq_len, past, window, HAS_PADDING: tl.constexpr):
    """Number of candidates and number of window rows of item b; rank counts the valid tokens up to each position."""
    if HAS_PADDING:
        valid_tokens = tl.load(p_rank + b * seq_len + seq_len - 1)
        before = tl.load(p_rank + b * seq_len + past - 1, mask=past > 0, other=0)
    else:
        valid_tokens = seq_len
        before = past
    rows = tl.minimum(valid_tokens - before, window)
    return valid_tokens - rows, rows


@triton.jit
def columns_of(p_padding, p_rank, b, positions, seq_len, HAS_PADDING: tl.constexpr):
    """Whether positions [BLOCK] are valid, and how many valid ones come before each."""
    valid = positions < seq_len
    columns = positions
    if HAS_PADDING:
        inside = valid
        valid = tl.load(p_padding + b * seq_len + positions, mask=inside, other=0) != 0
        columns = tl.load(p_rank + b * seq_len + positions, mask=inside, other=0) - 1
    return valid, columns


@triton.jit
def load_window(
    p_query, p_rows, b, slots, candidates, live, past, window, stride_ql,
    HAS_PADDING: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Query rows [BLOCK_M, BLOCK_D] of the window's slots [BLOCK_M], and their positions [BLOCK_M]."""
    if HAS_PADDING:
        positions = tl.load(p_rows + b * window + slots, mask=live, other=0)
    else:
        positions = candidates + slots
    return gather_rows(p_query, (positions - past).to(tl.int64) * stride_ql, live, 0, HEAD_DIM, BLOCK_D), positions


def window_rows(padding: Tensor | None, stand_in: Tensor, past: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Padding as kernels read it, rank and rows; where nothing is padded a tensor that stands for them, never read."""
    if padding is None:
        return stand_in, stand_in, stand_in
    batch, seq_len = padding.shape
    padding = padding.contiguous()
    rank = padding.cumsum(dim=1, dtype=torch.int32)
    rows = rank.new_empty((batch, window))
    launch(_window_rows_kernel, (cdiv(seq_len, 1024), batch), (padding, rank, rows), (seq_len, past, window), BLOCK=1024)
    return padding, rank, rows


def window_rows_aten(padding: Tensor | None, key: Tensor, past: int, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in ATen ops, with one line for all items where nothing is padded.

    Returns:
        rank [B or 1, L]; the number of candidates [B or 1, 1]; rows [B or 1, W], and which of them there are, bool.
    """
    seq_len, slots = key.shape[2], torch.arange(window, device=key.device)
    if padding is None:
        rank = torch.arange(1, seq_len + 1, device=key.device)[None]
        rows = (slots + (seq_len - window))[None]
        alive = rows >= past  # where the window is longer than the queries
        return rank, rank[:, -1:] - alive.sum(dim=1, keepdim=True), at_least(rows, 0), alive
    rank = running_count(padding)
    count = torch.minimum(rank[:, -1:] - _valid_before(padding, past), torch.full_like(rank[:, -1:], window))
    candidates = rank[:, -1:] - count
    return rank, candidates, positions_by_slot(padding, rank - 1 - candidates, window), slots < count


def _valid_before(padding: Tensor, past: int) -> Tensor | int:
    """How many tokens of each item are valid before position `past`: [B, 1]."""
    if isinstance(past, int) and past == 0:
        return 0
    before = torch.arange(padding.shape[1], device=padding.device) < past
    return (padding & before).sum(dim=1, keepdim=True)
