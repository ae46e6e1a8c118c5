"""A report with the expected milliseconds of its calls on a device, and the length from which they gain there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tsa_compile.config import TSAConfig
from tsa_compile.costs.breakeven import expected_kept, minimum
from tsa_compile.costs.calls import CallShape, dense_work, sparse_path, window_work
from tsa_compile.costs.devices import DeviceCosts, costs_of, is_cpu
from tsa_compile.reasons import Decision, Reason
from tsa_compile.report import CallRow, RewriteReport


def with_expectations(
    report: RewriteReport, config: TSAConfig, device: torch.device | str | DeviceCosts | None
) -> RewriteReport:
    """The report with what its calls are expected to take on a device, and the length from which sparse ones gain there.

    A call over a window is not compared: both of its figures are what it takes. A call that is not known well enough has
    none: one that stays as the model wrote it, or whose sizes are symbolic.
    """
    costs, notes = costs_of(device)
    rows = tuple(_with_times(row, config, costs) for row in report.rows)
    expected: dict[str, Any] = {"device": costs.name}
    candidates = [row for row in rows if row.reason in (Reason.SPARSE, Reason.TOO_SHORT)]
    shapes = [(row, shape) for row in candidates if (shape := _shape(row, config)) is not None]
    if shapes:
        decider = None if is_cpu(device) else costs  # as the calls were decided about
        share = len(candidates) / len(rows)
        known = [minimum(_own(row, config), shape, share, decider).shortest for row, shape in shapes]
        expected["break_even"] = min((length for length in known if length is not None), default=None)
    return replace(report, rows=rows, expected=expected, notes=(*report.notes, *notes))


def _with_times(row: CallRow, config: TSAConfig, costs: DeviceCosts) -> CallRow:
    shape, length = _shape(row, config), row.query[2] if len(row.query) == 4 else None
    if shape is None or not isinstance(length, int) or length < 1 or row.decision is Decision.UNCHANGED:
        return row
    if row.window is not None:
        ms = window_work(shape, costs, row.window, length).ms
        return replace(row, expected_dense_ms=ms, expected_ms=ms)
    dense = dense_work(shape, costs, length).ms
    sparse = sparse_path(shape, costs, length, expected_kept(_own(row, config), length + shape.past)).ms
    return replace(row, expected_dense_ms=dense, expected_ms=sparse if row.decision is Decision.SPARSE else dense)


def _own(row: CallRow, config: TSAConfig) -> TSAConfig:
    """The configuration of a row's layer."""
    return config if row.budget is None else config.replace(budget=dict([row.budget]))


def _shape(row: CallRow, config: TSAConfig) -> CallShape | None:
    """The sizes of a call, as `CallShape.of` reads them from tensors; None where they are symbolic."""
    dtype = getattr(torch, row.dtype, None)
    if not (len(row.query) == len(row.key) == len(row.value) == 4 and isinstance(dtype, torch.dtype)):
        return None
    past = 0 if row.query[2] == row.key[2] else _past(row)
    if past is None:
        return None
    sizes = (row.query[1], row.key[1], row.query[3], row.value[3])
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    heads, kv_heads, head_dim, value_head_dim = map(int, sizes)
    return CallShape.configured(
        _own(row, config), row.query[0], heads, kv_heads, head_dim, value_head_dim, dtype.itemsize, past
    )


def _past(row: CallRow) -> int | None:
    """How many keys lie before a chunk's; None where that is not known while compiling: of a cache of a fixed size, too."""
    queries, keys = row.query[2], row.key[2]
    known = isinstance(queries, int) and isinstance(keys, int) and "filled cache" not in row.mask
    return int(keys) - int(queries) if known and int(keys) > int(queries) else None
