"""Lists of blocks beside a causal mask: the part of a FlexAttention call's mask that its graph does not contain.

    seen[b, h, q, t] = full[b, h, i, j] + partial[b, h, i, j] * allowed[b, q, t]          i = q // rows, j = t // columns
    allowed[b, q, t] = t <= positions[q] and padding[b, t];          positions[q] is q + Lk - Lq where no tensor says it

    full, partial: how often a block of columns is listed for a block of rows:  num_blocks int32 [B', H', I] and indices
    int32 [B', H', I, J], of which the first num_blocks count; B' in (1, B), H' in (1, H); I * rows >= Lq

A BlockMask carries both a function of positions and these lists, and whoever makes one by hand (`BlockMask.from_kv_blocks`)
may list fewer blocks than the function allows. The lists are known only when the graph runs. So `listed` compares them, once
for all layers of a graph, and tells the host whether seen and allowed are one; the call then is what its function says. If
they are not, `as_listed_` computes the output by the lists, with a mask [B', H', some rows, Lk] at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tsa_compile.kernels._aten import torch_attention
from tsa_compile.kernels.define import define
from tsa_compile.kernels.padded import HOST

_MASK_ELEMENTS = 2**26


@define(lambda *others: torch.empty(1, dtype=torch.int64, device="cpu"), *HOST)
def listed(
    partial_count: Tensor, partial: Tensor, full_count: Tensor | None, full: Tensor | None, padding: Tensor | None,
    positions: Tensor | None, queries: int, keys: int, rows: int, columns: int,
) -> Tensor:  # fmt: skip
    """Whether the lists are those of the causal mask: int64 [1] on the CPU, 1 or 0. The one synchronisation is here."""
    if queries == 0 or keys == 0:
        return torch.ones(1, dtype=torch.int64)
    rows, columns = min(rows, queries), min(columns, keys)
    found, whole = _times(partial_count, partial, full_count, full, -(-queries // rows), -(-keys // columns))
    some, every = _allowed_in_blocks(padding, _last_seen(positions, queries, keys, partial.device), keys, rows, columns)
    total = found + whole
    agree = (total <= 1) & ((total == 1) | ~some) & ((whole == 0) | every)
    return agree.all().to(torch.int64).reshape(1).cpu()


def _last_seen(positions: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
    """Up to which key each query may see: int64 [Lq]."""
    return torch.arange(keys - queries, keys, device=device) if positions is None else positions


def _times(
    partial_count: Tensor, partial: Tensor, full_count: Tensor | None, full: Tensor | None, blocks: int, key_blocks: int
) -> tuple[Tensor, Tensor]:
    """How often each list has each block: two int64 [B', H', blocks, key_blocks], zeros for a list that there is not."""
    found = _times_in(partial_count, partial, key_blocks)[:, :, :blocks]
    if found.shape[2] < blocks:
        raise ValueError(f"the BlockMask has {found.shape[2]} blocks of rows, the queries take {blocks}: make one for them")
    if full_count is None or full is None:
        return found, torch.zeros_like(found)
    return found, _times_in(full_count, full, key_blocks)[:, :, :blocks]


def _times_in(count: Tensor, indices: Tensor, key_blocks: int) -> Tensor:
    """Blocks behind the last key do not count: no key is in them."""
    within = torch.arange(indices.shape[3], device=indices.device) < count[..., None]
    inside = within & (indices >= 0) & (indices < key_blocks)
    places = torch.where(inside, indices, key_blocks).to(torch.int64)
    times = torch.zeros(*indices.shape[:3], key_blocks + 1, dtype=torch.int64, device=indices.device)
    return times.scatter_add_(3, places, torch.ones_like(places))[..., :-1]


def _allowed_in_blocks(
    padding: Tensor | None, last_seen: Tensor, keys: int, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Whether some, and whether all pairs of a block are allowed: bool [B or 1, 1, I, J]."""
    missing = -len(last_seen) % rows
    by_block = torch.cat([last_seen, last_seen[-1:].expand(missing)]).view(-1, rows)
    lowest, highest = by_block.amin(1)[:, None], by_block.amax(1)[:, None]
    start = torch.arange(0, keys, columns, device=last_seen.device)
    stop = (start + columns).clamp(max=keys)
    some, every = (highest >= start)[None, None], (lowest >= stop - 1)[None, None]
    if padding is None:
        return some, every
    valid = F.pad(padding.to(torch.int64).cumsum(1), (1, 0))  # how many of the keys before each
    until = torch.minimum(highest + 1, stop).clamp(min=0)
    some = some & (valid[:, until] > valid[:, start][:, None])[:, None]
    return some, every & (valid[:, stop] - valid[:, start] == stop - start)[:, None, None]


@torch.library.custom_op("tsa::as_listed_", mutates_args=("output",), tags=HOST)
def as_listed_(
    output: Tensor, lists_match: Tensor, query: Tensor, key: Tensor, value: Tensor, partial_count: Tensor, partial: Tensor,
    full_count: Tensor | None, full: Tensor | None, padding: Tensor | None, positions: Tensor | None, scale: float,
    rows: int, columns: int,
) -> None:  # fmt: skip
    """Writes what the lists say over `output` [B, H, Lq, Dv], unless they are those of the causal mask (`lists_match`)."""
    if lists_match.item():
        return
    queries, keys = query.shape[2], key.shape[2]
    rows, columns = min(rows, queries), min(columns, keys)
    found, whole = _times(partial_count, partial, full_count, full, -(-queries // rows), -(-keys // columns))
    last_seen, column = _last_seen(positions, queries, keys, key.device), torch.arange(keys, device=key.device)
    some = max(1, _MASK_ELEMENTS // (keys * query.shape[0] * max(found.shape[1], whole.shape[1])))
    for first in range(0, queries, some):
        at = torch.arange(first, min(first + some, queries), device=key.device)
        allowed = (column <= last_seen[at, None])[None, None]
        allowed = allowed if padding is None else allowed & padding[:, None, None]
        pairs = [times[:, :, at // rows][..., column // columns] for times in (whole, found)]
        times = pairs[0] + pairs[1] * allowed
        bias = times.to(query.dtype).log()  # what is listed twice counts twice, as in FlexAttention's kernel
        part = torch_attention(query[:, :, at], key, value, scale, bias)
        output[:, :, at] = torch.where((times > 0).any(3, keepdim=True), part, 0.0)


@as_listed_.register_fake
def _(*others: Any) -> None:
    return None
