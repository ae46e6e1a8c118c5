"""The functional ATen form of a graph: what every reader reads, however the model was written.

    before   m = x.where(c, y); F.relu(m, True); o = F.scaled_dot_product_attention(q, k, v, m)      the graph as traced
    after    where = aten.where.self(c, x, y); relu = aten.relu_.default(where)                      beside it, read only
             o = aten.scaled_dot_product_attention.default(q, k, v, relu)

Each recorded node is one value and never changes. The operator's schema says what it writes: a tensor that was written to
has another node from there on, and so has everything that shares its memory. `record.py` makes it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch.fx import Graph, Node

from tsa_compile.passes.fakes import Memory
from tsa_compile.passes.graph import fake, is_mutating, unread


def unknown(*inputs: Any) -> Any:
    """The target of recorded nodes whose value is not known to be any operator's."""
    raise AssertionError("recorded nodes are read, not run")


class AtenGraph:
    """The recorded operators of a graph, and where their values can be found in it.

    Attributes:
        calls: one node a value. `meta["val"]` is its fake value, `meta["origin"]` the graph's node that was running,
            `meta["inside"]` the higher-order operator whose body it is in, `meta["constant"]` a small constant's numbers,
            `meta["failed"]` is set for a node of the graph that could not be recorded. In functions of positions (flex.py)
            `meta["position"]` is set for b, h, q and kv, and `meta["positional"]` for whatever may depend on them.
        values: what each node of the graph was when it had run: recorded nodes in place of tensors.
    """

    def __init__(self) -> None:
        self.calls = Graph()
        self.values: dict[Node, Any] = {}
        self.order: dict[Node, int] = {}
        self.holders: dict[Node, list[tuple[Node, int]]] = {}  # which node, and since when
        self.pieces: dict[Node, int] = {}
        self.memory = Memory()
        self.impure: set[Node] = set()
        self.scalars: dict[Any, Node] = {}
        self.ran: dict[Node, set[Any]] = {}
        self.problems: dict[Node, str] = {}

    @cached_property
    def extents(self) -> set[Any]:
        """The symbols that are the size of some recorded tensor."""
        values = (node.meta["val"] for node in self.calls.nodes)
        extents: Iterable[Any] = (extent for value in values if isinstance(value, torch.Tensor) for extent in value.shape)
        return {extent.node.expr for extent in extents if isinstance(extent, torch.SymInt)}

    def source(self, value: Any, at: Node) -> Any:
        """The graph's node that still holds a recorded value just before `at` runs; None if there is none.

        A Python number is its own source; a symbolic one is found by its expression.
        """
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return self.scalars.get(str(value.node.expr))
        if not isinstance(value, Node):
            return value
        found = (node for node, since in self.holders.get(value, ()) if self._holds(node, since, self.order[at]))
        return next(found, None)

    def number(self, expr: str, at: Node) -> Node | None:
        """The graph's node that is a symbolic number, if it runs before `at`."""
        found = self.scalars.get(expr)
        return found if found is not None and self.order[found] < self.order[at] else None

    def holder(self, value: Node) -> Node | None:
        """The first of the graph's nodes that held a recorded value."""
        return next((node for node, _ in self.holders.get(value, ())), None)

    def _holds(self, node: Node, since: int, until: int) -> bool:
        writes = self.memory.writes.get(self.pieces[node], ())
        return since < until and not any(since < write < until for write in writes)

    def is_pure(self, node: Node) -> bool:
        """Whether a node of the graph may go where nothing reads it. Nodes that passes insert say so by their schema."""
        return node.op in ("call_function", "call_method") and node not in self.impure and not is_mutating(node)

    def is_used(self, value: Node) -> bool:
        """Whether anything comes of a recorded value in the graph."""
        return any(unread(node, self.is_pure) is None for node, _ in self.holders.get(value, ()))

    def version(self, node: Node, at: Node) -> int:
        """How often the memory of a node's value is written to before `at` runs."""
        return sum(write < self.order[at] for write in self.memory.writes.get(self.pieces.get(node, -1), ()))

    def writers(self, node: Node) -> list[Node]:
        """The graph's nodes that write to the memory of a node's value, itself or a view of it, in order."""
        writes = self.memory.writes.get(self.pieces.get(node, -1), ())
        if not writes:
            return []
        nodes, began = list(self.order), list(self.order.values())
        return [nodes[bisect_right(began, write) - 1] for write in writes]

    def inputs_behind(self, value: Node) -> set[Node]:
        """The graph's inputs that a recorded value is computed from. Numbers that are sizes alone do not count.

        Of a value that is no operator's the graph has to say what it may be: its node, what that reads, and all that was
        written there before.
        """
        recorded, queue, inputs = {value}, [value], set[Node]()
        for each in queue:
            if each.target is unknown and "position" not in each.meta:
                origin = each.meta["origin"]
                inputs |= self._inputs_behind_node(self.holder(each) or origin, self.order[origin])
            new = [source for source in each.all_input_nodes if source not in recorded]
            recorded.update(new)
            queue += new
        return inputs

    def _inputs_behind_node(self, node: Node, until: int) -> set[Node]:
        seen, queue = {node}, [node]
        for each in queue:
            before = [*each.all_input_nodes, *(writer for writer in self.writers(each) if self.order[writer] < until)]
            new = [source for source in dict.fromkeys(before) if source not in seen and not self._is_size(source)]
            seen.update(new)
            queue += new
        return {each for each in queue if each.op == "placeholder"}

    def _is_size(self, node: Node) -> bool:
        """Whether a node of the graph is a number that sizes of tensors alone say."""
        number = fake(node)
        return isinstance(number, torch.SymInt) and number.node.expr.free_symbols <= self.extents


def is_input(value: Node) -> bool:
    """Whether a recorded value is an input of the graph."""
    return value.target is unknown and not value.args and value.meta["origin"].op == "placeholder"


def users(node: Node) -> Iterable[Node]:
    """The recorded nodes that read a value, without those that only check its dtype, device and layout."""
    return [user for user in node.users if user.target is not torch.ops.aten._assert_tensor_metadata.default]
