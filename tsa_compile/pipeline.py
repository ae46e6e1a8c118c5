"""The passes, in order. This is the one place that knows it.

A pass that raises leaves the graph as the model wrote it, with a warning; with `strict=True` it raises. What each pass found
and how long it took is logged, and with debug output the graph after it: `TORCH_LOGS="+tsa_compile.pipeline"`.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable

from torch._dynamo.utils import lazy_format_graph_code  # type: ignore[attr-defined]  # torch does not list it
from torch.fx import Graph, GraphModule

from tsa_compile.config import LayerBudgets, TSAConfig, budget_dict
from tsa_compile.costs.devices import DeviceCosts
from tsa_compile.errors import ConfigError, RewriteError, TSAWarning
from tsa_compile.kernels import attend_floor, filled, listed, registry, sliding, sparse
from tsa_compile.kernels.autocast import keep_types
from tsa_compile.passes.base import CallPlan, GraphState, Pass, summary
from tsa_compile.passes.canonicalize import CanonicalizeDense
from tsa_compile.passes.cleanup import RemoveDeadMasks
from tsa_compile.passes.decompose import Decompose
from tsa_compile.passes.emit_padding import EmitPadding
from tsa_compile.passes.find import FindCalls
from tsa_compile.passes.graph import fake, static
from tsa_compile.passes.masks.infer import InferMasks
from tsa_compile.passes.plan import PlanCalls, is_cached_prefill, is_decode_step
from tsa_compile.passes.rewrite import RewriteSparse
from tsa_compile.passes.validate import Validate
from tsa_compile.passes.verify import Verify
from tsa_compile.reasons import NOT_UNDERSTOOD, Decision, Reason
from tsa_compile.report import CallRow, RewriteReport

# Importing a kernel module registers its ops as torch.ops.tsa.*, which is how the passes know them. These import all others.
OPS = (attend_floor, filled, listed, sliding, sparse)
keep_types()

PASSES: tuple[type[Pass], ...] = (
    FindCalls,  #          find.py           every attention call, in the normal form of call.py
    InferMasks,  #         masks/infer.py    what each mask means
    PlanCalls,  #          plan.py           sparse, dense without a mask, or untouched, and why
    EmitPadding,  #        emit_padding.py   which tokens are valid, once for calls that share it
    Validate,  #           validate.py       each call and its normal form, on small random inputs
    RewriteSparse,  #      rewrite.py        one op for each sparse call
    CanonicalizeDense,  #  canonicalize.py   is_causal, a window, or that and padding; no repeated heads
    Decompose,  #          decompose.py      the op opened into score, budget, select, compress, attend, decompress
    RemoveDeadMasks,  #    cleanup.py        what only the replaced calls read
    Verify,  #             verify.py         what must hold afterwards
)
WHOLE: tuple[type[Pass], ...] = tuple(kind for kind in PASSES if kind is not Decompose)
"""What a graph goes through that runs where Python does: it calls one op for each sparse call."""

_log = logging.getLogger(__name__)


def check_names(config: TSAConfig) -> None:
    """Raises ConfigError or KernelError where a configuration names a pass or a kernel that does not exist."""
    optional = [kind.__name__ for kind in PASSES if kind.optional]
    for skipped in config.skip_passes:
        if skipped not in optional:
            raise ConfigError(
                f"skip_passes={skipped!r} is not allowed: the passes that can be left out are {', '.join(optional)}"
            )
    registry.check(config.kernel, config.dense_kernel)


def run_passes(
    graph_module: GraphModule,
    config: TSAConfig,
    passes: tuple[type[Pass], ...] = PASSES,
    *,
    after: Callable[[Pass, GraphModule], None] | None = None,
    costs: DeviceCosts | None = None,
) -> RewriteReport:
    """Rewrites a graph in place and reports on every attention call in it.

    Args:
        graph_module: traced by Dynamo or torch.export, with fake values in its nodes' metadata.
        passes: PASSES open sparse attention into its steps, to be read and exported; WHOLE leave it one op a call.
        after: called with each pass and the graph when the pass is through: to step from one to the next.
        costs: of the device that is decided for; None for the one that the calls are on.

    Raises:
        ConfigError, KernelError: the configuration names a layer, a kernel or a pass that does not exist.
        RewriteError: a pass failed and `config.strict` is set.
    """
    check_names(config)
    state = GraphState(config, costs=costs)
    original = copy.deepcopy(graph_module.graph)
    _log.debug("%s", lazy_format_graph_code("before the passes", graph_module))
    for kind in passes:
        try:
            if kind.__name__ in config.skip_passes:
                kind.skip(state)
                continue
            _run(kind(state), graph_module, after)
        except ConfigError:
            raise
        except Exception as error:
            message = f"{kind.__name__} failed: {summary(error)}"
            if config.strict:
                raise RewriteError(f"{message} (strict=True)") from error
            warnings.warn(f"{message}. The graph is compiled as the model wrote it.", TSAWarning, stacklevel=2)
            _restore(graph_module, original, state, message)
            break
    _announce_misses(state)
    rows = tuple(_row(index, plan) for index, plan in enumerate(state.plans))
    return RewriteReport(rows, state.config.to_dict(), tuple(state.notes))


def _run(step: Pass, graph_module: GraphModule, after: Callable[[Pass, GraphModule], None] | None) -> None:
    """One pass; what it did is logged."""
    began = time.perf_counter()
    result = step(graph_module)
    _log.info("%s: %d matched, %.1f ms", step.name, step.matched, 1e3 * (time.perf_counter() - began))
    if result is not None and result.modified:
        _log.debug("%s", lazy_format_graph_code(f"after {step.name}", graph_module))
    if after is not None:
        after(step, graph_module)


def _restore(graph_module: GraphModule, original: Graph, state: GraphState, message: str) -> None:
    """Puts the graph back as the model wrote it, and says so for every call that was found until then."""
    graph_module.graph = original
    state.notes.append(message)
    for plan in state.plans:
        plan.keep(Reason.PASS_FAILED, message)


def _row(index: int, plan: CallPlan) -> CallRow:
    call = plan.call
    shapes = [_shape(fake(node)) for node in (call.query, call.key, call.value)]
    dtype = str(getattr(fake(call.query), "dtype", "")).removeprefix("torch.")
    mask = "causal" if plan.mask is None and call.is_causal is True else str(plan.mask or "not read")
    return CallRow(
        index=index, layer=call.layer, layer_index=plan.place.number, query=shapes[0], key=shapes[1], value=shapes[2],
        dtype=dtype, form=call.form, mask=mask, decision=plan.decision, reason=plan.reason, kernel=plan.kernel,
        detail=plan.detail,
        budget=own_budget(plan.config) if plan.decision is Decision.SPARSE else None,
        window=plan.mask.window if plan.decision is Decision.WINDOW and plan.mask is not None else None,
    )  # fmt: skip


def own_budget(config: TSAConfig) -> tuple[str, float] | None:
    """What the row of a sparse call says of its budget: that of its layer's configuration, where layers have one each."""
    if not isinstance(config.layers, LayerBudgets):
        return None
    ((kind, amount),) = budget_dict(config.budget).items()
    return kind, amount


