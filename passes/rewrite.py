"""Planned sites, rewritten to token sparse attention (arXiv 2602.03216, section 3).

    before   o = <attention>(q [B,H,L,D], k [B,G,L,D], v [B,G,L,Dv])                      [B, H, L, Dv]
    after    scores  = tsa.score(q, k, padding, scale, window, pool)                      [B, H, L] float32
             count   = tsa.budget(scores, coverage, min_tokens)                           [B] int32, on the device
             indices = tsa.select(scores, count, C)                                       [B, H, C] int32, ascending
             q^, k^, v^ = tsa.compress(q, k, v, indices, count)                           [B, H, C, D]
             o^      = tsa.attend(q^, k^, v^, count, scale, kernel)                       [B, H, C, Dv]
             o       = tsa.decompress(o^, indices, count, L)                              [B, H, L, Dv]

C is L, the configured capacity, or, for KeepRatio, an expression in L: no shape depends on data. KeepRatio without
padding needs no count at all. With granularity "group", scores are averaged over a group's heads first: [B, G, L].

A site that keeps all tokens, for the kernel that `dense_kernel` names, needs no steps around it but for padding:

    after    o = tsa.attend(q, k, v, None, scale, dense_kernel)                           [B, H, L, Dv]
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from tsa_compile.config import KeepRatio, TSAConfig
from tsa_compile.kernels.kept import kept_of_share
from tsa_compile.passes.base import Pass, PassResult, SitePlan
from tsa_compile.passes.canonicalize import scale_of
from tsa_compile.passes.graph import fake, insert, known, size
from tsa_compile.passes.sites import AttentionSite
from tsa_compile.report import Decision


class RewriteSparse(Pass):
    """Replaces every site that was planned sparse by the five steps, and runs the kernel that others are to have."""

    def call(self, graph_module: GraphModule) -> PassResult:
        graph, modified = graph_module.graph, False
        for plan in self.state.plans:
            if plan.decision not in (Decision.SPARSE, Decision.KERNEL):
                continue
            with self.state.attempt(plan, graph, "sparse rewriting"), graph.inserting_before(plan.site.node):
                self.replace(plan, self._attention(graph, plan, plan.padding))
                modified = True
        return self.result(graph_module, modified)

    def _attention(self, graph: Graph, plan: SitePlan, padding: Node | None) -> Node:
        config, site = self.state.config, plan.site
        if plan.decision is Decision.SPARSE:
            return _five_steps(graph, plan, config, padding)
        if padding is None:
            rows, attend = (site.query, site.key, site.value), torch.ops.tsa.attend.default
            return insert(graph, attend, *rows, None, scale_of(site), plan.kernel)
        # Heads that all keep the valid tokens can share them.
        whole = config.replace(budget=KeepRatio(1.0), capacity=None, granularity="group", kernel=plan.kernel)
        return _five_steps(graph, plan, whole, padding)


def _five_steps(graph: Graph, plan: SitePlan, config: TSAConfig, padding: Node | None) -> Node:
    site, tsa = plan.site, torch.ops.tsa
    scale, length = scale_of(site), size(graph, site.query, 2)
    scores = insert(graph, tsa.score.default, site.query, site.key, padding, scale, config.window, config.pool)
    if config.granularity == "group":
        scores = _group_mean(graph, site, scores)
    capacity = _capacity(graph, config, length)
    count = _count(graph, config, scores, padding, capacity)
    indices = insert(graph, tsa.select.default, scores, count, capacity)
    rows = insert(graph, tsa.compress.default, site.query, site.key, site.value, indices, count)
    query, key, value = (insert(graph, operator.getitem, rows, i) for i in range(3))
    compressed = insert(graph, tsa.attend.default, query, key, value, count, scale, config.kernel)
    return insert(graph, tsa.decompress.default, compressed, indices, count, length)


def _group_mean(graph: Graph, site: AttentionSite, scores: Node) -> Node:
    """[B, H, L] -> [B, G, L]; +inf (the window) and -inf (padding) are the same for all heads and stay."""
    groups = fake(site.key).shape[1]
    grouped = insert(graph, "unflatten", scores, 1, (groups, -1))
    return insert(graph, "mean", grouped, 2)


def _capacity(graph: Graph, config: TSAConfig, length: int | Node) -> int | Node:
    """The static or symbolic size of the compressed rows."""
    extent = Proxy(length, _Inserting(graph)) if isinstance(length, Node) else length
    if isinstance(config.budget, KeepRatio):
        share = config.budget.fraction
        extent = kept_of_share(
            extent, config.window, share, config.min_tokens, config.capacity, minimum=_minimum, maximum=_maximum
        )
    elif config.capacity is not None:
        extent = _minimum(extent, config.capacity)
    return extent.node if isinstance(extent, Proxy) else extent


def _count(graph: Graph, config: TSAConfig, scores: Node, padding: Node | None, capacity: int | Node) -> Node | None:
    """How many slots are real, per batch item; None if all are, which KeepRatio without padding knows beforehand."""
    if isinstance(config.budget, KeepRatio):
        if padding is None:
            return None
        budget: tuple[float | None, float | None] = (None, config.budget.ratio)
    else:
        budget = (config.budget.tau, None)
    count = insert(graph, torch.ops.tsa.budget.default, scores, *budget, config.min_tokens)
    if config.capacity is not None:
        count = insert(graph, torch.clamp, count, max=capacity)
    return count


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
