"""`bench`: every mode at every length, turns, medians, and what is done where memory runs out."""

import dataclasses
import json

import pytest
import torch

from tsa_compile import ConfigError, Coverage, TSAConfig
from tsa_compile.bench import MODES, Benchmark, Measurement, bench
from tsa_compile.shapes import build, model_config

pytestmark = pytest.mark.usefixtures("fresh")

CONFIG = TSAConfig(budget=Coverage(0.2), window=4, min_tokens=4, compiler="eager")


class Counts(torch.nn.Module):
    """Stands for a model: remembers the lengths it saw, and has too little memory for more than `most` tokens."""

    def __init__(self, most=100):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = model_config("tiny", layers=1)
        self.most, self.seen = most, []

    def forward(self, input_ids, attention_mask, logits_to_keep):
        self.seen.append(input_ids.shape[1])
        if input_ids.shape[1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return self.weight


@pytest.mark.exhaustive
def test_every_mode_of_a_real_model():
    result = bench(build(model_config("tiny", layers=2)), [40], config=CONFIG, modes=("eager", "exact", "sparse"), rounds=1)
    assert [(row.mode, row.length) for row in result.rows] == [("eager", 40), ("exact", 40), ("sparse", 40)]
    assert [row.sparse_calls for row in result.rows] == [None, 0, 1]
    assert all(row.ms > 0 and row.first_call_s > 0 and not row.error for row in result.rows)
    assert result.row("eager", 40).speed == 1.0
    assert all(row.speed == pytest.approx(result.row("eager", 40).ms / row.ms, rel=1e-2) for row in result.rows)
    assert result.conditions["config"] == CONFIG.to_dict()
    assert (result.conditions["layers"], result.conditions["device"], result.conditions["dtype"]) == (2, "cpu", "float32")


def test_running_out_of_memory_is_a_result():
    model = Counts().eval()
    result = bench(model, [120, 60], modes=["eager"], rounds=3)
    assert result.row("eager", 60).ms > 0
    lost = result.row("eager", 120)
    assert (lost.ms, lost.speed, lost.error) == (None, None, "out of memory: CUDA out of memory")
    assert model.seen.count(120) == 1, "a mode that ran out of memory is not called again"
    assert "out of memory" in str(result)


def test_progress_never_goes_back_and_ends():
    seen = []
    model = Counts().eval()
    bench(model, [30, 60], modes=["eager"], rounds=2, progress=lambda text, done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (4, 4) and {total for _, total in seen} == {4}


def test_short_calls_have_more_rounds():
    model = Counts().eval()
    bench(model, [30], modes=["eager"], rounds=3)
    assert len(model.seen) == 1 + 20
    model.seen.clear()
    bench(model, [30], modes=["eager"], rounds=1)
    assert len(model.seen) == 1 + 1


@pytest.mark.parametrize(
    "changes",
    [
        *({"modes": modes} for modes in (["fast"], [], ["eager", "eager"], "eager", 5, [["eager"]])),
        *({"lengths": lengths} for lengths in ([], [0], [8.5], ["8K"], [True], 8, "8", None)),
        *({name: value} for name in ("rounds", "batch") for value in (0, 1.5, True, "2")),
        {"seed": -1},
    ],
    ids=str,
)
def test_what_is_not_allowed(changes):
    model = Counts().eval()
    (name,) = changes
    with pytest.raises(ConfigError, match=f"{name}=.* is not allowed: {name} must be"):
        bench(model, **{"lengths": [30], "modes": ["eager"], **changes})
    assert model.seen == []


def test_models_that_cannot_be_measured():
    model = Counts()
    with pytest.raises(ConfigError, match=r"in training mode: a benchmark is of inference, call model\.eval\(\) first"):
        bench(model, [30], modes=["eager"])
    with pytest.raises(ConfigError, match=r"Linear\.forward takes no logits_to_keep"):
        bench(torch.nn.Linear(2, 2).eval(), [30])
    positions = model.config.max_position_embeddings
    said = f"prompts of {positions + 1:,} tokens do not fit: Counts has {positions:,} positions, lengths up to {positions:,}"
    with pytest.raises(ConfigError, match=said):
        bench(model.eval(), [30, positions + 1], modes=["eager"])
    del model.config
    with pytest.raises(ConfigError, match="Counts has no configuration of transformers: pass a causal language model"):
        bench(model, [30], modes=["eager"])
    assert model.seen == []


@pytest.fixture
def result():
    rows = [
        Measurement("eager", 8192, 253.0, (250.0, 260.0), 1.0, 1.9, 0.5),
        Measurement("sparse", 8192, 206.0, (205.0, 207.0), 1.228, 1.9, 20.0, 16),
        Measurement("eager", 2000, 9.5, (9.0, 9.9), 1.0, 0.4, 0.5),
        Measurement("sparse", 2000, None, error="out of memory"),
    ]
    conditions = {"config": CONFIG.to_dict(), "model": "LlamaForCausalLM", "layers": 2, "device": "cpu"}
    return Benchmark(tuple(rows), conditions)


def test_the_table(result):
    *table, first_calls = str(result).splitlines()
    lines = [line.split("  ") for line in table]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells == [
        ["2000", "8K"],
        ["eager", "9.50 ms (1.00x), 0.4 GiB", "253 ms (1.00x), 1.9 GiB"],
        ['backend="tsa", coverage 0.2', "out of memory", "206 ms (1.23x), 1.9 GiB"],
    ]
    assert first_calls == 'first call, which compiles: eager 0.5 s, backend="tsa", coverage 0.2 20 s'


def test_the_table_says_where_nothing_was_sparse(result):
    """At that length, under a mode whose name says what sparse layers would keep; "exact" never has a sparse call."""
    dense = dataclasses.replace(result.row("sparse", 8192), sparse_calls=0)
    rows = (result.row("eager", 8192), dataclasses.replace(dense, mode="exact"), dense)
    found = dataclasses.replace(result, rows=rows)
    assert str(found).count("206 ms (1.23x), 1.9 GiB") == 2
    assert str(found).count("206 ms (1.23x), 1.9 GiB (no sparse call)") == str(found).count("sparse call)") == 1
    assert found.narrow(70).count("(no sparse") == 1 and "sparse call" not in str(result)


def test_json_holds_every_row(result):
    values = json.loads(result.to_json())
    assert [row["ms"] for row in values["rows"]] == [253.0, 206.0, 9.5, None]
    assert TSAConfig.from_json(values["conditions"]["config"]) == CONFIG
    with pytest.raises(KeyError):
        result.row("exact", 8192)


def test_in_a_narrow_terminal_lengths_are_rows(result):
    assert result.narrow(1000) == str(result)
    narrow = result.narrow(60)
    assert max(map(len, narrow.splitlines())) <= 60
    cells = [line.split()[0] for line in narrow.splitlines()[1:]]
    assert len(cells) >= len(result.lengths) * len(result.modes), "a row for each length and mode"


def test_the_figure(result, tmp_path, monkeypatch):
    """Lines over several lengths; of one length bars, as a line of one point is nothing to see."""
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "speed.svg")
    drawn = (tmp_path / "speed.svg").read_text()
    assert drawn.lstrip().startswith("<?xml") and len(drawn) > 5000
    figures = []
    monkeypatch.setattr("tsa_compile.bench.save_figure", lambda figure, path, **options: figures.append(figure))
    result.plot("lines.png")
    dataclasses.replace(result, rows=[row for row in result.rows if row.length == result.lengths[0]]).plot("bars.png")
    lines, bars = (figure.axes[0] for figure in figures)
    assert lines.lines and not lines.patches and bars.patches and not bars.lines
    assert all(axes.get_legend() and str(result.conditions["device"]) in axes.get_title() for axes in (lines, bars))


def test_modes_are_documented():
    import tsa_compile.bench as module

    assert all(f"    {mode} " in module.__doc__ for mode in MODES)


@pytest.mark.gpu
def test_peaks_and_gains_on_the_gpu():
    model = build(model_config("small"), "cuda", torch.bfloat16)
    result = bench(model, [2048], config=TSAConfig(min_length=1, compiler="eager"), rounds=3)
    assert all(row.peak_gib > 0 and row.ms > 0 for row in result.rows)
    assert result.row("sparse", 2048).sparse_calls == 4
