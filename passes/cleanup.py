"""Removes what only the replaced attention calls needed: masks, repeated heads, written-out scores.

    before   m = le(...); n = and_(m, ...); e = expand(n, ...)     read by nobody any more
    after    (gone)

Only nodes behind a replaced call are looked at, and of these only pure ones: a graph may hold calls for their effect.
torch.export's assertions about the type of a value go with the value.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tsa_compile.passes.base import Pass, PassResult
from tsa_compile.passes.graph import argument, is_mutation, op_name, readers

_IMPURE_WORDS = ("rand", "dropout", "bernoulli", "multinomial", "assert", "print", "set_grad", "wait", "seed", "check")


class RemoveDeadMasks(Pass):
    """Erases the replaced calls and, transitively, the pure nodes that nobody reads any more."""

    def call(self, graph_module: GraphModule) -> PassResult:
        candidates = dict.fromkeys(self.state.detached)
        pending, removed = list(candidates), False
        while pending:
            node = pending.pop()
            if node._erased or readers(node) or not (_is_pure(node) or node in candidates):
                continue
            for check in list(node.users):
                graph_module.graph.erase_node(check)
            pending.extend(node.all_input_nodes)
            graph_module.graph.erase_node(node)
            removed = True
        self.state.detached.clear()
        return self.result(graph_module, removed)


def _is_pure(node: Node) -> bool:
    if node.op not in ("call_function", "call_method") or is_mutation(node):
        return False
    name = op_name(node)
    if name == "dropout":  # `is_impure` calls aten.dropout a random operator, even where it does nothing
        return argument(node, 2, "training", True) is False or argument(node, 1, "p", 0.5) == 0
    return not node.is_impure() and not any(word in name for word in _IMPURE_WORDS)
