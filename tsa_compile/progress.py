"""A progress bar on stderr, as a function of (what comes next, steps done, steps in all)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, float, int | None], None]


@contextmanager
def bar(shown: bool = True, console: Console | None = None, **options: Any) -> Iterator[Progress]:
    """Steps may be fractions; the number of all steps is None where it is not known.

    Args:
        options: of rich's `Progress`.
    """
    if not shown:  # some versions of rich end a bar that was never drawn by an empty line
        yield lambda text, done, total: None
        return
    from rich import progress
    from rich.console import Console

    columns = progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn()
    time = progress.TimeRemainingColumn(elapsed_when_finished=True)
    with progress.Progress(*columns, time, console=console or Console(stderr=True), **options) as drawn:
        task = drawn.add_task("", total=None)
        yield lambda text, done, total: drawn.update(task, description=text, completed=done, total=total)
