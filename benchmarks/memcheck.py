"""Launches every Triton kernel of the package on small, odd shapes, for a memory checker to watch.

    python benchmarks/memcheck.py                                           compiles the kernels, so that the next is fast
    compute-sanitizer --tool memcheck python benchmarks/memcheck.py         "ERROR SUMMARY: 0 errors" is wanted

Every tensor is an allocation of its own, so that an access beyond its end is one beyond an allocation. Shapes: two items,
shared key heads, lengths, capacities and counts that no tile divides, a capacity above the length, left padding and
padding with holes, an item without a token, three types, head sizes that are no powers of two, layouts as projections
leave them and others. Prints a line a kernel; the exit code is 1 if one was never launched.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tsa_compile.kernels
from tsa_compile.kernels import fused
from tsa_compile.kernels.budget import coverage_triton
from tsa_compile.kernels.compress import compress_behind_triton, compress_triton
from tsa_compile.kernels.decompress import decompress_triton
from tsa_compile.kernels.flash import behind_triton, flash_triton
from tsa_compile.kernels.floor import merge_floor_triton, near_triton
from tsa_compile.kernels.merge import merge_triton
from tsa_compile.kernels.padded import valid_ranges
from tsa_compile.kernels.score import score_triton
from tsa_compile.kernels.select import select_triton
from tsa_compile.kernels.sparse.antidiagonals import Tiling
from tsa_compile.kernels.sparse.blocks import blocks_triton
from tsa_compile.kernels.sparse.flashprefill import flashprefill_triton
from tsa_compile.kernels.sparse.flexprefill import flexprefill_triton
from tsa_compile.kernels.sparse.minference import minference_triton
from tsa_compile.kernels.sparse.vertical_slash import vertical_slash_triton
from tsa_compile.kernels.sparse.xattention import xattention_triton

SCALE = 0.2
CHUNK = 119


class Recorded:
    """Stands for a kernel and counts its launches."""

    def __init__(self, name: str, kernel: Any, launches: Counter[str]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches
        launches[name] = 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches[self.name] += 1
        return self.kernel[grid]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)


def record(replace: Callable[[Any, str, Any], None] = setattr) -> Counter[str]:
    """Puts a Recorded in the place of every kernel; the counts, by module and name."""
    launches: Counter[str] = Counter()
    prefix = f"{tsa_compile.kernels.__name__}."
    for found in pkgutil.walk_packages(tsa_compile.kernels.__path__, prefix):
        module = importlib.import_module(found.name)
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and hasattr(value, "__getitem__"):
                replace(module, name, Recorded(f"{found.name.removeprefix(prefix)}.{name}", value, launches))
    return launches


@dataclass(frozen=True)
class Case:
    """One chain of launches; two items, four heads that share two key heads."""

    dtype: torch.dtype
    dim: int
    value_dim: int
    padding: str
    capacity: int
    counted: bool = True
    shared: bool = False
    layout: str = "BLHD"
    length: int = 333
    window: int = 20

    def tensor(self, heads: int, size: int, device: str) -> Tensor:
        """[2, heads, length, size]; in memory [B, L, heads, D], as a slice of a packed projection, or [B, heads, L, D]."""
        if self.layout == "BHLD":
            return torch.randn(2, heads, self.length, size, device=device).to(self.dtype)
        extra = 1 if self.layout == "packed" else 0
        made = torch.randn(2, self.length, heads + extra, size, device=device).to(self.dtype)
        return made[:, :, extra:].transpose(1, 2)

    def mask(self, device: str) -> Tensor | None:
        """The padding [2, length]: True for tokens."""
        positions = torch.arange(self.length, device=device)
        if self.padding == "left":
            return positions >= torch.tensor([[0], [101]], device=device)
        if self.padding == "holes":
            return (positions % 3 > 0) & torch.tensor([[True], [False]], device=device)
        return None


CASES = (
    Case(torch.bfloat16, 64, 64, "none", 177, counted=False),
    Case(torch.float16, 96, 75, "left", 401, layout="packed"),
    Case(torch.float32, 64, 64, "holes", 177, shared=True, layout="BHLD", window=40),
    Case(torch.bfloat16, 128, 128, "left", 328, shared=True),
)


def run(case: Case, device: str) -> None:
    """Every launcher, each on the results of the one before."""
    query, key = case.tensor(4, case.dim, device), case.tensor(2, case.dim, device)
    value = case.tensor(2, case.value_dim, device)
    sink_logits = torch.linspace(-1, 1, 4, device=device)
    scores = score_triton(query, key, case.mask(device), SCALE, case.window, 7, "mean", sink_logits)
    if case.shared:
        scores = scores.unflatten(1, (2, -1)).mean(2)
    count = coverage_triton(scores, 0.1, 30).clamp(max=case.capacity) if case.counted else None
    split = select_triton(scores, count, case.capacity, short=0, splits=4, block=32)
    indices = select_triton(scores, count, case.capacity)
    assert torch.equal(split, indices)
    rows = compress_triton(query, key, value, indices, count)
    lse = log_sums(rows[0])
    out = flash_triton(*rows, SCALE, count, lse=lse)
    decompress_triton(out, indices, count, case.length)
    for found in ((out, lse), *run_sparse(*rows, count)):
        merge_floor_triton(query, key, value, *found, indices, count, case.mask(device), SCALE, case.window, 5, sink_logits)
    near_triton(query, key, value, SCALE, case.window, sink_logits)


def run_chunk(case: Case, device: str) -> None:
    """The launchers of a chunk's queries behind a cache, and the one that merges two parts of their attention."""
    query, key = case.tensor(4, case.dim, device), case.tensor(2, case.dim, device)
    value, mask, past = case.tensor(2, case.value_dim, device), case.mask(device), case.length - CHUNK
    query = query[:, :, past:]
    scores = score_triton(query, key, mask, SCALE, case.window, 7)
    if case.shared:
        scores = scores.unflatten(1, (2, -1)).mean(2)
    count = coverage_triton(scores, 0.1, 30).clamp(max=case.capacity) if case.counted else None
    indices = select_triton(scores, count, case.capacity)
    *rows, first = compress_behind_triton(query, key, value, indices, count)
    out, lse = behind_triton(*rows, count, first, SCALE)
    decompress_triton(out, indices, count, case.length, past=past)
    merge_floor_triton(query, key, value, out, lse, indices, count, mask, SCALE, case.window, 5)
    near_triton(query, key, value, SCALE, case.window)
    merge_triton(out, lse, out.clone(), lse.clone())


