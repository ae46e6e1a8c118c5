"""The steps of sparse attention, opened into operators that run where there is no Python.

    before   scores  = tsa.score(q, k, padding, scale, window, pool)                      opaque ops [B, H, L]
             count   = tsa.budget(scores, tau, None, min_tokens)                          [B]
             ...
             o       = tsa.decompress(o^, indices, count, L)                              [B, H, L, Dv]
    after    "aten"   matmul, softmax, avg_pool1d, sort, index, scaled_dot_product_attention, scatter, ...

No shape depends on data before, and none does afterwards: lengths and batch stay as symbolic as they were, the count stays
on the device, and all C rows are attended to, those behind the count in vain. A capacity, or KeepRatio, makes C smaller.

The program is traced anew by `ExportedProgram.run_decompositions`, so that its signature, weights and ranges stay right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeGuard
from torch.utils._sympy.value_ranges import bound_sympy

from tsa_compile.errors import ConfigError, RewriteError
from tsa_compile.kernels.attend import AUTO, attend_aten
from tsa_compile.kernels.budget import budget_aten
from tsa_compile.kernels.compress import compress_aten
from tsa_compile.kernels.decompress import decompress_aten
from tsa_compile.kernels.padded import padded_attention_aten, spans_aten
from tsa_compile.kernels.score import score_aten
from tsa_compile.kernels.select import select_aten
from tsa_compile.passes.graph import fake_mode

Form = Literal["aten"]
FORMS: tuple[Form, ...] = ("aten",)
_BUILT_IN = (AUTO, "sdpa", "flash", "cudnn", "triton")  # what scaled_dot_product_attention stands for as well

tsa = torch.ops.tsa


def _attend(query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str) -> Tensor:
    return attend_aten(query, key, value, count, scale)


_ATEN: dict[Any, Callable[..., Any]] = {
    tsa.score.default: score_aten,
    tsa.budget.default: budget_aten,
    tsa.select.default: select_aten,
    tsa.compress.default: compress_aten,
    tsa.attend.default: _attend,
    tsa.decompress.default: decompress_aten,
    tsa.spans.default: spans_aten,
    tsa.padded_attention.default: padded_attention_aten,
}


def lower_program(program: ExportedProgram, form: Form | None = "aten") -> ExportedProgram:
    """A new program without tsa ops; with None, the same graph in operators of the ATen dialect and tsa ops alone.

    Raises:
        ConfigError: there is no such form, or a step names an attention kernel that is not part of this package.
        RewriteError: the result would hold for a part of the lengths only.
    """
    if form is None:
        return program.run_decompositions({})
    if form not in FORMS:
        raise ConfigError(f"lower={form!r} is not allowed: lower must be one of {', '.join(map(repr, FORMS))}, or None")
    for node in program.graph.nodes:
        if node.target is tsa.attend.default and node.args[5] not in _BUILT_IN:
            raise ConfigError(
                f"kernel={node.args[5]!r} cannot be lowered at {node.name!r}: it is called through Python, which the "
                f"exported program does without; use one of {', '.join(map(repr, _BUILT_IN))}, or lower=None"
            )
    mode = fake_mode(program.graph)
    environment = None if mode is None else mode.shape_env
    if environment is None:
        return program.run_decompositions(_ATEN)
    # A guard on a symbol also narrows its range, by which the guard would then always hold.
    known_guards, ranges = len(environment.guards), dict(environment.var_to_range)
    lowered = program.run_decompositions(_ATEN)
    _check_guards(environment.guards[known_guards:], ranges)
    return lowered


def is_lowered(program: ExportedProgram) -> bool:
    """Whether a program has no tsa ops, and so needs none of this package to run."""
    return not any(str(node.target).startswith("tsa.") for node in program.graph.nodes)


def _check_guards(guards: list[ShapeGuard], ranges: dict[Any, Any]) -> None:
    """What tracing an ATen form asked about the sizes must be so for all of them: nobody would look again.

    Raises:
        RewriteError: an answer holds for the example's length and cannot be shown to hold for every other one.
    """
    for guard in guards:
        found = bound_sympy(guard.expr, ranges)
        if found.lower is not sympy.true:
            raise RewriteError(
                f"the lowered program would hold for some lengths alone, those with {guard.expr}; raise the shortest of "
                "dynamic_lengths to at least the window, below which nothing is dropped"
            )
