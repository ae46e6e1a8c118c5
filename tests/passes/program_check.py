"""Runs a random program plainly and through the backend, and says where they differ.

Dynamo traces a program once; the graph is then compiled by `tsa_backend` for each mode, and as it is. What differs as it
is differs because of torch.compile, and the program is skipped.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch._dynamo.guards

from tsa_compile import KeepRatio, TSAConfig, tsa_backend
from tsa_compile.reasons import Decision, Reason
from tsa_compile.report import clear_reports, reports

from .programs import Program

KEEP_ALL = TSAConfig(layers=["*"], budget=KeepRatio(1.0), min_tokens=1, min_length=1, window=3, compiler="eager")
# The proofs are to be right by themselves; in the other mode what they say is also computed (passes/validate.py).
MODES = {"exact": TSAConfig(layers=[], compiler="eager", skip_passes=["Validate"]), "keep all": KEEP_ALL}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
NAMES = ("q", "k", "v", "pad", "at", "one")


@dataclass
class Outcome:
    """What came of a program: calls by (form, decision), differences as text by mode, or why it was skipped."""

    calls: Counter = field(default_factory=Counter)
    differences: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""


class Backend:
    """Compiles a graph of Dynamo's once for each mode; `mode` says which one runs."""

    def __init__(self, modes) -> None:
        self.modes, self.mode = modes, "plain"
        self.reports = {mode: [] for mode in modes}
        self.errors: dict[str, str] = {}

    def __call__(self, graph_module, example_inputs):
        compiled = {"plain": graph_module.forward}
        for mode, config in self.modes.items():
            own = copy.deepcopy(graph_module)
            clear_reports()
            try:
                compiled[mode] = tsa_backend(own, example_inputs, options={"config": config})
            except Exception as error:  # noqa: BLE001 an error of any kind is what is looked for
                self.errors[mode] = f"raised {type(error).__name__}: {error}"
                compiled[mode] = graph_module.forward
            self.reports[mode] += reports()
        return lambda *inputs: compiled[self.mode](*inputs)


def run(function, inputs, seed):
    """(outputs, inputs afterwards) of a call on copies of its inputs."""
    inputs = tuple(tensor.clone() for tensor in inputs)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would note a stack for each kind of GPU that is not there
    with torch.no_grad():
        outputs = function(*inputs)
    return outputs, inputs


def difference(expected, actual, ignored=None) -> str:
    """How two tensors differ; "" if they do not. `ignored`: bool, True where they may."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return f"{list(expected.shape)} {expected.dtype} became {list(actual.shape)} {actual.dtype}"
    tolerance = TOLERANCE.get(expected.dtype, 0.0)
    left, right = expected.double(), actual.double()
    same = (left == right) | (left.isnan() & right.isnan()) | ((left - right).abs() <= tolerance * (1 + left.abs()))
    wrong = ~same if ignored is None else ~same & ~ignored
    if not wrong.any():
        return ""
    at = tuple(wrong.nonzero()[0].tolist())
    return f"{int(wrong.sum())} of {wrong.numel()} elements, at {at} {left[at]:.4g} became {right[at]:.4g}"


def pad_rows(expected, actual):
    """Rows [B, 1, M, 1] of attention outputs that became zero in some layer, as a sparse layer's pad rows do."""
    rows = [
        ((b == 0).flatten(3).all(3).all(1) & ~(a == 0).flatten(3).all(3).all(1))[:, None, :, None]  # `a`: after a relu
        for a, b in zip(expected[:-1], actual[:-1], strict=True)
    ]
    return torch.stack(rows).any(0) if rows else None


def compare(program: Program, expected, actual, padded: bool) -> str:
    """The first difference between two results of `run`; `padded`: a layer is sparse, and some rows may see nothing."""
    if padded and not program.local:
        return ""
    ignored = pad_rows(expected[0], actual[0]) if padded else None
    for name, left, right in zip(program.outputs, expected[0], actual[0], strict=True):
        found = difference(left, right, ignored)
        if found:
            return f"output {name}: {found}"
    for name, left, right in zip(NAMES, expected[1], actual[1], strict=True):
        found = difference(left, right)
        if found:
            return f"input {name} afterwards: {found}"
    return ""


def compiled(program: Program, backend):
    torch._dynamo.reset()
    return torch.compile(program.function(), backend=backend, dynamic=True if program.dynamic == "all" else None)


def marked(program: Program, inputs):
    """The inputs, their lengths marked as dynamic if the program asks for it."""
    mark = {"mark": torch._dynamo.mark_dynamic, "maybe": torch._dynamo.maybe_mark_dynamic}.get(program.dynamic)
    for tensor, dim in zip(inputs, (2, 2, 2, 1, 0), strict=False) if mark else ():
        mark(tensor, dim)
    return inputs


@contextlib.contextmanager
def quick(program: Program):
    """Dynamo without a third of its time: measuring guards after a cache flush, keeping results of symbolic shapes."""
    with contextlib.ExitStack() as stack:
        if hasattr(torch._dynamo.guards, "profile_guard_manager"):
            stack.enter_context(mock.patch.object(torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0))
        stack.enter_context(torch._dynamo.config.patch(fake_tensor_cache_enabled=not program.dynamic))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)  # graph breaks and constraints that a random program violates
        stack.callback(logging.disable, logging.NOTSET)
        yield


def check(program: Program, modes=MODES) -> Outcome:
    """Runs a program in every mode."""
    outcome, backend = Outcome(), Backend(modes)
    with quick(program):
        for call in range(len(program.sizes.lengths)):
            inputs = program.inputs(call)
            try:
                expected = run(program.function(), inputs, program.seed)
            except Exception as error:  # noqa: BLE001 a program that plain Python refuses
                outcome.skipped = f"eager: {type(error).__name__}: {error}"
                break
            if not call:
                function = compiled(program, backend)
            try:
                _call(program, function, backend, inputs, expected, outcome)
            except Exception as error:  # noqa: BLE001 a program that torch.compile refuses
                outcome.skipped = f"compile: {type(error).__name__}: {error}"
            if outcome.skipped:
                break
    outcome.calls.update((mode, row.form, str(row.decision)) for mode, row in _rows(backend))
    outcome.notes += [note for said in backend.reports.values() for report in said for note in report.notes]
    return outcome


def _rows(backend: Backend):
    return [(mode, row) for mode, said in backend.reports.items() for report in said for row in report.rows]


def _call(program, function, backend, inputs, expected, outcome) -> None:
    """One call in every mode; what raises as it is or differs as it is is torch.compile's."""
    for mode in ("plain", *backend.modes):
        backend.mode = mode

        def call(*copies):
            return function(*marked(program, copies))

        try:
            actual = run(call, inputs, program.seed)
        except Exception as error:
            if mode == "plain":
                raise
            outcome.differences.setdefault(mode, f"raised {type(error).__name__}: {error}")
            continue
        if mode == "plain":
            found = compare(program, expected, actual, padded=False)
            if found:
                outcome.skipped = f"differs plainly: {found}"
                return
            continue
        rows = [row for name, row in _rows(backend) if name == mode]
        padded = any(row.decision is Decision.SPARSE and ("padding" in row.mask or "filled" in row.mask) for row in rows)
        failed = next((f"a pass failed: {row.detail}" for row in rows if row.reason is Reason.PASS_FAILED), "")
        found = backend.errors.get(mode) or failed or compare(program, expected, actual, padded)
        if found:
            outcome.differences.setdefault(mode, found)
