"""How the benchmarks measure: methods take turns in one run, and CUDA graphs show the GPU's time without the host's."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Call = Callable[[], Any]
Key = TypeVar("Key", bound=Hashable)
BURST_MS = 10.0
"""Calls are made back to back for about this long between two synchronisations, so that the host can run ahead."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median of some bursts, the extremes, and how many bursts there were."""

    ms: float
    low: float
    high: float
    rounds: int

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return {"ms": round(self.ms, 4), "range_ms": [round(self.low, 4), round(self.high, 4)], "rounds": self.rounds}


def burst_ms(calls: Sequence[Call], first: int, count: int) -> float:
    """Milliseconds of one call out of `count` back to back, on a device that was idle; inputs rotate from `first` on."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for number in range(count):
        calls[(first + number) % len(calls)]()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / count


def take_turns(
    candidates: Mapping[Key, Sequence[Call]],
    seconds: float,
    at_least: int = 5,
    at_most: int = 30,
    settle_ms: float = 0.0,
    burst: Callable[[Sequence[Call], int, int], float] | None = None,
) -> dict[Key, Timing]:
    """Times of candidates that take turns, in a new order each round: changes of clocks and what ran before meet all alike.

    Args:
        candidates: for each, the same call on one or more sets of inputs, which rotate; warmed up.
        seconds: about how long to measure each candidate, within at_least and at_most rounds.
        settle_ms: how long a candidate runs before it is measured, in each of its turns. At its power limit a GPU's clock
            follows what ran some 0.1 s before: a light kernel pays for a heavy one, unless it has run for that long.
        burst: what measures some calls; for tests.
    """
    burst = burst or burst_ms
    once = {key: burst(calls, 0, 1) for key, calls in candidates.items()}
    counts = {key: min(20, max(1, math.ceil(BURST_MS / max(ms, 1e-3)))) for key, ms in once.items()}
    round_ms = sum(once[key] * counts[key] + settle_ms for key in candidates)
    rounds = min(at_most, max(at_least, int(1e3 * seconds * len(candidates) / max(round_ms, 1e-3))))
    times: dict[Key, list[float]] = {key: [] for key in candidates}
    shuffled = random.Random(0).sample
    for turn in range(rounds):
        for key in shuffled(list(candidates), len(candidates)):
            calls = candidates[key]
            if settle_ms > 0:
                burst(calls, turn, math.ceil(settle_ms / max(once[key], 1e-3)))
            times[key].append(burst(calls, turn, counts[key]))
    return {key: Timing(statistics.median(found), min(found), max(found), rounds) for key, found in times.items()}


def captured(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A CUDA graph of these calls, one after the other, and their results, which every replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever a first call on a stream sets up must not be captured
        for call in dict.fromkeys(calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    return graph, results


def replayed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A call captured in a CUDA graph: replays it and returns its output. The output is poisoned once, before."""
    graph, (out,) = captured([call])
    out.fill_(math.nan)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def graph_ms(calls: Sequence[Call], call_ms: float, repeats: int = 15) -> float:
    """Milliseconds that the GPU takes for a call: replays of a graph that holds enough of them to hide its own launch.

    Args:
        calls: the same call on one or more sets of inputs, which rotate.
        call_ms: about how long one takes.
    """
    inner = min(20, max(1, math.ceil(BURST_MS / max(call_ms, 1e-3))))

    def rotate() -> None:
        for number in range(inner):
            calls[number % len(calls)]()

    graph, _ = captured([rotate])
    graph.replay()
    return statistics.median(burst_ms([graph.replay], 0, 1) / inner for _ in range(repeats))


def peak_of(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """A call's output, and the peak of memory above what was allocated before and the output itself, in GiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    own = out.numel() * out.element_size()
    return out, (torch.cuda.max_memory_allocated() - before - own) / 2**30
