"""What the ops' ATen forms are written in: one form an op for the CPU, AOTInductor, ONNX and TensorRT.

An ATen form is traceable with symbolic batch and length, and nothing in it becomes a TopK, a sort, a NonZero, an unfold, a
bit operation or a shape that depends on data. TensorRT 10 and 11 set the limits (their ONNX parser's operators.md): TopK
takes k < 3840, CumSum and Clip floating point alone, pooling two dimensions or three. Every scatter has distinct targets:
what must not be written goes to places of its own behind the part that is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def running_count(flags: Tensor) -> Tensor:
    """How many flags of the last dimension are set up to and with each: int64.

    TensorRT cumulates floats alone; float32 is exact up to 2^24 tokens.
    """
    return flags.to(torch.float32).cumsum(dim=-1).to(torch.int64)


def keys_before(query: Tensor, key: Tensor) -> int:
    """How many of the keys [B, G, L, D] lie before the first query [B, H, Lq, D]; 0 where a trace knows that none does."""
    return 0 if statically_known_true(query.shape[2] == key.shape[2]) else key.shape[2] - query.shape[2]


def at_least(numbers: Tensor, least: int) -> Tensor:
    """The larger of integers and `least`: clamp would be ONNX's Clip, which TensorRT has for floating point alone."""
    return torch.maximum(numbers, torch.full_like(numbers, least))


def positions_by_slot(padding: Tensor, slots: Tensor, size: int) -> Tensor:
    """Position of the valid token that has slot s, 0 where none has: [B,L] -> int64 [B,size]. Slots are distinct."""
    batch, seq_len = padding.shape
    positions = torch.arange(seq_len, device=padding.device).expand(batch, seq_len)
    targets = torch.where(padding & (slots >= 0), slots, positions + size)
    found = torch.zeros((batch, size + seq_len), dtype=torch.int64, device=padding.device)
    return found.scatter(1, targets, positions)[:, :size]


def slots_below(count: Tensor, capacity: int) -> Tensor:
    """The slots that are real: bool [B, 1, C]."""
    return (torch.arange(capacity, dtype=torch.int32, device=count.device) < count[:, None])[:, None]


def repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, Hs, ...] -> [B, H, ...], each for its H // Hs heads; a trace learns nothing about sizes, as with a view."""
    share = heads // tensor.shape[1]
    return tensor if share == 1 else tensor.index_select(1, torch.arange(heads, device=tensor.device) // share)


def torch_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Torch's attention, whose key heads may be fewer: causal over as many queries as keys, or under a mask."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def take_rows(source: Tensor, rows: Tensor) -> Tensor:
    """Source [B, G, L, D] of any strides, rows [B, H, C] -> [B, H, C, D], head h from h // (H / G), nothing repeated."""
    batch, heads, _ = rows.shape
    items = torch.arange(batch, device=source.device)[:, None, None]
    source_heads = (torch.arange(heads, device=source.device) // (heads // source.shape[1]))[None, :, None]
    return source[items, source_heads, rows.to(torch.int64)]


def as_rows(output: Tensor) -> Tensor:
    """[B, H, L, Dv] in the memory layout [B, L, H, Dv]: no copy where it has that already."""
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def whole_blocks(count: Tensor | None, block: int, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Tensors [B, *, C, D] with as many rows as whole blocks have, zeros from the count on.

    Returns:
        Which rows are none, bool [B or 1, Q * block], and the tensors.
    """
    capacity, device = tensors[0].shape[2], tensors[0].device
    rows = torch.arange(-(-capacity // block) * block, device=device)
    none = rows >= (rows.new_tensor([capacity]) if count is None else count.clamp(max=capacity))[:, None]
    longer = (F.pad(tensor, (0, 0, 0, len(rows) - capacity)) for tensor in tensors)
    return none, [tensor.masked_fill(none[:, None, :, None], 0) for tensor in longer]


def block_means_aten(rows: Tensor, none: Tensor, block: int) -> Tensor:
    """The mean of each block's rows, [B, *, Q * block, D] -> [B, *, Q, D]; 0 where there is no row."""
    members = (~none).unflatten(1, (-1, block)).sum(dim=2).clamp(min=1)
    return rows.unflatten(2, (-1, block)).sum(dim=3) / members[:, None, :, None]
