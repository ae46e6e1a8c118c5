"""Statements about positions as propositional formulas over canonical atoms.

A mask is a Boolean function of (b, h, q, kv). Its atoms are comparisons of integer expressions, brought into one form so
that equal statements become equal symbols and opposite ones become negations of each other:

    kv <= q        ->   A            with A: kv - q <= 0
    q < kv         ->  ~A
    kv > q - 16    ->  ~B            with B: kv - q + 16 <= 0

Formulas over these symbols are plain sympy Booleans, so that sympy's logic (normal forms, simplification) does the rest.
An atom that holds or fails for every position within the sizes of the graph folds to true or false at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import sympy
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

B, H, Q, KV = sympy.symbols("b h q kv", integer=True, nonnegative=True)
INDICES = (KV, Q, H, B)


@dataclass(frozen=True)
class Atom:
    """A comparison: `expr <= 0` ("le"), `expr == 0` ("eq"), or the truth of something that is not integer ("opaque")."""

    kind: str
    expr: sympy.Expr

    def __str__(self) -> str:
        return str(self.expr) if self.kind == "opaque" else f"{self.expr} {'<=' if self.kind == 'le' else '=='} 0"


@dataclass
class Atoms:
    """The atoms of one mask.

    Args:
        sizes: the extent of each position variable, as an expression in the graph's shape symbols: b in [0, sizes[b]).
        upper_bound: the largest value that an expression in shape symbols can have, or +oo.
    """

    sizes: dict[sympy.Symbol, sympy.Expr]
    upper_bound: Callable[[sympy.Expr], sympy.Expr]
    table: dict[sympy.Symbol, Atom] = field(default_factory=dict)

    def le(self, left: sympy.Expr, right: sympy.Expr) -> Boolean:
        """`left <= right` for integers."""
        difference = sympy.expand(left - right)
        if difference.is_integer is not True:
            return self.opaque(sympy.Le(left, right, evaluate=False))
        if self.never_positive(difference):
            return sympy.true
        if self.never_positive(1 - difference):
            return sympy.false
        if _leading_is_negative(difference):
            return sympy.Not(self._symbol(Atom("le", sympy.expand(1 - difference))))
        return self._symbol(Atom("le", difference))

    def lt(self, left: sympy.Expr, right: sympy.Expr) -> Boolean:
        """`left < right`. For integers `left + 1 <= right`; a float may be NaN, so there it is not `not right <= left`."""
        difference = sympy.expand(left - right)
        if difference.is_integer is not True:
            return self.opaque(sympy.Lt(left, right, evaluate=False))
        return self.le(left + 1, right)

    def eq(self, left: sympy.Expr, right: sympy.Expr) -> Boolean:
        """`left == right`."""
        difference = sympy.expand(left - right)
        if difference.is_integer is not True:
            return self.opaque(sympy.Eq(left, right, evaluate=False))
        if difference.is_zero:
            return sympy.true
        if self.never_positive(1 - difference) or self.never_positive(1 + difference):
            return sympy.false
        if _leading_is_negative(difference):
            difference = sympy.expand(-difference)
        return self._symbol(Atom("eq", difference))

    def opaque(self, expr: sympy.Basic) -> Boolean:
        """Something whose truth is not understood, but which is the same wherever it is written the same."""
        return self._symbol(Atom("opaque", expr))

    def never_positive(self, expr: sympy.Expr) -> bool:
        """Whether `expr <= 0` at every position that the sizes admit."""
        highest = expr
        for index in INDICES:
            slope = highest.coeff(index, 1)
            rest = sympy.expand(highest - slope * index)
            if rest.has(index) or slope.has(*INDICES) or not slope.is_number:
                return False
            extreme = self.sizes.get(index, sympy.oo) - 1 if slope > 0 else 0
            highest = rest + (slope * extreme if slope != 0 else 0)
        if highest.has(AppliedUndef):
            return False
        if highest.is_number:
            return bool(highest <= 0)
        return bool(self.upper_bound(highest) <= 0)

    def _symbol(self, atom: Atom) -> sympy.Symbol:
        symbol = sympy.Symbol(f"[{atom}]")
        self.table[symbol] = atom
        return symbol


def _leading_is_negative(expr: sympy.Expr) -> bool:
    """The sign convention: the first position variable that occurs has a positive coefficient, else the first term."""
    for index in INDICES:
        slope = expr.coeff(index, 1)
        if slope.is_number and slope != 0:
            return bool(slope < 0)
    terms = [term for term in sympy.Add.make_args(expr) if not term.is_number]
    leading = min(terms, key=sympy.default_sort_key)
    return bool(leading.as_coeff_Mul()[0] < 0)
