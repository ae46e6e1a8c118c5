"""Our ops compute in the types of their arguments, under `torch.autocast` too.

Autocast acts on operators. Those that an op of ours is made of would be cast inside it: scores that the method computes in
float32 would be rounded to half precision, and a finite stand-in for minus infinity would be out of range.
"""

from collections.abc import Callable
from typing import Any

import torch

_KEYS = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}
_LIBRARY = torch.library.Library("tsa", "IMPL")


def keep_types() -> None:
    """From now on all ops that are registered as torch.ops.tsa.* run with autocast switched off."""
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if name.startswith("tsa::") and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCPU"):
            op = getattr(torch.ops.tsa, name.removeprefix("tsa::")).default
            for key, device in _KEYS.items():
                _LIBRARY.impl(op._schema.name, _without_autocast(op, device), key)


def _without_autocast(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return call
