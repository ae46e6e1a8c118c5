"""What benchmarks/sparse.py computes on any device; times are measured on GPUs only."""

import argparse
import functools
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tsa_compile import Floor
from tsa_compile.kernels import registry
from tsa_compile.kernels.sparse import lists_of

FOLDER = Path(__file__).parents[3] / "benchmarks"
LENGTH = 1500


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark as its neighbours do: by name, from the folder."""
    monkeypatch.syspath_prepend(FOLDER)
    modules, kernels = set(sys.modules), set(registry.names())
    yield importlib.import_module
    for name in set(sys.modules) - modules:
        if name.startswith(("attention", "sparse")):
            del sys.modules[name]
    for name in set(registry.names()) - kernels:
        registry.unregister(name)


@pytest.fixture
def arguments(load):
    shape = load("attention_methods").Shape(heads=4, kv_heads=2, head_dim=16, dtype=torch.float32)
    return argparse.Namespace(length=LENGTH, keep=0.675, seconds=0.001, settle=0.001, device="cpu", shape=shape)


@pytest.fixture
def sparse(load, monkeypatch):
    """The benchmark with a clock that shows 1 ms, and plain SDPA for cuDNN and FlexAttention."""
    module = load("sparse")
    turns = functools.partial(load("attention_timing").take_turns, at_most=5, burst=lambda calls, first, count: 1.0)
    monkeypatch.setattr(module, "take_turns", turns)
    monkeypatch.setattr(
        module, "dense_call", lambda inputs: lambda: registry.get("sdpa").causal(*inputs.tensors, inputs.scale)
    )
    monkeypatch.setattr(load("attention_methods"), "compiled_flex", lambda: plain_flex)
    return module


def plain_flex(query, key, value, *, block_mask, scale, enable_gqa):
    """FlexAttention not compiled knows its mask_mod alone, not the lists."""
    rows = torch.arange(query.shape[2])
    mask = block_mask.to_dense().repeat_interleave(128, 2).repeat_interleave(128, 3).bool()
    mask = mask[:, :, : len(rows), : len(rows)] & block_mask.mask_mod(0, 0, rows[:, None], rows)
    return scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)


@pytest.mark.exhaustive
def test_every_part_runs_and_is_reported(sparse, load, arguments, tmp_path):
    run = load("attention").Run(0.001)
    run.parts = {name: [] for name in ("kernel", "selectors", "methods")}
    for name in ("kernel", "selectors", "methods"):
        sparse.PARTS[name](run, arguments)
    assert not run.failures and not run.wrong
    assert all(row["ms"] == row["flex_ms"] == 1.0 for row in run.parts["kernel"])
    rows = {(row["method"], row["form"]): row for row in run.parts["methods"]}
    assert rows["dense cuDNN", "all"]["speedup"] == 1.0
    for method in sparse.METHODS:
        alone, composed = rows[method, "all"], rows[method, "kept 0.675"]
        assert 0 < alone["density"] <= 1 and 0.5 < alone["mass"] <= 1 and alone["error_all"] < 0.7
        assert composed["mass"] <= alone["mass"] + 0.05 and composed["gain"] == 1.0
        assert composed["error_all"] > composed["error_kept"]
        grouped = rows[method, "kept 0.675, by groups"]
        assert grouped["gain"] == 1.0 and 0.3 < grouped["mass"] <= 1 and grouped["error_all"] > grouped["error_kept"]
    text = sparse.report({"device": "none"}, run.parts, [])
    assert text.count("| XAttention, stride 16") == 5 and "failed" not in text
    pytest.importorskip("matplotlib")
    sparse.write(tmp_path, run, {"device": "none"}, text)
    assert json.loads((tmp_path / "sparse.json").read_text())["kernel"][0]["goal_ms"] > 0
    assert (tmp_path / "sparse.png").stat().st_size > 0


@pytest.mark.parametrize("seed", range(4))
def test_structure_attracts_attention(load, seed):
    """On average over many heads: what one of them pays to the sinks is anything from a fiftieth to nearly all."""
    inputs_of = load("sparse_inputs").planted_inputs
    shape = load("attention_methods").Shape(heads=16, kv_heads=8, head_dim=64, dtype=torch.float32)
    inputs = inputs_of(shape, LENGTH, "cpu", seed=seed)
    assert torch.equal(inputs.key, inputs_of(shape, LENGTH, "cpu", seed=seed).key)
    logits = inputs.scale * inputs.query[0] @ inputs.key[0].repeat_interleave(2, 0).transpose(1, 2)
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)[:, 1000:]
    assert 0.1 < weights[:, :, :4].sum(-1).mean() < 0.8
    distance = torch.arange(1000, LENGTH)[:, None] - torch.arange(LENGTH)
    near, far = (logits[:, 1000:][:, (distance >= a) & (distance < b)].mean() for a, b in ((0, 32), (700, 900)))
    assert near > far + 3


def test_shares_and_errors(load, arguments):
    tools = load("sparse_inputs")
    inputs = tools.planted_inputs(arguments.shape, 500, "cpu")
    everything = lists_of(torch.ones(1, 4, 4, 4, dtype=torch.bool).tril())
    assert tools.mass_kept(inputs, None, None) == pytest.approx(1.0)
    assert tools.mass_kept(inputs, everything, None) == pytest.approx(1.0)
    half = torch.arange(0, 500, 2, dtype=torch.int32).expand(1, 4, -1)
    without = tools.mass_kept(inputs, None, half)
    assert 0.1 < without < tools.mass_kept(inputs, None, half, Floor(50, 4)) < 1
    assert tools.mass_kept(inputs, None, half, Floor(1, 0)) == pytest.approx(without)  # a kept row sees itself
    assert tools.mass_kept(inputs, None, half, Floor(500, 0)) == pytest.approx(1.0)
    out = torch.randn(1, 4, 500, 16)
    wrong = out.clone()
    wrong[:, :, 1::2] = 0
    assert tools.relative_error(out, out) == 0 and tools.relative_error(wrong, out, half) == 0
    assert tools.relative_error(wrong, out) == pytest.approx(0.5**0.5, rel=0.05)
    lists = tools.random_lists(4, 20, 0.3, "cpu")
    assert 0.3 < float(load("sparse").density(lists)) < 0.45


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
def test_candidates_of_the_tuning_script_run(load, arguments):
    pytest.importorskip("triton")
    tune = load("sparse_tune")
    inputs = load("sparse_inputs").planted_inputs(arguments.shape, 200, "cpu")
    for kind, candidates in tune.KINDS.items():
        calls = dict(candidates(inputs))
        assert len(calls) > 10, kind
        if not torch.cuda.is_available():
            next(iter(calls.values()))()
