"""The exceptions and the warning that a user of the package can meet."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class TSAError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(TSAError, ValueError):
    """An option has a name or a value that is not allowed; the message names both and says what is."""


class RewriteError(TSAError, RuntimeError):
    """A graph could not be rewritten as asked, or failed verification; raised under ``strict=True``."""


class KernelError(TSAError, RuntimeError):
    """No registered attention kernel has the name that was asked for, or none fits the request."""


class WriteError(TSAError, OSError):
    """A file could not be written whole, as on a full disk; a file that was there before is unchanged."""


class TSAWarning(UserWarning):
    """Something that was asked for did not happen; the computation is still right."""


def check_type(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raises ConfigError unless an argument is of a type; `wanted` is what to pass instead."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is a {type(value).__name__}: pass {wanted}")


def check_list(name: str, value: object) -> None:
    """Raises ConfigError unless an argument is a list or another sequence, with something in it; a str is none."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ConfigError(f"{name}={value!r} is not allowed: {name} must be a list that is not empty")


def check_inference(model: Any, what: str) -> None:
    """Raises ConfigError for a model in training mode; `what` is done with it: "a benchmark is of inference"."""
    if model.training and "eval" in vars(model):  # of torch.export, which puts one there that raises
        raise ConfigError(f"the model is a program's module, which has no mode: {what}, pass the model it was exported from")
    if model.training:
        raise ConfigError(f"the model is in training mode: {what}, call model.eval() first")


def unknown(name: str, what: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is none of the known ones, with the nearest of them. what: "an option"."""
    names = list(known)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ConfigError(f"{name!r} is not {what}{hint}: the {what.split()[-1]}s are {', '.join(names)}")
