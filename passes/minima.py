"""Minima of sizes, for exports with torch 2.11 and 2.12: min(16 L, 32 L) is 16 L.

    before   stride = Min(16*s, 32*s)        of repeated heads, `x[:, :, None].expand(...).reshape(...)`
             is it 16*s?                     not known: a guard, and torch.export refuses the range of lengths
    after    stride = 16*s

torch simplifies such a minimum by itself from 2.13 on, and is left alone there. Before, models with grouped heads could not
be exported for a range of lengths. `prefer_deferred_runtime_asserts_over_guards` of torch.export would get them through,
but then nothing tells either that a rewrite fixed a size: what it assumes would no longer be a guard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
from torch.utils._sympy.functions import Min


@contextmanager
def simplified_minima() -> Iterator[None]:
    """Inside, `Min` of two multiples of one non-negative size is the smaller of the two, whatever the version of torch."""
    size = sympy.Symbol("size", integer=True, positive=True)
    if Min(2 * size, 3 * size) == 2 * size:
        yield
        return
    original = Min.__new__

    def simplified(cls: Any, *args: Any, **assumptions: Any) -> Any:
        smaller = smaller_multiple(*map(sympy.sympify, args)) if cls is Min and len(args) == 2 else None
        return original(cls, *args, **assumptions) if smaller is None else smaller

    Min.__new__ = simplified  # type: ignore[method-assign]  # there is no hook for it
    try:
        yield
    finally:
        Min.__new__ = original  # type: ignore[method-assign]  # as it was


def smaller_multiple(left: sympy.Expr, right: sympy.Expr) -> sympy.Expr | None:
    """The smaller of two multiples of one expression that is not negative; None where that is not what they are."""
    (left_factor, left_rest), (right_factor, right_rest) = left.as_coeff_Mul(), right.as_coeff_Mul()
    if left_rest != right_rest or left_rest.is_nonnegative is not True:
        return None
    return left if left_factor <= right_factor else right
