"""What a study has found: cells with every sample's outcome, times, and how to ask for them.

A cell is one method on one task at one length. Outcomes are kept sample by sample, because sample i is the same for every
method: McNemar's test needs the pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tsa_compile.evaluation.statistics import Comparison, Share, compare, wilson

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
        return statistics.fmean([row.keep for row in self.layers] or [1.0])

    @property
    def survival(self) -> float:
        """Mean share of the evidence that the sparse layers select; 1 where none is sparse."""
        return statistics.fmean([row.survival for row in self.layers] or [1.0])


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
class Outcomes:
    """Cells and times, in the order in which they were made.

    Attributes:
        conditions: what must be the same for results to belong together: the model, the seed, the number of samples, ...
        notes: what may differ between machines: device, versions.
    """

    conditions: Mapping[str, Any]
    cells: tuple[Cell, ...] = ()
    times: tuple[Timing, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

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


def kept(cells: Iterable[Cell]) -> float:
    """The mean kept share of several cells."""
    return statistics.fmean(cell.keep for cell in cells)


def pooled(cells: Iterable[Cell]) -> list[bool]:
    """Every sample's outcome in several cells."""
    return [outcome for cell in cells for outcome in cell.right]
