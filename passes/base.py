"""What a pass is: a `torch.fx` PassBase over a shared state, which touches one attention call at a time.

The state carries the configuration, the calls that were found, and what was decided about each. A pass that fails on one
call leaves no trace of its attempt in the graph: `attempt` removes the nodes it had inserted, marks the call, and either
warns or, with `strict=True`, raises.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsa_compile.config import TSAConfig
from tsa_compile.costs.devices import DeviceCosts
from tsa_compile.errors import RewriteError, TSAWarning
from tsa_compile.passes.aten import AtenGraph
from tsa_compile.passes.call import AttentionCall
from tsa_compile.passes.frame import Frame
from tsa_compile.passes.graph import insert
from tsa_compile.passes.layers import Place
from tsa_compile.passes.layout import conform
from tsa_compile.passes.masks.info import MaskInfo
from tsa_compile.passes.padding import PaddingBuilder
from tsa_compile.reasons import Decision, Reason

__all__ = ["CallPlan", "GraphState", "Pass", "PassResult"]


@dataclass
class CallPlan:
    """What is known and decided about one call; filled in pass by pass.

    `selected`: its layer was asked to be sparse. `unplaced`: it may have been, but which layer it is is not known.
    `padding`: the bool tensor [B, L] of its valid tokens, once it is written. `filled`: with a static cache the tensor [Lq]
    that says up to which key a query sees, and what the host is told of it, once they are written. `lists_match`: of
    FlexAttention whether its lists of blocks are those of its mask, which the host is told. `group`: the name of the
    process group with its other heads, where they matter. `config`: what holds for its layer.
    """

    call: AttentionCall
    place: Place
    config: TSAConfig
    mask: MaskInfo | None = None
    selected: bool = False
    padding: Node | None = None
    filled: tuple[Node, Node] | None = None
    lists_match: Node | None = None
    group: str | None = None
    unplaced: bool = False
    decision: Decision = Decision.UNCHANGED
    reason: Reason = Reason.UNSUPPORTED_FORM
    kernel: str = ""
    detail: str = ""

    def keep(self, reason: Reason, detail: str = "") -> None:
        """Leaves the call as the model wrote it, and says why."""
        self.decision, self.reason, self.detail = Decision.UNCHANGED, reason, detail


@dataclass
class GraphState:
    """What the passes of one compilation share.

    `aten`: the graph's recorded operators, as it was before any pass. `costs`: of the device that is decided for, where that
    is another than the one that the calls are on.
    """

    config: TSAConfig
    aten: AtenGraph | None = None
    plans: list[CallPlan] = field(default_factory=list)
    detached: list[Node] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    frame: Frame | None = None
    costs: DeviceCosts | None = None
    _builder: PaddingBuilder | None = None

    def builder(self, graph: Graph) -> PaddingBuilder:
        """What writes padding and its valid ranges into the graph, each of them once."""
        if self._builder is None or self._builder.graph is not graph:
            self._builder = PaddingBuilder(graph)
        return self._builder

    def operands(self, plan: CallPlan, graph: Graph) -> tuple[Any, ...]:
        """The tensors of the op for a call.

        query, key, value                                                     causal
        query, key, value, padding, valid_ranges                              causal and padding
        query, key, value, padding, valid_ranges, positions, filled           into a cache of a fixed size; padding and
                                                                              valid_ranges may be None
        """
        rows, padding = (plan.call.query, plan.call.key, plan.call.value), plan.padding
        masked = None if padding is None else (padding, self.builder(graph).valid_ranges(padding))
        if plan.filled is not None:
            return (*rows, *(masked or (None, None)), *plan.filled)
        return rows if masked is None else (*rows, *masked)

    @contextmanager
    def attempt(self, plan: CallPlan, graph: Graph, doing: str) -> Iterator[None]:
        """Runs a block for one call; if it raises, the graph is as before and the call stays as the model wrote it."""
        before = set(graph.nodes)
        try:
            yield
        except Exception as error:
            for node in reversed(list(graph.nodes)):
                if node not in before:
                    graph.erase_node(node)
            cause = summary(error)
            message = f"{doing} failed at {plan.call.layer!r}: {cause}"
            if self.config.strict:
                raise RewriteError(
                    f"{message}. The call was left as the model wrote it until here (strict=True)."
                ) from error
            warnings.warn(f"{message}. It stays as the model wrote it.", TSAWarning, stacklevel=2)
            plan.keep(Reason.PASS_FAILED, cause)


def summary(error: Exception) -> str:
    """An error in one line: torch's may carry a whole graph."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class Pass(PassBase):
    """A pass over the attention calls of a graph. Subclasses implement `call(graph_module) -> PassResult`."""

    decisions: ClassVar[tuple[Decision, ...]] = ()
    """The decisions that this pass carries out: without it such calls stay as the model wrote them."""
    optional: ClassVar[bool] = False
    """Whether the graph is right without this pass, so that `TSAConfig.skip_passes` may name it."""
    matched = 0
    """How many calls or nodes the pass has found something to do at."""

    def __init__(self, state: GraphState) -> None:
        self.state = state

    @property
    def name(self) -> str:
        return type(self).__name__

    @classmethod
    def skip(cls, state: GraphState) -> None:
        """Notes that the pass does not run."""
        for plan in state.plans:
            if plan.decision in cls.decisions:
                plan.keep(Reason.PASS_SKIPPED, f"skip_passes has {cls.__name__}")

    def result(self, graph_module: GraphModule, matched: int, *, modified: bool = True) -> PassResult:
        """What torch.fx expects of a pass that has `matched` so many calls or nodes; a changed graph is recompiled."""
        self.matched = matched
        modified = modified and matched > 0
        if modified:
            graph_module.recompile()
        return PassResult(graph_module, modified)

    def replace_calls(
        self, graph_module: GraphModule, doing: str, form: Callable[[Graph, CallPlan], Node | None]
    ) -> PassResult:
        """Replaces each call of this pass's decisions by what `form` inserts in front of it; None: it is right as it is."""
        graph, matched = graph_module.graph, 0
        for plan in self.state.plans:
            if plan.decision not in self.decisions:
                continue
            with self.state.attempt(plan, graph, doing), graph.inserting_before(plan.call.node):
                new = form(graph, plan)
                if new is not None:
                    self.replace(plan, new)
                    matched += 1
        return self.result(graph_module, matched)

    def replace(self, plan: CallPlan, new: Node) -> None:
        """Lets every reader of the call's output read `new`; the old nodes are left to the clean-up."""
        old = plan.call.node
        if plan.lists_match is not None:
            self._as_listed(plan, new)
        new = conform(new, old, self.state.aten)
        value = new.meta["example_value"]
        new.meta = {**old.meta, **{"val" if "val" in old.meta else "example_value": value}}
        old.replace_all_uses_with(new)
        self.state.detached.append(old)
        for other in self.state.plans:
            other.call = reading(other.call, old, new)

    @staticmethod
    def _as_listed(plan: CallPlan, new: Node) -> None:
        """FlexAttention goes over lists of blocks, which need not be those of its mask."""
        call, positions = plan.call, None if plan.filled is None else plan.filled[0]
        assert call.lists is not None
        operands = (call.query, call.key, call.value, *call.lists.tensors, plan.padding, positions)
        shape = (call.scale, call.lists.rows, call.lists.columns)
        insert(new.graph, torch.ops.tsa.as_listed_.default, new, plan.lists_match, *operands, *shape)


def reading(call: AttentionCall, old: Node, new: Node) -> AttentionCall:
    """A call that read `old` directly, one layer's output as the next one's input, as it stands after the replacement."""
    operands = ("query", "key", "value", "wide_key", "wide_value")
    renewed: dict[str, Any] = {name: new for name in operands if getattr(call, name) is old}
    return dataclasses.replace(call, **renewed) if renewed else call
