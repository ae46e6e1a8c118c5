"""The command `tsa-compile`: help whose examples run, results, and the installed command."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from importlib import import_module
from importlib.metadata import version

import pytest
import torch

from tsa_compile import RewriteReport, TSAConfig, shapes
from tsa_compile.bench import MODES
from tsa_compile.cli import COMMANDS, main
from tsa_compile.commands import errors, export, output, texts
from tsa_compile.commands.bench import MODE_NAMES
from tsa_compile.commands.loading import DTYPES, Source
from tsa_compile.commands.options import GPU_NAMES, SHAPE_NAMES, TASK_NAMES
from tsa_compile.config import KeepRatio
from tsa_compile.costs.devices import MEASURED
from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.tasks import TASKS
from tsa_compile.export import _rtx
from tsa_compile.export.tensorrt import Finding

from ..support import exhaustive_but, without_interpreter
from .support import QUICK, TINY, fails, run

pytestmark = pytest.mark.usefixtures("fresh")


def test_help_does_not_wait_for_torch():
    source = "import sys, tsa_compile.cli; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert without_interpreter(source).strip() == "[]"


def test_the_package_imports_its_names_when_they_are_asked_for():
    """Also where their modules were imported first."""
    source = """
        import sys, types, tsa_compile
        lazy = "torch" not in sys.modules
        import tsa_compile.explanation, tsa_compile.calibration.calibrate, tsa_compile.costs.predict
        from tsa_compile.explanation import explain
        found = {name: getattr(tsa_compile, name) for name in tsa_compile.__all__}
        modules = [name for name, value in found.items() if isinstance(value, types.ModuleType)]
        print(lazy, modules, found["explain"] is explain, set(found) <= set(dir(tsa_compile)), tsa_compile.report.__name__)
    """
    assert without_interpreter(source).split() == ["True", "[]", "True", "True", "tsa_compile.report"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_cannot_be_written_ends_in_one_line(option, unbuffered):
    """Also where Python keeps what is printed in a buffer until its end, as it does for files."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-P", "-m", "tsa_compile", option]
        where = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=where)
    assert done.returncode == 1 and "free some space" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments):
    done = run(*arguments)
    assert done.exit_code == 0 and not done.stderr
    assert all(re.search(rf"\b{name}\b", done.stdout) for name in COMMANDS)


def test_options_name_every_shape_and_device():
    assert tuple(shapes.SHAPES) == SHAPE_NAMES and tuple(MEASURED) == GPU_NAMES and TASKS == TASK_NAMES
    assert set(texts.DTYPES.values()) == {str(dtype).removeprefix("torch.") for dtype in DTYPES} and MODES == MODE_NAMES


@pytest.mark.parametrize("device", ["h100", "cpu"])
@pytest.mark.parametrize("length", exhaustive_but(["8K", "64K"], "64K"))
def test_the_report_and_the_prediction_say_the_same(device, length):
    """On a CPU the length counts at which tokens can be dropped, on a GPU the one at which that pays."""
    done = run("explain", *TINY, "--length", length, "--device", device, "--json")
    found = json.loads(done.stdout)
    reasons = [row["reason"] for row in found["report"]["rows"]]
    assert reasons == [layer["reason"] for layer in found["prediction"]["layers"]]
    assert reasons[1] == ("TOO_SHORT" if (device, length) == ("h100", "8K") else "SPARSE")
    if device == "h100":
        assert found["report"]["expected"]["break_even"] == found["prediction"]["break_even"]
        assert found["prediction"]["device"] == "NVIDIA H100 80GB HBM3" and found["report"]["rows"][0]["dtype"] == "bfloat16"


@pytest.mark.exhaustive
def test_they_agree_on_a_model_with_windows():
    """Of its upper half, one layer in six can be sparse: by that share the length from which on that pays is found."""
    shape = ["--shape", "gemma-3-12b", "--layers", "12"]
    found = json.loads(run("explain", *shape, "--length", "8K", "--device", "h200", "--json").stdout)
    assert found["report"]["expected"]["break_even"] == found["prediction"]["break_even"] == 4352
    rows, layers = found["report"]["rows"], found["prediction"]["layers"]
    assert [row["reason"] for row in rows] == [layer["reason"] for layer in layers]
    windows = [row["expected_ms"] for row in rows if row["reason"] == "SLIDING_WINDOW"]
    assert windows == [layer["dense_ms"] for layer in layers if layer["reason"] == "SLIDING_WINDOW"] and len(windows) == 10


def test_without_a_gpu_one_is_assumed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("explain", *TINY, "--length", "2K", "--json", "--device", "auto")
    assert "one H200 is assumed" in done.stderr and json.loads(done.stdout)["report"]["rows"][1]["reason"] == "TOO_SHORT"


