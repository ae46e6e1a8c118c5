"""Intervals and paired tests, by statsmodels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tsa_compile.errors import ConfigError

CHANCE = 0.1  # dense accuracy below which a task says nothing about a model


@dataclass(frozen=True)
class Share:
    """A share of samples with its interval of 95%."""

    right: int
    samples: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.right / self.samples


@dataclass(frozen=True)
class Paired:
    """A setting against dense on the same samples.

    Attributes:
        lost, won: samples that dense alone, and the setting alone, has right.
        p_value: of McNemar's exact test that both are equally accurate.
    """

    lost: int
    won: int
    p_value: float


@dataclass(frozen=True)
class Mean:
    """A mean with its interval of 95%; without one (nan) for a single sample."""

    value: float
    low: float
    high: float


def require_statsmodels() -> Any:
    """The package's `stats`; ImportError that says how to install it."""
    try:
        from statsmodels.stats import contingency_tables, proportion, weightstats
    except ImportError as error:
        raise ImportError("intervals and tests need the package 'statsmodels': pip install 'tsa-compile[eval]'") from error
    return contingency_tables, proportion, weightstats


def wilson(right: Sequence[bool]) -> Share:
    """Accuracy with Wilson's score interval, which is of some width at 0 and 1 as well."""
    _some(right)
    _, proportion, _ = require_statsmodels()
    low, high = proportion.proportion_confint(sum(right), len(right), alpha=0.05, method="wilson")
    return Share(sum(right), len(right), float(low), float(high))


def mcnemar(setting: Sequence[bool], dense: Sequence[bool]) -> Paired:
    """McNemar's exact test; item i of both is the same sample."""
    _some(setting, dense)
    tables, _, _ = require_statsmodels()
    pairs = list(zip(map(bool, dense), map(bool, setting), strict=True))
    both, lost, won, neither = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
    p_value = tables.mcnemar([[both, lost], [won, neither]], exact=True).pvalue if lost + won else 1.0
    return Paired(lost, won, min(1.0, float(p_value)))


def mean_difference(setting: Sequence[float], dense: Sequence[float]) -> Mean:
    """The mean of the pairs' differences, setting minus dense, with Student's interval."""
    _some(setting, dense)
    differences = [one - other for one, other in zip(setting, dense, strict=True)]
    value = math.fsum(differences) / len(differences)
    if len(differences) == 1:
        return Mean(value, math.nan, math.nan)
    if len(set(differences)) == 1:
        return Mean(value, value, value)
    _, _, weightstats = require_statsmodels()
    low, high = weightstats.DescrStatsW(differences).tconfint_mean(alpha=0.05)
    return Mean(value, float(low), float(high))


def _some(first: Sequence[Any], *others: Sequence[Any]) -> None:
    sizes = [len(first), *map(len, others)]
    if not sizes[0] or len(set(sizes)) > 1:
        raise ConfigError(f"{' against '.join(map(str, sizes))} samples: both need the same samples, at least one")
