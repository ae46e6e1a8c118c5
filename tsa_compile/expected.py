"""Expected milliseconds of attention calls on a device, and where they gain: what `predict` and `explain` share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import sympy
import torch

from tsa_compile.config import Coverage, TSAConfig
from tsa_compile.errors import ConfigError
from tsa_compile.passes.costs import (
    KEPT,
    LENGTH,
    RestShape,
    SiteShape,
    Work,
    break_even,
    dense_work,
    expected_share,
    kept_share,
    rest_work,
    sparse_work,
)
from tsa_compile.passes.devices import H200, MEASURED, DeviceCosts, for_device
from tsa_compile.report import Decision, Reason, RewriteReport, SiteRow

NOTHING = Work(sympy.Integer(0), sympy.Integer(0), sympy.Integer(0))


def costs_of(device: torch.device | str | DeviceCosts | None = None) -> tuple[DeviceCosts, tuple[str, ...]]:
    """The costs of a device, and what must be said about them.

    Args:
        device: a device, its name, the name of one that was measured ("h200", "h100"), or costs. None is the CUDA device if
            there is one. Of a CPU, and of CUDA where there is none, nothing is known: then the figures are the H200's.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(device, DeviceCosts):
        return device, ()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, str):
        for short, costs in MEASURED.items():
            if device.lower() in (short, costs.name.lower()):
                return costs, ()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        known = ", ".join(map(repr, MEASURED))
        raise ConfigError(
            f"device={device!r} is not known: device must be a torch.device, its name, {known}, or a DeviceCosts"
        ) from error
    if found.type != "cuda" or not torch.cuda.is_available():
        why = "there is no CUDA device here" if found.type == "cuda" else f"speed is not claimed on {found.type}"
        return H200, (f"{why}: all figures are those of one {H200.name}",)
    if (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={str(found)!r} does not exist: there are {torch.cuda.device_count()} CUDA devices")
    costs = for_device(found)
    if costs in MEASURED.values():
        return costs, ()
    return costs, (f"{costs.name} was not measured: its costs are the {H200.name}'s, scaled by processors and bandwidth",)


def shortest(config: TSAConfig, costs: DeviceCosts, shape: SiteShape, sparse_layers: float = 0.5) -> int | None:
    """The shortest length that is compressed on a device, as passes/plan.py decides it on CUDA; None if none gains."""
    return break_even(costs, shape, config, sparse_layers) if config.min_length is None else config.min_length


@functools.lru_cache(maxsize=512)
def attention_works(shape: SiteShape, costs: DeviceCosts) -> tuple[Work, Work]:
    """A site dense and sparse, all steps together."""
    return dense_work(shape, costs), added(sparse_work(shape, costs).values())


@functools.lru_cache(maxsize=512)
def layer_work(rest: RestShape, costs: DeviceCosts) -> Work:
    """`rest_work`, built once for all layers alike."""
    return rest_work(rest, costs)


def added(works: Iterable[Work]) -> Work:
    """Several works, one after the other."""
    several = [NOTHING, *works]
    return Work(*(sympy.Add(*(getattr(work, name) for work in several)) for name in ("flops", "bytes", "ms")))


def evaluated(expression: sympy.Expr, length: int, kept: float) -> float:
    """An expression in L and s as a number."""
    return float(_function(expression)(length, kept))


@functools.lru_cache(maxsize=512)
def _function(expression: sympy.Expr) -> Callable[[int, float], float]:
    return sympy.lambdify((LENGTH, KEPT), expression, "math")


def site_ms(shape: SiteShape, costs: DeviceCosts, length: int, kept: float) -> tuple[float, float]:
    """Milliseconds of a site of this length, dense and sparse at this kept share."""
    dense, sparse = attention_works(shape, costs)
    return evaluated(dense.ms, length, kept), evaluated(sparse.ms, length, kept)


def with_expectations(
    report: RewriteReport, config: TSAConfig, device: torch.device | str | DeviceCosts | None
) -> RewriteReport:
    """The report with what its calls are expected to take on a device, and the length from which sparse ones gain there.

    A call that is not known well enough has no figures: one that stays as the model wrote it, or whose sizes are symbolic.
    """
    costs, notes = costs_of(device)
    rows = tuple(_with_times(row, config, costs) for row in report.rows)
    expected: dict[str, Any] = {"device": costs.name}
    candidates = [row for row in rows if row.reason in (Reason.SPARSE, Reason.TOO_SHORT)]
    shapes = [shape for row in candidates if (shape := _shape(row, config)) is not None]
    if shapes:
        expected["break_even"] = shortest(config, costs, shapes[0], len(candidates) / len(rows))
    return replace(report, rows=rows, expected=expected, notes=(*report.notes, *notes))


def _with_times(row: SiteRow, config: TSAConfig, costs: DeviceCosts) -> SiteRow:
    shape, length = _shape(row, config), row.query[2] if len(row.query) == 4 else None
    if shape is None or not isinstance(length, int) or length < 1 or row.decision is Decision.UNCHANGED:
        return row
    dense, sparse = site_ms(shape, costs, length, kept_share(config, length, expected_share(config.budget, length)))
    return replace(row, expected_dense_ms=dense, expected_ms=sparse if row.decision is Decision.SPARSE else dense)


def _shape(row: SiteRow, config: TSAConfig) -> SiteShape | None:
    """The sizes of a call, as `SiteShape.of` reads them from tensors; None where they are symbolic."""
    dtype = getattr(torch, row.dtype, None)
    if not (len(row.query) == len(row.key) == len(row.value) == 4 and isinstance(dtype, torch.dtype)):
        return None
    sizes = (row.query[1], row.key[1], row.query[3], row.value[3])
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    heads, kv_heads, head_dim, value_head_dim = map(int, sizes)
    return SiteShape(
        batch=row.query[0] if isinstance(row.query[0], int) else 1, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        value_head_dim=value_head_dim, itemsize=dtype.itemsize, window=config.window,
        grouped=config.granularity == "group", counted=isinstance(config.budget, Coverage),
    )  # fmt: skip
