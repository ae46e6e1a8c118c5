"""FlexPrefill's choice of blocks: a head whose pooled queries and keys foretell its attention goes by them (query-aware),
any other by the columns and diagonals that its last rows attend to (vertical-slash).

    A[r, c], columns[c], diagonals[d]   of the last 128 rows, as in last_rows.py; R = min(128, n) of them are real
    true[j]     = sum of columns over block j / R
    pooled[j]   = softmax over j of scale * <mean of the last rows, mean[j]>
    query-aware = sqrt(Jensen-Shannon divergence of true and pooled, in nats) < tau
    P[i, j]     = softmax over j <= i of scale * <mean of query block i, mean[j]>
    list of i   = {j <= i : j in V, or i - j in S, or the head is query-aware and P[i, j] among the fewest with gamma * Q'}

    V           the heaviest blocks of 128 columns, block 0 first: as many as min_budget / 128, and in vertical-slash heads
                as k // 128 + 1, where the fewest columns that hold `gamma` of the attention are k
    S           the same of bands of 128 diagonals, d // 128, of which band 0 holds the main diagonal

    query [B, H, C, D], key [B, Hk, C, D], strides and dtypes as in flash.py; count int32 [B] or None
    -> kv_num_blocks int32 [B, H, Q], kv_indices int32 [B, H, Q, Q], Q = ceil(C / 128); empty lists behind count

for one head of one item; n = count or C, Q' = ceil(n / 128), mean[j] the mean of the real keys of block j, in the dtype of
key. Of equal blocks and bands the lower come first; of equal P all are chosen. None of the launches is read back:

    _mean        flashprefill.py's                                                                    one read of key
    _norm, _sums last_rows.py: columns and diagonals                                                 two reads of key
    _judge       a program per head: is it query-aware?
    _pairs       a program per query block of a head that is: P                         one read of query; P, [B, H, Q, Q]
    _digit x 8   fewest.py: the smallest column, diagonal or P that is among the fewest
    _budget      a program per head, for V and for S
    _list        a program per query block: the list

At H = 32, G = 8, D = 128, n = 128K: 0.27 TFLOP, 1.07 G exponentials and 0.8 GB, 0.6 ms at 600 TFLOP/s and 4.2 TB/s. If all
heads are query-aware 1.4 GB more, and 4 GB from the L2 cache. As written about 2 to 3.5 ms of an H200's time, an estimate
from parts. 0.3 GB of memory.

FlexPrefill, arXiv 2502.20766, algorithms 1 to 4, with its defaults: gamma 0.95, tau 0.1, min_budget 1024. V and S are as
its published code has them: whole blocks, as heavy as the columns that the paper chooses one by one. A list of every
block that one of those touches holds most blocks, as few of the many are heavy; this leaves 0.05 to 0.16 of them on planted
inputs of 32K (benchmarks/sparse_inputs.py). As there, a band stands for the block diagonal at its near end, and query-aware
heads keep the least V and S. Of P the fewest that reach gamma are chosen, as in the paper, where the code stops one
short; and bands start at multiples of 128 from the main diagonal also where n is no multiple.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tsa_compile.kernels._aten import block_means_aten, repeat_heads, whole_blocks
from tsa_compile.kernels.launch import by_device, cdiv, launch, tl, triton
from tsa_compile.kernels.sparse.blocks import BLOCK
from tsa_compile.kernels.sparse.fewest import Search, fewest, search, splits_used, threshold_aten, threshold_of
from tsa_compile.kernels.sparse.flashprefill import block_means
from tsa_compile.kernels.sparse.last_rows import Splitting, last_rows_sums, last_rows_sums_aten, load_part
from tsa_compile.kernels.sparse.lists import CHUNK, Lists, append, empty_lists, forced, lists_of, real_blocks
from tsa_compile.kernels.tiles import (
    aligned_rows,
    at_head,
    block_dim,
    count_of,
    load_rows,
    row_alignment,
    row_strides,
    stride_names,
)

GAMMA, TAU, MIN_BUDGET = 0.95, 0.1, 1024
MEANS = 64
"""Mean keys that a program multiplies together."""


@triton.jit
def _mean_logits(
    b_mean, p_mean, p_logits, stop, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, MEANS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the logits to base 2 of one mean query and the mean keys before `stop`; returns their norm."""
    for start in range(0, stop, MEANS):
        b_keys = load_rows(p_mean, DIM // ALIGN, start, stop, True, MEANS, DIM, BLOCK_D, ALIGN).to(tl.float32)
        b_logits = tl.sum(b_keys * b_mean[None, :], axis=1) * scale_log2
        keys = start + tl.arange(0, MEANS)
        tl.store(p_logits + keys, b_logits, mask=keys < stop)
    tl.debug_barrier()
    b_max = tl.full([CHUNK], float("-inf"), tl.float32)
    for start in range(0, stop, CHUNK):
        keys = start + tl.arange(0, CHUNK)
        b_max = tl.maximum(b_max, tl.load(p_logits + keys, mask=keys < stop, other=float("-inf")))
    largest = tl.max(b_max, axis=0)
    b_sum = tl.zeros([CHUNK], tl.float32)
    for start in range(0, stop, CHUNK):
        keys = start + tl.arange(0, CHUNK)
        b_sum += tl.exp2(tl.load(p_logits + keys, mask=keys < stop, other=float("-inf")) - largest)
    return largest + tl.log2(tl.sum(b_sum, axis=0))


@triton.jit
def _divergence(p, q):
    """The terms of the Jensen-Shannon divergence to base 2; 0 log 0 is 0."""
    middle = (p + q) * 0.5
    of_p = tl.where(p > 0.0, p * tl.log2(tl.where(p > 0.0, p, 1.0) / tl.where(p > 0.0, middle, 1.0)), 0.0)
    of_q = tl.where(q > 0.0, q * tl.log2(tl.where(q > 0.0, q, 1.0) / tl.where(q > 0.0, middle, 1.0)), 0.0)
    return (of_p + of_q) * 0.5


@triton.jit(do_not_specialize=[*stride_names("q"), "capacity", "blocks", "heads_per_kv"])
def _judge_kernel(
    p_query, p_mean, p_bands, p_count, p_aware, p_pooled,
    stride_qb, stride_qh, stride_ql, capacity, blocks, heads_per_kv, tau, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, MEANS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Whether a head is query-aware."""
    head, item = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(0)
    row = (item * heads + head).to(tl.int64)
    count = count_of(p_count, item, capacity)
    if count <= 0:
        tl.store(p_aware + row, 0)
        return
    rows = tl.minimum(count, BLOCK).to(tl.float32)
    p_query = at_head(p_query, stride_qb, stride_qh, item, head, ALIGN)
    p_mean += (item * (heads // heads_per_kv) + head // heads_per_kv).to(tl.int64) * blocks * DIM
    p_bands += row * 2 * blocks
    p_pooled += row * blocks
    b_query = load_part(p_query, stride_ql, count - BLOCK, count, 0, BLOCK, DIM, BLOCK_D, ALIGN)
    b_mean = tl.sum(b_query.to(tl.float32), axis=0) / rows
    real = tl.cdiv(count, BLOCK)
    norm = _mean_logits(b_mean, p_mean, p_pooled, real, scale_log2, DIM, BLOCK_D, ALIGN, MEANS, CHUNK)
    b_divergence = tl.zeros([CHUNK], tl.float32)
    for start in range(0, real, CHUNK):
        keys = start + tl.arange(0, CHUNK)
        b_pooled = tl.exp2(tl.load(p_pooled + keys, mask=keys < real, other=float("-inf")) - norm)
        b_true = tl.load(p_bands + keys, mask=keys < real, other=0.0) / rows
        b_divergence += _divergence(b_true, b_pooled)
    nats = tl.maximum(tl.sum(b_divergence, axis=0), 0.0) * 0.6931471805599453
    tl.store(p_aware + row, (tl.sqrt(nats) < tau).to(tl.int32))


@triton.jit(do_not_specialize=[*stride_names("q"), "capacity", "blocks", "heads_per_kv"])
def _pairs_kernel(
    p_query, p_mean, p_count, p_aware, p_pairs,
    stride_qb, stride_qh, stride_ql, capacity, blocks, heads_per_kv, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, MEANS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """P of one query block, in query-aware heads; those that see most first."""
    head, item = tl.program_id(0), tl.program_id(2)
    heads = tl.num_programs(0)
    row = (item * heads + head).to(tl.int64)
    count = count_of(p_count, item, capacity)
    own = tl.cdiv(count, BLOCK) - 1 - tl.program_id(1)
    if own < 0:
        return
    if tl.load(p_aware + row) == 0:
        return
    p_query = at_head(p_query, stride_qb, stride_qh, item, head, ALIGN)
    p_mean += (item * (heads // heads_per_kv) + head // heads_per_kv).to(tl.int64) * blocks * DIM
    p_pairs += (row * blocks + own) * blocks
    b_query = load_rows(p_query, stride_ql, own * BLOCK, count, True, BLOCK, DIM, BLOCK_D, ALIGN)  # [BLOCK, BLOCK_D]
    b_mean = tl.sum(b_query.to(tl.float32), axis=0) / tl.minimum(count - own * BLOCK, BLOCK).to(tl.float32)
    norm = _mean_logits(b_mean, p_mean, p_pairs, own + 1, scale_log2, DIM, BLOCK_D, ALIGN, MEANS, CHUNK)
    for start in range(0, own + 1, CHUNK):
        keys = start + tl.arange(0, CHUNK)
        b_logits = tl.load(p_pairs + keys, mask=keys <= own, other=float("-inf"))
        tl.store(p_pairs + keys, tl.exp2(b_logits - norm), mask=keys <= own)


@triton.jit
def _bands(p_sums, p_bands, count, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Adds up the diagonals of each band."""
    BANDS: tl.constexpr = CHUNK // BLOCK if CHUNK > BLOCK else 1
    for start in range(0, tl.cdiv(count, BLOCK), BANDS):
        bands = start + tl.arange(0, BANDS)
        positions = bands[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        b_sums = tl.load(p_sums + positions, mask=positions < count, other=0.0)
        tl.store(p_bands + bands, tl.sum(b_sums, axis=1), mask=bands * BLOCK < count)


@triton.jit
def _load_order(p_bands, places, real):
    """The heaviness of bands as integers of the same order; the first is the heaviest, those that are none the lightest."""
    b_bits = tl.load(p_bands + places, mask=places < real, other=0.0).to(tl.int32, bitcast=True)
    return tl.where(places == 0, 0x7F800000, tl.where(places < real, b_bits, -1))


@triton.jit
def _least_of_the_heaviest(p_bands, real, budget, CHUNK: tl.constexpr):
    """The largest number that the order of `budget` bands reaches, by four bits at a time."""
    digits = tl.arange(0, 16)
    threshold = tl.zeros([], tl.int32)
    for step in range(8):
        shift = 28 - 4 * step
        b_candidates = threshold | (digits << shift)
        b_candidates = tl.where(b_candidates < 0, 0x7FFFFFFF, b_candidates)  # there is no order with the sign's bit
        b_reached = tl.zeros([16, CHUNK], tl.int32)
        for start in range(0, real, CHUNK):
            b_order = _load_order(p_bands, start + tl.arange(0, CHUNK), real)
            b_reached += (b_order[None, :] >= b_candidates[:, None]).to(tl.int32)
        enough = (tl.sum(b_reached, axis=1) >= budget) & (digits > 0)
        threshold |= tl.sum(enough.to(tl.int32), axis=0) << shift
    return threshold


@triton.jit(do_not_specialize=["capacity", "blocks", "least", "used"])
def _budget_kernel(
    p_sums, p_bands, p_aware, p_count, p_state, p_smallest, p_chosen, capacity, blocks, least, used, gamma,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, LINE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """V or S of a head, as a flag for each block or band; and the smallest P that is chosen."""
    kind, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (item * tl.num_programs(1) + head).to(tl.int64)
    count = count_of(p_count, item, capacity)
    if count <= 0:
        return
    aware = tl.load(p_aware + row)
    bits, wanted = threshold_of(p_state, row * 3 + tl.where(aware != 0, 2, kind), gamma, used, SPLITS)
    tl.store(p_smallest + row, bits.to(tl.float32, bitcast=True), mask=kind == 0)
    p_sums += (row * 2 + kind) * capacity
    p_bands += (row * 2 + kind) * blocks
    p_chosen += (row * 2 + kind) * blocks
    if kind == 1:
        _bands(p_sums, p_bands, count, BLOCK, LINE)
        tl.debug_barrier()
    real = tl.cdiv(count, BLOCK)
    budget = least
    if aware == 0:
        budget = tl.maximum(least, fewest(p_sums, bits, wanted, count, LINE) // BLOCK + 1)
    budget = tl.minimum(budget, real)

    threshold = _least_of_the_heaviest(p_bands, real, budget, CHUNK)
    b_above = tl.zeros([CHUNK], tl.int32)
    for start in range(0, real, CHUNK):
        b_above += (_load_order(p_bands, start + tl.arange(0, CHUNK), real) > threshold).to(tl.int32)
    missing = budget - tl.sum(b_above, axis=0)
    for start in range(0, real, CHUNK):
        places = start + tl.arange(0, CHUNK)
        b_order = _load_order(p_bands, places, real)
        equal = (b_order == threshold).to(tl.int32)
        chosen = (b_order > threshold) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= missing))
        tl.store(p_chosen + places, chosen.to(tl.int8), mask=places < real)
        missing -= tl.sum(equal, axis=0)


@triton.jit(do_not_specialize=["capacity", "blocks"])
def _list_kernel(
    p_pairs, p_aware, p_smallest, p_chosen, p_count, p_num, p_indices, capacity, blocks,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The list of one query block."""
    own, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = (item * tl.num_programs(1) + head).to(tl.int64)
    row = line * blocks + own
    if own * BLOCK >= count_of(p_count, item, capacity):
        tl.store(p_num + row, 0)
        return
    p_chosen += line * 2 * blocks
    seen = tl.where(tl.load(p_aware + line) != 0, own + 1, 0)
    smallest = tl.load(p_smallest + line)
    found = tl.zeros([], tl.int32)
    for start in range(0, own + 1, CHUNK):
        keys = start + tl.arange(0, CHUNK)
        inside = keys <= own
        kept = tl.load(p_chosen + keys, mask=inside, other=0) + tl.load(p_chosen + blocks + own - keys, mask=inside, other=0)
        # A P is no NaN, so that without a threshold, which is one, none is chosen.
        b_pairs = tl.load(p_pairs + row * blocks + keys, mask=keys < seen, other=-1.0)
        kept = inside & ((kept != 0) | (b_pairs >= smallest))
        found = append(p_indices + row * blocks, found, keys, kept)
    tl.store(p_num + row, found)


def flexprefill_triton(
    query: Tensor,
    key: Tensor,
    scale: float,
    count: Tensor | None = None,
    *,
    gamma: float = GAMMA,
    tau: float = TAU,
    min_budget: int = MIN_BUDGET,
    block: int = BLOCK,
    splitting: Splitting | None = None,
    cut: Search | None = None,
    means: int = MEANS,
    chunk: int = CHUNK,
) -> Lists:
    """Launch the kernels; also runs on CPU tensors in the Triton interpreter.

    splitting, cut, means: how last_rows.py, fewest.py and `_pairs` are cut. chunk: see lists.CHUNK.
    """
    query, key = aligned_rows(query), aligned_rows(key)
    batch, heads, capacity, _ = query.shape
    lists = empty_lists(batch, heads, cdiv(capacity, block), query.device)
    if lists.kv_num_blocks.numel() == 0:
        return lists
    blocks = lists.kv_num_blocks.shape[2]
    count = None if count is None else count.contiguous()
    mean = block_means(key, count, block)
    sums, bands = last_rows_sums(query, key, scale, count, block, splitting or Splitting())
    aware, pairs = _judged(query, mean, bands, count, scale, tau, {"BLOCK": block, "MEANS": means, "CHUNK": chunk})
    cut = cut or Search()
    state = search(sums, pairs, aware, count, gamma, block, cut)
    smallest = sums.new_empty(batch, heads)
    chosen = aware.new_empty(batch, heads, 2, blocks, dtype=torch.int8)
    launch(
        _budget_kernel, (2, heads, batch), (sums, bands, aware, count, state, smallest, chosen),
        (capacity, blocks, least_budget(min_budget, block), splits_used(capacity, blocks, cut), gamma),
        BLOCK=block, SPLITS=cut.splits, LINE=4 * chunk, CHUNK=chunk, num_warps=8,
    )  # fmt: skip
    launch(
        _list_kernel, (blocks, heads, batch), (pairs, aware, smallest, chosen, count, *lists), (capacity, blocks),
        BLOCK=block, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return lists


def _judged(
    query: Tensor, mean: Tensor, bands: Tensor, count: Tensor | None, scale: float, tau: float, cut: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Which heads are query-aware, int32 [B, H], and their P [B, H, Q, Q]."""
    (batch, heads, capacity, dim), blocks = query.shape, bands.shape[3]
    aware = torch.empty(batch, heads, dtype=torch.int32, device=query.device)
    pairs, pooled = bands.new_empty(batch, heads, blocks, blocks), bands.new_empty(batch, heads, blocks)
    align, scale_log2 = row_alignment(query, mean), scale * math.log2(math.e)
    numbers = (*row_strides(align, query), capacity, blocks, heads // mean.shape[1])
    options = {"DIM": dim, "BLOCK_D": block_dim(dim), "ALIGN": align, **cut, "num_warps": 8}
    launch(_judge_kernel, (heads, batch), (query, mean, bands, count, aware, pooled), (*numbers, tau, scale_log2), **options)
    launch(_pairs_kernel, (heads, blocks, batch), (query, mean, count, aware, pairs), (*numbers, scale_log2), **options)
    return aware, pairs


def least_budget(min_budget: int, block: int) -> int:
    """The smallest number of blocks in V and in S: at least the one that is always chosen."""
    return max(1, -(-min_budget // block))


def flexprefill_aten(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None = None, *,
    gamma: float = GAMMA, tau: float = TAU, min_budget: int = MIN_BUDGET, block: int = BLOCK,
) -> Lists:  # fmt: skip
    """The same in ATen ops alone, on any device."""
    capacity, blocks = query.shape[2], -(-query.shape[2] // block)
    real = real_blocks(count, capacity, block, query.device)
    rows = real.new_full(query.shape[:1], capacity) if count is None else count.clamp(max=capacity).long()
    none, (query, key) = whole_blocks(count, block, query, key)
    positions, wide = torch.arange(blocks * block, device=query.device), torch.promote_types(query.dtype, torch.float32)
    mean_key = block_means_aten(key.to(wide), none, block).to(key.dtype).to(wide)
    query, key, mean_key = query.to(wide), *(repeat_heads(x, query.shape[1]) for x in (key.to(wide), mean_key))
    sums = last_rows_sums_aten(query, key, scale, rows, block)
    bands = sums.unflatten(3, (blocks, block)).sum(dim=4)

    last = ((positions >= rows[:, None] - block) & ~none)[:, None, :, None]
    mean_last = (query * last).sum(dim=2, keepdim=True) / last.sum(dim=2, keepdim=True).clamp(min=1)
    aware = _aware(scale * mean_last @ mean_key.transpose(2, 3), bands[:, :, :1], real, rows, block, tau)
    candidates, _ = forced(blocks, real, 0, 0)
    logits = (scale * block_means_aten(query, none, block) @ mean_key.transpose(2, 3)).masked_fill(~candidates, -math.inf)
    pairs = logits.softmax(dim=3).masked_fill(~candidates, 0)
    smallest, _ = threshold_aten(pairs.flatten(2), gamma)
    aware_mask = aware & (pairs >= smallest[..., None])

    _, fewest = threshold_aten(sums.masked_fill(positions >= rows[:, None, None, None], 0), gamma)
    fewest = fewest.clamp(max=rows[:, None, None, None])  # behind the count are zeros, which a gamma above 1 takes too
    budget = torch.where(aware, 0, fewest // block + 1).clamp(min=least_budget(min_budget, block))
    places = torch.arange(blocks, device=query.device)
    bands = bands.masked_fill(places == 0, math.inf).masked_fill(places >= real, -1)
    ranks = bands.sort(dim=3, descending=True, stable=True).indices.argsort(dim=3)
    columns, diagonals = (ranks < budget).unbind(2)
    offsets = (places[:, None] - places).clamp(min=0)
    return lists_of(candidates & (columns[:, :, None] | diagonals[:, :, offsets] | aware_mask))


flexprefill_lists = by_device(flexprefill_triton, flexprefill_aten)


def _aware(logits: Tensor, bands: Tensor, real: Tensor, rows: Tensor, block: int, tau: float) -> Tensor:
    """Whether pooled logits [B, H, 1, Q] foretell what the last rows pay to blocks: bool [B, H, 1, 1]."""
    places = torch.arange(logits.shape[3], device=logits.device)
    pooled = logits.masked_fill((places >= real) & (places > 0), -math.inf).softmax(dim=3)
    true = bands / rows.clamp(1, block)[:, None, None, None]
    middle = (pooled + true) / 2
    divergence = (torch.xlogy(pooled, pooled / middle) + torch.xlogy(true, true / middle)) / 2
    return divergence.nan_to_num().sum(dim=3, keepdim=True).clamp(min=0).sqrt() < tau
