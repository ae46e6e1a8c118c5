"""`dense_kernel`: layers that are not sparse run over all tokens by the kernel that was asked for."""

import pytest
import torch

from tsa_compile import tsa_backend
from tsa_compile.config import KeepRatio, TSAConfig
from tsa_compile.errors import ConfigError, KernelError, TSAWarning
from tsa_compile.kernels import registry
from tsa_compile.pipeline import PASSES, WHOLE, run_passes
from tsa_compile.reasons import Decision, Reason
from tsa_compile.report import reports
from tsa_compile.testing import capture_all, count_ops

from ..support import difference, mixed_padding, tiny, tokens
from .support import causal_attention, inputs, padded_attention, padding

LENGTH, ATOL = 40, 2e-5
CONFIG = TSAConfig(budget=KeepRatio(0.5), window=4, min_tokens=4, layers=(1,))


@pytest.fixture
def calls():
    """The shapes of the queries that a registered kernel, "mine", is called with; it computes what "sdpa" does."""
    shapes = []

    def run(query, key, value, scale):
        shapes.append(tuple(query.shape))
        return registry.get("sdpa").run(query, key, value, scale)

    registry.register(registry.AttentionKernel("mine", run, lambda request: None, priority=-1))
    yield shapes
    registry.unregister("mine")


def graph_of(function, *arguments, passes):
    captured = capture_all(function, *arguments)
    report = run_passes(captured.graphs[0], TSAConfig(layers=(), dense_kernel="mine"), passes)
    return captured.graphs[0], report.rows[0], captured.inputs[0]


@pytest.mark.parametrize("passes", [PASSES, WHOLE], ids=["steps", "whole"])
def test_without_padding_it_is_one_call(calls, passes):
    graph, row, arguments = graph_of(causal_attention, *inputs(), passes=passes)
    assert (row.decision, row.reason, row.kernel) == (Decision.KERNEL, Reason.LAYER_NOT_SELECTED, "mine")
    assert count_ops(graph, "attend", "compress", "sparse_attention") == {"attend": 1, "compress": 0, "sparse_attention": 0}
    torch.testing.assert_close(graph(*arguments)[0], causal_attention(*inputs()))
    assert calls == [(2, 4, 12, 8)]


@pytest.mark.parametrize("passes", [PASSES, WHOLE], ids=["steps", "whole"])
def test_with_padding_only_the_valid_tokens_are_attended_to(calls, passes):
    graph, row, arguments = graph_of(padded_attention, *inputs(), padding(), passes=passes)
    assert (row.decision, row.kernel) == (Decision.KERNEL, "mine")
    out, valid = graph(*arguments)[0], padding().bool()
    torch.testing.assert_close(out[valid], padded_attention(*inputs(), padding())[valid])
    assert sorted(shape[2] for shape in calls) == [9, 10] and not out[~valid].any()


@pytest.mark.parametrize(
    "pads",
    [pytest.param((0, 0, 0), id="mask of ones", marks=pytest.mark.exhaustive), pytest.param((0, 9, -13), id="padded")],
)
def test_beside_sparse_layers(calls, pads):
    model, ids, mask = tiny("llama"), tokens(3, LENGTH), mixed_padding(LENGTH, pads)
    options = {"config": CONFIG, "compiler": "eager"}
    with torch.no_grad():
        wanted = torch.compile(model, backend=tsa_backend, options=options)(ids, attention_mask=mask).logits
        torch._dynamo.reset()
        options |= {"dense_kernel": "mine"}
        logits = torch.compile(model, backend=tsa_backend, options=options)(ids, attention_mask=mask).logits
    assert difference(logits, wanted, mask) < ATOL
    report = reports()[-1]
    assert [row.decision for row in report] == [
        Decision.SPARSE if row.layer_index == 1 else Decision.KERNEL for row in report
    ]
    assert report.count(Decision.KERNEL) == len(report) - 1 and "by the configured kernel" in report.summary
    assert calls and all(heads == model.config.num_attention_heads for _, heads, _, _ in calls)


def test_windows_do_not_get_it(calls):
    model, ids = tiny("mistral"), tokens(1, LENGTH)
    with torch.no_grad():
        wanted = model(ids).logits
        options = {"layers": [], "dense_kernel": "mine", "compiler": "eager"}
        logits = torch.compile(model, backend=tsa_backend, options=options)(ids).logits
    assert difference(logits, wanted) < ATOL and not calls
    assert {row.decision for row in reports()[-1]} == {Decision.WINDOW}


def test_a_selected_layer_that_is_too_short_gets_it_too(calls):
    model, ids = tiny("llama"), tokens(1, LENGTH)
    options = {"min_length": 100, "layers": [0], "dense_kernel": "mine", "compiler": "eager"}
    with torch.no_grad(), pytest.warns(TSAWarning, match="TOO_SHORT"):
        torch.compile(model, backend=tsa_backend, options=options)(ids)
    assert reports()[-1].rows[0].reason is Reason.TOO_SHORT and calls


@pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse")
def test_a_kernel_that_does_not_fit_leaves_the_layer_exact():
    captured = capture_all(causal_attention, *inputs())
    (row,) = run_passes(captured.graphs[0], TSAConfig(layers=(), dense_kernel="cudnn"), WHOLE).rows  # on a CPU
    assert (row.decision, row.reason) == (Decision.DENSE, Reason.KERNEL)
    torch.testing.assert_close(captured.graphs[0](*captured.inputs[0])[0], causal_attention(*inputs()))


def test_names():
    captured = capture_all(causal_attention, *inputs())
    with pytest.raises(KernelError, match="sdpa"):
        run_passes(captured.graphs[0], TSAConfig(dense_kernel="nonexistent"))
    with pytest.raises(ConfigError, match="dense_kernel=''"):
        TSAConfig(dense_kernel="")
    assert TSAConfig.from_json(TSAConfig(dense_kernel="mine").to_json()).dense_kernel == "mine"
