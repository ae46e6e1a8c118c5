"""Dense causal attention of queries behind a cache, exact and without an Lq x Lk tensor: a chunk of a prompt.

    out[b, h, i] = sum_t softmax_t(scale * <query[b, h, i], key[b, g, t]>) value[b, g, t]     t <= i + Lk - Lq

    query [B, H, Lq, D], key [B, G, Lk, D], value [B, G, Lk, Dv], g = h // (H / G), Lq <= Lk
    ->  out [B, H, Lq, Dv] in the memory layout [B, Lq, H, Dv]

The queries are the last Lq of Lk positions, so causality is aligned lower right. No operator of torch has this for every
kernel. Kernels of the registry that can do it have `run_behind`. cuDNN, the fastest on Hopper, takes two calls, both at its
full rate: all queries over the past without causality, and the chunk over itself, merged by their log-sum-exp,

    out = (exp(l) o + exp(l') o') / (exp(l) + exp(l'))

which reads and writes 3 B H Lq Dv elements more. Where no kernel has it, and for few rows, rows are computed in blocks with
the boolean mask [rows, keys] of each.

Here and in the modules that build on it, `sink_logits` [H] adds a number to each softmax's denominator (sink.py).
"""

from __future__ import annotations

from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tsa_compile.kernels._aten import as_rows, keys_before
from tsa_compile.kernels.decompress import attention_output
from tsa_compile.kernels.define import define
from tsa_compile.kernels.registry import KernelRequest, choose
from tsa_compile.kernels.sdpa import SDPA, fastest_first
from tsa_compile.kernels.sink import (
    attention_aten,
    attention_with_sink,
    check_sink,
    sink_as_key_aten,
    with_sink,
)

ROWS = 256
"""Query rows of a block, where a block has a mask of its own."""
FEW = 128
"""Fewer rows than that are one block: what leads to a fast kernel costs more."""


@define(attention_output)
def cached_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, sink_logits: Tensor | None = None) -> Tensor:
    """Dense attention under kv <= q + Lk - Lq; ValueError where shapes do not fit. See the module's docstring."""
    check_operands("cached_attention", query, key, value, sink_logits)
    return as_rows(behind(query, key, value, scale, sink_logits))


def cached_attention_aten(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sink_logits: Tensor | None = None
) -> Tensor:
    """The same in ATen ops, on any device; of a chunk holds a bool mask [1, 1, Lq, Lk], and with a sink its logits."""
    if sink_logits is not None and statically_known_true(query.shape[2] == key.shape[2]):
        return as_rows(sink_as_key_aten(query, key, value, scale, sink_logits))
    return as_rows(attention_aten(query, key, value, causal_behind(query, key), scale, sink_logits))


def causal_behind(query: Tensor, key: Tensor) -> Tensor:
    """Where kv <= q + Lk - Lq: bool [1, 1, Lq, Lk], four dimensions as TensorRT expects of a mask."""
    return (torch.arange(key.shape[2], device=query.device) <= query_positions(query, key)[:, None])[None, None]


def query_positions(query: Tensor, key: Tensor) -> Tensor:
    """The queries' positions among the keys': int64 [Lq]."""
    positions, past = torch.arange(query.shape[2], device=query.device), keys_before(query, key)
    return positions if isinstance(past, int) and past == 0 else positions + past


