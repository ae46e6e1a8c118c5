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

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tsa_compile.config import Coverage, TSAConfig, check_int, given
from tsa_compile.errors import ConfigError, check_inference, check_list
from tsa_compile.evaluation.cached import check_model
from tsa_compile.evaluation.limits import check_positions
from tsa_compile.files import new_figure, save_figure
from tsa_compile.progress import Progress
from tsa_compile.report import reports
from tsa_compile.shapes import prompts
from tsa_compile.text import Shown, as_text, new_table, wrapped

MODES = ("eager", "compile", "exact", "sparse")
_WORDS = {"eager": "eager", "compile": "torch.compile", "exact": 'backend="tsa", exact'}
_COLOURS = {"eager": "0.45", "compile": "0.7", "exact": "tab:blue", "sparse": "tab:orange"}


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
class Benchmark(Shown):
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

    def plot(self, path: str | Path) -> None:
        """A figure of speed relative to the first mode: a line for each by length; of one length, a bar for each.

        Needs matplotlib.
        """
        figure = new_figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for position, mode in enumerate(self.modes):
            rows = [self.row(mode, length) for length in self.lengths]
            points = [(row.length, row.speed) for row in rows if row.speed is not None]
            style: dict[str, Any] = {"color": _COLOURS[mode], "label": self.words(mode)}
            if points and len(self.lengths) > 1:
                axes.plot(*zip(*points), marker="o", **style)
            elif points:
                axes.bar(position, points[0][1], **style)
        if len(self.lengths) > 1:
            axes.set_xscale("log", base=2)
            axes.set_xticks(self.lengths, [_length_words(length) for length in self.lengths])
            axes.minorticks_off()
            axes.set_xlabel("prompt length")
        else:
            axes.set_xticks(range(len(self.modes)), self.modes)
            axes.set_xlabel(f"a prompt of {_length_words(self.lengths[0])} tokens")
        axes.set_ylabel(f"prefill speed, {self.words(self.modes[0])} = 1")
        axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
        axes.set_title(
            f"{self.conditions['model']}, {self.conditions['layers']} layers, {self.conditions['device']}", size=9
        )
        axes.legend(loc="upper left", fontsize=8)
        axes.grid(alpha=0.3)
        save_figure(figure, path, dpi=150)

    def _text(self, width: int | None) -> str:
        """With a width: where a column for each length is too wide, a row for each."""
        table = self._table()
        if width is None:
            return f"{table}\n{self._first_calls()}"
        if max(map(len, table.splitlines())) > width:
            rows = new_table("tokens", "mode", "prefill", right=("tokens",), fold=("mode", "prefill"))
            for length in self.lengths:
                for mode in self.modes:
                    rows.add_row(_length_words(length), self.words(mode), _cell(self.row(mode, length)))
            table = as_text(rows, width)
        return "\n".join([table, *wrapped([self._first_calls()], width)])

    def _table(self) -> str:
        table = new_table("", *map(_length_words, self.lengths))
        for mode in self.modes:
            table.add_row(self.words(mode), *(_cell(self.row(mode, length)) for length in self.lengths))
        return as_text(table)

    def _first_calls(self) -> str:
        """What compiling takes: each mode's longest first call."""
        longest = {mode: max(row.first_call_s or 0.0 for row in self.rows if row.mode == mode) for mode in self.modes}
        return "first call, which compiles: " + ", ".join(f"{self.words(mode)} {longest[mode]:.3g} s" for mode in self.modes)


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
        model: a causal language model of transformers, in evaluation mode.
        lengths: prompt lengths; with several, the length is dynamic, so that one compilation serves all.
        config: of the modes "exact" (its compiler) and "sparse"; the defaults if None.
        modes: some of `MODES`; speeds are relative to the first.
        batch: prompts at once.
        rounds: at least so many timed calls of each mode at each length, and more where they are short.
        progress: is told about every step.

    Raises:
        ConfigError: no such model, or one in training mode; no configuration; a mode that does not exist; a number that is
            not allowed; or lengths that there are none of, or that the model has no positions for.
    """
    config = given(config, "bench")
    lengths = _check_request(lengths, modes, rounds, batch, seed)
    _check_model(model, lengths[-1])
    steps = 2 * len(modes)
    rows: list[Measurement] = []
    torch._dynamo.reset()
    try:
        # Every mode compiles the same code once or more: all of them count towards Dynamo's limit.
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8 * len(modes) * max(1, len(lengths))):
            calls = {mode: _compiled(model, mode, config) for mode in modes}
            for number, length in enumerate(lengths):

                def show(text: str, step: int, before: int = number * steps) -> None:
                    if progress is not None:
                        progress(text, before + step, len(lengths) * steps)

                def inputs(turn: int, length: int = length) -> dict[str, Any]:
                    return _inputs(model, batch, length, len(lengths) > 1, seed + turn)

                rows += _rows([_Run(mode, call) for mode, call in calls.items()], length, inputs, rounds, show)
    finally:
        torch._dynamo.reset()
    return Benchmark(tuple(rows), _conditions(model, config, batch, rounds))


def _check_request(lengths: Sequence[int], modes: Sequence[str], rounds: int, batch: int, seed: int) -> list[int]:
    """The lengths, ascending, once it is clear that they and the modes can be measured; ConfigError otherwise."""
    check_list("modes", modes)
    if not all(mode in MODES for mode in modes) or len(set(modes)) < len(modes):
        raise ConfigError(f"modes={list(modes)} is not allowed: modes must be some of {', '.join(MODES)}, each once")
    check_list("lengths", lengths)
    for length in lengths:
        check_int("lengths", length, 1)
    check_int("rounds", rounds, 1)
    check_int("batch", batch, 1)
    check_int("seed", seed, 0)
    return sorted(set(lengths))


def _check_model(model: Any, longest: int) -> None:
    """Raises ConfigError unless prompts of that length can be run through the model, in evaluation mode."""
    check_model(model)
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        name = type(model).__name__
        raise ConfigError(f"{name} has no configuration of transformers: pass a causal language model of transformers")
    check_inference(model, "a benchmark is of inference")
    check_positions(model, longest)


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


def _inputs(model: Any, batch: int, length: int, dynamic: bool, seed: int) -> dict[str, Any]:
    ids = prompts(model.config, batch, length, next(model.parameters()).device, seed)
    mask = torch.ones_like(ids)
    if dynamic:
        torch._dynamo.maybe_mark_dynamic(ids, 1)
        torch._dynamo.maybe_mark_dynamic(mask, 1)
    return {"input_ids": ids, "attention_mask": mask, "logits_to_keep": 1}


def _rows(
    runs: list[_Run], length: int, inputs: Callable[[int], dict[str, Any]], rounds: int, show: Callable[[str, int], None]
) -> list[Measurement]:
    """All modes at one length: first every mode's first call, then they take turns, with other tokens in every round."""
    words = _length_words(length)
    for place, run in enumerate(runs):
        show(f"{run.mode} at {words}: first call", place)
        run.first(inputs(-1))
    turn = 0
    while any(run.wanting(rounds) for run in runs):
        show(f"{words}: round {turn + 1}", len(runs) + min(len(runs), len(runs) * turn // rounds))
        going = [run for run in runs if not run.error]
        start = turn % len(going)
        for run in going[start:] + going[:start]:
            run.turn(inputs(turn))
        turn += 1
    show(words, 2 * len(runs))
    return [run.row(length, runs[0]) for run in runs]


@dataclass
class _Run:
    """One mode at one length, while it is measured."""

    mode: str
    call: Callable[..., Any]
    times: list[float] = field(default_factory=list)
    peak: int = 0
    first_call_s: float = 0.0
    sparse: int | None = None
    error: str = ""

    def first(self, inputs: dict[str, Any]) -> None:
        """The call that compiles."""
        before = len(reports())
        self.first_call_s = self._ms(inputs) / 1e3
        made = reports()[before:]
        if made and self.mode in ("exact", "sparse"):
            self.sparse = sum(report.sparse for report in made)

    def turn(self, inputs: dict[str, Any]) -> None:
        """One round."""
        device = inputs["input_ids"].device
        if device.type != "cuda":
            self.times.append(self._ms(inputs))
            return
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.times.append(self._ms(inputs))
        self.peak = max(self.peak, torch.cuda.max_memory_allocated(device) - before)

    def _ms(self, inputs: dict[str, Any]) -> float:
        """Milliseconds of one prefill. Where memory runs out, that ends the mode at this length."""
        try:
            return elapsed_ms(lambda: self.call(**inputs), inputs["input_ids"].device)
        except torch.OutOfMemoryError as error:
            self.error = f"out of memory: {str(error).split('.')[0]}"
        torch.cuda.empty_cache()  # outside of the handler, which holds the failed call's tensors
        return math.nan

    def wanting(self, rounds: int) -> bool:
        """Whether it needs another round. Short calls are noisy: up to 20 of them, until they had 0.4 seconds."""
        enough = len(self.times) >= 20 or sum(self.times) >= 400 or rounds == 1
        return not self.error and not (len(self.times) >= rounds and enough)

    def row(self, length: int, base: _Run) -> Measurement:
        """What was measured; speed is relative to `base`."""
        if self.error:
            return Measurement(self.mode, length, None, error=self.error)
        middle = statistics.median(self.times)
        return Measurement(
            self.mode,
            length,
            round(middle, 3),
            range_ms=(round(min(self.times), 3), round(max(self.times), 3)),
            speed=None if base.error else round(statistics.median(base.times) / middle, 4),
            peak_gib=round(self.peak / 2**30, 3) if self.peak else None,
            first_call_s=round(self.first_call_s, 4),
            sparse_calls=self.sparse,
        )


def elapsed_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call, from an idle device to an idle device."""
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return 1e3 * (time.perf_counter() - started)


def _budget_words(config: TSAConfig) -> str:
    kinds = [
        f"coverage {budget.tau:g}" if isinstance(budget, Coverage) else f"keep {budget.ratio:g}" for budget in config.budgets
    ]
    text = " or ".join(kinds)
    return text if config.floor is not None else f"{text}, no floor"


def _length_words(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _cell(row: Measurement) -> str:
    if row.ms is None:
        return "out of memory"
    text = f"{row.ms:,.{0 if row.ms >= 100 else 1 if row.ms >= 10 else 2}f} ms"
    text += "" if row.speed is None else f" ({row.speed:.2f}x)"
    text += "" if row.peak_gib is None else f", {row.peak_gib:.1f} GiB"
    return text + (" (no sparse call)" if row.mode == "sparse" and row.sparse_calls == 0 else "")
