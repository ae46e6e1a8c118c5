"""Attention over compressed rows whose number lies on the device: the candidates for `attend` in a CUDA graph.

query, key, value [1, H, C, D], a key head for every query head, count int32 [1] on the device; rows from count on are
filler, zeros first and then NaN, as `compress` leaves them at worst. Only rows before count are looked at. cuDNN, which is
called with the count from the host, is what the others are held against.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from attention_methods import BLOCK, Inputs, Shape, block_indices, causal_blocks, compiled_flex, tsa
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tsa_compile.kernels.compress import FILLER_ROWS

Call = Callable[[], Tensor]


def make_rows(shape: Shape, count: int, capacity: int, device: str = "cuda") -> Inputs:
    """Random rows, and filler."""
    size = (shape.batch, shape.heads, capacity, shape.head_dim)
    rows = [torch.randn(size, device=device, dtype=shape.dtype) for _ in range(3)]
    for tensor in rows:
        tensor[:, :, count : count + FILLER_ROWS] = 0
        tensor[:, :, count + FILLER_ROWS :] = torch.nan
    return Inputs(*rows, shape.head_dim**-0.5)


def cudnn(rows: Inputs, count: Tensor) -> Call:
    """On exactly count rows."""
    host = int(count)
    query, key, value = (tensor[:, :, :host] for tensor in rows.tensors)

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=rows.scale)

    return call


def package(rows: Inputs, count: Tensor) -> Call:
    """This package's kernel that reads the count on the device."""
    return lambda: tsa.attend(*rows.tensors, count, rows.scale, "triton")


def flex_cut(rows: Inputs, count: Tensor) -> Call:
    """FlexAttention with block lists that end at the count, made anew in every call."""
    indices = block_indices(rows.length, count.device)

    def call() -> Tensor:
        mask = causal_blocks(rows.length, indices, count)
        return compiled_flex()(*rows.tensors, block_mask=mask, scale=rows.scale, kernel_options={"USE_TMA": True})

    assert rows.length % BLOCK == 0
    return call


def flash_varlen(rows: Inputs, count: Tensor) -> Call:
    """FlashAttention-2 over sequences of different length: every head is two, its rows and, without keys, its filler."""
    query, key, value = rows.tensors
    heads, capacity = query.shape[1], query.shape[2]
    starts = torch.arange(heads, dtype=torch.int32, device=count.device) * capacity
    end = torch.full_like(count, heads * capacity)

    def call() -> Tensor:
        bounds = torch.cat([torch.stack([starts, starts + count], dim=1).flatten(), end])
        keys = torch.stack([count.expand(heads), torch.zeros_like(starts)], dim=1).flatten()
        out = torch.ops.aten._flash_attention_forward(
            *(tensor.view(heads * capacity, 1, -1) for tensor in (query, key, value)), bounds, bounds, capacity, capacity,
            0.0, True, False, scale=rows.scale, seqused_k=keys,
        )[0]  # fmt: skip
        return out.view(1, heads, capacity, -1)

    return call


KERNELS: dict[str, Callable[[Inputs, Tensor], Call]] = {
    "cuDNN, count from the host": cudnn,
    'kernel="triton"': package,
    "FlexAttention (TMA), block lists cut": flex_cut,
    "FlashAttention-2 varlen": flash_varlen,
}
