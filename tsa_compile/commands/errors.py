"""Errors at the command line: one line on stderr that says what was found and what to do, and an exit code.

    0    done
    1    failed: too little memory, a model that cannot be traced, a package that is missing, ...
    2    bad usage: an option, a path or a file that is not allowed
    130  interrupted (Ctrl-C)

`--debug` shows the traceback as well.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from tsa_compile.commands import output
from tsa_compile.errors import ConfigError, KernelError, RewriteError, TSAError, TSAWarning
from tsa_compile.files import NO_SPACE

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Commands(TyperGroup):
    """A group of commands whose usage errors are one line, as all others are; without arguments it shows its help."""

    def main(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """Runs a command and exits with its code."""
        given = sys.argv[1:] if args is None else list(args)
        try:
            code = super().main(given or ["--help"], *rest, **{**options, "standalone_mode": False})
        except typer.Abort:
            code = INTERRUPTED
        except Exception as error:
            if isinstance(error, OSError):  # help that cannot be written; what commands raise is handled in `guarded`
                sys.exit(_flushed(_say(error)))
            if not hasattr(error, "format_message"):  # the base of typer's usage errors, whose home changes with versions
                raise
            context = getattr(error, "ctx", None)
            see = f" (see {context.command_path} --help)" if context is not None else ""
            output.say("error", _with_value(_line(error.format_message()).rstrip("."), given) + see)
            code = USAGE
        if not options.get("standalone_mode", True):
            return code
        sys.exit(_flushed(code if isinstance(code, int) else 0))


def _say(error: BaseException) -> int:
    """Says in one line what an exception means, and gives the exit code."""
    message, code = describe(error)
    output.say("error", message)
    return code


def _flushed(code: int) -> int:
    """The exit code, once stdout is written. Python flushes it at its end too, but fails there with a traceback and 120."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        return code or _say(error)
    return code


def _with_value(message: str, given: list[str]) -> str:
    """A usage error with what was found for the option that it names; typer tells of some values the type alone."""
    named = re.match(r"Invalid value for '(--[-a-z]+)': ", message)
    if named is None:
        return message
    option = named[1]
    for item, following in itertools.pairwise([*given, ""]):
        if item == option or item.startswith(f"{option}="):
            value = following if item == option else item.partition("=")[2]
            return f"{named[0]}found {_shortened(value, 60)!r}; {message[named.end() :]}"
    return message


def guarded(call: Callable[[], None], debug: bool) -> None:
    """Runs a command's body; what it raises becomes a line on stderr and an exit code."""
    try:
        with output.reserved(), _warnings_as_lines():
            call()
    except KeyboardInterrupt:
        raise _interrupted() from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error
            raise
        if any(isinstance(item, KeyboardInterrupt) for item in _chain(error)):
            raise _interrupted() from None
        if debug:
            traceback.print_exc()
        raise typer.Exit(_say(error)) from None


def _interrupted() -> typer.Exit:
    output.say("interrupted", "nothing more is done; files that were finished stay")
    return typer.Exit(INTERRUPTED)


def describe(error: BaseException) -> tuple[str, int]:
    """What to say about an exception, in one line, and the exit code."""
    chain = list(_chain(error))
    torch = sys.modules.get("torch")  # where it was not needed, nothing of it can have run out of memory
    memory = next((item for item in chain if torch is not None and _is_memory(item, torch.OutOfMemoryError)), None)
    known = sorted((item for item in chain if isinstance(item, TSAError)), key=lambda item: isinstance(item, RewriteError))
    if known and not isinstance(known[0], RewriteError):
        usage = isinstance(known[0], (ConfigError, KernelError)) and memory is None
        return _line(str(known[0])), USAGE if usage else FAILED
    full = next(filter(None, map(_no_space, chain)), None)
    if full is not None and not known:
        return f"{full}: free some space, or name another disk for --out and, in TMPDIR, for a compiler's files", FAILED
    if memory is not None or isinstance(error, MemoryError):
        said = _line(str(memory or "")).split(". ")[0]
        return f"out of memory ({said}): take fewer layers, a shorter length, a smaller batch or dtype", FAILED
    if known:
        return _line(str(known[0])), FAILED
    if isinstance(error, ImportError):
        return _line(str(error)), FAILED
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; choose another path or change its permissions", FAILED
    text = _line(str(error)) or "no message"
    return f"{type(error).__name__}: {_shortened(text)} (--debug shows where; if it looks like a fault, report it)", FAILED


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, and those inside of it or behind it: Dynamo wraps what a backend raises."""
    seen: list[BaseException] = []
    queue: list[Any] = [error]
    while queue:
        item = queue.pop(0)
        if isinstance(item, BaseException) and all(item is not other for other in seen):
            seen.append(item)
            yield item
            queue += [getattr(item, "inner_exception", None), item.__cause__, item.__context__]


def _is_memory(error: BaseException, kind: type[BaseException]) -> bool:
    """Also as PyTorch's allocator on CPUs says it."""
    return isinstance(error, kind) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _no_space(error: BaseException) -> str | None:
    """What says that a disk is full: Python, or in its output a compiler that was called."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return ": ".join(filter(None, (error.filename, error.strerror)))
    limit = signal.strsignal(signal.SIGXFSZ) if hasattr(signal, "SIGXFSZ") else None
    return next((text for text in (*map(os.strerror, NO_SPACE), limit) if text and text in str(error)), None)


def _line(text: str) -> str:
    return " ".join(text.split())


def _shortened(text: str, width: int = 300) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """The package's own warnings, each once and in a line; others are for developers, who have --debug and Python."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        text = _line(str(message))
        if issubclass(category, TSAWarning) and text not in said:
            said.add(text)
            output.say("warning", text)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", TSAWarning)
        warnings.showwarning = show
        yield
