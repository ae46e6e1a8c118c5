"""Dense causal attention over a sliding window, exact for every row and without an L x L tensor.

    out[b, h, i] = sum_t softmax_t(scale * <query[b, h, i], key[b, g, t]>) value[b, g, t]
                   over t with p(i) - window < t <= p(i), and with padding[b, t] where there is padding

    query [B, H, Lq, D], key [B, G, Lk, D], value [B, G, Lk, Dv], g = h // (H / G), window >= 1: a row sees that many tokens,
    itself among them; padding bool [B, Lk] (True = valid); p(i) = i + Lk - Lq: the queries are the last Lq of Lk positions
    ->  out [B, H, Lq, Dv] in the memory layout [B, Lq, H, Dv]

A row that sees no token is 0, or with `mean_rows` the mean of value over all keys, as in padded.py. With sink_logits each
softmax has a number more in its denominator (sink.py), on CUDA in the same kernel.

Models with such layers write them as attention under a mask of L x L, which torch's kernels read whole: at 32K tokens the
mask takes 1 GiB and the attention as long as without a window. Here a row costs its window, on CUDA by the kernel of
floor.py without selected rows: 4 H L (window + 64) D flops, at H = 32, D = 128, L = 128K and a window of 1,024 2.3 TFLOP,
where causal attention has 141. Elsewhere rows are computed in blocks, each with the mask [rows, window + rows] of its own.

With padding the work is cut as in padded.py: within the one range of an item's valid tokens positions say what ranks do;
rows behind it, and items whose valid tokens lie apart, are computed in blocks.

Method: the window is that of Longformer, arXiv 2004.05150.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tsa_compile.kernels._aten import as_rows, at_least, keys_before
from tsa_compile.kernels.cached import ROWS, check_operands, query_positions, shared_keys
from tsa_compile.kernels.decompress import attention_output
from tsa_compile.kernels.define import define
from tsa_compile.kernels.floor import near_triton
from tsa_compile.kernels.launch import remembered
from tsa_compile.kernels.padded import (
    HOST,
    fill_masked_rows,
    masked_attention_aten,
    mean_of_keys,
    runs_of_ranges,
    where_seen,
)
from tsa_compile.kernels.registry import TRITON, KernelRequest, of_window
from tsa_compile.kernels.sink import attention_aten, sink_as_key_aten

LEAST_BLOCK = 64
"""Rows of a block, in the ATen form, where the window is narrower."""


@define(attention_output)
def sliding_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, sink_logits: Tensor | None = None
) -> Tensor:
    """Dense attention under p(q) - window < kv <= p(q); ValueError where shapes do not fit. See the module's docstring."""
    _check("sliding_attention", window, query, key, value, sink_logits)
    output = attention_output(query, key, value)
    _fill(output, query, key, value, scale, window, sink_logits)
    return output


@define(attention_output, *HOST)
def padded_sliding_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, valid_ranges: Tensor, scale: float, window: int,
    mean_rows: bool, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same with padding; `valid_ranges` as `tsa.valid_ranges` gives them."""
    _check("padded_sliding_attention", window, query, key, value, sink_logits, padding, valid_ranges)
    output, length, past = attention_output(query, key, value), key.shape[2], keys_before(query, key)
    items = [(start, stop, contiguous) for start, stop, contiguous in valid_ranges.tolist()]
    for group, (start, stop, contiguous) in runs_of_ranges(items):
        part, rows = output[group], (query[group], key[group], value[group])
        mean_of = rows[2] if mean_rows else None
        # The first row that sees a valid token, those from which all do that it has before it, and the last that sees one.
        first, last, reach = (max(at - past, 0) for at in (start, stop, min(stop + window - 1, length)))
        fill_masked_rows(part[:, :, :first], mean_of)
        fill_masked_rows(part[:, :, reach:] if stop else part, mean_of)
        if contiguous and first < last:
            q, k, v = rows[0][:, :, first:last], rows[1][:, :, start:stop], rows[2][:, :, start:stop]
            _fill(part[:, :, first:last], q, k, v, scale, window, sink_logits)
        first = last if contiguous else first
        if stop:
            _fill_blocks(part, *rows, padding[group], range(first, reach), scale, window, sink_logits, mean_rows)
    return output


def sliding_attention_aten(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, sink_logits: Tensor | None = None
) -> Tensor:
    """The same in ATen ops, on any device; holds what `_blocks_aten` says."""
    if _is_short(key, window):
        return as_rows(attention_aten(query, key, value, _near(query, key, window), scale, sink_logits))
    return as_rows(_blocks_aten(query, key, value, None, scale, window, sink_logits)[0])


def padded_sliding_attention_aten(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, valid_ranges: Tensor | None, scale: float, window: int,
    mean_rows: bool, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same with padding. The valid ranges go unused."""
    if _is_short(key, window):
        allowed = _near(query, key, window) & padding[:, None, None, :]
        sees = allowed.any(3, keepdim=True)
        return masked_attention_aten(query, key, value, allowed, sees, scale, mean_rows, sink_logits)
    out, sees = _blocks_aten(query, key, value, padding, scale, window, sink_logits)
    return where_seen(out, value, sees, mean_rows)


