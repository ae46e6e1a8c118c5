"""Which of transformers' language models gain: every architecture, tiny and with random weights, on a CPU.

    python benchmarks/models.py --out benchmarks/results             causal ones, half an hour with --processes 2
    python benchmarks/models.py --out benchmarks/results --images    those that read images and text: image_models.md
    python benchmarks/models.py --models llama falcon gpt_oss        some

Each is run as it is, then through backend="tsa" in exact mode and with all layers sparse that keep all tokens, so that it
must compute the same, and then with attn_implementation="tsa", which keeps all tokens as well: a prompt with padding and one
without a mask, the first in two chunks through a cache, and with --images one that has padding and an image, where a way to
pass one was found. A row says what became of the attention calls of the first prompt, of the last one with an image and of
the last one uncompiled; whether the second chunk has sparse layers too, or "-" where the model itself takes none or computes
something else in chunks; and the largest difference of the logits, relative to their norm, at valid tokens. What cannot be
built at a small size, or needs a package that is not there, is listed with the reason. The exit code is 1 if a result
differs, from plain torch.compile's as well, or the backend fails where plain torch.compile does not.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from small_models import LENGTH, build, kinds, prompts
from torch import Tensor

from tsa_compile import Coverage, TSAConfig, attention, reports
from tsa_compile.errors import ConfigError
from tsa_compile.reasons import Decision
from tsa_compile.report import CallRow, clear_reports

TOLERANCE, AGREE = 1e-4, 1e-3
"""Relative differences of logits: at most so much by this package, and between a model's own chunks and its whole prompt."""
SAME: dict[str, Any] = dict(window=4, min_tokens=4, min_length=1, compiler="eager")
UNCOMPILED = "uncompiled"
PLAIN, PLAIN_TOO = "difference to plain torch.compile", " (plain torch.compile too)"
MODES = {"exact": TSAConfig(layers=[], **SAME), "sparse": TSAConfig(budget=Coverage(0), layers=["*"], **SAME)}


@dataclass(frozen=True)
class Subject:
    """A model and what it computes by itself.

    Attributes:
        prompts: padded, without a mask, and perhaps with an image.
        wanted: the logits of each, and those of the first in chunks if the model takes chunks.
    """

    model: Any
    prompts: list[dict[str, Tensor]]
    wanted: list[Tensor]

    @classmethod
    def of(cls, model: Any, images: bool) -> Subject:
        """Raises what the model raises."""
        given = prompts(model, images)
        wanted = logits_of(model, given)
        try:
            chunks = chunk_logits(model, given[0])
        except Exception:  # noqa: BLE001, a foreign model may raise anything; the table has "-" for it
            return cls(model, given, wanted)
        # GIT's later chunks see the padding, of which nothing is promised (docs/limits.md).
        agree = difference([chunks], wanted[:1]) < AGREE
        return cls(model, given, [*wanted, chunks] if agree else wanted)

    @property
    def chunked(self) -> bool:
        return len(self.wanted) > len(self.prompts)

    def logits_by(self, model: Any) -> list[Tensor]:
        """The same of another form of the model."""
        chunks = [chunk_logits(model, self.prompts[0])] if self.chunked else []
        return [*logits_of(model, self.prompts), *chunks]


