"""`tsa-compile eval`, end to end on a CPU: a model with a tokenizer of its own, files that go on, and what is refused."""

import inspect
import json

import pytest

from tsa_compile import shapes
from tsa_compile.calibration.calibrate import Calibration
from tsa_compile.commands import evaluate, texts
from tsa_compile.commands.loading import Source
from tsa_compile.config import Coverage, Floor, KeepRatio, TSAConfig
from tsa_compile.errors import ConfigError
from tsa_compile.evaluation import TASKS, Study
from tsa_compile.evaluation import evaluate as library

from .support import TINY, fails, run

pytest.importorskip("statsmodels")
pytestmark = pytest.mark.usefixtures("fresh")
QUICK = ["--length", "300", "--samples", "2", "--min-tokens", "0", "--window", "16", "--sparse-layers", "0"]


def evaluated(word_model, *arguments):
    done = run("eval", str(word_model), *QUICK, "--text", str(word_model / "book.txt"), *arguments)
    assert done.exit_code == 0, done.output
    return done


def test_settings_are_compared_with_dense(word_model, tmp_path):
    path = tmp_path / "study.json"
    settings = ["--setting", "dense", "--setting", "keep:0.15", "--setting", "keep:0.15,floor=none"]
    done = evaluated(word_model, "--tasks", "copy,needle", *settings, "--json", "--out", str(path))
    found = json.loads(done.stdout)
    rows = [(row["task"], row.get("setting")) for row in found["summary"]]
    assert rows == [("copy", "dense"), ("copy", "keep:0.15"), ("copy", "keep:0.15,floor=none"), ("needle", None)]
    assert found["summary"][-1]["remark"].startswith("dense itself finds 0 of 2; this task says nothing about this model")
    assert found["settings"]["keep:0.15,floor=none"]["config"]["floor"] is None
    assert found["settings"]["keep:0.15"]["config"] | {"floor": None} == found["settings"]["keep:0.15,floor=none"]["config"]
    study = Study.load(path)
    assert json.loads(path.read_text()) == {name: value for name, value in found.items() if name != "summary"}
    assert all(cell.samples == 2 for cell in study.cells) and study.names("length") == [300]


def test_a_file_goes_on_and_belongs_to_its_model(word_model, tmp_path):
    path = tmp_path / "study.json"
    chosen = ["--budget", "keep:0.2", "--tasks", "copy", "--out", str(path)]
    first = evaluated(word_model, *chosen).stdout
    saved = path.read_text()
    assert evaluated(word_model, *chosen).stdout == first and path.read_text() == saved
    assert max(map(len, first.splitlines())) <= 80 and "copy, 300 tokens, 2 samples" in first
    found = fails(2, "eval", str(word_model), *QUICK, "--text", str(word_model / "book.txt"), *chosen, "--seed", "1")
    assert "holds a study with another seed" in found


def test_prompts_that_are_too_long_are_refused_with_the_numbers(word_model):
    found = fails(2, "eval", str(word_model), "--length", "8K")
    assert "8,192 tokens and 80 of an answer make 8,272, LlamaForCausalLM has 4,096 positions" in found


def test_help_names_every_task():
    said = run("eval", "--help").stdout
    assert all(task in said for task in TASKS)


def test_a_setting_is_a_budget_and_what_differs():
    changes, random = texts.setting(
        "keep:0.15, floor=8+2,layers=2-4+7,window=32,min_tokens=0,granularity=group,select=random"
    )
    assert random and TSAConfig(**changes) == TSAConfig(
        budget=KeepRatio(0.15), floor=Floor(8, 2), layers=(2, 3, 4, 7), window=32, min_tokens=0, granularity="group"
    )
    assert texts.setting("coverage:0.005,floor=none,layers=upper") == (
        {"budget": Coverage(0.005), "floor": None, "layers": None}, False,
    )  # fmt: skip


def test_a_setting_with_the_calibration_of_another_model_is_refused(calibration, word_model):
    """Of the same rule as --sparse-layers: layers, sizes, and where the weights are at hand these too."""
    for setting in (f"layers={calibration}", f"keep:0.5,layers={calibration}"):
        said = fails(2, "eval", str(word_model), "--setting", setting)
        assert "the calibration is of a model with 2 layers" in said and "calibrate this one" in said
        said = fails(2, "eval", "--shape", "llama-3.2-1b", "--layers", "2", "--setting", setting)
        assert "the calibration is not of llama-3.2-1b (hidden_size 2048, not 64" in said


def test_a_setting_with_the_calibration_of_other_weights_warns_once(calibration, tmp_path, monkeypatch):
    shapes.build(shapes.model_config("tiny", layers=2), seed=1).save_pretrained(tmp_path)
    asked = []

    def stop(model, tokenizer, *, settings, **request):
        asked.extend(setting.config.layers for setting in settings)
        raise ConfigError("enough")

    monkeypatch.setattr(evaluate, "_tokenizer", lambda source: None)
    monkeypatch.setattr("tsa_compile.evaluation.evaluate", stop)
    settings = ["--setting", f"layers={calibration}", "--setting", f"keep:0.5,layers={calibration}"]
    done = run("eval", str(tmp_path), *settings)
    assert asked == [Calibration.load(calibration).sparse_layers] * 2 and "error: enough" in done.stderr
    assert done.stderr.count("warning: this calibration belongs to another model") == 1


def test_memory_is_asked_for_all_prompts_that_run_at_once(monkeypatch):
    asked = []

    def stop(source, length, batch=1):
        asked.append((length, batch))
        raise ConfigError("enough")

    monkeypatch.setattr(Source, "load", stop)
    for given in (["--samples", "9"], ["--samples", "2"], ["--batch-tokens", "1"], ["--samples", "100"]):
        fails(2, "eval", *TINY, "--lengths", "1K,6K", "--batch-tokens", "10240", *given)
    assert asked == [(1024, 9), (6144, 1), (6144, 1), (1024, 10)]


def test_the_defaults_are_the_librarys():
    known = inspect.signature(library).parameters
    assert {name: known[name].default for name in evaluate._ON_GPU} == evaluate._ON_GPU | {"lengths": (4096,)}


def test_a_budget_is_for_the_settings_without_one(calibration, tmp_path, monkeypatch):
    def stop(model, tokenizer, *, settings, **request):
        raise ConfigError(", ".join(str(setting.config.budget) for setting in settings))

    monkeypatch.setattr("tsa_compile.evaluation.evaluate", stop)
    settings = ["--setting", "keep:0.3", "--setting", f"layers={calibration}"]
    done = run("eval", *TINY, "--budget", "keep:0.5", *settings)
    assert "error: KeepRatio(ratio=0.3), KeepRatio(ratio=0.5)" in done.stderr


def test_a_budget_that_the_layers_own_would_hide_is_refused(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(TSAConfig(layers={0: KeepRatio(0.25), 1: KeepRatio(0.5)}).to_json())
    said = fails(2, "eval", *TINY, "--config", str(config), "--setting", "keep:0.3")
    assert "--setting keep:0.3 has a budget, but" in said and "--setting keep:0.3,layers=upper" in said
    for command in ("eval", "explain"):
        said = fails(2, command, *TINY, "--config", str(config), "--budget", "keep:0.3")
        assert "the budget keep:0.3, and layers with a budget each: leave one of them out" in said


def test_statsmodels_is_missed_before_the_work(word_model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "statsmodels.stats", None)
    assert "pip install 'tsa-compile[eval]'" in fails(1, "eval", str(word_model))
