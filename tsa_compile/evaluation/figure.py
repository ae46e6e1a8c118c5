"""Accuracy against what is kept and against attention time, one column of panels for each length."""

from __future__ import annotations

import os
from typing import Any

from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.methods import parse
from tsa_compile.evaluation.outcomes import BASELINE, Outcomes, kept, pooled
from tsa_compile.evaluation.statistics import wilson
from tsa_compile.files import new_figure, save_figure

_FAMILIES = {
    "coverage": ("Coverage", "tab:blue", "o"),
    "keep": ("KeepRatio", "tab:orange", "s"),
    "random": ("random tokens", "tab:red", "x"),
    "rescue": ("evidence kept first", "tab:green", "D"),
    "early": ("early layers", "tab:gray", "^"),
    "window": ("another scoring window", "tab:purple", "v"),
}


def draw(study: Outcomes, path: str | os.PathLike[str], question: str = "last") -> None:
    """Writes the figure; the path's suffix is the image's format.

    Raises:
        ConfigError: there is nothing to draw, or the file cannot be written.
        ImportError: matplotlib is missing.
    """
    question = question if question in study.names("question") else (study.names("question") or [""])[0]
    lengths = [length for length in study.names("length") if _points(study, length, question)]
    if not lengths:
        raise ConfigError("the study has no cells yet, so there is nothing to draw: run at least one method")
    timed = any(time.method != BASELINE for time in study.times)
    figure = new_figure(figsize=(1.5 + 3.5 * len(lengths), 6.5 if timed else 3.8), layout="constrained")
    panels = figure.subplots(1 + timed, len(lengths), squeeze=False, sharey=True)
    for column, length in enumerate(lengths):
        points = _points(study, length, question)
        _panel(panels[0][column], {name: (100 * keep, share) for name, (keep, share) in points.items()})
        panels[0][column].set(title=f"{length / 1024:g}K tokens", xlabel="tokens kept in sparse layers, %")
        if timed:
            speed = _speeds(study, length)
            _panel(panels[1][column], {name: (speed[name], share) for name, (_, share) in points.items() if name in speed})
            panels[1][column].set(xlabel="attention speed, dense = 1")
    for row in panels:
        row[0].set_ylabel("accuracy over all tasks, %")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 1 + 2 * len(lengths)), frameon=False)
    save_figure(figure, path, dpi=150)


def _points(study: Outcomes, length: int, question: str) -> dict[str, tuple[float, Any]]:
    """For each method the kept share, and its accuracy over all tasks' samples."""
    points = {}
    for method in study.names("method"):
        cells = study.select(length=length, method=method, question=question)
        if cells:
            right = pooled(cells)
            points[method] = (kept(cells), wilson(sum(right), len(right)))
    return points


def _speeds(study: Outcomes, length: int) -> dict[str, float]:
    times = {time.method: time.attention_ms for time in study.times if time.length == length}
    dense = times.get(BASELINE)
    return {name: dense / ms for name, ms in times.items()} if dense else {}


def _panel(axes: Any, points: dict[str, tuple[float, Any]]) -> None:
    """Accuracy with intervals over x; each family of methods is a line through its budgets."""
    dense = points.get(BASELINE)
    if dense is not None:
        axes.axhspan(100 * dense[1].low, 100 * dense[1].high, color="0.9")
        axes.axhline(100 * dense[1].value, color="0.3", linewidth=1, label="dense")
    for family, (label, colour, marker) in _FAMILIES.items():
        found = sorted((x, share) for name, (x, share) in points.items() if _family(name) == family)
        if found:
            values = [100 * share.value for _, share in found]
            below = [100 * (share.value - share.low) for _, share in found]
            above = [100 * (share.high - share.value) for _, share in found]
            line = "none" if family not in ("coverage", "keep") else "-"
            style = dict(color=colour, marker=marker, linestyle=line, capsize=2)
            axes.errorbar([x for x, _ in found], values, yerr=[below, above], label=label, **style)
    axes.grid(alpha=0.3)


def _family(name: str) -> str:
    method = parse(name)
    return method.control or ("window" if method.window else name.partition("-")[0])
