"""`calibrate(model, prompts, objective="loss", max_kl=...)`: which layers may be sparse, and what each keeps, by cost.

1. Alone: for each layer and keep ratio, the KL of the answers to dense where that layer alone is sparse.
2. A path: from none sparse to all at the smallest ratio, each step the one that saves most for what it costs alone.
3. As a whole: the last choice on that path whose KL, measured with all its layers sparse at once, is within `max_kl`.
4. What is left of `max_kl`: the steps that fit into it alone, those that save most first, each measured as a whole as well.

Costs of single layers are not added up, as they do not add up: they order the path, and the choice is measured itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from tsa_compile.calibration.base import Calibrated, device_of, evaluating
from tsa_compile.calibration.drift import PROBE, find_layers
from tsa_compile.calibration.fingerprint import Fingerprint, unwrapped
from tsa_compile.calibration.loss import Choice, LossMeter, read_samples
from tsa_compile.calibration.token_ids import items
from tsa_compile.config import KeepRatio, LayerBudgets, TSAConfig, check_int, checked_number, given
from tsa_compile.costs.breakeven import kept_share
from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.cached import check_model
from tsa_compile.kernels.kept import never_dropped
from tsa_compile.progress import Progress, bar

RATIOS = (0.5, 0.3, 0.15, 0.08)
ANSWER = 64  # tokens
TRIES = 8  # measurements that may use up what is left
Alone = Mapping[int, Mapping[float, float]]
"""Layer -> keep ratio -> KL where that layer alone is sparse."""


@dataclass(frozen=True)
class LossCalibration(Calibrated):
    """The sparse layers of one model and what each keeps, chosen by what they cost.

    Attributes:
        layers: module names, first layer first.
        ratios: what each of them keeps; None where it stays dense.
        alone: for each layer, a mapping from keep ratio to the KL of the answers if only this layer is sparse. It is empty
            for a layer that cannot be sparse, and it has no ratios whose KL is not finite.
        kl: of the choice as a whole: mean over the answers' tokens of KL(dense || sparse), in nats.
        max_kl: what was allowed.
        saved: the share of all layers' pairs of queries and keys that are not computed, without counting the floor.
        tokens: how many tokens the answers have, all together.
        prompts, length: how many prompts were used, and how many tokens they have on average.
        base: the configuration that was measured, without its layers and budgets.
        kl_error: the standard error of `kl` over the prompts: how far other prompts of the kind may well be from it. None if
            there is only one, or in a file of an earlier version.
    """

    FORMAT = "tsa_compile.loss_calibration/1"
    KIND, WRITER, REMEDY = "a calibration by loss", "LossCalibration.save", "calibrate again"

    layers: tuple[str, ...]
    ratios: tuple[float | None, ...]
    alone: tuple[Mapping[float, float], ...]
    kl: float
    max_kl: float
    saved: float
    tokens: int
    prompts: int
    length: int
    base: TSAConfig
    fingerprint: Fingerprint
    kl_error: float | None = None

    def __post_init__(self) -> None:
        if not len(self.layers) == len(self.ratios) == len(self.alone) > 0:
            raise ConfigError(
                f"{len(self.layers)} layers, {len(self.ratios)} ratios and {len(self.alone)} costs: as many each"
            )
        checked_number("kl", self.kl, "a finite number", math.isfinite)
        checked_number("max_kl", self.max_kl, "a finite number >= 0", lambda number: 0 <= number < math.inf)
        if self.kl_error is not None:
            checked_number("kl_error", self.kl_error, "a finite number >= 0", lambda number: 0 <= number < math.inf)
        checked_number("saved", self.saved, "a share in [0, 1]", lambda number: 0 <= number <= 1)
        for name in ("tokens", "prompts", "length"):
            check_int(name, getattr(self, name), 0)
        _ = self.sparse_layers  # refuses what is no ratio

    @property
    def sparse_layers(self) -> LayerBudgets:
        """The sparse layers and what each keeps: what `TSAConfig(layers=...)` takes."""
        return LayerBudgets((layer, KeepRatio(ratio)) for layer, ratio in enumerate(self.ratios) if ratio is not None)

    def config(self, **changes: Any) -> TSAConfig:
        """The configuration that was measured; `changes` are other options."""
        return self.base.replace(layers=self.sparse_layers).replace(**changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the inverse of `from_dict`. What is under "config" is a TSAConfig's JSON form."""
        layers = [
            {"name": name, "ratio": ratio, "alone": {str(each): kl for each, kl in costs.items()}}
            for name, ratio, costs in zip(self.layers, self.ratios, self.alone, strict=True)
        ]
        numbers = {
            name: getattr(self, name) for name in ("kl", "kl_error", "max_kl", "saved", "tokens", "prompts", "length")
        }
        return {
            "format": self.FORMAT, "config": self.config().to_dict(), **numbers, "layers": layers,
            "fingerprint": self.fingerprint.to_dict(),
        }  # fmt: skip

    @classmethod
    def _read(cls, values: Mapping[str, Any]) -> LossCalibration:
        rows = values["layers"]
        found = cls(
            layers=tuple(str(row["name"]) for row in rows), ratios=tuple(row["ratio"] for row in rows),
            alone=tuple({float(ratio): float(kl) for ratio, kl in row["alone"].items()} for row in rows),
            kl=float(values["kl"]), max_kl=float(values["max_kl"]), saved=float(values["saved"]),
            tokens=int(values["tokens"]), prompts=int(values["prompts"]), length=int(values["length"]),
            base=TSAConfig.from_json(values["config"]).replace(layers=None),
            fingerprint=Fingerprint.from_dict(values["fingerprint"]),
            kl_error=None if values.get("kl_error") is None else float(values["kl_error"]),
        )  # fmt: skip
        if TSAConfig.from_json(values["config"]).layers != found.sparse_layers:
            raise ValueError(
                f"the layers of its config are {values['config'].get('layers')!r}, and by its ratios "
                f"{found.config().to_dict()['layers']!r}: to choose layers by hand, write a TSAConfig's JSON file"
            )
        if len(rows) != found.fingerprint.layers:
            raise ValueError(f"it has {len(rows)} layers, and its model {found.fingerprint.layers}")
        return found


