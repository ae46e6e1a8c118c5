"""Removes what only the replaced attention calls needed: masks, repeated heads, written-out scores.

    before   m = le(...); n = and_(m, ...); e = expand(n, ...)     no longer read
    after    (gone)

Only nodes behind a replaced call are looked at, and of these only pure ones: a graph may hold calls for their effect.
torch.export's assertions about the type of a value go with the value.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tsa_compile.passes.base import Pass, PassResult
from tsa_compile.passes.graph import is_erased, is_mutating, unread


class RemoveDeadMasks(Pass):
    """Erases the replaced calls and, transitively, the pure nodes of which nothing comes any more."""

    optional = True

    def call(self, graph_module: GraphModule) -> PassResult:
        candidates = dict.fromkeys(self.state.detached)
        pending, removed = list(candidates), 0
        while pending:
            node = pending.pop()
            behind = None if is_erased(node) or not self._may_go(node) else unread(node, self._may_go)
            for dead in () if behind is None else (*reversed(behind), node):
                for check in list(dead.users):
                    graph_module.graph.erase_node(check)
                pending.extend(dead.all_input_nodes)
                graph_module.graph.erase_node(dead)
                removed += 1
        self.state.detached.clear()
        return self.result(graph_module, removed)

    def _may_go(self, node: Node) -> bool:
        """Whether a node does nothing but compute its value. Without recorded operators, only our own are known to."""
        if self.state.aten is None:
            ours = getattr(node.target, "namespace", "") == "tsa" and not is_mutating(node)
            return ours or node in self.state.detached
        return self.state.aten.is_pure(node)
