"""Launching: Triton where it is installed, one way to launch a kernel, and functions of launches remembered.

    launch(kernel, grid, tensors, numbers, **constants)      kernel[grid](*tensors, *numbers, **constants)
    remembered(function)(*arguments)                         function(*arguments), the second time by its launches alone

Every kernel file imports `triton` and `tl` from here, so that the package (and its CPU implementations) also import on
platforms without Triton. Kernels decorated by the stand-in can be defined but not launched: `HAS_TRITON` says which.

`launch` is the only way in which this package launches a kernel; where a compiler traces, the kernel goes into its graph.

A launch costs the host 15 to 30 us, as Triton examines and binds every argument anew, and around its launches a function
computes strides, alignments and tile sizes and allocates: for the six of a sparse layer 0.15 to 0.5 ms of the host's time,
while 8K tokens take the GPU 0.45 ms. All of this follows from the arguments' shapes, strides, dtypes and alignment and from
the numbers among them. So `remembered` watches a function once for each such signature, notes what it allocates and
launches, and then replays the notes on other arguments.

A replay gives what the function would give. Where that is not certain, the function itself runs: a signature is not
remembered if the function

- calls any operator that is neither an allocation, empty or of zeros, nor a view: its result would be missing,
- launches on memory that several arguments share, other than on an argument itself: which of them is meant?
- returns a part of an argument or of another result,
- launches nothing, or by an interpreter.

A function may not branch on data, on globals that change, or launch in any other way than by `launch`.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:

    class _Missing:
        """Stands for `triton`: its decorators leave the function as it is, anything else names what is missing."""

        def jit(self, fn: Any = None, **_: Any) -> Any:
            return fn if fn is not None else lambda inner: inner

        def __getattr__(self, name: str) -> Any:
            raise ImportError(f"triton.{name} needs Triton, which is not installed: install it, or stay on the CPU")

    triton = _Missing()
    tl = SimpleNamespace(constexpr=lambda value: value)
    HAS_TRITON = False


__all__ = ["HAS_TRITON", "by_device", "cdiv", "launch", "next_power_of_2", "remembered", "tl", "triton", "watching"]

Function = TypeVar("Function", bound=Callable[..., Any])
Found = TypeVar("Found")

_REMEMBERED = 4096
"""How many signatures of a function are kept: every length is one."""
_UNSEEN: Any = object()
_ALIGNMENT = 512
"""Bytes between temporaries, as the caching allocator has it: a kernel compiled for aligned addresses finds such."""

aten = torch.ops.aten
_ALLOCATIONS = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip
_ZEROS = {aten.zeros.default, aten.new_zeros.default}
_VIEWS = {
    aten.alias.default, aten.as_strided.default, aten.detach.default, aten.expand.default, aten.permute.default,
    aten.select.int, aten.slice.Tensor, aten.squeeze.dim, aten.transpose.int, aten.unsqueeze.default, aten.view.default,
}  # fmt: skip

_watch = threading.local()


def watching() -> _Notes | None:
    """The notes that this thread's launches go to, if a function is being watched."""
    return getattr(_watch, "notes", None)


class _Notes(TorchDispatchMode):
    """What a function does while it is watched. Holds the tensors of its launches, so that no memory serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Callable[..., Any], Sequence[Any], tuple[Any, ...]]] = []
        self.zeros: list[Tensor] = []
        self.replayable = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _ZEROS:
            self.zeros.append(found)
        elif func not in _ALLOCATIONS and func not in _VIEWS:
            self.replayable = False
        return found

    def __enter__(self) -> _Notes:
        _watch.notes = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _watch.notes = None
        super().__exit__(*error)

    def add(self, runner: Callable[..., Any], operands: Sequence[Any], numbers: tuple[Any, ...]) -> None:
        """A launch: `runner(*addresses, *numbers, stream=stream)` repeats it.

        operands: tensors, TMA descriptors of tensors, or None.
        """
        self.launches.append((runner, operands, numbers))


def cdiv(number: int, divisor: int) -> int:
    """Rounded up. `triton.cdiv` also works in kernels, for which it costs the host 5 us a call."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a number of at least 1; as `triton.next_power_of_2`, but fast."""
    return 1 << (number - 1).bit_length()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    *,
    descriptors: tuple[Any, ...] = (),
    **options: Any,
) -> None:
    """Launches a kernel on the current stream of the current device. See the module's docstring.

    Args:
        tensors, descriptors, numbers: the kernel's parameters in order, but for the constants. The first is a tensor.
        descriptors: of tensors for TMA, or None.
        options: the constants, and num_warps and num_stages.
    """
    arguments = (*tensors, *descriptors)
    if type(tensors[0]) is not Tensor:  # fake or functional: a compiler traces, and takes the kernel into its graph
        torch.library.wrap_triton(kernel)[grid](*arguments, *numbers, **options)
        return
    notes = watching()
    # Not for the interpreter's functions, nor for AMD, where Triton specializes on the extent of memory as well.
    if torch.version.cuda is None or not isinstance(kernel, triton.JITFunction):
        if notes is not None:
            notes.replayable = False
        kernel[grid](*arguments, *numbers, **options)
        return
    constants = tuple(options[name] for name in kernel.arg_names[len(arguments) + len(numbers) :])
    compiled = kernel[grid](*arguments, *numbers, **options)
    if notes is not None:
        notes.add(compiled[(*grid, 1, 1)[:3]], arguments, (*numbers, *constants))


