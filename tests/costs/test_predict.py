"""Predicted costs: against what was measured on an H200 and FLOPs that torch counts; what is asked of a configuration."""

import functools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, Gemma3TextConfig, LlamaConfig, MistralConfig, MixtralConfig, T5Config

from tsa_compile import ConfigError, Coverage, KeepRatio, KernelError, Reason, TSAConfig, explain
from tsa_compile.costs.devices import H200, costs_of
from tsa_compile.costs.models import FULL, anatomy
from tsa_compile.costs.predict import predict
from tsa_compile.passes import plan

from ..support import DECODERS, OTHERS, tiny, tokens

K = 1024
LENGTHS = (8 * K, 16 * K, 32 * K, 64 * K, 128 * K)
# ms of one layer's attention at these lengths, by the share that is kept (1: dense cuDNN): alone, and with a padding mask of
# ones. B=1 H=32 G=8 D=128, bfloat16.
ATTENTION = {
    ("h200", 1): [(0.9243, 3.5463, 15.0731, 59.7952, 252.7708)],
    ("h200", 0.5): [(0.4803, 1.3528, 4.1092, 14.5208, 59.0595), (0.4563, 1.2708, 4.0804, 14.7378, 64.082)],
    ("h200", 0.675): [(0.6613, 2.0462, 7.082, 25.5265, 107.2174), (0.6474, 1.9892, 6.9819, 26.7199, 111.9709)],
    ("h100", 1): [(0.9192, 3.5753, 14.6011, 60.1446, 250.798)],
    ("h100", 0.5): [(0.4805, 1.3145, 4.0826, 14.5984, 60.7037), (0.4704, 1.2856, 4.0608, 14.7099, 62.8924)],
    ("h100", 0.675): [(0.6666, 2.02, 7.2749, 27.7686, 109.2955), (0.665, 2.0065, 7.3025, 26.6465, 114.6312)],
}
# The same with the floor, without min_tokens.
FLOORED = {
    0.08: (0.3758, 0.5754, 1.119, 2.3125, 5.7392),
    0.15: (0.3841, 0.6638, 1.4181, 3.4425, 9.9001),
    0.3: (0.4423, 0.9556, 2.4334, 7.5709, 24.2289),
    0.5: (0.598, 1.5444, 4.6531, 16.9534, 61.1833),
}
# The same where a Coverage budget makes the count known on the device alone, by length and the share that it kept.
COUNTED = {
    "h200": {(32 * K, 0.5): 5.0791, (32 * K, 0.675): 8.2541, (128 * K, 0.5): 65.9949, (128 * K, 0.675): 115.4662},
    "h100": {(32 * K, 0.5): 4.6286, (32 * K, 0.675): 8.0855, (128 * K, 0.5): 66.9409, (128 * K, 0.675): 116.913},
}
# ms of a Llama-3.1-8B's whole prefill, its upper half sparse, by the share that is kept (1: exact).
PREFILL = {
    "h200": {1: {8: 217.3, 32: 1241.3, 128: 11086.8}, 0.675: {8: 206.2, 32: 1115.6, 128: 8830.1}},
    "h100": {
        1: {8: 214.87, 32: 1216.2, 128: 10941.11},
        0.5: {8: 205.81, 32: 1046.43, 128: 7872.71},
        0.675: {8: 208.91, 32: 1098.39, 128: 8737.91},
    },
}
LLAMA = LlamaConfig(  # what both benchmarks run
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
)  # fmt: skip


SMALL = LlamaConfig(num_hidden_layers=2)


@functools.cache
def two_layers():
    return predict(TSAConfig(budget=KeepRatio(0.5), min_length=1), SMALL, K, "h200")


@functools.cache
def made(device, keep):
    return predict(TSAConfig.published(budget=KeepRatio(keep), min_length=1), LLAMA, K, device)


@pytest.fixture(scope="module")
def llama():
    """Predictions for a Llama-3.1-8B whose upper half is sparse at a keep ratio, at any length."""
    return lambda keep, length, device="h200": made(device, keep).at(length)


