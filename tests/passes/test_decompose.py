"""The one op of a sparse call, opened: what its steps are, and that each configuration's steps compute what the op does."""

# ruff: noqa: E501  (a node is a line)

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.config import Coverage, Floor, KeepRatio
from tsa_compile.passes.base import GraphState
from tsa_compile.passes.decompose import Decompose
from tsa_compile.pipeline import WHOLE, run_passes
from tsa_compile.testing import capture_all, count_ops, graph_text

from .support import SPARSE, causal_attention, inputs, padded_attention, padding

STEPS = ("score", "budget", "select", "compress", "attend", "decompress")


def rewritten(function, *arguments, config):
    """A graph with whole ops, and its inputs."""
    captured = capture_all(function, *arguments)
    run_passes(captured.graphs[0], config, WHOLE)
    return captured.graphs[0], captured.inputs[0]


@settings(max_examples=20, deadline=None)
@given(
    budget=st.sampled_from([Coverage(0.3), Coverage(0), KeepRatio(0.4), KeepRatio(1.0)]),
    capacity=st.sampled_from([None, 7]),
    granularity=st.sampled_from(["head", "group"]),
    floor=st.sampled_from([None, Floor(2, 1)]),
    padded=st.booleans(),
)
def test_the_steps_compute_what_the_op_does(budget, capacity, granularity, floor, padded):
    config = SPARSE.replace(budget=budget, capacity=capacity, granularity=granularity, floor=floor)
    function, mask = (padded_attention, (padding(),)) if padded else (causal_attention, ())
    graph, given_ = rewritten(function, *inputs(), *mask, config=config)
    wanted = graph(*given_)[0]
    result = Decompose(GraphState(config))(graph)
    assert result.modified and Decompose(GraphState(config)).call(graph).modified is False
    graph.graph.lint()
    torch.testing.assert_close(graph(*given_)[0], wanted)
    counted = isinstance(budget, Coverage) or padded
    steps = (*STEPS[:4], "attend_lse", "merge_floor") if floor else STEPS
    assert count_ops(graph, *steps) == {step: int(step != "budget" or counted) for step in steps}


def test_a_floor_is_opened():
    """Window and sinks are the last numbers of the one op."""
    config = SPARSE.replace(budget=Coverage(0.3), floor=Floor(2, 1))
    graph, _ = rewritten(causal_attention, *inputs(), config=config.replace(granularity="group"))
    assert_expected_inline(
        graph_text(graph),
        """\
l_q_: float32[2, 4, 12, 8]
l_k_: float32[2, 2, 12, 8]
l_v_: float32[2, 2, 12, 8]
sparse_attention_default: float32[2, 4, 12, 8] = sparse_attention(l_q_, l_k_, l_v_, 0.353553, 3, 3, 0.3, None, 2, None, True, auto, 2, 1)
transpose: float32[2, 12, 4, 8] = transpose(sparse_attention_default, 1, 2)
reshape_2: float32[2, 12, 32] = reshape(transpose, 2, -1, 32)
return (reshape_2)""",
    )
    graph, _ = rewritten(padded_attention, *inputs(), padding(), config=config)
    assert_expected_inline(
        graph_text(graph),
        """\
l_q_: float32[2, 4, 12, 8]
l_pad_: int64[2, 12]
l_k_: float32[2, 2, 12, 8]
l_v_: float32[2, 2, 12, 8]
eq: bool[2, 12] = eq(l_pad_, 0)
logical_not: bool[2, 12] = not(eq)
expand: bool[2, 12] = expand(logical_not, 2, 12)
valid_ranges_default: int64[2, 3] = valid_ranges(expand)
padded_sparse_attention_default: float32[2, 4, 12, 8] = padded_sparse_attention(l_q_, l_k_, l_v_, expand, valid_ranges_default, 0.353553, 3, 3, 0.3, None, 2, None, False, auto, 2, 1)
transpose: float32[2, 12, 4, 8] = transpose(padded_sparse_attention_default, 1, 2)
reshape: float32[2, 12, 32] = reshape(transpose, 2, -1, 32)
return (reshape)""",
    )
    Decompose(GraphState(config))(graph)
    assert_expected_inline(
        graph_text(graph),
        """\
l_q_: float32[2, 4, 12, 8]
l_pad_: int64[2, 12]
l_k_: float32[2, 2, 12, 8]
l_v_: float32[2, 2, 12, 8]
eq: bool[2, 12] = eq(l_pad_, 0)
logical_not: bool[2, 12] = not(eq)
expand: bool[2, 12] = expand(logical_not, 2, 12)
valid_ranges_default: int64[2, 3] = valid_ranges(expand)
score_default: float32[2, 4, 12] = score(l_q_, l_k_, expand, 0.353553, 3, 3)
budget_default: int32[2] = budget(score_default, 0.3, None, 2)
select_default: int32[2, 4, 12] = select(score_default, budget_default, 12)
compress_default: tuple = compress(l_q_, l_k_, l_v_, select_default, budget_default)
getitem_3: float32[2, 4, 12, 8] = getitem(compress_default, 0)
getitem_4: float32[2, 4, 12, 8] = getitem(compress_default, 1)
getitem_5: float32[2, 4, 12, 8] = getitem(compress_default, 2)
attend_lse_default: tuple = attend_lse(getitem_3, getitem_4, getitem_5, budget_default, 0.353553, auto)
getitem_6: float32[2, 4, 12, 8] = getitem(attend_lse_default, 0)
getitem_7: float32[2, 4, 12] = getitem(attend_lse_default, 1)
merge_floor_default: float32[2, 4, 12, 8] = merge_floor(l_q_, l_k_, l_v_, getitem_6, getitem_7, select_default, budget_default, expand, 0.353553, 2, 1)
transpose: float32[2, 12, 4, 8] = transpose(merge_floor_default, 1, 2)
reshape: float32[2, 12, 32] = reshape(transpose, 2, -1, 32)
return (reshape)""",
    )


def test_what_the_op_stood_for_keeps_its_metadata():
    graph, _ = rewritten(causal_attention, *inputs(), config=SPARSE)
    (whole,) = (node for node in graph.graph.nodes if "sparse_attention" in str(node.target))
    meta = {name: whole.meta[name] for name in whole.meta if name != "example_value"}
    Decompose(GraphState(SPARSE))(graph)
    (last,) = (node for node in graph.graph.nodes if "tsa.decompress" in str(node.target))
    assert meta and all(last.meta[name] == value for name, value in meta.items())
    assert last.meta["example_value"].stride() == whole.meta["example_value"].stride()


@pytest.mark.parametrize("budget", [Coverage(0.3), KeepRatio(0.5)])
def test_a_symbolic_length_stays_symbolic(budget):
    def attention(q):
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(2, -1, 32)

    q = inputs()[0]
    torch._dynamo.mark_dynamic(q, 2)
    config = SPARSE.replace(budget=budget)
    graph, _ = rewritten(attention, q, config=config)
    Decompose(GraphState(config))(graph)
    (select,) = graph.graph.find_nodes(op="call_function", target=torch.ops.tsa.select.default)
    assert isinstance(select.meta["example_value"].shape[2], torch.SymInt)
    for length in (12, 9, 4, 2):
        longer = torch.randn(2, 4, length, 8)
        reference, _ = rewritten(attention, longer, config=config)
        values = [longer if isinstance(value, torch.Tensor) else length for value in placeholders(graph)]
        torch.testing.assert_close(graph(*values)[0], reference(longer)[0])


def placeholders(graph):
    return [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
