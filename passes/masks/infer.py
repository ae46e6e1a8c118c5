"""What a mask means, inferred from the graph that builds it.

    before   arange, <=, &, x[b, kv], expand, where ...  ->  [B, 1, L, L] tensor   (its meaning is not known)
    after    MaskInfo(kind=CAUSAL_PADDING, padding=attention_mask[b, kv] != 0)

The mask is evaluated at the symbolic position (b, h, q, kv) (`symbolic.py`), which gives a formula of what is allowed
(`predicate.py`). Its conjunctive normal form is then read clause by clause: `kv <= q` makes it causal (behind a cache
`kv <= q + Lk - Lq`), clauses without q and h are padding, `kv > q - W` is a sliding window. Whatever is left
unread makes the mask opaque. Nothing is assumed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from sympy.logic.inference import satisfiable
from torch.fx import GraphModule
from torch.utils._sympy.value_ranges import bound_sympy

from tsa_compile.passes.aten import AtenGraph
from tsa_compile.passes.base import Pass, PassResult
from tsa_compile.passes.call import AttentionCall, MaskTerm
from tsa_compile.passes.graph import expr_of, fake, known
from tsa_compile.passes.masks import symbolic_indexing, symbolic_ops, symbolic_views
from tsa_compile.passes.masks.info import CAUSAL_KINDS, FILLED_KINDS, MaskInfo, MaskKind
from tsa_compile.passes.masks.predicate import KV, Atom, Atoms, B, H, Q
from tsa_compile.passes.masks.symbolic import (
    MAX_ATOMS,
    MODERATE,
    Evaluator,
    NotUnderstood,
    Unsupported,
    as_number,
    exact,
    is_distance,
    round_constant,
)
from tsa_compile.passes.padding import unwritable

_RULE_MODULES = (symbolic_ops, symbolic_views, symbolic_indexing)  # importing them registers the rules
_WITH_PADDING = (MaskKind.CAUSAL_PADDING, MaskKind.FILLED_PADDING, MaskKind.PADDING, MaskKind.SLIDING_WINDOW)
_LOWEST = exact(torch.finfo(torch.bfloat16).min)


class InferMasks(Pass):
    """Infers what each call's mask means; calls that share a mask share the work."""

    def call(self, graph_module: GraphModule) -> PassResult:
        shared: dict[Any, Any] = {}
        for plan in self.state.plans:
            call = plan.call
            if call.problem is not None:
                continue
            with self.state.attempt(plan, graph_module.graph, "mask inference"):
                shapes = (tuple(fake(call.query).shape), fake(call.key).shape[2])
                key = (call.form, call.masks, str(call.is_causal), str(shapes), call.sink_logits is None)
                if key not in shared:
                    shared[key] = infer_mask(call)
                plan.mask = still_held(shared[key], call)
        return self.result(graph_module, len(shared), modified=False)


def infer_mask(call: AttentionCall) -> MaskInfo:
    """The meaning of everything that masks a call: `is_causal` and each mask term."""
    query, key = fake(call.query), fake(call.key)
    sizes = {B: query.shape[0], H: query.shape[1], Q: query.shape[2], KV: key.shape[2]}
    atoms = Atoms({symbol: expr_of(extent) for symbol, extent in sizes.items()}, _upper_bound(query))
    evaluator = Evaluator(atoms)
    try:
        allowed, hidden, absorbing = sympy.true, set[sympy.Expr](), True
        for term in reversed(call.masks):  # as they are applied
            term_allowed, values = _allowed(evaluator, term)
            if term.role == "bias":  # what two masks hide gets both values
                absorbing = absorbing and all(value <= _LOWEST for value in values)
                values |= {round_constant(old + new, term.dtype) for old in hidden for new in values}
            allowed, hidden = sympy.And(allowed, term_allowed), hidden | values
    except (Unsupported, NotUnderstood, RecursionError) as reason:
        return MaskInfo(MaskKind.OPAQUE, detail=str(reason) or "it is built in too many steps")
    if call.is_causal is True:  # upper-left alignment
        allowed = sympy.And(allowed, atoms.le(KV, Q))
    elif call.is_causal is not False:
        return MaskInfo(MaskKind.OPAQUE, detail="is_causal is computed by the graph")
    large = next((symbol for symbol in evaluator.moderate if not _is_moderate(symbol, call)), None)
    if large is not None:
        return MaskInfo(MaskKind.OPAQUE, detail=f"{large} may be too large for the integers that it is computed with")
    info = _classify(allowed, atoms, evaluator, hidden, absorbing, call.aten)
    if call.sink_logits is not None:  # what is hidden has no weight beside it, so a row that sees nothing is 0
        return replace(info, mean_rows=False)
    return replace(info, nan_rows=call.form == "eager" and -sympy.oo in hidden and _may_hide_all(info))


