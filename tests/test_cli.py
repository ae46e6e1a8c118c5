"""The command `tsa-compile`: results, errors in one line, exit codes, and the examples of its own help."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version

import pytest
import tokenizers
import torch
import transformers
from typer.testing import CliRunner

from tsa_compile import KernelError, RewriteReport, TSAConfig, shapes
from tsa_compile.calibrate import Calibration
from tsa_compile.cli import COMMANDS, app
from tsa_compile.commands import errors, export, output, texts
from tsa_compile.commands.loading import Source
from tsa_compile.commands.options import SHAPE_NAMES
from tsa_compile.commands.prompts import read
from tsa_compile.config import Coverage, KeepRatio
from tsa_compile.errors import ConfigError
from tsa_compile.export.tensorrt import Finding

from .support import without_interpreter

pytestmark = pytest.mark.usefixtures("fresh")

QUICK = ["--length", "40", "--window", "4", "--min-tokens", "4", "--no-predict"]
TINY = ["--shape", "tiny", "--layers", "2"]


def run(*arguments, **environment):
    """A command in this process, on the CPU unless a device is named."""
    if arguments and arguments[0] in COMMANDS and not {"--device", "--help"} & set(arguments):
        arguments = (*arguments, "--device", "cpu")
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb", **environment})


def fails(code, *arguments):
    """The one line on stderr of a command that ends with this code, and writes nothing to stdout."""
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("models") / "my-llama"
    shapes.build(shapes.model_config("tiny", layers=2)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrations") / "layers.json"
    done = run("calibrate", *TINY, "--random", "1", "--length", "16", "--out", str(path))
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture(scope="module")
def report():
    """What `explain TINY QUICK` really finds."""
    done = run("explain", *TINY, *QUICK, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    return RewriteReport.from_json(json.loads(done.stdout)["report"])


@pytest.fixture
def traced(report, monkeypatch):
    """In place of tracing: the report above, for tests of what is around it. The configurations that were asked for."""
    asked = []

    def explain_weightless(model_config, length, config, **options):
        asked.append(config)
        return report

    monkeypatch.setattr(shapes, "explain_weightless", explain_weightless)
    return asked


# Help


def test_help_does_not_wait_for_torch():
    source = "import sys, tsa_compile.cli; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert without_interpreter(source).strip() == "[]"


def test_the_face_is_lazy_and_its_names_are_what_they_say():
    """Also where a module was imported first that is called as one of its functions."""
    source = """
        import sys, types, tsa_compile
        lazy = "torch" not in sys.modules
        import tsa_compile.explain, tsa_compile.calibrate, tsa_compile.predict
        from tsa_compile.explain import explain
        found = {name: getattr(tsa_compile, name) for name in tsa_compile.__all__}
        modules = [name for name, value in found.items() if isinstance(value, types.ModuleType)]
        print(lazy, modules, found["explain"] is explain, set(found) <= set(dir(tsa_compile)), tsa_compile.report.__name__)
    """
    assert without_interpreter(source).split() == ["True", "[]", "True", "True", "tsa_compile.report"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments):
    done = run(*arguments)
    assert done.exit_code == 0 and not done.stderr
    assert all(re.search(rf"\b{name}\b", done.stdout) for name in COMMANDS)


def test_help_names_every_shape():
    assert tuple(shapes.SHAPES) == SHAPE_NAMES


def test_version():
    assert run("--version").stdout.strip() == f"tsa-compile {version('tsa-compile')}"


def examples(name):
    """The command lines at the end of a command's help."""
    done = run(name, "--help")
    assert done.exit_code == 0
    return [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("tsa-compile ")]


EXAMPLES = [(name, line) for name in COMMANDS for line in examples(name)]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_by_example(name):
    lines = [line for command, line in EXAMPLES if command == name]
    assert 2 <= len(lines) <= 3 and all(shlex.split(line)[1] == name for line in lines)
    assert any("--shape tiny" in line for line in lines), "one that any machine runs"
    assert all(len(line) <= 110 for line in lines)


