"""Attention of every row over its neighbourhood, in ATen ops: what merge_floor's and attend_floor's forms share.

    N'(i)  = N(i) of floor.py; in a selected row without the selected tokens
    out[i] = sum_{j in N'(i)} softmax_j(l[i, j]) value[j],    l[i, j] = scale * <query[i], key[j]>
    lse[i] = log sum_{j in N'(i)} exp(l[i, j])

With sink_logits both are of a softmax that has a further logit without a value (sink.py).

Rows lie in the order of their ranks: valid tokens first, as they are. They are computed in blocks of `window` rows, each
over its own keys, those of the block before it and the sinks: [B, H, L, 2 window + sinks] logits, nothing of size L x L.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsa_compile.kernels._aten import (
    as_rows,
    at_least,
    positions_by_slot,
    repeat_heads,
    running_count,
    slots_below,
    take_rows,
)
from tsa_compile.kernels.sink import lse_with_sink, with_sink

LOWEST_LOGIT = -1e30
"""Below every logit, and finite: a difference of two of them is no NaN."""


def near_aten(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor | None, padding: Tensor | None, scale: float,
    window: int, sinks: int, sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """See the module's docstring.

    Returns:
        Output [B, H, L, Dv] and log-sum-exp [B, H, L] (-1e30 where a row sees nothing), in at least float32; one more than
        the slot of each row, 0 where it has none, int64 [B, H, L]; and the rank of each position, [B, L], or None.
    """
    heads, seq_len = query.shape[1:3]
    if isinstance(seq_len, int):  # more would see no more, and take memory
        window, sinks = min(window, seq_len), min(sinks, seq_len)
    slots = _slots_aten(indices, count, seq_len)
    if padding is None:
        valid, rank = torch.full_like(slots[:, :1, :1], seq_len), None
    else:
        rank = running_count(padding) - 1
        valid = (rank[:, None, -1:] + 1).to(slots.dtype)
        source = positions_by_slot(padding, rank, seq_len)[:, None]
        query, key, value = (take_rows(x, source.expand(-1, x.shape[1], -1)) for x in (query, key, value))
        slots = slots.gather(2, source.expand(-1, slots.shape[1], -1))
        real = torch.arange(seq_len, device=padding.device) < valid[:, 0]
        value = torch.where(real[:, None, :, None], value, 0.0)  # a weight of 0 times NaN is NaN
    near, near_lse = _near_aten(query, key, value, slots, valid, scale, window, sinks)
    if sink_logits is not None:  # in this part alone: the other one joins it by its log-sum-exp
        near, near_lse = with_sink(near, near_lse, sink_logits), lse_with_sink(near_lse, sink_logits)
    return near, near_lse, repeat_heads(slots, heads), rank


def placed_aten(output: Tensor, padding: Tensor | None, rank: Tensor | None) -> Tensor:
    """Rows [B, H, L, Dv] from the order of ranks to their positions, 0 where there is no valid token."""
    if padding is not None and rank is not None:
        places = at_least(rank, 0)[:, None].expand(-1, output.shape[1], -1)
        output = torch.where(padding[:, None, :, None], take_rows(output, places), 0.0)
    return as_rows(output)


def _slots_aten(indices: Tensor, count: Tensor | None, seq_len: int) -> Tensor:
    """One more than the slot of each position, 0 where it has none: int64 [B, Hs, L], which onnxruntime gathers on GPUs."""
    batch, selections, capacity = indices.shape
    slots = torch.arange(capacity, device=indices.device)
    targets = indices.to(torch.int64)
    if count is not None:
        targets = torch.where(slots_below(count, capacity), targets, slots + seq_len)
    found = torch.zeros((batch, selections, seq_len + capacity), dtype=torch.int64, device=indices.device)
    return found.scatter(2, targets, (slots + 1).expand(batch, selections, capacity))[:, :, :seq_len]


def _near_aten(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, valid: Tensor, scale: float, window: int, sinks: int
) -> tuple[Tensor, Tensor]:
    """The same where ranks are positions: output and log-sum-exp.

    Blocks of all heads and items are numbered through, N of them, and gathered by index: a reshape of the length would ask
    whether it is a multiple of the window, and hold for some alone.
    """
    batch, heads, seq_len = query.shape[:3]
    groups, selections, wide = key.shape[1], slots.shape[1], torch.promote_types(query.dtype, torch.float32)
    blocks = seq_len // window + 1
    number = torch.arange(batch * heads * blocks, device=query.device)[:, None]  # [N, 1]
    line = torch.div(number, blocks, rounding_mode="floor")
    item, head = torch.div(line, heads, rounding_mode="floor"), line % heads
    group, selection = (torch.div(head, heads // x, rounding_mode="floor") for x in (groups, selections))
    first = (number - line * blocks) * window
    row = first + torch.arange(window, device=query.device)  # [N, window]
    band = first - window + torch.arange(2 * window, device=query.device)
    front = torch.arange(sinks, device=query.device) + first * 0
    rank, keys = row[..., None], torch.cat((band, front), 1)[:, None]  # [N, window, 1], [N, 1, 2 window + sinks]
    near = (band[:, None] >= 0) & (band[:, None] <= rank) & ((rank - band[:, None] < window) | (band[:, None] < sinks))
    seen = torch.cat((near, (front < first - window)[:, None] & (rank >= 0)), 2)
    last = valid[item[:, 0], 0, 0][:, None, None]
    seen = seen & (keys < last) & (rank < last)
    row, keys = (torch.minimum(at_least(x, 0), torch.full_like(x, seq_len - 1)) for x in (row, keys[:, 0]))
    seen = seen & ((slots[item, selection, row] == 0)[..., None] | (slots[item, selection, keys] == 0)[:, None])
    logits = scale * query[item, head, row].to(wide) @ key[item, group, keys].to(wide).transpose(1, 2)
    logits = torch.where(seen, logits, -math.inf)
    top = torch.maximum(logits.amax(-1, keepdim=True), torch.full_like(logits[..., :1], LOWEST_LOGIT))
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    output = weights @ value[item, group, keys].to(wide) / torch.where(total > 0, total, 1.0)
    lse = torch.where(total > 0, top + total.log(), LOWEST_LOGIT)[..., 0]
    position = torch.arange(seq_len, device=query.device)
    lines = torch.arange(batch, device=query.device)[:, None, None] * heads
    lines = (lines + torch.arange(heads, device=query.device)[:, None]) * blocks
    place = lines + torch.div(position, window, rounding_mode="floor"), position % window  # [B, H, L], [L]
    return output[place], lse[place]
