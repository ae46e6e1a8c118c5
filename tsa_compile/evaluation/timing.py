"""What the methods of a study save in time: attention alone, the whole prefill, and what the cost model foresees.

Attention is timed inside the model's own graph: an interpreter runs it node by node and repeats every attention call on the
tensors that arrive there. So counts are those of real inputs, nothing else is timed, and nothing need be compiled to machine
code. Probes are left out: with them in the graph, its steps could not be fused into the op that compiled graphs call.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from tsa_compile.backend import _dense_kernels
from tsa_compile.bench import elapsed_ms
from tsa_compile.config import TSAConfig
from tsa_compile.costs.calls import CallShape, dense_ms, sparse_ms
from tsa_compile.costs.devices import for_device
from tsa_compile.evaluation.methods import Method, compiled, parse
from tsa_compile.evaluation.outcomes import Timing, kept
from tsa_compile.evaluation.results import Study
from tsa_compile.evaluation.tasks import generate

_ATTENTION = (
    torch.nn.functional.scaled_dot_product_attention, torch.ops.tsa.padded_attention.default,
    torch.ops.tsa.sparse_attention.default, torch.ops.tsa.padded_sparse_attention.default,
)  # fmt: skip
PREFILLS = ("dense", "coverage-0.005", "coverage-0.01", "keep-0.5")


class AttentionTimer:
    """A `compiler` that runs the graph node by node and times its attention calls, the selection included.

    Attributes:
        ms: milliseconds of each attention call since the last `clear`, means over `repeats`.
        calls: the shape of each of these calls, and whether it is sparse.
    """

    def __init__(self, config: TSAConfig, repeats: int = 10) -> None:
        self.config, self.repeats = config, repeats
        self.ms: list[float] = []
        self.calls: list[tuple[CallShape, bool]] = []

    def clear(self) -> None:
        """Forgets what was timed: the first run compiles kernels."""
        self.ms, self.calls = [], []

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        interpreter = _Timed(graph_module, self)

        def run(*inputs: Any) -> Any:
            with _dense_kernels():
                return interpreter.run(*inputs)

        return run


class _Timed(Interpreter):
    def __init__(self, graph_module: GraphModule, timer: AttentionTimer) -> None:
        super().__init__(graph_module)
        self.timer = timer

    def run_node(self, n: Node) -> Any:
        if n.target in _ATTENTION:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            query, key, value = args[:3]
            shape = CallShape.of(query, key, value, self.timer.config)
            self.timer.calls.append((shape, n.target is torch.ops.tsa.sparse_attention.default))
            call = functools.partial(self.call_function, n.target, args, kwargs)
            self.timer.ms.append(_milliseconds(call, query.device, self.timer.repeats))
        return super().run_node(n)


def _milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The mean time of a call among `repeats` in a row, after one that warms up."""

    def run() -> None:
        for _ in range(repeats):
            call()

    call()
    return elapsed_ms(run, device) / repeats


def add_times(
    model: nn.Module,
    study: Study,
    *,
    batch: int = 1,
    repeats: int = 10,
    prefills: Sequence[str] = PREFILLS,
    compiler: str = "inductor",
    done: Callable[[Study], None] = lambda study: None,
) -> Study:
    """The study with the times of its methods at its lengths. The controls cost what their twins cost, and are left out.

    Args:
        model: the one that was studied, in evaluation mode.
        batch: samples at once.
        repeats: of every attention call, and of every prefill.
        prefills: the methods whose whole prefill is compiled and timed as well.
        compiler: what compiles these.
        done: is called with the study after each method and length; those that it has already are not timed again.
    """
    layers = [int(layer) for layer in study.conditions["layers"]]
    for length in study.names("length"):
        for name in study.names("method"):
            method = parse(name)
            if method.control is not None or any((old.method, old.length) == (name, length) for old in study.times):
                continue
            timing = _attention(model, study, method, length, layers, batch, repeats)
            if name in prefills:
                config = method.config(length, layers).replace(compiler=compiler)
                timing = replace(timing, prefill_ms=_prefill(model, config, length, batch, repeats))
            study = study.with_time(timing)
            done(study)
    return study


def _attention(
    model: nn.Module, study: Study, method: Method, length: int, layers: list[int], batch: int, repeats: int
) -> Timing:
    """All layers' attention, the mean over one batch of every task."""
    config = method.config(length, layers)
    timer = AttentionTimer(config, repeats)
    call = compiled(model, config.replace(compiler=timer, skip_passes=["Decompose"]))
    totals = []
    for place, task in enumerate(study.names("task")):
        tokens = _tokens(model, task, length, batch)
        if place == 0:
            call(tokens, 1)
        timer.clear()
        call(tokens, 1)
        totals.append(sum(timer.ms))
    cells = [cell for cell in study.cells if (cell.length, cell.method) == (length, method.name)]
    keep = kept(cells)
    device = next(model.parameters()).device
    return Timing(
        method=method.name, length=length, batch=batch, attention_ms=round(statistics.fmean(totals), 4), prefill_ms=None,
        predicted_ms=_predicted(timer.calls, device, length, keep), keep=keep,
    )  # fmt: skip


def _predicted(calls: list[tuple[CallShape, bool]], device: torch.device, length: int, keep: float) -> float | None:
    """The cost model's attention time for the share that was really kept; it knows CUDA devices only."""
    if device.type != "cuda":
        return None
    costs = for_device(device)
    total = 0.0
    for call, sparse in calls:
        total += sparse_ms(call, costs)(length, keep) if sparse else dense_ms(call, costs)(length)
    return round(float(total), 4)


def _prefill(model: nn.Module, config: TSAConfig, length: int, batch: int, repeats: int) -> float:
    """Median milliseconds of the whole compiled model, with the logits of the last token."""
    call = compiled(model, config)
    tokens = _tokens(model, "mqar", length, batch)
    times = [elapsed_ms(lambda: call(tokens, 1), tokens.device) for _ in range(repeats + 2)]
    return round(statistics.median(times[2:]), 4)


def _tokens(model: nn.Module, task: str, length: int, batch: int) -> Tensor:
    return generate(task, batch=batch, length=length, seed=0).tokens.to(next(model.parameters()).device)
