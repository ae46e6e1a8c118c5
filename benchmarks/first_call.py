"""How long the first prompt takes, with compilation: a whole prompt, and the same prompt in chunks, on a GPU.

    python benchmarks/first_call.py --layers 8 --modes exact --out benchmarks/results
    python benchmarks/first_call.py --layers 32 --modes sparse --out benchmarks/results --resume

A model of Llama-3.1-8B's shape with random weights reads one prompt twice, with a mask of ones and through a new
DynamicCache. The first time includes tracing, rewriting and compiling. Each figure is from a process of its own, with empty
caches of compiled code, and forms take turns. Seconds are those of the clock, from the call to its result. Writes
first-call.json and first-call.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FORMS = {
    "whole": "the whole prompt, regional=False",
    "regional": "the whole prompt, regional=True",
    "chunks": "in chunks, prefill(dynamic=True)",
    "chunks-apart": "in chunks, prefill(dynamic=True), regional=False",
}
REGIONAL = {"whole": False, "regional": True, "chunks": None, "chunks-apart": False}


def prompt_of(model: Any, form: str, config: Any, length: int, chunk: int) -> Callable[[], Any]:
    """Compiles a model in one form; the function that is returned reads the prompt, and compiles the first time."""
    import torch
    from prefill_chunks import prefill

    import tsa_compile

    config = config.replace(regional=REGIONAL[form])
    ids = torch.randint(1, model.config.vocab_size, (1, length), device=model.device)
    if form.startswith("chunks"):
        tsa_compile.prefill(model, config, dynamic=True)
        return lambda: prefill(model, model.config, ids, True, chunk)
    fast = torch.compile(model, backend="tsa", options={"config": config})
    return lambda: prefill(fast, model.config, ids, True, length)


def seconds(prompt: Callable[[], Any]) -> float:
    """Of one prompt, its work on the GPU included."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    prompt()
    wait()
    return time.perf_counter() - started


def measure(arguments: argparse.Namespace, form: str, mode: str, layers: int) -> Row:
    """The first prompt and the second one, in this process."""
    import torch
    from prefill import build_model, configuration

    from tsa_compile import TSAConfig, reports

    name = mode if mode == "exact" else str(TSAConfig().budget.ratio)
    model = build_model(layers)
    warm = torch.ones(1024, 1024, dtype=torch.bfloat16, device="cuda")
    warm @ warm  # the library's own start, which is no part of a compilation
    prompt = prompt_of(model, form, configuration(name, layers), arguments.length, arguments.chunk)
    with torch.no_grad():
        first, later = seconds(prompt), seconds(prompt)
    return {
        "form": form, "mode": name, "layers": layers, "length": arguments.length, "chunk": arguments.chunk,
        "first_s": round(first, 1), "later_ms": round(1e3 * later), "graphs": len(reports()),
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
    }  # fmt: skip


def measure_apart(arguments: argparse.Namespace, form: str, mode: str, layers: int) -> Row:
    """The same in a process of its own, without compiled code of any earlier one."""
    command = [sys.executable, "-P", __file__, "--one", form, "--modes", mode, "--layers", str(layers)]
    command += ["--length", str(arguments.length), "--chunk", str(arguments.chunk)]
    with tempfile.TemporaryDirectory(prefix="tsa-first-call-") as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder, "triton"))}
        paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, **caches, "PYTHONPATH": paths}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{form}, {mode}, {layers} layers failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def groups(rows: list[Row]) -> Iterator[list[Row]]:
    """The runs of one form, mode and number of layers."""
    keys = dict.fromkeys((row["layers"], row["mode"], row["form"]) for row in rows)
    for key in sorted(keys, key=lambda key: (key[0], key[1] != "exact", [*FORMS].index(key[2]))):
        yield [row for row in rows if (row["layers"], row["mode"], row["form"]) == key]


def table(rows: list[Row]) -> str:
    """Markdown: a line for each form, with the mean of its runs, and the shortest and the longest."""
    lines = ["| layers | mode | prompt | first time, s | runs, s | later, ms | graphs |", "|---|---|---|---|---|---|---|"]
    for found in groups(rows):
        times = [row["first_s"] for row in found]
        later, one = statistics.median(row["later_ms"] for row in found), found[0]
        mode = "exact" if one["mode"] == "exact" else f"keep {one['mode']} in the upper half"
        runs = f"{min(times)} to {max(times)}" if len(times) > 1 else "1 run"
        figures = f"{statistics.mean(times):.1f} | {runs} | {later:,.0f} | {one['graphs']}"
        lines.append(f"| {one['layers']} | {mode} | {FORMS[one['form']]} | {figures} |")
    return "\n".join(lines)


def text(rows: list[Row]) -> str:
    """The result's page."""
    one = rows[0]
    return (
        f"# First call\n\nA prompt of {one['length']:,} tokens, whole and in chunks of {one['chunk']:,}, read for the first "
        f"time and again ({one['device']}, torch {one['torch']}; `benchmarks/first_call.py`).\n\n{table(rows)}\n"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8])
    parser.add_argument("--modes", nargs="+", choices=["exact", "sparse"], default=["exact", "sparse"])
    parser.add_argument("--forms", nargs="+", choices=[*FORMS], default=[*FORMS])
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="add to the runs that are in --out already")
    parser.add_argument("--one", choices=[*FORMS], help="one form, in this process: what the others are started with")
    return parser.parse_args()


def main() -> None:
    """Measures, prints and writes after each run."""
    import torch

    arguments = parse()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; compile_time.py also runs on a CPU")
    if arguments.one is not None:
        print(json.dumps(measure(arguments, arguments.one, arguments.modes[0], arguments.layers[0])))
        return
    results = None if arguments.out is None else arguments.out / "first-call.json"
    rows: list[Row] = json.loads(results.read_text()) if arguments.resume and results and results.exists() else []
    for layers in arguments.layers:
        for mode in arguments.modes:
            for form in arguments.repeats * arguments.forms:
                rows.append(measure_apart(arguments, form, mode, layers))
                print(json.dumps(rows[-1]), flush=True)
                if results is not None:
                    results.write_text(json.dumps(rows, indent=2) + "\n")
                    results.with_suffix(".md").write_text(text(rows))
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
