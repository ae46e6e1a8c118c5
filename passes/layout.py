"""A replacement must look like what it replaces: same shape, dtype and device always, same strides where they are seen.

Most readers of an attention output (`reshape`, `contiguous`, a product) take any strides, so the new output keeps its
natural layout. `view` and the graph's own outputs do not: then the rows are brought into the old order.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from tsa_compile.errors import RewriteError
from tsa_compile.passes.graph import fake, insert, known, op_name, same_shape

# Operators that pass their input's strides on, and those whose result or success depends on strides.
_FORWARDING = frozenset(
    [
        "transpose",
        "permute",
        "getitem",
        "select",
        "slice",
        "unsqueeze",
        "squeeze",
        "expand",
        "detach",
        "alias",
        "t",
        "narrow",
        "movedim",
    ]
)
_SEEING = frozenset(
    [
        "view",
        "as_strided",
        "view_as",
        "stride",
        "is_contiguous",
        "storage_offset",
        "data_ptr",
        "unflatten",
        "getattr",
        "output",
    ]
)


def conform(new: Node, old: Node) -> Node:
    """`new`, laid out like `old` where a reader can tell; called at the insertion point behind `new`.

    Raises:
        RewriteError: the two differ in shape, dtype or device.
    """
    made, wanted = fake(new), fake(old)
    if not same_shape(made, wanted) or made.dtype != wanted.dtype or made.device != wanted.device:
        raise RewriteError(
            f"{new.name!r} would be {made.dtype} {tuple(made.shape)} on {made.device} where the model has "
            f"{wanted.dtype} {tuple(wanted.shape)} on {wanted.device}"
        )
    if _same_strides(made, wanted) or not _strides_are_seen(old):
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


def _strides_are_seen(node: Node) -> bool:
    for user in node.users:
        if user.op not in ("call_function", "call_method") or op_name(user) in _SEEING:
            return True
        if op_name(user) in _FORWARDING and _strides_are_seen(user):
            return True
    return False
