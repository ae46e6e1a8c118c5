"""Random whole programs: what the backend makes of them must compute what they compute.

`benchmarks/soundness.py` tries many more. A seed that fails is printed as the smallest program that still does.
"""

from collections import Counter

import pytest
import torch

from ..support import exhaustive_but
from .program_check import MODES, check
from .programs import HEADER, generate, shrink

CHUNKS, PROGRAMS = 5, 92  # in each are due one of the 457 spellings of masks and one of the 305 of attention


def failure(program):
    """The smallest program that fails in the same mode, as text."""
    mode, found = next(iter(check(program).differences.items()))
    modes = {mode: MODES[mode]}

    def fails(other):
        outcome = check(other, modes)
        return not outcome.skipped and bool(outcome.differences)

    return f"seed {program.seed}, {mode}: {found}\n{shrink(program, fails).source}"


@pytest.mark.parametrize("chunk", exhaustive_but(range(CHUNKS), 0))
def test_random_programs(chunk):
    calls, skipped, different = Counter(), 0, []
    for seed in range(chunk, CHUNKS * PROGRAMS, CHUNKS):  # neighbours have spellings of a kind
        program = generate(seed)
        outcome = check(program)
        calls.update(outcome.calls)
        skipped += bool(outcome.skipped)
        if outcome.differences:
            different.append(program)
    assert not different, "\n\n".join([failure(different[0]), f"in all: {[program.seed for program in different]}"])
    # Enough of them, or the comparison above would compare nothing.
    rewritten = sum(count for (_, _, decision), count in calls.items() if decision != "unchanged")
    assert rewritten >= 0.2 * calls.total(), calls
    assert skipped <= 0.1 * PROGRAMS


def test_a_seed_is_a_program():
    assert generate(3) == generate(3) != generate(4)
    assert all(torch.equal(a, b) for a, b in zip(generate(3).inputs(0), generate(3).inputs(0), strict=True))


def test_a_program_is_shrunk_to_what_fails():
    program = next(p for p in map(generate, range(100)) if "F.scaled_dot" in p.source and "cumsum" in p.source)
    small = shrink(program, lambda p: any("F.scaled_dot" in line for line in p.lines))
    assert len(small.lines) == 1 and len(small.outputs) == 2
    assert small.source.count("\n") == len(HEADER) + 3


def test_a_wrong_rewrite_is_found(monkeypatch):
    program = next(p for p in map(generate, range(100)) if not check(p).skipped)

    def wrong(graph_module, example_inputs, options):
        return lambda *inputs: tuple(out + 1 for out in graph_module.forward(*inputs))

    monkeypatch.setattr(f"{check.__module__}.tsa_backend", wrong)
    assert set(check(program).differences) == set(MODES)
