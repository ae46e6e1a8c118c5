"""The rules of `symbolic.Evaluator`: for each operator, the element at an index from the elements of its inputs.

A rule is `rule(evaluator, node, index, *arguments) -> Value`, with the arguments in the schema's order. It raises
`NotUnderstood` for any use that it does not cover, and the node becomes a leaf. Sizes and dims are those of the fake
tensors, so that symbolic lengths work as static ones do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from tsa_compile.passes.graph import fake, known
from tsa_compile.passes.masks.symbolic import (
    Cases,
    Evaluator,
    Index,
    NotUnderstood,
    Rule,
    Value,
    as_number,
    combine,
    constant,
    round_constant,
    rule,
)


def shape_of(node: Any) -> tuple[Any, ...]:
    """The sizes of a recorded tensor; of a number none."""
    value = fake(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def integer(value: Any) -> sympy.Expr:
    """A Python or symbolic integer as an expression."""
    if isinstance(value, bool):
        raise NotUnderstood
    cases = constant(value)
    if not isinstance(cases, list) or cases[0][1].is_integer is not True:
        raise NotUnderstood
    return cases[0][1]


def dimension(value: Any, rank: int) -> int:
    """A dimension's number, counted from the front."""
    if isinstance(value, bool) or not isinstance(value, int) or not -rank <= value < max(rank, 1):
        raise NotUnderstood
    return value % rank if rank else 0


def broadcast(node: Any, index: Index) -> Index:
    """The index into an operand that is broadcast to the result's shape."""
    shape = shape_of(node)
    tail = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if known(extent == 1) else i for extent, i in zip(shape, tail, strict=True))


# -- sources ------------------------------------------------------------------------------------------------------------


@rule("arange.default", "arange.start", "arange.start_step")
def _arange(evaluator: Evaluator, node: Node, index: Index, *arguments: Any) -> Value:
    """With an end, a start and an end, or a step as well, in front of dtype, layout, device and pin_memory."""
    numbers = [integer(number) for number in arguments[:-4]]
    start, step = numbers[0] if len(numbers) > 1 else 0, numbers[2] if len(numbers) > 2 else 1
    return [(sympy.true, start + step * index[0])]


rule("ones.default", "new_ones.default", "ones_like.default")(lambda *_: constant(1))
rule("zeros.default", "new_zeros.default", "zeros_like.default", "zero.default")(lambda *_: constant(0))


def _broadcast(place: int) -> Rule:
    """The rule of a tensor of what the argument at this place holds, a number or a tensor."""
    return lambda evaluator, node, index, *arguments: evaluator.element(arguments[place], broadcast(arguments[place], index))


rule("scalar_tensor.default", "expand.default", "expand_as.default", "broadcast_to.default")(_broadcast(0))
rule("full.default", "full_like.default", "fill.Scalar", "fill.Tensor", "copy.default")(_broadcast(1))
rule("new_full.default")(_broadcast(2))


# -- logic --------------------------------------------------------------------------------------------------------------


def _formulas(evaluator: Evaluator, node: Node, index: Index, left: Any, right: Any) -> list[Any]:
    if fake(node).dtype != torch.bool:
        raise NotUnderstood
    return [evaluator.formula(operand, broadcast(operand, index)) for operand in (left, right)]


def _logical(*names: str) -> tuple[str, ...]:
    """An operation on truth values: `logical_*` of anything, `bitwise_*` and Python's operators of bools."""
    overloads = ("Tensor", "Scalar", "Scalar_Tensor")
    return (f"logical_{names[0]}.default", *(f"{name}.{overload}" for name in names[1:] for overload in overloads))


def _operation(of_truth: Callable[[Any, Any], Any]) -> Rule:
    """The rule of an operation on truth values."""

    def compute(evaluator: Evaluator, node: Node, index: Index, left: Any, right: Any) -> Value:
        return of_truth(*_formulas(evaluator, node, index, left, right))

    return compute


def _xor(one: Any, other: Any) -> Any:
    return sympy.Or(sympy.And(one, sympy.Not(other)), sympy.And(sympy.Not(one), other))


rule(*_logical("and", "bitwise_and", "__and__", "__iand__"))(_operation(sympy.And))
rule(*_logical("or", "bitwise_or", "__or__", "__ior__"))(_operation(sympy.Or))
rule(*_logical("xor", "bitwise_xor", "__xor__", "__ixor__"))(_operation(_xor))


@rule("logical_not.default", "bitwise_not.default")
def _not(evaluator: Evaluator, node: Node, index: Index, source: Any) -> Value:
    if fake(node).dtype != torch.bool:  # the bitwise complement of an integer
        raise NotUnderstood
    return sympy.Not(evaluator.formula(source, index))


