"""What a study has found: cells with every sample's outcome, times, and how they are kept as JSON.

A cell is one method on one task at one length. Outcomes are kept sample by sample, because sample i is the same for every
method: McNemar's test needs the pairs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.statistics import Comparison, Share, compare, wilson
from tsa_compile.files import read_json, write

FORMAT = "tsa_compile.study/1"
BASELINE = "dense"


@dataclass(frozen=True)
class LayerRow:
    """One sparse layer in one cell.

    Attributes:
        keep, keep_low, keep_high: share of the tokens kept: mean, least and most over samples.
        survival: share of the evidence tokens selected, mean over heads and samples.
        survival_wrong: the same over the samples answered wrong; None if there are none.
    """

    layer: int
    keep: float
    keep_low: float
    keep_high: float
    survival: float
    survival_wrong: float | None


@dataclass(frozen=True)
class Cell:
    """One method on one task at one length, over all samples.

    Attributes:
        right: for each sample whether every answer was right.
        answers: share of the single answers that were right.
        layers: the sparse layers, first to last.
        seconds: what the cell took, compilation included.
    """

    task: str
    length: int
    method: str
    question: str
    right: tuple[bool, ...] = field(repr=False)
    answers: float
    layers: tuple[LayerRow, ...]
    seconds: float

    @property
    def key(self) -> tuple[str, int, str, str]:
        return self.task, self.length, self.method, self.question

    @property
    def accuracy(self) -> Share:
        """The share of right samples, with Wilson's interval."""
        return wilson(sum(self.right), len(self.right))

    @property
    def keep(self) -> float:
        """Mean share of the tokens kept in the sparse layers; 1 where none is sparse."""
        return _mean([row.keep for row in self.layers], 1.0)

    @property
    def survival(self) -> float:
        """Mean share of the evidence that the sparse layers select; 1 where none is sparse."""
        return _mean([row.survival for row in self.layers], 1.0)


@dataclass(frozen=True)
class Timing:
    """What a method's prefill takes at one length; milliseconds, medians.

    Attributes:
        attention_ms: all layers' attention, selection included.
        prefill_ms: the whole compiled model; None if it was not measured.
        predicted_ms: attention_ms as costs/calls.py foresees it at the kept share; None on a device without costs.
        keep: the share of the tokens that the sparse layers kept.
    """

    method: str
    length: int
    batch: int
    attention_ms: float
    prefill_ms: float | None
    predicted_ms: float | None
    keep: float


