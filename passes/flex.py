"""FlexAttention read into the normal form: what its two functions of positions say, and which lists of blocks it goes over.

    out, lse, max = flex_attention(q, k, v, score_mod, (Lq, Lk, *lists, rows, columns, mask_mod), scale, options, *captured)

    mask_mod(b, h, q, kv) -> bool []              a mask term without dimensions, read at (b, h, q, kv) (masks/infer.py)
    score_mod(score, b, h, q, kv) -> float []     the score, or the score times numbers: they go into the scale

`record.py` records both bodies with one set of index tensors for all calls, so that layers with one mask function share its
value, and with the graph's own values in place of what the functions capture.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from tsa_compile.passes.aten import AtenGraph
from tsa_compile.passes.call import OUT_OF_RANGE, BlockLists, MaskTerm, RecordedCall, keeps_range
from tsa_compile.passes.graph import fake
from tsa_compile.passes.operators import arguments, aten
from tsa_compile.reasons import Reason

FLEX = torch.ops.higher_order.flex_attention
_NAMES = (
    "query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options", "score_mod_other_buffers",
    "mask_mod_other_buffers",
)  # fmt: skip
_IGNORED = (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.detach.default, aten.alias.default)


@dataclass(frozen=True)
class RecordedFlex:
    """The arguments of a call as recorded values. `score` is what score_mod is given, `modified` what it returns."""

    query: Any
    key: Any
    value: Any
    scale: Any
    block_mask: tuple[Any, ...]
    score: Any
    modified: Any
    allowed: Any


def flex_arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call in a graph, by name; without captured values the last two are empty."""
    given = dict(zip(_NAMES, node.args, strict=False))
    return {"score_mod_other_buffers": (), "mask_mod_other_buffers": (), **given, **node.kwargs}


def at_index(node: Node, args: Sequence[Any]) -> Any:
    """`x[q, 0]` by index tensors without dimensions, as FlexAttention means it; None for any other node.

    Outside these functions such an index would be read as a number.
    """
    if node.target is not operator.getitem or len(args) != 2 or not isinstance(args[0], Tensor):
        return None
    entries = args[1] if isinstance(args[1], tuple) else (args[1],)
    plain = all(isinstance(entry, Tensor) or type(entry) is int for entry in entries)
    if not plain or not any(isinstance(entry, Tensor) for entry in entries):
        return None
    tensors = [entry if isinstance(entry, Tensor) else torch.full((), entry, device=args[0].device) for entry in entries]
    return aten.index.Tensor(args[0], tensors)


def read_flex(graph: AtenGraph, call: Node) -> RecordedCall | None:
    """Reads flex_attention, whose functions were recorded."""
    read = call.meta.get("flex")
    if call.target is not FLEX or not isinstance(read, RecordedFlex):
        return None
    output, *others = (user for user in call.users if user.args == (call,))
    factors = _factors(read.modified, read.score)
    factor = None if factors is None else math.prod(factors)
    problem = None
    if "example_value" not in call.meta["origin"].meta:
        problem = "flex_attention is not read in exported graphs"
    elif any(map(graph.is_used, others)):
        problem = "what flex_attention returns besides its output is read"
    elif factors is None or factor is None or factor <= 0:
        problem = "its score_mod does more than to scale scores"
    elif not keeps_range(factors, torch.float32):
        problem = f"by its score_mod {OUT_OF_RANGE}"
    elif factor != 1 and not isinstance(read.scale, (int, float)):
        problem = "its score_mod scales scores that have a symbolic scale"
    elif not isinstance(read.allowed, Node) or fake(read.allowed).dtype != torch.bool or fake(read.allowed).dim() != 0:
        problem = "its mask_mod does not return a bool"
    if problem is not None:
        return RecordedCall(output, "flex", read.query, read.key, read.value, problem=(Reason.UNSUPPORTED_FORM, problem))
    assert factor is not None
    *_, rows, columns, _ = read.block_mask
    return RecordedCall(
        output, "flex", read.query, read.key, read.value, (MaskTerm(read.allowed, "keep"),), grouped=True,
        scale=read.scale if factor == 1 else read.scale * factor,
        lists=BlockLists(tuple(read.block_mask[2:6]), rows, columns),
    )  # fmt: skip


def _factors(modified: Any, score: Any) -> list[float] | None:
    """The numbers that a score is multiplied by, the first step first; None if anything else happens to it."""
    factors: list[float] = []
    while modified is not score:
        if not isinstance(modified, Node):
            return None
        if modified.target in _IGNORED and fake(modified).dtype in (torch.float32, torch.float64):
            modified = modified.args[0]
            continue
        if modified.target not in (aten.mul.Tensor, aten.div.Tensor):
            return None
        left, right = arguments(modified)
        if modified.target is aten.mul.Tensor and not isinstance(left, Node):
            left, right = right, left
        if type(right) not in (int, float) or right == 0:
            return None
        factors.insert(0, float(right) if modified.target is aten.mul.Tensor else 1 / right)
        modified = left
    return factors
