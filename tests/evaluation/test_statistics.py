"""Intervals and tests against published figures, enumeration and hand-computed numbers."""

import itertools
import math

import pytest

from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.statistics import mcnemar, mean_difference, wilson

pytest.importorskip("statsmodels")


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"),
    # Newcombe, Stat. Med. 17 (1998) page 857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(right, samples, low, high):
    share = wilson([True] * right + [False] * (samples - right))
    assert (round(share.low, 4), round(share.high, 4)) == (low, high)
    assert share.value == right / samples


@pytest.mark.parametrize(("lost", "won"), list(itertools.product(range(5), range(5))))
def test_mcnemar_is_the_share_of_outcomes_as_extreme(lost, won):
    dense = [True] * lost + [False] * won + [True] * 3 + [False] * 2
    setting = [False] * lost + [True] * won + [True] * 3 + [False] * 2
    pairs = lost + won
    extreme = [
        outcome for outcome in itertools.product((0, 1), repeat=pairs) if abs(2 * sum(outcome) - pairs) >= abs(lost - won)
    ]
    found = mcnemar(setting, dense)
    assert (found.lost, found.won) == (lost, won)
    assert math.isclose(found.p_value, len(extreme) / 2**pairs)


def test_the_mean_difference_has_students_interval():
    found = mean_difference([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    # Differences 1, 2, 3: standard error 1 / sqrt(3), and the quantile of t with 2 degrees of freedom is 4.302653.
    margin = 4.302653 / math.sqrt(3)
    assert found.value == 2.0
    assert (found.low, found.high) == pytest.approx((2 - margin, 2 + margin), abs=1e-5)


def test_differences_without_spread_and_of_one_sample():
    same = mean_difference([1.5, 2.5], [1.0, 2.0])
    assert (same.value, same.low, same.high) == (0.5, 0.5, 0.5)
    one = mean_difference([1.0], [3.0])
    assert one.value == -2.0 and math.isnan(one.low) and math.isnan(one.high)


@pytest.mark.parametrize(
    "call", [lambda: wilson([]), lambda: mcnemar([True], []), lambda: mean_difference([1.0], [1.0, 2.0])]
)
def test_pairs_are_of_the_same_samples(call):
    with pytest.raises(ConfigError, match="need the same samples"):
        call()
