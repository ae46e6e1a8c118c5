"""Prompts from files, as token ids: text in pieces, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsa_compile.errors import ConfigError

_TEXT_KEYS = ("text", "prompt", "content")


def read(path: Path, length: int, count: int | None, tokenizer: Any) -> list[list[int]]:
    """The prompts of a file, each of at most `length` tokens.

    A file named .jsonl, .ndjson or .json, or whose first line is such a prompt, holds one prompt a line:
    {"input_ids": [...]}, {"text": "..."} (also "prompt" or "content"), or a JSON string. Any other file is one text, which
    is cut into pieces of `length` tokens.

    Args:
        count: at most so many; None: all.
        tokenizer: a function without arguments that gives the tokenizer, called if text is found.

    Raises:
        ConfigError: the file cannot be read or holds no prompts.
    """
    text = read_text(path)
    if _is_lines(path, text):
        found = [ids[:length] for ids in _lines(path, text, count, tokenizer)]
    else:
        found = _pieces(_encode(path, tokenizer(), text), length)[:count]
    if not found:
        raise ConfigError(f"{str(path)!r} holds no prompts: it has no tokens")
    return found


def read_text(path: Path, option: str = "--prompts") -> str:
    """What the file of an option holds; ConfigError where it cannot be read or is blank."""
    allowed = "a text file in UTF-8" + (", or a JSONL file of prompts" if option == "--prompts" else "")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors of Windows begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option} {str(path)!r} cannot be read ({reason}): pass {allowed}") from error
    if not text.strip():
        raise ConfigError(f"{option} {str(path)!r} is empty: pass {allowed}")
    return text


def read_prose(path: Path, option: str) -> str:
    """The text of a file in which tasks hide things; ConfigError for JSON lines too, whose braces would be read as words."""
    text = read_text(path, option)
    if _is_lines(path, text):
        raise ConfigError(
            f"{option} {str(path)!r} is JSON, and tasks hide things in plain text: write the text alone into a file"
        )
    return text


def _is_lines(path: Path, text: str) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson", ".json") or _begins_with_prompt(text)


def _pieces(ids: list[int], length: int) -> list[list[int]]:
    """Pieces of `length` tokens; a shorter rest counts only where it is all there is."""
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)] or ([ids] if ids else [])


def _begins_with_prompt(text: str) -> bool:
    first = text.lstrip().partition("\n")[0]
    try:
        value = json.loads(first) if first.startswith("{") else None
    except (ValueError, RecursionError):
        return False
    return _prompt(value) is not None


def _lines(path: Path, text: str, count: int | None, tokenizer: Any) -> Iterator[list[int]]:
    encoder = None
    given = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, line in given[:count]:
        where = f"{str(path)!r}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not JSON ({error}): write one JSON object a line") from error
        prompt = _prompt(value)
        if prompt is None:
            raise ConfigError(
                f"{where} is no prompt: write an object with input_ids (integers), or with {' or '.join(_TEXT_KEYS)}"
            )
        if isinstance(prompt, str):
            encoder = encoder or tokenizer()
            prompt = _encode(path, encoder, prompt)
        if prompt:
            yield prompt


def _prompt(value: Any) -> str | list[int] | None:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return None
    ids = value.get("input_ids")
    if isinstance(ids, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        return ids
    return next((value[key] for key in _TEXT_KEYS if isinstance(value.get(key), str)), None)


def _encode(path: Path, tokenizer: Any, text: str) -> list[int]:
    try:
        return list(tokenizer(text)["input_ids"])
    except Exception as error:  # of tokenizers, for a word that it cannot spell
        raise ConfigError(
            f"the folder's tokenizer cannot encode {str(path)!r} ({error}): pass other text, or JSON lines with input_ids"
        ) from error
