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

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tsa_compile.kernels._aten import as_rows, repeat_heads, running_count
from tsa_compile.kernels.cached import behind, causal_behind, check_lengths, in_blocks, query_positions, shared_keys
from tsa_compile.kernels.decompress import empty_output

# Both look at the padding on the host: what a CUDA graph captured would be replayed with the first batch's valid ranges.
_HOST = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("tsa::valid_ranges", mutates_args=(), tags=_HOST)
def valid_ranges(padding: Tensor) -> Tensor:
    """(start, stop, contiguous) of every item's valid tokens: bool [B, L] -> int64 [B, 3] on the CPU.

    An item without a valid token is (0, 0, 1). Reading the result is free: the one synchronisation is here.
    """
    return valid_ranges_aten(padding).cpu()


@valid_ranges.register_fake
def _(padding: Tensor) -> Tensor:
    return torch.empty(padding.shape[0], 3, dtype=torch.int64, device="cpu")


@torch.library.custom_op("tsa::padded_attention", mutates_args=(), tags=_HOST)
def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, valid_ranges: Tensor, scale: float, mean_rows: bool
) -> Tensor:
    """Dense attention under (kv <= q + Lk - Lq) & padding[b, kv]. See the module's docstring."""
    check_lengths("padded_attention", query, key, value)
    items = [(start, stop, contiguous) for start, stop, contiguous in valid_ranges.tolist()]
    return attend_ranges(query, key, value, padding, items, scale, value if mean_rows else None)


def attend_ranges(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, items: list[tuple[int, int, int]], scale: float,
    mean_of: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same with the valid ranges on the host, one an item; rows that see nothing are the mean of `mean_of`, or 0."""
    if all(item == (0, key.shape[2], 1) for item in items):
        return as_rows(behind(query, key, value, scale))
    output = empty_output(query, query.shape[2], value.shape[3])
    past, first = key.shape[2] - query.shape[2], 0
    for (start, stop, contiguous), same in itertools.groupby(items):
        group = slice(first, first + len(list(same)))
        first = group.stop
        parts = (query[group], key[group], value[group])
        nowhere = output[group, :, : max(start - past, 0)] if stop else output[group]
        _fill_masked_rows(nowhere, None if mean_of is None else mean_of[group])
        if contiguous:
            _fill_range(output[group], *parts, start, stop, scale)
        else:
            _fill_blocks(output[group], *parts, padding[group], start, scale)
    return output


@padded_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, valid_ranges: Tensor, scale: float, mean_rows: bool
) -> Tensor:
    return empty_output(query, query.shape[2], value.shape[3])


def valid_ranges_aten(padding: Tensor) -> Tensor:
    """The same in ATen ops, left on the device: `padded_attention_aten` has no use for it."""
    rank = running_count(padding)
    total = padding.sum(dim=1)
    found = total > 0
    start = torch.where(found, (rank == 0).sum(dim=1), 0)
    stop = torch.where(found, (rank < total[:, None]).sum(dim=1) + 1, 0)
    return torch.stack([start, stop, (stop - start == total).to(torch.int64)], dim=1)


def padded_attention_aten(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, valid_ranges: Tensor | None, scale: float, mean_rows: bool
) -> Tensor:
    """The same in ATen ops, on any device: nothing is read on the host, so the valid ranges go unused.

    Costs a bool mask [B, 1, L, L] (256 MB at 16K) and only kernels that take one.
    """
    sees = running_count(padding) > 0
    if not statically_known_true(query.shape[2] == key.shape[2]):
        sees = sees.index_select(1, query_positions(query, key))
    sees = sees[:, None, :, None]
    # A row that sees nothing looks at everything instead: runtimes differ on a softmax over nothing.
    allowed = (causal_behind(query, key) & padding[:, None, None, :]) | ~sees
    gqa = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale, enable_gqa=gqa)
    elsewhere = torch.zeros_like(value[:, :, :1])
    if mean_rows:
        elsewhere = value.mean(dim=2, keepdim=True, dtype=torch.promote_types(value.dtype, torch.float32)).to(value.dtype)
    return as_rows(torch.where(sees, out, repeat_heads(elsewhere, query.shape[1])))


def _fill_masked_rows(output: Tensor, value: Tensor | None) -> None:
    """Rows that may attend to no token: the mean of values, or 0."""
    if output.shape[2] == 0:
        return
    if value is not None:
        mean = value.mean(dim=2, keepdim=True, dtype=torch.promote_types(value.dtype, torch.float32))
        output.copy_(mean.repeat_interleave(output.shape[1] // value.shape[1], 1))
    else:
        output.zero_()


def _fill_range(output: Tensor, query: Tensor, key: Tensor, value: Tensor, start: int, stop: int, scale: float) -> None:
    """Rows from position `start` on, where exactly the tokens [start, stop) are valid."""
    if start == stop:
        return
    past = key.shape[2] - query.shape[2]
    first, last = max(start - past, 0), max(stop - past, 0)
    key, value = key[:, :, start:stop], value[:, :, start:stop]
    if first < last:
        output[:, :, first:last] = behind(query[:, :, first:last], key, value, scale)
    if last < query.shape[2]:
        output[:, :, last:] = shared_keys(query[:, :, last:], key, value, None, scale)


def _fill_blocks(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, padding: Tensor, start: int, scale: float
) -> None:
    """Rows from position `start` on, the first valid token: every row sees that one at least, so no softmax is empty."""
    first = max(start - (key.shape[2] - query.shape[2]), 0)
    seen = (key[:, :, start:], value[:, :, start:], padding[:, start:])
    output[:, :, first:] = in_blocks(query[:, :, first:], *seen, scale)
