"""The accuracy study: dense, token sparse and control methods on retrieval tasks that a small model has learned.

    python benchmarks/accuracy/study.py --model benchmarks/accuracy/model --out benchmarks/results
    python benchmarks/accuracy/study.py --model benchmarks/accuracy/model --quick         a look: minutes on a CPU

accuracy.json is written after every cell, accuracy.md and, with matplotlib, accuracy.png at the end of every call. The same
command goes on where a call was stopped; `--minutes 8` stops by itself, between two methods; `--render` runs nothing and
writes tables and figure of the JSON file again.

The negative control: the layers whose representations drift most. (A model with a token shift retrieves in them. Its upper
half loses nothing, whatever it keeps, as random-keep-0.5 shows, and this is the test of the selection.)

    python benchmarks/accuracy/study.py --model .. --out .. --name accuracy_lower --layers 0 1 2 3

Whether it is the scoring window that loses needles (accuracy_window, half an hour on two CPU cores):

    python benchmarks/accuracy/study.py --model .. --out .. --name accuracy_window --lengths 1024 --samples 256 \\
        --no-stress --dtype float32 --batch-tokens 16384 --methods dense keep-0.5 keep-0.5@8 keep-0.5@32 rescue-keep-0.5

Two GPUs take some of the lengths each, under two names:

    CUDA_VISIBLE_DEVICES=0 python benchmarks/accuracy/study.py --model .. --out part --name long --lengths 16384 &
    CUDA_VISIBLE_DEVICES=1 python benchmarks/accuracy/study.py --model .. --out part --name short --lengths 4096 8192
    python benchmarks/accuracy/study.py --join part/long.json part/short.json --out benchmarks/results

The order of work makes early results useful:

    1. dense, the published coverage and half of the tokens, at all lengths, the question last
    2. the other budgets and the negative controls
    3. times: attention in the model's own graph, and the prefill compiled by Inductor
    4. the stress test: the question lies before the scoring window

On one H100 131,072 tokens take 58 ms at 4K and 85 ms at 16K (15M parameters, op by op): a method takes 100 s for six tasks
at three lengths, the first part 5 minutes, all of it 40.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_checkpoint

from tsa_compile.errors import TSAError
from tsa_compile.evaluation.methods import STANDARD
from tsa_compile.evaluation.results import Study
from tsa_compile.evaluation.study import LENGTHS, evaluate
from tsa_compile.evaluation.tasks import TASKS
from tsa_compile.evaluation.timing import add_times

FIRST = 3  # methods of the first table
THREADS = 4  # of the CPU, which makes small samples: with 32 in each of two processes a batch took 160 instead of 58 ms
# Does selection fail where the scoring window sees no question, and is what it drops the reason? These show it.
STRESS = ("dense", "coverage-0.005", "keep-0.5", "coverage-0.01", "random-keep-0.5", "rescue-keep-0.5")
QUICK = dict(lengths=[512], samples=32, methods=["dense", "coverage-0.01", "keep-0.5", "random-keep-0.5"])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model of transformers")
    parser.add_argument("--out", type=Path, help="folder for the results; nothing is kept without it")
    parser.add_argument("--name", default="accuracy", help="what the result files are called")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(STANDARD), help="the most interesting first")
    parser.add_argument("--samples", type=int, default=1000, help="for each method, task and length")
    parser.add_argument("--layers", type=int, nargs="+", help="the sparse layers; the upper half if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=2**17, help="tokens that run at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--no-stress", action="store_true", help="leave the stress test out")
    parser.add_argument("--no-times", action="store_true", help="leave the times out, which need a GPU to mean something")
    parser.add_argument("--minutes", type=float, help="begin nothing more after so many, and write what there is")
    parser.add_argument("--quick", action="store_true", help=f"few samples and methods: {QUICK}")
    parser.add_argument("--render", action="store_true", help="run nothing: write tables and figure of results in --out")
    parser.add_argument("--join", type=Path, nargs="+", metavar="FILE", help="run nothing: make one study in --out of parts")
    found = parser.parse_args(arguments)
    ready = found.render or found.join
    if found.model is None and not ready:
        parser.error("--model is needed: the folder of the model to study")
    if found.out is None and ready:
        parser.error("--render and --join need --out, the folder of the results")
    if found.quick:
        vars(found).update(QUICK)
    found.no_times |= torch.device(found.device).type != "cuda"
    return found


def stages(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What `evaluate` is asked for, one method at one length at a time, in the order of usefulness."""
    first, rest = arguments.methods[:FIRST], arguments.methods[FIRST:]
    for methods in (first, rest):
        for length in sorted(arguments.lengths):
            yield from ({"methods": [name], "lengths": [length], "question": "last"} for name in methods)


