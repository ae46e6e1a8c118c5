"""Attention written out: softmax(q @ k^T * scale + mask) @ v, read into the same normal form as an SDPA call.

    scores  = matmul(q, transpose(k))                         [B, H, Lq, Lk]; or bmm, baddbmm, einsum
    scores  = mul(scores, scale)                              any number of factors, or none
    scores  = add(scores, mask)                               or masked_fill(~mask, min), or where(mask, scores, min)
    weights = softmax(scores, -1), cast to q's type
    weights = dropout(weights, p=0)
    output  = matmul(weights, v)                              [B, H, Lq, Dv]; or bmm, einsum

Between the two products only what is named here may stand, and what provably changes nothing: copies, casts to types that
hold all that the query's type does, and views that leave the last two dimensions. Every step must be read by the next one
alone. Anything else that weighs by a softmax over a product is a call with reason UNSUPPORTED_FORM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from tsa_compile.passes.aten import AtenGraph, users
from tsa_compile.passes.call import OUT_OF_RANGE, MaskTerm, RecordedCall, keeps_range
from tsa_compile.passes.graph import fake, known, same_shape
from tsa_compile.passes.operators import arguments, aten, functional, without_copies
from tsa_compile.reasons import Reason

_CASTS = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default,
)  # fmt: skip
_SAME = (aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default)
_VIEWS = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip
_TRANSPARENT = (*_CASTS, *_SAME, *_VIEWS)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what a float8 loses is more than rounding
_SOFTMAXES = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_FACTORS = {
    aten.mul.Tensor: "mul", aten.mul.Scalar: "mul", aten.multiply.Tensor: "mul", aten.multiply.Scalar: "mul",
    aten.div.Tensor: "div", aten.div.Scalar: "div", aten.divide.Tensor: "div", aten.true_divide.Tensor: "div",
}  # fmt: skip
_FAR = 12  # steps within which a softmax's product is looked for


class WrittenOut:
    """Reads written-out attention from its last product, and names softmaxes over products that no product reads so."""

    def __init__(self, graph: AtenGraph) -> None:
        self.softmaxes: dict[Node, _Weights] = {}
        for call in graph.calls.nodes:
            if call.target in _PRODUCTS and (weights := _operands(call)[0]) is not None:
                walked = _Weights().walk(weights)
                if walked.softmax is not None:
                    self.softmaxes[call] = walked

    def read(self, call: Node) -> RecordedCall | None:
        """The attention that ends with this operator; None if none does."""
        if call in self.softmaxes:
            return _read_product(call, self.softmaxes[call])
        if call.target not in _SOFTMAXES or any(call is weights.softmax for weights in self.softmaxes.values()):
            return None
        product = _product_behind(call.args[0])
        if not _is_over_last(call) or product is None:
            return None
        return _unsupported(call, product, None, "its weights are read by something else than a product with the values")


def _read_product(call: Node, weights: _Weights) -> RecordedCall | None:
    assert weights.softmax is not None
    scores = _Scores().walk(weights.softmax.args[0])
    value = _operands(call)[1]
    if scores.product is None:
        product = _product_behind(weights.softmax.args[0])
        if product is None:  # a mixture of something else
            return None
        return _unsupported(call, product, value, scores.problem or "the scores are no product of query and key")
    query, key = _query_and_key(scores.product)
    value = _four_dimensional(value)
    problem = scores.problem or _chain_problem(call, weights, scores)
    if problem is None and (None in (query, key, value) or not _are_matched(call, scores.product, query, key, value)):
        problem = "the products are not [B, H, Lq, D] with a transposed [B, H, Lk, D] and [B, H, Lk, Dv]"
    problem = problem or scores.problem_for(fake(query))
    if problem is not None:
        return _unsupported(call, scores.product, _operands(call)[1], problem)
    masks = tuple(term for term, _ in scores.masks)
    return RecordedCall(call, "eager", query, key, value, masks, scale=scores.scale, dropout=weights.dropout)


def _unsupported(call: Node, product: Node, value: Any, problem: str) -> RecordedCall:
    query, key = _operands(product)
    return RecordedCall(call, "eager", query, key, value, problem=(Reason.UNSUPPORTED_FORM, problem))


def _operands(product: Node) -> tuple[Any, Any]:
    """The two factors of a product."""
    if product.target is aten.baddbmm.default:
        return product.args[1], product.args[2]
    if product.target is aten.einsum.default:
        factors: Any = product.args[1]
        return tuple(factors) if len(factors) == 2 else (None, None)  # type: ignore[return-value]
    return product.args[0], product.args[1]


# -- the weights --------------------------------------------------------------------------------------------------------


@dataclass
class _Weights:
    """What stands between the softmax and the product with the values, read backwards."""

    softmax: Node | None = None
    dropout: Any = 0.0
    chain: list[Node] = field(default_factory=list)

    def walk(self, node: Any) -> _Weights:
        while isinstance(node, Node):
            self.chain.append(node)
            target = functional(node.target)
            if target in _SOFTMAXES:
                self.softmax = node
                if not _is_over_last(node):
                    self.softmax = None
                return self
            if target is aten.dropout.default:
                _, probability, training = arguments(node)
                if training is not False and probability != 0:
                    self.dropout = probability
            elif target not in _TRANSPARENT:
                return self
            node = node.args[0]
        return self


def _is_over_last(softmax: Node) -> bool:
    return arguments(softmax)[1] in (-1, fake(softmax).dim() - 1)


# -- the scores ---------------------------------------------------------------------------------------------------------


@dataclass
class _Scores:
    """What stands between `q @ k^T` and the softmax, read backwards."""

    product: Node | None = None
    masks: list[tuple[MaskTerm, Node]] = field(default_factory=list)
    """Each mask, and the step that applies it."""
    factors: list[float] = field(default_factory=list)
    """What the scale is the product of, the last step first."""
    symbol: Any = None
    """A number that the graph computes, in place of factors."""
    chain: list[Node] = field(default_factory=list)
    problem: str | None = None

    @property
    def scale(self) -> Any:
        return math.prod(self.factors, start=1.0) if self.symbol is None else self.symbol

    def walk(self, node: Any) -> _Scores:
        while isinstance(node, Node) and self.product is None:
            self.chain.append(node)
            node = self._step(node)
        return self

    def _step(self, node: Node) -> Any:
        target = functional(node.target)
        if target in _PRODUCTS:
            return self._take_product(node)
        if target in _TRANSPARENT:
            return node.args[0]
        if target in _FACTORS:
            return self._factor(node, _FACTORS[target])
        if target is aten.add.Tensor:
            return self._bias(node)
        if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            scores, mask, fill = arguments(node)
            return self._fill(node, scores, mask, fill, "drop")
        if target in (aten.where.self, aten.where.ScalarOther):
            mask, scores, fill = arguments(node)
            return self._fill(node, scores, mask, fill, "keep")
        self.problem = f"the scores go through {target}"
        return None

    def _take_product(self, node: Node) -> None:
        self.product = node
        if node.target is aten.baddbmm.default:
            added, _, _, beta, alpha = arguments(node)
            if beta != 0:
                self._add(node, added, plain=beta == 1)
            self._multiply(alpha, "mul")

    def _factor(self, node: Node, name: str) -> Any:
        left, right = node.args[:2]
        if name == "mul" and _is_scores(right) and not _is_scores(left):
            left, right = right, left
        self._multiply(_scalar(right), name)
        return left

    def _multiply(self, factor: Any, name: str) -> None:
        if factor is None:
            self.problem = f"the scores are {'multiplied' if name == 'mul' else 'divided'} by a tensor"
        elif isinstance(factor, (torch.SymInt, torch.SymFloat)):
            if name == "div" or not self._is_unscaled():
                self.problem = "the scale is computed by the graph in several steps"
            self.symbol = factor
        elif self.symbol is not None:
            self.problem = "the scale is computed by the graph in several steps"
        elif name == "div" and factor == 0:
            self.problem = "the scores are divided by zero"
        else:
            self.factors.append(float(factor) if name == "mul" else 1 / float(factor))

    def _bias(self, node: Node) -> Any:
        left, right, alpha = arguments(node)
        scores, mask = (left, right) if _product_behind(left) is not None else (right, left)
        self._add(node, mask, plain=not isinstance(alpha, bool) and alpha == 1)
        return scores

    def _add(self, node: Node, mask: Any, plain: bool) -> None:
        if not self._is_unscaled():
            self.problem = "the mask is scaled together with the scores"
        if plain and isinstance(mask, Node) and isinstance(fake(mask), torch.Tensor):
            self.masks.append((MaskTerm(mask, "bias", dtype=fake(node).dtype), node))
        else:
            self.problem = "something that is no mask is added to the scores"

    def _fill(self, node: Node, scores: Any, mask: Any, fill: Any, role: Any) -> Any:
        value = _scalar(fill)
        if not isinstance(value, float) or not isinstance(mask, Node) or not self._is_unscaled():
            self.problem = "scores are replaced by something that is no constant, or scaled afterwards"
        elif not isinstance(fake(mask), torch.Tensor) or fake(mask).dtype != torch.bool:
            self.problem = "the mask is not of truth values"
        else:
            self.masks.append((MaskTerm(mask, role, value, fake(node).dtype), node))
        return scores if isinstance(scores, Node) else None

    def _is_unscaled(self) -> bool:
        return self.symbol is None and all(factor == 1 for factor in self.factors)  # 2 * 0.5: a mask may overflow in between

    def problem_for(self, query: torch.Tensor) -> str | None:
        """What is in the way with the query [B, H, Lq, D] of these scores; None if nothing is."""
        if not all(_broadcasts(fake(term.mask), fake(step).shape, query.shape[:2]) for term, step in self.masks):
            return "a mask is not of the shape of the scores [B, H, Lq, Lk]"
        return None if keeps_range([*reversed(self.factors)], query.dtype) else OUT_OF_RANGE


def _broadcasts(mask: torch.Tensor, scores: torch.Size, heads: torch.Size) -> bool:
    """Whether a mask means the same for scores [B, H, Lq, Lk] with `heads` = [B, H] as for these, which may be a view."""
    if mask.dim() > min(4, len(scores)):
        return False
    if len(scores) == 4 and all(known(a == b) for a, b in zip(scores[:2], heads, strict=True)):
        return True
    return all(known(extent == 1) for extent in mask.shape[:-2])


def _is_scores(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(fake(node), torch.Tensor) and fake(node).dim() >= 3


def _product_behind(node: Any) -> Node | None:
    """The product that a value is made of, by steps that are understood or not."""
    for _ in range(_FAR):
        if not isinstance(node, Node):
            return None
        if node.target in _PRODUCTS:
            return node if all(map(_is_scores, _operands(node))) else None
        if node.target in (aten.sum.dim_IntList, aten.cat.default):  # products by hand, columns for sinks
            node = next(iter(node.all_input_nodes), None)
            continue
        operands = node.all_input_nodes[1:] if "where" in str(node.target) else node.all_input_nodes
        node = next(filter(_is_scores, operands), None)
    return None


def _scalar(value: Any) -> Any:
    """A Python number, a symbolic one, or a tensor that is filled with a constant, as a float (or the symbol)."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, Node) or fake(value).numel() != 1 or fake(value).dtype not in _FLOATS:
        return None
    number = _constant(value)
    return None if number is None else float(torch.tensor(number, dtype=torch.float64).to(fake(value).dtype))


