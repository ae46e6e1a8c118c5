"""The block selectors in plain PyTorch: which key blocks each query block computes, as the papers say it.

As in reference.py: written to be read, with loops, sharing no code with what it checks. Each returns a mask bool
[B, H, Q, Q] of blocks of `block` rows; rows from `count` on are no queries and no keys. What is computed of such blocks,
`keys_of` says, and what it means under a floor, `floor_mask`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tsa_compile.kernels import reference


def _heads(query: Tensor, key: Tensor, count: Tensor | None) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Each item and head, with its real rows in float64."""
    for b in range(query.shape[0]):
        rows = query.shape[2] if count is None else int(count[b])
        for h in range(query.shape[1]):
            kv = h * key.shape[1] // query.shape[1]
            yield b, h, query[b, h, :rows].double(), key[b, kv, :rows].double()


def _no_blocks(query: Tensor, block: int) -> Tensor:
    blocks = -(-query.shape[2] // block)
    return torch.zeros(*query.shape[:2], blocks, blocks, dtype=torch.bool, device=query.device)


def keys_of(blocks: Tensor, block: int, capacity: int, count: Tensor | None) -> Tensor:
    """Which keys each row sees, bool [B,H,Q,Q] of blocks -> [B,H,C,C]: no later ones, and nothing from `count` on."""
    seen = torch.zeros(*blocks.shape[:2], capacity, capacity, dtype=torch.bool, device=blocks.device)
    for b in range(blocks.shape[0]):
        for i in range(capacity if count is None else int(count[b])):
            seen[b, :, i, : i + 1] = blocks[b, :, i // block].repeat_interleave(block, dim=1)[:, : i + 1]
    return seen


def log_sum_exp(seen: Tensor, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Of the logits of what each row sees, natural: bool [B,H,C,C] -> float64 [B,H,C]; -inf in rows that see nothing."""
    out = torch.full(seen.shape[:3], -math.inf, dtype=torch.float64, device=query.device)
    for b, h, q, k in _heads(query, key, None):
        for i, keys in enumerate(seen[b, h]):
            out[b, h, i] = (scale * k[keys] @ q[i]).logsumexp(dim=0)
    return out


def floor_mask(
    seen: Tensor, indices: Tensor, count: Tensor | None, padding: Tensor | None, seq_len: int, window: int, sinks: int
) -> Tensor:
    """What each row sees where a kernel leaves out some of the selected tokens: bool [B,H,L,L].

    Every row sees its neighbourhood, but a selected one of the selected tokens those that the kernel looked at.

    Args:
        seen: which compressed rows the kernel looks at from each, bool [B,H,C,C].
        indices, count: where these rows come from, [B,Hs,C] and [B].
    """
    batch, heads, capacity, _ = seen.shape
    mask = reference.floor_mask(padding, torch.zeros(batch, heads, seq_len, dtype=torch.bool), window, sinks)
    for b in range(batch):
        kept = capacity if count is None else int(count[b])
        for h in range(heads):
            places = indices[b, h * indices.shape[1] // heads, :kept].long()
            mask[b, h, places[:, None], places] = seen[b, h, :kept, :kept]
    return mask


def flashprefill(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None, *,
    alpha: float, sinks: int, window: int, last: int, block: int,
) -> Tensor:  # fmt: skip
    """FlashPrefill, arXiv 2608.19758: blocks whose mean key gets at least alpha times the attention that the best gets."""
    mask = _no_blocks(query, block)
    for b, h, q, k in _heads(query, key, count):
        means = torch.stack([rows.mean(dim=0) for rows in k.split(block)]) if len(k) else k
        queries = q.split(block) if len(q) else ()
        for i, rows in enumerate(queries):
            energy = (scale * rows @ means[: i + 1].T).exp().sum(dim=0)
            for j in range(i + 1):
                always = j < sinks or i - j < window or i >= len(queries) - last
                mask[b, h, i, j] = always or bool(energy[j] >= alpha * energy.max())
    return mask


def xattention(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None, *, stride: int, mass: float, block: int
) -> Tensor:
    """XAttention, arXiv 2503.16428: the fewest blocks that hold `mass` of the softmax over sums along antidiagonals.

    The first block and the diagonal are on every list, and count towards the mass.
    """
    mask = _no_blocks(query, block)
    for b, h, q, k in _heads(query, key, count):
        groups = math.ceil(len(q) / stride)
        padded = torch.zeros(2, groups * stride, q.shape[1], dtype=q.dtype, device=q.device)
        padded[0, : len(q)], padded[1, : len(k)] = q, k
        q, k = padded.unflatten(1, (groups, stride))
        # In every stride x stride tile the antidiagonal: query stride - 1 - i meets key i.
        sums = torch.einsum("gid,hid->gh", q.flip(1), k) * scale / stride
        future = torch.ones_like(sums, dtype=torch.bool).triu(1)
        weights = sums.masked_fill(future, -math.inf).softmax(dim=1)
        per_block = block // stride
        for i, rows in enumerate(weights.split(per_block) if groups else ()):
            blocks = torch.stack([tile.sum() for tile in rows.split(per_block, dim=1)])[: i + 1]
            chosen = {0, i}
            others = sorted(set(range(i + 1)) - chosen, key=lambda j: -float(blocks[j]))
            while blocks[list(chosen)].sum() < mass * blocks.sum():
                chosen.add(others.pop(0))
            mask[b, h, i, list(chosen)] = True
    return mask


def flexprefill_mask(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None, *,
    gamma: float, tau: float, min_budget: int, block: int,
) -> Tensor:  # fmt: skip
    """FlexPrefill, arXiv 2502.20766, algorithms 1 to 4, by whole blocks of columns and of diagonals as its published code.

    A head gets at least min_budget tokens' columns, and as many diagonals.
    """
    mask = _no_blocks(query, block)
    least = max(1, math.ceil(min_budget / block))
    for b, h, q, k in _heads(query, key, count):
        if len(q) == 0:
            continue
        attention = _last_attention(q[-block:], k, scale)
        columns, diagonals = attention.sum(dim=0), _diagonal_sums(attention)
        means = torch.stack([rows.mean(dim=0) for rows in k.split(block)])
        pooled = (scale * means @ q[-block:].mean(dim=0)).softmax(dim=0)
        true = torch.stack([part.sum() for part in columns.split(block)]) / len(attention)
        query_aware = _divergence(pooled, true) ** 0.5 < tau
        budgets = [least if query_aware else max(least, _fewest(sums, gamma) // block + 1) for sums in (columns, diagonals)]
        chosen_columns, chosen_diagonals = (
            _heaviest_blocks(sums, budget, block) for sums, budget in zip((columns, diagonals), budgets)
        )
        weights = [(scale * means[: i + 1] @ rows.mean(dim=0)).softmax(dim=0) for i, rows in enumerate(q.split(block))]
        ordered = torch.cat(weights).sort(descending=True).values
        needed = _fewest(ordered, gamma)
        smallest = ordered[needed - 1] if query_aware and needed > 0 else math.inf
        for i in range(len(means)):
            for j in range(i + 1):
                by_query = bool(weights[i][j] >= smallest)
                mask[b, h, i, j] = j in chosen_columns or i - j in chosen_diagonals or by_query
    return mask


def _last_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The attention of the last rows to all."""
    logits = scale * queries @ keys.T
    future = torch.ones_like(logits, dtype=torch.bool).triu(len(keys) - len(queries) + 1)
    return logits.masked_fill(future, -math.inf).softmax(dim=1)


def _diagonal_sums(attention: Tensor) -> Tensor:
    """The sum along each diagonal of the last rows' attention, the main one first."""
    rows, columns = attention.shape
    return torch.stack([attention.diagonal(columns - rows - distance).sum() for distance in range(columns)])


def _divergence(first: Tensor, second: Tensor) -> float:
    """Jensen and Shannon's, in nats."""
    middle = (first + second) / 2
    terms = [torch.xlogy(p, p / middle).nan_to_num().sum() / 2 for p in (first, second)]
    return max(0.0, float(torch.stack(terms).sum()))


def _fewest(numbers: Tensor, share: float) -> int:
    """How many of the largest numbers it takes until they hold this share of the sum; all, if they never do."""
    held, total = 0.0, float(numbers.sum())
    for taken, number in enumerate(numbers.sort(descending=True).values.tolist()):
        if held >= share * total:
            return taken
        held += number
    return len(numbers)


def _heaviest_blocks(sums: Tensor, budget: int, block: int) -> set[int]:
    """The first block, and of the others the heaviest, of which the lower come first."""
    blocks = [float(part.sum()) for part in sums.split(block)]
    others = sorted(range(1, len(blocks)), key=lambda j: (-blocks[j], j))
    return {0, *others[: budget - 1]}


def minference_mask(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None, *,
    vertical: list[int], slash: list[int], a_shape: list[bool], sinks: int, near: int, last: int, block: int,
) -> Tensor:  # fmt: skip
    """MInference, arXiv 2407.02490: per head the columns and diagonals that the `last` rows attend to most, or the first.

    Unlike the others, a mask of keys, bool [B, H, C, C]. A diagonal is computed for `block` rows at a time: their keys on
    it, the nearest diagonal first, in as few tiles of `block` keys as it takes. A row sees its own block, and no later key.
    """
    mask = torch.zeros(*query.shape[:3], query.shape[2], dtype=torch.bool, device=query.device)
    for b, h, q, k in _heads(query, key, count):
        n = len(q)
        if n == 0:
            continue
        attention = _last_attention(q[-last:], k, scale)
        columns, diagonals = attention.sum(dim=0).tolist(), _diagonal_sums(attention).tolist()
        if a_shape[h]:
            columns = diagonals = [-place for place in range(n)]
        columns = [math.inf] * min(sinks, n) + columns[sinks:]
        diagonals = [math.inf] * min(near, n) + diagonals[near:]
        first_columns = sorted(range(n), key=lambda j: (-columns[j], j))[: max(vertical[h], sinks)]
        first_diagonals = sorted(range(n), key=lambda d: (-diagonals[d], d))[: max(slash[h], near // 2)]
        for start in range(0, n, block):
            # Keys at distance d from the rows of this block end d before the block does.
            seen, reached = set(first_columns), start
            seen |= set(range(start, n))
            for d in sorted(first_diagonals):
                while reached > start - d:
                    top = min(reached, start + block - d)
                    reached = top - block
                    seen |= set(range(max(reached, 0), top))
            for i in range(start, min(start + block, n)):
                mask[b, h, i, [j for j in seen if j <= i]] = True
    return mask
