"""A study as Markdown: accuracy, kept shares, needle survival, times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from tsa_compile.config import KeepRatio
from tsa_compile.evaluation.methods import parse
from tsa_compile.evaluation.outcomes import BASELINE, Cell, LayerRow, Outcomes, kept, pooled
from tsa_compile.evaluation.statistics import Comparison

LEVEL = 0.05  # of McNemar's tests, divided by the number of comparisons in a table (Bonferroni)
_WHERE = {"last": "question last", "early": "question before the scoring window (a stress test)"}


def accuracy_tables(study: Outcomes) -> str:
    """A table for each question and length: methods by tasks, and the difference to dense."""
    parts = [_accuracy(study, question, length) for question in study.names("question") for length in study.names("length")]
    legend = (
        "Accuracy in % of the samples, all of whose answers are right; in brackets the difference to dense in points. "
        f"`*`: McNemar's exact test rejects equality with dense at {LEVEL}, divided by the number of tests in the table. "
        "`kept`: mean share of the tokens in the sparse layers. `all`: all tasks' samples, with the 95% interval of "
        "the paired difference (Newcombe) and the p-value."
    )
    return "\n\n".join([*filter(None, parts), legend])


def _accuracy(study: Outcomes, question: str, length: int) -> str:
    methods = [name for name in study.names("method") if study.select(length=length, method=name, question=question)]
    if not methods:
        return ""
    tasks, rows = study.names("task"), []
    level = LEVEL / max(1, len(tasks) * (len(methods) - 1))
    for method in methods:
        cells = {cell.task: cell for cell in study.select(length=length, method=method, question=question)}
        entries = [_entry(study, [cells[task]], level) if task in cells else "" for task in tasks]
        rows.append([method, _percent(kept(cells.values())), *entries, *_all(study, list(cells.values()))])
    header = ["method", "kept", *tasks, "all", "difference to dense [95%]", "p"]
    samples = study.conditions.get("samples", "?")
    return f"**{length:,} tokens, {_WHERE.get(question, question)}**, {samples} samples a cell\n\n{_markdown(header, rows)}"


def _entry(study: Outcomes, cells: list[Cell], level: float) -> str:
    """Accuracy, with the difference to dense where there is one to compare with."""
    text, found = _compared(study, cells)
    return text if found is None else f"{text} ({100 * found.difference:+.1f}){'*' if found.p_value < level else ''}"


def _all(study: Outcomes, cells: list[Cell]) -> list[str]:
    text, found = _compared(study, cells)
    return [text, *(["", ""] if found is None else [_difference(found), _p_value(found.p_value)])]


def _compared(study: Outcomes, cells: list[Cell]) -> tuple[str, Comparison | None]:
    right = pooled(cells)
    found = None if cells[0].method == BASELINE else study.against_dense(cells)
    return f"{100 * sum(right) / len(right):.1f}", found


def _difference(found: Comparison) -> str:
    return f"{100 * found.difference:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def _p_value(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}"


def _asked(method: str, cells: Sequence[Cell]) -> float:
    """The keep ratio that was asked for, the scoring window's tokens apart; what was kept if none was."""
    budget = parse(method).budget
    return budget.ratio if isinstance(budget, KeepRatio) else kept(cells)


def goal_table(study: Outcomes, keep: float = 0.7, points: float = 1.0) -> str:
    """Which methods with a keep ratio of at most `keep` lose at most `points`, question last: in each task and in all."""
    rows = []
    for length in study.names("length"):
        for method in study.names("method"):
            cells = study.select(length=length, method=method)
            if not cells or method == BASELINE or parse(method).control or _asked(method, cells) > keep:
                continue
            found, whole = [study.against_dense([cell]) for cell in cells], study.against_dense(cells)
            if whole is None:
                continue
            losses = {cell.task: -100 * item.difference for cell, item in zip(cells, found, strict=True) if item is not None}
            worst = max(losses, key=lambda task: losses[task])
            within = sum(loss <= points for loss in losses.values())
            proven = "yes" if 100 * whole.low >= -points else "no"
            row = [f"{length:,}", method, _percent(kept(cells)), f"{within} of {len(losses)}"]
            rows.append([*row, f"{worst} ({-losses[worst]:+.1f})", _difference(whole), proven])
    header = ["length", "method", "kept", f"tasks within {points:g} point", "worst task", "all [95%]", "interval within"]
    return _markdown(header, rows) if rows else ""


