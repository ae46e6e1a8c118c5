"""What the schemas of operators say: arguments with their defaults, what is written, what is drawn.

    aten.add_.Tensor(Tensor(a!) self, Tensor other, *, Scalar alpha=1) -> Tensor(a!)       writes to `self`

A schema is believed but for one thing: batch and instance norms update their running statistics without saying so.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

ITEM = operator.getitem  # the target of recorded nodes that take one output of an operator with several

CHANGES_NOTHING = frozenset([aten.detach_.default, aten.requires_grad_.default, aten.retain_grad.default])
"""In place for autograd alone: the data stays."""
_RUNNING_STATISTICS = ("running_mean", "running_var")
_OWN = ("aten", "prims", "prim", "tsa")
_DROPOUTS = frozenset([aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default])

# Operators that give the same value whenever they are called alike, besides pointwise ones and views.
_SOURCES = ("arange", "ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "scalar_tensor")
_LIKE = ("ones_like", "zeros_like", "full_like")
_COPIES = ("to", "_to_copy", "clone", "contiguous", "type_as", "expand_as", "reshape", "lift_fresh_copy")
_LOGIC = ("__and__", "__or__", "__xor__")  # of Python's, the others of which are pointwise
_REPEATABLE = frozenset((*_SOURCES, *_LIKE, *_COPIES, *_LOGIC, "index", "tril", "triu", "cumsum", "diff"))
# Python's operators of which each calls one operator of ATen, if its first operand is a tensor.
_ARITHMETIC = frozenset([
    operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, operator.neg, operator.invert,
    operator.and_, operator.or_, operator.xor, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
])  # fmt: skip
_ATTENTION_WORDS = ("attention", "attn", "transformer_encoder_layer")


def arguments(node: Node) -> tuple[Any, ...]:
    """The arguments of a recorded operator in its schema's order, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    values = list(node.args)
    for argument in schema.arguments[len(values) :]:
        values.append(node.kwargs.get(argument.name, argument.default_value))
    return tuple(values)


def written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call writes to."""
    if not isinstance(func, OpOverload):  # no schema: anything
        yield from (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return
    for position, argument in enumerate(func._schema.arguments):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes or argument.name in _RUNNING_STATISTICS:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def is_pure(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call that writes to none of its inputs does nothing but return a value."""
    if func in _DROPOUTS:
        return args[2] is False or args[1] == 0
    if func is aten.scaled_dot_product_attention.default:
        return (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) == 0
    return func.namespace in _OWN and bool(func._schema.returns) and torch.Tag.nondeterministic_seeded not in func.tags


@lru_cache(maxsize=4096)
def is_repeatable(func: OpOverload) -> bool:
    """Whether two calls on the same values give the same value."""
    if func.namespace not in ("aten", "prims") or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    view = any(returned.alias_info is not None for returned in func._schema.returns)
    return torch.Tag.pointwise in func.tags or view or func._opname in _REPEATABLE


def is_all_of(node: Node, func: OpOverload, first: Any) -> bool:
    """Whether a node of a graph does nothing but call an operator, once: the operator itself, or what torch has in C under
    its name. A function in Python may be called as it likes and do more.

    Args:
        first: the node's first argument.
    """
    if isinstance(node.target, OpOverload):
        return node.target is func
    if node.op == "call_method":
        return func._opname == node.target and isinstance(getattr(Tensor, node.target, None), MethodDescriptorType)
    if node.target in _ARITHMETIC:
        return isinstance(first, Tensor)
    name = func._opname
    return type(node.target) is BuiltinFunctionType and node.target in (
        getattr(torch, name, 0),
        getattr(torch._C._nn, name, 0),
    )


@lru_cache(maxsize=4096)
def makes_one_tensor(func: OpOverload) -> bool:
    """Whether an operator writes to nothing and returns a tensor, whose shape does not hang on numbers in memory."""
    tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    tensors = [str(returned.type) for returned in func._schema.returns] == ["Tensor"]
    return tensors and not func._schema.is_mutable and not tags & {*func.tags}


@lru_cache(maxsize=4096)
def may_change_a_shape(func: Any) -> bool:
    """Whether an operator may give a tensor that it writes to another shape, or other memory."""
    if not isinstance(func, OpOverload) or torch.Tag.inplace_view in func.tags:
        return True
    outputs = any(argument.kwarg_only and argument.is_write for argument in func._schema.arguments)
    return outputs or "resize" in func._opname or func._opname in ("set_", "set_data")


def is_attention(target: Any) -> bool:
    """Whether an operator is attention by its name: enough for a row in the report, never for a rewrite."""
    name = target.name() if isinstance(target, OpOverload) else getattr(target, "__name__", "")
    return not str(name).startswith("tsa::") and any(word in str(name) for word in _ATTENTION_WORDS)


def full_like_number(value: float, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    """`torch.tensor(value)` as an operator with its number among the arguments."""
    return torch.full((), value, dtype=dtype, device=device)


@lru_cache(maxsize=4096)
def functional(func: Any) -> Any:
    """The operator that computes what an in-place one leaves in its first argument; any other operator is itself.

    ATen names the in-place variant of `add.Tensor` `add_.Tensor`.
    """
    if not isinstance(func, OpOverload) or func.namespace != "aten" or not func._opname.endswith("_"):
        return func
    packet = getattr(aten, func._opname.removesuffix("_"), None)
    return getattr(packet, func._overloadname, func) if packet is not None else func


_LAYOUT_COPIES = (aten.contiguous.default, aten.clone.default)


def without_copies(node: Any) -> Any:
    """The value behind copies that change nothing but the layout."""
    while isinstance(node, Node) and node.target in _LAYOUT_COPIES:
        node = node.args[0]
    return node
