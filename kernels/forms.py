"""What stands for each op where a graph is opened: one table for each form.

    "aten"       ATen operators: AOTInductor packages for CPUs
    "standard"   the same without a sort: what ONNX exports in standard operators and TensorRT engines are made of
    "triton"     triton_ops around our launchers, which AOTInductor compiles into a package for CUDA; ATen for the rest

    torch.ops.tsa_triton.<op>(...) = torch.ops.tsa.<op>(...)       same arguments, shapes, dtypes and strides

Functions of an op's arguments by its handle, as `ExportedProgram.run_decompositions` takes them. The ops themselves are
opaque to a compiler, and so need Python when they run. A triton_op is a plain function of tensors and launches
(`_triton.launch` hands a launch to whoever traces it). It may decide nothing by a length, which is symbolic while it is
traced, and read nothing on the host. Therefore, in "triton":

- select splits every row unless all lengths of the range are short;
- attend takes a count from the device, by the kernel of flash.py, without TMA, whose descriptors hold addresses; with count
  None (KeepRatio without padding) it is SDPA, by the fastest kernel that torch has;
- padded dense attention is causal attention over the valid tokens, moved together: no L x L mask, and zeros where the other
  op computes what pad tokens see. Over a window positions count, so with padding that is ATen's form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tsa_compile.errors import KernelError
from tsa_compile.kernels.attend import attend_aten, attend_lse_aten
from tsa_compile.kernels.attend_floor import attend_floor_aten
from tsa_compile.kernels.budget import budget_aten, budget_cuda
from tsa_compile.kernels.cached import cached_attention_aten
from tsa_compile.kernels.compress import compress_aten, compress_triton
from tsa_compile.kernels.decompress import decompress_aten, decompress_triton
from tsa_compile.kernels.filled import filled_aten, filled_attention_aten
from tsa_compile.kernels.flash import flash_triton
from tsa_compile.kernels.floor import merge_floor_aten, merge_floor_triton, near_triton, valid_first
from tsa_compile.kernels.padded import padded_attention_aten, valid_ranges_aten
from tsa_compile.kernels.registry import get
from tsa_compile.kernels.score import score_aten, score_cuda
from tsa_compile.kernels.select import select_by_bisection, select_by_sorting, select_triton
from tsa_compile.kernels.sink import with_sink
from tsa_compile.kernels.sliding import padded_sliding_attention_aten, sliding_attention_aten

CAUSAL_KERNELS = ("auto", "sdpa", "flash", "cudnn", "triton")
"""The attention kernels that every form of attend stands for: those of this package, which compute causal attention."""

_SHORT = 8192


def why_not(kernel: str) -> str | None:
    """Why plain causal attention does not stand for an attention kernel; None where it does."""
    if kernel in CAUSAL_KERNELS:
        return None
    try:
        return "it is no part of this package" if get(kernel).exact else "it leaves attention out, as its selector says"
    except KernelError:
        return "it is not registered here"


def _select(scores: Tensor, count: Tensor | None, capacity: int) -> Tensor:
    short = _SHORT if statically_known_true(scores.shape[2] <= _SHORT) else 0
    return select_triton(scores, count, capacity, short=short)


def _flash(query: Tensor, key: Tensor, value: Tensor, count: Tensor, scale: float, kernel: str) -> Tensor:
    return flash_triton(query, key, value, scale, count)


def _flash_lse(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return flash_triton(query, key, value, scale, count, lse=lse), lse


def _sliding(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, sink_logits: Tensor | None = None
) -> Tensor:
    return near_triton(query, key, value, scale, min(window, 2**31 - 1), sink_logits)  # kernels count in 32 bits


_LAUNCHERS: dict[str, Callable[..., Any]] = {
    "score": score_cuda,
    "budget": budget_cuda,
    "select": _select,
    "compress": compress_triton,
    "attend": _flash,
    "attend_lse": _flash_lse,
    "decompress": decompress_triton,
    "merge_floor": merge_floor_triton,
    "sliding_attention": _sliding,
}
for _name, _launcher in _LAUNCHERS.items():  # a launcher may have further parameters, which a graph leaves out
    torch.library.triton_op(f"tsa_triton::{_name}", _launcher, mutates_args={})

tsa, _triton = torch.ops.tsa, torch.ops.tsa_triton


def _attend(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if sink_logits is not None:
        out, lse = _triton.attend_lse.default(query, key, value, count, scale, kernel)
        return with_sink(out, lse, sink_logits)
    if count is None:
        return attend_aten(query, key, value, None, scale, kernel)
    return _triton.attend.default(query, key, value, count, scale, kernel)


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, valid_ranges: Tensor | None, scale: float, mean_rows: bool,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As tsa::padded_attention at valid tokens; zero at pad tokens. Queries behind a cache have no such form."""
    if not statically_known_true(query.shape[2] == key.shape[2]):
        return padded_attention_aten(query, key, value, padding, valid_ranges, scale, mean_rows, sink_logits)
    batch, seq_len = padding.shape
    order, count = valid_first(padding)
    indices = order[:, None].expand(batch, key.shape[1], seq_len).contiguous()
    rows = _triton.compress.default(query, key, value, indices, count)
    out = _attend(rows[0], rows[1], rows[2], count, scale, "triton", sink_logits)
    return _triton.decompress.default(out, indices, count, seq_len)


Table = dict[Any, Callable[..., Any]]

_ATEN: Table = {
    tsa.score.default: score_aten,
    tsa.budget.default: budget_aten,
    tsa.select.default: select_by_sorting,
    tsa.compress.default: compress_aten,
    tsa.attend.default: attend_aten,
    tsa.attend_lse.default: attend_lse_aten,
    tsa.decompress.default: decompress_aten,
    tsa.merge_floor.default: merge_floor_aten,
    tsa.attend_floor.default: attend_floor_aten,
    tsa.valid_ranges.default: valid_ranges_aten,
    tsa.cached_attention.default: cached_attention_aten,
    tsa.filled.default: filled_aten,
    tsa.filled_attention.default: filled_attention_aten,
    tsa.padded_attention.default: padded_attention_aten,
    tsa.sliding_attention.default: sliding_attention_aten,
    tsa.padded_sliding_attention.default: padded_sliding_attention_aten,
}

FORMS: dict[str, Table] = {
    "aten": _ATEN,
    "standard": {**_ATEN, tsa.select.default: select_by_bisection},
    "triton": {
        **_ATEN,
        **{getattr(tsa, name).default: getattr(_triton, name).default for name in _LAUNCHERS},
        tsa.attend.default: _attend,
        tsa.padded_attention.default: _padded_attention,
    },
}
