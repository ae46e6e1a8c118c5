"""Rules of `symbolic.Evaluator` for indexing: `x[...]`, `aten.slice`, `aten.select`, and index tensors."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from tsa_compile.passes.graph import argument, fake, known
from tsa_compile.passes.symbolic import Evaluator, Index, NotUnderstood, Value, rule
from tsa_compile.passes.symbolic_ops import _broadcast, _dim, _expr, _shape


def _slice_start(start: Any, extent: Any) -> sympy.Expr:
    """Where a slice begins, if that needs no clamping: a constant inside the dimension."""
    start = fake(start)
    if start is None or (isinstance(start, int) and start == 0):
        return sympy.Integer(0)
    if isinstance(start, int) and start < 0 and known(-start <= extent):
        return _expr(extent) + start
    if known(start >= 0) and known(start <= extent):
        return _expr(start)
    raise NotUnderstood


def _position(position: Any, extent: Any) -> sympy.Expr:
    """An integer index, counted from the end where it is negative."""
    position = fake(position)
    if isinstance(position, int) and position < 0:
        return _expr(extent) + position
    if isinstance(position, (int, torch.SymInt)) and known(position >= 0):
        return _expr(position)
    raise NotUnderstood


@rule("slice")
def _slice(evaluator: Evaluator, node: Node, index: Index) -> Value:
    dim = _dim(argument(node, 1, "dim", 0), len(index))
    if argument(node, 4, "step", 1) != 1:
        raise NotUnderstood
    start = _slice_start(argument(node, 2, "start"), _shape(node.args[0])[dim])
    return evaluator.element(node.args[0], (*index[:dim], index[dim] + start, *index[dim + 1 :]))


@rule("select")
def _select(evaluator: Evaluator, node: Node, index: Index) -> Value:
    dim = _dim(argument(node, 1, "dim"), len(index) + 1)
    position = _position(argument(node, 2, "index"), _shape(node.args[0])[dim])
    return evaluator.element(node.args[0], (*index[:dim], position, *index[dim:]))


@rule("index")
def _aten_index(evaluator: Evaluator, node: Node, index: Index) -> Value:
    indices: Any = node.args[1]
    entries = [slice(None) if entry is None else entry for entry in indices]
    return _gather(evaluator, node.args[0], entries, index)


@rule("getitem")
def _getitem(evaluator: Evaluator, node: Node, index: Index) -> Value:
    source, entries = node.args
    if not isinstance(fake(source), torch.Tensor):
        raise NotUnderstood
    entries = list(entries) if isinstance(entries, tuple) else [entries]
    return _gather(evaluator, source, _without_ellipsis(entries, len(_shape(source))), index)


def _is_tensor(entry: Any) -> bool:
    return isinstance(fake(entry), torch.Tensor)


def _without_ellipsis(entries: list[Any], rank: int) -> list[Any]:
    consumed = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if Ellipsis not in [entry if entry is Ellipsis else 0 for entry in entries]:
        return entries + [slice(None)] * (rank - consumed)
    at = next(i for i, entry in enumerate(entries) if entry is Ellipsis)
    return entries[:at] + [slice(None)] * (rank - consumed) + entries[at + 1 :]


def _gather(evaluator: Evaluator, source: Any, entries: list[Any], index: Index) -> Value:
    """`source[entries]` at `index`; index tensors must stand side by side and be known to be non-negative."""
    shape = _shape(source)
    entries = entries + [slice(None)] * (len(shape) - sum(entry is not None for entry in entries))
    tensors = [i for i, entry in enumerate(entries) if _is_tensor(entry)]
    if tensors and tensors != list(range(tensors[0], tensors[-1] + 1)):
        raise NotUnderstood
    width = max((len(_shape(entries[i])) for i in tensors), default=0)
    inner: list[sympy.Expr] = []
    taken = 0
    block: Index = ()
    for position, entry in enumerate(entries):
        if tensors and position == tensors[0]:
            block, taken = index[taken : taken + width], taken + width
        if _is_tensor(entry):
            inner.append(_looked_up(evaluator, entry, block))
        elif entry is None:
            taken += 1
        elif isinstance(entry, slice):
            if entry.step not in (None, 1):
                raise NotUnderstood
            inner.append(index[taken] + _slice_start(entry.start, shape[len(inner)]))
            taken += 1
        elif isinstance(fake(entry), bool):
            raise NotUnderstood
        else:
            inner.append(_position(entry, shape[len(inner)]))
    return evaluator.element(source, tuple(inner))


def _looked_up(evaluator: Evaluator, entry: Any, block: Index) -> sympy.Expr:
    if fake(entry).dtype == torch.bool:  # a mask as an index gives a data-dependent shape
        raise NotUnderstood
    position = evaluator.integer(entry, _broadcast(entry, block))
    if not evaluator.atoms.never_positive(-position):
        raise NotUnderstood
    return position
