"""Writes which tokens are valid, once for all calls that share it, in front of the first.

before   MaskInfo.padding, a formula in (b, kv) over recorded values                  attention_mask[b, kv] != 0
after    padding = (attention_mask != 0).expand(B, L)                                 bool [B, L]
"""

from __future__ import annotations

from torch.fx import GraphModule

from tsa_compile.passes.base import Pass, PassResult
from tsa_compile.reasons import Decision


class EmitPadding(Pass):
    """Writes the padding of every call that is to be rewritten."""

    def call(self, graph_module: GraphModule) -> PassResult:
        graph = graph_module.graph
        builder = self.state.builder(graph)
        for plan in self.state.plans:
            info = plan.mask
            if plan.decision is Decision.UNCHANGED or info is None or info.padding is None:
                continue
            with self.state.attempt(plan, graph, "writing its padding"), graph.inserting_before(plan.call.node):
                plan.padding = builder.padding(plan.call, info)
        emitted = [plan.padding for plan in self.state.plans if plan.padding is not None]
        self.state.detached.extend(emitted)  # they go where no rewrite reads them after all
        return self.result(graph_module, len(emitted))
