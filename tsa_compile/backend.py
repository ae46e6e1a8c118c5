"""`tsa_backend`, the torch.compile backend: passes over Dynamo's graph, then any other compiler.

torch.compile(model, backend="tsa")                                     entry point, defaults
torch.compile(model, backend=tsa_backend, options={"layers": [3, 4]})   fields of TSAConfig
torch.compile(model, backend=tsa_backend, options={"config": TSAConfig(...)})
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import TorchDynamoException
from torch.fx import GraphModule

from tsa_compile.config import TSAConfig
from tsa_compile.errors import ConfigError, TSAError, TSAWarning
from tsa_compile.handover import keep_out_of_packages, take_over
from tsa_compile.kernels.sdpa import fastest_first
from tsa_compile.passes.apart import apart
from tsa_compile.passes.base import summary
from tsa_compile.pipeline import PASSES, WHOLE, run_passes
from tsa_compile.reasons import Decision, Reason
from tsa_compile.regions import NotCut, compile_by_region
from tsa_compile.report import RewriteReport, record

Compiled = Callable[..., Any]

_WITHOUT_WRITES = ("inductor", "aot_")
"""How the names of compilers begin that make a graph functional first (AOTAutograd)."""


def tsa_backend(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Rewrites the attention of a graph and hands it to `config.compiler`.

    Args:
        graph_module, example_inputs: as Dynamo passes them to a backend.
        options: fields of `TSAConfig`, or {"config": TSAConfig(...)}, or both: fields override the config's. They are read
            when torch.compile is called; changing the mapping afterwards has no effect.
        mode: torch.compile's mode ("reduce-overhead", ...), for Inductor.

    Returns:
        The compiled graph. What was done is appended to `reports()`.

    Raises:
        ConfigError: an option that does not exist or has a value that is not allowed.
        RewriteError: with strict=True, where a rewrite failed or an attention call was not understood.
    """
    config = TSAConfig.from_options(options)
    compiler = resolve_compiler(config, mode)
    keep_out_of_packages(graph_module)
    original = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    # A callable is somebody's own pass, which wants to see the steps, unless it says that it does not (skip_passes).
    report = run_passes(graph_module, config, WHOLE if isinstance(config.compiler, str) else PASSES)
    try:
        with dense_kernels():
            compiled, notes = _compile(graph_module, example_inputs, _regional(config, mode), compiler, report)
    except (TorchDynamoException, TSAError):
        raise  # Dynamo's own control flow (a restart of the analysis among it), or an error that is already clear
    except Exception as error:
        if config.strict or all(row.decision is Decision.UNCHANGED for row in report.rows):
            raise
        text = f"the rewritten graph could not be compiled ({summary(error)}); compiling the model's own"
        warnings.warn(text, TSAWarning, stacklevel=2)
        compiled = compiler(original, list(example_inputs))
        report, notes = untouched(report, text), ()
    record(replace(report, notes=(*report.notes, *notes)))
    pieces = graph_module.meta.get("pieces_of_inputs")
    if not pieces or (isinstance(config.compiler, str) and config.compiler.startswith(_WITHOUT_WRITES)):
        return compiled
    return apart(compiled, original, pieces)


def _regional(config: TSAConfig, mode: str | None) -> bool | None:
    """What was asked for; None, which is "where it costs no time", for Inductor as it is, without a mode."""
    usual = config.compiler == "inductor" and mode in (None, "default")
    return config.regional if config.regional is not None or usual else False


def _compile(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    regional: bool | None,
    compiler: Compiled,
    report: RewriteReport,
) -> tuple[Compiled, tuple[str, ...]]:
    """The compiled graph, and notes for the report."""
    if regional is False:
        return compiler(graph_module, list(example_inputs)), ()
    try:
        compiled, note = compile_by_region(graph_module, example_inputs, report, compiler, always=regional is True)
    except NotCut as error:
        notes = (f"regional: the graph is compiled as a whole: {error}",) if regional else ()
        return compiler(graph_module, list(example_inputs)), notes
    return compiled, (f"regional: {note}",)


take_over(tsa_backend)


def untouched(report: RewriteReport, why: str) -> RewriteReport:
    """The report of a graph that was compiled as the model wrote it after all."""
    rows = (replace(row, decision=Decision.UNCHANGED, reason=Reason.PASS_FAILED, detail=why) for row in report.rows)
    return replace(report, rows=tuple(rows), notes=(*report.notes, why))


def resolve_compiler(config: TSAConfig, mode: str | None = None) -> Compiled:
    """What compiles the rewritten graph: a callable, or the Dynamo backend of that name.

    Raises:
        ConfigError: no Dynamo backend has that name, a mode is given to one that takes none, or CUDA graphs are asked for
            with `regional`.
    """
    compiler: Any = config.compiler
    if isinstance(compiler, str):
        if compiler == "tsa":
            raise ConfigError("compiler='tsa' is not allowed: it would compile with itself; name another backend")
        try:
            compiler = lookup_backend(compiler)
        except Exception as error:
            known = ", ".join(torch._dynamo.list_backends(exclude_tags=()))
            raise ConfigError(f"compiler={config.compiler!r} is not allowed: Dynamo's backends are {known}") from error
    if mode is None or mode == "default":
        return compiler
    if config.compiler != "inductor":
        raise ConfigError(f"mode={mode!r} is not allowed with compiler={config.compiler!r}: only Inductor has modes")
    modes = torch._inductor.list_mode_options()  # what torch.compile's own Inductor wrapper makes of them
    if mode not in modes:
        raise ConfigError(f"mode={mode!r} is not allowed: Inductor's modes are {', '.join(modes)}")
    patches = modes[mode]
    if config.regional and patches.get("triton.cudagraphs"):
        raise ConfigError(
            f"mode={mode!r} is not allowed with regional=True: a CUDA graph holds the addresses of one layer's weights, and "
            "layers share their code here; choose one of the two"
        )
    return partial(compiler, config_patches=patches)


@contextmanager
def dense_kernels() -> Iterator[None]:
    """Which kernel a dense SDPA call becomes is decided while it is traced, so the order is set around tracing.

    Which one a plain call picks differs between versions of torch. The keys of torch's caches do not have the order: without
    a mark of its own, a graph that another backend compiles would get the kernels that were chosen here.
    """
    if not torch.cuda.is_available():
        yield
        return
    settings: Any = torch.compiler.config
    with fastest_first(), settings.patch(cache_key_tag=f"{settings.cache_key_tag} tsa: fastest kernels first"):
        yield
