"""Which calls become sparse, which dense ones get cheaper without any approximation, and why the others stay.

    before   calls with the meaning of their masks
    after    the same graph; each CallPlan has a decision, a reason code and a kernel

The order of the questions is the order of the reason codes: is the call of a known form, needs no gradient, has no
dropout, attends to itself; is its mask causal; is its layer selected; can the kernels take it; is it long enough, which on
a GPU means long enough to gain time there (costs/breakeven.py). On a CPU correctness is the aim: any length is compressed.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tsa_compile.config import Coverage, Layers, TSAConfig
from tsa_compile.costs.breakeven import FEW_QUERIES, minimum
from tsa_compile.costs.calls import CallShape
from tsa_compile.costs.devices import DeviceCosts
from tsa_compile.errors import ConfigError, KernelError, TSAWarning
from tsa_compile.kernels.interface import MAX_HEAD_DIM
from tsa_compile.kernels.kept import never_dropped
from tsa_compile.kernels.registry import AUTO, KernelRequest, choose, of_dense, of_window
from tsa_compile.passes.aten import is_input
from tsa_compile.passes.base import CallPlan, Pass, PassResult
from tsa_compile.passes.call import Problem
from tsa_compile.passes.graph import fake, guarded, hint, in_marked_range, known, static
from tsa_compile.passes.layers import not_found, select_layers
from tsa_compile.passes.masks.info import CAUSAL_KINDS, FILLED_KINDS, MaskInfo, MaskKind
from tsa_compile.passes.ranks import group_of_heads, splits_heads
from tsa_compile.reasons import Decision, Reason

_DEVICES = ("cuda", "cpu")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INPUT = re.compile(r"^l_(?:kwargs_)?")  # Dynamo calls an input `l_kwargs_position_ids_`
MASK_REASONS = {
    MaskKind.NONE: Reason.NOT_CAUSAL,
    MaskKind.PADDING: Reason.NOT_CAUSAL,
    MaskKind.SLIDING_WINDOW: Reason.SLIDING_WINDOW,
    MaskKind.CHUNKED: Reason.CHUNKED,
    MaskKind.PACKED: Reason.PACKED,
    MaskKind.OPAQUE: Reason.MASK_OPAQUE,
}

_SHORT_SIGHTED = (MaskKind.SLIDING_WINDOW, MaskKind.CHUNKED, MaskKind.PACKED)
"""What a mask of these kinds keeps apart it keeps apart behind a cache too."""

_said: WeakKeyDictionary[torch.nn.Module, set[Layers | None]] = WeakKeyDictionary()


class PlanCalls(Pass):
    """Decides about every call; changes nothing in the graph."""

    def call(self, graph_module: GraphModule) -> PassResult:
        places = [plan.place for plan in self.state.plans]
        selected = select_layers(places, self.state.config)
        masks = [plan.mask for plan in self.state.plans]
        able = [mask is not None and mask.kind not in MASK_REASONS for mask in masks]  # windows, for one, are not
        share = sum(reason is None and mask for reason, mask in zip(selected, able, strict=True)) / max(len(places), 1)
        for plan, reason in zip(self.state.plans, selected, strict=True):
            if plan.reason is Reason.PASS_FAILED:
                continue
            plan.selected, plan.unplaced = reason is None, reason is Reason.LAYER_COUNT_UNKNOWN
            with self.state.attempt(plan, graph_module.graph, "planning"):
                self._decide(plan, reason, share)
        self._say_what_was_not_found(not_found(places, self.state.config, graph_module, self.state.frame))
        self._gather_split_heads(graph_module)
        planned = sum(plan.decision is not Decision.UNCHANGED for plan in self.state.plans)
        return self.result(graph_module, planned, modified=False)

    def _gather_split_heads(self, graph_module: GraphModule) -> None:
        """Coverage asks for the mean of the scores over all heads, of which each device of tensor parallel has its own."""
        all_sparse = [plan for plan in self.state.plans if plan.decision is Decision.SPARSE]
        sparse = [plan for plan in all_sparse if isinstance(plan.config.budget, Coverage) and plan.config.budget.tau > 0]
        found = splits_heads(graph_module, self.state.frame) if sparse else None
        for plan in sparse if found is not None else ():
            plan.group = self._group(plan)
            if plan.group is None:
                raise ConfigError(
                    f"budget={plan.config.budget!r} is not possible in {plan.call.layer!r}: the graph runs on several "
                    f"devices that each have some of the heads ({found}), Coverage keeps what matters in the mean over all "
                    "heads, and no sum of the layer's output over a process group says where the others are. "
                    "Choose budget=KeepRatio(...), which each head follows by itself, or layers=[] for none"
                )

    def _group(self, plan: CallPlan) -> str | None:
        """The name of the process group whose processes have the other heads of a call."""
        return group_of_heads(plan.call.node)

    def _say_what_was_not_found(self, text: str | None) -> None:
        """Once for a model, however many graphs it is compiled in."""
        if text is None:
            return
        self.state.notes.append(text)
        frame = self.state.frame
        model = frame.model() if frame is not None and frame.model is not None else None
        said = set() if model is None else _said.setdefault(model, set())
        if self.state.config.layers not in said:
            said.add(self.state.config.layers)
            warnings.warn(text, TSAWarning, stacklevel=2)

    def _settled(self, plan: CallPlan, sparse_layers: float) -> TSAConfig:
        """The configuration by which the length of a call is judged; of `sparse_layers`, the share of them."""
        return plan.config

    def _decide(self, plan: CallPlan, selected: Reason | None, sparse_layers: float) -> None:
        obstacle = _obstacle(plan)
        if obstacle is not None:
            plan.keep(*obstacle)
            if obstacle[0] is Reason.SLIDING_WINDOW and _is_exact_window(plan):
                plan.decision, plan.kernel = Decision.WINDOW, of_window(KernelRequest.of(*_operands(plan)))
            return
        assert plan.mask is not None
        plan.decision, plan.reason, plan.detail, plan.kernel = decide(
            _operands(plan), plan.config, selected, plan.place.doubt, sparse_layers,
            padded=plan.mask.padding is not None, behind=is_behind_cache(plan), filled=plan.mask.kind in FILLED_KINDS,
            settled=self._settled(plan, sparse_layers) if selected is None else None, costs=self.state.costs,
            sinks=plan.call.sink_logits is not None, fixed=plan.mask.fixed,
        )  # fmt: skip
        if plan.decision in (Decision.DENSE, Decision.DENSE_PADDED) and plan.mask.nan_rows:
            plan.kernel = ""
            plan.keep(plan.reason, plan.detail or "it stays as it is: a row that may attend to no token is NaN in it")


def decide(
    operands: tuple[Tensor, Tensor, Tensor], config: TSAConfig, unselected: Reason | None, doubt: str,
    sparse_layers: float, *, padded: bool, behind: bool, filled: bool = False, settled: TSAConfig | None = None,
    costs: DeviceCosts | None = None, sinks: bool = False, fixed: bool = False,
) -> tuple[Decision, Reason, str, str]:  # fmt: skip
    """What becomes of a call that need not stay as the model wrote it: the decision, its reason, a detail and the kernel.

    Args:
        unselected: why its layer is not to be sparse; None if it is. doubt: why its place is not known, if that is why.
        sparse_layers: the share of the layers that are.
        padded, behind: some keys are invalid; the queries are the last of more keys.
        filled, costs: see `sparse_obstacle`.
        settled: by which its length is judged, if not by `config`.
        sinks: its softmaxes have sinks, which take a kernel that gives the log-sum-exp.
        fixed: which keys are invalid does not depend on the input, so that the rows of their positions must be right.
    """
    dense = Decision.DENSE_PADDED if padded else Decision.DENSE
    if unselected is not None:
        obstacle: Problem | None = (unselected, doubt if unselected is Reason.LAYER_COUNT_UNKNOWN else "")
    elif fixed:
        obstacle = Reason.MASK_FIXED, ""
    else:
        obstacle = sparse_obstacle(*operands, settled or config, sparse_layers, costs, filled=filled)
    decision, (reason, detail) = dense, obstacle or (Reason.SPARSE, "")
    if obstacle is None:
        decision = Decision.SPARSE
    elif config.dense_kernel is not None and not (behind or fixed) and kernel_obstacle(*operands) is None:
        decision = Decision.KERNEL
    try:
        return decision, reason, detail, kernel_of(*operands, decision, config, costs, sinks=sinks)
    except KernelError as error:  # a kernel that was asked for by name and does not fit this call
        return dense, Reason.KERNEL, str(error), ""


def _obstacle(plan: CallPlan) -> Problem | None:
    """Why a call must stay exactly as the model wrote it."""
    call = plan.call
    if call.problem is not None:
        return call.problem
    query, key, _ = _operands(plan)
    unknown = [size for size in (query.shape[2], key.shape[2]) if isinstance(size, torch.SymInt) and size.node.hint is None]
    if unknown and call.form != "sdpa":
        return Reason.LENGTH_UNKNOWN, f"length {unknown[0]} is not known before the graph runs"
    obstacle = inputs_obstacle(query, call.needs_grad, call.dropout, call.scale)
    if obstacle is not None:
        return obstacle
    assert plan.mask is not None
    alike = known(query.shape[2] == key.shape[2]) and plan.mask.kind not in FILLED_KINDS
    if not alike and plan.mask.kind in _SHORT_SIGHTED:
        return MASK_REASONS[plan.mask.kind], _found_in_mask(plan, plan.mask)
    if not alike and not is_behind_cache(plan):
        cached = ": a prefill behind a cache, or into a static one" if is_cached_prefill(plan) else ""
        return Reason.NOT_SELF_ATTENTION, f"{query.shape[2]} queries over {key.shape[2]} keys{cached}"
    reason = MASK_REASONS.get(plan.mask.kind)
    return None if reason is None else (reason, _found_in_mask(plan, plan.mask))


def inputs_obstacle(query: Tensor, needs_grad: bool, dropout: Any, scale: Any) -> Problem | None:
    """Why a call of these inputs must stay as it is, whatever its mask."""
    if needs_grad:
        return Reason.NEEDS_GRAD, ""
    if not isinstance(dropout, (int, float)) or dropout != 0:
        return Reason.DROPOUT, f"dropout {dropout}"
    if known(query.shape[1] == 0) or known(query.shape[3] == 0):
        return Reason.UNSUPPORTED_FORM, f"a query of {query.shape[1]} heads of {query.shape[3]} numbers"
    if not _is_positive(scale):
        return Reason.UNSUPPORTED_FORM, f"the scale is {hint(fake(scale))}, not a number above 0, as causal kernels need it"
    return None


def _is_exact_window(plan: CallPlan) -> bool:
    """Whether a call under a sliding window can be computed without its mask. FlexAttention skips what a window hides."""
    mask, query = plan.mask, fake(plan.call.query)
    if mask is None or mask.window is None or mask.nan_rows or plan.call.lists is not None:
        return False
    rows, keys = query.shape[2], fake(plan.call.key).shape[2]
    alike = known(rows == keys) or (known(rows <= keys) and not known(rows < FEW_QUERIES))
    return alike and kernel_obstacle(*_operands(plan)) is None


def is_behind_cache(plan: CallPlan) -> bool:
    """Whether the queries are proven to be the last of the keys, and more than a few, for which the mask is small.

    The keys may be no more than the queries in some calls: of a cache that may be empty (`tsa_compile/chunk_cache.py`).
    A symbolic number of queries fits into a cache of a fixed size by a guard.
    """
    query, key, mask = fake(plan.call.query), fake(plan.call.key), plan.mask
    if mask is None or mask.kind not in CAUSAL_KINDS or known(query.shape[2] < FEW_QUERIES):
        return False
    fits = query.shape[2] <= key.shape[2]
    if mask.kind in FILLED_KINDS:
        return plan.call.is_causal is False and guarded(fits)
    return known(fits) and not known(query.shape[2] == key.shape[2])


def is_decode_step(plan: CallPlan) -> bool:
    """Whether one query, or a few of assisted decoding, look at a cache, by whatever operator."""
    query, key = fake(plan.call.query), fake(plan.call.key)
    if not isinstance(query, torch.Tensor) or not isinstance(key, torch.Tensor) or query.dim() < 3 or key.dim() < 3:
        return False
    few = known(query.shape[-2] < FEW_QUERIES) and not known(query.shape[-2] == key.shape[-2])
    return known(query.shape[-2] == 1) or few


def is_cached_prefill(plan: CallPlan) -> bool:
    """Whether several queries look at more keys than their own, and not as in cross-attention, which masks by key alone."""
    query, key = fake(plan.call.query), fake(plan.call.key)
    if query.dim() != 4 or known(query.shape[2] == 1) or known(query.shape[2] >= key.shape[2]):
        return False
    if plan.mask is None or plan.call.is_causal is True:
        return True
    masks = [fake(term.mask) for term in plan.call.masks]
    by_query = any(mask.dim() == 0 or (mask.dim() > 1 and not known(mask.shape[-2] == 1)) for mask in masks)
    return by_query and plan.mask.kind not in (MaskKind.NONE, MaskKind.PADDING)


def _found_in_mask(plan: CallPlan, info: MaskInfo) -> str:
    """What a report says of a mask that cannot be rewritten: where it comes from, if that is what is to be changed."""
    if info.kind is MaskKind.OPAQUE and any(_is_given(term.mask) for term in plan.call.masks):
        return "the mask is an input of this graph: it was built outside"
    if info.kind is MaskKind.PACKED:
        inputs = {each for leaf in info.leaves.values() for each in plan.call.aten.inputs_behind(leaf)}
        behind = sorted({_INPUT.sub("", each.name).strip("_") for each in inputs})  # as the model calls them: "position_ids"
        return f"computed from {', '.join(behind)}" if behind else info.detail
    return info.detail


def _is_given(mask: Node) -> bool:
    """Whether a recorded mask is an input of its graph, or a view or cast of one."""
    while not is_input(mask):
        tensors = [node for node in mask.all_input_nodes if isinstance(fake(node), torch.Tensor)]
        if len(tensors) != 1:
            return False
        mask = tensors[0]
    return fake(mask).dim() > 2


def _is_positive(scale: Any) -> bool:
    """Whether a scale is a number above zero; of a symbolic one, whether it is now: its sign is guarded."""
    if scale is None:
        return True
    value = fake(scale)
    if isinstance(value, (torch.SymInt, torch.SymFloat)) and value.node.hint is None:
        return False
    return bool(0 < value < math.inf)


def _operands(plan: CallPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, as fakes."""
    return fake(plan.call.query), fake(plan.call.key), fake(plan.call.value)


