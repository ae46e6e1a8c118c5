"""What the benchmarks of a model's prefill do on any device. Times are measured on GPUs only."""

import functools
import json
import time

import pytest
import torch

from tsa_compile import KeepRatio, TSAConfig, reports

from .support import exhaustive_but, tiny


def test_modes_of_the_prefill_benchmark(load):
    prefill, report = load("prefill"), load("prefill_report")
    arguments = prefill.parse(["--modes", "eager", "sparse", "wide", "kernel", "composed", "--keep", "0.3", "0.5"])
    modes = prefill.modes(arguments)
    assert modes == ["eager", "0.3", "0.5", "0.15@21", "a_shape", "a_shape+0.15@21"]
    settings = {mode: prefill.configuration(mode, 32) for mode in modes[1:]}
    assert settings["0.3"] == TSAConfig(budget=KeepRatio(0.3))
    assert settings["0.15@21"] == TSAConfig(budget=KeepRatio(0.15), layers=range(11, 32))
    assert settings["a_shape"] == TSAConfig(layers=[], dense_kernel="a_shape")
    assert settings["a_shape+0.15@21"] == settings["0.15@21"].replace(dense_kernel="a_shape")
    assert len({report.describe(mode) for mode in modes}) == len(modes)
    assert prefill.modes(prefill.parse([])) == ["eager", "compile", "exact", "0.15", "0.15@21", "a_shape+0.15@21"]
    with pytest.raises(SystemExit):
        prefill.parse(["--resume"])


