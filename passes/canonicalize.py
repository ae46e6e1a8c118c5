"""Dense sites with a proven mask, rewritten exactly: no [B,H,L,L] mask, no repeated key and value heads.

    before   m = <arange, <=, &, padding[b, kv], expand ...>                              [B, 1, L, L]
             o = sdpa(q, repeat(k), repeat(v), attn_mask=m)      or softmax(q @ k.mT * s + m) @ v
    after    o = sdpa(q, k, v, is_causal=True, enable_gqa=True)                           mask proven causal
             o = tsa.padded_attention(q, k, v, padding, spans, s)                         causal and padding [B, L]

Both compute what the model computes; the clean-up then removes what built the mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tsa_compile.passes.base import CallPlan, Pass, PassResult
from tsa_compile.passes.call import AttentionCall
from tsa_compile.passes.graph import fake, insert
from tsa_compile.report import Decision


class CanonicalizeDense(Pass):
    """Replaces dense sites whose mask is proven causal, or causal and padding."""

    decisions = (Decision.CAUSAL, Decision.PADDED)
    optional = True

    def call(self, graph_module: GraphModule) -> PassResult:
        graph, matched = graph_module.graph, 0
        for plan in self.state.plans:
            if plan.decision not in self.decisions or _is_canonical(plan.site):
                continue
            with self.state.attempt(plan, graph, "dense rewriting"), graph.inserting_before(plan.site.node):
                new = _causal(graph, plan.site) if plan.decision is Decision.CAUSAL else self._padded(graph, plan)
                self.replace(plan, new)
                matched += 1
        return self.result(graph_module, matched)

    def _padded(self, graph: Graph, plan: CallPlan) -> Node:
        site, meaning, padding = plan.site, plan.meaning, plan.padding
        assert meaning is not None and padding is not None
        spans = self.state.builder(graph).spans(padding)
        operands = (site.query, site.key, site.value, padding, spans, scale_of(site))
        return insert(graph, torch.ops.tsa.padded_attention.default, *operands, meaning.mean_rows)


def scale_of(site: AttentionCall) -> Any:
    """A site's scale as an argument: a number or a node."""
    return 1.0 / math.sqrt(fake(site.query).shape[3]) if site.scale is None else site.scale


def _is_canonical(site: AttentionCall) -> bool:
    return site.form == "sdpa" and not site.masks and not site.peeled


def _causal(graph: Graph, site: AttentionCall) -> Node:
    key, value = site.key, site.value
    query = fake(site.query)
    if site.peeled and query.device.type == "cuda" and query.dtype == torch.float32:
        assert site.wide_key is not None and site.wide_value is not None
        key, value = site.wide_key, site.wide_value  # no fused float32 kernel takes grouped heads
    call: Any = torch.nn.functional.scaled_dot_product_attention
    if isinstance(site.node.target, torch._ops.OpOverload):
        call = torch.ops.aten.scaled_dot_product_attention.default
    options: dict[str, Any] = {"is_causal": True, "scale": scale_of(site)}
    if fake(key).shape[1] != query.shape[1]:
        options["enable_gqa"] = True
    return insert(graph, call, site.query, key, value, **options)
