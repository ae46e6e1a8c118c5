"""TensorRT: engines of exported programs, and whether its parser will take an ONNX model.

    save(program, "model.engine")                an engine, built by torch-tensorrt on this machine's GPU
    onnx.save(program, "model.onnx")
    findings = check("model.onnx")               what TensorRT refuses, node by node; [] if nothing

`check` holds a model against NVIDIA's documentation (_trt_support.py: versions and addresses): operators, the types of
their data, restrictions, limits. It runs without TensorRT and proves no more than the documentation says.

`save` is written against the sources of torch-tensorrt 2.14 and has not been run with it: neither TensorRT nor its
Python package could be installed where it was written. What it hands to
them (PTX, launches, shapes, ranges) is tested.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map_only, tree_unflatten

from tsa_compile.errors import ConfigError, TSAWarning
from tsa_compile.export import _trt_support as support
from tsa_compile.export.onnx import require, to_portable, writable
from tsa_compile.files import replacing, write
from tsa_compile.passes.base import summary
from tsa_compile.passes.graph import fake

FORMATS = {".engine": "engine", ".ts": "torchscript", ".pt2": "exported_program"}
# Without these torch-tensorrt takes the mask of dense padded layers for a causal one, and leaves operators with sizes
# that vary to torch; the masses of a budget are float64, which TensorRT has not.
_OPTIONS = {
    "attn_bias_is_causal": False,
    "assume_dynamic_shape_support": True,
    "min_block_size": 1,
    "truncate_double": True,
}


def save(program: ExportedProgram, path: str | os.PathLike[str], *, plugins: bool = True, **options: Any) -> None:
    """Builds an engine with torch-tensorrt on the current GPU and writes it. Not yet run: see the module's docstring.

    Args:
        program: from `export_program(..., lower=None)`, with its weights on the GPU.
        path: ".engine" for TensorRT's own runtime; ".ts" (C++ and Python) or ".pt2" (Python) for torch-tensorrt's.
        plugins: score tokens, gather, attend to and scatter rows by Triton kernels, embedded as PTX; otherwise, and where
            this TensorRT takes no such plugins (with a warning), by standard operators like the other steps.
        options: of `torch_tensorrt.dynamo.compile`. An engine is tuned for the longest inputs of the program's ranges.

    Raises:
        ConfigError: a path or program that is not allowed; without plugins also a coverage without a capacity.
        WriteError: the file could not be written whole, as on a full disk; what was at `path` is as it was.
        ImportError: torch-tensorrt is missing.
    """
    target = writable(path, *FORMATS)
    torch_tensorrt = require("torch_tensorrt", extra="tensorrt")[0]
    lowered = _with_plugins(program) if plugins else to_portable(program)
    args, kwargs = example_ranges(lowered, torch_tensorrt.Input)
    options = {**_OPTIONS, **options}
    if target.suffix == ".engine":
        build = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine
        write(target, build(lowered, arg_inputs=args, kwarg_inputs=kwargs, require_full_compilation=True, **options))
        return
    module = torch_tensorrt.dynamo.compile(lowered, arg_inputs=args, kwarg_inputs=kwargs, **options)
    with replacing(target) as beside:
        _save_module(torch_tensorrt, module, lowered, beside)


def _save_module(torch_tensorrt: Any, module: Any, program: ExportedProgram, target: Path) -> None:
    """As torch-tensorrt traces it, on the example that the program was exported with."""
    example: Any = program.example_inputs or ((), {})
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), example)
    torch_tensorrt.save(
        module, str(target), output_format=FORMATS[target.suffix], arg_inputs=args or None, kwarg_inputs=kwargs or None
    )


def _with_plugins(program: ExportedProgram) -> ExportedProgram:
    """The program with plugins registered for it, or without where there are none to be had."""
    from tsa_compile.export._trt_describe import register
    from tsa_compile.export._trt_plugins import PluginForms

    forms = PluginForms()
    try:
        lowered = to_portable(program, forms.table())
        major, minor = torch.cuda.get_device_capability()
        kernels, trtp = require("torch_tensorrt.kernels", "tensorrt.plugin", extra="tensorrt")
        for plugin in forms.used.values():
            register(plugin, 10 * major + minor, kernels, trtp)
    except (ImportError, RuntimeError) as error:  # torch-tensorrt's own; KernelError is one as well
        text = f"no TensorRT plugins ({error}): all steps are standard operators"
        warnings.warn(text, TSAWarning, stacklevel=3)
        return to_portable(program)
    return lowered


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
        low, high = (tuple(_bounds(program, extent)[end] for extent in value.shape) for end in (0, 1))
        values.append(make(min_shape=low, opt_shape=high, max_shape=high, dtype=value.dtype))
    args, kwargs = tree_unflatten(values, program.call_spec.in_spec)
    return args, kwargs


def _bounds(program: ExportedProgram, extent: int | torch.SymInt) -> tuple[int, int]:
    if isinstance(extent, int):
        return extent, extent
    extents = program.range_constraints[extent.node.expr]
    return int(extents.lower), int(extents.upper)


@dataclass(frozen=True)
class Finding:
    """One thing that TensorRT refuses, or that nobody but a reader can decide (`certain` is False)."""

    node: str
    operator: str
    reason: str
    source: str
    certain: bool = True

    def __str__(self) -> str:
        doubt = "" if self.certain else " (not checked)"
        return f"{self.node} ({self.operator}): {self.reason}{doubt} [{support.VERSION}, {self.source}]"


@dataclass
class _Graph:
    """What a node's rules look up: element types, shapes and constants of the values by name."""

    onnx: Any
    types: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, list[int | str | None]] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)

    def add(self, graph: Any) -> None:
        """Reads a graph; a subgraph sees its parent's values as well."""
        for value in (*graph.input, *graph.output, *graph.value_info):
            tensor = value.type.tensor_type
            self.types[value.name] = _type_name(self.onnx, tensor.elem_type)
            if tensor.HasField("shape"):
                sizes = ((dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None) for dim in tensor.shape.dim)
                self.shapes[value.name] = list(sizes)
        for tensor in graph.initializer:
            self.types[tensor.name] = _type_name(self.onnx, tensor.data_type)
            self.shapes[tensor.name] = list(tensor.dims)
            self.constants[tensor.name] = tensor
        for node in graph.node:
            for attribute in node.attribute if node.op_type == "Constant" else ():
                self.constants[node.output[0]] = attribute.t if attribute.name == "value" else attribute

    def value(self, name: str) -> Any:
        """A constant's value as an array; None if it is none, or not a tensor."""
        constant = self.constants.get(name)
        return self.onnx.numpy_helper.to_array(constant) if isinstance(constant, self.onnx.TensorProto) else None