def by_device(by_triton: Callable[..., Found], by_aten: Callable[..., Found]) -> Callable[..., Found]:
    """The first function where its first argument is on a GPU and Triton is installed, else the second."""

    @functools.wraps(by_aten)
    def call(first: Tensor, *arguments: Any, **options: Any) -> Found:
        if not (first.is_cuda and HAS_TRITON):
            return by_aten(first, *arguments, **options)
        with torch.cuda.device_of(first):
            return by_triton(first, *arguments, **options)

    return call


class _Address:
    """What a TMA descriptor asks of its tensor when it is launched."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class _Launch:
    """A launch whose tensors lie elsewhere each time: an address is the number of a base, and bytes from there on."""

    runner: Callable[..., Any]
    arguments: list[Any]
    """Numbers, None, and views for TMA descriptors, which have no tensor."""
    addresses: list[tuple[int, int, int]]
    """Of each tensor the position among the arguments, the base and the bytes."""
    described: list[tuple[int, int, int]]
    """The same of each descriptor's tensor."""

    def again(self, bases: list[int], stream: int | None) -> None:
        """Launches on what lies at these bases."""
        arguments = self.arguments.copy()
        for position, base, offset in self.addresses:
            arguments[position] = bases[base] + offset
        for position, base, offset in self.described:
            known = arguments[position]
            kind: Any = type(known)
            arguments[position] = view = kind.__new__(kind)  # as copy.copy, which takes the host five times as long
            vars(view).update(vars(known), base=_Address(bases[base] + offset))
        self.runner(*arguments, stream=stream)


@dataclass(frozen=True)
class _Program:
    """The notes, so that they can be replayed.

    Bases are the arguments that are tensors, the results that are allocated, temporaries that begin as zeros, and one buffer
    for all others.
    """

    launches: list[_Launch]
    tensors: list[int]
    """Which arguments are tensors."""
    allocated: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    zeros: list[int]
    """Bytes."""
    results: list[int]
    """Per result its base."""
    single: bool
    temporary_bytes: int
    device: torch.device

    def replay(self, arguments: tuple[Any, ...]) -> Any:
        """What the function would return."""
        objects = [arguments[position] for position in self.tensors]
        for size, stride, dtype in self.allocated:
            objects.append(torch.empty_strided(size, stride, dtype=dtype, device=self.device))
        objects += [torch.zeros(size, dtype=torch.uint8, device=self.device) for size in self.zeros]
        if self.temporary_bytes:
            objects.append(torch.empty(self.temporary_bytes, dtype=torch.uint8, device=self.device))
        bases = [tensor.data_ptr() for tensor in objects]
        stream = torch._C._cuda_getCurrentRawStream(self.device.index) if self.device.type == "cuda" else None
        for launch in self.launches:
            launch.again(bases, stream)
        return objects[self.results[0]] if self.single else tuple(objects[base] for base in self.results)


