"""Token Sparse Attention in plain PyTorch: the oracle that every kernel is tested against.

One function per op and one for the whole layer, written to be read: loops over batch items and heads, slices where
the kernels use masks. Nothing here is fast, and nothing shares code with the implementations that it checks.

    score             where does the window of the last queries look?          [B,H,L]
    budget            how many tokens does each batch item keep?               [B]
    select            which tokens, per head?                                  [B,Hs,C]
    compress          the selected rows of query, key and value                [B,H,C,D] [B,Hs,C,D] [B,Hs,C,Dv]
    attend            causal attention over them                               [B,H,C,Dv]
    decompress        the output rows back in their places, zeros elsewhere    [B,H,L,Dv]
    floor_mask        what each row sees where there is a floor                [B,H,L,L]

Where a model has sinks, sink_logits [H], a softmax has a further logit, of its head, whose weight nothing receives.

B batch, H query heads over G key/value heads, L length, C capacity, Hs = H, or G when a group shares its selection.
Arithmetic is float32 for half-precision inputs and float64 for float64 inputs: feed float64 for ground truth.
Method: Token Sparse Attention, arXiv 2602.03216.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor


def valid_positions(padding: Tensor | None, item: int, seq_len: int) -> Tensor:
    """Ascending positions [n_b] of the tokens of one batch item that its padding mask (True = valid) allows."""
    if padding is None:
        return torch.arange(seq_len)
    return padding[item].cpu().nonzero().flatten()


REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda weights: weights.mean(dim=-2),  # the published score: what the window's rows look at on average
    "max": lambda weights: weights.amax(dim=-2),  # the largest weight that any of the window's rows gives
}


def score(
    query: Tensor, key: Tensor, padding: Tensor | None, scale: float, window: int, pool: int,
    reduce: str | Callable[[Tensor], Tensor] = "mean", value: Tensor | None = None, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """How much attention the window pays to each earlier token: [B,H,L] float32 (float64 for float64 inputs).

    Queries are those of the last positions, all L or a chunk of them. +inf marks the window itself (the last `window` valid
    tokens that have a query), -inf the invalid tokens; the other entries are the candidates. So the best tokens of a row can
    be found without its padding mask and without the window.

    `reduce` makes one row [n] of the window's [rows, n]: "mean", "max", or a function. With `value` [B,G,L,Dv] a score is
    multiplied by the length of the token's value.

    A query whose softmax is NaN gives NaN to the keys whose logits are NaN or +inf, the cause, and 0 to the others.
    """
    batch, heads, seq_len = *query.shape[:2], key.shape[2]
    past, group = seq_len - query.shape[2], heads // key.shape[1]
    query, key = _wide(query), _wide(key)
    scores = torch.full((batch, heads, seq_len), -math.inf, dtype=query.dtype, device=query.device)
    for b in range(batch):
        valid = valid_positions(padding, b, seq_len)
        rows = valid[valid >= past][-window:]
        candidates = valid[: len(valid) - len(rows)]
        for h in range(heads):
            logits = scale * query[b, h, rows - past] @ key[b, h // group, valid].T
            future = valid[None, :] > rows[:, None]
            weights = _softmax(logits.masked_fill(future.to(logits.device), -math.inf), _sink_of(sink_logits, h))
            weights[weights.isnan() & (logits < math.inf)] = 0.0
            scores[b, h, rows] = math.inf
            scores[b, h, candidates] = 0.0
            if len(candidates) > 0 and len(rows) > 0:
                row = (REDUCED[reduce] if isinstance(reduce, str) else reduce)(weights[:, : len(candidates)])
                if value is not None:
                    row = row * _wide(value)[b, h // group, candidates].norm(dim=-1)
                scores[b, h, candidates] = _average_pool(row, pool)
    return scores


def _average_pool(row: Tensor, pool: int) -> Tensor:
    """Stride 1, zero padding pool // 2, the divisor always `pool`: [n] -> [n]. NaN is 0 to its neighbours, and stays NaN."""
    padded = torch.nn.functional.pad(row.nan_to_num(0.0), (pool // 2, pool // 2))
    pooled = torch.stack([padded[i : i + len(row)] for i in range(pool)]).sum(dim=0) / pool
    return pooled.masked_fill(row.isnan(), math.nan)


def group_scores(scores: Tensor, kv_heads: int) -> Tensor:
    """Granularity "group": the mean over the heads of a group, [B,H,L] -> [B,G,L]; infinities and NaN stay."""
    return scores.unflatten(1, (kv_heads, -1)).mean(dim=2)


def budget(scores: Tensor, coverage: float | None, keep_ratio: float | None, min_tokens: int) -> Tensor:
    """How many tokens each batch item keeps, its window included: [B,Hs,L] -> int32 [B].

    Coverage drops the least-attended candidates whose joint mass (mean over heads, normalised) just reaches `coverage`;
    a keep ratio keeps ceil(keep_ratio * candidates). Exactly one of the two is given. At least `min_tokens` candidates
    are kept. An item with a NaN among its candidates' scores keeps everything instead of covering a share of nothing.
    """
    counts = []
    for item in scores:
        is_candidate, window = ~item[0].isinf(), int(item[0].isposinf().sum())
        candidates = int(is_candidate.sum())
        if keep_ratio is not None:
            keep = max(min_tokens, math.ceil(Fraction(str(keep_ratio)) * candidates))
        elif coverage == 0 or candidates <= min_tokens or item.isnan().any():
            keep = candidates
        else:
            mass = item[:, is_candidate].double().mean(dim=0)
            cumulated = (mass / mass.sum()).sort().values.cumsum(dim=0)
            drop = int((cumulated < coverage).sum())
            # With the token that crosses the line the dropped set is the smallest whose mass reaches coverage.
            keep = max(min_tokens, candidates - (drop + 1 if drop > 0 else 0))
        counts.append(min(keep, candidates) + window)
    return torch.tensor(counts, dtype=torch.int32, device=scores.device)


def select(scores: Tensor, count: Tensor | None, capacity: int) -> Tensor:
    """The `count` best tokens of each row in ascending order, int32 [B,Hs,C]; of equal scores the lower position wins.

    NaN is as good as the largest finite number. Slots from count on hold L - 1. Without a count every slot is a token.
    """
    batch, heads, seq_len = scores.shape
    indices = torch.full((batch, heads, capacity), seq_len - 1, dtype=torch.int32, device=scores.device)
    for b in range(batch):
        kept = min(capacity if count is None else int(count[b]), capacity, seq_len)
        for h in range(heads):
            row = scores[b, h].nan_to_num(torch.finfo(scores.dtype).max, math.inf, -math.inf).tolist()
            best = sorted(range(seq_len), key=lambda t: (-row[t], t))[:kept]
            indices[b, h, :kept] = torch.tensor(sorted(best), dtype=torch.int32)
    return indices


def compress(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The selected rows of query [B,H,C,D], key [B,Hs,C,D] and value [B,Hs,C,Dv]; zeros from count on."""
    heads, selections = query.shape[1], indices.shape[1]
    return (
        _gather_rows(query, indices, count, heads),
        _gather_rows(key, indices, count, selections),
        _gather_rows(value, indices, count, selections),
    )


def _gather_rows(source: Tensor, indices: Tensor, count: Tensor | None, heads: int) -> Tensor:
    """Rows of `source` [B,*,L,D] for each of `heads` output heads, which share source heads or selections in groups."""
    batch, selections, capacity = indices.shape
    out = source.new_zeros(batch, heads, capacity, source.shape[-1])
    for b in range(batch):
        kept = capacity if count is None else int(count[b])
        for h in range(heads):
            rows = indices[b, h * selections // heads, :kept].long()
            out[b, h, :kept] = source[b, h * source.shape[1] // heads, rows]
    return out


def attend(query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float) -> Tensor:
    """Causal attention over the first `count` rows of each item: [B,H,C,D], [B,Hk,C,D|Dv] -> [B,H,C,Dv]; then zeros."""
    batch, heads, capacity, _ = query.shape
    out = query.new_zeros(batch, heads, capacity, value.shape[-1])
    for b in range(batch):
        kept = capacity if count is None else int(count[b])
        allowed = torch.ones(kept, kept, dtype=torch.bool, device=query.device).tril()
        for h in range(heads):
            kv = h * key.shape[1] // heads
            out[b, h, :kept] = _attention(query[b, h, :kept], key[b, kv, :kept], value[b, kv, :kept], allowed, scale)
    return out


def _sink_of(sink_logits: Tensor | None, head: int) -> Tensor | None:
    return None if sink_logits is None else sink_logits[head]


def _softmax(logits: Tensor, sink: Tensor | None) -> Tensor:
    """Over the last dimension of [rows, n], and a sink beside it, if there is one: [rows, n]."""
    if sink is None:
        return logits.softmax(dim=-1)
    return torch.cat((logits, sink.to(logits).expand(len(logits), 1)), dim=1).softmax(dim=-1)[:, :-1]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float, sink: Tensor | None = None
) -> Tensor:
    """softmax(scale * query key^T, over `allowed`) value for one head; a row that may attend to no token is 0."""
    logits = (scale * _wide(query) @ _wide(key).T).masked_fill(~allowed, -math.inf)
    weights = _softmax(logits, sink).masked_fill(~allowed, 0.0)
    return (weights @ _wide(value)).to(value.dtype)


def decompress(out: Tensor, indices: Tensor, count: Tensor | None, seq_len: int) -> Tensor:
    """Row j < count of `out` [B,H,C,Dv] at position indices[j], every other row exactly 0: [B,H,L,Dv]."""
    batch, heads, capacity, _ = out.shape
    full = out.new_zeros(batch, heads, seq_len, out.shape[-1])
    for b in range(batch):
        kept = capacity if count is None else int(count[b])
        for h in range(heads):
            full[b, h, indices[b, h * indices.shape[1] // heads, :kept].long()] = out[b, h, :kept]
    return full


def is_selected(indices: Tensor, count: Tensor, heads: int, seq_len: int) -> Tensor:
    """The selection of each head as flags: bool [B,H,L]."""
    batch, selections, _ = indices.shape
    selected = torch.zeros(batch, heads, seq_len, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            selected[b, h, indices[b, h * selections // heads, : int(count[b])].long()] = True
    return selected


def floor_mask(padding: Tensor | None, selected: Tensor, window: int, sinks: int) -> Tensor:
    """A(i), what each row sees: bool [B,H,L,L] of the selected tokens, bool [B,H,L]; nothing in rows of invalid tokens."""
    batch, heads, seq_len = selected.shape
    mask = torch.zeros(batch, heads, seq_len, seq_len, dtype=torch.bool)
    for b in range(batch):
        valid = valid_positions(padding, b, seq_len).cpu()
        ranks = torch.arange(len(valid))
        behind = ranks[:, None] - ranks
        near = (behind < window) | (ranks < sinks)
        for h in range(heads):
            chosen = selected[b, h].cpu()[valid]
            seen = (near | (chosen[:, None] & chosen)) & (behind >= 0)
            mask[b, h, valid[:, None], valid] = seen
    return mask


def _among(selected: Tensor) -> Tensor:
    """What selected rows see without a floor: the selected tokens up to themselves; bool [B,H,L,L]."""
    return (selected[..., None] & selected[:, :, None]).tril()


def attention_under(
    mask: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, sink_logits: Tensor | None = None
) -> Tensor:
    """Dense attention under any mask [B,H,L,L]; a row that may attend to no token is 0: [B,H,L,Dv]."""
    batch, heads, _, _ = query.shape
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for b in range(batch):
        for h in range(heads):
            kv = h * key.shape[1] // heads
            allowed, sink = mask[b, h].to(query.device), _sink_of(sink_logits, h)
            out[b, h] = _attention(query[b, h], key[b, kv], value[b, kv], allowed, scale, sink)
    return out


def log_sum_exp(query: Tensor, key: Tensor, count: Tensor | None, scale: float) -> Tensor:
    """Of the causal logits of each compressed row, natural: [B,H,C,D], [B,Hk,C,D] -> [B,H,C]; then zeros."""
    batch, heads, capacity, _ = query.shape
    out = torch.zeros(batch, heads, capacity, dtype=_wide(query).dtype, device=query.device)
    for b in range(batch):
        kept = capacity if count is None else int(count[b])
        for h in range(heads):
            logits = scale * _wide(query[b, h, :kept]) @ _wide(key[b, h * key.shape[1] // heads, :kept]).T
            for i in range(kept):
                out[b, h, i] = logits[i, : i + 1].logsumexp(dim=0)
    return out


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, scale: float, mean_rows: bool = False,
    window: int | None = None, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Dense attention of the last Lq of Lk positions under (kv <= q + Lk - Lq) & padding[b, kv]: [B,H,Lq,Dv].

    With `window` rows see that many positions, up to their own, and none before.

    A row that may attend to no token (nothing valid among what it sees) is 0, or with `mean_rows` the mean of value over all
    Lk keys: what a softmax over equal, finitely masked logits gives.
    """
    batch, heads, rows, _ = query.shape
    out = query.new_zeros(batch, heads, rows, value.shape[-1])
    causal = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[key.shape[2] - rows :]
    if window is not None:
        causal = causal.triu(key.shape[2] - rows - window + 1)
    for b in range(batch):
        valid = slice(None) if padding is None else padding[b]
        allowed = causal[:, valid]
        for h in range(heads):
            kv = h * key.shape[1] // heads
            seen, sink = (key[b, kv][valid], value[b, kv][valid]), _sink_of(sink_logits, h)
            out[b, h] = _attention(query[b, h], *seen, allowed, scale, sink)
            if mean_rows:
                out[b, h, ~allowed.any(dim=-1)] = _wide(value[b, kv]).mean(dim=0).to(value.dtype)
    return out


def token_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None = None,
    *,
    scale: float | None = None,
    coverage: float | None = 0.005,
    keep_ratio: float | None = None,
    window: int = 128,
    pool: int = 7,
    min_tokens: int = 1024,
    granularity: str = "head",
    capacity: int | None = None,
    floor_window: int | None = None,
    floor_sinks: int = 0,
    reduce: str = "mean",
    sink_logits: Tensor | None = None,
) -> Tensor:
    """The whole layer: [B,H,Lq,D], [B,G,L,D], [B,G,L,Dv] -> [B,H,Lq,Dv]. A keep ratio, where given, replaces coverage.

    The queries are those of the last Lq positions: all L, or a chunk behind a cache, whose rows are what is computed. With
    `floor_window` it is dense attention under A(i), `floor_mask`; without, rows that are not selected are 0.
    """
    seq_len, head_dim = key.shape[2], query.shape[3]
    past = seq_len - query.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    capacity = seq_len if capacity is None else capacity
    scores = score(query, key, padding, scale, window, pool, reduce, sink_logits=sink_logits)
    if granularity == "group":
        scores = group_scores(scores, key.shape[1])
    count = budget(scores, None if keep_ratio is not None else coverage, keep_ratio, min_tokens).clamp(max=capacity)
    indices = select(scores, count, capacity)
    if floor_window is not None:
        mask = floor_mask(padding, is_selected(indices, count, query.shape[1], seq_len), floor_window, floor_sinks)
        return attention_under(mask[:, :, past:], query, key, value, scale, sink_logits)
    if past > 0 or sink_logits is not None:
        mask = _among(is_selected(indices, count, query.shape[1], seq_len))
        return attention_under(mask[:, :, past:], query, key, value, scale, sink_logits)
    rows = compress(query, key, value, indices, count)
    return decompress(attend(*rows, count, scale), indices, count, seq_len)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