def logits_of(model: Any, given: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """Of each prompt, at its valid tokens [n, V]."""
    found = []
    with torch.no_grad():
        for prompt in given:
            valid = prompt.get("attention_mask", torch.ones_like(prompt["input_ids"])).bool()
            found.append(model(**prompt).logits.float()[valid])
    return found


def chunk_logits(model: Any, prompt: dict[str, Tensor]) -> Tensor:
    """Of a padded prompt in two chunks through a cache, at its valid tokens; the reports are those of the second chunk."""
    ids, mask, parts = prompt["input_ids"], prompt["attention_mask"], []
    cache = transformers.DynamicCache(config=getattr(model, "_orig_mod", model).config)
    with torch.no_grad():
        for low, high in ((0, LENGTH // 2), (LENGTH // 2, LENGTH)):
            clear_reports()
            parts.append(
                model(ids[:, low:high], attention_mask=mask[:, :high], past_key_values=cache, use_cache=True).logits
            )
    return torch.cat(parts, dim=1).float()[mask.bool()]


def compare(subject: Subject, mode: str) -> dict[str, Any]:
    """What became of the attention calls, and the largest relative difference."""
    torch._dynamo.reset()
    clear_reports()
    compiled = torch.compile(subject.model, backend="tsa", options={"config": MODES[mode]})
    found = logits_of(compiled, subject.prompts[:2])
    result: dict[str, Any] = decided(calls := [row for report in first_compilations() for row in report])
    result["calls"] = len(calls)
    if len(subject.prompts) > 2:
        clear_reports()
        found += logits_of(compiled, subject.prompts[2:])
        result["image"] = decided(row for report in first_compilations() for row in report)
    if subject.chunked:
        found.append(chunk_logits(compiled, subject.prompts[0]))
        result["chunks"] = sorted({row.decision.value for report in reports() for row in report})
    result["difference"] = difference(found, subject.wanted)
    if not result["difference"] < TOLERANCE:  # then plain torch.compile may differ from the model as well
        torch._dynamo.reset()
        result[PLAIN] = difference(found, subject.logits_by(torch.compile(subject.model, backend="eager")))
    return result


def compare_uncompiled(subject: Subject) -> dict[str, Any]:
    """The same with another attention function in the model itself, which has it from then on; {} if it is refused."""
    name = attention.register(MODES["sparse"], name="tsa-all")
    try:
        subject.model.set_attn_implementation(name)
    except ValueError:  # of transformers: this model has no attention to be chosen
        return {}
    try:
        found = logits_of(subject.model, subject.prompts)
    except ConfigError:  # which says why
        return {}
    result: dict[str, Any] = decided(attention.report(subject.model))
    if subject.chunked:
        found.append(chunk_logits(subject.model, subject.prompts[0]))
    return {**result, "difference": difference(found, subject.wanted)}


def decided(calls: Iterable[CallRow]) -> dict[str, Any]:
    """Decisions and how many of each, and why calls were left alone."""
    rows = list(calls)
    return {
        "decisions": dict(Counter(row.decision.value for row in rows)),
        "reasons": sorted({row.reason.value for row in rows if row.decision is Decision.UNCHANGED}),
    }


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest of the prompts', relative to the norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def first_compilations() -> list[Any]:
    """The graphs of the first prompt: each layer once, though the second prompt is another graph, or several are."""
    seen: set[str] = set()
    kept = []
    for report in reports():
        names = {row.layer for row in report}
        if not names & seen:
            kept.append(report)
            seen |= names
    return kept


def examine(kind: str, images: bool = False) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"model": kind}
    try:
        row["form"], model = build(kind, images)
        subject = Subject.of(model, images)
    except Exception as error:  # noqa: BLE001, as in `build`; the table says what it was
        return row | {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:90]}
    for mode in (*MODES, UNCOMPILED):
        try:
            row[mode] = compare(subject, mode) if mode in MODES else compare_uncompiled(subject)
        except Exception as error:  # noqa: BLE001, a failure is what this looks for: a row that makes the exit code 1
            also = plain_too(subject) if mode in MODES else ""
            row["failed"] = f"{mode}: {type(error).__name__}: {error}".splitlines()[0][:200] + also
    return row


def examined(models: list[str], images: bool, processes: int) -> Iterator[dict[str, Any]]:
    """The rows, in order."""
    if processes == 1:
        quiet()
        yield from map(partial(examine, images=images), models)
        return
    with multiprocessing.get_context("spawn").Pool(processes, quiet) as pool:
        yield from pool.imap(partial(examine, images=images), models)


def quiet() -> None:
    """Without the warnings of foreign models, once in each process."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # recompilation limits of graph-breaking models


def plain_too(subject: Subject) -> str:
    """Whether torch.compile without this package fails as well."""
    torch._dynamo.reset()
    try:
        subject.logits_by(torch.compile(subject.model, backend="eager"))
    except Exception as error:  # noqa: BLE001, any failure of torch's own clears this package
        return f" (plain torch.compile fails too: {type(error).__name__})"
    return ""


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a row shows a fault of this package."""
    failed = "failed" in row and "plain torch.compile fails too" not in row["failed"]
    results = (row[mode] for mode in (*MODES, UNCOMPILED) if row.get(mode))
    return failed or any(not result.get(PLAIN, result["difference"]) < TOLERANCE for result in results)


def summarise(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many architectures of each kind there are."""
    ran = [row for row in rows if all(mode in row for mode in MODES)]
    gains = [row for row in ran if set(row["exact"]["decisions"]) & {"dense", "dense (padding)", "dense (window)"}]
    with_image = [row["sparse"]["image"] for row in ran if "image" in row["sparse"]]
    uncompiled = [row[UNCOMPILED] for row in ran if row.get(UNCOMPILED)]
    counts = {
        "architectures": len(rows), "ran": len(ran), "wrong": sum(map(is_wrong, rows)), "exact gain": len(gains),
        "can be sparse": sum(is_sparse(row["sparse"]) for row in ran),
        "in chunks": sum("sparse" in row["sparse"].get("chunks", ()) for row in ran),
        "ran with an image": len(with_image), "sparse with an image": sum(map(is_sparse, with_image)),
        "ran uncompiled": len(uncompiled), "sparse uncompiled": sum(map(is_sparse, uncompiled)),
    }  # fmt: skip
    return {name: count for name, count in counts.items() if with_image or "image" not in name}


def is_sparse(result: dict[str, Any]) -> bool:
    """Whether there is a sparse layer."""
    return "sparse" in result["decisions"]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row an architecture, then those that did not run."""
    ran = [row for row in rows if all(mode in row for mode in MODES)]
    images = any("image" in row["sparse"] for row in ran)
    names = ["model", "form", "attention calls: exact", "all layers sparse", "in chunks", "with an image", "uncompiled",
             "left alone because", "difference"]  # fmt: skip
    shown = [name for name in names if images or name != "with an image"]
    lines = [f"| {' | '.join(shown)} |", "|---" * len(shown) + "|"]
    for row in ran:
        cells = dict(zip(names, _cells(row), strict=True))
        lines.append(f"| {' | '.join(cells[name] for name in shown)} |")
    rest = [
        f"- {row['model']}: {row.get('failed') or row['skipped']}" for row in rows if "failed" in row or "skipped" in row
    ]
    return "\n".join([*lines, "", "Not run, or not through:", "", *rest])


def _cells(row: dict[str, Any]) -> list[str]:
    exact, sparse, uncompiled = row["exact"], row["sparse"], row.get(UNCOMPILED)
    image = sparse.get("image")
    behind = "sparse" if "sparse" in sparse.get("chunks", ()) else "no" if "chunks" in sparse else "-"
    results = [result for result in (exact, sparse, uncompiled) if result]
    largest = f"{max(result['difference'] for result in results):.0e}"
    reasons = sorted({reason for result in (sparse, image) if result for reason in result["reasons"]})
    return [
        row["model"], row["form"], describe(exact), describe(sparse), behind, describe(image), describe(uncompiled),
        ", ".join(reasons), largest + PLAIN_TOO * (any(PLAIN in result for result in results) and not is_wrong(row)),
    ]  # fmt: skip


def describe(result: dict[str, Any] | None) -> str:
    """Decisions and how many of each; "-" where nothing ran."""
    if not result:
        return "-"
    return ", ".join(f"{count} {name}" for name, count in sorted(result["decisions"].items())) or "none found"


def main(given: list[str] | None = None) -> int:
    """Examines, prints and writes; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="KIND", help="model types, as config.model_type names them")
    parser.add_argument("--images", action="store_true", help="models that read images and text")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for models.json and models.md, image_models with --images")
    arguments = parser.parse_args(given)
    known = kinds(arguments.images)
    chosen = arguments.models or known
    if unknown := [kind for kind in chosen if kind not in known]:
        what = "image-text-to-text" if arguments.images else "causal language"
        parser.error(f"{', '.join(unknown)}: no {what} model of transformers {transformers.__version__}")
    rows = []
    for number, row in enumerate(examined(chosen, arguments.images, arguments.processes), 1):
        rows.append(row)
        print(f"{number}/{len(chosen)}", json.dumps(row), file=sys.stderr, flush=True)
    conditions = {"torch": torch.__version__, "transformers": transformers.__version__, **summarise(rows)}
    text = f"{conditions}\n\n{table(rows)}\n"
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / ("image_models.json" if arguments.images else "models.json")
        path.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)
    return 1 if any(map(is_wrong, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
