"""Looks into the sparse layers of a compiled model, and makes them select at random, by a pass over the rewritten graph.

    before   indices = tsa.select(scores, count, C)                                        [B, H, C] int32
             return (output,)
    after    indices = tsa.select(scores, count, C)
             return (output, indices, count)                    the probe keeps the last two, the model never sees them

    with shuffle=True also
             noise   = torch.rand_like(scores)                  the window (+inf) and padding (-inf) stay what they are
             indices = tsa.select(where(isinf(scores), scores, noise), count, C)

So a layer that is shuffled keeps as many tokens as it would have kept, and random ones instead of the best. Nothing of the
model is patched: a probe is a `compiler` (docs/architecture.md), which any further compiler may follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tsa_compile.passes.graph import insert

Compiler = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Selection:
    """What one sparse layer selected in one call.

    Attributes:
        indices: int32 [B, H, C]; H is the number of groups where the heads of a group select together.
        count: int32 [B], how many of the C are real; None if all are.
    """

    indices: Tensor
    count: Tensor | None

    def kept(self) -> Tensor:
        """[B] int64: the tokens that each item keeps."""
        batch, _, capacity = self.indices.shape
        if self.count is None:
            return torch.full((batch,), capacity, device=self.indices.device)
        return self.count.long()


class Probe:
    """A `compiler` for `TSAConfig` that remembers what the sparse layers select.

    Args:
        shuffle: whether random tokens take the place of the selected ones, as many as these. They come from torch's
            generator of the device, so `torch.manual_seed` makes them reproducible.
        compiler: what compiles the graph afterwards; None runs it op by op.
    """

    def __init__(self, *, shuffle: bool = False, compiler: Compiler | None = None) -> None:
        self.shuffle, self.compiler = shuffle, compiler
        self.graphs = 0
        """How many graphs it has compiled."""
        self._taken: list[Selection] = []

    def take(self) -> list[Selection]:
        """The selections since the last `take`, one for each sparse layer and call, in the order of the graph."""
        taken, self._taken = self._taken, []
        return taken

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        selects = graph_module.graph.find_nodes(op="call_function", target=torch.ops.tsa.select.default)
        if self.shuffle:
            for select in selects:
                _shuffle(select)
        outputs, counted = _tap(graph_module, selects)
        compiled = self.compiler(graph_module, example_inputs) if self.compiler else graph_module.forward

        def run(*inputs: Any) -> Any:
            found = compiled(*inputs)
            tapped = iter(found[outputs:])
            self._taken += [Selection(next(tapped), next(tapped) if has_count else None) for has_count in counted]
            return found[:outputs]

        return run


def _shuffle(select: Node) -> None:
    scores, *others = select.args
    assert isinstance(scores, Node)
    with select.graph.inserting_before(select):
        noise = insert(select.graph, torch.rand_like, scores)
        fixed = insert(select.graph, torch.isinf, scores)
        shuffled = insert(select.graph, torch.where, fixed, scores, noise)
    select.args = (shuffled, *others)


def _tap(graph_module: GraphModule, selects: Sequence[Node]) -> tuple[int, list[bool]]:
    """Adds indices and count of each selection to the outputs; how many there were, and whether each has a count."""
    node = graph_module.graph.output_node()
    outputs: Any = node.args[0]
    counts = [select.args[1] for select in selects]
    tapped = [value for pair in zip(selects, counts, strict=True) for value in pair if value is not None]
    node.args = ((*outputs, *tapped),)
    graph_module.graph.lint()
    graph_module.recompile()
    return len(outputs), [count is not None for count in counts]
