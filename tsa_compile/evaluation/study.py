"""`evaluate(model, tokenizer, ...)`: what settings cost one model in accuracy, on the same samples.

For every length, task and batch of samples, dense attention runs first and then every setting. So dense attention's
probabilities of the answers are in memory for only one batch. The file is written after every setting. A later run with the
same file continues where the earlier one stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsa_compile.calibration.drift import PROBE, find_layers
from tsa_compile.calibration.fingerprint import Fingerprint
from tsa_compile.config import TSAConfig, check_int
from tsa_compile.errors import ConfigError, check_inference, check_list, check_type
from tsa_compile.evaluation import tasks as known_tasks
from tsa_compile.evaluation.cached import check_model
from tsa_compile.evaluation.limits import check_positions
from tsa_compile.evaluation.outcomes import Study
from tsa_compile.evaluation.prompts import Writer
from tsa_compile.evaluation.running import MORE, Runner
from tsa_compile.evaluation.settings import DENSE, Setting
from tsa_compile.evaluation.tasks import CONTINUED
from tsa_compile.evaluation.traced import Traced
from tsa_compile.progress import Progress

BATCH_TOKENS = 2**15
ROOM = MORE + CONTINUED
"""Positions that a model needs behind a prompt."""


@dataclass(frozen=True)
class Plan:
    """What is asked for, validated."""

    settings: tuple[Setting, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    seed: int
    batch_tokens: int

    def batch(self, length: int) -> int:
        """Samples that run at once."""
        return min(self.samples, max(1, self.batch_tokens // length))

    def batches(self) -> Iterator[tuple[int, str, range]]:
        """Length, task and indices of samples, short lengths first: a run that is stopped has whole tables of these."""
        for length in self.lengths:
            size = self.batch(length)
            for task in self.tasks:
                for first in range(0, self.samples, size):
                    yield length, task, range(first, min(self.samples, first + size))


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    *,
    settings: Sequence[Setting],
    tasks: Sequence[str] = ("needle",),
    lengths: Sequence[int] = (4096,),
    samples: int = 50,
    seed: int = 0,
    text: str | None = None,
    conditions: Mapping[str, Any] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    file: str | os.PathLike[str] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Study:
    """Runs dense attention and every setting on the same samples of every task and length, on the model's device.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: the model's own.
        settings: what is compared with dense, which need not be named.
        tasks: some of `tasks.TASKS`.
        lengths: of the prompts, in tokens.
        samples: how many samples of every task and length.
        text: what things are hidden in, and what "continuation" continues; None: a few sentences, repeated.
        conditions: what else must be the same for results to belong together in a file, by names of the caller's; plain JSON
            types.
        batch_tokens: tokens that run at once, at least one sample.
        file: keeps the results; those that it has already are not run again, and more samples, tasks, lengths and settings
            are added to it.
        progress: is told about every setting of every batch.

    Raises:
        ConfigError: an argument is not allowed, a prompt is longer than the model's positions, a text too short, a setting
            finds no layer to make sparse, or the file holds another study.
    """
    plan = _plan(settings, tasks, lengths, samples, seed, batch_tokens)
    others = _others(tokenizer, text, conditions)
    check_model(model)
    check_inference(model, "a study is of inference")
    check_positions(model, max(plan.lengths), ROOM)
    writer = Writer(tokenizer, text)
    for length in plan.lengths:
        for task in plan.tasks:
            writer.sample(task, length, plan.seed, 0)  # what does not fit is found before the work
    study = _start(plan, model, writer, file, others)
    todo = [(*batch, names) for batch in plan.batches() if (names := _missing(study, plan, batch))]
    done, total = 0, sum(map(len, (names for *_, names in todo)))
    runners = _Runners(model, tokenizer)
    for length, task, indices, names in todo:
        made = [writer.sample(task, length, plan.seed, index) for index in indices]
        made += made[-1:] * (plan.batch(length) - len(made))  # the last batch repeats a sample rather than be compiled anew
        dense = None
        for setting in [setting for setting in plan.settings if setting is DENSE or setting.name in names]:
            progress(f"{length:,} tokens, {task}, {setting.name}", done, total)
            torch.manual_seed(plan.seed + indices.start)  # for the random control
            started = time.perf_counter()
            outcomes, scored = runners.get(setting, length).run(made, dense)
            dense = scored if dense is None else dense
            cell = study.find(task, length, setting.name)
            new = outcomes[cell.samples - indices.start : len(indices)] if cell.samples < indices.stop else []
            study = study.with_cell(cell.extended(new, time.perf_counter() - started if new else 0.0))
            done += setting.name in names
            if file is not None and new:
                study.save(file)
    progress("done", total, total)
    return study


class _Runners:
    """Compiled settings of one length, from one trace: those of another are forgotten, and Dynamo forgets what it traced."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._length = 0
        self._made: dict[str, Runner] = {}
        self._traced = Traced(model)

    def get(self, setting: Setting, length: int) -> Runner:
        if length != self._length:
            self._length, self._made = length, {}
            torch._dynamo.reset()
        if setting.name not in self._made:
            self._made[setting.name] = Runner(self.model, self.tokenizer, setting, self._traced)
        return self._made[setting.name]


