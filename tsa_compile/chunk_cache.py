"""A DynamicCache as one graph reads it, whether it is empty or holds a prompt's earlier chunks.

    before   layer.keys, layer.values    None, or [B, G, past, D] and [B, G, past, Dv]
    inside   layer.rows                  [n] and [m, 2]: the same numbers; a few, which nothing reads, where past is 0
             layer.marker                [past + 2, 0]: no numbers, and the one that says how long the cache is
    behind   layer.keys, layer.values    [B, G, past + Lq, D] and [B, G, past + Lq, Dv], as without it

Dynamo compiles anew for a size that is 0 or 1. So the length is carried as a size that is at least 2, minus 2, and what
is cached as tensors whose own length says nothing. An empty cache then is no other case, and the op `tsa::extend_cache`
puts the two together (kernels/extend.py). Nothing is copied that torch.cat would not copy, and no memory is kept in reserve.

A model, or a hook of one of its modules, may ask a layer for its keys, or whether it has any, as prefix language models do,
which read a first chunk in both directions. The layer then becomes the DynamicLayer that it stands for, and whether that is
empty is a case of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tsa_compile.config import TSAConfig
from tsa_compile.kernels import extend
from tsa_compile.kernels.registry import AUTO, get

_MORE = 2
"""What is added to the length: the least size that Dynamo takes for one of many."""

_Shape = tuple[int, int, int]


@functools.cache
def _layer_class() -> type:
    """The layer that a graph reads: a function, as transformers is optional."""
    from transformers.cache_utils import DynamicLayer

    class ChunkLayer(DynamicLayer):
        """A DynamicLayer of which `rows` stand for keys and values until it is updated, asked for something or changed."""

        rows: tuple[Tensor, Tensor] | None = None

        def __init__(self, rows: tuple[Tensor, Tensor], shapes: tuple[_Shape, ...], marker: Tensor) -> None:
            """Without what a layer holds: `__getattr__` answers for it."""
            self.shapes, self.marker = shapes, marker
            self.rows = rows

        def __getattr__(self, name: str) -> Any:
            """What `rows` stand for, and all else that a DynamicLayer may have."""
            if name.startswith("__") or self.rows is None:
                raise AttributeError(name)
            self._unpack()
            return getattr(self, name)

        def __setattr__(self, name: str, value: Any) -> None:
            if self.rows is not None and name != "rows":
                self._unpack()
            super().__setattr__(name, value)

        def get_seq_length(self) -> int:
            if self.rows is not None:
                return self.marker.shape[0] - _MORE
            return self.keys.shape[2] if self.is_initialized else 0

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if self.rows is not None and _alike(self.rows[0], key_states) and _alike(self.rows[1], value_states):
                self._hold(*extend.extend_cache(*self.rows, self.get_seq_length(), key_states, value_states))
                return self.keys, self.values
            if self.rows is not None:  # an empty cache was taken for one of another dtype or device: it gets its own graph
                self._unpack()
            return super().update(key_states, value_states, *args, **kwargs)

        def _unpack(self) -> None:
            past, rows, shapes = self.get_seq_length(), self.rows or (), self.shapes
            self.rows = None
            super().__init__()
            if past:
                held = (each.view(batch, heads, past, size) for each, (batch, heads, size) in zip(rows, shapes, strict=True))
                self._hold(*held)

        def _hold(self, keys: Tensor, values: Tensor) -> None:
            self.rows, self.is_initialized = None, True
            self.keys, self.values = keys, values
            self.dtype, self.device = keys.dtype, keys.device

    return ChunkLayer


def _alike(cached: Tensor, new: Tensor) -> bool:
    return cached.dtype == new.dtype and cached.device == new.device


def serves(config: TSAConfig) -> bool:
    """Whether one form serves all chunks: not where a kernel is asked for by name that takes whole prompts alone."""
    named = config.kernel != AUTO and get(config.kernel).run_behind is None
    return config.dense_kernel is None and not named


def find(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, if there is one and `carried` takes it; else None."""
    found = [value for value in (*args, *kwargs.values()) if type(value).__name__ == "DynamicCache"]
    return found[0] if len(found) == 1 and _is_plain(found[0]) else None


