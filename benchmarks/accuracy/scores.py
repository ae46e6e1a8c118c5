"""Scores that hear a short question: other ways than the mean to make one score of the scoring window's rows.

    python benchmarks/accuracy/scores.py --model smollm2 --out benchmarks/results/scores.json --minutes 9 --jobs 12

The same command goes on where a call was stopped; with `--jobs` every length and question is a process of its own.
`--render FILE.md` writes the tables and runs nothing. How to get the model: pretrained.py.
On a CPU: --lengths 1024 --samples 4 --ratios 0.08 --scores mean max last_8 recent_16

The published score of a token is the mean attention that the last 128 tokens pay to it. Of a question of eight tokens, 120
of these rows ask nothing, and weigh as much. Here the window's rows stay what is always kept, and what changes is how their
weights become a score. Everything runs in torch's own operators: sparse layers are SDPA under the mask that the floor and
the selection mean (docs/semantics.md), so any score can be tried without a kernel; the upper half of the layers is sparse.

Questions have 4 to 100 tokens: `code` and `short` end in the key; `asked` is a question as people ask it; behind that of
`told` stand sixty more tokens of instructions, so that the prompt's end does not say what was asked.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from statistics import fmean, stdev
from typing import Any

import torch
from jobs import STOPPED, folder_of, run_parts
from torch import Tensor
from torch.nn.functional import avg_pool1d, scaled_dot_product_attention

from tsa_compile.commands.loading import source
from tsa_compile.config import Floor, upper_half
from tsa_compile.evaluation import words
from tsa_compile.evaluation.cached import CachedModel, divergence
from tsa_compile.evaluation.prompts import Sample
from tsa_compile.files import write

NAME, WINDOW, POOL, FLOOR = "scores-study", 128, 7, Floor(256, 16)
SEED, DENSE = 0, "dense"


def recent(half: int) -> Callable[[Tensor], Tensor]:
    """Weights that halve every `half` rows from the prompt's end."""

    def combine(weights: Tensor) -> Tensor:
        age = torch.arange(weights.shape[-2] - 1, -1, -1, device=weights.device, dtype=weights.dtype)
        rows = torch.exp2(-age / half)
        return (weights * (rows / rows.sum())[:, None]).sum(dim=-2)

    return combine


def highest(count: int) -> Callable[[Tensor], Tensor]:
    """The mean of a token's highest few weights."""
    return lambda weights: weights.topk(min(count, weights.shape[-2]), dim=-2).values.mean(dim=-2)


def last(count: int) -> Callable[[Tensor], Tensor]:
    """The mean over the last few rows alone."""
    return lambda weights: weights[..., -count:, :].mean(dim=-2)


def renormalised(weights: Tensor) -> Tensor:
    """The mean of rows that sum to 1 over the candidates: one that looks mostly nearby weighs as much as others."""
    return (weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-9)).mean(dim=-2)


