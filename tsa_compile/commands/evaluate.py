"""`tsa-compile eval`: what sparse layers cost in accuracy, on tasks that need the whole context."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsa_compile.commands import output, texts
from tsa_compile.commands.options import FigureOptions, ModelOptions, chosen_layers, command
from tsa_compile.config import Coverage
from tsa_compile.errors import ConfigError
from tsa_compile.files import writable

if TYPE_CHECKING:
    pass


class Question(StrEnum):
    """Where the question stands."""

    LAST = "last"
    EARLY = "early"
    BOTH = "both"


_ON_CPU: dict[str, Any] = {
    "lengths": [512],
    "samples": 8,
    "methods": ["dense", "keep-0.5"],
    "tasks": ["niah_single"],
}


@command(
    ("Does it run here? (random weights answer nothing right)", "tsa-compile eval --shape tiny --samples 4 --lengths 256"),
    (
        "The whole study of a trained model; the file lets it go on after a stop",
        "tsa-compile eval models/my-llama --lengths 4K,8K,16K --samples 1000 --resume study.json",
    ),
    (
        "Two tasks, one budget against dense, in the layers that were calibrated",
        "tsa-compile eval models/my-llama --tasks mqar,niah_multikey --budget keep:0.5 --sparse-layers layers.json",
    ),
)
def evaluate(
    model: ModelOptions,
    out: FigureOptions,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="mqar, niah_single, niah_multikey, ... Default: all; niah_single on a CPU.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="dense, coverage-0.005, keep-0.5, random-keep-0.5, keep-0.5@8 (8 tokens score), ... Default: many.",
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Instead of --methods: dense and this one, coverage:0.005 or keep:0.5.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Context lengths. Default: 4K,8K,16K; 512 on a CPU.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, max=1_000_000, help="Samples for each cell. Default: 1000; 8 on a CPU.")
    ] = None,
    sparse_layers: Annotated[
        str | None, typer.Option("--sparse-layers", help="Indices or a calibration's JSON file. Default: the upper half.")
    ] = None,
    question: Annotated[
        Question, typer.Option("--question", help="Behind the context, or before the scoring window (a stress test).")
    ] = Question.LAST,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of the samples.")] = 0,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", min=1, help="Tokens that run at once.")] = 2**16,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="A file that keeps results after each cell, and from which to go on.")
    ] = None,
) -> None:
    """Compare methods on generated retrieval tasks, on the same samples: accuracy, kept shares, needle survival.

    The model must be trained on these tasks' vocabulary of 4096 tokens (benchmarks/accuracy trains one).
    """
    request: dict[str, Any] = {"seed": seed, "batch_tokens": batch_tokens}
    request |= {"lengths": texts.lengths(lengths)} if lengths else {}
    request |= {"tasks": texts.names(tasks)} if tasks else {}
    request |= {"methods": _methods(methods, budget)} if methods or budget else {}
    request |= {"samples": samples} if samples else {}
    request["question"] = ("last", "early") if question is Question.BOTH else str(question)
    out.check()
    if resume is not None:
        writable(resume)
    with output.working("Loading PyTorch and transformers"):
        source = model.source()
        request = (_ON_CPU if source.device.type == "cpu" else {}) | request
        chosen, calibration = (None, None) if sparse_layers is None else chosen_layers(sparse_layers, source)
        layers = None if chosen is None else [layer for layer in chosen if isinstance(layer, int)]
        if chosen is not None and len(chosen) != len(layers or ()):
            raise ConfigError(f"--sparse-layers {sparse_layers}: eval takes indices, as 4-7, or a calibration's JSON file")
    with output.working(f"Loading {source.name}"):
        loaded = source.load(max(request.get("lengths", [16384])))
    if source.folder is None:
        output.say("note", "the weights are random: this shows that the study runs; its accuracies mean nothing")
    if calibration is not None:
        calibration.check(loaded)
    from tsa_compile.evaluation.study import evaluate as run

    study = run(loaded, layers=layers, resume=resume, progress=output.stderr().is_terminal, **request)
    out.draw(study.figure)
    out.show(str(study), study.to_dict())


def _methods(methods: str | None, budget: str | None) -> list[str]:
    """Names of methods."""
    if methods is not None and budget is not None:
        raise ConfigError("both --methods and --budget given: choose one")
    if methods is not None:
        return texts.names(methods)
    found = texts.budget(budget or "")
    return ["dense", f"coverage-{found.tau:g}" if isinstance(found, Coverage) else f"keep-{found.ratio:g}"]
