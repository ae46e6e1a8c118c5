"""Which sites become sparse, which dense ones get cheaper without any approximation, and why the others stay.

    before   sites with the meaning of their masks
    after    the same graph; each SitePlan has a decision, a reason code and a kernel

The order of the questions is the order of the reason codes: is the call of a known form, needs no gradient, has no
dropout, attends to itself; is its mask causal; is its layer selected; can the kernels take it; is it long enough, which on
a GPU means long enough to gain time there (costs.py). On a CPU correctness is the aim, and any length is compressed.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.fx import GraphModule

from tsa_compile.config import TSAConfig
from tsa_compile.errors import ConfigError, KernelError
from tsa_compile.kernels.attend import AUTO, KernelRequest, choose
from tsa_compile.passes.aten import record
from tsa_compile.passes.base import Pass, PassResult, SitePlan
from tsa_compile.passes.costs import SiteShape, break_even
from tsa_compile.passes.devices import for_device
from tsa_compile.passes.graph import fake, known
from tsa_compile.passes.masks import MaskKind, held, infer_mask
from tsa_compile.passes.sites import AttentionSite, sites_of
from tsa_compile.report import Decision, Reason

_DEVICES = ("cuda", "cpu")
MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MASK_REASONS = {
    MaskKind.NONE: Reason.NOT_CAUSAL,
    MaskKind.PADDING: Reason.NOT_CAUSAL,
    MaskKind.SLIDING_WINDOW: Reason.SLIDING_WINDOW,
    MaskKind.CHUNKED: Reason.CHUNKED,
    MaskKind.PACKED: Reason.PACKED,
    MaskKind.OPAQUE: Reason.MASK_OPAQUE,
}


class FindSites(Pass):
    """Reads every attention call into its normal form."""

    def call(self, graph_module: GraphModule) -> PassResult:
        self.state.aten = record(graph_module)
        self.state.plans = [SitePlan(site) for site in sites_of(self.state.aten)]
        return self.result(graph_module, modified=False)


class InferMasks(Pass):
    """Infers what each site's mask means; sites that share a mask share the work."""

    def call(self, graph_module: GraphModule) -> PassResult:
        shared: dict[Any, Any] = {}
        for plan in self.state.plans:
            site = plan.site
            if site.problem is not None:
                continue
            with self.state.attempt(plan, graph_module.graph, "mask inference"):
                shapes = (tuple(fake(site.query).shape), fake(site.key).shape[2])
                key = (site.masks, str(site.is_causal), str(shapes))
                if key not in shared:
                    shared[key] = infer_mask(site)
                plan.meaning = held(shared[key], site)
        return self.result(graph_module, modified=False)


class PlanSites(Pass):
    """Decides about every site; changes nothing in the graph."""

    def call(self, graph_module: GraphModule) -> PassResult:
        sites = [plan.site for plan in self.state.plans]
        selected = select_layers(sites, self.state.config, whole=is_whole(graph_module))
        share = sum(reason is None for reason in selected.values()) / max(len(sites), 1)
        for plan in self.state.plans:
            if plan.reason is Reason.PASS_FAILED:
                continue
            plan.selected = selected[plan.site] is None
            with self.state.attempt(plan, graph_module.graph, "planning"):
                self._decide(plan, selected[plan.site], share)
        return self.result(graph_module, modified=False)

    def _decide(self, plan: SitePlan, selected: Reason | None, sparse_layers: float) -> None:
        obstacle = _obstacle(plan)
        if obstacle is not None:
            return plan.keep(*obstacle)
        assert plan.meaning is not None
        plan.decision = Decision.PADDED if plan.meaning.padding is not None else Decision.CAUSAL
        reason, detail = selected, ""
        if reason is None:
            reason, detail = _sparse_obstacle(plan, self.state.config, sparse_layers)
        if reason is None:
            plan.decision, reason = Decision.SPARSE, Reason.SPARSE
        elif self.state.config.dense_kernel is not None and _kernel_obstacle(plan)[0] is None:
            plan.decision = Decision.KERNEL
        plan.reason, plan.detail = reason, detail
        if plan.decision is Decision.PADDED and plan.meaning.nan_rows:
            return plan.keep(reason, detail or "it stays as it is: a row that may look nowhere is NaN in it")
        try:
            plan.kernel = _kernel(plan, self.state.config)
        except KernelError as error:  # a kernel that was asked for by name and does not fit this site
            plan.decision = Decision.PADDED if plan.meaning.padding is not None else Decision.CAUSAL
            plan.reason, plan.detail, plan.kernel = Reason.KERNEL, str(error), ""
        return None


