"""Attention written out: softmax(q @ k^T * scale + mask) @ v, read into the same normal form as an SDPA call.

    scores  = torch.matmul(q, k.transpose(-2, -1))            [B, H, Lq, Lk]
    scores  = scores * scale                                  any number of factors, or none
    scores  = scores + mask                                   or masked_fill(~mask, min), or where(mask, scores, min)
    weights = softmax(scores, dim=-1, dtype=float32).to(q.dtype)
    weights = dropout(weights, p=0)
    output  = torch.matmul(weights, v)                        [B, H, Lq, Dv]

Every tensor between the two products must be read by the next step alone: a model that also returns the weights, caps
the scores (tanh) or adds a sink column is not this function. It becomes a site with reason UNSUPPORTED_FORM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from tsa_compile.passes.graph import argument, fake, is_mutated, is_mutation, known, mutated_storages, op_name, readers
from tsa_compile.passes.layers import layer_name
from tsa_compile.passes.sites import AttentionSite, MaskTerm, normal_form
from tsa_compile.report import Reason

_CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "_to_copy", "contiguous", "clone")
_RESHAPES = ("view", "reshape", "getitem", "slice", "narrow")  # `_chain_problem` refuses those that change the shape
_PRODUCTS = ("matmul",)


def read_eager(node: Node) -> AttentionSite | None:
    """Reads written-out attention from its last product, `weights @ value`."""
    if not _is_product(node):
        return _other_product(node)
    weights: Any = node.args[0]
    value: Any = node.args[1]
    softmax, dropout = _down_to_softmax(weights)
    if softmax is None:
        return None
    scores = _Scores().walk(argument(softmax, 0, "input"))
    if scores.product is None:
        return None
    query, key = scores.product.args[0], _transposed(scores.product.args[1])
    problem = scores.problem or _chain_problem(node, softmax, scores)
    if key is None or problem is not None or not isinstance(value, Node) or not isinstance(query, Node):
        return _unsupported(node, scores.product, value, problem or "key is not transposed in a way that is understood")
    site = normal_form(
        node, "eager", (query, key, value), tuple(scores.masks), grouped=False, scale=scores.scale, dropout=dropout
    )
    mutated = mutated_storages(node.graph)
    if any(is_mutated(operand, mutated) for operand in (query, key, value)):  # read early here, late by one call
        return _unsupported(node, scores.product, value, "query, key or value is written to in place")
    return site


def _other_product(node: Node) -> AttentionSite | None:
    """A product of softmax weights in another form than [B, H, Lq, Lk] @ [B, H, Lk, Dv], so that it is not passed over."""
    if node.op not in ("call_function", "call_method") or op_name(node) not in ("bmm", "baddbmm", "einsum"):
        return None
    operands = [operand for operand in node.all_input_nodes if isinstance(fake(operand), torch.Tensor)]
    if len(operands) < 2 or _down_to_softmax(operands[0])[0] is None:
        return None
    return _unsupported(node, node, operands[-1], f"the weights are multiplied by {op_name(node)}")


def _is_product(node: Any) -> bool:
    return (
        isinstance(node, Node)
        and node.op in ("call_function", "call_method")
        and op_name(node) in _PRODUCTS
        and len(node.args) == 2
        and all(isinstance(operand, Node) and isinstance(fake(operand), torch.Tensor) for operand in node.args)
    )


def _down_to_softmax(weights: Any) -> tuple[Node | None, Any]:
    """The softmax behind the weights, through casts, dropout and reshapes; and the dropout's probability."""
    dropout: Any = 0.0
    while isinstance(weights, Node) and weights.op in ("call_function", "call_method"):
        name = op_name(weights)
        if name == "softmax":
            dim = argument(weights, 1, "dim")
            rank = fake(weights).dim()
            return (weights if dim in (-1, rank - 1) else None), dropout
        if name == "dropout":
            if argument(weights, 2, "training", True) is not False:
                dropout = argument(weights, 1, "p", 0.5)
        elif name not in (*_CASTS, *_RESHAPES):
            break
        weights = argument(weights, 0, "input")
    return None, dropout


