"""What tasks are written with: names that a tokenizer splits into few tokens, numbers, and a text to hide things in."""

from __future__ import annotations

import bisect
import re
from random import Random

_ADJECTIVES = (
    "amber ancient bitter blue bright broken calm clever cold crimson dark deep distant early empty fair fast gentle "
    "golden green grey heavy hidden hollow honest icy iron jolly keen lonely loud lucky mild narrow noble old pale plain "
    "proud quick quiet red rough round rusty sharp shy silent silver simple slow small smooth soft solid steep strong "
    "sudden sweet tall thin tiny warm weary wide wild windy wise yellow young"
)
_NOUNS = (
    "anchor apple arrow badger basket beacon bell bird boat bridge bucket candle canyon castle cedar chair cloud coat "
    "comet corner crown desk diamond door dragon eagle engine falcon farmer feather fence field fisher flag flute forest "
    "fox garden gate glacier hammer harbor hill horse island jacket kettle ladder lake lamp lantern lemon lion maple "
    "marble market meadow mirror moon mountain needle oak orchard otter owl painter palace pencil piano pilot pine planet "
    "pocket pond potter rabbit raven ribbon river road robin rocket rope sailor salmon shepherd ship shoe singer spoon "
    "spring star stone storm table teacher temple thunder tiger tower train valley village violin wagon wheel whistle "
    "window winter wolf"
)
_VERBS = (
    "admires answers avoids calls carries changes chooses draws envies follows greets guards helps hides ignores invites "
    "keeps leads likes loses meets misses moves names paints passes praises pulls pushes remembers sees serves shows "
    "thanks trusts visits warns watches"
)

ADJECTIVES, NOUNS, VERBS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split()), tuple(_VERBS.split())

FILLER = (
    "The morning was calm, and the streets were almost empty. A baker opened his shop and put fresh bread in the window. "
    "Two children walked to school and talked about the weather. On the hill the wind moved slowly through the grass. "
    "Later in the day it began to rain, and people went home early. In the evening the lamps were lit along the river. "
)
"""Repeated where no text is given."""

_SENTENCE = re.compile(r"[.!?][\"')\]]*\s+|\n\s*")
_REACH = 400  # characters within which a sentence's end is looked for


def name(draw: Random) -> str:
    """An adjective and a noun."""
    return f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"


def names(draw: Random, count: int) -> list[str]:
    """Different names, no noun or adjective twice as long as there are others."""
    adjectives, nouns = draw.sample(ADJECTIVES, len(ADJECTIVES)), draw.sample(NOUNS, len(NOUNS))
    found = []
    for place in range(count):
        turn, at = divmod(place, len(NOUNS))
        found.append(f"{adjectives[(at + turn) % len(ADJECTIVES)]} {nouns[at]}")
    return found


MOST_NAMES = len(ADJECTIVES) * len(NOUNS)


def numbers(draw: Random, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(number) for number in draw.sample(range(1_000_000, 10_000_000), count)]


def letters(draw: Random, count: int) -> list[str]:
    """Different words of five capital letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5))] = None
    return list(found)


def coined(draw: Random, count: int) -> list[str]:
    """Different words that no language has: three syllables each."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))] = None
    return list(found)


def sentences(draw: Random, count: int) -> str:
    """Sentences that cannot be guessed."""
    return " ".join(f"The {name(draw)} {draw.choice(VERBS)} the {name(draw)}." for _ in range(count))


class Haystack:
    """A text, read in a circle, to hide sentences in.

    Args:
        text: of any length that is not blank.
    """

    def __init__(self, text: str) -> None:
        self.text = text.strip() + "\n"
        self._starts = [0, *(found.end() for found in _SENTENCE.finditer(self.text))]
        self._starts = [start for start in self._starts if start < len(self.text)]

    def cut(self, place: float, size: int) -> str:
        """`size` characters, from the beginning of the sentence in which `place` of the text lies; in [0, 1)."""
        start = self._starts[bisect.bisect_right(self._starts, int(place * len(self.text))) - 1]
        turns = (start + size) // len(self.text) + 1
        return (self.text * turns)[start : start + size]

    def hide(self, place: float, size: int, free: int, hidden: list[tuple[float, str]]) -> str:
        """About `size` characters of text, with sentences between its own.

        Args:
            place: as for `cut`.
            free: characters in front, in which nothing is hidden.
            hidden: (depth in [0, 1] behind the free part, sentence), in the order of the depths.
        """
        size = max(0, size - sum(len(sentence) + 1 for _, sentence in hidden))
        text = self.cut(place, size)
        free = min(free, len(text))
        parts, before = [], 0
        for depth, sentence in hidden:
            at = max(before, _gap(text, free + int(depth * (len(text) - free))))
            parts += [text[before:at], sentence + " "]
            before = at
        return "".join([*parts, text[before:]])


def _gap(text: str, place: int) -> int:
    """Where a sentence ends at or behind a place, or else a word."""
    found = _SENTENCE.search(text, place, place + _REACH) or re.compile(r"\s+").search(text, place)
    return len(text) if found is None else found.end()
