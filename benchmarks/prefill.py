"""Time to first token of a Llama-3.1-8B-shaped model: eager, torch.compile, and torch.compile(backend="tsa").

The model has random weights, so the figures are about time and memory, not about quality. Each mode is measured with an
`attention_mask` of ones, which every tokenizer passes, and without a mask. Writes tables, a JSON file and, with matplotlib,
a figure.

    eager, compile   the model as it is, and torch.compile with its own backend
    exact            backend="tsa" with no layer sparse
    sparse           the upper half of the layers keeps .15 of the tokens, with the floor: the default (--keep: other shares)
    wide             the upper two thirds keep .15 (--wide-keep)
    composed         as "wide", with a block-sparse kernel over all tokens in the other layers (--kernels)
    kernel           a block-sparse kernel over all tokens in every layer

    python benchmarks/prefill.py --out benchmarks/results --resume --stop-after 420        again, until it says "complete"
    python benchmarks/prefill.py --layers 2 --lengths 8192 --modes eager exact             a quick look
    python benchmarks/prefill.py --layers 2 --lengths 512 1024 2048 4096 8192 16384 32768 65536 131072 --masks ones \\
        --modes exact sparse --turns --name lengths --out benchmarks/results     where sparse layers begin to pay
    python benchmarks/prefill.py --lengths 131072 --modes eager wide kernel composed --masks ones \\
        --name prefill_block_sparse --out benchmarks/results             with a block-sparse kernel in the other layers

    python benchmarks/prefill.py --chunk 8192 --lengths 65536 131072 --modes exact sparse --masks ones \
        --out benchmarks/results             whole prompts against chunks of 8K through a cache (prefill_chunks.py)

With random weights attention has no structure. So a kernel whose work depends on it finds little to leave out, which says
nothing about real models ("minference": its diagonals lie anywhere and so touch every tile); that of "a_shape" is fixed.

One mode is measured after the other, and its compiled code dropped, as 32 layers in several modes would fill the memory's
rest. With --turns the modes take turns at each length, so that a difference of 1% is not the host's or the clock's. Results
are written after each mode. With --resume what is there already, measured under the same conditions, is kept and not
measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prefill_chunks
import torch
from prefill_report import COMPOSED, DESCRIPTIONS, UPPER, Row, mask_name, table, write

from tsa_compile import KeepRatio, Prefill, TSAConfig, prefill, reports
from tsa_compile.shapes import build, model_config

MASKS = {"both": (True, False), "ones": (True,), "none": (False,)}
LONG, LONG_REPEATS = 131072, 2
"""From this length on there are no more repeats than this."""
Key = tuple[str, bool, int]  # mode, masked, length


def build_model(layers: int) -> Any:
    """Llama-3.1-8B's shape with random bfloat16 weights, made on the GPU."""
    return build(model_config("llama-3.1-8b", layers), "cuda", torch.bfloat16)


def modes(arguments: argparse.Namespace) -> list[str]:
    """What is measured: a mode for every share of kept tokens, by its number, and for every kernel, by its name."""
    wide = f"{arguments.wide_keep}{UPPER}{2 * arguments.layers // 3}"
    expanded = {
        "sparse": [*map(str, arguments.keep)],
        "wide": [wide],
        "kernel": arguments.kernels,
        "composed": [f"{kernel}{COMPOSED}{wide}" for kernel in arguments.kernels],
    }
    return [name for mode in arguments.modes for name in expanded.get(mode, [mode])]


def configuration(mode: str, layers: int) -> TSAConfig:
    """The settings of a mode that is neither eager nor plain torch.compile, for a model of so many layers."""
    if mode == "exact":
        return TSAConfig(layers=[])
    kernel, _, sparse = mode.rpartition(COMPOSED)
    if not sparse[0].isdigit():
        return TSAConfig(layers=[], dense_kernel=sparse)
    keep, _, last = sparse.partition(UPPER)
    upper = range(layers - int(last), layers) if last else None
    return TSAConfig(budget=KeepRatio(float(keep)), layers=upper, dense_kernel=kernel or None)


def compiled(model: Any, mode: str, dynamic: bool = False) -> Callable[..., Any]:
    """The model in one of the modes; `dynamic`: by `tsa_compile.prefill(model, dynamic=True)`, of its kinds of modes."""
    if isinstance(model._compiled_call_impl, Prefill):
        model._compiled_call_impl.remove()
    if mode == "eager":
        return model
    if mode == "compile":
        return torch.compile(model)
    config = configuration(mode, model.config.num_hidden_layers)
    if dynamic:
        prefill(model, config, dynamic=True)
        return model
    return torch.compile(model, backend="tsa", options={"config": config})


def inputs(length: int, masked: bool = True) -> dict[str, Any]:
    """Fresh random tokens and a mask of ones; the length is marked dynamic, so that one compilation serves all."""
    ids = torch.randint(1, 128256, (1, length), device="cuda")
    mask = torch.ones_like(ids) if masked else None
    for tensor in filter(lambda tensor: tensor is not None, (ids, mask)):
        torch._dynamo.maybe_mark_dynamic(tensor, 1)
    return {"input_ids": ids, "attention_mask": mask, "logits_to_keep": 1, "use_cache": True}


