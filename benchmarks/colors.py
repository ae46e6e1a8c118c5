"""The colour of each series, the same in all figures."""

from __future__ import annotations

_KNOWN = {
    "eager": "0.45",
    "compile": "0.7",
    "exact": "tab:blue",
    "0.08": "tab:olive",
    "0.15": "tab:orange",
    "0.3": "tab:green",
    "0.5": "tab:red",
    "0.675": "tab:purple",
    "0.15@21": "tab:brown",
    "a_shape+0.15@21": "tab:pink",
}
"""By the mode of a prefill; a number is the share of the tokens that is kept in the upper half, or in a layer."""


def color_of(series: str) -> str:
    """A series' colour; one that no other figure has is cyan."""
    return _KNOWN.get(series, "tab:cyan")
