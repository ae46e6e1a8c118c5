"""Predicted costs: against what was measured on an H200 and FLOPs that torch counts; what is asked of a configuration."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, Gemma3TextConfig, LlamaConfig, MistralConfig, MixtralConfig, T5Config

from tsa_compile import ConfigError, Coverage, KeepRatio, Reason, TSAConfig, explain
from tsa_compile.costs.breakeven import shortest
from tsa_compile.costs.calls import KEPT, LENGTH, CallShape
from tsa_compile.costs.devices import H100, H200, costs_of
from tsa_compile.costs.models import FULL, anatomy
from tsa_compile.costs.predict import predict
from tsa_compile.passes import plan

from ..support import DECODERS, OTHERS, tiny, tokens

K = 1024
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ATTENTION = json.loads((RESULTS / "attention.json").read_text(encoding="utf-8"))
PREFILL = json.loads((RESULTS / "prefill.json").read_text(encoding="utf-8"))
ON_AN_H100 = json.loads((RESULTS / "attention-h100.json").read_text(encoding="utf-8"))
PREFILL_ON_AN_H100 = json.loads((RESULTS / "prefill-h100.json").read_text(encoding="utf-8"))
HOST = ("ours", "ours, padding mask of ones")
ROWS = [row for row in ATTENTION["main"] if row["length"] >= 8 * K]
LLAMA = LlamaConfig(  # what both benchmarks run
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
)  # fmt: skip


SMALL = LlamaConfig(num_hidden_layers=2)


@functools.cache
def two_layers():
    return predict(TSAConfig(budget=KeepRatio(0.5), min_length=1), SMALL, K, "h200")


@pytest.fixture(scope="module")
def llama():
    """Predictions for a Llama-3.1-8B whose upper half is sparse at a keep ratio, at any length."""
    made = {keep: predict(TSAConfig(budget=KeepRatio(keep), min_length=1), LLAMA, K, "h200") for keep in (0.5, 0.675)}
    return lambda keep, length: made[keep].at(length)


class TestMeasuredOnAnH100:
    """Within 10% of another device's measured times, from 8K to 128K tokens.

    Its memory's rate comes from the steps at 128K, what the host's look at a count costs from 32K, all else is the H200's;
    the prefill was not looked at.
    """

    def test_the_results_are_the_devices(self):
        assert ON_AN_H100["conditions"]["device"] == PREFILL_ON_AN_H100["conditions"]["device"] == H100.name

    @pytest.mark.parametrize(
        "row",
        [
            row
            for row in ON_AN_H100["main"]
            if row["length"] >= 8 * K and row["method"] in ("dense cuDNN", "ours, Coverage", *HOST)
        ],
        ids=lambda row: f"{row['length']}-{row['keep']}-{row['method']}",
    )
    def test_attention(self, row):
        counted = row["method"] == "ours, Coverage"
        budget = Coverage() if counted else KeepRatio(row["keep"] or 0.5)
        config, kept = TSAConfig(budget=budget, min_length=1), row["kept"] if counted else None
        layers = predict(config, LLAMA, row["length"], "h100", kept=kept).layers
        found = layers[0].dense_ms if row["method"] == "dense cuDNN" else layers[16].ms
        assert found == pytest.approx(row["ms"], rel=0.1)

    @pytest.mark.parametrize("keep", [0.5, 0.675])
    def test_the_whole_prefill(self, keep):
        times = {(row["mode"], row["length"]): row["ms"] for row in PREFILL_ON_AN_H100["rows"] if "ms" in row}
        for length in (8 * K, 32 * K, 128 * K):
            found = predict(TSAConfig(budget=KeepRatio(keep), min_length=1), LLAMA, length, "h100")
            exact, sparse = times["exact", length], times[str(keep), length]
            assert (found.dense_ms, found.ms) == pytest.approx((exact, sparse), rel=0.02)
            if length > 8 * K:
                assert found.saved_ms == pytest.approx(exact - sparse, rel=0.1)


class TestMeasured:
    """Within 10% of every measured time of one H200, from 8K to 128K tokens.

    Left out: CUDA graphs, which take away the host's launches that these figures contain (the prediction is 15% above them
    at 8K, 11% at 16K, and does not know the slower kernel that a count needs there). And of the prefill at 8K what sparsity
    saves: 5 ms of 217 are predicted, while its two runs lie 8 ms apart.
    """

    def test_the_results_hold_what_is_compared(self):
        measured = {(row["method"], row["length"], row["keep"]) for row in ROWS}
        lengths = (8 * K, 32 * K, 128 * K)
        assert {("dense cuDNN", length, None) for length in lengths} <= measured
        assert {(name, length, keep) for name in HOST for length in lengths for keep in (0.5, 0.675)} <= measured
        assert ATTENTION["conditions"]["shape"] == "B=1 H=32 G=8 D=128 bfloat16"
        assert ATTENTION["conditions"]["device"] == PREFILL["conditions"]["device"] == H200.name

    @pytest.mark.parametrize("row", [row for row in ROWS if row["method"] == "dense cuDNN"], ids=lambda row: row["length"])
    def test_dense_attention(self, llama, row):
        assert llama(0.5, row["length"]).layers[0].dense_ms == pytest.approx(row["ms"], rel=0.1)

    @pytest.mark.parametrize(
        "row",
        [row for row in ROWS if row["method"] in HOST],
        ids=lambda row: f"{row['length']}-{row['keep']}-{row['method']}",
    )
    def test_sparse_attention(self, llama, row):
        layer = llama(row["keep"], row["length"]).layers[16]
        assert layer.reason is Reason.SPARSE and layer.kept == pytest.approx(row["keep"], abs=0.01)
        assert layer.ms == pytest.approx(row["ms"], rel=0.1)

    @pytest.mark.parametrize(
        "row", [row for row in ROWS if row["method"] == "ours, Coverage"], ids=lambda row: f"{row['length']}-{row['kept']}"
    )
    def test_sparse_attention_of_a_count(self, row):
        layer = predict(TSAConfig(min_length=1), LLAMA, row["length"], "h200", kept=row["kept"]).layers[16]
        assert layer.ms == pytest.approx(row["ms"], rel=0.1)

    def test_the_whole_prefill(self, llama):
        times = {(row["mode"], row["length"]): row["ms"] for row in PREFILL["rows"] if "ms" in row}
        assert PREFILL["conditions"]["layers"] == LLAMA.num_hidden_layers
        for length in (8 * K, 32 * K, 128 * K):
            found = llama(0.675, length)
            assert found.dense_ms == pytest.approx(times["exact", length], rel=0.1)
            assert found.ms == pytest.approx(times["0.675", length], rel=0.1)
            if length > 8 * K:
                assert found.saved_ms == pytest.approx(times["exact", length] - times["0.675", length], rel=0.1)


class TestFlops:
    """Against what torch counts in a forward of the tiny models, layer by layer's products included."""

    @pytest.mark.parametrize("name", [*DECODERS, "qwen3", "opt", "deepseek_v3 (latent)", "gpt_oss (sinks)", "falcon"])
    def test_of_projections_mlp_and_experts(self, name):
        length = 40
        model = tiny(name, "eager")
        if hasattr(model.config, "_experts_implementation"):
            model.set_experts_implementation("eager")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.base_model(input_ids=tokens(2, length), use_cache=False)
        found = predict(None, model.config, length, "h200", batch=2)
        rest = sum(layer.rest.flops.subs(LENGTH, length) for layer in found.layers)
        # Written out, attention multiplies all pairs, with or without a mask.
        pairs = sum(2 * float(layer.dense.flops.subs(LENGTH, length)) for layer in found.layers)
        assert counter.get_total_flops() == pytest.approx(float(rest) + pairs, rel=2e-3)

    def test_published_sizes(self):
        """Mixtral-8x7B: 46.7 billion parameters of which a token meets 12.9; DeepSeek-V3: 671 and 37."""
        for config, total, active in (
            (MixtralConfig(), 46.7e9, 12.9e9),
            (DeepseekV3Config(), 671e9, 37e9),
        ):
            sizes = anatomy(config)
            assert sum(layer.weights for layer in sizes.layers) + 2 * sizes.head == pytest.approx(total, rel=0.01)
            assert sum(layer.active for layer in sizes.layers) + 2 * sizes.head == pytest.approx(active, rel=0.02)

    def test_a_short_prompt_reads_all_experts(self):
        """Below some hundred tokens reading the weights takes longer than multiplying with them."""
        found = predict(None, MixtralConfig(), 16, "h200")
        read = 2 * anatomy(MixtralConfig()).layers[0].weights
        assert found.layers[0].rest_ms == pytest.approx(read / (H200.bandwidth_tbs * 1e9), rel=0.02)


