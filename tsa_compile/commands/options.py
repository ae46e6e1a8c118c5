"""The options that commands share, as dataclasses, and `command`, which spreads them out for typer.

    @command("tsa-compile explain --shape tiny")
    def explain(model: ModelOptions, sparse: SparseOptions, output: OutputOptions, length: Length = "8K") -> None: ...

typer sees every field as an option of its own; the function gets them back as the three objects.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast, get_type_hints

import typer

from tsa_compile.commands import output, texts
from tsa_compile.commands.errors import guarded
from tsa_compile.config import MOST_LAYERS, TSAConfig
from tsa_compile.errors import ConfigError, unknown
from tsa_compile.files import writable

if TYPE_CHECKING:
    from tsa_compile.commands.loading import Source

_MODEL, _SPARSE, _OUTPUT = "Model", "Token Sparse Attention", "Output"


# Of shapes.SHAPES, costs.devices.MEASURED and evaluation.tasks.TASKS, which need PyTorch; a test holds them together.
GPU_NAMES = ("h200", "h100")
SHAPE_NAMES = (
    "tiny", "small", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b", "mistral-7b", "mistral-nemo",
    "qwen2.5-7b", "qwen3-0.6b", "qwen3-8b", "gemma-3-12b", "gpt-oss-20b", "phi-3-mini",
)  # fmt: skip
TASK_NAMES = (
    "needle", "needle_keys", "needle_values", "needle_queries", "question_first", "variables", "common_words",
    "frequent_words", "copy", "continuation",
)  # fmt: skip


def _option(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, **more)


def _among(*values: str) -> Callable[[str], list[str]]:
    """Completes what was begun to be written."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


@dataclass(frozen=True)
class ModelOptions:
    """Which model, where, and in which dtype."""

    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", show_default=False,
            help="A transformers model folder: config.json, weights and tokenizer, or one .gguf file; or a model on the "
            "Hugging Face Hub: owner/name.",
        ),
    ] = None  # fmt: skip
    shape: Annotated[
        str | None,
        _option(
            "--shape",
            panel=_MODEL,
            autocompletion=_among(*SHAPE_NAMES),
            help=f"A built-in shape with random weights instead: {', '.join(SHAPE_NAMES)}.",
        ),
    ] = None
    layers: Annotated[
        int | None,
        _option("--layers", min=1, max=MOST_LAYERS, panel=_MODEL, help="Build the shape with this number of layers only."),
    ] = None
    device: Annotated[
        str,
        _option(
            "--device", panel=_MODEL, autocompletion=_among("auto", "cpu", "cuda", *GPU_NAMES),
            help="auto (a GPU if there is one), cpu, cuda or cuda:N. For explain also h100 or h200, which may be elsewhere.",
        ),
    ] = "auto"  # fmt: skip
    dtype: Annotated[
        str,
        _option(
            "--dtype", panel=_MODEL, autocompletion=_among("auto", *texts.DTYPES),
            help="auto (the folder's; of shapes bfloat16 on GPUs, float32 on CPUs), float32, float16 (fp16) or bfloat16 "
            "(bf16).",
        ),
    ] = "auto"  # fmt: skip
    trust_remote_code: Annotated[
        bool, _option("--trust-remote-code", panel=_MODEL, help="Run Python code that lies in the folder.")
    ] = False

    def check(self) -> None:
        """Raises ConfigError for what can be seen to be wrong before PyTorch is imported."""
        if (self.folder is None) == (self.shape is None):
            found = f"both a folder ({str(self.folder)!r}) and --shape" if self.folder is not None else "no model"
            raise ConfigError(f"{found} given: pass a transformers model folder, or --shape tiny (or another shape)")
        if self.folder is not None and self.layers is not None:
            raise ConfigError(f"--layers {self.layers} goes with --shape alone: the model in a folder has its own layers")
        if self.folder is not None:
            texts.check_folder(self.folder)
        if self.shape is not None and self.shape not in SHAPE_NAMES:
            raise unknown(self.shape, "a built-in shape", SHAPE_NAMES)
        texts.check_device(self.device, GPU_NAMES)
        texts.dtype(self.dtype)

    def source(self) -> Source:
        """The model that they name; ConfigError where there is none."""
        from tsa_compile.commands.loading import source

        return source(**vars(self))


