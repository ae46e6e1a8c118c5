"""A package run from C++ against torch.compile(backend="tsa") in Python: prefill of an 8B-shaped model with few layers.

Exports the model for a range of lengths, compiles an AOTInductor package (on CUDA of our Triton kernels), builds
examples/aoti_cpp and lets it load and run the package. Its outputs are compared with the compiled model's. Random weights,
so the figures are about time and size. Writes a table and a JSON file. The goal is a ratio of at most 1.03.

    python benchmarks/export.py --out benchmarks/results                     8K and 32K, 4 layers
    python benchmarks/export.py --shape tiny --lengths 96 160 --device cpu   a look at whether it runs
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsa_compile import KeepRatio, TSAConfig, reports
from tsa_compile.export import aoti, export_program
from tsa_compile.shapes import build, model_config, prompts

PROGRAM = Path(__file__).parents[1] / "examples" / "aoti_cpp"
SHAPES = {"8b": "llama-3.1-8b", "tiny": "tiny"}


class LastLogits(torch.nn.Module):
    """A causal language model that returns the last position's logits [B, 1, V] alone, as a prefill needs them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask, logits_to_keep=1, use_cache=False).logits


def build_model(arguments: argparse.Namespace) -> LastLogits:
    """Random weights, made where they stay; bfloat16 on CUDA."""
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    config = model_config(SHAPES[arguments.shape], arguments.layers)
    return LastLogits(build(config, arguments.device, dtype)).eval()


def make_config(arguments: argparse.Namespace) -> TSAConfig:
    """The upper half of the layers at a keep ratio, at every length of the range."""
    small = {"window": 16, "min_tokens": 16} if arguments.shape == "tiny" else {}
    return TSAConfig(budget=KeepRatio(arguments.keep), min_length=min(arguments.lengths), **small)