def _plan(
    settings: Sequence[Setting], tasks: Sequence[str], lengths: Sequence[int], samples: int, seed: int, batch_tokens: int
) -> Plan:
    check_list("tasks", tasks)
    check_list("lengths", lengths)
    for task in tasks:
        known_tasks.check(task)
    for place, length in enumerate(lengths):
        check_int(f"lengths[{place}]", length, 1)
    check_int("samples", samples, 1)
    check_int("seed", seed, 0)
    check_int("batch_tokens", batch_tokens, 1)
    _check_settings(settings)
    different = dict.fromkeys((DENSE, *(setting for setting in settings if setting != DENSE)))
    names = [setting.name for setting in different]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"several settings are called {twice[0]!r}: give each a name of its own")
    return Plan(
        tuple(different), tuple(dict.fromkeys(tasks)), tuple(sorted(set(lengths))), samples, seed, batch_tokens
    )  # fmt: skip


def _check_settings(settings: Sequence[Setting]) -> None:
    check_type("settings", settings, Sequence, "a list of Setting(name, config)")
    for place, setting in enumerate(settings):
        check_type(f"settings[{place}]", setting, Setting, "a Setting(name, config)")
        check_type(f"the name of setting {setting.name!r}", setting.name, str, "a str")
        wanted = "a TSAConfig, or None for the model as it is"
        check_type(f"the config of setting {setting.name!r}", setting.config, (TSAConfig, type(None)), wanted)


def _others(tokenizer: Any, text: str | None, conditions: Mapping[str, Any] | None) -> dict[str, Any]:
    """The caller's conditions as a file will hold them: tuples are lists there. What samples are written with is checked."""
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}: pass the model's own tokenizer, one of transformers")
    check_type("text", text, (str, type(None)), "a str, or None for sentences of the package's own")
    check_type("conditions", conditions, (Mapping, type(None)), "a dict of what else must be the same, or None")
    try:
        return dict(json.loads(json.dumps(dict(conditions or {}), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"conditions={conditions!r} is not allowed: they must be plain JSON types ({error})") from error


def _start(
    plan: Plan, model: nn.Module, writer: Writer, file: str | os.PathLike[str] | None, others: Mapping[str, Any]
) -> Study:
    """An empty study, or what the file holds if it belongs together with this one."""
    conditions = {
        **others,
        "model": _identity(model), **writer.identity(), "seed": plan.seed,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip
    settings = {setting.name: setting.to_dict() for setting in plan.settings}
    study = Study(conditions, settings)
    if file is not None and Path(file).exists():
        study = Study.load(file)
        _check_same(study, conditions, settings, file)
        study = replace(study, settings={**study.settings, **settings})
    study = replace(study, notes=_notes(model, study))
    if file is not None:
        study.save(file)  # an unwritable path is found before the work
    return study


def _check_same(study: Study, conditions: dict[str, Any], settings: dict[str, Any], file: Any) -> None:
    names = dict.fromkeys((*conditions, *study.conditions))
    different = [name for name in names if study.conditions.get(name) != conditions.get(name)]
    if different:
        raise ConfigError(
            f"{str(file)!r} holds a study with another {', another '.join(different)}: repeat that one, or name another file"
        )
    for name, value in settings.items():
        if study.settings.get(name, value) != value:
            raise ConfigError(
                f"{str(file)!r} holds results of another configuration under the name {name!r} "
                f"({_difference(study.settings[name], value)}): repeat that one, or name another file"
            )


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In which fields two settings differ, in words."""
    old, new = ({"random": found.get("random"), **(found.get("config") or {})} for found in (before, now))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name} {old.get(name)}, not {new.get(name)}" for name in names)


def _identity(model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    with torch.inference_mode(False), torch.no_grad():
        stack = find_layers(model, torch.zeros(1, PROBE, dtype=torch.long, device=device))
    return Fingerprint.of(model, stack.layers).to_dict()


def _missing(study: Study, plan: Plan, batch: tuple[int, str, range]) -> list[str]:
    """The settings that have not run all samples of a batch."""
    length, task, indices = batch
    names = [setting.name for setting in plan.settings]
    return [name for name in names if study.find(task, length, name).samples < indices.stop]


def _notes(model: nn.Module, study: Study) -> dict[str, Any]:
    """Where results are made now, behind where they were made before."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    notes = {"device": name, "torch": torch.__version__}
    return {key: _then(study.notes.get(key), value) for key, value in notes.items()}


def _then(before: Any, now: str) -> str:
    if before is None or now in str(before).split(", then "):
        return now if before is None else str(before)
    return f"{before}, then {now}"
