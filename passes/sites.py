"""`AttentionSite`, the one normal form of an attention call, and how each spelling is read into it.

    torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=m, ...)    positional or by name      form "sdpa"
    torch.ops.aten.scaled_dot_product_attention.default(q, k, v, m, ...)           torch.export               form "sdpa"
    softmax(q @ k.mT * scale + m) @ v                                              `eager.py`                 form "eager"

    all with k and v [B, G, L, D] as they were before being repeated to H heads (repeat_kv is peeled)

Reading changes nothing in the graph. A call that cannot be read completely is still a site, with `problem` saying why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from tsa_compile.passes.graph import (
    argument,
    fake,
    is_mutated,
    known,
    mutated_storages,
    op_name,
    same_shape,
)
from tsa_compile.passes.layers import layer_name
from tsa_compile.report import Reason

_SDPA_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_SDPA_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


@dataclass(frozen=True)
class MaskTerm:
    """One thing that masks scores [B, H, Lq, Lk].

    Attributes:
        mask: a tensor that broadcasts to the scores.
        role: "keep" (True lets through), "drop" (True hides), "bias" (added to the scores).
        fill: what a hidden score becomes, for "keep" and "drop".
        dtype: the floating-point type in which hidden scores are written.
    """

    mask: Node
    role: Literal["keep", "drop", "bias"]
    fill: float = float("-inf")
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class AttentionSite:
    """An attention call in normal form: query [B,H,Lq,D], key [B,G,Lk,D], value [B,G,Lk,Dv], H % G == 0.

    Attributes:
        node: the node whose output is the attention output [B,H,Lq,Dv].
        form: the spelling it was read from.
        scale: the factor of the scores, a number or a node; None means 1/sqrt(D).
        layer: the module's name in the model ("model.layers.3.self_attn"), or the node's name outside any module.
        layer_index, container: 3 and "model.layers.*.self_attn"; None and "" where no number is known to be the layer's.
        wide_key, wide_value: key and value as the model wrote them, repeated to H heads or not.
        problem: why the call cannot be rewritten whatever its mask, with a sentence for the report; None if it can.
    """

    node: Node
    form: Literal["sdpa", "eager"]
    query: Node
    key: Node
    value: Node
    masks: tuple[MaskTerm, ...] = ()
    is_causal: Any = False
    scale: Any = None
    dropout: Any = 0.0
    layer: str = ""
    layer_index: int | None = None
    container: str = ""
    problem: tuple[Reason, str] | None = None
    wide_key: Node | None = None
    wide_value: Node | None = None

    @property
    def peeled(self) -> bool:
        """Whether key and value were repeated to H heads in front of the call."""
        return self.wide_key is not None and self.wide_key is not self.key


Reader = Callable[[Node], AttentionSite | None]


def find_sites(graph_module: GraphModule) -> list[AttentionSite]:
    """Every attention call of a graph, in execution order."""
    from tsa_compile.passes.eager import read_eager  # reads into this module's normal form

    readers: tuple[Reader, ...] = (read_sdpa, read_eager)
    sites = (next(filter(None, (reader(node) for reader in readers)), None) for node in graph_module.graph.nodes)
    return [site for site in sites if site is not None]


def read_sdpa(node: Node) -> AttentionSite | None:
    """Reads a call of scaled_dot_product_attention, whatever its spelling."""
    if node.op != "call_function" or op_name(node) != "scaled_dot_product_attention":
        return None
    given: dict[str, Any] = {**dict(zip(_SDPA_PARAMETERS, node.args, strict=False)), **node.kwargs}
    call: dict[str, Any] = {
        **_SDPA_DEFAULTS,
        **{("query" if name == "input" else name): value for name, value in given.items()},
    }
    mask = call["attn_mask"]
    masks: tuple[MaskTerm, ...] = ()
    if mask is not None:
        dtype = fake(mask).dtype
        masks = (MaskTerm(mask, "keep") if dtype == torch.bool else MaskTerm(mask, "bias", dtype=dtype),)
    return normal_form(
        node,
        "sdpa",
        (call["query"], call["key"], call["value"]),
        masks,
        is_causal=call["is_causal"],
        scale=call["scale"],
        dropout=call["dropout_p"],
        grouped=call["enable_gqa"],
    )


def normal_form(
    node: Node,
    form: Literal["sdpa", "eager"],
    operands: tuple[Node, Node, Node],
    masks: tuple[MaskTerm, ...],
    *,
    grouped: bool,
    **rest: Any,
) -> AttentionSite:
    """A site from its operands: repeated key and value heads are peeled, the layer is named, shapes are checked."""
    query, key, value = operands
    layer, container, layer_index = layer_name(node)
    wide_key, wide_value = key, value
    problem = _shape_problem(query, key, value, grouped)
    if problem is None:
        narrow_key, narrow_value = peel_repeated_heads(key), peel_repeated_heads(value)
        if narrow_key is not key and known(fake(narrow_key).shape[1] == fake(narrow_value).shape[1]):
            key, value = narrow_key, narrow_value
        problem = _kind_problem(node, query, key, value)
    return AttentionSite(
        node=node, form=form, query=query, key=key, value=value, masks=masks, layer=layer, layer_index=layer_index,
        container=container, problem=problem, wide_key=wide_key, wide_value=wide_value, **rest,
    )  # fmt: skip


def _shape_problem(query: Node, key: Node, value: Node, grouped: bool) -> tuple[Reason, str] | None:
    tensors = [fake(node) for node in (query, key, value)]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return Reason.UNSUPPORTED_FORM, "query, key or value is no tensor of the graph"
    q, k, v = tensors
    if any(tensor.dim() != 4 for tensor in tensors):
        return Reason.RANK, f"query has {q.dim()} dimensions, not the 4 of [batch, heads, length, head_dim]"
    heads, kv_heads = q.shape[1], k.shape[1]
    if grouped:
        matching = isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads == 0
    else:  # a single head is broadcast to all queries: one group of them
        matching = known(heads == kv_heads) or (isinstance(heads, int) and known(kv_heads == 1))
    if not matching or not known(kv_heads == v.shape[1]):
        return Reason.UNSUPPORTED_FORM, f"{heads} query heads over {kv_heads} key and {v.shape[1]} value heads"
    if not (known(q.shape[0] == k.shape[0]) and known(q.shape[0] == v.shape[0])):
        return Reason.UNSUPPORTED_FORM, "query, key and value are broadcast against each other"
    if not known(k.shape[2] == v.shape[2]):  # a decode step over caches whose lengths are separate symbols
        return Reason.NOT_SELF_ATTENTION, f"{q.shape[2]} queries over {k.shape[2]} keys and {v.shape[2]} values"
    return None


def _kind_problem(output: Node, query: Node, key: Node, value: Node) -> tuple[Reason, str] | None:
    q, k, v = tensors = [fake(node) for node in (query, key, value)]
    plain = (torch.Tensor, FakeTensor)
    if not all(type(tensor) in plain for tensor in tensors):  # a DTensor, say, has no rule for the ops
        return Reason.UNSUPPORTED_FORM, f"query, key and value are {', '.join(type(t).__name__ for t in tensors)}"
    if not (q.dtype == k.dtype == v.dtype):
        return Reason.DTYPE, f"query, key and value are {q.dtype}, {k.dtype}, {v.dtype}"
    if fake(output).dtype != q.dtype:  # autocast chooses another dtype inside the call
        return Reason.DTYPE, f"query is {q.dtype}, the output {fake(output).dtype}"
    if not (q.device == k.device == v.device):
        return Reason.DEVICE, f"query, key and value are on {q.device}, {k.device}, {v.device}"
    return None


def peel_repeated_heads(node: Node) -> Node:
    """The tensor [B,G,L,D] behind one that repeats its heads to [B,H,L,D]; the node itself if it does not.

        x[:, :, None].expand(B, G, n, L, D).reshape(B, G * n, L, D)        transformers' repeat_kv
        x.repeat_interleave(n, dim=1)

    Both put head g at positions g*n ... g*n + n - 1, which is what grouped-query attention computes.
    """
    source: Any = node
    while op_name(source) in ("contiguous", "clone") and source.op != "placeholder":
        source = source.args[0]
    narrow = _behind_repeat_interleave(source) or _behind_expand(source)
    if narrow is None:
        return node
    mutated = mutated_storages(node.graph)
    return node if any(is_mutated(step, mutated) for step in (narrow, source, node)) else narrow


def _behind_repeat_interleave(node: Node) -> Node | None:
    if op_name(node) != "repeat_interleave" or node.op == "placeholder":
        return None
    source, repeats, dim = node.args[0], argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(repeats, int) or dim not in (1, -3) or not isinstance(source, Node) or fake(source).dim() != 4:
        return None
    return source


def _behind_expand(node: Node) -> Node | None:
    """Each step is checked by what it does to the shape, so that any spelling of it is recognised."""
    if op_name(node) not in ("reshape", "view", "flatten") or node.op == "placeholder":
        return None
    expanded = node.args[0]
    while isinstance(expanded, Node) and op_name(expanded) in ("clone", "contiguous"):
        expanded = expanded.args[0]
    if not isinstance(expanded, Node) or op_name(expanded) != "expand" or fake(expanded).dim() != 5:
        return None
    inserted = expanded.args[0]
    if not isinstance(inserted, Node) or not _inserts_dimension(inserted, 2):
        return None
    source = _without_full_slices(inserted.args[0])
    batch, groups, repeats, length, width = fake(expanded).shape
    outer, inner = fake(node), fake(source)
    merged = (batch, groups * repeats, length, width)
    kept = (batch, groups, length, width)
    if inner.dim() != 4 or outer.dim() != 4:
        return None
    same = [known(a == b) for pair in ((outer.shape, merged), (inner.shape, kept)) for a, b in zip(*pair, strict=True)]
    return source if all(same) else None


def _inserts_dimension(node: Node, dim: int) -> bool:
    """`x.unsqueeze(2)` or `x[:, :, None, :, :]`."""
    if not isinstance(node.args[0], Node):
        return False
    if op_name(node) == "unsqueeze":
        return argument(node, 1, "dim") in (dim, dim - fake(node).dim())
    if op_name(node) != "getitem" or not isinstance(node.args[1], tuple):
        return False
    entries = [entry for entry in node.args[1] if entry is not Ellipsis]
    full = all(entry is None or entry == slice(None) for entry in entries)
    return full and entries.count(None) == 1 and Ellipsis not in node.args[1][:dim] and entries.index(None) == dim


def _without_full_slices(node: Any) -> Node:
    """torch.export writes `x[:, :, None]` with a slice over the whole of each dimension."""
    while op_name(node) == "slice" and node.op == "call_function" and same_shape(fake(node), fake(node.args[0])):
        node = node.args[0]
    return node
