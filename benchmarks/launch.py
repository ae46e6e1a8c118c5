"""What launching costs: the fused op with its launches replayed (`remembered` in kernels/launch.py), and without.

    python benchmarks/launch.py                     8K tokens, half of them kept, Llama-3.1-8B's heads in bfloat16
    python benchmarks/launch.py --lengths 2048 8192 --keep 0.5

The variants and dense cuDNN take turns in one run. `ms` is from call to call, back to back; `host us` is what a call keeps
the host, with nothing waited for. Outputs must be equal.

A third variant was measured in November 2026 and given up: compiled kernels kept by all that they depend on, and launched
without Triton's own launch. Replayed it was as fast (0.44 of dense either way, H100), and without replay 0.57 to 0.70.
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

from tsa_compile.kernels import fused
from tsa_compile.kernels.launch import remembered

Call = Callable[[], Any]
Patches = list[tuple[Any, str, Any]]
STEPS = ("_best", "_scored", "_selected", "_compressed", "_merged")


def patches(replay: bool) -> Patches:
    """What a variant puts where; nothing is remembered yet."""
    functions = [getattr(fused, name).__wrapped__ for name in STEPS]
    return [(fused, name, remembered(step) if replay else step) for name, step in zip(STEPS, functions, strict=True)]


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
    for name, replay in (("replayed", True), ("run each time", False)):
        variants[name] = patches(replay)
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
