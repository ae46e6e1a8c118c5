"""The plugins of the scores: the launches of kernels/score.py, one plugin each.

    tsa_trt::score_window_... (rank, padding, slots) -> rows int32 [B, W], where there is padding
    tsa_trt::score_stats_...  (room, query, key, padding, rank, rows) -> partial [B, H, S, W]
    tsa_trt::score_rows_...   (partial, query, rank) -> row_lse [B, H, W]
    tsa_trt::score_mean_...   (row_lse, query, key, padding, rank, rows) -> raw [B, H, L]
    tsa_trt::score_pool_...   (raw, padding, rank) -> scores [B, H, L]

All that is computed is float32, whatever query and key are, since a float32 tensor comes first: `room` [S, W], which is
never read, gives the first of them its dtype and its sizes. padding and rank (how many tokens are valid up to each one) are
int32 [B, L]; without padding they and the rows are one element that is never read. The number of splits is constant:
those behind the end of a short sequence are empty, and weigh nothing.

Beside its inputs and outputs a layer holds partial (0.5 MB at 32 heads, W = 128) and raw (16 MB at L = 128K), where the
standard form holds [B, H, 32, L]. What a plugin may be: _trt_describe.py.
"""

# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tsa_compile.export._trt_describe import NAMESPACE, Axis, Plugin, kind_of, power_of_2, signature
from tsa_compile.kernels.launch import cdiv, tl, triton
from tsa_compile.kernels.score import (
    MIN_SPLIT,
    SPLITS,
    _column_mean_kernel,
    _combine_kernel,
    _pool_kernel,
    _row_stats_kernel,
    _window_rows_kernel,
)

_SPLITS, _MIN_SPLIT = tl.constexpr(SPLITS), tl.constexpr(MIN_SPLIT)
_TILE_BYTES = 32 * 1024  # of queries and keys in shared memory; the rest of MAX_SHARED is for what Triton exchanges there
_BLOCK = 1024