class TestExpressions:
    def test_they_are_of_the_length_and_the_kept_share_alone(self, llama):
        found = llama(0.5, 32 * K)
        assert found.dense.ms.free_symbols == {LENGTH} and found.sparse.ms.free_symbols == {LENGTH, KEPT}
        at = {LENGTH: 32 * K, KEPT: found.layers[-1].kept}
        assert float(found.dense.ms.subs(at)) == pytest.approx(found.dense_ms)
        assert float(found.sparse.ms.subs(at)) == pytest.approx(found.ms)
        assert float(found.sparse.flops.subs(at)) < float(found.dense.flops.subs(at))
        assert float(found.sparse.bytes.subs(at)) > float(found.dense.bytes.subs(at))

    def test_sums(self, llama):
        found = llama(0.5, 32 * K)
        assert found.attention_ms + found.rest_ms == pytest.approx(found.ms)
        assert found.saved_ms == pytest.approx(16 * found.layers[-1].saved_ms) == pytest.approx(found.dense_ms - found.ms)
        assert found.gain == pytest.approx(found.dense_ms / found.ms) and 1 < found.gain < found.attention_gain
        assert found.layers[0].saved_ms == 0 and found.layers[0].gain == 1
        assert 0 < found.head_ms < 1

    def test_they_read_back_from_json(self, llama):
        found = llama(0.5, 32 * K)
        values = json.loads(found.to_json())
        layer = values["layers"][20]
        symbols = {"L": LENGTH, "s": KEPT}
        work = sympy.sympify(layer["work"]["sparse"]["ms"], locals=symbols)
        assert float(work.subs({LENGTH: 32 * K, KEPT: layer["kept"]})) == pytest.approx(layer["ms"])
        assert (values["device"], values["length"], values["break_even"]) == (H200.name, 32 * K, 1)
        assert values["ms"] == pytest.approx(found.ms) and len(values["layers"]) == 32
        assert TSAConfig.from_json(values["config"]) == found.config

    @given(length=st.integers(1, 1 << 20), more=st.integers(256, 4096))
    def test_longer_is_slower(self, length, more):
        found, longer = two_layers().at(length), two_layers().at(length + more)
        assert longer.dense_ms > found.dense_ms and longer.ms > found.ms
        assert all(math.isfinite(layer.ms) and layer.ms > 0 for layer in found.layers)

    def test_a_batch_costs_its_items_but_for_launches_and_weights(self):
        one, four = (predict(None, SMALL, 32 * K, "h200", batch=batch) for batch in (1, 4))
        assert four.dense_ms == pytest.approx(4 * one.dense_ms, rel=0.01)
        assert four.dense.flops.subs(LENGTH, 5) == 4 * one.dense.flops.subs(LENGTH, 5)

    def test_the_table_names_what_it_is_about(self, llama):
        found = llama(0.675, 128 * K)
        text = str(found)
        lines = {line.split("  ")[0]: line for line in text.splitlines()}
        assert "131,072" in text and H200.name in text and "bfloat16" in text
        assert f"{found.layers[16].gain:.2f}x" in lines["16..31"] and "SPARSE" in lines["16..31"]
        assert f"{found.attention_gain:.2f}x" in lines["attention of all"]
        assert f"{found.gain:.2f}x" in lines["whole prefill"] and f"{found.ms:,.0f}" in lines["whole prefill"]


