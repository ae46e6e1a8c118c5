"""A model folder: which of its files is damaged, and whether its weights are those of its configuration.

transformers fills what it does not find with random numbers and drops what it has no place for, and says so in a log. What
is measured of such a model does not hold for the one that was meant.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsa_compile.errors import ConfigError, TSAWarning
from tsa_compile.passes.base import summary

WEIGHTS = (".index.json", ".safetensors", ".bin")
TOKENIZER = (".json", "tokenizer.json")
_SHOWN = 3
_REMEDY = "take config.json and the weights from one model"


def check_weights(folder: Path, model: nn.Module, found: Mapping[str, Any]) -> None:
    """Holds transformers' account of what it loaded against the model. Tied weights are none that are missing.

    Raises:
        ConfigError: weights are missing, have other shapes, or belong to layers that the model does not have.
    """
    extra = sorted(found["unexpected_keys"])
    inside = [name for name in extra if _in_a_layer(model, name)]
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "of another shape": sorted(key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]),
        "without a place in the model's layers": inside,
        "not understood": [str(message) for message in found.get("error_msgs", ())],
    }
    if any(wrong.values()):
        said = "; ".join(f"{len(names)} {what} ({_few(names)})" for what, names in wrong.items() if names)
        raise ConfigError(f"the weights in {str(folder)!r} are not those of its config.json: {said}: {_REMEDY}")
    if extra:
        text = f"{str(folder)!r} holds weights for which {type(model).__name__} has no place: {_few(extra)}"
        warnings.warn(text, TSAWarning, stacklevel=2)


def why(folder: Path, error: Exception, suffixes: Iterable[str]) -> str:
    """Why files of a folder could not be loaded: the first damaged one of these kinds and what to do, or what was raised."""
    for suffix in suffixes:
        for file in sorted(folder.glob(f"*{suffix}")):
            try:
                _read(file, suffix)
            except Exception as damage:  # noqa: BLE001, readers of other packages, which raise what they like
                return f"{str(file)!r} is damaged ({summary(damage)}): copy or download it again"
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {text}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _in_a_layer(model: nn.Module, name: str) -> bool:
    """Whether a weight's name leads into a list of layers: of a head or a tower beside them the layers know nothing."""
    for module in (model, getattr(model, getattr(model, "base_model_prefix", ""), None)):
        for word in name.split("."):
            if isinstance(module, nn.ModuleList):
                return True
            module = getattr(module, word, None) if isinstance(module, nn.Module) else None
    return False


def _read(file: Path, suffix: str) -> None:
    """Reads a file as its kind is read, which raises where it is damaged."""
    if suffix == "tokenizer.json":
        from tokenizers import Tokenizer

        Tokenizer.from_file(str(file))
    elif suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(file), "pt"):  # which holds the header against the file's size
            pass
    elif suffix == ".bin":
        torch.load(file, map_location="meta", weights_only=True)
    else:
        values = json.loads(file.read_text(encoding="utf-8"))
        if suffix == ".index.json":
            dict(values["weight_map"])