def calibrate_loss(
    model: nn.Module,
    prompts: Iterable[Any],
    *,
    max_kl: float | None = None,
    ratios: Sequence[float] = RATIOS,
    config: TSAConfig | None = None,
    answer: int = ANSWER,
    tokenizer: Any = None,
    progress: bool = True,
    batch_size: int = 1,
) -> LossCalibration:
    """The largest set of sparse layers, and how much each keeps, that changes the answers by at most `max_kl`.

    Answers are scored behind a prefill, through its cache with dense attention, as in generation.

    Args:
        model: a causal language model of transformers.
        prompts: as for `calibrate`; each one's last `answer` tokens are its answer. Or mappings with answer_ids besides
            input_ids, or samples of `tsa_compile.evaluation`. Their token ids are in memory all at once.
        max_kl: the mean over the answers' tokens of KL(dense || sparse), in nats, that is allowed.
        ratios: the keep ratios that a layer may have.
        config: everything but layers and budgets; its `layers`, if given as indices, are the only candidates.
        answer: how many tokens at the end of each prompt are its answer.

    Raises:
        ConfigError: an option or prompt is not allowed, no layer can be sparse, no prompt is long enough to matter, or no KL
            is a finite number.
    """
    base = given(config, "calibrate_loss")
    if base.dense_kernel is not None:
        raise ConfigError(
            f"config.dense_kernel={base.dense_kernel!r} is not measured here: what is sparse is compared with dense. "
            "Leave it out, and name it behind: found.config(dense_kernel=...)"
        )
    levels = _levels(ratios)
    said = "a number >= 0: how far the answers' probabilities may be from dense, as max_kl=0.01 nats"
    allowed = checked_number("max_kl", max_kl, said, lambda kl: 0 <= kl < math.inf)
    check_int("answer", answer, 1)
    model = unwrapped(model)
    device = device_of(model)
    check_model(model)
    samples = read_samples(model, items(prompts), tokenizer, answer)
    length = round(fmean(len(sample.prompt) for sample in samples))
    check_length(base, max(len(sample.prompt) for sample in samples))
    with evaluating(model), bar(progress) as show:
        stack = find_layers(model, torch.tensor([samples[0].prompt[:PROBE]], device=device))
        meter = LossMeter(model, base, _candidates(base, len(stack.layers)), batch_size)
        search = Search(meter, samples, show)
        alone = search.alone(meter.eligible(samples[0]), levels)
        saved = {ratio: 1 - kept_share(base, length, KeepRatio(ratio).fraction) ** 2 for ratio in levels}
        choice, kl, error = search.best(alone, saved, allowed)
    count = len(stack.layers)
    return LossCalibration(
        layers=stack.names, ratios=tuple(choice.get(layer) for layer in range(count)),
        alone=tuple(alone.get(layer, {}) for layer in range(count)), kl=kl, max_kl=allowed,
        saved=math.fsum(saved[ratio] for ratio in choice.values()) / count,
        tokens=sum(len(sample.answer) for sample in samples), prompts=len(samples),
        length=length, base=base.replace(layers=None), fingerprint=Fingerprint.of(model, stack.layers), kl_error=error,
    )  # fmt: skip


