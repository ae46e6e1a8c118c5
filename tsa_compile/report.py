"""What the compiler did, and why: one row per attention call, a table to read and JSON to keep.

Every compilation records its `RewriteReport`. `reports()` returns the last ones, the newest at the end.
"""

from __future__ import annotations

import json
import re
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import torch

from tsa_compile.errors import ConfigError
from tsa_compile.reasons import Decision, Reason
from tsa_compile.text import Shown, as_text, new_table, number, spans, wrapped

MAX_REPORTS = 256


@dataclass(frozen=True)
class CallRow:
    """One attention call.

    Shapes hold an int for each static dimension and the expression's text for each symbolic one. `mask` is what the mask was
    proven to be, `form` how the model computes attention ("sdpa", "eager", "flex", "other"), `kernel` what runs the call
    now. Where a device's costs were asked for, `expected_dense_ms` and `expected_ms` are the expected times of the call,
    dense and as decided. `budget` is how much a sparse call keeps, as ("keep_ratio", 0.3), where layers have a budget each.
    `window` is how many tokens each row of a call sees that runs over a window.
    """

    index: int
    layer: str
    layer_index: int | None
    query: tuple[int | str, ...]
    key: tuple[int | str, ...]
    value: tuple[int | str, ...]
    dtype: str
    form: str
    mask: str
    decision: Decision
    reason: Reason
    kernel: str
    detail: str = ""
    expected_dense_ms: float | None = None
    expected_ms: float | None = None
    budget: tuple[str, float] | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            object.__setattr__(self, "budget", tuple(self.budget))
        for name in ("query", "key", "value"):
            shape = tuple(dim if type(dim) is int else str(dim) for dim in getattr(self, name))
            object.__setattr__(self, name, shape)
        object.__setattr__(self, "decision", Decision(self.decision))
        object.__setattr__(self, "reason", Reason(self.reason))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        row = {f.name: getattr(self, f.name) for f in fields(self)}
        row = {name: value for name, value in row.items() if value is not None or name == "layer_index"}
        for name in ("query", "key", "value"):
            row[name] = list(row[name])
        return row | {"decision": str(self.decision), "reason": str(self.reason)}


