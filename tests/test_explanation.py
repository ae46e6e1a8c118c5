"""`explain`: what the compiler would do, for each attention call, without compiling or recording anything."""

import dataclasses
import json

import pytest
import torch
from transformers import DynamicCache

from tsa_compile import ConfigError, Coverage, Decision, Reason, RewriteReport, TSAConfig, TSAWarning, explain, reports
from tsa_compile.costs.breakeven import expected_kept
from tsa_compile.costs.calls import CallShape, dense_work, sparse_path
from tsa_compile.costs.devices import H200

from .support import Attention, Stack, exhaustive_but, heads, mixed_padding, tiny, tokens

pytestmark = pytest.mark.usefixtures("fresh")

CONFIG = TSAConfig(budget=Coverage(0.2), window=4, min_tokens=4)


@pytest.mark.parametrize("form", exhaustive_but(["sdpa", "eager"], "sdpa"))
def test_rows_and_reasons(form):
    model = tiny("gemma3", form)
    report = explain(model, input_ids=tokens(3, 40), attention_mask=mixed_padding(40), config=CONFIG)
    assert [(row.decision, row.reason) for row in report] == [
        (Decision.DENSE_PADDED, Reason.LAYER_NOT_SELECTED),
        (Decision.WINDOW, Reason.SLIDING_WINDOW),
        (Decision.SPARSE, Reason.SPARSE),
    ]
    assert [row.form for row in report] == [form] * 3
    assert [row.layer for row in report] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert report.config == CONFIG.to_dict()


def test_nothing_is_recorded_and_nothing_compiled():
    model = tiny("llama")
    before = [parameter.clone() for parameter in model.parameters()]
    explain(model, input_ids=tokens(3, 40), config=CONFIG)
    assert reports() == []
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert "forward" not in vars(model)


def test_default_configuration_says_why_nothing_is_sparse():
    with pytest.warns(TSAWarning, match="TOO_SHORT"):
        report = explain(tiny("llama"), input_ids=tokens(1, 40))
    assert [row.reason for row in report] == [Reason.LAYER_NOT_SELECTED, Reason.TOO_SHORT, Reason.TOO_SHORT]
    assert "min_length" in str(report)


def test_it_explains_inference_whatever_the_mode():
    """Gradients enabled around the call, as outside torch.no_grad(), are no reason to say NEEDS_GRAD."""
    assert torch.is_grad_enabled()
    report = explain(tiny("llama"), input_ids=tokens(1, 40), config=CONFIG)
    assert report.sparse == 2
    assert torch.is_grad_enabled()


def test_several_graphs_become_one_report():
    report = explain(Stack(breaks=(0, 1)), *heads(), config=CONFIG.replace(layers=[1, 3]))
    assert [row.index for row in report] == [0, 1, 2, 3]
    assert [row.layer_index for row in report.sparse_calls] == [1, 3]
    assert any("3 graphs" in note for note in report.notes)


def test_functions_and_positional_inputs():
    report = explain(Attention().forward, *heads(), config=CONFIG.replace(layers=[0]))
    assert report.sparse == 1


def test_table_and_json():
    report = explain(tiny("llama"), input_ids=tokens(1, 40), config=CONFIG)
    assert RewriteReport.from_json(report.to_json()) == report
    assert len(json.loads(report.to_json())["rows"]) == 3
    assert "model.layers.1..2.self_attn" in str(report)


