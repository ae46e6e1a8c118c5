"""Triton where it is installed, a harmless stand-in where it is not; and a launch that costs the host less.

Every kernel file imports `triton` and `tl` from here, so that the package (and its CPU implementations) also import on
platforms without Triton. Kernels decorated by the stand-in can be defined but not launched: `HAS_TRITON` says which.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tsa_compile.kernels._replay import watching

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

__all__ = ["HAS_TRITON", "cdiv", "launch", "next_power_of_2", "tl", "triton"]


def cdiv(number: int, divisor: int) -> int:
    """Rounded up. `triton.cdiv` also works in kernels, for which it costs the host 5 us a call."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a number of at least 1; as `triton.next_power_of_2`, but fast."""
    return 1 << (number - 1).bit_length()


_compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
_REMEMBERED = 4096


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[torch.Tensor | None, ...], numbers: tuple[Any, ...], **options: Any
) -> None:
    """`kernel[grid](*tensors, *numbers, **options)`, with the compiled kernel remembered by all that it depends on.

    Triton examines and binds every argument anew at each launch, about half of the 15 to 30 us that one costs the host; a
    layer at 8K tokens, eight launches, is over on the GPU in 0.4 ms.

    Args:
        tensors, numbers: the kernel's parameters in order, but for the constants.
        options: the constants, and num_warps and num_stages.
    """
    if type(tensors[0]) is not torch.Tensor:  # fake or functional: a compiler traces, and takes the kernel into its graph
        torch.library.wrap_triton(kernel)[grid](*tensors, *numbers, **options)
        return
    notes = watching()
    # Not for the interpreter's functions, nor for AMD, where Triton specializes on the extent of memory as well.
    if torch.version.cuda is None or not isinstance(kernel, triton.JITFunction):
        if notes is not None:
            notes.replayable = False
        kernel[grid](*tensors, *numbers, **options)
        return
    pointers = [None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors]
    key = (id(kernel), torch.cuda.current_device(), numbers, *pointers, *options.values())
    found = _compiled.get(key)
    if found is None:
        if len(_compiled) >= _REMEMBERED:  # every length is an entry, though not a compilation
            _compiled.clear()
        constants = tuple(options[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])
        compiled = kernel[grid](*tensors, *numbers, **options)
        _compiled[key] = (compiled, constants)
    else:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*tensors, *numbers, *constants)
    if notes is not None:
        notes.add(compiled[(*grid, 1, 1)[:3]], tensors, (*numbers, *constants))
