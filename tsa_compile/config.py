"""What a user can decide: `TSAConfig`, frozen, validated, JSON in and out. Its budgets and its floor are in budgets.py.

A value that is not allowed raises `ConfigError`, which names the option, the value and what is allowed. Whether a layer
exists and whether a kernel is registered is known only with a model at hand, so later stages check these.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from tsa_compile.budgets import (
    MOST_TOKENS,
    Budget,
    Coverage,
    Floor,
    KeepRatio,
    budget_dict,
    ceil_fraction,
    check_int,
    checked_number,
    read_budget,
    read_floor,
    rejected,
    shown,
)
from tsa_compile.errors import ConfigError, unknown

__all__ = [
    "MOST_LAYERS",
    "OPTIONS",
    "Budget",
    "Coverage",
    "Floor",
    "HeldLayers",
    "KeepRatio",
    "LayerBudgets",
    "Layers",
    "TSAConfig",
    "budget_dict",
    "ceil_fraction",
    "check_int",
    "checked_number",
    "is_named",
    "upper_half",
]

MOST_LAYERS = 10_000  # of a model: a longer list of indices is refused before it is written out
GRANULARITIES = ("head", "group")


class LayerBudgets(Mapping[int | str, Budget]):
    """Layers, by index or by pattern, each with a budget of its own. Immutable and hashable; the order counts."""

    def __init__(self, budgets: Iterable[tuple[int | str, Budget]]) -> None:
        self._budgets = dict(budgets)

    def __getitem__(self, layer: int | str) -> Budget:
        return self._budgets[layer]

    def __iter__(self) -> Iterator[int | str]:
        return iter(self._budgets)

    def __len__(self) -> int:
        return len(self._budgets)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and list(self.items()) == list(other.items())

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        return repr(self._budgets)


Compiler = str | Callable[..., Any]
Layers = Sequence[int] | Sequence[str] | Mapping[int, Budget | float] | Mapping[str, Budget | float] | LayerBudgets
"""As they may be given."""
HeldLayers = tuple[int, ...] | tuple[str, ...] | LayerBudgets
"""As a TSAConfig holds them."""


@dataclass(frozen=True)
class TSAConfig:
    """How, and in which layers, attention becomes sparse. `TSAConfig.published()` has the settings of the publication.

    Attributes:
        budget: how many tokens a layer keeps: `Coverage(tau)` or `KeepRatio(ratio)`.
        window: the last tokens, always kept, whose attention scores all others.
        floor: what every row sees, whether it was selected or not, `Floor(window, sinks)`; None: rows that were not selected
            become 0, as published.
        score: how the attention that the window's rows pay to a token becomes its score: "max" over the rows, so that a
            question of fewer rows than the window has counts in full, or their "mean", as published.
        pool: width of the average pooling over the scores; odd.
        min_tokens: at least this many tokens are kept besides the window.
        layers: which layers are sparse: None for the upper half, indices, or glob patterns on module names
            (``"model.layers.1?.*"``). A pattern matches the whole name. Empty: none, and the graph stays exact. A mapping
            ``{15: 0.3, 16: 0.1}`` gives each of them a keep ratio, or a budget, of its own, in the place of `budget`; of
            several patterns that match a layer the first counts.
        granularity: "head" selects per query head, "group" per key/value head.
        capacity: static size of the selection, at least the window; None means the sequence length.
        min_length: shortest sequence to compress; None leaves it to the compiler.
        kernel: attention kernel over the kept rows: "auto" or a registered name.
        dense_kernel: attention kernel over all tokens in the causal layers that are not sparse, by its registered name; a
            block-sparse one makes them approximate as well. None: dense attention, exactly as the model wrote it.
        regional: compile layers that are alike once, not each by itself (regional compilation): compiling takes less time,
            and nothing is fused across the border of two layers. Not with CUDA graphs. None: with Inductor without a mode on
            a GPU where the products with a layer's weights are 4e11 operations (`regions.LEAST_WORK`), so that the GPU is
            not kept waiting (8B shape: from 920 tokens on); and in `prefill(dynamic=True)`, whose graph for all lengths
            takes longer to compile, unless `compiler` is a callable.
        strict: raise where a rewrite fails or the attention of a selected layer is not understood, instead of warning.
        compiler: what compiles the rewritten graph: a Dynamo backend's name, or a callable ``(gm, inputs)``, which is given
            the single steps of sparse attention.
        skip_passes: passes of `pipeline.py` that are left out, by name, to look for a fault or to spare their time:
            "Validate", "RewriteSparse", "CanonicalizeDense", "Decompose", "RemoveDeadMasks".
    """

    budget: Budget = KeepRatio(0.15)
    window: int = 128
    floor: Floor | None = Floor()
    score: Literal["max", "mean"] = "max"
    pool: int = 7
    min_tokens: int = 1024
    layers: Layers | None = None
    granularity: Literal["head", "group"] = "head"
    capacity: int | None = None
    min_length: int | None = None
    kernel: str = "auto"
    dense_kernel: str | None = None
    regional: bool | None = None
    strict: bool = False
    compiler: Compiler = "inductor"
    skip_passes: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", read_budget(self.budget))
        object.__setattr__(self, "floor", read_floor(self.floor))
        object.__setattr__(self, "layers", _layers(self.layers))
        check_int("window", self.window, 1, most=MOST_TOKENS)
        check_int("min_tokens", self.min_tokens, 0, most=MOST_TOKENS)
        check_int("capacity", self.capacity, 1, most=MOST_TOKENS, optional=True)
        if self.capacity is not None and self.capacity < self.window:
            raise rejected("capacity", self.capacity, f"at least window={self.window}, which is always kept, or None")
        check_int("min_length", self.min_length, 1, most=MOST_TOKENS, optional=True)
        if self.score not in ("max", "mean"):
            raise rejected("score", self.score, 'one of "max", "mean"')
        check_int("pool", self.pool, 1, most=MOST_TOKENS)
        if self.pool % 2 == 0:
            raise rejected("pool", self.pool, "an odd integer >= 1")
        if self.granularity not in GRANULARITIES:
            raise rejected("granularity", self.granularity, 'one of "head", "group"')
        if not isinstance(self.kernel, str) or not self.kernel:
            raise rejected("kernel", self.kernel, '"auto" or the name of a registered attention kernel')
        if self.dense_kernel is not None and (not isinstance(self.dense_kernel, str) or not self.dense_kernel):
            raise rejected("dense_kernel", self.dense_kernel, "the name of a registered attention kernel, or None")
        if not isinstance(self.regional, (bool, NoneType)):
            raise rejected("regional", self.regional, "True, False or None")
        if not isinstance(self.strict, bool):
            raise rejected("strict", self.strict, "True or False")
        if not isinstance(self.skip_passes, (list, tuple)) or not all(isinstance(name, str) for name in self.skip_passes):
            raise rejected("skip_passes", self.skip_passes, "a list of names")
        object.__setattr__(self, "skip_passes", tuple(self.skip_passes))
        if not (callable(self.compiler) or (isinstance(self.compiler, str) and self.compiler)):
            raise rejected("compiler", self.compiler, 'a Dynamo backend by name ("inductor", "eager", ...) or a callable')

    @classmethod
    def published(cls, **changes: Any) -> TSAConfig:
        """The settings of arXiv 2602.03216: `Coverage(0.005)`, no floor, the mean as score; `changes` are other fields."""
        return cls(budget=Coverage(0.005), window=128, floor=None, score="mean", pool=7, min_tokens=1024).replace(**changes)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> TSAConfig:
        """The config that `torch.compile(..., options=...)` asks for.

        `options` may hold a whole config under "config"; every other key is a field and overrides it.

        Raises:
            ConfigError: a key is no option (the nearest one is suggested), or a value is not allowed.
        """
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise rejected("options", options, "a mapping from option names to values, or None")
        fields = dict(options)
        base = fields.pop("config", None)
        if base is not None and not isinstance(base, TSAConfig):
            raise rejected("config", base, "a TSAConfig (TSAConfig.from_json reads a file)")
        _check_names(fields, (*OPTIONS, "config"))
        return (base if base is not None else cls()).replace(**fields)

    def of_layer(self, number: int | None, names: Iterable[str]) -> TSAConfig:
        """What holds for one of the sparse layers: with the budget that `layers` gives it, if it gives any.

        Args:
            number, names: of the layer and its modules, as for `is_named`.
        """
        if not isinstance(self.layers, LayerBudgets):
            return self
        known = tuple(names)
        own = next((budget for layer, budget in self.layers.items() if is_named(layer, number, known)), self.budget)
        return dataclasses.replace(self, budget=own)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The different budgets of its sparse layers."""
        return tuple(dict.fromkeys(self.layers.values())) if isinstance(self.layers, LayerBudgets) else (self.budget,)

    def replace(self, **changes: Any) -> TSAConfig:
        """A copy with some fields changed; an unknown name is a ConfigError."""
        _check_names(changes, OPTIONS)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the inverse of `from_json`. A callable compiler becomes its qualified name.

        That name is for reports: it does not read back, so `to_json` refuses it.
        """
        values = {name: getattr(self, name) for name in OPTIONS}
        values["budget"] = budget_dict(self.budget)
        values["floor"] = None if self.floor is None else dataclasses.asdict(self.floor)
        values["skip_passes"] = list(self.skip_passes)
        values["layers"] = _layers_dict(self.layers)
        if not isinstance(self.compiler, str):
            values["compiler"] = getattr(self.compiler, "__qualname__", type(self.compiler).__qualname__)
        return values

    def to_json(self) -> str:
        """This config as JSON text.

        Raises:
            ConfigError: `compiler` is a callable, which no JSON text can name.
        """
        if not isinstance(self.compiler, str):
            raise ConfigError(
                f"compiler={self.compiler!r} cannot be written as JSON: only a Dynamo backend's name can; "
                'write config.replace(compiler="inductor") and pass the callable beside it'
            )
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> TSAConfig:
        """Reads JSON text, a file (a Path, or a string that names one) or a mapping; missing fields are defaults.

        Raises:
            ConfigError: the text is no JSON object, a key is unknown or a value not allowed.
        """
        values = _read_json(source)
        if str(values.get("format")).startswith("tsa_compile.") and "fingerprint" in values:
            raise ConfigError(
                "this is a calibration, not a configuration: read it with load_calibration(path).config(), or pass it to "
                "--sparse-layers on the command line"
            )
        _check_names(values, OPTIONS)
        return cls().replace(**values)


def given(config: object, function: str) -> TSAConfig:
    """The configuration that a function was called with, for None the defaults; ConfigError for anything else."""
    if config is None:
        return TSAConfig()
    if not isinstance(config, TSAConfig):
        raise ConfigError(f"config={shown(config)} is not allowed: {function}() takes a TSAConfig, or None for the defaults")
    return config


OPTIONS = tuple(f.name for f in dataclasses.fields(TSAConfig))


def upper_half(count: int) -> range:
    """The layers that are sparse where `layers` is None: the middle one of an odd number included."""
    return range(count // 2, count)


def is_named(layer: int | str, number: int | None, names: Iterable[str]) -> bool:
    """Whether an entry of `layers` names a layer of this number, if it has one, with modules of these names."""
    return layer == number if isinstance(layer, int) else any(fnmatchcase(name, layer) for name in names)


def _check_names(given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise unknown(str(name), "an option", known)


def _layers_dict(layers: Layers | None) -> Any:
    """Plain JSON types, in whose mappings every key is text and a keep ratio a number."""
    if not isinstance(layers, LayerBudgets):
        return None if layers is None else list(layers)
    found = {str(layer): budget_dict(budget) for layer, budget in layers.items()}
    return {layer: budget.get("keep_ratio", budget) for layer, budget in found.items()}


def _layers(value: object) -> HeldLayers | None:
    """None, or a tuple of all ints or all strings, in the order given, without repeats; or such with a budget each."""
    allowed = (
        "None, a list of layer indices >= 0 or of module-name patterns, or a mapping of either to keep ratios or budgets"
    )
    if value is None:
        return None
    if isinstance(value, range):
        if value and max(value[0], value[-1]) >= MOST_LAYERS:
            raise rejected("layers", value, f"{allowed}; an index is at most {MOST_LAYERS - 1:,}")
        value = tuple(value)
    if not isinstance(value, (list, tuple, Mapping)):
        raise rejected("layers", value, allowed)
    keys = tuple(value)
    if isinstance(value, Mapping):  # of which JSON has text as keys only
        keys = tuple(int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() else key for key in keys)
    indices = all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in keys)
    patterns = all(isinstance(item, str) and item for item in keys)
    if not (indices or patterns):
        raise rejected("layers", value, allowed)
    if not isinstance(value, Mapping) or not value:
        return tuple(dict.fromkeys(keys))
    if len(set(keys)) < len(keys):
        raise rejected("layers", value, allowed)
    return LayerBudgets(zip(keys, map(_own_budget, value.values()), strict=True))


def _own_budget(value: Any) -> Budget:
    """A layer's budget; a number is a keep ratio."""
    if isinstance(value, (Mapping, Coverage, KeepRatio)):
        return read_budget(value)
    return KeepRatio(value)  # which refuses what is no number, by name


def _read_json(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    if isinstance(source, Path) or (isinstance(source, str) and not source.lstrip().startswith("{")):
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{str(source)!r} is neither a JSON object nor a readable file: {error}") from error
    elif isinstance(source, str):
        text = source
    else:
        raise rejected("source", source, "JSON text, a path or a mapping")
    name = "the config" if text is source else repr(str(source))
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and thousands of brackets
        raise ConfigError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must be a JSON object of options, found {type(values).__name__}")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python would keep the last of several values for one key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"{twice!r} is there twice; keep one of the two values")
    return values
