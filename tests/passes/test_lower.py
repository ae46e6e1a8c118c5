"""The ATen forms of ops that look at the host, and the checks of the lowering; whole models are in tests/export."""

import pytest
import torch

from tsa_compile import ConfigError, KeepRatio, TSAConfig
from tsa_compile.export import export_program
from tsa_compile.kernels.attend import AttentionKernel, register, unregister
from tsa_compile.kernels.padded import padded_attention, padded_attention_aten, spans, spans_aten
from tsa_compile.passes.lower import lower_program
from tsa_compile.testing import count_ops

from ..support import Attention, heads

PADDINGS = {
    "none": [(0, 12), (0, 12)],
    "left-right": [(5, 12), (0, 9)],
    "both": [(2, 7), (0, 12)],
    "one token": [(11, 12), (0, 1)],
    "nothing": [(0, 0), (3, 12)],
}


def padding_of(name):
    padding = torch.zeros(2, 12, dtype=torch.bool)
    for row, (start, stop) in zip(padding, PADDINGS[name], strict=True):
        row[start:stop] = True
    return padding


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", PADDINGS)
def test_padded_attention_without_the_host(name, holes):
    padding = padding_of(name)
    if holes:
        padding[:, 5] = False
    assert torch.equal(spans_aten(padding), spans(padding))
    query, key, value = heads(length=12)
    for mean_rows in (False, True):
        expected = padded_attention(query, key, value, padding, spans(padding), 0.3, mean_rows)
        actual = padded_attention_aten(query, key, value, padding, None, 0.3, mean_rows)
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()


def export(**options):
    config = TSAConfig(budget=KeepRatio(0.5), window=4, min_tokens=3, layers=(0,), **options)
    return export_program(Attention().eval(), heads(length=40), config, dynamic_lengths=(16, 200), lower=None)


def test_the_steps_become_aten():
    program = lower_program(export())
    assert not any("tsa" in str(node.target) for node in program.graph.nodes)
    assert count_ops(program.graph_module, "scaled_dot_product_attention", "sort") == {
        "scaled_dot_product_attention": 1, "sort": 2,
    }  # fmt: skip


@pytest.mark.parametrize("kernel", ["sdpa", "not part of the package"])
def test_a_kernel_that_is_called_through_python_is_refused(kernel):
    known = kernel == "sdpa"
    if not known:
        register(AttentionKernel(kernel, run=lambda q, k, v, scale: q, supports=lambda request: None, priority=-99))
    try:
        program = export(kernel=kernel)
        if known:
            lower_program(program)
        else:
            with pytest.raises(ConfigError, match=r"kernel='not part of the package' cannot be lowered.*lower=None"):
                lower_program(program)
    finally:
        if not known:
            unregister(kernel)


def test_an_answer_that_does_not_hold_for_all_lengths_is_refused(monkeypatch):
    def specialised(scores, count, capacity):
        assert scores.shape[2] == 40
        return torch.zeros(*scores.shape[:2], capacity, dtype=torch.int32)

    from tsa_compile import RewriteError
    from tsa_compile.passes import lower

    monkeypatch.setitem(lower._ATEN, torch.ops.tsa.select.default, specialised)
    with pytest.raises(RewriteError, match="would hold for some lengths alone"):
        lower_program(export())
