"""TensorRT: whether it takes an ONNX model, and engines.

    onnx.save(program, "model.onnx")
    findings = check("model.onnx")               what TensorRT refuses, node by node; [] if nothing
    build("model.onnx", "model.engine")          an engine for the ranges of lengths that the program was exported for
    save(program, "model.ts")                    an engine by torch-tensorrt, on this machine's GPU: not run yet

`check` holds a model against NVIDIA's documentation (_trt_support.py: versions and addresses), and where TensorRT-RTX is
installed also against its parser. The documentation is of TensorRT; TensorRT-RTX is NVIDIA's library of the same interface
for GPUs of compute capability 7.5 to 8.9 and 12, which can be installed from PyPI and builds engines without a GPU.

`save` hands to torch-tensorrt what ONNX files in standard operators are made of. It is written against the sources of
torch-tensorrt 2.14 and has not been run with it. What it hands over is tested.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map_only, tree_unflatten

from tsa_compile.errors import ConfigError, check_type
from tsa_compile.export import _rtx
from tsa_compile.export._rtx import require_library
from tsa_compile.export._trt_check import Finding, documented, read
from tsa_compile.export.onnx import require, to_portable
from tsa_compile.export.program import bounds
from tsa_compile.files import StrPath, replacing, writable, write
from tsa_compile.passes.graph import fake

__all__ = ["Finding", "build", "check", "require_library", "save"]

RUNTIMES = ("auto", "rtx", "tables")
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
Profile = Mapping[str, tuple[int, int]]

FORMATS = {".engine": "engine", ".ts": "torchscript", ".pt2": "exported_program"}
# Without these torch-tensorrt takes the mask of dense padded layers for a causal one, and leaves operators with sizes
# that vary to torch; the masses of a budget are float64, which TensorRT has not.
_OPTIONS = {
    "attn_bias_is_causal": False,
    "assume_dynamic_shape_support": True,
    "min_block_size": 1,
    "truncate_double": True,
}


def save(program: ExportedProgram, path: StrPath, **options: Any) -> None:
    """Builds an engine with torch-tensorrt on the current GPU and writes it. Not yet run: see the module's docstring.

    Args:
        program: from `export_program(..., lower=None)`, with its weights on the GPU.
        path: ".engine" for TensorRT's own runtime; ".ts" (C++ and Python) or ".pt2" (Python) for torch-tensorrt's.
        options: of `torch_tensorrt.dynamo.compile`. An engine is tuned for the longest inputs of the program's ranges.

    Raises:
        ConfigError: a path, option or program that is not allowed; a coverage without a capacity.
        WriteError: the file could not be written whole, as on a full disk; a file at `path` is unchanged.
        ImportError: torch-tensorrt is missing.
    """
    check_type("program", program, ExportedProgram, "what export_program returns")
    target = writable(path, *FORMATS)
    torch_tensorrt = package()
    known = inspect.signature(torch_tensorrt.dynamo.compile).parameters
    for option in options:
        if option not in known:  # torch-tensorrt takes any, and ignores it
            raise ConfigError(f"{option!r} is not an option of torch_tensorrt.dynamo.compile")
    lowered = to_portable(program)
    args, kwargs = example_ranges(lowered, torch_tensorrt.Input)
    options = {**_OPTIONS, **options}
    if target.suffix == ".engine":
        build = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine
        write(target, build(lowered, arg_inputs=args, kwarg_inputs=kwargs, require_full_compilation=True, **options))
        return
    module = torch_tensorrt.dynamo.compile(lowered, arg_inputs=args, kwarg_inputs=kwargs, **options)
    # As torch-tensorrt traces it, on the example that the program was exported with.
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), lowered.example_inputs or ((), {}))
    with replacing(target) as beside:
        torch_tensorrt.save(
            module, str(beside), output_format=FORMATS[beside.suffix], arg_inputs=args or None, kwarg_inputs=kwargs or None
        )


def package() -> Any:
    """The package torch-tensorrt, by which `save` builds; ImportError where it is missing."""
    return require("torch_tensorrt", extra="torch-tensorrt")[0]


def example_ranges(program: ExportedProgram, make: Callable[..., Any]) -> tuple[Any, Any]:
    """The program's (args, kwargs) with `make(min_shape=, opt_shape=, max_shape=, dtype=)` for every tensor."""
    nodes = {node.name: fake(node) for node in program.graph.nodes if node.op == "placeholder"}
    values: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is not torch.export.graph_signature.InputKind.USER_INPUT:
            continue
        value = nodes.get(getattr(spec.arg, "name", ""))
        if not isinstance(value, torch.Tensor):
            values.append(getattr(spec.arg, "value", value))
            continue
        low, high = (tuple(bounds(program, extent)[end] for extent in value.shape) for end in (0, 1))
        values.append(make(min_shape=low, opt_shape=high, max_shape=high, dtype=value.dtype))
    args, kwargs = tree_unflatten(values, program.call_spec.in_spec)
    return args, kwargs


