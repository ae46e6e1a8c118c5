"""`bench(model, lengths)`: the time of a prefill, dense, exact and sparse, side by side in one run.

    eager       the model as it is
    compile     torch.compile(model)
    exact       torch.compile(model, backend="tsa"), no layer sparse
    sparse      torch.compile(model, backend="tsa"), with the configuration

All modes are compiled first; then they take turns, in changing order, so that a change of clocks or a busy machine meets
all alike. A mode's figure is the median of its rounds, its speed relative to the first mode's. An `attention_mask` of ones
is passed, as every tokenizer does. Speed is claimed on GPUs only: a CPU's figures say that something runs, no more.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tsa_compile.config import Coverage, TSAConfig
from tsa_compile.errors import ConfigError
from tsa_compile.files import new_figure, save_figure
from tsa_compile.progress import Progress
from tsa_compile.report import reports
from tsa_compile.shapes import prompts

MODES = ("eager", "compile", "exact", "sparse")
_WORDS = {"eager": "eager", "compile": "torch.compile", "exact": 'backend="tsa", exact'}


@dataclass(frozen=True)
class Measurement:
    """One mode at one length.

    Attributes:
        ms: median milliseconds of a prefill; None where memory ran out.
        range_ms: the fastest and the slowest round.
        speed: time of the first mode divided by this one's.
        peak_gib: peak memory above what was allocated before, on CUDA.
        first_call_s: seconds of the first call at this length, compilation included.
        sparse_calls: attention calls that became sparse; None where nothing was rewritten.
    """

    mode: str
    length: int
    ms: float | None
    range_ms: tuple[float, float] | None = None
    speed: float | None = None
    peak_gib: float | None = None
    first_call_s: float | None = None
    sparse_calls: int | None = None
    error: str = ""


@dataclass(frozen=True)
class Benchmark:
    """The rows of a run, and the conditions under which they were measured."""

    rows: tuple[Measurement, ...]
    conditions: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths, ascending."""
        return tuple(sorted({row.length for row in self.rows}))

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes, in the order in which they were asked for."""
        return tuple(dict.fromkeys(row.mode for row in self.rows))

    def row(self, mode: str, length: int) -> Measurement:
        """One cell; KeyError where it was not measured."""
        for row in self.rows:
            if (row.mode, row.length) == (mode, length):
                return row
        raise KeyError((mode, length))

    def words(self, mode: str) -> str:
        """A mode as a reader should see it."""
        return _WORDS.get(mode) or f'backend="tsa", {_budget_words(TSAConfig.from_json(self.conditions["config"]))}'

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"conditions": self.conditions, "rows": [asdict(row) for row in self.rows]}

    def to_json(self) -> str:
        """The rows and the conditions as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def plot(self, path: str | Path) -> None:
        """A figure of speed relative to the first mode, by length. Needs matplotlib."""
        _plot(self, path)

    def __str__(self) -> str:
        head = ["", *(_length_words(length) for length in self.lengths)]
        lines = [[self.words(mode), *(_cell(self.row(mode, length)) for length in self.lengths)] for mode in self.modes]
        widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in [head, *lines]
        )


def bench(
    model: Any,
    lengths: Sequence[int],
    *,
    config: TSAConfig | None = None,
    modes: Sequence[str] = ("eager", "exact", "sparse"),
    batch: int = 1,
    rounds: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Benchmark:
    """Measures a causal language model of transformers where its weights are. Resets Dynamo before and after.

    Args:
        model: in evaluation mode.
        lengths: prompt lengths; with several, the length is dynamic, so that one compilation serves all.
        config: of the modes "exact" (its compiler) and "sparse"; the defaults if None.
        modes: some of `MODES`; speeds are relative to the first.
        rounds: at least so many timed calls of each mode at each length, and more where they are short.
        progress: is told about every step.

    Raises:
        ConfigError: a mode that does not exist, or no lengths.
    """
    config = TSAConfig() if config is None else config
    lengths = check_request(lengths, modes, rounds)
    call = {} if progress is None else {"progress": progress}
    rows: list[Measurement] = []
    torch._dynamo.reset()
    try:
        # Every mode compiles the same code once or more: all of them count towards Dynamo's limit.
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8 * len(modes) * max(1, len(lengths))):
            runs = {mode: _compiled(model, mode, config) for mode in modes}
            for number, length in enumerate(lengths):
                rows += _Length(model, length, batch, len(lengths) > 1, seed).measure(
                    runs, rounds, done=number * 2 * len(modes), total=len(lengths) * 2 * len(modes), **call
                )
    finally:
        torch._dynamo.reset()
    return Benchmark(tuple(rows), _conditions(model, config, batch, rounds))


