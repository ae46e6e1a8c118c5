"""The plugins around the rows of selected tokens: gather, attention, scatter.

    tsa_trt::compress_...    (query, key, value, indices, count) -> (query_rows, key_rows, value_rows)
    tsa_trt::attend_...      (query_rows, key_rows, value_rows, count) -> rows, where there is a count
    tsa_trt::decompress_...  (rows, indices, count, positions) -> output [B, L, H, Dv]

Without a count every row is real, and attention is TensorRT's own; with one, this kernel does not compute the rows behind
it. What a plugin may be: _trt_describe.py.
"""

# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsa_compile.errors import KernelError
from tsa_compile.export._trt_describe import NAMESPACE, Axis, Plugin, alignment, kind_of, power_of_2, signature
from tsa_compile.kernels.attend import attend
from tsa_compile.kernels.compress import _compress_kernel, block_rows, compress
from tsa_compile.kernels.decompress import _decompress_kernel, decompress
from tsa_compile.kernels.flash import MAX_HEAD_DIM, _flash_kernel
from tsa_compile.kernels.launch import tl, triton

# TensorRT's attention may read any row, so every filler row is zeroed, not only those that a tile may straddle.
_ALL_FILLER = tl.constexpr(2**30)


@triton.jit(do_not_specialize=["seq_len", "capacity"])
def _compress_plugin(
    p_query, p_key, p_value, p_indices, p_count, seq_len, capacity, p_query_rows, p_key_rows, p_value_rows,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SELECTIONS: tl.constexpr, DIM: tl.constexpr, DIM_POW2: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_DIM_POW2: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """_compress_kernel on dense tensors."""
    head, value_head = seq_len.to(tl.int64) * (DIM // ALIGN), seq_len.to(tl.int64) * (VALUE_DIM // ALIGN)
    _compress_kernel(
        p_query, p_key, p_value, p_indices, p_count, p_query_rows, p_key_rows, p_value_rows,
        HEADS * head, head, DIM // ALIGN, KV_HEADS * head, head, DIM // ALIGN,
        KV_HEADS * value_head, value_head, VALUE_DIM // ALIGN, SELECTIONS * capacity, capacity, capacity,
        HEADS, HEADS // SELECTIONS, HEADS // KV_HEADS, DIM, DIM_POW2, VALUE_DIM, VALUE_DIM_POW2, ALIGN,
        _ALL_FILLER, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["capacity"])
def _attend_plugin(
    p_query, p_key, p_value, p_count, capacity, p_rows,
    HEADS: tl.constexpr, SELECTIONS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr, SCALE_LOG2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """_flash_kernel on dense tensors, by pointers."""
    head, value_head = capacity.to(tl.int64) * (DIM // ALIGN), capacity.to(tl.int64) * (VALUE_DIM // ALIGN)
    _flash_kernel(
        p_query, p_key, p_value, p_rows, p_count, None, None,
        HEADS * head, head, DIM // ALIGN, SELECTIONS * head, head, DIM // ALIGN,
        SELECTIONS * value_head, value_head, VALUE_DIM // ALIGN, HEADS * value_head, value_head, VALUE_DIM // ALIGN,
        capacity, HEADS // SELECTIONS, SCALE_LOG2, DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, ALIGN, BLOCK_M, BLOCK_N,
        False, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seq_len", "capacity"])
def _decompress_plugin(
    p_rows, p_indices, p_count, p_positions, seq_len, capacity, p_output,
    HEADS: tl.constexpr, SELECTIONS: tl.constexpr, DIM: tl.constexpr, DIM_POW2: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """_decompress_kernel from dense rows into [B, L, H, Dv]; the positions are there for their number alone."""
    head, row = capacity.to(tl.int64) * (DIM // ALIGN), HEADS * (DIM // ALIGN)
    _decompress_kernel(
        p_rows, p_indices, p_count, p_output,
        HEADS * head, head, DIM // ALIGN, seq_len.to(tl.int64) * row, DIM // ALIGN, row,
        SELECTIONS * capacity, capacity, seq_len, capacity,
        HEADS // SELECTIONS, DIM, DIM_POW2, ALIGN, 32, BLOCK,
    )  # fmt: skip


def compress_plugin(
    heads: int, kv_heads: int, selections: int, dim: int, value_dim: int, dtype: torch.dtype
) -> Plugin:  # fmt: skip
    """The gather for one shape of heads; KernelError for a dtype without a kernel."""
    kind = kind_of(dtype)
    align = alignment(dtype, dim, value_dim)
    block = block_rows(max(dim, value_dim), dtype.itemsize)

    def fake(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, capacity = query.shape[0], indices.shape[2]
        rows = indices.shape[:3]
        return (
            query.new_empty(batch, query.shape[1], capacity, query.shape[3]),
            query.new_empty(*rows, key.shape[3]),
            query.new_empty(*rows, value.shape[3]),
        )

    constants = {
        "HEADS": heads, "KV_HEADS": kv_heads, "SELECTIONS": selections, "DIM": dim, "DIM_POW2": power_of_2(dim),
        "VALUE_DIM": value_dim, "VALUE_DIM_POW2": power_of_2(value_dim), "ALIGN": align, "BLOCK": block,
    }  # fmt: skip
    return Plugin(
        f"{NAMESPACE}::compress_h{heads}_g{kv_heads}_s{selections}_d{dim}_v{value_dim}_{kind}",
        "(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor count) -> (Tensor, Tensor, Tensor)",
        _compress_plugin,
        signature(
            (f"*{kind}", "p_query p_key p_value"),
            ("*i32", "p_indices p_count"),
            ("i32", "seq_len capacity"),
            (f"*{kind}", "p_query_rows p_key_rows p_value_rows"),
        ),
        tuple(constants.items()),
        sizes=((0, 2), (3, 2)),
        grid=(heads, Axis((3, 2), block), Axis((0, 0))),
        fake=fake,
        eager=lambda query, key, value, indices, count: compress(query, key, value, indices, count),
    )


def attend_plugin(heads: int, selections: int, dim: int, value_dim: int, dtype: torch.dtype, scale: float) -> Plugin:
    """Causal attention over the rows before the count; KernelError for a dtype, head size or scale without a kernel."""
    kind = kind_of(dtype)
    if max(dim, value_dim) > MAX_HEAD_DIM or not scale > 0:
        raise KernelError(
            f"there is no TensorRT plugin for attention with heads of {dim} and {value_dim} and scale {scale}: heads of at "
            f"most {MAX_HEAD_DIM} and a positive scale are taken"
        )
    # Small enough for MAX_SHARED.
    block_m, block_n = (16, 16) if dtype == torch.float32 else (64, 16 if max(dim, value_dim) > 128 else 32)

    def fake(query: Tensor, key: Tensor, value: Tensor, count: Tensor) -> Tensor:
        return query.new_empty(*query.shape[:3], value.shape[3])

    constants: dict[str, int | float] = {
        "HEADS": heads, "SELECTIONS": selections, "DIM": dim, "BLOCK_D": max(16, power_of_2(dim)), "VALUE_DIM": value_dim,
        "BLOCK_DV": max(16, power_of_2(value_dim)), "ALIGN": alignment(dtype, dim, value_dim),
        "SCALE_LOG2": scale * math.log2(math.e), "BLOCK_M": block_m, "BLOCK_N": block_n,
    }  # fmt: skip
    return Plugin(
        f"{NAMESPACE}::attend_h{heads}_s{selections}_d{dim}_v{value_dim}_{kind}_by_{scale:.9g}".replace(".", "p")
        .replace("-", "m")
        .replace("+", ""),
        "(Tensor query, Tensor key, Tensor value, Tensor count) -> Tensor",
        _attend_plugin,
        signature((f"*{kind}", "p_query p_key p_value"), ("*i32", "p_count"), ("i32", "capacity"), (f"*{kind}", "p_rows")),
        tuple(constants.items()),
        sizes=((0, 2),),
        grid=(Axis((0, 2), block_m), heads, Axis((0, 0))),
        fake=fake,
        eager=lambda query, key, value, count: attend(query, key, value, count, scale, "auto"),
    )


def decompress_plugin(heads: int, selections: int, dim: int, dtype: torch.dtype) -> Plugin:
    """The scatter for one shape of heads; KernelError for a dtype without a kernel."""
    kind = kind_of(dtype)
    block = block_rows(dim, dtype.itemsize, at_most=64)

    def fake(rows: Tensor, indices: Tensor, count: Tensor, positions: Tensor) -> Tensor:
        return rows.new_empty(rows.shape[0], positions.shape[0], rows.shape[1], rows.shape[3])

    def eager(rows: Tensor, indices: Tensor, count: Tensor, positions: Tensor) -> Tensor:
        return decompress(rows, indices, count, positions.shape[0]).transpose(1, 2).contiguous()

    constants = {
        "HEADS": heads, "SELECTIONS": selections, "DIM": dim, "DIM_POW2": power_of_2(dim),
        "ALIGN": alignment(dtype, dim), "BLOCK": block,
    }  # fmt: skip
    return Plugin(
        f"{NAMESPACE}::decompress_h{heads}_s{selections}_d{dim}_{kind}",
        "(Tensor rows, Tensor indices, Tensor count, Tensor positions) -> Tensor",
        _decompress_plugin,
        signature(
            (f"*{kind}", "p_rows"),
            ("*i32", "p_indices p_count p_positions"),
            ("i32", "seq_len capacity"),
            (f"*{kind}", "p_output"),
        ),
        tuple(constants.items()),
        sizes=((3, 0), (0, 2)),
        grid=(heads, Axis((3, 0), block), Axis((0, 0))),
        fake=fake,
        eager=eager,
    )
