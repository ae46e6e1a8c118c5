"""Dense causal attention with a padding mask, exact for every row and without an L x L tensor.

    out[b, h, i] = sum_t softmax_t(scale * <query[b, h, i], key[b, g, t]>) value[b, g, t]     t <= p(i) with padding[b, t]

    query [B, H, Lq, D], key [B, G, Lk, D], value [B, G, Lk, Dv], g = h // (H / G), padding bool [B, Lk] (True = valid);
    p(i) = i + Lk - Lq: the queries are the last Lq of Lk positions, all of them or a chunk behind a cache
    ->  out [B, H, Lq, Dv] in the memory layout [B, Lq, H, Dv]

A row that may attend to no token (no valid token at or before it) is 0, which is what SDPA gives for a boolean mask. With
`mean_rows` it is the mean of value over all Lk keys, which is what softmax gives where a mask added a finite
-3.4e38 to every logit. Both are what the model computed before, pad rows included.

What the padding leaves of the computation is decided from `valid_ranges`, which costs one host synchronisation for a whole
graph, since all layers share a padding mask:

    all valid             one causal call without a mask
    one range [s, e)       rows in [s, e): causal behind s;  rows from e: all of [s, e);  rows before s: no token
    valid tokens apart    chunks of query rows, each with the [rows, keys] boolean mask of its own

Neighbouring items with equal valid ranges share their calls. Key and value heads are never repeated: where a kernel takes
equally many heads only, a group's query heads become further rows of the same keys.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tsa_compile.kernels._aten import (
    as_rows,
    at_least,
    positions_by_slot,
    repeat_heads,
    running_count,
    take_rows,
    torch_attention,
)
from tsa_compile.kernels.cached import behind, causal_behind, check_operands, in_blocks, query_positions, shared_keys
from tsa_compile.kernels.decompress import attention_output
from tsa_compile.kernels.define import define
from tsa_compile.kernels.sink import attention_aten, sink_as_key_aten

_COLUMNS = 8
"""Further columns in the column form: one is used, and rows of half precision stay aligned to 16 bytes."""
_WIDEST = 256
"""Of the heads that kernels of torch, onnxruntime and TensorRT take without holding all logits."""
_LOW, _LOW_HALF, _LEAST_SCALE = 1e15, 6e4, 1e-3
"""The further column's number, that of float16, and the scale from which on their product with it is low enough."""

Range = tuple[int, int, int]
"""(start, stop, contiguous) of an item's valid tokens."""

HOST = (torch.Tag.cudagraph_unsafe,)
"""Tags of ops that look at numbers on the host: a captured CUDA graph would be replayed with those of the first call."""


@define(lambda padding: torch.empty(padding.shape[0], 3, dtype=torch.int64, device="cpu"), *HOST)
def valid_ranges(padding: Tensor) -> Tensor:
    """(start, stop, contiguous) of every item's valid tokens: bool [B, L] -> int64 [B, 3] on the CPU.

    An item without a valid token is (0, 0, 1). Reading the result is free: the one synchronisation is here.
    """
    return valid_ranges_aten(padding).cpu()


@define(attention_output, *HOST)
def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, valid_ranges: Tensor, scale: float, mean_rows: bool,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Dense attention under (kv <= q + Lk - Lq) & padding[b, kv]. See the module's docstring."""
    check_operands("padded_attention", query, key, value, sink_logits, padding, valid_ranges)
    items = [(start, stop, contiguous) for start, stop, contiguous in valid_ranges.tolist()]
    return attend_ranges(query, key, value, padding, items, scale, value if mean_rows else None, sink_logits)


def runs_of_ranges(items: list[Range]) -> Iterator[tuple[slice, Range]]:
    """Neighbouring items with equal valid ranges, and the range."""
    first = 0
    for item, same in itertools.groupby(items):
        group = slice(first, first + len(list(same)))
        first = group.stop
        yield group, item


