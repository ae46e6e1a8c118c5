"""What sparse.py writes: Markdown tables and a figure, from the rows that are also its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attention_report import failed, markdown

Row = dict[str, Any]

COLUMNS: dict[str, dict[str, str]] = {
    "kernel": {
        "density": "density", "ms": "ms", "tflops": "TFLOP/s of listed blocks", "rate": "of dense cuDNN's rate",
        "goal_ms": "goal, ms (density x dense / 0.7)", "flex_ms": "FlexAttention, ms", "settled_ms": "settled, ms",
        "settled_rate": "settled, of dense cuDNN's rate",
    },
    "selectors": {
        "method": "selector", "rows": "rows", "ms": "ms", "share": "of dense cuDNN's time", "settled_ms": "settled, ms",
        "settled_share": "settled, of dense cuDNN's time",
    },
    "methods": {
        "method": "method", "form": "rows", "ms": "ms", "speedup": "speedup over dense cuDNN", "gain": "composed over alone",
        "density": "density of its blocks", "mass": "attention kept", "error_kept": "error, kept rows",
        "error_all": "error, all rows",
    },
}  # fmt: skip
TITLES = {
    "kernel": "The kernel on random lists of blocks",
    "selectors": "Selectors alone",
    "methods": "Methods on planted inputs, everything counted, composed with a floor",
}


def cell(value: object) -> str:
    """Numbers with three digits."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(part: str, rows: list[Row]) -> str:
    """A part's rows; one that failed says why in its second column."""
    keys = list(COLUMNS[part])
    lines = []
    for row in rows:
        line = [cell(row.get(key)) for key in keys]
        if "failed" in row:
            line[-1] = failed(row)
        lines.append(line)
    return markdown(COLUMNS[part].values(), lines)


def report(conditions: Row, parts: dict[str, list[Row]], problems: list[str]) -> str:
    """Everything as Markdown."""
    sections = [f"## {TITLES[name]}\n\n{table(name, rows)}" for name, rows in parts.items() if rows]
    closing = "Every check passed." if not problems else "Problems:\n\n" + "\n".join(f"- {p}" for p in problems)
    return "\n\n".join([str(conditions), *sections, closing])


def figure(rows: list[Row], path: Path, device: str) -> None:
    """Speed against error: an arrow from each method alone to the method over the rows that TSA keeps."""
    from matplotlib import colormaps, pyplot

    palette = colormaps["tab20"]
    drawing, axes = pyplot.subplots(figsize=(8, 5.4))
    good = [row for row in rows if "failed" not in row and row.get("error_all") is not None]
    for number, name in enumerate(dict.fromkeys(row["method"] for row in good)):
        mine = [row for row in good if row["method"] == name]
        color = palette(number % palette.N)
        axes.plot(*zip(*((row["error_all"], row["speedup"]) for row in mine), strict=True), color=color, linewidth=1)
        for row in mine:
            marker, size = _marker(row["form"])
            axes.plot(row["error_all"], row["speedup"], marker, color=color, markersize=size)
        axes.plot([], [], "o", color=color, label=name)
    for form, label in (("all", "alone"), ("kept", "composed with TSA"), ("groups", "composed, by groups")):
        axes.plot([], [], _marker(form)[0], color="0.45", label=label)
    axes.set_yscale("log", base=2)
    axes.set_yticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.set_ylim(1, 100)  # room for the legend
    axes.set_xlabel("relative output error, all rows")
    axes.set_ylabel("speedup over dense cuDNN")
    axes.set_title(f"Block-sparse methods, alone and on the selected tokens, on one {device}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8, ncols=3)
    drawing.tight_layout()
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)


def _marker(form: str) -> tuple[str, int]:
    """How a form of a method is drawn, and how large."""
    if form == "all":
        return "o", 6
    return ("D", 6) if "groups" in form else ("*", 13)
