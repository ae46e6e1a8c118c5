"""A sink of written-out attention: a further column of scores, of which the weights are left out again.

    before   c = cat([scores, s.reshape(1, H, 1, 1).expand(B, H, Lq, 1)], -1)             [B, H, Lq, Lk + 1]
             w = softmax(c - c.amax(-1, keepdim=True), -1)[..., :-1]                      [B, H, Lq, Lk]
    read     sink_logits = s [H]                                                          kernels/sink.py

What is taken away from all scores of a row does not change its softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tsa_compile.passes.aten import users
from tsa_compile.passes.graph import fake, known, same_shape
from tsa_compile.passes.operators import ITEM, arguments, aten
from tsa_compile.passes.products import CASTS, FLOATS, SAME, VIEWS, holds


def drops_last_column(node: Node) -> bool:
    """`x[..., :-1]`"""
    if node.target is not aten.slice.Tensor:
        return False
    source, dim, start, _, step = arguments(node)
    width, kept = fake(source).shape[-1], fake(node).shape[-1]
    return dim in (-1, fake(node).dim() - 1) and start in (0, None) and step == 1 and known(kept == width - 1)


def own_maximum(difference: Node) -> Node | None:
    """What computes the maximum of each row, which is taken away from it; None for another difference."""
    scores, other, alpha = arguments(difference)
    if not isinstance(other, Node) or not isinstance(alpha, int) or alpha != 1:
        return None
    maximum: Any = other.args[0] if other.target is ITEM and other.args[1] == 0 else other
    if maximum.target not in (aten.max.dim, aten.amax.default) or (maximum is other) is (maximum.target is aten.max.dim):
        return None
    source, dims, keeps = arguments(maximum)
    last = dims in (-1, [-1], fake(scores).dim() - 1, [fake(scores).dim() - 1])
    beside = (reader for reader in users(maximum) if reader not in (other, difference))
    alone = len(list(users(other))) == 1 and not any(reader.users for reader in beside)  # the places of the maxima
    return maximum if source is scores and last and keeps and alone else None


def one_a_head(sink: Node, heads: Any) -> Node | None:
    """The tensor [H] behind a column [B, H, Lq, 1] that has a head's number in all of its places."""
    node = sink
    if fake(node).dim() != 4 or not known(fake(node).shape[1] == heads):
        return None
    while fake(node).dim() != 1:
        target, inner = node.target, node.args[0] if node.args else None
        if not isinstance(inner, Node) or not isinstance(fake(inner), torch.Tensor):
            return None
        narrow = known(fake(inner).numel() == heads)
        if target in (*CASTS, *SAME):
            if not same_shape(fake(node), fake(inner)) or not holds(fake(node).dtype, fake(inner).dtype):
                return None
        elif target is aten.expand.default:
            shape = fake(inner).shape
            if len(shape) < 3 or not narrow or not known(shape[-3] == heads):  # so that all others are 1
                return None
        elif target not in VIEWS or not narrow or not known(fake(node).numel() == heads):
            return None  # a view of as many numbers keeps their order
        node = inner
    return node if known(fake(node).shape[0] == heads) and fake(node).dtype in FLOATS else None
