"""Tracing an exported program anew, so that what comes out holds for every size that the program was exported for.

    before   length s in [2, 90]     c = min(8, s)
    while it is traced               is c at least 2?     a guard: every later trace takes it for known, and narrows by it
    after    length s in [2, 90]     no guard is left; had one of them not held for all s, a RewriteError

All programs that come of one export share their symbols, and with them what was asked about these. So the questions of a
trace are checked against the ranges of the program and then forgotten: which traces were made before makes no difference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch.export import ExportedProgram
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import TensorReferenceAnalysis
from torch.utils._sympy.value_ranges import bound_sympy

from tsa_compile.errors import RewriteError
from tsa_compile.passes.graph import fake_mode

_VALUES = 1 << 22  # so many combinations of sizes are tried at most
# What a torch.fx ShapeEnv knows of its symbols, and what it remembers because of that; some versions have less.
_KNOWN = ("guards", "axioms", "var_to_range", "replacements", "divisible", "fake_tensor_cache")
_exported: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def retraced(program: ExportedProgram, table: Mapping[Any, Any], **options: Any) -> ExportedProgram:
    """`program.run_decompositions`, for any of its sizes.

    torch would run the guards of the program in the trace, where Python's `min(8, s)` becomes a guard that 8 <= s.
    """
    unguarded = copy.copy(program)
    unguarded._guards_code = []
    return unguarded.run_decompositions(dict(table), **options)


def remember_sizes(program: ExportedProgram) -> None:
    """From now on the program's sizes are what they are at this moment, whatever others ask about them."""
    environment = _environment(program)
    if environment is not None:
        _exported[environment] = _state(environment)


@contextmanager
def for_all_sizes(program: ExportedProgram) -> Iterator[None]:
    """What is asked about a program's sizes inside must hold for all of them: nobody would look again.

    Raises:
        RewriteError: an answer holds for the example's length and cannot be shown to hold for every other one.
    """
    environment = _environment(program)
    if environment is None:
        yield
        return
    before = _state(environment)
    known = _exported.get(environment, before)
    try:
        _restore(environment, known)
        yield
        asked = [guard.expr for guard in environment.guards[len(known["guards"]) :]]
    finally:
        _restore(environment, before)
    # A guard on a symbol also narrows its range, by which the guard would then always hold.
    unproven = [question for question in asked if not _holds(question, known["var_to_range"])]
    if unproven:
        raise RewriteError(
            f"the lowered program would hold for some lengths alone, those with {sympy.And(*unproven)}; raise the shortest "
            "of dynamic_lengths to at least the window, below which nothing is dropped"
        )


def _environment(program: ExportedProgram) -> Any:
    mode = fake_mode(program.graph)
    return None if mode is None else mode.shape_env


def _state(environment: Any) -> dict[str, Any]:
    return {name: copy.copy(getattr(environment, name)) for name in _KNOWN if hasattr(environment, name)}


def _restore(environment: Any, state: dict[str, Any]) -> None:
    """What is known of symbols that the state has not, as of the sizes of what a trace draws from data, is kept."""
    symbols = state["var_to_range"]
    for name, value in state.items():
        if name in ("var_to_range", "replacements"):
            later = {symbol: known for symbol, known in getattr(environment, name).items() if symbol not in symbols}
            setattr(environment, name, {**value, **later})
        else:
            setattr(environment, name, copy.copy(value))
    for method in vars(type(environment)).values():  # what was derived from the other state is not true in this one
        if hasattr(method, "cache_clear"):
            method.cache_clear()
    version = "_replacements_version_counter"  # the same for what symbols stand for
    setattr(environment, version, getattr(environment, version, 0) + 1)


def _holds(question: Any, ranges: dict[Any, Any]) -> bool:
    """Whether the answer is yes for all sizes: by interval arithmetic, or else by trying all of them where they are few."""
    if bound_sympy(question, ranges).lower is sympy.true:
        return True
    symbols = sorted(question.free_symbols, key=str)
    extents = [ranges.get(symbol) for symbol in symbols]
    if not all(extent is not None and extent.is_int and extent.upper - extent.lower < _VALUES for extent in extents):
        return False
    sizes = [torch.arange(int(extent.lower), int(extent.upper) + 1) for extent in extents if extent is not None]
    if math.prod(map(len, sizes)) > _VALUES:
        return False
    grid = torch.meshgrid(*sizes, indexing="ij")
    try:
        return bool(sympy_interp(TensorReferenceAnalysis, dict(zip(symbols, grid, strict=True)), question).all())
    except (AttributeError, NotImplementedError, RuntimeError):  # how torch says that a function has no form on tensors
        return False  # not shown, so the program is refused