def check(model: Any) -> list[Finding]:
    """What TensorRT's parser would refuse in an ONNX model, in the order of the nodes; [] if it should take all of it.

    Args:
        model: an onnx.ModelProto, or the path of a file.

    Raises:
        ConfigError: the file cannot be read, or is no ONNX model.
        ImportError: the package onnx is missing.
    """
    onnx = require("onnx", "onnx.inliner", extra="onnx")[0]
    if isinstance(model, (str, os.PathLike)):
        model = _read(onnx, model)
    model = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model), data_prop=True)
    findings = list(_opset(model))
    graph = _Graph(onnx)
    _check_graph(model.graph, graph, findings)
    return findings


def _read(onnx: Any, path: str | os.PathLike[str]) -> Any:
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own, which has a name in no package that must be there
        raise ConfigError(f"{str(path)!r} cannot be read as an ONNX model ({summary(error)}): export it again") from error


def _opset(model: Any) -> Iterator[Finding]:
    first, last = support.OPSETS
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and not first <= entry.version <= last:
            reason = f"opset {entry.version} of ai.onnx; the parser takes {first} to {last}"
            yield Finding("the model", "opset_import", reason, support.OPERATORS)


def _check_graph(proto: Any, graph: _Graph, findings: list[Finding]) -> None:
    graph.add(proto)
    for index, node in enumerate(proto.node):
        name = node.name or f"node {index}"
        for reason, source, certain in _refusals(node, graph):
            findings.append(Finding(name, f"{node.domain}::{node.op_type}".removeprefix("::"), reason, source, certain))
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _check_graph(attribute.g, graph, findings)


Refusal = tuple[str, str, bool]


def _refusals(node: Any, graph: _Graph) -> Iterator[Refusal]:
    """Why a node would be refused."""
    operator = node.op_type
    if node.domain not in ("", "ai.onnx"):
        yield (
            f"a custom operator: the parser looks for a plugin named {operator!r}, whatever the domain",
            support.PARSER,
            True,
        )
        return
    if operator not in support.TYPES:
        listed = "listed as not supported" if operator in support.UNSUPPORTED else "not among the documented operators"
        yield listed, support.OPERATORS, True
        return
    yield from _type_refusals(node, graph)
    constant = support.CONSTANT_INPUTS.get(operator)
    if constant is not None and _input(node, constant[0]) and _input(node, constant[0]) not in graph.constants:
        yield f"{constant[1]} is computed; it must be known when the engine is built", support.OPERATORS, True
    if operator in support.DATA_DEPENDENT:
        page = f"{support.DOCS}{support.DATA_DEPENDENT[operator]}.html"
        yield "the shape of its output depends on data: no profile bounds it", page, True
    if operator in support.UNCHECKED:
        yield support.UNCHECKED[operator], support.OPERATORS, False
    if operator in _RULES:
        for reason in _RULES[operator](node, graph):
            yield reason, support.OPERATORS, True
    yield from _size_refusals(node, graph)