class TestMeasured:
    """Within 10% of the times that two devices took, from 8K to 128K tokens.

    Of the H100 only its memory's rate (from the steps at 128K) and what the host's look at a count costs (from 32K) were
    taken from its runs, all else is the H200's. Left out: CUDA graphs, which take away the host's launches that these
    figures contain (the prediction is 15% above them at 8K, 11% at 16K, and does not know the slower kernel that a count
    needs there). And of the prefill at 8K what sparsity saves: 5 ms of 217 are predicted, while its two runs lie 8 ms apart.
    """

    @pytest.mark.parametrize(("device", "keep"), ATTENTION)
    def test_attention(self, llama, device, keep):
        for times in ATTENTION[device, keep]:
            for length, ms in zip(LENGTHS, times, strict=True):
                layers = llama(0.5 if keep == 1 else keep, length, device).layers
                if keep == 1:
                    assert layers[0].dense_ms == pytest.approx(ms, rel=0.1), length
                    continue
                assert layers[16].reason is Reason.SPARSE and layers[16].kept == pytest.approx(keep, abs=0.01)
                assert layers[16].ms == pytest.approx(ms, rel=0.1), length

    @pytest.mark.parametrize("keep", FLOORED)
    def test_attention_with_the_floor(self, keep):
        config = TSAConfig(budget=KeepRatio(keep), min_tokens=0, min_length=1)
        for length, ms in zip(LENGTHS, FLOORED[keep], strict=True):
            layer = predict(config, LLAMA, length, "h100").layers[16]
            assert layer.ms == pytest.approx(ms, rel=0.1), length

    @pytest.mark.parametrize("device", COUNTED)
    def test_sparse_attention_of_a_count(self, device):
        for (length, kept), ms in COUNTED[device].items():
            layer = predict(TSAConfig.published(min_length=1), LLAMA, length, device, kept=kept).layers[16]
            assert layer.ms == pytest.approx(ms, rel=0.1), (length, kept)

    @pytest.mark.parametrize(("device", "bound"), [("h200", 0.1), ("h100", 0.02)])
    def test_the_whole_prefill(self, llama, device, bound):
        exact, *sparse = PREFILL[device].items()
        for keep, times in sparse:
            for length, ms in times.items():
                found, whole = llama(keep, length * K, device), exact[1][length]
                assert (found.dense_ms, found.ms) == pytest.approx((whole, ms), rel=bound), (keep, length)
                if length > 8:
                    assert found.saved_ms == pytest.approx(whole - ms, rel=0.1), (keep, length)


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
        rest = sum(layer.rest.flops for layer in found.layers)
        # Written out, attention multiplies all pairs, with or without a mask.
        attending = [layer for layer in anatomy(model.config).layers if layer.attends]
        pairs = sum(2 * 2 * layer.heads * (layer.head_dim + layer.value_head_dim) * length**2 for layer in attending)
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


