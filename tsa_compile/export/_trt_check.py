"""What TensorRT's documentation says that its ONNX parser refuses, node by node: operators, types, restrictions, limits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tsa_compile.errors import ConfigError
from tsa_compile.export import _trt_support as support
from tsa_compile.export.onnx import require
from tsa_compile.files import StrPath
from tsa_compile.passes.base import summary


@dataclass(frozen=True)
class Finding:
    """One thing that TensorRT refuses, or that only a person can decide (`certain` is False)."""

    node: str
    operator: str
    reason: str
    source: str
    certain: bool = True
    library: str = support.VERSION

    def __str__(self) -> str:
        doubt = "" if self.certain else " (not checked)"
        return f"{self.node} ({self.operator}): {self.reason}{doubt} [{self.library}, {self.source}]"


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

    def rank(self, name: str, default: int) -> int:
        """How many dimensions a value has; `default` where that is unknown."""
        return len(self.shapes[name]) if name in self.shapes else default

    def value(self, name: str) -> Any:
        """A constant's value as an array; None if it is none, or not a tensor."""
        constant = self.constants.get(name)
        return self.onnx.numpy_helper.to_array(constant) if isinstance(constant, self.onnx.TensorProto) else None


def documented(model: Any) -> list[Finding]:
    """What the documentation says that the parser refuses, in the order of the nodes; see `tensorrt.check`."""
    onnx = require("onnx", "onnx.inliner", extra="onnx")[0]
    if isinstance(model, (str, os.PathLike)):
        model = read(onnx, model)
    model = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model), data_prop=True)
    findings = list(_opset(model))
    graph = _Graph(onnx)
    _check_graph(model.graph, graph, findings)
    return findings


def read(onnx: Any, path: StrPath) -> Any:
    """The model in a file, without weights that lie beside it; ConfigError if it holds none."""
    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error.strerror})") from error
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
        reason = f"a custom operator: the parser looks for a plugin named {operator!r}, whatever the domain"
        yield reason, support.PARSER, True
        return
    if operator not in support.TYPES:
        listed = "listed as not supported" if operator in support.UNSUPPORTED else "not among the documented operators"
        yield listed, support.OPERATORS, True
        return
    for reason in (*_type_refusals(node, graph), *_form_refusals(node, graph), *_own_refusals(node, graph)):
        yield reason, support.OPERATORS, True
    if operator in support.DATA_DEPENDENT:
        page = f"{support.DOCS}{support.DATA_DEPENDENT[operator]}.html"
        yield "the shape of its output depends on data: no profile bounds it", page, True
    if operator in support.UNCHECKED:
        yield support.UNCHECKED[operator], support.OPERATORS, False
    yield from _size_refusals(node, graph)


def _type_refusals(node: Any, graph: _Graph) -> Iterator[str]:
    kind, position = support.DATA.get(node.op_type, ("input", 0))
    values = node.input if kind == "input" else node.output
    found = graph.types.get(values[position], "") if position < len(values) else ""
    allowed = support.TYPES[node.op_type]
    if found and {"DOUBLE": "FP32"}.get(found, found) not in allowed:
        yield f"data of type {found}; the parser takes {', '.join(sorted(allowed))}"


def _form_refusals(node: Any, graph: _Graph) -> Iterator[str]:
    """What an operator may not have, whatever its values."""
    position, name = support.CONSTANT_INPUTS.get(node.op_type, (0, ""))
    if name and _input(node, position) and _input(node, position) not in graph.constants:
        yield f"{name} is computed; it must be known when the engine is built"
    if node.op_type in support.ONE_OUTPUT and any(node.output[1:]):
        yield "only the first output is supported"
    for attribute in support.NO_ATTRIBUTES.get(node.op_type, ()):
        if _attribute(graph, node, attribute, 0):
            yield f"the attribute {attribute} is not supported"


def _size_refusals(node: Any, graph: _Graph) -> Iterator[Refusal]:
    page = support.LIMITED.get(node.op_type)
    for name in (*node.input, *node.output):
        shape = graph.shapes.get(name, [])
        if len(shape) > support.MAX_RANK:
            yield f"{name} has {len(shape)} dimensions; at most {support.MAX_RANK} are allowed", support.DIMS, True
        elements = math.prod(extent for extent in shape if isinstance(extent, int))  # a symbolic extent is at least 1
        if page is not None and elements > support.MAX_ELEMENTS:
            reason = f"{name} has {elements} elements; at most {support.MAX_ELEMENTS} are allowed"
            yield reason, f"{support.DOCS}{page}.html", True


def _own_refusals(node: Any, graph: _Graph) -> Iterator[str]:
    """Restrictions of a single operator."""
    operator, rank = node.op_type, graph.rank(_input(node, 0), 4)
    reduction = _attribute(graph, node, "reduction", b"none")
    positions = graph.types.get(_input(node, 3)) or "INT64"
    if operator == "TopK":
        yield from _topk(node, graph)
    elif operator == "Attention":
        yield from _attention(node, graph)
    elif operator == "ScatterND" and reduction != b"none":
        yield f"the reduction {reduction.decode()!r} is not supported"
    elif operator == "RotaryEmbedding" and positions != "INT64":
        yield f"position_ids is {positions}; it must be INT64"
    elif operator == "GridSample" and rank != 4:
        yield "the input must have 4 dimensions"
    elif operator in ("AveragePool", "MaxPool") and rank not in (4, 5):
        yield f"pools over {rank - 2} dimensions; 2 or 3 are supported"
    if operator in ("AveragePool", "MaxPool", "LpPool") and set(_attribute(graph, node, "dilations", [])) - {1}:
        yield "dilations must be 1"


def _topk(node: Any, graph: _Graph) -> Iterator[str]:
    if _attribute(graph, node, "sorted", 1) != 1:
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
        elif given and graph.rank(given, 4) != 4:
            yield f"{name} has {graph.rank(given, 4)} dimensions; it must have 4"


def _input(node: Any, position: int) -> str:
    return node.input[position] if position < len(node.input) else ""


def _attribute(graph: _Graph, node: Any, name: str, default: Any) -> Any:
    found = (attribute for attribute in node.attribute if attribute.name == name)
    return next(map(graph.onnx.helper.get_attribute_value, found), default)


_TYPE_NAMES = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8", "FLOAT4E2M1": "FP4"}


def _type_name(onnx: Any, element: int) -> str:
    """NVIDIA's name of an ONNX element type; "" where none was inferred."""
    name = onnx.TensorProto.DataType.Name(element) if element else ""
    return _TYPE_NAMES.get(name, name)
