"""TensorRT plugins that carry Triton kernels ahead of time, one kernel as PTX each.

    tsa_trt::compress_...    (query, key, value, indices, count) -> (query_rows, key_rows, value_rows)
    tsa_trt::attend_...      (query_rows, key_rows, value_rows, count) -> rows, where there is a count
    tsa_trt::decompress_...  (rows, indices, count, positions) -> output [B, L, H, Dv]

The other steps stay in standard operators: score, budget and select are several launches each. Without a count every row
is real, and attention is TensorRT's own; with one, this kernel does not compute the rows behind it.

What a plugin may be (torch_tensorrt.kernels.ptx_op of torch-tensorrt 2.14, TensorRT's quickly deployable plugins):

- One kernel, called with the inputs' pointers, then 32-bit sizes, then the outputs' pointers; tensors are dense. So the
  kernels here wrap those of compress.py and decompress.py in that order and compute the strides from the sizes.
- Inputs are tensors: no None, hence always a count, and a size that no input has comes with an input made for it
  (positions [L]). Everything else is baked in: heads, head sizes and dtype are part of a plugin's name.
- Outputs have the first input's dtype, and their shapes are products of the inputs' sizes.

Triton gives every kernel two more pointers, for scratch memory, that its own launcher fills in and TensorRT would not:
they are cut from the PTX, and a kernel that reads one is an error.
"""

# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tsa_compile.errors import KernelError
from tsa_compile.kernels import portable
from tsa_compile.kernels._triton import HAS_TRITON, tl, triton
from tsa_compile.kernels.attend import attend
from tsa_compile.kernels.compress import _compress_kernel, block_rows, compress
from tsa_compile.kernels.decompress import _decompress_kernel, decompress
from tsa_compile.kernels.flash import MAX_HEAD_DIM, _flash_kernel

NAMESPACE = "tsa_trt"
WARPS = 4
MAX_SHARED = 48 * 1024
"""Bytes of shared memory that a launch may ask for without permission, which nobody asks TensorRT for."""
# TensorRT's attention may read any row, so every filler row is zeroed, not only those that a tile may straddle.
_ALL_FILLER = tl.constexpr(2**30)
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

Size = tuple[int, int]
"""A size of an input: (input, dimension)."""


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
        False, False, False,
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


@dataclass(frozen=True)
class Plugin:
    """A kernel with all that TensorRT is told about it: plain data, but for the two functions that torch needs."""

    name: str
    schema: str
    kernel: Any
    signature: tuple[tuple[str, str], ...]
    """The kernel's parameters that are no constants, with Triton's types."""
    constants: tuple[tuple[str, int | float], ...]
    sizes: tuple[Size, ...]
    """What is passed between the inputs' and the outputs' pointers."""
    grid: tuple[int | tuple[Size, int], ...]
    """Programs in x, y, z: a number, or (size, how many of it a program does)."""
    fake: Callable[..., Any]
    eager: Callable[..., Any]


@dataclass(frozen=True)
class Compiled:
    """What is embedded in an engine."""

    kernel_name: str
    ptx: str
    threads: int
    shared: int


def compress_plugin(
    heads: int, kv_heads: int, selections: int, dim: int, value_dim: int, dtype: torch.dtype
) -> Plugin:  # fmt: skip
    """The gather for one shape of heads; KernelError for a dtype without a kernel."""
    kind = _kind(dtype)
    align = _alignment(dtype, dim, value_dim)
    block = block_rows(max(dim, value_dim), dtype.itemsize)

    def fake(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, capacity = query.shape[0], indices.shape[2]
        rows = indices.shape[:3]
        return (
            query.new_empty(batch, query.shape[1], capacity, query.shape[3]),
            query.new_empty(*rows, key.shape[3]),
            query.new_empty(*rows, value.shape[3]),
        )

    pointers = ("p_query", "p_key", "p_value"), ("p_query_rows", "p_key_rows", "p_value_rows")
    constants = {
        "HEADS": heads, "KV_HEADS": kv_heads, "SELECTIONS": selections, "DIM": dim, "DIM_POW2": _power(dim),
        "VALUE_DIM": value_dim, "VALUE_DIM_POW2": _power(value_dim), "ALIGN": align, "BLOCK": block,
    }  # fmt: skip
    return Plugin(
        f"{NAMESPACE}::compress_h{heads}_g{kv_heads}_s{selections}_d{dim}_v{value_dim}_{kind}",
        "(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor count) -> (Tensor, Tensor, Tensor)",
        _compress_plugin,
        _signature(kind, pointers[0], ("p_indices", "p_count"), ("seq_len", "capacity"), pointers[1]),
        tuple(constants.items()),
        sizes=((0, 2), (3, 2)),
        grid=(heads, ((3, 2), block), ((0, 0), 1)),
        fake=fake,
        eager=lambda query, key, value, indices, count: compress(query, key, value, indices, count),
    )


def attend_plugin(heads: int, selections: int, dim: int, value_dim: int, dtype: torch.dtype, scale: float) -> Plugin:
    """Causal attention over the rows before the count; KernelError for a dtype, head size or scale without a kernel."""
    kind = _kind(dtype)
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
        "HEADS": heads, "SELECTIONS": selections, "DIM": dim, "BLOCK_D": max(16, _power(dim)), "VALUE_DIM": value_dim,
        "BLOCK_DV": max(16, _power(value_dim)), "ALIGN": _alignment(dtype, dim, value_dim),
        "SCALE_LOG2": scale * math.log2(math.e), "BLOCK_M": block_m, "BLOCK_N": block_n,
    }  # fmt: skip
    return Plugin(
        f"{NAMESPACE}::attend_h{heads}_s{selections}_d{dim}_v{value_dim}_{kind}_by_{scale:.9g}".replace(".", "p")
        .replace("-", "m")
        .replace("+", ""),
        "(Tensor query, Tensor key, Tensor value, Tensor count) -> Tensor",
        _attend_plugin,
        _signature(kind, ("p_query", "p_key", "p_value"), ("p_count",), ("capacity",), ("p_rows",)),
        tuple(constants.items()),
        sizes=((0, 2),),
        grid=(((0, 2), block_m), heads, ((0, 0), 1)),
        fake=fake,
        eager=lambda query, key, value, count: attend(query, key, value, count, scale, "auto"),
    )


