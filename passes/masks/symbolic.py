"""What an element of a tensor is: recorded operators evaluated at symbolic positions.

`Evaluator.element(node, (i, j))` pulls the value of `node[i, j]` through the recorded operators (`aten.py`): `arange(n)[i]`
is `i`, `unsqueeze(x, 0)[i, j]` is `x[j]`, `le(x, y)[i]` is a formula over `x[i]` and `y[i]`. A Boolean tensor has a
formula (`predicate.py`); a number has cases, each a condition and a value:

    where(kv <= q, 0.0, -inf)   ->   [(kv <= q, 0), (~(kv <= q), -oo)]

Only operators in `symbolic_ops.py`, `symbolic_views.py` and `symbolic_indexing.py` are understood, each by its exact
overload. Any other value is a leaf: an uninterpreted function of its own indices, which is sound because a recorded value
never changes.

Integers are exact while their bounds fit into the dtype that holds them; of floating-point numbers only constants are
followed, since what sympy knows of numbers (x - x is 0) does not hold for infinities and NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch.fx import Node
from torch.utils._sympy.functions import Max

from tsa_compile.passes.graph import expr_of, fake
from tsa_compile.passes.masks.predicate import KV, Atoms, B, H, Q
from tsa_compile.passes.operators import arguments

Index = tuple[sympy.Expr, ...]
Cases = list[tuple[Boolean, sympy.Expr]]
Value: TypeAlias = "Boolean | Cases"

MAX_CASES = 8
MAX_ATOMS = 8  # beyond, normal forms get expensive and no known model is near
_MAX_SIZE = 200  # operations in a formula
_MAX_STEPS = 2000  # operators looked at for one mask
_WIDEST = 2**31  # no dimension that attention goes over is longer
MODERATE = 2**28  # a few numbers of this size and a dimension are together below 2^31


class Unsupported(Exception):
    """The mask cannot be understood at all; the message says which node and why."""


class NotUnderstood(Exception):
    """One operator is used in a way that its rule does not cover; the node becomes a leaf."""


Rule = Callable[..., Value]
RULES: dict[Any, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for overloads of ATen, "add.Tensor", and for their in-place variants, where there are any.

    A rule is called with the evaluator, the node, the index and the operator's arguments in its schema's order.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            packet, overload = name.rsplit(".", 1)
            for spelling in (packet, f"{packet}_"):
                found = getattr(getattr(torch.ops.aten, spelling, None), overload, None)
                if found is not None:
                    RULES[found] = function
        return function

    return register


class Evaluator:
    """Evaluates recorded operators at symbolic positions.

    Args:
        atoms: where comparisons are turned into symbols.

    Attributes:
        leaves: the nodes that stand as functions in the formulas, by their names.
        moderate: the symbols of the graph that were taken to be sizes, or numbers below MODERATE.
    """

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        self.moderate: set[sympy.Symbol] = set()
        self.leaves: dict[str, Node] = {}
        self._cache: dict[tuple[Node, Index], Value] = {}
        self._steps = 0

    def element(self, node: Any, index: Index) -> Value:
        """The value of one element; a Python scalar is the same at every index."""
        if not isinstance(node, Node):
            return constant(node)
        value = fake(node)
        if not isinstance(value, torch.Tensor):
            raise Unsupported(f"{node.name} is no tensor")
        key = (node, index)
        if key not in self._cache:
            self._cache[key] = self._evaluate(node, value, index)
        return self._cache[key]

    def _evaluate(self, node: Node, value: torch.Tensor, index: Index) -> Value:
        self._steps += 1
        number = node.meta.get("constant")
        evaluate = RULES.get(node.target)
        if "position" in node.meta:  # what functions of positions are given
            return [(sympy.true, (B, H, Q, KV)[node.meta["position"]])]
        try:
            if number is not None and number.numel() == 1:
                return self._as_dtype(constant(number.item()), value.dtype)
            if evaluate is None or self._steps > _MAX_STEPS:
                return self.leaf(node, index)
            return self._bounded(self._as_dtype(evaluate(self, node, index, *arguments(node)), value.dtype))
        except NotUnderstood:
            return self.leaf(node, index)

    def _bounded(self, value: Value) -> Value:
        """A value whose formulas are small enough to go on with: the work for a mask is bounded, however it is built."""
        formulas = [condition for condition, _ in value] if isinstance(value, list) else [value]
        for formula in formulas:
            if len(formula.free_symbols) > MAX_ATOMS or formula.count_ops() > _MAX_SIZE:
                raise NotUnderstood
        return value

    def leaf(self, node: Node, index: Index) -> Value:
        """An uninterpreted element of a node."""
        dtype = fake(node).dtype
        self.leaves[node.name] = node
        if node.meta.get("positional"):  # computed inside a function of positions, with or without indices of its own
            index = (*index, B, H, Q, KV)
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

    def held_by(self, number: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
        """A number as a dtype holds it: a constant is rounded, an integer expression must fit exactly."""
        if number.is_number:
            return round_constant(number, dtype)
        low, high = self._bounds(number)
        largest = 2 / torch.finfo(dtype).eps if dtype.is_floating_point else torch.iinfo(_integer(dtype)).max
        smallest = -largest if dtype.is_floating_point else torch.iinfo(_integer(dtype)).min
        within = smallest <= low and high <= largest
        distance = dtype == torch.int32 and is_distance(number)
        if number.is_integer is not True or not (within or distance):
            raise NotUnderstood
        self.moderate |= number.free_symbols - self.atoms.sizes.keys()
        return number

    def _bounds(self, expr: sympy.Expr) -> tuple[Any, Any]:
        """Between which numbers an expression lies, for every position and whatever the leaves hold."""
        if expr.is_number:
            return expr, expr
        if isinstance(expr, AppliedUndef):
            held = fake(self.leaves[expr.func.__name__]).dtype
            info = torch.iinfo(_integer(held))
            return sympy.Integer(info.min), sympy.Integer(info.max)
        if expr.is_Symbol:
            lowest = 0 if expr in self.atoms.sizes else max(-self.atoms.upper_bound(-expr), 1 - _WIDEST)
            return sympy.Integer(lowest), self._largest(expr)
        parts = [self._bounds(part) for part in expr.args]
        if isinstance(expr, sympy.Add):
            return sum(low for low, _ in parts), sum(high for _, high in parts)
        if isinstance(expr, sympy.Mul):
            low, high = parts[0]
            for other in parts[1:]:
                corners = [a * b for a in (low, high) for b in other]
                low, high = min(corners), max(corners)
            return low, high
        if isinstance(expr, (sympy.Max, Max)):
            return max(low for low, _ in parts), max(high for _, high in parts)
        if isinstance(expr, sympy.floor):
            return sympy.floor(parts[0][0]), sympy.floor(parts[0][1])
        return -sympy.oo, sympy.oo

    def _largest(self, symbol: sympy.Symbol) -> sympy.Expr:
        extent = self.atoms.sizes.get(symbol)
        bound = self.atoms.upper_bound(symbol) if extent is None else self.atoms.upper_bound(extent) - 1
        return min(bound, sympy.Integer(_WIDEST - 1))

    def _as_dtype(self, value: Value, dtype: torch.dtype) -> Value:
        """What storing a value as `dtype` makes of it; expressions survive only where the dtype holds them exactly."""
        if dtype == torch.bool:
            return self.truth(value)
        cases = as_number(value)
        if dtype.is_floating_point and not all(number.is_number for _, number in cases):
            raise NotUnderstood
        return [(condition, self.held_by(number, dtype)) for condition, number in cases]


def is_distance(number: sympy.Expr) -> bool:
    """Sums of positions, lengths and moderate numbers: those of a cache and what goes into it fit in int32 together."""
    terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(number)]
    return all((rest.is_Symbol and abs(factor) == 1) or (rest == 1 and abs(factor) < MODERATE) for factor, rest in terms)


def _integer(dtype: torch.dtype) -> torch.dtype:
    """The integers that a dtype holds, for `torch.iinfo`."""
    if dtype.is_floating_point or dtype.is_complex:
        raise NotUnderstood
    return torch.uint8 if dtype == torch.bool else dtype


def constant(value: Any) -> Value:
    """A Python or symbolic scalar as a value."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, torch.SymInt):
        return [(sympy.true, sympy.sympify(expr_of(value)))]
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
    """A constant as the dtype stores it; what it cannot hold (an integer out of range, a NaN) is not understood."""
    if dtype.is_floating_point:
        if number.is_finite and sympy.Rational(float(number)) != number:  # it would be rounded twice
            raise NotUnderstood
        return exact(torch.tensor(float(number), dtype=torch.float64).to(dtype).item())
    info = torch.iinfo(_integer(dtype))
    if not number.is_finite or not info.min <= (whole := sympy.Integer(int(number))) <= info.max:  # towards zero, as casts
        raise NotUnderstood
    return whole
