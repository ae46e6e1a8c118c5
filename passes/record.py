"""Recording a graph's operators: an AtenGraph of a graph as it was traced.

    before   m = x.where(c, y); F.relu(m, True); o = F.scaled_dot_product_attention(q, k, v, m)
    after    the same graph, and beside it its AtenGraph (aten.py)

The graph is run once on its fake values, and every operator that it reaches is recorded before autograd, autocast and
decompositions: which overload it is, with all its arguments. A function is recorded by what it does, not by its name:
methods, operators of Python, numpy's functions and functions of the user all become the operators behind them.

What cannot be recorded (a higher-order operator, a node that fails) is an unknown value, and is taken to write to all of
its inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from tsa_compile.passes import operators
from tsa_compile.passes.aten import AtenGraph, unknown
from tsa_compile.passes.fakes import (
    alike,
    autocast_type,
    functorch_depth,
    is_arithmetic,
    is_laid_out_like,
    is_plain,
    is_wrapped,
    note_constant,
    quiet,
    run_node,
    run_operator,
    tensors_in,
)
from tsa_compile.passes.flex import FLEX, RecordedFlex, at_index, flex_arguments
from tsa_compile.passes.graph import fake, fake_mode, known
from tsa_compile.passes.values import Values


def record(graph_module: GraphModule) -> AtenGraph:
    """Runs a graph on its fake values and records its operators; never raises for what a node does."""
    try:
        return _Recording(graph_module, borrows=True).run(graph_module)
    except _ChangeOfTrace:
        return _Recording(graph_module, borrows=False).run(graph_module)


class _ChangeOfTrace(BaseException):
    """A tensor of the trace would be given another shape. No node's own failure, so no Exception."""


class _Mode(SchemaCheckMode):
    """Sees every operator in front of autograd and decompositions: torch admits only its own kinds of mode there."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        # torch's type stubs do not list this key.
        self.__dict__["_dispatch_key"] = torch._C.DispatchKey.PreDispatch  # type: ignore[attr-defined]
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recording.call(func, args, kwargs or {})


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements may be one place in memory, as those of an expanded tensor are."""
    sizes = zip(tensor.stride(), tensor.shape, strict=True) if is_plain(tensor) else ()
    return any(known(stride == 0) and not known(size == 1) for stride, size in sizes)


