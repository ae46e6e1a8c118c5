"""A study's parts as processes of their own, several at a time, which go on where they were stopped.

Small models leave most of a GPU idle: where NVIDIA's multi-process service runs (`nvidia-cuda-mps-control -d`), a dozen
processes take little longer than one.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STOPPED = 3
"""The exit code of a part whose time was over before it was complete."""


def folder_of(out: Path) -> Path:
    """Where the parts of a result file are."""
    return out.with_name(out.name + ".parts")


def run_parts(
    script: str, arguments: Sequence[str], parts: Mapping[str, Sequence[str]], out: Path, jobs: int, minutes: float
) -> int:
    """Runs the script once for each part, a name and further arguments; the worst exit code.

    A part writes `name.json`, by --out, and its errors to `name.log`, both in `folder_of(out)`.
    """
    folder, end = folder_of(out), time.monotonic() + 60 * minutes
    folder.mkdir(exist_ok=True)

    def start(part: tuple[str, Sequence[str]]) -> int:
        name, own = part
        left = max(0.0, (end - time.monotonic()) / 60)
        more = [*own, "--out", str(folder / f"{name}.json"), "--jobs", "1"]
        more += ["--minutes", str(left)] if math.isfinite(left) else []
        with open(folder / f"{name}.log", "a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, script, *arguments, *more]
            return subprocess.run(command, stderr=log, check=False, env=environment).returncode

    with ThreadPoolExecutor(jobs) as pool:
        codes = list(pool.map(start, parts.items()))
    for name, code in zip(parts, codes, strict=True):
        if code not in (0, STOPPED):
            print(f"{name}: exit code {code}, see {folder / name}.log", file=sys.stderr)
    return 1 if set(codes) - {0, STOPPED} else max(codes)