def inputs(arguments: argparse.Namespace, length: int) -> dict[str, Tensor]:
    """Random tokens [1, length], the same for the same length, and a mask of ones if asked for."""
    ids = prompts(model_config(SHAPES[arguments.shape]), 1, length, arguments.device, seed=length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if arguments.masked else {"input_ids": ids}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds with the device's work."""
    started = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def export(model: LastLogits, arguments: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The package, and what it cost."""
    lengths = (min(arguments.lengths), max(arguments.lengths))
    example = inputs(arguments, lengths[0])
    form = "triton" if arguments.device == "cuda" else "aten"
    config = make_config(arguments)
    program, export_s = timed(lambda: export_program(model, example, config, dynamic_lengths=lengths, lower=form))
    sparse = reports()[-1].summary
    package, compile_s = timed(lambda: aoti.save(program, folder / "model.pt2"))
    size = Path(package).stat().st_size
    row = {"export_s": round(export_s, 1), "compile_s": round(compile_s, 1), "size_mib": round(size / 2**20, 1)}
    return Path(package), row | {"report": sparse}


def run_compiled(model: LastLogits, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """torch.compile's times, and its outputs as the cases that the C++ program is held against."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="tsa", options={"config": make_config(arguments)}, dynamic=True)
    rows = []
    for length in arguments.lengths:
        given = inputs(arguments, length)
        call = functools.partial(compiled, **given)
        expected, first_s = timed(call)
        times = [1e3 * timed(call)[1] for _ in range(arguments.repeats)]
        path = folder / f"case_{length}.pt"
        torch.save({"inputs": list(given.values()), "outputs": [expected.clone()]}, path)
        rows.append({"length": length, "case": str(path), "compiled_ms": times, "first_call_s": round(first_s, 1)})
    return rows


def build_program(folder: Path) -> Path:
    """examples/aoti_cpp, by cmake or, where there is none, by the C++ compiler itself."""
    root = Path(torch.__file__).parent
    target = folder / "run_package"
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("cmake"):
        _run(["cmake", "-S", str(PROGRAM), "-B", str(folder), f"-DTORCH_ROOT={root}", "-DCMAKE_BUILD_TYPE=Release"])
        _run(["cmake", "--build", str(folder)])
        return target
    cuda = ["-Wl,--no-as-needed", "-ltorch_cuda", "-lc10_cuda"] if (root / "lib" / "libtorch_cuda.so").exists() else []
    headers = [f"-isystem{root / 'include' / part}" for part in ("", "torch/csrc/api/include")]
    libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", *cuda]
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("neither cmake nor a C++ compiler (c++, g++, clang++) was found: install one")
    _run([compiler, "-std=c++20", "-O2", *headers, str(PROGRAM / "main.cpp"), "-o", str(target), *libraries])
    return target


def _run(command: list[str], allowed: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in allowed:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def run_package(program: Path, package: Path, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> float:
    """Adds the C++ program's times and errors to the rows; returns the seconds that loading took."""
    cases = [row["case"] for row in rows]
    options = ["--time", str(arguments.repeats), "--tolerance", str(arguments.tolerance)]
    return read_output(_run([str(program), *options, str(package), *cases], allowed=(0, 1)), rows)


def read_output(text: str, rows: list[dict[str, Any]]) -> float:
    """What the C++ program printed, by length."""
    lines = text.splitlines()
    errors = [float(line.rsplit(" ", 1)[1]) for line in lines if " max error " in line]
    times = [[float(number) for number in line.split()[1:]] for line in lines if line.startswith("times_ms")]
    loaded = [float(line.split()[1]) for line in lines if line.startswith("loaded_ms")]
    if not len(errors) == len(times) == len(rows) or len(loaded) != 1:
        raise SystemExit(f"the C++ program printed something else than {len(rows)} cases:\n{text}")
    for row, error, found in zip(rows, errors, times, strict=True):
        row.update(error=error, package_ms=found)
    return loaded[0] / 1e3


def summarise(rows: list[dict[str, Any]]) -> None:
    """Medians, and their ratio."""
    for row in rows:
        del row["case"]
        for name in ("compiled_ms", "package_ms"):
            times = row.pop(name)
            row[name] = round(statistics.median(times), 3)
            row[name.replace("_ms", "_range_ms")] = [round(min(times), 3), round(max(times), 3)]
        row["ratio"] = round(row["package_ms"] / row["compiled_ms"], 4)


def table(package: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    made = f"Export {package['export_s']} s, compilation {package['compile_s']} s"
    lines = [
        f"{made}; package {package['size_mib']:,} MiB, loaded by C++ in {package['load_s']} s.",
        "",
        '| length | package from C++ | torch.compile(backend="tsa") | ratio | largest difference |',
        "|---|---|---|---|---|",
    ]
    for row in rows:
        length = f"{row['length'] / 1024:g}K" if row["length"] >= 1024 else str(row["length"])
        times = f"{row['package_ms']:.2f} ms | {row['compiled_ms']:.2f} ms | {row['ratio']:.3f}"
        lines.append(f"| {length} | {times} | {row['error']:.1e} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--keep", type=float, default=0.5, help="share of the tokens that sparse layers keep")
    parser.add_argument("--masked", action="store_true", help="pass an attention_mask of ones")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tolerance", type=float, default=0.05, help="largest difference relative to the largest logit")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, help="folder for export.json and export.md")
    found = parser.parse_args(arguments)
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device; --device cpu --shape tiny shows whether it runs")
    if len(set(found.lengths)) < 2:
        parser.error("--lengths takes at least two different lengths: the package is exported for the range between them")
    return found


def main(given: list[str] | None = None) -> int:
    """Measures, prints and writes; 1 where outputs differ."""
    arguments = parse(given)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        model = build_model(arguments)
        rows = run_compiled(model, arguments, folder)
        path, package = export(model, arguments, folder)
        del model
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
        package["load_s"] = round(run_package(build_program(folder / "build"), path, rows, arguments), 2)
    summarise(rows)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    conditions = {
        "device": device, "torch": torch.__version__, "shape": arguments.shape, "layers": arguments.layers,
        "keep": arguments.keep, "masked": arguments.masked, "repeats": arguments.repeats,
    }  # fmt: skip
    text = table(package, rows)
    print(f"{json.dumps(conditions)}\n\n{text}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        found = {"conditions": conditions, "package": package, "rows": rows}
        (arguments.out / "export.json").write_text(json.dumps(found, indent=2) + "\n")
        (arguments.out / "export.md").write_text(f"{conditions}\n\n{text}\n")
    wrong = [row["length"] for row in rows if not row["error"] < arguments.tolerance]
    if wrong:
        print(f"outputs differ by more than {arguments.tolerance} at {wrong}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
