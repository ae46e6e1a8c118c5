"""benchmarks/accuracy/dropped.py: what is hidden, what is zero, and that without either it is the model's own attention."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tsa_compile.evaluation.tasks import IGNORED, SET, generate

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"
LENGTH = 12


@pytest.fixture(scope="module")
def dropped():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("dropped")
    sys.path.remove(str(FOLDER))
    for name in ("dropped", "checkpoint", "modeling_recall", "starts"):
        sys.modules.pop(name, None)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 4, LENGTH, 8), torch.randn(2, 2, LENGTH, 8), torch.randn(2, 2, LENGTH, 8)


@pytest.mark.parametrize("effect", ["dense", "keys", "rows", "both"])
@pytest.mark.parametrize("layer", [0, 1])
def test_effects(dropped, inputs, effect, layer):
    attention = dropped.Dropping([0])
    attention.effect, attention.kept = effect, torch.rand(2, LENGTH) < 0.5
    found, _ = attention(SimpleNamespace(layer_idx=layer), *inputs, None, scaling=0.3)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    if layer == 0 and effect in ("keys", "both"):
        mask = mask & (attention.kept[:, None, None] | torch.eye(LENGTH, dtype=torch.bool))
    wanted = scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.3, enable_gqa=True)
    if layer == 0 and effect in ("rows", "both"):
        wanted = wanted.masked_fill(~attention.kept[:, None, :, None], 0)
    torch.testing.assert_close(found, wanted.transpose(1, 2))


def test_needles_questions_and_the_window_are_kept(dropped):
    samples = generate("mqar", batch=4, length=600, seed=0)
    kept = dropped.keep(samples, 0)
    needles = samples.tokens[:, :-2] == SET
    assert needles.any() and kept[:, :-2][needles].all() and kept[:, 1:-1][needles].all() and kept[:, 2:][needles].all()
    assert kept[samples.evidence].all() and kept[samples.labels != IGNORED].all() and kept[:, -128:].all()
    assert 0.4 < kept[:, :-128].float().mean() < 0.9


def test_the_command(dropped, tmp_path, capsys):
    checkpoint = importlib.import_module("checkpoint")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    folder = checkpoint.save_checkpoint(checkpoint.build_model(**sizes), tmp_path / "model")
    found = dropped.main(["--model", str(folder), "--length", "160", "--samples", "8", "--device", "cpu"])
    assert list(found) == ["dense", "keys", "rows", "both"] and found["dense"] < 0.5  # random weights
    assert "niah_multivalue, 160 tokens, layers [0], % of 8 samples right: dense" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .*config\.json"):
        dropped.main(["--model", str(tmp_path), "--device", "cpu"])
