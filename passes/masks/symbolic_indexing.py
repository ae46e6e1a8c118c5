"""Rules of `symbolic.Evaluator` for indexing: `aten.slice`, `aten.select`, and index tensors."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from tsa_compile.passes.graph import fake, known
from tsa_compile.passes.masks.symbolic import Evaluator, Index, NotUnderstood, Value, rule
from tsa_compile.passes.masks.symbolic_ops import broadcast, dimension, integer, shape_of


@rule("slice.Tensor")
def _slice(evaluator: Evaluator, node: Node, index: Index, source: Any, dim: Any, start: Any, end: Any, step: Any) -> Value:
    dim = dimension(dim, len(index))
    if step != 1:
        raise NotUnderstood
    begin = _slice_start(start, shape_of(source)[dim])
    return evaluator.element(source, (*index[:dim], index[dim] + begin, *index[dim + 1 :]))


def _slice_start(start: Any, extent: Any) -> sympy.Expr:
    """Where a slice begins, if that needs no clamping: a constant inside the dimension."""
    if start is None or (isinstance(start, int) and start == 0):
        return sympy.Integer(0)
    if isinstance(start, int) and start < 0 and known(-start <= extent):
        return integer(extent) + start
    if known(start >= 0) and known(start <= extent):
        return integer(start)
    raise NotUnderstood


@rule("narrow.default")
def _narrow(evaluator: Evaluator, node: Node, index: Index, source: Any, dim: Any, start: Any, length: Any) -> Value:
    dim = dimension(dim, len(index))
    position = _position(start, shape_of(source)[dim])
    return evaluator.element(source, (*index[:dim], index[dim] + position, *index[dim + 1 :]))


@rule("select.int")
def _select(evaluator: Evaluator, node: Node, index: Index, source: Any, dim: Any, at: Any) -> Value:
    dim = dimension(dim, len(index) + 1)
    position = _position(at, shape_of(source)[dim])
    return evaluator.element(source, (*index[:dim], position, *index[dim:]))


def _position(position: Any, extent: Any) -> sympy.Expr:
    """An integer index, counted from the end where it is negative."""
    if isinstance(position, int) and position < 0:
        return integer(extent) + position
    if isinstance(position, (int, torch.SymInt)) and known(position >= 0):
        return integer(position)
    raise NotUnderstood


@rule("index.Tensor")
def _index(evaluator: Evaluator, node: Node, index: Index, source: Any, indices: Any) -> Value:
    """`source[indices]`; index tensors must stand side by side and be known to be non-negative."""
    shape = shape_of(source)
    entries = [*indices, *[None] * (len(shape) - len(indices))]
    tensors = [i for i, entry in enumerate(entries) if entry is not None]
    if not tensors or tensors != list(range(tensors[0], tensors[-1] + 1)):
        raise NotUnderstood
    width = max(len(shape_of(entries[i])) for i in tensors)
    before = tensors[0]
    block, rest = index[before : before + width], iter((*index[:before], *index[before + width :]))
    inner = [next(rest) if entry is None else _looked_up(evaluator, entry, block) for entry in entries]
    return evaluator.element(source, tuple(inner))


def _looked_up(evaluator: Evaluator, entry: Any, block: Index) -> sympy.Expr:
    if fake(entry).dtype in (torch.bool, torch.uint8):  # a mask as an index gives a data-dependent shape
        raise NotUnderstood
    position = evaluator.integer(entry, broadcast(entry, block))
    if not evaluator.atoms.never_positive(-position):
        raise NotUnderstood
    return position
