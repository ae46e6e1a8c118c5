"""The long run of random programs: a record of what was tried, with the programs that differ."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def soundness(monkeypatch):
    """The benchmark, imported from its folder as it is when it runs."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield importlib.import_module("soundness")
    for name in set(sys.modules) - before:
        if name.startswith("soundness"):
            del sys.modules[name]


@pytest.mark.parametrize("option", ["--programs", "--processes"])
def test_nothing_to_run_is_refused(soundness, option, capsys):
    with pytest.raises(SystemExit):
        soundness.main([option, "0"])
    assert "expected at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_recorded(soundness, tmp_path, capsys):
    assert soundness.main(["--programs", "6", "--processes", "1", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "soundness.json").read_text())
    conditions = record["conditions"]
    assert conditions["programs"] == 6 and conditions["differences"] == 0
    assert conditions["calls"] == sum(row["calls"] for row in record["rows"]) > 0
    text = (tmp_path / "soundness.md").read_text()
    assert "**0 differences**" in text and text in capsys.readouterr().out


@pytest.mark.slow
def test_a_wrong_rewrite_is_recorded_and_made_small(soundness, tmp_path, monkeypatch):
    programs, checking = soundness.modules()

    def wrong(graph_module, example_inputs, options):
        return lambda *inputs: tuple(out + 1 for out in graph_module.forward(*inputs))

    monkeypatch.setattr(checking, "tsa_backend", wrong)
    assert soundness.main(["--programs", "1", "--processes", "1", "--shrink", "1", "--out", str(tmp_path)]) == 1
    first, *_ = json.loads((tmp_path / "soundness.json").read_text())["differences"]
    assert first["mode"] == "exact"
    assert len(first["source"].splitlines()) <= len(programs.HEADER) + 4, "its first and last line, and two of its own"
    assert f"Seed {first['seed']}, exact: output" in (tmp_path / "soundness.md").read_text()
