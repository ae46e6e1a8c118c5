"""Whether a model has positions for prompts of a length, before any of them runs."""

from __future__ import annotations

from typing import Any

from torch import nn

from tsa_compile.calibration.fingerprint import text_config
from tsa_compile.errors import ConfigError


def check_positions(model: nn.Module, longest: int, room: int = 0) -> None:
    """Raises ConfigError where the longest prompt, and an answer of `room` tokens behind it, need more than a model has.

    A model whose configuration names no positions takes any length.
    """
    check_config(text_config(model), type(model).__name__, longest, room)


def check_config(config: Any, name: str, longest: int, room: int = 0) -> None:
    """The same by the configuration, without its other parts, of the model called `name`."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or not 0 < positions < longest + room:
        return
    most = f"lengths up to {positions - room:,} fit"
    if room:
        raise ConfigError(
            f"prompts of {longest:,} tokens and {room} of an answer make {longest + room:,}, {name} has "
            f"{positions:,} positions: {most}"
        )
    raise ConfigError(f"prompts of {longest:,} tokens do not fit: {name} has {positions:,} positions, {most}")
