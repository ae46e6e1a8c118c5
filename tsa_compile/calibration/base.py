"""What calibrations share: a model and prompts that can be measured, and files that know which model they belong to."""

from __future__ import annotations

import contextlib
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tsa_compile.calibration.fingerprint import Fingerprint, text_config, unwrapped
from tsa_compile.config import TSAConfig
from tsa_compile.errors import ConfigError, TSAWarning, check_type
from tsa_compile.saved import Saved


class Calibrated(Saved):
    """Base of what was measured about the decoder layers of one model."""

    layers: tuple[str, ...]
    """Module names, first layer first."""
    fingerprint: Fingerprint

    @property
    @abstractmethod
    def sparse_layers(self) -> Any:
        """The layers that are sparse, as `TSAConfig(layers=...)` takes them."""

    @abstractmethod
    def config(self, **changes: Any) -> TSAConfig:
        """A config with these layers sparse; `changes` are its other options."""

    def check_config(self, config: Any, name: str) -> None:
        """Raises ConfigError unless a transformers configuration, of the model called `name`, may be the calibrated one's.

        What it says without weights is compared: the number of layers, the architecture and the sizes. `check` goes on.
        """
        mine, theirs = len(self.layers), int(config.get_text_config().num_hidden_layers)
        if mine != theirs:
            raise ConfigError(f"the calibration is of a model with {mine} layers, {name} has {theirs}: calibrate this one")
        different = self.fingerprint.differences_of(config)
        if different:
            raise ConfigError(f"the calibration is not of {name} ({'; '.join(different)}): calibrate this model")

    def check(self, model: nn.Module) -> bool:
        """Whether `model` may be the one that was calibrated; a TSAWarning that says in what it differs if not.

        Its architecture, its sizes and samples of its weights are compared, whatever its dtype and device. Weights that were
        changed by less than the rounding of bfloat16, or that are quantised or on the meta device, are not told apart.
        """
        check_type("model", model, nn.Module, "a torch.nn.Module")
        layers = _layer_list(model, self.layers)
        if layers is None:
            different = [f"no layers {_stem(self.layers[0])}.0..{len(self.layers) - 1}"]
        else:
            different = self.fingerprint.differences(Fingerprint.of(model, layers))
        if different:
            name = type(unwrapped(model)).__name__
            text = f"this calibration belongs to another model than this {name} ({'; '.join(different)})"
            warnings.warn(f"{text}: calibrate anew, or choose `layers` yourself", TSAWarning, stacklevel=2)
        return not different


def device_of(model: nn.Module) -> torch.device:
    """Where token ids belong.

    Raises:
        ConfigError: it is no model, no decoder, or has no weights.
    """
    check_type("model", model, nn.Module, "a causal language model, a torch.nn.Module")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(f"{type(model).__name__} is an encoder-decoder: only decoder-only models are calibrated")
    devices = [parameter.device for parameter in model.parameters()]
    real = [device for device in devices if device.type != "meta"]
    if devices and not real:
        raise ConfigError(f"{type(model).__name__} has no weights, all are on the meta device: load it first")
    return real[0] if real else torch.device("cpu")


def checked(model: nn.Module, place: int, ids: Tensor) -> Tensor:
    """A prompt's token ids [L]; ConfigError unless the model knows all of them and takes so many."""
    config = text_config(model)
    vocabulary, longest = (getattr(config, name, None) for name in ("vocab_size", "max_position_embeddings"))
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
        wrong, size = (low if low < 0 else high), vocabulary if isinstance(vocabulary, int) else "n"
        raise ConfigError(f"prompt {place} has the token id {wrong}: token ids lie in [0, {size})")
    if isinstance(longest, int) and len(ids) > longest > 0:
        raise ConfigError(
            f"prompt {place} has {len(ids)} tokens, the model takes {longest} (config.max_position_embeddings): shorten it"
        )
    return ids


@contextlib.contextmanager
def running(batch: int, length: int, place: int, device: torch.device) -> Iterator[None]:
    """Says which prompts a model does not take, and why."""
    what = f"a batch of {batch} x {length} tokens, up to prompt {place},"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"{what} does not fit {device}: shorten prompts or lower batch_size") from error
    except IndexError as error:
        raise ConfigError(f"{what} does not fit the model ({error}): check token ids and lengths of the prompts") from error


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Inference tensors have no version, by which a layer that overwrites its input is found.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _layer_list(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module] | None:
    """The list of layers that carries the calibrated name, whatever its length; None if there is none."""
    stem = _stem(names[0])
    found: Any = dict(unwrapped(model).named_modules()).get(stem)
    return list(found) if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found) else None
