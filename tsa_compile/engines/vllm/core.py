"""What of a batch is sparse, and how it is computed: on plain tensors, without vLLM.

A batch is flat: the tokens of its requests, one request after the other, query [T, H, D], key and value [T, G, D]. A request
whose tokens in the batch are all that it has is a prompt, or the first chunk of one, and is computed by itself. The others,
decode steps and later chunks, stay the engine's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsa_compile import pipeline  # registers the ops
from tsa_compile.config import TSAConfig
from tsa_compile.passes.layers import Place, place_in, said_of_unused, select_layers, unused_layers
from tsa_compile.passes.rewrite import options_of
from tsa_compile.reasons import Reason

assert pipeline.OPS


@dataclass(frozen=True)
class Split:
    """The requests of a batch. `prompts`: the token ranges of those that are sparse. `others`: the numbers of the rest."""

    prompts: tuple[tuple[int, int], ...]
    others: tuple[int, ...]


def split(starts: Sequence[int], lengths: Sequence[int], shortest: int | None) -> Split:
    """Which requests are prompts of at least `shortest` tokens; None: none is.

    Args:
        starts: where each request's tokens begin in the batch, and where the last one's end.
        lengths: how many tokens each has, with those of earlier steps.
    """
    prompts, others = [], []
    for number, (start, stop) in enumerate(itertools.pairwise(starts)):
        rows = stop - start
        if shortest is not None and 1 < rows == lengths[number] and rows >= shortest:
            prompts.append((start, stop))
        elif rows:  # requests without a token fill a batch up
            others.append(number)
    return Split(tuple(prompts), tuple(others))


@dataclass(frozen=True)
class Layers:
    """The attention layers of an engine by name. `reasons`: why a layer stays dense; None for the sparse ones."""

    reasons: Mapping[str, tuple[Reason, str] | None]
    unused: str = ""

    @property
    def sparse(self) -> frozenset[str]:
        return frozenset(name for name, reason in self.reasons.items() if reason is None)

    @property
    def summary(self) -> str:
        """One line: which layers are sparse, and why the others are not."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            by_reason.setdefault("sparse" if reason is None else " ".join(reason).strip(), []).append(name)
        said = (f"{what}: {names[0]} to {names[-1]} ({len(names)})" for what, names in by_reason.items())
        return "; ".join([*said, *filter(None, [self.unused])])


def choose_layers(names: Mapping[str, type], obstacles: Mapping[str, str], config: TSAConfig) -> Layers:
    """Which layers are sparse, by the compiler's rule.

    Args:
        names: all attention layers of the model and their classes.
        obstacles: what is in the way of some of them.
    """
    places: list[Place] = [place_in(names, name) for name in names]
    reasons: dict[str, tuple[Reason, str] | None] = {}
    for name, place, reason in zip(names, places, select_layers(places, config), strict=True):
        if reason is None and name in obstacles:
            reasons[name] = (Reason.UNSUPPORTED_FORM, obstacles[name])
        else:
            reasons[name] = None if reason is None else (reason, place.doubt)
    unused = unused_layers(places, config)
    return Layers(reasons, said_of_unused(unused, places) if unused else "")


def attend(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: float, config: TSAConfig, group: str | None
) -> None:
    """Sparse attention of one prompt: query [L, H, D], key [L, G, D], value [L, G, Dv] into output [L, H, Dv]."""
    heads_first = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    out = torch.ops.tsa.sparse_attention(*heads_first, *options_of(config, scale, group))
    output.copy_(out[0].transpose(0, 1))
