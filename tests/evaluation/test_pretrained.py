"""The benchmark of a pretrained model: its settings, that it goes on, and its tables."""

import json
import sys
from pathlib import Path

import pytest

from tsa_compile.config import Floor, KeepRatio
from tsa_compile.evaluation import Study

from ..support import script

pytestmark = pytest.mark.usefixtures("fresh")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accuracy" / "pretrained.py"


@pytest.fixture(scope="module")
def pretrained():
    sys.path.insert(0, str(SCRIPT.parent))  # as where a script is run
    yield script(SCRIPT)
    sys.path.remove(str(SCRIPT.parent))


def test_settings_are_what_their_names_say(pretrained):
    found = {setting.name: setting for setting in pretrained.settings(30)}
    assert len(found) == 6 + 2 + 12 + 3 + 11
    for name, setting in found.items():
        config = setting.config
        assert (config.window, config.min_tokens, config.min_length) == (32 if "window 32" in name else 128, 0, 1)
        assert config.granularity == ("group" if "groups" in name else "head")
        assert (config.floor is None) == name.startswith("published")
        assert config.floor in (None, Floor(256, 16)) and setting.random == ("random" in name)
    assert found["floor, keep .08, all but 2"].config.layers == tuple(range(2, 30))
    assert found["floor, keep .3, upper two thirds"].config.layers == tuple(range(10, 30))
    assert found["published, keep .7"].config.layers == tuple(range(15, 30))
    assert found["floor alone, upper half"].config.budget == KeepRatio(0)


def test_it_stops_in_time_goes_on_and_makes_tables(pretrained, word_model, tmp_path, capsys):
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
    assert pretrained.main([*arguments, "--lengths", "9000"]) == 1
    assert "LlamaForCausalLM has 4,096 positions" in capsys.readouterr().err


def test_the_text_is_the_language_reference(pretrained):
    text = pretrained.handbook()
    assert len(text) > 200_000 and "Assert statements are a convenient way" in text
