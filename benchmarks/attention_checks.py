"""What attention.py holds outputs against: float64 on a sample of rows, and torch's own operators.

Tolerances are relative errors of a row, |got - want| / |want|. They leave room for the rounding of the probabilities and
of the output to the input's type (bfloat16: 2^-9 each), and none for a row that is shifted or a tile that is missing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from tsa_compile.kernels.budget import budget_aten
from tsa_compile.kernels.compress import compress_aten
from tsa_compile.kernels.decompress import decompress_aten
from tsa_compile.kernels.select import select_by_sorting

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
SCORE_TOLERANCE = 1e-3


class WrongOutputError(Exception):
    """A method computed something else than it should."""


def demand(error: float, tolerance: float, what: str) -> float:
    """The error, if it is within the tolerance; NaN never is.

    Raises:
        WrongOutputError: it is not.
    """
    if not error <= tolerance:
        raise WrongOutputError(f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}")
    return error


def sampled_error(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, scale: float, selection: Tensor | None = None,
    heads: int = 4, rows: int = 12,
) -> float:  # fmt: skip
    """The largest relative error of a sample of rows of several heads, against causal attention in float64.

    Args:
        query, key, value, out: [B, H, L, D], [B, G, L, D], [B, G, L, Dv], [B, H, L, Dv].
        selection: ascending positions [B, H, n]: queries and keys are these rows. None: all.
    """
    generator = torch.Generator().manual_seed(0)
    batch, all_heads, length, _ = query.shape
    drawn = torch.randint(batch * all_heads, (max(heads - 2, 0),), generator=generator).tolist()
    errors = []
    for b, h in sorted({divmod(number, all_heads) for number in (0, batch * all_heads - 1, *drawn)}):
        g = h * key.shape[1] // all_heads
        chosen = torch.arange(length, device=query.device) if selection is None else selection[b, h].long()
        ends = torch.tensor([0, len(chosen) - 1])
        slots = torch.cat([ends, torch.randint(len(chosen), (rows,), generator=generator)]).to(query.device)
        logits = scale * query[b, h, chosen[slots]].double() @ key[b, g, chosen].double().T
        later = torch.arange(len(chosen), device=query.device) > slots[:, None]
        want = logits.masked_fill(later, -math.inf).softmax(-1) @ value[b, g, chosen].double()
        got = out[b, h, chosen[slots]].double()
        errors.append(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
    return float(torch.stack(errors).max())  # NaN, where there is any


def stray_rows(out: Tensor, selection: Tensor) -> int:
    """How many rows that were not selected are not exactly 0."""
    selected = torch.zeros(out.shape[:3], dtype=torch.bool, device=out.device)
    selected.scatter_(2, selection.long(), True)
    return int(((out != 0).any(dim=-1) & ~selected).sum())


def relative_difference(left: Tensor, right: Tensor) -> float:
    """0 for equal bits, else |left - right| / |right| over everything."""
    if torch.equal(left, right):
        return 0.0
    return float(torch.linalg.vector_norm((left - right).float()) / torch.linalg.vector_norm(right.float()))


def check_output(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, scale: float, selection: Tensor | None, what: str
) -> float:
    """The sampled error of an attention output.

    Raises:
        WrongOutputError: it is too large, or a row that was not selected is not 0.
    """
    if out.shape != (*query.shape[:3], value.shape[3]):
        raise WrongOutputError(f"{what}: the output is {tuple(out.shape)}")
    stray = 0 if selection is None else stray_rows(out, selection)
    if stray:
        raise WrongOutputError(f"{what}: {stray} rows that were not selected are not 0")
    return demand(sampled_error(query, key, value, out, scale, selection), TOLERANCE[query.dtype], what)


def check_score(query: Tensor, key: Tensor, scores: Tensor, scale: float, window: int, pool: int) -> float:
    """The largest relative error of the first and the last head's scores, against float64."""
    length, errors = query.shape[2], []
    future = torch.ones(window, window, dtype=torch.bool, device=query.device).triu(1)
    for h in (0, query.shape[1] - 1):
        logits = scale * query[0, h, -window:].double() @ key[0, h * key.shape[1] // query.shape[1]].double().T
        logits[:, -window:].masked_fill_(future, -math.inf)
        raw = logits.softmax(-1)[:, : length - window].mean(0)
        want = avg_pool1d(raw[None], pool, 1, pool // 2)[0]
        errors.append(((scores[0, h, : length - window] - want) / want).abs().max())
    if not bool((scores[..., -window:] == math.inf).all()):
        raise WrongOutputError("score: the window is not marked")
    return demand(float(torch.stack(errors).max()), SCORE_TOLERANCE, "score")


def check_budget(scores: Tensor, count: Tensor, coverage: float, min_tokens: int) -> float:
    """The share of the tokens by which the count differs from one that cumulates in float64; one token may."""
    want = budget_aten(scores, coverage, None, min_tokens)
    difference = max(float((count - want).abs().max()) - 1, 0) / scores.shape[2]
    return demand(difference, 1e-4, "budget")


def check_select(scores: Tensor, indices: Tensor) -> float:
    """0: the indices equal those of a stable sort.

    Raises:
        WrongOutputError: they do not.
    """
    return _equal(indices, select_by_sorting(scores, None, indices.shape[2]), "select")


def check_compress(inputs: tuple[Tensor, Tensor, Tensor], indices: Tensor, rows: tuple[Tensor, ...]) -> float:
    """0: the rows equal those of torch's indexing, bit for bit."""
    for found, wanted in zip(rows, compress_aten(*inputs, indices, None), strict=True):
        _equal(found, wanted, "compress")
    return 0.0


def check_decompress(out: Tensor, indices: Tensor, full: Tensor) -> float:
    """0: the output equals zeros and a scatter, bit for bit."""
    return _equal(full, decompress_aten(out, indices, None, full.shape[2]), "decompress")


def _equal(found: Tensor, wanted: Tensor, what: str) -> float:
    if not torch.equal(found, wanted):
        raise WrongOutputError(f"{what}: differs from torch's operators")
    return 0.0
