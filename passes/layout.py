"""A replacement must look like what it replaces: same shape, dtype and device always, same strides where they are seen.

Most readers of an attention output (`reshape` over merged heads, `contiguous`, a product) give the same result for any
strides, so the new output keeps its natural layout. A `view`, a sum in the input's layout or the graph's own output do not:
then the rows are brought into the old order. Which is the case is tried out: the readers are propagated with the new
strides, on fake tensors, until what they make is as before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten

from tsa_compile.errors import RewriteError
from tsa_compile.passes.aten import AtenGraph
from tsa_compile.passes.fakes import tensors_in
from tsa_compile.passes.graph import fake, insert, known, propagate, same_shape

_FAR = 64  # readers with changed strides beyond which a copy is cheaper than finding out


def conform(new: Node, old: Node, aten: AtenGraph | None) -> Node:
    """`new`, laid out like `old` where a reader can tell; called at the insertion point behind `new`.

    Batch and heads become one dimension where they are one in `old`, as torch.bmm has them.

    Raises:
        RewriteError: the two differ in shape, dtype or device.
    """
    if fake(new).dim() == 4 and fake(old).dim() == 3:
        new = insert(new.graph, "flatten", new, 0, 1)
    made, wanted = fake(new), fake(old)
    if not same_shape(made, wanted) or made.dtype != wanted.dtype or made.device != wanted.device:
        raise RewriteError(
            f"{new.name!r} would be {made.dtype} {tuple(made.shape)} on {made.device} where the model has "
            f"{wanted.dtype} {tuple(wanted.shape)} on {wanted.device}"
        )
    if _same_strides(made, wanted) or not _strides_are_seen(old, made, aten):
        return new
    order = sorted(range(wanted.dim()), key=lambda dim: (_rank(wanted, dim), dim))
    back = [order.index(dim) for dim in range(wanted.dim())]
    graph = new.graph
    laid_out = insert(graph, "contiguous", insert(graph, "permute", new, order))
    return insert(graph, "permute", laid_out, back)


def _same_strides(made: torch.Tensor, wanted: torch.Tensor) -> bool:
    return all(known(a == b) for a, b in zip(made.stride(), wanted.stride(), strict=True))


def _rank(tensor: torch.Tensor, dim: int) -> int:
    """How many dimensions have a larger stride than this one."""
    return sum(known(other > tensor.stride(dim)) for other in tensor.stride())


def _strides_are_seen(node: Node, value: torch.Tensor, aten: AtenGraph | None) -> bool:
    """Whether anything behind a node changes, or fails, if its value has the strides of `value`."""
    changed: dict[Node, Any] = {node: value}
    for reader in list(node.graph.nodes):
        if not any(source in changed for source in reader.all_input_nodes):
            continue
        if aten is None or not aten.is_pure(reader) or any(map(_reads_memory, aten.ran.get(reader, ()))):
            return True
        if len(changed) > _FAR:
            return True
        args, kwargs = map_arg((reader.args, reader.kwargs), lambda source: changed.get(source, fake(source)))
        try:
            result = propagate(node.graph, reader.target, args, kwargs)
        except (RuntimeError, ValueError):  # a view that the new strides do not allow
            return True
        same = _same_layout(result, fake(reader))
        if same is None:
            return True
        read = [source for source in reader.all_input_nodes if source in changed]
        copied = _lies_in(aten, result, [changed[source] for source in read]) != _lies_in(
            aten, fake(reader), map(fake, read)
        )
        if copied and any(aten.writers(touched) for touched in (reader, *read)):
            return True  # a copy where the model has a view, or the other way round, and one of the two is written to
        if not same:
            changed[reader] = result
    return False


def _lies_in(aten: AtenGraph, made: Any, sources: Iterable[Any]) -> list[bool]:
    """Of each tensor in a result, whether it shares memory with one of those that it was made of."""
    pieces = {aten.memory.piece(tensor) for source in sources for tensor in tensors_in(source)}
    return [aten.memory.piece(tensor) in pieces for tensor in tensors_in(made)]


def _reads_memory(target: Any) -> bool:
    """Whether an operator takes elements as they lie in memory, whatever the strides of its input are."""
    return "as_strided" in str(target) or "_reshape_alias" in str(target)


def _same_layout(made: Any, wanted: Any) -> bool | None:
    """Whether two results are alike, strides included; None if one is no tensor and differs (`x.stride()`)."""
    made_leaves, made_spec = tree_flatten(made)
    wanted_leaves, wanted_spec = tree_flatten(wanted)
    if made_spec != wanted_spec:
        return None
    alike = True
    for ours, theirs in zip(made_leaves, wanted_leaves, strict=True):
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor) and same_shape(ours, theirs):
            alike = alike and _same_strides(ours, theirs)
        elif isinstance(ours, torch.Tensor) or isinstance(theirs, torch.Tensor) or not known(ours == theirs):
            return None
    return alike
