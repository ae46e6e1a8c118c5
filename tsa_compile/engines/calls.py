"""A call of a transformers attention function: what was asked for, why it must stay as it is, and how it runs then.

By the conventions for SDPA and FlashAttention: without a mask `is_causal` tells. A mask bool [B, tokens so far] of several
queries is the padding of a causal mask, as `Implementation.mask` makes it where a model asked for one, whatever the module
says of itself: PaliGemma's modules call themselves not causal. One of int32 is that of a sliding window: minus its width at
valid tokens, which no padding mask has, so that a copy says it too. Any other mask is bool or additive, [B, 1 or H, Lq, Lk].
Tokens so far may be fewer than a static cache has room for, and more than there are queries, which are the last of them.
"""

from __future__ import annotations

import inspect
import re
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tsa_compile.errors import ConfigError
from tsa_compile.kernels.sdpa import fastest_first
from tsa_compile.passes import plan
from tsa_compile.passes.fakes import autocast_type
from tsa_compile.passes.find import types_problem
from tsa_compile.passes.masks.info import MaskKind
from tsa_compile.reasons import Reason

MASK_KIND, VALID_RANGES, WINDOW = "tsa_kind", "tsa_valid_ranges", "tsa_window"
"""Attributes of a mask: what it means, on the host where its valid tokens lie, and its window. A copy of it has none."""
SINK = "s_aux"
_ARGUMENTS = {
    "softcap": "a soft cap on the logits",
    SINK: "a sink in each softmax",
    "position_bias": "a bias added to the logits",
    "head_mask": "a mask over heads",
    "indices": "keys that were chosen by index",
    "block_indices": "blocks of keys that were chosen by index",
}
"""Keyword arguments that change what attention computes, and so what SDPA must be able to do as well."""
_CHOSEN = ("indices", "block_indices")
"""Those of which the model's mask says nothing, and its eager function neither."""
_COMMON = (
    "module",
    "query",
    "key",
    "value",
    "attention_mask",
    "scaling",
    "dropout",
    "is_causal",
    "sliding_window",
    "kwargs",
)
"""What every attention function takes. That there is a window says the mask."""

_COMPUTES = re.compile(r"softmax\(|scaled_dot_product_attention\(", re.IGNORECASE)
_ASKS = re.compile(r"ALL_ATTENTION_FUNCTIONS|attention_interface|eager_attention_forward")
_BY_NAME = re.compile(r"_attn_implementation\b.*[\"']sdpa[\"']")
_FLASH_BY_NAME = re.compile(r"is_flash_attention_requested|_attn_implementation\b.*[\"']flash")

_own: dict[str, tuple[str, ...]] = {}
_sources: dict[type[Module], str] = {}


