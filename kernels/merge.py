"""Attention over two sets of keys from that over each of them, by their log-sum-exp, in the place of the first.

    out = (exp(l) o + exp(l') o') / (exp(l) + exp(l'))          lse = log(exp(l) + exp(l'))

    o, o' [B, H, R, Dv] of any strides but for the last, 1; l, l' float32 [B, H, R], contiguous, natural logarithms
    ->  o and l, overwritten

A pass over the rows: 3 B H R Dv elements move. At H = 32, R = 8K, Dv = 128, bfloat16: 192 MiB, 0.05 ms at 4 TB/s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsa_compile.kernels.launch import HAS_TRITON, cdiv, launch, tl, triton
from tsa_compile.kernels.tiles import at_head, block_dim, gather_rows, row_alignment, row_strides, stride_names

_ROWS = 64


@triton.jit(do_not_specialize=[*stride_names("on"), "rows"])
def _merge_kernel(
    p_out, p_other, p_lse, p_other_lse, stride_ob, stride_oh, stride_ol, stride_nb, stride_nh, stride_nl, rows,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows of a head."""
    head, item = tl.program_id(1), tl.program_id(2)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_real = at < rows
    line = (item.to(tl.int64) * tl.num_programs(1) + head) * rows
    b_lse = tl.load(p_lse + line + at, mask=b_real, other=0.0)
    b_other_lse = tl.load(p_other_lse + line + at, mask=b_real, other=0.0)
    b_share = 1.0 / (1.0 + tl.exp(b_lse - b_other_lse))
    b_more = tl.abs(b_lse - b_other_lse)
    tl.store(p_lse + line + at, tl.maximum(b_lse, b_other_lse) + tl.log(1.0 + tl.exp(-b_more)), mask=b_real)
    p_out = at_head(p_out, stride_ob, stride_oh, item, head, ALIGN)
    p_other = at_head(p_other, stride_nb, stride_nh, item, head, ALIGN)
    b_out = gather_rows(p_out, at.to(tl.int64) * stride_ol * ALIGN, b_real, 0, DIM, BLOCK_D).to(tl.float32)
    b_other = gather_rows(p_other, at.to(tl.int64) * stride_nl * ALIGN, b_real, 0, DIM, BLOCK_D).to(tl.float32)
    b_out += b_share[:, None] * (b_other - b_out)
    dims = tl.arange(0, BLOCK_D)
    pointers = p_out + (at.to(tl.int64) * stride_ol * ALIGN)[:, None] + dims[None, :]
    tl.store(pointers, b_out.to(p_out.dtype.element_ty), mask=b_real[:, None] & (dims < DIM)[None, :])


def merge_triton(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Launches the kernel; also runs on CPU tensors in the Triton interpreter. `out` and `lse` are overwritten."""
    batch, heads, rows, dim = out.shape
    align = row_alignment(out, other)
    launch(
        _merge_kernel,
        (cdiv(rows, _ROWS), heads, batch),
        (out, other, lse, other_lse.contiguous()),
        (*row_strides(align, out, other), rows),
        DIM=dim,
        BLOCK_D=block_dim(dim),
        ALIGN=align,
        BLOCK=_ROWS,
        num_warps=4,
    )
    return out, lse


def merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Both merged; the first pair may be overwritten."""
    if out.is_cuda and HAS_TRITON and out.stride(-1) == other.stride(-1) == 1 and lse.is_contiguous():
        with torch.cuda.device_of(out):
            return merge_triton(out, lse, other, other_lse)
    share = torch.sigmoid(other_lse - lse)[..., None]
    return torch.lerp(out.float(), other.float(), share).to(out.dtype), torch.logaddexp(lse, other_lse)
