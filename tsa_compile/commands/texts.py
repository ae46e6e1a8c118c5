"""The short texts that options are written in, read into what the library takes.

32K 8192            lengths                 8K,32K             several
coverage:0.005      Coverage(0.005)         keep:0.5           KeepRatio(0.5)
256,16              Floor(256, 16)          none               no floor
15-30,31            layers by index         model.layers.1?.*  by pattern
calibration.json    a calibration's         upper, none        the default; no layer
models/my-llama     a model's folder
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsa_compile.budgets import MOST_TOKENS
from tsa_compile.config import MOST_LAYERS, Budget, Coverage, Floor, HeldLayers, KeepRatio, LayerBudgets
from tsa_compile.errors import ConfigError
from tsa_compile.files import read_json

if TYPE_CHECKING:
    from tsa_compile.calibration.base import Calibrated

_MOST_DIGITS = 18


def length(text: str, least: int = 1, option: str = "") -> int:
    """A number of tokens, at least so many; K stands for 1024. What is wrong is said of the option that it is for."""
    tokens = _tokens(str(text))
    if tokens is None or not least <= tokens <= MOST_TOKENS:
        said = f"{option} {text!r}".lstrip()
        raise ConfigError(f"{said} is not a length: write a number of tokens from {least} to {MOST_TOKENS:,}: 8192, or 8K")
    return tokens


def _tokens(text: str) -> int | None:
    """The number of tokens that a text writes, with K or without; None where it is no number."""
    found = re.fullmatch(r"([0-9]+)([kK]?)", text.strip())
    return None if found is None else _number(found[1]) * (1024 if found[2] else 1)


def lengths(text: str) -> list[int]:
    """Lengths, with commas between them; ascending, each once."""
    return sorted({length(part) for part in names(text)})


def extent(shortest: str, longest: str) -> tuple[int, int]:
    """A range of lengths."""
    low, high = length(shortest), length(longest)
    if low >= high:
        raise ConfigError(f"{shortest} {longest} is not a range: write two lengths, the shorter one first, as 1024 32K")
    return low, high


def names(text: str) -> list[str]:
    """Words with commas between them, each once."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise ConfigError(f"{text!r} names nothing: write one or more, with commas between them")
    return list(dict.fromkeys(found))


def budget(text: str) -> Budget:
    """A budget."""
    kinds: dict[str, type[Coverage] | type[KeepRatio]] = {"coverage": Coverage, "keep": KeepRatio}
    kind, _, number = text.strip().partition(":")
    try:
        value = float(number)
    except ValueError:
        value = None
    if kind not in kinds or value is None:
        raise ConfigError(f"{text!r} is not a budget: write coverage:0.005 or keep:0.5")
    return kinds[kind](value)


def layers_of(text: str, config: Any = None, name: str = "", model: Any = None) -> HeldLayers | None:
    """The layers that a text names for a model; every command reads them here once it knows the model.

    Args:
        config: of transformers; None: any calibration will do, for what can be said before the model is known.
        name: of the model, for errors.
        model: where it is at hand, a TSAWarning says that a calibration is of other weights.

    Raises:
        ConfigError: the text names none, or the calibration is of a model of another architecture or of other sizes.
    """
    found = layers(text)
    if found is None or isinstance(found, (tuple, LayerBudgets)):
        return found
    if config is not None:
        found.check_config(config, name)
    if model is not None:
        found.check(model)
    return found.sparse_layers


_MEASURED = ("window", "floor", "score", "pool", "min_tokens", "granularity", "capacity", "kernel")
"""The options that the cost of a sparse layer depends on, besides its budget."""


def measured(text: str) -> dict[str, Any]:
    """The options by which the calibration that a text names was measured; none where nothing sparse was measured."""
    base = getattr(layers(text), "base", None)
    return {} if base is None else {name: getattr(base, name) for name in _MEASURED}


LayerReader = Callable[[str], HeldLayers | None]
"""`layers_of`, of some model or of any."""


def setting(text: str, read: LayerReader = layers_of) -> tuple[dict[str, Any], bool]:
    """A budget and fields behind it, as changes of a TSAConfig, and whether random tokens are selected.

    Layers of a calibration that gives each a budget come first, in the budget's place: layers=layers.json. They come with
    the options by which they were measured, which fields behind them change.
    """
    first, *others = text.split(",")
    calibrated = first.startswith("layers=")  # which may have a budget each
    changes: dict[str, Any] = measured(_layers_in(first.partition("=")[2])) if calibrated else {"budget": budget(first)}
    others = [first, *others] if calibrated else others
    random = False
    for part in others:
        name, _, value = (word.strip() for word in part.partition("="))
        if name == "select" and value == "random":
            random = True
            continue
        change = field(name, value, read)
        if change is None:
            raise ConfigError(
                f"--setting {text}: {part!r} is not understood: behind the budget write {FIELDS} or select=random"
            )
        changes |= change
    check_one_budget(None if calibrated else first, changes.get("layers"))
    return changes, random


def check_one_budget(budget: str | None, layers: object) -> None:
    """Raises ConfigError where a budget was written and layers have one each."""
    if budget is not None and isinstance(layers, LayerBudgets):
        raise ConfigError(f"the budget {budget}, and layers with a budget each: leave one of them out")


FIELDS = (
    "floor=none or floor=256+16 (window and sinks), layers=4-7+9, window=32, min_tokens=0, granularity=group, kernel=NAME"
)