class _Recording:
    """One run of a graph. If it `borrows`, a node that is a single operator need not run: the trace has the tensor that it
    makes, in memory of its own or in its input's. It ends with `_ChangeOfTrace` where the shape of such a tensor changes."""

    def __init__(self, graph_module: GraphModule, borrows: bool) -> None:
        self.result = AtenGraph()
        self.book = Values(self.result)
        self.borrows = borrows
        self.borrowed: set[int] = set()  # pieces of memory
        self.traced: set[int] = set()  # ids of the trace's values up to the node that runs
        self.laid: set[int] = set()  # the pieces of memory in which they lie
        self.wanted: tuple[Node, Any, Any] | None = None  # the node, its first argument and its value in the trace
        self.mode = fake_mode(graph_module.graph)
        self.entered: list[tuple[Node, Any]] = []  # contexts such as autocast, and what entering them has given
        self.memory = self.result.memory
        self.tick = 0
        self.paused = False
        self.env: dict[Node, Any] = {}
        self.indices: dict[Any, list[Tensor]] = {}  # b, h, q and kv, as functions of positions are given them

    def run(self, graph_module: GraphModule) -> AtenGraph:
        with quiet(self.mode):
            try:
                with _Mode(self):
                    self._run_graph(graph_module)
            finally:
                self._leave_contexts()
        return self.result

    def _leave_contexts(self) -> None:
        """Those that are still entered, as where the recording ends in the middle: all that follows would be under them."""
        while self.entered:
            node, context = self.entered.pop()
            enter: Any = node.target
            leave = getattr(sys.modules[enter.__module__], enter.__name__.replace("_enter_", "_exit_", 1), None)
            if leave is not None:
                leave(context)

    def _run_graph(self, graph_module: GraphModule, given: Sequence[Any] = ()) -> Any:
        """Runs all nodes. Inputs for which a value is given have that one. Returns what the graph returns, recorded."""
        inputs, returned = iter(given), None
        for node in graph_module.graph.nodes:
            if self.book.inside is None:
                self.tick += 1
                self.book.origin = node
                self.result.order[node] = self.tick
            if node.op == "output":
                returned = map_arg(node.args[0], lambda read: self.book.of(self.env[read]))
                self.book.new(unknown, (returned,), None)
                continue
            value = next(inputs, None) if node.op == "placeholder" else None
            self.env[node] = self._value(graph_module, node) if value is None else value
            self._note_context(node)
            for tensor in tensors_in(fake(node)):
                self.traced.add(id(tensor))
                self.laid.add(self.memory.piece(tensor))
            if self.book.inside is None:
                self._settle(node)
        return returned

    def _note_context(self, node: Node) -> None:
        name = getattr(node.target, "__name__", "")
        if name.startswith("_enter_") and node not in self.result.problems:
            self.entered.append((node, self.env[node]))
        elif name.startswith("_exit_"):
            self.entered = [(other, context) for other, context in self.entered if other not in node.all_input_nodes]

    def _value(self, graph_module: GraphModule, node: Node) -> Any:
        wanted = fake(node)
        if node.op == "placeholder":
            return tree_map(lambda leaf: self._input(node, leaf), wanted)
        if node.op == "get_attr":
            return self._attribute(graph_module, node)
        if node.target is FLEX:
            return self._flex(node, wanted)
        if node.op == "call_module" or isinstance(node.target, HigherOrderOperator):
            return self._body(graph_module, node, wanted)
        if node.op == "call_method" and node.target == "item":
            return wanted  # a number that is read at run time; run again it would be another symbol
        args, kwargs = map_arg((node.args, node.kwargs), self.env.__getitem__)
        borrows = self.borrows and self.book.inside != FLEX.__name__  # whose functions have other inputs than in the trace
        self.wanted = (node, args[0] if args else None, wanted) if borrows else None
        try:
            made = at_index(node, args) if self.book.inside == FLEX.__name__ else None
            made = run_node(node, args, kwargs) if made is None else made
        except Exception as error:  # noqa: BLE001  # whatever it is, this node's value is unknown, and the others' are not
            self.result.problems[node] = f"{type(error).__name__}: {error}"
            return self._unknown(node, wanted)
        return self._agreed(node, made, wanted)

    def _input(self, node: Node, value: Any) -> Any:
        """A tensor of its own over the same memory: the graph may change its shape in place, the trace's must stay."""
        if not isinstance(value, Tensor):
            return value
        if is_plain(value):
            with self._pause():
                value = value.detach()
        self.book.keep(value, self.book.new(unknown, (), value))
        return value

    def _attribute(self, graph_module: GraphModule, node: Node) -> Any:
        value = attrgetter(str(node.target))(graph_module)
        if not isinstance(value, Tensor):
            return value
        made = value
        if not isinstance(value, FakeTensor) and self.mode is not None:
            with self._pause():
                made = self.mode.from_tensor(value, static_shapes=True)
        leaf = self.book.new(unknown, (), made)
        note_constant(leaf, value)
        self.book.keep(made, leaf)
        return made

    def _agreed(self, node: Node, made: Any, wanted: Any) -> Any:
        """What a node made, if it is what the trace has: numbers are taken from the trace, which names their symbols."""
        if wanted is None or made is wanted:
            return made
        if self.book.inside == FLEX.__name__ and not isinstance(wanted, Tensor):
            return made  # the trace has symbols of its own for numbers that a function captures
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(wanted)):
            return wanted
        ours, theirs = tree_leaves(made), tree_leaves(wanted)
        if len(ours) == len(theirs) and all(map(alike, ours, theirs)):
            return made
        self.result.problems[node] = "its value is another one than the trace has"
        return self._unknown(node, wanted)

    def _unknown(self, node: Node, wanted: Any, writes: bool = True, flex: RecordedFlex | None = None) -> Any:
        """A node that may have done anything with its inputs: its outputs are new values that may share their memory.

        FlexAttention's do not, and if it was read it does nothing else.
        """
        read = tensors_in(map_arg((node.args, node.kwargs), self.env.__getitem__))
        inputs = tuple(self.book.node_of(tensor) for tensor in read)
        for tensor in read if writes else ():
            self._write(tensor)
        if flex is None:
            self.result.impure.add(node)
        with self._pause():
            values = tree_map(lambda leaf: leaf.detach() if is_plain(leaf) else leaf, wanted)
        target = node.target if isinstance(node.target, HigherOrderOperator) else unknown
        call = self.book.new(target, inputs, values)
        call.meta.update(failed=True, flex=flex)
        made = tensors_in(values)
        for tensor in made:
            self.book.keep(tensor, call if isinstance(values, Tensor) else self.book.new(unknown, (call,), tensor))
        if flex is None:
            self.memory.share([*made, *read])
        return values

    def _flex(self, node: Node, wanted: Any) -> Any:
        """FlexAttention: its functions are recorded at positions that all calls share, its value is unknown."""
        call = map_arg(flex_arguments(node), self.env.__getitem__)
        score_mod, mask_mod = call["score_mod"], call["block_mask"][-1]
        if not (isinstance(score_mod, GraphModule) and isinstance(mask_mod, GraphModule)):
            return self._unknown(node, wanted)
        recorded = self.book.of(call)  # before the functions run: a captured tensor is a value of the graph, not of theirs
        outside, self.book.inside = self.book.inside, FLEX.__name__
        before, indices = self.tick, self._indices(call["query"].device)
        modified = self._run_graph(score_mod, [None, *indices, *call["score_mod_other_buffers"]])
        allowed = self._run_graph(mask_mod, [*indices, *call["mask_mod_other_buffers"]])
        self.book.inside = outside
        if self.tick > before:  # one of them writes
            return self._unknown(node, wanted)
        score = self.book.of(self.env[next(iter(score_mod.graph.nodes))])
        operands = {name: recorded[name] for name in ("query", "key", "value", "scale", "block_mask")}
        read = RecordedFlex(**operands, score=score, modified=modified, allowed=allowed)
        return self._unknown(node, wanted, writes=False, flex=read)

    def _indices(self, device: torch.device) -> list[Tensor]:
        if device not in self.indices:
            with self._pause():
                self.indices[device] = [torch.empty((), dtype=torch.int32, device=device) for _ in range(4)]
            for position, index in enumerate(self.indices[device]):
                leaf = self.book.new(unknown, (), index)
                leaf.meta["position"] = position
                self.book.keep(index, leaf)
        return self.indices[device]

    def _body(self, graph_module: GraphModule, node: Node, wanted: Any) -> Any:
        """A higher-order operator: its bodies are recorded for the attention in them, its value is unknown.

        It writes to its inputs if a body writes to anything, or if there is no body to tell.
        """
        outside, self.book.inside = self.book.inside, getattr(node.target, "__name__", str(node.target))
        before = self.tick
        bodies = [body for source in node.all_input_nodes if isinstance(body := self.env.get(source), GraphModule)]
        for body in bodies:
            self._run_graph(body)
        self.book.inside = outside
        return self._unknown(node, wanted, writes=self.tick > before or not bodies)

    def _settle(self, node: Node) -> None:
        """Notes what a node of the graph holds now that it has run."""
        result, value = self.result, self.env[node]
        result.values[node] = self.book.of(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            result.scalars.setdefault(str(value.node.expr), node)
        elif isinstance(value, Tensor):
            self.tick += 1
            self.book.name(result.values[node], node, value, self.tick)
        elif value is None or (not tensors_in(value) and not is_arithmetic(node)):
            result.impure.add(node)  # it has no value that says what it is for

    # -- operators ------------------------------------------------------------------------------------------------------

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Records one operator and runs it."""
        if self.paused:
            return func(*args, **kwargs)
        written = list(operators.written(func, args, kwargs))
        if func in operators.CHANGES_NOTHING:
            return func(*args, **kwargs)
        if is_wrapped(args, kwargs):
            return self._call_wrapped(func, args, kwargs, written)
        if not isinstance(func, OpOverload) or written or not operators.is_pure(func, args, kwargs):
            self._mark_impure()
        if operators.may_change_a_shape(func) and any(self.memory.piece(tensor) in self.borrowed for tensor in written):
            raise _ChangeOfTrace
        inputs, options = self.book.of(args), self.book.of(kwargs)
        if torch.Tag.inplace_view in func.tags:
            self.book.freeze_shapes(written)
        pieces = [self.memory.piece(tensor) for tensor in written]
        result = self._borrow(func)
        if result is None:
            result = run_operator(func, args, kwargs)
        for piece, tensor in zip(pieces, written, strict=True):
            if self.memory.piece(tensor) != piece:  # Tensor.set_
                self.memory.unite(piece, tensor)
            self._write(tensor)
        self._keep_results(func, inputs, options, result, {id(tensor) for tensor in (*tensors_in((args, kwargs)),)}, written)
        return result

    def _borrow(self, func: Any) -> Tensor | None:
        """What the trace has for the operator that is a node: a new tensor, in new memory or in its first argument's."""
        if self.wanted is None:
            return None
        (node, first, made), self.wanted = self.wanted, None
        if not isinstance(func, OpOverload) or not operators.makes_one_tensor(func) or not is_plain(made):
            return None
        if id(made) in self.traced or getattr(made, "fake_mode", None) is not self.mode or functorch_depth():
            return None
        piece = self.memory.piece(made)
        if piece in self.laid and (
            not isinstance(first, Tensor) or self.memory.piece(first) != piece or is_laid_out_like(first, made)
        ):
            return None  # another tensor's memory, or the first argument itself
        if not operators.is_all_of(node, func, first):
            return None
        self.borrowed.add(piece)
        return made

    def _call_wrapped(self, func: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """Under torch.vmap a tensor is not what it looks like: attention is noted, writes are, values are not."""
        if operators.is_attention(func):
            self.book.new(func, (), None).meta["inside"] = "vmap"
        for tensor in written:
            while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                tensor = torch._C._functorch.get_unwrapped(tensor)
            self._write(tensor)
        self._mark_impure()
        return func(*args, **kwargs)

    def _keep_results(self, func: Any, args: Any, kwargs: Any, result: Any, given: set[int], written: list[Tensor]) -> None:
        if not written and isinstance(result, Tensor) and id(result) in given:
            return  # the input itself, as dropout in evaluation and casts to the same type return it
        if any(map(_overlaps_itself, written)):
            return  # of the numbers that are written to one place, one stays: the result is an unknown value
        call = (self.book.new if written else self.book.repeated)(func, args, result, kwargs)
        if func is operators.aten.scaled_dot_product_attention.default:
            call.meta["autocast"] = autocast_type(result.device)
        if isinstance(result, Tensor):
            in_place = any(result is tensor for tensor in written) and torch.Tag.inplace_view not in func.tags
            if in_place or id(result) not in given:
                self.book.keep(result, call)
            return
        for position, tensor in enumerate(result if isinstance(result, (tuple, list)) else ()):
            if isinstance(tensor, Tensor) and id(tensor) not in given:
                self.book.keep(tensor, self.book.new(operators.ITEM, (call, position), tensor))

    def _write(self, tensor: Tensor) -> None:
        self.tick += 1
        self.memory.write(tensor, self.tick)
        self._mark_impure()

    def _mark_impure(self) -> None:
        if self.book.origin is not None:
            self.result.impure.add(self.book.origin)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Without recording."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before
