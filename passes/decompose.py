"""Opens the one op of a sparse call into its steps, for passes that read them and for programs without Python.

    before   o = tsa.sparse_attention(q, k, v, scale, window, pool, ...)                  without padding
             o = tsa.padded_sparse_attention(q, k, v, padding, valid_ranges, scale, ...)         with padding [B, L]
    after    scores  = tsa.score(q, k, padding, scale, window, pool, reduce)              [B, H, L] float32
             count   = tsa.budget(scores, coverage, keep_ratio, min_tokens)               [B] int32, on the device
             indices = tsa.select(scores, count, C)                                       [B, H, C] int32, ascending
             q^, k^, v^ = tsa.compress(q, k, v, indices, count)                           [B, H, C, D]
             o^      = tsa.attend(q^, k^, v^, count, scale, kernel)                       [B, H, C, Dv]
             o       = tsa.decompress(o^, indices, count, L)                              [B, H, L, Dv]

    with a floor, instead of the last two steps
             o^, lse = tsa.attend_lse(q^, k^, v^, count, scale, kernel)                   [B, H, C, Dv], [B, H, C]
             o       = tsa.merge_floor(q, k, v, o^, lse, indices, count, padding, scale, window, sinks)

    with sinks, sink_logits=[H] (kernels/sink.py) of score, and of merge_floor, or attend without a floor

C is L, the capacity, or, for a keep ratio, an expression in L: no shape depends on data. A keep ratio without padding
needs no count at all. Where the heads of a group share a selection, scores are averaged over them first: [B, G, L]. Where
other processes have heads too, a coverage is decided by tsa.mean_over_ranks(scores, group), [B, 1, L].

    queries behind a cache, [B, H, Lq, D] of L > Lq keys
             scores  = tsa.score(q, k, padding, ...)                                      [B, H, L], by the last rows of q
             q       = pad(q, (0, 0, L - Lq, 0))                                          [B, H, L, D]
             ...                                                                          the steps above
             o       = narrow(o, 2, L - Lq, Lq)                                           [B, H, Lq, Dv], copied

The rows of these zeros are computed and not used, among the selected ones and in the neighbourhood: C^2 and L (2 window +
sinks) products, where dense attention has Lq L. So one form serves whole prompts and chunks.

Exported programs are opened, and what a callable `compiler` is given. Nothing is put together again: whoever wants the one
op switches the pass off, `TSAConfig(skip_passes=["Decompose"])`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from tsa_compile.config import KeepRatio
from tsa_compile.kernels.kept import kept_of_share
from tsa_compile.kernels.options import Options
from tsa_compile.passes.base import Pass, PassResult
from tsa_compile.passes.graph import fake, given, insert, known, size
from tsa_compile.passes.operators import arguments

tsa = torch.ops.tsa


class Decompose(Pass):
    """Replaces each whole op by its steps."""

    optional = True

    def call(self, graph_module: GraphModule) -> PassResult:
        graph = graph_module.graph
        whole = (tsa.sparse_attention.default, tsa.padded_sparse_attention.default)
        found = [node for node in graph.nodes if node.target in whole]
        for node in found:
            with graph.inserting_before(node):
                last = _open(graph, _SparseCall.of(node))
            last.meta = dict(node.meta)
            node.replace_all_uses_with(last)
            read = node.all_input_nodes
            graph.erase_node(node)
            self.state.detached.extend(
                source for source in read if not source.users
            )  # the valid ranges, if nobody else has them
        return self.result(graph_module, len(found))


@dataclass(frozen=True, kw_only=True)
class _SparseCall(Options):
    """The arguments of a whole op, by the names of their schema."""

    query: Node
    key: Node
    value: Node
    padding: Node | None = None
    valid_ranges: Node | None = None
    sink_logits: Node | None = None

    @property
    def sink(self) -> dict[str, Any]:
        return given(sink_logits=self.sink_logits)

    @classmethod
    def of(cls, node: Node) -> _SparseCall:
        names = (argument.name for argument in node.target._schema.arguments)  # type: ignore[union-attr]  # an overload
        return cls(**dict(zip(names, arguments(node), strict=True)))


def _open(graph: Graph, call: _SparseCall) -> Node:
    rows, length = size(graph, call.query, 2), size(graph, call.key, 2)
    scored = (call.query, call.key, call.padding, call.scale, call.window, call.pool, call.reduce)
    scores = insert(graph, tsa.score.default, *scored, **call.sink)
    if call.shared:
        # [B, H, L] -> [B, G, L]; +inf (the window) and -inf (padding) are the same for all heads and stay.
        grouped = insert(graph, "unflatten", scores, 1, (fake(call.key).shape[1], -1))
        scores = insert(graph, "mean", grouped, 2)
    capacity = _capacity(graph, call, rows, length)
    count = _count(graph, call, scores, capacity)
    indices = insert(graph, tsa.select.default, scores, count, capacity)
    if known(fake(call.query).shape[2] == fake(call.key).shape[2]):
        return _attend(graph, call, indices, count, length)
    if isinstance(length, Node) or isinstance(rows, Node):
        past: int | Node = insert(graph, operator.sub, length, rows)
    else:
        past = length - rows
    query = insert(graph, torch.nn.functional.pad, call.query, (0, 0, past, 0))
    output = _attend(graph, replace(call, query=query), indices, count, length)
    output = insert(graph, "transpose", insert(graph, torch.narrow, output, 2, past, rows), 1, 2)
    return insert(graph, "transpose", insert(graph, "contiguous", output), 1, 2)  # in the memory layout of the whole op


def _attend(graph: Graph, call: _SparseCall, indices: Node, count: Node | None, length: int | Node) -> Node:
    """What follows the selection: [B, H, L, Dv] of as many queries as keys."""
    rows = insert(graph, tsa.compress.default, call.query, call.key, call.value, indices, count)
    query, key, value = (insert(graph, operator.getitem, rows, i) for i in range(3))
    if call.floor_window is not None:
        attended = insert(graph, tsa.attend_lse.default, query, key, value, count, call.scale, call.kernel)
        compressed, lse = (insert(graph, operator.getitem, attended, i) for i in range(2))
        operands = (call.query, call.key, call.value, compressed, lse, indices, count, call.padding, call.scale)
        return insert(graph, tsa.merge_floor.default, *operands, call.floor_window, call.floor_sinks, **call.sink)
    compressed = insert(graph, tsa.attend.default, query, key, value, count, call.scale, call.kernel, **call.sink)
    return insert(graph, tsa.decompress.default, compressed, indices, count, length)


def _capacity(graph: Graph, call: _SparseCall, rows: int | Node, length: int | Node) -> int | Node:
    """The static or symbolic size of the compressed rows; `rows` is the number of queries, of which the window is."""
    inserting = _Inserting(graph)
    extent, queries = (Proxy(each, inserting) if isinstance(each, Node) else each for each in (length, rows))
    if call.keep_ratio is not None:
        share, window = KeepRatio(call.keep_ratio).fraction, _minimum(call.window, queries)
        extent = kept_of_share(extent, window, share, call.min_tokens, call.capacity, minimum=_minimum, maximum=_maximum)
    elif call.capacity is not None:
        extent = _minimum(extent, call.capacity)
    return extent.node if isinstance(extent, Proxy) else extent


def _count(graph: Graph, call: _SparseCall, scores: Node, capacity: int | Node) -> Node | None:
    """How many slots are real, per batch item; None if all are, which a keep ratio without padding knows beforehand."""
    if call.keep_ratio is not None and call.padding is None:
        return None
    if call.group is not None and call.coverage:
        scores = insert(graph, tsa.mean_over_ranks.default, scores, call.group)
    count = insert(graph, tsa.budget.default, scores, call.coverage, call.keep_ratio, call.min_tokens)
    return count if call.capacity is None else insert(graph, torch.clamp, count, max=capacity)


class _Inserting(GraphAppendingTracer):
    """Makes arithmetic on a proxy of a node into nodes with fake values."""

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Node:
        return insert(self.graph, target, *args)


# What the range of lengths decides is decided here: a sum of minima is more than a later reader could bound.
def _minimum(left: Any, right: Any) -> Any:
    smaller, larger = _fake(left), _fake(right)
    if known(smaller <= larger):
        return left
    return right if known(larger <= smaller) else torch.sym_min(left, right)


def _maximum(left: Any, right: Any) -> Any:
    larger, smaller = _fake(left), _fake(right)
    if known(larger >= smaller):
        return left
    return right if known(smaller >= larger) else torch.sym_max(left, right)


def _fake(extent: Any) -> Any:
    return fake(extent.node) if isinstance(extent, Proxy) else extent
