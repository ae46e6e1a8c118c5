"""One layer's attention on a GPU: token sparse attention against dense attention and against its peers.

    python benchmarks/attention.py --out benchmarks/results              everything, in some three minutes on an H100
    python benchmarks/attention.py --parts main --lengths 8192 32768     a part of it

    main     by length and share kept: this package's op with the default floor, call by call and as a CUDA graph, and, as
             published, without; and dense cuDNN; at a share of 0.3 also the op's other forms and the paper's pipeline
             written plainly in torch; at a few lengths FlashAttention-2 and FlexAttention
    stages   each stage of the op alone: time on the GPU and in calls, what it achieves, and the device's ceiling
    shapes   other head sizes and numbers of heads, batches, float16
    attend   kernels over a number of rows that only the device knows
    behind   the last 8,192 rows of a prompt, as a chunk behind a cache computes them, against the whole prompt

Shares are those of KeepRatio with min_tokens 0: with the default 1024, 8K tokens would keep more than 0.08 of them. Inputs
are random with a few dominant tokens. Methods of one length take turns, times are medians, and ratios are to dense cuDNN in
the same run. Every output is checked before it is timed (attention_checks.py): a sample of its rows, selected ones and
others, against float64; without a floor, rows that were not selected against 0. The exit code is 1 if an output is wrong,
and 0 if a method could not run: then its cell says why. Progress goes to stderr, results to stdout and into --out as JSON,
Markdown and a figure.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch._inductor.config
from attention_behind import KEPT, ROWS, WHOLE, Behind, behind_methods
from attention_checks import TOLERANCE, WrongOutputError, check_output, demand, relative_difference
from attention_kernels import KERNELS, make_rows
from attention_methods import (
    DENSE,
    FLOOR,
    FORM_KEEP,
    MIN_TOKENS,
    SCORE,
    WINDOW,
    Inputs,
    Runner,
    Shape,
    compared,
    make_inputs,
    ours,
    ours_coverage,
)
from attention_report import TABLES, figure, report, size_of
from attention_stages import Sizes, Stage, Work, attention_flops, stages
from attention_timing import burst_ms, graph_ms, peak_of, take_turns
from torch import Tensor

log = logging.getLogger("attention")
Result = TypeVar("Result")
Row = dict[str, Any]
Candidate = tuple[Row, Callable[[Inputs], Runner]]
ROTATED_BYTES = 256 * 2**20
"""Inputs smaller than this, which the L2 cache (60 MB) may hold in part, come in three sets."""
SHAPES = (
    Shape(head_dim=64),
    Shape(heads=64),
    Shape(heads=16, head_dim=256),
    Shape(batch=4),
    Shape(dtype=torch.float16),
)
SHAPE_LENGTHS = (8192, 32768, 65536)
UNEVEN = Shape(batch=4, uneven=True), 32768
COUNTS = (16384, 65536)
SDPA = ("dense cuDNN", "dense FlashAttention-2")


class Run:
    """The rows of each part, and what went wrong."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.parts: dict[str, list[Row]] = {}
        self.failures: list[str] = []
        self.wrong: list[str] = []

    def attempt(self, what: str, call: Callable[[], Result]) -> Result | str:
        """The result, or why there is none; the run goes on."""
        try:
            return call()
        except WrongOutputError as error:
            log.error("%s: WRONG: %s", what, error)
            self.wrong.append(f"{what}: WRONG: {error}")
            return f"wrong output: {error}"
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0][:300]}"
            log.error("%s failed: %s", what, reason, exc_info=log.isEnabledFor(logging.DEBUG))
            self.failures.append(f"{what}: {reason}")
            return reason

    def add(self, part: str, what: str, row: Row, measure: Callable[[Any], Row], inputs: Any) -> None:
        """A row of a part: what `measure` finds, or why it failed."""
        found = self.attempt(what, functools.partial(measure, inputs))
        self.parts[part].append(row | ({"failed": found} if isinstance(found, str) else found))

    def measure(self, what: str, candidates: dict[Any, Candidate], sets: list[Inputs]) -> None:
        """Checks each candidate on every set of inputs and adds what is measured to its row, or why it failed."""
        runners: dict[Any, list[Runner]] = {}
        for key, (row, build) in candidates.items():
            checked = self.attempt(f"{what}, {row['method']}", functools.partial(prepare, build, sets, row))
            if isinstance(checked, str):
                row["failed"] = checked
            else:
                runners[key] = checked
        calls = {key: [runner.call for runner in found] for key, found in runners.items()}
        times = self.attempt(what, lambda: take_turns(calls, self.seconds) if calls else {})
        for key in runners:
            row = candidates[key][0]
            row |= {"failed": times} if isinstance(times, str) else times[key].row()