def _constant(value: Node) -> float | None:
    """The number in a tensor of one element, where the graph says which."""
    if "constant" in value.meta:
        return float(value.meta["constant"].item())
    if value.target in (*_CASTS, *_SAME, aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.expand.default):
        return _scalar(value.args[0])
    if value.target in (aten.full.default, aten.scalar_tensor.default, aten.new_full.default):
        number = {aten.scalar_tensor.default: 0, aten.full.default: 1, aten.new_full.default: 2}[value.target]
        found = value.args[number]
        return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None
    return None


# -- the operands -------------------------------------------------------------------------------------------------------


def _are_matched(call: Node, product: Node, query: Node, key: Node, value: Node) -> bool:
    """Whether both products pair the matrices of one item and head, as those of [B, H, ..] with [B, H or G, ..] do.

    Of a matrix in three dimensions the first is B * H, so it must be that in both factors: beside four dimensions it would
    be broadcast over the batch.
    """
    wanted = fake(query).shape[:2]
    for left, right, source in ((*_operands(product), key), (*_operands(call), value)):
        if fake(left).dim() != fake(right).dim():
            return False
        flat = fake(left).dim() == 3
        pairs = [*zip(fake(source).shape[: 1 + flat], wanted, strict=False)]
        if flat:
            pairs.append((fake(left).shape[0], fake(right).shape[0]))
        elif fake(left).dim() == 4:
            pairs += zip(fake(left).shape[:2], wanted, strict=True)
        if not all(known(a == b) for a, b in pairs):
            return False
    return True


