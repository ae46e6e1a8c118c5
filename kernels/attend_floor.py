"""The floor and the attention that it is merged with, in one step: for runtimes whose attention gives no log-sum-exp.

    attend_floor(query, key, value, query^, key^, value^, ...)
        = merge_floor(query, key, value, *attend_lse(query^, key^, value^, count), indices, count, padding)

    Shapes are those of the two ops, attend.py and floor.py.

What a row gets from its neighbourhood, o' with the log-sum-exp l', joins the softmax over the compressed rows as one more
key. Its logit is l'; its value is 0, and 1 in a further column, where every other value has 0:

    a[i], p[i] = sum_{j <= i} softmax_j(l'[i], scale * <query^[i], key^[j]>) ((0, 1), (value^[j], 0))
    p[i]       = exp(l'[i]) / (exp(l'[i]) + exp(l^[i])),    a[i] = (1 - p[i]) o^[i]
    out[i]     = a[i] + p[i] o'[i]

So plain causal attention is enough, at any magnitude of logits, and l^ is never computed: ONNX's Attention does not give it,
each of ATen's calls that do serves one device, and computed separately it would take [B, H, C, C] logits.

The op stands in programs that are being lowered (passes/lower.py); compiled graphs call the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsa_compile.kernels._aten import at_least, repeat_heads, take_rows, torch_attention
from tsa_compile.kernels.attend import attend_lse
from tsa_compile.kernels.decompress import attention_output
from tsa_compile.kernels.floor import merge_floor
from tsa_compile.kernels.neighbourhood import near_aten, placed_aten

_COLUMNS = 8
"""Further columns of query, key and value: three are used, and rows of half precision stay aligned to 16 bytes."""
_PARTS = 3
"""A logit is handed over as a sum of numbers of the query's dtype: three of bfloat16 hold what float32 does."""
_FACTOR = 64.0
"""Of the further key, so that a logit of -1e6 fits into float16."""


def attend_floor_aten(
    query: Tensor, key: Tensor, value: Tensor, query_rows: Tensor, key_rows: Tensor, value_rows: Tensor, indices: Tensor,
    count: Tensor | None, padding: Tensor | None, scale: float, kernel: str, window: int, sinks: int,
) -> Tensor:  # fmt: skip
    """In ATen ops, on any device, for any exact kernel and a positive scale."""
    near, near_lse, slots, rank = near_aten(query, key, value, indices, count, padding, scale, window, sinks)
    at = indices.to(torch.int64)
    if rank is not None:
        at = at_least(rank, 0)[:, None].expand(-1, indices.shape[1], -1).gather(2, at)
    logits = near_lse.gather(2, repeat_heads(at, query.shape[1]))
    rows = _attend_with(logits / (_FACTOR * scale), query_rows, key_rows, value_rows, scale)
    chosen = (slots > 0)[..., None]
    rows = take_rows(rows, at_least(slots - 1, 0)).to(near.dtype)
    far, share = rows[..., : value.shape[3]], rows[..., value.shape[3] : value.shape[3] + 1]
    output = torch.where(chosen, far, 0.0) + torch.where(chosen, share, 1.0) * near
    return placed_aten(output.to(value.dtype), padding, rank)


def _attend_with(logits: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention over the rows and one key before them, whose logit is scale * _FACTOR * `logits` [B, H, C].

    Returns:
        [B, H, C, Dv + 8]; the further key's share is in column Dv.
    """
    parts, rest = [], torch.maximum(logits, torch.full_like(logits, torch.finfo(query.dtype).min))
    for _ in range(_PARTS):
        parts.append(rest.to(query.dtype)[..., None])
        rest = rest - parts[-1][..., 0].to(rest.dtype)
    unused = torch.zeros_like(query[..., :1]).expand(-1, -1, -1, _COLUMNS - _PARTS)
    query = _behind_one(torch.cat((query, *parts, unused), 3), 0, 0, 0.0)  # row i sees the keys up to i, and one more
    key = _behind_one(key, _COLUMNS, _PARTS, _FACTOR)
    value = _behind_one(value, _COLUMNS, 1, 1.0)
    return torch_attention(query, key, value, scale)[:, :, 1:]


def _behind_one(rows: Tensor, columns: int, filled: int, number: float) -> Tensor:
    """The rows with further columns of zeros, behind a row of zeros that has `number` in the first of these columns."""
    width = rows.shape[3]
    rows = torch.cat((rows, torch.zeros_like(rows[..., :1]).expand(-1, -1, -1, columns)), 3) if columns else rows
    places = torch.arange(width + columns, device=rows.device)
    first = torch.where((places >= width) & (places < width + filled), number, 0.0).to(rows.dtype)
    return torch.cat((first.expand(rows.shape[0], rows.shape[1], 1, width + columns), rows), 2)


@torch.library.custom_op("tsa::attend_floor", mutates_args=())
def attend_floor(
    query: Tensor, key: Tensor, value: Tensor, query_rows: Tensor, key_rows: Tensor, value_rows: Tensor, indices: Tensor,
    count: Tensor | None, padding: Tensor | None, scale: float, kernel: str, window: int, sinks: int,
) -> Tensor:  # fmt: skip
    """Both steps; ValueError where shapes do not fit. See the module's docstring."""
    compressed, lse = attend_lse(query_rows, key_rows, value_rows, count, scale, kernel)
    return merge_floor(query, key, value, compressed, lse, indices, count, padding, scale, window, sinks)


attend_floor.register_fake(attention_output)
