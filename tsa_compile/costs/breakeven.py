"""How much a budget keeps, and from which length on a sparse call gains on a device.

`minimum` is the one rule: of graphs, whose lengths may be symbolic, of eager models, and of engines that judge each request.
What is unknown is assumed so that the sparse path looks slower than it is: see `expected_share` and `gains`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar

import torch

from tsa_compile.config import Budget, KeepRatio, TSAConfig
from tsa_compile.costs.calls import CallShape, dense_work, sparse_path
from tsa_compile.costs.devices import DeviceCosts, for_device
from tsa_compile.kernels.kept import kept_of_share, never_dropped

LONGEST = 2**20  # tokens; a call that does not gain here never does
STEP = 256  # break-even lengths are rounded up to multiples: the figures behind them are no finer
MARGIN = 0.05  # the sparse path must be faster than dense by this share: medians of two runs differ by as much
WORST_LOSS = 0.02  # how much slower a model may become on the input of which `Coverage` drops least
FEW_QUERIES = 32
"""Behind a cache, fewer queries than this stay dense: a step of assisted decoding, which must be exact, has up to 21 of them
with the defaults of transformers (20 candidates). Where their number is known while compiling, they also keep their mask."""
LAYER_WEIGHTS = 12  # weights of a layer's projections and MLP, in (H D)^2: the least that dense decoders have (Llama 13)

_DROPPABLE = "where tokens can be dropped"
Length = TypeVar("Length", int, torch.SymInt)


def expected_share(budget: Budget, length: int) -> float | Fraction:
    """The share of candidates that a budget is expected to keep.

    KeepRatio: its ratio, exactly. Coverage(tau) depends on the input. At tau 0.005 the publication (arXiv 2602.03216) found
    17% of the attention map skipped in the sparse layers at 4K and 54% at 128K: sqrt(0.83) and sqrt(0.46) of the tokens
    kept. In between it is taken as linear in log2 L, beyond as constant. The share dropped is a concave function of tau, 0
    at 0 and 1 at 1, because the least-scored tokens go first; so the chords from its one known value bound it from below.
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
    """The share of all tokens that a call keeps, given that of the candidates: the window and the minimum included."""
    return kept_of_share(length, config.window, share, config.min_tokens, config.capacity) / length


def expected_kept(config: TSAConfig, length: int) -> float:
    """The share of all tokens that a call is expected to keep."""
    return kept_share(config, length, expected_share(config.budget, length))


def gains(costs: DeviceCosts, call: CallShape, config: TSAConfig, length: int, sparse_layers: float = 0.5) -> bool:
    """Whether a call of this length is faster sparse, and safe to make sparse.

    The expected time must be below the dense one by `MARGIN`. And where Coverage finds next to nothing to drop, the steps
    around attention are spent in vain, and where the host does not run ahead, the GPU waits for it: each may slow the model,
    of whose layers `sparse_layers` are sparse, by `WORST_LOSS`.
    """
    dense, keys = dense_work(call, costs, length).ms, length + call.past
    expected = sparse_path(call, costs, length, expected_kept(config, keys)).ms
    worst = sparse_path(call, costs, length, kept_share(config, keys, largest_share(config.budget))).ms
    weights = LAYER_WEIGHTS * (call.heads * call.head_dim) ** 2
    layer = dense + 2 * call.batch * length * weights / (costs.matmul_tflops * 1e9)
    loss = max(worst, costs.host_ms) - dense
    return expected <= (1 - MARGIN) * dense and sparse_layers * loss <= WORST_LOSS * layer


def break_even(costs: DeviceCosts, call: CallShape, config: TSAConfig, sparse_layers: float = 0.5) -> int | None:
    """The shortest length, of a chunk its own, from which a call gains, here and at every longer one; None if none does.

    Args:
        sparse_layers: the share of the model's layers that are sparse.
    """
    # Only what matters: a config may hold a compiler that cannot be hashed.
    relevant = TSAConfig(budget=config.budget, window=config.window, min_tokens=config.min_tokens, capacity=config.capacity)
    return _break_even(costs, call, relevant, sparse_layers)


@functools.lru_cache(maxsize=1024)
def _break_even(costs: DeviceCosts, call: CallShape, config: TSAConfig, sparse_layers: float) -> int | None:
    """From above by eighths of an octave, since a call gains from there on; then by bisection."""

    def gaining(steps: int) -> bool:
        return gains(costs, call, config, steps * STEP, sparse_layers)

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


@dataclass(frozen=True)
class Minimum:
    """From which length on calls of one shape, behind a cache of one length, are compressed.

    Attributes:
        tokens: None: at no length.
        of_keys: whether all keys so far are counted, as all of them are selected from; else the queries are.
        why: what happens there.
    """

    tokens: int | None
    of_keys: bool
    why: str

    @property
    def shortest(self) -> int | None:
        """The shortest prompt that is compressed; one token alone, a decode step, never is."""
        return None if self.tokens is None else max(self.tokens, 2)

    def __str__(self) -> str:
        return f"for no length: {self.why}" if self.tokens is None else f"from {self.tokens} tokens on, {self.why}"

    def length(self, queries: Length, keys: Length) -> Length:
        """What is compared with `tokens`."""
        return keys if self.of_keys else queries

    def of_all_keys(self, past: int) -> Minimum:
        """The same behind `past` keys, counted in all keys so far: what one chunk of a prompt reaches, later ones do."""
        if self.of_keys or self.tokens is None:
            return self
        return replace(self, tokens=self.tokens + past, of_keys=True)

    def reached_by(self, queries: int, keys: int) -> bool:
        """Whether so many queries are compressed, which are the last of the keys."""
        least = 2 if queries == keys else FEW_QUERIES
        return self.tokens is not None and queries >= least and self.length(queries, keys) >= self.tokens


def minimum(
    config: TSAConfig, call: CallShape, sparse_layers: float = 0.5, where: DeviceCosts | torch.device | None = None
) -> Minimum:
    """From which length on a call behind `call.past` keys is compressed: the one rule of compilers and engines.

    What the user says; else from where tokens can be dropped and, on CUDA devices, that pays.

    Args:
        sparse_layers: the share of the model's layers that are sparse.
        where: the device, or its costs; None where speed does not count, as on a CPU.
    """
    if config.min_length is not None:
        return Minimum(config.min_length, False, "the configured min_length")
    if isinstance(where, torch.device):
        where = for_device(where) if where.type == "cuda" else None
    able = droppable(config)
    if where is None:
        return Minimum(able, True, _DROPPABLE)
    gaining = break_even(where, call, config, sparse_layers)
    if gaining is None:
        return Minimum(None, False, f"with {config.budget} the sparse path never breaks even on {where.name}")
    if gaining > able - call.past:
        return Minimum(gaining, False, f"where the sparse path breaks even on {where.name}")
    return Minimum(able, True, _DROPPABLE)


def droppable(config: TSAConfig) -> int:
    """The shortest length that is compressed where speed does not count: what the user says, else where tokens can go."""
    return config.min_length or never_dropped(config.window, config.min_tokens) + 1