def check_request(lengths: Sequence[int], modes: Sequence[str], rounds: int) -> list[int]:
    """The lengths, ascending, once it is clear that they and the modes can be measured; ConfigError otherwise."""
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes or len(set(modes)) < len(modes):
        raise ConfigError(f"modes={list(modes)} is not allowed: modes must be some of {', '.join(MODES)}, each once")
    if not lengths or min(lengths) < 1:
        raise ConfigError(f"lengths={list(lengths)} is not allowed: at least one length >= 1 is needed")
    if rounds < 1:
        raise ConfigError(f"rounds={rounds} is not allowed: rounds must be at least 1")
    return sorted(set(lengths))


def _compiled(model: Any, mode: str, config: TSAConfig) -> Callable[..., Any]:
    if mode == "eager":
        return model
    if mode == "compile":
        return torch.compile(model, backend=config.compiler)
    chosen = config.replace(layers=()) if mode == "exact" else config
    options: dict[str, Any] = {"config": chosen}
    return torch.compile(model, backend="tsa", options=options)


def _conditions(model: Any, config: TSAConfig, batch: int, rounds: int) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": str(torch.__version__),
        "model": type(model).__name__,
        "layers": model.config.get_text_config().num_hidden_layers,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "batch": batch,
        "rounds": rounds,
        "config": config.to_dict(),
    }