def _is_moderate(symbol: sympy.Symbol, call: AttentionCall) -> bool:
    """Whether a symbol is a size, or a moderate number. Of a number that is given to the graph this becomes a guard."""
    if symbol in call.aten.extents:
        return True
    number = call.aten.scalars.get(str(symbol))
    size = None if number is None else fake(number)
    if size is None or (size.node.hint is None and not known(abs(size) < MODERATE)):
        return False
    return bool(abs(size) < MODERATE)


def _may_hide_all(info: MaskInfo) -> bool:
    """Whether a causal mask may hide every key from a row. Without padding, row 0 of `kv <= q + offset` sees key 0."""
    return info.padding is not None or info.positions is not None or info.offset.is_nonnegative is not True


def still_held(info: MaskInfo, call: AttentionCall) -> MaskInfo:
    """What a mask means to a call: what its padding reads must still be in the graph where the call stands."""
    if info.kind is MaskKind.SLIDING_WINDOW:
        held = all(call.aten.source(value, call.node) is not None for value in info.leaves.values())
        return info if held else replace(info, window=None)
    if info.kind not in CAUSAL_KINDS or info.kind is MaskKind.CAUSAL:
        return info
    for name, value in info.leaves.items():
        if call.aten.source(value, call.node) is None:
            return MaskInfo(MaskKind.OPAQUE, detail=f"it reads {name}, which has been written to since")
    missing = sorted(str(symbol) for symbol in info.offset.free_symbols if call.aten.number(str(symbol), call.node) is None)
    if missing:
        return MaskInfo(MaskKind.OPAQUE, detail=f"{info.detail}, and {missing[0]} is no value of the graph")
    return info


def _upper_bound(tensor: torch.Tensor) -> Any:
    """A function that bounds an expression in shape symbols, from the ranges that the graph's ShapeEnv knows."""
    symbolic: Any = next((extent for extent in tensor.shape if isinstance(extent, torch.SymInt)), None)
    ranges = symbolic.node.shape_env.var_to_range if symbolic is not None else {}

    def upper(expr: sympy.Expr) -> sympy.Expr:
        if any(symbol not in ranges for symbol in expr.free_symbols):
            return sympy.oo
        return bound_sympy(expr, ranges).upper

    return upper


def _allowed(evaluator: Evaluator, term: MaskTerm) -> tuple[Boolean, set[sympy.Expr]]:
    """Where a mask term lets a score through, and the values that it puts in place of the others."""
    shape = tuple(fake(term.mask).shape)
    position = (B, H, Q, KV)[4 - len(shape) :]
    index = tuple(sympy.Integer(0) if known(extent == 1) else i for extent, i in zip(shape, position, strict=True))
    if term.role != "bias":
        formula = evaluator.formula(term.mask, index)
        value = _hidden_value(term.fill, term.dtype)
        return (formula if term.role == "keep" else sympy.Not(formula)), {value}
    allowed, hidden = sympy.false, set()
    for condition, number in as_number(evaluator.element(term.mask, index)):
        if number == 0:
            allowed = sympy.Or(allowed, condition)
        elif satisfiable(condition) is not False:
            hidden.add(_hidden_value(number, term.dtype))
    return allowed, hidden


def _hidden_value(number: Any, dtype: torch.dtype) -> sympy.Expr:
    """A masking value: only -inf and bfloat16's lowest number (-3.4e38), which adding a score does not even move, hide
    for certain. A score in float16 can be as low as that type's lowest number.
    """
    value = exact(number) if isinstance(number, float) else number
    if not value.is_number:
        raise Unsupported(f"adds {value}, which is not constant")
    value = round_constant(value, dtype)
    if value > _LOWEST:
        raise Unsupported(f"adds {value}, which need not hide a score")
    return value