def sparse_obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TSAConfig,
    sparse_layers: float,
    costs: DeviceCosts | None = None,
    *,
    filled: bool = False,
) -> Problem | None:
    """Why a call whose layer is selected stays dense all the same.

    Args:
        costs: of the device that is decided for; None for those of the query's.
        filled: the keys are a cache of a fixed size, of which may be filled no more than the queries.
    """
    obstacle = kernel_obstacle(query, key, value)
    if obstacle is None and not known(query.shape[2] == key.shape[2]):
        obstacle = _length_obstacle(query.shape[2], FEW_QUERIES, "more than a step of assisted decoding has", 0)
    if obstacle is not None:
        return obstacle
    shape = CallShape.of(query, key, value, config)
    shape = replace(shape, past=0) if filled else shape
    least = minimum(config, shape, sparse_layers, query.device if costs is None else costs)
    if not filled and may_be_whole(query, key):
        queries = hint(query.shape[2])
        if shape.past == 0 or (queries is not None and least.reached_by(queries, queries + shape.past)):
            least = least.of_all_keys(shape.past)
        if least.of_keys and least.tokens is not None and least.tokens <= all_kept_below(config):
            return None  # the op decides: of fewer keys it keeps all
    return _length_obstacle(least.length(query.shape[2], key.shape[2]), least.tokens, least.why, all_kept_below(config))