def decompress_plugin(heads: int, selections: int, dim: int, dtype: torch.dtype) -> Plugin:
    """The scatter for one shape of heads; KernelError for a dtype without a kernel."""
    kind = _kind(dtype)
    block = block_rows(dim, dtype.itemsize, at_most=64)

    def fake(rows: Tensor, indices: Tensor, count: Tensor, positions: Tensor) -> Tensor:
        return rows.new_empty(rows.shape[0], positions.shape[0], rows.shape[1], rows.shape[3])

    def eager(rows: Tensor, indices: Tensor, count: Tensor, positions: Tensor) -> Tensor:
        return decompress(rows, indices, count, positions.shape[0]).transpose(1, 2).contiguous()

    constants = {
        "HEADS": heads, "SELECTIONS": selections, "DIM": dim, "DIM_POW2": _power(dim),
        "ALIGN": _alignment(dtype, dim), "BLOCK": block,
    }  # fmt: skip
    return Plugin(
        f"{NAMESPACE}::decompress_h{heads}_s{selections}_d{dim}_{kind}",
        "(Tensor rows, Tensor indices, Tensor count, Tensor positions) -> Tensor",
        _decompress_plugin,
        _signature(kind, ("p_rows",), ("p_indices", "p_count", "p_positions"), ("seq_len", "capacity"), ("p_output",)),
        tuple(constants.items()),
        sizes=((3, 0), (0, 2)),
        grid=(heads, ((3, 0), block), ((0, 0), 1)),
        fake=fake,
        eager=eager,
    )


def _kind(dtype: torch.dtype) -> str:
    if dtype not in _TYPES:
        known = ", ".join(str(known) for known in _TYPES)
        raise KernelError(f"there is no TensorRT plugin for {dtype}: use one of {known}")
    return _TYPES[dtype]


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _alignment(dtype: torch.dtype, *dims: int) -> int:
    """Elements of 16 bytes where every row is a multiple of them, else 1: TensorRT's tensors begin aligned."""
    unit = 16 // dtype.itemsize
    return unit if all(dim % unit == 0 for dim in dims) else 1


def _signature(
    kind: str, inputs: tuple[str, ...], integers: tuple[str, ...], sizes: tuple[str, ...], outputs: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """In the order in which TensorRT passes them."""
    types = ((inputs, f"*{kind}"), (integers, "*i32"), (sizes, "i32"), (outputs, f"*{kind}"))
    return tuple((name, type_) for names, type_ in types for name in names)


def compile_ptx(plugin: Plugin, arch: int = 90) -> Compiled:
    """A plugin's kernel for compute capability arch / 10; needs no GPU. KernelError if it cannot run in TensorRT."""
    if not HAS_TRITON:
        raise KernelError("TensorRT plugins are Triton kernels, and Triton is not installed: pass plugins=False")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = dict(plugin.signature)
    names = plugin.kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in given.items() if kind.startswith("*")}
    signature = {name: given.get(name, "constexpr") for name in names}
    source = ASTSource(plugin.kernel, signature, dict(plugin.constants), aligned)
    # Not the newest PTX, which only the newest drivers read: these kernels need nothing from it.
    options = {"num_warps": WARPS, "num_stages": 1, "ptx_version": 84 if arch <= 90 else 87}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    name = compiled.metadata.name
    if compiled.metadata.shared > MAX_SHARED:
        raise KernelError(f"{plugin.name} needs {compiled.metadata.shared} bytes of shared memory, beyond {MAX_SHARED}")
    ptx = without_scratch(compiled.asm["ptx"], name, len(given))
    return Compiled(name, ptx, WARPS * 32, compiled.metadata.shared)


