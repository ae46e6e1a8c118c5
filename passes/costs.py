"""What one attention site costs, dense and sparse, and from which length on the sparse path gains.

    dense(L)     = attention over L rows
    sparse(L, s) = launches + score + budget + select + compress + attention over s L rows + decompress
    rest(L)      = a layer's projections and MLP, and what is between them

FLOPs, bytes and milliseconds are sympy expressions in `LENGTH` (L, tokens) and `KEPT` (s, the kept share of them).
Everything else is a number: B, H, G, D, Dv, bytes per element and the window come from a `SiteShape`; rates come from
devices.py, the only place with measured figures. Attention over n rows takes t0 + B H (D + Dv) (n^2 + h n) / rate, at
n = h (the half length) twice what its causal pairs are worth: short rows do not fill the GPU, diagonal tiles are half empty.
The rate is that of D = Dv = 128; a pair's exponential takes as long whatever the head size, so narrower heads are slower.

What is unknown is assumed so that the sparse path looks slower than it is, or dense attention faster: see `SiteShape`,
`expected_share`, `gains` and, for devices, devices.py. Not foreseen are padded batches of very unequal items (the dense path
skips their padding too), padding with holes, and a kernel asked for by name that is slower than the dense one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction

import sympy
import torch
from torch import Tensor

from tsa_compile.config import Budget, Coverage, KeepRatio, TSAConfig
from tsa_compile.passes.devices import H200, DeviceCosts

LENGTH, KEPT = sympy.symbols("L s", positive=True)
LONGEST = 2**20  # tokens; a site that does not gain here never does
STEP = 256  # break-even lengths are rounded up to multiples: the figures behind them are no finer
MARGIN = 0.05  # the sparse path must be faster than dense by this share: medians of two runs differ by as much
WORST_LOSS = 0.02  # how much slower a model may become on the input of which `Coverage` drops least
LAYER_WEIGHTS = 12  # weights of a layer's projections and MLP, in (H D)^2: the least that dense decoders have (Llama 13)
ROUNDED_ROWS = sympy.Rational(33, 32)  # rows computed for a count read on the host (kernels/attend.py), at most
SCORED_DIM = 128  # narrower heads score no faster: their exponentials are as many
MEASURED_WIDTH = 256  # D + Dv of which `attention_tflops` is the rate


@dataclass(frozen=True)
class SiteShape:
    """What the costs of one attention call depend on besides its length."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    itemsize: int
    """Bytes per element. Attention in float32 is charged at the speed of half precision, though it is far slower."""
    window: int
    grouped: bool = False
    """Whether the heads of a group select together. `score` and `select` are charged per query head all the same."""
    counted: bool = True
    """Whether the number of kept rows is known on the device only, as with Coverage."""

    @property
    def selections(self) -> int:
        """How many heads select for themselves: so many heads of key and value are gathered."""
        return self.kv_heads if self.grouped else self.heads

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, config: TSAConfig) -> SiteShape:
        """The call on these [B,H,L,D], [B,G,L,D], [B,G,L,Dv]. A symbolic batch is 1.

        Launches weigh most there, and the graph that is compiled for one batch size serves the others.
        """
        batch, heads, kv_heads = query.shape[0], query.shape[1], key.shape[1]
        return cls(
            batch=batch if isinstance(batch, int) else 1,
            heads=heads,
            kv_heads=kv_heads if isinstance(kv_heads, int) else heads,
            head_dim=query.shape[3],
            value_head_dim=value.shape[3],
            itemsize=query.dtype.itemsize,
            window=config.window,
            grouped=config.granularity == "group",
            counted=isinstance(config.budget, Coverage),
        )


@dataclass(frozen=True)
class Work:
    """Floating-point operations, bytes read and written, and the time that they take in ms: expressions in L and s."""

    flops: sympy.Expr
    bytes: sympy.Expr
    ms: sympy.Expr


def attention_work(site: SiteShape, costs: DeviceCosts, rows: sympy.Expr, kv_heads: int) -> Work:
    """Causal attention over [B,H,rows,D], with key and value at `kv_heads` heads. Its bytes hide behind its FLOPs."""
    width = site.head_dim + site.value_head_dim
    per_pair = site.batch * site.heads * width  # 2 FLOPs, for half of the pairs
    pairs = rows * (rows + costs.attention_half_length)
    running = per_pair * _slowness(width, costs.attention_exponential) * pairs / (costs.attention_tflops * 1e9)
    slower = costs.attention_slowdown * sympy.Max(0, running - costs.attention_sustained_ms)
    moved = site.batch * (site.heads + kv_heads) * width * site.itemsize * rows
    return Work(per_pair * rows**2, moved, costs.attention_ms + running + slower)