def _shape(value: object) -> tuple[int | str, ...]:
    numbers = ((static(extent), extent) for extent in getattr(value, "shape", ()))
    return tuple(str(extent) if number is None else number for number, extent in numbers)


_ORDINARY = (Reason.LAYER_NOT_SELECTED, Reason.NOT_SELF_ATTENTION, Reason.NOT_CAUSAL)
# What a model has beside sparse layers, or what was warned of already.
_BESIDE_SPARSE = (
    Reason.SPARSE,
    Reason.SLIDING_WINDOW,
    Reason.CHUNKED,
    Reason.TOO_SHORT,
    Reason.PASS_FAILED,
    Reason.PASS_SKIPPED,
)


def _announce_misses(state: GraphState) -> None:
    """No rewrite is silent: layers were asked to be sparse, the graph has causal attention, and none, or not all, became so.

    With `strict=True` a single selected call that was not understood is an error.
    """
    plans, config = state.plans, state.config
    if config.layers == ():
        return
    missed = [plan for plan in plans if plan.selected and plan.reason in NOT_UNDERSTOOD]
    if config.strict and missed:
        said = "; ".join(f"{plan.call.layer}: {plan.reason} ({plan.detail})" for plan in missed)
        raise RewriteError(f"not sparse although asked for, because not understood: {said} (strict=True)")
    misses = [plan for plan in plans if _is_miss(plan)]
    if any(plan.decision is Decision.SPARSE for plan in plans):
        misses = [plan for plan in misses if plan.reason not in _BESIDE_SPARSE]
        text = (
            f"{len(misses)} of the {len(plans)} attention calls of this graph stay dense although their layers were selected"
        )
    else:
        text = f"no attention call of this graph became sparse ({len(plans)} calls)"
    if misses:
        reasons = {plan.reason: plan.detail for plan in reversed(misses)}
        said = "; ".join(reason.said(detail) for reason, detail in reversed(reasons.items()))
        warnings.warn(f"{text}. {said}", TSAWarning, stacklevel=2)


def _is_miss(plan: CallPlan) -> bool:
    """Whether a call was or may have been asked to be sparse, and is of the kind that becomes so; a decode step is not."""
    if not (plan.selected or plan.unplaced) or is_decode_step(plan):
        return False
    prefill = plan.reason is Reason.NOT_SELF_ATTENTION and is_cached_prefill(plan)
    return prefill or plan.reason not in _ORDINARY
