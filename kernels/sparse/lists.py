"""From scores of blocks to lists of blocks: what the selectors share.

    list of (b, h, i) = ascending j <= i with scores[b,h,i,j] >= threshold, or j < sinks, or j > i - window

    scores float32 [B, H, Q, Q], of which j <= i is read  ->  kv_num_blocks int32 [B, H, Q], kv_indices int32 [B, H, Q, Q]

`window` counts the query block itself, so that from 1 on every list ends with its diagonal. Slots behind a list and lists of
query blocks behind the count, which are empty, are left unwritten. A list takes as many bytes as its scores: 134 MB at
128K and 32 heads, 1.1 GB for four times as many heads or twice the length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tsa_compile.kernels.launch import tl, triton

CHUNK = 1024
"""Blocks of a row that a program looks at together."""


class Lists(NamedTuple):
    """The key blocks of every query block, as blocks.py takes them."""

    kv_num_blocks: Tensor
    kv_indices: Tensor


Selector = Callable[..., Lists]
"""`(query, key, scale, count, **options) -> Lists`: for each block of 128 queries, which blocks of keys to compute."""


@triton.jit
def append(p_list, found, b_blocks, b_kept):
    """Writes the blocks [CHUNK] that are kept behind the `found` first of a list; how long it is then."""
    ranks = tl.cumsum(b_kept.to(tl.int32), axis=0)
    tl.store(p_list + found + ranks - 1, b_blocks, mask=b_kept)
    return found + tl.sum(b_kept.to(tl.int32), axis=0)


@triton.jit
def write_list(p_scores, p_list, p_num, own, threshold, sinks, window, CHUNK: tl.constexpr):
    """The list of query block `own`."""
    found = tl.zeros([], tl.int32)
    for start in range(0, own + 1, CHUNK):
        blocks = start + tl.arange(0, CHUNK)
        inside = blocks <= own
        b_scores = tl.load(p_scores + blocks, mask=inside, other=float("-inf"))  # [CHUNK]
        kept = inside & ((b_scores >= threshold) | (blocks < sinks) | (blocks > own - window))
        found = append(p_list, found, blocks, kept)
    tl.store(p_num, found)


def empty_lists(batch: int, heads: int, blocks: int, device: torch.device) -> Lists:
    """Memory for lists of up to all blocks."""
    kv_num_blocks = torch.empty(batch, heads, blocks, dtype=torch.int32, device=device)
    return Lists(kv_num_blocks, kv_num_blocks.new_empty(batch, heads, blocks, blocks))


def lists_of(mask: Tensor) -> Lists:
    """The lists of a mask bool [B, H, Q, Q]; slots behind a list hold 0."""
    ranks = mask.cumsum(dim=-1)
    blocks = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    indices = blocks.new_zeros(*mask.shape[:-1], mask.shape[-1] + 1)
    # What is not on the list goes to a slot of its own, which is cut off.
    indices.scatter_(3, torch.where(mask, ranks - 1, mask.shape[-1]), blocks)
    return Lists(ranks[..., -1].to(torch.int32), indices[..., :-1].to(torch.int32).contiguous())


def real_blocks(count: Tensor | None, capacity: int, block: int, device: torch.device) -> Tensor:
    """How many blocks [B, 1, 1, 1] have a row before the count."""
    rows = torch.tensor([capacity], device=device) if count is None else count.clamp(max=capacity)
    return ((rows + block - 1) // block)[:, None, None, None]


def forced(blocks: int, real: Tensor, sinks: int, window: int, last: int = 0) -> tuple[Tensor, Tensor]:
    """Which pairs of blocks are candidates, and which of them are on a list whatever their score: bool [B, 1, Q, Q]."""
    keys = torch.arange(blocks, device=real.device)
    own = keys[:, None]
    candidates = (keys <= own) & (own < real)
    return candidates, candidates & ((keys < sinks) | (keys > own - window) | (own >= real - last))


def density(lists: Lists, count: Tensor | None = None, capacity: int | None = None, block: int = 128) -> Tensor:
    """The share of the causal blocks of each item that its lists hold, [B]; every list holds its diagonal."""
    heads, blocks = lists.kv_num_blocks.shape[1:]
    real = real_blocks(count, blocks * block if capacity is None else capacity, block, lists.kv_num_blocks.device)
    rows = torch.arange(blocks, device=real.device) < real.flatten(1)
    listed = (lists.kv_num_blocks * rows[:, None]).sum(dim=(1, 2), dtype=torch.int64)
    return listed / (heads * real * (real + 1) / 2).flatten().clamp(min=1)
