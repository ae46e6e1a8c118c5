"""Oracles and graph assertions, for this project's tests and for anyone who writes a pass.

graph = capture(model, ids, attention_mask=mask)      what torch.compile hands to a backend
call, = find_calls(graph)
values = run_nodes(graph, inputs, call)               every node's real value, and what stands in front of the call
allowed = evaluate_mask(infer_mask(call), values)     the inferred predicate, dense: compare it with the real mask
print(graph_text(graph))                              one line a node, for golden tests
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from tsa_compile.passes.call import AttentionCall
from tsa_compile.passes.frame import remember_frame
from tsa_compile.passes.graph import fake
from tsa_compile.passes.masks.info import MaskInfo
from tsa_compile.passes.masks.predicate import KV, B, H, Q


class Captured:
    """The graphs that Dynamo makes of a call, with the inputs of each."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []
        self.inputs: list[tuple[Any, ...]] = []

    def backend(self, graph_module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        remember_frame(graph_module)
        self.graphs.append(graph_module)

        def run(*inputs: Any) -> Any:
            self.inputs.append(inputs)
            return graph_module.forward(*inputs)

        return run


def capture_all(function: Any, *args: Any, dynamic: bool | None = None, grad: bool = False, **kwargs: Any) -> Captured:
    """Every graph that torch.compile makes of a call, and the inputs that each was run with."""
    captured = Captured()
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(function, backend=captured.backend, dynamic=dynamic)(*args, **kwargs)
    return captured


def capture(function: Any, *args: Any, **options: Any) -> GraphModule:
    """The only graph that torch.compile makes of a call.

    Raises:
        AssertionError: it makes none or several.
    """
    graphs = capture_all(function, *args, **options).graphs
    assert len(graphs) == 1, f"the call consists of {len(graphs)} graphs, not one"
    return graphs[0]


def run_nodes(graph_module: GraphModule, inputs: tuple[Any, ...], call: AttentionCall | None = None) -> dict[str, Any]:
    """Runs a graph node by node; the value of each, when it had run, by the node's name.

    With a call, its operands are as they stand in front of it, and so is what recorded operators gave (its mask, what a
    predicate reads), by their names, wherever the graph still holds it there.
    """
    values: dict[str, Any] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            if call is not None and n is call.node:
                for recorded in call.aten.calls.nodes:
                    source = call.aten.source(recorded, n) if recorded.op == "call_function" else None
                    if source is not None:
                        values[recorded.name] = _copied(self.env[source])
                for operand in filter(self.env.__contains__, (call.query, call.key, call.value, call.sink_logits)):
                    values[operand.name] = _copied(self.env.get(operand))
            result = super().run_node(n)
            values.setdefault(n.name, _copied(result))
            return result

    with torch.no_grad():
        Recorder(graph_module, garbage_collect_values=False).run(*inputs)
    return values


def _copied(value: Any) -> Any:
    """A value that later writes to it do not change."""
    return value.clone() if isinstance(value, Tensor) else value


def evaluate_mask(
    info: MaskInfo,
    sizes: tuple[int, int, int, int],
    values: Mapping[str, Any],
    symbols: Mapping[str, int] | None = None,
) -> Tensor:
    """An inferred predicate as a bool tensor of `sizes` [B, H, Lq, Lk].

    Args:
        values: the real value of each node that stands in the predicate, by name (`run_nodes`).
        symbols: the value of each shape symbol, by name.
    """
    assert info.predicate is not None, "an opaque mask has no predicate"
    grids = torch.meshgrid(*(torch.arange(extent) for extent in sizes), indexing="ij")
    environment: dict[Any, Any] = dict(zip((B, H, Q, KV), grids, strict=True))
    environment.update({symbol: torch.tensor(value) for symbol, value in (symbols or {}).items()})
    return _truth(info.predicate, info, environment, values).expand(sizes)


def _truth(formula: Any, info: MaskInfo, environment: dict[Any, Any], values: Mapping[str, Any]) -> Tensor:
    if formula in (sympy.true, sympy.false):
        return torch.tensor(bool(formula))
    if isinstance(formula, sympy.Not):
        return ~_truth(formula.args[0], info, environment, values)
    if isinstance(formula, (sympy.And, sympy.Or)):
        parts = torch.broadcast_tensors(*(_truth(part, info, environment, values) for part in formula.args))
        return torch.stack(parts).all(0) if isinstance(formula, sympy.And) else torch.stack(parts).any(0)
    atom = info.atoms[formula]
    if atom.kind == "opaque":
        relation = {sympy.Le: torch.le, sympy.Lt: torch.lt, sympy.Eq: torch.eq}.get(atom.expr.func)
        if relation is None:
            return _number(atom.expr, environment, values).bool()
        return relation(*(_number(side, environment, values) for side in atom.expr.args))
    number = _number(atom.expr, environment, values)
    return number <= 0 if atom.kind == "le" else number == 0


def _number(expr: Any, environment: dict[Any, Any], values: Mapping[str, Any]) -> Tensor:
    if expr.is_number:
        return torch.tensor(int(expr) if expr.is_Integer else float(expr))
    if expr.is_Symbol:
        return environment[expr] if expr in environment else environment[expr.name]
    if isinstance(expr, AppliedUndef):
        index = torch.broadcast_tensors(*(_number(argument, environment, values) for argument in expr.args))
        element = values[expr.func.__name__][tuple(index)]
        return element.long() if expr.is_integer else element  # unsigned integers wrap around
    operands = [_number(argument, environment, values) for argument in expr.args]
    if isinstance(expr, sympy.floor):
        return torch.floor(operands[0])
    operations: dict[Any, Callable[..., Tensor]] = {sympy.Add: torch.add, sympy.Mul: torch.mul}
    return functools.reduce(operations[expr.func], operands)


_ALIASES = {
    "bitwise_and": "and",
    "logical_and": "and",
    "bitwise_or": "or",
    "logical_or": "or",
    "bitwise_not": "not",
    "logical_not": "not",
    "invert": "not",
    "bitwise_xor": "xor",
    "logical_xor": "xor",
    "less_equal": "le",
    "less": "lt",
    "greater_equal": "ge",
    "greater": "gt",
    "not_equal": "ne",
    "subtract": "sub",
    "multiply": "mul",
    "true_divide": "div",
    "truediv": "div",
    "divide": "div",
    "floordiv": "floor_divide",
    "negative": "neg",
    "_unsafe_view": "view",
    "_softmax": "softmax",
    "swapaxes": "transpose",
    "swapdims": "transpose",
}


def op_name(node: Node) -> str:
    """One name for every way of writing an operator: "le" for `operator.le`, `torch.le`, `x.le(y)` and `aten.le.Tensor`."""
    target = node.target
    if node.op == "call_method":
        name = str(target)
    elif isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
        name = packet.__name__
        namespace = packet._qualified_op_name.split("::")[0]
        if namespace not in ("aten", "prims", "tsa"):  # another library's `softmax` may be anything
            return f"{namespace}::{name}"
    else:
        name = getattr(target, "__name__", str(target))
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    elif target in (operator.and_, operator.or_, operator.not_):
        name = name.rstrip("_")
    return _ALIASES.get(name, name)


def count_ops(graph_module: GraphModule, *names: str) -> dict[str, int]:
    """How often operators occur in a graph, by their one name (`op_name`): {"sdpa...": 2, "score": 0}."""
    found = [op_name(node) for node in graph_module.graph.nodes if node.op in ("call_function", "call_method")]
    return {name: found.count(name) for name in names}


def widest_elements(graph_module: GraphModule) -> int:
    """The number of elements of the largest tensor that a call of the graph makes (static shapes)."""
    made = [fake(node) for node in graph_module.graph.nodes if node.op in ("call_function", "call_method")]
    return max((int(value.numel()) for value in made if isinstance(value, Tensor)), default=0)


def graph_text(graph_module: GraphModule) -> str:
    """One line a node: `name: dtype[shape] = operator(arguments)`; placeholders and outputs included."""
    return "\n".join(_line(node) for node in graph_module.graph.nodes)


def _line(node: Node) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    value = fake(node)
    kind = (
        f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, Tensor)
        else type(value).__name__
    )
    if node.op == "placeholder":
        return f"{node.name}: {kind}"
    arguments = [_argument(argument) for argument in node.args]
    arguments += [f"{name}={_argument(argument)}" for name, argument in node.kwargs.items()]
    return f"{node.name}: {kind} = {op_name(node)}({', '.join(arguments)})"


def _argument(argument: Any) -> str:
    if isinstance(argument, Node):
        return argument.name
    if isinstance(argument, (tuple, list)):
        return "(" + ", ".join(map(_argument, argument)) + ")"
    if isinstance(argument, slice):
        return ":".join("" if part is None else _argument(part) for part in (argument.start, argument.stop))
    if isinstance(argument, float):
        return f"{argument:.6g}"
    return str(argument)
