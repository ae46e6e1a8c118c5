"""What a study says of its outcomes: tables, figure, times; and the script that runs the whole."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from tsa_compile.costs.calls import CallShape
from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.outcomes import Cell, LayerRow, Timing
from tsa_compile.evaluation.results import Study
from tsa_compile.evaluation.statistics import mcnemar
from tsa_compile.evaluation.study import evaluate
from tsa_compile.evaluation.tables import goal_table, keep_table, survival_table, time_table
from tsa_compile.evaluation.timing import AttentionTimer, add_times

from .toys import Toy


def cell(task, method, right, *, length=4096, question="last", keep=0.5, wrong=0.25):
    rows = (
        ()
        if method == "dense"
        else (LayerRow(2, keep, keep - 0.1, keep + 0.1, 0.75, wrong), LayerRow(3, 0.3, 0.3, 0.3, 1.0, None))
    )
    return Cell(task, length, method, question, tuple(right), 1.0, rows, 1.0)


@pytest.fixture
def study():
    """40 samples a cell: dense has all but 4 right, the method 20 fewer in one task and one more in the other."""
    dense, worse, better = [True] * 36 + [False] * 4, [True] * 16 + [False] * 24, [True] * 37 + [False] * 3
    cells = (
        cell("mqar", "dense", dense), cell("niah_single", "dense", dense),
        cell("mqar", "keep-0.5", worse), cell("niah_single", "keep-0.5", better, keep=0.7),
        cell("mqar", "random-keep-0.5", dense, length=8192, question="early"),
    )  # fmt: skip
    times = (
        Timing("dense", 4096, 1, 2.0, 8.0, 1.0, 1.0),
        Timing("keep-0.5", 4096, 1, 0.5, None, 0.75, 0.45),
        Timing("keep-0.5", 8192, 1, 0.5, None, None, 0.45),
    )
    return Study({"samples": 40}, cells, times, {"device": "none"})


def read(text):
    """The rows of the first Markdown table in a text, by header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = ([entry.strip() for entry in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_the_table_compares_with_dense(study):
    dense, method = read(study.table().split("\n\n**8,192")[0])
    assert (dense["mqar"], dense["niah_single"], dense["all"], dense["kept"]) == ("90.0", "90.0", "90.0", "100.0%")
    assert dense["p"] == "" == dense["difference to dense [95%]"]
    # Two comparisons: 20 lost of 20 is far below .025, 1 gained of 1 is not. Kept: .4 and .5 over the two layers.
    assert (method["mqar"], method["niah_single"], method["kept"]) == ("40.0 (-50.0)*", "92.5 (+2.5)", "45.0%")
    low, high = map(float, re.fullmatch(r"-23\.75 \[(.*), (.*)\]", method["difference to dense [95%]"]).groups())
    assert -35 < low < -23.75 < high < -12
    assert method["p"] == "< .001" and mcnemar(20, 1) < 0.001
    (early,) = read(study.table().split("\n\n**8,192")[1])
    assert early["mqar"] == "90.0", "nothing to compare with"


def test_the_goal_counts_the_tasks_within_a_point(study):
    (row,) = read(goal_table(study))
    assert (row["length"], row["method"], row["kept"]) == ("4,096", "keep-0.5", "45.0%")
    assert row["tasks within 1 point"] == "1 of 2" and row["worst task"] == "mqar (-50.0)"
    assert row["interval within"] == "no" and row["all [95%]"].startswith("-23.75 [")
    assert read(goal_table(study, points=60.0))[0]["interval within"] == "yes"
    assert goal_table(study, keep=0.44) == ""
    control = [dataclasses.replace(found, method="random-keep-0.5") for found in study.cells[2:4]]
    assert goal_table(dataclasses.replace(study, cells=(*study.cells[:2], *control))) == ""


def test_layers_are_columns(study):
    rows = read(keep_table(study))
    assert [(row["question"], row["length"], row["method"]) for row in rows] == [
        ("last", "4,096", "keep-0.5"),
        ("early", "8,192", "random-keep-0.5"),
    ]
    assert rows[0]["layer 2"] == "60.0% (40.0% to 80.0%)" and rows[0]["layer 3"] == "30.0%"
    survival = read(survival_table(study))
    assert survival[0]["layer 2"] == "75.0% (25.0%)" and survival[0]["layer 3"] == "100.0%"


def test_times_are_relative_to_dense_at_the_same_length(study):
    dense, method, alone = read(time_table(study))
    assert (dense["attention ms"], dense["prefill ms"]) == ("2.00 (1.00x)", "8.00 (1.00x)")
    assert (method["attention ms"], method["predicted ms"], method["prefill ms"]) == ("0.50 (0.25x)", "0.75 (0.75x)", "")
    assert alone["attention ms"] == "0.50"


def test_a_time_replaces_an_earlier_one(study):
    timing = dataclasses.replace(study.times[0], attention_ms=3.0)
    assert [time.attention_ms for time in study.with_time(timing).times] == [0.5, 0.5, 3.0]


def test_parts_of_a_study_are_joined(study):
    def part(cells, times):
        return dataclasses.replace(study, cells=cells, times=times)

    first, second = part(study.cells[:2], study.times[1:]), part(study.cells[1:], study.times[:2])
    whole = first.joined(second)
    assert sorted(whole.cells, key=repr) == sorted(study.cells, key=repr)
    assert sorted(whole.times, key=repr) == sorted(study.times, key=repr)
    other = dataclasses.replace(study, conditions={"samples": 40, "seed": 1})
    with pytest.raises(ConfigError, match="differ in seed"):
        study.joined(other)


def test_the_report_has_every_part(study):
    text = study.markdown()
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "### Accuracy",
        "### Within a point of dense",
        "### Tokens kept",
        "### Needle survival",
        "### Time",
    ]
    assert "###" not in dataclasses.replace(study, cells=study.cells[:2], times=()).markdown().split("### Accuracy")[1]


def test_the_figure_shows_accuracy_over_what_is_kept_and_over_speed(study, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    original = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), original(self, *args, **kwargs))
    )
    study.figure(tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    kept, speed = drawn[0].axes
    assert kept.get_title() == "4K tokens"
    accuracy = 100 * (16 + 37) / 80
    for axes, x in ((kept, 45.0), (speed, 4.0)):
        points = [tuple(map(float, point)) for line in axes.get_lines() for point in line.get_xydata()]
        assert (pytest.approx(x), pytest.approx(accuracy)) in points
        assert any(y == pytest.approx(90.0) for _, y in points), "dense"
    with pytest.raises(ConfigError, match="cannot be written"):
        study.figure(tmp_path / "no folder" / "study.png")
    with pytest.raises(ConfigError, match="nothing to draw"):
        Study({}).figure(tmp_path / "study.png")


def test_attention_is_timed_in_the_models_own_graph(monkeypatch):
    torch.manual_seed(0)
    model, timers = Toy().eval(), []
    original = AttentionTimer.__call__
    monkeypatch.setattr(AttentionTimer, "__call__", lambda self, *args: (timers.append(self), original(self, *args))[1])
    cells = tuple(cell("mqar", name, [True], length=256) for name in ("dense", "keep-0.5", "random-keep-0.5"))
    seen = []
    study = add_times(
        model, Study({"layers": [1]}, cells), repeats=2, prefills=["dense"], compiler="eager",
        done=lambda study: seen.append(len(study.times)),
    )  # fmt: skip
    assert [(time.method, time.length) for time in study.times] == [("dense", 256), ("keep-0.5", 256)] and seen == [1, 2]
    assert [[sparse for _, sparse in timer.calls] for timer in timers] == [[False, False], [False, True]]
    shape = CallShape(1, 4, 2, 8, 8, 4, 128, counted=False)
    assert timers[1].calls[1][0] == shape
    assert all(len(timer.ms) == 2 and min(timer.ms) > 0 for timer in timers)
    assert study.times[1].attention_ms == pytest.approx(sum(timers[1].ms), abs=1e-4)
    assert study.times[0].prefill_ms > 0 and study.times[1].prefill_ms is None
    assert study.times[1].predicted_ms is None, "nothing is claimed of a CPU"
    assert study.times[1].keep == pytest.approx(0.4)
    assert add_times(model, study, done=seen.append) == study and len(seen) == 2, "nothing is timed twice"


@pytest.mark.gpu
def test_a_study_runs_on_the_gpu():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **shape)).to("cuda", torch.bfloat16)
    methods = ["dense", "coverage-0.3", "keep-0.5", "random-coverage-0.3", "rescue-keep-0.5"]
    options = dict(tasks=["mqar", "niah_single"], lengths=[512], samples=20, batch_tokens=4096, progress=False)
    study = evaluate(model, methods=methods, question=["last", "early"], **options)
    assert len(study.cells) == 20
    for found in study.cells:
        assert len(found.right) == 20 and len(found.layers) == (found.method != "dense")
        assert found.method == "dense" or (128 + 32) / 512 <= found.keep < 1
        assert not found.method.startswith("rescue") or found.survival == 1.0
    again = evaluate(model, methods=["random-coverage-0.3"], **options)
    assert [row.layers for row in again.cells] == [
        study.find(row.task, 512, "random-coverage-0.3").layers for row in again.cells
    ]
    timed = add_times(model, study, repeats=2, prefills=["dense"], compiler="eager")
    assert [time.method for time in timed.times] == methods[:3]
    assert all(time.attention_ms > 0 and time.predicted_ms > 0 for time in timed.times)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "accuracy")
    before = set(sys.modules)
    yield importlib.import_module("study")
    for name in {"study", "checkpoint", "modeling_recall", "starts"} & (set(sys.modules) - before):
        del sys.modules[name]


