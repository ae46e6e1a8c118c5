"""Results that are kept as JSON files, which name their format."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from tsa_compile.errors import ConfigError
from tsa_compile.files import read_json, write


class Saved(ABC):
    """Base of such results. A subclass has `to_dict`, whose values name `FORMAT`, and `_read`, which takes them apart."""

    FORMAT: ClassVar[str]
    KIND: ClassVar[str]
    WRITER: ClassVar[str]
    """What writes such files."""
    REMEDY: ClassVar[str]
    """What to do if a file is damaged."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the inverse of `from_dict`."""

    @classmethod
    @abstractmethod
    def _read(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` wrote, taken apart; a KeyError, TypeError or ValueError says that it is damaged."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` wrote.

        Raises:
            ConfigError: the format is another, or something is missing or not allowed.
        """
        found = values.get("format") if isinstance(values, Mapping) else type(values).__name__
        if found != cls.FORMAT:
            raise ConfigError(f"found format {found!r}, expected {cls.FORMAT!r}: pass a file that {cls.WRITER} wrote")
        try:
            return cls._read(values)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else error
            raise ConfigError(f"a value is not what was saved ({why}): {cls.REMEDY}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes this as JSON, whole or not at all.

        Raises:
            ConfigError: no file can be written there.
            WriteError: it could not be written whole; a file that was there is unchanged.
        """
        write(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote.

        Raises:
            ConfigError: the file cannot be read, or holds something else; the message names it.
        """
        values = read_json(path, f"pass a file that {cls.WRITER} wrote")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{str(path)!r} is not {cls.KIND}: {error}") from error