class TestExpectations:
    def test_none_on_a_cpu_unless_asked_for(self):
        report = explain(Stack(), *heads(), config=CONFIG)
        assert report.expected == {} and report.expected_ms is None
        assert all(row.expected_dense_ms is None for row in report)

    @pytest.mark.exhaustive
    def test_of_each_call_that_is_understood(self):
        model = tiny("gemma3")
        inputs = dict(input_ids=tokens(3, 40), attention_mask=mixed_padding(40))
        plain = explain(model, **inputs, config=CONFIG)
        report = explain(model, **inputs, config=CONFIG.replace(min_length=1), device="h200")
        dense, window, compressed = report
        assert dense.expected_ms == dense.expected_dense_ms > 0
        assert window.decision is Decision.WINDOW and window.window == 16
        assert window.expected_ms == window.expected_dense_ms > 0
        assert compressed.expected_dense_ms == dense.expected_dense_ms < compressed.expected_ms, "40 tokens cannot gain"
        assert [dataclasses.replace(row, expected_dense_ms=None, expected_ms=None) for row in report] == list(plain)
        assert report.expected["device"] == "NVIDIA H200"
        assert RewriteReport.from_json(report.to_json()) == report

    def test_symbolic_lengths_have_none(self):
        ids = tokens(1, 40)
        torch._dynamo.mark_dynamic(ids, 1)
        report = explain(tiny("llama"), input_ids=ids, config=CONFIG.replace(min_length=1), device="h200")
        assert report.sparse == 2 and report.expected_ms is None

    @pytest.mark.filterwarnings("ignore::tsa_compile.TSAWarning")
    def test_a_chunk_is_one_of_all_keys(self):
        def chunk(query, key, value):
            allowed = torch.arange(80) <= torch.arange(40)[:, None] + 40
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True)

        query, key, value = heads(length=80)
        (row,) = explain(chunk, query[:, :, :40], key, value, config=CONFIG.replace(layers=[0], min_length=1), device="h200")
        call = CallShape.configured(CONFIG, 2, 4, 2, 16, 16, itemsize=4, past=40)
        assert row.decision is Decision.SPARSE and row.expected_dense_ms == dense_work(call, H200, 40).ms
        assert row.expected_ms == sparse_path(call, H200, 40, expected_kept(CONFIG, 80)).ms

    def test_what_is_long_enough_is_decided_for_the_device_that_is_asked_about(self):
        report = explain(tiny("llama"), input_ids=tokens(1, 40), config=CONFIG, device="h200")
        assert [row.reason for row in report] == [Reason.LAYER_NOT_SELECTED, *[Reason.TOO_SHORT] * 2]
        assert report.expected["break_even"] > 4096 and f"40 < {report.expected['break_even']}" in report.rows[1].detail
        for device in ("cpu", "cpu:0"):
            on_cpu = explain(tiny("llama"), input_ids=tokens(1, 40), config=CONFIG, device=device)
            assert on_cpu.sparse == 2 and on_cpu.expected["break_even"] == 9

    def test_a_kernel_of_a_device_that_is_not_here(self):
        config = CONFIG.replace(layers=[1], kernel="triton", min_length=1)
        row = explain(Stack(), *heads(), config=config, device="h100").rows[1]
        assert (row.reason, row.kernel) == (Reason.SPARSE, "triton")
        assert explain(Stack(), *heads(), config=config, device="cpu").rows[1].reason is Reason.KERNEL

    def test_a_device_without_figures_is_said_to_have_none(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        report = explain(Stack(), *heads(), config=CONFIG.replace(layers=[1]), device="cpu")
        assert report.expected["device"] == "NVIDIA H200"
        assert any("NVIDIA H200" in note for note in report.notes)

    def test_an_unknown_device(self):
        with pytest.raises(ConfigError, match="h300"):
            explain(Stack(), *heads(), device="h300")

    def test_costs_of_ones_own(self):
        slow = H200.scaled("mine", attention=0.5)
        report = explain(Stack(), *heads(length=400), config=CONFIG.replace(layers=[1]), device=slow)
        fast = explain(Stack(), *heads(length=400), config=CONFIG.replace(layers=[1]), device="h200")
        assert report.expected["device"] == "mine" and report.expected_dense_ms > fast.expected_dense_ms


def test_a_cache_stays_as_it_is():
    model, cache, ids = tiny("llama", num_hidden_layers=2), DynamicCache(), tokens(1, 90)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
    explain(model, ids[:, 40:], past_key_values=cache)
    assert cache.get_seq_length() == 40


def test_a_class_is_no_model():
    """torch.compile would change it for all of its instances."""
    kind = type(tiny("llama", num_hidden_layers=1))
    with pytest.raises(ConfigError, match="a type is not allowed"):
        explain(kind, tokens(1, 40))


def test_a_model_without_attention():
    assert len(explain(torch.nn.Linear(3, 3), torch.ones(2, 3))) == 0


@pytest.mark.exhaustive
@torch._dynamo.config.patch(recompile_limit=2)
def test_many_questions_leave_room_for_the_compilation():
    """Dynamo stops compiling a function after a number of recompilations; questions must not use them up."""
    model, inputs = tiny("llama"), dict(input_ids=tokens(1, 40))
    assert {explain(model, **inputs, config=CONFIG).sparse for _ in range(4)} == {2}
    with torch.no_grad():
        torch.compile(model, backend="tsa", options={"config": CONFIG.replace(compiler="eager")})(**inputs)
    assert [report.sparse for report in reports()] == [2]
