"""Whether a call is traced: by torch.compile, torch.export, make_fx or torch.jit.trace, or on fake tensors."""

from __future__ import annotations

import torch
from torch._guards import TracingContext, active_fake_mode
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_traced() -> bool:
    """Whether this thread is tracing the caller.

    `torch.compiler.is_compiling()` alone is True in all threads while any of them compiles, be it another model.
    """
    if torch.compiler.is_dynamo_compiling():  # a constant of the code that Dynamo traces
        return True
    if torch.compiler.is_compiling() and TracingContext.try_get() is not None:
        return True
    return torch._C._is_tracing() or get_proxy_mode() is not None or active_fake_mode() is not None