def _classify(
    allowed: Boolean, atoms: Atoms, evaluator: Evaluator, hidden: set[sympy.Expr], absorbing: bool, graph: AtenGraph
) -> MaskInfo:
    """Reads a formula. `hidden` are the values of hidden scores; `absorbing`: a score adds nothing to them."""
    if len(allowed.free_symbols) > MAX_ATOMS:
        return MaskInfo(MaskKind.OPAQUE, detail=f"depends on {len(allowed.free_symbols)} conditions")
    normal = sympy.to_cnf(sympy.simplify_logic(allowed, form="cnf"))
    reading = _Reading(atoms.table, sympy.expand(atoms.sizes[KV] - atoms.sizes[Q]))
    for clause in sympy.And.make_args(normal):
        reading.read(clause)
    kind, detail = reading.verdict()
    padding = sympy.And(*reading.padding) if kind in _WITH_PADDING and reading.padding else None
    causal = kind in CAUSAL_KINDS and kind is not MaskKind.CAUSAL
    window, unknown = reading.window(kind), None
    if (causal or padding is not None) and (len(hidden) > 1 or not absorbing):  # a fully masked row depends on the values
        unknown = "hides scores with different values"
    if (causal or window is not None) and padding is not None:
        obstacle = unwritable(padding, atoms.table, evaluator.leaves, (atoms.sizes[B], atoms.sizes[KV]))
        unknown = f"its padding {obstacle}" if obstacle is not None else unknown
    if unknown is not None:
        window, (kind, detail) = None, (MaskKind.OPAQUE, unknown) if causal else (kind, detail)
    positions = reading.positions(kind)
    if positions is not None and fake(evaluator.leaves[positions]).dtype != torch.int64:
        kind, detail, positions = MaskKind.OPAQUE, f"bounded by {positions}, which is no int64", None
    leaves = {name: evaluator.leaves[name] for name in sorted(_leaves_of(normal, atoms))}
    mean_rows = bool(hidden) and -sympy.oo not in hidden
    places = None if positions is not None else Q + (reading.offset if kind in FILLED_KINDS else reading.past)
    fixed = padding is not None and not all(
        any(graph.inputs_behind(leaves[name]) for name in _leaves_of(clause, atoms)) or _holds_at(clause, atoms, places)
        for clause in reading.padding
    )
    return MaskInfo(
        kind, normal, padding, fixed, atoms.table, leaves, mean_rows, False, positions, reading.offset, window, detail
    )


def _leaves_of(formula: Boolean, atoms: Atoms) -> set[str]:
    """The names of the recorded values that a formula reads."""
    calls = (call for symbol in formula.free_symbols for call in atoms.table[symbol].expr.atoms(AppliedUndef))
    return {call.func.__name__ for call in calls}


def _holds_at(clause: Boolean, atoms: Atoms, places: sympy.Expr | None) -> bool:
    """Whether a clause hides no query's own key. `places`: the queries' positions among the keys; None: not known."""
    if places is None:
        return False
    bounds = {symbol: atoms.table[symbol] for symbol in clause.free_symbols if atoms.table[symbol].kind == "le"}
    at_places = {symbol: atoms.le(atom.expr.subs(KV, places), sympy.Integer(0)) for symbol, atom in bounds.items()}
    return clause.subs(at_places) == sympy.true