def attend_ranges(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, items: list[Range], scale: float, mean_of: Tensor | None,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same with the valid ranges on the host, one an item; rows that see nothing are the mean of `mean_of`, or 0."""
    if all(item == (0, key.shape[2], 1) for item in items):
        return as_rows(behind(query, key, value, scale, sink_logits))
    output = attention_output(query, key, value)
    past = key.shape[2] - query.shape[2]
    for group, (start, stop, contiguous) in runs_of_ranges(items):
        parts = (query[group], key[group], value[group])
        nowhere = output[group, :, : max(start - past, 0)] if stop else output[group]
        fill_masked_rows(nowhere, None if mean_of is None else mean_of[group])
        if contiguous:
            _fill_range(output[group], *parts, start, stop, scale, sink_logits)
        else:
            _fill_blocks(output[group], *parts, padding[group], start, scale, sink_logits)
    return output


def valid_ranges_aten(padding: Tensor) -> Tensor:
    """The same in ATen ops, left on the device: `padded_attention_aten` has no use for it."""
    rank = running_count(padding)
    total = padding.sum(dim=1)
    found = total > 0
    start = torch.where(found, (rank == 0).sum(dim=1), 0)
    stop = torch.where(found, (rank < total[:, None]).sum(dim=1) + 1, 0)
    return torch.stack([start, stop, (stop - start == total).to(torch.int64)], dim=1)


def padded_attention_aten(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, valid_ranges: Tensor | None, scale: float, mean_rows: bool,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in ATen ops, on any device: nothing is read on the host, so the valid ranges go unused.

    A whole prompt has one of two forms, both without an L x L mask. The column form is one attention over somewhat wider
    heads. The form by shares takes heads of any width and any scale above 0, and is two attentions: on an H100, with heads
    of 128, 31 ms where the column form takes 20, and a mask 68 (bfloat16, 32 heads over 8, 32K tokens). Chunks have a mask
    [B, 1, Lq, Lk]: causality alone needs one of [Lq, Lk], and a column would copy all that is cached.
    """
    rank, whole = running_count(padding), statically_known_true(query.shape[2] == key.shape[2])
    sees = rank if whole else rank.index_select(1, query_positions(query, key))
    sees = (sees > 0)[:, None, :, None]
    width = query.shape[3] + _COLUMNS * (1 if sink_logits is None else 2)
    if whole and width <= _WIDEST and scale >= _LEAST_SCALE:
        out = _attention_by_column(query, key, value, padding, scale, sink_logits)
        return where_seen(out, value, sees, mean_rows)
    if whole and scale > 0 and sink_logits is None:
        out = _attention_by_shares(query, key, value, padding, rank, scale)
        return where_seen(out, value, sees, mean_rows)
    allowed = causal_behind(query, key) & padding[:, None, None, :]
    return masked_attention_aten(query, key, value, allowed, sees, scale, mean_rows, sink_logits)


def masked_attention_aten(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, sees: Tensor, scale: float, mean_rows: bool,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention under a mask; rows that see nothing, as `sees` [B or 1, 1, Lq, 1] says, are 0 or the mean of value.

    They look at everything instead: runtimes differ on a softmax over nothing.
    """
    return where_seen(attention_aten(query, key, value, allowed | ~sees, scale, sink_logits), value, sees, mean_rows)


def _attention_by_column(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, scale: float, sink_logits: Tensor | None
) -> Tensor:
    """Causal attention over the valid keys of a whole prompt, [B, H, L, Dv]; rows that see none are unspecified.

    A further column of query and key gives keys that are not valid a logit of -scale * _LOW^2, which is below every other
    one (in float16, whose numbers end at 65504, below all down to -3.6e9 scale).
    """
    valid, low = padding[:, None, :, None], _LOW_HALF if query.dtype is torch.float16 else _LOW
    query = _with_column(query, torch.full_like(query[..., :1], low))
    key = torch.where(valid, key, 0.0)
    key = _with_column(key, torch.where(valid, 0.0, -low).to(key.dtype).expand(-1, key.shape[1], -1, -1))
    value, width = torch.where(valid, value, 0.0), value.shape[3]  # a weight of 0 times NaN is NaN
    if query.shape[3] == width + _COLUMNS:  # kernels are fast where rows of all three are as wide
        value = _with_column(value, torch.zeros_like(value[..., :1]))
    return sink_as_key_aten(query, key, value, scale, sink_logits)[..., :width]


def _with_column(rows: Tensor, column: Tensor) -> Tensor:
    """Rows [B, H, L, D] with a column [B, H, L, 1], and columns of zeros: [B, H, L, D + _COLUMNS]."""
    unused = torch.zeros_like(column).expand(-1, -1, -1, _COLUMNS - 1)
    return torch.cat((rows, column, unused), 3)


def _attention_by_shares(query: Tensor, key: Tensor, value: Tensor, padding: Tensor, rank: Tensor, scale: float) -> Tensor:
    """Causal attention over the valid keys of a whole prompt, [B, H, L, Dv]; rows that see none are unspecified.

    A key that is not valid becomes a copy of the last valid one before it, and its value 0. Of the weights w that attention
    without a mask then gives to the valid keys and the copies,

        out = (sum over valid keys of w value) / share          share = sum over valid keys of w

    The dividend is the attention itself, and the share is the same attention with values of 1, and 0 at copies. They are
    one call with twice the heads: TensorRT's builder crashes on two attentions with the same queries and keys.

    Copies repeat logits that are there, so the share is at least 1 / (1 + n), with n the most invalid tokens in succession
    that the row sees. Half precision rounds three times instead of once in rows that see copies. Valid rows see copies of
    holes alone: items are rolled to begin at their first valid token, so that padding on the left comes last and causality
    hides it, as it hides padding on the right.

    Args:
        rank: how many tokens are valid up to and with each, int64 [B, L].
    """
    seq_len = padding.shape[1]
    positions, first = torch.arange(seq_len, device=padding.device), (rank == 0).sum(dim=1, keepdim=True)
    order, back = positions + first, positions - first
    order = torch.where(order < seq_len, order, order - seq_len)
    back = torch.where(back < 0, back + seq_len, back)
    latest = positions_by_slot(padding, rank - 1, seq_len).gather(1, at_least(rank - 1, 0)).gather(1, order)
    query, key, value = _in_order(query, order), _in_order(key, latest), _in_order(value, latest)
    original = padding.gather(1, order)[:, None, :, None]
    value = torch.where(original, value, 0.0)
    ones = original.to(value.dtype).expand_as(value)
    query, key, value = torch.cat((query, query), 1), torch.cat((key, key), 1), torch.cat((value, ones), 1)
    out, share = torch_attention(query, key, value, scale).chunk(2, dim=1)
    return _in_order(out / share[..., :1], back)


def _in_order(tensor: Tensor, positions: Tensor) -> Tensor:
    """Rows [B, H, L, D] at the positions [B, L] of each item."""
    return take_rows(tensor, positions[:, None].expand(-1, tensor.shape[1], -1))


def where_seen(output: Tensor, value: Tensor, sees: Tensor, mean_rows: bool) -> Tensor:
    """The output, and in rows that see nothing 0 or the mean of value."""
    elsewhere = _mean(value).to(value.dtype) if mean_rows else torch.zeros_like(value[:, :, :1])
    return as_rows(torch.where(sees, output, repeat_heads(elsewhere, output.shape[1])))


def _mean(value: Tensor) -> Tensor:
    """Over all keys: [B, G, 1, Dv], in at least float32."""
    return value.mean(dim=2, keepdim=True, dtype=torch.promote_types(value.dtype, torch.float32))


def mean_of_keys(value: Tensor, heads: int) -> Tensor:
    """What each query head sees where it sees all keys alike: [B, heads, 1, Dv], in at least float32."""
    return repeat_heads(_mean(value), heads)


def fill_masked_rows(output: Tensor, value: Tensor | None) -> None:
    """Rows that may attend to no token: the mean of values, or 0."""
    if output.shape[2] == 0:
        return
    if value is not None:
        output.copy_(mean_of_keys(value, output.shape[1]))
    else:
        output.zero_()


def _fill_range(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, start: int, stop: int, scale: float,
    sink_logits: Tensor | None,
) -> None:  # fmt: skip
    """Rows from position `start` on, where exactly the tokens [start, stop) are valid."""
    if start == stop:
        return
    past = key.shape[2] - query.shape[2]
    first, last = max(start - past, 0), max(stop - past, 0)
    key, value = key[:, :, start:stop], value[:, :, start:stop]
    if first < last:
        output[:, :, first:last] = behind(query[:, :, first:last], key, value, scale, sink_logits)
    if last < query.shape[2]:
        output[:, :, last:] = shared_keys(query[:, :, last:], key, value, None, scale, sink_logits)


def _fill_blocks(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, padding: Tensor, start: int, scale: float,
    sink_logits: Tensor | None,
) -> None:  # fmt: skip
    """Rows from position `start` on, the first valid token: every row sees that one at least, so no softmax is empty."""
    first = max(start - (key.shape[2] - query.shape[2]), 0)
    key = torch.where(padding[:, None, :, None], key, 0.0)  # under a mask, kernels may add -inf to the NaN of a hidden key
    seen = (key[:, :, start:], value[:, :, start:], padding[:, start:])
    output[:, :, first:] = in_blocks(query[:, :, first:], *seen, scale, sink_logits)