def prepare(build: Callable[[Inputs], Runner], sets: list[Inputs], row: Row) -> list[Runner]:
    """A method's runners on each set of inputs, checked; its memory, error and note go into the row."""
    runners, errors = [], []
    for inputs in sets:
        runner = build(inputs)
        runner.call()  # compiles, plans
        out, memory = peak_of(runner.call)
        errors.append(check_output(*inputs.tensors, out, inputs.scale, row["method"], runner.selected, runner.floor))
        if runner.twin is not None:
            twin = relative_difference(out, runner.twin())
            row["twin_difference"] = demand(twin, TOLERANCE[out.dtype], f"{row['method']} against the plain op")
        runners.append(runner)
        del out
    row |= {"memory_gib": None if "CUDA graph" in row["method"] else round(memory, 3), "error": max(errors)}
    if runner.selected is not None:
        mean = float(runner.selected.sum(dim=2).double().mean())
        row["kept"] = round((mean - WINDOW) / (sets[-1].length - WINDOW), 4)
    if runner.note:
        row["note"] = runner.note
    return runners


def input_sets(shape: Shape, length: int) -> list[Inputs]:
    """Several where one might be found in the cache."""
    return [make_inputs(shape, length) for _ in range(3 if shape.input_bytes(length) < ROTATED_BYTES else 1)]


def set_ratios(rows: list[Row], baselines: tuple[str, ...]) -> None:
    """Relates every time to the best of the baselines at the same length."""
    for row in rows:
        dense = [other["ms"] for other in rows if other["method"] in baselines and "ms" in other]
        row["ratio"] = round(row["ms"] / min(dense), 4) if dense and "ms" in row else None


def main_part(run: Run, arguments: argparse.Namespace, length: int) -> None:
    """Every method at one length."""
    candidates: dict[Any, Candidate] = {
        (name, keep): ({"length": length, "keep": keep, "method": name}, build)
        for name, keep, build in compared(length, arguments.keep)
    }
    run.measure(f"main {size_of(length)}", candidates, input_sets(Shape(), length))
    rows = [row for row, _ in candidates.values()]
    set_ratios(rows, ("dense cuDNN",))
    run.parts["main"] += rows
    log.info("main %s: ours %s of dense cuDNN", size_of(length), [r["ratio"] for r in rows if r["method"] == "ours"])


def stages_part(run: Run, arguments: argparse.Namespace, length: int) -> None:
    """Every stage at one length, and the op that runs them all."""
    what = f"stages {size_of(length)}"
    sets = input_sets(Shape(), length)
    per_set = [stages(inputs, FORM_KEEP) for inputs in sets]
    for alike in zip(*per_set, strict=True):
        run.add("stages", f"{what}, {alike[0].name}", {"length": length, "stage": alike[0].name}, stage_row, alike)
    run.add("stages", f"{what}, all", {"length": length, "stage": "all, as one op"}, whole_row, sets)
    log.info("%s done", what)


def stage_row(alike: tuple[Stage, ...]) -> Row:
    """A stage, checked, on each set of inputs: what it takes and achieves."""
    alike[0].check()
    times = two_times([stage.call for stage in alike])
    return times | {"work": achieved(alike[0].work, times["gpu_ms"] or times["ms"])}


def whole_row(sets: list[Inputs]) -> Row:
    """The same of the whole op, which the main part checks."""
    return two_times([ours(inputs, FORM_KEEP).call for inputs in sets])


