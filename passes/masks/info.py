"""`MaskInfo`: what a mask was proven to say."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import sympy
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from tsa_compile.passes.masks.predicate import Atom


class MaskKind(StrEnum):
    """The meanings that a rewrite can tell apart; only the causal ones and causal windows are rewritten."""

    NONE = "none"
    CAUSAL = "causal"  # kv <= q + Lk - Lq: of the last Lq positions each sees itself and those before it
    CAUSAL_PADDING = "causal+padding"
    FILLED = "causal (filled cache)"  # kv <= positions[q], or kv <= q < Lk: what is filled of a cache of a fixed size
    FILLED_PADDING = "causal+padding (filled cache)"
    PADDING = "padding"
    SLIDING_WINDOW = "sliding window"
    CHUNKED = "chunked"
    PACKED = "packed"
    OPAQUE = "opaque"


CAUSAL_KINDS = (MaskKind.CAUSAL, MaskKind.CAUSAL_PADDING, MaskKind.FILLED, MaskKind.FILLED_PADDING)
"""The kinds that sparse and dense rewrites know."""
FILLED_KINDS = (MaskKind.FILLED, MaskKind.FILLED_PADDING)


@dataclass(frozen=True)
class MaskInfo:
    """What a mask was proven to say.

    Attributes:
        predicate: which (b, h, q, kv) are allowed, a formula over `atoms`; None if opaque.
        padding: the part of the predicate in (b, kv) alone; None if every key is valid.
        fixed: some of the padding is computed from no input, and may hide a query's own key. It hides the same positions in
            every call, and the tokens there need not be padding: their own rows are results, which a sparse layer would
            make 0.
        leaves: the recorded values that stand in atoms as uninterpreted functions, by name.
        mean_rows: a row with no allowed key yields the mean of all values (an additive, finite mask) and not zeros.
        nan_rows: it yields NaN (minus infinity in written-out attention), which no rewrite reproduces.
        positions: of kinds FILLED and FILLED_PADDING the leaf that says up to which key each query sees; None: it is
            q + `offset`, in the graph's shape symbols.
        window: of kind SLIDING_WINDOW how many tokens a row sees, itself the last of them, where the queries are the keys'
            and the rewrite knows all that hides a token besides; None: anything else.
        detail: for a person: the window's size, or why the mask is opaque.
    """

    kind: MaskKind
    predicate: Boolean | None = None
    padding: Boolean | None = None
    fixed: bool = False
    atoms: dict[sympy.Symbol, Atom] = field(default_factory=dict)
    leaves: dict[str, Node] = field(default_factory=dict)
    mean_rows: bool = False
    nan_rows: bool = False
    positions: str | None = None
    offset: sympy.Expr = sympy.S.Zero
    window: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else str(self.kind)
