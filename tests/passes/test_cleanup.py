"""The clean-up takes what only replaced calls read, and nothing that anybody else reads or that has an effect."""

import pytest
import torch
from torch.fx import GraphModule

from tsa_compile.passes.base import GraphState
from tsa_compile.passes.cleanup import RemoveDeadMasks
from tsa_compile.passes.graph import insert
from tsa_compile.passes.record import record
from tsa_compile.pipeline import run_passes
from tsa_compile.testing import capture, capture_all, count_ops, graph_text

from .support import EXACT, L, causal, hand_built, inputs, padded_attention, padding


def clean(graph, *replaced, output, recorded=True):
    """The names of the calls that are left, when `replaced` are calls that others took the place of."""
    graph.output((output,))
    module = GraphModule(torch.nn.Module(), graph)
    state = GraphState(EXACT, aten=record(module) if recorded else None, detached=[*replaced])
    RemoveDeadMasks(state)(module)
    graph.lint()
    assert state.detached == [], "the next pass would look at nodes that are gone"
    return [node.name for node in graph.nodes if node.op.startswith("call")]


def test_a_chain_goes_up_to_what_others_read():
    graph, x = hand_built(x=torch.randn(2, 3))
    shared = insert(graph, torch.sin, x)
    mask = insert(graph, torch.cos, insert(graph, torch.exp, shared))
    old = insert(graph, torch.mul, mask, mask)
    assert clean(graph, old, output=insert(graph, torch.neg, shared)) == ["sin", "neg"]


def test_a_replaced_call_that_is_still_read_stays():
    graph, x = hand_built(x=torch.randn(2, 3))
    old = insert(graph, torch.cos, insert(graph, torch.sin, x))
    assert clean(graph, old, output=old) == ["sin", "cos"]


def test_what_nobody_replaced_stays():
    """A call of the model's whose value nobody reads may be there for its effect."""
    graph, x = hand_built(x=torch.randn(2, 3))
    insert(graph, torch.sin, x)
    assert clean(graph, output=insert(graph, torch.cos, x)) == ["sin", "cos"]


@pytest.mark.parametrize(
    "effect",
    [lambda graph, x: insert(graph, "add_", x, 1), lambda graph, x: insert(graph, torch.nn.functional.dropout, x, 0.5)],
    ids=["a write", "a random number"],
)
def test_an_effect_stays_when_its_value_is_not_read_any_more(effect):
    graph, x = hand_built(x=torch.randn(2, 3))
    node = effect(graph, x)
    old = insert(graph, torch.cos, insert(graph, torch.sin, node))
    assert clean(graph, old, output=x) == [node.name]


def test_without_recorded_operators_only_our_own_are_known_to_be_pure():
    graph, x = hand_built(x=torch.ones(2, 3, dtype=torch.bool))
    inverted = insert(graph, torch.logical_not, x)
    old = insert(graph, torch.neg, insert(graph, torch.ops.tsa.valid_ranges.default, inverted))
    assert clean(graph, old, output=x, recorded=False) == ["logical_not"]


@pytest.mark.parametrize(
    ("options", "stays"), [({"dtype": torch.float32}, False), ({"size": [2, 3]}, True)], ids=["dtype", "size"]
)
def test_an_assertion_of_the_type_goes_with_its_value(options, stays):
    """One of sizes is about the model's inputs: it stays, and so does what it looks at."""
    graph, x = hand_built(x=torch.randn(2, 3))
    looked_at = insert(graph, torch.sin, x)
    graph.call_function(torch.ops.aten._assert_tensor_metadata.default, (looked_at,), options)
    old = insert(graph, torch.cos, looked_at)
    left = clean(graph, old, output=x)
    assert left == (["sin", "_assert_tensor_metadata_default"] if stays else [])


def test_nothing_as_large_as_the_mask_is_left():
    graph = capture(padded_attention, *inputs(), padding())
    run_passes(graph, EXACT)
    assert count_ops(graph, "le", "scaled_dot_product_attention", "padded_attention") == {
        "le": 0,
        "scaled_dot_product_attention": 0,
        "padded_attention": 1,
    }
    values = [node.meta.get("example_value") for node in graph.graph.nodes]
    assert not any(value.shape[-2:] == (L, L) for value in values if isinstance(value, torch.Tensor))


def test_a_mask_with_another_reader_stays():
    def function(q, k, v, pad, log):
        mask = causal(q.shape[2]) & pad.bool()[:, None, None, :]
        log.add_(mask.sum())
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    captured = capture_all(function, *inputs(), padding(), torch.zeros((), dtype=torch.long))
    (graph,) = captured.graphs
    run_passes(graph, EXACT)
    log = torch.zeros((), dtype=torch.long)
    graph(*[log if isinstance(value, torch.Tensor) and value.dim() == 0 else value for value in captured.inputs[0]])
    assert log == (causal(L) & padding().bool()[:, None, None, :]).sum()
    assert count_ops(graph, "padded_attention") == {"padded_attention": 1}


def test_a_graph_without_replaced_calls_is_left_alone():
    graph = capture(padded_attention, *inputs(), padding())
    before = graph_text(graph)
    assert not RemoveDeadMasks(GraphState(EXACT))(graph).modified
    assert graph_text(graph) == before
