"""Tracing a graph anew without a stack for every node.

For each node of a new graph, each sum of two sizes included, torch looks for the lines of the model that it comes of. Where
a program is only traced anew, there are none to be found on the stack, which takes a quarter of an export's time to look at.
What a program knows of its model's lines stays with the nodes that are made of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.fx.config


@contextmanager
def without_stacks() -> Iterator[None]:
    """Inside, nodes have the stacks that the traced graph has already, and no others; torch 2.11 has no switch for it."""
    known = getattr(torch.fx.config, "do_not_emit_stack_traces", None)
    if known is None:
        yield
        return
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = known
