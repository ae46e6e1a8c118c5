"""Running the nodes of a graph again on fake tensors: quietly, and told which of these share memory or are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from tsa_compile.passes import operators
from tsa_compile.passes.graph import known, same_shape

SMALL = 16  # elements of a constant whose numbers are kept


class Memory:
    """Which tensors share memory, and when each piece was written to."""

    def __init__(self) -> None:
        self._shared: dict[int, set[int]] = {}
        self.writes: dict[int, list[int]] = {}

    def piece(self, tensor: Tensor) -> int:
        """The piece of memory that a tensor lies in."""
        try:
            return tensor.untyped_storage()._cdata
        except (RuntimeError, NotImplementedError):  # a sparse tensor, or a wrapper of functorch
            return id(tensor)

    def share(self, tensors: Sequence[Tensor]) -> None:
        """From now on these may share memory."""
        together: set[int] = set()
        for tensor in tensors:
            piece = self.piece(tensor)
            together |= self._shared.get(piece, {piece})
        self._shared.update(dict.fromkeys(together, together))

    def unite(self, before: int, tensor: Tensor) -> None:
        """A tensor has left one piece of memory for another: what was written to either counts for both from now on."""
        together = {piece for one in (before, self.piece(tensor)) for piece in self._shared.get(one, {one})}
        writes = sorted({tick for piece in together for tick in self.writes.get(piece, ())})
        self._shared.update(dict.fromkeys(together, together))
        self.writes.update({piece: [*writes] for piece in together})

    def write(self, tensor: Tensor, tick: int) -> None:
        """Notes a write to a tensor, and so to all that shares its memory."""
        piece = self.piece(tensor)
        for touched in self._shared.get(piece, {piece}):
            self.writes.setdefault(touched, []).append(tick)

    def version(self, tensor: Tensor) -> int:
        """How often a tensor's memory was written to."""
        return len(self.writes.get(self.piece(tensor), ()))


def run_node(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Runs a call of a graph on other values."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.target is torch.tensor and len(args) == 1 and type(args[0]) in (bool, int, float):
        return operators.full_like_number(args[0], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def run_operator(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Runs an operator; `linear`, which would take a third of the time, only makes a tensor of that shape."""
    if func is torch.ops.aten.linear.default and not kwargs and all(map(is_plain, tensors_in(args))):
        features, weight = args[:2]
        if autocast_type(features.device) is None:
            return features.new_empty((*features.shape[:-1], *weight.shape[:-1]))
    return func(*args, **kwargs)


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The type to which torch.autocast casts on a device at this moment; None if it does not."""
    kind = device.type
    active = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if active else None


@contextmanager
def quiet(mode: Any) -> Iterator[None]:
    """On fake values, without gradients, without guards or symbols that the trace does not have, and undone at the end."""
    shapes = getattr(mode, "shape_env", None)
    depth = functorch_depth()
    with ExitStack() as stack:
        stack.enter_context(mode or nullcontext())
        stack.enter_context(torch.no_grad())
        stack.enter_context(enable_python_dispatcher())
        if shapes is not None:
            stack.enter_context(shapes.suppress_guards())  # running the same again, it can only ask what was asked before
            stack.enter_context(shapes.ignore_fresh_unbacked_symbols())
        try:
            yield
        finally:
            while functorch_depth() > depth:  # a node inside torch.vmap failed
                torch._C._functorch.pop_dynamic_layer_stack()


def functorch_depth() -> int:
    """How many of torch.func's transformations are running, torch.vmap among them."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return 0 if interpreter is None else interpreter.level()


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor, and none of a subclass, whose operators may do anything."""
    return type(value) in (Tensor, FakeTensor) and value.layout is torch.strided and not value.is_nested


def is_laid_out_like(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in one piece of memory are the same view of it."""
    if not (is_plain(one) and is_plain(other)) or one.dtype != other.dtype or not same_shape(one, other):
        return False
    strides = all(known(a == b) for a, b in zip(one.stride(), other.stride(), strict=True))
    return strides and known(one.storage_offset() == other.storage_offset()) and one.is_conj() == other.is_conj()


def is_wrapped(*trees: Any) -> bool:
    """Whether an argument is one of functorch's wrappers, in which a dimension of torch.vmap is hidden."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return functorch_depth() > 0 and any(wrapped(tensor) for tensor in tensors_in(trees))


def is_arithmetic(node: Node) -> bool:
    """A number computed from sizes: Python's operators and methods such as `size`."""
    if node.op == "call_method":
        return True
    module = getattr(node.target, "__module__", "")
    return bool(node.all_input_nodes) and module in ("_operator", "builtins", "math", "torch", "torch._ops", "torch.ops")


def alike(made: Any, wanted: Any) -> bool:
    """Whether what a node made now is of the shape and type that the trace has."""
    if not isinstance(wanted, Tensor):
        return not isinstance(made, Tensor)
    return isinstance(made, Tensor) and made.dtype == wanted.dtype and same_shape(made, wanted)


def note_constant(node: Node, tensor: Tensor) -> None:
    """Keeps the numbers of a small constant, which are the same at every run."""
    if isinstance(tensor, FakeTensor):
        tensor = tensor.constant  # type: ignore[assignment]  # what torch.tensor(...) was made of
    wrapped = type(tensor) is Tensor and torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # symbols in torch.vmap
    if type(tensor) is Tensor and not wrapped and tensor.numel() <= SMALL and tensor.device.type == "cpu":
        with torch._C._DisableTorchDispatch():
            node.meta["constant"] = tensor.detach().clone()


def key_of(tree: Any, of_node: Callable[[Node], Any] = lambda node: node) -> Any:
    """Arguments as a dictionary's key: 1, 1.0 and True are different, and a symbol is what its expression is.

    Whoever hashes it meets a TypeError where something in it cannot be compared.
    """
    if isinstance(tree, Node):
        return Node, of_node(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree), tuple(key_of(leaf, of_node) for leaf in tree)
    if isinstance(tree, dict):
        return dict, tuple((name, key_of(leaf, of_node)) for name, leaf in sorted(tree.items()))
    if isinstance(tree, slice):
        return slice, key_of((tree.start, tree.stop, tree.step), of_node)
    if isinstance(tree, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return type(tree), str(tree.node.expr)
    return type(tree), str(tree) if isinstance(tree, (float, complex)) else tree