def _type_refusals(node: Any, graph: _Graph) -> Iterator[Refusal]:
    kind, position = support.DATA.get(node.op_type, ("input", 0))
    values = node.input if kind == "input" else node.output
    found = graph.types.get(values[position], "") if position < len(values) else ""
    allowed = support.TYPES[node.op_type]
    if found and {"DOUBLE": "FP32"}.get(found, found) not in allowed:
        yield f"data of type {found}; the parser takes {', '.join(sorted(allowed))}", support.OPERATORS, True


def _size_refusals(node: Any, graph: _Graph) -> Iterator[Refusal]:
    page = support.LIMITED.get(node.op_type)
    for name in (*node.input, *node.output):
        shape = graph.shapes.get(name, [])
        if len(shape) > support.MAX_RANK:
            yield f"{name} has {len(shape)} dimensions; at most {support.MAX_RANK} are allowed", support.DIMS, True
        elements = 1
        for extent in shape:
            elements *= extent if isinstance(extent, int) else 1  # a symbolic extent is at least 1
        if page is not None and elements > support.MAX_ELEMENTS:
            reason = f"{name} has {elements} elements; at most {support.MAX_ELEMENTS} are allowed"
            yield reason, f"{support.DOCS}{page}.html", True


def _topk(node: Any, graph: _Graph) -> Iterator[str]:
    if _attribute(node, "sorted", 1) != 1:
        yield "sorted is 0; it must be 1"
    k = graph.value(_input(node, 1))
    if k is None:
        yield f"k is computed; it must be a constant of at most {support.MAX_TOPK}"
    elif int(k.reshape(-1)[0]) > support.MAX_TOPK:
        yield f"k is {int(k.reshape(-1)[0])}; at most {support.MAX_TOPK} are allowed"


def _attention(node: Any, graph: _Graph) -> Iterator[str]:
    names = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
    for position, name in enumerate(names):
        given = _input(node, position)
        if given and position > 3:
            yield f"the input {name} is not supported"
        elif given and len(graph.shapes.get(given, [None] * 4)) != 4:
            yield f"{name} has {len(graph.shapes[given])} dimensions; it must have 4"
    if any(node.output[1:]):
        yield "only the first output is supported"
    for name in ("softcap", "qk_matmul_output_mode"):
        if _attribute(node, name, 0):
            yield f"the attribute {name} is not supported"


def _pooling(node: Any, graph: _Graph) -> Iterator[str]:
    rank = len(graph.shapes.get(_input(node, 0), [None] * 4))
    if rank not in (4, 5) and node.op_type != "LpPool":
        yield f"pools over {rank - 2} dimensions; 2 or 3 are supported"
    if any(extent != 1 for extent in _attribute(node, "dilations", [])):
        yield "dilations must be 1"
    if any(node.output[1:]):
        yield "the output Indices is not supported"


def _constant(node: Any, graph: _Graph) -> Iterator[str]:
    for attribute in node.attribute:
        if attribute.name in ("sparse_value", "value_string", "value_strings"):
            yield f"the attribute {attribute.name} is not supported"


def _scatter_nd(node: Any, graph: _Graph) -> Iterator[str]:
    if _attribute(node, "reduction", b"none") != b"none":
        yield f"the reduction {_attribute(node, 'reduction', b'').decode()!r} is not supported"


def _grid_sample(node: Any, graph: _Graph) -> Iterator[str]:
    if len(graph.shapes.get(_input(node, 0), [None] * 4)) != 4:
        yield "the input must have 4 dimensions"


def _layer_normalization(node: Any, graph: _Graph) -> Iterator[str]:
    if any(node.output[1:]):
        yield "only the first output is supported"


def _rotary_embedding(node: Any, graph: _Graph) -> Iterator[str]:
    positions = _input(node, 3)
    if positions and graph.types.get(positions, "INT64") != "INT64":
        yield f"position_ids is {graph.types[positions]}; it must be INT64"


_RULES: dict[str, Callable[[Any, _Graph], Iterator[str]]] = {
    "TopK": _topk,
    "Attention": _attention,
    "AveragePool": _pooling,
    "MaxPool": _pooling,
    "LpPool": _pooling,
    "Constant": _constant,
    "ScatterND": _scatter_nd,
    "GridSample": _grid_sample,
    "LayerNormalization": _layer_normalization,
    "RotaryEmbedding": _rotary_embedding,
}


def _input(node: Any, position: int) -> str:
    return node.input[position] if position < len(node.input) else ""


def _attribute(node: Any, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            kinds = {1: attribute.f, 2: attribute.i, 3: attribute.s, 7: list(attribute.ints)}
            return kinds.get(attribute.type, default)
    return default


_TYPE_NAMES = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8", "FLOAT4E2M1": "FP4"}


def _type_name(onnx: Any, element: int) -> str:
    """NVIDIA's name of an ONNX element type; "" where none was inferred."""
    name = onnx.TensorProto.DataType.Name(element) if element else ""
    return _TYPE_NAMES.get(name, name)
