"""Trains the accuracy study's model: a small transformer that really uses its context, from scratch, in minutes on one GPU.

    python benchmarks/accuracy/train.py --out out/plain --minutes 8 --no-shift       the model that ships
    python benchmarks/accuracy/train.py --out out/shift --minutes 8

A mixture of the tasks of tsa_compile/evaluation/tasks.py, on a ladder of lengths (ladder.py), 131,072 tokens a step, loss at
the answers alone, weights that start aligned (`align` in starts.py; --no-align: drawn apart). The folder then holds

    checkpoint/        the model in transformers' form, bfloat16 (checkpoint.py)
    training.json .md .png
    log.jsonl          a line for every 20th step, every evaluation, every rung
    state.pt           from which the same command goes on, after it was cut off at any moment or paused by --pause

What a step costs: 6 operations per weight of the layers and token (10.5 TFLOP), and 3,584 * length per token and layer for
causal attention. At 350 TFLOP/s, which one H200 should reach in bfloat16 at these sizes:

| length        | 128 | 512 | 2K | 4K | 8K  | 16K |
|---------------|-----|-----|----|----|-----|-----|
| TFLOP a step  | 11  | 12  | 18 | 26 | 41  | 72  |
| ms a step     | 31  | 36  | 52 | 74 | 118 | 206 |

An H100 took 54, 54, 66, 82, 116 and 184 ms with the shift, an H200 46, 50, 69, 95, 148 and 252 ms without; with 4,700 steps,
evaluation every 100 steps and the compilation of a layer for each length it was 7.5 and 8 minutes in all
(benchmarks/results/training_shift.md, training.md). On a CPU, for a look (minutes):

    python benchmarks/accuracy/train.py --out out/look --device cpu --tokens 4096 --lengths 128 --tasks mqar niah_single \\
        --steps 800 --decay 100 --lr 5e-3 --size hidden_size=128 num_hidden_layers=2 num_attention_heads=4 head_dim=32
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from checkpoint import SIZES, save_checkpoint
from ladder import Rules
from trainer import Settings, Trainer
from training_report import summary, write

from tsa_compile.evaluation.tasks import TASKS


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    settings, rules = Settings(), Rules()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; one with a state is gone on with")
    parser.add_argument("--minutes", type=float, help="of training in all, earlier runs in the folder counted in")
    parser.add_argument("--pause", type=float, help="minutes after which this call saves and stops, to be gone on with")
    parser.add_argument("--steps", type=int, help="at most, the decay included")
    parser.add_argument("--no-shift", action="store_true", help="a plain Qwen3 without the token shift")
    parser.add_argument("--no-align", action="store_true", help="draw every projection by itself (starts.align)")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(rules.lengths), help="the ladder")
    parser.add_argument("--target", type=float, default=rules.target, help="accuracy of the worst task to advance at")
    parser.add_argument("--floor", type=int, default=rules.floor, help="steps at a rung at least")
    parser.add_argument("--cap", type=int, default=rules.cap, help="steps at a rung at most")
    parser.add_argument("--decay", type=int, default=rules.decay, help="steps of the learning rate's fall")
    parser.add_argument("--tokens", type=int, default=settings.tokens, help="of a step")
    parser.add_argument("--lr", type=float, default=settings.learning_rate)
    parser.add_argument("--seed", type=int, default=settings.seed, help="of the initial weights")
    parser.add_argument("--start", help="a checkpoint folder whose weights training starts from")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--evaluate-every", type=int, default=settings.evaluate_every, help="steps")
    parser.add_argument("--size", nargs="+", default=[], metavar="NAME=N", help="replaces a size of the model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true", help="on a GPU, run the layers as they are")
    parser.add_argument("--attention", choices=["auto", *ATTENTION], default="auto", help="on a GPU; auto: the fastest")
    found = parser.parse_args(arguments)
    if found.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device was found; pass --device cpu and a small --size for a look")
    if max(found.lengths) > found.tokens:
        parser.error(f"--tokens {found.tokens} is less than one sample of the longest length, {max(found.lengths)}")
    found.size = _sizes(parser, found.size)
    try:
        found.rules = Rules(
            lengths=tuple(found.lengths), target=found.target, floor=found.floor, cap=found.cap, decay=found.decay,
            minutes=found.minutes, steps=found.steps,
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    return found


def _sizes(parser: argparse.ArgumentParser, given: list[str]) -> dict[str, int]:
    sizes = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in SIZES or not number.isdigit():
            parser.error(f"--size {text}: expected NAME=N with a name of {', '.join(SIZES)}")
        sizes[name] = int(number)
    return sizes


ATTENTION = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION"}


def attention(choice: str, sizes: dict[str, int], tokens: int, length: int) -> Any:
    """A context in which SDPA runs one kernel, "auto" the one that is faster forward and backward at this length."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if choice == "auto":
        kernels = {name: getattr(SDPBackend, kernel) for name, kernel in ATTENTION.items()}
        times = {name: attention_ms(kernel, sizes, tokens, length) for name, kernel in kernels.items()}
        print(f"attention at {length} tokens, forward and backward, ms: {times}", flush=True)
        choice = min(times, key=times.__getitem__)
    first = getattr(SDPBackend, ATTENTION[choice])
    return sdpa_kernel([first, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


def attention_ms(backend: Any, sizes: dict[str, int], tokens: int, length: int, device: str = "cuda") -> float:
    """Of compiled attention, as a layer calls it; infinite where it fails, or its gradient isn't that of plain attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    counts = [sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")]
    generator = torch.Generator(device).manual_seed(0)

    def inputs(samples: int, seq_len: int) -> list[torch.Tensor]:
        shapes = [(samples, seq_len, count, sizes["head_dim"]) for count in counts]
        made = [torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) for shape in shapes]
        return [tensor.transpose(1, 2).requires_grad_() for tensor in made]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous()

    def gradient(call: Any, tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.autograd.grad(call(*tensors).float().square().sum(), tensors)[1].float()

    small, large = inputs(2, 256), inputs(max(1, tokens // length), length)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = gradient(attend, [tensor.detach().float().requires_grad_() for tensor in small])
    torch._dynamo.reset()  # what was compiled for another kernel
    compiled = torch.compile(attend, dynamic=False)
    try:
        with sdpa_kernel(backend):
            error = float((gradient(compiled, small) - wanted).norm() / wanted.norm())
            gradient(compiled, large).sum().item()  # compiles, and waits
            started = time.perf_counter()
            gradient(compiled, large).sum().item()
    except RuntimeError as failure:
        print(f"{backend}: {str(failure).splitlines()[0]}", flush=True)
        return math.inf
    return round(1e3 * (time.perf_counter() - started), 2) if error < 0.05 else math.inf


def main(arguments: list[str] | None = None) -> None:
    """Trains, or goes on training, and writes what is known."""
    asked = parse(arguments)
    cuda = asked.device.startswith("cuda")
    settings = Settings(
        token_shift=not asked.no_shift, aligned=not asked.no_align, seed=asked.seed, tokens=asked.tokens,
        learning_rate=asked.lr, evaluate_every=asked.evaluate_every, tasks=tuple(asked.tasks), sizes=asked.size,
        start=asked.start,
    )  # fmt: skip
    sizes = SIZES | asked.size
    torch._dynamo.config.recompile_limit = 4 * len(asked.lengths)  # a graph of the layer for each length
    with attention(asked.attention, sizes, asked.tokens, max(asked.lengths)) if cuda else contextlib.nullcontext():
        trainer = Trainer(
            settings, asked.rules, asked.out, device=asked.device, dtype=torch.bfloat16 if cuda else torch.float32,
            compiled=cuda and not asked.no_compile, say=lambda line: print(line, flush=True),
        )  # fmt: skip
        over = trainer.run(pause_after=None if asked.pause is None else 60 * asked.pause)
        facts = trainer.facts() | {"sizes": sizes, "final": trainer.evaluate_all() if over else []}
    if not over:
        print(f"paused at step {trainer.step}; the same command goes on")
        return
    save_checkpoint(trainer.model, asked.out / "checkpoint", facts)
    write(facts, asked.out)
    print(f"\n{summary(facts)}")


if __name__ == "__main__":
    main()