def keep_table(study: Outcomes) -> str:
    """The realised share of kept tokens for each sparse layer: the mean over tasks, the least and the most of a sample."""

    def entry(rows: list[LayerRow]) -> str:
        mean, low, high = (
            statistics.fmean(row.keep for row in rows),
            min(r.keep_low for r in rows),
            max(r.keep_high for r in rows),
        )
        return _percent(mean) if low == high else f"{_percent(mean)} ({_percent(low)} to {_percent(high)})"

    return _layer_table(study, entry)


def survival_table(study: Outcomes) -> str:
    """The share of evidence tokens that each sparse layer selects: of all samples, and of those answered wrong."""

    def entry(rows: list[LayerRow]) -> str:
        text = _percent(statistics.fmean(row.survival for row in rows))
        wrong = [row.survival_wrong for row in rows if row.survival_wrong is not None]
        return f"{text} ({_percent(statistics.fmean(wrong))})" if wrong else text

    return _layer_table(study, entry)


def _layer_table(study: Outcomes, entry: Callable[[list[LayerRow]], str]) -> str:
    """A row for each question, length and sparse method, a column for each layer that is sparse in any."""
    layers = sorted({row.layer for cell in study.cells for row in cell.layers})
    rows = []
    for question in study.names("question"):
        for length in study.names("length"):
            for method in study.names("method"):
                found = [r for cell in study.select(length=length, method=method, question=question) for r in cell.layers]
                by_layer = [[row for row in found if row.layer == layer] for layer in layers]
                if found:
                    rows.append([question, f"{length:,}", method, *(entry(same) if same else "" for same in by_layer)])
    return _markdown(["question", "length", "method", *(f"layer {layer}" for layer in layers)], rows)


def time_table(study: Outcomes) -> str:
    """Attention, its prediction and the prefill, in milliseconds and relative to dense at the same length."""
    base = {time.length: time for time in study.times if time.method == BASELINE}
    rows = []
    for time in study.times:
        dense = base.get(time.length)
        pairs = [
            (getattr(time, name), getattr(dense, name, None)) for name in ("attention_ms", "predicted_ms", "prefill_ms")
        ]
        rows.append([f"{time.length:,}", time.method, _percent(time.keep), *(_relative(*pair) for pair in pairs)])
    return _markdown(["length", "method", "kept", "attention ms", "predicted ms", "prefill ms"], rows)


def _relative(value: float | None, dense: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" + (f" ({value / dense:.2f}x)" if dense else "")


def report(study: Outcomes) -> str:
    """All tables, with what they show."""
    conditions = {name: value for name, value in {**study.conditions, **study.notes}.items() if name != "model"}
    model = study.conditions.get("model", {})
    about = f"{model.get('architecture', 'a model')} of {model.get('layers', '?')} layers; " if model else ""
    parts = [
        about + "; ".join(f"{name} {value}" for name, value in conditions.items()),
        "### Accuracy",
        accuracy_tables(study),
    ]
    goal = goal_table(study)
    if goal:
        about = "Methods with a keep ratio of at most .7 (the scoring window's tokens come on top), question last."
        parts += ["### Within a point of dense", about, goal]
    if any(cell.layers for cell in study.cells):
        parts += ["### Tokens kept", "Mean over tasks (least to most of a sample).", keep_table(study)]
        parts += [
            "### Needle survival",
            "Share of the evidence tokens that a layer selects, mean over heads (in samples answered wrong).",
            survival_table(study),
        ]
    if study.times:
        batch = ", ".join(map(str, sorted({time.batch for time in study.times})))
        parts += [
            "### Time",
            f"Batch {batch}. Attention of all layers with the selection; in brackets relative to dense. `predicted`: by the "
            "cost model, at the kept share. `prefill`: the whole compiled model.",
            time_table(study),
        ]
    return "\n\n".join(parts) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
