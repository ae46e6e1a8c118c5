"""What tells one model from another: its architecture, its sizes, and samples of its weights.

Samples rather than a digest: bfloat16, float16 and float32 of one checkpoint differ by rounding, and quantised layers keep
none of their numbers, but some of the model's. So samples are compared within the rounding, where both models have them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "num_local_experts", "num_experts",
)  # fmt: skip
_TENSORS = 2  # the largest of a layer, of which
_SAMPLES = 8  # numbers are taken
RELATIVE, ABSOLUTE = 2**-8, 1e-6  # twice the rounding to bfloat16; float16's below its smallest normal number


@dataclass(frozen=True)
class Fingerprint:
    """A model as its calibration remembers it; plain JSON types."""

    architecture: str
    layer: str
    """The class of its decoder layers."""
    layers: int
    sizes: dict[str, int] = field(hash=False)
    weights: dict[str, list[float]] = field(hash=False)
    """A few numbers of the largest tensors of the first, the middle and the last layer, where they are at hand."""

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[nn.Module]) -> Fingerprint:
        """The fingerprint of a model with these decoder layers."""
        model = unwrapped(model)
        count = len(layers)
        weights = {
            f"{index}.{name}": values
            for index in sorted({0, count // 2, count - 1})
            for name, values in _samples(layers[index])
        }
        return cls(type(model).__name__, type(unwrapped(layers[0])).__name__, count, _sizes_of(text_config(model)), weights)

    def differences(self, other: Fingerprint) -> list[str]:
        """In what another model differs, in words; empty if it may be the same."""
        found = [
            f"{what} {mine}, not {theirs}"
            for what, mine, theirs in (
                ("architecture", other.architecture, self.architecture),
                ("layer class", other.layer, self.layer),
                ("layers", other.layers, self.layers),
                *((name, other.sizes.get(name), size) for name, size in self.sizes.items()),
            )
            if mine != theirs
        ]
        if not found and not self._same_weights(other):
            found.append("other weights")
        return found

    def differences_of(self, config: Any) -> list[str]:
        """In what a transformers configuration differs, as far as it says without a model: the kind and the sizes."""
        sizes = _sizes_of(config.get_text_config() if hasattr(config, "get_text_config") else config)
        found = [f"{name} {sizes[name]}, not {size}" for name, size in self.sizes.items() if sizes.get(name, size) != size]
        named = list(getattr(config, "architectures", None) or [_architecture(config)])
        if None not in named and self.architecture not in named:
            found.insert(0, f"architecture {named[0]}, not {self.architecture}")
        return found

    def _same_weights(self, other: Fingerprint) -> bool:
        common = [(values, other.weights[name]) for name, values in self.weights.items() if name in other.weights]
        return all(
            len(mine) == len(theirs)
            and all(math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE) for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in common
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """The inverse of `to_dict`; TypeError or ValueError where something is missing or of another type."""
        weights = {str(name): [float(number) for number in numbers] for name, numbers in dict(values["weights"]).items()}
        sizes = {str(name): int(size) for name, size in dict(values["sizes"]).items()}
        return cls(str(values["architecture"]), str(values["layer"]), int(values["layers"]), sizes, weights)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself where torch.compile wrapped it."""
    return getattr(module, "_orig_mod", module)


def text_config(model: nn.Module) -> Any:
    """A transformers model's configuration, of one with several parts that of the text; None where there is none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _architecture(config: Any) -> str | None:
    """The class that transformers makes of a configuration for causal language models; None where that is not known."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(getattr(config, "model_type", ""))
    return name if isinstance(name, str) else None


def _sizes_of(config: Any) -> dict[str, int]:
    named = {name: getattr(config, name, None) for name in _SIZES}
    return {name: size for name, size in named.items() if isinstance(size, int) and not isinstance(size, bool)}


def _samples(layer: nn.Module) -> Iterator[tuple[str, list[float]]]:
    """Numbers from evenly spaced places of a layer's largest tensors, as far as they are plain floating-point ones."""
    tensors = [
        (name, tensor.detach())
        for name, tensor in layer.named_parameters()
        if tensor.is_floating_point() and tensor.device.type != "meta" and type(tensor.data) is Tensor and tensor.numel()
    ]
    tensors.sort(key=lambda named: (-named[1].numel(), named[0]))
    for name, tensor in tensors[:_TENSORS]:
        places = [(2 * sample + 1) * tensor.numel() // (2 * _SAMPLES) for sample in range(_SAMPLES)]
        where = torch.unravel_index(torch.tensor(places, device=tensor.device), tensor.shape)
        yield name.replace("_orig_mod.", ""), [float(f"{number:.5g}") for number in tensor[where].float().tolist()]
