"""benchmarks/export.py and onnx_files.py at a tiny size on the CPU; what the C++ program prints is read in test_aoti.py."""

import contextlib
import io
import json
import subprocess
import traceback
from pathlib import Path

import pytest
import torch

from tsa_compile.export import aoti

from ..support import script

FILE = Path(__file__).parents[2] / "benchmarks" / "export.py"
OPTIONS = ["--shape", "tiny", "--lengths", "96", "160", "--device", "cpu", "--layers", "2", "--repeats", "2"]


@pytest.fixture
def benchmark(monkeypatch):
    """With graphs run as they are in Python, and the program in the package's place: neither is what this test is about."""
    module, programs = script(FILE), []
    make_config = module.make_config

    def save(program, path):
        programs.append(program.module())
        path.write_bytes(bytes(2**19))
        return path

    monkeypatch.setattr(module, "make_config", lambda arguments: make_config(arguments).replace(compiler="eager"))
    monkeypatch.setattr(module, "build_program", lambda folder: folder)
    monkeypatch.setattr(aoti, "save", save)

    def run_package(program, package, rows, arguments):
        (loaded,), lines = programs, ["loaded_ms 1500"]
        for row in rows:
            case = torch.load(row["case"])
            gap = (loaded(input_ids=case["inputs"][0]) - case["outputs"][0]).abs().max() / case["outputs"][0].abs().max()
            lines += [f"{row['case']} [1, {row['length']}] max error {float(gap)}", "times_ms 2.0 4.0 3.0"]
        return module.read_output("\n".join(lines), rows)

    monkeypatch.setattr(module, "run_package", run_package)
    return module


@pytest.mark.exhaustive
@pytest.mark.usefixtures("fresh")
def test_measures_and_writes(benchmark, tmp_path, capsys):
    assert benchmark.main([*OPTIONS, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "export.json").read_text())
    assert found["conditions"]["device"] == "cpu" and found["package"]["load_s"] == 1.5
    assert found["package"]["size_mib"] == 0.5 and "1 of 2 attention calls sparse" in found["package"]["report"]
    assert [(row["length"], row["package_ms"], row["package_range_ms"]) for row in found["rows"]] == [
        (96, 3.0, [2.0, 4.0]), (160, 3.0, [2.0, 4.0]),
    ]  # fmt: skip
    assert all(
        row["error"] < 1e-4 and row["ratio"] == pytest.approx(3 / row["compiled_ms"], rel=1e-2) for row in found["rows"]
    )
    assert "| 160 | 3.00 ms |" in (tmp_path / "export.md").read_text()
    assert "| 96 | 3.00 ms |" in capsys.readouterr().out


def test_output_of_another_kind_ends_it():
    with pytest.raises(SystemExit, match="something else than 2 cases"):
        script(FILE).read_output("loaded_ms 3\ntimes_ms 1\na max error 0.1", [{}, {}])


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--lengths", "96"], "at least two different lengths"), (["--device", "cuda"], "needs a CUDA device")],
)
def test_command_line(options, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script(FILE).main([*OPTIONS, *options])
    assert said in capsys.readouterr().err


def only_one_process(files, run=subprocess.run):
    """`subprocess.run` for onnx_files.py: its first child is a process, which imports torch for seconds; the others are
    calls of the same `main`."""
    known = []

    def run_child(command, **options):
        known.append(command)
        if len(known) == 1:
            return run(command, **options)
        said, failed, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
            try:
                code = files.main(command[2:])
            except (Exception, SystemExit):  # noqa: BLE001 the parent reads it, as it reads that of a process
                code = 1
                traceback.print_exc()
        return subprocess.CompletedProcess(command, code, said.getvalue(), failed.getvalue())

    return run_child


@pytest.mark.exhaustive
@pytest.mark.usefixtures("fresh")
def test_files_are_run_and_refusals_told(monkeypatch, tmp_path):
    """As on a GPU, where float16 takes float32's place; the graph that is held against it runs as it is in Python."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.syspath_prepend(FILE.parent)
    files = script(FILE.with_name("onnx_files.py"))
    configurations = files.configurations
    monkeypatch.setattr(
        files, "configurations",
        lambda arguments: {name: config.replace(compiler="eager") for name, config in configurations(arguments).items()},
    )  # fmt: skip
    monkeypatch.setattr(files.subprocess, "run", only_one_process(files))
    assert files.main([*OPTIONS, "--floor", "8", "2", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "onnx_files.json").read_text())["rows"]
    assert {(row["form"], row["length"]) for row in rows} == {
        (form, length) for form in ("dense", "sparse") for length in (96, 160)
    }
    by_runtime = {name: [row for row in rows if row["runtime"] == name] for name in ("onnxruntime", "TensorRT-RTX")}
    assert all(row["error"] < 1e-4 and row["ms"] > 0 and row["elsewhere"] == {} for row in by_runtime["onnxruntime"])
    refusals = [row["said"] for row in by_runtime["TensorRT-RTX"] if row["failed"] == "build"]
    assert len(refusals) == 4 and all("is not installed" in said or "no kernel for attention" in said for said in refusals)


def test_operators_that_ran_elsewhere_are_told(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FILE.parent)
    nodes = [("MatMul", "GPU", 5000), ("Attention", "CPU", 2000), ("Shape", "CPU", 10), ("Attention", "CPU", 1000)]
    events = [
        {"cat": "Node", "dur": took, "args": {"op_name": name, "provider": provider}} for name, provider, took in nodes
    ]
    (tmp_path / "profile.json").write_text(json.dumps([{"cat": "Session", "dur": 9}, *events]))
    assert script(FILE.with_name("onnx_files.py")).not_by("GPU", tmp_path / "profile.json") == {
        "Attention": 3.0,
        "Shape": 0.01,
    }


def test_a_runtime_that_ends_early_is_a_row_with_the_step(monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    monkeypatch.syspath_prepend(FILE.parent)
    files = script(FILE.with_name("onnx_files.py"))
    torch.save({"inputs": {}, "output": torch.zeros(1), "cuda": False}, tmp_path / "case.pt")
    (tmp_path / "model.onnx").write_bytes(b"something else")
    row = files.in_child(files.by_onnxruntime, str(tmp_path / "model.onnx"), str(tmp_path / "case.pt"), "1")
    assert row["failed"] == "InferenceSession with CPUExecutionProvider" and "model.onnx" in row["said"]
    text = files.table([{"form": "dense", "length": 1024, "runtime": "onnxruntime", **row}])
    assert "| dense | 1,024 | onnxruntime | failed at InferenceSession with CPUExecutionProvider: " in text
