"""The stages of a sparse layer one by one: their calls, checks, and what each has to do at least.

Bytes are those that must come from or go to device memory: what is read again is found in the L2 cache. A multiply-add
is two operations. B items, H query heads, G key heads, L tokens, n of them kept, D the head size, e bytes an element, W
the scoring window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from attention_checks import check_budget, check_compress, check_decompress, check_output, check_score, check_select
from attention_methods import FLOOR, MIN_TOKENS, POOL, SCORE, WINDOW, Inputs, kept, marked, scored, tsa
from torch import Tensor

COPY, MATMUL, ATTENTION = 4.24e12, 750e12, 600e12
"""Ceilings measured on an H200: bytes a second of a copy, read plus written; operations a second of a bfloat16 product,
and of causal attention by cuDNN."""
COVERAGE = 0.005


@dataclass(frozen=True)
class Work:
    """What a stage does at least, and the ceilings (per second) that it is held against.

    `counted` says which of the two is its rate: "TB/s" or "TFLOP/s".
    """

    bytes: float
    flops: float
    counted: str
    flops_ceiling: float = MATMUL

    @property
    def ceiling(self) -> float:
        """In units of `counted`."""
        return (COPY if self.counted == "TB/s" else self.flops_ceiling) / 1e12

    @property
    def least_ms(self) -> float:
        """No implementation is faster."""
        return 1e3 * max(self.bytes / COPY, self.flops / self.flops_ceiling)

    def rate(self, ms: float) -> float:
        """Achieved, in units of `counted`."""
        return (self.bytes if self.counted == "TB/s" else self.flops) / (ms * 1e9)


@dataclass(frozen=True)
class Sizes:
    """The sizes that the work follows from."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    rows: int
    head_dim: int
    item: int
    distinct: int = 0
    """Rows of key, all key heads together, that at least one head of the group selected."""


def score_work(s: Sizes) -> Work:
    """Flops: W logits for each token and head, computed twice (statistics, then weights): 2 x 2 W L D a head.
    Bytes: key in both passes, 2 G L D e, though the second may find some of it in the cache; scores written, 4 H L."""
    flops = 4.0 * WINDOW * s.length * s.head_dim * s.heads * s.batch
    return Work(s.batch * s.length * (2 * s.kv_heads * s.head_dim * s.item + 4 * s.heads), flops, "TFLOP/s")


def budget_work(s: Sizes) -> Work:
    """Bytes: scores read, 4 H L, and their mean over the heads written, 4 L, which the passes over it find in the cache."""
    return Work(4.0 * s.batch * s.length * (s.heads + 1), 0, "TB/s")


def select_work(s: Sizes) -> Work:
    """Bytes: scores read once, 4 H L, and indices written, 4 H n."""
    return Work(4.0 * s.batch * s.heads * (s.length + s.rows), 0, "TB/s")


def compress_work(s: Sizes) -> Work:
    """Bytes: H n rows of query read and written, H n rows of key and of value written, and those rows of key and value
    that any head of a group selected read once, `distinct` each; indices read, 4 H n."""
    selected = s.batch * s.heads * s.rows
    return Work(s.head_dim * s.item * (4.0 * selected + 2.0 * s.distinct) + 4.0 * selected, 0, "TB/s")


def attend_work(s: Sizes) -> Work:
    """Flops: n^2 / 2 pairs a head, each 2 D for the logit and 2 D for the value: 2 n^2 D a head.
    Bytes: query, key, value (H heads each) and the output, 4 H n D e; log-sum-exp written, 4 H n."""
    bytes_ = s.batch * s.heads * s.rows * (4.0 * s.head_dim * s.item + 4)
    return Work(bytes_, attention_flops(s), "TFLOP/s", ATTENTION)


def attention_flops(s: Sizes) -> float:
    """Of causal attention over `rows`: 2 B H n^2 D."""
    return 2.0 * s.batch * s.heads * s.rows**2 * s.head_dim


