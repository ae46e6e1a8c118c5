"""What of a batch is sparse, and how it is computed: on plain tensors, without vLLM.

A batch is flat: the tokens of its requests, one after the other, query [T, H, D], key and value [T, G, D]. Those of a
request are a whole prompt, a chunk of one, or what a decode step adds. Prompts and chunks are computed one by one; keys and
values of earlier chunks are gathered from the paged cache. Decode steps stay the engine's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tsa_compile import pipeline  # registers the ops
from tsa_compile.config import TSAConfig
from tsa_compile.costs.breakeven import Minimum, minimum
from tsa_compile.costs.calls import CallShape
from tsa_compile.costs.devices import DeviceCosts
from tsa_compile.passes.layers import Place, place_in, said_of_unused, select_layers, unused_layers
from tsa_compile.passes.rewrite import options_of
from tsa_compile.reasons import Reason

assert pipeline.OPS


@dataclass(frozen=True)
class Request:
    """A request of a batch: its number there, the range of its tokens, and how many it has with those of earlier batches."""

    number: int
    start: int
    stop: int
    length: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def is_behind(self) -> bool:
        """Whether keys of earlier batches are to be gathered."""
        return self.rows < self.length


@dataclass(frozen=True)
class Rule:
    """The compiler's rule of lengths (costs/breakeven.py) for the requests of layers of one shape.

    Attributes:
        share: of the model's layers that are sparse.
        where: the device, or its costs.
    """

    config: TSAConfig
    shape: CallShape
    share: float
    where: torch.device | DeviceCosts

    def minimum(self, past: int = 0) -> Minimum:
        """From which length on a request is sparse behind so many tokens of earlier batches."""
        return minimum(self.config, replace(self.shape, past=past), self.share, self.where)

    def takes(self, request: Request) -> bool:
        """Whether a request is sparse."""
        return self.minimum(request.length - request.rows).reached_by(request.rows, request.length)


def strictest(rules: Iterable[Rule]) -> Rule:
    """Of the rules of layers that are sparse for the same requests, the one that asks for the longest prompts."""

    def least(rule: Rule) -> float:
        tokens = rule.minimum().tokens
        return math.inf if tokens is None else tokens

    return max(rules, key=least)


@dataclass(frozen=True)
class Split:
    """The requests of a batch. `prompts`: those that are sparse. `others`: the numbers of the rest."""

    prompts: tuple[Request, ...]
    others: tuple[int, ...]


def split(starts: Sequence[int], lengths: Sequence[int], prefilling: Sequence[bool] | None, rule: Rule) -> Split:
    """Which requests are prompts, or chunks of them, that are long enough.

    Args:
        starts: where each request's tokens begin in the batch, and where the last one's end.
        lengths: how many tokens each has, with those of earlier batches.
        prefilling: whether each has tokens of its prompt in the batch, without those that fill it up; if that is not known,
            only those count whose tokens are all in it, because a few tokens behind a cache may be speculative ones.
    """
    prompts, others = [], []
    for number, (start, stop) in enumerate(itertools.pairwise(starts)):
        request = Request(number, start, stop, lengths[number])
        if not request.rows:  # it fills the batch up
            continue
        is_prompt = not request.is_behind if prefilling is None else prefilling[number]
        if is_prompt and rule.takes(request):
            prompts.append(request)
        else:
            others.append(number)
    return Split(tuple(prompts), tuple(others))


@dataclass(frozen=True)
class Layers:
    """The attention layers of an engine by name.

    Attributes:
        reasons: why a layer stays dense; None for the sparse ones.
        sparse: the configuration of each sparse one.
        unused: what to say of layers that were named and are not there.
    """

    reasons: Mapping[str, tuple[Reason, str] | None]
    sparse: Mapping[str, TSAConfig]
    unused: str = ""

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
    sparse = {
        name: config.of_layer(place.number, place.names)
        for name, place in zip(names, places, strict=True)
        if reasons[name] is None
    }
    unused = unused_layers(places, config)
    return Layers(reasons, sparse, said_of_unused(unused, places) if unused else "")


def gather(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first `length` tokens of a request [length, ...] in a paged cache [all blocks, tokens of a block, ...].

    Args:
        blocks: the numbers of the request's blocks, in order; at least as many as its tokens fill.
    """
    positions = torch.arange(length, device=cache.device)
    return cache[blocks[positions // cache.shape[1]].long(), positions % cache.shape[1]]


def attend(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: float, config: TSAConfig, group: str | None,
    sink_logits: Tensor | None = None,
) -> None:  # fmt: skip
    """Sparse attention of one prompt or chunk: query [Lq, H, D] into output [Lq, H, Dv].

    The queries are the last of the positions of key [Lk, G, D] and value [Lk, G, Dv], whose earlier chunks were gathered;
    sink_logits [H] are the layer's sinks, if it has any.
    """
    heads_first = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    options = options_of(config, scale, group)
    out = torch.ops.tsa.sparse_attention(*heads_first, *options, sink_logits=sink_logits)
    output.copy_(out[0].transpose(0, 1))


def rehearse(
    query: Tensor, kv_heads: int, longest: int, rule: Rule, scale: float, config: TSAConfig,
    sink_logits: Tensor | None = None,
) -> None:  # fmt: skip
    """Computes, and throws away, the largest request that can come, so that an engine that measures its memory sees it.

    Args:
        query: [rows, H, D], as many rows as the largest batch has; their values do not matter.
        longest: how many tokens a request may have.
    """
    rows, _, width = query.shape
    length = max(longest, rows)
    kept = query.new_zeros(length, kv_heads, 2 * width)  # keys and values side by side, as they are gathered
    key, value = kept.split(width, dim=-1)
    if rule.takes(Request(0, 0, rows, length)):
        attend(query, key, value, torch.empty_like(query), scale, config, None, sink_logits)
