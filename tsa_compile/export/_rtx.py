"""NVIDIA's TensorRT-RTX where it is installed, in a process of its own (_rtx_process.py): a crash of it ends that alone.

The library and its ONNX parser build engines on machines without a GPU. They come with NVIDIA's Python binding from PyPI.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tsa_compile.errors import ConfigError
from tsa_compile.export._trt_check import Finding

PROGRAM = Path(__file__).with_name("_rtx_process.py")
PACKAGE = "tensorrt_rtx_bindings"
INSTALL = "pip install 'tsa-compile[tensorrt]' (tensorrt-rtx-cu13-bindings and tensorrt-rtx-cu13-libs)"
HALF = ("HALF", "BF16")
HEAD_DIMS = (16, 256)
"""Heads that an Attention in half precision may have: 16 and 256 were built, 8 and 264 refused, by version 1.7.1."""


def installed() -> bool:
    """Whether the library can be imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def require_library() -> None:
    """ImportError with the command that installs it."""
    if not installed():
        raise ImportError(f"NVIDIA's TensorRT-RTX is not installed: {INSTALL}")


def parse(model: str) -> list[Finding]:
    """What the parser refuses in a file, and attention that the builder has no kernel for."""
    answer, crash = _run({"model": model, "engine": None})
    if answer is None:
        return [
            Finding("the model", "", f"the parser ended without an answer: {crash}", "the parser", library="TensorRT-RTX")
        ]
    library = f"TensorRT-RTX {answer['version']}"
    findings = [
        Finding(error["node"] or "the model", error["operator"], error["reason"], "its ONNX parser", library=library)
        for error in answer["errors"]
    ]
    for entry in answer["attention"]:
        reason = _no_kernel(entry)
        if reason:
            findings.append(Finding(entry["node"], "Attention", reason, "its builder", library=library))
    return findings


def build(model: str, engine: Path, profiles: Sequence[Mapping[str, Any]], capabilities: list[str], decompose: bool) -> None:
    """Writes an engine; ConfigError with what the library said where it builds none."""
    job = {"model": model, "engine": str(engine), "profiles": profiles, "capabilities": capabilities, "decompose": decompose}
    answer, crash = _run(job)
    if answer is not None and answer["built"]:
        return
    if answer is None:
        raise ConfigError(f"TensorRT-RTX built no engine of {model!r}: its process ended without an answer: {crash}")
    reasons = [f"{error['node']} ({error['operator']}): {error['reason']}" for error in answer["errors"]]
    kernels = () if decompose else ((entry["node"], _no_kernel(entry)) for entry in answer["attention"])
    reasons += [f"{node} (Attention): {reason}" for node, reason in kernels if reason]
    more = f"; and {len(reasons) - 1} more: see check(..., runtime='rtx')" if len(reasons) > 1 else ""
    said = "".join(reasons[:1]) + more or " ".join(answer["said"])[:2000] or "it gave no reason"
    raise ConfigError(f"TensorRT-RTX {answer['version']} builds no engine of {model!r}: {said}")


def _no_kernel(attention: dict[str, Any]) -> str | None:
    """Why the builder would refuse an Attention; None where it takes it."""
    dtype, head_dim = attention["dtype"], attention["head_dim"]
    if dtype in HALF and HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        return None
    return (
        f"there is no kernel for attention in {dtype} with heads of {head_dim}, but for HALF and BF16 with heads of "
        f"{HEAD_DIMS[0]} to {HEAD_DIMS[1]}: export the model in float16 or bfloat16 (a floor makes heads 8 wider), or build "
        "it with decompose=True, which holds the logits in memory"
    )


def _run(job: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The answer of the process, or None and how it ended."""
    with TemporaryDirectory(prefix="tsa-rtx-") as folder:
        question, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        question.write_text(json.dumps(job))
        # -P: the program's own folder has modules that are called onnx and tensorrt.
        command = [sys.executable, "-P", str(PROGRAM), str(question), str(answer)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode == 0 and answer.exists():
            return json.loads(answer.read_text()), ""
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        return None, f"{ended}, {last[0]}"
