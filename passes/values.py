"""The book of a recording: which recorded node a tensor is at this moment, and which of the graph's nodes hold that value.

    x: a tensor, value_3     after x.add_(1), in whatever view of its memory:    x: the same tensor, value_4

Two calls of one operator on the same values are one node, if nothing is drawn. `record.py` keeps it while a graph runs; an
AtenGraph (aten.py) is what remains.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from tsa_compile.passes import operators
from tsa_compile.passes.aten import AtenGraph, unknown
from tsa_compile.passes.fakes import is_laid_out_like, key_of, note_constant
from tsa_compile.passes.flex import FLEX


class Values:
    """The nodes of tensors.

    Attributes:
        origin: the graph's node that runs.
        inside: the higher-order operator whose body runs, if one does.
    """

    def __init__(self, result: AtenGraph) -> None:
        self.result, self.memory = result, result.memory
        self.origin: Node | None = None
        self.inside: str | None = None
        self._known: dict[int, tuple[Tensor, Node, int]] = {}  # the tensor stays alive, so that its id stays its own
        self._placed: dict[int, list[int]] = {}  # the known tensors in each piece of memory
        self._numbered: dict[Any, Node] = {}
        self._named: dict[int, Node] = {}  # the graph's node whose value a tensor is

    def new(self, target: Any, args: Any, value: Any, kwargs: Any = None) -> Node:
        """A recorded node of its own for a value, or for the outputs of an operator."""
        graph = self.result.calls
        node = graph.create_node("call_function", target, name=f"value_{len(graph.nodes)}")
        node.args, node.kwargs = tuple(args), dict(kwargs or {})  # with symbols as they are, which `create_node` warns of
        node.meta = {"val": value, "origin": self.origin, "inside": self.inside, "named": False}
        unread = target is unknown and self.inside == FLEX.__name__
        node.meta["positional"] = unread or any(read.meta["positional"] for read in node.all_input_nodes)
        if self.origin is not None:
            self.result.ran.setdefault(self.origin, set()).add(target)
        return node

    def repeated(self, func: Any, args: Any, value: Any, kwargs: Any) -> Node:
        """The node of this value: two calls of one operator on the same values are one value, if nothing is drawn."""
        if not operators.is_repeatable(func):
            return self.new(func, args, value, kwargs)
        key = key_of((func, args, kwargs, getattr(value, "dtype", None)))  # torch.autocast chooses another type
        try:
            known = self._numbered.get(key)
        except TypeError:
            return self.new(func, args, value, kwargs)
        if known is None:
            known = self._numbered[key] = self.new(func, args, value, kwargs)
        return known

    def of(self, tree: Any) -> Any:
        """The same arguments with recorded nodes in place of tensors."""
        return map_aggregate(tree, lambda leaf: self.node_of(leaf) if isinstance(leaf, Tensor) else leaf)

    def node_of(self, tensor: Tensor) -> Node:
        """The value of a tensor at this moment."""
        held = self._known.get(id(tensor)) or self._same_place(tensor)
        if held is not None and held[2] == self.memory.version(tensor):
            return held[1]
        leaf = self.new(unknown, () if held is None else (held[1],), tensor)  # made elsewhere, or written to since
        if held is None:
            note_constant(leaf, tensor)
        self.keep(tensor, leaf)
        return leaf

    def _same_place(self, tensor: Tensor) -> tuple[Tensor, Node, int] | None:
        """A known tensor that lies in memory as this one does: factories return another one than they have made."""
        found = (self._known[key] for key in reversed(self._placed.get(self.memory.piece(tensor), ())))
        return next((known for known in found if is_laid_out_like(known[0], tensor)), None)

    def keep(self, tensor: Tensor, node: Node) -> None:
        """From now on, and until its memory is written to, a tensor is this value."""
        if id(tensor) not in self._known:
            self._placed.setdefault(self.memory.piece(tensor), []).append(id(tensor))
        self._known[id(tensor)] = (tensor, node, self.memory.version(tensor))
        if id(tensor) in self._named:  # one of the graph's nodes has held this value since the last write
            writes = self.memory.writes.get(self.memory.piece(tensor), [0])
            self._hold(node, self._named[id(tensor)], tensor, writes[-1])

    def _hold(self, value: Node, node: Node, tensor: Tensor, since: int) -> None:
        self.result.holders.setdefault(value, []).append((node, since))
        self.result.pieces[node] = self.memory.piece(tensor)

    def name(self, value: Node, node: Node, tensor: Tensor, since: int) -> None:
        """A node of the graph has run, and holds this value, under whose name it is known if it is the first."""
        if value not in self.result.holders and not value.meta["named"]:
            value.meta["named"] = True
            value._rename(node.name)
        self._named.setdefault(id(tensor), node)
        self._hold(value, node, tensor, since)

    def freeze_shapes(self, tensors: list[Tensor]) -> None:
        """In front of an operator that changes a tensor's shape in place: its earlier values keep theirs."""
        for tensor in tensors:
            frozen = tensor.detach()
            for node in self.result.calls.nodes:
                if node.meta["val"] is tensor:
                    node.meta["val"] = frozen