def _is_plain(cache: Any) -> bool:
    """Whether a cache is a DynamicCache of DynamicLayers, which all hold as many tokens, on their devices."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return False
    grown_by = getattr(cache, "layer_class_to_replicate", None)
    if grown_by not in (None, DynamicLayer) or not (cache.layers or grown_by):
        return False
    plain = all(type(layer) is DynamicLayer and _is_dense(layer) for layer in cache.layers)
    return plain and len({layer.get_seq_length() for layer in cache.layers}) <= 1


def _is_dense(layer: Any) -> bool:
    """Whether a layer never held anything, or holds keys and values that can be read as rows of numbers."""
    if layer.get_seq_length() == 0:
        return not layer.is_initialized
    held = (layer.keys, layer.values)
    return all(type(each) is Tensor and each.dim() == 4 and not each.requires_grad for each in held) and (
        layer.values.numel() % 2 == 0 and layer.keys.numel() > 1
    )


@contextmanager
def carried(cache: Any, model: Module, device: torch.device) -> Iterator[None]:
    """Inside, the layers of a cache that `find` found are what one graph reads. Behind it they are DynamicLayers again.

    Where the block raises, the cache holds what it held before.

    Args:
        model: the module that fills it: how many layers there will be, and of which dtype, is asked of it.
        device: of the tokens. If an empty cache is filled with another dtype or on another device, the first chunk gets a
            graph of its own.
    """
    own, past = cache.layers, cache.get_seq_length()
    marker = torch.empty(past + _MORE, 0, device=device)
    torch._dynamo.maybe_mark_dynamic(marker, [0])
    held: list[tuple[tuple[Tensor, Tensor], tuple[_Shape, ...]]]
    if past:
        held = [(_packed(layer), (_shape(layer.keys), _shape(layer.values))) for layer in own]
    else:
        held = [(_nothing(_dtype(model), device), ()) for _ in range(len(own) or _count_layers(model))]
    cache.layers = [_layer_class()(*each, marker) for each in held]
    try:
        yield
        filled = cache.layers
    finally:
        cache.layers = own
    _hand_over(filled, own)


def _packed(layer: Any) -> tuple[Tensor, Tensor]:
    """What a layer holds, as rows of numbers: no copies, if it is dense, as what a graph leaves is.

    Tensors of their own (`data`) of the same memory: of a view, Dynamo reads the sizes of what it is a view of as well.
    """
    layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
    return _marked(layer.keys.view(-1).data, layer.values.view(-1, 2).data)


def _shape(held: Tensor) -> _Shape:
    """Of keys or values [B, G, L, D], what is no length: B, G and D."""
    return held.shape[0], held.shape[1], held.shape[3]


def _nothing(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What stands for the keys and values of an empty layer: Dynamo must not find one tensor in two of them."""
    return _marked(torch.empty(2, dtype=dtype, device=device), torch.empty(3, 2, dtype=dtype, device=device))


def _marked(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The lengths are not marked: Dynamo finds that they are the same in all layers, so that layers have one form."""
    torch._dynamo.mark_static(values, 1)
    return keys, values


def _dtype(model: Module) -> torch.dtype:
    """Of the model's keys and values, as far as its weights say it."""
    known = (weight.dtype for weight in model.parameters() if weight.dtype.is_floating_point and weight.itemsize > 1)
    return next(known, torch.get_default_dtype())


def _count_layers(model: Module) -> int:
    """How many layers a cache gets that grows as they are filled; 0 if nothing says it."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    return int(getattr(config, "num_hidden_layers", 0))


def _hand_over(filled: list[Any], own: list[Any]) -> None:
    """Gives a cache's own layers what a call filled theirs with; adds those that the call has added."""
    from transformers.cache_utils import DynamicLayer

    # Not those of which nobody has asked for what they hold, and which nobody has changed: they still have their rows.
    used = [at for at, layer in enumerate(filled) if getattr(layer, "rows", None) is None and layer.is_initialized]
    for at, layer in enumerate(filled[: max(used, default=-1) + 1]):
        if at == len(own):
            own.append(DynamicLayer())
        if at in used:
            if not own[at].is_initialized:
                # As the first update does: of the keys alone in the first versions of transformers 5.
                taken = len(signature(own[at].lazy_initialization).parameters)
                own[at].lazy_initialization(*(layer.keys, layer.values)[:taken])
            own[at].keys, own[at].values = layer.keys, layer.values