def test_tables_fit_a_terminal():
    question = ["explain", *TINY, "--length", "32K", "--device", "h200", "--budget", "coverage:0.005"]
    done = run(*question)
    assert done.exit_code == 0 and max(map(len, done.stdout.splitlines())) <= 80
    assert "model.layers.0.self_attn" in done.stdout and "length 32768 < " in done.stdout
    assert "[1, 4, 32768, 16]" in run(*question, "--details", "--no-predict").stdout


def test_short_names_of_dtypes():
    assert (
        json.loads(run("explain", *TINY, *QUICK, "--dtype", "fp16", "--json").stdout)["report"]["rows"][0]["dtype"]
        == "float16"
    )


def test_what_is_wrong_is_said_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "config.json").write_text("no JSON")
    source = f"""
        import io, sys
        from contextlib import redirect_stderr
        from tsa_compile.cli import main
        bad = (
            "explain nowhere", "explain --shape lama", "explain --shape tiny --device tpu",
            "bench --shape tiny --dtype x", "explain --shape tiny --budget keep", "explain --shape tiny --floor 3",
            "explain --shape tiny --window 0", "explain --shape tiny --sparse-layers 3-1",
            "explain --shape tiny --sparse-layers none.json", "calibrate --shape tiny --delta 2",
            "calibrate --shape tiny --random 2 --prompts x", "bench --shape tiny --modes fast",
            "bench --shape tiny --lengths x", "export --shape tiny",
            "eval --shape tiny --setting keep:0.5,flor=none", "eval --shape tiny --text nowhere.txt",
            "eval --shape tiny --setting keep:0.5,window=0", "eval --shape tiny --tasks poetry",
            "eval --shape tiny --tasks ,", "eval --shape tiny --out {tmp_path}/config.json",
            "explain --shape tiny --sparse-layers ,", "explain --shape tiny --sparse-layers {tmp_path}/config.json",
            "calibrate {tmp_path}", "calibrate --shape tiny --prompts nowhere.txt",
            "calibrate --shape tiny --objective loss --max-kl 1 --ratios 2",
            "calibrate --shape tiny --objective loss --max-kl 1 --tasks poetry",
        )
        for line in bad:
            sys.argv[1:] = line.split()
            said = io.StringIO()
            try:
                with redirect_stderr(said):
                    main()
            except SystemExit as stop:
                print(line, stop.code, "torch" in sys.modules, said.getvalue().count("error: "))
    """
    lines = without_interpreter(source).splitlines()
    assert len(lines) == 26 and all(line.endswith(" 2 False 1") for line in lines), lines


def test_version():
    assert run("--version").stdout.strip() == f"tsa-compile {version('tsa-compile')}"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("ca", ["calibrate"]),
        ("explain --shape qwen3", ["qwen3-0.6b", "qwen3-8b"]),
        ("explain --device h", ["h200", "h100"]),
        ("bench --dtype bf", ["bfloat16", "bf16"]),
        ("eval --sam", ["--samples"]),
    ],
)
def test_the_shell_completes(line, wanted, monkeypatch, capsys):
    """As bash asks; `tsa-compile --install-completion` teaches it to."""
    monkeypatch.setenv("_TSA_COMPILE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"tsa-compile {line}")
    monkeypatch.setenv("COMP_CWORD", str(len(line.split())))
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None) and capsys.readouterr().out.split() == wanted


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
    assert all(len(line) <= 76 for line in lines), "in 80 columns, no example is broken"


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


@pytest.mark.parametrize("more", [[], ["--weights"]])
def test_explain_a_folder_as_the_shape_that_it_holds(more, folder, report):
    found = json.loads(run("explain", str(folder), *QUICK, *more, "--json").stdout)
    assert RewriteReport.from_json(found["report"]) == report
    assert report.sparse == 1 and report.config["window"] == 4
    assert (found["model"], found["length"]) == (str(folder), 40)


def test_explain_writes_text_and_a_file(traced, report, tmp_path):
    path = tmp_path / "report.json"
    done = run("explain", *TINY, *QUICK, "--sparse-layers", "0-1", "--out", str(path))
    assert (done.exit_code, done.stdout) == (0, f"{report.narrow(80)}\n")
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

    monkeypatch.setattr(import_module("tsa_compile.costs.predict"), "predict", refuse)
    done = run("explain", *TINY, *QUICK[:-1])
    assert (done.exit_code, done.stdout) == (0, f"{report.narrow(80)}\n")
    assert done.stderr == "note: no times are predicted: an unknown kind of layer\n"


def test_lengths_that_the_model_has_no_positions_for_are_told(traced):
    done = run("explain", *TINY, "--no-predict", "--length", "256K")
    assert done.exit_code == 0 and "note: prompts of 262,144 tokens do not fit: tiny has 131,072 positions" in done.stderr
    assert "fit" not in run("explain", *TINY, "--no-predict", "--length", "128K").stderr


