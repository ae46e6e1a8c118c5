"""`tsa-compile`: what goes wrong is said in one line, with an exit code; texts and files of prompts."""

import shutil
from dataclasses import replace

import pytest
import torch

from tsa_compile import KernelError, shapes
from tsa_compile.commands import errors, texts
from tsa_compile.commands.loading import Source
from tsa_compile.commands.prompts import read
from tsa_compile.config import Coverage, KeepRatio
from tsa_compile.costs import memory
from tsa_compile.errors import ConfigError

from .support import QUICK, TINY, fails, run

pytestmark = pytest.mark.usefixtures("fresh")


USAGE = {
    "no model": ([], "no model given"),
    "two models": (["other", *TINY], "both a folder ('other') and --shape given"),
    "no folder": (["nowhere"], "there is no folder 'nowhere'"),
    "a folder misspelt": (["my-lama"], "there is no folder 'my-lama' (did you mean 'my-llama'?)"),
    "a file": ([__file__], "is a file"),
    "a folder without a model": (["."], "a folder without config.json"),
    "a shape that is not": (["--shape", "lama-3.1-8b"], "did you mean 'llama-3.1-8b'?"),
    "no layers": (["--shape", "tiny", "--layers", "0"], "--layers"),
    "an unknown option": ([*TINY, "--lenght", "8"], "No such option: --lenght"),
    "no number": ([*TINY, "--batch", "many"], "'--batch': found 'many'"),
    "no number behind an equals sign": ([*TINY, "--batch=many"], "'--batch': found 'many'"),
    "no text": ([*TINY, "--batch", ""], "'--batch': found ''"),
    "a budget without a kind": ([*TINY, "--budget", "0.5"], "write coverage:0.005 or keep:0.5"),
    "a budget beyond": ([*TINY, "--budget", "keep:1.5"], "a number in [0, 1]"),
    "a length that is none": ([*TINY, "--length", "8 thousand"], "is not a length"),
    "a window beyond any length": ([*TINY, "--window", "9" * 20], "a number of tokens from 1 to 2,147,483,647"),
    "a minimum beyond any length": ([*TINY, "--min-length", "9" * 20], "a number of tokens from 1 to 2,147,483,647"),
    "a window below 1": ([*TINY, "--window", "0"], "--window '0' is not a length"),
    "a window without a number": ([*TINY, "--window", "many"], "--window 'many' is not a length"),
    "a window without a text": ([*TINY, "--window", ""], "--window '' is not a length"),
    "fewer tokens than none": ([*TINY, "--min-tokens", "-1"], "--min-tokens '-1' is not a length"),
    "a layer that is not": ([*TINY, "--sparse-layers", "0,1,2"], "layer 2 does not exist: tiny has the layers 0 to 1"),
    "many layers that are not": ([*TINY, "--sparse-layers", "1-90"], "layer 2 (and 88 more of those given) does not exist"),
    "layers that are no list": ([*TINY, "--sparse-layers", "3-1"], "write the lower index first"),
    "more layers than fit into memory": ([*TINY, "--sparse-layers", "0-99999999999"], "an index is at most 9,999"),
    "a layer of thousands of digits": ([*TINY, "--sparse-layers", "9" * 5000], "an index is at most 9,999"),
    "a length beyond any memory": ([*TINY, "--length", "99999999999K"], "a number of tokens from 1 to 2,147,483,647"),
    "a batch beyond any memory": ([*TINY, "--batch", "99999999999"], "--batch"),
    "a shape of too many layers": (["--shape", "tiny", "--layers", "99999999999"], "--layers"),
    "layers as a report names them": ([*TINY, "--sparse-layers", "0..1"], "write 0-1"),
    "layers half indices": ([*TINY, "--sparse-layers", "1,x"], "is no list of layers"),
    "a calibration that is not there": ([*TINY, "--sparse-layers", "none.json"], "'none.json' cannot be read"),
    "a kernel that is not": ([*TINY, "--kernel", "fastest"], "fastest"),
    "a device that is not": ([*TINY, "--device", "tpu"], "it must be auto, cpu, cuda or cuda:N"),
    "a device without a name": ([*TINY, "--device", ""], "--device '' is not known"),
    "a dtype without a name": ([*TINY, "--dtype", ""], "--dtype '' is not known"),
    "a dtype that is not": ([*TINY, "--dtype", "int8"], "--dtype int8 is not known"),
    "output into nowhere": ([*TINY, "--out", "nowhere/report.json"], "there is no folder 'nowhere'"),
    "output onto a folder": ([*TINY, "--out", "."], "it is a folder"),
}