@dataclass(frozen=True)
class Call:
    """A call of several queries. `padding`: valid tokens [B, Lk] of a causal mask; `mask`: any other, [B, 1 or H, Lq, Lk].

    Key and value are those of the tokens so far where the mask is causal. `window`: how many tokens a row sees then, the
    last of them itself; None: all.
    """

    module: Module
    query: Tensor
    key: Tensor
    value: Tensor
    padding: Tensor | None
    mask: Tensor | None
    kind: MaskKind
    scale: float
    dropout: float
    is_causal: bool
    others: dict[str, Any]
    window: int | None = None

    def obstacle(self) -> tuple[Reason, str] | None:
        """Why the call must stay exactly as the model wrote it, in the order of the compiler's questions."""
        changed = [name for name in _changed(self.module, self.others) if name != SINK or self.sink_logits is None]
        if changed:
            return Reason.UNSUPPORTED_FORM, ", ".join(_ARGUMENTS.get(name, f"the argument {name!r}") for name in changed)
        if self.others.get("output_attentions"):
            return Reason.UNSUPPORTED_FORM, "its weights are asked for"
        obstacle = types_problem(self.query, self.key, self.value, self._computed_in())
        needs_grad = any(tensor.requires_grad for tensor in (self.query, self.key, self.value))
        obstacle = obstacle or plan.inputs_obstacle(self.query, needs_grad, self.dropout, self.scale)
        if self.module.training:  # reentrant checkpoints run a layer without gradients, and again for them
            obstacle = obstacle or (Reason.NEEDS_GRAD, "the module is in training mode; model.eval() is for inference")
        if torch.is_grad_enabled() and self.sink_logits is not None and self.sink_logits.requires_grad:
            obstacle = obstacle or (Reason.NEEDS_GRAD, "")
        if obstacle is not None:
            return obstacle
        if self.query.shape[2] != self.key.shape[2] and not self.is_behind and self.window is None:
            cached = ": a prefill behind a cache" if self.is_chunk else ""
            return Reason.NOT_SELF_ATTENTION, f"{self.query.shape[2]} queries over {self.key.shape[2]} keys{cached}"
        reason = plan.MASK_REASONS.get(self.kind)
        if reason is not Reason.MASK_OPAQUE:
            return None if reason is None else (reason, "")
        if hasattr(self.mask, MASK_KIND):
            return reason, 'the model may change its masks, so it gets them whole; a compiler with backend="tsa" reads them'
        return reason, "it was not asked for as causal, a window or chunks"

    @property
    def sink_logits(self) -> Tensor | None:
        """A number for each head in its softmax's denominator, [H]; None if there is none, or something else."""
        sink = self.others.get(SINK)
        fits = isinstance(sink, Tensor) and sink.shape == self.query.shape[1:2] and sink.is_floating_point()
        return sink if fits else None

    def _computed_in(self) -> torch.dtype:
        """The type that SDPA computes in: autocast casts for it, but not for our ops."""
        return autocast_type(self.query.device) or self.query.dtype

    @property
    def is_chunk(self) -> bool:
        """Whether it belongs to a prompt that is run in parts."""
        return self.is_causal and self.query.shape[2] < self.key.shape[2]

    @property
    def is_behind(self) -> bool:
        """Whether it is one whose queries are known to be the last of the keys' positions."""
        return self.is_chunk and self.kind in (MaskKind.CAUSAL, MaskKind.CAUSAL_PADDING)

    def full_mask(self) -> Tensor | None:
        """The mask as SDPA takes it; None if nothing is hidden but, where it is causal, the future."""
        if self.padding is not None:
            return self._causal() & self.padding[:, None, None, :]
        return self._causal() if self.is_behind or self.window is not None else self.mask

    def additive_mask(self) -> Tensor | None:
        """The mask as the models' eager functions take it, which know of no causality."""
        mask = self._causal() if self.kind is MaskKind.CAUSAL else self.full_mask()
        if mask is None or mask.dtype != torch.bool:
            return mask
        zero = torch.zeros((), dtype=self.query.dtype, device=mask.device)
        return torch.where(mask, zero, torch.finfo(self.query.dtype).min)

    def _causal(self) -> Tensor:
        rows, keys = self.query.shape[2], self.key.shape[2]
        seen = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=self.query.device).tril(keys - rows)
        return seen if self.window is None else seen.triu(keys - rows - self.window + 1)


def read(
    module: Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float,
    scaling: float | None, is_causal: bool | None, others: dict[str, Any],
) -> Call:  # fmt: skip
    """The arguments of an attention function, by transformers' conventions for SDPA and FlashAttention.

    Raises:
        ConfigError: there are more keys than queries, and no mask: as of a compiled model that cuts its queries to the
            logits that are kept, but not under the name "sdpa" (Gemma 4).
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    length, padding, kind, window = query.shape[2], None, MaskKind.NONE, None
    if mask is not None and mask.dim() == 2:
        if length > 1:
            causal = True
            kind, length, window = getattr(mask, MASK_KIND, MaskKind.CAUSAL_PADDING), mask.shape[1], window_of(mask)
            padding, mask = mask if kind is MaskKind.CAUSAL_PADDING else None, None
            if window is not None:
                padding, kind = None if padding is None else with_ranges(padding < 0, padding), MaskKind.SLIDING_WINDOW
        else:
            mask, kind = mask[:, None, None, :].to(torch.bool), MaskKind.PADDING
    elif mask is not None:
        kind = getattr(mask, MASK_KIND, MaskKind.PADDING if not causal and mask.shape[-2] == 1 else MaskKind.OPAQUE)
        if kind is MaskKind.SLIDING_WINDOW and not (others.get("sliding_window") or getattr(module, "sliding_window", None)):
            kind = MaskKind.CHUNKED
    elif causal and length > 1:
        kind = MaskKind.CAUSAL
        if length < key.shape[2]:
            raise ConfigError(
                f"{type(module).__name__} has {length} queries over {key.shape[2]} keys and no mask, which does not say "
                'where they stand: load the model with attn_implementation="sdpa", and compile it with backend="tsa"'
            )
    if window is not None or kind in (MaskKind.CAUSAL, MaskKind.CAUSAL_PADDING):
        # Without the keys of a static cache that are still to be written.
        bias = others.get("position_bias")  # [1 or B, H, Lq, Lk]
        if isinstance(bias, Tensor) and bias.shape[-1] == key.shape[2]:
            others = {**others, "position_bias": bias[..., :length]}
        key, value = key[:, :, :length], value[:, :, :length]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return Call(module, query, key, value, padding, mask, kind, scale, dropout, causal, others, window)


def window_of(mask: Tensor) -> int | None:
    """The window that a mask [B, tokens so far] tells of; the host waits only for a copy of one that a layer was given."""
    if mask.dtype != torch.int32:
        return None
    window = getattr(mask, WINDOW, None)
    found = -int(mask.min()) if window is None and mask.numel() else window
    return found if found is not None and found > 0 else None


def with_ranges(padding: Tensor, source: Tensor) -> Tensor:
    """A padding mask with the valid ranges that another one has, where it has them."""
    if hasattr(source, VALID_RANGES):
        setattr(padding, VALID_RANGES, getattr(source, VALID_RANGES))
    return padding


def _changed(module: Module, others: dict[str, Any]) -> list[str]:
    """The arguments that change what attention computes: known ones, and those that the model's own function names."""
    names = dict.fromkeys((*_ARGUMENTS, *_own_arguments(type(module).__module__)))
    return [name for name in names if others.get(name) is not None]


