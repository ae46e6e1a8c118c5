"""Prompts as callers give them, read as token ids: lists, tensors, mappings with input_ids, or text with a tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tsa_compile.errors import ConfigError

_FORMS = "token ids (a list or a tensor [L] or [B,L]), a mapping with input_ids, or text if a tokenizer is given"


def items(prompts: Any) -> Iterable[Any]:
    """The prompts one by one; also where a single one was given, which is iterable itself."""
    if isinstance(prompts, (str, Tensor, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ConfigError(f"prompts={prompts!r} is not allowed: prompts must be an iterable of {_FORMS}")
    return prompts


def read_prompts(prompts: Iterable[Any], tokenizer: Any = None) -> Iterator[tuple[int, Tensor]]:
    """Every prompt as token ids [L] without pad tokens, with the place of what it came from.

    Raises:
        ConfigError: something is no prompt, or a prompt without tokens; also where there is none at all.
    """
    place = -1
    for place, prompt in enumerate(prompts):
        for ids in rows_of(place, prompt, tokenizer):
            if not len(ids):
                raise ConfigError(
                    f"prompt {place} has no tokens: leave it out (tokens that attention_mask hides do not count)"
                )
            yield place, ids
    if place < 0:
        raise ConfigError(
            "no prompts were given: drift is measured on some, best on long texts of the kind that will be used"
        )


def rows_of(place: int, prompt: Any, tokenizer: Any = None) -> Iterator[Tensor]:
    """The token ids [L] of each row of a prompt, without pad tokens."""
    if isinstance(prompt, str):
        if not callable(tokenizer):
            raise ConfigError(f"prompt {place} is text: pass tokenizer=, or token ids instead")
        prompt = tokenizer(prompt)
    mask = None
    if isinstance(prompt, Mapping):
        if "input_ids" not in prompt:
            raise ConfigError(f"prompt {place} is a mapping of {', '.join(map(str, prompt))}: it must have input_ids")
        mask, prompt = prompt.get("attention_mask"), prompt["input_ids"]
    ids = _ids(place, prompt)
    kept = torch.ones_like(ids) if mask is None else _ids(place, mask, "attention_mask")
    if kept.shape != ids.shape:
        raise ConfigError(
            f"prompt {place}: attention_mask has the shape {list(kept.shape)}, input_ids {list(ids.shape)}: make them equal"
        )
    for row, valid in zip(ids, kept, strict=True):
        yield row[valid.bool()]


def _ids(place: int, value: Any, name: str = "input_ids") -> Tensor:
    """[B, L] int64, of [L] or [B, L] in any form."""
    try:
        ids = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"prompt {place} ({name}) is {type(value).__name__}, not {_FORMS}: {error}") from error
    whole = not ids.is_floating_point() and not ids.is_complex() and (ids.dtype != torch.bool or name != "input_ids")
    if ids.dim() not in (1, 2) or not (whole or ids.numel() == 0):
        kind = f"{type(value).__name__} of shape {list(ids.shape)} and {ids.dtype}"
        raise ConfigError(f"prompt {place} ({name}) is a {kind}, not {_FORMS}")
    return ids.long() if ids.dim() == 2 else ids.long()[None]


def batches(prompts: Iterable[tuple[int, Tensor]], size: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Up to `size` prompts at a time, padded on the right: the last one's place, ids [B, L], mask [B, L] or None."""
    rest = iter(prompts)
    while group := list(itertools.islice(rest, size)):
        rows = [ids for _, ids in group]
        padded = len({len(row) for row in rows}) > 1
        mask = _padded([torch.ones_like(row) for row in rows]) if padded else None
        yield group[-1][0], _padded(rows), mask


def _padded(rows: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)
