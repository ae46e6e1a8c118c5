"""The rules of `symbolic.Evaluator`: for each operator, the element at an index from the elements of its inputs.

A rule is `rule(evaluator, node, index) -> Value`. It raises `NotUnderstood` for any use that it does not cover, and the
node becomes a leaf. Sizes and dims are those of the fake tensors, so that symbolic lengths work as static ones do.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from tsa_compile.passes.graph import argument, fake, known
from tsa_compile.passes.symbolic import (
    RULES,
    Evaluator,
    Index,
    NotUnderstood,
    Rule,
    Value,
    as_number,
    combine,
    constant,
    rule,
)


def _shape(node: Any) -> tuple[Any, ...]:
    value = fake(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _expr(value: Any) -> sympy.Expr:
    """A Python or symbolic integer, or a node that yields one, as an expression."""
    cases = constant(fake(value))
    if not isinstance(cases, list) or cases[0][1].is_integer is not True:
        raise NotUnderstood
    return cases[0][1]


def _dim(value: Any, rank: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -rank <= value < max(rank, 1):
        raise NotUnderstood
    return value % rank if rank else 0


def _broadcast(node: Any, index: Index) -> Index:
    """The index into an operand that is broadcast to the result's shape."""
    shape = _shape(node)
    tail = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if known(extent == 1) else i for extent, i in zip(shape, tail, strict=True))


def _operand(node: Node, position: int, *names: str) -> Any:
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    if len(node.args) <= position:
        raise NotUnderstood
    return node.args[position]


# -- sources ------------------------------------------------------------------------------------------------------------


@rule("arange")
def _arange(evaluator: Evaluator, node: Node, index: Index) -> Value:
    positional = [argument(node, i, name) for i, name in ((0, "start"), (1, "end"), (2, "step"))]
    if positional[1] is None or (len(node.args) == 1 and "end" not in node.kwargs):
        start: Any = 0
    else:
        start = 0 if positional[0] is None else positional[0]
    step = 1 if positional[2] is None else positional[2]
    return [(sympy.true, _expr(start) + _expr(step) * index[0])]