def larger(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The larger of two scores, each divided by its sum: what either of them wants."""

    def combine(weights: Tensor) -> Tensor:
        shares = [score / score.sum(dim=-1, keepdim=True).clamp(min=1e-9) for score in (first(weights), second(weights))]
        return torch.maximum(*shares)

    return combine


def mean(weights: Tensor) -> Tensor:
    """The published score."""
    return weights.mean(dim=-2)


# Of weights [..., rows, n] each makes [..., n]. With "values" the score is multiplied by the length of the value.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": mean,
    "max": lambda weights: weights.amax(dim=-2),
    "highest_4": highest(4),
    "highest_16": highest(16),
    "rms": lambda weights: weights.square().mean(dim=-2).sqrt(),
    "recent_8": recent(8),
    "recent_16": recent(16),
    "recent_32": recent(32),
    "last_8": last(8),
    "last_32": last(32),
    "renormalised": renormalised,
    "mean_or_last_8": larger(mean, last(8)),
    "mean_values": mean,
    "max_values": lambda weights: weights.amax(dim=-2),
    "random": mean,
}


def score(query: Tensor, key: Tensor, value: Tensor, scale: float, name: str) -> Tensor:
    """Scores [B,H,n] of the candidates, all tokens in front of the window, for query, key, value [B,H,L,D]."""
    rows, length = min(WINDOW, query.shape[2]), query.shape[2]
    logits = scale * (query[:, :, -rows:].float() @ key.float().mT)
    positions = torch.arange(length, device=query.device)
    weights = logits.masked_fill(positions > positions[-rows:, None], -math.inf).softmax(dim=-1)[..., : length - rows]
    found = torch.rand_like(weights[..., 0, :]) if name == "random" else SCORES[name](weights)
    if name.endswith("_values"):
        found = found * value[:, :, : length - rows].float().norm(dim=-1)
    return avg_pool1d(found, POOL, 1, POOL // 2, count_include_pad=True)


def allowed(scores: Tensor, ratio: float) -> Tensor:
    """What each row may see: its neighbourhood, and if it is selected the selected tokens; bool [B,H,L,L]."""
    batch, heads, candidates = scores.shape
    length = candidates + WINDOW
    best = scores.topk(math.ceil(ratio * candidates), dim=-1).indices
    selected = torch.ones(batch, heads, length, dtype=torch.bool, device=scores.device)
    selected[..., :candidates] = False
    selected.scatter_(2, best, True)
    query = torch.arange(length, device=scores.device)[:, None]
    key = query.mT
    near = (query - key < FLOOR.window) | (key < FLOOR.sinks)
    return (near | (selected[..., :, None] & selected[..., None, :])) & (key <= query)


class Attention:
    """An attention function for transformers, whose sparse layers follow what is set."""

    def __init__(self, layers: int) -> None:
        self.sparse, self.name, self.ratio = frozenset(upper_half(layers)), DENSE, 1.0

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Query [B,H,Lq,D] over key and value [B,G,Lk,D], no padding: [B,Lq,H,D]."""
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        new, length = query.shape[2], key.shape[2]
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        seen = None
        if self.name != DENSE and new == length > WINDOW and module.layer_idx in self.sparse:
            seen = allowed(score(query, key, value, scale, self.name), self.ratio)
        elif 1 < new < length:
            seen = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(length - new)
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=new == length and seen is None, scale=scale
        )
        return output.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Question:
    """How something is asked: texts with {key}, for one value and for several."""

    fact: str
    one: str
    several: str


_TOLD = (
    " Read the whole text carefully before you answer. Give numbers exactly as they are written there, digit by digit, "
    "without any separators, units or explanations. If there is more than one, put commas between them. Do not repeat the "
    "text, do not add anything that is not in it, and do not guess.\n\nAnswer:"
)
_FACT = " The special number for {key} is {value}."
QUESTIONS = {
    "code": Question(" Code {key}: {value}.", "\nCode {key}:", "\nCode {key}:"),
    "short": Question(_FACT, "\n\nThe special number for {key} is", "\n\nThe special numbers for {key} are"),
    "asked": Question(
        _FACT,
        "\n\nWhat is the special number for {key} in the text above?\n\nThe special number for {key} in the text is",
        "\n\nWhat are all the special numbers for {key} in the text above?\n\nThe special numbers for {key} in the text are",
    ),
    "told": Question(
        _FACT, "\n\nWhat is the special number for {key} in the text above?" + _TOLD,
        "\n\nWhat are all the special numbers for {key} in the text above?" + _TOLD,
    ),
}  # fmt: skip
TASKS = ("keys", "values")


