"""Whether a call is traced, by torch.compile or torch.export."""

from __future__ import annotations

import torch
from torch._guards import TracingContext


def is_traced() -> bool:
    """Whether this thread is tracing the caller.

    `torch.compiler.is_compiling()` alone is True in all threads while any of them compiles, be it another model.
    """
    if torch.compiler.is_dynamo_compiling():  # a constant of the code that Dynamo traces
        return True
    return torch.compiler.is_compiling() and TracingContext.try_get() is not None