@pytest.mark.parametrize("case", USAGE)
def test_bad_usage(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-llama").mkdir()
    arguments, said = USAGE[case]
    assert said in fails(2, "explain", *arguments)


OTHERS = {
    "an unknown command": (["explian"], "explian"),
    "calibrate without prompts": (["calibrate", "FOLDER"], "pass --prompts FILE"),
    "calibrate with both": (["calibrate", *TINY, "--prompts", "x", "--random", "2"], "choose one"),
    "a count of random prompts": (["calibrate", *TINY, "--count", "3"], "--count goes with --prompts or --tasks"),
    "prompts that are not there": (["calibrate", *TINY, "--prompts", "x.jsonl"], "'x.jsonl' cannot be read"),
    "text without a tokenizer": (["calibrate", *TINY, "--prompts", "TEXT"], "the shape 'tiny' has no tokenizer"),
    "an empty file": (["calibrate", *TINY, "--prompts", "EMPTY"], "'empty.txt' is empty: pass a text file"),
    "prompts of four tokens": (
        ["calibrate", *TINY, "--length", "4"],
        "--length 4 is too short to calibrate: take 16 or more",
    ),
    "a prompt of four tokens": (
        ["calibrate", *TINY, "--prompts", "IDS"],
        "holds a prompt of 4 tokens, too short to calibrate",
    ),
    "a GPU that is elsewhere": (["bench", *TINY, "--device", "h100"], "--device h100"),
    "a GPU that is elsewhere with weights": (["explain", *TINY, "--device", "h100", "--weights"], "goes without --weights"),
    "a model on a Hub that is out of reach": (["explain", "nobody/nothing"], "no such model could be had from the Hugging"),
    "delta beyond": (["calibrate", *TINY, "--delta", "2"], "--delta 2.0 is not allowed"),
    "an objective that is not": (["calibrate", *TINY, "--objective", "time"], "--objective time is not known"),
    "an objective without a name": (["calibrate", *TINY, "--objective", ""], "--objective '' is not known"),
    "loss without a limit": (["calibrate", *TINY, "--objective", "loss"], "needs --max-kl"),
    "loss below zero": (["calibrate", *TINY, "--objective", "loss", "--max-kl", "-1"], "--max-kl"),
    "a limit of drift": (["calibrate", *TINY, "--max-kl", "1", "--answer", "8"], "--max-kl, --answer goes with --objective"),
    "delta of loss": (["calibrate", *TINY, "--objective", "loss", "--delta", "0.5"], "--delta goes with --objective drift"),
    "answers of tasks": (
        ["calibrate", "FOLDER", "--objective", "loss", "--max-kl", "1", "--tasks", "copy", "--answer", "8"],
        "--answer 8 does not go with --tasks",
    ),
    "loss on prompts that are kept whole": (
        ["calibrate", *TINY, "--objective", "loss", "--max-kl", "1", "--length", "1K"],
        "--length 1K: prompts have at most 960 tokens before their answers, and 1,152 are always kept",
    ),
    "loss on tasks that are kept whole": (
        ["calibrate", "FOLDER", "--objective", "loss", "--max-kl", "1", "--tasks", "copy", "--length", "1K"],
        "--length 1K: prompts have at most 1,024 tokens before their answers",
    ),
    "tasks of drift": (["calibrate", *TINY, "--tasks", "needle"], "--tasks goes with --objective loss"),
    "a task of loss that is not": (
        ["calibrate", *TINY, "--objective", "loss", "--max-kl", "1", "--tasks", "riddle"],
        "task='riddle' is not allowed",
    ),
    "tasks of a shape": (
        ["calibrate", *TINY, "--objective", "loss", "--max-kl", "1", "--tasks", "needle"],
        "--tasks are asked in words, and the shape 'tiny' has no tokenizer: pass a model folder",
    ),
    "tasks in JSON lines": (
        ["calibrate", "FOLDER", "--objective", "loss", "--max-kl", "1", "--tasks", "needle", "--prompts", "IDS"],
        "is JSON, and tasks hide things in plain text",
    ),
    "eval in JSON lines": (["eval", "FOLDER", "--text", "IDS"], "is JSON, and tasks hide things in plain text"),
    "ratios without a number": (
        ["calibrate", *TINY, "--objective", "loss", "--max-kl", "1", "--ratios", ""],
        "--ratios '' is not understood",
    ),
    "ratios that are none": (
        ["calibrate", *TINY, "--objective", "loss", "--max-kl", "1", "--ratios", "half"],
        "--ratios half is not understood",
    ),
    "a figure of no kind": (["calibrate", *TINY, "--figure", "drift.doc"], "must end in .png or .svg or .pdf"),
    "layers of a folder": (["explain", "FOLDER", "--layers", "2"], "--layers 2 goes with --shape alone"),
    "modes that are not": (["bench", *TINY, "--modes", "fast"], "modes must be some of"),
    "lengths that are none": (["bench", *TINY, "--lengths", "8K,x"], "'x' is not a length"),
    "export to nothing": (["export", *TINY], "pass --out model.pt2"),
    "export with another ending": (["export", *TINY, "--out", "x.zip"], "must end in .pt2"),
    "export with another format's ending": (["export", *TINY, "--out", "x.onnx"], "is a file of --format onnx"),
    "export beyond the positions": (
        ["export", *TINY, "--out", "x.pt2", "--lengths", "1K", "1000K"],
        "prompts of 1,024,000 tokens do not fit",
    ),
    "standard operators of a coverage": (
        ["export", *TINY, "--out", "x.onnx", "--format", "onnx", "--budget", "coverage:0.01"],
        "at run time how many tokens are kept: pass --budget keep:0.15",
    ),
    "export of a range upside down": (["export", *TINY, "--out", "x.pt2", "--lengths", "4K", "1K"], "is not a range"),
    "batches from none on": (["export", *TINY, "--out", "x.pt2", "--batches", "0", "4"], "--batches 0 4 is not a range"),
    "batches upside down": (
        ["export", *TINY, "--out", "x.pt2", "--batches", "4", "1"],
        "write the smaller size first, as 1 8",
    ),
    "a check of no ONNX file": (["export", *TINY, "--out", "x.pt2", "--check"], "--check goes with --format onnx"),
    "a format that is not": (["export", *TINY, "--out", "x.pt2", "--format", "zip"], "--format"),
    "more samples than fit into memory": (["eval", *TINY, "--samples", "99999999999"], "--samples"),
    "more prompts than fit into memory": (["calibrate", *TINY, "--random", "99999999999"], "--random"),
    "a seed of more than 64 bits": (["eval", *TINY, "--seed", "9" * 30], "--seed"),
    "a task that is not": (["eval", "--shape", "tiny", "--tasks", "poetry"], "task='poetry' is not allowed"),
    "no task": (["eval", *TINY, "--tasks", ""], "'' names nothing"),
    "a setting with an unknown field": (["eval", *TINY, "--setting", "keep:0.5,flor=none"], "'flor=none' is not understood"),
    "a setting without a budget": (["eval", *TINY, "--setting", "floor=none"], "'floor=none' is not a budget"),
    "a setting with half a floor": (["eval", *TINY, "--setting", "keep:0.5,floor=256"], "'floor=256' is not understood"),
    "a budget that every setting replaces": (
        ["eval", *TINY, "--budget", "keep:0.5", "--setting", "dense", "--setting", "keep:0.3,window=2K"],
        "--budget keep:0.5 is used by no --setting",
    ),
    "a setting of other layers": (["eval", *TINY, "--setting", "keep:0.5,layers=1+2"], "has the layers 0 to 1"),
    "a text that is not there": (["eval", *TINY, "--text", "x.txt"], "--text 'x.txt' cannot be read"),
    "a continuation of nothing": (["eval", *TINY, "--tasks", "continuation"], "pass one (--text FILE)"),
    "eval without a tokenizer": (["eval", "FOLDER"], "eval asks in words, so copy the model's tokenizer"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_bad_usage_of_other_commands(case, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Some words.")
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [5, 6, 7, 8]}')
    (tmp_path / "empty.txt").write_text(" \n")
    arguments, said = OTHERS[case]
    places = {"FOLDER": str(folder), "TEXT": "text.txt", "IDS": "ids.jsonl", "EMPTY": "empty.txt"}
    found = fails_after_notes(2, *(places.get(argument, argument) for argument in arguments))
    assert said in found


def fails_after_notes(code, *arguments):
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    *notes, last = done.stderr.splitlines()
    assert last.startswith("error: ") and all(note.startswith("note: ") for note in notes)
    return last


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"window": ' + "1" * 5000 + "}", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ('{"windw": 3}', "did you mean 'window'?"),
    ],
)
def test_a_configuration_file_that_is_wrong(text, said, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    found = fails(2, "explain", *TINY, "--config", str(path))
    assert said in found and str(path) in found


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not JSON"), ('{"format": "x"}', "expected 'tsa_compile.calibration/1'")]
)
def test_a_calibration_file_that_is_wrong(text, said, tmp_path):
    path = tmp_path / "layers.json"
    path.write_text(text)
    assert said in fails(2, "explain", *TINY, "--sparse-layers", str(path))


def test_loss_is_measured_on_longer_prompts(monkeypatch):
    """Of 1,024 tokens all would be kept; for drift any length will do."""
    asked = []

    def stop(source, length, batch=1):
        asked.append(length)
        raise ConfigError("enough")

    monkeypatch.setattr(Source, "check", stop)
    fails(2, "calibrate", *TINY)
    fails(2, "calibrate", *TINY, "--objective", "loss", "--max-kl", "1")
    assert asked == [1024, 4096]


def test_a_calibration_of_another_size(calibration):
    said = fails(2, "explain", "--shape", "tiny", "--sparse-layers", str(calibration))
    assert "a model with 2 layers, tiny has 4" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json' is no causal language model's configuration"),
        ("{}", "config.json' is no causal language model's configuration"),
        ("[" * 100_000, "config.json' is no causal language model's configuration"),
        ('{"model_type": "llama", "num_hidden_layers": "two"}', "config.json' is no causal language model's configuration"),
        (
            '{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 3}',
            "is no causal language model's configuration",
        ),
        ('{"model_type": "no-such-model"}', "config.json' is no causal language model's configuration"),
        ('{"model_type": "vit"}', "no causal language model can be made of this ViTConfig"),
    ],
)
def test_a_folder_whose_configuration_is_wrong(text, said, tmp_path):
    (tmp_path / "config.json").write_text(text)
    found = fails(2, "explain", str(tmp_path), "--weights", *QUICK)
    assert said in found and len(found) < 400