def _query_and_key(product: Node) -> tuple[Any, Any]:
    """Query [B,H,Lq,D] and key [B,H,Lk,D] of a product [B,H,Lq,Lk]; None for what is not of that form."""
    left, right = _operands(product)
    if product.target is aten.einsum.default:
        return (left, right) if _is_equation(product, "bhqd,bhkd->bhqk") else (None, None)
    flat = _transposed(right)
    key = _four_dimensional(flat) if flat is not None else _transposed(_four_dimensional(right))
    return _four_dimensional(left), key


def _is_equation(einsum: Node, form: str) -> bool:
    """Whether an equation is of a form, whatever its letters."""
    equation = str(einsum.args[0]).replace(" ", "")
    if len(equation) != len(form):
        return False
    letters = dict(zip(form, equation, strict=True))
    same = "".join(letters[letter] for letter in form) == equation
    distinct = len({letters[letter] for letter in "bhqkd"}) == 5
    return same and distinct and all(letters[sign] == sign for sign in ",->")


def _transposed(node: Any) -> Any:
    """Key [.., L, D] behind the [.., D, L] that is multiplied from the right; None if it is not its transpose."""
    node = without_copies(node)
    if not isinstance(node, Node):
        return None
    rank, swapped = fake(node).dim(), False
    if node.target in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default):
        swapped = {dim % rank for dim in node.args[1:3]} == {rank - 2, rank - 1}  # type: ignore[operator]
    elif node.target is aten.permute.default:
        order = [dim % rank for dim in node.args[1]]  # type: ignore[union-attr, operator]
        swapped = order == [*range(rank - 2), rank - 1, rank - 2]
    elif node.target is aten.mT.default:
        swapped = True
    return node.args[0] if swapped else None


