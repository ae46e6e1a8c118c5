"""`calibrate(model, prompts)`: which layers of a model may be sparse, by representation drift or by what they cost.

By what they cost in the answers: loss_search.py. By drift: where a layer changes its input little, little is lost with
the tokens that its attention skips (arXiv 2602.03216). The layers of least drift become sparse: those with
rank / layers <= delta.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, overload

from torch import nn

from tsa_compile.calibration.base import Calibrated, checked, device_of, evaluating, running
from tsa_compile.calibration.drift import PROBE, DriftMeter, find_layers
from tsa_compile.calibration.fingerprint import Fingerprint, unwrapped
from tsa_compile.calibration.loss_search import LossCalibration, calibrate_loss
from tsa_compile.calibration.token_ids import batches, items, read_prompts
from tsa_compile.config import Coverage, TSAConfig, check_int, checked_number
from tsa_compile.errors import ConfigError, TSAWarning
from tsa_compile.files import new_figure, read_json, save_figure
from tsa_compile.progress import Progress, bar


@dataclass(frozen=True)
class Calibration(Calibrated):
    """The drift of each decoder layer of one model, and which of them are sparse at `delta`.

    `dataclasses.replace(calibration, delta=0.25)` chooses other layers without measuring again.
    """

    FORMAT = "tsa_compile.calibration/1"
    KIND, WRITER, REMEDY = "a calibration", "Calibration.save", "calibrate again"

    layers: tuple[str, ...]
    """Module names, first layer first."""
    drift: tuple[float, ...]
    """R_l of each layer: the mean change of a token's hidden state, relative to its length."""
    delta: float
    """The share of the layers that are sparse, in (0, 1]."""
    tokens: int
    prompts: int
    fingerprint: Fingerprint

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "drift", tuple(map(float, self.drift)))
        object.__setattr__(self, "delta", _share(self.delta))
        if len(self.layers) != len(self.drift) or not self.layers:
            raise ConfigError(f"{len(self.layers)} layers and {len(self.drift)} drifts: there must be as many, at least one")
        bad = [
            name for name, value in zip(self.layers, self.drift, strict=True) if not (math.isfinite(value) and value >= 0)
        ]
        if bad:
            raise ConfigError(
                f"the drift of {len(bad)} layers is not a finite number >= 0, the first is {bad[0]}: hidden states "
                "overflow, or weights are not loaded. Calibrate in bfloat16 or float32"
            )

    @property
    def ranks(self) -> tuple[int, ...]:
        """Each layer's rank: 1 drifts least. Of equal drifts the lower layer comes first."""
        order = sorted(range(len(self.drift)), key=lambda index: (self.drift[index], index))
        places = {index: place for place, index in enumerate(order, start=1)}
        return tuple(places[index] for index in range(len(self.drift)))

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The indices of the layers with rank / layers <= delta, ascending: what `TSAConfig(layers=...)` takes."""
        return tuple(index for index, rank in enumerate(self.ranks) if rank / len(self.ranks) <= self.delta)

    def config(self, **changes: Any) -> TSAConfig:
        """A config with these layers sparse; `changes` are its other options."""
        if not self.sparse_layers:
            text = f"delta={self.delta} selects none of {len(self.layers)} layers: use at least {1 / len(self.layers):.3g}"
            warnings.warn(text, TSAWarning, stacklevel=2)
        return TSAConfig(layers=self.sparse_layers).replace(**changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the inverse of `from_dict`."""
        layers = [
            {"name": name, "drift": drift, "rank": rank}
            for name, drift, rank in zip(self.layers, self.drift, self.ranks, strict=True)
        ]
        return {
            "format": self.FORMAT, "delta": self.delta, "sparse_layers": list(self.sparse_layers), "layers": layers,
            "tokens": self.tokens, "prompts": self.prompts, "fingerprint": self.fingerprint.to_dict(),
        }  # fmt: skip

    @classmethod
    def _read(cls, values: Mapping[str, Any]) -> Calibration:
        """Ranks and sparse layers are computed again from drift and delta, and must be those that were saved."""
        found = cls(
            layers=tuple(str(layer["name"]) for layer in values["layers"]),
            drift=tuple(float(layer["drift"]) for layer in values["layers"]),
            delta=values["delta"], tokens=int(values["tokens"]), prompts=int(values["prompts"]),
            fingerprint=Fingerprint.from_dict(values["fingerprint"]),
        )  # fmt: skip
        if values["sparse_layers"] != [*found.sparse_layers]:
            raise ValueError(
                f"sparse_layers is {values['sparse_layers']!r}, and by drift and delta {[*found.sparse_layers]}: to choose "
                "layers by hand, pass TSAConfig(layers=[...])"
            )
        return found

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the drift of each layer, the sparse ones in another colour; the path's suffix is the image's format.

        Raises:
            ConfigError: no file can be written there, or the suffix names no format.
            WriteError: it could not be written whole; a file that was there is unchanged.
            ImportError: matplotlib is missing.
        """
        figure = new_figure(figsize=(max(6.0, len(self.layers) / 4), 3.5), layout="constrained")
        axes = figure.subplots()
        sparse = set(self.sparse_layers)
        for label, colour, shown in (("dense", "0.7", False), (f"sparse (delta {self.delta:g})", "tab:orange", True)):
            indices = [index for index in range(len(self.drift)) if (index in sparse) == shown]
            axes.bar(indices, [self.drift[index] for index in indices], color=colour, label=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="layer", ylabel="drift", title=f"Drift over {self.tokens:,} tokens of {self.prompts:,} prompts")
        axes.legend()
        save_figure(figure, path)


_LOSS_OPTIONS = "max_kl, ratios, config and answer"


@overload
def calibrate(
    model: nn.Module, prompts: Iterable[Any], delta: float | None = ..., *, tokenizer: Any = ..., progress: bool = ...,
    batch_size: int = ..., objective: Literal["drift"] = ...,
) -> Calibration: ...  # fmt: skip
@overload
def calibrate(
    model: nn.Module, prompts: Iterable[Any], delta: None = ..., *, tokenizer: Any = ..., progress: bool = ...,
    batch_size: int = ..., objective: Literal["loss"], max_kl: float, **search: Any,
) -> LossCalibration: ...  # fmt: skip
def calibrate(
    model: nn.Module,
    prompts: Iterable[Any],
    delta: float | None = None,
    *,
    tokenizer: Any = None,
    progress: bool = True,
    batch_size: int = 1,
    objective: str = "drift",
    **search: Any,
) -> Calibration | LossCalibration:
    """Measures on prompts which decoder layers may be sparse. Use long prompts of the kind that the model will see.

    objective "drift": the layers that change hidden states least. The model runs once, dense, without cache and head.
    objective "loss": the layers, and how much each keeps, that change the probabilities of answers by at most `max_kl`. The
    model runs once for each layer and keep ratio, and a few times more. Its further options are ratios, config and answer
    (tsa_compile.calibration.loss_search.calibrate_loss).

    Either way it runs in evaluation mode without gradients, and activations of no more than a batch are in memory.

    Args:
        model: a causal language model of transformers, or a module that takes token ids [B, L] and has a list of layers.
        prompts: token ids (lists or tensors [L] or [B, L]), mappings with input_ids and perhaps attention_mask, whose pad
            tokens do not count, or text.
        delta: the share of the layers to be sparse, in (0, 1]; of "drift" alone. None: 0.5.
        tokenizer: needed for text alone.
        progress: whether to show a progress bar, on stderr.
        batch_size: how many prompts run at once. "drift" pads them on the right; "loss" puts only prompts of one length
            together.

    Raises:
        ConfigError: the model has no decoder layers, or a prompt or an option is not allowed.
    """
    check_int("batch_size", batch_size, 1)
    if objective == "loss":
        wrong = [name for name in search if name not in ("max_kl", "ratios", "config", "answer")]
        wrong += [] if delta is None else [f"delta={delta!r}"]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: objective='loss' has no such option; its options are {_LOSS_OPTIONS}")
        return calibrate_loss(model, prompts, tokenizer=tokenizer, progress=progress, batch_size=batch_size, **search)
    if objective != "drift":
        raise ConfigError(f"objective={objective!r} is not allowed: it must be 'drift' or 'loss'")
    if search:
        raise ConfigError(f"{', '.join(search)}: objective='drift' has no such option; {_LOSS_OPTIONS} are for 'loss'")
    return _by_drift(model, prompts, _share(0.5 if delta is None else delta), tokenizer, progress, batch_size)


def _by_drift(
    model: nn.Module, prompts: Iterable[Any], delta: float, tokenizer: Any, progress: bool, batch_size: int
) -> Calibration:
    model = unwrapped(model)
    device = device_of(model)
    prompts = items(prompts)
    rows = ((place, checked(model, place, ids)) for place, ids in read_prompts(prompts, tokenizer))
    meter, count, taken, total = None, 0, 0, operator.length_hint(prompts, 0) or None
    with evaluating(model), bar(progress) as show, contextlib.ExitStack() as hooks:
        for place, ids, mask in batches(rows, batch_size):
            ids, mask = ids.to(device), None if mask is None else mask.to(device)
            with running(len(ids), ids.shape[1], place, device):
                if meter is None:
                    meter = DriftMeter(find_layers(model, ids[:1, :PROBE]))
                    hooks.enter_context(meter.watching())
                meter.passed = functools.partial(_step, show, taken, place + 1 - taken, total)
                meter.run(ids, mask)
            count, taken = count + len(ids), place + 1
    assert meter is not None  # read_prompts refuses to give none
    names, layers = meter.stack.names, meter.stack.layers
    return Calibration(names, meter.drift, delta, meter.tokens, count, Fingerprint.of(model, layers))


def load_calibration(path: str | os.PathLike[str]) -> Calibration | LossCalibration:
    """Reads the file that `save` of a `Calibration` or of a `LossCalibration` wrote.

    Raises:
        ConfigError: the file cannot be read, or holds something else; the message names it.
    """
    values = read_json(path, "pass a file that Calibration.save wrote")
    by_loss = isinstance(values, Mapping) and values.get("format") == LossCalibration.FORMAT
    return LossCalibration.load(path) if by_loss else Calibration.load(path)


def _step(show: Progress, taken: int, prompts: int, total: int | None, share: float) -> None:
    """A batch of so many prompts, of which a share of the layers is done."""
    show("prompts", taken + prompts * share, total)


def _share(delta: object) -> float:
    allowed = "a number in (0, 1], the share of layers to be sparse"
    return checked_number("delta", delta, allowed, lambda share: 0 < share <= 1)


@dataclass(frozen=True)
class Preset:
    """A published list of sparse layers."""

    layers: tuple[int, ...]
    tau: float
    citation: str


_CITATION = "Token Sparse Attention (ICML 2026), https://arxiv.org/abs/2602.03216, layers by representation drift, delta 0.5"
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "llama-3.1-8b-instruct": Preset(tuple(range(15, 31)), 0.005, _CITATION),
        "mistral-nemo-instruct-2407": Preset((14, 15, *range(20, 38)), 0.008, _CITATION),
    }
)


def preset(name: str, **changes: Any) -> TSAConfig:
    """The published config of a model: its sparse layers and its coverage; `changes` are other options.

    Args:
        name: of `PRESETS`, in any case, with or without the organisation ("meta-llama/Llama-3.1-8B-Instruct").

    Raises:
        ConfigError: no list was published for that model.
    """
    found = PRESETS.get(str(name).rpartition("/")[2].lower())
    if found is None:
        raise ConfigError(
            f"{name!r} has no published layers: presets are {', '.join(PRESETS)}; for others, calibrate(model, prompts)"
        )
    return TSAConfig.published(**{"budget": Coverage(found.tau), "layers": found.layers, **changes})