def _signature(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that a function of launches depends on. Triton compiles for addresses that are multiples of 16, and for others."""
    return tuple(
        (argument.shape, argument.stride(), argument.dtype, argument.data_ptr() % 16, argument.get_device())
        if isinstance(argument, Tensor)
        else argument
        for argument in arguments
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Bases:
    """Where tensors of launches lie."""

    def __init__(self, arguments: list[Tensor], allocated: list[Tensor]) -> None:
        self.whole = {id(tensor): number for number, tensor in enumerate(arguments)}
        self.owners: dict[int, list[tuple[int, int]]] = {}
        for number, tensor in enumerate([*arguments, *allocated]):
            self.owners.setdefault(_storage(tensor), []).append((number, tensor.data_ptr()))
        self.buffer = len(arguments) + len(allocated)
        self.offsets: dict[int, int] = {}
        self.bytes = 0

    def place(self, tensor: Tensor) -> tuple[int, int] | None:
        """None if several arguments share the memory."""
        if id(tensor) in self.whole:
            return self.whole[id(tensor)], 0
        storage = _storage(tensor)
        owners = self.owners.get(storage, [])
        if len(owners) == 1:
            number, address = owners[0]
            return number, tensor.data_ptr() - address
        if owners:
            return None
        if storage not in self.offsets:
            self.offsets[storage] = self.bytes
            self.bytes += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        return self.buffer, self.offsets[storage] + tensor.data_ptr() - storage


def _program(notes: _Notes, arguments: tuple[Any, ...], found: Tensor | tuple[Tensor, ...]) -> _Program | None:
    """None if the function has to run each time."""
    if not notes.replayable or not notes.launches:
        return None
    positions = [position for position, argument in enumerate(arguments) if isinstance(argument, Tensor)]
    tensors = [arguments[position] for position in positions]
    results = [found] if isinstance(found, Tensor) else list(found)
    fresh = [result for result in results if not any(result is tensor for tensor in tensors)]
    if not _independent(tensors, [*fresh, *notes.zeros]):
        return None
    bases = _Bases(tensors, [*fresh, *notes.zeros])
    launches = [launch for noted in notes.launches if (launch := _placed(*noted, bases)) is not None]
    if len(launches) < len(notes.launches):
        return None
    numbered = {id(tensor): number for number, tensor in enumerate([*tensors, *fresh])}
    return _Program(
        launches, positions, [(t.shape, t.stride(), t.dtype) for t in fresh],
        [t.untyped_storage().nbytes() for t in notes.zeros], [numbered[id(t)] for t in results],
        isinstance(found, Tensor), bases.bytes, tensors[0].device,
    )  # fmt: skip


def _placed(runner: Callable[..., Any], operands: Sequence[Any], numbers: tuple[Any, ...], bases: _Bases) -> _Launch | None:
    """A launch of the notes; None if several arguments share the memory of one of its tensors."""
    launch = _Launch(runner, [None] * len(operands) + [*numbers], [], [])
    for position, operand in enumerate(operands):
        if operand is None:
            continue
        is_tensor = isinstance(operand, Tensor)
        place = bases.place(operand if is_tensor else operand.base)
        if place is None:
            return None
        (launch.addresses if is_tensor else launch.described).append((position, *place))
        if not is_tensor:
            launch.arguments[position] = view = copy.copy(operand)
            view.base = None  # or the tensor would live as long as the program
    return launch


def _independent(arguments: list[Tensor], fresh: list[Tensor]) -> bool:
    """Whether all are on one device, and each new one is all of memory of its own."""
    storages = [_storage(tensor) for tensor in fresh]
    extents = (
        1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) for tensor in fresh
    )
    return (
        len({tensor.device for tensor in (*arguments, *fresh)}) == 1
        and len(set(storages)) == len(storages)
        and not set(storages) & {_storage(tensor) for tensor in arguments}
        and all(
            tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == extent * tensor.element_size()
            for tensor, extent in zip(fresh, extents, strict=True)
        )
    )


def remembered(function: Function) -> Function:
    """The function, replayed where its notes allow it. See the module's docstring.

    Args:
        function: of positional arguments, tensors (or None) and hashable ones; the first is a tensor.
    """
    programs: dict[tuple[Any, ...], _Program | None] = {}

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        # Fake and functional tensors belong to a compiler that traces; who watches wants to see what is inside.
        if type(arguments[0]) is not Tensor or watching() is not None:
            return function(*arguments)
        signature = _signature(arguments)
        program = programs.get(signature, _UNSEEN)  # one look: another thread may clear them
        if program is not _UNSEEN:
            return function(*arguments) if program is None else program.replay(arguments)
        notes = _Notes()
        with notes:
            result = function(*arguments)
        if len(programs) >= _REMEMBERED:  # every length is an entry
            programs.clear()
        programs[signature] = _program(notes, arguments, result)
        return result

    vars(call)["programs"] = programs
    return cast(Function, call)
