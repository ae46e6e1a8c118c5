"""What expressions of sizes are, for whoever proves something of them."""

import pytest
import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from tsa_compile.passes.graph import expr_of


@pytest.fixture
def number():
    """A number of a graph, of which is known that it is at least 16; and its symbol."""
    env = ShapeEnv()
    symbol = env.create_symbol(40, ConstantSource("cached"), dynamic_dim=DimDynamic.DYNAMIC)
    given = env.create_symintnode(symbol, hint=40)
    assert given >= 16  # a guard
    return given, symbol


CASES = {
    "a cache that is full": (lambda n: n - torch.sym_max(0, n - 15), lambda s: sympy.Integer(15)),
    "the other way round": (lambda n: n - torch.sym_max(n - 15, 0), lambda s: sympy.Integer(15)),
    "a minimum": (lambda n: torch.sym_min(n, 16), lambda s: sympy.Integer(16)),
    "what the range does not decide": (lambda n: torch.sym_max(0, n - 20) + 3, None),
    "no extreme": (lambda n: 2 * n + 1, lambda s: 2 * s + 1),
}


@pytest.mark.parametrize("make, wanted", CASES.values(), ids=CASES)
def test_maxima_that_ranges_decide(number, make, wanted):
    given, symbol = number
    made = make(given)
    assert expr_of(made) == (made.node.expr if wanted is None else wanted(symbol))


def test_a_number_is_itself():
    assert expr_of(7) == 7
