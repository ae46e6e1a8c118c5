"""`tsa-compile bench`: the time of a prefill, dense, exact and sparse, side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from tsa_compile.commands import output, texts
from tsa_compile.commands.options import Batch, FigureOptions, ModelOptions, SparseOptions, command
from tsa_compile.errors import ConfigError

MODE_NAMES = ("eager", "compile", "exact", "sparse")  # bench.MODES, which needs PyTorch; a test holds the two together


@command(
    ("Does everything run here? (a CPU will do)", "tsa-compile bench --shape tiny --layers 1"),
    (
        "How fast is an 8B-shaped model at several lengths? (a GPU)",
        "tsa-compile bench --shape llama-3.1-8b --lengths 8K,32K --budget keep:0.5",
    ),
    (
        "And my own, against torch.compile as well, with a figure?",
        "tsa-compile bench my-llama --modes eager,compile,sparse --figure speed.png",
    ),
)
def bench(
    model: ModelOptions,
    sparse: SparseOptions,
    out: FigureOptions,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Prompt lengths: 8K,32K. Default: 8K,32K on a GPU, 2K on a CPU.")
    ] = None,
    batch: Batch = 1,
    modes: Annotated[
        str, typer.Option("--modes", help="Some of eager, compile, exact, sparse; speeds are relative to the first.")
    ] = "eager,exact,sparse",
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds",
            min=1,
            max=10_000,
            help="The least number of timed calls of each mode. Default: 5 on a GPU, 1 on a CPU.",
        ),
    ] = None,
    compiler: Annotated[
        str | None,
        typer.Option(
            "--compiler", help="What compiles the graphs. Default: inductor; on a CPU eager, which is quick to try."
        ),
    ] = None,
) -> None:
    """Time prefills: the model as it is, exact (masks proven causal are gone), and with sparse layers.

    All modes are compiled first and then take turns. Medians, spreads, peak memory and ratios come from one run.
    """
    tokens, chosen = None if lengths is None else texts.lengths(lengths), texts.names(modes)
    if not set(chosen) <= set(MODE_NAMES):
        raise ConfigError(f"--modes {modes} is not allowed: modes must be some of {', '.join(MODE_NAMES)}")
    with output.working("Loading PyTorch and transformers"):
        source = model.source()
        on_cpu = source.device.type == "cpu"
        tokens = tokens or ([2048] if on_cpu else [8192, 32768])
        changes = {"compiler": compiler or "eager"} if compiler or (on_cpu and sparse.config is None) else {}
        config = sparse.tsa_config(source, **changes)
        source.check(max(tokens), batch)
    from tsa_compile.bench import bench as measure

    with output.working(f"Loading {source.name}"):
        loaded = source.load(max(tokens), batch)
    sparse.check_model(loaded)
    rounds = rounds or (1 if on_cpu else 5)
    with output.steps() as progress:
        found = measure(loaded, tokens, config=config, modes=chosen, batch=batch, rounds=rounds, progress=progress)
    if on_cpu:
        output.say(
            "note", f"speed is claimed on GPUs only: this CPU's figures (compiler {config.compiler}) show that all modes run"
        )
    out.draw(found.plot)
    out.show(found.narrow(output.WIDTH), found.to_dict())
