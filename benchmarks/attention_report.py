"""What attention.py writes: Markdown tables and a figure, from the rows that are also its JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


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
    """For each share kept: times with the ratio to dense cuDNN, and memory."""
    parts = []
    for keep in sorted({row["keep"] for row in rows if row["keep"] is not None}):
        chosen = [row for row in rows if row["keep"] in (None, keep)]
        times = pivot(chosen, "method", "length", _time, f"keep {keep}: ms (ratio to dense cuDNN)")
        memory = pivot(
            [row for row in chosen if "failed" in row or row["memory_gib"] is not None],
            "method", "length", lambda row: f"{row['memory_gib']:.2f}", f"keep {keep}: peak GiB beyond inputs and output",
        )  # fmt: skip
        parts += [times, memory]
    notes = dict.fromkeys(f"{row['method']}: {row['note']}." for row in rows if row.get("note"))
    return "\n\n".join([*parts, *notes])


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
        f"{work['rate']:.3g} {work['unit']}", f"{work['ceiling']:.3g} {work['unit']}", f"{work['floor_ms']:.4f}",
        f"{work['floor_ms'] / (row['gpu_ms'] or row['ms']):.0%}",
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


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "main": ("The sparse layer and its peers", main_tables),
    "stages": ("The stages of a layer, keep 0.5", stage_table),
    "shapes": ("Other shapes, keep 0.5", shape_table),
    "attend": ("Attention over a number of rows that lies on the device", kernel_table),
}


def report(conditions: Row, parts: dict[str, list[Row]], problems: list[str]) -> str:
    """Everything as Markdown."""
    sections = [f"## {TABLES[name][0]}\n\n{TABLES[name][1](rows)}" for name, rows in parts.items() if rows]
    closing = "Every output was checked." if not problems else "Problems:\n\n" + "\n".join(f"- {p}" for p in problems)
    return "\n\n".join([str(conditions), *sections, closing])


def figure(rows: list[Row], path: Path) -> None:
    """The ratio to dense cuDNN by length, a panel for each share kept."""
    from matplotlib import pyplot

    keeps = sorted({row["keep"] for row in rows if row["keep"] is not None})
    lengths = sorted({row["length"] for row in rows})
    drawing, panels = pyplot.subplots(1, len(keeps), figsize=(5.2 * len(keeps), 4.4), sharey=True, squeeze=False)
    for axes, keep in zip(panels[0], keeps, strict=True):
        chosen = [row for row in rows if row["keep"] in (None, keep) and row.get("ratio") is not None]
        for number, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
            points = sorted((row["length"], row["ratio"]) for row in chosen if row["method"] == name)
            if points:
                style = {"linewidth": 2.2} if name == "ours" else {"linewidth": 1.2, "alpha": 0.85}
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=f"C{number}", label=name, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(lengths, [size_of(length) for length in lengths])
        axes.set_yticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
        axes.set_xlabel("tokens")
        axes.set_title(f"{keep:.1%} of the tokens kept".replace(".0%", "%"))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("time, dense cuDNN = 1")
    handles, labels = panels[0][0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="lower center", ncol=3, frameon=False, fontsize=9)
    drawing.tight_layout(rect=(0, 0.16, 1, 1))
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)
