"""A study's results: outcomes as JSON, tables and figures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tsa_compile.errors import ConfigError
from tsa_compile.evaluation import figure, tables
from tsa_compile.evaluation.outcomes import Cell, LayerRow, Outcomes, Timing
from tsa_compile.saved import Saved


@dataclass(frozen=True)
class Study(Outcomes, Saved):
    """Outcomes that grow, are shown as tables and figures, and are kept as JSON."""

    FORMAT = "tsa_compile.study/1"
    KIND, WRITER, REMEDY = "a study", "a study", "run the study again"
    FOLDERS = True

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

    def table(self) -> str:
        """Accuracy by task, length and method, in Markdown."""
        return tables.accuracy_tables(self)

    def markdown(self) -> str:
        """Everything, in Markdown: accuracy, kept shares, needle survival, times."""
        return tables.report(self)

    def figure(self, path: str | os.PathLike[str]) -> None:
        """Draws accuracy against the kept share and against attention time; needs matplotlib."""
        figure.draw(self, path)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the inverse of `from_dict`."""
        return {
            "format": self.FORMAT, "conditions": dict(self.conditions), "notes": dict(self.notes),
            "cells": [{**asdict(cell), "right": _pack(cell.right)} for cell in self.cells],
            "times": [asdict(time) for time in self.times],
        }  # fmt: skip

    @classmethod
    def _read(cls, values: Mapping[str, Any]) -> Study:
        cells = tuple(_cell(cell) for cell in values["cells"])
        times = tuple(Timing(**time) for time in values["times"])
        return cls(dict(values["conditions"]), cells, times, dict(values["notes"]))


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
