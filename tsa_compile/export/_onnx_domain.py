"""The domain "tsa" of ONNX: an operator for each op, its schema, and how a graph's op becomes a node.

[B, H, L, D] and the like are shapes: items, heads, tokens and head size as in the ops (kernels/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tsa_compile.config import KeepRatio
from tsa_compile.kernels.forms import CAUSAL_KERNELS

DOMAIN = "tsa"
DOMAIN_VERSION = 1

# name, inputs, outputs, attributes. "?" marks what may be left out; T is the model's floating-point type.
_SCHEMAS: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "Score",
        "query T [B,H,Lq,D], key T [B,G,L,D], padding? bool [B,L], sink_logits? float [H]",
        "scores float [B,H,L]",
        "pool int, reduce? string, scale float, window int",
        "Attention of the last `window` valid queries, which are those of the last Lq <= L positions, to each earlier "
        "token, pooled over `pool` neighbours. +inf marks the window's tokens, -inf invalid ones. sink_logits: each softmax "
        "has a further logit, of its head, here and below.",
    ),
    (
        "Budget",
        "scores float [B,S,L]",
        "count int32 [B]",
        "coverage? float, keep_denominator? int, keep_numerator? int, min_tokens int",
        "Tokens to keep, the window included: all but the lightest that carry `coverage` of the mass, or "
        "ceil(candidates * keep_numerator / keep_denominator) candidates; at least min_tokens of them.",
    ),
    (
        "Select",
        "scores float [B,S,L], capacity int64 [], count? int32 [B]",
        "indices int32 [B,S,C]",
        "",
        "Ascending positions of the `count` highest scores of each row; equal scores: the lower position first. Slots "
        "from count on hold L - 1. Without a count all slots are tokens.",
    ),
    (
        "CompressRows",
        "query T [B,H,L,D], key T [B,G,L,D], value T [B,G,L,Dv], indices int32 [B,S,C], count? int32 [B]",
        "query_rows T [B,H,C,D], key_rows T [B,S,C,D], value_rows T [B,S,C,Dv]",
        "",
        "The selected rows; S is H, or G where a group shares its selection. Rows from count on are zero.",
    ),
    (
        "Attend",
        "query T [B,H,C,D], key T [B,S,C,D], value T [B,S,C,Dv], count? int32 [B], sink_logits? float [H]",
        "rows T [B,H,C,Dv]",
        "kernel? string, scale float",
        "Causal attention over the first `count` rows; what follows them is unspecified. `kernel` names a method that "
        "leaves part of it out, or one of the user's own; without it attention is exact.",
    ),
    (
        "AttendLse",
        "query T [B,H,C,D], key T [B,S,C,D], value T [B,S,C,Dv], count? int32 [B]",
        "rows T [B,H,C,Dv], lse float [B,H,C]",
        "kernel? string, scale float",
        "As Attend, with lse[b,h,i] = log(sum of exp(scale * <query[b,h,i], key[b,s,j]>)) over the j that row i attends to, "
        "for MergeFloor.",
    ),
    (
        "MergeFloor",
        "query T [B,H,L,D], key T [B,G,L,D], value T [B,G,L,Dv], rows T [B,H,C,Dv], lse float [B,H,C], "
        "indices int32 [B,S,C], count? int32 [B], padding? bool [B,L], sink_logits? float [H]",
        "output T [B,H,L,Dv]",
        "scale float, sinks int, window int",
        "Dense attention of row i over N(i) = valid j <= i with rank(i) - rank(j) < window or rank(j) < sinks, where "
        "rank(t) counts the valid tokens before t; a selected row, i = indices[j] with j < count, also over the selected "
        "tokens up to i. So, with (near, m) the attention and its log-sum-exp over N(i), in a selected row without the "
        "selected tokens: (exp(lse[j]) * rows[j] + exp(m) * near) / (exp(lse[j]) + exp(m)) there, near in other rows, 0 "
        "in those of invalid tokens. With sink_logits, m is log(exp(m) + exp(sink_logits[h])), and near is as much smaller.",
    ),
    (
        "DecompressRows",
        "rows T [B,H,C,Dv], indices int32 [B,S,C], length int64 [], count? int32 [B]",
        "output T [B,H,L,Dv]",
        "",
        "Row j < count at position indices[j], zeros elsewhere.",
    ),
    (
        "PaddedAttention",
        "query T [B,H,Lq,D], key T [B,G,L,D], value T [B,G,L,Dv], padding bool [B,L], sink_logits? float [H]",
        "output T [B,H,Lq,Dv]",
        "mean_rows int, scale float",
        "Dense attention under (kv <= q + L - Lq) and padding[b,kv], with Lq <= L. A row without any token to attend to is "
        "0, or with mean_rows the mean of value.",
    ),
)


def registered(onnx: Any) -> list[Any]:
    """The schemas, known to the package onnx."""
    found = []
    for name, *rest in _SCHEMAS:
        if not onnx.defs.has(name, DOMAIN):
            onnx.defs.register_schema(_schema(onnx.defs.OpSchema, name, *rest))
        found.append(onnx.defs.get_schema(name, DOMAIN_VERSION, DOMAIN))
    return found


def schema_table() -> str:
    """The schemas as a Markdown table: a row an operator; "?" marks what may be left out."""
    lines = ["| operator | inputs | outputs | attributes | computes |", "|---|---|---|---|---|"]
    lines += [f"| `{name}` | {' | '.join(rest)} |" for name, *rest in _SCHEMAS]
    return "\n".join(lines)


def _schema(kind: Any, name: str, inputs: str, outputs: str, attributes: str, doc: str) -> Any:
    def parameters(text: str) -> list[Any]:
        option = {True: kind.FormalParameterOption.Optional, False: kind.FormalParameterOption.Single}
        return [
            kind.FormalParameter(given, type_ if type_ == "T" else f"tensor({type_})", shape, param_option=option[optional])
            for given, type_, shape, optional in _entries(text)
        ]

    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    return kind(
        name,
        DOMAIN,
        DOMAIN_VERSION,
        doc=doc,
        inputs=parameters(inputs),
        outputs=parameters(outputs),
        type_constraints=[("T", floats, "The model's floating-point type.")] if " T " in inputs else [],
        attributes=[
            kind.Attribute(given, getattr(kind.AttrType, type_.upper()), required=not optional)
            for given, type_, _, optional in _entries(attributes)
        ],
    )


def _entries(text: str) -> Iterator[tuple[str, str, str, bool]]:
    """(name, type, shape, whether it may be left out) of each of "padding? bool [B,L], scale float"."""
    for entry in filter(None, text.split(", ")):
        name, type_, *shape = entry.split()
        yield name.rstrip("?"), type_, "".join(shape), name.endswith("?")


def translations(values: Any, opset: int) -> dict[str, Callable[..., Any]]:
    """One node for each op. torch's exporter takes annotated parameters for attributes, the others for inputs.

    So tensors stay without annotations, and mypy is told not to ask for them (no-untyped-def).
    """
    ops, standard = values.Opset(DOMAIN, DOMAIN_VERSION), values.Opset("", opset)

    def in_float32(sink_logits: Any) -> list[Any]:
        return [] if sink_logits is None else [standard.Cast(sink_logits, to=1)]

    def score(  # type: ignore[no-untyped-def]
        query, key, padding, scale: float, window: int, pool: int, reduce: str = "mean", sink_logits=None
    ):
        sink = in_float32(sink_logits)
        return ops.Score(query, key, padding, *sink, scale=scale, window=window, pool=pool, reduce=reduce)

    def budget(scores, coverage: float, keep_ratio: float, min_tokens: int):  # type: ignore[no-untyped-def]
        if keep_ratio is None:
            return ops.Budget(scores, coverage=coverage, min_tokens=min_tokens)
        share = KeepRatio(keep_ratio).fraction  # a float attribute has too few digits for an exact ceiling
        return ops.Budget(scores, keep_numerator=share.numerator, keep_denominator=share.denominator, min_tokens=min_tokens)

    def select(scores, count, capacity):  # type: ignore[no-untyped-def]
        return ops.Select(scores, capacity, count)

    def compress(query, key, value, indices, count):  # type: ignore[no-untyped-def]
        return ops.CompressRows(query, key, value, indices, count)

    def attend(  # type: ignore[no-untyped-def]
        query, key, value, count, scale: float, kernel: str, sink_logits=None
    ):
        named = {} if kernel in CAUSAL_KERNELS else {"kernel": kernel}
        return ops.Attend(query, key, value, count, *in_float32(sink_logits), scale=scale, **named)

    def attend_lse(query, key, value, count, scale: float, kernel: str):  # type: ignore[no-untyped-def]
        named = {} if kernel in CAUSAL_KERNELS else {"kernel": kernel}
        return ops.AttendLse(query, key, value, count, scale=scale, **named)

    def merge_floor(  # type: ignore[no-untyped-def]
        query, key, value, compressed, lse, indices, count, padding, scale: float, window: int, sinks: int,
        sink_logits=None,
    ):  # fmt: skip
        rows = (query, key, value, compressed, lse, indices, count, padding, *in_float32(sink_logits))
        return ops.MergeFloor(*rows, scale=scale, window=window, sinks=sinks)

    def decompress(compressed, indices, count, seq_len):  # type: ignore[no-untyped-def]
        return ops.DecompressRows(compressed, indices, seq_len, count)

    def padded_attention(  # type: ignore[no-untyped-def]
        query, key, value, padding, valid_ranges, scale: float, mean_rows: bool, sink_logits=None
    ):
        sink = in_float32(sink_logits)
        return ops.PaddedAttention(query, key, value, padding, *sink, scale=scale, mean_rows=int(mean_rows))

    forms = (score, budget, select, compress, attend, attend_lse, merge_floor, decompress, padded_attention)
    return {form.__name__: form for form in forms}
