"""Minima of sizes that every torch simplifies: min(16 L, 32 L) is 16 L.

    before   stride = Min(16*s, 32*s)        of repeated heads, `x[:, :, None].expand(...).reshape(...)`
             is it 16*s?                     nobody knows: a guard, and torch.export refuses the range of lengths
    after    stride = 16*s

torch 2.13 simplifies such a minimum by itself, 2.11 does not. It matters where a graph may have no guards, in exports.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
from torch.utils._sympy import functions

_lock = threading.RLock()


@contextmanager
def simplified_minima() -> Iterator[None]:
    """Inside, `Min` of two multiples of one non-negative size is the smaller of the two, whatever the version of torch."""
    size = sympy.Symbol("size", integer=True, positive=True)
    if functions.Min(2 * size, 3 * size) == 2 * size:
        yield
        return
    with _lock:
        original = functions.Min.__new__

        def simplified(cls: Any, *args: Any, **assumptions: Any) -> Any:
            smaller = smaller_multiple(*map(sympy.sympify, args)) if cls is functions.Min and len(args) == 2 else None
            return original(cls, *args, **assumptions) if smaller is None else smaller

        functions.Min.__new__ = simplified  # type: ignore[method-assign]  # torch 2.11 offers no hook for it
        try:
            yield
        finally:
            functions.Min.__new__ = original  # type: ignore[method-assign]  # as above


def smaller_multiple(left: sympy.Expr, right: sympy.Expr) -> sympy.Expr | None:
    """The smaller of two multiples of one expression that is not negative; None where that is not what they are."""
    (left_factor, left_rest), (right_factor, right_rest) = left.as_coeff_Mul(), right.as_coeff_Mul()
    if left_rest != right_rest or left_rest.is_nonnegative is not True:
        return None
    return left if left_factor <= right_factor else right
