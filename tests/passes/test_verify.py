"""What the last pass holds a graph to: each violation raises and names the call or the node."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F

from tsa_compile.errors import RewriteError
from tsa_compile.passes.canonicalize import CanonicalizeDense
from tsa_compile.passes.cleanup import RemoveDeadMasks
from tsa_compile.passes.emit_padding import EmitPadding
from tsa_compile.passes.masks.info import CAUSAL_KINDS, MaskInfo, MaskKind
from tsa_compile.passes.verify import Verify
from tsa_compile.reasons import Decision
from tsa_compile.testing import graph_text

from .support import EXACT, SPARSE, causal_attention, inputs, padded_attention, padding, passed

SOUND = CAUSAL_KINDS


def rewritten(last=RemoveDeadMasks, config=EXACT):
    graph, state, _ = passed(last, padded_attention, *inputs(), padding(), config=config)
    return graph, state, state.plans[0]


@pytest.mark.parametrize("config", [EXACT, SPARSE], ids=["dense", "sparse"])
def test_a_sound_graph_passes_and_is_not_changed(config):
    graph, state, _ = rewritten(config=config)
    before, step = graph_text(graph), Verify(state)
    assert not step(graph).modified and step.matched == 1
    assert graph_text(graph) == before


def test_a_node_that_is_read_before_it_is_computed():
    graph, state, _ = rewritten()
    (valid_ranges,) = graph.graph.find_nodes(op="call_function", target=torch.ops.tsa.valid_ranges.default)
    next(node for node in graph.graph.nodes if node.op == "output").prepend(valid_ranges)
    with pytest.raises(RuntimeError, match=f"{valid_ranges.name}.*used before it has been defined"):
        Verify(state)(graph)


@pytest.mark.parametrize("kind", [None, *(kind for kind in MaskKind if kind not in SOUND)])
def test_a_call_was_rewritten_under_another_mask(kind):
    graph, state, plan = rewritten()
    plan.mask = None if kind is None else MaskInfo(kind)
    with pytest.raises(RewriteError, match=f"^{plan.call.layer!r} was rewritten, but its mask is {kind}$"):
        Verify(state)(graph)
    plan.decision = Decision.UNCHANGED  # of a call that was left alone any mask is right
    Verify(state)(graph)


def test_a_call_was_decided_about_and_not_replaced():
    graph, state, plan = rewritten(EmitPadding)
    name = re.escape(plan.call.node.name)
    with pytest.raises(RewriteError, match=f"^{plan.call.layer!r} was rewritten, but '{name}' is still read$"):
        Verify(state)(graph)


def test_a_replaced_call_got_a_reader_again():
    graph, state, plan = rewritten(CanonicalizeDense)
    Verify(state)(graph)
    with graph.graph.inserting_after(plan.call.node):
        graph.graph.call_function(torch.neg, (plan.call.node,))
    with pytest.raises(RewriteError, match=f"^{plan.call.layer!r} was rewritten, but .* is still read$"):
        Verify(state)(graph)


def test_a_call_that_was_canonical_already_stays_and_is_read():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    graph, state, _ = passed(RemoveDeadMasks, attention, *inputs(), config=EXACT)
    (plan,) = state.plans
    assert plan.decision is Decision.DENSE and plan.call.node.users
    Verify(state)(graph)
    plan.decision = Decision.SPARSE
    with pytest.raises(RewriteError, match="is still read"):
        Verify(state)(graph)


@pytest.mark.parametrize("function", [causal_attention, padded_attention])
def test_one_of_our_ops_reads_a_mask_that_was_proven_away(function):
    arguments = inputs() if function is causal_attention else (*inputs(), padding())
    graph, state, _ = passed(CanonicalizeDense, function, *arguments, config=EXACT)
    (plan,) = state.plans
    (term,) = plan.call.masks
    mask = plan.call.aten.holder(term.mask)
    with graph.graph.inserting_after(mask):
        graph.graph.call_function(torch.sum, (mask,))
    Verify(state)(graph)  # the model may read its mask as often as it likes
    with graph.graph.inserting_after(mask):
        ours = graph.graph.call_function(torch.ops.tsa.valid_ranges.default, (mask,))
    with pytest.raises(RewriteError, match=f"^{ours.name!r} reads a mask that was proven away$"):
        Verify(state)(graph)


def test_a_call_without_a_decision_may_be_anything():
    graph, state, plan = rewritten(EmitPadding)
    plan.decision, plan.mask = Decision.UNCHANGED, None
    plan.call = dataclasses.replace(plan.call, masks=())
    step = Verify(state)
    step(graph)
    assert step.matched == 0
