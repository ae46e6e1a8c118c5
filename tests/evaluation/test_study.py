"""A study is the same whether it runs through or goes on, and refuses what does not belong together."""

import json
import math
from dataclasses import replace

import pytest
import torch

from tsa_compile.config import Floor
from tsa_compile.errors import ConfigError
from tsa_compile.evaluation import DENSE, Setting, Study, evaluate
from tsa_compile.evaluation.outcomes import Cell
from tsa_compile.evaluation.running import Runner

from . import small
from .small import TEXT, llama, tokenizer

pytestmark = pytest.mark.usefixtures("fresh")
CONFIG = small.CONFIG.replace(layers=(0,))
SETTINGS = [Setting("published", CONFIG), Setting("floor", CONFIG.replace(floor=Floor(16, 4)))]
LENGTH = 300


@pytest.fixture(scope="module")
def model():
    return llama(1)


@pytest.fixture
def run(model, words):
    def call(**changes):
        given = dict(settings=SETTINGS, tasks=["needle"], lengths=[LENGTH], samples=3, text=TEXT, batch_tokens=2 * LENGTH)
        given |= changes
        return evaluate(given.pop("model", model), given.pop("tokenizer", words), **given)

    return call


@pytest.fixture
def runs(monkeypatch):
    """What is really run: the setting's name and the number of samples."""
    seen, run = [], Runner.run

    def spy(self, samples, dense=None):
        seen.append((self.setting.name, len(samples)))
        return run(self, samples, dense)

    monkeypatch.setattr(Runner, "run", spy)
    return seen


def columns(study):
    return [replace(cell, seconds=0.0) for cell in study.cells]


