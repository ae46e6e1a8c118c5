"""The one op of a sparse call, opened: what its steps are, and that each configuration's steps compute what the op does."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.config import Coverage, Floor, KeepRatio
from tsa_compile.passes.base import GraphState
from tsa_compile.passes.decompose import Decompose
from tsa_compile.pipeline import WHOLE
from tsa_compile.testing import count_ops

from .support import SPARSE, Rewritten, causal, causal_attention, inputs, padded_attention, padding

STEPS = ("score", "budget", "select", "compress", "attend", "decompress")


def rewritten(function, *arguments, config):
    """A graph with whole ops, and its inputs."""
    made = Rewritten(function, *arguments, config=config, passes=WHOLE)
    return made.after, made.inputs


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


def behind_a_cache(query, key, value, pad=None):
    mask = causal(key.shape[2])[key.shape[2] - query.shape[2] :]
    if pad is not None:
        mask = mask & pad.bool()[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


@settings(max_examples=12, deadline=None)
@given(
    budget=st.sampled_from([Coverage(0.3), KeepRatio(0.4)]),
    window=st.sampled_from([3, 40]),
    granularity=st.sampled_from(["head", "group"]),
    floor=st.sampled_from([None, Floor(2, 1)]),
    padded=st.booleans(),
)
def test_the_steps_of_a_chunk_compute_what_the_op_does(budget, window, granularity, floor, padded):
    """The last 34 of 50 positions, and a scoring window of more rows than these."""
    config = SPARSE.replace(budget=budget, window=window, granularity=granularity, floor=floor)
    query, key, value = inputs(50)
    graph, given_ = rewritten(
        behind_a_cache, query[:, :, 16:], key, value, *((padding(50),) if padded else ()), config=config
    )
    (whole,) = (node for node in graph.graph.nodes if "sparse_attention" in str(node.target))
    strides, wanted = whole.meta["example_value"].stride(), graph(*given_)[0]
    assert Decompose(GraphState(config))(graph).modified
    graph.graph.lint()
    torch.testing.assert_close(graph(*given_)[0], wanted)
    assert count_ops(graph, "score", "sparse_attention", "padded_sparse_attention") == {
        "score": 1, "sparse_attention": 0, "padded_sparse_attention": 0,
    }  # fmt: skip
    last = [node for node in graph.graph.nodes if node.target == "transpose"][-1]
    assert last.meta["example_value"].stride() == strides


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
