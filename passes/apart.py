"""Inputs that do not share memory while a graph is rewritten must not share any when it runs.

    s = q @ k.mT; x.zero_(); softmax(s) @ v        rewritten, k is read behind the write to x, which was another tensor

Compilers on AOTAutograd run a graph without its writes, so that k is what it was. Any other compiler runs the graph as it
is, and Dynamo does not ask whether x is a view of k in a later call. So where a graph writes to an input, `apart` looks at
the inputs of every call, and the graph that the model wrote runs where inputs have come to share memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from torch.fx import Graph
from torch.nn import Parameter

from tsa_compile.passes.aten import AtenGraph
from tsa_compile.passes.fakes import is_plain
from tsa_compile.passes.graph import fake

Pieces: TypeAlias = "list[tuple[list[int], bool]]"
"""For each piece of memory the positions of the inputs that lie in it, and whether the graph writes to it."""


def pieces_of_inputs(graph: Graph, aten: AtenGraph) -> Pieces:
    """The memory of a graph's inputs; none if the graph writes to no input.

    Weights are left out, but for those that the graph writes to, or that what was inserted reads.
    """
    inserted = (node for node in graph.nodes if node not in aten.order)
    read = {aten.pieces[source] for node in inserted for source in node.all_input_nodes if source in aten.pieces}
    found: dict[int, tuple[list[int], bool]] = {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        if not is_plain(fake(node)) or node not in aten.pieces:
            continue
        piece, writes = aten.pieces[node], bool(aten.writers(node))
        if writes or piece in read or not isinstance(fake(node), Parameter):
            positions, _ = found.get(piece, ([], writes))
            found[piece] = ([*positions, position], writes)
    return [*found.values()] if any(writes for _, writes in found.values()) else []


def apart(compiled: Callable[..., Any], written: Callable[..., Any], pieces: Pieces) -> Callable[..., Any]:
    """`compiled`, or, where pieces of memory overlap of which one is written to, `written`: the graph as it was."""

    def call(*inputs: Any) -> Any:
        numbered = ((position, number) for number, (positions, _) in enumerate(pieces) for position in positions)
        reached: list[tuple[int, int]] = []  # the ends of spans that have begun and not ended, with their pieces
        for start, end, number in sorted((*_span(inputs[position]), number) for position, number in numbered):
            reached = [(last, other) for last, other in reached if last > start]
            if any(other != number and (pieces[other][1] or pieces[number][1]) for _, other in reached):
                return written(*inputs)
            reached.append((end, number))
        return compiled(*inputs)

    return call


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's memory, the end behind it."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
