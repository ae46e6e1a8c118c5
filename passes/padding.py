"""From a proven padding predicate back to a tensor: `attention_mask[b, kv] != 0` becomes a bool tensor [B, L].

before   MaskInfo.padding, a formula in (b, kv) over elements of the graph's tensors
after    getitem, ne, and ... on small tensors: no query dimension, so nothing of size L x L
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch.fx import Graph, Node

from tsa_compile.errors import RewriteError
from tsa_compile.passes.call import AttentionCall, BlockLists
from tsa_compile.passes.graph import expr_of, fake, insert, is_erased, known, size
from tsa_compile.passes.masks.info import MaskInfo
from tsa_compile.passes.masks.predicate import KV, Atom, B

_EMITTED = "tsa_emitted"
# What makes an element's tensor broadcast to [B, L], by the variables of its dimensions.
_VIEWS: dict[Any, Any] = {
    (): ("reshape", 1, 1), (B,): ("unsqueeze", 1), (KV,): ("unsqueeze", 0), (B, KV): None, (KV, B): ("transpose", 0, 1),
}  # fmt: skip


def unwritable(
    padding: Boolean, table: dict[sympy.Symbol, Atom], leaves: Mapping[str, Node], sizes: Iterable[sympy.Expr]
) -> str | None:
    """What in a padding predicate the builder has no tensor for; None if it has all.

    Args:
        table: the predicate's atoms.
        leaves: the recorded values that stand in it, by name.
        sizes: the shape symbols that a tensor's own extents give.
    """
    known_symbols = {B, KV, *sizes}
    for symbol in sorted(padding.free_symbols, key=str):
        atom = table[symbol]
        if atom.kind != "opaque" and _may_wrap(atom.expr, leaves):
            return f"adds up elements that may wrap in {atom.expr}"
        sides = atom.expr.args if atom.kind == "opaque" and not isinstance(atom.expr, AppliedUndef) else (atom.expr,)
        for part in (part for side in sides for part in _parts(side)):
            if isinstance(part, AppliedUndef):
                bad = [index for index in part.args if not _is_plain_index(index)]
                if bad or any(sum(index.has(axis) for index in part.args) > 1 for axis in (B, KV)):  # a diagonal
                    return f"reads an element at {bad[0] if bad else part.args}"
                if fake(leaves[part.func.__name__]).dtype is torch.float8_e8m0fnu:
                    return "reads numbers of a type that has no zero"
            elif not part.is_number and part not in known_symbols:
                return f"depends on {part}"
    return None


def _may_wrap(expr: sympy.Expr, leaves: Mapping[str, Node]) -> bool:
    """Whether int64 arithmetic may not hold the two sides of a comparison, as `two_sides` has them."""
    dtypes = [fake(leaves[call.func.__name__]).dtype for call in expr.atoms(AppliedUndef)]
    sides = two_sides(expr)[:2]
    summed = [side for side in sides if not isinstance(side, AppliedUndef) and not side.is_number]
    wide = torch.int64 in dtypes and any(side.has(AppliedUndef) for side in summed)
    large = any(abs(number) >= 2**31 for side in summed for number in side.atoms(sympy.Number))
    return wide or large or torch.uint64 in dtypes or any(side.is_number and abs(side) >= 2**63 for side in sides)


def two_sides(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr, bool]:
    """`expr <= 0` as `left <= right`, with elements of tensors alone on their side where that can be: they may hold any
    number, so that nothing can be added to them. The third is True if the comparison is to be turned round.

        x[b, kv] + 1 <= 0     x[b, kv] <= -1               5 - x[b, kv] <= 0     x[b, kv] >= 5
    """
    elements = [term for term in sympy.Add.make_args(sympy.expand(expr)) if term.has(AppliedUndef)]
    rest = sympy.expand(expr - sum(elements))
    signs = [element.as_coeff_Mul() for element in elements]
    plain = all(isinstance(element, AppliedUndef) and abs(factor) == 1 for factor, element in signs)
    if len(elements) == 1 and plain:
        factor, element = signs[0]
        return (element, -rest, False) if factor == 1 else (element, rest, True)
    if len(elements) == 2 and plain and rest == 0 and signs[0][0] != signs[1][0]:
        (first, left), (_, right) = signs
        return (left, right, False) if first == 1 else (right, left, False)
    return expr, sympy.Integer(0), False


def _parts(expr: sympy.Expr) -> Iterator[sympy.Expr]:
    """What sums and products are made of."""
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        for part in expr.args:
            yield from _parts(part)
    else:
        yield expr


def _is_plain_index(index: sympy.Expr) -> bool:
    """A constant, or b or kv from a constant on."""
    offsets = [sympy.expand(index - symbol) for symbol in (B, KV)]
    return bool(index.is_Integer or any(offset.is_Integer and offset >= 0 for offset in offsets))


def is_emitted(node: Node) -> bool:
    """Whether a node tells calls of their masks: it writes to nothing, and its inputs alone say what it gives."""
    return _EMITTED in node.meta


def _emit(graph: Graph, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Node:
    node = insert(graph, target, *args, **kwargs)
    node.meta[_EMITTED] = True
    return node


class PaddingBuilder:
    """Emits what calls are told of their masks, once for all that share it.

    What is emitted for one call stands in front of it, and serves a later one only if it is of the same values, read from
    the same nodes. It may be a view of the model's memory, which these nodes hold until it is written to.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._emitted: dict[Any, Node] = {}

    def _once(self, key: Any, emit: Callable[[], Node]) -> Node:
        """What was emitted for a key, unless it has been taken out of the graph again."""
        if key not in self._emitted or is_erased(self._emitted[key]):
            self._emitted[key] = emit()
        return self._emitted[key]

    def padding(self, call: AttentionCall, info: MaskInfo) -> Node | None:
        """The bool tensor [B, L] of valid tokens for a call; None if all are. Must be called in front of the call."""
        if info.padding is None:
            return None
        leaves = ((name, leaf, call.aten.source(leaf, call.node)) for name, leaf in sorted(info.leaves.items()))
        key = ("padding", info.padding, tuple(leaves), tuple(map(str, fake(call.key).shape)))
        return self._once(key, _Emitter(self.graph, call, info).emit)

    def valid_ranges(self, padding: Node) -> Node:
        """The valid range of each item, computed once behind the padding that it is of."""
        valid_ranges = torch.ops.tsa.valid_ranges.default
        for reader in padding.users:
            if reader.target is valid_ranges:
                return reader
        with self.graph.inserting_after(padding):
            return _emit(self.graph, valid_ranges, padding)

    def positions(self, call: AttentionCall, info: MaskInfo) -> tuple[Node, Node]:
        """Up to which key each query of a call sees, int64 [Lq], and what of it the host is told, once for all calls.

        Must be called in front of the call.
        """
        rows, leaf = fake(call.query).shape[2], None if info.positions is None else info.leaves[info.positions]
        if leaf is None:
            given = self._once(("counted", str(rows), str(info.offset)), lambda: self._counted(call, info.offset))
        else:
            given = call.aten.source(leaf, call.node)
        if given is None:
            raise RewriteError(f"the graph holds {info.positions} no longer, which says what queries see")
        if fake(given).dtype != torch.int64 or fake(given).device != fake(call.key).device:
            raise RewriteError(f"{info.positions} is {fake(given).dtype} on {fake(given).device}, not int64 beside the keys")
        key = (leaf, given, str(rows))
        if not known(fake(given).shape[0] == rows):  # more positions than the mask reads
            read = (operator.getitem, given)
            given = self._once(("read", *key), lambda: _emit(self.graph, *read, slice(size(self.graph, call.query, 2))))
        return given, self._once(("filled", *key), lambda: _emit(self.graph, torch.ops.tsa.filled.default, given))

    def lists_match(self, call: AttentionCall, lists: BlockLists, padding: Node | None, positions: Node | None) -> Node:
        """What the host is told of lists of blocks: whether they are those of the mask. Once for all calls with the same.

        Must be called in front of the call.
        """
        extents = [size(self.graph, call.query, 2), size(self.graph, call.key, 2)]
        arguments = (*lists.tensors, padding, positions, *extents, lists.rows, lists.columns)
        lengths = (str(fake(call.query).shape[2]), str(fake(call.key).shape[2]))
        read = (node for node in (*lists.tensors, positions) if node is not None)
        key = ("lists", lists, padding, positions, lengths, tuple(call.aten.version(node, call.node) for node in read))
        return self._once(key, lambda: _emit(self.graph, torch.ops.tsa.listed.default, *arguments))

    def _counted(self, call: AttentionCall, offset: sympy.Expr) -> Node:
        """The numbers of a call's queries in a cache, one after the other from `offset` on; int64 [Lq]."""
        positions = _emit(self.graph, torch.arange, size(self.graph, call.query, 2), device=fake(call.key).device)
        for term in sympy.Add.make_args(offset):
            factor, symbol = term.as_coeff_Mul()  # plus or minus a symbol, or a number
            number = call.aten.number(str(symbol), call.node) if symbol.is_Symbol else int(factor)
            if number != 0:
                join = operator.sub if symbol.is_Symbol and factor < 0 else operator.add
                positions = _emit(self.graph, join, positions, number)
        return positions


