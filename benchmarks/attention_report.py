"""What attention.py writes: Markdown tables and a figure, from the rows that are also its JSON."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from attention_behind import KEPT
from colors import color_of

Row = dict[str, Any]
GOALS = {
    8192: {0.08: 0.36, 0.15: 0.38, 0.3: 0.46, 0.5: 0.63},
    32768: {0.08: 0.08, 0.15: 0.10, 0.3: 0.17, 0.5: 0.32},
    131072: {0.08: 0.022, 0.15: 0.038, 0.3: 0.11, 0.5: 0.255},
}
"""By length and share kept: the ratio to dense cuDNN, with the floor, that an H100 should reach."""


def size_of(length: int) -> str:
    """32768 -> 32K."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table."""
    header = list(header)
    rows = [header, ["---"] * len(header), *(list(line) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def failed(row: Row) -> str:
    """What stands in a cell without a figure."""
    return f"failed: {row['failed'][:60]}"


def pivot(rows: list[Row], down: str, across: str, cell: Callable[[Row], str], header: str) -> str:
    """A line for each value of `down`, a column for each of `across` (lengths)."""
    columns = sorted({row[across] for row in rows})
    by_key = {(row[down], row[across]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row[down] for row in rows):
        found = (by_key.get((name, column)) for column in columns)
        lines.append([name, *("" if row is None else failed(row) if "failed" in row else cell(row) for row in found)])
    return markdown([header, *map(size_of, columns)], lines)


def main_tables(rows: list[Row]) -> str:
    """The ratios by length and share, by calls and as a CUDA graph; for each share times with the ratio, and memory."""
    parts = [
        ratio_table(rows, method) for method in ("ours", "ours, CUDA graph") if any(row["method"] == method for row in rows)
    ]
    for keep in sorted({row["keep"] for row in rows if row["keep"] is not None}):
        chosen = [row for share in (None, keep) for row in rows if row["keep"] == share]  # dense methods first
        times = pivot(chosen, "method", "length", _time, f"keep {keep}: ms (ratio to dense cuDNN)")
        memory = pivot(
            [row for row in chosen if "failed" in row or row["memory_gib"] is not None],
            "method", "length", lambda row: f"{row['memory_gib']:.2f}", f"keep {keep}: peak GiB beyond inputs and output",
        )  # fmt: skip
        parts += [times, memory]
    notes = dict.fromkeys(f"{row['method']}: {row['note']}." for row in rows if row.get("note"))
    return "\n\n".join([*parts, *notes])


def ratio_table(rows: list[Row], method: str) -> str:
    """A line for each length, a column for each share kept: the ratio of the method to dense cuDNN, and the goal."""
    chosen = [row for row in rows if row["method"] == method and row["keep"] is not None]
    keeps, by_key = sorted({row["keep"] for row in chosen}), {(row["length"], row["keep"]): row for row in chosen}
    lines = []
    for length in sorted({row["length"] for row in chosen}):
        cells = [_against_goal(by_key.get((length, keep)), GOALS.get(length, {}).get(keep)) for keep in keeps]
        lines.append([size_of(length), *cells])
    return markdown([f"{method} / dense cuDNN", *(f"keep {keep}" for keep in keeps)], lines)


def _against_goal(row: Row | None, goal: float | None) -> str:
    if row is None or row.get("ratio") is None:
        return "" if row is None or "failed" not in row else failed(row)
    if goal is None:
        return f"{row['ratio']:.3f}"
    return f"{row['ratio']:.3f} (goal {goal:g}{'' if row['ratio'] <= goal else ', missed'})"


def _time(row: Row) -> str:
    ratio = f" ({row['ratio']:.3f})" if row.get("ratio") is not None else ""
    share = f", keeps {row['kept']:.3f}" if "Coverage" in row["method"] else ""
    return f"{row['ms']:.3g}{ratio}{share}"


def stage_table(rows: list[Row]) -> str:
    """A line for each stage and length."""
    header = ["tokens", "stage", "GPU ms", "ms in calls", "GB", "GFLOP", "achieved", "ceiling", "least ms", "of it"]
    return markdown(header, map(_stage_line, rows))


def _stage_line(row: Row) -> list[str]:
    start = [size_of(row["length"]), row["stage"]]
    if "failed" in row:
        return [*start, failed(row), *[""] * 7]
    gpu = "not capturable" if row["gpu_ms"] is None else f"{row['gpu_ms']:.4f}"
    if "work" not in row:
        return [*start, gpu, f"{row['ms']:.4f}", *[""] * 6]
    work = row["work"]
    return [
        *start, gpu, f"{row['ms']:.4f}", f"{work['gb']:.3f}", f"{work['gflop']:.0f}" if work["gflop"] else "",
        f"{work['rate']:.3g} {work['unit']}", f"{work['ceiling']:.3g} {work['unit']}", f"{work['least_ms']:.4f}",
        f"{work['least_ms'] / (row['gpu_ms'] or row['ms']):.0%}",
    ]  # fmt: skip


def shape_table(rows: list[Row]) -> str:
    """A line for each shape and length."""
    header = ["shape", "tokens", "cuDNN, ms", "FlashAttention-2, ms", "ours, ms", "ours / best dense", "ours, peak GiB"]
    by_key: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        by_key.setdefault((row["shape"], row["length"]), {})[row["method"]] = row
    lines = []
    for (shape, length), found in by_key.items():
        cells = [failed(row) if "failed" in row else f"{row['ms']:.3g}" for row in map(found.get, _SHAPE_METHODS) if row]
        ours = found["ours"]
        ratio = ours.get("ratio")
        memory = ours.get("memory_gib")
        last = ["" if ratio is None else f"{ratio:.3f}", "" if memory is None else f"{memory:.2f}"]
        lines.append([shape, size_of(length), *cells, *last])
    return markdown(header, lines)


_SHAPE_METHODS = ("dense cuDNN", "dense FlashAttention-2", "ours")


def kernel_table(rows: list[Row]) -> str:
    """A line for each kernel, a column for each count."""
    return pivot(
        rows, "kernel", "count", lambda row: f"{row['ms']:.3g} ms, {row['tflops']:.0f} TFLOP/s",
        "kernel over count of twice as many rows",
    )  # fmt: skip


def behind_table(rows: list[Row]) -> str:
    """A line for each method, a column for each number of keys; and what the cost model's rate would have to be."""
    table = pivot(rows, "method", "length", _behind_cell, f"{rows[0]['rows']} rows behind a cache; keys:")
    found = [row["model_rate"] for row in rows if row["method"] == KEPT and "model_rate" in row]
    said = f"BEHIND_RATE of costs/calls.py by these: {min(found):.2f} to {max(found):.2f}" if found else ""
    return "\n\n".join(filter(None, [table, said]))


def _behind_cell(row: Row) -> str:
    rate = f", {row['tflops']:.0f} TFLOP/s" if "tflops" in row else ""
    return f"{row['ms']:.3g} ms{rate}" + (f" ({row['of_whole']:.2f})" if "of_whole" in row else "")


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "main": ("The sparse layer and its peers", main_tables),
    "stages": ("The stages of a layer, keep 0.3", stage_table),
    "shapes": ("Other shapes, keep 0.3", shape_table),
    "attend": ("Attention over a number of rows that lies on the device", kernel_table),
    "behind": ("Chunks behind a cache, keep 0.3: TFLOP/s, relative to the whole prompt's", behind_table),
}


def report(conditions: Row, parts: dict[str, list[Row]], problems: list[str]) -> str:
    """Everything as Markdown."""
    sections = [f"## {TABLES[name][0]}\n\n{TABLES[name][1](rows)}" for name, rows in parts.items() if rows]
    closing = "Every output was checked." if not problems else "Problems:\n\n" + "\n".join(f"- {p}" for p in problems)
    return "\n\n".join([str(conditions), *sections, closing])


def figure(rows: list[Row], path: Path, title: str) -> None:
    """The ratio to dense cuDNN by length: a colour for each share kept, dashed without the floor; peers in grey."""
    from matplotlib import pyplot

    lengths = sorted({row["length"] for row in rows})
    drawing, axes = pyplot.subplots(figsize=(8, 5.4))
    keeps = sorted({row["keep"] for row in rows if row["method"] == "ours"})
    names = dict.fromkeys(row["method"] for row in rows if row["keep"] is None or "paper" in row["method"])
    for number, name in enumerate(names):
        style = {"linestyle": ("-", "--", ":", "-.")[number % 4], "marker": "os^D"[number % 4]}
        _line(axes, rows, name, None, label=name, color="0.45", linewidth=1.2, **style)
    for keep in keeps:
        draw = functools.partial(_line, axes, rows, keep=keep, color=color_of(f"{keep:g}"))
        draw("ours", label=f"ours, {keep:g} of the tokens kept", linewidth=2.2)
        draw("ours, published", label="_", linewidth=1.2, linestyle="--")
    axes.plot([], [], color="0", linewidth=1.2, linestyle="--", label="the same without the floor, as published")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(lengths, [size_of(length) for length in lengths])
    ticks = [2.0**power for power in range(-6, 4)]
    axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xlabel("tokens")
    axes.set_ylabel("time, dense cuDNN = 1")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", frameon=True, fontsize=8)
    drawing.tight_layout()
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)


def _line(axes: Any, rows: list[Row], name: str, keep: float | None, **style: Any) -> None:
    """A method's line, where it has points; keep None: at any share."""
    wanted = (row for row in rows if row["method"] == name and (keep is None or row["keep"] == keep))
    points = sorted((row["length"], row["ratio"]) for row in wanted if row.get("ratio") is not None)
    if points:
        axes.plot(*zip(*points, strict=True), **({"marker": "o", "markersize": 4} | style))