def reasons(prediction):
    return [layer.reason for layer in prediction.layers]


class TestLayers:
    CONFIG = TSAConfig(budget=KeepRatio(0.5))

    def sparse(self, layers, length=32 * K):
        found = predict(self.CONFIG.replace(layers=layers), LLAMA, length, "h200")
        return [layer.index for layer in found.layers if layer.reason is Reason.SPARSE]

    def test_the_upper_half_indices_and_patterns(self):
        assert self.sparse(None) == list(range(16, 32))
        assert self.sparse([3, 30]) == [3, 30]
        assert self.sparse(["model.layers.1?.*"]) == list(range(10, 20))
        assert self.sparse(["model.layers.7.self_attn"]) == [7]
        assert self.sparse([]) == []

    @pytest.mark.parametrize("layers", [[32], [1, 99], ["model.layers.99.*"], ["nothing"]])
    def test_layers_that_there_are_not(self, layers):
        with pytest.raises(ConfigError, match=r"not found.*0\.\.31"):
            self.sparse(layers)

    def test_a_short_prompt_stays_dense(self):
        found = predict(self.CONFIG, LLAMA, 2 * K, "h200")
        assert reasons(found)[16:] == [Reason.TOO_SHORT] * 16
        assert found.saved_ms == 0 and found.gain == 1
        assert found.layers[16].sparse_ms > 0, "what it would take is told all the same"
        assert found.at(found.break_even).saved_ms > 0 == found.at(found.break_even - 1).saved_ms

    def test_nothing_to_gain_at_any_length(self):
        found = predict(TSAConfig(budget=KeepRatio(1)), LLAMA, 128 * K, "h200")
        assert found.break_even is None and found.saved_ms == 0

    def test_windows_stay_dense(self):
        found = predict(self.CONFIG, Gemma3TextConfig(), 64 * K, "h200")
        kinds = [layer.kind for layer in found.layers]
        assert kinds.count(FULL) == 4
        for index, layer in enumerate(found.layers):
            expected = Reason.SPARSE if index >= 13 else Reason.LAYER_NOT_SELECTED
            assert layer.reason is (expected if layer.kind == FULL else Reason.SLIDING_WINDOW)
        assert any("window" in note for note in found.notes)

    def test_a_window_in_all_layers(self):
        found = predict(self.CONFIG, MistralConfig(), 32 * K, "h200")
        assert set(reasons(found)) == {Reason.SLIDING_WINDOW} and found.break_even is None
        assert math.isnan(found.layers[0].sparse_ms) and "sparse_ms" not in found.to_dict()["layers"][0]
        none = predict(self.CONFIG, MistralConfig(sliding_window=None), 32 * K, "h200")
        assert Reason.SPARSE in reasons(none)

    def test_heads_that_are_too_wide(self):
        wide = dict(OTHERS["qwen3"][1], head_dim=320)
        found = predict(self.CONFIG.replace(min_length=1), LlamaConfig(**wide), 2 * K, "h200")
        assert Reason.HEAD_DIM in reasons(found) and Reason.SPARSE not in reasons(found)

    def test_layers_without_attention_cost_their_products(self):
        from transformers import Qwen3NextConfig

        config = Qwen3NextConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=16, linear_value_head_dim=16,
        )  # fmt: skip
        found = predict(self.CONFIG.replace(min_length=1), config, 2 * K, "h200")
        assert [layer.dense_ms > 0 for layer in found.layers] == [False, False, False, True]
        assert all(layer.rest_ms > 0 for layer in found.layers)
        assert reasons(found)[0] is Reason.UNSUPPORTED_FORM and any("linear_attention" in note for note in found.notes)

    def test_the_same_lengths_as_the_compiler(self, monkeypatch):
        monkeypatch.setattr(plan, "for_device", lambda device: H200)
        shape = CallShape(1, 32, 8, 128, 128, itemsize=2, window=128)
        for budget in (KeepRatio(0.5), KeepRatio(1), Coverage(0.005), Coverage(0.3)):
            for options in ({}, {"min_length": 77}, {"min_tokens": 50_000}):
                config = TSAConfig(budget=budget, **options)
                call = dataclasses.replace(shape, counted=isinstance(budget, Coverage))
                planned, _ = plan.minimum_length(config, torch.device("cuda"), call, 0.25)
                assert shortest(config, H200, call, 0.25) == planned

    def test_what_is_kept_may_be_known(self):
        expected, known = (predict(None, SMALL, 64 * K, "h200", kept=kept) for kept in (None, 0.25))
        assert known.layers[1].kept == 0.25 and known.layers[0].kept == 1
        assert known.ms < expected.ms
        assert known.at(128 * K).layers[1].kept == 0.25
        assert any("depends on the input" in note for note in expected.notes)
        assert not any("depends on the input" in note for note in known.notes)

    def test_explain_expects_the_same(self):
        config = TSAConfig(budget=KeepRatio(0.5), window=4, min_tokens=4, min_length=1)
        model = tiny("llama", num_hidden_layers=2)
        report = explain(model, input_ids=tokens(2, 40), config=config, device="h200")
        found = predict(config, model.config, 40, "h200", batch=2, dtype=torch.float32)
        assert [row.reason for row in report] == reasons(found)
        assert [row.expected_dense_ms for row in report] == pytest.approx([layer.dense_ms for layer in found.layers])
        assert [row.expected_ms for row in report] == pytest.approx([layer.ms for layer in found.layers])


