"""The block selectors in plain PyTorch: which key blocks each query block computes, as the papers say it.

As in reference.py: written for the eye, with loops, sharing no code with what it checks. Each returns a mask bool
[B, H, Q, Q] of blocks of `block` rows; rows from `count` on are no queries and no keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def _heads(query: Tensor, key: Tensor, count: Tensor | None) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Each item and head, with its real rows in float64."""
    for b in range(query.shape[0]):
        rows = query.shape[2] if count is None else int(count[b])
        for h in range(query.shape[1]):
            kv = h * key.shape[1] // query.shape[1]
            yield b, h, query[b, h, :rows].double(), key[b, kv, :rows].double()


def _no_blocks(query: Tensor, block: int) -> Tensor:
    blocks = -(-query.shape[2] // block)
    return torch.zeros(*query.shape[:2], blocks, blocks, dtype=torch.bool, device=query.device)


def flashprefill(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None, *,
    alpha: float, sinks: int, window: int, last: int, block: int,
) -> Tensor:  # fmt: skip
    """FlashPrefill, arXiv 2608.19758: blocks whose mean key gets at least alpha times the attention that the best gets."""
    mask = _no_blocks(query, block)
    for b, h, q, k in _heads(query, key, count):
        means = torch.stack([rows.mean(dim=0) for rows in k.split(block)]) if len(k) else k
        queries = q.split(block) if len(q) else ()
        for i, rows in enumerate(queries):
            energy = (scale * rows @ means[: i + 1].T).exp().sum(dim=0)
            for j in range(i + 1):
                always = j < sinks or i - j < window or i >= len(queries) - last
                mask[b, h, i, j] = always or bool(energy[j] >= alpha * energy.max())
    return mask


def xattention(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None, *, stride: int, mass: float, block: int
) -> Tensor:
    """XAttention, arXiv 2503.16428: the fewest blocks that hold `mass` of the softmax over sums along antidiagonals.

    The first block and the diagonal are on every list, and count towards the mass.
    """
    mask = _no_blocks(query, block)
    for b, h, q, k in _heads(query, key, count):
        groups = math.ceil(len(q) / stride)
        padded = torch.zeros(2, groups * stride, q.shape[1], dtype=q.dtype, device=q.device)
        padded[0, : len(q)], padded[1, : len(k)] = q, k
        q, k = padded.unflatten(1, (groups, stride))
        # In every stride x stride tile the antidiagonal: query stride - 1 - i meets key i.
        sums = torch.einsum("gid,hid->gh", q.flip(1), k) * scale / stride
        future = torch.ones_like(sums, dtype=torch.bool).triu(1)
        weights = sums.masked_fill(future, -math.inf).softmax(dim=1)
        per_block = block // stride
        for i, rows in enumerate(weights.split(per_block) if groups else ()):
            blocks = torch.stack([tile.sum() for tile in rows.split(per_block, dim=1)])[: i + 1]
            chosen = {0, i}
            others = sorted(set(range(i + 1)) - chosen, key=lambda j: -float(blocks[j]))
            while blocks[list(chosen)].sum() < mass * blocks.sum():
                chosen.add(others.pop(0))
            mask[b, h, i, list(chosen)] = True
    return mask
