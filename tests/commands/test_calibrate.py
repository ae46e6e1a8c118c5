"""`tsa-compile calibrate`: on prompts of token ids and of text, on tasks, by drift and by loss."""

import json
import shutil
import string
from types import SimpleNamespace

import pytest
import tokenizers
import transformers

from tsa_compile import TSAConfig, shapes
from tsa_compile.calibration.calibrate import Calibration
from tsa_compile.calibration.loss import _batches
from tsa_compile.calibration.loss_search import LossCalibration
from tsa_compile.commands import texts
from tsa_compile.commands.calibrate import _samples
from tsa_compile.commands.evaluate import _tokenizer
from tsa_compile.config import KeepRatio
from tsa_compile.errors import ConfigError

from .support import QUICK, TINY, fails, run

pytestmark = pytest.mark.usefixtures("fresh")


def test_calibrate_writes_what_explain_reads(calibration, traced):
    run("explain", *TINY, *QUICK, "--sparse-layers", str(calibration))
    chosen = Calibration.load(calibration).sparse_layers
    assert len(chosen) == 1 and traced[0].layers == chosen


def test_calibrate_by_loss_writes_a_ratio_for_each_layer(traced, tmp_path):
    path, config = tmp_path / "layers.json", tmp_path / "config.json"
    config.write_text(TSAConfig(window=4, min_tokens=0).to_json())
    search = ["--objective", "loss", "--max-kl", "100", "--ratios", "0.5,0.25", "--answer", "8", "--config", str(config)]
    done = run("calibrate", *TINY, "--random", "2", "--length", "40", *search, "--out", str(path))
    assert done.exit_code == 0 and "2 of 2 layers sparse" in done.stdout and f"--sparse-layers {path}" in done.stdout
    found = LossCalibration.load(path)
    assert (found.prompts, found.tokens, found.length, found.ratios) == (2, 16, 32, (0.25, 0.25))
    short = ["explain", *TINY, "--length", "40", "--no-predict", "--sparse-layers", str(path)]
    run(*short)
    assert traced[0] == found.config(), "with what was measured"
    assert traced[0].layers == {0: KeepRatio(0.25), 1: KeepRatio(0.25)} and traced[0].window == 4
    run(*short, "--window", "6", "--floor", "none")
    assert traced[1] == found.config(window=6, floor=None)
    (tmp_path / "other.json").write_text("{}")
    run(*short, "--config", str(tmp_path / "other.json"))
    assert traced[2] == TSAConfig(layers=found.sparse_layers)
    changes, random = texts.setting(f"layers={path},window=8")
    assert TSAConfig(**changes) == found.config(window=8) and not random
    said = fails(2, "explain", *TINY, *QUICK, "--sparse-layers", str(path), "--budget", "keep:0.5")
    assert "the budget keep:0.5, and layers with a budget each: leave one of them out" in said
    with pytest.raises(ConfigError, match="leave one of them out"):
        texts.setting(f"keep:0.5,layers={path}")


def test_calibrate_by_loss_on_tasks(folder, tmp_path):
    """Behind prompts of the asked length, in the text that was given."""
    shutil.copytree(folder, tmp_path / "model")
    letters = tokenizers.models.BPE({letter: place for place, letter in enumerate(sorted(set(string.printable)))}, [])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(letters)).save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_text("A morning in May. " * 40)
    (tmp_path / "config.json").write_text(TSAConfig(window=4, min_tokens=0).to_json())
    search = ["--objective", "loss", "--max-kl", "100", "--ratios", "0.5", "--config", str(tmp_path / "config.json")]
    asked = ["--tasks", "needle,copy", "--count", "1", "--length", "1200", "--prompts", str(tmp_path / "book.txt")]
    done = run("calibrate", str(tmp_path / "model"), *search, *asked, "--json")
    assert done.exit_code == 0, done.output
    found = LossCalibration.from_dict(json.loads(done.stdout))
    assert (found.prompts, found.length, found.ratios) == (2, 1200, (0.5, 0.5)) and found.tokens > 100


def test_samples_with_answers_of_one_length_run_at_once():
    source = SimpleNamespace(tokenizer=lambda advice: _tokenizer(SimpleNamespace(folder=None)))
    samples = _samples(source, "needle,copy", None, 1200, 3)
    assert max(len(batch) for _, batch in _batches(samples, 3)) == 3


def test_calibrate_reads_token_ids_from_a_file(tmp_path):
    ids = shapes.prompts(shapes.model_config("tiny"), 3, 20).tolist()
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in ids))
    done = run("calibrate", *TINY, "--prompts", str(path), "--count", "2", "--length", "18", "--json")
    found = Calibration.from_dict(json.loads(done.stdout))
    assert (found.prompts, found.tokens) == (2, 36) and "no prompt has more" not in done.stderr
    done = run("calibrate", *TINY, "--prompts", str(path), "--length", "1K")
    assert "no prompt has more than 20 tokens, of the 1,024 asked for by --length" in done.stderr


def test_calibrate_reads_text_with_the_folders_tokenizer(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    words = tokenizers.models.WordLevel({"[UNK]": 0, "one": 5, "two": 6, "three": 7}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_text("one two three two one three two " * 6)
    arguments = ["--prompts", str(tmp_path / "book.txt"), "--length", "20", "--json"]
    found = Calibration.from_dict(json.loads(run("calibrate", str(tmp_path / "model"), *arguments).stdout))
    assert (found.prompts, found.tokens) == (2, 40)
    assert "holds no tokenizer (tokenizer.json, tokenizer.model" in fails(2, "calibrate", str(folder), *arguments)
