"""The last rows of a prompt over all of its keys: the kernels that a chunk behind a cache runs by, at what rates.

    whole prompt, cuDNN               query [1, 32, Lk, 128], key and value [1, 8, Lk, 128]: what a rate is relative to
    chunk, two cuDNN calls, merged    its last rows alone: what stays dense
    chunk, kernel="triton"            the same by the package's own kernel
    merge of two results              of those rows, by their log-sum-exp; it computes next to nothing and moves bytes
    kept rows, cuDNN                  Lk times a share of query, key and value, a key head for each query head
    kept rows of the chunk            those of them that lie in the chunk, by the kernel that the sparse path calls there

A chunk's rows differ in number from head to head; operations are those of the pairs that are seen, 4 D of each. For the last
line the cost model (tsa_compile/costs/calls.py) charges `BEHIND_RATE` of dense attention's rate. What it would have to be
for each length stands in the row as `model_rate`: what the model says at a rate of 1, over what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_checks import TOLERANCE, check_output, demand, relative_difference
from attention_methods import POOL, SCORE, WINDOW, Inputs, kept, tsa
from torch import Tensor

from tsa_compile.costs.calls import CallShape, attention_work
from tsa_compile.costs.devices import costs_of
from tsa_compile.kernels.compress import compress_behind_triton
from tsa_compile.kernels.flash import behind_triton
from tsa_compile.kernels.merge import merged
from tsa_compile.kernels.registry import get

ROWS = 8192
"""Rows of the chunk."""
WHOLE, KEPT = "whole prompt, cuDNN", "kept rows of the chunk, the sparse path's kernel"


@dataclass(frozen=True)
class Behind:
    """One method: its call, its operations and what they take by the cost model at dense attention's rate, its check."""

    name: str
    flops: float
    model_ms: float
    call: Callable[[], Tensor]
    check: Callable[[], float]


def behind_methods(inputs: Inputs, keep: float, rows: int = ROWS) -> list[Behind]:
    """All methods on one prompt, of which the last `rows` are the chunk and the share `keep` is selected."""
    query, key, value = inputs.tensors
    chunk, scale = query[:, :, -rows:], inputs.scale
    cudnn, triton = get("cudnn"), get("triton")
    assert cudnn.run_behind is not None and triton.run_behind is not None
    whole = cudnn.run(query, key, value, scale)
    parts = cudnn.run_behind(chunk, key, value, scale)

    def like_whole(call: Callable[[], Tensor], name: str) -> Callable[[], float]:
        return lambda: same(call(), whole[:, :, -rows:], name)

    def method(name: str, call: Callable[[], Tensor], count: int) -> Behind:
        return Behind(
            name, *_work(inputs, [count] * query.shape[1], query.shape[2], key.shape[1]), call, like_whole(call, name)
        )

    merge = "merge of two results"
    return [
        Behind(
            WHOLE, *_work(inputs, [query.shape[2]] * query.shape[1], query.shape[2], key.shape[1]),
            lambda: cudnn.run(query, key, value, scale), lambda: check_output(query, key, value, whole, scale, WHOLE),
        ),
        method("chunk, two cuDNN calls, merged", lambda: cudnn.run_behind(chunk, key, value, scale)[0], rows),
        method('chunk, kernel="triton"', lambda: triton.run_behind(chunk, key, value, scale)[0], rows),
        Behind(
            merge, 0.0, 0.0, lambda: merged(*parts, *parts)[0], like_whole(lambda: merged(*parts, *parts)[0], merge),
        ),
        *_kept_methods(inputs, keep, rows),
    ]  # fmt: skip


def _kept_methods(inputs: Inputs, keep: float, rows: int) -> list[Behind]:
    """Over the rows that each head selects: of the whole prompt, and of the chunk."""
    query, key, value = inputs.tensors
    scale, count = inputs.scale, kept(inputs.length, keep)
    chunk = query[:, :, -rows:]
    indices = tsa.select(tsa.score(chunk, key, None, scale, WINDOW, POOL, SCORE), None, count)
    all_rows = tsa.compress(query, key, value, indices, None)
    dense = get("cudnn")
    wanted = dense.run(*all_rows, scale)
    asked, keys, values, first = compress_behind_triton(chunk, key, value, indices, None)
    real = torch.arange(asked.shape[2], device=query.device) >= first[..., None]

    def call() -> Tensor:
        with torch.cuda.device_of(query):
            return behind_triton(asked, keys, values, None, first, scale)[0]

    def check() -> float:
        outputs = (out[:, :, -asked.shape[2] :][real] for out in (call(), wanted))
        return same(*outputs, KEPT)

    counts = (asked.shape[2] - first).flatten().tolist()
    return [
        Behind(
            "kept rows, cuDNN", *_work(inputs, [count] * query.shape[1], count, query.shape[1]),
            lambda: dense.run(*all_rows, scale), lambda: check_output(*all_rows, wanted, scale, "kept rows, cuDNN"),
        ),
        Behind(KEPT, *_work(inputs, counts, count, query.shape[1]), call, check),
    ]  # fmt: skip


def same(out: Tensor, wanted: Tensor, what: str) -> float:
    """The relative difference of two outputs.

    Raises:
        WrongOutputError: it is too large.
    """
    return demand(relative_difference(out, wanted), TOLERANCE[out.dtype], what)


def _work(inputs: Inputs, counts: list[int], keys: int, kv_heads: int) -> tuple[float, float]:
    """Operations of causal attention of each head's last `counts` rows of `keys`, and what the cost model says: ms."""
    query, value = inputs.query, inputs.value
    sizes = (query.shape[1], inputs.key.shape[1], query.shape[3], value.shape[3])
    call = CallShape(query.shape[0], *sizes, query.element_size(), WINDOW)
    pairs = sum(count * (keys - count / 2) for count in counts)
    work = attention_work(call, costs_of(query.device)[0], sum(counts) / len(counts), kv_heads, keys)
    return 2.0 * query.shape[0] * (query.shape[3] + value.shape[3]) * pairs, work.ms