def sample(tokenizer: Any, text: Sequence[int], task: str, question: str, length: int, index: int) -> Sample:
    """Six numbers under six names, or four under one; a prompt of exactly `length` tokens."""
    draw = Random(f"{SEED}/{task}/{question}/{length}/{index}")

    def ids(written: str) -> list[int]:
        return list(tokenizer(written, add_special_tokens=False)["input_ids"])

    asked, forms = QUESTIONS[question], words.names(draw, 6)
    keys = forms if task == "keys" else forms[:1] * 4
    values = words.numbers(draw, len(keys))
    place = draw.randrange(len(keys))
    facts = [ids(asked.fact.format(key=key, value=value)) for key, value in zip(keys, values, strict=True)]
    end = ids((asked.one if task == "keys" else asked.several).format(key=keys[place]))
    answer = ids(f" {values[place]}" if task == "keys" else f" {', '.join(values[:-1])} and {values[-1]}")
    room = length - len(end) - sum(map(len, facts))
    start = draw.randrange(len(text) - room)
    depths = sorted(draw.randrange(room) for _ in facts)
    prompt = list(text[start : start + room])
    for depth, fact in reversed(list(zip(depths, facts, strict=True))):
        prompt[depth:depth] = fact
    return Sample(prompt + end, answer)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder, or one with a .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file, from which to go on")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05])
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=SCORES)
    parser.add_argument("--questions", nargs="+", default=list(QUESTIONS), choices=QUESTIONS)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many, to go on later")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with a length and a question")
    parser.add_argument("--render", type=Path, metavar="FILE.md", help="write the tables there and run nothing")
    found = parser.parse_args(arguments)
    if found.model is None and not found.render:
        parser.error("pass --model FOLDER, or --render FILE.md")
    return found


def run(given: argparse.Namespace) -> bool:
    """Runs what the file has not, and writes it behind every sample; whether there was time for all."""
    from transformers import AttentionInterface, AttentionMaskInterface

    end = time.monotonic() + 60 * given.minutes
    model_source = source(given.model, None, None, given.device, given.dtype, False)
    tokenizer = model_source.tokenizer("copy the tokenizer's files into the folder")
    model, attention = model_source.load(max(given.lengths)), Attention(model_source.layers)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)
    text = tokenizer("\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    device = next(model.parameters()).device
    data = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    data = data or {"model": given.model.name, "dtype": given.dtype, "cells": {}, "question_tokens": {}}
    data |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else str(device), "torch": torch.__version__}
    settings = [(DENSE, 1.0), *((name, ratio) for ratio in given.ratios for name in given.scores)]
    for index in range(given.samples):
        for length in given.lengths:
            for task in TASKS:
                for question in given.questions:
                    cell = data["cells"].setdefault(f"{length}/{task}/{question}", {})
                    if all(len(cell.get(_name(*setting), ())) > index for setting in settings):
                        continue
                    made = sample(tokenizer, text, task, question, length, index)
                    data["question_tokens"][f"{task}/{question}"] = len(_end(tokenizer, task, question))
                    measure(model, attention, made, cell, settings, index)
                    write(given.out, json.dumps(data) + "\n")
                    if time.monotonic() > end:
                        return False
        print(f"{time.strftime('%H:%M:%S')} {index + 1}/{given.samples} samples", file=sys.stderr, flush=True)
    return True


def run_jobs(given: argparse.Namespace, arguments: list[str]) -> int:
    """Runs this script for each length and question, several at a time, and puts their files together; an exit code."""
    pairs = [(length, question) for length in sorted(given.lengths, reverse=True) for question in given.questions]
    parts = {f"{question}-{length}": ["--lengths", str(length), "--questions", question] for length, question in pairs}
    code = run_parts(__file__, arguments, parts, given.out, given.jobs, given.minutes)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder_of(given.out).glob("*.json"))]
    if not found:
        raise SystemExit("nothing has run: no part has a file")
    joined = {
        name: {key: cell for part in found for key, cell in part[name].items()} for name in ("cells", "question_tokens")
    }
    write(given.out, json.dumps(found[0] | joined) + "\n")
    return code


def _end(tokenizer: Any, task: str, question: str) -> list[int]:
    form = QUESTIONS[question].one if task == "keys" else QUESTIONS[question].several
    return list(tokenizer(form.format(key="amber fox"), add_special_tokens=False)["input_ids"])


