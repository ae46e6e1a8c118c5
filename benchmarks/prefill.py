"""Time to first token of a Llama-3.1-8B-shaped model: eager, torch.compile, and torch.compile(backend="tsa").

The model has random weights, so the figures are about time and memory, not about quality. `attention_mask` (ones) is
passed, as every tokenizer does. Writes a table, a JSON file and, with matplotlib, a figure.

    python benchmarks/prefill.py --lengths 8192 32768 131072 --out benchmarks/results
    python benchmarks/prefill.py --layers 2 --lengths 8192 --modes eager exact        a quick look
    python benchmarks/prefill.py --layers 2 --lengths 512 1024 2048 4096 8192 16384 32768 65536 131072 \\
        --modes exact sparse --turns --name lengths --out benchmarks/results     where sparse layers begin to pay
    python benchmarks/prefill.py --lengths 131072 --modes eager kernel composed --kernels a_shape \\
        --name prefill_block_sparse --out benchmarks/results             with a block-sparse kernel in every layer

With random weights attention has no structure. So a kernel whose work depends on it finds little to leave out, which says
nothing about real models ("minference": its diagonals lie anywhere and so touch every tile); that of "a_shape" is fixed.

One mode is measured after the other, and its compiled code dropped, as 32 layers in several modes would fill the memory's
rest. With --turns the modes take turns at each length, so that a difference of 1% is not the host's or the clock's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tsa_compile import KeepRatio, TSAConfig, reports

DESCRIPTIONS = {
    "eager": "eager",
    "compile": "torch.compile",
    "exact": 'backend="tsa", exact',
}
SPARSE = 'backend="tsa", upper half at keep '
COMPOSED = "+"  # "a_shape+0.675": that kernel in every layer, over that share of the tokens in the upper half


def build_model(layers: int) -> Any:
    """Llama-3.1-8B's shape with random bfloat16 weights, made on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def modes(arguments: argparse.Namespace) -> list[str]:
    """What is measured: a mode for every share of kept tokens, by its number, and for every kernel, by its name."""
    expanded = {
        "sparse": [*map(str, arguments.keep)],
        "kernel": arguments.kernels,
        "composed": [f"{kernel}{COMPOSED}{arguments.keep[0]}" for kernel in arguments.kernels],
    }
    return [name for mode in arguments.modes for name in expanded.get(mode, [mode])]


def configuration(mode: str) -> TSAConfig:
    """The settings of a mode that is neither eager nor plain torch.compile."""
    if mode == "exact":
        return TSAConfig(layers=[])
    kernel, composed, keep = mode.rpartition(COMPOSED)
    if composed:
        return TSAConfig(budget=KeepRatio(float(keep)), kernel=kernel, dense_kernel=kernel)
    if mode[0].isdigit():
        return TSAConfig(budget=KeepRatio(float(mode)))
    return TSAConfig(layers=[], dense_kernel=mode)