def two_times(calls: list[Callable[[], Any]]) -> Row:
    """Milliseconds of an ordinary call, and of the GPU alone, None where it cannot be captured."""
    for call in calls:
        call()
    once = burst_ms(calls, 0, 1)
    row: Row = {"ms": round(take_turns({"": calls}, seconds=0.1)[""].ms, 4), "gpu_ms": None}
    try:
        row["gpu_ms"] = round(graph_ms(calls, once), 4)
    except RuntimeError as error:
        log.error("not capturable: %s", error, exc_info=log.isEnabledFor(logging.DEBUG))
    return row


def achieved(work: Work, ms: float) -> Row:
    """For JSON."""
    return {
        "gb": round(work.bytes / 1e9, 4), "gflop": round(work.flops / 1e9, 2), "unit": work.counted,
        "rate": round(work.rate(ms), 3), "ceiling": work.ceiling, "least_ms": round(work.least_ms, 4),
    }  # fmt: skip


def shapes_part(run: Run, arguments: argparse.Namespace, case: tuple[Shape, int]) -> None:
    """Ours against the best dense kernel for one other shape and length."""
    shape, length = case
    builders: dict[str, Callable[[Inputs], Runner]] = {name: DENSE[name] for name in SDPA}
    builders["ours"] = functools.partial(ours_coverage if shape.uneven else ours, keep=FORM_KEEP)
    candidates: dict[Any, Candidate] = {
        name: ({"shape": str(shape), "length": length, "method": name}, build) for name, build in builders.items()
    }
    run.measure(f"shapes {shape}, {size_of(length)}", candidates, input_sets(shape, length))
    rows = [row for row, _ in candidates.values()]
    set_ratios(rows, SDPA)
    run.parts["shapes"] += rows
    log.info("shapes %s, %s: ours %s of the best dense", shape, size_of(length), rows[-1]["ratio"])


def attend_part(run: Run, arguments: argparse.Namespace, count: int) -> None:
    """Kernels that read a count on the device which is half of their rows; TFLOP/s of 2 H n^2 D operations."""
    shape = Shape()
    rows = make_rows(shape, count, 2 * count)
    device_count = torch.tensor([count], dtype=torch.int32, device="cuda")
    found: list[Row] = []
    calls: dict[str, list[Callable[[], Any]]] = {}
    for name, build in KERNELS.items():
        found.append({"count": count, "kernel": name})
        call = run.attempt(f"attend {count}, {name}", functools.partial(checked_kernel, build, rows, device_count, name))
        if isinstance(call, str):
            found[-1]["failed"] = call
        else:
            calls[name] = [call]
    times = take_turns(calls, run.seconds) if calls else {}
    flops = attention_flops(Sizes(1, shape.heads, shape.heads, 2 * count, count, shape.head_dim, 2))
    for row in found:
        if row["kernel"] in times:
            timing = times[row["kernel"]]
            row |= timing.row() | {"tflops": round(flops / timing.ms / 1e9, 1)}
    run.parts["attend"] += found
    log.info("attend %s: TFLOP/s %s", size_of(count), {row["kernel"]: row.get("tflops") for row in found})


def checked_kernel(
    build: Callable[[Inputs, Tensor], Callable[[], Tensor]], rows: Inputs, count: Tensor, name: str
) -> Callable[[], Tensor]:
    """A kernel's call, after its rows before count were held against float64."""
    call, valid = build(rows, count), int(count)
    inputs = (tensor[:, :, :valid] for tensor in rows.tensors)
    check_output(*inputs, call()[:, :, :valid], rows.scale, name)
    return call


