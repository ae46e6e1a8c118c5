"""`AttentionCall`, the one normal form of an attention call, into which `find.py` reads every way of writing it.

softmax(scale * query key^T, where the masks allow) value          query [B,H,Lq,D], key [B,G,Lk,D], value [B,G,Lk,Dv]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any, Literal

import torch
from torch.fx import Node

from tsa_compile.passes.aten import AtenGraph
from tsa_compile.passes.graph import fake
from tsa_compile.reasons import Reason

Form = Literal["sdpa", "eager", "flex", "other"]
Problem = tuple[Reason, str]

OUT_OF_RANGE = "the scores are scaled by steps that may leave the range of their type"
_MODERATE = (1e-4, 1e4)  # scores times any of these keep to their type's range


def keeps_range(factors: Sequence[float], dtype: torch.dtype) -> bool:
    """Whether scores may be multiplied by all factors at once, the first step first: no step leaves the type's range.

    Scores in float16 reach into the last bits of its range, so that no step may make them larger than the last one does.
    """
    partial = [*accumulate(factors, mul), *accumulate(reversed(factors), mul), *factors]
    if dtype == torch.float16 and any(abs(step) > max(1.0, abs(math.prod(factors))) for step in accumulate(factors, mul)):
        return False
    return all(_MODERATE[0] <= abs(factor) <= _MODERATE[1] for factor in partial)


@dataclass(frozen=True)
class MaskTerm:
    """One thing that masks scores [B, H, Lq, Lk].

    Attributes:
        mask: a recorded tensor that broadcasts to the scores.
        role: "keep" (True lets through), "drop" (True hides), "bias" (added to the scores).
        fill: what a hidden score becomes, for "keep" and "drop".
        dtype: the floating-point type in which hidden scores are written.
    """

    mask: Node
    role: Literal["keep", "drop", "bias"]
    fill: float = float("-inf")
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class BlockLists:
    """Which blocks of keys FlexAttention's kernel goes over (kernels/listed.py): recorded values, or nodes of the graph.

    Attributes:
        tensors: for blocks in which the mask function is asked, and for those in which all is allowed, how many are listed
            for each block of rows, and which: int32 [B', H', I] and [B', H', I, J]. The latter two may be None.
        rows, columns: the size of a block.
    """

    tensors: tuple[Any, Any, Any, Any]
    rows: Any
    columns: Any


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """An attention call in normal form: query [B,H,Lq,D], key [B,G,Lk,D], value [B,G,Lk,Dv], H % G == 0.

    Attributes:
        node: the graph's node whose output is the attention output [B,H,Lq,Dv].
        aten: the recorded operators of the graph, in which the masks are.
        form: the form it was read from.
        query, key, value: nodes of the graph.
        scale: the factor of the scores, a number or a node of the graph; None means 1/sqrt(D).
        layer: the module's name in the model ("model.layers.3.self_attn"), or the node's name outside any module.
        wide_key, wide_value: key and value as the model wrote them, repeated to H heads or not.
        lists: of FlexAttention, which blocks it goes over.
        sink_logits: a tensor [H] of numbers in the softmaxes' denominators (kernels/sink.py).
        problem: why the call cannot be rewritten whatever its mask, with a sentence for the report; None if it can.
    """

    node: Node
    aten: AtenGraph
    form: Form
    query: Any
    key: Any
    value: Any
    masks: tuple[MaskTerm, ...] = ()
    is_causal: Any = False
    scale: Any = None
    dropout: Any = 0.0
    layer: str = ""
    problem: Problem | None = None
    wide_key: Node | None = None
    wide_value: Node | None = None
    lists: BlockLists | None = None
    sink_logits: Node | None = None

    @property
    def needs_grad(self) -> bool:
        """Whether a gradient may flow through what takes the call's place.

        Where none is computed, a view of a parameter says all the same that it needs one. But then what reads it says that
        it needs none. Weights may be detached, so an output that needs none does not say by itself that none is computed.
        """
        stopped = self.form != "flex" and not _needs_grad(self.node) and any(map(_needs_grad, self.node.all_input_nodes))
        return not stopped and any(map(_needs_grad, (self.query, self.key, self.value)))

    @property
    def peeled(self) -> bool:
        """Whether key and value were repeated to H heads in front of the call."""
        return self.wide_key is not None and self.wide_key is not self.key


@dataclass(frozen=True)
class RecordedCall:
    """An attention call as it was read: everything but `output`'s place in the graph. Operands are recorded values."""

    output: Node
    form: Form
    query: Any = None
    key: Any = None
    value: Any = None
    masks: tuple[MaskTerm, ...] = ()
    is_causal: Any = False
    scale: Any = None
    dropout: Any = 0.0
    grouped: bool = False
    lists: BlockLists | None = None
    sink_logits: Node | None = None
    problem: Problem | None = None


def _needs_grad(node: Node) -> bool:
    value = fake(node)
    return isinstance(value, torch.Tensor) and value.requires_grad
