"""Block-sparse attention on a GPU: the kernel, the selectors, and each method alone and over the rows that TSA keeps.

    python benchmarks/sparse.py --out benchmarks/results              everything, in less than four minutes on an H200
    python benchmarks/sparse.py --parts methods --length 32768        a part of it

    checks      short inputs against the ATen implementations
    kernel      random lists of several densities, against the time that dense cuDNN takes for as many blocks, and against
                FlexAttention over the same lists
    selectors   each selector on all rows, and on the rows that are kept
    methods     on inputs with planted structure (sparse_inputs.py): time, density, share of the attention kept, and the
                relative output error against dense attention, on kept rows and on all rows

Calls take turns. At its power limit a GPU's clock follows what ran before, so a light call pays for a heavy one before it,
as it does in a model, between matrix products. The kernel and the selectors are measured "settled", too: after --settle
seconds of the same call, at the clock that they have by themselves.

A method alone attends from all rows; composed, over the rows that TSA keeps, each head its own or the heads of a group the
same ones, with a floor that leaves no other row blind (FLOOR): the time is then that of the whole op, from scoring to the
floor. Methods take turns, times are medians, and ratios are to dense cuDNN in the same run. The exit code is 1 if a check
fails. Progress goes to stderr, results to stdout and into --out as JSON, Markdown and a figure.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention import Run, describe
from attention_checks import demand
from attention_methods import DENSE, Inputs, Shape, flex, kept, listed_blocks, options, scored, tsa
from attention_timing import take_turns
from sparse_inputs import AnyLists, mass_kept, planted_inputs, random_lists, relative_error
from sparse_report import TITLES, Row, figure, report
from torch import Tensor

from tsa_compile import Floor
from tsa_compile.kernels import registry
from tsa_compile.kernels.sparse import (
    Lists,
    VerticalSlash,
    a_shape_lists,
    block_sparse,
    density,
    flashprefill_lists,
    flexprefill_lists,
    minference_lists,
    xattention_lists,
)
from tsa_compile.kernels.sparse.blocks import BLOCK, block_sparse_attention, blocks_aten, blocks_mask
from tsa_compile.kernels.sparse.flashprefill import flashprefill_aten
from tsa_compile.kernels.sparse.flexprefill import flexprefill_aten
from tsa_compile.kernels.sparse.minference import minference_aten
from tsa_compile.kernels.sparse.vertical_slash import (
    vertical_slash_aten,
    vertical_slash_attention,
    vertical_slash_density,
    vertical_slash_mask,
)
from tsa_compile.kernels.sparse.xattention import xattention_aten

log = logging.getLogger("attention")
FLOOR = Floor(256, 16)
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
METHODS: dict[str, tuple[Callable[..., AnyLists], dict[str, float]]] = {
    "FlashPrefill, alpha 0.1": (flashprefill_lists, {}),
    "FlashPrefill, alpha 0.05": (flashprefill_lists, {"alpha": 0.05}),
    "FlashPrefill, alpha 0.02": (flashprefill_lists, {"alpha": 0.02}),
    "XAttention, stride 16, mass 0.9": (xattention_lists, {}),
    "XAttention, stride 8, mass 0.9": (xattention_lists, {"stride": 8}),
    "FlexPrefill, gamma 0.95": (flexprefill_lists, {}),
    "FlexPrefill, gamma 0.9": (flexprefill_lists, {"gamma": 0.9}),
    "MInference, 1000 + 6096": (minference_lists, {}),
    "MInference, 3500 + 100": (minference_lists, {"vertical": 3500, "slash": 100}),
    "A-shape, 128 + 3968": (a_shape_lists, {}),
}
CHECKED = (
    ("flashprefill", flashprefill_lists, flashprefill_aten, {}),
    ("xattention 16", xattention_lists, xattention_aten, {}),
    ("xattention 8", xattention_lists, xattention_aten, {"stride": 8}),
    ("flexprefill", flexprefill_lists, flexprefill_aten, {"gamma": 0.9, "min_budget": 256}),
    ("flexprefill, query-aware", flexprefill_lists, flexprefill_aten, {"gamma": 0.9, "tau": 2.0, "min_budget": 256}),
    ("minference", minference_lists, minference_aten, {"vertical": 200, "slash": 300}),
)


def kernel_name(method: str) -> str:
    """The method in the registry, where the first who asks puts it."""
    name = f"benchmark: {method}"
    if name not in registry.names():
        selector, settings = METHODS[method]
        block_sparse(name, selector, **settings)
    return name


def dense_call(inputs: Inputs) -> Callable[[], Tensor]:
    """Dense cuDNN, which everything is held against."""
    return DENSE["dense cuDNN"](inputs).call


def checks_part(run: Run, arguments: argparse.Namespace) -> None:
    """Lists differ in no more blocks than rounding explains; outputs equal SDPA's under the same lists."""
    inputs = planted_inputs(Shape(heads=8, kv_heads=2), 4096 - 100, arguments.device)
    count = torch.tensor([3500], dtype=torch.int32, device=arguments.device)
    for name, fast, plain, settings in CHECKED:
        lists = fast(inputs.query, inputs.key, inputs.scale, count, **settings)
        wanted = plain(inputs.query, inputs.key, inputs.scale, count, **settings)
        by_columns = isinstance(lists, VerticalSlash)
        attention, plainly = block_sparse_attention, blocks_aten
        if by_columns:
            attention, plainly = vertical_slash_attention, vertical_slash_aten
        masks = [vertical_slash_mask(found, 3500) if by_columns else blocks_mask(*found) for found in (lists, wanted)]
        differ = (masks[0] != masks[1]).float().mean()
        out = attention(*inputs.tensors, inputs.scale, *lists, count)
        expected = plainly(*(t.float() for t in inputs.tensors), inputs.scale, *lists, count)
        error = relative_error(out[:, :, :3500], expected[:, :, :3500])
        run.attempt(f"check of {name}'s lists", functools.partial(demand, float(differ), 5e-3, f"{name}: lists"))
        run.attempt(f"check of {name}'s output", functools.partial(demand, error, 1e-2, f"{name}: output"))
        log.info("check of %s: %.2g of the blocks differ, output error %.2g", name, differ, error)


