"""Tables, lines, numbers and runs of numbers as plain text, and the base of results that are read and kept."""

from __future__ import annotations

import io
import json
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from tsa_compile.budgets import check_int

_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


class Shown(ABC):
    """A result that is printed as text, and kept as JSON."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""

    @abstractmethod
    def _text(self, width: int | None) -> str:
        """As text; with a width in lines of at most so many characters, which say less where a table would not fit."""

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def narrow(self, width: int) -> str:
        """As text in lines of at most so many characters."""
        check_int("width", width, 1)
        return self._text(width)

    def __str__(self) -> str:
        return self._text(None)


def wrapped(lines: Iterable[str], width: int) -> list[str]:
    """Lines of at most so many characters; what goes on is indented. A word that is longer stays whole."""
    return [text for line in lines for text in textwrap.wrap(line, width, subsequent_indent="  ", **_WHOLE_WORDS)]


def new_table(*columns: str, right: Container[str] = (), fold: Container[str] = ()) -> Table:
    """An empty table without lines. Some columns are aligned on the right; some may be broken into several lines."""
    table = Table(box=None, pad_edge=False, header_style="")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name not in fold, overflow="fold")
    return table


def as_text(content: RenderableType, width: int = 100_000) -> str:
    """A table, say, as plain text, by default wider than any row: no column is ever cut, whatever the terminal."""
    sink = io.StringIO()
    console = Console(file=sink, width=width, color_system=None, force_terminal=False, markup=False, emoji=False)
    console.print(content)
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines())


def number(ms: float) -> str:
    """Three digits: expected times are no better."""
    return f"{ms:,.0f}" if abs(ms) >= 100 else f"{ms:.3g}"


def counted(count: int, noun: str) -> str:
    """A number of things: 1 token, 1,024 tokens."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def spans(indices: Iterable[int]) -> str:
    """Numbers as text, neighbours together: 0..3,5."""
    runs: list[list[int]] = []
    for index in dict.fromkeys(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs)
