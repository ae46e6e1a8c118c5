"""How much of attention stays: the two budgets and the floor, frozen, validated, to JSON's types and back.

A value that is not allowed raises `ConfigError`, which names the option, the value and what is allowed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from tsa_compile.errors import ConfigError

_SHOWN = 200  # characters
MOST_TOKENS = 2**31 - 1  # tokens: up to where budgets are exact, and far beyond any memory


def shown(value: object) -> str:
    """A value as errors show it: in one line, of which a model or a long list has only the beginning."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def rejected(option: str, value: object, allowed: str) -> ConfigError:
    """The error about an option's value."""
    return ConfigError(f"{option}={shown(value)} is not allowed: {option} must be {allowed}")


def checked_number(option: str, value: object, allowed: str, within: Callable[[float], bool]) -> float:
    """`value` as a float; ConfigError unless it is a number within limits. A bool is none, and a NaN is within none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise rejected(option, value, allowed)
    try:
        number = float(value)
    except OverflowError:
        raise rejected(option, value, allowed) from None
    if not within(number):
        raise rejected(option, value, allowed)
    return number


def check_int(option: str, value: object, minimum: int, *, most: int | None = None, optional: bool = False) -> None:
    """Raises ConfigError unless `value` is an integer of at least `minimum` and at most `most`; a bool is none."""
    if optional and value is None:
        return
    allowed = f"an integer >= {minimum}" + (" or None" if optional else "")
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise rejected(option, value, allowed)
    if most is not None and value > most:
        raise rejected(option, value, f"{allowed}, at most {most:,}")


@dataclass(frozen=True)
class Coverage:
    """Drop the least-scored tokens that make up the share `tau` of all scores: how many are kept depends on the input.

    `tau` lies in [0, 1); 0 keeps every token. The published setting is 0.005.
    """

    tau: float = 0.005

    def __post_init__(self) -> None:
        allowed = "a number in [0, 1) (0 keeps every token)"
        tau = checked_number("Coverage.tau", self.tau, allowed, lambda tau: 0.0 <= tau < 1.0)
        object.__setattr__(self, "tau", tau)


@dataclass(frozen=True)
class KeepRatio:
    """Keep the share `ratio` of the tokens before the window: how many are kept follows from the length alone.

    `ratio` lies in [0, 1]; 1 keeps every token, 0 the window and `min_tokens`.
    """

    ratio: float

    def __post_init__(self) -> None:
        ratio = checked_number("KeepRatio.ratio", self.ratio, "a number in [0, 1]", lambda ratio: 0.0 <= ratio <= 1.0)
        object.__setattr__(self, "ratio", ratio)

    @property
    def fraction(self) -> Fraction:
        """The ratio for integer arithmetic: ceil(fraction * n) is ceil(ratio * n) for every n below 2^31, in int64."""
        return ceil_fraction(self.ratio)


@functools.lru_cache(maxsize=64)
def ceil_fraction(ratio: float, limit: int = 2**31 - 1) -> Fraction:
    """The smallest fraction >= the decimal that `ratio` prints as, with a denominator of at most `limit`.

    For every n <= limit, ceil(n * ratio) is the same with either, and n * numerator fits into int64, which it need not
    do with the decimal itself: 1/3 prints as 0.3333333333333333.
    """
    exact = Fraction(str(ratio))
    near = exact.limit_denominator(limit)
    if near >= exact:
        return near
    # The successor of a/b among these fractions is c/d with c b - a d = 1 and the largest d <= limit.
    a, b = near.numerator, near.denominator
    d = limit - (limit + pow(a, -1, b)) % b if b > 1 else limit
    return Fraction(a * d + 1, b * d)


@dataclass(frozen=True)
class Floor:
    """Every row sees its neighbourhood: the last `window` tokens up to itself, and the item's first `sinks` tokens.

    A selected row sees the selected tokens as well, in one softmax. Without a floor the rows that are not selected become 0,
    as published. Without one, at keep 0.5, a small pretrained model lost 24 to 53 points where a fact is asked for
    (docs/accuracy.md).
    """

    window: int = 256
    sinks: int = 16

    def __post_init__(self) -> None:
        check_int("floor.window", self.window, 1, most=MOST_TOKENS)
        check_int("floor.sinks", self.sinks, 0, most=MOST_TOKENS)


Budget = Coverage | KeepRatio


def read_budget(value: object) -> Budget:
    """A budget, also from its JSON form ``{"coverage": 0.005}`` or ``{"keep_ratio": 0.5}``."""
    allowed = 'Coverage(tau) or KeepRatio(ratio), in JSON {"coverage": tau} or {"keep_ratio": ratio}'
    if isinstance(value, (Coverage, KeepRatio)):
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        ((kind, number),) = value.items()
        if kind == "coverage":
            return Coverage(number)
        if kind == "keep_ratio":
            return KeepRatio(number)
    raise rejected("budget", value, allowed)


def read_floor(value: object) -> Floor | None:
    """A floor, also from its JSON form ``{"window": 256, "sinks": 16}``."""
    if value is None or isinstance(value, Floor):
        return value
    if isinstance(value, Mapping) and set(value) <= {"window", "sinks"}:
        return Floor(**value)
    raise rejected("floor", value, 'Floor(window, sinks), in JSON {"window": ..., "sinks": ...}, or None')


def budget_dict(budget: Budget) -> dict[str, float]:
    """A budget's JSON form."""
    return {"coverage": budget.tau} if isinstance(budget, Coverage) else {"keep_ratio": budget.ratio}
