"""Tensor parallel: which processes have a layer's other heads, and what shows that some are elsewhere.

    o = attention(q, k, v)                           [B, H / processes, L, D]
    y = _c10d_functional.all_reduce(o @ w, "sum", group)     each process adds its heads' part

What is computed from a call's output alone, with weights and factors, and then summed over a group, is a part of that sum:
the group has the heads. Nothing that other activations were added to is followed. Where each process has all heads, and only
what is made of them is split, the scores are the same in all, and their mean is no other.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import Module

from tsa_compile.passes.frame import Frame, is_split
from tsa_compile.passes.graph import fake

_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", torch.ops.aten.mul.Tensor)
_SUMS = ("all_reduce", "all_reduce_", "reduce_scatter_tensor")


def group_of_heads(call: Node) -> str | None:
    """The name of the process group over which a call's output is summed; None if the graph names none, or several."""
    names, followed = set(), {call}
    for node in call.graph.nodes:  # in order, so that what a node reads was looked at before
        read = node.all_input_nodes
        if followed.isdisjoint(read):
            continue
        if _is_reduction(node):
            names.add(_group_name(node))
        elif node.target in _PRODUCTS or all(source in followed or _is_given(source) for source in read):
            followed.add(node)
    return names.pop() if len(names) == 1 else None


def _is_given(node: Node) -> bool:
    """Whether a value is an input of the graph, or a view, cast or local part of one: as weights are."""
    while node.op not in ("placeholder", "get_attr"):
        if len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return True


def _group_name(node: Node) -> str | None:
    """The group of a sum, if it is one and says so by name."""
    target = getattr(node.target, "default", node.target)
    if not isinstance(target, torch._ops.OpOverload) or target._schema.name.partition("::")[2] not in _SUMS:
        return None
    names = (argument.name for argument in target._schema.arguments)
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    name = given.get("group_name")
    return name if given.get("reduce_op") == "sum" and isinstance(name, str) else None


def group_of_module(module: Module) -> str | None:
    """The process group over which a module's own parameters are split; None if they are not, or over several."""
    split: Iterator[Any] = filter(is_split, module.parameters())
    names = {
        parameter.device_mesh.get_group(dim).group_name
        for parameter in split
        for dim, placement in enumerate(parameter.placements)
        if placement.is_shard()
    }
    return names.pop() if len(names) == 1 else None


def splits_heads(graph_module: GraphModule, frame: Frame | None) -> str | None:
    """What shows that a graph sees some of a layer's heads only, as in tensor parallel; None if nothing does."""
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and is_split(fake(node)):
            return f"its input `{node.name}` is split over devices"
        if node.op == "call_function" and _is_reduction(node):
            return f"it calls `{node.target}`"
    return "parameters of the model are split over devices" if frame is not None and frame.sharded else None


def _is_reduction(node: Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
    else:
        name = str(getattr(target, "_qualified_op_name", None) or getattr(target, "__module__", ""))
        name += f".{getattr(target, '__name__', '')}"
    return ("c10d" in name or "torch.distributed" in name) and ("all_reduce" in name or "reduce_scatter" in name)
