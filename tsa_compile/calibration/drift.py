"""Representation drift of every decoder layer, measured by hooks while prompts stream through a model.

    R_l = mean over tokens of |h_{l+1} - h_l| / (|h_l| + eps)      (arXiv 2602.03216)

h_l and h_{l+1} are the hidden states [B, L, hidden] before and after decoder layer l. Norms are taken in float32 over a
few rows at a time and summed up in float64, so a layer costs some megabytes and one number, however long the prompts.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsa_compile.errors import ConfigError

EPS = 1e-6
CHUNK = 2**22  # elements of a hidden state that are in float32 at a time
PROBE = 8  # tokens by which the layers are found


@dataclass(frozen=True)
class LayerStack:
    """The decoder layers of a model in their order, and the module to call so that they run: the model without its head."""

    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    runner: nn.Module
    overwrites: bool
    """Whether a layer overwrites its input, which then must be copied."""


def find_layers(model: nn.Module, ids: Tensor) -> LayerStack:
    """The decoder layers: the longest list of modules of which each turns hidden states [1, L, hidden] into such.

    Found by calling the model with `ids` [1, L], so that no name and no class of a model needs to be known. Of lists of
    the same length the outer one.

    Raises:
        ConfigError: there is no such list.
    """
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    watched = {layer: _Probe(ids.shape) for layers in lists.values() for layer in layers}
    with contextlib.ExitStack() as hooks:
        for layer, probe in watched.items():
            hooks.enter_context(layer.register_forward_pre_hook(probe.before, with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(probe.after, with_kwargs=True))
        if lists:  # or nothing can be found, and what the model is given may not be what it takes
            call(_runner(model, None), ids, None)
    found = {name: layers for name, layers in lists.items() if all(watched[layer].is_layer for layer in layers)}
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no decoder layers: expected a ModuleList of which each module runs once and turns "
            f"hidden states [batch, length, size] into such; of its {len(lists)} lists of modules none is one. "
            "Pass the causal language model itself"
        )
    name = max(found, key=lambda name: len(found[name]))  # the first of several: named_modules yields outer ones first
    layers = found[name]
    names = tuple(f"{name}.{index}" if name else str(index) for index in range(len(layers)))
    return LayerStack(names, tuple(layers), _runner(model, layers[0]), any(watched[layer].overwrites for layer in layers))


class _Probe:
    """Whether a module behaves like a decoder layer in one call of the model."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.calls = 0
        self.fits = True
        self.overwrites = False
        self._before: tuple[Tensor | None, int] = (None, 0)

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = _input(args, kwargs)
        self._before = (hidden, 0 if hidden is None else hidden._version)

    def after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden, version = self._before
        made = _output(output)
        self.calls += 1
        self.fits &= (
            hidden is not None and made is not None and hidden.shape == made.shape and hidden.shape[:2] == self.shape
        )
        self.overwrites |= hidden is not None and hidden._version != version
        self._before = (None, 0)

    @property
    def is_layer(self) -> bool:
        return self.calls == 1 and self.fits


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next(filter(_is_hidden, (*args, kwargs.get("hidden_states"), *kwargs.values())), None)


def _output(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if _is_hidden(first) else None


def _is_hidden(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3


def _runner(model: nn.Module, layer: nn.Module | None) -> nn.Module:
    """The model without its head, by transformers' convention `base_model`; itself where it has none.

    Also itself where it has weights besides its base and its head: what they do may come before the layers.
    """
    inner = getattr(model, "base_model", model)
    while isinstance(inner, nn.Module) and inner is not model and (layer is None or layer in set(inner.modules())):
        find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = find_head()
        known = {*inner.parameters(), *(head.parameters() if isinstance(head, nn.Module) else ())}
        if any(parameter not in known for parameter in model.parameters()):
            break
        model, inner = inner, getattr(inner, "base_model", inner)
    return model


def call(runner: nn.Module, ids: Tensor, mask: Tensor | None) -> None:
    """Runs token ids [B, L] through a model, with a padding mask where one is needed, keeping neither cache nor logits."""
    known = inspect.signature(runner.forward).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    named: dict[str, Any] = {}
    if "use_cache" in known or (anything and "input_ids" in known):
        named["use_cache"] = False
    if "logits_to_keep" in known:
        named["logits_to_keep"] = 1
    if mask is not None:
        if "attention_mask" not in known and not anything:
            raise ConfigError(
                f"{type(runner).__name__} takes no attention_mask, so prompts of different lengths cannot share a batch: "
                "set batch_size=1"
            )
        named["attention_mask"] = mask
    if "input_ids" in known:
        runner(input_ids=ids, **named)
    else:
        runner(ids, **named)


class DriftMeter:
    """Sums up each layer's drift over the tokens of the batches that run inside `watching`."""

    def __init__(self, stack: LayerStack, passed: Callable[[float], None] = lambda share: None) -> None:
        self.stack = stack
        self.passed = passed
        """Called after each layer with the share of the layers that the batch has passed."""
        self._sums: list[Tensor | None] = [None] * len(stack.layers)
        self.tokens = 0
        """That were counted so far."""
        self._valid: Tensor | None = None
        self._copy: Tensor | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every layer, for as long as the context lasts, however it ends."""
        with contextlib.ExitStack() as hooks:
            for index, layer in enumerate(self.stack.layers):
                if self.stack.overwrites:
                    hooks.enter_context(layer.register_forward_pre_hook(self._keep, with_kwargs=True))
                hooks.enter_context(layer.register_forward_hook(self._hook(index), with_kwargs=True))
            yield

    def run(self, ids: Tensor, mask: Tensor | None) -> None:
        """One batch of token ids [B, L]; tokens that a padding mask [B, L] hides do not count."""
        self._valid = None if mask is None else mask.bool()
        try:
            call(self.stack.runner, ids, mask)
        finally:
            self._valid = self._copy = None
        self.tokens += ids.numel() if mask is None else int(mask.sum())

    @property
    def drift(self) -> tuple[float, ...]:
        """R_l of every layer; NaN where a layer has never run."""
        return tuple(float("nan") if found is None else float(found) / max(self.tokens, 1) for found in self._sums)

    def _keep(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = _input(args, kwargs)
        self._copy = None if hidden is None else hidden.clone()

    def _hook(self, index: int) -> Callable[..., None]:
        def after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden = self._copy if self._copy is not None else _input(args, kwargs)
            made = _output(output)
            assert hidden is not None and made is not None  # as found by `find_layers`
            found, total = drift_sum(hidden, made, self._valid), self._sums[index]
            self._sums[index] = found if total is None else total + found
            self.passed((index + 1) / len(self._sums))

        return after


def drift_sum(before: Tensor, after: Tensor, valid: Tensor | None = None) -> Tensor:
    """Sum over tokens of |after - before| / (|before| + eps), of hidden states [B, L, hidden]; float64, on their device.

    Args:
        valid: bool [B, L], which tokens count; all if None. What lies in the others may be anything.
    """
    total = torch.zeros((), dtype=torch.float64, device=before.device)
    rows = max(1, CHUNK // before.shape[-1])
    for item in range(len(before)):
        for start in range(0, before.shape[1], rows):
            part = slice(start, start + rows)
            old, new = before[item, part].float(), after[item, part].to(before.device).float()
            ratio = (new - old).norm(dim=-1) / (old.norm(dim=-1) + EPS)
            if valid is not None:
                ratio = torch.where(valid[item, part].to(before.device), ratio, 0)
            total += ratio.sum(dtype=torch.float64)
    return total
