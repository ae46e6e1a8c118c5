"""Torch's own attention as attention kernels: cuDNN's, FlashAttention-2 and whatever SDPA takes.

    run(query [B, H, C, D], key [B, Hk, C, D], value [B, Hk, C, Dv], scale) -> causal attention over all rows, [B, H, C, Dv]

torch is asked which of them fits a request, because this differs between versions and devices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.backends import cuda as cuda_backends
from torch.nn.attention import SDPBackend, sdpa_kernel

from tsa_compile.kernels._aten import torch_attention
from tsa_compile.kernels.flash import run_behind
from tsa_compile.kernels.interface import MAX_HEAD_DIM, AttentionKernel, KernelRequest
from tsa_compile.kernels.launch import HAS_TRITON
from tsa_compile.kernels.merge import merged
from tsa_compile.kernels.tiles import rows_contiguous

PRIORITY = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""Torch's kernels, the fastest on Hopper first; later ones are what single calls fall back to."""

_ROWS = 512
"""How many rows of logits are written out at a time."""
_FUSED_HEAD_DIM = 256
"""The widest heads that torch's fast kernels take."""
_CUDNN_ROWS = 128
"""Below, SDPA is asked which kernel takes the rows: cuDNN takes no single one."""


def fastest_first(backends: Sequence[SDPBackend] = PRIORITY) -> AbstractContextManager[Any]:
    """Inside, a call of SDPA runs, or is traced, as the first of these kernels that takes its tensors."""
    return sdpa_kernel(list(backends), set_priority=True)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, backends: tuple[SDPBackend, ...]) -> Tensor:
    """Causal SDPA by the first of `backends` that takes these very tensors."""
    with fastest_first(backends):
        return torch_attention(query, key, value, scale)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal cuDNN attention: its operator itself where it surely fits, as `sdpa_kernel` costs the host 30 to 60 us.

    The operator wants dense rows; SDPA would take another kernel for others.
    """
    if query.shape[2] < _CUDNN_ROWS or query.shape[1] != key.shape[1] or not query.is_cuda:
        return _sdpa(query, key, value, scale, PRIORITY)
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    rows = map(rows_contiguous, (query, key, value))
    return attention(*rows, None, False, 0.0, True, False, scale=scale)[0]


def _cudnn_lse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """With the log-sum-exp, which cuDNN's operator gives [B, H, rows, 1]."""
    if query.shape[2] < _CUDNN_ROWS or not query.is_cuda:
        return _lse_elsewhere(query, key, value, scale)
    rows = (rows_contiguous(_repeated(tensor, query)) for tensor in (query, key, value))
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    out, lse = attention(*rows, None, True, 0.0, True, False, scale=scale)[:2]
    return out, lse.reshape(query.shape[:3])


def _flash_lse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """With the log-sum-exp, from FlashAttention-2's operator, which takes heads of a multiple of 8 alone.

    It aligns causality lower right where queries are fewer than keys.
    """
    if not query.is_cuda or query.shape[3] % 8 != 0 or query.shape[3] != value.shape[3]:
        return _lse_elsewhere(query, key, value, scale)
    rows = (rows_contiguous(_repeated(tensor, query)) for tensor in (query, key, value))
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    out, lse = attention(*rows, 0.0, True, False, scale=scale)[:2]
    return out, lse[:, :, : query.shape[2]]