def check(model: Any, *, runtime: str = "auto") -> list[Finding]:
    """What TensorRT would refuse in an ONNX model, in the order of the nodes; [] if it should take all of it.

    Args:
        model: an onnx.ModelProto, or the path of a file.
        runtime: "tables" for NVIDIA's documentation of TensorRT alone; "rtx" for the parser of TensorRT-RTX, with what its
            builder has no attention kernel for; "auto" for the tables, and the parser where it is installed.

    Raises:
        ConfigError: the file cannot be read or is no ONNX model; a runtime that is none of these.
        ImportError: the package onnx is missing, or with "rtx" TensorRT-RTX.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"runtime={runtime!r} is not allowed: runtime must be one of {', '.join(RUNTIMES)}")
    if not isinstance(model, (str, os.PathLike)) and not hasattr(model, "graph"):
        raise ConfigError(f"model is a {type(model).__name__}: pass an onnx.ModelProto, or the path of a file")
    findings = documented(model) if runtime != "rtx" else []
    if runtime == "rtx":
        _rtx.require_library()
    if runtime == "rtx" or (runtime == "auto" and _rtx.installed()):
        findings += _parse(model)
    return findings


def _parse(model: Any) -> list[Finding]:
    onnx = require("onnx", extra="onnx")[0]
    if isinstance(model, (str, os.PathLike)):
        read(onnx, model)
        return _rtx.parse(os.fspath(model))
    with TemporaryDirectory(prefix="tsa-rtx-") as folder:
        path = os.path.join(folder, "model.onnx")
        onnx.save(model, path)
        return _rtx.parse(path)


def build(
    model: StrPath, engine: StrPath, profiles: Sequence[Profile] | None = None, *, capabilities: Sequence[str] = (),
    decompose: bool = False,
) -> None:  # fmt: skip
    """Builds an engine of an ONNX file with TensorRT-RTX, which needs no GPU.

    Args:
        model: a file in standard operators, as `onnx.save` writes it.
        engine: where to write; ends in ".engine".
        profiles: ranges of the sizes that vary, [{"batch": (1, 4), "length": (1024, 65536)}] for one profile; each is
            tuned for its largest sizes. Default: those that the program was exported for, as the file says.
        capabilities: of the GPUs that it is for, as "8.9". Default: all that the library knows.
        decompose: whether attention that has no kernel (in float32, or with heads of more than 256) may become
            products and a softmax, whose logits [B, H, L, L] are in memory.

    Raises:
        ConfigError: a path, range or capability that is not allowed; no engine can be built: the message says why.
        WriteError: the engine could not be written whole; a file that was there is unchanged.
        ImportError: TensorRT-RTX or the package onnx is missing.
    """
    target = writable(engine, ".engine")
    onnx = require("onnx", extra="onnx")[0]
    unknown = [capability for capability in capabilities if capability not in CAPABILITIES]
    if unknown:
        raise ConfigError(f"capabilities={unknown} are not allowed: TensorRT-RTX builds for {', '.join(CAPABILITIES)}")
    proto = read(onnx, model)
    ranges = [_exported_for(proto)] if profiles is None else profiles
    shapes = [_shapes(proto, profile) for profile in ranges]
    _rtx.require_library()
    names = ["SM" + capability.replace(".", "") for capability in capabilities]
    with replacing(target) as beside:
        _rtx.build(os.fspath(model), beside, shapes, names, decompose)


def _exported_for(model: Any) -> dict[str, tuple[int, int]]:
    """The ranges that `onnx.save` wrote into the file's metadata."""
    found = {entry.key: re.fullmatch(r"(\d+)\.\.(\d+)", entry.value) for entry in model.metadata_props}
    return {
        key.removeprefix("tsa_compile."): (int(match[1]), int(match[2]))
        for key, match in found.items()
        if match and key.startswith("tsa_compile.")
    }


def _shapes(model: Any, profile: Profile) -> dict[str, list[list[int]]]:
    """For each input with sizes that vary the smallest shape, the one to tune for, and the largest."""
    shapes = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            continue
        for dim in dims:
            low, high = profile.get(dim.dim_param, (0, 0))
            if not dim.HasField("dim_value") and not 0 < low <= high:
                raise ConfigError(
                    f"input {value.name!r} has a size {dim.dim_param!r} that varies, and no range of it is given: pass "
                    f"profiles=[{{{dim.dim_param!r}: (1, 1024), ...}}]"
                )
        shortest, longest = ([dim.dim_value or profile[dim.dim_param][end] for dim in dims] for end in (0, 1))
        shapes[value.name] = [shortest, longest, longest]
    return shapes