def field(name: str, value: str, read: LayerReader = layers_of) -> dict[str, Any] | None:
    """A field of a TSAConfig where fields are written in a row, `FIELDS`; None where it is not understood.

    What else has commas in it, layers and a floor, is written with + there.
    """
    if name == "floor" and re.fullmatch(r"none|\d+\+\d+", value, re.ASCII):
        return {"floor": floor(value.replace("+", ","))}
    if name == "layers" and value:
        return {"layers": read(_layers_in(value))}
    if name in ("window", "min_tokens") and (tokens := _tokens(value)) is not None:
        return {name: tokens}
    return {name: value} if name in ("granularity", "kernel") and value else None


def _layers_in(value: str) -> str:
    """The layers 4-7+9 of a setting, as an option of their own writes them."""
    return value.strip().replace("+", ",")


def floor(text: str) -> Floor | None:
    """A floor, its window and its sinks; None for none."""
    if text.strip() == "none":
        return None
    found = re.fullmatch(r"(\d{1,9})\s*,\s*(\d{1,9})", text.strip(), re.ASCII)
    if found is None:
        raise ConfigError(f"{text!r} is not a floor: write window and sinks, as 256,16, or none")
    return Floor(int(found[1]), int(found[2]))


def layers(text: str) -> HeldLayers | Calibrated | None:
    """Layers, or a calibration that knows them; None for the default, the upper half.

    Raises:
        ConfigError: neither, or a file that is no calibration.
    """
    text = text.strip()
    if text == "upper":
        return None
    if text == "none":
        return ()
    if not re.fullmatch(r"[-,\s\d]*", text) or os.path.isfile(text):
        from tsa_compile.calibration.calibrate import PRESETS, load_calibration

        if text in PRESETS:
            return PRESETS[text].layers
        if text.endswith(".json") or os.path.isfile(text):
            return load_calibration(text)
    parts = names(text)
    if all(re.fullmatch(r"[0-9]+(-[0-9]+)?", part) for part in parts):
        return tuple(dict.fromkeys(index for part in parts for index in _run(part)))
    if run := next((found for part in parts if (found := re.fullmatch(r"(\d+)\.\.(\d+)", part, re.ASCII))), None):
        raise ConfigError(f"{run[0]!r} is no run of layers: write {run[1]}-{run[2]}")
    if any(re.fullmatch(r"[-\d]*", part) for part in parts):
        raise ConfigError(
            f"{text!r} is no list of layers: write indices as 15-30,31, a pattern or a calibration's JSON file"
        )
    return tuple(parts)


def check_layers(text: str) -> None:
    """Raises ConfigError for indices that are no list, or a file that cannot be read: what can be said without PyTorch."""
    text = text.strip()
    if text.endswith(".json"):
        read_json(text, "pass a calibration, as `tsa-compile calibrate --out` writes")
    elif re.fullmatch(r"[-.,\s\d]*", text) and not os.path.exists(text):
        layers(text)


def _run(part: str) -> range:
    """The indices of 15-30 or 15; refused before they are written out, where no model has so many layers."""
    first, _, last = part.partition("-")
    low, high = _number(first), _number(last or first)
    if high < low:
        raise ConfigError(f"{part!r} is no run of layers: write the lower index first")
    if high >= MOST_LAYERS:
        raise ConfigError(f"{part!r} is no run of layers: an index is at most {MOST_LAYERS - 1:,}")
    return range(low, high + 1)


def _number(digits: str) -> int:
    """An integer; of more digits than any limit here, which Python may refuse to read, one beyond all limits."""
    return int(digits) if len(digits) <= _MOST_DIGITS else 10**_MOST_DIGITS


DTYPES = {
    "float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16", "half": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
}  # fmt: skip


def dtype(text: str) -> str:
    """The name of a dtype, also of its short forms, or "auto"."""
    if text != "auto" and text not in DTYPES:
        raise ConfigError(f"--dtype {shlex.quote(text)} is not known: it must be auto, {', '.join(DTYPES)}")
    return DTYPES.get(text, text)


def check_device(text: str, gpus: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for what names no device, and none of these GPUs."""
    if text.lower() not in gpus and not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", text):
        also = f"; explain takes {', '.join(gpus)} as well" if gpus else ""
        raise ConfigError(f"--device {shlex.quote(text)} is not known: it must be auto, cpu, cuda or cuda:N{also}")


def check_tasks(names: Iterable[str], known: tuple[str, ...]) -> None:
    """Raises ConfigError where no task has one of these names."""
    for name in names:
        if name not in known:
            raise ConfigError(f"task={name!r} is not allowed: the tasks are {', '.join(known)}")


def is_hub_id(folder: Path) -> bool:
    """Whether what is no path here may be a model on the Hugging Face Hub: owner/name."""
    return not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(folder), re.ASCII) is not None


def check_folder(folder: Path) -> None:
    """Raises ConfigError where a folder is not there, is no model folder, and may be no model on the Hub either."""
    if is_hub_id(folder):
        return
    if not folder.exists():
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, beside, n=1)
        hint = f" (did you mean {str(folder.parent / near[0])!r}?)" if near else ""
        raise ConfigError(f"there is no folder {str(folder)!r}{hint}: pass a transformers model folder, or --shape NAME")
    if (folder / "config.json").is_file() or gguf_file(folder) is not None:
        return
    what = "a folder without config.json" if folder.is_dir() else "a file"
    raise ConfigError(
        f"{str(folder)!r} is {what}: pass a model folder, as save_pretrained writes it, or one with a .gguf file"
    )


def gguf_file(folder: Path) -> str | None:
    """The name of the one .gguf file that a folder without config.json holds instead; None where there is none.

    Raises:
        ConfigError: there are several, so that it is not clear which is meant.
    """
    if (folder / "config.json").is_file():
        return None
    found = sorted(file.name for file in folder.glob("*.gguf"))
    if len(found) > 1:
        few = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ConfigError(
            f"{str(folder)!r} holds {len(found)} .gguf files ({few}): leave one of them in a folder of its own"
        )
    return found[0] if found else None
