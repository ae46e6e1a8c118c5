"""Minima of sizes, as an older torch leaves them."""

import pytest
import sympy
from torch.utils._sympy.functions import Max, Min

from tsa_compile.passes.minima import simplified_minima, smaller_multiple

S, T = sympy.symbols("s t", integer=True, positive=True)
SIGNED = sympy.Symbol("u", integer=True)


@pytest.mark.parametrize(
    ("left", "right", "smaller"),
    [
        (16 * S, 32 * S, 16 * S),
        (32 * S, 16 * S, 16 * S),
        (S, 4 * S, S),
        (S * T, 3 * S * T, S * T),
        (sympy.Integer(3), sympy.Integer(5), sympy.Integer(3)),
        (16 * S, 32 * T, None),
        (16 * S, 32 * S + 1, None),
        (16 * SIGNED, 32 * SIGNED, None),
    ],
)
def test_the_smaller_of_two_multiples(left, right, smaller):
    assert smaller_multiple(left, right) == smaller
    with simplified_minima():
        for size in (1, 7):
            values = {S: size, T: 3, SIGNED: -size}
            assert Min(left, right).subs(values) == min(left.subs(values), right.subs(values))


@pytest.mark.parametrize("old", [False, True])
def test_inside_every_torch_simplifies(old, monkeypatch):
    original = Min.__new__
    if old:  # as torch 2.11: whatever it is given stays as it is
        monkeypatch.setattr(Min, "__new__", lambda cls, *args, **_: sympy.Expr.__new__(cls, *args))
        assert Min(16 * S, 32 * S) != 16 * S
    with simplified_minima():
        assert Min(16 * S, 32 * S) == 16 * S
        assert Max(16 * S, 32 * S).subs(S, 2) == 64
    assert (Min.__new__ is original) is not old
