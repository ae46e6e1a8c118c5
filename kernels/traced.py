"""The ops as triton_ops, which compilers look into: what a CUDA package without Python is made of.

    torch.ops.tsa_triton.<op>(...) = torch.ops.tsa.<op>(...)       for every op in OPS, same shapes, dtypes and strides

The ops of the other files are opaque to a compiler, and so need Python when they run. These are plain functions of tensors
and launches (`launch` hands a launch to whoever traces it), which AOTInductor compiles into the package. They may
decide nothing by a length, which is symbolic while they are traced, and read nothing on the host. Therefore:

- select splits every row unless all lengths of the range are short;
- attend takes a count from the device, by the kernel of flash.py, without TMA, whose descriptors hold addresses; with count
  None (KeepRatio without padding) it is SDPA, by the fastest kernel that torch has;
- padded dense attention is causal attention over the valid tokens, moved together: no L x L mask, and zeros where the other
  op computes what pad tokens see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tsa_compile.kernels.attend import attend_aten
from tsa_compile.kernels.budget import budget_cuda
from tsa_compile.kernels.compress import compress_triton
from tsa_compile.kernels.decompress import decompress_triton
from tsa_compile.kernels.flash import flash_triton
from tsa_compile.kernels.score import score_cuda
from tsa_compile.kernels.select import select_triton

_SHORT = 8192


@torch.library.triton_op("tsa_triton::score", mutates_args={})
def score(query: Tensor, key: Tensor, padding: Tensor | None, scale: float, window: int, pool: int) -> Tensor:
    """As tsa::score."""
    return score_cuda(query, key, padding, scale, window, pool)


@torch.library.triton_op("tsa_triton::budget", mutates_args={})
def budget(scores: Tensor, coverage: float | None, keep_ratio: float | None, min_tokens: int) -> Tensor:
    """As tsa::budget."""
    return budget_cuda(scores, coverage, keep_ratio, min_tokens)


@torch.library.triton_op("tsa_triton::select", mutates_args={})
def select(scores: Tensor, count: Tensor | None, capacity: int) -> Tensor:
    """As tsa::select."""
    short = _SHORT if statically_known_true(scores.shape[2] <= _SHORT) else 0
    return select_triton(scores, count, capacity, short=short)


@torch.library.triton_op("tsa_triton::compress", mutates_args={})
def compress(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As tsa::compress."""
    return compress_triton(query, key, value, indices, count)


@torch.library.triton_op("tsa_triton::attend", mutates_args={})
def attend(query: Tensor, key: Tensor, value: Tensor, count: Tensor, scale: float) -> Tensor:
    """As tsa::attend with a count, which stays on the device; rows behind it are unspecified."""
    return flash_triton(query, key, value, scale, count)


@torch.library.triton_op("tsa_triton::decompress", mutates_args={})
def decompress(compressed: Tensor, indices: Tensor, count: Tensor | None, seq_len: int) -> Tensor:
    """As tsa::decompress."""
    return decompress_triton(compressed, indices, count, seq_len)


def _attend(query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str) -> Tensor:
    if count is None:
        return attend_aten(query, key, value, None, scale)
    return ops.attend.default(query, key, value, count, scale)


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, spans: Tensor | None, scale: float, mean_rows: bool
) -> Tensor:
    """As tsa::padded_attention at valid tokens; zero at pad tokens."""
    batch, seq_len = padding.shape
    order = (~padding).to(torch.uint8).sort(dim=1, stable=True).indices.to(torch.int32)  # valid tokens first, as they are
    indices = order[:, None].expand(batch, key.shape[1], seq_len).contiguous()
    count = padding.sum(dim=1, dtype=torch.int32)
    rows = ops.compress.default(query, key, value, indices, count)
    return ops.decompress.default(ops.attend.default(*rows, count, scale), indices, count, seq_len)


ops = torch.ops.tsa_triton
OPS: dict[str, Callable[..., Any]] = {
    "score": ops.score.default,
    "budget": ops.budget.default,
    "select": ops.select.default,
    "compress": ops.compress.default,
    "attend": _attend,
    "decompress": ops.decompress.default,
    "padded_attention": padded_attention,
}