def stress(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same with early questions."""
    for length in sorted(arguments.lengths):
        for name in STRESS if not arguments.no_stress else ():
            if name in arguments.methods:
                yield {"methods": [name], "lengths": [length], "question": "early"}


class OutOfTime(Exception):
    """`--minutes` have passed."""


class Run:
    """One call of this script: a model, the results so far, and where they are kept."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.started = time.perf_counter()
        self.model = load_checkpoint(arguments.model, getattr(torch, arguments.dtype)).to(arguments.device)
        self.results = None if arguments.out is None else arguments.out / arguments.name
        self.study = Study({})

    @property
    def path(self) -> Path | None:
        return None if self.results is None else self.results.with_suffix(".json")

    def evaluate(self, stage: dict[str, Any]) -> None:
        """One method at one length: all tasks."""
        self.check_time()
        a = self.arguments
        found = evaluate(
            self.model, **stage, tasks=a.tasks, samples=a.samples, seed=a.seed, batch_tokens=a.batch_tokens, layers=a.layers,
            resume=self.path,
        )  # fmt: skip
        new = found if self.path else Study(found.conditions, (*self.study.cells, *found.cells), (), found.notes)
        self.study = new
        (method,), (length,) = stage["methods"], stage["lengths"]
        cells = self.study.select(length=length, method=method, question=stage["question"])
        accuracies = ", ".join(f"{cell.task} {cell.accuracy}" for cell in cells)
        print(
            f"{length} {method} {stage['question']}: kept {sum(c.keep for c in cells) / len(cells):.3f}; {accuracies}",
            flush=True,
        )

    def add_times(self) -> None:
        """The times of all methods at all lengths."""
        self.check_time()
        self.study = add_times(self.model, self.study, done=self.keep)

    def keep(self, study: Study) -> None:
        """Keeps what has been timed."""
        self.study = study
        if self.path is not None:
            study.save(self.path)
        print(study.times[-1], flush=True)
        self.check_time()

    def check_time(self) -> None:
        """Raises OutOfTime."""
        if self.arguments.minutes is not None and time.perf_counter() - self.started > 60 * self.arguments.minutes:
            raise OutOfTime

    def write(self) -> None:
        """Markdown and figure beside the JSON."""
        if self.path is not None and self.study.cells:
            render(self.study, self.path)


def render(study: Study, path: Path) -> None:
    """Writes a study's tables and figure beside its JSON file."""
    path.with_suffix(".md").write_text(study.markdown())
    try:
        study.figure(path.with_suffix(".png"))
    except ImportError as error:
        print(f"no figure: {error}; --render draws it later")


def main(arguments: list[str] | None = None) -> Study:
    """Evaluates, times, prints and writes."""
    parsed = parse(arguments)
    try:
        if parsed.render or parsed.join:
            path = (parsed.out / parsed.name).with_suffix(".json")
            study = functools.reduce(Study.joined, map(Study.load, parsed.join or [path]))
            if parsed.join:
                study.save(path)
            render(study, path)
            return study
        if torch.device(parsed.device).type != "cpu":
            torch.set_num_threads(min(THREADS, torch.get_num_threads()))
        run = Run(parsed)
        try:
            for stage in stages(parsed):
                run.evaluate(stage)
            if not parsed.no_times:
                run.add_times()
            for stage in stress(parsed):
                run.evaluate(stage)
        except OutOfTime:
            print(f"stopped after {parsed.minutes:g} minutes; the same command goes on")
        finally:
            run.write()
    except (TSAError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"\n{run.study.markdown()}")
    return run.study


if __name__ == "__main__":
    main()
