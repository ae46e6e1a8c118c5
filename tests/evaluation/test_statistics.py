"""Intervals and tests against published figures, enumeration and simulation."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.statistics import compare, mcnemar, wilson


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"),
    # Newcombe, Stat. Med. 17 (1998) page 857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(right, samples, low, high):
    share = wilson(right, samples)
    assert (round(share.low, 4), round(share.high, 4)) == (low, high)
    assert share.value == right / samples


@given(samples=st.integers(1, 5000), data=st.data())
def test_wilson_is_symmetric_and_holds_its_value(samples, data):
    right = data.draw(st.integers(0, samples))
    share, other = wilson(right, samples), wilson(samples - right, samples)
    assert 0 <= share.low <= share.value <= share.high <= 1 and share.low < share.high
    assert math.isclose(share.low, 1 - other.high, abs_tol=1e-12)


@pytest.mark.parametrize(("lost", "gained"), list(itertools.product(range(5), range(5))))
def test_mcnemar_is_the_share_of_outcomes_as_extreme(lost, gained):
    pairs = lost + gained
    extreme = [
        outcome for outcome in itertools.product((0, 1), repeat=pairs) if abs(2 * sum(outcome) - pairs) >= abs(lost - gained)
    ]
    assert mcnemar(lost, gained) == len(extreme) / 2**pairs


def test_mcnemar_is_exact_for_thousands_of_pairs():
    assert mcnemar(0, 3000) == 0.0  # 2^-2999 is below the smallest float
    assert math.isclose(mcnemar(0, 900), 2.0**-899)
    # The normal approximation with continuity correction is good to a few per cent here.
    lost, gained = 2400, 2600
    z = (abs(lost - gained) - 1) / math.sqrt(lost + gained)
    assert math.isclose(mcnemar(lost, gained), math.erfc(z / math.sqrt(2)), rel_tol=0.02)


def pairs(both, gained, lost, neither):
    """Two lists of outcomes with so many pairs of each kind."""
    method = [True] * (both + gained) + [False] * (lost + neither)
    baseline = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return method, baseline


@pytest.mark.parametrize(
    ("table", "low", "high"),
    # Newcombe, Stat. Med. 17 (1998) page 2635, table III, method 10.
    [((36, 12, 2, 0), 0.0569, 0.3404), ((20, 12, 2, 16), 0.0562, 0.3292), ((54, 0, 0, 0), -0.0664, 0.0664)],
)
def test_the_difference_has_the_published_interval(table, low, high):
    found = compare(*pairs(*table))
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert (found.lost, found.gained, found.samples) == (table[2], table[1], sum(table))
    assert found.difference == (table[1] - table[2]) / sum(table)


@given(st.tuples(*[st.integers(0, 300)] * 4).filter(lambda table: sum(table) > 0))
def test_a_comparison_is_antisymmetric(table):
    method, baseline = pairs(*table)
    there, back = compare(method, baseline), compare(baseline, method)
    assert -1 <= there.low <= there.difference <= there.high <= 1
    assert math.isclose(there.low, -back.high, abs_tol=1e-12) and there.p_value == back.p_value


def test_the_interval_covers_the_difference_as_often_as_it_says():
    dice = random.Random(0)
    shares, covered = (0.94, 0.01, 0.03, 0.02), 0
    for _ in range(1000):
        drawn = dice.choices(range(4), shares, k=300)
        found = compare(*pairs(*(drawn.count(kind) for kind in range(4))))
        covered += found.low <= shares[1] - shares[2] <= found.high
    assert 0.93 <= covered / 1000 <= 0.99


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(0, 0),
        lambda: wilson(3, 2),
        lambda: wilson(1, 2, confidence=95),
        lambda: mcnemar(-1, 2),
        lambda: compare([], []),
        lambda: compare([True], [True, False]),
    ],
)
def test_what_has_no_answer_is_refused(call):
    with pytest.raises(ConfigError):
        call()
