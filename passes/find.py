"""Every attention call of a graph, read into its normal form (call.py), however it was written.

    aten.scaled_dot_product_attention.default(q, k, v, m, ...)      by any of its names                     form "sdpa"
    matmul(softmax(matmul(q, k.mT) * scale + m), v)                 written out, see eager.py               form "eager"
    flex_attention(q, k, v, score_mod, block_mask)                  its functions read, see flex.py         form "flex"
    fused layers, bodies of higher-order operators                  a row in the report, never rewritten

    all with k and v [B, G, L, D] as they were before being repeated to H heads (repeat_kv is peeled)

What is read are the recorded operators of a graph (aten.py); operands are the graph's own nodes that hold their values
where the call stands. Reading changes nothing. A call that cannot be read is still a call, with `problem` saying why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from tsa_compile.passes.aten import AtenGraph, unknown
from tsa_compile.passes.base import CallPlan, Pass, PassResult
from tsa_compile.passes.call import AttentionCall, BlockLists, MaskTerm, Problem, RecordedCall
from tsa_compile.passes.eager import WrittenOut
from tsa_compile.passes.flex import read_flex
from tsa_compile.passes.frame import frame_of
from tsa_compile.passes.graph import fake, known, same_shape, static
from tsa_compile.passes.layers import module_name, places_of
from tsa_compile.passes.operators import arguments, aten, is_attention, without_copies
from tsa_compile.passes.record import record
from tsa_compile.reasons import Reason


class FindCalls(Pass):
    """Reads every attention call into its normal form, and finds its place among the model's layers."""

    def call(self, graph_module: GraphModule) -> PassResult:
        self.state.aten, self.state.frame = record(graph_module), frame_of(graph_module)
        calls = calls_of(self.state.aten)
        places = places_of(calls, graph_module, self.state.frame)
        self.state.plans = [
            CallPlan(replace(call, layer=place.names[0]), place, self.state.config.of_layer(place.number, place.names))
            for call, place in zip(calls, places, strict=True)
        ]
        return self.result(graph_module, len(calls), modified=False)


def find_calls(graph_module: GraphModule) -> list[AttentionCall]:
    """Every attention call of a graph, in execution order."""
    return calls_of(record(graph_module))


def calls_of(graph: AtenGraph) -> list[AttentionCall]:
    """Every attention call among recorded operators, in execution order. Never raises: a call that fails has a problem."""
    written_out = WrittenOut(graph)
    calls = []
    for node in list(graph.calls.nodes):
        try:
            read = read_sdpa(node) or written_out.read(node) or read_flex(graph, node) or read_other(node)
            call = None if read is None else normal_form(graph, read)
        except Exception as error:  # noqa: BLE001  # one call that cannot be read must not hide the others
            found = node in written_out.softmaxes or is_attention(node.target) or "softmax" in str(node.target)
            call = _unreadable(graph, node, f"reading it failed: {type(error).__name__}: {error}") if found else None
        if call is not None:
            calls.append(call)
    return calls


def read_sdpa(call: Node) -> RecordedCall | None:
    """Reads scaled_dot_product_attention."""
    if call.target is not aten.scaled_dot_product_attention.default or not call.args:
        return None
    query, key, value, mask, dropout, is_causal, scale, grouped = arguments(call)
    masks: tuple[MaskTerm, ...] = ()
    problem: Problem | None = None
    if mask is not None:
        dtype, cast = fake(mask).dtype, call.meta["autocast"]
        masks = (MaskTerm(mask, "keep") if dtype == torch.bool else MaskTerm(mask, "bias", dtype=dtype),)
        if dtype not in (torch.bool, torch.float64, cast) and cast is not None:  # its lowest number may become -inf
            problem = Reason.DTYPE, f"torch.autocast casts the {dtype} mask to {cast}"
    return RecordedCall(call, "sdpa", query, key, value, masks, is_causal, scale, dropout, grouped, problem=problem)


def read_other(call: Node) -> RecordedCall | None:
    """An attention operator that no rewrite knows: it has a row in the report, with the first tensors as its operands."""
    target = call.meta["origin"].target if call.target is unknown and "failed" in call.meta else call.target
    if not is_attention(target):
        return None
    tensors = [read for read in call.all_input_nodes if isinstance(fake(read), torch.Tensor)]
    query, key, value = ([*tensors[:3], None, None, None])[:3]
    name = getattr(target, "__name__", str(target))
    return RecordedCall(
        call, "other", query, key, value, problem=(Reason.UNSUPPORTED_FORM, f"{name} is attention that is not read")
    )