class Search:
    """Measures what a choice of layers costs, with progress."""

    def __init__(self, meter: LossMeter, samples: Sequence[Any], show: Progress) -> None:
        self.meter, self.samples, self.show = meter, samples, show

    def alone(self, layers: Sequence[int], ratios: Sequence[float]) -> dict[int, dict[float, float]]:
        """Every layer alone at every ratio; those of which the KL is not finite are left out.

        Raises:
            ConfigError: there is none of which it is.
        """
        single = [(layer, ratio) for layer in layers for ratio in ratios]
        total = len(single)
        costs = self.meter.costs(
            self.samples, [dict([each]) for each in single], lambda share: self.show("layers alone", share * total, total)
        )
        found: dict[int, dict[float, float]] = {layer: {} for layer in layers}
        for (layer, ratio), kl in zip(single, costs.kl, strict=True):
            if math.isfinite(kl):
                found[layer][ratio] = kl
        if not any(found.values()):
            raise ConfigError(
                f"no layer alone has a finite KL to dense, of {total} pairs of layers and ratios: hidden states overflow, "
                "or weights are not loaded. Calibrate in bfloat16 or float32"
            )
        return found

    def best(self, alone: Alone, saved: Mapping[float, float], max_kl: float) -> tuple[Choice, float, float | None]:
        """The choice that saves most of those that are measured as a whole and within `max_kl`, its KL and its error."""
        choices = path(alone, saved)
        turns = itertools.count()
        errors: dict[frozenset[tuple[int, float]], float] = {frozenset(): 0.0}
        total = (len(choices) + 1).bit_length() + TRIES

        def measure(choice: Choice) -> float:
            turn = next(turns)
            step = lambda share: self.show("as a whole", turn + share, total)  # noqa: E731
            found = self.meter.costs(self.samples, [choice], step)
            errors[frozenset(choice.items())] = found.errors[0] if found.errors else math.nan
            return found.kl[0]

        place, kl = bisect(len(choices), lambda place: measure(choices[place]), max_kl)
        choice, kl = fill(choices[place] if place >= 0 else {}, kl, measure, alone, saved, max_kl)
        error = errors[frozenset(choice.items())]
        return choice, kl, error if math.isfinite(error) else None