@triton.jit(do_not_specialize=["seq_len"])
def _window_plugin(p_rank, p_padding, p_slots, seq_len, p_rows, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """_window_rows_kernel; the slots are there for their number alone."""
    _window_rows_kernel(p_padding, p_rank, p_rows, seq_len, WINDOW, BLOCK)


@triton.jit(do_not_specialize=["seq_len"])
def _stats_plugin(
    p_room, p_query, p_key, p_padding, p_rank, p_rows, seq_len, p_partial,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SCALE_LOG2: tl.constexpr,
    PADDED: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """_row_stats_kernel on dense tensors."""
    head = seq_len.to(tl.int64) * DIM
    split_len = tl.cdiv(tl.maximum(tl.cdiv(seq_len, _SPLITS), _MIN_SPLIT), BLOCK_N) * BLOCK_N
    _row_stats_kernel(
        p_query, p_key, p_padding, p_rank, p_rows, p_partial, HEADS * head, head, DIM, KV_HEADS * head, head, DIM,
        SCALE_LOG2, seq_len, WINDOW, split_len, HEADS, HEADS // KV_HEADS, PADDED, DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seq_len"])
def _rows_plugin(
    p_partial, p_query, p_rank, seq_len, p_row_lse,
    HEADS: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """_combine_kernel; the queries are there for their number alone."""
    _combine_kernel(p_partial, p_rank, p_row_lse, seq_len, WINDOW, HEADS, _SPLITS, PADDED, _SPLITS, BLOCK_M)


@triton.jit(do_not_specialize=["seq_len"])
def _mean_plugin(
    p_row_lse, p_query, p_key, p_padding, p_rank, p_rows, seq_len, p_raw,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SCALE_LOG2: tl.constexpr,
    PADDED: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """_column_mean_kernel on dense tensors."""
    head = seq_len.to(tl.int64) * DIM
    _column_mean_kernel(
        p_query, p_key, p_padding, p_rank, p_rows, p_row_lse, p_raw, HEADS * head, head, DIM, KV_HEADS * head, head, DIM,
        SCALE_LOG2, seq_len, WINDOW, HEADS, HEADS // KV_HEADS, PADDED, DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seq_len"])
def _pool_plugin(
    p_raw, p_padding, p_rank, seq_len, p_scores,
    HEADS: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """_pool_kernel."""
    _pool_kernel(p_raw, p_padding, p_rank, p_scores, seq_len, WINDOW, HEADS, PADDED, POOL, BLOCK)


def score_plugins(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, scale: float, window: int, pool: int, padded: bool
) -> dict[str, Plugin]:
    """The plugins "window" (with padding), "stats", "rows", "mean" and "pool"; KernelError for a dtype without kernels."""
    products = stats_plugin, mean_plugin
    made = {
        name: make(heads, kv_heads, dim, dtype, scale, window, padded) for name, make in zip(("stats", "mean"), products)
    }
    made["rows"] = rows_plugin(heads, dtype, window, padded)
    made["pool"] = pool_plugin(heads, window, pool, padded)
    return {**made, "window": window_plugin(window)} if padded else made


def score(
    ops: Callable[[str], Callable[..., Tensor]],
    query: Tensor,
    key: Tensor,
    padding: Tensor | None,
    rank: Tensor | None,
    window: int,
) -> Tensor:
    """`tsa::score` by `ops`, from a plugin's name to its op. rank [B, L] counts the valid tokens."""
    nothing = torch.zeros(1, dtype=torch.int32, device=query.device)
    mask, rows = nothing, nothing
    if padding is None or rank is None:
        rank = nothing
    else:
        mask, rank = padding.to(torch.int32), rank.to(torch.int32)
        rows = ops("window")(rank, mask, torch.zeros(window, dtype=torch.int32, device=query.device))
    room = torch.zeros((SPLITS, window), dtype=torch.float32, device=query.device)
    row_lse = ops("rows")(ops("stats")(room, query, key, mask, rank, rows), query, rank)
    return ops("pool")(ops("mean")(row_lse, query, key, mask, rank, rows), mask, rank)


def window_plugin(window: int) -> Plugin:
    """Positions of the window's rows; without a row, a slot is left as it is."""

    def fake(rank: Tensor, padding: Tensor, slots: Tensor) -> Tensor:
        return rank.new_empty(rank.shape[0], slots.shape[0])

    def eager(rank: Tensor, padding: Tensor, slots: Tensor) -> Tensor:
        candidates, _ = _counts(rank, rank.shape[1], window, True)
        wanted = candidates + 1 + torch.arange(window, device=rank.device)
        found = torch.searchsorted(rank.contiguous(), wanted.to(torch.int32).contiguous())
        return found.clamp(max=rank.shape[1] - 1).to(torch.int32)

    return Plugin(
        f"{NAMESPACE}::score_window_w{window}",
        "(Tensor rank, Tensor padding, Tensor slots) -> Tensor",
        _window_plugin,
        signature(("*i32", "p_rank p_padding p_slots"), ("i32", "seq_len"), ("*i32", "p_rows")),
        (("WINDOW", window), ("BLOCK", _BLOCK)),
        sizes=((0, 1),),
        grid=(Axis((0, 1), _BLOCK), Axis((0, 0)), 1),
        fake=fake,
        eager=eager,
    )


def stats_plugin(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, scale: float, window: int, padded: bool
) -> Plugin:  # fmt: skip
    """Per split of the keys, the log2-sum-exp of each row of the window."""
    constants = _product_constants(heads, kv_heads, dim, dtype, scale, window, padded)

    def fake(room: Tensor, query: Tensor, key: Tensor, padding: Tensor, rank: Tensor, rows: Tensor) -> Tensor:
        return room.new_empty(*query.shape[:2], *room.shape)

    def eager(room: Tensor, query: Tensor, key: Tensor, padding: Tensor, rank: Tensor, rows: Tensor) -> Tensor:
        seq_len = query.shape[2]
        rows = rows if padded else _last_rows(query, window)
        allowed = torch.arange(seq_len, device=query.device) <= rows[:, :, None]
        if padded:
            allowed = allowed & (padding != 0)[:, None]
        logits = _logits(query, key, rows, scale).masked_fill(~allowed[:, None], -math.inf)
        block = int(constants["BLOCK_N"])
        split_len = cdiv(max(cdiv(seq_len, SPLITS), MIN_SPLIT), block) * block
        logits = F.pad(logits, (0, SPLITS * split_len - seq_len), value=-math.inf)
        return _log2_sum(logits.unflatten(3, (SPLITS, split_len)), 4).transpose(2, 3).contiguous()

    return Plugin(
        _product_name("stats", heads, kv_heads, dim, dtype, scale, window, padded),
        "(Tensor room, Tensor query, Tensor key, Tensor padding, Tensor rank, Tensor rows) -> Tensor",
        _stats_plugin,
        signature(
            ("*fp32", "p_room"), (f"*{kind_of(dtype)}", "p_query p_key"), ("*i32", "p_padding p_rank p_rows"),
            ("i32", "seq_len"), ("*fp32", "p_partial"),
        ),
        tuple(constants.items()),
        sizes=((1, 2),),
        grid=(heads * cdiv(window, int(constants["BLOCK_M"])), SPLITS, Axis((1, 0))),
        fake=fake,
        eager=eager,
    )  # fmt: skip


def rows_plugin(heads: int, dtype: torch.dtype, window: int, padded: bool) -> Plugin:
    """The splits of a row become its log2-sum-exp; +inf in slots without a row."""

    def fake(partial: Tensor, query: Tensor, rank: Tensor) -> Tensor:
        return partial.new_empty(partial.shape[0], partial.shape[1], partial.shape[3])

    def eager(partial: Tensor, query: Tensor, rank: Tensor) -> Tensor:
        _, rows = _counts(rank, query.shape[2], window, padded)
        alive = torch.arange(window, device=partial.device) < rows
        return torch.where(alive[:, None], _log2_sum(partial, 2), math.inf)

    return Plugin(
        f"{NAMESPACE}::score_rows_h{heads}_w{window}{_suffix(padded)}_{kind_of(dtype)}",
        "(Tensor partial, Tensor query, Tensor rank) -> Tensor",
        _rows_plugin,
        signature(
            ("*fp32", "p_partial"), (f"*{kind_of(dtype)}", "p_query"), ("*i32", "p_rank"), ("i32", "seq_len"),
            ("*fp32", "p_row_lse"),
        ),
        (("HEADS", heads), ("WINDOW", window), ("PADDED", padded), ("BLOCK_M", 64)),
        sizes=((1, 2),),
        grid=(cdiv(window, 64), Axis((0, 0), times=heads), 1),
        fake=fake,
        eager=eager,
    )  # fmt: skip


def mean_plugin(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, scale: float, window: int, padded: bool
) -> Plugin:  # fmt: skip
    """The mean weight of each candidate, in the candidates' order; what lies behind them is left as it is."""
    constants = _product_constants(heads, kv_heads, dim, dtype, scale, window, padded)

    def fake(row_lse: Tensor, query: Tensor, key: Tensor, padding: Tensor, rank: Tensor, rows: Tensor) -> Tensor:
        return row_lse.new_empty(query.shape[:3])

    def eager(row_lse: Tensor, query: Tensor, key: Tensor, padding: Tensor, rank: Tensor, rows: Tensor) -> Tensor:
        seq_len = query.shape[2]
        candidates, row_count = _counts(rank, seq_len, window, padded)
        logits = _logits(query, key, rows if padded else _last_rows(query, window), scale)
        raw = torch.exp2(logits - row_lse[..., None]).sum(dim=2) / row_count.clamp(min=1)[:, None]
        if not padded:
            return raw
        # What is no candidate goes to a place of its own behind them.
        taken = (padding != 0) & (rank <= candidates)
        target = torch.where(taken, rank - 1, seq_len).to(torch.int64)[:, None].expand_as(raw)
        return raw.new_zeros((*raw.shape[:2], seq_len + 1)).scatter(2, target, raw)[..., :seq_len].contiguous()

    return Plugin(
        _product_name("mean", heads, kv_heads, dim, dtype, scale, window, padded),
        "(Tensor row_lse, Tensor query, Tensor key, Tensor padding, Tensor rank, Tensor rows) -> Tensor",
        _mean_plugin,
        signature(
            ("*fp32", "p_row_lse"), (f"*{kind_of(dtype)}", "p_query p_key"), ("*i32", "p_padding p_rank p_rows"),
            ("i32", "seq_len"), ("*fp32", "p_raw"),
        ),
        tuple(constants.items()),
        sizes=((1, 2),),
        grid=(Axis((1, 2), int(constants["BLOCK_N"])), kv_heads, Axis((1, 0))),
        fake=fake,
        eager=eager,
    )  # fmt: skip


def pool_plugin(heads: int, window: int, pool: int, padded: bool) -> Plugin:
    """Neighbouring candidates averaged, infinities placed."""

    def fake(raw: Tensor, padding: Tensor, rank: Tensor) -> Tensor:
        return raw.new_empty(raw.shape)

    def eager(raw: Tensor, padding: Tensor, rank: Tensor) -> Tensor:
        order = torch.arange(raw.shape[2], device=raw.device)
        candidates, _ = _counts(rank, raw.shape[2], window, padded)
        pooled = F.avg_pool1d(raw.masked_fill((order >= candidates)[:, None], 0.0), pool, 1, pool // 2)
        columns = (rank - 1).clamp(min=0).to(torch.int64) if padded else order[None].expand(raw.shape[0], -1)
        pooled = pooled.gather(2, columns[:, None].expand_as(raw))
        scores = pooled.masked_fill((columns >= candidates)[:, None], math.inf)
        return scores.masked_fill((padding == 0)[:, None], -math.inf) if padded else scores

    return Plugin(
        f"{NAMESPACE}::score_pool_h{heads}_w{window}_p{pool}{_suffix(padded)}",
        "(Tensor raw, Tensor padding, Tensor rank) -> Tensor",
        _pool_plugin,
        signature(("*fp32", "p_raw"), ("*i32", "p_padding p_rank"), ("i32", "seq_len"), ("*fp32", "p_scores")),
        (("HEADS", heads), ("WINDOW", window), ("PADDED", padded), ("POOL", pool), ("BLOCK", _BLOCK)),
        sizes=((0, 2),),
        grid=(Axis((0, 2), _BLOCK), Axis((0, 0), times=heads), 1),
        fake=fake,
        eager=eager,
    )


def _product_constants(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, scale: float, window: int, padded: bool
) -> dict[str, int | float]:
    block_d = max(16, power_of_2(dim))
    tile = max(16, min(64, power_of_2(_TILE_BYTES // (2 * block_d * dtype.itemsize))))
    return {
        "HEADS": heads, "KV_HEADS": kv_heads, "WINDOW": window, "SCALE_LOG2": scale * math.log2(math.e), "PADDED": padded,
        "DIM": dim, "BLOCK_D": block_d, "BLOCK_M": min(tile, max(16, power_of_2(window))), "BLOCK_N": tile,
    }  # fmt: skip


def _product_name(
    step: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, scale: float, window: int, padded: bool
) -> str:
    number = f"{scale:.9g}".replace(".", "p").replace("-", "m").replace("+", "")
    shape = f"h{heads}_g{kv_heads}_d{dim}_w{window}{_suffix(padded)}"
    return f"{NAMESPACE}::score_{step}_{shape}_{kind_of(dtype)}_by_{number}"


def _suffix(padded: bool) -> str:
    return "_padded" if padded else ""


def _counts(rank: Tensor, seq_len: int, window: int, padded: bool) -> tuple[Tensor, Tensor]:
    """Candidates and rows of the window, [B, 1] or, the same for all, [1, 1]."""
    valid = rank[:, -1:] if padded else torch.full((1, 1), seq_len, dtype=torch.int32, device=rank.device)
    rows = valid.clamp(max=window)
    return valid - rows, rows


def _last_rows(query: Tensor, window: int) -> Tensor:
    """Positions [1, W] of the window without padding, where it is longer than the sequence the last one repeated."""
    seq_len = query.shape[2]
    return (torch.arange(window, device=query.device) + max(seq_len - window, 0)).clamp(max=seq_len - 1)[None]


def _logits(query: Tensor, key: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Of the window's rows [B or 1, W], times log2 e: float32 [B, H, W, L]."""
    batch, heads, _, dim = query.shape
    index = rows.to(torch.int64)[:, None, :, None].expand(batch, heads, -1, dim)
    picked = query.gather(2, index).float().unflatten(1, (key.shape[1], -1))
    return (picked @ key.float()[:, :, None].transpose(3, 4)).flatten(1, 2) * (scale * math.log2(math.e))


def _log2_sum(exponents: Tensor, dim: int) -> Tensor:
    return torch.logsumexp(exponents * math.log(2), dim) / math.log(2)