def test_a_prefill_run_goes_on_where_it_stopped(load, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("agg")
    prefill, asked, made = load("prefill"), [], []

    def measured(model, names, masked, lengths, repeats):
        asked.append((names, masked, lengths))
        times = {"ms": 2.0, "range_ms": [1.9, 2.1], "peak_gib": 1.0}
        rows = [{"mode": name, "mask": masked, "length": length, **times} for length in lengths for name in names]
        return rows, {name: 0.01 for name in names if name == "exact"}

    monkeypatch.setattr(prefill, "measure_modes", measured)

    def run(*options, conditions=None):
        asked.clear()
        options = (*options, "--lengths", "1024", "2048", "--out", str(tmp_path), "--resume")
        return prefill.run(prefill.parse(options), conditions or {"device": "none"}, made.append)

    rows, complete = run("--modes", "sparse", "--masks", "ones")
    assert complete and len(rows) == 2 and made == [32]
    assert run("--modes", "sparse", "eager", "--stop-after", "-1") == (rows, False) and asked == []
    rows, complete = run("--modes", "sparse", "eager", "exact")
    both = [([mode], masked, [1024, 2048]) for mode in ("eager", "exact") for masked in (True, False)]
    assert complete and asked == [(["0.15"], False, [1024, 2048]), *both]
    assert [row["mode"] for row in rows] == ["eager"] * 4 + ["exact"] * 4 + ["0.15"] * 4
    assert run("--modes", "eager", "exact") == (rows, True) and asked == []
    found = json.loads((tmp_path / "prefill.json").read_text())
    assert found["rows"] == rows and found["conditions"]["relative_error_against_eager"] == {"exact": 0.01}
    with pytest.raises(SystemExit, match="other conditions"):
        run("--modes", "eager", conditions={"device": "another"})
    text = (tmp_path / "prefill.md").read_text()
    assert text.count("| eager | 2.0 ms (1.00x), 1.0 GiB | 2.0 ms (1.00x), 1.0 GiB |") == 2
    assert "| mask of ones | 1K | 2K |" in text and "| no mask | 1K | 2K |" in text
    assert (tmp_path / "prefill.png").stat().st_size > 1000


def test_modes_take_turns_and_running_out_of_memory_is_a_result(load, monkeypatch):
    prefill, order = load("prefill"), []
    for name, value in dict(synchronize=None, reset_peak_memory_stats=None, empty_cache=None).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(prefill, "inputs", lambda length, masked: {"length": length})

    def full(length):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate all of it.")

    def called(mode, length):
        order.append(mode)
        time.sleep(1e-3)

    calls = {"exact": functools.partial(called, "exact"), "0.5": functools.partial(called, "0.5"), "compile": full}
    rows = prefill.measure(calls, 4096, 2, True, {"exact": "2 dense", "0.5": "1 sparse"})
    assert order[:6] == ["exact", "0.5"] * 3
    assert (rows["exact"]["report"], rows["exact"]["peak_gib"]) == ("2 dense", 2.0)
    assert rows["compile"]["error"] == "out of memory: CUDA out of memory" and "report" not in rows["compile"]
    text = prefill.table(list(rows.values()))
    assert "| torch.compile | out of memory |" in text and text.count("2.0 GiB") == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_prompt_in_chunks_is_measured_beside_the_whole_prompt(load, tmp_path, monkeypatch, dynamic):
    chunks, prefill, model = load("prefill_chunks"), load("prefill"), tiny("llama", num_hidden_layers=1)
    monkeypatch.setattr(prefill, "configuration", lambda mode, layers: TSAConfig(layers=[], compiler="eager"))

    def compiled(model, mode, chunked):
        return prefill.compiled(model, mode, dynamic and chunked)

    (rows,) = chunks.run(model, compiled, ["exact"], (True,), [200], 40, 1, [])
    (row,) = rows
    assert (row["whole_graphs"], row["chunked_graphs"], row["chunked_graphs_later"]) == (1, 1 if dynamic else 3, 0)
    assert row["relative_difference"] < 1e-4 and row["ratio"] > 0
    chunks.write([*rows, {**row, "error": "out of memory"}], {"device": "none"}, tmp_path / "chunks")
    assert json.loads((tmp_path / "chunks.json").read_text())["rows"][0] == row
    assert "| out of memory |" in (tmp_path / "chunks.md").read_text()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("form", exhaustive_but(["whole", "regional", "chunks", "chunks-apart"], "regional"))
def test_a_first_prompt_compiles_and_a_later_one_does_not(load, form):
    load("prefill_chunks")
    first_call, model = load("first_call"), tiny("llama", num_hidden_layers=3)
    prompt = first_call.prompt_of(model, form, TSAConfig(layers=[], compiler="eager"), 200, 40)
    with torch.no_grad():
        assert first_call.seconds(prompt) > first_call.seconds(prompt)
    (report,) = reports()
    assert any("parts of the graph" in note for note in report.notes) == (form in ("regional", "chunks"))


def test_first_calls_are_told_by_their_mean_and_their_range(load):
    first_call = load("first_call")
    run = dict(form="chunks", mode="exact", layers=8, length=64, chunk=8, later_ms=10, graphs=1, device="none", torch="2")
    rows = [{**run, "first_s": first} for first in (20.0, 23.0)]
    rows += [{**run, "form": "whole", "first_s": 30.0}, {**run, "mode": "0.15", "first_s": 40.0}]
    assert first_call.text(rows).splitlines()[-3:] == [
        "| 8 | exact | the whole prompt, regional=False | 30.0 | 1 run | 10 | 1 |",
        "| 8 | exact | in chunks, prefill(dynamic=True) | 21.5 | 20.0 to 23.0 | 10 | 1 |",
        "| 8 | keep 0.15 in the upper half | in chunks, prefill(dynamic=True) | 40.0 | 1 run | 10 | 1 |",
    ]


@pytest.mark.parametrize("length, rounds", [(32768, 5), (131072, 2)])
def test_long_prefills_are_repeated_less_often(load, monkeypatch, length, rounds):
    prefill, times = load("prefill"), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(prefill, "timed", lambda *given: (times.append(given), (5000.0, 2**30))[1])
    (row,) = prefill.measure({"exact": None}, length, 5, False, {}).values()
    assert len(times) == 1 + rounds
    assert (row["ms"], row["mask"], row["length"]) == (5000.0, False, length)