def may_be_whole(query: Tensor, key: Tensor) -> bool:
    """Whether the keys may be those of the queries alone in some calls of a graph, and more in others.

    That is a prompt in chunks whose first one is no case of its own (`tsa_compile/chunk_cache.py`). What is asked of its
    length must then have one answer for all of its chunks. So the keys so far are counted, where the first chunk is the one
    that is compiled, or where a later one is long enough. Where it is too short, all chunks as short as it are.
    """
    return not known(query.shape[2] == key.shape[2]) and not known(query.shape[2] < key.shape[2])


def kernel_obstacle(query: Tensor, key: Tensor, value: Tensor) -> Problem | None:
    """Why no kernel of the registry can be asked to run a call."""
    if query.device.type not in _DEVICES:
        return Reason.DEVICE, f"on {query.device.type}"
    if query.dtype not in _DTYPES:
        return Reason.DTYPE, str(query.dtype)
    widths = (static(query.shape[3]), static(value.shape[3]))
    if None in widths:
        return Reason.HEAD_DIM, "the head size is not static"
    if not all(width <= MAX_HEAD_DIM for width in widths if width is not None):
        return Reason.HEAD_DIM, f"head sizes {widths[0]} and {widths[1]}"
    if static(query.shape[1]) is None:
        return Reason.UNSUPPORTED_FORM, "the number of heads is not static"
    return None