class TestWork:
    def test_layers_add_up_to_the_model(self, llama):
        found = llama(0.5, 32 * K)
        assert (found.dense.ms, found.sparse.ms) == pytest.approx((found.dense_ms, found.ms))
        assert found.sparse.flops < found.dense.flops and found.sparse.bytes > found.dense.bytes

    def test_sums(self, llama):
        found = llama(0.5, 32 * K)
        assert found.attention_ms + found.rest_ms == pytest.approx(found.ms)
        assert found.saved_ms == pytest.approx(16 * found.layers[-1].saved_ms) == pytest.approx(found.dense_ms - found.ms)
        assert found.gain == pytest.approx(found.dense_ms / found.ms) and 1 < found.gain < found.attention_gain
        assert found.layers[0].saved_ms == 0 and found.layers[0].gain == 1
        assert 0 < found.head.ms < 1

    def test_they_read_back_from_json(self, llama):
        found = llama(0.5, 32 * K)
        values = json.loads(found.to_json())
        layer = values["layers"][20]
        assert layer["work"]["sparse"]["ms"] == layer["ms"]
        assert (values["device"], values["length"], values["break_even"]) == (H200.name, 32 * K, 2)
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
        assert four.dense.flops == 4 * one.dense.flops

    def test_in_a_narrow_terminal_sentences_stand_whole_above_and_below_the_table(self):
        text = predict(TSAConfig(), LLAMA, 131072, "h100").narrow(80)
        above, below = text.split("\nlayers  ", 1)
        assert max(map(len, text.splitlines())) <= 80
        assert " ".join(above.split()).endswith("NVIDIA H100 80GB HBM3") and "HBM3" not in below

    def test_the_table_names_what_it_is_about(self, llama):
        found = llama(0.675, 128 * K)
        text = str(found)
        lines = {line.split("  ")[0]: line for line in text.splitlines()}
        assert "131,072" in text and H200.name in text and "bfloat16" in text
        assert f"{found.layers[16].gain:.2f}x" in lines["16..31"] and "SPARSE" in lines["16..31"]
        assert f"{found.attention_gain:.2f}x" in lines["all attention"]
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

    def test_one_token_is_never_sparse(self):
        found = predict(self.CONFIG.replace(min_length=1), LLAMA, 1, "h200")
        assert reasons(found)[16:] == [Reason.TOO_SHORT] * 16 and found.break_even == 2
        assert reasons(found.at(2))[16:] == [Reason.SPARSE] * 16

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
        assert any("charged for their windows" in note for note in found.notes)
        window, full = (next(layer for layer in found.layers if (layer.kind == FULL) is whole) for whole in (False, True))
        assert window.ms == window.dense_ms < 0.2 * full.dense_ms

    def test_a_window_in_all_layers(self):
        found = predict(self.CONFIG, MistralConfig(), 32 * K, "h200")
        assert set(reasons(found)) == {Reason.SLIDING_WINDOW} and found.break_even is None
        assert math.isnan(found.layers[0].sparse_ms) and "sparse_ms" not in found.to_dict()["layers"][0]
        none = predict(self.CONFIG, MistralConfig(sliding_window=None), 32 * K, "h200")
        assert Reason.SPARSE in reasons(none)

    def test_heads_that_are_too_wide(self):
        wide = dict(OTHERS["qwen3"][1], head_dim=520)
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

    @pytest.mark.parametrize("options", [{}, {"min_length": 77}, {"min_tokens": 50_000}], ids=str)
    @pytest.mark.parametrize("budget", [KeepRatio(0.5), KeepRatio(1), Coverage(0.005), Coverage(0.3)], ids=str)
    def test_the_same_lengths_as_the_compiler(self, budget, options):
        config = TSAConfig(budget=budget, layers=[1], **options)
        found, (layer, _) = predict(config, SMALL, K, "h200").break_even, anatomy(SMALL).layers

        def is_long_enough(length):
            sizes = ((1, heads, length, layer.head_dim) for heads in (layer.heads, layer.kv_heads))
            query, key = (torch.empty_strided(size, (0, 0, 0, 0), dtype=torch.half) for size in sizes)
            return plan.sparse_obstacle(query, key, key, config, 0.5, H200) is None

        if found is None:
            assert not is_long_enough(1024 * K)
        else:
            assert is_long_enough(found) and not is_long_enough(found - 1)

    def test_what_is_kept_may_be_known(self):
        expected, known = (predict(TSAConfig.published(), SMALL, 64 * K, "h200", kept=kept) for kept in (None, 0.25))
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

    @pytest.mark.parametrize("length", [0, -5, 2.5, True, "8K", None])
    def test_other_lengths(self, length):
        with pytest.raises(ConfigError, match="length="):
            predict(None, SMALL, K, "h200").at(length)

    @pytest.mark.parametrize("kept", [0, -1, 1.1, "half", True, float("nan")])
    def test_kept(self, kept):
        with pytest.raises(ConfigError, match="kept="):
            predict(None, SMALL, K, "h200", kept=kept)

    @pytest.mark.parametrize("config", [{}, "h200", 3])
    def test_configs(self, config):
        with pytest.raises(ConfigError, match="TSAConfig"):
            predict(config, SMALL, K, "h200")

    @pytest.mark.parametrize("name", ["kernel", "dense_kernel"])
    def test_kernels_that_are_not_registered(self, name):
        with pytest.raises(KernelError, match="unknown attention kernel 'nope'; registered: "):
            predict(TSAConfig(**{name: "nope"}), SMALL, K, "h200")

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
