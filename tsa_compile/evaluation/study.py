"""`evaluate(model, ...)`: the accuracy of one model under several methods, on the same samples.

Every method runs through the compiler: `torch.compile` with `tsa_backend`, and a probe (probe.py) that looks at what the
sparse layers select. Samples are generated on the CPU in blocks of 64, each from its own seed, so that sample i is the
same for every method, batch size and machine. Logits are computed at the questions only. After each cell the results are
written, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsa_compile.config import check_int, upper_half
from tsa_compile.drift import PROBE, find_layers
from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.methods import STANDARD, Method, compiled, parse
from tsa_compile.evaluation.outcomes import Cell, LayerRow
from tsa_compile.evaluation.probe import Selection
from tsa_compile.evaluation.results import Study
from tsa_compile.evaluation.tasks import IGNORED, QUESTIONS, TASKS, VOCABULARY, Samples, check, generate
from tsa_compile.fingerprint import Fingerprint, text_config
from tsa_compile.progress import bar
from tsa_compile.report import Decision, reports

LENGTHS = (4096, 8192, 16384)
BLOCK = 64  # samples that share a seed
ASKED = 16  # positions of which logits are computed; a multiple of it, so that tasks share a compiled graph


@dataclass(frozen=True)
class Plan:
    """What a study consists of, validated; `cells` is the order of work."""

    methods: tuple[Method, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    questions: tuple[str, ...]
    samples: int
    seed: int
    batch_tokens: int

    def cells(self) -> Iterator[tuple[int, Method, str, str]]:
        """Length, method, question and task. Tasks of a method and length come together: they share a compiled graph.

        Short lengths come first, and methods in their order: a run that is stopped has whole tables of the short lengths.
        """
        for length in self.lengths:
            for method in self.methods:
                for question in self.questions:
                    for task in self.tasks:
                        yield length, method, question, task

    def batch(self, length: int) -> int:
        """Samples that run at once: the largest power of two within `batch_tokens` that divides a block and is of use."""
        fitting = min(BLOCK, max(1, self.batch_tokens // length))
        return min(1 << (fitting.bit_length() - 1), 1 << (self.samples - 1).bit_length())


def evaluate(
    model: nn.Module,
    *,
    methods: Sequence[str | Method] = STANDARD,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = LENGTHS,
    samples: int = 1000,
    seed: int = 0,
    batch_tokens: int = 2**16,
    device: Any = None,
    question: str | Sequence[str] = "last",
    layers: Sequence[int] | None = None,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
) -> Study:
    """Runs every method on every task at every length, over the same samples.

    Args:
        model: a causal language model of transformers whose vocabulary has the tasks' 4096 tokens.
        methods: names (methods.py) or methods, the most interesting first; "dense" is what the others are compared with.
        samples: for each cell.
        batch_tokens: tokens that run at once, at least one sample.
        device: where to run; the model is moved there. None: where it is.
        question: "last", "early" (questions lie before the scoring window: a stress test), or both.
        layers: the sparse layers, as a calibration chose them; None for the upper half.
        progress: whether to show a progress bar, on stderr.
        resume: a file that keeps the results after each cell; cells that it has already are not run again.

    Raises:
        ConfigError: an option is not allowed, the model does not fit the tasks, a method finds no layer to make sparse,
            or `resume` holds another study.
    """
    plan = _plan(methods, tasks, lengths, question, samples, seed, batch_tokens)
    if device is not None:
        model = model.to(device)
    subject = Subject.of(model, layers, max(plan.lengths))
    study = _start(plan, subject, resume)
    todo = [cell for cell in plan.cells() if study.find(cell[3], cell[0], cell[1].name, cell[2]) is None]
    if todo:
        study = replace(study, notes=_notes(plan, subject, study.notes))
    runner: Runner | None = None
    with bar(progress) as show:
        for done, (length, method, asked, task) in enumerate(todo):
            show(f"{length:,} tokens, {method.name}, {task}, question {asked}", done, len(todo))
            if runner is None or runner.key != (method.name, length):
                runner = Runner(subject, method, length, plan.batch(length))
            study = study.with_cell(_run_cell(runner, plan, task, asked))
            if resume is not None:
                study.save(resume)
        show("done", len(todo), len(todo))
    return study


@dataclass(frozen=True)
class Subject:
    """The model under study, and its sparse layers."""

    model: nn.Module
    device: torch.device
    layers: tuple[int, ...]
    identity: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[int] | None, longest: int) -> Subject:
        """Checks a model.

        Raises:
            ConfigError: it takes no `logits_to_keep`, has too few tokens or positions, or not the layers that are named.
        """
        name = type(model).__name__
        known = inspect.signature(model.forward).parameters.values()
        if not any(p.name == "logits_to_keep" or p.kind is inspect.Parameter.VAR_KEYWORD for p in known):
            raise ConfigError(f"{name}.forward takes no logits_to_keep: pass a causal language model of transformers 5")
        _check_sizes(model, longest)
        device = next(model.parameters()).device
        model.eval()
        with torch.inference_mode(False), torch.no_grad():
            stack = find_layers(model, torch.zeros(1, PROBE, dtype=torch.long, device=device))
        count = len(stack.layers)
        chosen = tuple(upper_half(count) if layers is None else sorted(set(layers)))
        if not chosen or chosen[0] < 0 or chosen[-1] >= count:
            raise ConfigError(
                f"layers={list(chosen)} is not allowed: {name} has the layers 0..{count - 1}; name some of them"
            )
        return cls(model, device, chosen, Fingerprint.of(model, stack.layers).to_dict())


def _check_sizes(model: nn.Module, longest: int) -> None:
    tokens, positions = (getattr(text_config(model), name, None) for name in ("vocab_size", "max_position_embeddings"))
    if tokens is not None and tokens < VOCABULARY:
        raise ConfigError(f"the model knows {tokens} tokens, the tasks use {VOCABULARY}: evaluate a model that has as many")
    if positions is not None and positions < longest:
        raise ConfigError(f"the model has {positions} positions, found a length of {longest}: leave longer lengths out")


def _plan(
    methods: Sequence[str | Method],
    tasks: Sequence[str],
    lengths: Sequence[int],
    question: str | Sequence[str],
    samples: int,
    seed: int,
    batch_tokens: int,
) -> Plan:
    questions = (question,) if isinstance(question, str) else tuple(question)
    for name, value in (("methods", methods), ("tasks", tasks), ("lengths", lengths), ("question", questions)):
        if isinstance(value, str) or not len(value):
            raise ConfigError(f"{name}={value!r} is not allowed: it must be a list with at least one of them")
    check_int("samples", samples, 1)
    check_int("batch_tokens", batch_tokens, 1)
    for task in tasks:
        for length in lengths:
            for asked in questions:
                check(task, 1, length, asked)
    parsed = tuple(method if isinstance(method, Method) else parse(method) for method in methods)
    ordered = tuple(item for item in QUESTIONS if item in questions)
    return Plan(
        tuple(dict.fromkeys(parsed)), tuple(dict.fromkeys(tasks)), tuple(sorted(set(lengths))), ordered, samples, seed,
        batch_tokens,
    )  # fmt: skip


def _start(plan: Plan, subject: Subject, resume: str | os.PathLike[str] | None) -> Study:
    """An empty study, or the one that the file holds if it belongs together with this one."""
    conditions = {
        "model": subject.identity, "layers": list(subject.layers), "samples": plan.samples, "seed": plan.seed,
        "dtype": str(next(subject.model.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip
    if resume is None or not Path(resume).exists():
        study = Study(conditions)
        if resume is not None:
            study.save(resume)  # an unwritable path is found before the work
        return study
    study = Study.load(resume)
    different = [name for name, value in conditions.items() if study.conditions.get(name) != value]
    if different:
        raise ConfigError(
            f"{str(resume)!r} holds a study with other {', '.join(different)}: repeat them, or name another file"
        )
    return study


def _notes(plan: Plan, subject: Subject, before: Mapping[str, Any]) -> dict[str, Any]:
    """Where cells are made now, behind where they were made before."""
    cuda = subject.device.type == "cuda"
    device = torch.cuda.get_device_name(subject.device) if cuda else str(subject.device)
    notes = {"device": device, "torch": torch.__version__, "batch_tokens": plan.batch_tokens}
    return {name: _then(before.get(name), value) for name, value in notes.items()}


def _then(before: Any, now: Any) -> Any:
    """A note of a study that was made in several runs: what was different is listed."""
    if before is None or str(now) in str(before).split(", then "):
        return now if before is None else before
    return f"{before}, then {now}"


class Runner:
    """One method at one length, compiled once; every batch has the same shape."""

    def __init__(self, subject: Subject, method: Method, length: int, batch: int) -> None:
        self.key = (method.name, length)
        self.method, self.length, self.batch, self.device = method, length, batch, subject.device
        self.sparse = method.layers(subject.layers)
        self.probe = method.probe()
        config = method.config(length, subject.layers).replace(compiler=self.probe)
        self._call = compiled(subject.model, config)
        self._checked = False

    def run(self, samples: Samples) -> tuple[Tensor, Tensor, list[Selection]]:
        """Right answers, bool [B, A] for the A positions where any sample asks; where each asks, bool [B, A]; selections.

        All of them stay on the device, so that the next samples are made while it computes.

        Raises:
            ConfigError: a layer that should be sparse is not, or the model ignores `logits_to_keep`.
        """
        asked = samples.labels != IGNORED
        places = asked.any(0).nonzero()[:, 0]  # on the CPU, where samples are made
        padding = places[-1:].expand(-len(places) % ASKED)
        wanted = torch.cat((places, padding)).to(self.device)
        # An early question's own rows are dropped too: a rescue keeps them, so that it tells whether anything else is lost.
        self.probe.mark((samples.evidence | asked).to(self.device))
        logits = self._logits(samples.tokens.to(self.device), wanted)
        if logits.shape[1] != len(wanted):
            raise ConfigError(
                f"the model gave logits at {logits.shape[1]} positions, expected {len(wanted)}: its forward must obey "
                "logits_to_keep, as the causal language models of transformers 5 do"
            )
        selections = self.probe.take()
        self._check(selections)
        labels, asks = samples.labels[:, places].to(self.device), asked[:, places].to(self.device)
        return (logits.argmax(-1)[:, : len(places)] == labels) & asks, asks, selections

    def _logits(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        try:
            return self._call(tokens, wanted).logits
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"{self.batch} x {self.length} tokens do not fit {self.device}: lower batch_tokens") from error

    def _check(self, selections: list[Selection]) -> None:
        """Once: the layers that the method asks for, and no others, are sparse. So their selections come in this order."""
        if self._checked:
            return
        made = reports()[-self.probe.graphs :] if self.probe.graphs else []
        rows = [row for report in made for row in report.rows]
        found = tuple(row.layer_index for row in rows if row.decision is Decision.SPARSE)
        if found != self.sparse or len(selections) != len(self.sparse):
            reasons = {str(row.reason) for row in rows if row.decision is not Decision.SPARSE}
            raise ConfigError(
                f"{self.method.name} at length {self.length}: layers {list(self.sparse)} should be sparse, {list(found)} "
                f"are ({', '.join(sorted(reasons))}); choose `layers` whose attention is causal, and see explain(model, ...)"
            )
        self._checked = True


def _run_cell(runner: Runner, plan: Plan, task: str, question: str) -> Cell:
    started = time.perf_counter()
    right: list[Tensor] = []
    answers: list[Tensor] = []  # [batch, 2] each: answers that are right, and all
    kept: list[Tensor] = []  # [batch, sparse layers] each
    survived: list[Tensor] = []
    for samples in _batches(plan, task, runner.length, question):
        torch.manual_seed(plan.seed + len(right))  # for the random control
        found, asked, selections = runner.run(samples)
        right.append((found == asked).all(1))
        answers.append(torch.stack((found.sum(1), asked.sum(1)), 1))
        if selections:
            evidence = samples.evidence.to(runner.device)
            kept.append(torch.stack([selection.kept() for selection in selections], 1))
            survived.append(torch.stack([selection.share_of(evidence) for selection in selections], 1))
    outcomes = torch.cat(right)[: plan.samples].cpu()
    answered, asked_in_all = torch.cat(answers)[: plan.samples].sum(0).tolist()
    rows = _layer_rows(runner, outcomes, kept, survived) if kept else ()
    return Cell(
        task=task, length=runner.length, method=runner.method.name, question=question,
        right=tuple(outcomes.tolist()), answers=answered / asked_in_all, layers=rows,
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip


def _batches(plan: Plan, task: str, length: int, question: str) -> Iterator[Samples]:
    """The samples of a cell. The last batch may hold some more than asked for: all have one shape."""
    size = plan.batch(length)
    for first in range(0, plan.samples, BLOCK):
        seed = plan.seed * 1_000_003 + first // BLOCK
        block = generate(task, batch=BLOCK, length=length, seed=seed, question=question)
        for start in range(0, min(BLOCK, plan.samples - first), size):
            part = slice(start, start + size)
            yield Samples(block.tokens[part], block.labels[part], block.evidence[part])


def _layer_rows(runner: Runner, right: Tensor, kept: list[Tensor], survived: list[Tensor]) -> tuple[LayerRow, ...]:
    keep = torch.cat(kept).cpu()[: len(right)].double() / runner.length
    survival = torch.cat(survived).cpu()[: len(right)].double()
    wrong = survival[~right]
    rows = []
    for place, layer in enumerate(runner.sparse):
        column = keep[:, place]
        rows.append(
            LayerRow(
                layer=layer, keep=float(column.mean()), keep_low=float(column.min()), keep_high=float(column.max()),
                survival=float(survival[:, place].mean()),
                survival_wrong=float(wrong[:, place].mean()) if len(wrong) else None,
            )
        )  # fmt: skip
    return tuple(rows)