def _obstacle(plan: SitePlan) -> tuple[Reason, str] | None:
    """Why a site must stay exactly as the model wrote it."""
    site = plan.site
    if site.problem is not None:
        return site.problem
    query, key, value = (fake(node) for node in (site.query, site.key, site.value))
    if query.requires_grad or key.requires_grad or value.requires_grad:
        return Reason.NEEDS_GRAD, ""
    if not isinstance(site.dropout, (int, float)) or site.dropout != 0:
        return Reason.DROPOUT, f"dropout {site.dropout}"
    if not _is_positive(site.scale):
        return Reason.UNSUPPORTED_FORM, f"the scale is {fake(site.scale)}: torch's causal kernels are right for positive ones"
    if not known(query.shape[2] == key.shape[2]):
        return Reason.NOT_SELF_ATTENTION, f"{query.shape[2]} queries over {key.shape[2]} keys"
    assert plan.meaning is not None
    reason = _MASK_REASONS.get(plan.meaning.kind)
    return None if reason is None else (reason, plan.meaning.detail)


def _is_positive(scale: Any) -> bool:
    """Whether a scale is above zero; of a symbolic one, whether it is now: its sign is guarded."""
    if scale is None:
        return True
    value = fake(scale)
    if isinstance(value, (torch.SymInt, torch.SymFloat)) and value.node.hint is None:
        return False
    return bool(value > 0)


def _sparse_obstacle(plan: SitePlan, config: TSAConfig, sparse_layers: float) -> tuple[Reason | None, str]:
    """Why a site whose layer is selected stays dense all the same."""
    reason, detail = _kernel_obstacle(plan)
    if reason is not None:
        return reason, detail
    query, key, value = (fake(node) for node in (plan.site.query, plan.site.key, plan.site.value))
    shape = SiteShape.of(query, key, value, config)
    return _length_obstacle(query.shape[2], *minimum_length(config, query.device, shape, sparse_layers))


def _kernel_obstacle(plan: SitePlan) -> tuple[Reason | None, str]:
    """Why no kernel of the registry can be asked to run a site."""
    query, value = fake(plan.site.query), fake(plan.site.value)
    if query.device.type not in _DEVICES:
        return Reason.DEVICE, f"on {query.device.type}"
    if query.dtype not in _DTYPES:
        return Reason.DTYPE, str(query.dtype)
    widths = (query.shape[3], value.shape[3])
    if not all(isinstance(width, int) and width <= MAX_HEAD_DIM for width in widths):
        return Reason.HEAD_DIM, f"head sizes {widths[0]} and {widths[1]}"
    if not isinstance(query.shape[1], int):
        return Reason.UNSUPPORTED_FORM, "the number of heads is not static"
    return None, ""


def minimum_length(
    config: TSAConfig, device: torch.device, shape: SiteShape, sparse_layers: float = 0.5
) -> tuple[int | None, str]:
    """The shortest length that is compressed, and what happens there; None if no length gains.

    It is what the user says, else the length from which something can be dropped and that pays on the device.
    """
    if config.min_length is not None:
        return config.min_length, "the configured min_length"
    droppable = config.min_tokens + config.window + 1
    if device.type == "cuda":
        costs = for_device(device)
        gaining = break_even(costs, shape, config, sparse_layers)
        if gaining is None:
            return None, f"with {config.budget} the sparse path never breaks even on {costs.name}"
        if gaining > droppable:
            return gaining, f"where the sparse path breaks even on {costs.name}"
    return droppable, "where tokens can be dropped"


def _length_obstacle(length: int | torch.SymInt, minimum: int | None, why: str) -> tuple[Reason | None, str]:
    """Compares a length with the minimum. A symbolic length is guarded: a shorter one compiles anew, as dense."""
    if minimum is None:
        return Reason.TOO_SHORT, why
    if isinstance(length, torch.SymInt) and length.node.hint is None:
        return Reason.LENGTH_UNKNOWN, f"length {length} is not known before the graph runs"
    if length < minimum:  # on a SymInt this adds the guard
        return Reason.TOO_SHORT, f"length {length} < {minimum}, {why}"
    return None, ""


