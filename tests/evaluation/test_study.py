"""A whole study of tiny models: what is scored, paired, kept and refused."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.outcomes import Cell, LayerRow, Timing
from tsa_compile.evaluation.probe import Probe
from tsa_compile.evaluation.results import Study
from tsa_compile.evaluation.study import BLOCK, Plan, evaluate
from tsa_compile.evaluation.tasks import IGNORED, VOCABULARY, generate

from .toys import Output, Toy

LENGTH = 160
QUICK = dict(tasks=["niah_single"], lengths=[LENGTH], samples=6, batch_tokens=4 * LENGTH, progress=False)


class Cheat(Toy):
    """Sees the next token, but says something else where the first token of noise is odd, and in every second answer."""

    def forward(self, input_ids, use_cache=False, logits_to_keep=0):
        logits = super().forward(input_ids, use_cache, logits_to_keep).logits
        honest = input_ids[:, 1:2] % 2 == 0
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        answers = torch.where(honest | (places % 2 == 0), input_ids.roll(-1, 1), 0)[:, logits_to_keep]
        return Output(logits + 1000 * functional.one_hot(answers, VOCABULARY))


@pytest.fixture(scope="module")
def cheat():
    torch.manual_seed(0)
    return Cheat()


@pytest.fixture(scope="module")
def study(cheat, tmp_path_factory):
    """Two tasks, 70 samples (more than a block), a method of each kind."""
    return evaluate(
        cheat, methods=["dense", "keep-0.5", "random-coverage-0.3"], tasks=["mqar", "niah_multivalue"], lengths=[LENGTH],
        samples=70, batch_tokens=10_000, progress=False,
    )  # fmt: skip


def blocks(task, samples, **options):
    """The samples of a study, as `generate` gives them: each block of 64 from its own seed."""
    made = [generate(task, batch=BLOCK, length=LENGTH, seed=place, **options) for place in range(-(-samples // BLOCK))]
    fields = ("tokens", "labels", "evidence")
    return [torch.cat([getattr(block, name) for block in made])[:samples] for name in fields]


@pytest.mark.parametrize("task", ["mqar", "niah_multivalue"])
def test_a_sample_is_right_if_every_answer_is(study, task):
    tokens, labels, _ = blocks(task, 70)
    honest = (tokens[:, 1] % 2 == 0).tolist()
    asked = labels[0] != IGNORED
    even = (asked & (torch.arange(LENGTH) % 2 == 0)).sum() / asked.sum()
    assert 10 < sum(honest) < 60 and 0 < even < 1
    for method in ("dense", "keep-0.5", "random-coverage-0.3"):
        cell = study.find(task, LENGTH, method)
        assert list(cell.right) == honest
        assert cell.answers == pytest.approx((sum(honest) + (70 - sum(honest)) * float(even)) / 70)


def test_the_kept_share_and_the_survival_are_those_of_the_sparse_layer(study):
    assert study.find("mqar", LENGTH, "dense").layers == ()
    (row,) = study.find("mqar", LENGTH, "keep-0.5").layers
    # Candidates 160 - 128, of which half, besides the window.
    assert row.layer == 1 and row.keep_low == row.keep_high == (16 + 128) / LENGTH == pytest.approx(row.keep)
    (row,) = study.find("niah_multivalue", LENGTH, "random-coverage-0.3").layers
    assert (10 + 128) / LENGTH <= row.keep_low <= row.keep <= row.keep_high < 1
    _, _, evidence = blocks("niah_multivalue", 70)
    # What lies in the window survives; of the rest a random selection takes its share.
    inside = evidence[:, -128:].sum() / evidence.sum()
    share = (row.keep * LENGTH - 128) / 32
    assert row.survival == pytest.approx(float(inside + (1 - inside) * share), abs=0.03)
    assert 0 < row.survival_wrong < 1 and row.survival_wrong != row.survival


def test_a_rescue_keeps_the_evidence_and_an_early_question(cheat, monkeypatch):
    marked = []
    monkeypatch.setattr(Probe, "mark", lambda self, tokens: (marked.append(tokens), setattr(self, "_marked", tokens)))
    options = QUICK | dict(lengths=[320], question="early", tasks=["niah_multiquery"])
    found = evaluate(cheat, methods=["keep-0.3", "rescue-keep-0.3"], **options)
    dropped, rescued = (found.find("niah_multiquery", 320, name, "early") for name in ("keep-0.3", "rescue-keep-0.3"))
    assert dropped.survival < 0.9 and rescued.survival == 1.0 and rescued.keep == dropped.keep
    samples = generate("niah_multiquery", batch=BLOCK, length=320, seed=0, question="early")
    assert torch.equal(marked[0], (samples.evidence | (samples.labels != IGNORED))[:2])


def test_samples_are_the_same_for_every_batch_size(study, cheat):
    again = evaluate(
        cheat, methods=["keep-0.5"], tasks=["mqar"], lengths=[LENGTH], samples=7, batch_tokens=2 * LENGTH, progress=False
    )
    cell, whole = again.cells[0], study.find("mqar", LENGTH, "keep-0.5")
    assert cell.right == whole.right[:7]


def test_an_early_question_is_asked_and_scored(cheat):
    found = evaluate(cheat, **QUICK | dict(lengths=[320], question=["early", "last"], methods=["dense"]))
    assert found.names("question") == ["last", "early"]
    samples = generate("niah_single", batch=BLOCK, length=320, seed=0, question="early")
    place = int((samples.labels[0] != IGNORED).nonzero())
    right = (samples.tokens[:6, 1] % 2 == 0) | (place % 2 == 0)
    assert list(found.find("niah_single", 320, "dense", "early").right) == right.tolist()


def test_a_stopped_study_goes_on(cheat, tmp_path, monkeypatch):
    path, options = tmp_path / "results" / "study.json", QUICK | dict(methods=["dense"], tasks=["niah_single", "mqar"])
    options["resume"] = path

    def stop(task, **_):
        if task == "mqar":
            raise KeyboardInterrupt
        return generate(task, **_)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("tsa_compile.evaluation.study.generate", stop)
        evaluate(cheat, **options)
    before = Study.load(path)
    assert [cell.task for cell in before.cells] == ["niah_single"]
    after = evaluate(cheat, **options)
    assert after.cells[0] == before.cells[0] and [cell.task for cell in after.cells] == options["tasks"]
    assert Study.load(path) == after
    other = evaluate(cheat, **options | dict(batch_tokens=LENGTH, lengths=[LENGTH + 1]))
    assert other.notes["batch_tokens"] == f"{4 * LENGTH}, then {LENGTH}" and other.notes["device"] == "cpu"
    with pytest.raises(ConfigError, match="holds a study with other samples, seed"):
        evaluate(cheat, **options | dict(samples=7, seed=1))
    with pytest.raises(ConfigError, match="other model"):
        evaluate(Toy(), **options)


class NoKeep(nn.Module):
    def forward(self, input_ids):
        return input_ids


class Ignores(Toy):
    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (lambda: NoKeep(), {}, "takes no logits_to_keep"),
        (lambda: Toy(vocabulary=300), {}, "knows 300 tokens, the tasks use 4096"),
        (
            lambda: Toy(positions=150),
            {},
            "has 150 positions, found a length of 160",
        ),
        (lambda: Ignores(), {"methods": ["dense"]}, "gave logits at 160 positions"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(model, options, said):
    with pytest.raises(ConfigError, match=said):
        evaluate(model(), **QUICK | options)


class Bidirectional(Toy):
    """Attention that is not causal: there is nothing to compress."""

    def forward(self, input_ids, use_cache=False, logits_to_keep=0):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, is_causal=False)
        return Output(self.lm_head(hidden[:, logits_to_keep]) if not isinstance(logits_to_keep, int) else hidden)


def test_a_layer_that_cannot_be_sparse_is_named():
    said = r"layers \[1\] should be sparse, \[\] are \(NOT_CAUSAL"
    with pytest.raises(ConfigError, match=said):
        evaluate(Bidirectional(), **QUICK | dict(methods=["keep-0.5"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 0}, "samples=0 is not allowed"),
        ({"batch_tokens": True}, "batch_tokens=True is not allowed"),
        ({"methods": []}, "methods=.* at least one"),
        ({"tasks": "mqar"}, "tasks='mqar' is not allowed: it must be a list"),
        ({"tasks": ["mqr"]}, "the tasks are mqar"),
        ({"lengths": [100]}, "at least 128"),
        ({"question": "late"}, "must be one of last, early"),
        ({"layers": [2]}, r"has the layers 0\.\.1"),
        ({"layers": []}, r"has the layers 0\.\.1"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(cheat, options, said):
    with pytest.raises(ConfigError, match=said):
        evaluate(cheat, **QUICK | options)


def test_results_that_cannot_be_kept_are_refused_before_the_work(cheat, tmp_path):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be written"):
        evaluate(cheat, **QUICK, resume=tmp_path / "file" / "study.json")
    with pytest.raises(ConfigError, match="is not a study: found format None"):
        evaluate(cheat, **QUICK, resume=tmp_path / "other.json")


OUTCOMES = st.lists(st.booleans(), min_size=1, max_size=80)


@given(right=OUTCOMES, answers=st.floats(0, 1), wrong=st.none() | st.floats(0, 1))
def test_a_study_survives_json(right, answers, wrong):
    cell = Cell("mqar", 4096, "keep-0.5", "last", tuple(right), answers, (LayerRow(3, 0.5, 0.4, 0.6, 0.9, wrong),), 1.5)
    timing = Timing("keep-0.5", 4096, 1, 2.0, None, 1.5, 0.5)
    study = Study({"samples": len(right)}, (cell,), (timing,), {"device": "cpu"})
    assert Study.from_dict(json.loads(json.dumps(study.to_dict()))) == study


@given(OUTCOMES)
def test_a_truncated_study_is_refused(right):
    study = Study({}, (Cell("mqar", 4096, "dense", "last", tuple(right), 1.0, (), 1.0),))
    values = study.to_dict()
    values["cells"][0]["right"] = f"{len(right)}:{2 ** len(right):x}"
    with pytest.raises(ConfigError, match="not what was saved"):
        Study.from_dict(values)
    with pytest.raises(ConfigError, match="not what was saved"):
        Study.from_dict({"format": values["format"], "cells": []})


def test_a_method_is_compared_with_dense_on_the_same_samples(study):
    cells = study.select(length=LENGTH, method="keep-0.5")
    found = study.against_dense(cells)
    assert (found.samples, found.lost, found.gained, found.p_value) == (140, 0, 0, 1.0)
    worse = tuple(outcome and place % 3 > 0 for place, outcome in enumerate(cells[0].right))
    changed = dataclasses.replace(study, cells=(*study.cells[:2], dataclasses.replace(cells[0], right=worse)))
    found = changed.against_dense(changed.select(length=LENGTH, method="keep-0.5"))
    assert found.lost == sum(cells[0].right) - sum(worse) > 0 and found.samples == 70
    assert dataclasses.replace(study, cells=study.cells[2:]).against_dense(cells) is None


@pytest.mark.parametrize(
    "samples, length, batch", [(1000, 4096, 32), (1000, 48_000, 2), (1000, 10**6, 1), (6, 128, 8), (1, 128, 1)]
)
def test_a_batch_is_no_larger_than_what_is_asked_for(samples, length, batch):
    plan = Plan((), (), (), (), samples, seed=0, batch_tokens=2**17)
    assert plan.batch(length) == batch
