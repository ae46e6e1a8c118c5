"""How many tokens an item keeps: the one rule behind the ops' counts, the size of compressed rows, and expected costs.

    kept = min(candidates, max(min_tokens, ceil(share * candidates))) + window,   at most the capacity

`candidates` are the tokens in front of the window. All in exact integers; a symbolic length works as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from tsa_compile.config import KeepRatio
from tsa_compile.kernels.launch import tl, triton


def at_least_and_most(
    kept: Any,
    candidates: Any,
    min_tokens: int,
    minimum: Callable[[Any, Any], Any] = min,
    maximum: Callable[[Any, Any], Any] = max,
) -> Any:
    """How many candidates are kept where a budget asks for `kept` of them. See `kept_candidates`."""
    return minimum(candidates, maximum(kept, min_tokens))


@triton.jit
def at_least_and_most_triton(kept, candidates, min_tokens):
    """The same in a kernel."""
    return tl.minimum(candidates, tl.maximum(kept, min_tokens))


def kept_candidates(
    candidates: Any,
    share: Fraction | float,
    min_tokens: int,
    minimum: Callable[[Any, Any], Any] = min,
    maximum: Callable[[Any, Any], Any] = max,
) -> Any:
    """How many of the candidates are kept, given their share; without the window.

    Args:
        candidates: an integer, or whatever has an integer's operators.
        share: 0 to 1; of a keep ratio its exact `fraction`.
        minimum, maximum: of two such numbers, where `min` and `max` cannot tell.
    """
    numerator, denominator = share.as_integer_ratio()
    kept = (candidates * numerator + (denominator - 1)) // denominator
    return at_least_and_most(kept, candidates, min_tokens, minimum, maximum)


def kept_of_share(
    length: Any,
    window: int,
    share: Fraction | float,
    min_tokens: int,
    capacity: int | None = None,
    minimum: Callable[[Any, Any], Any] = min,
    maximum: Callable[[Any, Any], Any] = max,
) -> Any:
    """How many tokens of a length are kept, the window included."""
    window = minimum(window, length)
    kept = kept_candidates(length - window, share, min_tokens, minimum, maximum) + window
    return kept if capacity is None else minimum(kept, capacity)


def never_dropped(window: int, min_tokens: int) -> int:
    """Of so many tokens all are kept, whatever their scores and the budget."""
    return window + min_tokens


@functools.lru_cache(maxsize=1024)
def kept_tokens(valid: int, window: int, coverage: float | None, keep_ratio: float | None, min_tokens: int) -> int | None:
    """The count of an item with `valid` tokens where it follows from their number alone, else None.

    It does with a keep ratio, and where coverage has nothing to drop.
    """
    if keep_ratio is not None:
        return kept_of_share(valid, window, KeepRatio(keep_ratio).fraction, min_tokens)
    return valid if not coverage or valid <= never_dropped(window, min_tokens) else None