def check_operands(
    op: str, query: Tensor, key: Tensor, value: Tensor, sink_logits: Tensor | None, padding: Tensor | None = None,
    valid_ranges: Tensor | None = None,
) -> None:  # fmt: skip
    """ValueError where an op's tensors do not fit: lengths among others, which a graph with symbols cannot know."""
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"tsa::{op}: tensors of {query.dim()}, {key.dim()} and {value.dim()} dimensions; expected 4")
    (batch, heads, rows, dim), (_, kv_heads, keys, _) = query.shape, key.shape
    if value.shape[2] != keys or keys < rows:
        raise ValueError(
            f"tsa::{op}: {rows} queries over {keys} keys and {value.shape[2]} values; expected as many values as keys, and "
            "at least as many as queries"
        )
    fits = key.shape[0] == value.shape[0] == batch and value.shape[1] == kv_heads and key.shape[3] == dim
    if not fits or heads % max(kv_heads, 1) != 0 or not query.dtype == key.dtype == value.dtype:
        given = ", ".join(f"{tensor.dtype} {[*tensor.shape]}" for tensor in (query, key, value))
        raise ValueError(
            f"tsa::{op}: {given}; expected query [B,H,Lq,D], key [B,G,L,D] and value [B,G,L,Dv] of one dtype, G a divisor "
            "of H"
        )
    check_sink(op, query, sink_logits)
    if padding is None and valid_ranges is None:
        return
    if padding is None or valid_ranges is None:
        raise ValueError(f"tsa::{op}: padding and its valid ranges belong together; expected both or neither")
    if padding.shape != (batch, keys) or padding.dtype != torch.bool or valid_ranges.shape != (batch, 3):
        raise ValueError(
            f"tsa::{op}: padding {padding.dtype} {list(padding.shape)} and valid ranges {list(valid_ranges.shape)} for "
            f"{batch} items of {keys} keys; expected torch.bool [{batch}, {keys}] and [{batch}, 3]"
        )


def behind(query: Tensor, key: Tensor, value: Tensor, scale: float, sink_logits: Tensor | None = None) -> Tensor:
    """Causal attention of queries that are the last of the keys' positions, by the fastest kernel that fits."""
    request, rows = KernelRequest.of(query, key, value), query.shape[2]
    is_chunk = rows < key.shape[2]
    if sink_logits is None and not is_chunk:  # with no keys before the queries: of these the log-sum-exp would be -inf
        return choose(request).causal(query, key, value, scale)
    if query.is_cuda and (rows >= FEW or sink_logits is not None):
        kernel = choose(request, lse=True, behind=is_chunk)
        if kernel is not SDPA or not is_chunk:  # that one writes out the products of all rows
            compute = kernel.causal_behind if is_chunk else kernel.causal_lse
            out, lse = compute(query, key, value, scale)
            return out if sink_logits is None else with_sink(out, lse, sink_logits)
    return in_blocks(query, key, value, None, scale, sink_logits)


def in_blocks(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, scale: float, sink_logits: Tensor | None = None
) -> Tensor:
    """Causal attention of queries behind a cache, block by block; padding bool [B, Lk]: what keys every row may see.

    Every row must see a key: with padding, the first one must be valid.
    """
    output = attention_output(query, key, value)
    past = key.shape[2] - query.shape[2]
    keys = torch.arange(key.shape[2], device=query.device)
    for low in range(0, query.shape[2], ROWS):
        rows = slice(low, min(low + ROWS, query.shape[2]))
        seen = slice(0, past + rows.stop)
        allowed = (keys[seen] <= keys[past + rows.start : past + rows.stop, None])[None, None]
        if padding is not None:
            allowed = allowed & padding[:, None, None, seen]
        keys_seen = (key[:, :, seen], value[:, :, seen])
        output[:, :, rows] = shared_keys(query[:, :, rows], *keys_seen, allowed, scale, sink_logits)
    return output


def shared_keys(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scale: float, sink_logits: Tensor | None = None
) -> Tensor:
    """Attention [B, H, R, Dv] of R query rows to all keys, or those in `allowed` [B or 1, 1, R, keys].

    Without causality rows are independent, so [B, H, R] becomes [B, G, (H / G) R]: any kernel then shares key heads.
    """
    if sink_logits is not None:
        parts = query.split(ROWS, 2), [None] if allowed is None else allowed.split(ROWS, 2)
        several = zip_longest(*parts)
        return torch.cat([attention_with_sink(q, key, value, seen, scale, sink_logits) for q, seen in several], 2)
    group = query.shape[1] // key.shape[1]
    if allowed is not None:
        allowed = allowed.repeat(1, 1, group, 1)
    with fastest_first():
        rows = query.unflatten(1, (-1, group)).flatten(2, 3)
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=allowed, scale=scale)
    return out.unflatten(2, (group, query.shape[2])).flatten(1, 2)