def normal_form(graph: AtenGraph, call: RecordedCall) -> AttentionCall:
    """A call in normal form: repeated heads are peeled, the module is named, shapes are checked, operands are located."""
    node, problem = _place(graph, call)
    query, key, value = call.query, call.key, call.value
    problem = problem or _shape_problem(query, key, value, call.grouped)
    located = [graph.source(operand, node) if isinstance(operand, Node) else None for operand in (query, key, value)]
    wide_key, wide_value = located[1:]
    scale = graph.source(call.scale, node)
    if problem is None:
        located, problem = _narrow(graph, call, node, located)
    if problem is None and call.scale is not None and scale is None:
        problem = Reason.UNSUPPORTED_FORM, "the scale is computed inside another operator"
    sink = graph.source(call.sink_logits, node)
    if problem is None and call.sink_logits is not None and sink is None:
        problem = Reason.UNSUPPORTED_FORM, "its sinks are written to in place, or are made inside"
    if problem is None:
        problem = _kind_problem(node, *located, *([] if sink is None else [sink]))
    lists = None if call.lists is None else _located(graph, call.lists, node)
    if problem is None and call.lists is not None and lists is None:
        problem = Reason.UNSUPPORTED_FORM, "its lists of blocks are written to, or are made inside another operator"
    shown = [place if place is not None else recorded for place, recorded in zip(located, (query, key, value), strict=True)]
    return AttentionCall(
        node=node, aten=graph, form=call.form, query=shown[0], key=shown[1], value=shown[2], masks=call.masks,
        is_causal=call.is_causal, scale=scale, dropout=call.dropout, layer=_module_of(node), problem=problem,
        wide_key=wide_key, wide_value=wide_value, lists=lists, sink_logits=sink,
    )  # fmt: skip


def _located(graph: AtenGraph, lists: BlockLists, node: Node) -> BlockLists | None:
    """Lists of blocks as nodes of the graph; None if one of them is nowhere in it."""
    recorded = (*lists.tensors, lists.rows, lists.columns)
    first, second, third, fourth, rows, columns = found = [graph.source(value, node) for value in recorded]
    missing = any(place is None and value is not None for place, value in zip(found, recorded, strict=True))
    return None if missing else BlockLists((first, second, third, fourth), rows, columns)


def _place(graph: AtenGraph, call: RecordedCall) -> tuple[Node, Problem | None]:
    """The graph's node that a call is, and its problem, if it is none: it may be hidden inside another operator."""
    node, inside = graph.holder(call.output), call.output.meta["inside"]
    if node is not None and inside is None and node.op in ("call_function", "call_method"):
        return node, call.problem
    origin = call.output.meta["origin"]
    name = inside or getattr(origin.target, "__name__", str(origin.target))
    leave = "; call model.eval() or model.gradient_checkpointing_disable()" if "checkpoint" in name else ""
    return origin, call.problem or (Reason.UNSUPPORTED_FORM, f"it is inside {name}{leave}")


def _unreadable(graph: AtenGraph, call: Node, why: str) -> AttentionCall:
    """What stands for a call whose reading failed."""
    origin = call.meta["origin"]
    problem = (Reason.PASS_FAILED, why)
    return AttentionCall(origin, graph, "other", None, None, None, layer=_module_of(origin), problem=problem)


def _module_of(node: Node) -> str:
    """The name of a node's module, as far as the node alone tells, or else its own."""
    return module_name(node) or node.name


def _narrow(
    graph: AtenGraph, call: RecordedCall, node: Node, located: Sequence[Node | None]
) -> tuple[list[Any], Problem | None]:
    """Query, key and value in the graph, without repeated heads where the tensors behind them are still there."""
    query, key, value = located
    narrow = [peel_repeated_heads(operand) for operand in (call.key, call.value)]
    behind = [graph.source(operand, node) for operand in narrow]
    peeled = all(inner is not outer for inner, outer in zip(narrow, (call.key, call.value), strict=True))
    if peeled and None not in behind and known(fake(narrow[0]).shape[1] == fake(narrow[1]).shape[1]):
        key, value = behind
    if None in (query, key, value):
        return [query, key, value], (
            Reason.UNSUPPORTED_FORM,
            "query, key or value is written to in place, or is made inside",
        )
    return [query, key, value], None


