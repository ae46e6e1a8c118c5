"""ONNX files in standard operators on a GPU: onnxruntime's CUDA provider and TensorRT-RTX against torch.compile.

Exports an 8B-shaped model with few layers in float16, dense and sparse with a floor, for a range of lengths. Each file is
run by onnxruntime and, as an engine, by TensorRT-RTX; outputs are held against torch.compile(backend="tsa"), with times and
memory. A runtime that does not get that far is a row with the step that failed and what it said: TensorRT-RTX, for one, has
no engines for Hopper. Random weights, so the figures are about time and memory. Writes a table and a JSON file.

    python benchmarks/onnx_files.py --out benchmarks/results                     8K and 32K, 2 layers
    python benchmarks/onnx_files.py --shape tiny --lengths 96 160 --device cpu   a look at whether it runs

Needs the packages onnx, onnxscript and onnxruntime-gpu, and for engines tensorrt-rtx-cu13-bindings and -libs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from export import SHAPES, build_model, inputs, timed
from torch import Tensor

from tsa_compile import Floor, KeepRatio, TSAConfig
from tsa_compile.export import export_program, onnx, tensorrt

Row = dict[str, Any]


def configurations(arguments: argparse.Namespace) -> dict[str, TSAConfig]:
    """By name; sparse in the upper half of the layers."""
    small = {"window": 16, "min_tokens": 16} if arguments.shape == "tiny" else {}
    sparse = TSAConfig(budget=KeepRatio(arguments.keep), floor=Floor(*arguments.floor), min_length=1, **small)
    return {"dense": sparse.replace(layers=[]), "sparse": sparse}


def by_torch(model: torch.nn.Module, config: TSAConfig, given: dict[str, Tensor], repeats: int) -> tuple[Tensor, float]:
    """The compiled model's output and its median time in ms."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="tsa", options={"config": config})
    output, _ = timed(lambda: compiled(**given))
    return output, statistics.median(1e3 * timed(lambda: compiled(**given))[1] for _ in range(repeats))


def used_mib() -> float:
    """Memory in use on the GPU, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def in_child(steps: Callable[..., None], *arguments: str) -> Row:
    """Runs a function of this file in a process of its own: what it printed last, or the step at which it ended."""
    command = [sys.executable, __file__, "--child", steps.__name__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    lines = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("row ")]
    row = lines[-1] if lines else {"step": "start"}
    if done.returncode:
        said = " ".join((done.stderr.strip().splitlines() or ["nothing"])[-4:])
        return {"failed": row["step"], "status": done.returncode, "said": said[-600:]}
    return row


def say(**row: Any) -> None:
    """What the parent reads: the step that begins, or the result."""
    print("row", json.dumps(row), flush=True)


def by_onnxruntime(file: str, case: str, repeats: str) -> None:
    """In a child: a session on the GPU, on tensors that stay there."""
    say(step="import onnxruntime")
    import onnxruntime

    saved = torch.load(case)
    device = "cuda" if saved["cuda"] else "cpu"
    provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device]
    torch.zeros(1, device=device)
    before = used_mib() if device == "cuda" else 0.0
    say(step=f"InferenceSession with {provider}")
    if device == "cuda":
        onnxruntime.preload_dlls()  # CUDA's libraries, from the packages that torch's are in
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(Path(case).with_suffix(""))
    session = onnxruntime.InferenceSession(file, options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise SystemExit(f"{provider} was not taken: {onnxruntime.get_available_providers()}")
    say(step="run")
    binding = session.io_binding()
    for name, tensor in saved["inputs"].items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy(), device))
    binding.bind_output(session.get_outputs()[0].name, device)
    session.run_with_iobinding(binding)
    elsewhere = not_by(provider, Path(session.end_profiling()))
    got = torch.from_numpy(binding.copy_outputs_to_cpu()[0])
    times = []
    for _ in range(int(repeats)):
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        times.append(1e3 * (time.perf_counter() - started))
    memory = used_mib() - before if device == "cuda" else None
    error = relative_error(got, saved["output"])
    say(ms=statistics.median(times), memory_mib=memory, error=error, elsewhere=elsewhere)


def not_by(provider: str, profile: Path) -> dict[str, float]:
    """The milliseconds of operators that another provider than the one asked for ran in a profile, the longest first."""
    found: dict[str, float] = {}
    for event in json.loads(profile.read_text()):
        ran = event.get("args", {})
        if event.get("cat") == "Node" and ran.get("provider", provider) != provider:
            found[ran["op_name"]] = round(found.get(ran["op_name"], 0.0) + event["dur"] / 1e3, 3)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def by_tensorrt(engine: str, case: str, repeats: str) -> None:
    """In a child: an engine, call by call."""
    say(step="import tensorrt_rtx_bindings")
    import tensorrt_rtx_bindings as rtx

    saved = torch.load(case)
    before = used_mib()
    say(step="Runtime")
    runtime = rtx.Runtime(rtx.Logger(rtx.Logger.WARNING))
    say(step="Runtime.deserialize_cuda_engine")
    loaded = runtime.deserialize_cuda_engine(Path(engine).read_bytes())
    if loaded is None:
        raise SystemExit("deserialize_cuda_engine gave None")
    say(step="ICudaEngine.create_execution_context")
    context = loaded.create_execution_context()
    if context is None:
        raise SystemExit("create_execution_context gave None")
    given = {name: tensor.cuda() for name, tensor in saved["inputs"].items()}
    for name, tensor in given.items():
        say(step=f"IExecutionContext.set_input_shape({name!r})")
        if not context.set_input_shape(name, tuple(tensor.shape)):
            raise SystemExit("set_input_shape gave False")
        context.set_tensor_address(name, tensor.data_ptr())
    (name,) = [
        loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors) if loaded.get_tensor_name(index) not in given
    ]
    output = torch.empty(saved["output"].shape, dtype=saved["output"].dtype, device="cuda")
    context.set_tensor_address(name, output.data_ptr())
    stream = torch.cuda.Stream()

    def run() -> None:
        if not context.execute_async_v3(stream.cuda_stream):
            raise SystemExit("execute_async_v3 gave False")
        stream.synchronize()

    say(step="IExecutionContext.execute_async_v3")
    run()
    times = [1e3 * timed(run)[1] for _ in range(int(repeats))]
    error = relative_error(output.cpu(), saved["output"])
    say(ms=statistics.median(times), memory_mib=used_mib() - before, error=error)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected number."""
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """A row for each form, length and runtime, as soon as it is measured."""
    model = build_model(arguments).to(torch.float16 if arguments.device == "cuda" else torch.float32)
    span = (min(arguments.lengths), max(arguments.lengths))
    files: list[tuple[str, Path]] = []
    for form, config in configurations(arguments).items():
        path = folder / f"{form}.onnx"
        onnx.save(export_program(model, inputs(arguments, span[0]), config, dynamic_lengths=span), path)
        files.append((form, path))
        for length in arguments.lengths:
            given = inputs(arguments, length)
            output, ms = by_torch(model, config, given, arguments.repeats)
            yield {"form": form, "length": length, "runtime": "torch.compile", "ms": ms}
            case = {name: tensor.cpu() for name, tensor in given.items()}
            saved = {"inputs": case, "output": output.cpu(), "cuda": arguments.device == "cuda"}
            torch.save(saved, folder / f"{form}-{length}.pt")
    del model
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    repeats = str(arguments.repeats)
    cases = [
        (form, path, length, str(folder / f"{form}-{length}.pt")) for form, path in files for length in arguments.lengths
    ]
    for form, path, length, case in cases:
        row = {"form": form, "length": length, "runtime": "onnxruntime"}
        yield row | in_child(by_onnxruntime, str(path), case, repeats)
    built: dict[str, Row] = {}
    for form, path, length, case in cases:
        if form in arguments.engines:
            engine = path.with_suffix(".engine")
            if form not in built:
                built[form] = build_engine(path)
            ran = in_child(by_tensorrt, str(engine), case, repeats) if engine.exists() else {}
            yield {"form": form, "length": length, "runtime": "TensorRT-RTX", **built[form], **ran}


