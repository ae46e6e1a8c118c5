"""What a study has found: every sample's outcome, by task, length and setting, as JSON.

Sample i is the same for every setting, so that differences are paired.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from tsa_compile.evaluation.running import Outcome
from tsa_compile.evaluation.settings import DENSE
from tsa_compile.files import write
from tsa_compile.saved import Saved

Key = tuple[str, int, str]


@dataclass(frozen=True)
class Cell:
    """One setting on one task at one length; item i of every tuple is sample i.

    Attributes:
        right: empty for a task that is scored by likelihood alone.
        nll, kl, kept, output: see running.Outcome.
        seconds: what the samples took, compilation included.
    """

    task: str
    length: int
    setting: str
    right: tuple[bool, ...] = ()
    nll: tuple[float, ...] = ()
    kl: tuple[float, ...] = ()
    kept: tuple[float, ...] = ()
    output: tuple[str, ...] = field(default=(), repr=False)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        sizes = {len(self.nll), len(self.kl), len(self.kept), len(self.output), len(self.right or self.nll)}
        if len(sizes) != 1:
            raise ValueError(f"{self.task}, {self.length}, {self.setting}: columns of {sorted(sizes)} samples")

    @property
    def key(self) -> Key:
        return self.task, self.length, self.setting

    @property
    def samples(self) -> int:
        return len(self.nll)

    @property
    def mean_kept(self) -> float:
        """The mean kept share; nan without samples."""
        return fmean(self.kept) if self.kept else math.nan

    def extended(self, outcomes: Iterable[Outcome], seconds: float) -> Cell:
        """A copy with more samples."""
        more = list(outcomes)
        right = tuple(item.right for item in more if item.right is not None)
        return replace(
            self,
            right=self.right + right,
            nll=self.nll + tuple(_rounded(item.nll) for item in more),
            kl=self.kl + tuple(_rounded(item.kl) for item in more),
            kept=self.kept + tuple(_rounded(item.kept) for item in more),
            output=self.output + tuple(item.output for item in more),
            seconds=round(self.seconds + seconds, 3),
        )


@dataclass(frozen=True)
class Study(Saved):
    """Cells in the order in which they were begun.

    Attributes:
        conditions: what must be the same for results to belong together: the model, the tokenizer, the text, the seed, ...
        settings: what each setting's name stands for.
        notes: what may differ between runs: device, versions.
    """

    conditions: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    cells: tuple[Cell, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    FORMAT = "tsa_compile.accuracy/1"
    KIND, WRITER, REMEDY = "a study of accuracy", "tsa-compile eval", "name another file, or delete this one"

    def find(self, task: str, length: int, setting: str) -> Cell:
        """The cell of that key; one without samples if none was run."""
        key = (task, length, setting)
        return next((cell for cell in self.cells if cell.key == key), Cell(*key))

    def dense(self, cell: Cell) -> Cell:
        """The dense cell on the same samples."""
        return self.find(cell.task, cell.length, DENSE.name)

    def names(self, what: str) -> list[Any]:
        """The different values of a cell's field, in the order of their first appearance."""
        return list(dict.fromkeys(getattr(cell, what) for cell in self.cells))

    def with_cell(self, cell: Cell) -> Study:
        """A copy with this cell in place of an earlier one of the same key."""
        if any(other.key == cell.key for other in self.cells):
            return replace(self, cells=tuple(cell if other.key == cell.key else other for other in self.cells))
        return replace(self, cells=(*self.cells, cell))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes this as JSON, a cell a line; see `Saved.save`."""
        values = self.to_dict()
        cells = ",\n".join(map(json.dumps, values.pop("cells")))
        write(path, f'{json.dumps(values, indent=1)[:-2]},\n "cells": [\n{cells}\n]\n}}\n')

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the inverse of `from_dict`. JSON has no NaN or infinity: they are None, and read as NaN."""
        return {
            "format": self.FORMAT, "conditions": dict(self.conditions), "settings": dict(self.settings),
            "notes": dict(self.notes), "cells": [finite(asdict(cell)) for cell in self.cells],
        }  # fmt: skip

    @classmethod
    def _read(cls, values: Mapping[str, Any]) -> Study:
        cells = tuple(_cell(cell) for cell in values["cells"])
        return cls(dict(values["conditions"]), dict(values["settings"]), cells, dict(values["notes"]))


_TEXTS, _NUMBERS = ("task", "setting", "output"), ("nll", "kl", "kept", "seconds")


def _cell(values: Mapping[str, Any]) -> Cell:
    fields: dict[str, Any] = {}
    for name, value in values.items():
        fields[name] = _column(name, value) if isinstance(value, list) else _entry(name, value)
    return Cell(**fields)


def _column(name: str, values: list[Any]) -> tuple[Any, ...]:
    if name not in ("right", "nll", "kl", "kept", "output"):
        raise TypeError(f"{name} is a list")
    return tuple(_entry(name, value) for value in values)


def _entry(name: str, value: Any) -> Any:
    """A value of a column, or of a field that is no column; TypeError where it is of another type."""
    wanted = str if name in _TEXTS else (int, float) if name in _NUMBERS else bool if name == "right" else int
    if value is None and name in _NUMBERS:
        return math.nan
    if not isinstance(value, wanted) or (isinstance(value, bool) and name != "right"):
        raise TypeError(f"{name} is {value!r}")
    return float(value) if name in _NUMBERS else value


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
