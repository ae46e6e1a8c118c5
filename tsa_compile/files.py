"""Files: written whole or not at all, and read with errors that name them.

    with replacing("model.onnx") as path:      .tsa-x7k2/model.onnx       a folder beside, on the same disk
        ...                                    .tsa-x7k2/model.onnx.data  what belongs to it
                                               model.onnx, model.onnx.data, once all is on the disk

A full disk, a limit, an error or Ctrl-C in between leaves what was there before.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from tsa_compile.errors import ConfigError, WriteError, check_type

StrPath = str | os.PathLike[str]

_PREFIX = ".tsa-"
NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_ANOTHER_PATH = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP,
    errno.ENAMETOOLONG,
)  # fmt: skip


def write(path: StrPath, content: str | bytes) -> None:
    """Writes a file; see `replacing` for errors."""
    with replacing(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """A path of the same name in a folder beside; what was written there takes the place of `path` in the end.

    Raises:
        ConfigError: no file can be written there.
        WriteError: it could not be written whole, or not put into its place.
    """
    check_path(path)
    if is_special(path):
        with _errors_that_name(path, Path(path)):
            yield Path(path)
        return
    target = Path(os.path.realpath(path))  # a link stays one
    with _errors_that_name(path, target), TemporaryDirectory(prefix=_PREFIX, dir=target.parent) as folder:
        beside = Path(folder) / target.name
        yield beside
        written = sorted(Path(folder).iterdir(), key=lambda file: file == beside)  # what it refers to goes first
        for file in written:
            _settle(file, target)
        for file in written:
            os.replace(file, target.parent / file.name)


def writable(path: StrPath, *suffixes: str) -> Path:
    """Holds an output path against the disk before anything long is begun.

    Raises:
        ConfigError: it is no path, no file can be written there, or its name does not end in one of `suffixes`.
    """
    check_path(path)
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        problem = "it is a folder: name a file in it"
    elif suffixes and target.suffix not in suffixes:
        problem = f"its name must end in {' or '.join(suffixes)}"
    elif not folder.is_dir():
        problem = f"there is no folder {str(folder)!r}: create it, or name another"
    elif not os.access(path if is_special(path) else folder, os.W_OK):  # files are written beside, and renamed
        problem = "there is no permission: choose another path"
    else:
        return target
    raise ConfigError(f"{str(path)!r} cannot be written: {problem}")


def check_path(path: object) -> None:
    """Raises ConfigError for what cannot be a file's path."""
    check_type("path", path, (str, os.PathLike), "the path of a file")


def is_special(path: StrPath) -> bool:
    """A device or a pipe, which holds nothing that could be lost and cannot be replaced."""
    return os.path.exists(path) and not os.path.isfile(path)


@contextmanager
def stream(path: StrPath) -> Iterator[IO[bytes]]:
    """`replacing` as a file object, for PyTorch's archive writers.

    Given a path, these write in C++ and end the process where a write fails; a Python error there ends it as well. So the
    error is kept, what follows is dropped, and the error is raised once the writer is done.
    """
    with replacing(path) as beside, open(beside, "wb") as file:
        sink = _Sink(file)
        try:
            yield sink  # type: ignore[misc]
        finally:
            if sink.error is not None:
                raise sink.error


class _Sink(io.RawIOBase):
    """A file for writers that must not see an error."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Archives are written from front to back; torch rewinds a buffer for its reader."""
        return 0


def new_figure(**options: Any) -> Any:
    """An empty figure of matplotlib; ImportError that says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need the package 'matplotlib': pip install matplotlib") from error
    return Figure(**options)


def save_figure(figure: Any, path: StrPath, **options: Any) -> None:
    """Writes a figure of matplotlib; see `replacing` for errors, to which a suffix that names no format adds."""
    with replacing(path) as beside:
        try:
            figure.savefig(beside, **options)
        except ValueError as error:
            raise ConfigError(f"{str(path)!r} cannot be written ({error}): choose another name, as figure.png") from error


def read_json(path: StrPath, advice: str) -> Any:
    """What a JSON file holds.

    Raises:
        ConfigError: it cannot be read or is not JSON; the message ends in `advice`.
    """
    check_path(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({getattr(error, 'strerror', None) or error}): {advice}") from error
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and thousands of brackets
        raise ConfigError(f"{str(path)!r} is not JSON ({error}): {advice}") from error


def _settle(file: Path, target: Path) -> None:
    """On the disk, as some file systems find out only now that they are full; with the permissions of the old file."""
    if os.path.exists(target):
        shutil.copymode(target, file)
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


@contextmanager
def _errors_that_name(path: StrPath, target: Path) -> Iterator[None]:
    try:
        yield
    except (ConfigError, WriteError):
        raise
    except OSError as error:
        reason = error.strerror or error
        found = str(error.filename or target)  # a compiler's own files are elsewhere
        ours = found in (str(path), str(target)) or found.startswith(str(target.parent / _PREFIX))
        name, kept = (str(path), "there") if ours else (found, f"at {str(path)!r}")
        if error.errno in _ANOTHER_PATH:
            raise ConfigError(f"{name!r} cannot be written ({reason}): choose another path") from error
        raise WriteError(
            f"{name!r} could not be written ({reason}); what was {kept} is as it was: free some space, or choose a path on "
            "another disk"
        ) from error
