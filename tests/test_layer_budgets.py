"""Layers with a budget each: what is computed, reported, explained and predicted follows each layer's own."""

import pytest
import torch

from tsa_compile import explain
from tsa_compile.backend import tsa_backend
from tsa_compile.bench import Benchmark
from tsa_compile.config import Coverage, KeepRatio, TSAConfig
from tsa_compile.costs.predict import predict
from tsa_compile.reasons import Reason
from tsa_compile.report import RewriteReport, reports
from tsa_compile.shapes import model_config

from .support import exhaustive_but, tiny, tokens

pytestmark = pytest.mark.usefixtures("fresh")
BASE = TSAConfig(window=4, min_tokens=0, min_length=1, floor=None, compiler="eager")
OWN = BASE.replace(layers={2: 0.5, 0: 0.1, 1: Coverage(0.3)})
K = 1024


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=3)


def logits(model, config, dynamic=None):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend=tsa_backend, dynamic=dynamic, options={"config": config})(
            tokens(1, 48), use_cache=False
        ).logits


def ratios(graph):
    """What each sparse op of a graph keeps."""
    calls = [node for node in graph.graph.nodes if node.target is torch.ops.tsa.sparse_attention.default]
    return [(node.args[6], node.args[7]) for node in calls]


@pytest.mark.parametrize("dynamic", exhaustive_but([False, True], True))
def test_each_layer_keeps_its_own_share(model, dynamic):
    seen = []

    def look(graph_module, inputs):
        seen.extend(ratios(graph_module))
        return graph_module.forward

    logits(model, OWN.replace(compiler=look, skip_passes=("Decompose",)), dynamic)
    assert seen == [(None, 0.1), (0.3, None), (None, 0.5)]


def test_what_is_computed_is_that_of_the_ratios(model):
    by_name = logits(model, BASE.replace(layers={"model.layers.0.*": 0.25, "model.layers.?.self_attn": 0.25}))
    assert torch.equal(by_name, logits(model, BASE.replace(layers=[0, 1, 2], budget=KeepRatio(0.25))))


def test_reports_say_what_each_layer_keeps(model):
    logits(model, OWN)
    report = reports()[-1]
    assert [row.budget for row in report.rows] == [("keep_ratio", 0.1), ("coverage", 0.3), ("keep_ratio", 0.5)]
    assert "KeepRatio(0.1) or Coverage(0.3) or KeepRatio(0.5) selects" in str(report)
    assert [line.count("KeepRatio") for line in str(report).splitlines()[1:4]] == [1, 0, 1]
    assert RewriteReport.from_json(report.to_json()) == report
    logits(model, BASE)
    assert all(row.budget is None for row in reports()[-1].rows)


def test_explain_expects_what_each_layer_keeps(model):
    own = explain(model, tokens(1, 512), use_cache=False, config=OWN.replace(layers={2: 0.5, 0: 0.1}), device="h200")
    alike = BASE.replace(layers=[0, 2], budget=KeepRatio(0.1))
    other = explain(model, tokens(1, 512), use_cache=False, config=alike, device="h200")
    assert own.rows[0].expected_ms == other.rows[0].expected_ms
    assert own.rows[0].expected_ms < own.rows[2].expected_ms


def test_predictions_follow_each_layer():
    llama = model_config("llama-3.1-8b")
    base = TSAConfig()
    own = predict(base.replace(layers={20: 0.1, 21: 0.5, 22: 1.0}), llama, 32 * K, "h200")
    for layer, ratio in ((20, 0.1), (21, 0.5), (22, 1.0)):
        alone = predict(base.replace(layers=[20, 21, 22], budget=KeepRatio(ratio)), llama, 32 * K, "h200")
        assert own.layers[layer] == alone.layers[layer]
    assert own.layers[20].kept < own.layers[21].kept and own.layers[22].reason is Reason.TOO_SHORT  # it never gains
    least = predict(base.replace(layers=[20, 21, 22], budget=KeepRatio(0.1)), llama, 32 * K, "h200")
    assert own.break_even == least.break_even
    noted = predict(base.replace(layers={20: 0.1, 21: Coverage(0.01)}), llama, 32 * K, "h200").notes
    assert any("Coverage(tau=0.01)" in note for note in noted)


def test_benchmarks_name_each_budget():
    made = Benchmark((), {"config": OWN.to_dict()})
    assert "keep 0.5 or keep 0.1 or coverage 0.3" in made.words("tsa")
