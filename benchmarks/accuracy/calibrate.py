"""Which layers: chosen by what they cost in the answers, by representation drift, or the upper part of the model.

    python benchmarks/accuracy/calibrate.py --model smollm2 --out calibrate_4k.json --dtype bfloat16 --unseen 5 \\
        --tasks needle needle_keys question_first copy continuation --minutes 9

The same command goes on where a call was stopped; `--render FILE.md` writes the table and runs nothing. How to get the
model: pretrained.py. On a CPU (no conclusion about longer prompts): --length 512 --samples 1 --ratios 0.3 0.08

Calibration chooses on samples of one seed; what is compared is measured on samples of another, which it has not seen. Each
choice of layers and keep ratios has two figures there: the share of query-key pairs that its layers leave out of selected
attention, of all layers (what the floor sees is the same for each sparse layer), and the KL of the answers to dense.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

import torch

from tsa_compile.calibration.calibrate import calibrate
from tsa_compile.calibration.loss import Choice, Costs, LossMeter
from tsa_compile.calibration.loss_search import RATIOS, Search
from tsa_compile.commands.loading import source
from tsa_compile.config import Floor, KeepRatio, TSAConfig, upper_half
from tsa_compile.costs.breakeven import kept_share
from tsa_compile.evaluation.prompts import Sample, Writer
from tsa_compile.files import write

BASE = TSAConfig(floor=Floor(256, 16), window=128, min_tokens=0)
TASKS = ("needle", "needle_keys", "needle_values", "question_first", "copy", "continuation")
SEED, UNSEEN = 1, 2
MAX_KL = (0.001, 0.003, 0.01, 0.03, 0.1)
DELTAS = (0.25, 0.5, 0.75)
AT_ONCE = 8  # choices measured before the file is written


class Stopped(Exception):
    """The time is over."""


class Kept:
    """A `LossMeter` that keeps every sample's cost in a file, and measures what the file has not."""

    def __init__(self, meter: LossMeter, path: Path, conditions: Mapping[str, Any], end: float) -> None:
        self.meter, self.path, self.end = meter, path, end
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if found and found["conditions"] != conditions:
            raise SystemExit(f"{path} was made under other conditions ({found['conditions']}): name another file")
        self.data: dict[str, Any] = found or {"conditions": dict(conditions), "costs": {}}

    def costs(
        self,
        samples: Sequence[tuple[str, Sample]],
        choices: Sequence[Choice],
        step: Callable[[float], None] = lambda share: None,
    ) -> Costs:
        """As LossMeter.costs, over (name, sample): the mean of the samples, so that each of them weighs the same."""
        for place, (name, sample) in enumerate(samples):
            known = self.data["costs"].setdefault(name, {})
            missing = [choice for choice in choices if _key(choice) not in known]
            for first in range(0, len(missing), AT_ONCE):
                part = missing[first : first + AT_ONCE]
                for choice, kl in zip(part, self.meter.costs([sample], part).kl, strict=True):
                    known[_key(choice)] = float(f"{kl:.5g}")
                self.save()
                if time.monotonic() > self.end:
                    raise Stopped
            step((place + 1) / len(samples))
        found = self.data["costs"]
        means = tuple(fmean(found[name][_key(choice)] for name, _ in samples) for choice in choices)
        return Costs(means, sum(len(sample.answer) for _, sample in samples))

    def save(self) -> None:
        """Writes the file."""
        write(self.path, json.dumps(self.data, indent=0) + "\n")


def _key(choice: Choice) -> str:
    return ",".join(f"{layer}:{ratio:g}" for layer, ratio in sorted(choice.items()))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder, or one with a .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file, from which to go on")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=2, help="of each task to calibrate on")
    parser.add_argument("--unseen", type=int, default=8, help="of each task to compare on")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many, to go on later")
    parser.add_argument("--render", type=Path, metavar="FILE.md", help="write the table there and run nothing")
    found = parser.parse_args(arguments)
    if found.model is None and not found.render:
        parser.error("pass --model FOLDER, or --render FILE.md")
    return found