@dataclass(frozen=True)
class SparseOptions:
    """Which layers become sparse, and how: fields of TSAConfig."""

    budget: Annotated[
        str | None,
        _option("--budget", panel=_SPARSE, help="How many tokens are kept: coverage:0.005 or keep:0.5. Default: keep:0.15."),
    ] = None
    floor: Annotated[
        str | None,
        _option(
            "--floor", panel=_SPARSE,
            help="How many of the last and of the first tokens every row sees: 256,16; none: rows that are not kept become "
            "0, as published. Default: 256,16.",
        ),
    ] = None  # fmt: skip
    sparse_layers: Annotated[
        str | None,
        _option(
            "--sparse-layers", panel=_SPARSE,
            help="Indices (15-30,31), a pattern, a calibration's JSON file, the model name of a published list, upper or "
            "none. Default: upper, the upper half.",
        ),
    ] = None  # fmt: skip
    window: Annotated[
        str | None,
        _option("--window", panel=_SPARSE, help="The last tokens, always kept, which score the others. Default: 128."),
    ] = None
    min_tokens: Annotated[
        str | None,
        _option(
            "--min-tokens", panel=_SPARSE, help="The least number of tokens kept besides the window, from 0 on. Default: 1K."
        ),
    ] = None
    min_length: Annotated[
        str | None,
        _option("--min-length", panel=_SPARSE, help="The shortest prompt that is compressed: 2K. Default: by cost."),
    ] = None
    kernel: Annotated[
        str | None, _option("--kernel", panel=_SPARSE, help="The attention kernel over the kept rows. Default: auto.")
    ] = None
    config: Annotated[
        Path | None,
        _option("--config", panel=_SPARSE, help="A TSAConfig as JSON; the options above take precedence over it."),
    ] = None

    def tsa_config(self, source: Source, **changes: Any) -> TSAConfig:
        """The configuration that they ask for.

        Raises:
            ConfigError, KernelError: a value, file, layer or kernel that is not allowed or not there.
        """
        from tsa_compile.kernels import registry

        base = {}
        if self.sparse_layers is not None:
            changes["layers"] = texts.layers_of(self.sparse_layers, source.config, source.name)
            base = texts.measured(self.sparse_layers)
        config = self._but_layers(**base).replace(**changes)
        texts.check_one_budget(self.budget, config.layers)
        check_layers(config, source)
        registry.check(config.kernel, config.dense_kernel)
        return config

    def check(self) -> None:
        """Raises ConfigError for a value that is not allowed, before PyTorch is imported."""
        config = self._but_layers()
        if self.sparse_layers is not None:
            texts.check_layers(self.sparse_layers)
        else:
            texts.check_one_budget(self.budget, config.layers)

    def _but_layers(self, **measured: Any) -> TSAConfig:
        """The configuration of the options besides the layers, over those by which the layers were measured."""
        base = TSAConfig(**measured) if self.config is None else read_config(self.config)
        changes: dict[str, Any] = {} if self.kernel is None else {"kernel": self.kernel}
        for name, least in (("window", 1), ("min_tokens", 0), ("min_length", 1)):
            if (value := getattr(self, name)) is not None:
                changes[name] = texts.length(value, least, f"--{name.replace('_', '-')}")
        if self.budget is not None:
            changes["budget"] = texts.budget(self.budget)
        if self.floor is not None:
            changes["floor"] = texts.floor(self.floor)
        return base.replace(**changes)

    def check_model(self, model: Any) -> None:
        """Warns where layers come from the calibration of another model; ConfigError for a pattern that no module has."""
        chosen: Any = None if self.sparse_layers is None else texts.layers(self.sparse_layers)
        if hasattr(chosen, "check"):
            chosen.check(model)
        for pattern in [each for each in chosen if isinstance(each, str)] if isinstance(chosen, tuple) else ():
            if not any(fnmatchcase(name, pattern) for name, _ in model.named_modules()):
                raise ConfigError(f"--sparse-layers: no module of the model matches {pattern!r}: name layers, as 15-30,31")


def read_config(path: Path) -> TSAConfig:
    """A TSAConfig of a JSON file; ConfigError names the file."""
    try:
        return TSAConfig.from_json(path)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error


