"""Prompts longer than a model's positions: rotary positions stretched by a factor, through the model's configuration.

    yarn   rope_type "yarn" of transformers (arXiv 2309.00071): slow rotations are slowed by the factor, fast ones stay, and
           attention is sharpened a little
    ntk    the base grows by factor ** (d / (d - 2)), so that the slowest rotation is slowed by the factor

Both are fixed for a model. transformers' "dynamic" is not offered: it changes all rotations with every token beyond the
trained positions, so that what is generated does not fit the keys in the cache, and one sample depends on those before.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tsa_compile.commands.loading import Source
from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.study import ROOM

WAYS = ("yarn", "ntk")


def by_factor(config: Any, lengths: Sequence[int], factors: Sequence[float]) -> dict[float, list[int]]:
    """The lengths by the least factor that gives them positions enough, 1 among the factors; else by the largest."""
    positions = config.get_text_config().max_position_embeddings
    allowed = sorted({1.0, *factors})
    found: dict[float, list[int]] = {}
    for length in sorted(lengths):
        enough = (factor for factor in allowed if length + ROOM <= int(factor * positions))
        found.setdefault(next(enough, allowed[-1]), []).append(length)
    return found


def stretched(source: Source, factor: float, way: str) -> Source:
    """The same weights with `factor` times as many positions; the source itself for a factor of 1.

    Raises:
        ConfigError: a factor below 1; a model without rotary positions, with different ones in its layers, or with positions
            that are stretched already.
    """
    if factor == 1:
        return source
    if factor < 1:
        raise ConfigError(f"--stretch {factor:g} is not allowed: factors must be at least 1")
    config = copy.deepcopy(source.config)
    text = config.get_text_config()
    rope = dict(getattr(text, "rope_parameters", None) or {})
    if rope.get("rope_type") != "default":
        found = rope.get("rope_type") or (f"several kinds ({', '.join(rope)})" if rope else "none")
        raise ConfigError(f"--stretch needs plain rotary positions, of rope_type 'default'; found {found}: leave it out")
    positions = text.max_position_embeddings
    if way == "yarn":
        rope.update(rope_type="yarn", factor=factor, original_max_position_embeddings=positions)
    else:
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        rope["rope_theta"] *= factor ** (rotated / (rotated - 2))
    text.rope_parameters, text.max_position_embeddings = rope, int(factor * positions)
    return replace(source, config=config)
