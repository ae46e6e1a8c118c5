"""The tables of pretrained.py: each length by itself, and the tasks over all lengths."""

from __future__ import annotations

import math
import re
from typing import Any

from tsa_compile.evaluation import Study
from tsa_compile.evaluation.outcomes import Cell
from tsa_compile.evaluation.settings import DENSE
from tsa_compile.evaluation.statistics import mcnemar
from tsa_compile.evaluation.tables import markdown, remark

ENOUGH = 80
"""Samples that a setting needs of every task, at all lengths together and some at each, to stand in the table over them."""


def report(study: Study) -> str:
    """The tables, with what they need to be read."""
    model: Any = study.conditions["model"]
    sizes = f"{model['architecture']}, {model['layers']} layers of {model['sizes']['hidden_size']}"
    stretch: Any = study.conditions.get("stretch")
    made = "; ".join(f"{name} {value}" for name, value in study.notes.items())
    if stretch is not None:
        factors = ", ".join(f"{factor:g}" for factor in stretch["factors"])
        made += f"; positions of prompts that need it stretched by {factors} ({stretch['by']})"
    text = (
        f"{sizes}, {study.conditions['dtype']}; seed {study.conditions['seed']}; {made}\n\n{_over_lengths(study)}"
        "kept: mean share of the tokens in the sparse layers. Each task: % of the samples right (`*`: McNemar's exact test "
        "rejects equality with dense at 0.05, not corrected for the number of tests), mean negative log-likelihood of the "
        "expected answer, and in brackets its mean difference to dense. copy and continuation are scored by likelihood "
        "alone.\n\n"
        f"{markdown(study)}\n"
    )
    return re.sub(r"(?<= )\.(?=\d)", "0.", text)  # settings are named "keep .3", by which results are found again


def _over_lengths(study: Study) -> str:
    """Points of accuracy gained or lost, or the change in likelihood; empty without a setting that ran enough."""
    lengths, tasks = sorted(study.names("length")), sorted(study.names("task"))
    lines = []
    for setting in study.names("setting"):
        cells = [[study.find(task, length, setting) for length in lengths] for task in tasks]
        counts = [cell.samples for row in cells for cell in row]
        enough = min(counts) > 0 and min(sum(cell.samples for cell in row) for row in cells) >= ENOUGH
        if setting == DENSE.name or not enough:
            continue
        mean_kl = math.fsum(math.fsum(cell.kl) / cell.samples for row in cells for cell in row) / len(tasks) / len(lengths)
        changes = [_change([(cell, study.dense(cell)) for cell in row if not remark(study, cell.task, cell.length)])
                   for row in cells]  # fmt: skip
        samples = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        lines.append([setting, *changes, f"{mean_kl:.4f}", samples])
    if not lines:
        return ""
    head = [["setting", *tasks, "KL", "samples"], ["---"] * (len(tasks) + 3)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in [*head, *lines])
    title = f"**All lengths together** ({', '.join(f'{length:,}' for length in lengths)} tokens)"
    return (
        f"{title}: points of accuracy won or lost against dense and McNemar's p; of tasks scored by likelihood, its "
        f"change; the mean KL divergence from dense of all tasks; and how many samples each task ran at each length\n\n"
        f"{table}\n\n"
    )


def _change(pairs: list[tuple[Cell, Cell]]) -> str:
    """A setting against dense on the same samples, of several lengths."""
    count = sum(cell.samples for cell, _ in pairs)
    if not count:
        return ""
    if not pairs[0][0].right:
        changes = (ours - theirs for cell, dense in pairs for ours, theirs in zip(cell.nll, dense.nll))
        return f"{math.fsum(changes) / count:+.3f}"
    answers = [(ours, theirs) for cell, dense in pairs for ours, theirs in zip(cell.right, dense.right)]
    paired = mcnemar([ours for ours, _ in answers], [theirs for _, theirs in answers])
    return f"{100 * (paired.won - paired.lost) / count:+.1f} (p {paired.p_value:.2f})"