def _lse_elsewhere(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What torch's operators do not take: by our kernel (8K rows behind 64 keys: 1.1 ms; 35 by products), or on CPUs."""
    compute = run_behind if query.is_cuda and HAS_TRITON else written_out_lse
    return compute(query, key, value, scale)


def written_out_lse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention and its log-sum-exp by products, some rows at a time: for CPUs, and float32 on GPUs.

    Queries may be fewer than keys, and are the last ones then.
    """
    wide, rows = torch.promote_types(query.dtype, torch.float32), query.shape[2]
    past = key.shape[2] - rows
    key, value = (_repeated(tensor, query).to(wide) for tensor in (key, value))
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=wide)
    for first in range(0, rows, _ROWS):
        last = min(first + _ROWS, rows)
        logits = scale * query[:, :, first:last].to(wide) @ key[:, :, : past + last].mT
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(past + first + 1), float("-inf"))
        lse[:, :, first:last] = logits.logsumexp(-1)
        out[:, :, first:last] = (logits.softmax(-1) @ value[:, :, : past + last]).to(out.dtype)
    return out, lse.float()


def _cudnn_behind(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Two calls, over the keys before the queries and among the queries, merged; cuDNN takes no few rows, nor 0 keys."""
    past = key.shape[2] - query.shape[2]
    if min(past, query.shape[2]) < _CUDNN_ROWS or not query.is_cuda:
        return _lse_elsewhere(query, key, value, scale)
    own = _cudnn_lse(query, key[:, :, past:], value[:, :, past:], scale)
    group = query.shape[1] // key.shape[1]
    rows = query.unflatten(1, (-1, group)).flatten(2, 3)  # without causality a group's heads are further rows
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    operands = map(rows_contiguous, (rows, key[:, :, :past], value[:, :, :past]))
    out, lse = attention(*operands, None, True, 0.0, False, False, scale=scale)[:2]
    out, lse = (part.unflatten(2, (group, -1)).flatten(1, 2) for part in (out, lse.reshape(rows.shape[:3])))
    return merged(*own, out, lse)


def _repeated(tensor: Tensor, query: Tensor) -> Tensor:
    """Key or value with as many heads as the query."""
    group = query.shape[1] // tensor.shape[1]
    return tensor if group == 1 else tensor.repeat_interleave(group, 1)


def _run_plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if query.is_cuda:
        # Of the kernels left on CUDA only the one that builds L x L shares key heads: repeating them costs less.
        key, value = _repeated(key, query), _repeated(value, query)
    return torch_attention(query, key, value, scale)


@functools.lru_cache(maxsize=256)
def _refusal(backend: SDPBackend, request: KernelRequest) -> str | None:
    """Why torch's SDPA backend cannot take a request."""
    if request.device_type != "cuda":
        return f"runs on CUDA devices only, not on {request.device_type}"
    ask = {
        SDPBackend.CUDNN_ATTENTION: cuda_backends.can_use_cudnn_attention,
        SDPBackend.FLASH_ATTENTION: cuda_backends.can_use_flash_attention,
    }[backend]
    # Compilers ask while they trace, under a fake mode in which nothing real could be allocated.
    with unset_fake_temporarily(), sdpa_kernel(backend):
        query, key, value = (
            torch.empty(1, heads, 256, size, dtype=request.dtype, device="cuda")
            for heads, size in (
                (request.heads, request.head_dim),
                (request.kv_heads, request.head_dim),
                (request.kv_heads, request.value_head_dim),
            )
        )
        gqa = request.heads != request.kv_heads
        fits = ask(cuda_backends.SDPAParams(query, key, value, None, 0.0, True, gqa))
    return None if fits else f"torch {torch.__version__} refuses it ({ask.__name__})"


def _plain_refusal(request: KernelRequest) -> str | None:
    """What is left of torch's for wider heads in half precision takes several times what flash.py does."""
    half = request.device_type == "cuda" and request.dtype in (torch.float16, torch.bfloat16) and HAS_TRITON
    widest = max(request.head_dim, request.value_head_dim)
    if half and _FUSED_HEAD_DIM < widest <= MAX_HEAD_DIM:
        return f"torch has no fast kernel for heads of {widest}: kernel='triton' has"
    return None


def plan_rows(rows: int) -> int:
    """At most 1/32 more rows, from a grid of few: cuDNN builds a plan of tens of milliseconds for every new shape."""
    step = max(256, (1 << (rows - 1).bit_length()) // 64)
    return -(-rows // step) * step


CUDNN = AttentionKernel(
    "cudnn",
    run=_cudnn,
    run_lse=_cudnn_lse,
    run_behind=_cudnn_behind,
    supports=functools.partial(_refusal, SDPBackend.CUDNN_ATTENTION),
    priority=30,
    round_rows=plan_rows,
)
FLASH = AttentionKernel(
    "flash",
    run=functools.partial(_sdpa, backends=PRIORITY[1:]),
    run_lse=_flash_lse,
    run_behind=_flash_lse,
    supports=functools.partial(_refusal, SDPBackend.FLASH_ATTENTION),
    priority=20,
)
SDPA = AttentionKernel(
    "sdpa",
    run=_run_plain,
    run_lse=written_out_lse,
    run_behind=written_out_lse,
    supports=_plain_refusal,
    priority=0,
)