@rule("ones", "new_ones", "ones_like")
def _ones(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return constant(1)


@rule("zeros", "new_zeros", "zeros_like")
def _zeros(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return constant(0)


@rule("full")
def _full(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return constant(fake(_operand(node, 1, "fill_value")))


@rule("new_full")
def _new_full(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return constant(fake(_operand(node, 2, "fill_value")))


@rule("full_like")
def _full_like(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return constant(fake(_operand(node, 1, "fill_value")))


@rule("scalar_tensor", "tensor")
def _scalar(evaluator: Evaluator, node: Node, index: Index) -> Value:
    if index:
        raise NotUnderstood
    return constant(fake(node.args[0]))


# -- views and copies ---------------------------------------------------------------------------------------------------


@rule("to", "_to_copy", "type", "type_as", "bool", "int", "long", "float", "half", "double", "bfloat16")
def _cast(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return evaluator.element(node.args[0], index)  # the caller stores the result as the node's dtype


@rule("contiguous", "clone", "detach", "alias", "lift_fresh_copy", "cpu", "cuda")
def _same(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return evaluator.element(node.args[0], index)


@rule("expand", "expand_as", "broadcast_to")
def _expand(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return evaluator.element(node.args[0], _broadcast(node.args[0], index))


@rule("unsqueeze")
def _unsqueeze(evaluator: Evaluator, node: Node, index: Index) -> Value:
    dim = _dim(_operand(node, 1, "dim"), len(index))
    return evaluator.element(node.args[0], index[:dim] + index[dim + 1 :])


@rule("squeeze", "view", "reshape", "flatten")
def _reshape(evaluator: Evaluator, node: Node, index: Index) -> Value:
    """Reshapes that only add or remove dimensions of size one."""
    source, target = _shape(node.args[0]), _shape(node)
    if fake(node).dtype != fake(node.args[0]).dtype:  # `x.view(dtype)` reads the same bits as another type
        raise NotUnderstood
    kept = [i for extent, i in zip(target, index, strict=True) if not known(extent == 1)]
    wide = [extent for extent in source if not known(extent == 1)]
    wide_target = [extent for extent in target if not known(extent == 1)]
    if len(wide) != len(kept) or not all(known(a == b) for a, b in zip(wide, wide_target, strict=True)):
        raise NotUnderstood
    remaining = iter(kept)
    inner = tuple(sympy.Integer(0) if known(extent == 1) else next(remaining) for extent in source)
    return evaluator.element(node.args[0], inner)


@rule("transpose")
def _transpose(evaluator: Evaluator, node: Node, index: Index) -> Value:
    first, second = (_dim(argument(node, i, f"dim{i - 1}"), len(index)) for i in (1, 2))
    swapped = list(index)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    return evaluator.element(node.args[0], tuple(swapped))


@rule("t")
def _t(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return evaluator.element(node.args[0], index[::-1])


@rule("permute")
def _permute(evaluator: Evaluator, node: Node, index: Index) -> Value:
    dims: Any = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    dims = node.kwargs.get("dims", dims)
    inner: list[sympy.Expr] = [sympy.Integer(0)] * len(index)
    for position, dim in enumerate(dims):
        inner[_dim(dim, len(index))] = index[position]
    return evaluator.element(node.args[0], tuple(inner))


# -- logic and arithmetic -----------------------------------------------------------------------------------------------


def _formulas(evaluator: Evaluator, node: Node, index: Index) -> list[Any]:
    operands = (_operand(node, 0, "input", "self"), _operand(node, 1, "other"))
    if fake(node).dtype != torch.bool:
        raise NotUnderstood
    return [evaluator.formula(operand, _broadcast(operand, index)) for operand in operands]


@rule("and")
def _and(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return sympy.And(*_formulas(evaluator, node, index))


@rule("or")
def _or(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return sympy.Or(*_formulas(evaluator, node, index))


@rule("xor")
def _xor(evaluator: Evaluator, node: Node, index: Index) -> Value:
    left, right = _formulas(evaluator, node, index)
    return sympy.Or(sympy.And(left, sympy.Not(right)), sympy.And(sympy.Not(left), right))


@rule("not")
def _not(evaluator: Evaluator, node: Node, index: Index) -> Value:
    if fake(node).dtype != torch.bool:  # the bitwise complement of an integer
        raise NotUnderstood
    return sympy.Not(evaluator.formula(node.args[0], index))


def _numbers(evaluator: Evaluator, node: Node, index: Index) -> list[Any]:
    operands = (_operand(node, 0, "input", "self"), _operand(node, 1, "other"))
    return [evaluator.number(operand, _broadcast(operand, index)) for operand in operands]


def _relation(name: str, *, swapped: bool = False) -> Rule:
    """The rule of a comparison; `a >= b` is `b <= a`."""

    def compare(evaluator: Evaluator, node: Node, index: Index) -> Value:
        left, right = _numbers(evaluator, node, index)
        if swapped:
            left, right = right, left
        return sympy.Or(*(sympy.And(c, d, _holds(evaluator, name, x, y)) for c, x in left for d, y in right))

    return compare


def _holds(evaluator: Evaluator, name: str, left: sympy.Expr, right: sympy.Expr) -> Any:
    """A comparison of two values. Expressions must be integers: what float arithmetic rounds, sympy does not."""
    if left.is_number and right.is_number:
        return sympy.sympify(bool({"le": left <= right, "lt": left < right, "eq": left == right}[name]))
    if not (left.is_integer and right.is_integer):
        raise NotUnderstood
    return getattr(evaluator.atoms, name)(left, right)


RULES["le"], RULES["ge"] = _relation("le"), _relation("le", swapped=True)
RULES["lt"], RULES["gt"] = _relation("lt"), _relation("lt", swapped=True)
RULES["eq"] = _relation("eq")


@rule("ne")
def _ne(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return sympy.Not(RULES["eq"](evaluator, node, index))


def _require_plain(node: Node) -> None:
    """`add(x, y, alpha=2)` and `div(x, y, rounding_mode=...)` are other operators."""
    if set(node.kwargs) - {"input", "self", "other", "dtype"} or len(node.args) > 2:
        raise NotUnderstood


@rule("add")
def _add(evaluator: Evaluator, node: Node, index: Index) -> Value:
    _require_plain(node)
    if fake(node).dtype == torch.bool:
        return sympy.Or(*_formulas(evaluator, node, index))
    return combine(lambda a, b: a + b, *_numbers(evaluator, node, index))


@rule("sub")
def _sub(evaluator: Evaluator, node: Node, index: Index) -> Value:
    _require_plain(node)
    return combine(lambda a, b: a - b, *_numbers(evaluator, node, index))


@rule("rsub")
def _rsub(evaluator: Evaluator, node: Node, index: Index) -> Value:
    _require_plain(node)
    return combine(lambda a, b: b - a, *_numbers(evaluator, node, index))


@rule("mul")
def _mul(evaluator: Evaluator, node: Node, index: Index) -> Value:
    _require_plain(node)
    if fake(node).dtype == torch.bool:
        return sympy.And(*_formulas(evaluator, node, index))
    return combine(lambda a, b: a * b, *_numbers(evaluator, node, index))


@rule("neg")
def _neg(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return combine(lambda a: -a, evaluator.number(node.args[0], index))


@rule("floor_divide")
def _floor_divide(evaluator: Evaluator, node: Node, index: Index) -> Value:
    left, right = _numbers(evaluator, node, index)
    if not all(number.is_integer for _, number in left) or not all(number.is_Integer and number > 0 for _, number in right):
        raise NotUnderstood
    return combine(lambda a, b: sympy.floor(a / b), left, right)


@rule("div")
def _div(evaluator: Evaluator, node: Node, index: Index) -> Value:
    if node.kwargs.get("rounding_mode") == "floor":
        return _floor_divide(evaluator, node, index)
    raise NotUnderstood


# -- selection ----------------------------------------------------------------------------------------------------------


def _choose(evaluator: Evaluator, node: Node, condition: Any, chosen: Value, other: Value) -> Value:
    if fake(node).dtype == torch.bool:
        chosen, other = evaluator.truth(chosen), evaluator.truth(other)
        return sympy.Or(sympy.And(condition, chosen), sympy.And(sympy.Not(condition), other))
    cases = [(sympy.And(condition, c), number) for c, number in as_number(chosen)]
    cases += [(sympy.And(sympy.Not(condition), c), number) for c, number in as_number(other)]
    merged: dict[sympy.Expr, Any] = {}
    for case, number in cases:
        if case != sympy.false:
            merged[number] = sympy.Or(merged.get(number, sympy.false), case)
    return [(case, number) for number, case in merged.items()]


@rule("where")
def _where(evaluator: Evaluator, node: Node, index: Index) -> Value:
    condition, chosen, other = (
        _operand(node, i, *names) for i, names in enumerate((("condition",), ("input", "self"), ("other",)))
    )
    test = evaluator.formula(condition, _broadcast(condition, index))
    values = [evaluator.element(operand, _broadcast(operand, index)) for operand in (chosen, other)]
    return _choose(evaluator, node, test, *values)


@rule("masked_fill")
def _masked_fill(evaluator: Evaluator, node: Node, index: Index) -> Value:
    tensor, mask, fill = _operand(node, 0, "input", "self"), _operand(node, 1, "mask"), _operand(node, 2, "value")
    test = evaluator.formula(mask, _broadcast(mask, index))
    kept = evaluator.element(tensor, _broadcast(tensor, index))
    return _choose(evaluator, node, test, evaluator.element(fill, ()), kept)


def _triangle(evaluator: Evaluator, node: Node, index: Index, lower: bool) -> Value:
    if len(index) < 2:
        raise NotUnderstood
    diagonal = _expr(argument(node, 1, "diagonal", 0))
    row, column = index[-2], index[-1]
    inside = evaluator.atoms.le(column, row + diagonal) if lower else evaluator.atoms.le(row + diagonal, column)
    return _choose(evaluator, node, inside, evaluator.element(_operand(node, 0, "input", "self"), index), constant(0))


@rule("tril")
def _tril(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return _triangle(evaluator, node, index, lower=True)


@rule("triu")
def _triu(evaluator: Evaluator, node: Node, index: Index) -> Value:
    return _triangle(evaluator, node, index, lower=False)


# -- scans --------------------------------------------------------------------------------------------------------------


@rule("diff")
def _diff(evaluator: Evaluator, node: Node, index: Index) -> Value:
    """`diff(x, prepend=p)[i]`: x[i] - x[i-1] behind the first element, x[0] - p there; one value if both agree."""
    source, prepend = node.args[0], argument(node, 3, "prepend")
    dim = _dim(argument(node, 2, "dim", -1), len(index))
    if argument(node, 1, "n", 1) != 1 or argument(node, 4, "append") is not None:
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


@rule("cumsum")
def _cumsum(evaluator: Evaluator, node: Node, index: Index) -> Value:
    """The running sum of a constant."""
    dim = _dim(_operand(node, 1, "dim"), len(index))
    cases = evaluator.number(node.args[0], index)
    if len(cases) != 1 or not cases[0][1].is_Integer:
        raise NotUnderstood
    return [(sympy.true, cases[0][1] * (index[dim] + 1))]
