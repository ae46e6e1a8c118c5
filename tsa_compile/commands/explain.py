"""`tsa-compile explain`: what the compiler would do with every attention call of a model, without weights or memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsa_compile.commands import output, texts
from tsa_compile.commands.options import GPU_NAMES, Batch, Length, ModelOptions, OutputOptions, SparseOptions, command
from tsa_compile.errors import ConfigError

if TYPE_CHECKING:
    from tsa_compile.commands.loading import Source
    from tsa_compile.config import TSAConfig
    from tsa_compile.costs.devices import DeviceCosts
    from tsa_compile.costs.predict import Prediction
    from tsa_compile.report import RewriteReport


@command(
    ("Which layers of a small model become sparse at 64K tokens?", "tsa-compile explain --shape tiny --length 64K"),
    (
        "Of an 8B-shaped one at 128K on an H100, and what is gained?",
        "tsa-compile explain --shape qwen3-8b --length 128K --device h100",
    ),
    (
        "Of my model, with the layers that were calibrated?",
        "tsa-compile explain my-llama --sparse-layers layers.json --length 32K",
    ),
)
def explain(
    model: ModelOptions,
    sparse: SparseOptions,
    out: OutputOptions,
    length: Length = "8K",
    batch: Batch = 1,
    predict: Annotated[
        bool, typer.Option("--predict/--no-predict", help="Also the expected time of every layer, dense and sparse.")
    ] = True,
    details: Annotated[
        bool,
        typer.Option("--details", help="Also shapes, dtypes, kernels and what is said about single calls: wide tables."),
    ] = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Load the weights and run the model; without them it is only traced.")
    ] = False,
) -> None:
    """Show what would become of every attention call, and why; nothing is compiled.

    The model is traced without weights and without memory, so any size at any length can be asked about on any machine.
    """
    tokens = texts.length(length)
    gpu = model.device.lower() if model.device.lower() in GPU_NAMES else None
    if gpu and weights:
        raise ConfigError(f"--device {gpu} goes without --weights, which run the model: take one of them away")
    with output.working("Loading PyTorch and transformers"):
        source, costs = _place(model, gpu, weights)
        config = sparse.tsa_config(source)
    _note_positions(source, tokens)
    with output.working(f"Tracing {source.name} at {tokens:,} tokens"):
        if weights:
            report = _with_weights(source, sparse, config, tokens, batch)
        else:
            from tsa_compile.shapes import explain_weightless

            report = explain_weightless(
                source.config, tokens, config, batch=batch, device=source.device, dtype=source.dtype,
                trust_remote_code=source.trust_remote_code, costs=costs,
            )  # fmt: skip
    data: dict[str, Any] = {"model": source.name, "length": tokens, "batch": batch, "report": report.to_dict()}
    text = _text(report, details)
    if predict:
        with output.working("Predicting times"):
            prediction = _prediction(source, config, tokens, batch, costs, chosen_dtype=model.dtype != "auto")
        if prediction is not None:
            data["prediction"] = prediction.to_dict()
            text += f"\n\n{_text(prediction, details)}"
    out.show(text, data)


def _text(found: RewriteReport | Prediction, details: bool) -> str:
    return str(found) if details else found.narrow(output.WIDTH)


def _place(model: ModelOptions, gpu: str | None, weights: bool) -> tuple[Source, DeviceCosts | None]:
    """The model, and the costs of the GPU that is asked about, where that is not this machine's.

    Without a GPU here an H200 is assumed, as long as nothing has to run: sparse layers are meant for GPUs.
    """
    import torch

    from tsa_compile.costs.devices import MEASURED

    if gpu is None and model.device == "auto" and not weights and not torch.cuda.is_available():
        gpu = "h200"
        output.say(
            "note", "no GPU is here, so one H200 is assumed; --device h100 asks about another, cpu about this machine"
        )
    if gpu is None:
        return model.source(), None
    source = replace(model, device="auto").source()
    if source.folder is None and model.dtype == "auto":
        source = replace(source, dtype=torch.bfloat16)
    return source, MEASURED[gpu]


def _note_positions(source: Source, length: int) -> None:
    """Tracing takes any length; the model itself may not."""
    from tsa_compile.evaluation.limits import check_config

    try:
        check_config(source.config.get_text_config(), source.name, length)
    except ConfigError as error:
        output.say("note", str(error))


def _prediction(
    source: Source, config: TSAConfig, length: int, batch: int, costs: DeviceCosts | None, chosen_dtype: bool
) -> Prediction | None:
    """None, with a note, for a model whose costs are not known: the report does not hang on them.

    Layers are sparse as in the report. On a CPU that is at any length at which tokens can be dropped; its times are not
    predicted but a GPU's, in bfloat16 and not in the float32 that a shape has on a CPU.
    """
    import torch

    from tsa_compile.costs.breakeven import droppable
    from tsa_compile.costs.predict import predict

    on_cpu = costs is None and source.device.type == "cpu"
    as_it_is = chosen_dtype or source.folder is not None or not on_cpu
    dtype = source.dtype if as_it_is else torch.bfloat16
    if on_cpu:
        config = config.replace(min_length=droppable(config))
    try:
        return predict(config, source.config, length, costs or source.device, batch=batch, dtype=dtype)
    except ConfigError as error:
        output.say("note", f"no times are predicted: {error}")
        return None


def _with_weights(source: Source, sparse: SparseOptions, config: TSAConfig, length: int, batch: int) -> RewriteReport:
    import torch

    from tsa_compile.explanation import explain as explain_model
    from tsa_compile.shapes import prompts

    model = source.load(length, batch)
    sparse.check_model(model)
    ids = prompts(source.config, batch, length, source.device)
    return explain_model(model, input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, config=config)