def all_kept_below(config: TSAConfig) -> int:
    """The length below which the sparse path keeps every token, and so computes what dense attention does."""
    kept = never_dropped(config.window, config.min_tokens)
    return 1 + (kept if config.capacity is None else min(kept, config.capacity))


def _length_obstacle(length: int | torch.SymInt, least: int | None, why: str, all_kept: int) -> Problem | None:
    """Compares a length with the minimum. A symbolic length is guarded: a shorter one compiles anew, as dense.

    A range that the user marked must hold as a whole, so no guard may cut it: where both sides of the minimum are in it,
    the op decides, if it keeps all tokens of the shorter ones anyway.
    """
    if least is None:
        return Reason.TOO_SHORT, why
    if isinstance(length, torch.SymInt) and not known(length >= least) and not known(length < least):
        if length.node.hint is None:
            return Reason.LENGTH_UNKNOWN, f"length {length} is not known before the graph runs"
        if in_marked_range(length):
            said = f"the range marked for length {length} has lengths on both sides of {least}, {why}"
            return None if least <= all_kept else (Reason.LENGTH_UNKNOWN, said)
    if length < least:  # on a SymInt this adds the guard
        return Reason.TOO_SHORT, f"length {hint(length)} < {least}, {why}"
    return None


def kernel_of(
    query: Tensor, key: Tensor, value: Tensor, decision: Decision, config: TSAConfig, costs: DeviceCosts | None = None, *,
    sinks: bool = False,
) -> str:  # fmt: skip
    """The kernel that will run at a call: the one configured for it, else the fastest that fits; KernelError if none.

    A dense call of a whole prompt without padding becomes SDPA, which chooses among torch's own.

    Where `costs` are those of a device that is not here, a kernel that is configured by name is taken to fit.
    """
    sizes = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    if query.device.type not in _DEVICES or any(static(size) is None for size in sizes):
        return "sdpa"
    configured = {Decision.SPARSE: config.kernel, Decision.KERNEL: config.dense_kernel}.get(decision)
    sparse = decision is Decision.SPARSE
    if decision is Decision.DENSE and known(query.shape[2] == key.shape[2]):
        return of_dense(KernelRequest.of(query, key, value))
    behind = sparse and not known(query.shape[2] == key.shape[2])
    elsewhere = costs is not None and not query.is_cuda and configured not in (None, AUTO)
    request = None if elsewhere else KernelRequest.of(query, key, value)
    lse = sinks or (sparse and config.floor is not None)
    chosen = choose(request, configured or AUTO, lse=lse, behind=behind).name
    return "triton" if behind and query.is_cuda else chosen  # it takes rows of which each head has another number