@dataclass
class _Scores:
    """What stands between `q @ k^T` and the softmax, read backwards."""

    product: Node | None = None
    masks: list[MaskTerm] = field(default_factory=list)
    scale: Any = 1.0
    chain: list[Node] = field(default_factory=list)
    problem: str | None = None

    def walk(self, node: Any) -> _Scores:
        while isinstance(node, Node) and node.op in ("call_function", "call_method"):
            self.chain.append(node)
            if _is_product(node):
                self.product = node if fake(node).dim() == 4 else None
                return self
            node = self._step(node)
        return self

    def _step(self, node: Node) -> Any:
        name = op_name(node)
        if name in _CASTS:
            return argument(node, 0, "input")
        if is_mutation(node):
            self.problem = f"{name} writes in place"
            return argument(node, 0, "input")
        if name in ("mul", "div") and _is_binary(node):
            return self._factor(node, name)
        if name == "add" and _is_binary(node):
            return self._bias(node)
        if name == "masked_fill":
            return self._fill(
                node, argument(node, 0, "input"), argument(node, 1, "mask"), argument(node, 2, "value"), "drop"
            )
        if name == "where" and len(node.args) == 3:
            condition, kept, fill = node.args
            return self._fill(node, kept, condition, fill, "keep")
        self.problem = f"the scores go through {name}"
        return next(iter(node.all_input_nodes), None)

    def _factor(self, node: Node, name: str) -> Any:
        left, right = node.args[:2]
        if name == "mul" and _is_scores(right) and not _is_scores(left):
            left, right = right, left
        factor = _scalar(right)
        if factor is None:
            self.problem = f"the scores are {'multiplied' if name == 'mul' else 'divided'} by a tensor"
        elif isinstance(factor, Node):
            if name == "div" or self.scale != 1.0:
                self.problem = "the scale is computed by the graph in several steps"
            self.scale = factor
        elif isinstance(self.scale, Node):
            self.problem = "the scale is computed by the graph in several steps"
        else:
            self.scale = self.scale * factor if name == "mul" else self.scale / factor
        return left

    def _bias(self, node: Node) -> Any:
        left, right = node.args[:2]
        scores, mask = (left, right) if _leads_to_product(left) else (right, left)
        if self.scale != 1.0:
            self.problem = "the mask is scaled together with the scores"
        if isinstance(mask, Node) and isinstance(fake(mask), torch.Tensor) and fake(mask).dim() <= 4:
            self.masks.append(MaskTerm(mask, "bias", dtype=fake(node).dtype))
        else:
            self.problem = "something that is no mask is added to the scores"
        return scores

    def _fill(self, node: Node, scores: Any, mask: Any, fill: Any, role: Any) -> Any:
        value = _scalar(fill)
        if not isinstance(value, float) or not isinstance(mask, Node) or self.scale != 1.0:
            self.problem = "scores are replaced by something that is no constant"
        else:
            self.masks.append(MaskTerm(mask, role, value, fake(node).dtype))
        return scores if isinstance(scores, Node) else fill


def _is_scores(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(fake(node), torch.Tensor) and fake(node).dim() == 4


def _is_binary(node: Node) -> bool:
    """`add(x, y, alpha=2)` and `div(x, y, rounding_mode="floor")` are other operators."""
    return len(node.args) == 2 and not node.kwargs


def _leads_to_product(node: Any) -> bool:
    """Whether a node is made of scores, by steps that are understood or not."""
    while isinstance(node, Node) and node.op in ("call_function", "call_method"):
        if _is_product(node):
            return True
        operands = node.args[1:] if op_name(node) == "where" else node.all_input_nodes
        node = next(filter(_is_scores, operands), None)
    return False


def _scalar(value: Any) -> Any:
    """A Python number, a scalar node, or a tensor that is filled with a constant, as a float (or the node)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, Node):
        return None
    if isinstance(fake(value), (torch.SymFloat, float, int)):
        return value
    if not isinstance(fake(value), torch.Tensor) or not fake(value).is_floating_point():  # an integer would be rounded
        return None
    if op_name(value) in ("to", "type", "_to_copy", "lift_fresh_copy", "detach"):
        return _scalar(value.args[0])
    if op_name(value) in ("full", "new_full") and fake(value).numel() == 1:
        return _scalar(argument(value, 2 if op_name(value) == "new_full" else 1, "fill_value"))
    if op_name(value) in ("tensor", "scalar_tensor") and value.op == "call_function":
        return _scalar(value.args[0])
    return None


def _transposed(node: Any) -> Any:
    """Key [B,G,L,D] behind the [B,G,D,L] that is multiplied from the right; None if it is not its transpose."""
    while isinstance(node, Node) and op_name(node) in ("contiguous", "clone"):
        node = node.args[0]
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    name, rank, swapped = op_name(node), 4, False
    if name == "transpose":
        dims = {argument(node, 1, "dim0"), argument(node, 2, "dim1")}
        swapped = {dim % rank for dim in dims if isinstance(dim, int)} == {2, 3}
    elif name == "permute":
        order: Any = argument(node, 1, "dims")
        order = order if isinstance(order, (list, tuple)) else node.args[1:]
        swapped = [dim % rank for dim in order] == [0, 1, 3, 2]
    elif name in ("getattr", "mT"):  # Dynamo's spelling and torch.export's
        swapped = name == "mT" or node.args[1] == "mT"
    return argument(node, 0, "input") if swapped else None


def _chain_problem(output: Node, softmax: Node, scores: _Scores) -> str | None:
    """Every step must be read by the next one only, and none may change the shape of the scores."""
    between = [*scores.chain, softmax]
    node = output.args[0]
    while isinstance(node, Node) and node is not softmax:
        between.append(node)
        node = argument(node, 0, "input")
    if any(len(readers(step)) != 1 for step in between):
        return "scores or weights are used elsewhere too"
    assert scores.product is not None
    shape = fake(scores.product).shape
    for step in between:
        if fake(step).dim() != 4 or not all(known(a == b) for a, b in zip(fake(step).shape, shape, strict=True)):
            return "the scores change their shape on the way"
        if not fake(step).is_floating_point():
            return "the scores are rounded on the way"
    return None


def _unsupported(node: Node, product: Node, value: Any, problem: str) -> AttentionSite:
    layer, container, layer_index = layer_name(node)
    query: Any = product.args[0]
    key: Any = product.args[1]
    return AttentionSite(
        node, "eager", query, key, value, layer=layer, layer_index=layer_index,
        container=container, problem=(Reason.UNSUPPORTED_FORM, problem),
    )  # fmt: skip
