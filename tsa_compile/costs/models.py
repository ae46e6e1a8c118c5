"""What a transformers configuration is made of: each layer's attention, and the weights that its tokens are multiplied with.

The model is built on the meta device, which takes neither memory nor a GPU, and its parameters are counted. So sizes are
exact for every architecture that transformers knows, whatever it names them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tsa_compile.errors import ConfigError

FULL = "full_attention"
WINDOWED = ("sliding_attention", "chunked_attention")
_LOCAL = {"global": FULL, "local": "sliding_attention"}  # GPT-Neo's names
_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_k")
_REFUSED = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError)  # the causes are many
_EXPERT = re.compile(r"(^|\.)experts\.(\d+\.)?")


@dataclass(frozen=True)
class LayerSizes:
    """One decoder layer. Counts are per token of one prompt."""

    name: str
    modules: tuple[str, ...]
    """The names of the layer and of what is in it, as patterns of `TSAConfig.layers` meet them."""
    kind: str
    """As `layer_types` names it: "full_attention", "sliding_attention", ...; others have no attention."""
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    active: int
    """Weights that a token is multiplied with: projections and MLP, of a mixture those of the experts that are chosen."""
    weights: int
    """All of them."""
    outputs: int
    """Elements that those products give for a token."""
    window: int | None = None
    """How many tokens a row of a layer with a sliding window sees."""

    @property
    def attends(self) -> bool:
        """Whether the layer has attention as it is understood here."""
        return self.kind == FULL or self.kind in WINDOWED


@dataclass(frozen=True)
class ModelSizes:
    """A decoder: its layers and its head."""

    name: str
    layers: tuple[LayerSizes, ...]
    head: int
    """Weights of the head."""
    dtype: torch.dtype


def anatomy(model_config: Any, dtype: torch.dtype | str | None = None) -> ModelSizes:
    """The sizes of the causal language model that a transformers configuration describes.

    Args:
        dtype: of the weights and of attention; the configuration's if None, and bfloat16 where it names none.

    Raises:
        ConfigError: it is no configuration of a causal language model, or its layers are not found.
    """
    if not (hasattr(model_config, "get_text_config") and hasattr(model_config, "model_type")):
        raise ConfigError(
            f"model_config is {type(model_config).__name__}: pass a transformers configuration, as in model.config"
        )
    config = copy.deepcopy(model_config.get_text_config())
    with torch.device("meta"):
        model = causal_model(config, refused=_REFUSED, attn_implementation="eager")
    layers = _layer_list(model, config)
    names = {layer: name for name, layer in model.named_modules()}
    kinds = _kinds(config, len(layers))
    hidden, heads, kv_heads, head_dim, value_head_dim = attention_sizes(config)
    experts = next((value for name in _ACTIVE_EXPERTS if isinstance(value := getattr(config, name, None), int)), None)
    found = []
    for layer, kind in zip(layers, kinds, strict=True):
        inside = tuple(f"{names[layer]}.{name}" if name else names[layer] for name, _ in layer.named_modules())
        counts = _count(layer, hidden, experts)
        window = getattr(config, "sliding_window", None) if kind == WINDOWED[0] else None
        found.append(LayerSizes(names[layer], inside, kind, heads, kv_heads, head_dim, value_head_dim, *counts, window))
    head = model.get_output_embeddings()
    return ModelSizes(type(model).__name__, tuple(found), 0 if head is None else head.weight.numel(), _dtype(dtype, config))


def causal_model(
    config: Any, trust_remote_code: bool = False, refused: tuple[type[Exception], ...] = (ValueError,), **options: Any
) -> Any:
    """A causal language model with random weights, on the device of the context.

    Args:
        refused: what transformers raises where the configuration is of something else; it becomes a ConfigError.
        options: of transformers' `from_config`.
    """
    if trust_remote_code:
        options["trust_remote_code"] = True
    transformers = require_transformers()
    try:
        return transformers.AutoModelForCausalLM.from_config(config, **options)
    except refused as error:
        why = str(error).partition("\n")[0][:200]  # a list of all models follows
        raise ConfigError(f"no causal language model can be made of this {type(config).__name__}: {why}") from error


def require_transformers() -> Any:
    """The package; ImportError with the command that installs it where it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("models need the package 'transformers': pip install 'tsa-compile[transformers]'") from error
    return transformers