def flex_call(inputs: Inputs, lists: Lists) -> Callable[[], Tensor]:
    """FlexAttention over lists."""
    return flex(inputs, listed_blocks(inputs.length, lists)).call


def agree(call: Callable[[], Tensor], peer: Callable[[], Tensor]) -> None:
    """Raises where the two compute different things."""
    demand(relative_error(call(), peer()), 1e-2, "the kernel and FlexAttention")


def kernel_part(run: Run, arguments: argparse.Namespace) -> None:
    """Random lists, by the kernel and by FlexAttention."""
    inputs, blocks = planted_inputs(arguments.shape, arguments.length, arguments.device), -(-arguments.length // BLOCK)
    rows: dict[Any, Row] = {}
    calls: dict[Any, list[Callable[[], Tensor]]] = {"dense": [dense_call(inputs)]}
    calls["dense"][0]()
    for wanted in DENSITIES:
        lists = random_lists(arguments.shape.heads, blocks, wanted, arguments.device)
        rows[wanted] = {"density": float(density(lists, capacity=arguments.length))}
        peer = flex_call(inputs, lists)
        call = functools.partial(block_sparse_attention, *inputs.tensors, inputs.scale, *lists)
        ran = run.attempt(f"kernel at density {wanted}", functools.partial(agree, call, peer))
        if isinstance(ran, str):
            rows[wanted]["failed"] = ran
        else:
            calls[wanted], calls["flex", wanted] = [call], [peer]
    times = take_turns(calls, arguments.seconds)
    own = {case: found for case, found in calls.items() if not isinstance(case, tuple)}  # without FlexAttention
    settled = take_turns(own, arguments.seconds, settle_ms=1e3 * arguments.settle)
    dense_ms = times["dense"].ms
    flops = 2.0 * arguments.length**2 * arguments.shape.heads * arguments.shape.head_dim
    for wanted, row in rows.items():
        if wanted in times:
            ms, share = times[wanted].ms, row["density"]
            row |= {"ms": ms, "tflops": share * flops / ms / 1e9, "rate": share * dense_ms / ms, "dense_ms": dense_ms}
            row |= {"goal_ms": share * dense_ms / 0.7, "flex_ms": times["flex", wanted].ms}
            row["settled_ms"] = settled[wanted].ms
            row["settled_rate"] = share * settled["dense"].ms / settled[wanted].ms
    run.parts["kernel"] = list(rows.values())
    log.info("kernel: %s of dense cuDNN's rate", [round(row.get("rate", 0), 2) for row in rows.values()])


def selection(inputs: Inputs, rows: int, count: Tensor | None = None, *, shared: bool = False) -> Tensor:
    """The positions that TSA keeps, [1, H, rows], or [1, G, rows] where the heads of a group share theirs."""
    scores = scored(inputs)
    if shared:
        scores = scores.unflatten(1, (inputs.key.shape[1], -1)).mean(2)
    return tsa.select(scores, count, rows)


def of_heads(positions: Tensor, inputs: Inputs) -> Tensor:
    """The positions of each head, [1, H, n]."""
    return positions.repeat_interleave(inputs.query.shape[1] // positions.shape[1], 1)


def kept_rows(inputs: Inputs, keep: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed queries and keys, and their number, as the op hands them to a selector: rounded up, for TMA's views."""
    number = kept(inputs.length, keep)
    rows = min(registry.get(kernel_name(next(iter(METHODS)))).round_rows(number), inputs.length)
    count = torch.tensor([number], dtype=torch.int32, device=inputs.query.device)
    query, key, _ = tsa.compress(*inputs.tensors, selection(inputs, rows, count), count)
    return query, key, count


def selectors_part(run: Run, arguments: argparse.Namespace) -> None:
    """Each selector on all rows, and on those that are kept."""
    inputs = planted_inputs(arguments.shape, arguments.length, arguments.device)
    query, key, count = kept_rows(inputs, arguments.keep)
    rows: dict[Any, Row] = {}
    calls: dict[Any, list[Callable[[], Any]]] = {"dense": [dense_call(inputs)]}
    calls["dense"][0]()
    for method, (selector, settings) in METHODS.items():
        for form, tensors, real in (("all", (inputs.query, inputs.key), None), ("kept", (query, key), count)):
            row = rows[method, form] = {"method": method, "rows": inputs.length if real is None else int(real)}
            call = functools.partial(selector, *tensors, inputs.scale, real, **settings)
            ran = run.attempt(f"selector {method}", call)
            if isinstance(ran, str):
                row["failed"] = ran
            else:
                calls[method, form] = [call]
            del ran
    times = take_turns(calls, arguments.seconds)
    settled = take_turns(calls, arguments.seconds, settle_ms=1e3 * arguments.settle)
    for case, row in rows.items():
        if case in times:
            row |= {"ms": times[case].ms, "share": times[case].ms / times["dense"].ms}
            row["settled_ms"] = settled[case].ms
            row["settled_share"] = settled[case].ms / settled["dense"].ms
    run.parts["selectors"] = list(rows.values())
    log.info("selectors: %s", [(row["method"], round(row.get("ms", 0), 2)) for row in rows.values()])


def share_of(lists: AnyLists, rows: int) -> float:
    """The density of lists of one item."""
    return float(vertical_slash_density(lists, rows) if isinstance(lists, VerticalSlash) else density(lists, capacity=rows))


def describe_alone(method: str, inputs: Inputs) -> Row:
    """The density of a method's lists on all rows, and what they hold."""
    selector, settings = METHODS[method]
    lists = selector(inputs.query, inputs.key, inputs.scale, None, **settings)
    return {"density": share_of(lists, inputs.length), "mass": mass_kept(inputs, lists, None)}


def describe_composed(method: str | None, inputs: Inputs, positions: Tensor) -> Row:
    """The same over the rows that TSA keeps, with their floor; without a method all of their blocks."""
    if method is None:
        return {"density": 1.0, "mass": mass_kept(inputs, None, of_heads(positions, inputs), FLOOR)}
    query, key, _ = tsa.compress(*inputs.tensors, positions, None)
    selector, settings = METHODS[method]
    lists = selector(query, key, inputs.scale, None, **settings)
    mass = mass_kept(inputs, lists, of_heads(positions, inputs), FLOOR)
    return {"density": share_of(lists, query.shape[2]), "mass": mass}


Form = tuple[Callable[[], Tensor], Callable[[], Row], Tensor]
"""What is called, what is known of its blocks, and the positions that it attends from."""


def forms(method: str | None, inputs: Inputs, keep: float, selections: dict[str, Tensor]) -> dict[str, Form]:
    """A method over each selection, and alone if there is one."""
    name = "auto" if method is None else kernel_name(method)
    found: dict[str, Form] = {}
    own = next(iter(selections.values()))
    if method is not None:
        alone = functools.partial(registry.get(name).causal, *inputs.tensors, inputs.scale)
        found["all"] = (alone, functools.partial(describe_alone, method, inputs), own)
    for form, positions in selections.items():
        shared = positions.shape[1] < inputs.query.shape[1]
        scalars = options(inputs.scale, keep=keep, kernel=name, shared=shared, floor=FLOOR)
        op = functools.partial(tsa.sparse_attention, *inputs.tensors, *scalars)
        facts = functools.partial(describe_composed, method, inputs, positions)
        found[form] = (op, facts, of_heads(positions, inputs))
    return found


def methods_part(run: Run, arguments: argparse.Namespace) -> None:
    """Each method alone and composed, TSA alone, and dense attention."""
    inputs = planted_inputs(arguments.shape, arguments.length, arguments.device)
    number, form = kept(inputs.length, arguments.keep), f"kept {arguments.keep}"
    selections = {form: selection(inputs, number), f"{form}, by groups": selection(inputs, number, shared=True)}
    calls: dict[Any, list[Callable[[], Tensor]]] = {("dense cuDNN", "all"): [dense_call(inputs)]}
    rows: dict[Any, Row] = {("dense cuDNN", "all"): {"method": "dense cuDNN", "form": "all"}}
    dense = calls["dense cuDNN", "all"][0]()
    for method in (None, *METHODS):
        title = method or "TSA"
        for form, (call, facts, positions) in forms(method, inputs, arguments.keep, selections).items():
            row = rows[title, form] = {"method": title, "form": form}
            measured = run.attempt(f"{title}, {form}", functools.partial(judge, call, facts, dense, positions))
            if isinstance(measured, str):
                row["failed"] = measured
            else:
                row |= measured
                calls[title, form] = [call]
    del dense
    for case, timing in take_turns(calls, arguments.seconds).items():
        rows[case] |= timing.row()
    run.parts["methods"] = with_ratios(list(rows.values()))
    log.info("methods: %s", [(row["method"], row["form"], row.get("ms")) for row in rows.values()])


def judge(call: Callable[[], Tensor], facts: Callable[[], Row], dense: Tensor, positions: Tensor) -> Row:
    """A method's output against dense attention, with what is known of its blocks."""
    out = call()
    errors = {"error_kept": relative_error(out, dense, positions), "error_all": relative_error(out, dense)}
    del out
    return facts() | errors


def with_ratios(rows: list[Row]) -> list[Row]:
    """Adds the speedup over dense attention, and that of each method composed over the same alone."""
    alone = {row["method"]: row["ms"] for row in rows if row["form"] == "all" and "ms" in row}
    for row in rows:
        if "ms" in row and "dense cuDNN" in alone:
            row["speedup"] = alone["dense cuDNN"] / row["ms"]
            if row["form"] != "all" and row["method"] in alone:
                row["gain"] = alone[row["method"]] / row["ms"]
    return rows


PARTS: dict[str, Callable[[Run, argparse.Namespace], None]] = {
    "checks": checks_part,
    "kernel": kernel_part,
    "selectors": selectors_part,
    "methods": methods_part,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--keep", type=float, default=0.675, help="share of the tokens that TSA keeps")
    parser.add_argument("--seconds", type=float, default=0.5, help="measure each call for about this long")
    parser.add_argument("--settle", type=float, default=0.3, help="run a call for this long before it is measured settled")
    parser.add_argument("--verbose", action="store_true", help="show where a method failed")
    parser.add_argument("--out", type=Path, help="folder for sparse.json, sparse.md and sparse.png")
    return parser.parse_args(argv)


def write(folder: Path, run: Run, conditions: Row, text: str) -> None:
    """JSON, Markdown and, of the methods, the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {"conditions": conditions, **run.parts, "failures": run.failures, "wrong": run.wrong}
    (folder / "sparse.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "sparse.md").write_text(text + "\n")
    if run.parts.get("methods"):
        run.attempt("figure", lambda: figure(run.parts["methods"], folder / "sparse.png", conditions["device"]))


def main() -> int:
    """Measures, prints and writes; the exit code."""
    arguments = parse()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    arguments.shape, arguments.device = Shape(), "cuda"
    log.setLevel(logging.DEBUG if arguments.verbose else logging.INFO)
    log.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(relativeCreated)7d ms  %(message)s"))
    log.addHandler(handler)
    run = Run(arguments.seconds)
    run.parts = {name: [] for name in TITLES}
    conditions = describe() | {"length": arguments.length, "keep": arguments.keep}
    conditions |= {"floor": str(FLOOR), "settle": arguments.settle}
    with torch.no_grad():
        for name in arguments.parts:
            run.attempt(name, functools.partial(PARTS[name], run, arguments))
            torch.cuda.empty_cache()
            problems = run.wrong + run.failures
            text = report(conditions, run.parts, problems)
            if arguments.out is not None:  # after each part, so that a run cut short leaves what it had
                write(arguments.out, run, conditions, text)
    print(text)
    log.info("%d wrong, %d failures%s", len(run.wrong), len(run.failures), "".join("\n  " + p for p in problems))
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