def _is_short(key: Tensor, window: int) -> bool:
    """Whether a mask [Lq, Lk] has no more columns than the masks of blocks, at all lengths of a trace."""
    return statically_known_true(key.shape[2] <= 2 * window)


def _blocks_aten(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, scale: float, window: int,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Blocks of R rows, each over the keys of its own positions and of the W before, the window or all that there are.

    The N blocks of all items are items of one attention: queries [N, H, R, D], keys [N, G, W + R, D], and a bool mask
    [N, 1, R, W + R]. An eighth of the window as R copies each key nine times, and computes an eighth more than is seen.
    They are gathered by index: a reshape of the length would ask whether it is a multiple of R, and hold for some lengths
    alone. So would a number of blocks that may be 1, so there is one without rows.

    Returns:
        The rows [B, H, Lq, Dv], and which of them see a key, bool [B, 1, Lq, 1]; those that do not are unspecified.
    """
    (batch, _, queries, _), keys, device = query.shape, key.shape[2], query.device
    block, window_keys = max(window // 8, LEAST_BLOCK), torch.sym_min(window, keys)
    blocks = (queries + block - 1) // block + 1
    number = torch.arange(batch * blocks, device=device)[:, None]
    item = torch.div(number, blocks, rounding_mode="floor")
    rows = (number - item * blocks) * block + torch.arange(block, device=device)  # [N, R]
    places = rows + keys_before(query, key)
    band = places[:, :1] + torch.arange(window_keys + block, device=device) - window_keys  # [N, W + R]
    allowed = (band[:, None] <= places[:, :, None]) & (band[:, None] > places[:, :, None] - window) & (band >= 0)[:, None]
    rows, band = (torch.minimum(at_least(x, 0), torch.full_like(x, end - 1)) for x, end in ((rows, queries), (band, keys)))
    if padding is not None:
        allowed = allowed & padding[item, band][:, None]
        key, value = (torch.where(padding[:, None, :, None], x, 0.0) for x in (key, value))  # as in padded.py
    sees = allowed.any(2, keepdim=True)  # [N, R, 1]
    parts = ((query, rows), (key, band), (value, band))
    query, key, value = (x.transpose(1, 2)[item, positions].transpose(1, 2) for x, positions in parts)
    allowed = (allowed | ~sees)[:, None]
    out = sink_as_key_aten(query, key, value, scale, sink_logits, allowed)
    position = torch.arange(queries, device=device)
    lines = torch.arange(batch, device=device)[:, None] * blocks + torch.div(position, block, rounding_mode="floor")
    place = lines, position % block  # [B, Lq], [Lq]
    return out.transpose(1, 2)[place].transpose(1, 2), sees[place][:, None]


_near_rows = remembered(near_triton)


def _near(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Where p(q) - window < kv <= p(q): bool [1, 1, Lq, Lk]."""
    rows, keys = query_positions(query, key)[:, None], torch.arange(key.shape[2], device=key.device)
    return ((keys <= rows) & (keys > rows - window))[None, None]


def _check(op: str, window: int, *operands: Any) -> None:
    check_operands(op, *operands)
    if window < 1:
        raise ValueError(f"tsa::{op}: a window of {window} tokens; expected at least 1")


def _fill(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, sink_logits: Tensor | None
) -> None:
    """All rows, where all tokens are valid."""
    window = min(window, key.shape[2])  # kernels count in 32 bits
    if of_window(KernelRequest.of(query, key, value)) == TRITON:
        with torch.cuda.device_of(query):
            _near_rows(query, key, value, scale, window, sink_logits, output)
    else:
        _fill_blocks(output, query, key, value, None, range(query.shape[2]), scale, window, sink_logits)


def _fill_blocks(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, rows: range, scale: float,
    window: int, sink_logits: Tensor | None, mean_rows: bool = False,
) -> None:  # fmt: skip
    """Some rows, block by block; those that see nothing look at everything, as a softmax over nothing is NaN."""
    positions = torch.arange(key.shape[2], device=query.device)
    elsewhere = mean_of_keys(value, query.shape[1]).to(output.dtype) if mean_rows else output.new_zeros(())
    past = keys_before(query, key)
    if padding is not None:
        key = torch.where(padding[:, None, :, None], key, 0.0)  # as in padded.py
    for low in range(rows.start, rows.stop, ROWS):
        high = min(low + ROWS, rows.stop)
        first, until = max(past + low - window + 1, 0), past + high
        distance = positions[past + low : until, None] - positions[first:until]
        allowed = ((distance >= 0) & (distance < window))[None, None]  # [1, 1, rows, keys]
        sees = None
        if padding is not None:
            allowed = allowed & padding[:, None, None, first:until]
            sees = allowed.any(3, keepdim=True)
            allowed = allowed | ~sees
        keys, values = key[:, :, first:until], value[:, :, first:until]
        out = shared_keys(query[:, :, low:high], keys, values, allowed, scale, sink_logits)
        output[:, :, low:high] = out if sees is None else torch.where(sees, out, elsewhere)
