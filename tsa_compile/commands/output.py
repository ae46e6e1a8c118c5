"""What a command writes: the result to stdout, as text or JSON; progress, notes and errors to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.status import Status

from tsa_compile import files
from tsa_compile.progress import Progress, bar

WIDTH = 80  # columns that every terminal has
_PLAIN: dict[str, Any] = dict(soft_wrap=True, markup=False, highlight=False, emoji=False)
_STYLES = {"error": "bold red", "warning": "yellow", "interrupted": "bold red", "note": "dim"}


def stderr() -> Console:
    """A console for what is not the result. Made anew, since tests and notebooks replace the stream."""
    return Console(stderr=True, emoji=False)


def say(kind: str, text: str) -> None:
    """One line on stderr: "error: ...", "note: ..."."""
    console = stderr()
    console.print(kind, end=": ", style=_STYLES[kind], soft_wrap=True, highlight=False)
    console.print(text, **_PLAIN)


_stdout: ContextVar[TextIO | None] = ContextVar("stdout", default=None)


@contextmanager
def reserved() -> Iterator[None]:
    """Inside, stdout is for `result` alone: what a library or a model's own code prints goes to stderr."""
    token = _stdout.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout.reset(token)


def result(text: str) -> None:
    """Text to stdout, lines as they are."""
    Console(file=_stdout.get(), emoji=False).print(text, **_PLAIN)


def write(data: Any, path: Path) -> None:
    """JSON into a file."""
    files.write(path, json.dumps(data, indent=2) + "\n")
    say("note", f"wrote {path}")


def working(text: str) -> Status:
    """A spinner on stderr while something of unknown length runs; nothing where stderr is no terminal."""
    return stderr().status(text)


def steps() -> AbstractContextManager[Progress]:
    """A progress bar on stderr, as a function of (what comes next, steps done, steps in all); nothing without a terminal."""
    console = stderr()
    return bar(console.is_terminal, console, transient=True)
