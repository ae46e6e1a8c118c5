"""Small facts about FX nodes that every pass needs: fake values, sizes, readers, insertion.

What a node of a model's graph computes is not asked here: a name proves nothing. Recorded operators say it (aten.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint, statically_known_true
from torch.fx.node import map_arg
from torch.utils._sympy.functions import Max, Min
from torch.utils._sympy.value_ranges import bound_sympy

from tsa_compile.passes.operators import arguments


def fake(node: Any) -> Any:
    """The fake value that tracing recorded for a node (Dynamo: "example_value", export: "val"); constants pass through."""
    if not isinstance(node, Node):
        return node
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None: an argument that is left out is not written into a graph."""
    return {name: value for name, value in options.items() if value is not None}


def expr_of(extent: int | torch.SymInt) -> sympy.Expr:
    """A number as an expression in the graph's shape symbols, without maxima and minima that their ranges decide.

    max(0, s - 15) is s - 15 where s is at least 15, as of a sliding window's cache that is full
    """
    if not isinstance(extent, torch.SymInt):
        return sympy.Integer(extent)
    expr = extent.node.expr
    decided = {extreme: _decided(extreme, extent.node.shape_env.var_to_range) for extreme in expr.atoms(Max, Min)}
    return expr.xreplace(decided) if decided else expr


def _decided(extreme: sympy.Expr, ranges: Any) -> sympy.Expr:
    """That argument of a maximum or minimum which is never below, or above, the others; itself if none is known to be."""
    sign = 1 if isinstance(extreme, Max) else -1
    for one in extreme.args:
        apart = [sign * (one - other) for other in extreme.args if other is not one]
        if all(bound_sympy(sympy.expand(difference), ranges).lower >= 0 for difference in apart):
            return one
    return extreme


def known(condition: Any) -> bool:
    """Whether a (symbolic) condition holds for every size that the graph admits; never adds a guard."""
    if isinstance(condition, torch.SymBool):
        return bool(statically_known_true(condition))
    return bool(condition)


def static(size: Any) -> int | None:
    """A size as a number, also one that was symbolic until a guard fixed it; None where it is symbolic.

    Dynamo takes a size for symbolic that another model had differently at the same line of code.
    """
    return size if isinstance(size, int) else size.node.maybe_as_int()


def guarded(condition: Any) -> bool:
    """Whether a (symbolic) condition holds for the sizes at hand. A guard lets sizes with another answer compile anew.

    False where no guard can be had: a size is not known before the graph runs, or lies in a range that the user marked.
    """
    if known(condition) or not isinstance(condition, torch.SymBool):
        return bool(condition)
    return condition.node.hint is not None and not in_marked_range(condition) and bool(condition)


def in_marked_range(size: torch.SymInt | torch.SymBool) -> bool:
    """Whether the user marked a range (`mark_dynamic(x, 1, min=2, max=4096)`) for a size that this one depends on.

    A guard within such a range is an error of Dynamo's. One on a size that is dynamic without a range compiles anew.
    """
    symbols = size.node.expr.free_symbols
    for tracked in size.node.shape_env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for extent, constraint in zip(getattr(tracked.fake, "shape", ()), constraints, strict=False):
            marked = isinstance(constraint, StrictMinMaxConstraint) and isinstance(extent, torch.SymInt)
            if marked and symbols & extent.node.expr.free_symbols:
                return True
    return False


def same_shape(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two fake tensors provably have one shape."""
    return left.dim() == right.dim() and all(known(a == b) for a, b in zip(left.shape, right.shape, strict=True))


def readers(node: Node) -> list[Node]:
    """The nodes that read a value, without those that only compare its dtype, device and layout, as torch.export does.

    Such a check says what the graph itself determines, so it may go with the value; one that names sizes or strides is
    about the inputs, and counts as a reader.
    """
    return [user for user in node.users if not is_type_check(user)]


def is_type_check(node: Node) -> bool:
    """Whether a node asserts the dtype, device and layout of a tensor, and nothing else."""
    if node.target is not torch.ops.aten._assert_tensor_metadata.default or node.users:
        return False
    _, size, stride, *_ = arguments(node)
    return size is None and stride is None


def unread(node: Node, is_pure: Callable[[Node], bool]) -> list[Node] | None:
    """The nodes that depend on a value, in order, if nothing comes of them: all are pure. None if the value is used."""
    found: dict[Node, None] = {}
    pending = [node]
    while pending:
        for reader in readers(pending.pop()):
            if not is_pure(reader):
                return None
            if reader not in found:
                found[reader] = None
                pending.append(reader)
    return sorted(found)


def is_mutating(node: Node) -> bool:
    """Whether a node is an operator whose schema says that it writes to an argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_erased(node: Node) -> bool:
    """Whether a node has been taken out of its graph, as all nodes of a failed attempt are."""
    return node._erased


def insert(graph: Graph, target: Callable[..., Any] | str, *args: Any, name: str | None = None, **kwargs: Any) -> Node:
    """Adds a call at the graph's insertion point and records its fake value, so that the next pass can read it.

    A string target is a method of the first argument. Must be called under `graph.inserting_before(...)`.
    """
    kind = "call_method" if isinstance(target, str) else "call_function"
    node = graph.create_node(kind, target, args, kwargs, name=name)
    node.meta["example_value"] = propagate(graph, target, *map_arg((args, kwargs), fake))
    return node


def hint(number: Any) -> Any:
    """A number in the call that is being compiled; None where nobody knows it before the graph runs. Guards nothing."""
    return number.node.hint if isinstance(number, (torch.SymInt, torch.SymFloat)) else number


def propagate(graph: Graph, target: Callable[..., Any] | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call makes of fake values; a string target is a method of the first."""
    call = getattr(args[0], target) if isinstance(target, str) else target
    # Without Python's dispatcher a composite operator (SDPA's plain form) reads symbolic sizes as numbers, which fixes them.
    with fake_mode(graph) or nullcontext(), torch.no_grad(), enable_python_dispatcher():
        return call(*(args[1:] if isinstance(target, str) else args), **kwargs)


def fake_mode(graph: Graph) -> FakeTensorMode | None:
    """The mode that made the graph's fake values. Not the active one: Dynamo gives a backend another."""
    for node in graph.nodes:
        value = fake(node)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def size(graph: Graph, node: Node, dim: int) -> int | Node:
    """A tensor's size along a dimension: an int where it is static, else a node of the graph."""
    value = static(fake(node).shape[dim])
    if value is not None:
        return value
    return insert(graph, torch.ops.aten.sym_size.int, node, dim)
