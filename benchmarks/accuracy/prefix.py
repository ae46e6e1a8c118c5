"""What a prefix that is used again costs: the answer to a question behind a context that another question's prefill left.

    dense        all of [context, question B] dense
    own          [context, question B] sparse, as one prompt
    handed on    [context, question A] sparse; A's tokens cut off its cache; question B as a chunk behind what is left

    python benchmarks/accuracy/prefix.py --model smollm2 --out prefix.json --length 1024 --samples 16

The model is SmolLM2-135M-Instruct (pretrained.py says where it comes from). Six numbers under six names lie in the context,
and A and B ask for two of them. The answer follows through the cache, dense. The file has every sample; tables are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import torch
from pretrained import FLOOR, abridged, handbook, setting
from torch import Tensor

from tsa_compile import attention
from tsa_compile.commands.loading import source
from tsa_compile.config import KeepRatio, upper_half
from tsa_compile.evaluation import words
from tsa_compile.evaluation.cached import CachedModel

SEED = 5
NAMES = 6
_FACT = " The special number for {key} is {value}. "
_MARK = "x!x"


def sample(tokenizer: Any, text: list[int], length: int, index: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """A context, two questions about it, and the answer to the second; context and question are `length` tokens."""
    draw = Random(f"{SEED}/{length}/{index}")

    def ids(written: str) -> list[int]:
        return list(tokenizer(written, add_special_tokens=False)["input_ids"])

    turn = [{"role": "user", "content": _MARK}]
    before, behind = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).split(_MARK)
    keys, values = words.names(draw, NAMES), words.numbers(draw, NAMES)
    first, second = draw.sample(range(NAMES), 2)
    asked = (
        "\n\nWhat is the special number for {key} in the text above?"
        + behind
        + "The special number for {key} in the text is"
    )
    questions = [ids(asked.format(key=keys[which])) for which in (first, second)]
    start = ids(before + "Some special numbers are hidden in the following text. Remember them.\n\n")
    facts = [ids(_FACT.format(key=key, value=value)) for key, value in zip(keys, values, strict=True)]
    room = length - len(start) - len(questions[1]) - sum(map(len, facts))
    place = draw.randrange(len(text) - room)
    context = text[place : place + room]
    for depth, fact in sorted(((draw.randrange(room), fact) for fact in facts), reverse=True):
        context[depth:depth] = fact
    return start + context, *questions, ids(f" {values[second]}")


class Prefills:
    """The three ways to the logits behind [context, question] and to a cache, by one model."""

    def __init__(self, model: Any) -> None:
        self.model, self.cached = model, CachedModel(model)

    def whole(self, form: str, context: Tensor, question: Tensor) -> tuple[Tensor, Any]:
        self.model.set_attn_implementation(form)
        return self.cached.prefill(torch.cat([context, question], 1))

    def handed_on(self, form: str, context: Tensor, other: Tensor, question: Tensor) -> tuple[Tensor, Any]:
        _, cache = self.whole(form, context, other)
        cache.crop(context.shape[1] - cache.get_seq_length())
        assert cache.get_seq_length() == context.shape[1]
        return self.cached.follow(question, cache)[:, -1], cache

    def score(self, logits: Tensor, cache: Any, answer: Tensor) -> dict[str, Any]:
        """The answer's mean negative log-likelihood, and whether all of its tokens are the likeliest."""
        self.model.set_attn_implementation("sdpa")
        found = self.cached.score(logits, cache, answer)[0]
        likelihood = found.gather(1, answer[0, :, None])
        return {"nll": -float(likelihood.mean()), "exact": bool((found.argmax(-1) == answer[0]).all())}


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the samples that the file does not have yet."""
    model_source = source(given.model, None, None, given.device, given.dtype, False)
    tokenizer = model_source.tokenizer("copy the tokenizer's files into the folder")
    upper = upper_half(model_source.layers)
    studied = (
        setting("floor, keep .15, upper half", KeepRatio(0.15), upper, FLOOR),
        setting("published, keep .5", KeepRatio(0.5), upper, None),
    )
    forms = {
        found.name: attention.register(found.config, name=f"prefix{number}")
        for number, found in enumerate(studied)
        if found.name in (given.settings or [found.name])
    }
    data: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"length": given.length, "rows": []}
    if data["length"] != given.length:
        raise SystemExit(f"{given.out} is of {data['length']} tokens, not of {given.length}: name another file")
    prefills = Prefills(model_source.load(given.length + 64).eval())
    text = list(tokenizer(handbook(), add_special_tokens=False, verbose=False)["input_ids"])
    for index in range(len(data["rows"]), given.samples):
        parts = sample(tokenizer, text, given.length, index)
        context, other, question, answer = (torch.tensor([ids], device=given.device) for ids in parts)
        row = {}
        with torch.no_grad():
            row["dense"] = prefills.score(*prefills.whole("sdpa", context, question), answer)
            for name, form in forms.items():
                row[f"{name}: own"] = prefills.score(*prefills.whole(form, context, question), answer)
                found = prefills.handed_on(form, context, other, question)
                row[f"{name}: handed on"] = prefills.score(*found, answer)
        data["rows"].append(row)
        given.out.write_text(json.dumps(data, indent=1) + "\n")
        print(f"{index + 1}/{given.samples}", file=sys.stderr, flush=True)
    return data


def table(data: dict[str, Any]) -> str:
    """Exact answers, the answers' mean likelihood, and how it differs from the same samples' dense."""
    rows = data["rows"]
    lines = [
        f"| {data['length']} tokens, {len(rows)} samples | exact | nll | nll, more than dense (standard error) |",
        "|---|---|---|---|",
    ]
    for name in rows[0]:
        nll = torch.tensor([row[name]["nll"] for row in rows], dtype=torch.float64)
        more = nll - torch.tensor([row["dense"]["nll"] for row in rows], dtype=torch.float64)
        exact = sum(row[name]["exact"] for row in rows) / len(rows)
        error = float(more.std()) / len(rows) ** 0.5
        lines.append(f"| {name} | {exact:.0%} | {float(nll.mean()):.3f} | {float(more.mean()):+.3f} ({error:.3f}) |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model folder, or one with a .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file, from which to go on")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--settings", nargs="+", type=abridged, help="one of the two settings, by name; default: both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(table(run(parse())))
