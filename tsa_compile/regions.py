"""Regional compilation: the layers of a graph compiled once, however many there are.

    graph      embed | layer 0 | layer 1 | ... | layer 15 | layer 16 (sparse) | ... | layer 31 (sparse) | norm, head
    compiled   a     | b       | b       | ... | b        | c                 | ... | c                 | d

The passes have seen the whole graph by then, so masks and layers are known as without it. Then the graph is cut where one
layer of the model ends and the next begins. Parts that are the same but for their inputs (weights among them: Dynamo makes
them inputs) share one compiled function. Nothing is fused across a cut.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sympy import Expr
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module, Parameter

from tsa_compile.passes.fakes import key_of
from tsa_compile.passes.graph import fake, hint
from tsa_compile.passes.layers import module_name
from tsa_compile.passes.padding import is_emitted
from tsa_compile.report import RewriteReport

LEAST_WORK = {"cuda": 4e11}
"""By device, how many operations the products with a layer's weights need for a function of the layer's own to cost no time.

Each call of such a function takes the host about 0.1 ms more, which does not matter while the GPU is busy. On an H200 the
time relative to the whole graph's was 0.97 to 1.01 from 4.5e11 operations on (8B shape, 1,024 to 65,536 tokens; 1.7B shape,
4,096), 1.01 to 1.12 at 2.2e11, and 1.17 to 1.26 at 1.2e11.
"""

_CONTEXTS = ("_enter_", "_exit_", "_set_grad_enabled", "_saved_tensors_hooks")


class NotCut(Exception):
    """Why a graph is compiled as a whole."""


def compile_by_region(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    report: RewriteReport,
    compiler: Callable[..., Any],
    always: bool = True,
) -> tuple[Callable[..., Any], str]:
    """Compiles a graph in parts, those that are alike once.

    Args:
        graph_module: after the passes, with fake values in its nodes' metadata.
        example_inputs: one for each of its placeholders, as Dynamo passes them to a backend.
        report: the passes': the names and numbers of the layers.
        compiler: takes a graph and its example inputs.
        always: also where a function for each layer may cost time (`LEAST_WORK`).

    Returns:
        The compiled graph, and a sentence on how many parts there are.

    Raises:
        NotCut: the graph has no parts that are alike, or values would go from one part to another that are not tensors; with
            `always=False`, also a part with too little work.
    """
    if torch.is_grad_enabled():
        raise NotCut("a gradient may be needed")
    if not always and not any(isinstance(given, Tensor) and given.device.type in LEAST_WORK for given in example_inputs):
        raise NotCut("its device is none of those where a function for each layer is known to cost no time")
    if inductor.freezing or inductor.triton.cudagraphs:
        raise NotCut("Inductor's freezing and CUDA graphs hold the weights of one layer, whose code the others would run")
    cut = _cut(graph_module.graph, _container(report), _shared(graph_module))
    parts = [_Part(graph_module, nodes) for nodes in cut]
    keys = [part.key() for part in parts]
    try:
        counts = Counter(keys)
    except TypeError as error:
        raise NotCut(f"its parts cannot be compared: {error}") from error
    repeated = [part for part, key in zip(parts, keys, strict=True) if counts[key] > 1]
    if not repeated:
        raise NotCut("it has no two parts that are alike")
    if not always and not all(part.is_work_enough() for part in repeated):
        raise NotCut("its layers have too little work for a function each")
    given = dict(zip(graph_module.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    functions: dict[Hashable, Callable[..., Any]] = {}
    for part, key in zip(parts, keys, strict=True):
        if key not in functions:
            functions[key] = compiler(part.graph_module(), [given.get(node, fake(node)) for node in part.inputs])
    joined = _join(graph_module, parts, [functions[key] for key in keys])
    return joined, f"{len(parts)} parts of the graph, of which {len(functions)} were compiled: the others are like them"


def _container(report: RewriteReport) -> str:
    """What holds the layers: "layers" of model.layers.3.self_attn; "" if the model itself does.

    Raises:
        NotCut: fewer than two layers have a number.
    """
    names = [(row.layer.split("."), str(row.layer_index)) for row in report.rows if row.layer_index is not None]
    if len({number for _, number in names}) < 2:
        raise NotCut("fewer than two attention calls are in numbered layers")
    places = ({at for at, part in enumerate(parts) if part == number} for parts, number in names)
    at = min(set.intersection(*places), default=None)
    if at is None:
        raise NotCut("its layers are not members of one list")
    return "" if at == 0 else names[0][0][at - 1]


def _shared(graph_module: GraphModule) -> list[Node]:
    """What passes wrote into the first layer for all of them, the padding, if it reads the graph's inputs alone.

    It is to be in front of the layers, so that the first one is like the others. Not if the graph writes to an input.
    """
    if graph_module.meta.get("pieces_of_inputs") != []:
        return []
    inputs = graph_module.graph.find_nodes(op="placeholder")
    found = dict.fromkeys(node for node in inputs if not isinstance(fake(node), Parameter))
    for node in graph_module.graph.nodes:
        if is_emitted(node) and all(read in found for read in node.all_input_nodes):
            found[node] = None
    return [node for node in found if node.op != "placeholder"]


def _cut(graph: Graph, container: str, first: Sequence[Node]) -> list[list[Node]]:
    """The nodes of each part, in the graph's order, but for those that are to be in front of all, in a part of their own
    where nothing is in front of the layers."""
    parts: list[list[Node]] = [[*first]]
    current, opened = "", 0
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or node in first:
            continue
        name = module_name(node)
        layer = _layer(name.split("."), container) if name else current  # what passes insert belongs where it stands
        if layer != current and not opened and parts[-1]:
            parts.append([])
        opened += _opens(node)
        current = layer
        parts[-1].append(node)
    return parts


def _layer(parts: list[str], container: str) -> str:
    """The number of the layer that a module is in, as text; "" outside of all layers."""
    for at, part in enumerate(parts):
        if part.isdigit() and (parts[at - 1] if at else "") == container:
            return part
    return ""


def _opens(node: Node) -> int:
    """1 where a context such as autocast is entered, -1 where it is left.

    Raises:
        NotCut: the node changes what holds for all that follows.
    """
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or not name.startswith(_CONTEXTS):
        return 0
    if name.startswith(("_enter_", "_exit_")):
        return 1 if name.startswith("_enter_") else -1
    raise NotCut(f"{name} holds for all that follows it")


@dataclass
class _Part:
    """Neighbouring nodes of a graph.

    inputs: the nodes before them that they read, and the sizes that those are computed from, as [s0 + s1] from s0 and s1.
    outputs: those of them that are read behind them.
    """

    whole: GraphModule
    nodes: list[Node]

    def __post_init__(self) -> None:
        own = set(self.nodes)
        self.inputs = list(dict.fromkeys(read for node in self.nodes for read in node.all_input_nodes if read not in own))
        self.inputs += self._further_sizes()
        self.outputs = [node for node in self.nodes if any(user not in own for user in node.users)]
        for node in (*self.inputs, *self.outputs):
            if not _is_passed(fake(node)):
                raise NotCut(f"{node.name!r} would go from one part to another and is a {type(fake(node)).__name__}")

    def _further_sizes(self) -> list[Node]:
        """Inputs of the whole graph that are sizes which no input of the part is, but which sizes of its inputs depend on.

        Inductor reads sizes from what a function is given, and solves no equations for them.
        """
        sizes = [size for node in self.inputs for size in _sizes(fake(node))]
        missing = set[Any]().union(*(size.free_symbols for size in sizes)) - set(sizes)
        given = self.whole.graph.find_nodes(op="placeholder") if missing else ()
        found = {size: node for node in given if isinstance(fake(node), SymInt) for size in _sizes(fake(node))}
        return [found[size] for size in sorted(missing & found.keys(), key=str)]

    def graph_module(self) -> GraphModule:
        graph, copies = Graph(), {}
        for node in self.inputs:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta["example_value"] = fake(node)
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in self.outputs))
        root = self.whole if any(node.op in ("get_attr", "call_module") for node in self.nodes) else Module()
        return GraphModule(root, graph)

    def key(self) -> Hashable:
        """Equal for parts that one compiled function serves."""
        number = {node: at for at, node in enumerate((*self.inputs, *self.nodes))}
        nodes = tuple(
            (node.op, self._target(node), key_of((node.args, node.kwargs), number.__getitem__)) for node in self.nodes
        )
        return nodes, tuple(number[node] for node in self.outputs), tuple(_described(map(fake, self.inputs)))

    def is_work_enough(self) -> bool:
        """Whether the products with the part's weights are as many operations as `LEAST_WORK` asks for."""
        weights = {node for node in self.inputs if isinstance(fake(node), Parameter) and fake(node).dim() == 2}
        done, least = 0.0, math.inf
        for node in self.nodes:
            result = fake(node)
            rows = math.prod(hint(size) or 0 for size in result.shape[:-1]) if isinstance(result, Tensor) else 0
            for weight in weights.intersection(node.all_input_nodes):
                least = LEAST_WORK.get(fake(weight).device.type, least)
                done += 2.0 * rows * (hint(fake(weight).numel()) or 0)
        return done >= least

    def _target(self, node: Node) -> Hashable:
        if node.op not in ("get_attr", "call_module"):
            return node.target
        return id(operator.attrgetter(str(node.target))(self.whole))


