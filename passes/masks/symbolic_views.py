"""The rules of `symbolic.Evaluator` for views and copies: each element of these is one of their input's."""

from __future__ import annotations

from typing import Any

import sympy
from torch.fx import Node

from tsa_compile.passes.graph import known
from tsa_compile.passes.masks.symbolic import Evaluator, Index, NotUnderstood, Value, rule
from tsa_compile.passes.masks.symbolic_ops import dimension, shape_of


@rule("to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy.default", "type_as.default")
@rule(
    "contiguous.default", "clone.default", "detach.default", "alias.default", "lift_fresh.default", "lift_fresh_copy.default"
)
def _same(evaluator: Evaluator, node: Node, index: Index, source: Any, *_: Any) -> Value:
    return evaluator.element(source, index)  # the caller stores the result as the node's dtype


@rule("unsqueeze.default")
def _unsqueeze(evaluator: Evaluator, node: Node, index: Index, source: Any, dim: Any) -> Value:
    dim = dimension(dim, len(index))
    return evaluator.element(source, index[:dim] + index[dim + 1 :])


@rule("squeeze.default", "squeeze.dim", "squeeze.dims", "view.default", "_unsafe_view.default", "reshape.default")
@rule("flatten.using_ints", "unflatten.int", "view_as.default", "reshape_as.default")
def _reshape(evaluator: Evaluator, node: Node, index: Index, source: Any, *_: Any) -> Value:
    """Reshapes that only add or remove dimensions of size one."""
    before, after = shape_of(source), shape_of(node)
    kept = [i for extent, i in zip(after, index, strict=True) if not known(extent == 1)]
    wide = [extent for extent in before if not known(extent == 1)]
    wide_after = [extent for extent in after if not known(extent == 1)]
    if len(wide) != len(kept) or not all(known(a == b) for a, b in zip(wide, wide_after, strict=True)):
        raise NotUnderstood
    remaining = iter(kept)
    inner = tuple(sympy.Integer(0) if known(extent == 1) else next(remaining) for extent in before)
    return evaluator.element(source, inner)


@rule("transpose.int", "swapaxes.default", "swapdims.default")
def _transpose(evaluator: Evaluator, node: Node, index: Index, source: Any, first: Any, second: Any) -> Value:
    swapped, rank = list(index), len(index)
    first, second = dimension(first, rank), dimension(second, rank)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    return evaluator.element(source, tuple(swapped))


rule("t.default", "numpy_T.default")(lambda evaluator, node, index, source: evaluator.element(source, index[::-1]))
rule("mT.default")(lambda evaluator, _, index, source: evaluator.element(source, (*index[:-2], index[-1], index[-2])))


@rule("permute.default")
def _permute(evaluator: Evaluator, node: Node, index: Index, source: Any, dims: Any) -> Value:
    inner: list[sympy.Expr] = [sympy.Integer(0)] * len(index)
    for position, dim in enumerate(dims):
        inner[dimension(dim, len(index))] = index[position]
    return evaluator.element(source, tuple(inner))
