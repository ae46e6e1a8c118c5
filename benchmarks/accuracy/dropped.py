"""What a task loses when a layer drops a token: the token as a key, or the token's own row?

    python benchmarks/accuracy/dropped.py --model benchmarks/accuracy/model --layers 0 --task niah_multivalue

A sparse layer does two things to a token that it does not select: others do not see its key and value, and its own row of
the output is zero. Here half of the noise is dropped, at random; needles, questions and the last 128 tokens never are. So
whatever is lost is not lost because evidence was dropped. Attention is written out, and each effect can be had alone:

    dense    neither
    keys     dropped tokens are seen by themselves alone; their rows are computed
    rows     dropped tokens are seen; their rows are zero
    both     what a sparse layer does
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_checkpoint
from torch import Tensor

from tsa_compile.evaluation.tasks import IGNORED, SET, TASKS, Samples, generate

EFFECTS = ("dense", "keys", "rows", "both")
WINDOW = 128
BATCH = 8


class Dropping:
    """Attention for transformers' registry that drops tokens in some layers, in one way at a time."""

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        self.effect = "dense"
        self.kept = torch.empty(0)
        """bool [B, L]"""

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        effect = self.effect if module.layer_idx in self.layers else "dense"
        seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
        if effect in ("keys", "both"):
            itself = torch.eye(query.shape[2], dtype=torch.bool, device=query.device)
            seen = seen & (self.kept[:, None, None, :] | itself)
        scores = (query @ key.transpose(2, 3) * scaling).float().masked_fill(~seen, float("-inf"))
        out = scores.softmax(-1).to(value.dtype) @ value
        if effect in ("rows", "both"):
            out = out * self.kept[:, None, :, None]
        return out.transpose(1, 2).contiguous(), None


def keep(samples: Samples, seed: int) -> Tensor:
    """Half of the tokens, all needles, all questions, the last WINDOW tokens: bool [B, L]."""
    chosen = torch.rand(samples.tokens.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    marks = samples.tokens == SET  # SET key value
    for step in range(3):
        chosen[:, step:] |= marks[:, : marks.shape[1] - step]
    chosen |= samples.evidence | (samples.labels != IGNORED)
    chosen[:, -WINDOW:] = True
    return chosen


@torch.inference_mode()
def accuracy(model: Any, attention: Dropping, arguments: argparse.Namespace) -> dict[str, float]:
    """The share of samples, of `arguments.samples`, all of whose answers are right, under each effect."""
    right = dict.fromkeys(EFFECTS, 0)
    batches = -(-arguments.samples // BATCH)
    for number in range(batches):
        samples = generate(arguments.task, batch=BATCH, length=arguments.length, seed=arguments.seed + number)
        attention.kept = keep(samples, number).to(arguments.device)
        tokens, labels = samples.tokens.to(arguments.device), samples.labels.to(arguments.device)
        asked = labels != IGNORED
        places = asked.any(0).nonzero()[:, 0]
        for effect in EFFECTS:
            attention.effect = effect
            found = model(input_ids=tokens, use_cache=False, logits_to_keep=places).logits.argmax(-1)
            wrong = (found != labels[:, places]) & asked[:, places]
            right[effect] += int((~wrong.any(1)).sum())
    return {effect: count / (batches * BATCH) for effect, count in right.items()}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model of transformers")
    parser.add_argument("--layers", type=int, nargs="+", default=[0], help="that drop tokens")
    parser.add_argument("--task", default="niah_multivalue", choices=TASKS)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Prints one line."""
    from transformers import AttentionInterface

    asked = parse(arguments)
    attention = Dropping(asked.layers)
    AttentionInterface.register("dropping", attention)
    try:
        dtype = torch.float32 if asked.device == "cpu" else torch.bfloat16
        model = load_checkpoint(asked.model, dtype).to(asked.device)
    except OSError as error:
        sys.exit(f"error: {error}")
    model.config._attn_implementation = "dropping"
    found = accuracy(model, attention, asked)
    shares = ", ".join(f"{effect} {100 * share:.1f}" for effect, share in found.items())
    print(
        f"{asked.task}, {asked.length} tokens, layers {asked.layers}, % of {asked.samples} samples right: {shares}",
        flush=True,
    )
    return found


if __name__ == "__main__":
    main()
