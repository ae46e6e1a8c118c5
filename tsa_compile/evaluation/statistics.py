"""Shares with intervals, and what two methods on the same samples differ in.

Closed forms and exact integers, so that nothing but the standard library is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from tsa_compile.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """A share of samples with its interval."""

    value: float
    low: float
    high: float
    samples: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Comparison:
    """A method against a baseline on the same samples.

    Attributes:
        difference: accuracy of the method minus that of the baseline.
        low, high: its interval.
        lost, gained: samples that the baseline alone, and the method alone, has right.
        p_value: of McNemar's exact test that both are equally accurate.
    """

    difference: float
    low: float
    high: float
    lost: int
    gained: int
    samples: int
    p_value: float


def wilson(right: int, samples: int, confidence: float = 0.95) -> Share:
    """Accuracy with Wilson's score interval (J. Am. Stat. Assoc. 22, 1927): within [0, 1], and of some width at 0 and 1.

    Raises:
        ConfigError: there is no sample, more are right than there are, or the confidence is not in (0, 1).
    """
    if samples < 1 or not 0 <= right <= samples:
        raise ConfigError(f"{right} right of {samples} samples: there must be a sample, and at most all can be right")
    z, value = _quantile(confidence), right / samples
    shrink = 1 + z * z / samples
    center = (value + z * z / (2 * samples)) / shrink
    margin = z / shrink * math.sqrt(value * (1 - value) / samples + (z / (2 * samples)) ** 2)
    low = 0.0 if right == 0 else center - margin
    high = 1.0 if right == samples else center + margin
    return Share(value, low, high, samples)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value: discordant pairs fall to either side like a fair coin (McNemar, Psychometrika 12, 1947).

    Computed in integers: exact for any number of pairs, where sums of floating-point probabilities underflow.
    """
    if lost < 0 or gained < 0:
        raise ConfigError(f"{lost} lost and {gained} gained samples: neither can be negative")
    pairs, term, tail = lost + gained, 1, 0
    for successes in range(min(lost, gained) + 1):
        tail += term
        term = term * (pairs - successes) // (successes + 1)
    return min(1.0, 2 * tail / 2**pairs)


def compare(method: Sequence[bool], baseline: Sequence[bool], confidence: float = 0.95) -> Comparison:
    """A method against a baseline; item i of both is the same sample.

    The interval is Newcombe's (Stat. Med. 17, 1998, page 2635, method 10): Wilson's intervals of the two accuracies,
    combined by their correlation. Unlike the difference's normal interval it holds where nearly all samples are right.

    Raises:
        ConfigError: there is no sample, or the two have different numbers.
    """
    if len(method) != len(baseline) or not method:
        raise ConfigError(
            f"{len(method)} samples against {len(baseline)}: the comparison is paired, so both need the same samples, at "
            "least one"
        )
    pairs = list(zip(map(bool, method), map(bool, baseline), strict=True))
    both, gained = pairs.count((True, True)), pairs.count((True, False))
    lost, neither = pairs.count((False, True)), pairs.count((False, False))
    low, high = _difference_interval(both, gained, lost, neither, confidence)
    return Comparison((gained - lost) / len(pairs), low, high, lost, gained, len(pairs), mcnemar(lost, gained))


def _difference_interval(both: int, gained: int, lost: int, neither: int, confidence: float) -> tuple[float, float]:
    samples = both + gained + lost + neither
    first = wilson(both + gained, samples, confidence)
    second = wilson(both + lost, samples, confidence)
    correlation = _correlation(both, gained, lost, neither)
    difference = (gained - lost) / samples

    def combined(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    below = combined(first.value - first.low, second.high - second.value)
    above = combined(first.high - first.value, second.value - second.low)
    return max(-1.0, difference - below), min(1.0, difference + above)


def _correlation(both: int, gained: int, lost: int, neither: int) -> float:
    """Phi of the two-by-two table, with Newcombe's continuity correction; 0 where a margin is empty."""
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if margins == 0:
        return 0.0
    product = float(both * neither - gained * lost)
    if product > 0:
        product = max(product - (both + gained + lost + neither) / 2, 0.0)
    return product / math.sqrt(margins)


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence!r} is not allowed: it must be in (0, 1)")
    return NormalDist().inv_cdf((1 + confidence) / 2)
