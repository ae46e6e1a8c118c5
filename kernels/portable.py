"""The ops in operators that every deployment runtime has: what ONNX and TensorRT exports are made of.

Same arguments and meaning as the ops of this package, traceable with symbolic batch and length. Nothing here becomes a
TopK, a sort, a NonZero, an unfold, a bit operation or a shape that depends on data. TensorRT 10 and 11 set the limits
(their ONNX parser's operators.md): TopK takes k < 3840, CumSum and Clip floating point alone,
pooling two dimensions or three.

    score        the window's rows gathered, softmax over 32 of them at a time, 2-D average pooling    [B, H, L] float32
    budget       counts; for a coverage, the mass below a threshold                                    [B] int32
    select       a threshold by bisection, ties by a prefix sum, slots by another, one scatter         [B, Hs, C] int32
    compress     one gather of rows for each of query, key and value                                   [B, H, C, D], ...
    attend       scaled_dot_product_attention: ONNX's Attention from opset 23                          [B, H, C, Dv]
    decompress   one scatter of C ones a head, a prefix sum, and a gather of rows                      [B, H, L, Dv]

Select's bisection is exact. Non-negative floats order like their bits, so the largest float v that `kept` scores reach
is found bit by bit; and because neither ONNX (below opset 26) nor TensorRT reinterprets bits, candidates are built by
arithmetic: nine doublings and one comparison settle the exponent (2^-126 times powers of two, each product exact; an
overflow is +inf, the window's own value), 23 halvings the mantissa (2^-126 * 2^e * (m + 2^-k), exact as well). By then
v is the kept-th largest score itself, so fewer than `kept` scores lie above it, and the lowest positions of those that
equal it fill up. That holds too where a runtime flushes denormal numbers to zero: it then compares them as zeros
everywhere, and they tie. 33 passes over the scores, at L = 128K, H = 32: 33 times 16 MB.

Prefix sums are float32, since TensorRT has no others, and exact up to 2^24 tokens. Every scatter has distinct targets:
what must not be written goes to places of its own behind the part that is kept.

Memory beside inputs and outputs: score holds [B, H, 32, L] float32 weights (0.5 GiB at L = 128K, H = 32), gathers one
int64 index for each row and not for each element. What attend needs is the runtime's affair: a fused kernel (TensorRT)
nothing, onnxruntime's CPU kernel [B, H, C, C].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tsa_compile.config import KeepRatio
from tsa_compile.kernels.select import NAN_SCORE

_SMALLEST_NORMAL = 2.0**-126
_DOUBLINGS = (64, 64, 64, 32, 16, 8, 4, 2, 1)  # any exponent from 0 to 255 is a sum of them, taken greedily
_MANTISSA_BITS = 23
_CHUNK = 32

CAUSAL_KERNELS = ("auto", "sdpa", "flash", "cudnn", "triton")
"""The attention kernels that `attend` stands for: those of this package, which all compute causal attention."""


def score(query: Tensor, key: Tensor, padding: Tensor | None, scale: float, window: int, pool: int) -> Tensor:
    """`tsa::score`: [B,H,L,D], [B,G,L,D], bool [B,L] or None -> float32 [B,H,L]."""
    seq_len = query.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    positions = torch.arange(seq_len, device=query.device)
    if padding is None:
        # Rows before the first token, where the window is longer than the sequence, are not alive.
        rows = (torch.arange(window, device=query.device) + (seq_len - window))[None]
        alive, valid = rows >= 0, None
        rows, row_count = _at_least(rows, 0), alive.sum(dim=1, keepdim=True)
        candidates = seq_len - row_count
        rank = (positions + 1)[None]
    else:
        valid = padding
        rank = _running_count(padding)
        row_count = torch.minimum(rank[:, -1:], torch.full_like(rank[:, -1:], window))
        candidates = rank[:, -1:] - row_count
        rows = _positions_by_slot(padding, rank - 1 - candidates, window)
        alive = torch.arange(window, device=query.device) < row_count
    total, faulty = _window_sum(query.to(wide), key.to(wide), valid, rows, alive, scale)
    raw = torch.where(faulty, 0.0, total / _at_least(row_count, 1)[:, None].to(wide))
    pooled = torch.where(faulty, math.nan, _pool_candidates(raw, padding, rank, candidates, pool))
    scores = torch.where((rank > candidates)[:, None], math.inf, pooled)
    if valid is not None:
        scores = torch.where(valid[:, None], scores, -math.inf)
    return scores.to(torch.float32).contiguous()


def _window_sum(
    query: Tensor, key: Tensor, valid: Tensor | None, rows: Tensor, alive: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights [B, H, L], summed over those rows [B or 1, W] of the window that are alive and not NaN.

    And whether a row has a logit there, bool [B, H, L], that is NaN or +inf.
    """
    batch, heads, seq_len, dim = query.shape
    group = heads // key.shape[1]
    positions = torch.arange(seq_len, device=query.device)
    transposed_key = key.transpose(2, 3)
    parts, logit_sums = [], []
    for first in range(0, rows.shape[1], _CHUNK):
        chunk, chunk_alive = rows[:, first : first + _CHUNK], alive[:, first : first + _CHUNK]
        count = chunk.shape[1]
        picked = _take_rows(query, chunk[:, None].expand(batch, heads, count)) * scale
        logits = picked.reshape(batch, heads // group, group * count, dim) @ transposed_key
        logits = logits.reshape(batch, heads, count, seq_len)
        allowed = positions <= chunk[:, :, None]
        if valid is not None:
            allowed = allowed & valid[:, None, :]
        logits = torch.where(allowed[:, None], logits, -math.inf)
        weights = logits.softmax(dim=-1)
        sound = ~weights[..., :1].isnan()  # a softmax is NaN everywhere or nowhere
        parts.append(torch.where(chunk_alive[:, None, :, None] & sound, weights, 0.0).sum(dim=2))
        logit_sums.append(logits.sum(dim=2))  # NaN or +inf if one of them is; a maximum passes NaN over in some runtimes
    total, logit_sum = (torch.stack(p).sum(dim=0) if len(p) > 1 else p[0] for p in (parts, logit_sums))
    return total, ~(logit_sum < math.inf)


def _pool_candidates(raw: Tensor, padding: Tensor | None, rank: Tensor, candidates: Tensor, pool: int) -> Tensor:
    """Average pooling in candidate order: invalid tokens in between neither count nor take a place."""
    seq_len = raw.shape[2]
    order = torch.arange(seq_len, device=raw.device)
    if padding is not None:
        source = _positions_by_slot(padding, rank - 1, seq_len)
        raw = raw.gather(2, source[:, None].expand(raw.shape))
    raw = torch.where((order < candidates)[:, None], raw, 0.0)
    # As an image of one channel: TensorRT pools over two dimensions.
    pooled = F.avg_pool2d(raw[:, None], (1, pool), stride=1, padding=(0, pool // 2))[:, 0]
    if padding is not None:
        pooled = pooled.gather(2, _at_least(rank - 1, 0)[:, None].expand(raw.shape))
    return pooled


def budget(scores: Tensor, coverage: float | None, keep_ratio: float | None, min_tokens: int) -> Tensor:
    """`tsa::budget`: float32 [B,Hs,L] -> int32 [B]. Masses are float32: a coverage may count one token differently."""
    first = scores[:, 0]
    is_candidate = first.abs() != math.inf
    candidates = is_candidate.sum(dim=1)
    keep = candidates
    if keep_ratio is not None:
        ratio = KeepRatio(keep_ratio).fraction
        keep = torch.floor_divide(candidates * ratio.numerator + (ratio.denominator - 1), ratio.denominator)
    elif coverage:
        mass = torch.where(is_candidate, torch.where(is_candidate[:, None], scores, 0.0).mean(dim=1), 0.0)
        keep = candidates - _dropped(mass, is_candidate, coverage)
    keep = torch.minimum(_at_least(keep, min_tokens), candidates)
    return (keep + (first == math.inf).sum(dim=1)).to(torch.int32)


def _dropped(mass: Tensor, is_candidate: Tensor, coverage: float) -> Tensor:
    """How many of the lightest candidates carry `coverage` of the mass [B, L] together, 0 if the first carries it.

    0 also if there is no mass, or NaN.
    """
    target = mass.sum(dim=1, keepdim=True) * coverage

    def lighter(value: Tensor) -> Tensor:
        return torch.where(mass < value, mass, 0.0).sum(dim=1, keepdim=True)

    # Tokens below the threshold stay under the target together; with all that equal it they do not.
    threshold = _largest(lambda value: lighter(value) < target, target)
    below = (is_candidate & (mass < threshold)).sum(dim=1, keepdim=True)
    equal = (is_candidate & (mass == threshold)).sum(dim=1, keepdim=True)
    steps = torch.ceil((target - lighter(threshold)) / threshold.clamp(min=_SMALLEST_NORMAL)) - 1
    fitting = torch.minimum(equal, steps.clamp(min=0.0, max=2.0**24).to(torch.int64))
    drop = below + torch.where(threshold > 0, fitting, equal)
    return torch.where((drop > 0) & (target > 0), drop + 1, 0)[:, 0]


def select(scores: Tensor, count: Tensor | None, capacity: int) -> Tensor:
    """`tsa::select`: float32 [B,Hs,L], none of it negative and finite, int32 [B] or None -> int32 [B,Hs,C]."""
    scores = torch.where(scores.isnan(), NAN_SCORE, scores)
    batch, heads, seq_len = scores.shape
    most = torch.sym_min(capacity, seq_len)
    kept = torch.full((batch,), most, dtype=torch.int32, device=scores.device)
    if count is not None:
        kept = _at_least(torch.minimum(count, kept), 0)
    wanted = kept[:, None, None].expand(batch, heads, 1)

    def how_many(flags: Tensor) -> Tensor:
        return flags.to(torch.int32).sum(dim=2, keepdim=True, dtype=torch.int32)

    def reached(value: Tensor) -> Tensor:
        return how_many(scores >= value) >= wanted

    start = torch.zeros_like(scores[:, :, :1])
    threshold = torch.where(reached(start), _largest(reached, start), -math.inf)
    above, equal = scores > threshold, scores == threshold
    chosen = above | (equal & (_running_count(equal) <= wanted - how_many(above)))

    positions = torch.arange(seq_len, device=scores.device)
    rank = _running_count(chosen)
    slots = torch.where(chosen, rank - 1, positions - rank + capacity)
    indices = torch.full((batch, heads, capacity + seq_len), seq_len - 1, dtype=torch.int32, device=scores.device)
    indices = indices.scatter(2, slots, positions.to(torch.int32).expand(batch, heads, seq_len))
    return indices[:, :, :capacity].contiguous()


def _largest(holds: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The largest float32 v >= 0 with holds(v), elementwise, for a condition that holds up to some v and not beyond.

    holds(0) is taken for granted. See the module's docstring for why the result is exact.
    """
    unit = torch.full_like(like, _SMALLEST_NORMAL)
    mantissa = torch.where(holds(unit), 1.0, 0.0).to(like.dtype)
    for doublings in _DOUBLINGS:
        larger = unit * 2.0**doublings
        unit = torch.where(holds(larger), larger, unit)
    for bit in range(1, _MANTISSA_BITS + 1):
        larger = mantissa + 2.0**-bit
        mantissa = torch.where(holds(unit * larger), larger, mantissa)
    return unit * mantissa


def compress(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`tsa::compress`: rows `indices` [B,Hs,C] of query [B,H,L,D], key and value; zeros from count on."""
    real = None if count is None else _slots_below(count, indices.shape[2])[:, None, :, None]
    gathered = []
    for source, heads in ((query, query.shape[1]), (key, indices.shape[1]), (value, indices.shape[1])):
        rows = _take_rows(source, _for_heads(indices, heads))
        gathered.append(rows if real is None else torch.where(real, rows, 0.0).contiguous())
    return gathered[0], gathered[1], gathered[2]


def attend(query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str) -> Tensor:
    """`tsa::attend`: all C rows, whatever the count; no row that counts can see one that does not."""
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa).contiguous()


def decompress(compressed: Tensor, indices: Tensor, count: Tensor | None, seq_len: int) -> Tensor:
    """`tsa::decompress`: row j < count of [B,H,C,Dv] at position indices[j], zeros elsewhere: [B,H,L,Dv].

    Positions read from slots instead of slots writing to positions, so only one number for each token is scattered.
    """
    batch, heads, capacity, dim = compressed.shape
    selections = indices.shape[1]
    slots = torch.arange(capacity, device=indices.device)
    targets = indices.to(torch.int64)
    if count is not None:
        targets = torch.where(_slots_below(count, capacity)[:, None], targets, slots + seq_len)
    marks = compressed.new_zeros((batch, selections, seq_len + capacity), dtype=torch.float32)
    marks = marks.scatter(2, targets, torch.ones_like(targets, dtype=torch.float32))[:, :, :seq_len]
    kept = _for_heads(marks > 0, heads).transpose(1, 2)
    source = _for_heads(_at_least(_running_count(marks > 0) - 1, 0), heads).transpose(1, 2)
    rows = compressed.reshape(batch * heads * capacity, dim)
    starts = _row_starts(batch, heads, heads, capacity, indices.device)
    rows = rows.index_select(0, (starts[:, None, :, 0] + source).reshape(-1)).reshape(batch, seq_len, heads, dim)
    # Contiguous as [B, L, H, Dv], the layout that the graph around the op was traced with.
    return torch.where(kept[..., None], rows, 0.0).to(compressed.dtype).contiguous().transpose(1, 2)


def spans(padding: Tensor) -> Tensor:
    """Stands for `tsa::spans` [B, 3], which tells the host what need not be computed and is not read here: zeros."""
    return torch.zeros((padding.shape[0], 3), dtype=torch.int64)


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, spans: Tensor, scale: float, mean_rows: bool
) -> Tensor:
    """`tsa::padded_attention` with the mask [B,1,L,L] written out; pad rows 0 or the mean of value, as there."""
    positions = torch.arange(query.shape[2], device=query.device)
    allowed = (positions <= positions[:, None]) & padding[:, None, None, :]
    sees = (_running_count(padding) > 0)[:, None, :, None]
    # A row that sees nothing looks at everything instead: runtimes differ on a softmax over nothing.
    gqa = query.shape[1] != key.shape[1]
    allowed = allowed | ~sees
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale, enable_gqa=gqa)
    elsewhere = torch.zeros_like(value[:, :, :1])
    if mean_rows:
        elsewhere = value.to(torch.promote_types(value.dtype, torch.float32)).mean(2, keepdim=True).to(value.dtype)
    elsewhere = _for_heads(elsewhere, query.shape[1])
    return torch.where(sees, out, elsewhere).transpose(1, 2).contiguous().transpose(1, 2)


def _running_count(flags: Tensor) -> Tensor:
    """How many flags of the last dimension are set up to and with each: int64. TensorRT cumulates floats alone."""
    return flags.to(torch.float32).cumsum(dim=-1).to(torch.int64)


def _at_least(numbers: Tensor, least: int) -> Tensor:
    """The larger of integers and `least`: clamp would be ONNX's Clip, which TensorRT has for floating point alone."""
    return torch.maximum(numbers, torch.full_like(numbers, least))


def _slots_below(count: Tensor, capacity: int) -> Tensor:
    """The slots that are real: bool [B, C]."""
    return torch.arange(capacity, dtype=torch.int32, device=count.device) < count[:, None]


def _positions_by_slot(padding: Tensor, slots: Tensor, size: int) -> Tensor:
    """Position of the valid token that has slot s, 0 where none has: [B, L] -> int64 [B, size]. Slots are distinct."""
    batch, seq_len = padding.shape
    positions = torch.arange(seq_len, device=padding.device).expand(batch, seq_len)
    targets = torch.where(padding & (slots >= 0), slots, positions + size)
    found = torch.zeros((batch, size + seq_len), dtype=torch.int64, device=padding.device)
    return found.scatter(1, targets, positions)[:, :size]


def _for_heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, S, ...] -> [B, heads, ...], head h from h // (heads / S)."""
    batch, shared = tensor.shape[:2]
    if shared == heads:
        return tensor
    rest = tensor.shape[2:]
    return tensor[:, :, None].expand(batch, shared, heads // shared, *rest).reshape(batch, heads, *rest)


def _row_starts(batch: int, heads: int, source_heads: int, length: int, device: torch.device) -> Tensor:
    """Where the rows of head h's source begin in [B * G * L, D]: int64 [B, H, 1]."""
    shared = _for_heads(torch.arange(source_heads, device=device)[None], heads)
    return ((torch.arange(batch, device=device)[:, None] * source_heads + shared) * length)[..., None]


def _take_rows(source: Tensor, rows: Tensor) -> Tensor:
    """Source [B, G, L, D], rows [B, H, C] -> [B, H, C, D], head h from h // (H / G), by one gather of whole rows."""
    batch, source_heads, length, dim = source.shape
    heads, count = rows.shape[1:]
    flat = _row_starts(batch, heads, source_heads, length, source.device) + rows
    taken = source.reshape(batch * source_heads * length, dim).index_select(0, flat.reshape(-1))
    return taken.reshape(batch, heads, count, dim)


OPS: dict[str, Callable[..., object]] = {
    "score": score,
    "budget": budget,
    "select": select,
    "compress": compress,
    "attend": attend,
    "decompress": decompress,
    "spans": spans,
    "padded_attention": padded_attention,
}
"""The portable form of every op `tsa::<name>` that an exported program may contain."""
