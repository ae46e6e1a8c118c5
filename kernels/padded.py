"""Dense causal attention with a padding mask, exact for every row and without an L x L tensor.

    out[b, h, i] = sum_t softmax_t(scale * <query[b, h, i], key[b, g, t]>) value[b, g, t]     t <= i with padding[b, t]

    query [B, H, L, D], key [B, G, L, D], value [B, G, L, Dv], g = h // (H / G), padding bool [B, L] (True = valid)
    ->  out [B, H, L, Dv] in the memory layout [B, L, H, Dv]

A row that may look nowhere (no valid token at or before it) is 0, which is what SDPA gives for a boolean mask. With
`mean_rows` it is the mean of value over all L keys, which is what softmax gives where a mask added a finite
-3.4e38 to every logit. Both are what the model computed before, pad rows included.

What the padding leaves of the computation is decided from `valid_ranges`, which costs one host synchronisation for a whole
graph, since all layers share a padding mask:

    all valid             one causal call, at the price of no mask at all
    one range [s, e)       rows [s, e): causal among themselves;  rows from e: all of [s, e);  rows before s: nowhere
    valid tokens apart    chunks of query rows, each with the [rows, keys] boolean mask of its own

Neighbouring items with equal valid ranges share their calls. Key and value heads are never repeated: where a kernel takes
equally many heads only, a group's query heads become further rows of the same keys.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from tsa_compile.kernels._aten import as_rows, repeat_heads, running_count
from tsa_compile.kernels.decompress import empty_output
from tsa_compile.kernels.registry import KernelRequest, choose
from tsa_compile.kernels.sdpa import PRIORITY

_CHUNK = 256

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
    """Dense attention under (kv <= q) & padding[b, kv]. See the module's docstring."""
    items = [tuple(row) for row in valid_ranges.tolist()]
    if all(item == (0, query.shape[2], 1) for item in items):
        return as_rows(_causal(query, key, value, scale))
    output = empty_output(query, query.shape[2], value.shape[3])
    first = 0
    for (start, stop, contiguous), same in itertools.groupby(items):
        group = slice(first, first + len(list(same)))
        first = group.stop
        parts = (query[group], key[group], value[group])
        _fill_masked_rows(output[group, :, :start] if stop else output[group], parts[2], mean_rows)
        if contiguous:
            _fill_range(output[group], *parts, start, stop, scale)
        else:
            _fill_chunks(output[group], *parts, padding[group], start, stop, scale)
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
    positions = torch.arange(query.shape[2], device=query.device)
    sees = (running_count(padding) > 0)[:, None, :, None]
    # A row that sees nothing looks at everything instead: runtimes differ on a softmax over nothing.
    allowed = ((positions <= positions[:, None]) & padding[:, None, None, :]) | ~sees
    gqa = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale, enable_gqa=gqa)
    elsewhere = torch.zeros_like(value[:, :, :1])
    if mean_rows:
        elsewhere = value.mean(dim=2, keepdim=True, dtype=torch.promote_types(value.dtype, torch.float32)).to(value.dtype)
    return as_rows(torch.where(sees, out, repeat_heads(elsewhere, query.shape[1])))


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return choose(KernelRequest.of(query, key, value)).causal(query, key, value, scale)


def _fill_masked_rows(output: Tensor, value: Tensor, mean_rows: bool) -> None:
    """Rows that may look nowhere."""
    if output.shape[2] == 0:
        return
    if mean_rows:
        mean = value.mean(dim=2, keepdim=True, dtype=torch.promote_types(value.dtype, torch.float32))
        output.copy_(mean.repeat_interleave(output.shape[1] // value.shape[1], 1))
    else:
        output.zero_()


def _fill_range(output: Tensor, query: Tensor, key: Tensor, value: Tensor, start: int, stop: int, scale: float) -> None:
    """Rows from start on, where exactly the tokens [start, stop) are valid."""
    if start == stop:
        return
    valid = slice(start, stop)
    key, value = key[:, :, valid], value[:, :, valid]
    output[:, :, valid] = _causal(query[:, :, valid], key, value, scale)
    if stop < query.shape[2]:
        output[:, :, stop:] = _shared_keys(query[:, :, stop:], key, value, None, scale)


def _fill_chunks(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, padding: Tensor, start: int, stop: int, scale: float
) -> None:
    """Rows from start on, the first valid token: every row sees that one at least, so no softmax is empty."""
    positions = torch.arange(query.shape[2], device=query.device)
    for low in range(start, query.shape[2], _CHUNK):
        rows = slice(low, low + _CHUNK)
        keys = slice(start, min(low + _CHUNK, stop))
        allowed = (positions[keys] <= positions[rows, None]) & padding[:, None, None, keys]
        output[:, :, rows] = _shared_keys(query[:, :, rows], key[:, :, keys], value[:, :, keys], allowed, scale)


def _shared_keys(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """Attention [B, H, R, Dv] of R query rows to all keys, or those in `allowed` [B, 1, R, keys].

    Without causality rows are independent, so [B, H, R] becomes [B, G, (H / G) R]: any kernel then shares key heads.
    """
    heads, rows = query.shape[1:3]
    group = heads // key.shape[1]
    query = query.unflatten(1, (-1, group)).flatten(2, 3)
    if allowed is not None:
        allowed = allowed.repeat(1, 1, group, 1)
    with sdpa_kernel(list(PRIORITY), set_priority=True):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale)
    return out.unflatten(2, (group, rows)).flatten(1, 2)
