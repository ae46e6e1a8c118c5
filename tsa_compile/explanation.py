"""`explain(model, *inputs)`: what the compiler would do with a model, and why, without compiling it."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from tsa_compile.config import TSAConfig, given
from tsa_compile.costs.devices import DeviceCosts, costs_of, is_cpu
from tsa_compile.costs.expected import with_expectations
from tsa_compile.errors import ConfigError, TSAWarning
from tsa_compile.pipeline import check_names, run_passes
from tsa_compile.report import RewriteReport


def explain(
    model: Any,
    *args: Any,
    config: TSAConfig | None = None,
    device: torch.device | str | DeviceCosts | None = None,
    **kwargs: Any,
) -> RewriteReport:
    """One row for each attention call of a model, for these inputs.

    The model runs once, without gradients (the only way in which anything is rewritten), in its exact rewritten form: dense,
    and without L x L masks where they are proven causal. A cache among the inputs is copied, and so stays as it is. Nothing
    is compiled and nothing is recorded. Like `torch._dynamo.explain` it resets Dynamo: what was compiled before is compiled
    again at its next call.

    Args:
        model: a module or function.
        args, kwargs: its inputs.
        config: what would be passed to the backend; the defaults if None.
        device: whose costs give the expected time of each call, dense and as decided: a device, costs, or the name of a
            measured device ("h200", "h100"). If None, the CUDA device that the inputs are on. It also decides which calls
            are long enough to become sparse. CPUs have no costs: no times are expected there, and calls become sparse at
            any length at which tokens can be dropped.

    Returns:
        A report over all graphs that the call consists of. `print` shows it as a table, `to_json()` as data.

    Raises:
        ConfigError: `model` cannot be called, or `config`, a value in it or `device` is not allowed.
        KernelError: `config` names a kernel that is not registered.
    """
    if not callable(model) or isinstance(model, type):  # torch.compile would change a class for all of its instances
        raise ConfigError(f"a {type(model).__name__} is not allowed: explain() takes a model, or a function, and its inputs")
    config = given(config, "explain")
    check_names(config)  # inside of Dynamo it would be raised as Dynamo's own error
    costs = None if device is None else costs_of(device)[0]  # before the whole model has run, should it be unknown
    decider = None if is_cpu(device) else costs  # which is None where no device is given
    seen: list[RewriteReport] = []
    devices: list[torch.device] = []

    def look(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Any:
        trial = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
        trial.__dict__["compile_subgraph_reason"] = getattr(graph_module, "compile_subgraph_reason", None)
        seen.append(run_passes(trial, config, costs=decider))
        devices.extend(value.device for value in example_inputs if isinstance(value, torch.Tensor) and value.is_cuda)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TSAWarning)  # said already, for the configuration that was asked about
            run_passes(graph_module, TSAConfig(layers=()))
        return graph_module.forward

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            own = {name: _own(value) for name, value in kwargs.items()}
            torch.compile(model, backend=look)(*map(_own, args), **own)
    finally:  # or the model's next compilation would count this one against Dynamo's recompilation limit
        torch._dynamo.reset()
    report, on = _merge(seen, config), device or next(iter(devices), None)
    return report if on is None else with_expectations(report, config, on)


def _own(value: Any) -> Any:
    """An argument that the model may write to: a cache of transformers is copied."""
    return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value


def _merge(reports: list[RewriteReport], config: TSAConfig) -> RewriteReport:
    """One report over several graphs, its rows numbered through."""
    rows = [row for report in reports for row in report.rows]
    numbered = tuple(dataclasses.replace(row, index=index) for index, row in enumerate(rows))
    notes = [note for report in reports for note in report.notes]
    if len(reports) > 1:
        notes.insert(0, f"the call consists of {len(reports)} graphs")
    return RewriteReport(rows=numbered, config=config.to_dict(), notes=tuple(notes))
