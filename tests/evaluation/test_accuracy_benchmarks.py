"""The benchmarks of scores and of calibrations: what they compute, that they go on, and their tables."""

import json
from pathlib import Path

import pytest
import torch

from tsa_compile.backend import tsa_backend
from tsa_compile.config import KeepRatio, TSAConfig
from tsa_compile.kernels import reference

from ..support import script
from .small import TEXT, llama, save

pytestmark = pytest.mark.usefixtures("fresh")
FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"


@pytest.fixture(scope="module", autouse=True)
def beside():
    """The scripts import what lies beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield


@pytest.fixture(scope="module")
def scores():
    return script(FOLDER / "scores.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "tiny", layers=2)


def drawn(length, heads=4, groups=2):
    torch.manual_seed(0)
    return [torch.randn(1, count, length, 8) for count in (heads, groups, groups)]


def test_scores_are_the_references(scores):
    query, key, value = drawn(200)
    for name, combine in scores.SCORES.items():
        if name == "random":
            continue
        wanted = reference.score(
            query.double(), key.double(), None, 0.3, scores.WINDOW, scores.POOL, combine,
            value.double() if name.endswith("_values") else None,
        )  # fmt: skip
        found = scores.score(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), 0.3, name)
        torch.testing.assert_close(found.double(), wanted[..., : 200 - scores.WINDOW], rtol=1e-4, atol=1e-7)


def test_ways_to_combine_rows(scores):
    weights = torch.tensor([[0.9, 0.0], [0.1, 0.2], [0.2, 0.4]])
    found = {name: combine(weights).tolist() for name, combine in scores.SCORES.items()}
    assert found["mean"] == pytest.approx([0.4, 0.2]) and found["max"] == pytest.approx([0.9, 0.4])
    assert scores.highest(2)(weights).tolist() == pytest.approx([0.55, 0.3])
    assert scores.last(2)(weights).tolist() == pytest.approx([0.15, 0.3])
    assert scores.recent(1)(weights).tolist() == pytest.approx([(0.9 + 0.2 + 0.8) / 7, (0.4 + 1.6) / 7])
    assert found["renormalised"] == pytest.approx([(1 + 1 / 3 + 1 / 3) / 3, (2 / 3 + 2 / 3) / 3])
    assert scores.larger(scores.mean, scores.last(1))(weights).tolist() == pytest.approx([2 / 3, 2 / 3])


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_sparse_layers_are_those_of_the_backend(scores, reduce):
    """Logits behind the study's own attention, which is SDPA under a mask, equal the compiled model's."""
    from transformers import AttentionInterface, AttentionMaskInterface

    plain, model, ids = llama(2), llama(2), torch.randint(400, (1, 500))
    config = TSAConfig(KeepRatio(0.1), 128, scores.FLOOR, min_tokens=0, min_length=1, layers=[1], compiler="eager")
    config = config.replace(score=reduce)
    attention = scores.Attention(2)
    AttentionInterface.register("scores-test", attention)
    AttentionMaskInterface.register("scores-test", lambda *_, **__: None)
    model.set_attn_implementation("scores-test")
    with torch.no_grad():
        wanted = torch.compile(plain, backend=tsa_backend, options={"config": config})(ids, use_cache=False).logits
        dense = model(ids, use_cache=False).logits
        torch.testing.assert_close(dense, plain(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
        attention.name, attention.ratio = reduce, 0.1
        found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, dense, atol=1e-2)


@pytest.mark.parametrize("task", ["keys", "values"])
def test_samples_have_their_length_and_their_answers(scores, words, task):
    text = words(TEXT * 2)["input_ids"]
    for question in scores.QUESTIONS:
        made = scores.sample(words, text, task, question, 1200, 3)
        assert len(made.prompt) == 1200 and made == scores.sample(words, text, task, question, 1200, 3)
        written, answer = words.decode(made.prompt), words.decode(made.answer)
        numbers = answer.replace(" and", ",").strip().split(", ")
        assert len(numbers) == (1 if task == "keys" else 4) and all(f" {number}." in written for number in numbers)
        assert (numbers[0] in written[: written.index(scores._TOLD[:20])]) if question == "told" else True
    assert made != scores.sample(words, text, task, "code", 1200, 3)


def test_scores_go_on_and_are_rendered(scores, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "topics", {"book": TEXT * 3})
    out = tmp_path / "scores.json"
    given = ["--model", str(folder), "--out", str(out), "--lengths", "600", "--questions", "short", "--ratios", "0.1"]
    assert scores.main([*given, "--samples", "1", "--scores", "mean", "--minutes", "0"]) == 3
    assert scores.main([*given, "--samples", "2", "--scores", "mean", "random"]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert {name: len(rows) for name, rows in cells["600/keys/short"].items()} == {
        "dense": 2, "mean, keep 0.1": 2, "random, keep 0.1": 2,
    }  # fmt: skip
    assert [row[2] for row in cells["600/values/short"]["dense"]] == [0, 0]
    assert scores.main(["--render", str(tmp_path / "scores.md"), "--out", str(out)]) == 0
    lines = (tmp_path / "scores.md").read_text().splitlines()
    assert "**600 tokens, 2 samples**" in lines and sum(line.startswith("| random, keep 0.1 |") for line in lines) == 1


def test_calibrations_go_on_and_are_rendered(folder, tmp_path, monkeypatch):
    module = script(FOLDER / "calibrate.py")
    monkeypatch.setattr(module, "topics", {"book": TEXT * 3})
    out = tmp_path / "calibrate.json"
    given = ["--model", str(folder), "--out", str(out), "--length", "600", "--tasks", "needle", "--ratios", "0.3", "0.1"]
    given += ["--samples", "1", "--unseen", "1"]
    assert module.main([*given, "--minutes", "0"]) == 3
    first = json.loads(out.read_text())["costs"]["1/needle/0"]
    assert first and module.main(given) == 0
    data = json.loads(out.read_text())
    assert data["costs"]["1/needle/0"].items() >= first.items()
    rows = {row["name"]: row for row in data["rows"]}
    assert (
        rows["upper half, keep 0.1"]["choice"] == "1:0.1" and rows["upper two thirds, keep 0.3"]["choice"] == "0:0.3,1:0.3"
    )
    for name, row in rows.items():
        assert row["kl"] == row["tasks"]["needle"] == data["costs"]["2/needle/0"][row["choice"]]
        assert "max_kl" not in name or row["seen"] <= float(name.split()[-1])
    assert module.main(["--render", str(tmp_path / "c.md"), "--out", str(out)]) == 0
    assert "| **by loss" in (tmp_path / "c.md").read_text()
    with pytest.raises(SystemExit, match="other conditions"):
        module.main([*given, "--length", "500"])


def test_parts_run_as_processes_of_their_own_and_the_worst_exit_code_counts(tmp_path, capfd):
    jobs = script(FOLDER / "jobs.py")
    child = tmp_path / "child.py"
    child.write_text("import sys, pathlib; out = sys.argv[sys.argv.index('--out') + 1]; print('why', file=sys.stderr)\n"
                     "pathlib.Path(out).write_text(' '.join(sys.argv[1:3])); sys.exit(int(sys.argv[2]))\n")  # fmt: skip
    out = tmp_path / "found.json"
    for codes, worst in (((0, 0), 0), ((0, 3), 3), ((3, 5), 1)):
        parts = {f"part-{code}": [str(code)] for code in codes}
        assert jobs.run_parts(str(child), ["given"], parts, out, 2, 1.0) == worst
    assert (jobs.folder_of(out) / "part-5.json").read_text() == "given 5"
    assert "why" in (jobs.folder_of(out) / "part-5.log").read_text() and "part-5: exit code 5" in capfd.readouterr().err


def test_the_parts_of_scores_are_put_together(scores, tmp_path, monkeypatch):
    out, asked = tmp_path / "scores.json", {}

    def run_parts(script, arguments, parts, out, jobs, minutes):
        asked.update(parts)
        scores.folder_of(out).mkdir()
        for name in parts:
            part = {"model": "m", "cells": {name: {"dense": [[1, 0.5, 0.0]]}}, "question_tokens": {f"keys/{name}": 4}}
            (scores.folder_of(out) / f"{name}.json").write_text(json.dumps(part))
        return scores.STOPPED

    monkeypatch.setattr(scores, "run_parts", run_parts)
    given = ["--model", "m", "--out", str(out), "--lengths", "64", "128", "--questions", "code", "told", "--jobs", "4"]
    assert scores.main(given) == scores.STOPPED
    assert list(asked) == ["code-128", "told-128", "code-64", "told-64"]
    assert asked["told-64"] == ["--lengths", "64", "--questions", "told"]
    found = json.loads(out.read_text())
    assert set(found["cells"]) == set(asked) and len(found["question_tokens"]) == 4 and found["model"] == "m"


class TestPrefixes:
    """A context's cache that another question left."""

    @pytest.fixture
    def prefix(self):
        return script(FOLDER / "prefix.py")

    @pytest.mark.parametrize("keeps_all", [True, False])
    def test_handing_on_costs_what_the_selection_does(self, prefix, keeps_all):
        """Where all is kept, a context is what it is whatever ended it; else what follows depends on that."""
        from tsa_compile import attention

        budget = KeepRatio(1.0) if keeps_all else KeepRatio(0.1)
        config = TSAConfig(budget=budget, layers=(0,), floor=None, window=20, min_tokens=0, min_length=1)
        form, prefills = attention.register(config, name="prefixtest"), prefix.Prefills(llama())
        context, other, question, answer = (
            torch.randint(0, 40, (1, length), generator=torch.Generator().manual_seed(length)) for length in (60, 20, 24, 3)
        )
        with torch.no_grad():
            dense = prefills.score(*prefills.whole("sdpa", context, question), answer)["nll"]
            own = prefills.score(*prefills.whole(form, context, question), answer)["nll"]
            handed_on = prefills.score(*prefills.handed_on(form, context, other, question), answer)["nll"]
        if keeps_all:
            assert own == pytest.approx(dense, abs=1e-5) and handed_on == pytest.approx(dense, abs=1e-5)
        else:
            assert len({round(nll, 6) for nll in (dense, own, handed_on)}) == 3

    def test_the_table(self, prefix):
        rows = [{"dense": {"nll": 0.5, "exact": True}, "a": {"nll": 0.5 + more, "exact": more < 0.2}} for more in (0.1, 0.3)]
        *_, dense, other = prefix.table({"length": 64, "rows": rows}).splitlines()
        assert dense == "| dense | 100% | 0.500 | +0.000 (0.000) |"
        assert other == "| a | 50% | 0.700 | +0.200 (0.100) |"
