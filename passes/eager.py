"""Attention written out: softmax(q @ k^T * scale + mask) @ v, read into the same normal form as an SDPA call.

    scores  = matmul(q, transpose(k))                         [B, H, Lq, Lk]; or bmm, baddbmm, einsum
    scores  = mul(scores, scale)                              any number of factors, or none
    scores  = add(scores, mask)                               or masked_fill(~mask, min), where(mask, scores, min),
                                                              where(~mask, min, scores)
    weights = softmax(scores, -1), cast to q's type
    weights = dropout(weights, p=0)
    output  = matmul(weights, v)                              [B, H, Lq, Dv]; or bmm, einsum

with a sink for each head (kernels/sink.py), between the masks and the product with the values
    scores  = cat([scores, s.reshape(1, H, 1, 1).expand(B, H, Lq, 1)], -1)
    scores  = scores - max(scores, -1, keepdim)               or not: a softmax does not change by it
    weights = softmax(scores, -1)[..., :-1]

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

from tsa_compile.passes.aten import AtenGraph, unknown, users
from tsa_compile.passes.call import OUT_OF_RANGE, MaskTerm, RecordedCall, keeps_range
from tsa_compile.passes.graph import fake, known, same_shape
from tsa_compile.passes.operators import arguments, aten, functional
from tsa_compile.passes.products import (
    CASTS,
    FLOATS,
    SAME,
    VIEWS,
    are_matched,
    factors_of,
    four_dimensional,
    holds,
    is_equation,
    keeps_last_two,
    query_and_key,
)
from tsa_compile.passes.sinks import drops_last_column, one_a_head, own_maximum
from tsa_compile.reasons import Reason

_TRANSPARENT = (*CASTS, *SAME, *VIEWS)
_SOFTMAXES = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = (aten.matmul.default, aten.linalg_matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_PROJECTIONS = (aten.linear.default, aten.addmm.default, aten.mm.default)  # a router's softmax is over these
_FACTORS = {
    aten.mul.Tensor: "mul", aten.mul.Scalar: "mul", aten.multiply.Tensor: "mul", aten.multiply.Scalar: "mul",
    aten.div.Tensor: "div", aten.div.Scalar: "div", aten.divide.Tensor: "div", aten.true_divide.Tensor: "div",
}  # fmt: skip
_COLUMNS = (aten.cat.default, aten.slice.Tensor)  # a sink's comes and goes
_FAR = 40  # values among which a softmax's product is looked for


class WrittenOut:
    """Reads written-out attention from its last product, and names softmaxes over products that no product reads so."""

    def __init__(self, graph: AtenGraph) -> None:
        self.softmaxes: dict[Node, _Weights] = {}
        for call in graph.calls.nodes:
            if call.target in _PRODUCTS and (weights := factors_of(call)[0]) is not None:
                walked = _Weights().walk(weights)
                if walked.softmax is not None:
                    self.softmaxes[call] = walked

    def read(self, call: Node) -> RecordedCall | None:
        """The attention that ends with this operator; None if none does."""
        if call in self.softmaxes:
            return _read_product(call, self.softmaxes[call])
        plain = call.target in _SOFTMAXES and not any(call is weights.softmax for weights in self.softmaxes.values())
        if not plain and call.target is not aten.special_softmax.default:
            return None
        product = _product_behind(call.args[0])
        if not _is_over_last(call) or product is None:
            return None
        return _unsupported(call, product, None, "its weights are read by something else than a product with the values")


def _read_product(call: Node, weights: _Weights) -> RecordedCall | None:
    assert weights.softmax is not None
    scores = _Scores(held=_computed_in(weights.softmax)).walk(weights.softmax.args[0])
    value = factors_of(call)[1]
    if scores.product is None:
        product = _product_behind(weights.softmax.args[0])
        if product is None:  # a mixture of something else
            return None
        return _unsupported(call, product, value, scores.problem or "the scores are no product of query and key")
    query, key = query_and_key(scores.product)
    value = four_dimensional(value)
    problem = scores.problem or _chain_problem(call, weights, scores) or scores.sink_problem(query, weights.dropped)
    if problem is None and (None in (query, key, value) or not are_matched(call, scores.product, query, key, value)):
        problem = "the products are not [B, H, Lq, D] with a transposed [B, H, Lk, D] and [B, H, Lk, Dv]"
    problem = problem or scores.problem_for(fake(query))
    if problem is not None:
        return _unsupported(call, scores.product, factors_of(call)[1], problem)
    masks = tuple(term for term, _ in scores.masks)
    return RecordedCall(
        call, "eager", query, key, value, masks, scale=scores.scale, dropout=weights.dropout, sink_logits=scores.sink_logits
    )


def _unsupported(call: Node, product: Node, value: Any, problem: str) -> RecordedCall:
    query, key = factors_of(product)
    return RecordedCall(call, "eager", query, key, value, problem=(Reason.UNSUPPORTED_FORM, problem))


# -- the weights --------------------------------------------------------------------------------------------------------


@dataclass
class _Weights:
    """What stands between the softmax and the product with the values, read backwards."""

    softmax: Node | None = None
    dropout: Any = 0.0
    chain: list[Node] = field(default_factory=list)
    dropped: bool = False
    """Whether the last column is left out."""

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
            elif not self.dropped and drops_last_column(node):
                self.dropped = True
            elif target not in _TRANSPARENT:
                return self
            node = node.args[0]
        return self


def _is_over_last(softmax: Node) -> bool:
    return arguments(softmax)[1] in (-1, fake(softmax).dim() - 1)


def _computed_in(softmax: Node) -> torch.dtype:
    """The type to which a softmax casts its scores first."""
    given = softmax.kwargs.get("dtype", softmax.args[2] if len(softmax.args) > 2 else None)
    return given if isinstance(given, torch.dtype) else fake(softmax.args[0]).dtype


# -- the scores ---------------------------------------------------------------------------------------------------------


@dataclass
class _Scores:
    """What stands between `q @ k^T` and the softmax, read backwards."""

    product: Node | None = None
    masks: list[tuple[MaskTerm, Node]] = field(default_factory=list)
    """Each mask, and the step that applies it."""
    factors: list[float] = field(default_factory=list)
    """What the scale is the product of, the last step first."""
    sink: Node | None = None
    """What is joined to the scores as a further column."""
    sink_logits: Node | None = None
    """The numbers in it, one a head: [H]."""
    shifted: dict[Node, Node] = field(default_factory=dict)
    """Scores from which their own maximum is taken away, and what computes it."""
    symbol: Any = None
    """A number that the graph computes, in place of factors."""
    chain: list[Node] = field(default_factory=list)
    held: torch.dtype = torch.float64
    """The narrowest type in which the scores are held from the last step that was read to the softmax."""
    problem: str | None = None

    @property
    def scale(self) -> Any:
        return math.prod(self.factors, start=1.0) if self.symbol is None else self.symbol

    def walk(self, node: Any) -> _Scores:
        while isinstance(node, Node) and self.product is None:
            self.chain.append(node)
            self._narrow(fake(node).dtype)
            node = self._step(node)
        return self

    def _narrow(self, dtype: torch.dtype) -> None:
        """What is masked in one type and held in a narrower one behind it is rounded to that."""
        if holds(self.held, dtype):
            self.held = dtype
        elif not holds(dtype, self.held):
            self.problem = f"the scores are held in {dtype} and then in {self.held}"

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
        if target is aten.sub.Tensor and (maximum := own_maximum(node)) is not None:
            return self._shift(node, maximum)
        if target is aten.cat.default and self.sink is None:
            return self._join_sink(node)
        if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            scores, mask, fill = arguments(node)
            return self._fill(node, scores, mask, fill, "drop")
        if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            mask, chosen, other = arguments(node)
            if _is_scores(other) and not _is_scores(chosen):
                return self._fill(node, other, mask, chosen, "drop")
            return self._fill(node, chosen, mask, other, "keep")
        self.problem = f"the scores go through {'something that is not read' if target is unknown else target}"
        return None

    def _shift(self, node: Node, maximum: Node) -> Any:
        if self.sink is not None:
            self.problem = "the scores are shifted before the sink is joined to them"
        scores: Any = node.args[0]
        self.shifted[scores] = maximum
        return scores

    def _join_sink(self, node: Node) -> Any:
        columns, dim = arguments(node)
        if len(columns) != 2 or dim not in (-1, fake(node).dim() - 1) or not known(fake(columns[1]).shape[-1] == 1):
            self.problem = "the scores are joined with something that is no sink"
            return None
        if self.masks or not self._is_unscaled():
            self.problem = "the sink is masked or scaled together with the scores"
        self.sink = columns[1]
        return columns[0]

    def sink_problem(self, query: Any, dropped: bool) -> str | None:
        """What is in the way with the sink, where the weights' last column is left out, or not."""
        if (self.sink is not None) is not dropped:
            return "the weights' last column is left out" if dropped else "the weights of a further column are read"
        if self.sink is None:
            return None
        self.sink_logits = one_a_head(self.sink, fake(query).shape[1])
        return "the sink is not a number for each head" if self.sink_logits is None else None

    def _take_product(self, node: Node) -> None:
        self.product = node
        if functional(node.target) is aten.baddbmm.default:
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
            self.masks.append((MaskTerm(mask, "bias", dtype=self.held), node))
        else:
            self.problem = "something that is no mask is added to the scores"

    def _fill(self, node: Node, scores: Any, mask: Any, fill: Any, role: Any) -> Any:
        value = _scalar(fill)
        if not isinstance(value, float) or not isinstance(mask, Node) or not self._is_unscaled():
            self.problem = "scores are replaced by something that is no constant, or scaled afterwards"
        elif not isinstance(fake(mask), torch.Tensor) or fake(mask).dtype != torch.bool:
            self.problem = "the mask is not of truth values"
        else:
            self.masks.append((MaskTerm(mask, role, value, self.held), node))
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
    """The product that scores are made of, by steps that are understood or not; the nearest of several."""
    queue = [node]
    for value in queue:
        if not isinstance(value, Node) or value.target in _PROJECTIONS or len(queue) > _FAR:
            continue
        if functional(value.target) in _PRODUCTS:
            if all(map(_is_scores, factors_of(value))):
                return value
        elif value.target in (aten.sum.dim_IntList, aten.cat.default):  # products by hand, columns for sinks
            queue += [each for each in value.all_input_nodes if not known(fake(each).shape[-1] == 1)]
        else:
            operands = value.all_input_nodes[1:] if "where" in str(value.target) else value.all_input_nodes
            queue += [each for each in operands if _is_scores(each) and each not in queue]
    return None


