"""What attention.py holds outputs against: float64 on a sample of rows, and torch's own operators.

Tolerances are relative errors of a row, |got - want| / |want|. They leave room for the rounding of the probabilities and
of the output to the input's type (bfloat16: 2^-9 each), and none for a row that is shifted or a tile that is missing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from tsa_compile import Floor
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
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, scale: float, selected: Tensor | None = None,
    floor: Floor | None = None, heads: int = 4, rows: int = 12,
) -> float:  # fmt: skip
    """The largest relative error of a sample of rows of several heads, against causal attention in float64.

    Args:
        query, key, value, out: [B, H, L, D], [B, G, L, D], [B, G, L, Dv], [B, H, L, Dv].
        selected: bool [B, H, L], the tokens among which a selected row attends. None: all.
        floor: what every row sees besides, half of the sample being rows that are not selected. None: those are left out.
    """
    generator = torch.Generator().manual_seed(0)
    batch, all_heads, length, _ = query.shape
    drawn = torch.randint(batch * all_heads, (max(heads - 2, 0),), generator=generator).tolist()
    keys, errors = torch.arange(length, device=query.device), []
    for b, h in sorted({divmod(number, all_heads) for number in (0, batch * all_heads - 1, *drawn)}):
        g = h * key.shape[1] // all_heads
        chosen = torch.ones_like(keys, dtype=torch.bool) if selected is None else selected[b, h]
        pools = [chosen] if floor is None else [chosen, ~chosen]
        sample = torch.cat([_sample(pool, rows // len(pools), generator) for pool in pools])
        behind = sample[:, None] - keys
        seen = chosen & chosen[sample][:, None]
        if floor is not None:
            seen = seen | (behind < floor.window) | (keys < floor.sinks)
        logits = scale * query[b, h, sample].double() @ key[b, g].double().T
        want = logits.masked_fill(~seen | (behind < 0), -math.inf).softmax(-1) @ value[b, g].double()
        got = out[b, h, sample].double()
        errors.append(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
    return float(torch.stack(errors).max())  # NaN, where there is any


def _sample(marks: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """The first and the last marked position, and some between."""
    places = marks.nonzero()[:, 0]
    if len(places) == 0:
        return places
    ends = torch.tensor([0, len(places) - 1])
    return places[torch.cat([ends, torch.randint(len(places), (number,), generator=generator)]).to(places.device)]


def stray_rows(out: Tensor, selected: Tensor) -> int:
    """How many rows that were not selected are not exactly 0."""
    return int(((out != 0).any(dim=-1) & ~selected).sum())


def relative_difference(left: Tensor, right: Tensor) -> float:
    """0 for equal bits, else |left - right| / |right| over everything."""
    if torch.equal(left, right):
        return 0.0
    return float(torch.linalg.vector_norm((left - right).float()) / torch.linalg.vector_norm(right.float()))


def check_output(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, scale: float, what: str, selected: Tensor | None = None,
    floor: Floor | None = None,
) -> float:  # fmt: skip
    """The sampled error of an attention output; `selected` and `floor` as in `sampled_error`.

    Raises:
        WrongOutputError: it is too large; or there is no floor, and a row that was not selected is not 0.
    """
    if out.shape != (*query.shape[:3], value.shape[3]):
        raise WrongOutputError(f"{what}: the output is {tuple(out.shape)}")
    stray = 0 if selected is None or floor is not None else stray_rows(out, selected)
    if stray:
        raise WrongOutputError(f"{what}: {stray} rows that were not selected are not 0")
    return demand(sampled_error(query, key, value, out, scale, selected, floor), TOLERANCE[query.dtype], what)


def check_score(query: Tensor, key: Tensor, scores: Tensor, scale: float, window: int, pool: int, reduce: str) -> float:
    """The largest relative error of the first and the last head's scores, against float64."""
    length, errors = query.shape[2], []
    future = torch.ones(window, window, dtype=torch.bool, device=query.device).triu(1)
    for h in (0, query.shape[1] - 1):
        logits = scale * query[0, h, -window:].double() @ key[0, h * key.shape[1] // query.shape[1]].double().T
        logits[:, -window:].masked_fill_(future, -math.inf)
        weights = logits.softmax(-1)[:, : length - window]
        raw = weights.amax(0) if reduce == "max" else weights.mean(0)
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
