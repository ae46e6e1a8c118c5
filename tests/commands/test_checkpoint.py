"""Model folders whose weights are not those of their configuration, or whose files are damaged."""

import json
import shutil

import pytest
import tokenizers
import torch
import transformers

from tsa_compile import shapes
from tsa_compile.commands.checkpoint import check_weights
from tsa_compile.errors import ConfigError, TSAWarning

from ..evaluation.small import tokenizer
from .support import fails, run

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def copy(folder, tmp_path):
    """A model folder to be spoilt."""
    return shutil.copytree(folder, tmp_path / "model")


def calibrate(path, *more):
    return fails(2, "calibrate", str(path), "--random", "1", "--length", "16", *more)


def change(path, **fields):
    """The folder with another configuration."""
    file = path / "config.json"
    values = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


OTHERS = {
    "a layer too many": ({"num_hidden_layers": 3}, ["9 missing (model.layers.2.input_layernorm.weight"]),
    "a layer too few": ({"num_hidden_layers": 1}, ["without a place in the model's layers (model.layers.1.input_layernorm"]),
    "other sizes": ({"intermediate_size": 64}, ["6 of another shape (model.layers.0.mlp.down_proj.weight"]),
    "norms that are not there": ({"model_type": "qwen3", "architectures": None}, ["self_attn.k_norm.weight", "missing"]),
    "another architecture": ({"model_type": "bert", "architectures": None}, ["missing (bert.embeddings.LayerNorm.bias"]),
}


@pytest.mark.parametrize("what", OTHERS)
def test_weights_of_another_model(what, copy):
    """transformers would fill them up at random and drop the others, and what is measured would be no model's."""
    fields, said = OTHERS[what]
    change(copy, **fields)
    found = calibrate(copy)
    assert f"the weights in {str(copy)!r} are not those of its config.json" in found
    assert all(part in found for part in said) and found.endswith("take config.json and the weights from one model")


@pytest.mark.parametrize("command", ["bench", "export", "eval", "explain"])
def test_every_command_that_loads_weights_asks(command, copy, tmp_path):
    change(copy, num_hidden_layers=3)
    tokenizer().save_pretrained(copy)
    small = {
        "bench": ["--lengths", "32"],
        "export": ["--out", str(tmp_path / "x.pt2"), "--lengths", "32", "64"],
        "eval": ["--lengths", "256", "--samples", "1"],
        "explain": ["--weights", "--length", "40"],
    }
    said = fails(2, command, str(copy), *small[command])
    assert "are not those of its config.json" in said


def test_tied_weights_are_not_missing(tmp_path):
    config = shapes.model_config("tiny", layers=2)
    config.tie_word_embeddings = True
    shapes.build(config).save_pretrained(tmp_path)
    done = run("calibrate", str(tmp_path), "--random", "1", "--length", "16", "--json")
    assert (done.exit_code, done.stderr) == (0, "")


def test_weights_beside_the_layers_are_only_said():
    """A head or a tower for which a text model has no place."""
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    model = torch.nn.Module()
    model.add_module("model", torch.nn.Module())
    model.model.add_module("layers", layers)
    model.base_model_prefix = "model"
    found = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": {"score.weight", "model.tower.0.weight"}}
    with pytest.warns(TSAWarning, match=r"has no place: model\.tower\.0\.weight, score\.weight"):
        check_weights("folder", model, found)
    for name in ("model.layers.1.weight", "layers.1.weight", "model.layers.0.norm.weight"):
        with pytest.raises(ConfigError, match=name):
            check_weights("folder", model, {**found, "unexpected_keys": {name}})


def spoil(name, content):
    """A folder in which a file holds something else."""

    def act(path):
        (path / name).write_bytes(content)

    return act


def cut(name):
    def act(path):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2])

    return act


def pickled(path):
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"junk")


DAMAGE = {
    "half a file of weights": (cut("model.safetensors"), "model.safetensors' is damaged (SafetensorError"),
    "an empty file of weights": (spoil("model.safetensors", b""), "model.safetensors' is damaged (SafetensorError"),
    "other bytes": (spoil("model.safetensors", bytes(range(256)) * 9), "model.safetensors' is damaged (SafetensorError"),
    "no pickle": (pickled, "pytorch_model.bin' is damaged"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_weights_are_named(what, copy):
    spoiled, said = DAMAGE[what]
    spoiled(copy)
    found = calibrate(copy)
    assert said in found and found.endswith("copy or download it again")


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_index_is_named(text, tmp_path):
    model = shapes.build(shapes.model_config("tiny", layers=2))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json' is damaged" in calibrate(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_named(name, text, copy, tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "one": 5}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(copy)
    (copy / name).write_text(text)
    (tmp_path / "book.txt").write_text("one one")
    if (name, text) == ("tokenizer_config.json", '{"version": "1.0"}'):
        return  # another tokenizer's, but one
    said = fails(2, "calibrate", str(copy), "--prompts", str(tmp_path / "book.txt"), "--length", "16")
    assert "has no tokenizer that can be loaded" in said and f"{name}' is damaged" in said


def test_text_that_a_tokenizer_cannot_encode(copy, tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 5}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(copy)
    (tmp_path / "book.txt").write_text("two")
    said = fails(2, "calibrate", str(copy), "--prompts", str(tmp_path / "book.txt"), "--length", "16")
    assert "the folder's tokenizer cannot encode" in said and "book.txt" in said


def test_a_package_that_is_missing_is_no_damage(copy, monkeypatch):
    def missing(*args, **options):
        raise ImportError("pip install accelerate")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", missing)
    assert "pip install accelerate" in fails(1, "calibrate", str(copy), "--random", "1", "--length", "16")
