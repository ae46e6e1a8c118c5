"""`tsa-compile eval`, end to end on a CPU: a model with a tokenizer of its own, files that go on, and what is refused."""

import json

import pytest

from tsa_compile.commands import texts
from tsa_compile.config import Coverage, Floor, KeepRatio, TSAConfig
from tsa_compile.evaluation import TASKS, Study

from .support import fails, run

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


def test_statsmodels_is_missed_before_the_work(word_model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "statsmodels.stats", None)
    assert "pip install 'tsa-compile[eval]'" in fails(1, "eval", str(word_model))