def _four_dimensional(node: Any) -> Any:
    """[B, H, L, D] behind a [B * H, L, D] that is a view of it; a tensor of four dimensions is itself."""
    while isinstance(node, Node) and fake(node).dim() == 3:
        inner = without_copies(node)
        if inner.target not in _VIEWS or not _keeps_last_two(inner):
            return None
        node = inner.args[0]
    return node if isinstance(node, Node) and fake(node).dim() == 4 else None


def _keeps_last_two(view: Node) -> bool:
    """Whether a view only splits or joins dimensions in front of the last two."""
    before, after = fake(view.args[0]), fake(view)
    if before.dim() < 3 or after.dim() < 3:
        return False
    return all(known(a == b) for a, b in zip(before.shape[-2:], after.shape[-2:], strict=True))


def _holds(dtype: torch.dtype, needed: torch.dtype) -> bool:
    """Whether a type holds what another one does, to the last bit and in range."""
    return dtype == needed or (dtype in _FLOATS and dtype.itemsize > needed.itemsize)


def _chain_problem(call: Node, weights: _Weights, scores: _Scores) -> str | None:
    """Every step must be read by the next one only, and none may mix, move or round away what it is handed."""
    chain = [*weights.chain, *scores.chain]
    if any(len(list(users(step))) != 1 for step in chain):
        return "scores or weights are used elsewhere too"
    needed = fake(_operands(scores.chain[-1])[0]).dtype
    rounding = next((step for step in chain if not _holds(fake(step).dtype, needed)), None)
    if rounding is not None:
        return f"scores or weights of {needed} queries are held in {fake(rounding).dtype}"
    for step, source in pairwise(chain):
        kept = _keeps_last_two(step) if functional(step.target) in _VIEWS else same_shape(fake(step), fake(source))
        if not kept or fake(step).device != fake(source).device:
            return "the scores change their shape or device on the way"
    forms = ((scores.chain[-1], "bhqd,bhkd->bhqk"), (call, "bhqk,bhkd->bhqd"))
    for product, form in forms:
        if product.target is aten.einsum.default and not _is_equation(product, form):
            return f"einsum({product.args[0]!r}) has another layout than {form}"
    if call.target is aten.baddbmm.default:
        return "something is added to the product with the values"
    return None
