"""Which tiles make the block-sparse kernels fastest on a GPU: for whoever sets their defaults.

    python benchmarks/sparse_tune.py                       every candidate at 128K, in about three minutes on an H200
    python benchmarks/sparse_tune.py --kinds xattention    the candidates of one kernel

Candidates of a kind take turns on the same planted inputs; one that does not fit the GPU says why.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from attention_methods import Inputs, Shape
from attention_report import markdown
from attention_timing import take_turns
from sparse_inputs import planted_inputs, random_lists

from tsa_compile.kernels.sparse import flashprefill_lists, minference_lists
from tsa_compile.kernels.sparse.antidiagonals import Tiling
from tsa_compile.kernels.sparse.blocks import BLOCK, blocks_triton
from tsa_compile.kernels.sparse.fewest import Search
from tsa_compile.kernels.sparse.flashprefill import flashprefill_triton
from tsa_compile.kernels.sparse.flexprefill import flexprefill_triton
from tsa_compile.kernels.sparse.last_rows import Splitting
from tsa_compile.kernels.sparse.minference import minference_triton
from tsa_compile.kernels.sparse.vertical_slash import vertical_slash_triton
from tsa_compile.kernels.sparse.xattention import xattention_triton
from tsa_compile.kernels.tiles import Tiles

Candidates = Iterator[tuple[str, Callable[[], Any]]]
BLOCK_TILES = (
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4),
    (128, 128, 8, 2),
)  # fmt: skip
TILINGS = (
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3), (128, 128, 128, 8, 3),
)  # fmt: skip


def block_candidates(inputs: Inputs) -> Candidates:
    """The kernel on lists of random blocks, and on lists that FlashPrefill makes."""
    blocks = -(-inputs.length // BLOCK)
    cases = {
        "random 5 %": random_lists(inputs.query.shape[1], blocks, 0.05, str(inputs.query.device)),
        "random 10 %": random_lists(inputs.query.shape[1], blocks, 0.1, str(inputs.query.device)),
        "FlashPrefill .05": flashprefill_lists(inputs.query, inputs.key, inputs.scale, alpha=0.05),
    }
    for (case, lists), sizes, lag in itertools.product(cases.items(), BLOCK_TILES, (True, False)):
        tiles = Tiles(*sizes, use_tma=True, lag=lag)
        call = functools.partial(blocks_triton, *inputs.tensors, inputs.scale, *lists, tiles=tiles)
        yield f"{case}: {sizes}{', lag' if lag else ''}", call


def flashprefill_candidates(inputs: Inputs) -> Candidates:
    """All of the selector; its second kernel is cut differently."""
    for block_n, warps, stages in itertools.product((32, 64, 128), (4, 8), (1, 2, 3)):
        options = {"block_n": block_n, "num_warps": warps, "num_stages": stages}
        call = functools.partial(flashprefill_triton, inputs.query, inputs.key, inputs.scale, **options)
        yield f"{block_n} means, {warps} warps, {stages} stages", call


def xattention_candidates(inputs: Inputs) -> Candidates:
    """All of the selector at stride 16; its first kernel is cut differently."""
    for sizes, units in itertools.product(TILINGS, (0, 2, 4, 8)):
        tiling = Tiling(*sizes, use_tma=units > 0, units=units)
        call = functools.partial(xattention_triton, inputs.query, inputs.key, inputs.scale, tiling=tiling)
        yield f"{sizes}{f', TMA, {units} units' if units else ''}", call


def flexprefill_candidates(inputs: Inputs) -> Candidates:
    """All of the selector: as it is, last_rows.py cut differently, and with query-aware heads alone, fewest.py."""
    shared = (inputs.query, inputs.key, inputs.scale)
    for span, columns, warps, stages in itertools.product((4, 8, 16), (64, 128), (4, 8), (1, 2, 3)):
        splitting = Splitting(span, columns, num_warps=warps, num_stages=stages)
        call = functools.partial(flexprefill_triton, *shared, splitting=splitting)
        yield f"span {span}, {columns} columns, {warps} warps, {stages} stages", call
    for splits, chunk, warps, means in itertools.product((32, 64, 128), (512, 1024), (4, 8), (32, 64)):
        cut = Search(splits, chunk, warps)
        call = functools.partial(flexprefill_triton, *shared, tau=2.0, cut=cut, means=means)
        yield f"query-aware: {splits} splits of {chunk}, {warps} warps, {means} means", call


def minference_candidates(inputs: Inputs) -> Candidates:
    """All of the selector; its sums are cut differently."""
    for span, dims, warps, stages in itertools.product((4, 8, 16, 32), (64, 128), (4, 8), (1, 2)):
        splitting = Splitting(span=span, dims=dims, num_warps=warps, num_stages=stages)
        call = functools.partial(minference_triton, inputs.query, inputs.key, inputs.scale, splitting=splitting)
        yield f"span {span}, {dims} dims, {warps} warps, {stages} stages", call


def vertical_slash_candidates(inputs: Inputs) -> Candidates:
    """The kernel on MInference's lists: mostly diagonals, and mostly columns."""
    cases = {
        f"{vertical} + {slash}": minference_lists(inputs.query, inputs.key, inputs.scale, vertical=vertical, slash=slash)
        for vertical, slash in ((1000, 6096), (3500, 100))
    }
    for (case, lists), warps, stages, lag in itertools.product(cases.items(), (4, 8), (2, 3), (True, False)):
        tiles = Tiles(64, 64, warps, stages, use_tma=True, lag=lag)
        call = functools.partial(vertical_slash_triton, *inputs.tensors, inputs.scale, *lists, tiles=tiles)
        yield f"{case}: {warps} warps, {stages} stages{', lag' if lag else ''}", call


KINDS: dict[str, Callable[[Inputs], Candidates]] = {
    "blocks": block_candidates,
    "flashprefill": flashprefill_candidates,
    "xattention": xattention_candidates,
    "flexprefill": flexprefill_candidates,
    "minference": minference_candidates,
    "vertical_slash": vertical_slash_candidates,
}


def measure(candidates: Candidates, seconds: float) -> list[list[str]]:
    """A line for each candidate, the fastest first, those that cannot run last."""
    calls: dict[str, list[Callable[[], Any]]] = {}
    refused = []
    for name, call in candidates:
        try:
            call()
            torch.cuda.synchronize()
            calls[name] = [call]
        except Exception as error:  # noqa: BLE001, whatever it is (too much shared memory, mostly) goes into the table
            refused.append([name, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"])
    times = take_turns(calls, seconds) if calls else {}
    return [[name, f"{times[name].ms:.3f}"] for name in sorted(times, key=lambda name: times[name].ms)] + refused


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--seconds", type=float, default=0.2, help="measure each candidate for about this long")
    return parser.parse_args(argv)


def main() -> None:
    """Measures and prints."""
    arguments = parse()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    inputs = planted_inputs(Shape(), arguments.length)
    with torch.no_grad():
        for kind in arguments.kinds:
            print(markdown([kind, "ms"], measure(KINDS[kind](inputs), arguments.seconds)), end="\n\n", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