@dataclass(frozen=True)
class Study:
    """Results, in the order in which they were made.

    Attributes:
        conditions: what must be the same for results to belong together: the model, the seed, the number of samples, ...
        notes: what may differ between machines: device, versions.
    """

    conditions: Mapping[str, Any]
    cells: tuple[Cell, ...] = ()
    times: tuple[Timing, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    def with_cell(self, cell: Cell) -> Study:
        """A copy with one more cell."""
        return replace(self, cells=(*self.cells, cell))

    def with_time(self, time: Timing) -> Study:
        """A copy with one more time, which replaces an earlier one of the same method and length."""
        kept = [other for other in self.times if (other.method, other.length) != (time.method, time.length)]
        return replace(self, times=(*kept, time))

    def joined(self, other: Study) -> Study:
        """A copy with the cells and times of another part of the same study; what both have is this one's.

        Raises:
            ConfigError: the other was made under other conditions.
        """
        names = {*self.conditions, *other.conditions}
        different = sorted(name for name in names if self.conditions.get(name) != other.conditions.get(name))
        if different:
            raise ConfigError(f"parts of a study differ in {', '.join(different)}: join parts of one model and one plan")
        keys = {cell.key for cell in self.cells}
        timed = {(time.method, time.length) for time in self.times}
        cells = [cell for cell in other.cells if cell.key not in keys]
        times = [time for time in other.times if (time.method, time.length) not in timed]
        return replace(self, cells=(*self.cells, *cells), times=(*self.times, *times), notes={**other.notes, **self.notes})

    def find(self, task: str, length: int, method: str, question: str = "last") -> Cell | None:
        """The cell of that key; None if it was not run."""
        return next((cell for cell in self.cells if cell.key == (task, length, method, question)), None)

    def names(self, what: str) -> list[Any]:
        """The different values of a cell's field, in the order of their first appearance."""
        return list(dict.fromkeys(getattr(cell, what) for cell in self.cells))

    def select(self, *, length: int, method: str, question: str = "last") -> list[Cell]:
        """The cells of one method at one length, one for each task."""
        wanted = (length, method, question)
        return [cell for cell in self.cells if (cell.length, cell.method, cell.question) == wanted]

    def against_dense(self, cells: Iterable[Cell]) -> Comparison | None:
        """Cells of one method, pooled, against dense on the same samples; None without a dense cell for each."""
        method: list[bool] = []
        dense: list[bool] = []
        for cell in cells:
            base = self.find(cell.task, cell.length, BASELINE, cell.question)
            if base is None:
                return None
            method += cell.right
            dense += base.right
        return compare(method, dense) if method else None

    def table(self) -> str:
        """Accuracy by task, length and method, in Markdown."""
        from tsa_compile.evaluation.tables import accuracy_tables

        return accuracy_tables(self)

    def markdown(self) -> str:
        """Everything, in Markdown: accuracy, kept shares, needle survival, times."""
        from tsa_compile.evaluation.tables import report

        return report(self)

    def figure(self, path: str | os.PathLike[str]) -> None:
        """Draws accuracy against the kept share and against attention time; needs matplotlib."""
        from tsa_compile.evaluation.figure import draw

        draw(self, path)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the inverse of `from_dict`."""
        return {
            "format": FORMAT, "conditions": dict(self.conditions), "notes": dict(self.notes),
            "cells": [{**asdict(cell), "right": _pack(cell.right)} for cell in self.cells],
            "times": [asdict(time) for time in self.times],
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Study:
        """Reads what `to_dict` wrote.

        Raises:
            ConfigError: something is missing or of another form.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, Mapping) else type(values).__name__
            raise ConfigError(f"found format {found!r}, expected {FORMAT!r}: pass a file that a study wrote")
        try:
            cells = tuple(_cell(cell) for cell in values["cells"])
            times = tuple(Timing(**time) for time in values["times"])
            return cls(dict(values["conditions"]), cells, times, dict(values["notes"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"a value is not what was saved ({type(error).__name__}: {error}): run the study again"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes this study as JSON, whole or not at all: a run that is stopped while it writes loses nothing.

        Raises:
            ConfigError: no file can be written there.
            WriteError: it could not be written whole; what was there is as it was.
        """
        write(path, json.dumps(self.to_dict(), indent=1) + "\n", folders=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Study:
        """Reads what `save` wrote.

        Raises:
            ConfigError: the file cannot be read, or is no study.
        """
        values = read_json(path, "pass a file that a study wrote")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{str(path)!r} is not a study: {error}") from error


def _cell(values: Mapping[str, Any]) -> Cell:
    layers = tuple(LayerRow(**row) for row in values["layers"])
    return Cell(**{**values, "right": _unpack(values["right"]), "layers": layers})


def _pack(right: tuple[bool, ...]) -> str:
    """Outcomes as "number of samples:hexadecimal", the first sample being the highest bit."""
    bits = "".join("01"[outcome] for outcome in right)
    return f"{len(right)}:{int(bits or '0', 2):x}"


_MOST_SAMPLES = 10**7  # of a cell: a damaged file must not fill the memory


def _unpack(text: str) -> tuple[bool, ...]:
    count, _, digits = text.partition(":")
    samples = int(count)
    if not 0 <= samples <= _MOST_SAMPLES:
        raise ValueError(f"{samples} samples, of at most {_MOST_SAMPLES}")
    bits = f"{int(digits, 16):0{samples}b}" if samples else ""
    if len(bits) != samples:
        raise ValueError(f"{len(bits)} outcomes for {samples} samples")
    return tuple(bit == "1" for bit in bits)


def _mean(values: list[float], empty: float) -> float:
    return sum(values) / len(values) if values else empty
