"""Fuses the steps of every sparse site into the one op that a compiled graph calls.

    before   scores = tsa.score(q, k, padding, ...); count = tsa.budget(scores, ...); indices = tsa.select(scores, count, C)
             q^, k^, v^ = tsa.compress(q, k, v, indices, count); o^ = tsa.attend(q^, k^, v^, count, ...)
             o = tsa.decompress(o^, indices, count, L)                                     [B, H, L, Dv]
    after    o = tsa.sparse_attention(q, k, v, ...)                                        without padding
             o = tsa.padded_sparse_attention(q, k, v, padding, spans, ...)                 with padding [B, L]

For graphs that run where Python does; exported ones keep the steps, which can be opened. Steps that somebody else reads,
or that another pass has put something between, stay as they are. The spans of a padding mask are computed once for all calls
that read it, so that they reach the host once for all layers.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tsa_compile.config import Coverage, KeepRatio, TSAConfig
from tsa_compile.passes.base import GraphState, Pass, PassResult
from tsa_compile.passes.cleanup import RemoveDeadMasks
from tsa_compile.passes.graph import insert
from tsa_compile.passes.padding import spans_of

tsa = torch.ops.tsa


class FuseSparse(Pass):
    """Replaces each chain of steps by the fused op."""

    def call(self, graph_module: GraphModule) -> PassResult:
        graph, config = graph_module.graph, self.state.config
        modified = False
        for node in list(graph.nodes):
            if node.target is tsa.decompress.default and (chain := _chain(node)) is not None:
                with graph.inserting_before(node):
                    fused = _fused(graph, *chain, node, config)
                fused.meta = {**node.meta}
                node.replace_all_uses_with(fused)
                self.state.detached.append(node)
                modified = True
        return self.result(graph_module, modified)


def fuse(graph_module: GraphModule, config: TSAConfig) -> GraphModule:
    """Fuses a rewritten graph in place: for a `compiler` that is a callable, when it is through with the steps."""
    state = GraphState(config)
    FuseSparse(state)(graph_module)
    RemoveDeadMasks(state)(graph_module)
    return graph_module


def _chain(decompress: Node) -> tuple[Node, Node] | None:
    """The score and compress nodes of a chain that ends here, if it is whole and nobody else reads a step of it."""
    compressed, indices, count, _ = decompress.args
    attend = _step(compressed, tsa.attend.default)
    if attend is None:
        return None
    rows: Any = attend.args[:3]
    sources = {_row_source(row, position) for position, row in enumerate(rows)}
    compress = _step(sources.pop(), tsa.compress.default, readers=3) if len(sources) == 1 else None
    select = _step(indices, tsa.select.default, readers=2)
    if select is None or compress is None:
        return None
    if compress.args[3:] != (indices, count) or attend.args[3] is not count:
        return None
    score = _scores_source(select.args[0])
    if score is None or score.args[:2] != compress.args[:2]:
        return None
    return (score, compress) if select.args[1] is count and _counts(count, select.args[0]) else None


def _row_source(row: Any, position: int) -> Any:
    """What compress gave, behind its query, key or value."""
    row = _step(row, operator.getitem)
    return row.args[0] if row is not None and row.args[1] == position else None


def _counts(count: Any, scores: Any) -> bool:
    """Whether a count is the budget of these scores, clamped or not, or there is none."""
    if isinstance(count, Node) and count.target is torch.clamp:
        count = count.args[0]
    return count is None or (count.target is tsa.budget.default and count.args[0] is scores)


def _step(node: Any, target: Any, readers: int = 1) -> Node | None:
    return node if isinstance(node, Node) and node.target is target and len(node.users) == readers else None


def _scores_source(node: Any) -> Node | None:
    """`score`, seen through the mean over a group's heads."""
    while isinstance(node, Node) and node.op == "call_method" and node.target in ("mean", "unflatten"):
        node = node.args[0]
    return node if isinstance(node, Node) and node.target is tsa.score.default else None


def _fused(graph: Graph, score: Node, compress: Node, decompress: Node, config: TSAConfig) -> Node:
    query, key, padding, *scoring = score.args
    compressed, indices, count, _ = decompress.args
    value = compress.args[2]
    coverage = config.budget.tau if isinstance(config.budget, Coverage) else None
    keep_ratio = config.budget.ratio if isinstance(config.budget, KeepRatio) else None
    min_tokens, capacity = config.min_tokens, config.capacity
    if isinstance(count, Node):  # not the configured budget where a site keeps all tokens
        clamped = count.target is torch.clamp
        budget: Any = count.args[0] if clamped else count
        _, coverage, keep_ratio, min_tokens = budget.args
        capacity = capacity if clamped else None
    assert isinstance(compressed, Node) and isinstance(indices, Node)
    shared, kernel = indices.args[0] is not score, compressed.args[5]
    options = (*scoring, coverage, keep_ratio, min_tokens, capacity, shared, kernel)
    if padding is None:
        return insert(graph, tsa.sparse_attention.default, query, key, value, *options)
    assert isinstance(padding, Node)
    operands = (query, key, value, padding, spans_of(graph, padding))
    return insert(graph, tsa.padded_sparse_attention.default, *operands, *options)
