"""What a calibration says, saves and draws: ranks, files, fingerprints, presets, progress."""

import dataclasses
import io
import json
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tsa_compile import ConfigError, Coverage, KeepRatio, TSAConfig, TSAWarning
from tsa_compile.calibration.calibrate import PRESETS, Calibration, calibrate, preset
from tsa_compile.calibration.fingerprint import Fingerprint

from ..support import tiny, tokens

PRINT = Fingerprint("Model", "Layer", 4, {"hidden_size": 8}, {"0.w": [1.0, 2.0]})


def made(drift=(3.0, 1.0, 4.0, 2.0), delta=0.5):
    return Calibration(tuple(f"model.layers.{i}" for i in range(len(drift))), drift, delta, 100, 2, PRINT)


def measured(model, prompts, **options):
    return calibrate(model, prompts, progress=False, **options)


class TestRanks:
    @pytest.mark.parametrize("delta", [0, -0.5, 1.01, float("nan"), float("inf"), None, "0.5", True])
    def test_delta_is_a_share(self, delta):
        with pytest.raises(ConfigError, match="delta"):
            made(delta=delta)

    def test_least_drift_first(self):
        found = made()
        assert found.ranks == (3, 1, 4, 2)
        assert found.sparse_layers == (1, 3)
        assert dataclasses.replace(found, delta=0.75).sparse_layers == (0, 1, 3)

    def test_equal_drifts_by_position(self):
        assert made((1.0, 0.5, 1.0, 0.5, 1.0)).ranks == (3, 1, 4, 2, 5)

    @given(st.lists(st.floats(0, 10), min_size=1, max_size=40), st.integers(1, 100))
    def test_what_the_specification_says(self, drift, percent):
        found = made(drift, percent / 100)
        assert sorted(found.ranks) == list(range(1, len(drift) + 1))
        assert len(found.sparse_layers) == len(drift) * percent // 100, "in exact arithmetic"
        dense = set(range(len(drift))) - set(found.sparse_layers)
        assert all(drift[a] <= drift[b] for a in found.sparse_layers for b in dense)
        assert list(found.sparse_layers) == sorted(found.sparse_layers)

    def test_a_config(self):
        assert made().config() == TSAConfig(layers=[1, 3])
        assert made().config(budget=KeepRatio(0.5)) == TSAConfig(layers=[1, 3], budget=KeepRatio(0.5))
        with pytest.raises(ConfigError, match="windw"):
            made().config(windw=3)

    def test_a_share_that_selects_nothing_is_said(self):
        with pytest.warns(TSAWarning, match="selects none of 4 layers"):
            assert made(delta=0.2).config().layers == ()

    def test_the_compiler_takes_the_layers(self):
        from tsa_compile import explain

        model = tiny("llama", num_hidden_layers=2)
        found = measured(model, tokens(1, 40))
        report = explain(model, input_ids=tokens(1, 40), config=found.config(window=4, min_tokens=4))
        assert tuple(row.layer_index for row in report.sparse_calls) == found.sparse_layers