def _slowness(width: int, exponential: float) -> float:
    """What a product of heads of D + Dv = `width` takes, relative to `MEASURED_WIDTH`."""
    return (1 + exponential / width) / (1 + exponential / MEASURED_WIDTH)


def dense_work(site: SiteShape, costs: DeviceCosts) -> Work:
    """The call as the model wrote it, by the fastest dense kernel."""
    return attention_work(site, costs, LENGTH, site.kv_heads)


def sparse_work(site: SiteShape, costs: DeviceCosts) -> dict[str, Work]:
    """The sparse path by steps, of which "launches" is what it takes at any length."""
    batch, heads, size = site.batch, site.heads, site.itemsize
    kept, selections, zero = KEPT * LENGTH, site.selections, sympy.Integer(0)

    def moved(count: sympy.Expr, rate: float, flops: sympy.Expr = zero) -> Work:
        return Work(flops, count, count / (rate * 1e9) + flops / (costs.score_tflops * 1e9))

    indices = 4 * batch * selections * kept
    # Key is read twice and the products are made twice, since the weights are too many to keep; the scores are written,
    # read for pooling and written again.
    products = 4 * batch * heads * max(site.head_dim, SCORED_DIM) * site.window * LENGTH
    scored = (2 * site.kv_heads * site.head_dim * size + 12 * heads) * batch * LENGTH
    # A row of key and value is read from memory once, for however many heads of its group.
    pair = site.head_dim + site.value_head_dim
    pair_in = LENGTH * sympy.Min(1, KEPT * (heads // site.kv_heads)) * site.kv_heads * pair
    gathered = 2 * kept * heads * site.head_dim + pair_in + kept * selections * pair
    scattered = batch * heads * site.value_head_dim * size * (LENGTH + kept)
    return {
        "launches": Work(zero, zero, sympy.Float(costs.sparse_ms + (costs.count_ms if site.counted else 0.0))),
        "score": moved(scored, costs.bandwidth_tbs, products),
        "budget": moved(batch * (4 * heads + 12) * LENGTH if site.counted else zero, costs.bandwidth_tbs),
        "select": moved(4 * batch * heads * (5 * LENGTH + kept), costs.select_tbs),
        "compress": moved(batch * size * gathered + indices, costs.bandwidth_tbs),
        "attend": _attend_work(site, costs),
        "decompress": moved(scattered + indices, costs.bandwidth_tbs),
    }


def _attend_work(site: SiteShape, costs: DeviceCosts) -> Work:
    """Attention over the kept rows; with a count, at worst one call per item, on as many more rows as are rounded up."""
    exact = attention_work(site, costs, KEPT * LENGTH, site.selections)
    if not site.counted:
        return exact
    rounded = attention_work(site, costs, LENGTH * sympy.Min(1, KEPT * ROUNDED_ROWS), site.selections)
    return replace(exact, ms=rounded.ms + (site.batch - 1) * costs.attention_ms)


@dataclass(frozen=True)
class RestShape:
    """What the costs of a layer without its attention, or of the head, depend on besides the length."""

    batch: int
    tokens: int | None
    """How many tokens of each item pass; None for all L."""
    active: int
    """Weights that each token is multiplied with: of a mixture of experts those of its experts."""
    weights: int
    """Weights that are read."""
    elements: int
    """Elements per token that kernels between the products read and write: norms, residuals, positions, activations."""
    itemsize: int


def rest_work(rest: RestShape, costs: DeviceCosts) -> Work:
    """Projections and MLP, at the rate of the products or of reading the weights, and the kernels between them."""
    tokens = rest.batch * (LENGTH if rest.tokens is None else sympy.Integer(rest.tokens))
    flops, read, moved = 2 * rest.active * tokens, rest.weights * rest.itemsize, rest.elements * rest.itemsize * tokens
    products = sympy.Max(flops / (costs.matmul_tflops * 1e9), read / (costs.bandwidth_tbs * 1e9))
    return Work(flops, read + moved, products + moved / (costs.bandwidth_tbs * 1e9))


@functools.lru_cache
def dense_ms(site: SiteShape, costs: DeviceCosts) -> Callable[[float], float]:
    """Milliseconds of the dense call, of its length."""
    return sympy.lambdify(LENGTH, dense_work(site, costs).ms, "math")


@functools.lru_cache
def sparse_ms(site: SiteShape, costs: DeviceCosts) -> Callable[[float, float], float]:
    """Milliseconds of the whole sparse path, of the length and the kept share."""
    return sympy.lambdify((LENGTH, KEPT), sympy.Add(*(step.ms for step in sparse_work(site, costs).values())), "math")


def expected_share(budget: Budget, length: int) -> float | Fraction:
    """The share of candidates that a budget is expected to keep.

    KeepRatio: its ratio, exactly. Coverage(tau) depends on the input. At tau .005 the publication (arXiv 2602.03216) found
    17% of the attention map skipped in the sparse layers at 4K and 54% at 128K: sqrt(.83) and sqrt(.46) of the tokens kept.
    In between it is taken as linear in log2 L, beyond as constant. The share dropped is a concave function of tau, 0 at 0
    and 1 at 1, because the least-scored tokens go first; so the chords from its one known value bound it from below.
    """
    if isinstance(budget, KeepRatio):
        return budget.fraction
    at_4k, at_128k = 1 - math.sqrt(0.83), 1 - math.sqrt(0.46)
    octaves = min(max(math.log2(length / 4096), 0.0), 5.0)
    dropped = at_4k + (at_128k - at_4k) * octaves / 5
    if budget.tau <= 0.005:
        return 1 - dropped * budget.tau / 0.005
    return (1 - dropped) * (1 - budget.tau) / (1 - 0.005)


def largest_share(budget: Budget) -> float | Fraction:
    """The share of candidates that a budget keeps at most: by Coverage(tau) where all scores are equal."""
    return budget.fraction if isinstance(budget, KeepRatio) else 1 - budget.tau


def kept_share(config: TSAConfig, length: int, share: float | Fraction) -> float:
    """The share of all tokens that a site keeps, given that of the candidates: the window and the minimum included."""
    window = min(config.window, length)
    candidates = length - window
    kept = window + min(candidates, max(config.min_tokens, math.ceil(share * candidates)))
    return min(kept, length if config.capacity is None else config.capacity) / length


def gains(costs: DeviceCosts, site: SiteShape, config: TSAConfig, length: int, sparse_layers: float = 0.5) -> bool:
    """Whether a site of this length is faster sparse, and safe to make sparse.

    The expected time must be below the dense one by `MARGIN`. And where Coverage finds next to nothing to drop, the steps
    around attention are spent in vain, and where the host does not run ahead, the GPU waits for it: each may slow the model,
    of whose layers `sparse_layers` are sparse, by `WORST_LOSS`.
    """
    budget, dense = config.budget, dense_ms(site, costs)(length)
    expected, worst = (
        sparse_ms(site, costs)(length, kept_share(config, length, share))
        for share in (expected_share(budget, length), largest_share(budget))
    )
    weights = LAYER_WEIGHTS * (site.heads * site.head_dim) ** 2
    layer = dense + 2 * site.batch * length * weights / (costs.matmul_tflops * 1e9)
    loss = max(worst, costs.host_ms) - dense
    return expected <= (1 - MARGIN) * dense and sparse_layers * loss <= WORST_LOSS * layer


def break_even(costs: DeviceCosts, site: SiteShape, config: TSAConfig, sparse_layers: float = 0.5) -> int | None:
    """The shortest length from which a site gains, here and at every longer one; None if it never does.

    Args:
        sparse_layers: the share of the model's layers that are sparse.
    """
    # Only what matters: a config may hold a compiler that cannot be hashed.
    relevant = TSAConfig(budget=config.budget, window=config.window, min_tokens=config.min_tokens, capacity=config.capacity)
    return _break_even(costs, site, relevant, sparse_layers)


@functools.lru_cache(maxsize=1024)
def _break_even(costs: DeviceCosts, site: SiteShape, config: TSAConfig, sparse_layers: float) -> int | None:
    """From above by eighths of an octave, since a site gains from there on; then by bisection."""

    def gaining(steps: int) -> bool:
        return gains(costs, site, config, steps * STEP, sparse_layers)

    high = LONGEST // STEP
    if not gaining(high):
        return None
    low = high
    while low > 1 and gaining(low):
        high, low = low, min(low - 1, int(low * 2**-0.125))
    if gaining(low):
        return low * STEP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gaining(middle) else (middle, high)
    return high * STEP


def fit_attention(
    site: SiteShape, times: Iterable[tuple[float, float]], exponential: float = H200.attention_exponential
) -> tuple[float, float, float]:
    """Measured (rows, ms) of attention -> attention_tflops, attention_half_length, attention_ms.

    Least squares of t0 + a n + b n^2 in relative errors; times at a lowered clock do not belong here.
    """
    rows, ms = (torch.tensor(column, dtype=torch.float64) for column in zip(*times))
    terms = torch.stack([torch.ones_like(rows), rows, rows**2], dim=1) / ms[:, None]
    launch, linear, square = torch.linalg.lstsq(terms, torch.ones_like(ms)[:, None]).solution.flatten().tolist()
    width = site.head_dim + site.value_head_dim
    per_pair = site.batch * site.heads * width * _slowness(width, exponential)
    return per_pair / square / 1e9, linear / square, launch