def measure(
    model: Any, attention: Attention, made: Sample, cell: dict[str, Any], settings: Sequence[Any], index: int
) -> None:
    """Adds [all digits right, mean negative log-likelihood, KL to dense] of one sample to every setting that lacks it."""
    device = next(model.parameters()).device
    prompt, answer = torch.tensor([made.prompt], device=device), torch.tensor([made.answer], device=device)
    cached, dense = CachedModel(model), None
    for name, ratio in settings:
        if dense is not None and len(cell.get(_name(name, ratio), ())) > index:
            continue
        torch.manual_seed(index)
        attention.name, attention.ratio = name, ratio
        scored = cached.score(*cached.prefill(prompt), answer)
        dense = scored if dense is None else dense
        kl = float(divergence(dense, scored).mean())
        nll = -float(scored.gather(2, answer[:, :, None]).mean())
        right = bool((scored.argmax(-1) == answer).all())
        known = cell.setdefault(_name(name, ratio), [])
        if len(known) == index:
            known.append([int(right), float(f"{nll:.5g}"), float(f"{kl:.5g}")])


def _name(name: str, ratio: float) -> str:
    return name if name == DENSE else f"{name}, keep {ratio:g}"


def tables(data: Mapping[str, Any]) -> str:
    """For each length: right in %, and the mean difference of the likelihood to dense with its standard error."""
    lines = [
        f"{data['model']}, {data['dtype']}; {data['device']}, torch {data['torch']}. Upper half sparse, floor "
        f"{FLOOR.window} and {FLOOR.sinks}, window {WINDOW}.",
        "Cells: % of samples whose answer is the likeliest at every token; mean negative log-likelihood, for scores its "
        "difference to dense on the same samples, with the standard error. Questions: tokens behind the text.\n",
    ]
    lengths = sorted({int(key.split("/")[0]) for key in data["cells"]})
    for length in lengths:
        cells = {key.split("/", 1)[1]: cell for key, cell in data["cells"].items() if key.startswith(f"{length}/")}
        head = [f"{key.replace('/', ', ')} ({data['question_tokens'][key]})" for key in cells]
        samples = {len(cell[DENSE]) for cell in cells.values()}
        lines += [f"\n**{length:,} tokens, {min(samples)} samples**\n", f"| score | mean | {' | '.join(head)} |"]
        lines.append(f"|{' --- |' * (len(head) + 2)}")
        for name in dict.fromkeys(name for cell in cells.values() for name in cell):
            found = [_cell(cell.get(name, []), cell[DENSE], name) for cell in cells.values()]
            every = [row for cell in cells.values() for row in _differences(cell.get(name, []), cell[DENSE])]
            lines.append(
                f"| {name} | {'' if name == DENSE or not every else f'{fmean(every):+.3f}'} | {' | '.join(found)} |"
            )
    return "\n".join(lines) + "\n"


def _differences(rows: Sequence[Any], dense: Sequence[Any]) -> list[float]:
    return [row[1] - base[1] for row, base in zip(rows, dense, strict=False)]


def _cell(rows: Sequence[Any], dense: Sequence[Any], name: str) -> str:
    if not rows:
        return ""
    right = f"{fmean(row[0] for row in rows):.0%}"
    if name == DENSE:
        return f"{right}, {fmean(row[1] for row in rows):.3f}"
    found = _differences(rows, dense)
    error = f" ± {stdev(found) / math.sqrt(len(found)):.3f}" if len(found) > 1 else ""
    return f"{right}, {fmean(found):+.3f}{error}"


def main(arguments: list[str] | None = None) -> int:
    """0 when all is run, STOPPED when the time was over before."""
    given = parse(arguments)
    torch.set_grad_enabled(False)
    if given.render:
        given.render.write_text(tables(json.loads(given.out.read_text(encoding="utf-8"))), encoding="utf-8")
        return 0
    if given.jobs > 1:
        return run_jobs(given, sys.argv[1:] if arguments is None else arguments)
    return 0 if run(given) else STOPPED


if __name__ == "__main__":
    sys.exit(main())
