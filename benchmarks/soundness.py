"""Random whole programs with attention, plain eager against backend="tsa": how many differ, out of how many rewritten.

    python benchmarks/soundness.py --out benchmarks/results           10,000 programs, some 20 minutes on a CPU
    python benchmarks/soundness.py --first 20000 --programs 500       others

Each program (`tests/passes/programs.py`) runs in exact mode and with all layers sparse that keep all tokens. Programs that
plain Python or plain torch.compile refuses or gets wrong are skipped and counted. A program that differs is printed by its
seed, as small as it gets. The exit code is 1 if one does.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing
import signal
import sys
import time
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PASSES = Path(__file__).parents[1] / "tests" / "passes"
CHUNK, LIMIT = 50, 60  # programs that share their shapes; seconds that a program may take


class TooSlow(BaseException):
    """A program takes longer than LIMIT; no `except Exception` on the way may take it for a failed pass."""


def modules() -> tuple[types.ModuleType, types.ModuleType]:
    """The tests' generator and check. Their folder is no package, and must not be on the path."""
    if "soundness_programs" not in sys.modules:
        package = types.ModuleType("soundness_programs")
        package.__path__ = [str(PASSES)]
        sys.modules["soundness_programs"] = package
    names = ("programs", "program_check")
    programs, check = (importlib.import_module(f"soundness_programs.{name}") for name in names)
    return programs, check


def start() -> None:
    """Sets up a process."""
    torch.set_num_threads(1)
    modules()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    signal.signal(signal.SIGALRM, _stop)


def _stop(number: int, frame: Any) -> None:
    raise TooSlow


def check_all(seeds: range) -> dict[str, Any]:
    """Some programs, as counts and a list of what was found."""
    programs, checking = modules()
    calls: Counter[tuple[str, str, str]] = Counter()
    skipped: Counter[str] = Counter()
    found, failed_passes = [], 0
    for seed in seeds:
        program = programs.generate(seed)
        signal.alarm(LIMIT)
        try:
            outcome = checking.check(program)
        except TooSlow:
            found.append({"seed": seed, "mode": "", "difference": f"took more than {LIMIT} s", "source": program.source})
            continue
        finally:
            signal.alarm(0)
        calls.update(outcome.calls)
        failed_passes += len(outcome.notes)
        if outcome.skipped:
            skipped[outcome.skipped.split(":")[0]] += 1
        found += [{"seed": seed, "mode": mode, "difference": text} for mode, text in outcome.differences.items()]
    return {"calls": list(calls.items()), "skipped": skipped, "found": found, "failed passes": failed_passes}


def shrunk(seed: int, mode: str) -> str:
    """The smallest program that differs in the same mode, as text."""
    programs, checking = modules()
    modes = {mode: checking.MODES[mode]}

    def fails(program: Any) -> bool:
        outcome = checking.check(program, modes)
        return not outcome.skipped and bool(outcome.differences)

    return programs.shrink(programs.generate(seed), fails).source


def results(first: int, count: int, processes: int) -> Iterator[dict[str, Any]]:
    """What `check_all` says of each chunk, in order."""
    last = first + count
    chunks = [range(at, min(at + CHUNK, last)) for at in range(first, last, CHUNK)]
    if processes == 1:
        start()
        yield from map(check_all, chunks)
        return
    with multiprocessing.get_context("spawn").Pool(processes, start, maxtasksperchild=40) as pool:
        yield from pool.imap(check_all, chunks)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole record."""
    began, done = time.perf_counter(), 0
    calls: Counter[tuple[str, str, str]] = Counter()
    skipped: Counter[str] = Counter()
    found: list[dict[str, Any]] = []
    failed_passes = 0
    for part in results(arguments.first, arguments.programs, arguments.processes):
        done = min(done + CHUNK, arguments.programs)
        calls.update({tuple(key): count for key, count in part["calls"]})
        skipped.update(part["skipped"])
        found += part["found"]
        failed_passes += part["failed passes"]
        rewritten = sum(count for (_, _, decision), count in calls.items() if decision != "unchanged")
        print(f"{done} programs, {calls.total()} calls, {rewritten} rewritten, {len(found)} differences", flush=True)
    conditions = {
        "programs": arguments.programs, "first seed": arguments.first, "skipped": dict(skipped), "calls": calls.total(),
        "rewritten": rewritten, "differences": len(found), "failed passes": failed_passes, "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began),
    }  # fmt: skip
    rows = [dict(zip(("mode", "form", "decision"), key, strict=True), calls=calls[key]) for key in sorted(calls)]
    return {"conditions": conditions, "rows": rows, "differences": found}


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    c = record["conditions"]
    skipped = ", ".join(f"{count} ({why})" for why, count in sorted(c["skipped"].items())) or "none"
    lines = [
        f"{c['programs']:,} random programs from seed {c['first seed']} on, torch {c['torch']}, {c['seconds']:,} s. Of "
        f"{c['calls']:,} attention calls {c['rewritten']:,} ({c['rewritten'] / max(c['calls'], 1):.0%}) were rewritten. "
        f"**{c['differences']} differences** to plain eager. Skipped programs: {skipped}; passes that failed and left the "
        f"graph as it was: {c['failed passes']}.",
        "",
        "| mode | form | decision | calls |",
        "|---|---|---|---:|",
        *(f"| {row['mode']} | {row['form']} | {row['decision']} | {row['calls']:,} |" for row in record["rows"]),
    ]
    for found in record["differences"]:
        lines += ["", f"Seed {found['seed']}, {found['mode']}: {' '.join(found['difference'].split())}"]
        lines += ["", "```python", found["source"].rstrip(), "```"] if "source" in found else []
    return "\n".join(lines) + "\n"


def write(record: dict[str, Any], folder: Path | None) -> str:
    """The table, which is also written to a folder if there is one."""
    text = table(record)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "soundness.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / "soundness.md").write_text(text)
    return text


def main(argv: list[str] | None = None) -> int:
    """Runs the programs and writes soundness.json and soundness.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=20, help="at most this many differences are made small")
    parser.add_argument("--out", type=Path, help="a folder; without it, the table is only printed")
    arguments = parser.parse_args(argv)
    if min(arguments.programs, arguments.processes) < 1:
        parser.error("--programs and --processes: expected at least 1")
    record = run(arguments)
    write(record, arguments.out)  # shrinking takes its time
    for difference in record["differences"][: arguments.shrink]:
        if difference["mode"]:
            difference["source"] = shrunk(difference["seed"], difference["mode"])
    print(write(record, arguments.out))
    return 1 if record["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
