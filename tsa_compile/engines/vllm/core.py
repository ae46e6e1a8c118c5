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
from tsa_compile.errors import ConfigError
from tsa_compile.kernels import registry
from tsa_compile.passes.layers import Place, place_in, said_of_unused, select_layers, unused_layers
from tsa_compile.passes.plan import kernel_of
from tsa_compile.passes.rewrite import options_of
from tsa_compile.reasons import NOT_UNDERSTOOD, Decision, Reason

assert pipeline.OPS

WINDOW = "a sliding window"
"""What is in the way of layers with one."""
_DEFAULT, _WITHOUT_EFFECT = TSAConfig(), ("dense_kernel", "regional", "compiler", "skip_passes")


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


def split(
    starts: Sequence[int], lengths: Sequence[int], prefilling: Sequence[bool] | None, rule: Rule
) -> tuple[tuple[Request, ...], tuple[int, ...]]:
    """Which requests are prompts, or chunks of them, that are long enough; and the numbers of the others.

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
    return tuple(prompts), tuple(others)


@dataclass(frozen=True)
class Layers:
    """The attention layers of an engine by name.

    Attributes:
        reasons: why a layer stays dense; None for the sparse ones.
        sparse: the configuration of each sparse one.
        unused: what to say of layers that were named and are not there.
        whole: whether all of the model's layers are here, not those of one stage of a pipeline.
    """

    reasons: Mapping[str, tuple[Reason, str] | None]
    sparse: Mapping[str, TSAConfig]
    unused: str = ""
    whole: bool = True

    @property
    def summary(self) -> str:
        """One line: which layers are sparse, and why the others are not."""
        return "; ".join([*self._said(Reason), *filter(None, [self.unused])])

    @property
    def not_understood(self) -> str:
        """Which selected layers are not sparse because of what the plug-in cannot do; "" if there are none."""
        return "; ".join(self._said((*NOT_UNDERSTOOD, Reason.LAYER_COUNT_UNKNOWN)))

    def _said(self, which: Iterable[Reason]) -> Iterable[str]:
        by_reason: dict[str, list[str]] = {}
        for name, (reason, detail) in ((name, found or (Reason.SPARSE, "")) for name, found in self.reasons.items()):
            if reason in which:
                title = "sparse" if reason is Reason.SPARSE else f"{reason} {detail}".strip()
                by_reason.setdefault(title, []).append(name)
        return (f"{what}: {names[0]} to {names[-1]} ({len(names)})" for what, names in by_reason.items())


def choose_layers(
    names: Mapping[str, type], obstacles: Mapping[str, str], config: TSAConfig, count: int | None = None, whole: bool = True
) -> Layers:
    """Which layers are sparse, by the compiler's rule.

    Args:
        names: the attention layers of the model that are in this process, and their classes.
        obstacles: what is in the way of some of them.
        count: how many layers the model has, with those of other processes and without attention, if that is known.
        whole: whether no other process has layers of the model.
    """
    places = _places(names, count)
    reasons: dict[str, tuple[Reason, str] | None] = dict.fromkeys(names, (Reason.LAYER_NOT_SELECTED, "a draft model's"))
    for (name, place), reason in zip(places.items(), select_layers([*places.values()], config), strict=True):
        if reason is None and name in obstacles:
            what = obstacles[name]
            reasons[name] = (Reason.SLIDING_WINDOW if what == WINDOW else Reason.UNSUPPORTED_FORM, what)
        else:
            reasons[name] = None if reason is None else (reason, place.doubt)
    sparse = {name: config.of_layer(place.number, place.names) for name, place in places.items() if reasons[name] is None}
    unused = unused_layers([*places.values()], config)
    if not whole:
        unused = [layer for layer in unused if count is not None and isinstance(layer, int) and layer >= count]
    return Layers(reasons, sparse, said_of_unused(unused, [*places.values()]) if unused else "", whole)


def _places(names: Mapping[str, type], count: int | None) -> dict[str, Place]:
    """The place of each layer, but for those numbered beyond `count`: those of a draft model, which stands behind the model.

    The names here may be those of a stage of a pipeline, or of the layers of a hybrid model that have attention. So how many
    layers a stack has is `count`, if that can be meant: where there is one stack.
    """
    found = {name: place_in(names, name) for name in names}
    if count is None:
        return found
    found = {name: place for name, place in found.items() if place.number is None or place.number < count}
    if len({place.stack.partition("*")[0] for place in found.values() if place.number is not None}) > 1:
        return found
    return {name: place if place.number is None else replace(place, count=count, doubt="") for name, place in found.items()}


def complaints(layers: Layers, config: TSAConfig) -> list[str]:
    """What to warn of when an engine starts.

    Raises:
        ConfigError: with `strict`, for layers that were named and are not there, and for what the plug-in cannot do.
    """
    said = [*filter(None, [layers.unused, layers.not_understood])]
    if config.strict and said:
        raise ConfigError(f"not sparse although asked for: {'; '.join(said)} (strict=True). Name others in `layers`")
    found = [layers.unused] if layers.unused else []
    if config.layers != () and layers.whole and not layers.sparse:
        found = [f"no layer is sparse: {layers.summary}"]
    changed = [
        f"{name}={getattr(config, name)!r}" for name in _WITHOUT_EFFECT if getattr(config, name) != getattr(_DEFAULT, name)
    ]
    if changed:
        found.append(
            f"{', '.join(changed)}: without effect in vLLM. This package compiles nothing there, and vLLM's own kernel runs "
            "in the layers that are not sparse"
        )
    return found


def check_kernels(
    config: TSAConfig, heads: int, kv_heads: int, width: int, dtype: torch.dtype, where: torch.device, sinks: bool
) -> None:
    """Raises KernelError where a kernel is not registered, or that of sparse layers does not fit them."""
    registry.check(config.kernel, config.dense_kernel)
    query, key = (torch.empty(1, each, 1, width, dtype=dtype, device=where) for each in (heads, kv_heads))
    kernel_of(query, key, key, Decision.SPARSE, config, sinks=sinks)


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