def _is_passed(value: Any) -> bool:
    """Whether a value can go from one compiled function to another."""
    return type(value) is FakeTensor or isinstance(value, (SymInt, SymFloat, SymBool, int, float, bool))


def _sizes(value: Any) -> list[Expr]:
    """What is symbolic among the sizes, strides and offset of a tensor, or a number that is: as expressions."""
    extents: tuple[Any, ...] = (value,) if not isinstance(value, Tensor) else tuple(value.shape)
    if isinstance(value, Tensor) and value.layout is torch.strided:
        extents += (*value.stride(), value.storage_offset())
    return [extent.node.expr for extent in extents if isinstance(extent, SymInt)]


def _described(values: Iterable[Any]) -> Iterator[Hashable]:
    """What a compiled function may rely on of its inputs: types, sizes, strides, and which of them share memory."""
    storages: dict[int, int] = {}
    for value in values:
        if not isinstance(value, Tensor):
            yield type(value), str(value)
            continue
        storage = storages.setdefault(value.untyped_storage()._cdata, len(storages))
        layout = (*value.shape, *value.stride(), value.storage_offset()) if value.layout is torch.strided else ()
        yield value.dtype, value.device, value.layout, value.dim(), tuple(map(str, layout)), storage, value.is_conj()


class _Region(Module):
    """A compiled part, as a member of the graph that calls it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def _join(whole: GraphModule, parts: list[_Part], functions: list[Callable[..., Any]]) -> Callable[..., Any]:
    """The graph again, of calls of its parts' functions."""
    root, graph, made = Module(), Graph(), {}
    for node in whole.graph.find_nodes(op="placeholder"):
        made[node] = graph.placeholder(node.name)
    for at, (part, function) in enumerate(zip(parts, functions, strict=True)):
        root.add_module(f"part_{at}", _Region(function))
        results = graph.call_module(f"part_{at}", tuple(made[node] for node in part.inputs))
        for position, node in enumerate(part.outputs):
            made[node] = graph.call_function(operator.getitem, (results, position))
    (output,) = whole.graph.find_nodes(op="output")
    graph.node_copy(output, made.__getitem__)
    return GraphModule(root, graph)
