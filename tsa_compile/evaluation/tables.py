"""A study against dense, as text of 80 columns and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tsa_compile.evaluation.outcomes import Cell, Study, finite
from tsa_compile.evaluation.settings import DENSE
from tsa_compile.evaluation.statistics import CHANCE, Mean, Paired, Share, mcnemar, mean_difference, wilson
from tsa_compile.evaluation.tasks import is_scored
from tsa_compile.kernels.kept import never_dropped
from tsa_compile.text import as_text, counted

WIDTH = 80
_SCORED = ("right % [95%]", "lost", "won", "p")
_HEADER = ("setting", "kept", *_SCORED, "nll - dense [95%]", "KL")
LEGEND = (
    "n: how many samples a setting ran, where it ran fewer than dense. kept: mean share of the tokens in sparse layers. "
    "right: everything expected is in the output. lost, won: samples that dense alone, or the setting alone, has right; p: "
    "McNemar's exact test of these. nll: mean negative log-likelihood of the expected answer's tokens, and of settings its "
    "difference to dense with Student's interval. KL: from dense to the setting at these tokens, in nats."
)


@dataclass(frozen=True)
class Row:
    """One setting at one task and length, against dense; what is None is not there to compare."""

    task: str
    length: int
    setting: str
    samples: int
    kept: float
    nll: float
    accuracy: Share | None = None
    paired: Paired | None = None
    difference: Mean | None = None
    kl: float | None = None


def remark(study: Study, task: str, length: int) -> str | None:
    """Why a task says nothing about this model; None where it does."""
    dense = study.find(task, length, DENSE.name)
    if not is_scored(task) or not dense.right:
        return None
    found, asked = sum(dense.right), len(dense.right)
    if found > 0 and found / asked >= CHANCE:
        return None
    return f"dense itself finds {found} of {asked}; this task says nothing about this model at this length"


def rows(study: Study, task: str, length: int) -> list[Row]:
    """Dense and behind it every setting that ran samples at a task and length; none where there is a remark.

    A setting that ran fewer samples than dense is compared with dense on these.
    """
    if remark(study, task, length):
        return []
    cells = [cell for cell in study.cells if (cell.task, cell.length) == (task, length) and cell.samples]
    return [_row(study, cell) for cell in sorted(cells, key=lambda cell: cell.setting != DENSE.name)]


def _row(study: Study, cell: Cell) -> Row:
    dense = study.dense(cell)
    row: dict[str, Any] = {
        "task": cell.task, "length": cell.length, "setting": cell.setting, "samples": cell.samples, "kept": cell.mean_kept,
        "nll": math.fsum(cell.nll) / cell.samples, "accuracy": wilson(cell.right) if cell.right else None,
    }  # fmt: skip
    if cell.setting != DENSE.name:
        count = cell.samples
        row["paired"] = mcnemar(cell.right, dense.right[:count]) if cell.right else None
        row["difference"] = mean_difference(cell.nll, dense.nll[:count])
        row["kl"] = math.fsum(cell.kl) / count
    return Row(**row)


def summary(study: Study) -> list[dict[str, Any]]:
    """All rows as plain JSON types, and the remarks in place of rows. JSON has no NaN: what is no number is None."""
    found: list[dict[str, Any]] = []
    for length, task in _pairs(study):
        why = remark(study, task, length)
        found += [{"task": task, "length": length, "remark": why}] if why else map(asdict, rows(study, task, length))
    return [finite(row) for row in found]


def notes(study: Study) -> list[str]:
    """Where a setting keeps more tokens than its budget says, since `min_tokens` are selected at least."""
    found = []
    for name, length in sorted({(cell.setting, cell.length) for cell in study.cells if cell.samples}):
        config = study.settings.get(name, {}).get("config")
        if config is None or config["layers"] == []:
            continue
        window, least = config["window"], config["min_tokens"]
        missed = [f"{ratio:.0%}" for ratio in _ratios(config) if least > ratio * (length - window)]
        said = f"{name} at {length:,} tokens: min_tokens={least} tokens and the window of {window} are always kept, "
        if length <= never_dropped(window, least):
            found.append(said + "which is all of them, so this is dense attention. Choose longer prompts or min_tokens=0")
        elif missed:
            kept = never_dropped(window, least) / length
            found.append(
                said + f"{kept:.0%} and not {' or '.join(missed)}. To measure the ratio itself, choose min_tokens=0"
            )
    return found


def _ratios(config: dict[str, Any]) -> list[float]:
    """The keep ratios of the sparse layers in a configuration's JSON form, where layers may have a budget each."""
    layers = config["layers"]
    if isinstance(layers, dict):
        return sorted({each for each in layers.values() if not isinstance(each, dict)})
    return list(config["budget"].values()) if "keep_ratio" in config["budget"] else []


