"""The one rule of how many tokens are kept: of integers, of tensors, and of lengths that are symbolic."""

import math
from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from tsa_compile.kernels.kept import kept_candidates, kept_of_share, never_dropped

LENGTHS = st.integers(1, 5000)
SHARES = st.fractions(0, 1, max_denominator=1000) | st.floats(0, 1)


@given(LENGTHS, st.integers(1, 300), SHARES, st.integers(0, 2000))
def test_it_is_exact_and_never_drops_the_window(length, window, share, min_tokens):
    kept = kept_of_share(length, window, share, min_tokens)
    candidates = max(0, length - window)
    assert kept == length - candidates + min(candidates, max(min_tokens, math.ceil(Fraction(share) * candidates)))
    assert kept == length or length > never_dropped(window, min_tokens)
    assert kept_of_share(length, window, share, min_tokens, capacity=window) == min(kept, window)


@given(st.lists(LENGTHS, min_size=1, max_size=5), st.fractions(0, 1, max_denominator=1000), st.integers(0, 2000))
def test_tensors_follow_it(candidates, share, min_tokens):
    found = kept_candidates(
        torch.tensor(candidates), share, min_tokens, torch.minimum, lambda numbers, least: numbers.clamp(min=least)
    )
    assert found.tolist() == [kept_candidates(each, share, min_tokens) for each in candidates]
