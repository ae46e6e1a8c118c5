"""Masks whose integers do not stay small: what overflows in torch is not read as if it did not."""

import pytest
import torch
import torch.nn.functional as F

from tsa_compile import reports
from tsa_compile.reasons import Decision

from .support import EXACT

LENGTH = 20
LARGEST = 2**31 - 1


def inputs():
    return torch.randn(3, 2, 4, LENGTH, 8)


def attend(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, mask)


def later_keys(query, key, value, number):
    at = torch.arange(LENGTH, dtype=torch.int32)
    return attend(query, key, value, at[None] + number <= at[:, None])


def later_queries(query, key, value, number):
    at = torch.arange(LENGTH, dtype=torch.int32)
    return attend(query, key, value, at[None] <= at[:, None] + number.item())


def both_later(query, key, value, number):
    at = torch.arange(LENGTH)
    return attend(query, key, value, at[None] + number <= at[:, None] + number)


def multiplied_in_place(query, key, value, _):
    """In float64: 1e-39 times -1e39 is -1, which hides nothing."""
    at = torch.arange(LENGTH)
    large = torch.full((LENGTH, LENGTH), -1e39, dtype=torch.float64).masked_fill_(at <= at[:, None], 0.0)
    return attend(query, key, value, torch.full((LENGTH, LENGTH), 1e-39).mul_(large))


def test_the_type_of_both_operands_is_computed_in():
    torch._dynamo.reset()
    config = EXACT.replace(compiler="eager", skip_passes=("Validate",))
    compiled, given = torch.compile(multiplied_in_place, backend="tsa", options={"config": config}), (*inputs(), 0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), multiplied_in_place(*given))


NUMBERS = {
    later_keys: (-3, -5, 2**32, LARGEST - 4, -(2**32), 2**30),
    later_queries: [torch.tensor(number) for number in (3, 2**32, LARGEST - 4)],
    both_later: (3, 5, 2**63 - 3),
}


@pytest.mark.parametrize("function", NUMBERS)
@pytest.mark.parametrize("first", [0, -1], ids=["small first", "large first"])
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_numbers_that_are_given(function, first):
    """A graph that is compiled for one number serves another one only if that is as small."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="tsa", options={"config": EXACT.replace(compiler="eager")})
    with torch.no_grad():
        for number in sorted(NUMBERS[function], key=abs, reverse=first == -1):
            given = (*inputs(), number)
            torch.testing.assert_close(compiled(*given), function(*given))


def test_a_number_that_is_given_is_read_while_it_is_small():
    torch._dynamo.reset()
    compiled = torch.compile(both_later, backend="tsa", options={"config": EXACT.replace(compiler="eager")})
    with torch.no_grad():
        for number in (3, 4, 5, 6):
            compiled(*inputs(), number)
        assert [report.rows[0].decision for report in reports()[-2:]] == [Decision.DENSE] * 2
        compiled(*inputs(), 2**63 - 3)
    assert reports()[-1].rows[0].decision is Decision.UNCHANGED


def whole(number, dtype=torch.uint8):
    return torch.full((LENGTH,), number, dtype=dtype)


CONSTANTS = {
    "int32 + 2**31 - 5": lambda: torch.arange(LENGTH, dtype=torch.int32) + (LARGEST - 4) > 0,
    "uint8 // 257": lambda: whole(200) // 257 == 0,
    "uint8 // 258 by mode": lambda: torch.div(whole(200), 258, rounding_mode="floor") == 0,
    "uint8 < -1": lambda: whole(200) < -1,
    "int8 * 3": lambda: whole(100, torch.int8) * 3 > 0,
}
ADDED = {
    "0, and exactly 1": lambda: torch.full((), 2.0**24) + 1 - 2.0**24,
    "NaN, and exactly 0": lambda: torch.full((), 1e30) * 1e30 * 0,
    "0, and exactly next to 0": lambda: torch.full((), 0.1) + torch.full((), 0.7) - 0.8,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_that_a_type_does_not_hold(name):
    """No mask is misread, also if what was read is not run once more on small inputs."""

    def function(query, key, value):
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        return attend(query, key, value, causal & CONSTANTS[name]())

    torch._dynamo.reset()
    config = EXACT.replace(compiler="eager", skip_passes=["Validate"])
    compiled, given = torch.compile(function, backend="tsa", options={"config": config}), inputs()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), function(*given))


@pytest.mark.parametrize("name", ADDED)
def test_constants_are_rounded_as_they_are_computed(name):
    """A mask adds 0 where torch finds 0, and NaN is no number that hides or allows."""
    number = ADDED[name]

    def function(query, key, value):
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        return attend(query, key, value, torch.where(causal, number(), -torch.inf))

    torch._dynamo.reset()
    config = EXACT.replace(compiler="eager", skip_passes=["Validate"])
    compiled, given = torch.compile(function, backend="tsa", options={"config": config}), inputs()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), function(*given), equal_nan=True)
    wanted = Decision.DENSE if number() == 0 else Decision.UNCHANGED
    assert reports()[-1].rows[0].decision is wanted
