"""`tsa-compile export`: a model with sparse layers that runs without Python, or outside of PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsa_compile.commands import output, texts
from tsa_compile.commands.options import ModelOptions, ResultOptions, SparseOptions, command
from tsa_compile.errors import ConfigError
from tsa_compile.files import stream, writable

if TYPE_CHECKING:
    from tsa_compile.commands.loading import Source
    from tsa_compile.config import TSAConfig


class Format(StrEnum):
    """What is written, and how its name ends."""

    AOTI = "aoti"
    ONNX = "onnx"
    TENSORRT = "tensorrt"
    PROGRAM = "program"


SUFFIXES = {
    Format.AOTI: (".pt2",),
    Format.ONNX: (".onnx",),
    Format.TENSORRT: (".engine", ".ts", ".pt2"),
    Format.PROGRAM: (".pt2",),
}


@command(
    (
        "A torch.export program, to be looked at or lowered later",
        "tsa-compile export --shape tiny --layers 1 --out tiny.pt2 --lengths 1K 4K",
    ),
    (
        "A package that runs from C++, sparse at every length from 1K to 128K tokens",
        "tsa-compile export my-llama --format aoti --out model.pt2 --min-length 1024",
    ),
    (
        "Standard ONNX operators, compared with what TensorRT supports",
        "tsa-compile export my-llama --format onnx --out model.onnx --check",
    ),
)
def export(
    model: ModelOptions,
    sparse: SparseOptions,
    result: ResultOptions,
    out: Annotated[Path | None, typer.Option("--out", help="The file to write: .pt2, .onnx, .engine or .ts.")] = None,
    kind: Annotated[
        Format,
        typer.Option("--format", help="What to write. tensorrt: .engine by TensorRT-RTX, .ts and .pt2 by torch-tensorrt."),
    ] = Format.PROGRAM,
    lengths: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--lengths",
            metavar="MIN MAX",
            help="The shortest and the longest prompt. Default: 1K 128K, or up to the model's positions.",
        ),
    ] = None,
    batches: Annotated[
        tuple[int, int] | None,
        typer.Option("--batches", metavar="MIN MAX", help="A range of batch sizes. Default: 1 alone."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Compare the ONNX file with what TensorRT supports. What it refuses is a failure: exit code 1."
        ),
    ] = False,
) -> None:
    """Export the prefill for a range of lengths: for C++ (AOTInductor), ONNX, TensorRT, or as a torch.export program."""
    given = None if lengths is None else texts.extent(*lengths)
    if batches is not None and not 1 <= batches[0] < batches[1]:
        raise ConfigError(
            f"--batches {batches[0]} {batches[1]} is not a range of sizes from 1 on: write the smaller size first, as 1 8"
        )
    target = _target(out, kind, check)
    with output.working("Loading PyTorch and transformers"):
        source = model.source()
        config = sparse.tsa_config(source)
        _check_budgets(config, kind)
        span = _span(source, given)
        _check_installed(kind, target)
        length = _example_length(source, *span)
        source.check(length, _example_batch(batches))
    with output.working(f"Loading {source.name}"):
        loaded = source.load(length, _example_batch(batches))
        sparse.check_model(loaded)
    with output.working(f"Exporting {source.name} for {span[0]:,} to {span[1]:,} tokens"):
        program, summary = _program(loaded, source, config, length, span, batches)
    with output.working(f"Writing {target}"):
        findings = _save(program, kind, target, check)
    if kind is Format.ONNX and "bfloat16" in str(source.dtype):
        output.say("note", "onnxruntime runs bfloat16 on GPUs alone: for its CPU provider, pass --dtype float16 or float32")
    if kind is Format.PROGRAM:
        output.say("note", "torch.export.load reads it after `import tsa_compile.export`, which registers the ops in it")
    beside = target.with_name(f"{target.name}.data")  # weights that do not fit into one ONNX file
    size = sum(path.stat().st_size for path in (target, beside) if path.exists())
    text = f"{target}: {kind}, {size / 1e6:,.1f} MB, lengths {span[0]:,} to {span[1]:,}\n{summary}"
    data: dict[str, Any] = {
        "path": str(target), "format": str(kind), "bytes": size, "lengths": list(span), "summary": summary,
        "config": config.to_dict(),
    }  # fmt: skip
    if check:
        data["tensorrt_findings"] = [str(finding) for finding in findings]
        text += "".join(f"\nTensorRT: {finding}" for finding in findings) or "\nTensorRT: nothing that it refuses"
    result.show(text, data)
    if any(finding.certain for finding in findings):
        raise typer.Exit(1)


def _target(out: Path | None, kind: Format, check: bool) -> Path:
    """The file to write, once it is clear that it can be."""
    if out is None:
        raise ConfigError(f"no file given: pass --out model{SUFFIXES[kind][0]}")
    if check and kind is not Format.ONNX:
        raise ConfigError(f"--check goes with --format onnx, found {kind}: TensorRT's tables speak of ONNX operators")
    others = [str(each) for each, suffixes in SUFFIXES.items() if out.suffix in suffixes]
    if others and str(kind) not in others:
        raise ConfigError(f"--out {out} is a file of --format {' or '.join(others)}, and the format is {kind}")
    return writable(out, *SUFFIXES[kind])


def _span(source: Source, given: tuple[int, int] | None) -> tuple[int, int]:
    """The shortest and the longest length, before any weights are loaded."""
    from tsa_compile.evaluation.limits import check_config
    from tsa_compile.export.program import default_lengths

    config = source.config.get_text_config()
    span = given or default_lengths(config)
    check_config(config, source.name, span[1])
    return span


def _check_budgets(config: TSAConfig, kind: Format) -> None:
    """Raises what standard operators are refused for, before the model is loaded and traced."""
    from tsa_compile.budgets import Coverage

    budgets = config.layers.values() if isinstance(config.layers, Mapping) else [config.budget]
    unbounded = config.capacity is None and any(isinstance(budget, Coverage) and budget.tau for budget in budgets)
    if unbounded and config.layers != () and kind in (Format.ONNX, Format.TENSORRT):
        raise ConfigError(
            f"--format {kind} computes as many rows as the shapes say, and a coverage decides at run time how many tokens "
            "are kept: pass --budget keep:0.15, or --config with a file that sets a capacity"
        )


def _check_installed(kind: Format, target: Path) -> None:
    """Raises what a missing package or compiler raises, before the model is loaded and traced."""
    from tsa_compile.export import onnx, tensorrt
    from tsa_compile.export._toolchain import require_compiler

    if kind is Format.AOTI:
        require_compiler()
    elif kind is Format.ONNX or target.suffix == ".engine":
        onnx.packages()
    elif kind is Format.TENSORRT:
        tensorrt.package()
    if target.suffix == ".engine":
        tensorrt.require_library()


def _example_length(source: Source, low: int, high: int) -> int:
    """A length within the range that is no size of the model, nor 1: torch.export would take them for constants."""
    sizes = {value for value in source.config.get_text_config().to_dict().values() if isinstance(value, int)}
    return next((length for length in range(low + 1, high) if length not in sizes), low if low > 1 else high)


def _example_batch(batches: tuple[int, int] | None) -> int:
    """torch.export would take a batch of one for a constant."""
    return 1 if batches is None else max(2, batches[0])


def _program(
    model: Any, source: Source, config: TSAConfig, length: int, span: tuple[int, int], batches: Any
) -> tuple[Any, str]:
    """The program, and a line on what became of the attention calls in it."""
    import torch

    from tsa_compile.export import export_program
    from tsa_compile.report import reports
    from tsa_compile.shapes import prompts

    ids = prompts(source.config, _example_batch(batches), length, source.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return export_program(model, inputs, config, dynamic_lengths=span, dynamic_batch=batches), reports()[-1].summary


def _save(program: Any, kind: Format, target: Path, check: bool) -> list[Any]:
    """Writes the file; what TensorRT would refuse in it, if that is asked for."""
    import torch

    from tsa_compile.export import aoti, onnx, tensorrt

    if kind is Format.AOTI:
        aoti.save(program, target)
    elif kind is Format.ONNX:
        onnx.save(program, target)
    elif target.suffix == ".engine":
        with TemporaryDirectory(prefix=".tsa-", dir=target.parent) as folder:
            onnx.save(program, Path(folder) / "model.onnx")
            tensorrt.build(Path(folder) / "model.onnx", target)
    elif kind is Format.TENSORRT:
        tensorrt.save(program, target)
    else:
        with stream(target) as file:
            torch.export.save(program, file)
    return tensorrt.check(target) if check else []