def without_scratch(ptx: str, kernel: str, parameters: int) -> str:
    """PTX whose kernel takes its first `parameters` parameters alone; KernelError if it uses one of the others."""
    entry = re.search(rf"\.entry {kernel}\((.*?)\n\)", ptx, re.DOTALL)
    if entry is None:
        raise KernelError(f"the PTX has no kernel {kernel!r}")
    declared = [line.rstrip(",") for line in entry[1].strip("\n").split("\n")]
    for line in declared[parameters:]:
        extra = line.split()[-1]
        if re.search(rf"\[{extra}[\]+]", ptx):
            raise KernelError(f"kernel {kernel!r} uses scratch memory ({extra}), which TensorRT does not hand over")
    if len(declared) < parameters:
        raise KernelError(f"kernel {kernel!r} has {len(declared)} parameters, not {parameters}")
    return ptx[: entry.start(1)] + "\n" + ",\n".join(declared[:parameters]) + ptx[entry.end(1) :]


_libraries: dict[str, torch.library.Library] = {}  # an op lives as long as its library


def torch_op(plugin: Plugin) -> Any:
    """The op that stands for a plugin in a graph, defined once: it computes what the plugin will, on CPU and CUDA."""
    name = plugin.name.split("::")[1]
    if name not in _libraries:
        library = _libraries[name] = torch.library.Library(NAMESPACE, "FRAGMENT")
        library.define(name + plugin.schema)
        for device in ("CPU", "CUDA"):
            library.impl(name, plugin.eager, device)
        torch.library.register_fake(plugin.name, plugin.fake, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


class PluginForms:
    """The steps that become plugins, in place of their portable forms; `used` collects which ones a program needs."""

    def __init__(self) -> None:
        self.used: dict[str, Plugin] = {}

    def table(self) -> dict[Any, Callable[..., Any]]:
        """Decompositions for ExportedProgram.run_decompositions."""
        tsa = torch.ops.tsa
        return {
            tsa.compress.default: self.compress,
            tsa.attend.default: self.attend,
            tsa.decompress.default: self.decompress,
        }

    def compress(
        self, query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`tsa::compress` by a plugin."""
        heads, kv_heads, selections = (tensor.shape[1] for tensor in (query, key, indices))
        plugin = compress_plugin(heads, kv_heads, selections, query.shape[3], value.shape[3], query.dtype)
        return self._op(plugin)(query, key, value, indices, _counted(indices, count))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str) -> Tensor:
        """`tsa::attend` by a plugin where there are rows that do not count."""
        if count is None:
            return portable.attend(query, key, value, count, scale, kernel)
        heads, selections, dims = query.shape[1], key.shape[1], (query.shape[3], value.shape[3])
        return self._op(attend_plugin(heads, selections, *dims, query.dtype, scale))(query, key, value, count)

    def decompress(self, compressed: Tensor, indices: Tensor, count: Tensor | None, seq_len: int) -> Tensor:
        """`tsa::decompress` by a plugin."""
        _, heads, _, dim = compressed.shape
        plugin = decompress_plugin(heads, indices.shape[1], dim, compressed.dtype)
        positions = torch.arange(seq_len, dtype=torch.int32, device=compressed.device)
        return self._op(plugin)(compressed, indices, _counted(indices, count), positions).transpose(1, 2)

    def _op(self, plugin: Plugin) -> Any:
        self.used[plugin.name] = plugin
        return torch_op(plugin)


def _counted(indices: Tensor, count: Tensor | None) -> Tensor:
    """A plugin has no optional inputs: without a count every slot counts."""
    if count is not None:
        return count
    return torch.full(indices.shape[:1], indices.shape[2], dtype=torch.int32, device=indices.device)


def register(plugin: Plugin, arch: int, kernels: Any, trtp: Any) -> None:
    """Hands a plugin to TensorRT: `kernels` is torch_tensorrt.kernels, `trtp` tensorrt.plugin."""
    torch_op(plugin)
    compiled = compile_ptx(plugin, arch)
    kernels.ptx_op(
        plugin.name,
        compiled.ptx.encode(),
        compiled.kernel_name,
        meta_fn=plugin.fake,
        eager_fn=plugin.eager,
        aot_fn=functools.partial(launch, plugin, compiled, trtp),
        supports_dynamic_shapes=True,
        schema=plugin.schema,
    )


def launch(plugin: Plugin, compiled: Compiled, trtp: Any, inputs: Any, outputs: Any, tactic: Any) -> tuple[Any, Any]:
    """Launch parameters and sizes as TensorRT's symbolic expressions of the inputs' shapes."""

    def extent(size: Size) -> Any:
        return inputs[size[0]].shape_expr[size[1]]

    def programs(axis: int | tuple[Size, int]) -> Any:
        if isinstance(axis, int):
            return axis
        return extent(axis[0]) if axis[1] == 1 else trtp.cdiv(extent(axis[0]), axis[1])

    params = trtp.KernelLaunchParams()
    params.grid_x, params.grid_y, params.grid_z = (programs(axis) for axis in plugin.grid)
    params.block_x, params.shared_mem = compiled.threads, compiled.shared
    sizes = trtp.SymIntExprs(len(plugin.sizes))
    for position, size in enumerate(plugin.sizes):
        sizes[position] = trtp.SymInt32(extent(size))
    return params, sizes
