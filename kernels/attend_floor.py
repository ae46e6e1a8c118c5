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

from tsa_compile.kernels._aten import at_least, repeat_heads, take_rows
from tsa_compile.kernels.attend import attend_lse
from tsa_compile.kernels.decompress import attention_output
from tsa_compile.kernels.define import define
from tsa_compile.kernels.floor import merge_floor
from tsa_compile.kernels.neighbourhood import near_aten, placed_aten
from tsa_compile.kernels.sink import attention_beside


def attend_floor_aten(
    query: Tensor, key: Tensor, value: Tensor, query_rows: Tensor, key_rows: Tensor, value_rows: Tensor, indices: Tensor,
    count: Tensor | None, padding: Tensor | None, scale: float, kernel: str, window: int, sinks: int,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """In ATen ops, on any device, for any exact kernel and a positive scale."""
    operands = (query, key, value, indices, count, padding)
    near, near_lse, slots, rank = near_aten(*operands, scale, window, sinks, sink_logits)
    at = indices.to(torch.int64)
    if rank is not None:
        at = at_least(rank, 0)[:, None].expand(-1, indices.shape[1], -1).gather(2, at)
    logits = near_lse.gather(2, repeat_heads(at, query.shape[1]))
    rows = attention_beside(logits, query_rows, key_rows, value_rows, scale)
    chosen = (slots > 0)[..., None]
    rows = take_rows(rows, at_least(slots - 1, 0)).to(near.dtype)
    far, share = rows[..., : value.shape[3]], rows[..., value.shape[3] : value.shape[3] + 1]
    output = torch.where(chosen, far, 0.0) + torch.where(chosen, share, 1.0) * near
    return placed_aten(output.to(value.dtype), padding, rank)


@define(attention_output)
def attend_floor(
    query: Tensor, key: Tensor, value: Tensor, query_rows: Tensor, key_rows: Tensor, value_rows: Tensor, indices: Tensor,
    count: Tensor | None, padding: Tensor | None, scale: float, kernel: str, window: int, sinks: int,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Both steps; ValueError where shapes do not fit. See the module's docstring."""
    compressed, lse = attend_lse(query_rows, key_rows, value_rows, count, scale, kernel)
    rows = (query, key, value, compressed, lse, indices, count, padding)
    return merge_floor(*rows, scale, window, sinks, sink_logits)
