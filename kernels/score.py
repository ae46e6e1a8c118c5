"""Scores: how much attention the most recent queries pay to every earlier token.

    A[b,h,i,t]  = softmax_t(scale * <query[b,h,i], key[b,g,t]>)    i in the window, t valid and t <= i, g = h // (H/G)
    raw[b,h,t]  = mean_i A[b,h,i,t], or max_i                      t a candidate: valid and before the window
    scores      = average pooling of raw along the candidates, stride 1, zero padded, the divisor always `pool`

    query [B,H,Lq,D], key [B,G,L,D] of any strides, float16 | bfloat16 | float32; queries are those of the last Lq positions,
    all L or a chunk behind a cache, and the window is of those;
    padding bool [B,L] (True = valid) or None
    -> scores float32 [B,H,L], contiguous: +inf at the window's tokens (the last W_b = min(window, n_b) valid ones),
    -inf at invalid tokens, and at the candidates what the formula says, or NaN.

With sink_logits [H] (sink.py) the softmax has a further logit for each head, of which no score is made.

A row of the window whose softmax is NaN (a logit is NaN or +inf, or all are -inf) has weight 0, and the candidates whose own
logits in it are NaN or +inf get NaN as raw score. Their scores are NaN too, and the pooling takes them for 0. So no
computation makes a score infinite, which only the window and padding are, and NaN marks the tokens that are at fault.

On CUDA this is attention's first half, computed twice, because W x L weights are too many to keep:

    _row_stats      one program per (rows of a head, split of the keys): log2-sum-exp of its logits   -> [B,H,S,W]
    _combine        the splits of a row become its log2-sum-exp                                       -> [B,H,W]
    _columns        one program per tile of keys: recomputes the logits for all heads of the group
                    (each key is loaded once) and reduces the weights over the rows                   -> raw [B,H,L]
    _pool           neighbours averaged, infinities placed                                            -> scores [B,H,L]

Reads key twice; 4 W L D FLOPs and W L exponentials per query head, of the mean 2 W L. At L = 128K, H = 32, G = 8,
D = 128, W = 128 in bfloat16: 0.5 GB of keys, 48 MB of scores, 0.27 TFLOP. The order of every sum is fixed by the shapes
and is the same for every batch item, so the result is reproducible and an item scores alone as it does in a batch. Only
the device knows how many tokens are valid: with padding, the window's rows are found there.

The publication takes the mean, in which the rows of a short question weigh no more than the other rows of the window. With
the maximum they count in full, at no more cost (benchmarks/results/scores.md).

Method: Token Sparse Attention, arXiv 2602.03216; the two passes follow FlashAttention (arXiv 2205.14135) and its
split over the keys Flash-Decoding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tsa_compile.kernels._aten import at_least, keys_before, positions_by_slot, take_rows
from tsa_compile.kernels.define import define
from tsa_compile.kernels.interface import MAX_HEAD_DIM
from tsa_compile.kernels.launch import by_device, cdiv, launch, next_power_of_2, tl, triton
from tsa_compile.kernels.sink import check_sink
from tsa_compile.kernels.tiles import LOG2_E, Tiles, block_dim, gather_rows, log_sum, on_hopper, row_strides, rows_contiguous
from tsa_compile.kernels.window import candidates_of, columns_of, load_window, window_rows, window_rows_aten

REDUCTIONS = ("mean", "max")
SPLITS = 32
MIN_SPLIT = 512


@triton.jit
def _accumulate(
    b_query, row_max, row_sum, row_positions, p_key, p_padding, start, seq_len, scale_log2, stride_kl,
    MASKED: tl.constexpr, HAS_PADDING: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys joins the running maximum and sum of each row (online softmax)."""
    offsets = tl.arange(0, BLOCK_N)
    positions = start + offsets
    p_tile = p_key + tl.cast(start, tl.int64) * stride_kl
    b_key = gather_rows(p_tile, offsets * stride_kl, positions < seq_len, 0, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    logits = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale_log2
    if MASKED:
        allowed = (positions[None, :] <= row_positions[:, None]) & (positions < seq_len)[None, :]
        if HAS_PADDING:
            valid = tl.load(p_padding + positions, mask=positions < seq_len, other=0) != 0
            allowed = allowed & valid[None, :]
        logits = tl.where(allowed, logits, float("-inf"))
    return log_sum(logits, row_max, row_sum, 1)


@triton.jit(do_not_specialize=["seq_len", "past", "window", "split_len"])
def _row_stats_kernel(
    p_query, p_key, p_padding, p_rank, p_rows, p_partial,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kg, stride_kl,
    scale_log2, seq_len, past, window, split_len, heads, group,
    HAS_PADDING: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[b,h,split,w] = log2 sum_{t in split, t <= row w} 2^(logit[w,t] log2 e)."""
    scale_log2 = tl.cast(scale_log2, tl.float32)  # Inductor hands a Python float on as a double
    # The row tiles of a group are neighbours in launch order, so that they find each other's keys in the L2 cache.
    row_tiles = tl.cdiv(window, BLOCK_M)
    head, row_tile = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles
    split = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    candidates, rows = candidates_of(p_rank, b, seq_len, past, window, HAS_PADDING)

    slots = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = slots < rows
    p_query += b * stride_qb + head.to(tl.int64) * stride_qh
    p_key += b * stride_kb + (head // group).to(tl.int64) * stride_kg
    p_padding += b * seq_len
    b_query, row_positions = load_window(
        p_query, p_rows, b, slots, candidates, live, past, window, stride_ql, HAS_PADDING, HEAD_DIM, BLOCK_D
    )

    start = split * split_len
    stop = tl.minimum(start + split_len, seq_len)
    # Without padding, tiles that end before the window need no mask.
    masked_from = start
    if not HAS_PADDING:
        masked_from += tl.maximum(tl.minimum(stop, candidates) - start, 0) // BLOCK_N * BLOCK_N
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(start, masked_from, BLOCK_N):
        row_max, row_sum = _accumulate(
            b_query, row_max, row_sum, row_positions, p_key, p_padding, tile, seq_len, scale_log2, stride_kl,
            False, HAS_PADDING, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    for tile in range(masked_from, stop, BLOCK_N):
        row_max, row_sum = _accumulate(
            b_query, row_max, row_sum, row_positions, p_key, p_padding, tile, seq_len, scale_log2, stride_kl,
            True, HAS_PADDING, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    p_partial += ((b * heads + head) * tl.num_programs(1) + split) * window
    tl.store(p_partial + slots, row_max + tl.log2(row_sum), mask=live)


@triton.jit(do_not_specialize=["seq_len", "past", "window", "splits"])
def _combine_kernel(
    p_partial, p_rank, p_sink, p_row_lse, seq_len, past, window, heads, splits,
    HAS_PADDING: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """row_lse[b,h,w] = log2 sum_split 2^partial; +inf for slots without a row, whose weights thereby become 0.

    And +inf where it is NaN: then only those weights of the row are NaN whose own logits are NaN or +inf.
    """
    line = tl.program_id(1).to(tl.int64)
    _, rows = candidates_of(p_rank, line // heads, seq_len, past, window, HAS_PADDING)
    slots = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    parts = tl.arange(0, BLOCK_S)
    pointers = p_partial + (line * splits + parts)[:, None] * window + slots[None, :]
    partial = tl.load(pointers, mask=(parts < splits)[:, None] & (slots < rows)[None, :], other=float("-inf"))
    row_max = tl.max(partial, axis=0)
    total = tl.sum(tl.exp2(partial - tl.where(slots < rows, row_max, 0.0)[None, :]), axis=0)
    row_lse = row_max + tl.log2(total)
    if p_sink is not None:
        sink = tl.load(p_sink + line % heads).to(tl.float32) * LOG2_E
        top = tl.maximum(row_lse, sink)
        row_lse = tl.where(row_lse == row_lse, top + tl.log2(tl.exp2(row_lse - top) + tl.exp2(sink - top)), row_lse)
    row_lse = tl.where((slots < rows) & (row_lse == row_lse), row_lse, float("inf"))
    tl.store(p_row_lse + line * window + slots, row_lse, mask=slots < window)


@triton.jit(do_not_specialize=["seq_len", "past", "window"])
def _columns_kernel(
    p_query, p_key, p_padding, p_rank, p_rows, p_row_lse, p_raw,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kg, stride_kl,
    scale_log2, seq_len, past, window, heads, group,
    MAX: tl.constexpr, HAS_PADDING: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """raw[b,h,c] = mean (with MAX: maximum) over the rows of 2^(logit log2 e - row_lse) for the c-th candidate."""
    scale_log2 = tl.cast(scale_log2, tl.float32)
    start = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    candidates, rows = candidates_of(p_rank, b, seq_len, past, window, HAS_PADDING)
    if start >= seq_len - rows:  # no candidate can stand in the last `rows` places
        return

    offsets = tl.arange(0, BLOCK_N)
    positions = start + offsets
    inside = positions < seq_len
    valid, columns = columns_of(p_padding, p_rank, b, positions, seq_len, HAS_PADDING)
    p_key += b * stride_kb + kv_head.to(tl.int64) * stride_kg + start.to(tl.int64) * stride_kl
    # Every candidate precedes every row of the window, so no logit is masked here; invalid keys are never stored.
    b_key = gather_rows(p_key, offsets * stride_kl, inside, 0, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]

    row_tiles = tl.cdiv(window, BLOCK_M)
    total = tl.zeros([BLOCK_N], tl.float32)
    for step in range(0, group * row_tiles):  # one loop over heads and row tiles, so that its loads are pipelined
        head = kv_head * group + step // row_tiles
        row_tile = step % row_tiles
        slots = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        p_head = p_query + b * stride_qb + head.to(tl.int64) * stride_qh
        # Slots behind the last row repeat it: zeros in its place would make NaN of an infinite key that no row sees.
        held = tl.minimum(slots, rows - 1)
        b_query, _ = load_window(
            p_head, p_rows, b, held, candidates, held >= 0, past, window, stride_ql, HAS_PADDING, HEAD_DIM, BLOCK_D
        )
        row_lse = tl.load(p_row_lse + (b * heads + head) * window + slots, mask=slots < window, other=float("inf"))
        logits = tl.dot(b_key, tl.trans(b_query), input_precision="ieee") * scale_log2
        exponents = logits - row_lse[None, :]  # [BLOCK_N, BLOCK_M], -inf where a row has no weight
        if MAX:
            # The exponential of the maximum alone. A maximum may pass NaN over; a sum does not, and here makes none.
            best = tl.max(exponents, axis=1)
            exact = tl.sum(exponents, axis=1)
            best = tl.where(exact == exact, best, float("nan"))
            total = tl.where(row_tile == 0, best, tl.maximum(total, best, propagate_nan=tl.PropagateNan.ALL))
            raw = tl.exp2(total)
        else:
            weights = tl.sum(tl.exp2(exponents), axis=1)
            total = tl.where(row_tile == 0, weights, total + weights)
            raw = total / tl.maximum(rows, 1)
        stored = tl.where(row_tile == row_tiles - 1, candidates, 0)
        p_out = p_raw + (b * heads + head) * seq_len + columns
        tl.store(p_out, raw, mask=valid & (columns < stored))


@triton.jit(do_not_specialize=["seq_len", "past", "window"])
def _pool_kernel(
    p_raw, p_padding, p_rank, p_scores, seq_len, past, window, heads,
    HAS_PADDING: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scores[b,h,t]: the mean of the raw scores around candidate t, +inf in the window, -inf where invalid.

    NaN where the raw score is NaN, and only there.
    """
    line = tl.program_id(1).to(tl.int64)
    b = line // heads
    candidates, _ = candidates_of(p_rank, b, seq_len, past, window, HAS_PADDING)
    positions = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = positions < seq_len
    valid, columns = columns_of(p_padding, p_rank, b, positions, seq_len, HAS_PADDING)
    total = tl.zeros([BLOCK], tl.float32)
    for shift in tl.static_range(POOL):
        neighbours = columns + shift - POOL // 2
        exists = valid & (neighbours >= 0) & (neighbours < candidates)
        raw = tl.load(p_raw + line * seq_len + neighbours, mask=exists, other=0.0)
        if shift != POOL // 2:
            raw = tl.where(raw == raw, raw, 0.0)
        total += raw
    pooled = tl.where(columns < candidates, total / POOL, float("inf"))
    tl.store(p_scores + line * seq_len + positions, tl.where(valid, pooled, float("-inf")), mask=inside)


def score_triton(
    query: Tensor, key: Tensor, padding: Tensor | None, scale: float, window: int, pool: int, reduce: str = "mean",
    sink_logits: Tensor | None = None, split_len: int = 0,
) -> Tensor:  # fmt: skip
    """Launches the kernels. About `split_len` keys go to each program of the first pass; 0 chooses by the length."""
    batch, heads, _, head_dim = query.shape
    seq_len, past = key.shape[2], keys_before(query, key)
    query, key = rows_contiguous(query), rows_contiguous(key)
    block_d = block_dim(head_dim)
    tiles = _tiles(query.dtype, block_d, window, on_hopper(query))
    # A static size, for whoever traces this with a symbolic length; the splits there are lie densely in it.
    most_splits = SPLITS if split_len == 0 else max(SPLITS, next_power_of_2(cdiv(seq_len, split_len)))
    per_split = cdiv(split_len or torch.sym_max(MIN_SPLIT, cdiv(seq_len, SPLITS)), tiles.block_n)
    split_len = per_split * tiles.block_n
    splits, row_tiles = cdiv(seq_len, split_len), cdiv(window, tiles.block_m)
    scores = query.new_empty((batch, heads, seq_len), dtype=torch.float32)
    raw = torch.empty_like(scores)
    partial = scores.new_empty((batch, heads, most_splits, window))
    row_lse = scores.new_empty((batch, heads, window))

    has_padding = padding is not None
    mask, rank, rows = window_rows(padding, scores, past, window)
    strides = row_strides(1, query, key)
    scale_log2 = float(scale) / math.log(2)
    group = heads // key.shape[1]
    options: dict[str, Any] = {
        "HAS_PADDING": has_padding, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
    }  # fmt: skip
    launch(_row_stats_kernel, (heads * row_tiles, splits, batch),
        (query, key, mask, rank, rows, partial),
        (*strides, scale_log2, seq_len, past, window, split_len, heads, group), **options,
    )  # fmt: skip
    launch(_combine_kernel, (cdiv(window, 64), batch * heads),
        (partial, rank, sink_logits, row_lse), (seq_len, past, window, heads, splits),
        HAS_PADDING=has_padding, BLOCK_S=most_splits, BLOCK_M=64,
    )  # fmt: skip
    launch(_columns_kernel, (cdiv(seq_len, tiles.block_n), key.shape[1], batch),
        (query, key, mask, rank, rows, row_lse, raw),
        (*strides, scale_log2, seq_len, past, window, heads, group), MAX=reduce == "max", **options,
    )  # fmt: skip
    launch(
        _pool_kernel, (cdiv(seq_len, 1024), batch * heads),
        (raw, mask, rank, scores), (seq_len, past, window, heads), HAS_PADDING=has_padding, POOL=pool, BLOCK=1024,
    )  # fmt: skip
    return scores


def _tiles(dtype: torch.dtype, block_d: int, window: int, hopper: bool) -> Tiles:
    """Rows of the window and keys, for _row_stats and _columns: what fits into registers and shared memory."""
    rows = max(16, next_power_of_2(window))
    if dtype == torch.float32:  # exact products run on the ordinary cores; larger tiles spill
        return Tiles(min(rows, 32), 64, 8, 2)
    if block_d > 256:
        return Tiles(min(rows, 64), 64, 4, 2) if hopper else Tiles(min(rows, 32), 32, 4, 1)
    # Four warps leave room for two programs on a multiprocessor: one multiplies while the other exponentiates.
    return Tiles(min(rows, 128), 128, 4, 2) if block_d <= 128 else Tiles(min(rows, 64), 128, 8 if rows >= 64 else 4, 2)


def score_cuda(
    query: Tensor, key: Tensor, padding: Tensor | None, scale: float, window: int, pool: int, reduce: str = "mean",
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """By the kernels where they fit, else in ATen ops."""
    if query.dtype == torch.float64 or query.shape[3] > MAX_HEAD_DIM:
        return score_aten(query, key, padding, scale, window, pool, reduce, sink_logits)
    return score_triton(query, key, padding, scale, window, pool, reduce, sink_logits)


@define(lambda query, key, *others, **options: query.new_empty((*query.shape[:2], key.shape[2]), dtype=torch.float32))
def score(
    query: Tensor, key: Tensor, padding: Tensor | None, scale: float, window: int, pool: int, reduce: str = "mean",
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Scores [B,H,L] float32 of every token; `reduce`, over the window's rows: "mean" or "max".

    ValueError where shapes do not fit or an option is not allowed.
    """
    _check(query, key, padding, window, pool, reduce)
    check_sink("score", query, sink_logits)
    return _compute(query, key, padding, scale, window, pool, reduce, sink_logits)


def _check(query: Tensor, key: Tensor, padding: Tensor | None, window: int, pool: int, reduce: str) -> None:
    batch, heads, rows, head_dim = query.shape
    seq_len = key.shape[2]
    if key.shape != (batch, key.shape[1], seq_len, head_dim) or heads % key.shape[1] != 0 or rows > seq_len:
        raise ValueError(
            f"tsa::score: key {tuple(key.shape)} does not fit query {tuple(query.shape)}; expected [B,G,L,D] of the "
            "same B and D and at least as many rows, with the query's heads a multiple of G"
        )
    if padding is not None and (padding.dtype != torch.bool or padding.shape != (batch, seq_len)):
        raise ValueError(f"tsa::score: padding is {padding.dtype} {tuple(padding.shape)}; expected bool {(batch, seq_len)}")
    check_window("score", window, pool, reduce)


def check_window(op: str, window: int, pool: int, reduce: str) -> None:
    """ValueError where an op is told to score in a way that is not allowed."""
    if window < 1 or pool < 1 or pool % 2 == 0:
        raise ValueError(f"tsa::{op}: window {window} must be at least 1, pool {pool} odd and at least 1")
    if reduce not in REDUCTIONS:
        raise ValueError(f"tsa::{op}: reduce is {reduce!r}; expected one of {', '.join(REDUCTIONS)}")


def score_aten(
    query: Tensor, key: Tensor, padding: Tensor | None, scale: float, window: int, pool: int, reduce: str = "mean",
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in ATen ops, on any device. Holds the weights of 32 rows of the window at a time: [B,H,32,L]."""
    past = keys_before(query, key)
    rank, candidates, rows, alive = window_rows_aten(padding, key, past, window)
    total, faulty = _over_window(query, key, padding, rows, alive, scale, past, reduce, sink_logits)
    if reduce == "mean":
        total = total / at_least(rank[:, -1:] - candidates, 1)[:, None].to(total.dtype)
    raw = torch.where(faulty, 0.0, total)
    pooled = torch.where(faulty, math.nan, _pool_candidates(raw, padding, rank, candidates, pool))
    scores = torch.where((rank > candidates)[:, None], math.inf, pooled)
    if padding is not None:
        scores = torch.where(padding[:, None], scores, -math.inf)
    return scores.to(torch.float32)


def _over_window(
    query: Tensor, key: Tensor, padding: Tensor | None, rows: Tensor, alive: Tensor, scale: float, past: int, reduce: str,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum of weights [B,H,L], or their maximum, over those rows [B or 1, W] of the window that are alive and not NaN.

    And whether a row has a logit there, bool [B,H,L], that is NaN or +inf.
    """
    batch, heads, seq_len = *query.shape[:2], key.shape[2]
    kv_heads, wide = key.shape[1], torch.promote_types(query.dtype, torch.float32)
    positions = torch.arange(seq_len, device=query.device)
    transposed_key = key.to(wide).transpose(2, 3)
    total = query.new_zeros((batch, heads, seq_len), dtype=wide)
    faulty = torch.zeros_like(total, dtype=torch.bool)
    for first in range(0, rows.shape[1], 32):
        chunk = rows[:, None, first : first + 32]
        at = chunk if isinstance(past, int) and past == 0 else at_least(chunk - past, 0)
        picked = take_rows(query, at.expand(batch, heads, -1)).to(wide) * scale
        logits = picked.unflatten(1, (kv_heads, -1)).flatten(2, 3) @ transposed_key
        logits = logits.unflatten(2, (-1, chunk.shape[2])).flatten(1, 2)
        live = alive[:, None, first : first + 32, None]
        allowed = (positions <= chunk[..., None]) & live
        if padding is not None:
            allowed = allowed & padding[:, None, None]
        logits = torch.where(allowed, logits, -math.inf)
        weights = _softmax(logits, sink_logits)
        sound = ~weights[..., :1].isnan()  # a softmax is NaN everywhere or nowhere
        weights = torch.where(live & sound, weights, 0.0)
        total = total + weights.sum(dim=2) if reduce == "mean" else torch.maximum(total, weights.amax(dim=2))
        # NaN or +inf if one of them is (or if they pass 1e37); a maximum passes NaN over in some runtimes.
        faulty = faulty | ~(logits.sum(dim=2) < math.inf)
    return total, faulty


def _softmax(logits: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Of logits [B, H, rows, L]; that of the sink takes its share, and has no weight among those that are returned."""
    if sink_logits is None:
        return logits.softmax(dim=-1)
    sink = sink_logits.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
    return torch.cat((logits, sink), 3).softmax(dim=-1)[..., :-1]


def _pool_candidates(raw: Tensor, padding: Tensor | None, rank: Tensor, candidates: Tensor, pool: int) -> Tensor:
    """Average pooling in candidate order: invalid tokens in between neither count nor take a place."""
    order = torch.arange(raw.shape[2], device=raw.device)
    if padding is not None:
        source = positions_by_slot(padding, rank - 1, raw.shape[2])
        raw = raw.gather(2, source[:, None].expand(raw.shape))
    raw = torch.where((order < candidates)[:, None], raw, 0.0)
    # As an image of one channel: TensorRT pools over two dimensions.
    pooled = F.avg_pool2d(raw[:, None], (1, pool), stride=1, padding=(0, pool // 2))[:, 0]
    if padding is not None:
        pooled = pooled.gather(2, at_least(rank - 1, 0)[:, None].expand(raw.shape))
    return pooled


_compute = by_device(score_cuda, score_aten)