class TestFiles:
    def test_round_trip(self, tmp_path):
        found = measured(tiny("llama"), tokens(2, 20), delta=0.7)
        found.save(tmp_path / "c.json")
        assert Calibration.load(str(tmp_path / "c.json")) == found
        values = json.loads((tmp_path / "c.json").read_text())
        assert values["sparse_layers"] == list(found.sparse_layers)
        assert [layer["name"] for layer in values["layers"]] == [f"model.layers.{index}" for index in range(3)]

    @given(st.lists(st.floats(0, 1e6), min_size=1, max_size=5), st.floats(0.001, 1))
    def test_every_number_survives(self, drift, delta):
        found = made(drift, delta)
        assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"format": "other"}, "expected 'tsa_compile.calibration/1'"),
            ({"delta": 2}, "delta=2"),
            ({"layers": []}, "at least one"),
            ({"layers": [{"name": "a"}]}, "no 'drift'"),
            ({"layers": [{"name": "a", "drift": "x"}]}, "calibrate again"),
            ({"layers": [{"name": "a", "drift": -1}]}, "drift"),
            ({"layers": 3}, "calibrate again"),
            ({"tokens": None}, "calibrate again"),
            ({"tokens": float("inf")}, "calibrate again"),
            ({"sparse_layers": [1]}, r"sparse_layers is \[1\], and by drift and delta \[1, 3\]"),
            ({"sparse_layers": None}, "sparse_layers is None"),
            ({"fingerprint": {}}, "calibrate again"),
            ({"fingerprint": 3}, "calibrate again"),
        ],
    )
    def test_other_contents(self, change, said, tmp_path):
        (tmp_path / "c.json").write_text(json.dumps(made().to_dict() | change))
        with pytest.raises(ConfigError, match=said) as caught:
            Calibration.load(tmp_path / "c.json")
        assert "c.json" in str(caught.value)

    @pytest.mark.parametrize("text", ["", "{", "[1]", '"a"', "\x00", "{}"])
    def test_no_calibration(self, text, tmp_path):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ConfigError, match=r"c\.json.*Calibration\.save"):
            Calibration.load(tmp_path / "c.json")

    def test_no_file(self, tmp_path):
        for path in (tmp_path / "none.json", tmp_path):
            with pytest.raises(ConfigError, match="cannot be read"):
                Calibration.load(path)
        (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\xff")
        with pytest.raises(ConfigError, match="cannot be read"):
            Calibration.load(tmp_path / "bytes.json")

    def test_nowhere_to_write(self, tmp_path):
        pytest.importorskip("matplotlib")
        with pytest.raises(ConfigError, match="cannot be written"):
            made().save(tmp_path / "none" / "c.json")
        with pytest.raises(ConfigError, match="cannot be written"):
            made().plot(tmp_path / "none" / "c.png")
        with pytest.raises(ConfigError, match="cannot be written"):
            made().plot(tmp_path / "c.nonsense")


class TestFingerprint:
    @pytest.fixture
    def found(self):
        return measured(tiny("llama"), tokens(1, 12))

    @pytest.fixture
    def accepts(self, found):
        def accepts(model):
            with warnings.catch_warnings():
                warnings.simplefilter("error", TSAWarning)
                return found.check(model)

        return accepts

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_same_model_in_any_dtype(self, dtype, accepts):
        assert accepts(tiny("llama").to(dtype))
        assert measured(tiny("llama").bfloat16(), tokens(1, 12)).check(tiny("llama").to(dtype))

    def test_compiled_and_on_the_meta_device(self, accepts):
        assert accepts(torch.compile(tiny("llama")))
        assert accepts(tiny("llama").to("meta"))

    def test_a_calibration_read_back(self, found, tmp_path):
        found.save(tmp_path / "c.json")
        assert Calibration.load(tmp_path / "c.json").check(tiny("llama"))

    @pytest.mark.parametrize(
        ("name", "changes", "said"),
        [
            ("llama", {"num_hidden_layers": 4}, "layers 4, not 3"),
            ("llama", {"num_key_value_heads": 4}, "num_key_value_heads 4, not 2"),
            ("llama", {"vocab_size": 65}, "vocab_size 65, not 64"),
            ("qwen3", {}, "Qwen3ForCausalLM, not LlamaForCausalLM"),
            ("gpt2", {}, r"no layers model\.layers"),
        ],
    )
    def test_another_model(self, found, name, changes, said):
        with pytest.warns(TSAWarning, match=said):
            assert not found.check(tiny(name, **changes))

    def test_other_weights(self, found):
        model = tiny("llama")
        for parameter in model.model.layers[2].parameters():
            nn.init.normal_(parameter, std=0.02)
        with pytest.warns(TSAWarning, match="other weights"):
            assert not found.check(model)

    def test_samples_do_not_depend_on_the_layout_in_memory(self, accepts):
        model = tiny("llama")
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.self_attn.q_proj):
                linear.weight.data = linear.weight.data.t().contiguous().t()
        assert accepts(model)


class TestFigure:
    def test_one_bar_for_each_layer(self, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        made().plot(tmp_path / "drift.svg")
        text = (tmp_path / "drift.svg").read_text()
        assert text.count("<path") > 4 and "<svg" in text
        figures = []
        monkeypatch.setattr("tsa_compile.calibration.calibrate.save_figure", lambda figure, path: figures.append(figure))
        made().plot("drift.png")
        assert all(tick == int(tick) for tick in figures[0].axes[0].get_xticks()), "layers have whole numbers"
        monkeypatch.undo()
        made(delta=1.0).plot(tmp_path / "all.png")
        assert (tmp_path / "all.png").stat().st_size > 1000

    def test_without_matplotlib(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            made().plot(tmp_path / "drift.png")


class TestProgress:
    @pytest.fixture
    def screen(self, monkeypatch):
        import rich.console

        screen = io.StringIO()
        original = rich.console.Console
        made = dict(file=screen, force_terminal=True, width=80)
        monkeypatch.setattr(rich.console, "Console", lambda **options: original(**made))
        return screen

    def test_a_bar_over_the_prompts(self, screen):
        calibrate(tiny("llama"), [*tokens(3, 8)], batch_size=2)
        assert "3/3" in screen.getvalue()

    def test_of_an_unknown_number(self, screen):
        calibrate(tiny("llama"), iter(tokens(3, 8)))
        assert "3/" in screen.getvalue()

    def test_none_if_not_wanted(self, screen):
        measured(tiny("llama"), tokens(1, 8))
        assert screen.getvalue().strip() == ""


class TestPresets:
    def test_the_published_lists(self):
        assert preset("llama-3.1-8b-instruct") == TSAConfig.published(layers=range(15, 31))
        nemo = preset("mistralai/Mistral-Nemo-Instruct-2407")
        assert nemo == TSAConfig.published(layers=[14, 15, *range(20, 38)], budget=Coverage(0.008))
        assert all("2602.03216" in published.citation for published in PRESETS.values())

    def test_other_options(self):
        assert preset("Llama-3.1-8B-Instruct", window=64).window == 64
        assert preset("Llama-3.1-8B-Instruct", budget=KeepRatio(0.5)).budget == KeepRatio(0.5)

    def test_unknown_models(self):
        with pytest.raises(ConfigError, match="mistral-nemo-instruct-2407"):
            preset("llama-2")
