"""A learned number for each head in the denominator of its softmax, as gpt-oss has it: a key of that logit without a value.

    out[b, h, i] = sum_t exp(l[t]) value[t] / (exp(s[h]) + sum_t exp(l[t]))        l[t] = scale * <query[i], key[t]>, t seen
                 = o exp(r) / (exp(s[h]) + exp(r))

    s: sink_logits [H], floating point. o [B, H, R, Dv] and r [B, H, R] are the attention without it and the log-sum-exp
    r = log sum_t exp(l[t]), which kernels give anyway

A row that sees no key is 0. These sinks are no tokens: those of the floor (floor.py) are the first tokens of the prompt.

Method: gpt-oss (arXiv 2508.10925); the number in the denominator is that of "Attention is off by one" and of
StreamingLLM's zero sink, arXiv 2309.17453.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsa_compile.kernels._aten import torch_attention

_COLUMNS = 8
"""Further columns of query, key and value: four are used, and rows of half precision stay aligned to 16 bytes."""
_FACTORS = (32768.0, 64.0, 64.0, 64.0)
"""The further key's numbers. A logit is handed over as a sum of numbers of the query's dtype times these: the first product
reaches as far as float16 does with queries and keys, 2e9 times the scale, and three of bfloat16 hold what float32 does."""


def check_sink(op: str, query: Tensor, sink_logits: Tensor | None) -> None:
    """ValueError unless there is a number for each of the query's heads, or none at all."""
    if sink_logits is None:
        return
    if sink_logits.shape != query.shape[1:2] or not sink_logits.is_floating_point():
        raise ValueError(
            f"tsa::{op}: sink_logits {sink_logits.dtype} {[*sink_logits.shape]} for {query.shape[1]} heads; expected "
            f"floating point [{query.shape[1]}]"
        )


def with_sink(output: Tensor, lse: Tensor, sink_logits: Tensor) -> Tensor:
    """Attention [B, H, R, Dv] with log-sum-exp [B, H, R] as it is with the number in its denominator, in the same layout."""
    share = torch.sigmoid(lse - sink_logits.to(lse.dtype)[:, None])
    if output.is_cuda and type(output) is Tensor:  # nobody traces: without a product in float32 in between
        return torch.mul(output, share[..., None], out=torch.empty_like(output))
    return (output * share[..., None]).to(output.dtype)


def lse_with_sink(lse: Tensor, sink_logits: Tensor) -> Tensor:
    """The log-sum-exp [B, H, R] with the number among the logits."""
    return torch.logaddexp(lse, sink_logits.to(lse.dtype)[:, None])


def attention_aten(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float, sink_logits: Tensor | None
) -> Tensor:
    """Attention under a mask [B or 1, 1, R, K] in ATen ops, with a sink or without."""
    if sink_logits is None:
        return torch_attention(query, key, value, scale, allowed)
    return attention_with_sink(query, key, value, allowed, scale, sink_logits)


def attention_with_sink(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scale: float, sink_logits: Tensor
) -> Tensor:
    """The rows [B, H, R, Dv], written out; `allowed` [B or 1, 1, R, K] are the keys that each sees, None: all.

    In ATen ops, on any device; holds the logits [B, H, R, K], and repeats no key.
    """
    wide, groups = torch.promote_types(query.dtype, torch.float32), key.shape[1]
    share = query.shape[1] // groups
    rows = query.unflatten(1, (groups, share)).flatten(2, 3).to(wide)  # a group's heads are further rows of the same keys
    logits = (scale * rows @ key.to(wide).transpose(2, 3)).unflatten(2, (share, query.shape[2]))  # [B, G, H / G, R, K]
    if allowed is not None:
        logits = torch.where(allowed[:, :, None], logits, float("-inf"))
    sink = sink_logits.to(wide).unflatten(0, (groups, share))[None, :, :, None, None]
    top = torch.maximum(logits.amax(-1, keepdim=True), sink)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True) + (sink - top).exp()
    out = weights.flatten(2, 3) @ value.to(wide)
    return (out.unflatten(2, (share, query.shape[2])) / total).flatten(1, 2).to(query.dtype)


def sink_as_key_aten(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sink_logits: Tensor | None, allowed: Tensor | None = None
) -> Tensor:
    """The rows [B, H, C, Dv] in ATen ops, with a sink or without: causal over as many keys, or under a mask, as
    `attention_beside` has it.
    """
    if sink_logits is None:
        return torch_attention(query, key, value, scale, allowed)
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = sink_logits.to(wide)[None, :, None].expand(query.shape[:3])
    return attention_beside(logits, query, key, value, scale, allowed)[..., : value.shape[3]].to(query.dtype)


def attention_beside(
    logits: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, allowed: Tensor | None = None
) -> Tensor:
    """Attention of rows [B, H, C, D], and to one key before theirs that has `logits` [B, H, C] and no value.

    In ATen ops, one call of torch's attention with somewhat wider heads, for a positive scale: causal over as many keys as
    queries, with nothing of [C, C], or over K keys under `allowed`, bool [B or 1, 1, C, K].

    Returns:
        [B, H, C, Dv + 8]; the further key's share is in column Dv.
    """
    # Somewhat below what a logit can be, for the first part is rounded, and may be larger.
    most = min(torch.finfo(query.dtype).max * _FACTORS[0], 0.99 * torch.finfo(logits.dtype).max)
    parts, rest = [], (logits / scale).clamp(-most, most)
    for factor in _FACTORS:
        parts.append((rest / factor).to(query.dtype)[..., None])
        rest = rest - parts[-1][..., 0].to(rest.dtype) * factor
    unused = torch.zeros_like(query[..., :1]).expand(-1, -1, -1, _COLUMNS - len(_FACTORS))
    query = torch.cat((query, *parts, unused), 3)
    key = _behind_one(key, _COLUMNS, _FACTORS)
    value = _behind_one(value, _COLUMNS, (1.0,))
    if allowed is not None:
        return torch_attention(query, key, value, scale, torch.cat((torch.ones_like(allowed[..., :1]), allowed), 3))
    query = _behind_one(query, 0, ())  # row i sees the keys up to i, and one more
    return torch_attention(query, key, value, scale)[:, :, 1:]


def _behind_one(rows: Tensor, columns: int, numbers: tuple[float, ...]) -> Tensor:
    """The rows with further columns of zeros, behind a row of zeros that has `numbers` in the first of these columns."""
    width = rows.shape[3]
    rows = torch.cat((rows, torch.zeros_like(rows[..., :1]).expand(-1, -1, -1, columns)), 3) if columns else rows
    places = torch.arange(width + columns, device=rows.device)
    first = torch.zeros_like(places, dtype=rows.dtype)
    for place, number in enumerate(numbers, width):
        first = torch.where(places == place, number, first)
    return torch.cat((first.expand(rows.shape[0], rows.shape[1], 1, width + columns), rows), 2)