class TestDevices:
    @pytest.mark.parametrize("device", ["h200", "H200", "NVIDIA H200", "nvidia h200", H200])
    def test_measured_ones(self, device):
        assert costs_of(device) == (H200, ())

    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta", "cuda", "cuda:3", torch.device("cuda"), None])
    def test_without_a_gpu_they_are_said_to_be_the_h200s(self, device, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        costs, notes = costs_of(device)
        assert costs is H200 and len(notes) == 1 and H200.name in notes[0]
        assert notes[0] in str(predict(None, SMALL, K, device))

    def test_one_that_was_not_measured(self, monkeypatch):
        other = H200.scaled("NVIDIA L40S", attention=0.5)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr("tsa_compile.costs.devices.for_device", lambda device: other)
        costs, (note,) = costs_of(None)
        assert costs is other and "not measured" in note
        with pytest.raises(ConfigError, match="cuda:1"):
            costs_of("cuda:1")

    @pytest.mark.parametrize("device", ["h300", "", 1.5, object()])
    def test_unknown_ones(self, device):
        with pytest.raises(ConfigError, match="'h200'"):
            costs_of(device)

    def test_slower_devices_take_longer(self):
        slow = H200.scaled("slow", attention=0.5, compute=0.5, bandwidth=0.5)
        assert predict(None, SMALL, 32 * K, slow).ms > 1.8 * predict(None, SMALL, 32 * K, "h200").ms


class TestRefused:
    @pytest.mark.parametrize("name", ["length", "batch"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "8K", None])
    def test_numbers(self, name, value):
        options = {"length": K} | {name: value}
        with pytest.raises(ConfigError, match=f"{name}="):
            predict(None, SMALL, options.pop("length"), "h200", **options)

    @pytest.mark.parametrize("kept", [0, -1, 1.1, "half", True, float("nan")])
    def test_kept(self, kept):
        with pytest.raises(ConfigError, match="kept="):
            predict(None, SMALL, K, "h200", kept=kept)

    @pytest.mark.parametrize("config", [{}, "h200", 3])
    def test_configs(self, config):
        with pytest.raises(ConfigError, match="TSAConfig"):
            predict(config, SMALL, K, "h200")

    @pytest.mark.parametrize("config", [None, {}, SMALL.to_dict(), "llama", torch.nn.Linear(2, 2)])
    def test_what_is_no_configuration(self, config):
        with pytest.raises(ConfigError, match=r"model\.config"):
            predict(None, config, K, "h200")

    def test_models_that_are_no_causal_language_models(self):
        with pytest.raises(ConfigError, match="T5Config"):
            predict(None, T5Config(), K, "h200")

    @pytest.mark.parametrize("dtype", ["float17", torch.int64, "int8", 3])
    def test_dtypes(self, dtype):
        with pytest.raises(ConfigError, match="dtype="):
            predict(None, SMALL, K, "h200", dtype=dtype)

    def test_dtypes_that_are_none_of_these(self):
        assert predict(None, SMALL, K, "h200", dtype="float16").model.dtype is torch.float16
        single = predict(None, SMALL, K, "h200", dtype=torch.float32)
        assert any("half precision" in note for note in single.notes)
        assert anatomy(LlamaConfig(dtype="float16")).dtype is torch.float16
