"""`tsa-compile calibrate`: which layers of a model may be sparse, by representation drift or by what they cost."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsa_compile.commands import output, prompts, texts
from tsa_compile.commands.options import TASK_NAMES, Batch, FigureOptions, ModelOptions, command, read_config
from tsa_compile.config import KeepRatio, TSAConfig
from tsa_compile.errors import ConfigError
from tsa_compile.text import as_text, counted, new_table

if TYPE_CHECKING:
    from tsa_compile.calibration.calibrate import Calibration
    from tsa_compile.calibration.loss_search import LossCalibration
    from tsa_compile.commands.loading import Source

_SHORTEST = 16  # tokens of a prompt; of fewer, each of which sees next to nothing, drift says nothing about long ones
_LENGTHS = {"drift": "1K", "loss": "4K"}  # of fewer than 1,152 tokens all are kept by default, and nothing is lost
_SEED, _EACH = 1, 4  # of the samples of a task
_RANDOM = 2  # with random weights more prompts say nothing more


@command(
    ("How does it work? (a shape, random tokens)", "tsa-compile calibrate --shape tiny --random 4 --length 512"),
    (
        "Which half of my model's layers?",
        "tsa-compile calibrate my-llama --prompts texts.jsonl --out layers.json",
    ),
    (
        "Which layers, and how much each keeps, for answers that stay near?",
        "tsa-compile calibrate my-llama --objective loss --max-kl 0.01 --tasks copy",
    ),
)
def calibrate(
    model: ModelOptions,
    out: FigureOptions,
    file: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="A text file, or JSON lines with text or input_ids; text needs the folder's tokenizer."
        ),
    ] = None,
    random: Annotated[
        int | None,
        typer.Option(
            "--random", min=1, max=10_000, help="A number of prompts of random tokens instead. Default: 2 for a shape."
        ),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option("--length", help="Prompt length in tokens: 8192, or 8K. Default: 1K for drift, 4K for loss."),
    ] = None,
    batch: Batch = 1,
    count: Annotated[
        int | None,
        typer.Option(
            "--count", min=1, help="The largest number of prompts to take from the file; with --tasks, of each task."
        ),
    ] = None,
    delta: Annotated[
        float | None, typer.Option("--delta", help="The share of the layers to be sparse, in (0, 1]. Default: 0.5.")
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            help="drift: how much a layer changes its input; loss: how much a sparse layer changes the answers.",
        ),
    ] = "drift",
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", min=0, help="loss: how far answers may be from dense: mean KL of their tokens, in nats."),
    ] = None,
    ratios: Annotated[
        str | None, typer.Option("--ratios", help="loss: the keep ratios to choose from. Default: 0.5,0.3,0.15,0.08.")
    ] = None,
    answer: Annotated[
        int | None,
        typer.Option("--answer", min=1, help="loss: how many tokens at the end of a prompt are its answer. Default: 64."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="loss: ask these tasks of `tsa-compile eval` instead, --count of each (default: 4). They hide things in "
            "the text of --prompts, or else in a few sentences.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="loss: a TSAConfig as JSON (floor, window, ...). Its budget is not used; only its layers are tried.",
        ),
    ] = None,
) -> None:
    """Find the layers that may be sparse: those that change their input least, or cost the answers least.

    Run it on long prompts of the kind that the model will see. What --out writes is what --sparse-layers takes.
    """
    length = _LENGTHS.get(objective, "1K") if length is None else length
    tokens = texts.length(length)
    search = _search(objective, delta, out, max_kl=max_kl, ratios=ratios, answer=answer, tasks=tasks, config=config)
    if tokens < _SHORTEST:
        raise ConfigError(
            f"--length {length} is too short to calibrate: take {_SHORTEST} or more, best what the model will see"
        )
    _check_prompts(model, file, random, tasks, count)
    by_task = tasks is not None
    with output.working("Loading PyTorch and transformers"):
        if objective == "loss":
            _check_length(length, search, by_task)
        source = model.source()
        source.check(tokens, batch)
        chosen = _samples(source, tasks, file, tokens, count) if by_task else _prompts(source, file, random, tokens, count)
    with output.working(f"Loading {source.name}"):
        loaded = source.load(tokens, batch)
    from tsa_compile.calibration.calibrate import calibrate as measure

    found: Any = measure(loaded, chosen, batch_size=batch, progress=output.stderr().is_terminal, **search)
    if source.folder is None:
        output.say("note", "the weights are random: this shows how calibration runs, not which layers a trained model has")
    if objective == "drift":
        out.draw(found.plot)
    out.show(_table(found, out.out) if objective == "drift" else _costs(found, out.out), found.to_dict())


def _check_prompts(model: ModelOptions, file: Path | None, random: int | None, tasks: str | None, count: int | None) -> None:
    """Raises ConfigError unless it is clear which prompts are meant, before anything heavy is imported."""
    if random is not None and (file is not None or tasks is not None):
        raise ConfigError(f"both {'--tasks' if file is None else '--prompts'} and --random given: choose one")
    if count is not None and file is None and tasks is None:
        raise ConfigError(f"--count goes with --prompts or --tasks; for {count} random prompts, pass --random {count}")
    if tasks is not None and model.shape is not None:
        raise ConfigError(
            f"--tasks are asked in words, and the shape {model.shape!r} has no tokenizer: pass a model folder, or leave "
            "--tasks out"
        )
    if file is not None:
        read = prompts.read_text if tasks is None else prompts.read_prose
        read(file, "--prompts")
    if file is None and random is None and tasks is None and model.folder is not None:
        raise ConfigError(
            "no prompts given: pass --prompts FILE (text or JSON lines), --tasks (with --objective loss), or --random 8 for "
            "random tokens"
        )


def _check_length(length: str, search: dict[str, Any], by_task: bool) -> None:
    """Raises ConfigError where all tokens of prompts of this length are kept; a task's answer stands behind them."""
    from tsa_compile.calibration.loss_search import ANSWER, check_length

    answer = 0 if by_task else search.get("answer", ANSWER)
    try:
        check_length(search.get("config", TSAConfig()), texts.length(length) - answer)
    except ConfigError as error:
        raise ConfigError(f"--length {length}: {error}") from error


