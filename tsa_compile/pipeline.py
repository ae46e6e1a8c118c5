"""The passes, in order. This is the one place that knows it.

    FindSites           every attention call, in normal form                    passes/sites.py, eager.py
    InferMasks          what each mask means                                    passes/masks.py
    PlanSites           sparse, dense without a mask, or untouched, and why     passes/plan.py
    EmitPadding         which tokens are valid, once for calls that share it    passes/padding.py
    Validate            each call and its normal form, on small random inputs   passes/validate.py
    RewriteSparse       score, budget, select, compress, attend, decompress     passes/rewrite.py
    CanonicalizeDense   is_causal, or causal and padding; no repeated heads     passes/canonicalize.py
    FuseSparse          the steps of a site as one op (compiled graphs only)    passes/fuse.py
    RemoveDeadMasks     what only the replaced calls read                       passes/cleanup.py
    Verify              what must hold afterwards                               passes/verify.py

A pass that raises leaves the graph as the model wrote it, with a warning; with `strict=True` it raises.
"""

from __future__ import annotations

import copy
import warnings

from torch.fx import Graph, GraphModule

from tsa_compile.config import TSAConfig
from tsa_compile.errors import ConfigError, RewriteError, TSAWarning
from tsa_compile.kernels import attend, budget, compress, decompress, fused, padded, registry, score, select, sparse
from tsa_compile.passes.base import GraphState, Pass, SitePlan, summary
from tsa_compile.passes.canonicalize import CanonicalizeDense
from tsa_compile.passes.cleanup import RemoveDeadMasks
from tsa_compile.passes.fuse import FuseSparse
from tsa_compile.passes.graph import fake
from tsa_compile.passes.padding import EmitPadding
from tsa_compile.passes.plan import FindSites, InferMasks, PlanSites, is_cached_prefill
from tsa_compile.passes.rewrite import RewriteSparse
from tsa_compile.passes.validate import Validate
from tsa_compile.passes.verify import Verify
from tsa_compile.report import Decision, Reason, RewriteReport, SiteRow

# Importing a kernel module registers its ops as torch.ops.tsa.*, which is how the passes know them.
OPS = (score, budget, select, compress, attend, decompress, padded, fused, sparse)

PASSES: tuple[type[Pass], ...] = (
    FindSites,
    InferMasks,
    PlanSites,
    EmitPadding,
    Validate,
    RewriteSparse,
    CanonicalizeDense,
    RemoveDeadMasks,
    Verify,
)
COMPILED: tuple[type[Pass], ...] = (*PASSES[:-2], FuseSparse, *PASSES[-2:])


def run_passes(graph_module: GraphModule, config: TSAConfig, passes: tuple[type[Pass], ...] = PASSES) -> RewriteReport:
    """Rewrites a graph in place and reports on every attention call in it.

    Args:
        graph_module: traced by Dynamo or torch.export, with fake values in its nodes' metadata.
        passes: PASSES leave the steps of sparse attention apart, to be read and exported; COMPILED fuse them.

    Raises:
        ConfigError, KernelError: the configuration names a layer or a kernel that does not exist.
        RewriteError: a pass failed and `config.strict` is set.
    """
    for name in (config.kernel, config.dense_kernel):
        if name not in (registry.AUTO, None):
            registry.get(name)
    state = GraphState(config)
    original = copy.deepcopy(graph_module.graph)
    for kind in passes:
        try:
            kind(state)(graph_module)
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
    return make_report(state)


def _restore(graph_module: GraphModule, original: Graph, state: GraphState, message: str) -> None:
    """Puts the graph back as the model wrote it, and says so for every call that was found until then."""
    graph_module.graph = original
    state.notes.append(message)
    for plan in state.plans:
        plan.keep(Reason.PASS_FAILED, message)


def make_report(state: GraphState) -> RewriteReport:
    """One row for each attention call."""
    return RewriteReport(
        rows=tuple(_row(index, plan) for index, plan in enumerate(state.plans)),
        config=state.config.to_dict(),
        notes=tuple(state.notes),
    )


def _row(index: int, plan: SitePlan) -> SiteRow:
    site = plan.site
    shapes = [_shape(fake(node)) for node in (site.query, site.key, site.value)]
    dtype = str(getattr(fake(site.query), "dtype", "")).removeprefix("torch.")
    mask = "causal" if plan.meaning is None and site.is_causal is True else str(plan.meaning or "not read")
    return SiteRow(
        index=index, layer=site.layer, layer_index=site.layer_index, query=shapes[0], key=shapes[1], value=shapes[2],
        dtype=dtype, form=site.form, mask=mask, decision=plan.decision, reason=plan.reason, kernel=plan.kernel,
        detail=plan.detail,
    )  # fmt: skip


def _shape(value: object) -> tuple[int | str, ...]:
    return tuple(extent if isinstance(extent, int) else str(extent) for extent in getattr(value, "shape", ()))


# A site that was asked to be sparse and whose meaning could not be established; the other reasons are established facts.
_NOT_UNDERSTOOD = (Reason.MASK_OPAQUE, Reason.UNSUPPORTED_FORM, Reason.PASS_FAILED)
_ORDINARY = (Reason.LAYER_NOT_SELECTED, Reason.NOT_SELF_ATTENTION, Reason.NOT_CAUSAL)


def _announce_misses(state: GraphState) -> None:
    """No rewrite is silent: layers were asked to be sparse, the graph has causal attention, and none became sparse.

    With `strict=True` a single selected site that was not understood is an error.
    """
    plans, config = state.plans, state.config
    if config.layers == ():
        return
    missed = [plan for plan in plans if plan.selected and plan.reason in _NOT_UNDERSTOOD]
    if config.strict and missed:
        said = "; ".join(f"{plan.site.layer}: {plan.reason} ({plan.detail})" for plan in missed)
        raise RewriteError(f"not sparse although asked for, because not understood: {said} (strict=True)")
    reasons = {plan.reason: plan.detail for plan in reversed(plans) if _is_miss(plan)}
    if reasons and all(plan.decision is not Decision.SPARSE for plan in plans):
        said = "; ".join(reason.said(detail) for reason, detail in reversed(reasons.items()))
        text = f"no attention call of this graph became sparse ({len(plans)} calls). {said}"
        warnings.warn(text, TSAWarning, stacklevel=2)


def _is_miss(plan: SitePlan) -> bool:
    """Whether a call was or may have been asked to be sparse, and is of the kind that becomes so; a decode step is not."""
    if not (plan.selected or plan.unplaced):
        return False
    prefill = plan.reason is Reason.NOT_SELF_ATTENTION and is_cached_prefill(plan)
    return prefill or plan.reason not in _ORDINARY
