"""What a training run leaves for a reader: JSON, tables in Markdown, and a figure, from its folder's log.

python benchmarks/accuracy/training_report.py out/shift    makes the tables and the figure of a folder anew
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FLOPS = 350e12  # per second that an H200 is expected to reach here, in bfloat16
Facts = dict[str, Any]


def step_flops(sizes: dict[str, int], tokens: int, length: int) -> float:
    """Floating-point operations of one training step: 6 per weight of the layers and token, and causal attention.

    Attention's forward is 4 * heads * head_dim * length / 2 per token and layer, its backward 2.5 times that. The head runs
    at labelled rows alone and isn't counted.
    """
    hidden, width = sizes["hidden_size"], sizes["head_dim"]
    projections = hidden * width * 2 * (sizes["num_attention_heads"] + sizes["num_key_value_heads"])
    weights = projections + 3 * hidden * sizes["intermediate_size"]
    attention = 3.5 * 2 * sizes["num_attention_heads"] * width * length
    return float(tokens * sizes["num_hidden_layers"] * (6 * weights + attention))


def size_of(length: int) -> str:
    """16384 -> 16K."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def ladder_table(facts: Facts) -> str:
    """A line for each rung: how long it took, and why it was left."""
    times = {row["length"]: row for row in facts["lengths"]}
    lines = []
    for rung in facts["rungs"]:
        row = times.get(rung["length"], {"first_call_s": None, "ms": None})
        expected = 1e3 * step_flops(facts["sizes"], facts["settings"]["tokens"], rung["length"]) / FLOPS
        accuracy = rung["accuracy"]
        worst = min(accuracy, key=accuracy.__getitem__) if accuracy else ""
        lines.append(
            [
                size_of(rung["length"]), str(rung["steps"]), f"{rung['took_s']:.0f}", _number(row["ms"]), f"{expected:.0f}",
                _number(row["first_call_s"]), rung["reason"], f"{worst} {accuracy[worst]:.3f}" if worst else "",
            ]
        )  # fmt: skip
    expected = f"at {FLOPS / 1e12:.0f} TFLOP/s"
    header = ["rung", "steps", "seconds", "ms a step", expected, "first call, s", "left by", "worst task"]
    return markdown(header, lines)


def accuracy_table(facts: Facts) -> str:
    """Held-out accuracy in the end: a line for each task, a column for each length; samples, with labels in brackets."""
    columns = facts["final"]
    lines = [
        [task, *(f"{column['samples'][task]:.3f} ({column['labels'][task]:.3f})" for column in columns)]
        for task in facts["settings"]["tasks"]
    ]
    return markdown(["samples (labels) right", *(size_of(column["length"]) for column in columns)], lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def summary(facts: Facts) -> str:
    """Everything as Markdown."""
    shift = "with" if facts["settings"]["token_shift"] else "without"
    start = (
        f"{facts['parameters']:,} parameters, {shift} the token shift; {facts['steps']:,} steps of "
        f"{facts['settings']['tokens']:,} tokens in {facts['minutes']:.1f} minutes on {facts['device']} "
        f"(torch {facts['torch']})."
    )
    parts = [start, ladder_table(facts)]
    return "\n\n".join(parts + [accuracy_table(facts)] if facts["final"] else parts) + "\n"


def figure(lines: list[dict[str, Any]], tasks: list[str], path: Path) -> None:
    """Loss and held-out accuracy at the rung's own length by step; a vertical line where a rung was left."""
    from matplotlib import pyplot

    pictured, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True)
    steps = [line for line in lines if line["kind"] == "step"]
    for length in sorted({line["length"] for line in steps}):
        points = [(line["step"], line["loss"]) for line in steps if line["length"] == length]
        upper.plot(*zip(*points, strict=True), ".", markersize=3, label=size_of(length))
    evaluations = [line for line in lines if line["kind"] == "evaluation" and len(line["samples"]) == len(tasks)]
    for task in tasks:
        points = [(line["step"], line["samples"][task]) for line in evaluations]
        lower.plot(*zip(*points, strict=True), marker="." if len(points) < 60 else None, label=task)
    for axes in (upper, lower):
        for line in lines:
            if line["kind"] == "rung":
                axes.axvline(line["left_at_step"], color="grey", linewidth=0.6)
        axes.legend(fontsize=7, ncol=3, frameon=False)
        axes.grid(alpha=0.3)
    upper.set_ylabel("loss")
    lower.set_ylabel("held-out samples right")
    lower.set_xlabel("step")
    pictured.tight_layout()
    pictured.savefig(path, dpi=150)
    pyplot.close(pictured)


def write(facts: Facts, folder: Path, name: str = "training") -> None:
    """`name`.json, .md and .png in the folder that holds log.jsonl; no figure where matplotlib is missing."""
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / f"{name}.md").write_text(summary(facts))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    try:
        figure(lines, facts["settings"]["tasks"], folder / f"{name}.png")
    except ImportError:
        (folder / f"{name}.png").unlink(missing_ok=True)


def main() -> None:
    """Makes the tables and the figure of a folder anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what train.py was given as --out")
    folder = parser.parse_args().folder
    for needed in ("training.json", "log.jsonl"):
        if not (folder / needed).exists():
            parser.error(f"{folder / needed} is missing: name a folder that train.py has written")
    write(json.loads((folder / "training.json").read_text()), folder)


if __name__ == "__main__":
    main()
