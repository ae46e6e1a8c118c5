"""`tsa-compile eval`: what sparse layers cost a pretrained model in accuracy, through its own tokenizer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsa_compile.commands import output, prompts, texts
from tsa_compile.commands.options import TASK_NAMES, ModelOptions, ResultOptions, SparseOptions, check_layers, command
from tsa_compile.config import LayerBudgets, TSAConfig
from tsa_compile.errors import ConfigError
from tsa_compile.files import read_json, writable

if TYPE_CHECKING:
    from tsa_compile.commands.loading import Source
    from tsa_compile.evaluation import Setting

_MOST_SAMPLES = 1_000_000
_DENSE = "dense"  # evaluation.DENSE
_ON_GPU: dict[str, Any] = {"lengths": [4096], "samples": 50, "batch_tokens": 32768}  # study.BATCH_TOKENS
_ON_CPU: dict[str, Any] = {"lengths": [2048], "samples": 8, "tasks": ["needle"], "batch_tokens": 4096}


@command(
    ("Does it run here? (random weights answer nothing right)", "tsa-compile eval --shape tiny --layers 1 --samples 2"),
    (
        "What does a budget cost my model? The file lets it go on after a stop",
        "tsa-compile eval my-llama --text book.txt --budget keep:0.3 --out study.json",
    ),
    (
        "Several settings on the same samples, one of them as published",
        "tsa-compile eval my-llama --setting keep:0.15 --setting keep:0.15,floor=none",
    ),
)
def evaluate(
    model: ModelOptions,
    sparse: SparseOptions,
    result: ResultOptions,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--setting",
            help="A budget and, behind commas, what differs from the options below: floor=none or 256+16, layers=2-29+31, "
            "window=32, min_tokens=0, granularity=group, kernel=NAME, select=random (the control: random tokens). A "
            "calibration by loss stands in the budget's place: layers=layers.json. Pass the option once for each setting; "
            "all are compared with dense. Default: the options below.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            "--task",
            help="needle, needle_keys, needle_values, needle_queries, question_first, variables, common_words, "
            "frequent_words, copy, continuation (of --text). Default: all; needle on a CPU.",
        ),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", "--length", help="Prompt lengths: 4K,16K. Default: 4K; 2K on a CPU.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", min=1, max=_MOST_SAMPLES, help="Samples of each task and length. Default: 50; 8 on a CPU."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="A text file of yours, to hide things in. Default: a few sentences, repeated."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="The seed of the samples.")] = 0,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", min=1, help="Tokens that run at once. Default: 32768; 4096 on a CPU.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A JSON file for the results, written as they come. The same command continues from it."),
    ] = None,
) -> None:
    """Compare settings with dense attention on tasks in plain English that need the whole prompt.

    A prefill by the setting, then the answer through its cache: is it right, how likely is the
    expected one, how far from dense are the probabilities? All settings run on the same samples.
    """
    request: dict[str, Any] = {"seed": seed}
    request |= {"lengths": texts.lengths(lengths)} if lengths is not None else {}
    request |= {"tasks": texts.names(tasks)} if tasks is not None else {}
    request |= {"samples": samples} if samples else {}
    request |= {"batch_tokens": batch_tokens} if batch_tokens else {}
    texts.check_tasks(request.get("tasks", ()), TASK_NAMES)
    _check_settings(setting or [], sparse.budget)
    if out is not None and writable(out).exists():
        read_json(out, "pass a file that tsa-compile eval wrote, or a new name")
    request |= {"text": prompts.read_prose(text, "--text")} if text else {}
    with output.working("Loading PyTorch and transformers"):
        from tsa_compile.evaluation.statistics import require_statsmodels

        require_statsmodels()  # found missing before the work
        source = model.source()
        defaults = _ON_CPU if source.device.type == "cpu" else _ON_GPU
        every = [task for task in TASK_NAMES if text is not None or task != "continuation"]
        request = {"tasks": every, **defaults, **request}
        settings = _settings(source, sparse, setting or [])
        tokenizer = _tokenizer(source)
    with output.working(f"Loading {source.name}"):
        loaded = source.load(*_largest_batch(request))
    _check_weights(loaded, source, sparse, setting or [])
    if source.folder is None:
        output.say("note", "the weights are random: this shows that the study runs; its accuracies mean nothing")
    from tsa_compile.evaluation import evaluate as run
    from tsa_compile.evaluation import tables

    with output.steps() as progress:
        study = run(loaded, tokenizer, settings=settings, file=out, progress=progress, **request)
    result.show(tables.text(study), {**study.to_dict(), "summary": tables.summary(study)})


def _check_settings(named: list[str], budget: str | None) -> None:
    """Raises ConfigError for a setting that is not understood, and for a `--budget` that none of them leaves in place."""
    changes = [texts.setting(name)[0] for name in named if name != _DENSE]
    for each in changes:
        TSAConfig().replace(**each)
    own = all("budget" in each or isinstance(each.get("layers"), LayerBudgets) for each in changes)
    if named and own and budget is not None:
        raise ConfigError(
            f"--budget {budget} is used by no --setting: each has a budget of its own, or is dense. Leave it out, or "
            f"compare it as well, by --setting {budget}"
        )


def _largest_batch(request: dict[str, Any]) -> tuple[int, int]:
    """The length and the number of the prompts that run at once with the most tokens together."""
    from tsa_compile.evaluation.study import Plan

    plan = Plan((), (), tuple(request["lengths"]), request["samples"], request["seed"], request["batch_tokens"])
    return max(((length, plan.batch(length)) for length in plan.lengths), key=lambda size: (size[0] * size[1], size[1]))


def _check_weights(model: Any, source: Source, sparse: SparseOptions, named: list[str]) -> None:
    """Warns, once for each of them, of calibrations with other weights than the model's."""
    sparse.check_model(model)
    read = functools.cache(functools.partial(texts.layers_of, config=source.config, name=source.name, model=model))
    for name in named:
        if name != _DENSE:
            texts.setting(name, read)


def _settings(source: Source, sparse: SparseOptions, named: list[str]) -> list[Setting]:
    """The settings of the command line; without `--setting` that of the other options."""
    from tsa_compile.evaluation import DENSE, Setting

    base = sparse.tsa_config(source)
    base = base if base.min_length is not None else base.replace(min_length=1)  # it is accuracy that is asked for, not time
    if not named:
        return [Setting(sparse.budget or "sparse", base)]
    found = []
    read = functools.partial(texts.layers_of, config=source.config, name=source.name)
    for name in dict.fromkeys(named):
        if name == DENSE.name:
            continue
        changes, random = texts.setting(name, read)
        config = base.replace(**changes)
        if "budget" in changes and isinstance(config.layers, LayerBudgets):
            raise ConfigError(
                f"--setting {name} has a budget, but the layers that --config or --sparse-layers names have one each, which "
                f"would hold. Name the setting's layers too: --setting {name},layers=upper"
            )
        check_layers(config, source)
        found.append(Setting(name, config, random))
    return found


def _tokenizer(source: Source) -> Any:
    """The folder's; for a shape with random weights, which know no words, one whose tokens are bytes."""
    if source.folder is not None:
        return source.tokenizer(
            "eval asks in words, so copy the model's tokenizer (tokenizer.json, tokenizer_config.json) into the folder"
        )
    from tsa_compile.costs.models import require_transformers

    transformers = require_transformers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = Tokenizer(models.BPE({letter: place for place, letter in enumerate(sorted(spelt.alphabet()))}, []))
    made.pre_tokenizer, made.decoder = spelt, decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)