@dataclass(frozen=True)
class RewriteReport(Shown):
    """What one compilation did: a row per attention call, the config it followed and notes on the whole graph.

    `expected` is empty, or names the "device" of the rows' expected times and the "break_even" length, from which calls
    become sparse there (None: at no length).
    """

    rows: tuple[CallRow, ...]
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()
    torch_version: str = str(torch.__version__)
    expected: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "notes", tuple(self.notes))

    def __len__(self) -> int:
        return len(self.rows)

    def __bool__(self) -> bool:
        return True  # a report without attention calls is still a report

    def __iter__(self) -> Iterator[CallRow]:
        return iter(self.rows)

    def count(self, decision: Decision) -> int:
        """How many calls met this decision."""
        return sum(row.decision is decision for row in self.rows)

    @property
    def is_prefill(self) -> bool:
        """Whether a call has several queries, or a number of them that varies."""
        return any(len(row.query) > 1 and row.query[-2] != 1 for row in self.rows)

    @property
    def sparse(self) -> int:
        """Calls rewritten to token sparse attention."""
        return self.count(Decision.SPARSE)

    @property
    def dense(self) -> int:
        """Dense calls whose mask was proven causal and removed."""
        return self.count(Decision.DENSE)

    @property
    def dense_padded(self) -> int:
        """Dense calls whose mask was proven causal and padding, and replaced by the padding mask."""
        return self.count(Decision.DENSE_PADDED)

    @property
    def unchanged(self) -> int:
        """Calls left as the model wrote them."""
        return self.count(Decision.UNCHANGED)

    @property
    def sparse_calls(self) -> tuple[CallRow, ...]:
        """The rows of the sparse calls."""
        return tuple(row for row in self.rows if row.decision is Decision.SPARSE)

    @property
    def expected_dense_ms(self) -> float | None:
        """What all calls with an expected time would take dense; None if no call has one."""
        return self._expected("expected_dense_ms")

    @property
    def expected_ms(self) -> float | None:
        """What all calls with an expected time take as decided; None if no call has one."""
        return self._expected("expected_ms")

    def _expected(self, name: str) -> float | None:
        known = [value for row in self.rows if (value := getattr(row, name)) is not None]
        return sum(known) if known else None

    @property
    def summary(self) -> str:
        """One line: how many calls met which decision."""
        if not self.rows:
            return "no attention calls found"
        parts = [
            (self.sparse, "sparse"),
            (self.dense, "dense with the mask removed"),
            (self.dense_padded, "dense with padding and no L x L mask"),
            (self.count(Decision.WINDOW), "dense over a window and no L x L mask"),
            (self.count(Decision.KERNEL), "over all tokens by the configured kernel"),
            (self.unchanged, "unchanged"),
        ]
        said = [f"{count} {what}" for count, what in parts if count]
        calls = "attention call" if len(self) == 1 else "attention calls"
        first_count, _, first_what = said[0].partition(" ")
        return ", ".join([f"{first_count} of {len(self)} {calls} {first_what}", *said[1:]])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, one entry per call."""
        rows = [row.to_dict() for row in self.rows]
        values = {"rows": rows, "config": self.config, "notes": list(self.notes), "torch_version": self.torch_version}
        return values | ({"expected": self.expected} if self.expected else {})

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> RewriteReport:
        """Reads what `to_json` or `to_dict` wrote; ConfigError for anything else."""
        try:
            values = json.loads(text) if isinstance(text, str) else text
            if not all(isinstance(values.get(name, {}), Mapping) for name in ("config", "expected")):
                raise TypeError("its config is no mapping")
            length = values.get("expected", {}).get("break_even")
            if length is not None and (isinstance(length, bool) or not isinstance(length, int)):
                raise TypeError(f"its break_even is {length!r}, no number of tokens")
            return cls(**{**values, "rows": tuple(CallRow(**row) for row in values["rows"])})
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"no report can be read ({error!r}): pass what RewriteReport.to_json wrote") from error

    def _text(self, width: int | None) -> str:
        """A table in which like layers share a row, a summary, and a legend of the reasons.

        With a width the table says what was decided and why, without masks, shapes and kernels.
        """
        lines = [self.summary, *_sight(self), *_expectation(self)]
        for reason in dict.fromkeys(row.reason for row in self.rows if row.reason is not Reason.SPARSE):
            details = dict.fromkeys(row.detail for row in self.rows if row.reason is reason and row.detail)
            short = "" if width is None else "; ".join([*details][:1] + ["..."] * (len(details) > 1))
            lines.append(reason.said(" ".join(short.split())))
        lines.extend(f"note: {note}" for note in self.notes)
        table = [_table(self.rows, width)] if self.rows else []
        return "\n".join(table + (lines if width is None else wrapped(lines, width)))


def _sight(report: RewriteReport) -> list[str]:
    """What the rows of sparse calls see."""
    if not report.sparse or "budget" not in report.config:
        return []
    budgets = dict.fromkeys(row.budget for row in report.rows if row.budget is not None)
    chosen = " or ".join(_budget_words(*budget) for budget in budgets or report.config["budget"].items())
    floor = report.config.get("floor")
    if floor is None:
        return [f"sparse: the rows that {chosen} selects see each other; all other rows become 0 (floor=None, as published)"]
    near = f"the last {floor['window']} tokens and the first {floor['sinks']}"
    return [f"sparse: every row sees {near}; the rows that {chosen} selects see each other as well"]


def _budget_words(kind: str, amount: float) -> str:
    return f"KeepRatio({amount:g})" if kind == "keep_ratio" else f"Coverage({amount:g})"


def _expectation(report: RewriteReport) -> list[str]:
    """What is expected of all calls together, and from which length on calls become sparse; nothing if nothing is known."""
    said = []
    dense, now = report.expected_dense_ms, report.expected_ms
    if dense is not None and now:
        calls = sum(row.expected_ms is not None for row in report.rows)
        said.append(
            f"attention of {calls} calls: {number(dense)} ms dense, {number(now)} ms as decided ({dense / now:.2f}x)"
        )
    if "break_even" in report.expected:
        length = report.expected["break_even"]
        said.append(
            "calls become sparse at no length" if length is None else f"calls become sparse from {length:,} tokens on"
        )
    return [f"expected on {report.expected.get('device', '?')}: {', '.join(said)}"] if said else []


def _table(rows: tuple[CallRow, ...], width: int | None) -> str:
    if width is None:
        return _wide_table(rows)
    table = new_table("layer", "calls", "decision", "reason", right=("calls",), fold=("layer",))
    for group in _collapse(rows):
        table.add_row(_name(group), f"x{len(group)}", _decided(group[0]), str(group[0].reason))
    return as_text(table, width)


def _wide_table(rows: tuple[CallRow, ...]) -> str:
    timed, detailed = any(row.expected_ms is not None for row in rows), any(row.detail for row in rows)
    names = ("layer", "calls", "query", "key", "value", "dtype", "form", "mask", "decision", "reason", "kernel")
    times = ("dense ms", "expected ms")
    table = new_table(*names, *(times if timed else ()), right=("calls", *times))
    if detailed:
        table.add_column("detail", max_width=60, overflow="fold")  # may be a whole error message
    for group in _collapse(rows):
        detail = [" ".join(group[0].detail.split())] if detailed else []
        table.add_row(*_cells(group), *(_times(group[0]) if timed else ()), *detail)
    return as_text(table)


def _collapse(rows: tuple[CallRow, ...]) -> list[list[CallRow]]:
    """Neighbouring rows that differ in the layer's number alone, together."""

    def likeness(row: CallRow) -> object:
        before, _, after = _split(row)
        return before, after, replace(row, index=0, layer="", layer_index=None)

    return [list(group) for _, group in groupby(rows, key=likeness)]


