"""`predict(config, model.config, length, device)`: what a prefill costs layer by layer, dense and sparse, before any run.

FLOPs, bytes and time (calls.py) follow from the length, the kept share and the device's measured costs. They include the
projections and the MLP of every layer and the head for the last token, so the whole prefill is predicted, not its attention
alone.

Assumed is what holds for transformers' models with a padding mask of ones: the masks of full attention are proven, those of
sliding windows too. `explain` says what the compiler really does with a model. Not included: a host that launches more
slowly than the GPU works (below about 8K tokens without a CUDA graph), padding, dequantisation, communication between
devices, and the kernels of what is no attention (Mamba, convolutions).
Rates are those of bfloat16 at the sizes of Llama-3.1-8B; much smaller products run at lower ones. A block-sparse `kernel` or
`dense_kernel` is taken for one that computes everything it is given, as what it leaves out depends on the prompt.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.table import Table

from tsa_compile.config import Coverage, TSAConfig, check_int, checked_number, given, is_named, upper_half
from tsa_compile.costs.breakeven import Minimum, expected_kept, minimum
from tsa_compile.costs.calls import NOTHING, CallShape, Work, added, dense_work, rest_work, sparse_path, window_work
from tsa_compile.costs.devices import DeviceCosts, costs_of
from tsa_compile.costs.models import FULL, LayerSizes, ModelSizes, anatomy
from tsa_compile.errors import ConfigError
from tsa_compile.kernels import registry
from tsa_compile.kernels.interface import MAX_HEAD_DIM
from tsa_compile.reasons import Reason
from tsa_compile.text import Shown, as_text, new_table, number, spans, wrapped

_WINDOWS = {"sliding_attention": Reason.SLIDING_WINDOW, "chunked_attention": Reason.CHUNKED}


@dataclass(frozen=True)
class LayerPrediction:
    """One layer and its work at the predicted length."""

    index: int
    name: str
    kind: str
    reason: Reason
    """SPARSE, or why the layer stays dense."""
    kept: float
    """The share of tokens whose attention is computed; 1 in dense layers."""
    dense: Work = field(repr=False)
    """Dense attention."""
    sparse: Work = field(repr=False)
    """Sparse attention with all its steps; nothing where the layer has no full attention."""
    rest: Work = field(repr=False)
    """Projections, MLP, and the kernels between them."""
    sparse_kept: float

    @property
    def dense_ms(self) -> float:
        """Attention, dense."""
        return self.dense.ms

    @property
    def sparse_ms(self) -> float:
        """Attention, sparse at `sparse_kept`, whether or not it is made so; NaN where it cannot be."""
        return math.nan if self.sparse is NOTHING else self.sparse.ms

    @property
    def rest_ms(self) -> float:
        """All but attention."""
        return self.rest.ms

    @property
    def ms(self) -> float:
        """Attention as it will run."""
        return self.sparse_ms if self.reason is Reason.SPARSE else self.dense_ms

    @property
    def saved_ms(self) -> float:
        """What sparsity saves; negative where it costs."""
        return self.dense_ms - self.ms

    @property
    def gain(self) -> float:
        """How many times faster attention becomes."""
        return _gain(self.dense_ms, self.ms)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = {
            name: getattr(self, name) for name in ("index", "name", "kind", "kept", "dense_ms", "ms", "saved_ms", "gain")
        }
        possible = {"sparse_ms": self.sparse_ms, "sparse_kept": self.sparse_kept} if self.sparse is not NOTHING else {}
        works = {"dense": self.dense, "sparse": self.sparse, "rest": self.rest}
        done = {name: asdict(work) for name, work in works.items() if work is not NOTHING}
        return values | {"reason": str(self.reason), **possible, "rest_ms": self.rest_ms, "work": done}


@dataclass(frozen=True)
class Prediction(Shown):
    """What one prefill of a model costs, layer by layer and in all."""

    model: ModelSizes = field(repr=False)
    config: TSAConfig
    costs: DeviceCosts
    length: int
    batch: int
    layers: tuple[LayerPrediction, ...]
    head: Work
    """The head, for the last token."""
    break_even: int | None
    """The shortest length from which layers become sparse; None if there is none."""
    notes: tuple[str, ...] = ()
    kept: float | None = None
    """The kept share that was given instead of being expected of the budget."""

    @property
    def attention_dense_ms(self) -> float:
        """Attention of all layers, dense."""
        return sum(layer.dense_ms for layer in self.layers)

    @property
    def attention_ms(self) -> float:
        """Attention of all layers as it will run."""
        return sum(layer.ms for layer in self.layers)

    @property
    def rest_ms(self) -> float:
        """All but attention, the head for the last token included."""
        return sum(layer.rest_ms for layer in self.layers) + self.head.ms

    @property
    def dense_ms(self) -> float:
        """The whole prefill with dense attention."""
        return self.attention_dense_ms + self.rest_ms

    @property
    def ms(self) -> float:
        """The whole prefill as it will run."""
        return self.attention_ms + self.rest_ms

    @property
    def saved_ms(self) -> float:
        """What sparsity saves."""
        return self.dense_ms - self.ms

    @property
    def attention_gain(self) -> float:
        """How many times faster the attention of all layers becomes."""
        return _gain(self.attention_dense_ms, self.attention_ms)

    @property
    def gain(self) -> float:
        """How many times faster the whole prefill becomes."""
        return _gain(self.dense_ms, self.ms)

    @property
    def dense(self) -> Work:
        """The whole prefill with dense attention."""
        return added([*(layer.dense for layer in self.layers), *(layer.rest for layer in self.layers), self.head])

    @property
    def sparse(self) -> Work:
        """The whole prefill with those layers sparse that are at this length."""
        attention = (layer.sparse if layer.reason is Reason.SPARSE else layer.dense for layer in self.layers)
        return added([*attention, *(layer.rest for layer in self.layers), self.head])

    def at(self, length: int) -> Prediction:
        """The same question for another length; ConfigError unless it is an integer of at least 1."""
        check_int("length", length, 1)
        return _predict(self.config, self.model, length, self.costs, self.notes, self.batch, self.kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        totals = ("dense_ms", "ms", "saved_ms", "gain", "attention_dense_ms", "attention_ms", "attention_gain", "rest_ms")
        return {
            "model": self.model.name, "dtype": str(self.model.dtype).removeprefix("torch."), "device": self.costs.name,
            "length": self.length, "batch": self.batch, "break_even": self.break_even, "config": self.config.to_dict(),
            **{name: getattr(self, name) for name in totals}, "head_ms": self.head.ms,
            "layers": [layer.to_dict() for layer in self.layers], "notes": list(self.notes),
        }  # fmt: skip

    def _text(self, width: int | None) -> str:
        """With a width sentences are broken into lines of at most so many characters; the table has 78."""
        sizes = f"{self.batch} x {self.length:,} tokens, {self.model.name}"
        head = [f"prefill of {sizes} in {str(self.model.dtype).removeprefix('torch.')}, {self.costs.name}"]
        if self.break_even is None:
            rest = ["sparse layers gain at no length"]
        else:
            rest = [f"layers become sparse from {self.break_even:,} tokens on"]
        rest.extend(f"note: {note}" for note in self.notes)
        table = as_text(_table(self, _COLUMNS if width is None else _NARROW))
        if width is not None:
            head, rest = wrapped(head, width), wrapped(rest, width)
        return "\n".join([*head, table, *rest])


def predict(
    config: TSAConfig | None,
    model_config: Any,
    length: int,
    device: torch.device | str | DeviceCosts | None = None,
    *,
    batch: int = 1,
    dtype: torch.dtype | str | None = None,
    kept: float | None = None,
) -> Prediction:
    """What the prefill of a model costs on a device, dense and with the layers sparse that `config` asks for.

    Args:
        config: what would be passed to the backend; the defaults if None.
        model_config: a transformers configuration: layers, heads, sizes, windows, experts.
        length: tokens of each prompt.
        device: see `costs_of`.
        batch: how many prompts run at once.
        dtype: of weights and attention; the configuration's if None.
        kept: the share of all tokens that sparse layers keep, if you measured it. If None, the share that the budget is
            expected to keep; for Coverage that is the share that the publication found.

    Raises:
        ConfigError: a value is not allowed, or the configuration is of no causal language model.
        KernelError: `config` names a kernel that is not registered.
    """
    config = given(config, "predict")
    registry.check(config.kernel, config.dense_kernel)
    check_int("length", length, 1)
    check_int("batch", batch, 1)
    if kept is not None:
        kept = checked_number("kept", kept, "a share of the tokens in (0, 1], or None", lambda share: 0 < share <= 1)
    costs, notes = costs_of(device)
    return _predict(config, anatomy(model_config, dtype), length, costs, notes, batch, kept)


def _predict(
    config: TSAConfig,
    model: ModelSizes,
    length: int,
    costs: DeviceCosts,
    notes: tuple[str, ...],
    batch: int,
    kept: float | None,
) -> Prediction:
    selected = _selected(config, model)
    share = sum(layer.kind == FULL for index, layer in enumerate(model.layers) if index in selected) / len(model.layers)
    itemsize = model.dtype.itemsize
    configs = [config.of_layer(index, sizes.modules) for index, sizes in enumerate(model.layers)]
    shapes = [
        CallShape.configured(own, batch, layer.heads, layer.kv_heads, layer.head_dim, layer.value_head_dim, itemsize)
        for own, layer in zip(configs, model.layers, strict=True)
    ]
    minima = [minimum(own, shape, share, costs) for own, shape in zip(configs, shapes, strict=True)]
    layers = []
    for index, (sizes, shape) in enumerate(zip(model.layers, shapes, strict=True)):
        reason = _reason(sizes, index in selected, length, minima[index])
        sparse_kept = expected_kept(configs[index], length) if kept is None else kept
        layers.append(
            LayerPrediction(
                index=index, name=sizes.name, kind=sizes.kind, reason=reason, dense=_dense(sizes, shape, costs, length),
                sparse=sparse_path(shape, costs, length, sparse_kept) if sizes.kind == FULL else NOTHING,
                rest=rest_work(costs, batch * length, sizes.active, sizes.weights, itemsize, 2 * sizes.outputs),
                kept=sparse_kept if reason is Reason.SPARSE else 1.0, sparse_kept=sparse_kept,
            )
        )  # fmt: skip
    head = rest_work(costs, batch, model.head, model.head, itemsize)
    full = [index for index, layer in enumerate(model.layers) if layer.kind == FULL]
    gaining = [minima[index].shortest for index in [index for index in full if index in selected] or full[:1]]
    said = dict.fromkeys((*notes, *_notes(config, model, kept)))
    return Prediction(
        model=model, config=config, costs=costs, length=length, batch=batch, layers=tuple(layers), head=head,
        break_even=min((length for length in gaining if length is not None), default=None),
        notes=tuple(said), kept=kept,
    )  # fmt: skip


def _dense(sizes: LayerSizes, shape: CallShape, costs: DeviceCosts, length: int) -> Work:
    if sizes.window is not None:
        return window_work(shape, costs, sizes.window, length)
    return dense_work(shape, costs, length) if sizes.attends else NOTHING


def _selected(config: TSAConfig, model: ModelSizes) -> frozenset[int]:
    """The layers that `config.layers` names; ConfigError where one is not in the model."""
    count = len(model.layers)
    if config.layers is None:
        return frozenset(upper_half(count))
    named = {
        layer: {index for index, sizes in enumerate(model.layers) if is_named(layer, index, sizes.modules)}
        for layer in config.layers
    }
    unused = [layer for layer, found in named.items() if not found]
    if unused:
        first, last = model.layers[0].name, model.layers[-1].name
        raise ConfigError(f"layers={unused!r} not found: {model.name} has the layers 0..{count - 1} ({first} to {last})")
    return frozenset().union(*named.values())


def _reason(layer: LayerSizes, selected: bool, length: int, least: Minimum) -> Reason:
    if not layer.attends:
        return Reason.UNSUPPORTED_FORM
    if layer.kind in _WINDOWS:
        return _WINDOWS[layer.kind]
    if not selected:
        return Reason.LAYER_NOT_SELECTED
    if max(layer.head_dim, layer.value_head_dim) > MAX_HEAD_DIM:
        return Reason.HEAD_DIM
    return Reason.SPARSE if least.reached_by(length, length) else Reason.TOO_SHORT


def _notes(config: TSAConfig, model: ModelSizes, kept: float | None) -> list[str]:
    notes = []
    counted = [budget for budget in config.budgets if isinstance(budget, Coverage)]
    if counted and kept is None:
        notes.append(f"what {counted[0]} keeps depends on the input: the times are for the share that the publication found")
    if any(layer.window is not None for layer in model.layers):
        notes.append("layers with a window are charged for their windows, as they run without a mask")
    if any(layer.kind in _WINDOWS and layer.window is None for layer in model.layers):
        notes.append("layers with chunks are charged as causal attention over all tokens, dense and unchanged")
    others = sorted({layer.kind for layer in model.layers if not layer.attends})
    if others:
        notes.append(f"layers of {', '.join(others)} are charged for their products alone")
    if model.dtype.itemsize > 2:
        notes.append(f"products and attention of {model.dtype} are charged at the rates of half precision: they are slower")
    return notes


def _gain(dense: float, now: float) -> float:
    return dense / now if now else 1.0


_COLUMNS = ("layers", "kind", "decision", "kept", "attention ms", "becomes", "saved", "gain", "rest ms")
_NARROW = tuple(name for name in _COLUMNS if name not in ("kind", "saved"))


def _table(prediction: Prediction, columns: tuple[str, ...]) -> Table:
    table = new_table(*columns, right=[name for name in columns if name not in ("layers", "kind", "decision")])

    def add(*cells: str) -> None:
        table.add_row(*(cell for name, cell in zip(_COLUMNS, cells, strict=True) if name in columns))

    alike: dict[LayerPrediction, list[int]] = {}
    for layer in prediction.layers:
        alike.setdefault(replace(layer, index=0, name=""), []).append(layer.index)
    for layer, indices in alike.items():
        times = [*_cells(layer.dense_ms, layer.ms), number(layer.rest_ms)]
        add(spans(indices), layer.kind, str(layer.reason), f"{layer.kept:.3f}", *times)
    add("all attention", "", "", "", *_cells(prediction.attention_dense_ms, prediction.attention_ms), "")
    add("whole prefill", "", "", "", *_cells(prediction.dense_ms, prediction.ms), number(prediction.rest_ms))
    return table


def _cells(dense: float, now: float) -> list[str]:
    return [number(dense), number(now), number(dense - now), f"{_gain(dense, now):.2f}x"]
