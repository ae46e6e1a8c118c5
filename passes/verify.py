"""What must hold for a graph when all passes have run; a violation is a bug in a pass and raises.

The shape, dtype, device and strides of each replacement are held against the original where it is made (`layout.py`).
Here: the graph is well formed, nothing reads a replaced call, and no new node reads a mask that was proven away. Which
inputs must not share memory in later calls is left in the graph's `meta` (`apart.py`).
"""

from __future__ import annotations

from torch.fx import GraphModule

from tsa_compile.errors import RewriteError
from tsa_compile.passes.apart import pieces_of_inputs
from tsa_compile.passes.base import Pass, PassResult
from tsa_compile.passes.masks.info import CAUSAL_KINDS
from tsa_compile.reasons import Decision


class Verify(Pass):
    """Checks the graph; changes nothing."""

    def call(self, graph_module: GraphModule) -> PassResult:
        graph_module.graph.lint()
        nodes = set(graph_module.graph.nodes)
        changed = [plan for plan in self.state.plans if plan.decision is not Decision.UNCHANGED]
        for plan in changed:
            window = plan.decision is Decision.WINDOW and plan.mask is not None and plan.mask.window is not None
            if not window and (plan.mask is None or plan.mask.kind not in CAUSAL_KINDS):
                raise RewriteError(f"{plan.call.layer!r} was rewritten, but its mask is {plan.mask}")
            kept = plan.call.form == "sdpa" and not plan.call.masks and plan.decision is Decision.DENSE
            if not kept and plan.call.node in nodes and plan.call.node.users:
                raise RewriteError(f"{plan.call.layer!r} was rewritten, but {plan.call.node.name!r} is still read")
        masks = {plan.call.aten.holder(term.mask) for plan in changed for term in plan.call.masks}
        readers = {reader for mask in masks if mask is not None for reader in mask.users if reader in nodes}
        for reader in readers:
            if "tsa" in str(reader.target):
                raise RewriteError(f"{reader.name!r} reads a mask that was proven away")
        if changed and self.state.aten is not None:
            graph_module.meta["pieces_of_inputs"] = pieces_of_inputs(graph_module.graph, self.state.aten)
        return self.result(graph_module, len(changed), modified=False)
