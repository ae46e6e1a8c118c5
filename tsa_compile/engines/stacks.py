"""Which layer of its model a running attention module is, and what is said once where no layer became sparse.

The model is the outermost of the modules whose calls are running that holds the attention module. Names, numbers and the
default, the upper half, are those of a compiled graph (passes/layers.py).
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from dataclasses import dataclass, field

from torch.nn import Module

from tsa_compile.config import TSAConfig
from tsa_compile.errors import TSAWarning
from tsa_compile.passes.frame import running_modules
from tsa_compile.passes.layers import APPLIED_AGAIN, Place, is_among, place_in, said_of_unused, select_layers, unused_layers
from tsa_compile.reasons import Reason


@dataclass
class Stack:
    """The attention layers of one class in a model, and what became of them in the prefill that is running.

    Attributes:
        selected: for each module's name its place, and the reason why its layer is not asked to be sparse, if it is not.
        sizes: for each of them, how many members the modules have that it is found in.
        share: how many of them are asked to be sparse, of all. Those with a window count, as their masks come when they run.
    """

    title: str
    selected: dict[str, tuple[Place, Reason | None]]
    sizes: dict[str, tuple[int, ...]]
    last: int = -1
    sparse: bool = False
    misses: dict[Reason, str] = field(default_factory=dict)
    said: set[Reason] = field(default_factory=set)

    @property
    def share(self) -> float:
        return sum(reason is None for _, reason in self.selected.values()) / len(self.selected)

    def note(self, place: Place, reason: Reason, detail: str, missed: bool) -> None:
        """Records a layer's call. Behind the last layer it is said why none became sparse, once for a set of reasons."""
        number = -1 if place.number is None else place.number
        if number <= self.last:  # the next prefill
            self.misses, self.sparse = {}, False
        self.last = number
        self.sparse |= reason is Reason.SPARSE
        if missed:
            self.misses.setdefault(reason, detail)
        if place.count is not None and number < place.count - 1:
            return
        if self.misses and not self.sparse and not self.said >= set(self.misses):
            self.said.update(self.misses)
            why = "; ".join(reason.said(detail) for reason, detail in self.misses.items())
            warnings.warn(f"{self.title}: no attention call became sparse. {why}", TSAWarning, stacklevel=2)


@dataclass(frozen=True)
class Seat:
    """An attention module in its model. `outermost`: the module whose call was the first when it was looked up."""

    outermost: weakref.ref[Module]
    model: weakref.ref[Module]
    name: str
    stack: Stack

    @property
    def place(self) -> Place:
        return self.stack.selected[self.name][0]

    @property
    def unselected(self) -> Reason | None:
        return self.stack.selected[self.name][1]

    def is_of(self, module: Module, outermost: Module) -> bool:
        """Whether the module is where it was looked up, beside as many others: layers may be cut off, or change places."""
        model = self.model()
        if model is None or self.outermost() is not outermost:
            return False
        return _found(model, self.name) == (module, self.stack.sizes[self.name])


def _found(model: Module, name: str) -> tuple[Module | None, tuple[int, ...]]:
    """The module of a name, and how many members each of the modules has that it is found in."""
    module: Module | None = model
    sizes = []
    for part in filter(None, name.split(".")):
        if module is None:
            break
        sizes.append(len(module._modules))
        module = module._modules.get(part)
    return module, tuple(sizes)


class Seats:
    """The seats of all modules that ran under one configuration."""

    def __init__(self, title: str, config: TSAConfig) -> None:
        self.title, self.config = title, config
        self._seats: weakref.WeakKeyDictionary[Module, Seat] = weakref.WeakKeyDictionary()
        self._stacks: weakref.WeakKeyDictionary[Module, dict[type, Stack]] = weakref.WeakKeyDictionary()

    def of(self, module: Module) -> Seat:
        """Where a module stands; looked up again when it runs within another model, or elsewhere in its own."""
        running = [*running_modules()]
        outermost = running[-1] if running else module
        seat = self._seats.get(module)
        if seat is None or not seat.is_of(module, outermost):
            holding = [each for each in running if any(inner is module for inner in each.modules())]
            model = holding[-1] if holding else module
            name = next(name for name, inner in model.named_modules() if inner is module)
            seat = Seat(weakref.ref(outermost), weakref.ref(model), name, self._stack(model, type(module), name))
            self._seats[module] = seat
        return seat

    def _stack(self, model: Module, kind: type, name: str) -> Stack:
        stacks = self._stacks.setdefault(model, {})
        if kind not in stacks or stacks[kind].sizes.get(name) != _found(model, name)[1]:
            stacks[kind] = self._read(model, kind)
        return stacks[kind]

    def _read(self, model: Module, kind: type) -> Stack:
        modules = dict(model.named_modules())
        kinds = {name: type(inner) for name, inner in modules.items()}
        held = Counter(id(inner) for _, inner in model.named_modules(remove_duplicate=False))
        places = {}
        for name, inner in modules.items():
            if type(inner) is kind:
                place = place_in(kinds, name)
                places[name] = place if held[id(inner)] == 1 else Place(place.names, doubt=APPLIED_AGAIN)
        reasons = select_layers([*places.values()], self.config)
        unused = [layer for layer in unused_layers([*places.values()], self.config) if not is_among(layer, kinds)]
        if unused:
            text = f"{self.title}: {said_of_unused(unused, [*places.values()])}"
            warnings.warn(text, TSAWarning, stacklevel=2)
        selected = {name: (place, reason) for (name, place), reason in zip(places.items(), reasons, strict=True)}
        return Stack(self.title, selected, {name: _found(model, name)[1] for name in selected})