def run(given: argparse.Namespace) -> None:
    """Runs what is missing in the file, and says on stderr what runs."""
    end = time.monotonic() + 60 * given.minutes
    model_source = source(given.model, None, None, given.device, given.dtype, False)
    tokenizer = model_source.tokenizer("copy the tokenizer's files into the folder")
    model, count = model_source.load(given.length), model_source.layers
    writer = Writer(tokenizer, "\n".join(topics[name] for name in sorted(topics)))
    seen, unseen = (
        [
            (f"{seed}/{task}/{index}", writer.sample(task, given.length, seed, index))
            for index in range(n)
            for task in given.tasks
        ]
        for seed, n in ((SEED, given.samples), (UNSEEN, given.unseen))
    )
    conditions = {
        "model": given.model.name, "layers": count, "length": given.length, "dtype": given.dtype, "tasks": list(given.tasks),
        "ratios": sorted(given.ratios, reverse=True), "config": BASE.to_dict(),
    }  # fmt: skip
    meter = LossMeter(model, BASE, range(count))
    kept = Kept(meter, given.out, conditions, end)
    device = next(model.parameters()).device
    kept.data |= {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        "samples": [len(seen), len(unseen)],
    }
    layers = meter.eligible(seen[0][1])
    if "drift" not in kept.data:
        prompts = [torch.tensor(sample.prompt + sample.answer) for _, sample in seen]
        kept.data["drift"] = calibrate(model, prompts, progress=False).drift
    chosen = by_loss(kept, seen, layers, given.ratios) | fixed(kept.data["drift"], layers, given.ratios)
    chosen = {name: choice for name, choice in chosen.items() if choice}
    _say("comparing on unseen samples")
    kl = kept.costs(unseen, list(chosen.values()), lambda share: _say(f"unseen {share:.0%}")).kl
    seen_kl = kept.costs(seen, list(chosen.values()), lambda share: _say(f"seen {share:.0%}")).kl
    saved = saving(given.ratios, given.length)
    kept.data["rows"] = [
        {
            "name": name, "choice": _key(choice), "saved": sum(saved[r] for r in choice.values()) / count, "kl": kl[place],
            "seen": seen_kl[place], "tasks": {task: _mean(kept.data["costs"], unseen, task, choice) for task in given.tasks},
        }
        for place, (name, choice) in enumerate(chosen.items())
    ]  # fmt: skip
    kept.save()


def by_loss(kept: Kept, seen: Sequence[Any], layers: Sequence[int], ratios: Iterable[float]) -> dict[str, Choice]:
    """Calibration by loss at every allowed KL; single layers are measured once for all of them."""
    meter: Any = kept  # measures as a LossMeter does, and remembers
    search = Search(meter, seen, lambda what, done, total: _say(f"{what} {done:.0f}/{total}"))
    levels = sorted(ratios, reverse=True)
    alone, saved = search.alone(layers, levels), saving(ratios, len(seen[0][1].prompt))
    return {f"by loss, max_kl {limit:g}": search.best(alone, saved, limit)[0] for limit in MAX_KL}


def fixed(drift: Sequence[float], layers: Sequence[int], ratios: Iterable[float]) -> dict[str, Choice]:
    """One ratio for a set of layers that drift, or the place in the model, chooses."""
    by_drift = sorted(layers, key=lambda layer: (drift[layer], layer))
    sets = {f"drift, delta {delta:g}": by_drift[: int(delta * len(drift))] for delta in DELTAS}
    first = {"upper half": upper_half(len(drift))[0], "upper two thirds": len(drift) // 3, "all but 2": 2}
    sets |= {name: [each for each in layers if each >= start] for name, start in first.items()}
    return {f"{name}, keep {ratio:g}": dict.fromkeys(each, ratio) for name, each in sets.items() for ratio in ratios}


def saving(ratios: Iterable[float], length: int) -> dict[float, float]:
    """What a layer leaves out at each ratio: the share of its query-key pairs."""
    return {ratio: 1 - kept_share(BASE, length, KeepRatio(ratio).fraction) ** 2 for ratio in ratios}


def _mean(costs: Mapping[str, Any], samples: Sequence[Any], task: str, choice: Choice) -> float:
    return fmean(costs[name][_key(choice)] for name, _ in samples if f"/{task}/" in name)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def table(data: Mapping[str, Any]) -> str:
    """The rows, most saved first, as Markdown; what no other row beats in both figures is marked."""
    tasks, rows = data["conditions"]["tasks"], sorted(data["rows"], key=lambda row: -row["saved"])
    best = [row for row in rows if not any(o["saved"] >= row["saved"] and o["kl"] < row["kl"] for o in rows)]
    head = ["layers and ratios", "left out", "KL, unseen", "KL, calibrated on", *tasks]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        name = f"**{row['name']}**" if row in best else row["name"]
        cells = [name, f"{row['saved']:.1%}", f"{row['kl']:.2g}", f"{row['seen']:.2g}"]
        cells += [f"{row['tasks'][task]:.2g}" for task in tasks]
        lines.append(f"| {' | '.join(cells)} |")
    facts, (seen, unseen) = data["conditions"], data["samples"]
    made = f"{facts['model']}, {facts['dtype']}, {facts['length']:,} tokens; {seen} samples to calibrate on, {unseen} unseen"
    note = "Bold: no other row leaves out as much at a smaller KL. Tasks: KL on the unseen samples of each."
    return f"{made}; {data['device']}, torch {data['torch']}\n\n{note}\n\n" + "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """0 when all is run, 3 when the time was over before."""
    given = parse(arguments)
    torch.set_grad_enabled(False)
    if given.render:
        given.render.write_text(table(json.loads(given.out.read_text(encoding="utf-8"))), encoding="utf-8")
        return 0
    try:
        run(given)
    except Stopped:
        _say("stopped: the same command goes on from here")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
