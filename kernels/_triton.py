"""Triton where it is installed, a harmless stand-in where it is not.

Every kernel file imports `triton` and `tl` from here, so that the package (and its CPU implementations) also import on
platforms without Triton. Kernels decorated by the stand-in can be defined but not launched: `HAS_TRITON` says which.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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

__all__ = ["HAS_TRITON", "tl", "triton"]