def log_sums(query: Tensor) -> Tensor:
    """Room for the log-sum-exp of each row."""
    return query.new_empty(query.shape[:3], dtype=torch.float32)


def run_sparse(query: Tensor, key: Tensor, value: Tensor, count: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The selectors, and attention over what they list, with its log-sum-exp. FlexPrefill with heads of both kinds."""
    for choose in (
        functools.partial(flashprefill_triton, alpha=0.5),
        functools.partial(xattention_triton, stride=8),
        functools.partial(xattention_triton, stride=8, tiling=Tiling(16, 16, 32, use_tma=True)),  # whole tiles of few rows
        functools.partial(flexprefill_triton, tau=0.0, min_budget=128),
        functools.partial(flexprefill_triton, tau=2.0, min_budget=128),
    ):
        lse = log_sums(query)
        yield blocks_triton(query, key, value, SCALE, *choose(query, key, SCALE, count), count, lse=lse), lse
    lists, lse = minference_triton(query, key, SCALE, count, vertical=20, slash=30), log_sums(query)
    yield vertical_slash_triton(query, key, value, SCALE, *lists, count, lse=lse), lse


def run_fused(case: Case, device: str) -> None:
    """The fused ops, which hand parts of tensors to the same kernels: one group of heads at a time, items of a batch."""
    query, key = case.tensor(4, case.dim, device), case.tensor(2, case.dim, device)
    value, mask = case.tensor(2, case.value_dim, device), case.mask(device)
    options = (SCALE, case.window, 7, 0.1 if case.counted else None, None if case.counted else 0.5, 30, None, case.shared)
    for floor in ((None, 0), (case.window, 5)):
        fused.sparse_attention(query, key, value, *options, "triton", *floor)
        if mask is not None:
            fused.padded_sparse_attention(query, key, value, mask, valid_ranges(mask), *options, "triton", *floor)


def main() -> int:
    """Runs the cases and prints the launches; the exit code."""
    if not torch.cuda.is_available():
        sys.exit("this check needs a CUDA device")
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch reads it when it first allocates
    launches = record()
    fused.STREAM_BYTES = 1
    torch.manual_seed(0)
    for case in CASES:
        run(case, "cuda")
        run_chunk(case, "cuda")
        run_fused(case, "cuda")
        torch.cuda.synchronize()
        print(case, flush=True)
    for name, count in launches.items():
        print(f"{count:4d} x {name}")
    return 1 if 0 in launches.values() else 0


if __name__ == "__main__":
    sys.exit(main())