@pytest.mark.parametrize("line", [line for _, line in EXAMPLES if "--shape tiny" in line])
def test_examples_run_on_a_cpu(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*shlex.split(line)[1:], "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)


@pytest.mark.parametrize("line", [line for _, line in EXAMPLES if "--shape tiny" not in line])
def test_examples_that_need_more_are_understood(line):
    """All options exist and have values that are read; the model's folder is not there, or the shape is asked for less."""
    arguments = shlex.split(line)[1:]
    if "--shape" in arguments:
        arguments[arguments.index("--shape") + 1] = "no-such-shape"
        assert "is not a built-in shape" in fails(2, *arguments)
    else:
        assert "there is no folder" in fails(2, *arguments)


# Results


@pytest.mark.parametrize("more", [[], ["--weights"]])
def test_explain_a_folder_as_the_shape_that_it_holds(more, folder, report):
    found = json.loads(run("explain", str(folder), *QUICK, *more, "--json").stdout)
    assert RewriteReport.from_json(found["report"]) == report
    assert report.sparse == 1 and report.config["window"] == 4
    assert (found["model"], found["length"]) == (str(folder), 40)


def test_explain_writes_text_and_a_file(traced, report, tmp_path):
    path = tmp_path / "report.json"
    done = run("explain", *TINY, *QUICK, "--sparse-layers", "0-1", "--out", str(path))
    assert (done.exit_code, done.stdout) == (0, f"{report}\n")
    assert RewriteReport.from_json(json.loads(path.read_text())["report"]) == report
    assert traced[0].layers == (0, 1)


def test_a_prediction_comes_along(traced):
    done = run("explain", *TINY, *QUICK[:-1], "--json", "--budget", "keep:0.5")
    prediction = json.loads(done.stdout)["prediction"]
    assert prediction["length"] == 40 and len(prediction["layers"]) == 2
    assert prediction["config"]["budget"] == {"keep_ratio": 0.5}


def test_a_report_does_not_hang_on_a_prediction(traced, report, monkeypatch):
    def refuse(*args, **options):
        raise ConfigError("an unknown kind of layer")

    monkeypatch.setattr(import_module("tsa_compile.predict"), "predict", refuse)
    done = run("explain", *TINY, *QUICK[:-1])
    assert (done.exit_code, done.stdout) == (0, f"{report}\n")
    assert done.stderr == "note: no times are predicted: an unknown kind of layer\n"


def test_options_take_precedence_over_a_file(traced, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(TSAConfig(budget=KeepRatio(0.25), window=7, min_tokens=5).to_json())
    run("explain", *TINY, "--no-predict", "--config", str(path), "--window", "6")
    assert traced == [TSAConfig(budget=KeepRatio(0.25), window=6, min_tokens=5)]


def test_calibrate_writes_what_explain_reads(calibration, traced):
    run("explain", *TINY, *QUICK, "--sparse-layers", str(calibration))
    chosen = Calibration.load(calibration).sparse_layers
    assert len(chosen) == 1 and traced[0].layers == chosen


def test_calibrate_reads_token_ids_from_a_file(tmp_path):
    ids = shapes.prompts(shapes.model_config("tiny"), 3, 20).tolist()
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in ids))
    done = run("calibrate", *TINY, "--prompts", str(path), "--count", "2", "--length", "12", "--json")
    found = Calibration.from_dict(json.loads(done.stdout))
    assert (found.prompts, found.tokens) == (2, 24)