def _scalar(value: Any) -> Any:
    """A Python number, a symbolic one, or a tensor that is filled with a constant, as a float (or the symbol)."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, Node) or fake(value).numel() != 1 or fake(value).dtype not in FLOATS:
        return None
    number = _constant(value)
    return None if number is None else float(torch.tensor(number, dtype=torch.float64).to(fake(value).dtype))


def _constant(value: Node) -> float | None:
    """The number in a tensor of one element, where the graph says which."""
    if "constant" in value.meta:
        return float(value.meta["constant"].item())
    if value.target in (*CASTS, *SAME, aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.expand.default):
        return _scalar(value.args[0])
    places: dict[Any, int] = {aten.scalar_tensor.default: 0, aten.full.default: 1, aten.new_full.default: 2}
    found = value.args[places[value.target]] if value.target in places else None
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def _chain_problem(call: Node, weights: _Weights, scores: _Scores) -> str | None:
    """Every step must be read by the next one only, and none may mix, move or round away what it is handed."""
    chain = [*weights.chain, *scores.chain]
    for step in chain:  # what computes a step's maximum for the next one may read it as well
        if len([reader for reader in users(step) if reader is not scores.shifted.get(step)]) != 1:
            return "scores or weights are used elsewhere too"
    needed = fake(factors_of(scores.chain[-1])[0]).dtype
    rounding = next((step for step in chain if not holds(fake(step).dtype, needed)), None)
    if rounding is not None:
        return f"scores or weights of {needed} queries are held in {fake(rounding).dtype}"
    for step, source in pairwise(chain):
        if step.target in _COLUMNS:  # that they are a sink's is asked by `sink_problem`
            kept = all(known(a == b) for a, b in zip(fake(step).shape[:-1], fake(source).shape[:-1], strict=True))
        else:
            kept = keeps_last_two(step) if functional(step.target) in VIEWS else same_shape(fake(step), fake(source))
        if not kept or fake(step).device != fake(source).device:
            return "the scores change their shape or device on the way"
    forms = ((scores.chain[-1], "bhqd,bhkd->bhqk"), (call, "bhqk,bhkd->bhqd"))
    for product, form in forms:
        if product.target is aten.einsum.default and not is_equation(product, form):
            return f"einsum({product.args[0]!r}) has another layout than {form}"
    if call.target is aten.baddbmm.default:
        return "something is added to the product with the values"
    return None