def _own_arguments(home: str) -> tuple[str, ...]:
    if home not in _own:
        function = getattr(sys.modules.get(home), "eager_attention_forward", None)
        names = inspect.signature(function).parameters if function else ()
        _own[home] = tuple(name for name in names if name not in _COMMON)
    return _own[home]


# What a model does with masks is told by its classes' source, as transformers tells whether a model can have another
# implementation. It goes by the whole file, of which only some classes may ask.


def asks_the_interface(kind: type[Module]) -> bool:
    """Whether modules of a class ask the AttentionInterface for their attention."""
    return _ASKS.search(_source(kind)) is not None


def computes_attention_alone(kind: type[Module]) -> bool:
    """Whether modules of a class take a mask and compute attention themselves."""
    takes_mask = "attention_mask" in inspect.signature(kind.forward).parameters
    return takes_mask and _COMPUTES.search(_source(kind)) is not None and not asks_the_interface(kind)


def knows_sdpa_by_name(kind: type[Module]) -> bool:
    """Whether modules of a class do something else where the implementation's name is not "sdpa"; what, is not known."""
    return _BY_NAME.search(_source(kind)) is not None


def knows_flash_by_name(kind: type[Module]) -> bool:
    """Whether modules of a class do something else where FlashAttention runs."""
    return _FLASH_BY_NAME.search(_source(kind)) is not None


def _source(kind: type[Module]) -> str:
    """A class's source, for which Python reads the whole file; of one that was made in a shell, what it inherits from."""
    if kind not in _sources:
        _sources[kind] = ""
        for each in kind.__mro__:
            if each.__module__.startswith(("torch.", "transformers.modeling_utils")):
                break
            with suppress(OSError, TypeError):
                _sources[kind] = inspect.getsource(each)
                break
    return _sources[kind]


def as_written(call: Call) -> tuple[Tensor, Tensor | None]:
    """By SDPA, or by the model's own eager function where SDPA cannot do what is asked for."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    known = sdpa_attention_forward.__code__.co_varnames
    changed = _changed(call.module, call.others)
    lost = [name for name in changed if name in _CHOSEN and name not in _own_arguments(type(call.module).__module__)]
    if lost:
        raise ConfigError(
            f"{type(call.module).__name__} passes {', '.join(lost)} to its attention, which neither SDPA nor its eager "
            'function takes: load the model with attn_implementation="sdpa", and compile it with backend="tsa"'
        )
    if call.others.get("output_attentions") or not all(name in known for name in changed):
        return _eager(call)
    causal = call.kind is MaskKind.CAUSAL and not call.is_behind
    with fastest_first() if causal and call.query.is_cuda else nullcontext():
        return sdpa_attention_forward(
            call.module, call.query, call.key, call.value, call.full_mask(),
            dropout=call.dropout, scaling=call.scale, is_causal=causal, **call.others,
        )  # fmt: skip


def _eager(call: Call) -> tuple[Tensor, Tensor | None]:
    home = sys.modules[type(call.module).__module__]
    function = getattr(home, "eager_attention_forward", None)
    if function is None:
        reason, detail = call.obstacle() or (Reason.UNSUPPORTED_FORM, "")
        raise ConfigError(
            f"{type(call.module).__name__} cannot run its attention here ({reason}: {detail}), and {home.__name__} has no "
            'eager_attention_forward to run instead; load the model with attn_implementation="eager"'
        )
    return function(
        call.module, call.query, call.key, call.value, call.additive_mask(),
        scaling=call.scale, dropout=call.dropout, **call.others,
    )  # fmt: skip
