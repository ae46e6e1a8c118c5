"""Causal attention into a cache of a fixed size, of which the device knows how much is filled: exact, or sparse.

    out[b, h, i] = sum_t softmax_t(scale * <query[b, h, i], key[b, g, t]>) value[b, g, t]    t <= positions[i], padding[b, t]

    query [B, H, Lq, D], key [B, G, Lk, D], value [B, G, Lk, Dv], positions int64 [Lq]; padding bool [B, Lk] or None
    ->  out [B, H, Lq, Dv] in the memory layout [B, Lq, H, Dv]

A graph knows the buffer's length Lk and a tensor of positions, no number. `filled` reads two numbers from it, once for all
layers of a graph: the first position, and whether the others follow one by one. If so, keys behind the last position are cut
off on the host, and what is left are queries behind a cache (cached.py, padded.py, fused.py). Any other positions are
computed correctly as well, dense with a mask [Lq, Lk]. Rows that may attend to no token are 0, or with `mean_rows` the mean
of value over all Lk keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsa_compile.kernels._aten import as_rows
from tsa_compile.kernels.cached import behind, check_operands
from tsa_compile.kernels.decompress import attention_output
from tsa_compile.kernels.define import define
from tsa_compile.kernels.fused import define_op, padded_sparse_attention, sparse_attention
from tsa_compile.kernels.options import Options
from tsa_compile.kernels.padded import HOST, Range, attend_ranges, masked_attention_aten


@define(lambda positions: torch.empty(2, dtype=torch.int64, device="cpu"), *HOST)
def filled(positions: Tensor) -> Tensor:
    """(first, consecutive) of positions int64 [Lq]: int64 [2] on the CPU. The one synchronisation is here."""
    return filled_aten(positions).cpu()


def filled_aten(positions: Tensor) -> Tensor:
    """The same in ATen ops, left on the device."""
    consecutive = (positions[1:] == positions[:-1] + 1).all()
    return torch.stack([positions[0], consecutive.to(torch.int64)])


@define(attention_output, *HOST)
def filled_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, valid_ranges: Tensor | None, positions: Tensor,
    filled: Tensor, scale: float, mean_rows: bool, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See the module's docstring."""
    _check("filled_attention", positions, query, key, value, sink_logits, padding, valid_ranges)
    stop = keys_in_use(filled, query, key)
    if stop is None:
        operands = (query, key, value, padding, valid_ranges, positions, filled)
        return filled_attention_aten(*operands, scale, mean_rows, sink_logits)
    used = (query, key[:, :, :stop], value[:, :, :stop])
    if padding is None or valid_ranges is None:
        return as_rows(behind(*used, scale, sink_logits))
    ranges, mean_of = ranges_until(valid_ranges, stop), value if mean_rows else None
    return attend_ranges(*used, padding[:, :stop], ranges, scale, mean_of, sink_logits)


def _check(op: str, positions: Tensor, query: Tensor, *others: Any) -> None:
    check_operands(op, query, *others)
    if len(positions) != query.shape[2]:
        raise ValueError(f"tsa::{op}: {len(positions)} positions for {query.shape[2]} queries; expected one for each")


def keys_in_use(filled: Tensor, query: Tensor, key: Tensor) -> int | None:
    """How many keys there are up to the last query's position; None where positions do not follow one by one in the keys."""
    first, consecutive = filled.tolist()
    stop = first + query.shape[2]
    return stop if consecutive and first >= 0 and stop <= key.shape[2] else None


def ranges_until(valid_ranges: Tensor, stop: int) -> list[Range]:
    """The valid ranges of keys of which those from `stop` on are cut off."""
    items = [(start, min(end, stop), contiguous) for start, end, contiguous in valid_ranges.tolist()]
    return [item if item[0] < item[1] else (0, 0, 1) for item in items]


def filled_attention_aten(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, valid_ranges: Tensor | None, positions: Tensor,
    filled: Tensor | None, scale: float, mean_rows: bool, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in ATen ops, on any device, for any positions; holds a bool mask [B or 1, 1, Lq, Lk]."""
    allowed = (torch.arange(key.shape[2], device=key.device) <= positions[:, None])[None, None]
    if padding is not None:
        allowed = allowed & padding[:, None, None]
    sees = allowed.any(dim=-1, keepdim=True)
    return masked_attention_aten(query, key, value, allowed, sees, scale, mean_rows, sink_logits)


def filled_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, valid_ranges: Tensor | None, positions: Tensor,
    filled: Tensor, *options: Any, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Token sparse attention over the keys up to the last query's position, by the ops of fused.py."""
    _check("filled_sparse_attention", positions, query, key, value, sink_logits, padding, valid_ranges)
    stop = keys_in_use(filled, query, key)
    if stop is None:
        operands = (query, key, value, padding, valid_ranges, positions, filled)
        return filled_attention_aten(*operands, Options(*options).scale, False, sink_logits)
    used = (query, key[:, :, :stop], value[:, :, :stop])
    if padding is None or valid_ranges is None:
        return sparse_attention(*used, *options, sink_logits=sink_logits)
    ranges = torch.tensor(ranges_until(valid_ranges, stop), dtype=torch.int64).reshape(-1, 3)
    return padded_sparse_attention(*used, padding[:, :stop], ranges, *options, sink_logits=sink_logits)


define_op(filled_sparse_attention, *HOST)
