"""Registering an op without torch.library.custom_op, whose layers take 60 to 120 us of each call; this takes 10."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def define(fake: Callable[..., Any], *tags: torch.Tag) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function the op tsa::<its name>, of its signature's schema, on CPUs and on CUDA; `fake` gives the shapes.

    It has no gradient: a backward pass through it raises RuntimeError.
    """

    def register(function: Callable[..., Any]) -> Any:
        name, schema = f"tsa::{function.__name__}", torch.library.infer_schema(function, mutates_args=())

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return function(*args, **kwargs)
            with torch.no_grad():  # else a part of the gradients would come from the operators inside
                made = function(*args, **kwargs)
            needing = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.requires_grad]
            return _NoGradient.apply(name, made, *needing) if needing else made

        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        torch.library.impl(name, ("cpu", "cuda"), run)
        torch.library.register_fake(name, fake)
        return getattr(torch.ops.tsa, function.__name__)

    return register


class _NoGradient(torch.autograd.Function):
    """What an op made, which comes of inputs that need a gradient."""

    @staticmethod
    def forward(ctx: Any, name: str, made: Any, *inputs: Tensor) -> Any:
        ctx.name = name
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{ctx.name} has no gradient: leave the model as it is for training, or use torch.no_grad()")
