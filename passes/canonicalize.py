"""Dense calls with a proven mask, rewritten exactly: no [B,H,L,L] mask, no repeated key and value heads.

    before   m = <arange, <=, &, padding[b, kv], expand ...>                              [B, 1, L, L]
             o = sdpa(q, repeat(k), repeat(v), attn_mask=m)      or softmax(q @ k.mT * s + m) @ v
    after    o = sdpa(q, k, v, is_causal=True, enable_gqa=True)                           mask proven causal
             o = tsa.attend(q, k, v, None, s, "triton")                                   the same, where SDPA is slow
             o = tsa.cached_attention(q, k, v, s)                                         causal, q the last of k's positions
             o = tsa.padded_attention(q, k, v, padding, valid_ranges, s)                         causal and padding [B, L]
             o = tsa.sliding_attention(q, k, v, s, window)                                causal, window keys a row
             o = tsa.padded_sliding_attention(q, k, v, padding, valid_ranges, s, window)             and padding [B, L]
             o = tsa.filled_attention(q, k, v, .., positions [Lq], filled [2], s)         causal up to positions in a cache

Each computes what the model computes, up to rounding; the clean-up then removes what built the mask. All but SDPA take a
call's sinks, sink_logits=[H] (kernels/sink.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tsa_compile.kernels.registry import TRITON
from tsa_compile.passes.base import CallPlan, Pass, PassResult
from tsa_compile.passes.call import AttentionCall
from tsa_compile.passes.graph import fake, given, insert, known
from tsa_compile.reasons import Decision


class CanonicalizeDense(Pass):
    """Replaces dense calls whose mask is proven causal, over a window or not, or that and padding."""

    decisions = (Decision.DENSE, Decision.DENSE_PADDED, Decision.WINDOW)
    optional = True

    def call(self, graph_module: GraphModule) -> PassResult:
        return self.replace_calls(graph_module, "dense rewriting", self._dense)

    def _dense(self, graph: Graph, plan: CallPlan) -> Node | None:
        call = plan.call
        if plan.decision is Decision.WINDOW:
            return self._window(graph, plan)
        rows, whole = (call.query, call.key, call.value), known(_length(call.query) == _length(call.key))
        named = plan.decision is Decision.DENSE and plan.kernel == TRITON
        if named and whole:
            sink = given(sink_logits=call.sink_logits)
            return insert(graph, torch.ops.tsa.attend.default, *rows, None, scale_of(call), plan.kernel, **sink)
        if call.form == "sdpa" and not call.masks and not call.peeled:
            return None
        if plan.filled is None and plan.decision is Decision.DENSE:
            return _causal(graph, call)
        assert plan.mask is not None
        op = torch.ops.tsa.padded_attention if plan.filled is None else torch.ops.tsa.filled_attention
        operands = (*self.state.operands(plan, graph), scale_of(call))
        return insert(graph, op.default, *operands, plan.mask.mean_rows, **given(sink_logits=call.sink_logits))

    def _window(self, graph: Graph, plan: CallPlan) -> Node:
        assert plan.mask is not None
        operands = (*self.state.operands(plan, graph), scale_of(plan.call), plan.mask.window)
        sink = given(sink_logits=plan.call.sink_logits)
        if plan.padding is None:
            return insert(graph, torch.ops.tsa.sliding_attention.default, *operands, **sink)
        return insert(graph, torch.ops.tsa.padded_sliding_attention.default, *operands, plan.mask.mean_rows, **sink)


def _length(rows: Node) -> Any:
    return fake(rows).shape[2]


def scale_of(call: AttentionCall) -> Any:
    """A call's scale as an argument: a number or a node."""
    return 1.0 / math.sqrt(fake(call.query).shape[3]) if call.scale is None else call.scale


def _causal(graph: Graph, call: AttentionCall) -> Node:
    sink = given(sink_logits=call.sink_logits)
    key, value = call.key, call.value
    query = fake(call.query)
    if sink or not known(_length(call.query) == _length(key)):
        return insert(graph, torch.ops.tsa.cached_attention.default, call.query, key, value, scale_of(call), **sink)
    if call.peeled and query.device.type == "cuda" and query.dtype == torch.float32:
        assert call.wide_key is not None and call.wide_value is not None
        key, value = call.wide_key, call.wide_value  # no fused float32 kernel takes grouped heads
    attention: Any = torch.nn.functional.scaled_dot_product_attention
    if isinstance(call.node.target, torch._ops.OpOverload):
        attention = torch.ops.aten.scaled_dot_product_attention.default
    options: dict[str, Any] = {"is_causal": True, "scale": scale_of(call)}
    if fake(key).shape[1] != query.shape[1]:
        options["enable_gqa"] = True
    return insert(graph, attention, call.query, key, value, **options)