class _Length:
    """All modes at one length, which take turns."""

    def __init__(self, model: Any, length: int, batch: int, dynamic: bool, seed: int) -> None:
        self.device = next(model.parameters()).device
        self.model, self.length, self.batch, self.dynamic, self.seed = model, length, batch, dynamic, seed
        self.times: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}
        self.first: dict[str, float] = {}
        self.sparse: dict[str, int] = {}
        self.errors: dict[str, str] = {}

    def measure(
        self,
        runs: dict[str, Callable[..., Any]],
        rounds: int,
        done: int,
        total: int,
        progress: Progress = lambda text, done, total: None,
    ) -> list[Measurement]:
        """First every mode's first call, then the turns."""
        for mode, run in runs.items():
            progress(f"{mode} at {_length_words(self.length)}: first call", done, total)
            self._first_call(mode, run)
            done += 1
        while not self._enough(rounds):
            turn = max((len(times) for times in self.times.values()), default=0)
            names = list(self.times)
            start = turn % len(names)
            share = min(len(runs), int(len(runs) * turn / rounds))
            progress(f"{_length_words(self.length)}: round {turn + 1}", done + share, total)
            for mode in names[start:] + names[:start]:
                self._turn(mode, runs[mode], turn)
        progress(_length_words(self.length), done + len(runs), total)
        return [self._row(mode, next(iter(runs))) for mode in runs]

    def _inputs(self, turn: int) -> dict[str, Any]:
        """Other random tokens in every round."""
        ids = prompts(self.model.config, self.batch, self.length, self.device, self.seed + turn)
        mask = torch.ones_like(ids)
        if self.dynamic:
            torch._dynamo.maybe_mark_dynamic(ids, 1)
            torch._dynamo.maybe_mark_dynamic(mask, 1)
        return {"input_ids": ids, "attention_mask": mask, "logits_to_keep": 1}

    def _first_call(self, mode: str, run: Callable[..., Any]) -> None:
        before = len(reports())
        started = time.perf_counter()
        if self._call(mode, run, -1) is None:
            return
        self.first[mode] = time.perf_counter() - started
        self.times[mode] = []
        made = reports()[before:]
        if made and mode in ("exact", "sparse"):
            self.sparse[mode] = sum(report.sparse for report in made)

    def _turn(self, mode: str, run: Callable[..., Any], turn: int) -> None:
        milliseconds = self._call(mode, run, turn)
        if milliseconds is not None:
            self.times[mode].append(milliseconds)

    def _call(self, mode: str, run: Callable[..., Any], turn: int) -> float | None:
        """Milliseconds of one prefill; None where memory ran out, which ends the mode at this length."""
        cuda = self.device.type == "cuda"
        inputs = self._inputs(turn)
        try:
            if cuda:
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
                before = torch.cuda.memory_allocated(self.device)
            started = time.perf_counter()
            run(**inputs)
            if cuda:
                torch.cuda.synchronize(self.device)
            milliseconds = 1e3 * (time.perf_counter() - started)
            if cuda and turn >= 0:
                peak = torch.cuda.max_memory_allocated(self.device) - before
                self.peaks[mode] = max(self.peaks.get(mode, 0), peak)
            return milliseconds
        except torch.OutOfMemoryError as error:
            self.errors[mode] = f"out of memory: {str(error).split('.')[0]}"
            self.times.pop(mode, None)
        torch.cuda.empty_cache()  # outside of the handler, which holds the failed call's tensors
        return None

    def _enough(self, rounds: int) -> bool:
        """Short calls are noisy: up to 20 of them, until each mode had 0.4 seconds."""
        return all(
            len(times) >= rounds and (len(times) >= 20 or sum(times) >= 400 or rounds == 1) for times in self.times.values()
        )

    def _row(self, mode: str, base: str) -> Measurement:
        if mode not in self.times:
            return Measurement(mode, self.length, None, error=self.errors[mode])
        times = self.times[mode]
        middle = statistics.median(times)
        return Measurement(
            mode,
            self.length,
            round(middle, 3),
            range_ms=(round(min(times), 3), round(max(times), 3)),
            speed=round(statistics.median(self.times[base]) / middle, 4) if base in self.times else None,
            peak_gib=round(self.peaks[mode] / 2**30, 3) if mode in self.peaks else None,
            first_call_s=round(self.first[mode], 4),
            sparse_calls=self.sparse.get(mode),
        )


def _budget_words(config: TSAConfig) -> str:
    budget = config.budget
    return f"coverage {budget.tau:g}" if isinstance(budget, Coverage) else f"keep {budget.ratio:g}"


def _length_words(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _cell(row: Measurement) -> str:
    if row.ms is None:
        return "out of memory"
    text = f"{row.ms:,.{0 if row.ms >= 100 else 1 if row.ms >= 10 else 2}f} ms"
    text += "" if row.speed is None else f" ({row.speed:.2f}x)"
    return text + ("" if row.peak_gib is None else f", {row.peak_gib:.1f} GiB")


def _plot(result: Benchmark, path: str | Path) -> None:
    figure = new_figure(figsize=(6, 4))
    axes = figure.subplots()
    for mode in result.modes:
        rows = [result.row(mode, length) for length in result.lengths]
        points = [(row.length, row.speed) for row in rows if row.speed is not None]
        if points:
            axes.plot(*zip(*points), marker="o", label=result.words(mode))
    axes.set_xscale("log", base=2)
    axes.set_xticks(result.lengths, [_length_words(length) for length in result.lengths])
    axes.minorticks_off()
    axes.set_xlabel("prompt length")
    axes.set_ylabel(f"prefill speed, {result.words(result.modes[0])} = 1")
    axes.set_title(
        f"{result.conditions['model']}, {result.conditions['layers']} layers, {result.conditions['device']}", size=9
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path, dpi=150)