def _kernel(plan: SitePlan, config: TSAConfig) -> str:
    """The kernel that will run at a site: the one configured for it, else the fastest that fits."""
    query, key, value = (fake(node) for node in (plan.site.query, plan.site.key, plan.site.value))
    sizes = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    if query.device.type not in _DEVICES or not all(isinstance(size, int) for size in sizes):
        return "sdpa"
    configured = {Decision.SPARSE: config.kernel, Decision.KERNEL: config.dense_kernel}.get(plan.decision)
    return choose(KernelRequest.of(query, key, value), configured or AUTO).name


def select_layers(
    sites: list[AttentionSite], config: TSAConfig, *, whole: bool = True
) -> dict[AttentionSite, Reason | None]:
    """For each site: None if its layer may be sparse, else the reason code why not.

    A layer is the number in its module's name. A call outside any module counts by its place in the graph. One inside
    modules without a number may be any layer of a model that Dynamo compiles layer by layer: only a pattern selects it.

    Args:
        whole: False if the graph ends at a graph break, so that layers above it may exist.

    Raises:
        ConfigError: a configured layer or pattern that no attention call of a whole model has.
    """
    numbers = {site: _number(site, position) for position, site in enumerate(sites)}
    if config.layers is None:
        return _upper_half(sites, whole)
    unused = [layer for layer in config.layers if not any(_matches(layer, site, numbers[site]) for site in sites)]
    if unused and sites and whole and 0 in numbers.values():
        raise ConfigError(f"layers={unused!r} not found: the graph's attention calls are {_present(sites, numbers)}")
    wanted = {site: any(_matches(layer, site, numbers[site]) for layer in config.layers) for site in sites}
    by_number = any(isinstance(layer, int) for layer in config.layers)
    return {site: None if wanted[site] else _not_wanted(by_number and numbers[site] is None) for site in sites}


def _not_wanted(number_unknown: bool) -> Reason:
    return Reason.LAYER_COUNT_UNKNOWN if number_unknown else Reason.LAYER_NOT_SELECTED


def _number(site: AttentionSite, position: int) -> int | None:
    if site.layer_index is None and site.layer == site.node.name:
        return position
    return site.layer_index


def _present(sites: list[AttentionSite], numbers: dict[AttentionSite, int | None]) -> str:
    """The layers that there are: "0..31 (model.layers.*.self_attn)" for each stack, calls outside stacks one by one."""
    stacks: dict[str, list[int]] = {}
    for site in sites:
        number = numbers[site]
        stacks.setdefault(site.container or site.layer, []).extend([] if number is None else [number])
    return ", ".join(f"{_span(found)} ({name})" if found else name for name, found in stacks.items())


def _span(found: list[int]) -> str:
    return str(min(found)) if len(found) == 1 else f"{min(found)}..{max(found)}"


def _matches(layer: int | str, site: AttentionSite, number: int | None) -> bool:
    return layer == number if isinstance(layer, int) else fnmatchcase(site.layer, layer)


def _upper_half(sites: list[AttentionSite], whole: bool) -> dict[AttentionSite, Reason | None]:
    """The upper half of each stack of numbered layers, the middle one of an odd number included.

    Which half a call belongs to is unknown in part of a model, and outside numbered modules: Dynamo may compile each
    layer by itself, and then every one looks like this.
    """
    chosen: dict[AttentionSite, Reason | None] = {}
    for site in sites:
        if not whole or site.layer_index is None:
            chosen[site] = Reason.LAYER_COUNT_UNKNOWN
        else:
            layers = 1 + max(other.layer_index or 0 for other in sites if other.container == site.container)
            chosen[site] = None if site.layer_index >= layers // 2 else Reason.LAYER_NOT_SELECTED
    return chosen


def is_whole(graph_module: GraphModule) -> bool:
    """Whether a graph runs to the end of its function: Dynamo records why it stopped tracing."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    return not getattr(reason, "graph_break", False)
