"""What prefill.py writes: Markdown tables and a figure, from the rows that are also its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from colors import color_of

Row = dict[str, Any]
DESCRIPTIONS = {
    "eager": "eager",
    "compile": "torch.compile",
    "exact": 'backend="tsa", exact',
}
UPPER = "@"  # "0.15@21": that share of the tokens in the last 21 layers
COMPOSED = "+"  # "a_shape+0.15@21": and that kernel over all tokens in the other layers


def describe(mode: str) -> str:
    """A mode in words."""
    if mode in DESCRIPTIONS:
        return DESCRIPTIONS[mode]
    kernel, composed, sparse = mode.rpartition(COMPOSED)
    if not sparse[0].isdigit():
        return f'backend="tsa", kernel {sparse} in all layers'
    keep, _, last = sparse.partition(UPPER)
    words = f'backend="tsa", keep {keep} in the ' + (f"last {last} layers" if last else "upper half")
    return f"{words}, {kernel} in the others" if composed else words


def mask_name(masked: bool) -> str:
    """What was passed as `attention_mask`."""
    return "mask of ones" if masked else "no mask"


def table(rows: list[Row]) -> str:
    """Markdown, a table with a mask and one without: a row a mode, a column a length.

    Milliseconds, the speed relative to the first mode, and the peak of memory.
    """
    return "\n\n".join(_table(chosen) for chosen in by_mask(rows).values())


def by_mask(rows: list[Row]) -> dict[bool, list[Row]]:
    """The rows with a mask, and those without, as far as there are any."""
    halves = {masked: [row for row in rows if row["mask"] == masked] for masked in (True, False)}
    return {masked: chosen for masked, chosen in halves.items() if chosen}


def _table(rows: list[Row]) -> str:
    lengths = sorted({row["length"] for row in rows})
    base, by_key = rows[0]["mode"], {(row["mode"], row["length"]): row for row in rows}
    header = [mask_name(rows[0]["mask"]), *map(_size, lengths)]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        cells = [_cell(by_key.get((mode, length)), by_key.get((base, length))) for length in lengths]
        lines.append(f"| {describe(mode)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _size(length: int) -> str:
    return f"{length / 1024:g}K"


def _cell(row: Row | None, base: Row | None) -> str:
    if row is None:
        return ""
    if "ms" not in row:
        return "out of memory"
    relative = f" ({base['ms'] / row['ms']:.2f}x)" if base and "ms" in base else ""
    return f"{row['ms']:,.{0 if row['ms'] >= 100 else 1}f} ms{relative}, {row['peak_gib']:.1f} GiB"


def figure(rows: list[Row], path: Path, device: str) -> None:
    """Speed relative to the first mode, by length: a panel with a mask, one without."""
    from matplotlib import pyplot

    halves = by_mask(rows)
    drawing, panels = pyplot.subplots(1, len(halves), figsize=(6 * len(halves), 4.4), sharey=True, squeeze=False)
    for axes, (masked, chosen) in zip(panels[0], halves.items(), strict=True):
        base = {row["length"]: row["ms"] for row in chosen if row["mode"] == chosen[0]["mode"] and "ms" in row}
        for mode in dict.fromkeys(row["mode"] for row in chosen):
            timed = [row for row in chosen if row["mode"] == mode and "ms" in row and row["length"] in base]
            points = sorted((row["length"], base[row["length"]] / row["ms"]) for row in timed)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=color_of(mode), label=describe(mode))
            if points and any("error" in row for row in chosen if row["mode"] == mode):
                axes.annotate("then out of memory", points[-1], xytext=(8, 0), textcoords="offset points", va="center")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(base), [_size(length) for length in sorted(base)])
        axes.set_xlabel("prompt length")
        axes.set_title(f"{mask_name(masked)}, one {device}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"prefill speed, {describe(rows[0]['mode'])} = 1")
    panels[0][0].set_ylim(0, 1.4 * panels[0][0].get_ylim()[1])  # room for the legend
    panels[0][0].legend(loc="upper left", fontsize=8)
    drawing.tight_layout()
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)


def write(rows: list[Row], conditions: Row, results: Path) -> None:
    """JSON, Markdown and, of several lengths, a figure: `results` with three suffixes."""
    results.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"conditions": conditions, "rows": rows}, indent=2) + "\n"
    replaced = results.with_suffix(".json.tmp")  # a run may be cut short at any time
    replaced.write_text(text)
    replaced.replace(results.with_suffix(".json"))
    results.with_suffix(".md").write_text(f"{conditions}\n\n{table(rows)}\n")
    if len({row["length"] for row in rows if "ms" in row}) > 1:
        figure(rows, results.with_suffix(".png"), conditions["device"])
