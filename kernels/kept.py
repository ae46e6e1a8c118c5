"""How many tokens an item keeps: the one rule behind the ops' counts, the size of compressed rows, and expected costs.

    kept = min(candidates, max(min_tokens, ceil(share * candidates))) + window,   at most the capacity

`candidates` are the tokens in front of the window. All in exact integers; a symbolic length works as well.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any


def kept_of_share(
    length: Any,
    window: int,
    share: Fraction | float,
    min_tokens: int,
    capacity: int | None = None,
    *,
    minimum: Callable[[Any, Any], Any] = min,
    maximum: Callable[[Any, Any], Any] = max,
) -> Any:
    """The tokens that are kept of `length`, given the share of the candidates.

    Args:
        length: an integer, or whatever has an integer's operators.
        share: 0 to 1; of a keep ratio its exact `fraction`.
        minimum, maximum: of a length and an integer, where `min` and `max` cannot tell.
    """
    numerator, denominator = share.as_integer_ratio()
    window = minimum(window, length)
    candidates = length - window
    kept = (candidates * numerator + (denominator - 1)) // denominator
    kept = minimum(candidates, maximum(kept, min_tokens)) + window
    return kept if capacity is None else minimum(kept, capacity)


def never_dropped(window: int, min_tokens: int) -> int:
    """Of so many tokens all are kept, whatever their scores and the budget."""
    return window + min_tokens