def _layer_list(model: nn.Module, config: Any) -> list[nn.Module]:
    """The outermost list with as many modules as the configuration has layers."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    count = getattr(config, "num_hidden_layers", None)
    found = next((layers for layers in lists if len(layers) == count and layers), None)
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} has no list of {count} layers (num_hidden_layers): its costs are not known"
        )
    return found


def _kinds(config: Any, count: int) -> Sequence[str]:
    named = getattr(config, "layer_types", None)
    if not named and getattr(config, "attention_layers", None):
        named = [_LOCAL.get(name, name) for name in config.attention_layers]
    if named and len(named) == count:
        return [str(name) for name in named]
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return [WINDOWED[0] if windowed else FULL] * count


def attention_sizes(config: Any) -> tuple[int, int, int, int, int]:
    """Hidden size, heads, heads of key and value, head size, head size of value."""
    hidden, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads):
        raise ConfigError(
            f"{type(config).__name__} has hidden_size={hidden!r} and num_attention_heads={heads!r}: integers are needed"
        )
    rope, rest = (getattr(config, name, None) for name in ("qk_rope_head_dim", "qk_nope_head_dim"))
    if isinstance(rope, int) and isinstance(rest, int):  # latent attention: every head has its own key
        return hidden, heads, heads, rope + rest, getattr(config, "v_head_dim", None) or rope + rest
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return hidden, heads, kv_heads, head_dim, head_dim


def _count(layer: nn.Module, hidden: int, chosen: int | None) -> tuple[int, int, int]:
    """Weights that a token is multiplied with, all weights, and elements of the products for a token."""
    active = weights = outputs = 0.0
    for name, weight in layer.named_parameters():
        weights += weight.numel()
        if weight.dim() < 2 or name.endswith("bias"):
            continue
        share, out = 1.0, _out(layer, name, weight, hidden)
        if _EXPERT.search(name):
            count = weight.shape[0] if weight.dim() == 3 else _siblings(layer, name)
            share = min(chosen, count) / count if chosen is not None else 1.0
            out *= count if weight.dim() == 3 else 1
        active += share * weight.numel()
        outputs += share * out
    return round(active), round(weights), round(outputs)


def _out(layer: nn.Module, name: str, weight: torch.Tensor, hidden: int) -> int:
    """How many elements the product with a weight gives: [out, in], GPT-2's [in, out], or experts, either way around."""
    if weight.dim() == 3 and _EXPERT.search(name):
        return hidden if "down" in name else weight[0].numel() // hidden
    owner = layer.get_submodule(name.rpartition(".")[0])
    out = getattr(owner, "out_features", None) or getattr(owner, "nf", None)
    return out if isinstance(out, int) else weight.shape[0]


def _siblings(layer: nn.Module, name: str) -> int:
    """How many experts lie in the list that a weight's expert lies in."""
    found = _EXPERT.search(name)
    assert found is not None
    stem = name[: found.end()].rstrip(".").rpartition(".")[0] if found[2] else name[: found.end() - 1]
    experts = layer.get_submodule(stem)
    return len(experts) if isinstance(experts, nn.ModuleList) else 1


def _dtype(dtype: torch.dtype | str | None, config: Any) -> torch.dtype:
    found = getattr(config, "dtype", None) if dtype is None else dtype
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), found)
    if found is None:
        return torch.bfloat16
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ConfigError(f"dtype={dtype!r} is not allowed: dtype must be a floating-point torch.dtype or its name")
    return found