# -- comparisons --------------------------------------------------------------------------------------------------------


def _comparison(name: str, *, swapped: bool = False) -> Rule:
    """The rule of a comparison; `a >= b` is `b <= a`."""

    def compare(evaluator: Evaluator, node: Node, index: Index, left: Any, right: Any) -> Value:
        pairs = _compared(evaluator, index, left, right)
        return sympy.Or(
            *(sympy.And(condition, _holds(evaluator, name, *(pair[::-1] if swapped else pair))) for condition, pair in pairs)
        )

    return compare


def _compared(evaluator: Evaluator, index: Index, left: Any, right: Any) -> list[tuple[Any, tuple[Any, Any]]]:
    """Both sides, case by case, in the dtype that they are compared in: a uint8 beside -1 is compared with 255."""
    dtype = torch.result_type(_typed(left), _typed(right))
    sides = [
        [
            (condition, evaluator.held_by(number, dtype))
            for condition, number in evaluator.number(side, broadcast(side, index))
        ]
        for side in (left, right)
    ]
    return [(sympy.And(c, d), (x, y)) for c, x in sides[0] for d, y in sides[1]]


def _typed(side: Any) -> Any:
    """A side of a comparison for `torch.result_type`, which takes no symbols."""
    if isinstance(side, torch.SymInt):
        return 1
    if isinstance(side, (torch.SymFloat, torch.SymBool)):
        raise NotUnderstood
    return fake(side)


def _holds(evaluator: Evaluator, name: str, left: sympy.Expr, right: sympy.Expr) -> Any:
    """A comparison of two values. Expressions must be integers: what float arithmetic rounds, sympy does not."""
    if left.is_number and right.is_number:
        return sympy.sympify(bool({"le": left <= right, "lt": left < right, "eq": left == right}[name]))
    if not (left.is_integer and right.is_integer):
        raise NotUnderstood
    return getattr(evaluator.atoms, name)(left, right)


_COMPARISONS: dict[tuple[str, str], Rule] = {
    ("le", "less_equal"): _comparison("le"),
    ("ge", "greater_equal"): _comparison("le", swapped=True),
    ("lt", "less"): _comparison("lt"),
    ("gt", "greater"): _comparison("lt", swapped=True),
    ("eq", "eq"): _comparison("eq"),
    ("ne", "not_equal"): lambda *operands: sympy.Not(_comparison("eq")(*operands)),
}
for _names, _compare in _COMPARISONS.items():
    rule(*(f"{_name}.{_overload}" for _name in _names for _overload in ("Tensor", "Scalar")))(_compare)


# -- arithmetic ---------------------------------------------------------------------------------------------------------


def _numbers(evaluator: Evaluator, node: Node, index: Index, *operands: Any) -> list[Cases]:
    """The operands of arithmetic: integers, or constants where floating-point numbers are computed with."""
    cases = [evaluator.number(operand, broadcast(operand, index)) for operand in operands]
    dtype = fake(node).dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        return cases
    if not all(number.is_number for case in cases for _, number in case):
        raise NotUnderstood
    # The operands' type, which in place may be wider than the result's; a number too large for it is infinite.
    promoted = torch.result_type(_typed(operands[0]), _typed(operands[-1]))
    computed = torch.float64 if promoted == torch.float64 else torch.float32
    return [[(condition, round_constant(number, computed)) for condition, number in case] for case in cases]


def _arithmetic(operation: Callable[[Any, Any], Any], of_truth: Any = None) -> Rule:
    """The rule of `operation(left, right)`, which on truth values is `of_truth`, if that is allowed."""

    def compute(evaluator: Evaluator, node: Node, index: Index, left: Any, right: Any, alpha: Any = 1) -> Value:
        if isinstance(alpha, bool) or alpha != 1:
            raise NotUnderstood
        if fake(node).dtype == torch.bool:
            if of_truth is None:
                raise NotUnderstood
            return of_truth(*_formulas(evaluator, node, index, left, right))
        return combine(operation, *_numbers(evaluator, node, index, left, right))

    return compute


rule("add.Tensor", "add.Scalar")(_arithmetic(lambda a, b: a + b, sympy.Or))
rule("sub.Tensor", "sub.Scalar", "subtract.Tensor", "subtract.Scalar")(_arithmetic(lambda a, b: a - b))
rule("rsub.Tensor", "rsub.Scalar")(_arithmetic(lambda a, b: b - a))
rule("mul.Tensor", "mul.Scalar", "multiply.Tensor", "multiply.Scalar")(_arithmetic(lambda a, b: a * b, sympy.And))