def build_engine(path: Path) -> Row:
    """Builds an engine beside a file, if not for this GPU then for one that the library knows; the seconds, and refusals."""
    refused = {}
    for capabilities in ((), ("8.9",)):
        started = time.perf_counter()
        try:
            tensorrt.build(path, path.with_suffix(".engine"), capabilities=capabilities)
        except (ValueError, ImportError) as error:
            refused[" ".join(capabilities) or "any"] = str(error)[:600]
            continue
        return {"build_s": round(time.perf_counter() - started, 1), "refused": refused}
    return {"failed": "build", "said": json.dumps(refused)}


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| form | length | runtime | time | memory | largest difference | run on the CPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['form']} | {row['length']:,} | {row['runtime']} |"
        if "failed" in row:
            lines.append(f"{head} failed at {row['failed']}: {row['said'].replace('|', '/')} | | | |")
            continue
        memory = "" if row.get("memory_mib") is None else f"{row['memory_mib']:,.0f} MiB"
        error = "" if "error" not in row else f"{row['error']:.1e}"
        elsewhere = ", ".join(list(row.get("elsewhere", {}))[:4])
        lines.append(f"{head} {row['ms']:.2f} ms | {memory} | {error} | {elsewhere} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--keep", type=float, default=0.3, help="share of the tokens that sparse layers keep")
    parser.add_argument("--floor", type=int, nargs=2, default=(256, 16), metavar=("WINDOW", "SINKS"))
    parser.add_argument("--masked", action="store_true", help="pass an attention_mask of ones")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--engines", nargs="*", choices=["dense", "sparse"], default=["dense", "sparse"], help="forms that TensorRT-RTX gets"
    )
    parser.add_argument("--out", type=Path, help="folder for onnx_files.json and onnx_files.md")
    found = parser.parse_args(arguments)
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device; --device cpu --shape tiny shows whether it runs")
    if len(set(found.lengths)) < 2:
        parser.error("--lengths takes at least two different lengths: a file is exported for the range between them")
    return found


def main(given: list[str] | None = None) -> int:
    """Measures, prints and writes."""
    given = sys.argv[1:] if given is None else given
    if given[:1] == ["--child"]:
        {"by_onnxruntime": by_onnxruntime, "by_tensorrt": by_tensorrt}[given[1]](*given[2:])
        return 0
    arguments = parse(given)
    conditions = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu", "torch": torch.__version__,
        **{name: getattr(arguments, name) for name in ("shape", "layers", "keep", "floor", "masked", "repeats")},
    }  # fmt: skip
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        for row in measure(arguments, Path(name)):
            rows.append(row)
            if arguments.out is not None:
                write(arguments.out, conditions, rows)
    print(f"{json.dumps(conditions)}\n\n{table(rows)}")
    return 0


def write(folder: Path, conditions: Row, rows: list[Row]) -> None:
    """What has been measured so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "onnx_files.json").write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=2) + "\n")
    (folder / "onnx_files.md").write_text(f"{conditions}\n\n{table(rows)}\n")


if __name__ == "__main__":
    sys.exit(main())