def text(study: Study) -> str:
    """A table for each length and task."""
    parts: list[Any] = []
    told = False
    for length, task in _pairs(study):
        why, found = remark(study, task, length), rows(study, task, length)
        told = told or why is None
        samples = found[0].samples if found else study.find(task, length, DENSE.name).samples
        title = Text(f"{task}, {length:,} tokens, {counted(samples, 'sample')}")
        parts += [title, Padding(Text(why), (0, 0, 0, 2)) if why else _table(found), ""]
    parts += [Text(f"note: {note}") for note in notes(study)]
    return as_text(Group(*parts, *([Text(LEGEND)] if told else [])), WIDTH)


def _table(found: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    scored = any(row.accuracy is not None for row in found)
    shown = [scored or name not in _SCORED for name in _HEADER]
    for name in compress(_HEADER, shown):
        table.add_column(name, justify="left" if name == "setting" else "right", no_wrap=name != "setting", overflow="fold")
    for row in found:
        table.add_row(*(Text(word) for word in compress(_words(row, found[0].samples), shown)))
    return table


def _words(row: Row, samples: int) -> list[str]:
    """A row's columns; behind the setting n, where it ran fewer samples than the title says."""
    setting = row.setting + (f", n {row.samples}" if row.samples < samples else "")
    share, paired = row.accuracy, row.paired
    accuracy = "" if share is None else f"{_percent(share.value)} [{_percent(share.low)}, {_percent(share.high)}]"
    tested = ["", "", ""] if paired is None else [str(paired.lost), str(paired.won), _p_value(paired.p_value)]
    difference = f"{row.nll:.3f}" if row.difference is None else _mean(row.difference)
    return [setting, _percent(row.kept) + "%", accuracy, *tested, difference, "" if row.kl is None else f"{row.kl:.3f}"]


def markdown(study: Study) -> str:
    """For each length a table of settings by tasks: % right and the likelihood; * where McNemar's test rejects equality."""
    parts = []
    for length in sorted(study.names("length")):
        names = [task for other, task in _pairs(study) if other == length]
        cells = {(row.task, row.setting): row for task in names for row in rows(study, task, length)}
        samples = max(study.find(task, length, DENSE.name).samples for task in names)
        lines = [["setting", "kept", *names], ["---"] * (len(names) + 2)]
        for setting in study.names("setting"):
            found = [cells.get((task, setting)) for task in names]
            kept = [row.kept for row in found if row is not None]
            if kept:
                cells_of = [_cell(row, samples) for row in found]
                lines.append([setting, f"{_percent(math.fsum(kept) / len(kept))}%", *cells_of])
        remarks = [f"- {task}: {why}" for task in names if (why := remark(study, task, length))]
        fewer = ", or n" if any(row.samples < samples for row in cells.values()) else ""
        title = f"**{length:,} tokens**, {counted(samples, 'sample')} of each task{fewer}"
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append("\n\n".join(filter(None, (title, table, "\n".join(remarks)))))
    return "\n\n".join(parts)


def _cell(row: Row | None, samples: int) -> str:
    """Accuracy, a star where it differs from dense (p < 0.05), the likelihood with its change, and n if it is another."""
    if row is None:
        return ""
    likelihood = f"{row.nll:.3f}"
    if row.difference is not None:
        likelihood += f" ({row.difference.value:+.3f})"
    if row.samples < samples:
        likelihood += f", n {row.samples}"
    if row.accuracy is None:
        return likelihood
    star = "*" if row.paired is not None and row.paired.p_value < 0.05 else ""
    return f"{_percent(row.accuracy.value)}%{star}, {likelihood}"


def _pairs(study: Study) -> list[tuple[int, str]]:
    """Lengths and tasks with results, short lengths first."""
    found = dict.fromkeys((cell.length, cell.task) for cell in study.cells if cell.samples)
    return sorted(found, key=lambda pair: pair[0])


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _mean(found: Mean) -> str:
    if math.isnan(found.low):
        return f"{found.value:+.3f}"
    return f"{found.value:+.3f} [{found.low:+.2f}, {found.high:+.2f}]"


def _p_value(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0")