def test_a_folder_without_weights(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    assert "cannot be loaded as a causal language model" in fails(2, "explain", str(tmp_path), "--weights", *QUICK)


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = fails(2, "explain", *TINY, "--device", "cuda")
    assert "no CUDA device was found; use --device cpu" in said


@pytest.mark.parametrize(
    "arguments", [["bench"], ["calibrate"], ["export", "--out", "x.pt2"], ["eval"], ["explain", "--weights", *QUICK]]
)
def test_too_little_memory_is_found_before_anything_is_built(arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(shapes, "build", lambda *args: pytest.fail("it was built"))
    said = fails(1, *arguments, *TINY)
    assert "are needed on cpu" in said and "0.0 GiB are free: take fewer layers" in said


def test_a_folder_is_loaded_through_the_hosts_memory(folder, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20 if str(device) == "cpu" else 2**40)
    config = shapes.model_config("tiny")
    of_shape = Source("tiny", None, config, torch.device("cuda"), torch.bfloat16)
    of_shape.check(100)
    with pytest.raises(memory.MemoryShortage, match="are needed on cpu"):
        replace(of_shape, folder=folder).check(100)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 1, "error: out of memory (CUDA out of"),
        (MemoryError(), 1, "error: out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            1,
            "error: out of memory (DefaultCPUAllocator",
        ),
        (OSError(28, "No space left on device"), 1, "error: No space left on device: free some space"),
        (RuntimeError("C++ compile error: x.cpp: No space left on device"), 1, "error: No space left on device: free some"),
        (KeyboardInterrupt(), 130, "interrupted: "),
        (KernelError("no kernel 'x'"), 2, "error: no kernel 'x'"),
        (ImportError("pip install transformers"), 1, "error: pip install transformers"),
        (PermissionError(13, "Permission denied", "out.json"), 1, "error: out.json: Permission denied; choose another path"),
        (ValueError("some\nthing"), 1, "error: ValueError: some thing (--debug shows where"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_failures_of_the_work(error, code, said, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(shapes, "explain_weightless", fail)
    done = run("explain", *TINY, *QUICK)
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(shapes, "explain_weightless", lambda *args, **kwargs: 1 / 0)
    done = run("explain", *TINY, *QUICK, "--debug")
    assert done.exit_code == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ZeroDivisionError: division by zero")


def test_an_error_inside_another_is_what_is_said():
    """As Dynamo wraps what a backend raises; running out of memory is no bad usage, whoever says so."""
    wrapped = RuntimeError("backend='tsa' raised: ...")
    wrapped.inner_exception = ConfigError("layers=[9] not found")
    assert errors.describe(wrapped) == ("layers=[9] not found", errors.USAGE)
    said = ConfigError("2 x 8192 tokens do not fit")
    said.__cause__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert errors.describe(said) == ("2 x 8192 tokens do not fit", errors.FAILED)


def test_a_pattern_that_no_layer_has():
    """Not an error, as it is none where a model is compiled; the report says it."""
    done = run("explain", *TINY[:-1], "1", *QUICK, "--sparse-layers", "model.blocks.*")
    assert done.exit_code == 0
    assert "note: layers=['model.blocks.*'] not found: the attention calls here are 0 (" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("upper", None), ("none", ()), ("3", (3,)), ("15-17,20,16", (15, 16, 17, 20)), ("a.1?.*,b", ("a.1?.*", "b"))],
)
def test_layers(text, wanted):
    assert texts.layers(text) == wanted


def test_published_layers_by_name():
    assert texts.layers("llama-3.1-8b-instruct") == tuple(range(15, 31))


@pytest.mark.parametrize(("text", "wanted"), [("coverage:0.01", Coverage(0.01)), ("keep:0.5", KeepRatio(0.5))])
def test_budgets(text, wanted):
    assert texts.budget(text) == wanted


@pytest.mark.parametrize("text", ["", "keep", "keep:", "keep:x", "Keep:0.5", "keep_ratio:0.5", "keep:nan", "coverage:1"])
def test_no_budgets(text):
    with pytest.raises(ConfigError):
        texts.budget(text)


def test_lengths():
    assert texts.lengths("32K,8k,100,8192") == [100, 8192, 32768]
    assert texts.length("0", least=0) == 0
    for wrong in ("", "0", "-8", "8.5K", "8M"):
        with pytest.raises(ConfigError):
            texts.lengths(wrong)


class Words:
    """A tokenizer: a token for every word, its length."""

    def __call__(self, text):
        return {"input_ids": [len(word) for word in text.split()]}


def test_text_is_cut_into_pieces(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("a bb ccc dddd eeeee\nffffff ggggggg")
    assert read(path, 3, None, Words) == [[1, 2, 3], [4, 5, 6]]
    assert read(path, 3, 1, Words) == [[1, 2, 3]]
    assert read(path, 100, None, Words) == [[1, 2, 3, 4, 5, 6, 7]]


def test_lines_of_json_are_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "a bb ccc"}\n\n"dd e"\n{"input_ids": [7, 8], "text": "unused"}\n{"prompt": "ffff"}\n')
    assert read(path, 2, None, Words) == [[1, 2], [2, 1], [7, 8], [4]]


def test_lines_end_where_json_says(tmp_path):
    """Scraped text has Unicode's separators of lines and paragraphs, and files of some editors begin with a mark."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028bb\u0085ccc"}\r\n{"text": "dd"}\r\n'.encode())
    assert read(path, 5, None, Words) == [[1, 2, 3], [2]]


@pytest.mark.parametrize("name", ["prompts.json", "prompts.txt", "prompts.JSONL"])
def test_lines_of_json_are_known_by_their_first(name, tmp_path):
    path = tmp_path / name
    path.write_text('{"text": "a bb ccc"}\n{"input_ids": [7, 8]}\n')
    assert read(path, 2, None, Words) == [[1, 2], [7, 8]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ('{"input_ids": []}', "has no tokens"),
        ('"a"\n{', "line 2 is not JSON"),
        ('{"input_ids": [1.5]}', "line 1 is no prompt"),
        ("3", "is no"),
    ],
)
def test_lines_that_are_no_prompts(text, said, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read(path, 2, None, Words)


@pytest.mark.parametrize(
    ("shape", "said"), [("llama-3.2-1b", "hidden_size 2048, not 64"), ("qwen3-0.6b", "architecture Qwen3ForCausalLM")]
)
def test_a_calibration_of_another_architecture(shape, said, calibration):
    found = fails(2, "explain", "--shape", shape, "--layers", "2", "--sparse-layers", str(calibration))
    assert said in found and "calibrate this model" in found
