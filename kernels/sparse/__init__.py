"""Block-sparse attention over the compressed rows: a selector says which blocks, blocks.py computes them.

Or which diagonals and columns: these vertical_slash.py computes.

    kernel              selector                          options and their defaults
    "flashprefill"      flashprefill.flashprefill_lists   alpha 0.1, sinks 2, window 4, last 2
    "xattention"        xattention.xattention_lists       stride 16, mass 0.9
    "flexprefill"       flexprefill.flexprefill_lists     gamma 0.95, tau 0.1, min_budget 1024
    "minference"        minference.minference_lists       vertical 1000, slash 6096, or numbers for each head; a_shape None
    "a_shape"           minference.a_shape_lists          sinks 128, window 3968, or numbers for each head

Importing this package registers them as attention kernels, behind all others, so that they run only where they are named:
`TSAConfig(kernel="xattention")`. The selector sees the compressed rows, reads their number on the device, and chooses among
the blocks before it. As `dense_kernel` it sees all rows, which is the method alone.

Variants are registered under names of their own, and so is any function that makes lists:

    block_sparse("flashprefill-0.02", flashprefill_lists, alpha=0.02)

    def every_fourth(query, key, scale, count):  # blocks of 128 rows: those a multiple of four before each query block
        blocks = torch.arange(-(-query.shape[2] // 128), device=query.device)
        mask = (blocks % 4 == 0) & (blocks <= blocks[:, None])
        return lists_of(mask.expand(*query.shape[:2], -1, -1))

    block_sparse("fourth", every_fourth)

What selectors leave out is gone: unlike the other kernels, these do not compute causal attention over all rows. Their
log-sum-exp is that of the keys that they looked at. So under a floor (floor.py) a selected row sees, of the selected tokens,
those that the kernel looked at, and of the others its neighbourhood.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tsa_compile.errors import KernelError
from tsa_compile.kernels import flash
from tsa_compile.kernels.registry import AttentionKernel, KernelRequest, register
from tsa_compile.kernels.sparse.blocks import block_sparse_attention
from tsa_compile.kernels.sparse.flashprefill import flashprefill_lists
from tsa_compile.kernels.sparse.flexprefill import flexprefill_lists
from tsa_compile.kernels.sparse.lists import Lists, Selector, density, lists_of
from tsa_compile.kernels.sparse.minference import a_shape_lists, minference_lists
from tsa_compile.kernels.sparse.vertical_slash import VerticalSlash, vertical_slash_attention
from tsa_compile.kernels.sparse.xattention import stride_fault, xattention_lists

PRIORITY = -20
MAX_HEAD_DIM = 256
"""Selectors hold 128 rows at once, four times as many as fit with heads of 512."""
STREAM_BYTES = 2**32
"""So many bytes of rows at a time: a selector's small launches take as long for few heads. Over 0.675 of 128K tokens,
H = 32, D = 128, MInference's 3500 columns and 100 diagonals take 15.9 ms in four streams, 14.3 in one; XAttention
34.8 and 32.5."""

AnySelector = Selector | Callable[..., VerticalSlash]

__all__ = [
    "Lists",
    "Selector",
    "VerticalSlash",
    "a_shape_lists",
    "block_sparse",
    "density",
    "flashprefill_lists",
    "flexprefill_lists",
    "lists_of",
    "minference_lists",
    "xattention_lists",
]


def block_sparse(name: str, selector: AnySelector, **options: Any) -> AttentionKernel:
    """Registers block-sparse attention over what a selector chooses.

    selector: `(query [B,H,C,D], key [B,Hk,C,D], scale, count int32 [B] or None, **options) -> (kv_num_blocks, kv_indices)`
        as blocks.py takes them, or a VerticalSlash. It must not synchronise, and query and key behind the count may hold
        anything.

    Raises:
        KernelError: the name is taken, or the selector cannot be called with these options.
    """
    fault = _option_fault(selector, options)
    if fault is not None:
        raise KernelError(f"cannot register attention kernel {name!r}: {fault}")
    chosen = functools.partial(selector, **options)
    run, run_lse = functools.partial(run_blocks, selector=chosen), functools.partial(run_blocks_lse, selector=chosen)
    return register(
        AttentionKernel(
            name, run, _supports, PRIORITY,
            device_count=True, round_rows=_whole_groups, exact=False, stream_bytes=STREAM_BYTES, run_lse=run_lse,
        )
    )  # fmt: skip


def _option_fault(selector: object, options: dict[str, Any]) -> str | None:
    """Why a selector could not be called with its options; None if it could."""
    if not callable(selector):
        return f"the selector is a {type(selector).__name__}: pass a function of query, key, scale, count and its options"
    try:
        signature = inspect.signature(selector)
    except ValueError:  # of a function that is written in C
        return None
    try:
        signature.bind(None, None, 1.0, None, **options)
    except TypeError as error:
        given = ", ".join(["query", "key", "scale", "count", *(f"{name}={value!r}" for name, value in options.items())])
        known = ", ".join(list(signature.parameters)[4:]) or "no options"
        who = getattr(selector, "__name__", type(selector).__name__)
        return f"{who} cannot be called with {given} ({error}): it takes {known}"
    return stride_fault(**options) if selector is xattention_lists else None


def run_blocks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, count: Tensor | None = None, *,
    selector: AnySelector, lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Chooses blocks, or diagonals and columns, and computes them.

    lse: where to write the log-sum-exp over what each row saw, float32 [B, H, C], contiguous.
    """
    lists = selector(query, key, scale, count)
    attention = vertical_slash_attention if isinstance(lists, VerticalSlash) else block_sparse_attention
    return attention(query, key, value, scale, *lists, count, lse=lse)


def run_blocks_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float, count: Tensor | None = None, *, selector: AnySelector
) -> tuple[Tensor, Tensor]:
    """As `run_blocks`, with the log-sum-exp over what each row saw: float32 [B, H, C]."""
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return run_blocks(query, key, value, scale, count, selector=selector, lse=lse), lse


def _whole_groups(rows: int) -> int:
    """XAttention reads the heads' rows by TMA where each has whole groups of 16; the others do not mind."""
    return -(-rows // 16) * 16


def _supports(request: KernelRequest) -> str | None:
    """On CUDA what the Triton kernels take, with heads that fit their larger tiles; on the CPU everything."""
    if request.device_type == "cpu":
        return None
    if max(request.head_dim, request.value_head_dim) > MAX_HEAD_DIM:
        return f"takes heads of at most {MAX_HEAD_DIM}, not {request.head_dim} and {request.value_head_dim}"
    return flash.supports(request)


block_sparse("flashprefill", flashprefill_lists)
block_sparse("xattention", xattention_lists)
block_sparse("flexprefill", flexprefill_lists)
block_sparse("minference", minference_lists)
block_sparse("a_shape", a_shape_lists)
