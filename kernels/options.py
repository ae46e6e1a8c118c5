"""The numbers of the ops that are all steps of token sparse attention (fused.py), named and typed in one place.

    tsa::sparse_attention(query, key, value, [tensors of its own], *options)

The ops' schemas are made of the fields below, passes write them as arguments, and a pass that opens an op reads them again.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from tsa_compile.kernels.kept import kept_tokens


@dataclass(frozen=True)
class Options:
    """What an op is told besides tensors. See TSAConfig for what is not said here.

    Attributes:
        scale: of the products of queries and keys; in a graph perhaps a node.
        coverage, keep_ratio: one of them; the other is None.
        shared: the heads of a group share one selection.
        floor_window: with None there is no floor.
        group: the process group whose processes have the other heads.
    """

    scale: float
    window: int
    pool: int
    coverage: float | None
    keep_ratio: float | None
    min_tokens: int
    capacity: int | None
    shared: bool
    kernel: str
    floor_window: int | None = None
    floor_sinks: int = 0
    group: str | None = None
    reduce: str = "mean"

    def arguments(self) -> tuple[Any, ...]:
        """As an op takes them, without defaults at the end."""
        given = [(getattr(self, field.name), field.default) for field in fields(self)]
        while given[-1][1] is not MISSING and given[-1][0] == given[-1][1]:
            given.pop()
        return tuple(value for value, _ in given)

    def kept(self, valid: int, rows: int) -> int | None:
        """How many of an item's valid tokens are kept, if that follows from their number and that of those with a query."""
        kept = kept_tokens(valid, min(self.window, rows), self.coverage, self.keep_ratio, self.min_tokens)
        return kept if kept is None or self.capacity is None else min(kept, self.capacity)

    def limit(self, seq_len: int) -> int:
        """No item keeps more than this."""
        return seq_len if self.capacity is None else min(seq_len, self.capacity)
