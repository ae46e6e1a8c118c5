"""`tsa-compile calibrate`: which layers of a model may be sparse, from the drift of their representations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsa_compile.commands import output, prompts, texts
from tsa_compile.commands.options import Batch, FigureOptions, Length, ModelOptions, command
from tsa_compile.errors import ConfigError

if TYPE_CHECKING:
    from tsa_compile.calibration import Calibration
    from tsa_compile.commands.loading import Source

_SHORTEST = 16  # tokens of a prompt; of fewer, each of which sees next to nothing, drift says nothing about long ones
_RANDOM = 2  # with random weights more prompts say nothing more


@command(
    ("How does it work? (a shape, random tokens)", "tsa-compile calibrate --shape tiny --random 4 --length 512"),
    (
        "Which half of my model's layers?",
        "tsa-compile calibrate my-llama --prompts texts.jsonl --out layers.json",
    ),
    (
        "A quarter of them, from one long text cut into pieces of 16K tokens",
        "tsa-compile calibrate my-llama --prompts book.txt --length 16K --delta 0.25",
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
        typer.Option("--random", min=1, max=10_000, help="So many prompts of random tokens instead; 2 for a shape."),
    ] = None,
    length: Length = "1K",
    batch: Batch = 1,
    count: Annotated[int | None, typer.Option("--count", min=1, help="At most so many prompts of the file.")] = None,
    delta: Annotated[float, typer.Option("--delta", help="The share of the layers to be sparse, in (0, 1].")] = 0.5,
) -> None:
    """Measure how much every layer changes its input; the layers that change it least may be sparse.

    Run it on long prompts of the kind that the model will see. What --out writes is what --sparse-layers takes.
    """
    tokens = texts.length(length)
    if not 0 < delta <= 1:
        raise ConfigError(f"--delta {delta} is not allowed: it must lie in (0, 1], the share of layers to be sparse")
    if tokens < _SHORTEST:
        raise ConfigError(
            f"--length {length} is too short to calibrate: take {_SHORTEST} or more, best what the model will see"
        )
    if file is not None and random is not None:
        raise ConfigError("both --prompts and --random given: choose one")
    with output.working("Loading PyTorch and transformers"):
        source = model.source()
        source.check(tokens, batch)
        chosen = _prompts(source, file, random, tokens, count)
    with output.working(f"Loading {source.name}"):
        loaded = source.load(tokens, batch)
    from tsa_compile.calibration import calibrate as measure

    found = measure(loaded, chosen, delta, batch_size=batch, progress=output.stderr().is_terminal)
    if source.folder is None:
        output.say("note", "the weights are random: this shows how calibration runs, not which layers a trained model has")
    out.draw(found.plot)
    out.show(_table(found, out.out), found.to_dict())


def _prompts(source: Source, file: Path | None, random: int | None, length: int, count: int | None) -> Any:
    if file is not None:
        found = prompts.read(file, length, count, source.tokenizer)
        if (shortest := min(map(len, found))) < _SHORTEST:
            raise ConfigError(
                f"{str(file)!r} holds a prompt of {shortest} tokens, too short to calibrate: leave out what is shorter than "
                f"{_SHORTEST} tokens"
            )
        return found
    if random is None and source.folder is not None:
        raise ConfigError("no prompts given: pass --prompts FILE (text or JSON lines), or --random 8 for random tokens")
    from tsa_compile.shapes import prompts as random_prompts

    return list(random_prompts(source.config, random or _RANDOM, length))


def _table(found: Calibration, path: Path | None) -> str:
    """The layers with drift and rank, and what to do with them."""
    sparse = set(found.sparse_layers)
    width = max(map(len, found.layers))
    lines = [f"{'layer'.ljust(width)}  drift    rank"]
    for index, (name, drift, rank) in enumerate(zip(found.layers, found.drift, found.ranks, strict=True)):
        lines.append(f"{name.ljust(width)}  {drift:<7.4f}  {rank:>4}{'  sparse' if index in sparse else ''}")
    chosen = ",".join(map(str, found.sparse_layers))
    lines.append(
        f"{len(sparse)} of {len(found.layers)} layers sparse at delta {found.delta:g}, from {found.tokens:,} tokens"
    )
    lines.append(f"use them: --sparse-layers {path or chosen}" if sparse else "no layer is sparse: take a larger --delta")
    return "\n".join(lines)