def bisect(count: int, measure: Callable[[int], float], limit: float) -> tuple[int, float]:
    """The last place in [0, count) of which the measured value is within a limit, and the value; taken as ascending.

    Returns:
        (-1, 0.0) if even the first is beyond it.
    """
    low, value, high = -1, 0.0, count
    while high - low > 1:
        middle = (low + high) // 2
        found = measure(middle)
        if found <= limit:
            low, value = middle, found
        else:
            high = middle
    return low, value


def fill(
    choice: Choice, kl: float, measure: Callable[[Choice], float], alone: Alone, saved: Mapping[float, float], max_kl: float
) -> tuple[Choice, float]:
    """Takes more layers, or smaller ratios, as long as the whole stays within `max_kl`: at most `TRIES` measurements."""
    tried: list[Choice] = []
    while len(tried) < TRIES:
        steps = [step for step in _steps(choice, alone, saved) if step.cost <= max_kl - kl]
        new = [made for step in sorted(steps, key=lambda step: -step.gain) if (made := step.of(choice)) not in tried]
        if not new:
            break
        tried.append(new[0])
        found = measure(new[0])
        if found <= max_kl:
            choice, kl = new[0], found
    return choice, kl


def path(alone: Alone, saved: Mapping[float, float]) -> list[Choice]:
    """Choices from one sparse layer to all at the least ratio: each takes one layer to a smaller ratio than the one before.

    The step of the least cost for what it saves comes first; of equals the one that saves more, then the higher layer.

    Args:
        saved: what a layer saves at each ratio; a dense one saves 0 and costs 0.
    """
    choices: list[Choice] = [{}]
    while left := _steps(choices[-1], alone, saved):
        best = min(left, key=lambda step: (max(step.cost, 0.0) / step.gain, -step.gain, -step.layer))
        choices.append(best.of(choices[-1]))
    return choices[1:]


@dataclass(frozen=True)
class _Step:
    """One layer to a smaller ratio: what it saves more, and what it costs more alone."""

    layer: int
    ratio: float
    gain: float
    cost: float

    def of(self, choice: Choice) -> Choice:
        return dict(sorted({**choice, self.layer: self.ratio}.items()))


def _steps(choice: Choice, alone: Alone, saved: Mapping[float, float]) -> list[_Step]:
    """All steps from a choice that save something."""
    steps = []
    for layer, costs in alone.items():
        now = choice.get(layer)
        saving, cost = (0.0, 0.0) if now is None else (saved[now], costs[now])
        steps += [_Step(layer, ratio, saved[ratio] - saving, costs[ratio] - cost) for ratio in costs]
    return [step for step in steps if step.gain > 0]


def _levels(ratios: Sequence[float]) -> list[float]:
    """The ratios, largest first."""
    listed = isinstance(ratios, Iterable) and not isinstance(ratios, str)
    found = sorted({KeepRatio(ratio).ratio for ratio in ratios}, reverse=True) if listed else []
    if not found or found[0] == 1:
        raise ConfigError(f"ratios={ratios!r} is not allowed: it must be a list of keep ratios in [0, 1)")
    return found


def _candidates(base: TSAConfig, count: int) -> list[int]:
    chosen = range(count) if base.layers is None else base.layers
    wrong = [layer for layer in chosen if not isinstance(layer, int) or layer >= count]
    if wrong or not len(chosen):
        raise ConfigError(
            f"config.layers={base.layers!r} is not allowed here: None, or indices of the layers 0 to {count - 1}"
        )
    return [layer for layer in chosen if isinstance(layer, int)]


def check_length(base: TSAConfig, longest: int) -> None:
    """Raises ConfigError where the longest prompt, its answer left out, has no token that may be dropped."""
    kept = never_dropped(base.window, base.min_tokens)
    if longest < 1:
        raise ConfigError("no prompt is longer than its answer: pass longer prompts, or a smaller number of answer tokens")
    if longest <= kept:
        raise ConfigError(
            f"prompts have at most {longest:,} tokens before their answers, and {kept:,} are always kept (window + "
            "min_tokens): nothing would be measured. Pass longer prompts, or a config with a smaller min_tokens"
        )
