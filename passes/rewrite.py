"""Planned calls, rewritten to token sparse attention (arXiv 2602.03216, section 3), each as one op.

    before   o = <attention>(q [B,H,L,D], k [B,G,L,D], v [B,G,L,Dv])                      [B, H, L, Dv]
    after    o = tsa.sparse_attention(q, k, v, scale, window, pool, coverage, keep_ratio, ...)      without padding
             o = tsa.padded_sparse_attention(q, k, v, padding [B,L], valid_ranges [B,3], scale, ...)       with padding
             o = tsa.filled_sparse_attention(q, k, v, .., positions [Lq], filled [2], ...)    into a cache of a fixed size

`decompose.py` opens the op into its steps where they are needed. A call that keeps all tokens, for the kernel that
`dense_kernel` names, needs no steps but for padding:

    after    o = tsa.attend(q, k, v, None, scale, dense_kernel)                           [B, H, L, Dv]

A call with sinks (kernels/sink.py) hands them on as sink_logits=[H].
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tsa_compile.config import Coverage, KeepRatio, TSAConfig
from tsa_compile.kernels.options import Options
from tsa_compile.passes.base import CallPlan, Pass, PassResult
from tsa_compile.passes.canonicalize import scale_of
from tsa_compile.passes.graph import given, insert
from tsa_compile.reasons import Decision

tsa = torch.ops.tsa


class RewriteSparse(Pass):
    """Replaces every call that was planned sparse, and runs the kernel that others are to have."""

    decisions = (Decision.SPARSE, Decision.KERNEL)
    optional = True

    def call(self, graph_module: GraphModule) -> PassResult:
        return self.replace_calls(graph_module, "sparse rewriting", self._attention)

    def _attention(self, graph: Graph, plan: CallPlan) -> Node:
        if plan.decision is Decision.SPARSE:
            return self._sparse(graph, plan, plan.config)
        if plan.padding is None:
            call = plan.call
            rows = (call.query, call.key, call.value)
            sink = given(sink_logits=call.sink_logits)
            return insert(graph, tsa.attend.default, *rows, None, scale_of(call), plan.kernel, **sink)
        return self._sparse(graph, plan, keeping_all(plan.config, plan.kernel))

    def _sparse(self, graph: Graph, plan: CallPlan, config: TSAConfig) -> Node:
        op = tsa.sparse_attention
        if plan.filled is not None:
            op = tsa.filled_sparse_attention
        elif plan.padding is not None:
            op = tsa.padded_sparse_attention
        options = options_of(config, scale_of(plan.call), plan.group)
        sink = given(sink_logits=plan.call.sink_logits)
        return insert(graph, op.default, *self.state.operands(plan, graph), *options, **sink)


def keeping_all(config: TSAConfig, kernel: str) -> TSAConfig:
    """What runs a kernel over all valid tokens: heads that all keep the same can share them."""
    return config.replace(budget=KeepRatio(1.0), capacity=None, granularity="group", floor=None, score="mean", kernel=kernel)


def options_of(config: TSAConfig, scale: Any, group: str | None = None) -> tuple[Any, ...]:
    """The arguments of the ops behind their tensors (kernels/options.py)."""
    budget, floor = config.budget, config.floor
    return Options(
        scale, config.window, config.pool, coverage=budget.tau if isinstance(budget, Coverage) else None,
        keep_ratio=budget.ratio if isinstance(budget, KeepRatio) else None, min_tokens=config.min_tokens,
        capacity=config.capacity, shared=config.granularity == "group", kernel=config.kernel,
        floor_window=None if floor is None else floor.window, floor_sinks=0 if floor is None else floor.sinks,
        group=group, reduce=config.score,
    ).arguments()  # fmt: skip
