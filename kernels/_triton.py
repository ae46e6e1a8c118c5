"""Triton where it is installed, a harmless stand-in where it is not; and a launch that costs the host less.

Every kernel file imports `triton` and `tl` from here, so that the package (and its CPU implementations) also import on
platforms without Triton. Kernels decorated by the stand-in can be defined but not launched: `HAS_TRITON` says which.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

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

__all__ = ["HAS_TRITON", "launch", "tl", "triton"]

_compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, with the compiled kernel remembered by what Triton specializes on.

    Triton examines and binds all arguments anew at each launch, about half of the 15 to 30 us that one costs the host; a
    layer at 8K tokens, eight launches, is over on the GPU in 0.4 ms.

    Args:
        args: the parameters that are not constants, in order; options: the constants, and num_warps, num_stages.
    """
    # Not for the interpreter's functions, nor for AMD, where Triton specializes on the extent of memory as well.
    if torch.version.cuda is None or not isinstance(kernel, triton.JITFunction):
        kernel[grid](*args, **options)
        return
    key = (id(kernel), torch.cuda.current_device(), *options.values(), *map(_specialization, args))
    found = _compiled.get(key)
    if found is None:
        constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
        _compiled[key] = (kernel[grid](*args, **options), constants)
    else:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)


def _specialization(argument: Any) -> Any:
    """Two arguments that are equal in this are the same to Triton's compiler."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return type(argument)
