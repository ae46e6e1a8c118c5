"""A rewritten call has the strides of the original wherever a reader can tell, and no copy where none can."""

import pytest
import torch
from torch import nn

from tsa_compile.config import KeepRatio, TSAConfig
from tsa_compile.pipeline import run_passes
from tsa_compile.testing import capture, capture_all, count_ops

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
    "as it lies in memory": lambda out: torch.as_strided_copy(out, (out.numel(),), (1,)),
    "written over as it lies in memory": lambda out: torch.as_strided_scatter(
        out, torch.zeros(100), (100,), (1,)
    ).contiguous(),
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


COPIES = {
    "a copy that becomes a view": lambda out: out.transpose(1, 2).reshape(2, LENGTH, -1),
    "another one": lambda out: out.transpose(1, 2).contiguous(),
    "a view that becomes a copy": lambda out: out.contiguous(),
}


@pytest.mark.parametrize("config", [EXACT, SPARSE], ids=["exact", "sparse"])
@pytest.mark.parametrize("reader", COPIES)
def test_what_is_written_to_a_copy_stays_there(reader, config, inputs):
    def function(x, padding):
        out = (x @ x.mT * 0.25).masked_fill(~mask_of(x.shape[2], padding), torch.finfo(x.dtype).min).softmax(-1) @ x
        read = COPIES[reader](out)
        read += 1
        return read, out.mean(-1)

    captured = capture_all(function, *inputs)
    (graph,), expected = captured.graphs, function(*inputs)
    assert run_passes(graph, config).unchanged == 0
    valid = inputs[1][:, None, :].expand(2, 4, LENGTH)
    torch.testing.assert_close(graph(*captured.inputs[0])[1][valid], expected[1][valid])


def test_no_copy_where_strides_are_not_seen(inputs):
    graph = capture(lambda x, padding: attention(x, padding).transpose(1, 2).reshape(2, LENGTH, -1), *inputs)
    run_passes(graph, EXACT)
    assert count_ops(graph, "permute", "contiguous") == {"permute": 0, "contiguous": 0}


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
