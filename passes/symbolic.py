"""What an element of a tensor is: FX nodes evaluated at symbolic positions.

`Evaluator.element(node, (i, j))` pulls the value of `node[i, j]` through the graph: `arange(n)[i]` is `i`,
`x.unsqueeze(0)[i, j]` is `x[j]`, `(x <= y)[i]` is a formula over `x[i]` and `y[i]`. A Boolean tensor has a formula
(`predicate.py`); a number has cases, each a condition and a value:

    torch.where(kv <= q, 0.0, -inf)   ->   [(kv <= q, 0), (~(kv <= q), -oo)]

A node that is not understood becomes a leaf: an uninterpreted function of its own indices, which is sound because the
same element always has the same value. Only a tensor that the graph writes into has no fixed value: `Opaque` is raised.
Operators are in `symbolic_ops.py`, keyed by their one name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from tsa_compile.passes.graph import fake, is_mutated, op_name
from tsa_compile.passes.predicate import Atoms

Index = tuple[sympy.Expr, ...]
Cases = list[tuple[Boolean, sympy.Expr]]
Value: TypeAlias = "Boolean | Cases"

MAX_CASES = 8
_EXACT_INTEGERS = (torch.int32, torch.int64)


class Opaque(Exception):
    """The mask cannot be understood at all; the message says which node and why."""


class NotUnderstood(Exception):
    """One operator is used in a way that its rule does not cover; the node becomes a leaf."""


Rule = Callable[["Evaluator", Node, Index], Value]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of the operators with these names (`graph.op_name`)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Evaluator:
    """Evaluates the nodes of one graph at symbolic positions.

    Args:
        atoms: where comparisons are turned into symbols.
        mutated: storages that the graph writes into (`graph.mutated_storages`).
    """

    def __init__(self, atoms: Atoms, mutated: set[Any]) -> None:
        self.atoms = atoms
        self.mutated = mutated
        self.leaves: dict[str, Node] = {}
        self._cache: dict[tuple[Node, Index], Value] = {}

    def element(self, node: Any, index: Index) -> Value:
        """The value of one element; a Python scalar is the same at every index."""
        if not isinstance(node, Node):
            return constant(node)
        value = fake(node)
        if isinstance(value, (int, float, bool, torch.SymInt)):
            return constant(value)
        if not isinstance(value, torch.Tensor):
            raise Opaque(f"{node.name} is no tensor")
        if is_mutated(node, self.mutated):
            raise Opaque(f"{node.name} is written to in place")
        key = (node, index)
        if key not in self._cache:
            self._cache[key] = self._evaluate(node, value, index)
        return self._cache[key]

    def _evaluate(self, node: Node, value: torch.Tensor, index: Index) -> Value:
        evaluate = RULES.get(op_name(node)) if node.op in ("call_function", "call_method") else None
        if evaluate is None:
            return self.leaf(node, index)
        try:
            return self._as_dtype(evaluate(self, node, index), value.dtype)
        except (NotUnderstood, IndexError):  # rules expect the leading arguments by position
            return self.leaf(node, index)

    def leaf(self, node: Node, index: Index) -> Value:
        """An uninterpreted element of a node."""
        dtype = fake(node).dtype
        self.leaves[node.name] = node
        if dtype == torch.bool:
            return self.atoms.opaque(sympy.Function(node.name)(*index))
        integer = not (dtype.is_floating_point or dtype.is_complex)
        return [(sympy.true, sympy.Function(node.name, integer=True if integer else None)(*index))]

    def formula(self, node: Any, index: Index) -> Boolean:
        """An element as a truth value: a number is true where it isn't zero."""
        return self.truth(self.element(node, index))

    def truth(self, value: Value) -> Boolean:
        if not isinstance(value, list):
            return value
        return sympy.Or(
            *(sympy.And(condition, sympy.Not(self.atoms.eq(number, sympy.Integer(0)))) for condition, number in value)
        )

    def number(self, node: Any, index: Index) -> Cases:
        """An element as a number: a truth value is 1 or 0."""
        return as_number(self.element(node, index))

    def integer(self, node: Any, index: Index) -> sympy.Expr:
        """An element that is one integer expression in every case."""
        cases = self.number(node, index)
        if len(cases) != 1 or cases[0][1].is_integer is not True:
            raise NotUnderstood
        return cases[0][1]

    def _as_dtype(self, value: Value, dtype: torch.dtype) -> Value:
        """What storing a value as `dtype` makes of it; expressions survive only where the dtype holds them exactly."""
        if dtype == torch.bool:
            return self.truth(value)
        cases = as_number(value)
        if all(number.is_number for _, number in cases):
            return [(condition, round_constant(number, dtype)) for condition, number in cases]
        if dtype in _EXACT_INTEGERS and all(number.is_integer for _, number in cases):
            return cases
        raise NotUnderstood


def constant(value: Any) -> Value:
    """A Python or symbolic scalar as a value."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, torch.SymInt):
        return [(sympy.true, sympy.sympify(value.node.expr))]
    if isinstance(value, (int, float)):
        return [(sympy.true, exact(value))]
    raise NotUnderstood


def exact(value: int | float) -> sympy.Expr:
    """A Python number as an exact sympy one: 0.0 is 0, finfo.min is an integer, so that equal numbers are equal."""
    if value != value:
        raise NotUnderstood
    if value in (float("inf"), float("-inf")):
        return sympy.oo if value > 0 else -sympy.oo
    return sympy.Rational(value)


def as_number(value: Value) -> Cases:
    """A truth value as 1 or 0; a number stays."""
    if isinstance(value, list):
        return value
    return [case for case in ((value, sympy.Integer(1)), (sympy.Not(value), sympy.Integer(0))) if case[0] != sympy.false]


def combine(operation: Callable[..., sympy.Expr], *operands: Cases) -> Cases:
    """Applies an operation case by case: conditions are and-ed, equal results merged."""
    merged: dict[sympy.Expr, Boolean] = {}
    for condition, numbers in _product(operands):
        result = operation(*numbers)
        if result.has(sympy.nan, sympy.zoo):
            raise NotUnderstood
        merged[result] = sympy.Or(merged.get(result, sympy.false), condition)
    if len(merged) > MAX_CASES:
        raise NotUnderstood
    return [(condition, number) for number, condition in merged.items()]


def _product(operands: Iterable[Cases]) -> list[tuple[Boolean, tuple[sympy.Expr, ...]]]:
    rows: list[tuple[Boolean, tuple[sympy.Expr, ...]]] = [(sympy.true, ())]
    for cases in operands:
        joined = [(sympy.And(condition, case), (*numbers, number)) for condition, numbers in rows for case, number in cases]
        rows = [row for row in joined if row[0] != sympy.false]
    return rows


def round_constant(number: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    """A constant as the dtype stores it; what it cannot hold (overflow of an integer) is not understood."""
    if number in (sympy.oo, -sympy.oo):
        if dtype.is_floating_point:
            return number
        raise NotUnderstood
    if dtype.is_floating_point:
        return exact(torch.tensor(float(number), dtype=torch.float64).to(dtype).item())
    info = torch.iinfo(dtype)
    whole = sympy.Integer(int(number))  # towards zero, as a cast does
    if not info.min <= whole <= info.max:
        raise NotUnderstood
    return whole