def test_every_setting_runs_on_the_same_samples_and_a_file_keeps_it(run, runs, tmp_path):
    path = tmp_path / "study.json"
    steps = []
    study = run(file=path, progress=lambda what, done, total: steps.append((what, done, total)))
    assert runs == [(name, 2) for _ in range(2) for name in ("dense", "published", "floor")], "one shape, though 3 are odd"
    assert [(cell.setting, cell.samples, len(cell.right)) for cell in study.cells] == [
        ("dense", 3, 3), ("published", 3, 3), ("floor", 3, 3),
    ]  # fmt: skip
    assert study.find("needle", LENGTH, "dense").kl == (0.0, 0.0, 0.0)
    assert all(kl > 0 for kl in study.find("needle", LENGTH, "published").kl)
    assert Study.load(path) == study and study.settings["floor"]["config"]["floor"] == {"window": 16, "sinks": 4}
    assert steps[0] == ("300 tokens, needle, dense", 0, 6) and steps[-1] == ("done", 6, 6)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_where_it_was(run, runs, tmp_path):
    given, path = dict(settings=SETTINGS[:1]), tmp_path / "study.json"
    whole = run(**given)

    def stop(what, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(**given, file=path, progress=stop)
    assert [cell.samples for cell in Study.load(path).cells] == [3, 2], "dense has run the second batch"
    runs.clear()
    again = run(**given, file=path)
    assert runs == [("dense", 2), ("published", 2)] and columns(again) == columns(whole)
    runs.clear()
    assert columns(run(**given, file=path)) == columns(whole) and runs == []


@pytest.mark.exhaustive
def test_samples_and_settings_can_be_added(run, runs, tmp_path):
    path = tmp_path / "study.json"
    run(file=path, samples=1, settings=[])
    assert runs == [("dense", 1)]
    runs.clear()
    run(file=path, samples=1, settings=SETTINGS[:1])
    assert runs == [("dense", 1), ("published", 1)], "dense runs again for what its probabilities are needed for"
    study = run(file=path, settings=SETTINGS[:1])
    whole = run(settings=SETTINGS[:1])
    for cell, other in zip(columns(study), columns(whole), strict=True):
        assert (cell.key, cell.right, cell.kept) == (other.key, other.right, other.kept)
        assert cell.nll == pytest.approx(other.nll, rel=1e-3) and cell.kl == pytest.approx(other.kl, rel=1e-2, abs=1e-6)


def test_other_models_texts_seeds_and_configurations_are_refused(run, tmp_path, words):
    path = tmp_path / "study.json"
    run(file=path, samples=1)
    others = {
        "another model": dict(model=llama(1, seed=1)),
        "another text": dict(text=TEXT + " More."),
        "another seed": dict(seed=1),
        "another dtype": dict(model=llama(1).bfloat16()),
        "another configuration under the name 'floor' .floor .*'window': 16.*, not .*'window': 17": dict(
            settings=[SETTINGS[0], Setting("floor", CONFIG.replace(floor=Floor(17, 4)))]
        ),
        "another configuration under the name 'published' .random False, not True": dict(
            settings=[replace(SETTINGS[0], random=True)]
        ),
    }
    for said, changes in others.items():
        given = dict(settings=SETTINGS, tasks=["needle"], lengths=[LENGTH], samples=1, text=TEXT, file=path) | changes
        with pytest.raises(ConfigError, match=said):
            evaluate(given.pop("model", llama(1)), words, **given)
    with pytest.raises(ConfigError, match="another tokenizer"):
        evaluate(llama(1), tokenizer(chat=False), settings=SETTINGS, lengths=[LENGTH], samples=1, text=TEXT, file=path)


def test_conditions_are_what_a_file_will_hold(run, runs, tmp_path):
    """A tuple is a list there, and a number that names something a text: neither is another condition."""
    given = dict(file=tmp_path / "study.json", samples=1, settings=[], conditions={"factors": (1, 2), "by": {4: "yarn"}})
    assert run(**given).conditions["factors"] == [1, 2]
    runs.clear()
    assert run(**given).conditions["by"] == {"4": "yarn"} and runs == []


def test_a_damaged_file_is_refused(run, tmp_path):
    path = tmp_path / "study.json"
    run(file=path, samples=1)
    values = json.loads(path.read_text())
    for change, said in (
        ({"nll": [0.5, 1.0]}, r"columns of \[1, 2\] samples"),
        ({"right": None}, "right is None"),
        ({"right": ["x"]}, "right is 'x'"),
        ({"task": {}}, r"task is \{\}"),
        ({"length": None}, "length is None"),
        ({"length": [1]}, "length is a list"),
        ({"kl": [10**400]}, "too large"),
    ):
        path.write_text(json.dumps(values | {"cells": [values["cells"][0] | change]}))
        with pytest.raises(ConfigError, match=rf"study.json' is not a study of accuracy: .*{said}"):
            run(file=path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            dict(lengths=[4050]),
            "prompts of 4,050 tokens and 80 of an answer make 4,130, LlamaForCausalLM has 4,096 positions",
        ),
        (dict(tasks=["poetry"]), "task='poetry' is not allowed"),
        (dict(tasks=[]), "must be a list that is not empty"),
        (dict(samples=0), "samples=0 is not allowed"),
        (dict(lengths=[40]), "needle needs .* found a length of 40"),
        (dict(text=" "), "the text is blank"),
        (dict(tasks=["continuation"], text=None), "continuation goes on with a text of yours"),
        (dict(settings=[Setting("dense", CONFIG)]), "several settings are called 'dense'"),
        (dict(settings=[CONFIG]), r"settings\[0\] is a TSAConfig: pass a Setting"),
        (dict(settings={"floor": CONFIG}), "settings is a dict: pass a list of Setting"),
        (dict(settings=SETTINGS[0]), "settings is a Setting: pass a list of Setting"),
        (dict(settings=[Setting("floor", {})]), "the config of setting 'floor' is a dict: pass a TSAConfig"),
        (dict(settings=[Setting(3, CONFIG)]), "the name of setting 3 is a int: pass a str"),
        (dict(lengths=1024), "lengths=1024 is not allowed: lengths must be a list that is not empty"),
        (dict(tasks="needle"), "tasks='needle' is not allowed: tasks must be a list that is not empty"),
        (dict(text=3), "text is a int: pass a str"),
        (dict(tokenizer=None), "tokenizer is a NoneType: pass the model's own tokenizer"),
        (dict(conditions=["made"]), "conditions is a list: pass a dict"),
        (dict(conditions={"made": object()}), "conditions=.* must be plain JSON types .*not JSON serializable"),
        (dict(conditions={"made": float("nan")}), "conditions=.* must be plain JSON types"),
        (dict(model=llama(1).train()), r"in training mode: a study is of inference, call model\.eval\(\) first"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_work(run, runs, changes, said):
    with pytest.raises(ConfigError, match=said):
        run(**changes)
    assert runs == []


def test_likelihood_alone_is_asked_of_a_continuation(run):
    study = run(tasks=["continuation"], settings=[DENSE, SETTINGS[0]], samples=2)
    dense, sparse = study.cells
    assert dense.right == sparse.right == () and dense.nll != sparse.nll
    ids = tokenizer()(TEXT)["input_ids"]
    assert len(ids) > LENGTH + 64 and all(torch.isfinite(torch.tensor(sparse.nll)))


def test_answers_that_are_no_numbers_are_json_too(tmp_path):
    cell = Cell("copy", 8, "none", (), (float("nan"), 1.5), (float("inf"), 0.5), (0.5, 0.5), ("", "a"))
    study = Study({}, cells=(cell,))
    study.save(tmp_path / "study.json")
    assert '"nll": [null, 1.5], "kl": [null, 0.5]' in (tmp_path / "study.json").read_text()
    (found,) = Study.load(tmp_path / "study.json").cells
    assert math.isnan(found.nll[0]) and math.isnan(found.kl[0]) and found.nll[1:] == (1.5,) and found.right == ()
