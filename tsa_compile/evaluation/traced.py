"""A model that Dynamo traces once, and that every setting compiles from there.

    prefill = torch.compile(model, backend=tsa_backend, options=...)    one trace and one rewrite for each setting
    traced  = Traced(model)                                             one trace
    prefill = traced.by(config)                                         one rewrite for each setting, at its first call

What Dynamo traces does not depend on the configuration. For a model of thirty layers tracing takes ten seconds on one core,
and rewriting the graph one or two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule

from tsa_compile.backend import Compiled, tsa_backend
from tsa_compile.config import TSAConfig


class Traced:
    """One model, to be compiled by several configurations for prompts of fixed shapes.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._config: TSAConfig | None = None
        self._call = torch.compile(model, backend=self._keep, dynamic=False)

    def by(self, config: TSAConfig) -> Callable[..., Any]:
        """The model as `torch.compile(model, backend=tsa_backend, options={"config": config})` would run it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._config = config
            return self._call(*args, **kwargs)

        return run

    def _keep(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        """Dynamo's graph, which is compiled when the first call of a configuration comes to it."""
        context, made = TracingContext.get(), dict[TSAConfig | None, Compiled]()

        def run(*inputs: Any) -> Any:
            if self._config not in made:
                own = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
                own.meta.update(graph_module.meta)
                with tracing(context):
                    made[self._config] = tsa_backend(own, example_inputs, options={"config": self._config})
            return made[self._config](*inputs)

        return run