def timed(call: Callable[..., Any], length: int, masked: bool) -> tuple[float, int]:
    """Milliseconds of one prefill, and the peak memory above what was allocated before it, in bytes."""
    batch = inputs(length, masked)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    call(**batch)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started), torch.cuda.max_memory_allocated() - before


def measure(
    calls: dict[str, Callable[..., Any]], length: int, repeats: int, masked: bool, summaries: dict[str, str]
) -> dict[str, Row]:
    """Median milliseconds of modes that take turns, peak memory in GiB, and the seconds of the first call.

    At least `repeats` rounds (LONG_REPEATS where prompts are LONG), and up to 100 of them while they are short. Running out
    of memory is a result. `summaries` keeps what the last compilation of each mode reported, for lengths that need none.
    """
    repeats = min(repeats, LONG_REPEATS) if length >= LONG else repeats
    rows: dict[str, Row] = {mode: {"mode": mode, "mask": masked, "length": length} for mode in calls}
    found: dict[str, list[tuple[float, int]]] = {}
    for mode, call in calls.items():
        before = len(reports())
        try:
            rows[mode]["first_call_s"] = round(timed(call, length, masked)[0] / 1e3, 1)
            found[mode] = []
        except torch.OutOfMemoryError as error:
            rows[mode]["error"] = "out of memory: " + str(error).split(".")[0]
        torch.cuda.empty_cache()
        if len(reports()) > before:
            summaries[mode] = reports()[-1].summary
        if mode in summaries:
            rows[mode]["report"] = summaries[mode]
    rounds, spent = 0, 0.0
    while found and (rounds < repeats or (rounds < 100 and spent < 400 * len(found))):
        for mode in found:
            found[mode].append(timed(calls[mode], length, masked))
            spent += found[mode][-1][0]
        rounds += 1
    for mode, measured in found.items():
        times = [ms for ms, _ in measured]
        rows[mode] |= {
            "ms": round(statistics.median(times), 2),
            "range_ms": [round(min(times), 2), round(max(times), 2)],
            "peak_gib": round(max(peak for _, peak in measured) / 2**30, 2),
        }
    return rows


def measure_modes(
    model: Any, names: list[str], masked: bool, lengths: list[int], repeats: int
) -> tuple[list[Row], dict[str, float]]:
    """The rows of modes that take turns, and the relative error of the exact ones' logits."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 16 * len(names)  # they share the model's code, and so its limit
    rows = []
    summaries: dict[str, str] = {}
    with torch.no_grad():
        calls = {name: compiled(model, name) for name in names}
        for length in lengths:
            for row in measure(calls, length, repeats, masked, summaries).values():
                print(json.dumps(row), flush=True)
                rows.append(row)
            torch.cuda.empty_cache()
        checked = [name for name in names if name in DESCRIPTIONS and name != "eager" and masked]
        return rows, {name: logits_error(model, calls[name]) for name in checked}


def check_logits(call: Callable[..., Any], length: int = 4096) -> torch.Tensor:
    """The last logits for one fixed prompt, a quarter of it padding on the left."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    ids = torch.randint(1, 128256, (1, length), device="cuda", generator=generator)
    mask = torch.ones_like(ids)
    mask[0, : length // 4] = 0
    return call(**(inputs(length) | {"input_ids": ids, "attention_mask": mask})).logits.float()


def logits_error(model: Any, call: Callable[..., Any]) -> float:
    """Relative error of the logits against the eager model's.

    The model computes in bfloat16, so any other order of operations shows: torch.compile's own error is the yardstick.
    """
    wanted = check_logits(model)
    return round(float((check_logits(call) - wanted).norm() / wanted.norm()), 4)


def earlier(results: Path, conditions: Row) -> tuple[dict[Key, Row], dict[str, float]]:
    """The rows of an earlier run, and its errors; none if there is no such file.

    Raises:
        SystemExit: it was made under other conditions.
    """
    if not results.exists():
        return {}, {}
    found = json.loads(results.read_text())
    errors = found["conditions"].pop("relative_error_against_eager", {})
    if found["conditions"] != conditions:
        raise SystemExit(
            f"{results} was made under other conditions, {found['conditions']}, and not {conditions}: leave out --resume to "
            "replace it, or give another --name"
        )
    return {(row["mode"], row["mask"], row["length"]): row for row in found["rows"]}, errors


def missing(arguments: argparse.Namespace, done: dict[Key, Row]) -> Iterator[tuple[list[str], bool, list[int]]]:
    """What is yet to be measured: modes that take turns, whether with a mask, and the lengths."""
    names = modes(arguments)
    for group in [names] if arguments.turns else [[name] for name in names]:
        for masked in MASKS[arguments.masks]:
            keys = {length: {(name, masked, length) for name in group} for length in arguments.lengths}
            lengths = [length for length in arguments.lengths if not keys[length] <= done.keys()]
            if lengths:
                yield group, masked, lengths


def ordered(rows: dict[Key, Row]) -> list[Row]:
    """Exact modes first, the others as they came."""
    names = [*DESCRIPTIONS]
    return sorted(rows.values(), key=lambda row: names.index(row["mode"]) if row["mode"] in names else len(names))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    choices = [*DESCRIPTIONS, "sparse", "wide", "composed", "kernel"]
    parser.add_argument("--modes", nargs="+", choices=choices, default=choices[:-1])
    parser.add_argument("--masks", choices=list(MASKS), default="both", help="an attention_mask of ones, none, or both")
    parser.add_argument(
        "--kernels", nargs="+", default=["a_shape"], help='block-sparse kernels, for "kernel" and "composed"'
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--keep", type=float, nargs="+", default=[TSAConfig().budget.ratio], help='shares of the tokens kept, for "sparse"'
    )
    parser.add_argument("--wide-keep", type=float, default=0.15, help='the share kept, for "wide" and "composed"')
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, metavar="TOKENS", help="the prompt in chunks of so many tokens as well")
    parser.add_argument(
        "--dynamic",
        action="store_true",
        help="with --chunk: chunks by prefill(model, dynamic=True), the whole prompt without",
    )
    parser.add_argument("--turns", action="store_true", help="modes take turns at each length")
    parser.add_argument("--resume", action="store_true", help="keep what is there already in --out")
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), metavar="SECONDS", help="begin no further mode after that"
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--name", default="prefill", help="what the result files are called")
    arguments = parser.parse_args(argv)
    if arguments.resume and arguments.out is None:
        parser.error("--resume needs --out, the folder of what is there already")
    return arguments


