"""A rewritten call has the strides of the original wherever a reader can tell, and no copy where none can."""

import pytest
import torch
from torch import nn

from tsa_compile.config import KeepRatio, TSAConfig
from tsa_compile.passes.cleanup import RemoveDeadMasks
from tsa_compile.pipeline import run_passes
from tsa_compile.testing import capture, capture_all, count_ops, widest_elements

SPARSE = TSAConfig(budget=KeepRatio(1.0), window=4, min_tokens=4, layers=[0])
EXACT = TSAConfig(layers=[])
LENGTH = 40


def mask_of(length, padding):
    positions = torch.arange(length)
    return (positions[None, :] <= positions[:, None])[None, None] & padding[:, None, None, :]


def attention(x, padding):
    return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask_of(x.shape[2], padding))


READERS = {
    "returned": lambda out: out,
    "transposed": lambda out: out.transpose(1, 2),
    "viewed": lambda out: out.transpose(1, 2).contiguous().view(2, LENGTH, -1),
    "viewed as it is": lambda out: (
        out.transpose(1, 2).view(2, LENGTH, -1) if out.stride(1) < out.stride(2) else out.view(2, -1)
    ),
    "reshaped": lambda out: out.transpose(1, 2).reshape(2, LENGTH, -1),
    "added": lambda out: out + 1,
}


@pytest.fixture
def inputs():
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[0, :7] = False
    return torch.randn(2, 4, LENGTH, 16), padding


@pytest.mark.parametrize("config", [EXACT, SPARSE], ids=["exact", "sparse"])
@pytest.mark.parametrize("reader", READERS)
def test_shape_strides_and_values_survive(reader, config, inputs):
    read = READERS[reader]

    def function(x, padding):
        return read(attention(x, padding))

    captured = capture_all(function, *inputs)
    (graph,), expected = captured.graphs, function(*inputs)
    report = run_passes(graph, config)
    assert report.unchanged == 0
    (found,) = graph(*captured.inputs[0])
    torch.testing.assert_close(found, expected)
    if reader in ("returned", "transposed"):
        assert found.stride() == expected.stride()


def test_no_copy_where_strides_are_not_seen(inputs):
    graph = capture(lambda x, padding: attention(x, padding).transpose(1, 2).reshape(2, LENGTH, -1), *inputs)
    run_passes(graph, EXACT)
    assert count_ops(graph, "permute", "contiguous") == {"permute": 0, "contiguous": 0}


def test_nothing_of_size_length_squared_is_left(inputs):
    graph = capture(attention, *inputs)
    assert widest_elements(graph) >= LENGTH * LENGTH * 2
    run_passes(graph, EXACT)
    assert count_ops(graph, "le", "scaled_dot_product_attention", "padded_attention") == {
        "le": 0,
        "scaled_dot_product_attention": 0,
        "padded_attention": 1,
    }
    assert not any(LENGTH == extent == other for node in graph.graph.nodes for extent, other in _last_two(node))


def _last_two(node):
    value = node.meta.get("example_value")
    return [tuple(value.shape[-2:])] if isinstance(value, torch.Tensor) and value.dim() >= 2 else []


def test_what_has_an_effect_or_another_reader_stays(inputs):
    x, padding = inputs

    def function(x, padding, log):
        mask = mask_of(x.shape[2], padding)
        log.add_(mask.sum())
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    captured = capture_all(function, x, padding, torch.zeros((), dtype=torch.long))
    (graph,) = captured.graphs
    run_passes(graph, EXACT)
    log = torch.zeros((), dtype=torch.long)
    graph(*[log if isinstance(value, torch.Tensor) and value.dim() == 0 else value for value in captured.inputs[0]])
    assert log == mask_of(LENGTH, padding).sum()
    assert count_ops(graph, "padded_attention")["padded_attention"] == 1


@pytest.mark.parametrize("config", [EXACT, SPARSE.replace(layers=[0, 2])], ids=["exact", "mixed"])
def test_calls_that_read_each_others_output_directly(config, inputs):
    def function(x, padding):
        for _ in range(3):
            x = attention(x, padding)
        return x

    captured = capture_all(function, *inputs)
    (graph,) = captured.graphs
    assert run_passes(graph, config.replace(strict=True)).unchanged == 0
    torch.testing.assert_close(graph(*captured.inputs[0])[0], function(*inputs))


def test_the_cleanup_looks_at_replaced_calls_only(inputs):
    graph = capture(attention, *inputs)
    before = [node.name for node in graph.graph.nodes]
    from tsa_compile.passes.base import GraphState

    RemoveDeadMasks(GraphState(EXACT))(graph)
    assert [node.name for node in graph.graph.nodes] == before