class _Reading:
    """Reads a conjunctive normal form clause by clause and remembers what each was.

    `past`: Lk - Lq, how many keys lie before the queries. The position of query q among the keys is q + past.
    """

    def __init__(self, table: dict[sympy.Symbol, Atom], past: sympy.Expr) -> None:
        self.table, self.past = table, past
        self.padding: list[Boolean] = []
        self.upper: list[sympy.Expr] = []  # kv - q <= upper
        self.lower: list[sympy.Expr] = []  # kv - q >= lower
        self.given: list[str] = []  # kv <= name(q)
        self.offset: sympy.Expr = sympy.Integer(0)  # kv <= q + offset, where that is neither of the two alignments
        self.kinds: list[MaskKind] = []
        self.unread: list[str] = []

    def read(self, clause: Boolean) -> None:
        if clause == sympy.true:
            return
        literals = sorted(sympy.Or.make_args(clause), key=str)
        exprs = [self.table[symbol].expr for symbol in clause.free_symbols]
        if clause != sympy.false and not any(expr.has(Q, H) for expr in exprs):
            self.padding.append(clause)
        elif len(literals) != 1 or not literals[0].free_symbols:
            self.unread.append(str(clause))
        else:
            self._read_literal(literals[0], exprs[0])

    def _read_literal(self, literal: Boolean, expr: sympy.Expr) -> None:
        negated = isinstance(literal, sympy.Not)
        kind = self.table[next(iter(literal.free_symbols))].kind
        offset = sympy.expand(expr - KV + Q) if kind == "le" else expr
        if kind == "le" and not offset.has(KV, Q, H, B, AppliedUndef):
            (self.lower if negated else self.upper).append(1 - offset if negated else -offset)
        elif kind == "le" and not negated and _is_given_to_queries(expr):
            self.given.append((KV - expr).func.__name__)
        elif kind == "eq" and not negated and expr.has(sympy.floor) and expr.has(Q, KV):
            self.kinds.append(MaskKind.CHUNKED)
        elif not negated and _compares_documents(expr):
            self.kinds.append(MaskKind.PACKED)
        else:
            self.unread.append(str(literal))

    def verdict(self) -> tuple[MaskKind, str]:
        """What the whole mask is."""
        if self.unread:
            return MaskKind.OPAQUE, self.unread[0]
        if self.given:
            alone = len(self.given) == 1 and not (self.upper or self.lower or self.kinds)
            kind = MaskKind.FILLED_PADDING if self.padding else MaskKind.FILLED
            return (kind, "") if alone else (MaskKind.OPAQUE, f"bounded by {', '.join(self.given)} and by more")
        kind, detail = self._band(self.past, "behind a cache" if self.past != 0 else "")
        if kind is MaskKind.OPAQUE and self.past != 0:  # positions of queries may count from the first key on
            kind, detail = self._band(sympy.Integer(0), "")
            if kind in (MaskKind.CAUSAL, MaskKind.CAUSAL_PADDING):
                return (MaskKind.FILLED_PADDING if self.padding else MaskKind.FILLED), ""
        alone = len(self.upper) == 1 and not (self.lower or self.kinds)
        if kind is MaskKind.OPAQUE and alone and not self.upper[0].is_number and is_distance(self.upper[0]):
            self.offset = self.upper[0]
            return (MaskKind.FILLED_PADDING if self.padding else MaskKind.FILLED), f"kv <= q + {self.offset}"
        return kind, detail

    def positions(self, kind: MaskKind) -> str | None:
        """The leaf that says up to which key queries see."""
        return self.given[0] if kind in FILLED_KINDS and self.given else None

    def window(self, kind: MaskKind) -> int | None:
        """How many tokens a row sees of a causal window up to its own position; None: it is none, or no number."""
        if kind is not MaskKind.SLIDING_WINDOW or not self.upper or not self.lower:
            return None
        upper, lower = ([sympy.expand(bound - self.past) for bound in bounds] for bounds in (self.upper, self.lower))
        if any(bound != 0 for bound in upper) or not all(bound.is_Integer for bound in lower):
            return None
        return int(1 - max(lower))

    def _band(self, past: sympy.Expr, where: str) -> tuple[MaskKind, str]:
        """The kind, if query q is at position q + past. Several bounds on kv - (q + past): only one at zero is causal."""
        upper, lower = ([sympy.expand(bound - past) for bound in bounds] for bounds in (self.upper, self.lower))
        causal = any(bound == 0 for bound in upper) and all(_at_least_zero(bound) for bound in upper)
        band = all(_at_least_zero(bound) for bound in upper) and all(_at_least_zero(-bound) for bound in lower)
        query = f"q + {past}" if past != 0 else "q"
        said = " and ".join(
            [f"kv <= {query}" + (f" + {bound}" if bound != 0 else "") for bound in upper]
            + [f"kv >= {query} - {-bound}" for bound in lower]
        )
        if len(upper) == len(lower) == 1 and not upper[0].is_number and sympy.expand(upper[0] - lower[0]).is_nonnegative:
            width = sympy.expand(upper[0] - lower[0]) + 1  # in a cache that holds no more, wherever that begins
            return MaskKind.SLIDING_WINDOW, f"{width} keys, as many as the cache holds before the queries"
        if not band or (bool(upper) != bool(lower) and not causal):
            return MaskKind.OPAQUE, said
        if self.kinds:
            return self.kinds[0], ""
        if lower:
            return MaskKind.SLIDING_WINDOW, said
        if causal:
            return (MaskKind.CAUSAL_PADDING if self.padding else MaskKind.CAUSAL), where
        return (MaskKind.PADDING if self.padding else MaskKind.NONE), ""


def _is_given_to_queries(expr: sympy.Expr) -> bool:
    """`kv - x[q]`: a tensor says up to which key a query sees."""
    given = sympy.expand(KV - expr)
    return isinstance(given, AppliedUndef) and given.args == (Q,)


def _at_least_zero(bound: sympy.Expr) -> bool:
    return bound.is_nonnegative is True


def _compares_documents(expr: sympy.Expr) -> bool:
    """`x[b, q] - x[b, kv]`, zero or at most zero: documents that are equal, or the order of positions that are given."""
    calls = expr.atoms(AppliedUndef)
    return len(calls) == 2 and len({call.func for call in calls}) == 1