def compiled(model: Any, mode: str) -> Callable[..., Any]:
    """The model in one of the modes."""
    if mode == "eager":
        return model
    if mode == "compile":
        return torch.compile(model)
    return torch.compile(model, backend="tsa", options={"config": configuration(mode)})


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
) -> dict[str, dict[str, Any]]:
    """Median milliseconds of modes that take turns, peak memory in GiB, and the seconds of the first call.

    At least `repeats` rounds, and up to 100 of them while they are short. Running out of memory is a result. `summaries`
    keeps what the last compilation of each mode reported, for lengths that need none.
    """
    rows: dict[str, dict[str, Any]] = {mode: {"mode": mode, "length": length} for mode in calls}
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
    model: Any, names: list[str], arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """All lengths of modes that take turns; and the logits to compare with other modes'."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 16 * len(names)  # they share the model's code, and so its limit
    rows = []
    summaries: dict[str, str] = {}
    with torch.no_grad():
        calls = {name: compiled(model, name) for name in names}
        for length in arguments.lengths:
            for row in measure(calls, length, arguments.repeats, not arguments.no_mask, summaries).values():
                print(json.dumps(row), flush=True)
                rows.append(row)
            torch.cuda.empty_cache()
        checked = [name for name in names if name in DESCRIPTIONS and not arguments.no_mask]
        return rows, {name: check_logits(calls[name]) for name in checked}


def check_logits(call: Callable[..., Any], length: int = 4096) -> torch.Tensor:
    """The last logits for one fixed prompt, a quarter of it padding on the left."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    ids = torch.randint(1, 128256, (1, length), device="cuda", generator=generator)
    mask = torch.ones_like(ids)
    mask[0, : length // 4] = 0
    return call(**(inputs(length) | {"input_ids": ids, "attention_mask": mask})).logits.float()


def errors_against_eager(logits: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of the logits.

    The model computes in bfloat16, so any other order of operations shows: torch.compile's own error is the yardstick.
    """
    wanted = logits.get("eager")
    if wanted is None:
        return {}
    found = {mode: float((value - wanted).norm() / wanted.norm()) for mode, value in logits.items() if mode != "eager"}
    return {mode: round(value, 4) for mode, value in found.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a mode, a column a length; milliseconds, and the speed relative to the first mode."""
    lengths = sorted({row["length"] for row in rows})
    base = rows[0]["mode"]
    by_key = {(row["mode"], row["length"]): row for row in rows}
    lines = ["| | " + " | ".join(f"{length / 1024:g}K" for length in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        cells = [_cell(by_key.get((mode, length)), by_key.get((base, length))) for length in lengths]
        lines.append(f"| {describe(mode)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(mode: str) -> str:
    """A mode in words."""
    if mode in DESCRIPTIONS:
        return DESCRIPTIONS[mode]
    kernel, composed, keep = mode.rpartition(COMPOSED)
    if composed:
        return f"{SPARSE}{keep}, kernel {kernel} in all layers"
    return SPARSE + mode if mode[0].isdigit() else f'backend="tsa", kernel {mode} in all layers'


def _cell(row: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "ms" not in row:
        return "out of memory"
    relative = f" ({base['ms'] / row['ms']:.2f}x)" if base and "ms" in base else ""
    return f"{row['ms']:,.{0 if row['ms'] >= 100 else 1}f} ms{relative}, {row['peak_gib']:.1f} GiB"


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed relative to the first mode, by length."""
    from matplotlib import pyplot

    base = {row["length"]: row["ms"] for row in rows if row["mode"] == rows[0]["mode"] and "ms" in row}
    _, axes = pyplot.subplots(figsize=(6, 4))
    for mode in dict.fromkeys(row["mode"] for row in rows):
        points = [(row["length"], base[row["length"]] / row["ms"]) for row in rows if row["mode"] == mode and "ms" in row]
        axes.plot(*zip(*points, strict=True), marker="o", label=describe(mode))
        if len(points) < len(base):
            axes.annotate("then out of memory", points[-1], xytext=(8, 0), textcoords="offset points", va="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(base), [f"{length / 1024:g}K" for length in sorted(base)])
    axes.set_xlabel("prompt length")
    axes.set_ylabel(f"prefill speed, {describe(rows[0]['mode'])} = 1")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=2, frameon=False)
    axes.grid(alpha=0.3)
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    choices = [*DESCRIPTIONS, "sparse", "kernel", "composed"]
    parser.add_argument("--modes", nargs="+", choices=choices, default=[*DESCRIPTIONS, "sparse"])
    parser.add_argument(
        "--kernels", nargs="+", default=["minference"], help='block-sparse kernels, for "kernel" and "composed"'
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--keep", type=float, nargs="+", default=[0.675, 0.5], help="shares of the tokens that sparse layers keep"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turns", action="store_true", help="modes take turns at each length")
    parser.add_argument("--no-mask", action="store_true", help="pass no attention_mask")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--name", default="prefill", help="what the result files are called")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device; examples/quickstart.py also runs on a CPU")

    model = build_model(arguments.layers)
    rows: list[dict[str, Any]] = []
    logits: dict[str, torch.Tensor] = {}
    names = modes(arguments)
    for group in [names] if arguments.turns else [[name] for name in names]:  # written after each: a run may be cut short
        found, checked = measure_modes(model, group, arguments)
        rows += found
        logits |= checked
        conditions = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "layers": arguments.layers,
            "repeats": arguments.repeats, "turns": arguments.turns,
            "relative_error_against_eager": errors_against_eager(logits),
        }  # fmt: skip
        if arguments.out is not None:
            write(rows, conditions, arguments.out / arguments.name)
    print(f"\n{json.dumps(conditions)}\n\n{table(rows)}")


def write(rows: list[dict[str, Any]], conditions: dict[str, Any], results: Path) -> None:
    """JSON, Markdown and a figure."""
    results.parent.mkdir(parents=True, exist_ok=True)
    results.with_suffix(".json").write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=2) + "\n")
    results.with_suffix(".md").write_text(f"{conditions}\n\n{table(rows)}\n")
    figure(rows, results.with_suffix(".png"))


if __name__ == "__main__":
    main()