def _shape_problem(query: Any, key: Any, value: Any, grouped: bool) -> Problem | None:
    tensors = [fake(node) for node in (query, key, value)]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return Reason.UNSUPPORTED_FORM, "query, key or value is no tensor of the graph"
    q, k, v = tensors
    if any(tensor.dim() != 4 for tensor in tensors):
        return Reason.RANK, f"query has {q.dim()} dimensions, not the 4 of [batch, heads, length, head_dim]"
    heads, kv_heads = q.shape[1], k.shape[1]
    number, kv_number = static(heads), static(kv_heads)
    if grouped:
        matching = number is not None and kv_number is not None and number % kv_number == 0
    else:  # a single head is broadcast to all queries: one group of them
        matching = known(heads == kv_heads) or (number is not None and known(kv_heads == 1))
    if not matching or not known(kv_heads == v.shape[1]):
        return Reason.UNSUPPORTED_FORM, f"{heads} query heads over {kv_heads} key and {v.shape[1]} value heads"
    if not (known(q.shape[0] == k.shape[0]) and known(q.shape[0] == v.shape[0])):
        return Reason.UNSUPPORTED_FORM, "query, key and value are broadcast against each other"
    if not known(q.shape[3] == k.shape[3]):  # einsum broadcasts a width of 1
        return Reason.UNSUPPORTED_FORM, f"queries are {q.shape[3]} wide, keys {k.shape[3]}"
    # A cache's keys and values may have separate symbols for their length. The model's attention fails where these differ,
    # and so do our ops, which compare them when they run.
    if known(k.shape[2] != v.shape[2]) or (known(q.shape[2] == k.shape[2]) and not known(k.shape[2] == v.shape[2])):
        return Reason.NOT_SELF_ATTENTION, f"{q.shape[2]} queries over {k.shape[2]} keys and {v.shape[2]} values"
    return None


def types_problem(query: Any, key: Any, value: Any, computed: torch.dtype) -> Problem | None:
    """Why a call of these types is not read: mixed ones, or autocast chooses another to compute in."""
    if not (query.dtype == key.dtype == value.dtype):
        return Reason.DTYPE, f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype}"
    return None if query.dtype == computed else (Reason.DTYPE, f"query is {query.dtype}, the output {computed}")


def _kind_problem(output: Node, query: Any, key: Any, value: Any, *sink: Any) -> Problem | None:
    q, k, v, *others = tensors = [fake(node) for node in (query, key, value, *sink)]
    plain = (torch.Tensor, FakeTensor)
    if not all(type(tensor) in plain for tensor in tensors):  # a DTensor, say, has no rule for the ops
        return Reason.UNSUPPORTED_FORM, f"query, key and value are {', '.join(type(t).__name__ for t in tensors)}"
    if others and fake(output).requires_grad:
        return Reason.NEEDS_GRAD, ""
    problem = types_problem(q, k, v, fake(output).dtype)
    if problem is not None:
        return problem
    if any(tensor.device != q.device for tensor in tensors):
        return Reason.DEVICE, f"query, key and value are on {', '.join(str(tensor.device) for tensor in tensors)}"
    return None


_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints)


def peel_repeated_heads(node: Node) -> Node:
    """The recorded tensor [B,G,L,D] behind one that repeats its heads to [B,H,L,D]; the node itself if it does not.

        x[:, :, None].expand(B, G, n, L, D).reshape(B, G * n, L, D)        transformers' repeat_kv
        x.repeat_interleave(n, dim=1)

    Both put head g at positions g*n ... g*n + n - 1, which is what grouped-query attention computes.
    """
    source = without_copies(node)
    return _behind_repeat_interleave(source) or _behind_expand(source) or node


def _behind_repeat_interleave(node: Node) -> Node | None:
    if node.target is not aten.repeat_interleave.self_int:
        return None
    source, repeats, dim, _ = arguments(node)
    return source if isinstance(repeats, int) and dim in (1, -3) and fake(source).dim() == 4 else None


def _behind_expand(node: Node) -> Node | None:
    """Each step is checked by what it does to the shape, so that any way of writing it is recognised."""
    if node.target not in _RESHAPES:
        return None
    expanded = without_copies(node.args[0])
    if expanded.target is not aten.expand.default or fake(expanded).dim() != 5:
        return None
    inserted = _without_full_slices(expanded.args[0])
    if inserted.target is not aten.unsqueeze.default or inserted.args[1] not in (2, -3):
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


def _without_full_slices(node: Any) -> Node:
    """`x[:, :, None]` is recorded with slices over the whole of a dimension where its size is symbolic."""
    while node.target is aten.slice.Tensor and same_shape(fake(node), fake(node.args[0])):
        node = node.args[0]
    return node