def test_options_take_precedence_over_a_file(traced, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(TSAConfig(budget=KeepRatio(0.25), window=7, min_tokens=5).to_json())
    run("explain", *TINY, "--no-predict", "--config", str(path), "--window", "6")
    assert traced == [TSAConfig(budget=KeepRatio(0.25), window=6, min_tokens=5)]


def test_numbers_of_tokens_are_written_as_lengths(traced):
    run("explain", *TINY, "--no-predict", "--window", "1K", "--min-tokens", "0", "--min-length", "2k")
    assert traced == [TSAConfig(window=1024, min_tokens=0, min_length=2048)]
    assert texts.setting("keep:0.5,window=2K,min_tokens=0")[0] == {
        "budget": KeepRatio(0.5), "window": 2048, "min_tokens": 0,
    }  # fmt: skip


def test_what_is_not_installed_is_told_before_the_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(_rtx, "PACKAGE", "no_such_package")
    monkeypatch.setattr(Source, "load", lambda *_: pytest.fail("loaded"))
    done = run("export", *TINY, "--format", "tensorrt", "--out", str(tmp_path / "model.engine"))
    assert done.exit_code != 0 and "TensorRT-RTX is not installed" in done.stderr


@pytest.mark.parametrize(("certain", "code"), [(True, 1), (False, 0), (None, 0)])
def test_what_tensorrt_would_refuse_is_a_failure(certain, code, monkeypatch, tmp_path):
    def save(program, kind, target, check):
        target.write_text(program)
        return [finding] if finding and check else []

    finding = None if certain is None else Finding("node", "TopK", "k is too large", "operators.md", certain)
    monkeypatch.setattr(export, "_program", lambda *args: ("a program", "1 of 2 attention calls sparse"))
    monkeypatch.setattr(export, "_save", save)
    path = tmp_path / "model.onnx"
    done = run("export", *TINY, "--format", "onnx", "--out", str(path), "--lengths", "1K", "2K", "--check", "--json")
    values = json.loads(done.stdout)
    assert done.exit_code == code
    assert values["tensorrt_findings"] == ([str(finding)] if finding else [])
    assert (values["bytes"], values["lengths"]) == (len("a program"), [1024, 2048])


@pytest.mark.parametrize("kind", ["program", "aoti"])
def test_what_a_saved_program_needs_to_be_loaded_is_told(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "_program", lambda *args: ("a program", "1 of 2 attention calls sparse"))
    monkeypatch.setattr(export, "_save", lambda program, kind, target, check: [])
    monkeypatch.setattr(export, "_check_installed", lambda *args: None)
    done = run("export", *TINY, "--format", kind, "--out", str(tmp_path / "model.pt2"), "--lengths", "1K", "2K")
    assert done.exit_code == 0 and ("`import tsa_compile.export`" in done.stderr) is (kind == "program")


def test_the_example_of_an_export_has_a_length_that_is_no_size_of_the_model():
    source = Source("tiny", None, shapes.model_config("tiny"), torch.device("cpu"), torch.float32)
    assert export._example_length(source, 63, 200) == 65  # 64 is the hidden size
    assert export._example_length(source, 1000, 2000) == 1001


@pytest.mark.parametrize(("seed", "warnings"), [(0, 0), (1, 1)])
def test_a_calibration_of_other_weights_warns_where_weights_are(seed, warnings, calibration, report, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("tsa_compile.explanation"), "explain", lambda model, **inputs: report)
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


def test_steps_show_nothing_without_a_terminal(capsys):
    with output.steps() as step:
        step("first", 1, 2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.gpu
def test_on_a_gpu():
    chosen = ["--shape", "small", "--device", "cuda", "--budget", "keep:0.5", "--min-length", "1", "--json"]
    report = RewriteReport.from_json(json.loads(run("explain", *chosen, "--length", "8K").stdout)["report"])
    assert report.sparse == 4 and {row.dtype for row in report} == {"bfloat16"}
    done = run("bench", *chosen, "--lengths", "2K,4K", "--rounds", "2", "--compiler", "eager")
    assert done.stderr == "" and all(row["peak_gib"] > 0 for row in json.loads(done.stdout)["rows"])


@pytest.fixture(scope="module")
def installed():
    path = shutil.which("tsa-compile", path=sysconfig.get_path("scripts"))
    assert path, "the package is installed without its command: install it again"
    return path


def test_the_installed_command_fails_in_one_line(installed, tmp_path):
    done = subprocess.run([installed, "explain", "nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no folder 'nowhere'") and done.stderr.count("\n") == 1


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_the_installed_command_is_interrupted(installed, tmp_path, request):
    """Ctrl-C while it works, which the spinner on stderr shows (TTY_COMPATIBLE: as if that were a terminal)."""
    environment = {**os.environ, "TTY_COMPATIBLE": "1", "COLUMNS": "200"}
    command = [installed, "explain", "--shape", "llama-3.1-70b", "--json"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # Jobs in a shell's background ignore the signal, and would hand that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        seen = b""
        while b"Tracing" not in seen:
            seen += process.stderr.read(1) or pytest.fail(seen.decode())
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    assert process.returncode == errors.INTERRUPTED, rest.decode()
    assert out == b"" and b"interrupted" in rest and b"Traceback" not in rest
