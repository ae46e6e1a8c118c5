"""The benchmark of a pretrained model: its settings, that it goes on, and its tables."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tsa_compile.commands.loading import source
from tsa_compile.config import Floor, KeepRatio
from tsa_compile.errors import ConfigError
from tsa_compile.evaluation import Study

from ..support import script
from .small import TEXT, llama, tokenizer

pytestmark = pytest.mark.usefixtures("fresh")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accuracy" / "pretrained.py"


@pytest.fixture(scope="module")
def pretrained():
    sys.path.insert(0, str(SCRIPT.parent))  # as where a script is run
    yield script(SCRIPT)
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def stretch(pretrained):
    return sys.modules["stretch"]


@pytest.fixture(scope="module")
def short_model(tmp_path_factory):
    """A model of 512 positions."""
    path = tmp_path_factory.mktemp("models") / "short"
    llama(1, positions=512).save_pretrained(path)
    tokenizer().save_pretrained(path)
    (path / "book.txt").write_text(TEXT)
    return path


def test_settings_are_what_their_names_say(pretrained):
    found = {setting.name: setting for setting in pretrained.settings(30)}
    assert len(found) == 6 + 2 + 12 + 2 + 4 + 11
    for name, setting in found.items():
        config = setting.config
        assert (config.window, config.min_tokens, config.min_length) == (32 if "window 32" in name else 128, 0, 1)
        assert config.score == ("mean" if name.startswith("published") or "mean" in name else "max")
        assert config.granularity == ("group" if "groups" in name else "head")
        assert (config.floor is None) == name.startswith("published")
        assert config.floor in (None, Floor(256, 16)) and setting.random == ("random" in name)
    assert found["floor, keep .08, all but 2"].config.layers == tuple(range(2, 30))
    assert found["floor, keep .3, upper two thirds"].config.layers == tuple(range(10, 30))
    assert found["published, keep .7"].config.layers == tuple(range(15, 30))
    assert found["floor alone, upper half"].config.budget == KeepRatio(0)


def test_it_stops_in_time_goes_on_and_makes_tables(pretrained, word_model, tmp_path, capsys, monkeypatch):
    pytest.importorskip("statsmodels")
    path = tmp_path / "small.json"
    arguments = ["--model", str(word_model), "--out", str(path), "--lengths", "400", "--tasks", "copy", "--samples", "2"]
    arguments += ["--settings", "floor, keep .15, upper half", "--text", str(word_model / "book.txt"), "--device", "cpu"]
    assert pretrained.main([*arguments, "--minutes", "0"]) == 3 and Study.load(path).cells == ()
    assert "the same command goes on" in capsys.readouterr().err
    assert pretrained.main(arguments) == 0
    study = Study.load(path)
    assert [(cell.setting, cell.samples) for cell in study.cells] == [("dense", 2), ("floor, keep .15, upper half", 2)]
    assert study.cells[1].mean_kept == pytest.approx((41 + 128) / 400)
    with pytest.raises(SystemExit, match="2"):
        pretrained.main(["--out", str(path), "--render", str(path.with_suffix(".md"))])
    assert "over the results" in capsys.readouterr().err
    tables = tmp_path / "tables.md"
    assert pretrained.main(["--out", str(path), "--render", str(tables)]) == 0
    assert len(json.loads(tables.with_suffix(".json").read_text())) == 2
    text = tables.read_text()
    assert "LlamaForCausalLM, 1 layers of 32, float32; seed 0; device cpu" in text and "| dense | 100% |" in text
    monkeypatch.setitem(pretrained.report.__globals__, "ENOUGH", 2)
    assert "All lengths together" in pretrained.report(study)
    longer = dataclasses.replace(study, cells=(*study.cells, dataclasses.replace(study.cells[0], length=500)))
    assert "All lengths together" not in pretrained.report(longer), "the setting did not run at 500"
    assert pretrained.main([*arguments, "--lengths", "9000"]) == 1
    assert "LlamaForCausalLM has 4,096 positions" in capsys.readouterr().err


def test_a_gguf_file_is_unpacked_once_for_all_jobs(pretrained, short_model, tmp_path, monkeypatch):
    assert pretrained.unpacked(short_model, tmp_path, "float32") == short_model
    monkeypatch.setattr(pretrained, "gguf_file", lambda folder: "book.txt")
    made = pretrained.unpacked(short_model, tmp_path, "bfloat16")
    again, before = (source(folder, None, None, "cpu", "bfloat16", False) for folder in (made, short_model))
    assert all(map(torch.equal, again.load(8).state_dict().values(), before.load(8).state_dict().values()))
    assert again.tokenizer("")("harbour") == before.tokenizer("")("harbour")
    assert pretrained.unpacked(short_model, tmp_path, "float32") != made, "a run in another type would get rounded weights"
    monkeypatch.setattr(pretrained, "source", None)
    assert pretrained.unpacked(short_model, tmp_path, "bfloat16") == made
    (short_model / "book.txt").write_text(TEXT + "another model's")
    with pytest.raises(TypeError, match="NoneType"):
        pretrained.unpacked(short_model, tmp_path, "bfloat16")
    (short_model / "book.txt").write_text(TEXT)


def test_the_text_is_the_language_reference(pretrained):
    text = pretrained.handbook()
    assert len(text) > 200_000 and "Assert statements are a convenient way" in text


def test_each_length_has_the_least_factor_that_is_enough(stretch, short_model):
    config = source(short_model, None, None, "cpu", "float32", False).config
    most = 512 - stretch.ROOM
    lengths = [3000, most, most + 1, 1024 - stretch.ROOM, 1024]
    assert stretch.by_factor(config, lengths, [4, 2]) == {1: [most], 2: [most + 1, 1024 - stretch.ROOM], 4: [1024, 3000]}
    assert stretch.by_factor(config, [700], []) == {1: [700]}  # which evaluate refuses


@pytest.mark.parametrize("way", ["yarn", "ntk"])
def test_positions_are_stretched_and_weights_stay(way, stretch, short_model):
    plain = source(short_model, None, None, "cpu", "float32", False)
    assert stretch.stretched(plain, 1.0, way) is plain
    before, after = plain.load(8), stretch.stretched(plain, 2.0, way).load(8)
    assert (before.config.max_position_embeddings, after.config.max_position_embeddings) == (512, 1024)
    assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))
    old, new = before.model.rotary_emb, after.model.rotary_emb
    ratios = old.inv_freq / new.inv_freq  # of the fastest rotation 1, of the slowest the factor
    assert ratios[0] == 1 and ratios[-1] == pytest.approx(2) and ratios.diff().min() >= -1e-6
    assert new.attention_scaling == pytest.approx(1 + 0.1 * math.log(2) if way == "yarn" else 1)


@pytest.mark.parametrize(
    "kind, sizes, found",
    [
        (transformers.GPT2Config, {}, "found none"),
        (transformers.LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
        (transformers.Gemma3TextConfig, {}, r"several kinds \(sliding_attention, full_attention\)"),
    ],
)
def test_positions_that_cannot_be_stretched(kind, sizes, found, stretch, short_model):
    plain = source(short_model, None, None, "cpu", "float32", False)
    other = type(plain)(plain.name, plain.folder, kind(**sizes), plain.device, plain.dtype)
    with pytest.raises(ConfigError, match=rf"needs plain rotary positions.*{found}"):
        stretch.stretched(other, 2.0, "yarn")
    with pytest.raises(ConfigError, match="factors must be at least 1"):
        stretch.stretched(plain, 0.5, "yarn")


def test_longer_prompts_than_positions(pretrained, short_model, tmp_path, capsys):
    pytest.importorskip("statsmodels")
    path, setting = tmp_path / "long.json", "floor, keep .15, upper half"
    arguments = ["--model", str(short_model), "--out", str(path), "--lengths", "400", "900", "--tasks", "copy"]
    arguments += ["--samples", "1", "--settings", setting, "--text", str(short_model / "book.txt"), "--device", "cpu"]
    assert pretrained.main(arguments) == 1 and "LlamaForCausalLM has 512 positions" in capsys.readouterr().err
    assert pretrained.main([*arguments, "--stretch", "2"]) == 0
    study = Study.load(path)
    assert study.conditions["stretch"] == {"by": "yarn", "factors": [2.0]}
    assert [(cell.length, cell.setting) for cell in study.cells] == [
        (400, "dense"), (400, setting), (900, "dense"), (900, setting),
    ]  # fmt: skip
    assert pretrained.main([*arguments[:4], "--lengths", "400", *arguments[7:]]) == 1
    assert "a study with another stretch" in capsys.readouterr().err
    tables = tmp_path / "tables.md"
    assert pretrained.main(["--out", str(path), "--render", str(tables)]) == 0
    assert "positions of prompts that need it stretched by 2 (yarn)" in tables.read_text()