def _search(objective: str, delta: float | None, out: FigureOptions, **given: Any) -> dict[str, Any]:
    """The options of `calibrate` that belong to its objective; ConfigError where they belong to the other."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if objective == "drift":
        if names:
            raise ConfigError(f"{', '.join(names)} goes with --objective loss")
        delta = 0.5 if delta is None else delta
        if not 0 < delta <= 1:
            raise ConfigError(f"--delta {delta} is not allowed: it must lie in (0, 1], the share of layers to be sparse")
        return {"delta": delta}
    if objective != "loss":
        raise ConfigError(f"--objective {shlex.quote(objective)} is not known: it is drift or loss")
    if delta is not None or out.figure is not None:
        raise ConfigError(f"{'--delta' if delta is not None else '--figure'} goes with --objective drift")
    if given["max_kl"] is None:
        raise ConfigError("--objective loss needs --max-kl: how far answers may be from dense, as --max-kl 0.01")
    if given["tasks"] is not None:
        if given["answer"] is not None:
            raise ConfigError(
                f"--answer {given['answer']} does not go with --tasks, which have answers of their own: leave it out"
            )
        texts.check_tasks(texts.names(given["tasks"]), TASK_NAMES)
    search: dict[str, Any] = {"objective": "loss", "max_kl": given["max_kl"]}
    search |= {} if given["ratios"] is None else {"ratios": _ratios(given["ratios"])}
    search |= {} if given["answer"] is None else {"answer": given["answer"]}
    return search | ({} if given["config"] is None else {"config": read_config(given["config"])})


def _ratios(text: str) -> list[float]:
    try:
        found = [float(part) for part in texts.names(text)]
    except ValueError:
        shown = shlex.quote(text)
        raise ConfigError(f"--ratios {shown} is not understood: write keep ratios with commas between them") from None
    return [KeepRatio(ratio).ratio for ratio in found]


def _samples(source: Source, tasks: str | None, file: Path | None, length: int, count: int | None) -> list[Any]:
    """Prompts of `length` tokens with the answers that tasks expect; their seed is none that eval has by default."""
    from tsa_compile.evaluation.prompts import Writer

    names = texts.names(tasks or "")
    text = None if file is None else prompts.read_prose(file, "--prompts")
    writer = Writer(source.tokenizer("tasks are asked in words"), text)
    found = [writer.sample(name, length, _SEED, index) for name in names for index in range(count or _EACH)]
    return sorted(found, key=lambda sample: len(sample.answer))  # neighbours with answers of one length run at once


def _prompts(source: Source, file: Path | None, random: int | None, length: int, count: int | None) -> Any:
    if file is not None:
        found = prompts.read(file, length, count, source.tokenizer)
        if (shortest := min(map(len, found))) < _SHORTEST:
            raise ConfigError(
                f"{str(file)!r} holds a prompt of {counted(shortest, 'token')}, too short to calibrate: leave out what is "
                f"shorter than {_SHORTEST} tokens"
            )
        if (longest := max(map(len, found))) < length // 2:
            output.say("warning", f"no prompt has more than {longest:,} tokens, of the {length:,} asked for by --length")
        return found
    from tsa_compile.shapes import prompts as random_prompts

    return list(random_prompts(source.config, random or _RANDOM, length))


def _table(found: Calibration, path: Path | None) -> str:
    """The layers with drift and rank, and what to do with them."""
    sparse, table = set(found.sparse_layers), new_table("layer", "drift", "rank", "", right=("rank",))
    for index, (name, drift, rank) in enumerate(zip(found.layers, found.drift, found.ranks, strict=True)):
        table.add_row(name, f"{drift:.4f}", str(rank), "sparse" if index in sparse else "")
    chosen = ",".join(map(str, found.sparse_layers))
    said = f"{len(sparse)} of {len(found.layers)} layers sparse at delta {found.delta:g}, of {found.tokens:,} tokens"
    lines = [as_text(table), said]
    lines.append(f"use them: --sparse-layers {path or chosen}" if sparse else "no layer is sparse: take a larger --delta")
    return "\n".join(lines)


def _costs(found: LossCalibration, path: Path | None) -> str:
    """What each layer costs alone, what it keeps now, and what all of it costs."""
    ratios = sorted({ratio for costs in found.alone for ratio in costs}, reverse=True)
    table = new_table("layer", *(f"keep {ratio:g}" for ratio in ratios), "chosen")
    for name, costs, ratio in zip(found.layers, found.alone, found.ratios, strict=True):
        cells = (f"{costs[each]:.2g}" if each in costs else "" for each in ratios)
        table.add_row(name, *cells, "dense" if ratio is None else f"keep {ratio:g}")
    chosen = found.sparse_layers
    error = "" if found.kl_error is None else f" +- {found.kl_error:.1g}"
    lines = [
        as_text(table),
        f"(KL of the answers to dense with that layer alone sparse; {counted(found.tokens, 'token')} of "
        f"{counted(found.prompts, 'answer')})",
        f"{len(chosen)} of {len(found.layers)} layers sparse: KL {found.kl:.2g}{error} as a whole, of {found.max_kl:g} "
        f"allowed; {found.saved:.0%} of the pairs of queries and keys left out of selected attention",
    ]
    if not chosen:
        return "\n".join([*lines, "no layer is sparse: allow a larger --max-kl, or larger --ratios"])
    return "\n".join([*lines, f"use them: --sparse-layers {path or '(the file that --out writes)'}"])
