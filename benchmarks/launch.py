"""What launching costs: the fused op with and without remembered launches, by compiled kernels and by Triton's own launch.

    python benchmarks/launch.py                     8K tokens, half of them kept, Llama-3.1-8B's heads in bfloat16
    python benchmarks/launch.py --lengths 2048 8192 --keep 0.5

    replay     functions of launches are remembered and replayed (`remembered` in kernels/launch.py), or run each time
    compiled   `launch` keeps compiled kernels and launches them itself, or hands each launch to Triton's `kernel[grid]`

A replay launches compiled kernels however they were launched when it was noted; so where all functions replay, `compiled`
can only gain at the first call with a length. The variants and dense cuDNN take turns in one run. `ms` is from call to call,
back to back; `host us` is what a call keeps the host, with nothing waited for. Outputs must be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from attention_methods import Inputs, Shape, dense, make_inputs, ours
from attention_report import markdown
from attention_timing import take_turns
from torch.nn.attention import SDPBackend

from tsa_compile.kernels import budget, compress, decompress, fused, score, select
from tsa_compile.kernels.launch import launch, remembered, watching

Call = Callable[[], Any]
Patches = list[tuple[Any, str, Any]]
STEPS = ("_best", "_scored", "_selected", "_compressed", "_decompressed")
FILES = (score, budget, select, compress, decompress)


def by_triton(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Any, ...], numbers: tuple[Any, ...], **options: Any
) -> None:  # fmt: skip
    """`launch` without compiled kernels of its own."""
    compiled = kernel[grid](*tensors, *numbers, **options)
    notes = watching()
    if notes is not None:
        constants = (options[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])
        notes.add(compiled[(*grid, 1, 1)[:3]], tensors, (*numbers, *constants))


def patches(replay: bool, compiled: bool) -> Patches:
    """What a variant puts where; nothing is remembered yet."""
    functions = [getattr(fused, name).__wrapped__ for name in STEPS]
    steps = [remembered(function) if replay else function for function in functions]
    launches = [(file, "launch", launch if compiled else by_triton) for file in FILES]
    return [*((fused, name, step) for name, step in zip(STEPS, steps, strict=True)), *launches]


@contextlib.contextmanager
def patched(places: Patches) -> Iterator[None]:
    """A variant, as long as the context lasts."""
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(places, before, strict=True):
            setattr(module, name, value)


def within(call: Call, places: Patches) -> Call:
    """The call in a variant; switching takes the host some 3 us."""

    def switched() -> Any:
        with patched(places):
            return call()

    return switched


def host_us(call: Call, rounds: int = 15, calls: int = 20) -> float:
    """What a call keeps the host, the median over rounds that begin on an idle device."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(found)


def measure(inputs: Inputs, keep: float) -> list[list[str]]:
    """A line for each variant, and for dense attention."""
    op = ours(inputs, keep).call
    expected = op()
    variants: dict[str, Patches] = {"dense cuDNN": []}
    calls = {"dense cuDNN": dense(inputs, SDPBackend.CUDNN_ATTENTION).call}
    for replay in (True, False):
        for compiled in (True, False):
            name = f"{'replayed' if replay else 'run each time'}, {'compiled kernels' if compiled else 'kernel[grid]'}"
            variants[name] = patches(replay, compiled)
            calls[name] = within(op, variants[name])
            if not torch.equal(calls[name](), expected):
                raise AssertionError(f"{name}: another output")
    times = take_turns({name: [call] for name, call in calls.items()}, seconds=3.0)
    base, lines = times["dense cuDNN"].ms, []
    for name, places in variants.items():
        with patched(places):
            host = host_us(op if places else calls[name])
        ms = times[name].ms
        lines.append([str(inputs.length), name, f"{ms:.3f}", f"{ms / base:.3f}", f"{host:.0f}"])
    return lines


def main() -> None:
    """Measures and writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--keep", type=float, default=0.5)
    arguments = parser.parse_args()
    with torch.inference_mode():
        lines = [line for length in arguments.lengths for line in measure(make_inputs(Shape(), length), arguments.keep)]
    table = markdown(("length", "launches", "ms", "of dense", "host us"), lines)
    sys.stdout.write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, keep {arguments.keep}\n\n{table}\n")


if __name__ == "__main__":
    main()