def _split(row: CallRow) -> tuple[str, str, str]:
    """A layer name around its number: ("model.layers.", "15", ".self_attn"); without a number, ("name", "", "")."""
    found = list(re.finditer(r"\d+", row.layer))
    own = [match for match in found if row.layer_index is not None and int(match[0]) == row.layer_index]
    if not found:
        return row.layer, "", ""
    match = (own or found)[0]
    return row.layer[: match.start()], match[0], row.layer[match.end() :]


def _cells(group: list[CallRow]) -> list[str]:
    row = group[0]
    shapes = [f"[{', '.join(map(str, shape))}]" for shape in (row.query, row.key, row.value)]
    cells = [_name(group), f"x{len(group)}", *shapes, row.dtype, row.form, row.mask]
    return [*cells, _decided(row), str(row.reason), row.kernel]


def _decided(row: CallRow) -> str:
    return str(row.decision) if row.budget is None else f"{row.decision} {_budget_words(*row.budget)}"


def _times(row: CallRow) -> list[str]:
    dense, now = row.expected_dense_ms, row.expected_ms
    if dense is None or not now:
        return ["", ""]
    return [number(dense), f"{number(now)} ({dense / now:.2f}x)"]


def _name(group: list[CallRow]) -> str:
    """The name with the group's numbers, as in model.layers.0..15.self_attn; gaps are kept: 0..3,5."""
    before, first, after = _split(group[0])
    if not first:
        return before or "?"
    return before + spans(int(_split(row)[1]) for row in group) + after


_history: deque[RewriteReport] = deque(maxlen=MAX_REPORTS)
_lock = threading.Lock()


def record(report: RewriteReport) -> None:
    """Appends to the history; the oldest report leaves it when there are more than `MAX_REPORTS`."""
    with _lock:
        _history.append(report)


def reports(*, prefill: bool = False) -> list[RewriteReport]:
    """The reports of this process's compilations, newest last.

    Args:
        prefill: leave out the graphs of decode steps, and graphs without attention.
    """
    with _lock:
        return [report for report in _history if report.is_prefill or not prefill]


def clear_reports() -> None:
    """Empties the history."""
    with _lock:
        _history.clear()