def test_the_script_goes_on_and_writes(script, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Toy().eval()
    monkeypatch.setattr(script, "load_checkpoint", lambda folder, dtype: model)
    arguments = ["--model", "a folder", "--out", str(tmp_path / "out"), "--device", "cpu", "--dtype", "float32"]
    arguments += ["--samples", "3", "--lengths", "288", "--tasks", "niah_single", "--methods", "dense", "keep-0.5"]
    with_limit = script.main([*arguments, "--minutes", "0"])
    assert with_limit.cells == ()
    first = script.main([*arguments, "--no-stress"])
    assert [found.key[2:] for found in first.cells] == [("dense", "last"), ("keep-0.5", "last")]
    whole = script.main(arguments)
    assert whole.cells[:2] == first.cells and [found.question for found in whole.cells[2:]] == ["early", "early"]
    assert Study.load(tmp_path / "out" / "accuracy.json") == whole
    assert (tmp_path / "out" / "accuracy.md").read_text() == whole.markdown()
    assert (tmp_path / "out" / "accuracy.png").exists()
    (tmp_path / "out" / "accuracy.md").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as where it is not installed
    assert script.main(["--render", "--out", str(tmp_path / "out")]) == whole
    assert (tmp_path / "out" / "accuracy.md").read_text() == whole.markdown()
    part = str(tmp_path / "out" / "accuracy.json")
    assert script.main(["--join", part, part, "--out", str(tmp_path / "joined")]) == whole
    assert (tmp_path / "joined" / "accuracy.md").exists()
    with pytest.raises(SystemExit, match=r"error: .*holds a study with other seed"):
        script.main([*arguments, "--seed", "5"])


def test_the_script_does_the_useful_first(script):
    arguments = script.parse(["--model", "x", "--lengths", "16384", "4096"])
    order = [(stage["lengths"][0], stage["methods"][0]) for stage in script.stages(arguments)]
    assert order[:4] == [(4096, "dense"), (4096, "coverage-0.005"), (4096, "keep-0.5"), (16384, "dense")]
    assert len(order) == len(set(order)) == 2 * len(arguments.methods)
    assert all(stage["question"] == "early" for stage in script.stress(arguments))
    quick = script.parse(["--model", "x", "--quick"])
    assert quick.samples < 100 and quick.lengths == [512]


def test_a_damaged_count_does_not_fill_the_memory(study):
    values = study.to_dict()
    values["cells"][0]["right"] = "99999999999:0"
    with pytest.raises(ConfigError, match="99999999999 samples, of at most 10000000"):
        Study.from_dict(values)