def behind_part(run: Run, arguments: argparse.Namespace, length: int) -> None:
    """Chunks of a prompt of one length: TFLOP/s, also relative to those of the whole prompt in the same run."""
    found = behind_methods(make_inputs(Shape(), length), FORM_KEEP)
    rows: list[Row] = [{"length": length, "rows": ROWS, "method": method.name} for method in found]
    calls: dict[str, list[Callable[[], Any]]] = {}
    for method, row in zip(found, rows, strict=True):
        error = run.attempt(f"behind {size_of(length)}, {method.name}", method.check)
        row |= {"failed": error} if isinstance(error, str) else {"error": error}
        if not isinstance(error, str):
            calls[method.name] = [method.call]
    times = take_turns(calls, run.seconds) if calls else {}
    for method, row in zip(found, rows, strict=True):
        if method.name in times:
            row |= times[method.name].row() | rates(method, times[method.name].ms)
    whole = rows[[method.name for method in found].index(WHOLE)].get("tflops")
    for row in rows:
        if whole is not None and row.get("tflops"):
            row["of_whole"] = round(row["tflops"] / whole, 3)
    run.parts["behind"] += rows
    log.info("behind %s: %s", size_of(length), [row.get("model_rate") for row in rows if row["method"] == KEPT])


def rates(method: Behind, ms: float) -> Row:
    """What a method achieves; by the cost model, the share of dense attention's rate."""
    if not method.flops:
        return {}
    return {"tflops": round(method.flops / ms / 1e9, 1), "model_rate": round(method.model_ms / ms, 3)}


Part = Callable[[Run, argparse.Namespace, Any], None]


def parts(arguments: argparse.Namespace) -> dict[str, tuple[Part, list[Any]]]:
    """Of each part the function and the cases that it is called with."""
    return {
        "main": (main_part, arguments.lengths),
        "stages": (stages_part, arguments.lengths),
        "shapes": (shapes_part, [*itertools.product(SHAPES, SHAPE_LENGTHS), UNEVEN]),
        "attend": (attend_part, COUNTS),
        "behind": (behind_part, [length for length in arguments.lengths if length > ROWS]),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.08, 0.15, 0.3, 0.5], help="shares kept")
    parser.add_argument("--seconds", type=float, default=0.3, help="measure each method for about this long")
    parser.add_argument("--verbose", action="store_true", help="show where a method failed")
    parser.add_argument("--out", type=Path, help="folder for the results: JSON, Markdown and a figure")
    parser.add_argument("--name", default="attention", help="what the result files are called")
    return parser.parse_args(argv)


def describe() -> Row:
    """What the run was made on."""
    import triton

    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(), "shape": str(Shape()), "floor": str(FLOOR), "score": SCORE,
        "min_tokens": MIN_TOKENS,
    }  # fmt: skip


def write(results: Path, run: Run, conditions: Row, text: str) -> None:
    """JSON, Markdown and, of the main part, the figure: `results` with three suffixes."""
    results.parent.mkdir(parents=True, exist_ok=True)
    found = {"conditions": conditions, **run.parts, "failures": run.failures, "wrong": run.wrong}
    results.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    results.with_suffix(".md").write_text(text + "\n")
    if run.parts.get("main"):
        title = f"One layer's attention on one {conditions['device']}"
        run.attempt("figure", lambda: figure(run.parts["main"], results.with_suffix(".png"), title))


def main() -> int:
    """Measures, prints and writes; the exit code."""
    arguments = parse()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    log.setLevel(logging.DEBUG if arguments.verbose else logging.INFO)
    log.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(relativeCreated)7d ms  %(message)s"))
    log.addHandler(handler)
    # Otherwise FlexAttention starts processes that compile, and they take the host's time from what is measured meanwhile.
    torch._inductor.config.compile_threads = 1
    torch.manual_seed(0)
    run = Run(arguments.seconds)
    with torch.no_grad():
        for name, (part, cases) in parts(arguments).items():
            run.parts[name] = []
            for case in cases if name in arguments.parts else []:
                run.attempt(f"{name} {case}", functools.partial(part, run, arguments, case))
                torch.cuda.empty_cache()
    conditions, problems = describe(), run.wrong + run.failures
    text = report(conditions, run.parts, problems)
    print(text)
    if arguments.out is not None:
        write(arguments.out / arguments.name, run, conditions, text)
    log.info("%d wrong outputs, %d failures%s", len(run.wrong), len(run.failures), "".join("\n  " + p for p in problems))
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