def floor_work(s: Sizes) -> Work:
    """Flops: every row's window and sinks, each 2 D for the logit and 2 D for the value: 4 H L (window + sinks) D.
    Bytes: query and output, 2 H L D e, key and value once, 2 G L D e, compressed rows, H n D e; log-sum-exp and indices
    read, 8 H n."""
    flops = 4.0 * s.batch * s.heads * s.length * (FLOOR.window + FLOOR.sinks) * s.head_dim
    rows = 2 * (s.heads + s.kv_heads) * s.length + s.heads * s.rows
    return Work(s.batch * (rows * s.head_dim * s.item + 8.0 * s.heads * s.rows), flops, "TFLOP/s", ATTENTION)


def decompress_work(s: Sizes) -> Work:
    """Bytes: n rows read and L rows written for each head, H (n + L) D e; indices read, 4 H n."""
    return Work(s.batch * s.heads * ((s.rows + s.length) * s.head_dim * s.item + 4.0 * s.rows), 0, "TB/s")


def distinct_rows(indices: Tensor, kv_heads: int, length: int) -> int:
    """Rows of key that the heads of a group select together, summed over items and key heads."""
    grouped = indices.unflatten(1, (kv_heads, -1)).flatten(2).long()
    return int(torch.zeros(*grouped.shape[:2], length, device=indices.device).scatter_(2, grouped, 1.0).sum())


@dataclass(frozen=True)
class Stage:
    """A stage over the results of those before it."""

    name: str
    work: Work
    call: Callable[[], Any]
    check: Callable[[], float]


def stages(inputs: Inputs, keep: float) -> list[Stage]:
    """The six stages with KeepRatio(keep), budget as Coverage calls it; and decompress, which is there without a floor."""
    query, key, value = inputs.tensors
    batch, heads, length, dim = query.shape
    scores = scored(inputs)
    indices = tsa.select(scores, None, kept(length, keep))
    rows = tsa.compress(query, key, value, indices, None)
    distinct = distinct_rows(indices, key.shape[1], length)
    s = Sizes(batch, heads, key.shape[1], length, indices.shape[2], dim, query.element_size(), distinct)

    def budget() -> Tensor:
        return tsa.budget(scores, COVERAGE, None, MIN_TOKENS)

    return [
        Stage(
            "score", score_work(s), lambda: scored(inputs),
            lambda: check_score(query, key, scores, inputs.scale, WINDOW, POOL, SCORE),
        ),
        Stage(
            f"budget, Coverage({COVERAGE})", budget_work(s), budget,
            lambda: check_budget(scores, budget(), COVERAGE, MIN_TOKENS),
        ),
        Stage(
            "select", select_work(s), lambda: tsa.select(scores, None, s.rows), lambda: check_select(scores, indices)
        ),
        Stage(
            "compress", compress_work(s), lambda: tsa.compress(query, key, value, indices, None),
            lambda: check_compress(inputs.tensors, indices, rows),
        ),
        *last_stages(inputs, s, indices, rows),
    ]  # fmt: skip


def last_stages(inputs: Inputs, s: Sizes, indices: Tensor, rows: tuple[Tensor, Tensor, Tensor]) -> list[Stage]:
    """Attention over the rows that the indices chose, and the floor; and what is in the floor's place without one."""
    out, lse = tsa.attend_lse(*rows, None, inputs.scale, "auto")

    def floor() -> Tensor:
        near = (inputs.scale, FLOOR.window, FLOOR.sinks)
        return tsa.merge_floor(*inputs.tensors, out, lse, indices, None, None, *near)

    def decompress() -> Tensor:
        return tsa.decompress(out, indices, None, s.length)

    def check_floor() -> float:
        return check_output(*inputs.tensors, floor(), inputs.scale, "floor", marked(indices, s.length), FLOOR)

    return [
        Stage(
            "attend", attend_work(s), lambda: tsa.attend_lse(*rows, None, inputs.scale, "auto"),
            lambda: check_output(*rows, out, inputs.scale, "attend"),
        ),
        Stage("floor", floor_work(s), floor, check_floor),
        Stage(
            "decompress, in the floor's place", decompress_work(s), decompress,
            lambda: check_decompress(out, indices, decompress()),
        ),
    ]  # fmt: skip
