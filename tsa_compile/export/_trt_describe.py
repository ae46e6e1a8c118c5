"""A TensorRT plugin that carries one Triton kernel ahead of time: its description, its PTX, its registration.

What a plugin may be (torch_tensorrt.kernels.ptx_op of torch-tensorrt 2.14, TensorRT's quickly deployable plugins):

- One kernel, called with the inputs' pointers, then 32-bit sizes, then the outputs' pointers; tensors are dense. So the
  kernels of _trt_rows.py and _trt_score.py wrap those of this package in that order and compute the strides from the sizes.
- Inputs are tensors: no None, and a size that no input has comes with an input made for it. Everything else is baked in:
  heads, head sizes and dtype are part of a plugin's name.
- Outputs have the first input's dtype, whatever the others have (TensorDesc.like() of the first tensor, in
  dynamo/conversion/plugins/_generate_plugin.py), and their shapes are products of the inputs' sizes. So a plugin for 16-bit
  tensors returns float32 or int32 if a tensor of that type comes first.
- Output memory is not initialised: nothing may be added to it, by atomics or otherwise, before it was written.

Triton gives every kernel two more pointers, for scratch memory, that its own launcher fills in and TensorRT would not:
they are cut from the PTX, and a kernel that reads one is an error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tsa_compile.errors import KernelError
from tsa_compile.kernels.launch import HAS_TRITON, triton

NAMESPACE = "tsa_trt"
WARPS = 4
MAX_SHARED = 48 * 1024
"""Bytes of shared memory that a launch may ask for without permission, which nobody asks TensorRT for."""
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

Size = tuple[int, int]
"""A size of an input: (input, dimension)."""


class Axis(NamedTuple):
    """Programs along one axis of a launch: ceil(size / each) * times."""

    size: Size
    each: int = 1
    times: int = 1


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
    grid: tuple[int | Axis, ...]
    """Programs in x, y, z."""
    fake: Callable[..., Any]
    eager: Callable[..., Any]


@dataclass(frozen=True)
class Compiled:
    """What is embedded in an engine."""

    kernel_name: str
    ptx: str
    threads: int
    shared: int


def kind_of(dtype: torch.dtype) -> str:
    if dtype not in _TYPES:
        known = ", ".join(str(known) for known in _TYPES)
        raise KernelError(f"there is no TensorRT plugin for {dtype}: use one of {known}")
    return _TYPES[dtype]


def power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def alignment(dtype: torch.dtype, *dims: int) -> int:
    """Elements of 16 bytes where every row is a multiple of them, else 1: TensorRT's tensors begin aligned."""
    unit = 16 // dtype.itemsize
    return unit if all(dim % unit == 0 for dim in dims) else 1


def signature(*groups: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """A kernel's parameters from (type, names separated by spaces), in the order in which TensorRT passes them."""
    return tuple((name, type_) for type_, names in groups for name in names.split())


def compile_ptx(plugin: Plugin, arch: int = 90) -> Compiled:
    """A plugin's kernel for compute capability arch / 10; needs no GPU. KernelError if it cannot run in TensorRT."""
    if not HAS_TRITON:
        raise KernelError("TensorRT plugins are Triton kernels, and Triton is not installed: pass plugins=False")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = dict(plugin.signature)
    names = plugin.kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in given.items() if kind.startswith("*")}
    parameters = {name: given.get(name, "constexpr") for name in names}
    source = ASTSource(plugin.kernel, parameters, dict(plugin.constants), aligned)
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

    def programs(axis: int | Axis) -> Any:
        if isinstance(axis, int):
            return axis
        number = extent(axis.size) if axis.each == 1 else trtp.cdiv(extent(axis.size), axis.each)
        return number if axis.times == 1 else number * axis.times

    params = trtp.KernelLaunchParams()
    params.grid_x, params.grid_y, params.grid_z = (programs(axis) for axis in plugin.grid)
    params.block_x, params.shared_mem = compiled.threads, compiled.shared
    sizes = trtp.SymIntExprs(len(plugin.sizes))
    for position, size in enumerate(plugin.sizes):
        sizes[position] = trtp.SymInt32(extent(size))
    return params, sizes
