"""`tsa-compile explain`: what the compiler would do with every attention call of a model, without weights or memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsa_compile.commands import output, texts
from tsa_compile.commands.options import Batch, Length, ModelOptions, OutputOptions, SparseOptions, command
from tsa_compile.errors import ConfigError

if TYPE_CHECKING:
    from tsa_compile.commands.loading import Source
    from tsa_compile.config import TSAConfig
    from tsa_compile.costs.predict import Prediction
    from tsa_compile.report import RewriteReport


@command(
    ("Which layers of a small model become sparse at 8K tokens?", "tsa-compile explain --shape tiny"),
    (
        "Of an 8B-shaped one at 128K, with half of the tokens kept, and what is gained?",
        "tsa-compile explain --shape qwen3-8b --layers 4 --length 128K --budget keep:0.5",
    ),
    (
        "Of my model, with the layers that were calibrated?",
        "tsa-compile explain models/my-llama --sparse-layers layers.json --length 32K",
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
    weights: Annotated[
        bool, typer.Option("--weights", help="Load the weights and run the model; without them it is only traced.")
    ] = False,
) -> None:
    """Show what would become of every attention call, and why; nothing is compiled.

    The model is traced without weights and without memory, so any size at any length can be asked about on any machine.
    """
    tokens = texts.length(length)
    out.check()
    with output.working("Loading PyTorch and transformers"):
        source = model.source()
        config = sparse.tsa_config(source)
    with output.working(f"Tracing {source.name} at {tokens:,} tokens"):
        report = _with_weights(source, sparse, config, tokens, batch) if weights else _report(source, config, tokens, batch)
    data: dict[str, Any] = {"model": source.name, "length": tokens, "batch": batch, "report": report.to_dict()}
    text = str(report)
    if predict:
        with output.working("Predicting times"):
            prediction = _prediction(source, config, tokens, batch, chosen_dtype=model.dtype != "auto")
        if prediction is not None:
            data["prediction"] = prediction.to_dict()
            text += f"\n\n{prediction}"
    out.show(text, data)


def _prediction(source: Source, config: TSAConfig, length: int, batch: int, chosen_dtype: bool) -> Prediction | None:
    """None, with a note, for a model whose costs are not known: the report does not hang on them."""
    import torch

    from tsa_compile.costs.predict import predict

    # A CPU's times are not predicted but a GPU's, which nobody would run in the float32 that a shape has on a CPU.
    as_it_is = chosen_dtype or source.folder is not None or source.device.type == "cuda"
    dtype = source.dtype if as_it_is else torch.bfloat16
    try:
        return predict(config, source.config, length, source.device, batch=batch, dtype=dtype)
    except ConfigError as error:
        output.say("note", f"no times are predicted: {error}")
        return None


def _report(source: Source, config: TSAConfig, length: int, batch: int) -> RewriteReport:
    from tsa_compile.shapes import explain_weightless

    return explain_weightless(
        source.config, length, config, batch=batch, device=source.device, dtype=source.dtype,
        trust_remote_code=source.trust_remote_code,
    )  # fmt: skip


def _with_weights(source: Source, sparse: SparseOptions, config: TSAConfig, length: int, batch: int) -> RewriteReport:
    import torch

    from tsa_compile.explanation import explain as explain_model
    from tsa_compile.shapes import prompts

    model = source.load(length, batch)
    sparse.check_model(model)
    ids = prompts(source.config, batch, length, source.device)
    return explain_model(model, input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, config=config)