def test_calibrate_reads_text_with_the_folders_tokenizer(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    words = tokenizers.models.WordLevel({"[UNK]": 0, "one": 5, "two": 6, "three": 7}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_text("one two three two one three two")
    arguments = ["--prompts", str(tmp_path / "book.txt"), "--length", "3", "--json"]
    found = Calibration.from_dict(json.loads(run("calibrate", str(tmp_path / "model"), *arguments).stdout))
    assert (found.prompts, found.tokens) == (2, 6)
    assert "has no tokenizer" in fails(2, "calibrate", str(folder), *arguments)


@pytest.mark.parametrize(("certain", "code"), [(True, 1), (False, 0), (None, 0)])
def test_what_tensorrt_would_refuse_is_a_failure(certain, code, monkeypatch, tmp_path):
    def save(program, kind, target):
        target.write_text(program)

    finding = None if certain is None else Finding("node", "TopK", "k is too large", "operators.md", certain)
    monkeypatch.setattr(export, "_program", lambda *args: "a program")
    monkeypatch.setattr(export, "_last_report", lambda: "1 of 2 attention calls sparse")
    monkeypatch.setattr(export, "_save", save)
    monkeypatch.setattr(export, "_findings", lambda target: [finding] if finding else [])
    path = tmp_path / "model.onnx"
    done = run("export", *TINY, "--format", "onnx", "--out", str(path), "--lengths", "1K", "2K", "--check", "--json")
    values = json.loads(done.stdout)
    assert done.exit_code == code
    assert values["tensorrt_findings"] == ([str(finding)] if finding else [])
    assert (values["bytes"], values["lengths"]) == (len("a program"), [1024, 2048])


def test_the_example_of_an_export_has_a_length_that_is_no_size_of_the_model():
    source = Source("tiny", None, shapes.model_config("tiny"), torch.device("cpu"), torch.float32)
    assert export._example_length(source, 63, 200) == 65  # 64 is the hidden size
    assert export._example_length(source, 1000, 2000) == 1001


@pytest.mark.parametrize(("seed", "warnings"), [(0, 0), (1, 1)])
def test_a_calibration_of_other_weights_warns_where_weights_are(seed, warnings, calibration, report, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("tsa_compile.explain"), "explain", lambda model, **inputs: report)
    shapes.build(shapes.model_config("tiny", layers=2), seed=seed).save_pretrained(tmp_path)
    found = run("explain", str(tmp_path), *QUICK, "--sparse-layers", str(calibration), "--weights", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)
    assert found.stderr.count("\n") == found.stderr.count("warning: this calibration belongs to another model") == warnings


def test_what_models_print_does_not_reach_stdout(report, monkeypatch):
    def noisy(*args, **kwargs):
        sys.stdout.write("loading something")
        return report

    monkeypatch.setattr(shapes, "explain_weightless", noisy)
    done = run("explain", *TINY, *QUICK, "--json")
    assert json.loads(done.stdout)["model"] == "tiny" and "loading something" in done.stderr


def test_a_warning_is_one_line():
    done = run("explain", "--shape", "tiny", "--layers", "1", "--length", "40", "--no-predict", "--json")
    assert json.loads(done.stdout)["report"]["rows"]
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["warning"]
    assert "TOO_SHORT" in done.stderr


def test_progress_goes_to_a_terminal(traced, monkeypatch):
    """On stderr, where one is; stdout is the same."""
    quiet = run("explain", *TINY, *QUICK)
    monkeypatch.setattr(output, "stderr", lambda: output.Console(stderr=True, force_terminal=True))
    shown = run("explain", *TINY, *QUICK, TERM="xterm")
    assert quiet.stderr == "" and "Tracing tiny at 40 tokens" in shown.stderr
    assert quiet.stdout == shown.stdout


# Errors


USAGE = {
    "no model": ([], "no model given"),
    "two models": ([".", *TINY], "both a folder and --shape"),
    "no folder": (["nowhere"], "there is no folder 'nowhere'"),
    "a file": ([__file__], "is a file"),
    "a folder without a model": (["."], "a folder without config.json"),
    "a shape that is not": (["--shape", "lama-3.1-8b"], "did you mean 'llama-3.1-8b'?"),
    "no layers": (["--shape", "tiny", "--layers", "0"], "--layers"),
    "an unknown option": ([*TINY, "--lenght", "8"], "No such option: --lenght"),
    "no number": ([*TINY, "--window", "many"], "--window"),
    "a budget without a kind": ([*TINY, "--budget", "0.5"], "write coverage:0.005 or keep:0.5"),
    "a budget beyond": ([*TINY, "--budget", "keep:1.5"], "a number in (0, 1]"),
    "a length that is none": ([*TINY, "--length", "8 thousand"], "is not a length"),
    "a window below 1": ([*TINY, "--window", "0"], "window=0 is not allowed"),
    "a layer that is not": ([*TINY, "--sparse-layers", "0,1,2"], "layer 2 does not exist: tiny has the layers 0 to 1"),
    "layers that are no list": ([*TINY, "--sparse-layers", "3-1"], "write the lower index first"),
    "layers half indices": ([*TINY, "--sparse-layers", "1,x"], "is no list of layers"),
    "a calibration that is not there": ([*TINY, "--sparse-layers", "none.json"], "'none.json' cannot be read"),
    "a kernel that is not": ([*TINY, "--kernel", "fastest"], "fastest"),
    "a device that is not": ([*TINY, "--device", "tpu"], "it must be auto, cpu, cuda or cuda:N"),
    "a dtype that is not": ([*TINY, "--dtype", "int8"], "--dtype int8 is not known"),
    "output into nowhere": ([*TINY, "--out", "nowhere/report.json"], "there is no folder 'nowhere'"),
    "output onto a folder": ([*TINY, "--out", "."], "it is a folder"),
}


@pytest.mark.parametrize("case", USAGE)
def test_bad_usage(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, said = USAGE[case]
    assert said in fails(2, "explain", *arguments)


OTHERS = {
    "an unknown command": (["explian"], "explian"),
    "calibrate without prompts": (["calibrate", "FOLDER"], "pass --prompts FILE"),
    "calibrate with both": (["calibrate", *TINY, "--prompts", "x", "--random", "2"], "choose one"),
    "prompts that are not there": (["calibrate", *TINY, "--prompts", "x.jsonl"], "'x.jsonl' cannot be read"),
    "text without a tokenizer": (["calibrate", *TINY, "--prompts", "TEXT"], "the shape 'tiny' has no tokenizer"),
    "delta beyond": (["calibrate", *TINY, "--delta", "2"], "--delta 2.0 is not allowed"),
    "a figure of no kind": (["calibrate", *TINY, "--figure", "drift.doc"], "must end in .png or .svg or .pdf"),
    "layers of a folder": (["explain", "FOLDER", "--layers", "2"], "--layers 2 goes with --shape alone"),
    "modes that are not": (["bench", *TINY, "--modes", "fast"], "modes must be some of"),
    "lengths that are none": (["bench", *TINY, "--lengths", "8K,x"], "'x' is not a length"),
    "export to nothing": (["export", *TINY], "pass --out model.pt2"),
    "export with another ending": (["export", *TINY, "--out", "x.onnx"], "must end in .pt2"),
    "export of a range upside down": (["export", *TINY, "--out", "x.pt2", "--lengths", "4K", "1K"], "is not a range"),
    "a check of no ONNX file": (["export", *TINY, "--out", "x.pt2", "--check"], "--check goes with --format onnx"),
    "a format that is not": (["export", *TINY, "--out", "x.pt2", "--format", "zip"], "--format"),
    "a task that is not": (["eval", "--shape", "tiny", "--tasks", "poetry"], "task='poetry' is not allowed"),
    "methods and a budget": (["eval", *TINY, "--methods", "dense", "--budget", "keep:0.5"], "choose one"),
    "patterns in eval": (["eval", *TINY, "--sparse-layers", "model.*"], "eval takes indices"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_bad_usage_of_other_commands(case, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Some words.")
    arguments, said = OTHERS[case]
    places = {"FOLDER": str(folder), "TEXT": "text.txt"}
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
    [("{", "not valid JSON"), ("[1]", "must be a JSON object"), ('{"windw": 3}', "did you mean 'window'?")],
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


def test_a_calibration_of_another_size(calibration):
    said = fails(2, "explain", "--shape", "tiny", "--sparse-layers", str(calibration))
    assert "a model with 2 layers, tiny has 4" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json' is no causal language model's configuration"),
        ("{}", "config.json' is no causal language model's configuration"),
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
    monkeypatch.setattr(shapes, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(shapes, "build", lambda *args: pytest.fail("it was built"))
    said = fails(1, *arguments, *TINY)
    assert "are needed on cpu" in said and "0.0 GiB are free: take fewer layers" in said


def test_a_folder_is_loaded_through_the_hosts_memory(folder, monkeypatch):
    monkeypatch.setattr(shapes, "free_bytes", lambda device: 2**20 if str(device) == "cpu" else 2**40)
    config = shapes.model_config("tiny")
    of_shape = Source("tiny", None, config, torch.device("cuda"), torch.bfloat16)
    of_shape.check(100)
    with pytest.raises(shapes.MemoryShortage, match="are needed on cpu"):
        replace(of_shape, folder=folder).check(100)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 1, "error: out of memory (CUDA out of"),
        (MemoryError(), 1, "error: out of memory"),
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
    assert "layers=['model.blocks.*'] not found" in fails(
        2, "explain", *TINY[:-1], "1", *QUICK, "--sparse-layers", "model.blocks.*"
    )


# Texts


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no prompts"),
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


@pytest.mark.gpu
def test_on_a_gpu():
    chosen = ["--shape", "small", "--device", "cuda", "--budget", "keep:0.5", "--min-length", "1", "--json"]
    report = RewriteReport.from_json(json.loads(run("explain", *chosen, "--length", "8K").stdout)["report"])
    assert report.sparse == 4 and {row.dtype for row in report} == {"bfloat16"}
    done = run("bench", *chosen, "--lengths", "2K,4K", "--rounds", "2", "--compiler", "eager")
    assert done.stderr == "" and all(row["peak_gib"] > 0 for row in json.loads(done.stdout)["rows"])


# The installed command


@pytest.fixture(scope="module")
def installed():
    path = shutil.which("tsa-compile", path=sysconfig.get_path("scripts"))
    return path or pytest.skip("the package was installed before it had a command: install it again")


def test_the_installed_command_fails_in_one_line(installed, tmp_path):
    done = subprocess.run([installed, "explain", "nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no folder 'nowhere'") and done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_the_installed_command_is_interrupted(installed, tmp_path):
    """Ctrl-C while it works, which the spinner on stderr shows (TTY_COMPATIBLE: as if that were a terminal)."""
    environment = {**os.environ, "TTY_COMPATIBLE": "1", "COLUMNS": "200"}
    command = [installed, "explain", "--shape", "llama-3.1-70b", "--json"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        seen = b""
        while b"Tracing" not in seen:
            seen += process.stderr.read(1) or pytest.fail(seen.decode())
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    assert process.returncode == errors.INTERRUPTED, rest.decode()
    assert out == b"" and b"interrupted" in rest and b"Traceback" not in rest