def check_layers(config: TSAConfig, source: Source) -> None:
    """Raises ConfigError for layers that a model does not have."""
    missing = [layer for layer in config.layers or () if isinstance(layer, int) and layer >= source.layers]
    if missing:
        others = f" (and {len(missing) - 1} more of those given)" if len(missing) > 1 else ""
        raise ConfigError(
            f"layer {missing[0]}{others} does not exist: {source.name} has the layers 0 to {source.layers - 1}"
        )


@dataclass(frozen=True)
class ResultOptions:
    """How the result is shown."""

    json: Annotated[bool, _option("--json", panel=_OUTPUT, help="Write JSON, and nothing else, to stdout.")] = False
    debug: Annotated[bool, _option("--debug", panel=_OUTPUT, help="Show the traceback of an error.")] = False

    def check(self) -> None:
        """Nothing can be wrong with these."""

    def show(self, text: str, data: Any) -> None:
        """Writes a result to stdout."""
        output.result(json.dumps(data, indent=2) if self.json else text)


@dataclass(frozen=True)
class OutputOptions(ResultOptions):
    """How the result is shown, and where it is kept."""

    out: Annotated[Path | None, _option("--out", panel=_OUTPUT, help="Also write the result as JSON to this file.")] = None

    def check(self) -> None:
        """Raises ConfigError if `--out` cannot be written."""
        super().check()
        if self.out is not None:
            writable(self.out)

    def show(self, text: str, data: Any) -> None:
        """Writes a result, to the file first."""
        if self.out is not None:
            output.write(data, self.out)
        super().show(text, data)


@dataclass(frozen=True)
class FigureOptions(OutputOptions):
    """How the result is shown, where it is kept, and where it is drawn."""

    figure: Annotated[
        Path | None, typer.Option("--figure", help="Also draw a figure: .png, .svg or .pdf; needs matplotlib.")
    ] = None

    def check(self) -> None:
        """Raises ConfigError if `--out` or `--figure` cannot be written."""
        super().check()
        if self.figure is not None:
            writable(self.figure, ".png", ".svg", ".pdf")

    def draw(self, plot: Callable[[Path], None]) -> None:
        """Lets `plot` draw the figure, if one was asked for."""
        if self.figure is not None:
            plot(self.figure)
            output.say("note", f"wrote {self.figure}")


Length = Annotated[str, typer.Option("--length", help="Prompt length in tokens: 8192, or 8K.")]
Batch = Annotated[int, typer.Option("--batch", min=1, max=2**16, help="How many prompts run at once.")]


class Command(Protocol):
    """A function for typer, and the examples that end its help."""

    epilog: str

    def __call__(self, **given: Any) -> None: ...


def command(*examples: tuple[str, str]) -> Callable[[Callable[..., None]], Command]:
    """Makes a function that takes options as dataclasses into one that typer understands.

    Args:
        examples: (what it answers, the command line) of the help's end.
    """

    def spread(function: Callable[..., None]) -> Command:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

        @functools.wraps(function)
        def run(**given: Any) -> None:
            objects = {
                name: kind(**{item.name: given.pop(item.name) for item in fields(kind)}) for name, kind in groups.items()
            }
            debug = any(getattr(value, "debug", False) for value in objects.values())

            def body() -> None:
                for options in objects.values():
                    options.check()
                function(**objects, **given)

            guarded(body, debug)

        parameters = list(_parameters(function, hints, groups))
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        vars(run).update(__signature__=inspect.Signature(parameters), epilog=_epilog(examples))
        return cast(Command, run)

    return spread


def _parameters(function: Callable[..., None], hints: dict[str, Any], groups: dict[str, Any]) -> Any:
    """The function's own options behind the model's, the other groups behind them."""
    own, shared = [], []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            own.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))
            continue
        types = get_type_hints(groups[name], include_extras=True)
        for item in fields(groups[name]):
            kind = inspect.Parameter.KEYWORD_ONLY
            shared.append(inspect.Parameter(item.name, kind, default=item.default, annotation=types[item.name]))
    return own + shared


def _epilog(examples: tuple[tuple[str, str], ...]) -> str:
    """Rich markup: each example behind what it answers. A blank line ends a paragraph for typer."""
    lines = [f"[dim]{what}[/dim]\n\n  [bold]{line}[/bold]" for what, line in examples]
    return "\n\n".join(["[bold]Examples[/bold]", *lines])