class _Emitter:
    def __init__(self, graph: Graph, call: AttentionCall, info: MaskInfo) -> None:
        self.graph = graph
        self.mask = info
        self.call = call
        self.key = call.key

    def emit(self) -> Node:
        assert self.mask.padding is not None
        node = self._formula(self.mask.padding)
        return _emit(self.graph, "expand", node, self._extent(0), self._extent(2))

    def _extent(self, dim: int) -> int | Node:
        return size(self.graph, self.key, dim)

    def _formula(self, formula: Boolean) -> Node:
        if isinstance(formula, sympy.Not):
            return _emit(self.graph, torch.logical_not, self._formula(formula.args[0]))
        if isinstance(formula, (sympy.And, sympy.Or)):
            join = torch.logical_and if isinstance(formula, sympy.And) else torch.logical_or
            parts = [self._formula(part) for part in sorted(formula.args, key=str)]
            return reduce(lambda left, right: _emit(self.graph, join, left, right), parts)
        if formula.is_Symbol:
            return self._atom(self.mask.atoms[formula])
        raise RewriteError(f"the padding predicate {formula} cannot be written as a tensor")

    def _atom(self, atom: Any) -> Node:
        if atom.kind == "opaque":
            return self._truth(atom.expr)
        left, right, turned = two_sides(atom.expr)
        comparison = operator.eq if atom.kind == "eq" else operator.ge if turned else operator.le
        return _emit(self.graph, comparison, self._value(left), self._value(right))

    def _truth(self, expr: sympy.Basic) -> Node:
        if isinstance(expr, AppliedUndef):
            return self._element(expr)
        comparison = {sympy.Le: operator.le, sympy.Lt: operator.lt, sympy.Eq: operator.eq}.get(expr.func)
        if comparison is None:
            raise RewriteError(f"the padding condition {expr} cannot be written as a tensor")
        return _emit(self.graph, comparison, *map(self._value, expr.args))

    def _value(self, expr: sympy.Expr) -> Any:
        """An expression in (b, kv) as a number or as a tensor that broadcasts to [B, L]."""
        if expr.is_number:
            return int(expr) if expr.is_Integer else float(expr)
        if expr in (B, KV):
            return self._positions(expr)
        for dim in (0, 2):
            if expr.is_Symbol and expr == expr_of(fake(self.key).shape[dim]):
                return self._extent(dim)
        if isinstance(expr, AppliedUndef):
            element = self._element(expr)
            narrow = expr.is_integer and fake(element).dtype != torch.int64
            return _emit(self.graph, "to", element, torch.int64) if narrow else element  # uint8 wraps around
        if isinstance(expr, (sympy.Add, sympy.Mul)):
            call = operator.add if isinstance(expr, sympy.Add) else operator.mul
            return reduce(lambda a, b: self._join(call, a, b), [self._value(part) for part in expr.args])
        raise RewriteError(f"the padding expression {expr} cannot be written as a tensor")

    def _join(self, call: Any, left: Any, right: Any) -> Any:
        if not isinstance(left, Node) and not isinstance(right, Node):
            return call(left, right)
        return _emit(self.graph, call, left, right)

    def _positions(self, symbol: sympy.Symbol) -> Node:
        extent = self._extent(0 if symbol == B else 2)
        positions = _emit(self.graph, torch.arange, extent, device=fake(self.key).device)
        return _emit(self.graph, "unsqueeze", positions, 1 if symbol == B else 0)

    def _element(self, call: AppliedUndef) -> Node:
        """`x(b, 0, kv)` as `x[:, 0, :]`: [B, L], or [1, L] and [B, 1] where b or kv does not occur."""
        leaf = self.call.aten.source(self.mask.leaves[call.func.__name__], self.call.node)
        if leaf is None:
            raise RewriteError(f"the padding reads {call.func.__name__}, which the graph holds no longer")
        axes = tuple(B if argument.has(B) else KV for argument in call.args if argument.has(B, KV))
        if axes not in _VIEWS:
            raise RewriteError(f"the element {call} cannot be written as a tensor over (b, kv)")
        entries = tuple(self._entry(argument, dim, leaf) for dim, argument in enumerate(call.args))
        whole = all(entry == slice(None) for entry in entries)
        node = leaf if whole else _emit(self.graph, operator.getitem, leaf, entries)
        view = _VIEWS[axes]
        return node if view is None else _emit(self.graph, view[0], node, *view[1:])

    def _entry(self, argument: sympy.Expr, dim: int, leaf: Node) -> Any:
        """One dimension's index: a constant, or from a constant on as many elements as there are items or keys."""
        if argument.is_Integer:
            return int(argument)
        symbol, axis = (B, 0) if argument.has(B) else (KV, 2)
        start = sympy.expand(argument - symbol)
        if not start.is_Integer or start < 0:
            raise RewriteError(f"the index {argument} of {leaf.name!r} cannot be written as a constant")
        if start == 0 and known(fake(self.key).shape[axis] == fake(leaf).shape[dim]):
            return slice(None)
        extent = self._extent(axis)
        return slice(int(start), extent if start == 0 else self._join(operator.add, extent, int(start)))
