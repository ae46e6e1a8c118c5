"""Writes which tokens are valid, and in a cache of a fixed size how far it is filled, once for all calls, before the first.

before   MaskInfo.padding, a formula in (b, kv) over recorded values                  attention_mask[b, kv] != 0
after    padding = (attention_mask != 0).expand(B, L)                                 bool [B, L]
         filled = tsa.filled(positions)                                               int64 [2], on the host
         lists_match = tsa.listed(*block_mask, padding, ...)                          int64 [1], on the host
"""

from __future__ import annotations

from torch.fx import GraphModule

from tsa_compile.passes.base import Pass, PassResult
from tsa_compile.passes.masks.info import FILLED_KINDS
from tsa_compile.reasons import Decision


class EmitPadding(Pass):
    """Writes the padding of every call that is to be rewritten."""

    def call(self, graph_module: GraphModule) -> PassResult:
        graph = graph_module.graph
        builder = self.state.builder(graph)
        for plan in self.state.plans:
            info = plan.mask
            if plan.decision is Decision.UNCHANGED or info is None:
                continue
            with self.state.attempt(plan, graph, "writing its padding"), graph.inserting_before(plan.call.node):
                plan.padding = builder.padding(plan.call, info)
                plan.filled = builder.positions(plan.call, info) if info.kind in FILLED_KINDS else None
                if plan.call.lists is not None:
                    positions = None if plan.filled is None else plan.filled[0]
                    plan.lists_match = builder.lists_match(plan.call, plan.call.lists, plan.padding, positions)
        emitted = [plan.padding for plan in self.state.plans if plan.padding is not None]
        emitted += [told for plan in self.state.plans if plan.filled is not None for told in plan.filled[1:]]
        emitted += [plan.lists_match for plan in self.state.plans if plan.lists_match is not None]
        self.state.detached.extend(emitted)  # they go where no rewrite reads them after all
        return self.result(graph_module, len(emitted))