def describe_run(arguments: argparse.Namespace) -> Row:
    """The conditions: rows of runs in which these are the same may stand in one table."""
    import transformers

    settings = TSAConfig().to_dict()
    return {
        "device": torch.cuda.get_device_name(), "torch": str(torch.__version__), "transformers": transformers.__version__,
        "layers": arguments.layers, "repeats": arguments.repeats, "turns": arguments.turns,
        **{name: settings[name] for name in ("window", "score", "floor", "min_tokens")},
    }  # fmt: skip


def run(arguments: argparse.Namespace, conditions: Row, make_model: Callable[[int], Any]) -> tuple[list[Row], bool]:
    """Measures what is missing, and writes after each mode; the rows, and whether they are complete."""
    started, model = time.monotonic(), None
    results = None if arguments.out is None else arguments.out / arguments.name
    rows: dict[Key, Row] = {}
    errors: dict[str, float] = {}
    if arguments.resume and results is not None:
        rows, errors = earlier(results.with_suffix(".json"), conditions)
    for group, masked, lengths in [*missing(arguments, rows)]:
        if time.monotonic() - started > arguments.stop_after:
            return ordered(rows), False
        model = model if model is not None else make_model(arguments.layers)
        found, checked = measure_modes(model, group, masked, lengths, arguments.repeats)
        rows |= {(row["mode"], masked, row["length"]): row for row in found}
        errors |= checked
        if results is not None:
            write(ordered(rows), conditions | {"relative_error_against_eager": errors}, results)
        print(f"{', '.join(group)}, {mask_name(masked)}: {time.monotonic() - started:.0f} s so far", flush=True)
    return ordered(rows), True


def in_chunks(arguments: argparse.Namespace, conditions: Row) -> None:
    """Prompts whole and in chunks, by all modes that were asked for."""
    model, masks = build_model(arguments.layers), MASKS[arguments.masks]
    conditions = conditions | {"chunk": arguments.chunk, "dynamic": arguments.dynamic}

    def make(model: Any, mode: str, chunked: bool) -> Callable[..., Any]:
        return compiled(model, mode, arguments.dynamic and chunked)

    results = None if arguments.out is None else arguments.out / f"{arguments.name}_chunks"
    known: list[Row] = prefill_chunks.earlier(conditions, results) if arguments.resume and results is not None else []
    rows, options = known, (masks, arguments.lengths, arguments.chunk, arguments.repeats)
    for rows in prefill_chunks.run(model, make, modes(arguments), *options, known):
        if results is not None:
            prefill_chunks.write(rows, conditions, results)
    print(f"\n{json.dumps(conditions)}\n\n{prefill_chunks.table(rows)}\n")


def main() -> None:
    """Measures, prints and writes."""
    arguments = parse()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; examples/quickstart.py also runs on a CPU")
    conditions = describe_run(arguments)
    if arguments.chunk is not None:
        return in_chunks(arguments, conditions)
    rows, complete = run(arguments, conditions, build_model)
    print(f"\n{json.dumps(conditions)}\n\n{table(rows)}\n")
    print("complete" if complete else "stopped early: go on with --resume")


if __name__ == "__main__":
    main()