@rule("neg.default", "negative.default")
def _neg(evaluator: Evaluator, node: Node, index: Index, source: Any) -> Value:
    return combine(lambda a: -a, *_numbers(evaluator, node, index, source))


@rule("floor_divide.default", "floor_divide.Scalar")
def _floor_divide(evaluator: Evaluator, node: Node, index: Index, left: Any, right: Any) -> Value:
    dtype = fake(node).dtype  # in which both are divided: 200 // 257 of uint8 is 200 // 1
    above, below = (
        [(condition, evaluator.held_by(number, dtype)) for condition, number in cases]
        for cases in _numbers(evaluator, node, index, left, right)
    )
    if not all(number.is_integer for _, number in above) or not all(number.is_Integer and number > 0 for _, number in below):
        raise NotUnderstood
    return combine(lambda a, b: sympy.floor(a / b), above, below)


@rule("div.Tensor_mode", "div.Scalar_mode", "divide.Tensor_mode", "divide.Scalar_mode")
def _div(evaluator: Evaluator, node: Node, index: Index, left: Any, right: Any, rounding_mode: Any) -> Value:
    if rounding_mode != "floor":
        raise NotUnderstood
    return _floor_divide(evaluator, node, index, left, right)


# -- selection ----------------------------------------------------------------------------------------------------------


def choose(evaluator: Evaluator, node: Node, condition: Any, chosen: Value, other: Value) -> Value:
    """One value where a condition holds, another one elsewhere."""
    if fake(node).dtype == torch.bool:
        chosen, other = evaluator.truth(chosen), evaluator.truth(other)
        return sympy.Or(sympy.And(condition, chosen), sympy.And(sympy.Not(condition), other))
    cases = [(sympy.And(condition, c), number) for c, number in as_number(chosen)]
    cases += [(sympy.And(sympy.Not(condition), c), number) for c, number in as_number(other)]
    return combine(lambda number: number, cases)


@rule("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where(evaluator: Evaluator, node: Node, index: Index, condition: Any, chosen: Any, other: Any) -> Value:
    test = evaluator.formula(condition, broadcast(condition, index))
    values = [evaluator.element(operand, broadcast(operand, index)) for operand in (chosen, other)]
    return choose(evaluator, node, test, *values)


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(evaluator: Evaluator, node: Node, index: Index, source: Any, mask: Any, fill: Any) -> Value:
    test = evaluator.formula(mask, broadcast(mask, index))
    kept = evaluator.element(source, broadcast(source, index))
    return choose(evaluator, node, test, evaluator.element(fill, ()), kept)


def _triangle(lower: bool) -> Rule:
    def compute(evaluator: Evaluator, node: Node, index: Index, source: Any, diagonal: Any) -> Value:
        row, column, offset = index[-2], index[-1], integer(diagonal)
        inside = evaluator.atoms.le(column, row + offset) if lower else evaluator.atoms.le(row + offset, column)
        return choose(evaluator, node, inside, evaluator.element(source, index), constant(0))

    return compute


rule("tril.default")(_triangle(lower=True))
rule("triu.default")(_triangle(lower=False))


# -- scans --------------------------------------------------------------------------------------------------------------


@rule("diff.default")
def _diff(
    evaluator: Evaluator, node: Node, index: Index, source: Any, n: Any, dim: Any, prepend: Any = None, append: Any = None
) -> Value:
    """`diff(x, prepend=p)[i]`: x[i] - x[i-1] behind the first element, x[0] - p there; one value if both agree."""
    dim = dimension(dim, len(index))
    if n != 1 or append is not None or fake(node).dtype == torch.bool:
        raise NotUnderstood
    i = index[dim]

    def at(tensor: Any, position: sympy.Expr) -> sympy.Expr:
        return evaluator.integer(tensor, (*index[:dim], position, *index[dim + 1 :]))

    if prepend is None:
        return [(sympy.true, at(source, i + 1) - at(source, i))]
    if not known(fake(prepend).shape[dim] == 1):
        raise NotUnderstood
    first = at(source, sympy.Integer(0)) - at(prepend, sympy.Integer(0))
    later = sympy.expand(at(source, i) - at(source, i - 1))
    if sympy.expand(first - later) != 0:
        raise NotUnderstood
    return [(sympy.true, later)]


@rule("cumsum.default")
def _cumsum(evaluator: Evaluator, node: Node, index: Index, source: Any, dim: Any, *_: Any) -> Value:
    """The running sum of a constant."""
    dim = dimension(dim, len(index))
    cases = evaluator.number(source, index)
    if len(cases) != 1 or not cases[0][1].is_Integer:
        raise NotUnderstood
    return [(sympy.true, cases[0][1] * (index[dim] + 1))]
