"""Which layer an attention call belongs to, and which layers are chosen to be sparse.

    modules of the calls                                          number      layers in the stack
    model.layers.0.self_attn ... model.layers.31.self_attn        0 ... 31    32
    layers.0.1, layers.1.1, layers.2.1                            0, 1, 2     the first number varies, the second does not
    stages.0.blocks.0, stages.0.blocks.1, stages.1.blocks.0       unknown     neither tells all calls apart
    layers.0, applied four times                                  unknown     a module has one number for all its calls
    self_attn, of a layer that Dynamo compiles by itself          unknown     its code runs for any layer
    layers.0, found as an argument or in a list of the model's own          unknown     which layer that is may change

A wrong number would make the wrong layers sparse, so a number counts only where it is proven to be the layer's: the
calls of the graph, or the modules that the frame's module holds (`frame.py`), are told apart by it alone. How many layers a
stack has is read from its container, whose members must be 0, 1, ..., n - 1 without a gap. A model that was cut before it
was compiled, and kept its first layers only, cannot be told from a model that never had more: it is what it holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from tsa_compile.config import Layers, TSAConfig, is_named, upper_half
from tsa_compile.passes.call import AttentionCall
from tsa_compile.passes.frame import Frame
from tsa_compile.reasons import Reason
from tsa_compile.text import spans

_ROOT = re.compile(r"^(?:[LG]\['[^']*'\]\.?|L__self__(?:_|$))+")
_AMONG_ARGUMENTS = re.compile(r"^L\['args'\]\[\d+\]")
_GETATTR = re.compile(r"getattr\(([^()]*), ?['\"]([^'\"]*)['\"]\)")
_SUBSCRIPT = re.compile(r"\[['\"]?(\w+)['\"]?\]")
_HIDDEN = re.compile(r"\.(?:_modules|__dict__|__self__)\b")
_CLOSURE = re.compile(r"^.*\bcell_contents\b")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PREFIXES = (("module",), ("base_model", "model"))
APPLIED_AGAIN = "one module is applied several times"


@dataclass(frozen=True)
class Place:
    """Where a call stands in the model.

    Attributes:
        names: the names of its module, as the model and as the frame have it; the first is the one to show.
        number: the layer's number, if one is proven.
        stack: the first name with `*` for the number; "" without one.
        count: how many layers the stack has, if that is proven.
        doubt: why the number or the count is not known.
        possible: the names that its module may have in the model, where Dynamo compiles it once for several.
    """

    names: tuple[str, ...]
    number: int | None = None
    stack: str = ""
    count: int | None = None
    doubt: str = ""
    possible: tuple[str, ...] = ()


def module_name(node: Node) -> str:
    """The innermost module that a node was traced from, as the model names it: "layers.3.attn"; "" if it is in none.

    Dynamo writes `L['self'].layers[3].attn`. A decorated forward finds its module among its arguments, `L['args'][0]`: that
    is the root, unless it is itself among the modules that were called. Then the place is a number of its own.
    """
    paths = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    if not paths:
        return ""
    path = paths[-1]
    while _GETATTR.search(path):
        path = _GETATTR.sub(r"\1.\2", path)
    among = _AMONG_ARGUMENTS.match(path)
    if among is not None and among.group() not in paths:
        path = path[among.end() :].removeprefix(".")
    path = _ROOT.sub("", _HIDDEN.sub("", _CLOSURE.sub("", path)))
    return _SUBSCRIPT.sub(r".\1", path).strip(".")


def _numbered(name: str) -> list[int]:
    """The positions of the numbers in a name."""
    return [position for position, part in enumerate(name.split(".")) if part.isdigit()]


def _numbers_by_container(names: Iterable[str]) -> dict[str, set[int]]:
    """The numbers of each container's members: {"layers": {0, 1, 2}}."""
    found: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for position in _numbered(name):
            found.setdefault(".".join(parts[:position]), set()).add(int(parts[position]))
    return found


def _starred(name: str, positions: Iterable[int]) -> str:
    parts = name.split(".")
    for position in positions:
        parts[position] = "*"
    return ".".join(parts)


def is_whole(graph_module: GraphModule) -> bool:
    """Whether a graph runs to the end of its function: Dynamo records why it stopped tracing."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    return not getattr(reason, "graph_break", False)


def is_model(graph_module: GraphModule, frame: Frame | None) -> bool:
    """Whether a graph holds all of what was compiled, as far as the graph shows."""
    if frame is None:
        return is_whole(graph_module)
    complete = getattr(graph_module, "compile_subgraph_reason", None) is not None  # a part that DDP cut out has none
    return complete and is_whole(graph_module) and frame.begins and not frame.part


def places_of(calls: list[AttentionCall], graph_module: GraphModule, frame: Frame | None) -> list[Place]:
    """The place of each call."""
    return _Stacks(calls, graph_module, frame).places()


def place_in(kinds: Mapping[str, type], name: str) -> Place:
    """The place of the module of this name in a model whose modules, all of them, have these names and classes."""
    return _Numbering(kinds, [name], kinds, whole=True).place(name, tuple(dict.fromkeys(aliases(name))) or (name,))


class _Numbering:
    """Which number in a module's name is its layer's, and how many layers there are.

    held: the names of all modules at hand. names: those with attention calls. kinds: the class of each name, where known.
    whole: nothing of the model is missing, so that a container's members are all there.
    """

    def __init__(self, held: Iterable[str], names: Iterable[str], kinds: Mapping[str, type], whole: bool) -> None:
        self.numbers = _numbers_by_container(held)
        self.names, self.kinds, self.whole = set(names), kinds, whole

    def place(self, name: str, names: tuple[str, ...]) -> Place:
        """The place of a module, which is shown by the first of `names`."""
        position, doubt = self._position(name)
        if position is None:
            return Place(names, doubt=doubt)
        parts = name.split(".")
        numbers = self.numbers[".".join(parts[:position])]
        count = len(numbers) if self.whole and numbers == set(range(len(numbers))) else None
        doubt = "" if count is not None else "how many layers there are is not known in this part of the model"
        return Place(names, int(parts[position]), unwrapped(_starred(name, [position])), count, doubt)

    def _position(self, name: str) -> tuple[int | None, str]:
        """Where in a name the layer's number stands, or why none of its numbers is known to be that."""
        numbered = _numbered(name)
        if not numbered:
            return None, "its module has no number"
        alike = self._alike(name, numbered)
        telling = [position for at, position in enumerate(numbered) if len({each[at] for each in alike}) == len(alike)]
        if len(alike) > 1 and len(telling) == 1:
            return telling[0], ""
        container = ".".join(name.split(".")[: numbered[0]])
        if len(numbered) == 1 and self.numbers[container] == {int(name.split(".")[numbered[0]])}:
            return numbered[0], ""
        return None, "the numbers in its module's name do not say which layer it is"

    def _alike(self, name: str, numbered: list[int]) -> set[tuple[str, ...]]:
        """The numbers in the names of all calls, and of all modules of the same class, that are named alike."""
        kind = self.kinds.get(name)
        others = {name, *self.names, *(other for other, its_kind in self.kinds.items() if its_kind is kind)}
        pattern = _starred(name, numbered)
        alike = (other.split(".") for other in others if _starred(other, _numbered(other)) == pattern)
        return {tuple(parts[position] for position in numbered) for parts in alike}


class _Stacks:
    """The calls of a graph beside the modules that its frame holds: which number of a name is the layer's."""

    def __init__(self, calls: list[AttentionCall], graph_module: GraphModule, frame: Frame | None) -> None:
        self.calls, self.graph_module, self.frame = calls, graph_module, frame
        self.names = [self._name(call.node) for call in calls]
        kinds = frame.kinds if frame is not None else {}
        held = set(kinds) or {self._name(node) for node in graph_module.graph.nodes}
        self.numbering = _Numbering(held, self.names, kinds, is_whole(graph_module))
        applications: dict[str, set[str]] = {}
        for call, name in zip(calls, self.names, strict=True):
            applications.setdefault(name, set()).add(str(call.node.meta.get("nn_module_stack")))
        self.repeated = {name for name, found in applications.items() if len(found) > 1}

    def places(self) -> list[Place]:
        """A call outside all modules counts by its place in the graph, if all calls are, and the graph is the model."""
        shown = [unwrapped(name) for name in self.names]
        if not any(shown) and is_model(self.graph_module, self.frame):
            doubt = "it is in no numbered module"
            return [Place((call.node.name,), number, doubt=doubt) for number, call in enumerate(self.calls)]
        return [self._place(call, name) for call, name in zip(self.calls, self.names, strict=True)]

    def _name(self, node: Node) -> str:
        if self.frame is not None:
            stack = node.meta.get("nn_module_stack") or {}
            if not stack:
                return self.frame.root
            name = self.frame.names.get(str(next(reversed(stack))).partition("@")[0])
            if name is not None:
                return name
        return module_name(node)

    def _place(self, call: AttentionCall, name: str) -> Place:
        names = tuple(dict.fromkeys([unwrapped(name) or call.node.name, *aliases(name), *aliases(module_name(call.node))]))
        frame = self.frame
        if frame is not None and frame.repeated:
            doubt = "Dynamo compiles its module by itself, once for all of its class"
            possible = (alias for sibling in frame.siblings for alias in aliases(f"{sibling}.{name}".strip(".")))
            return Place(names, doubt=doubt, possible=tuple(possible))
        if frame is not None and not _leads_to(frame, call.node):
            doubt = "it is an argument, or in a list of the model's own, so the next call may have another layer there"
            alike = (other for other, kind in frame.kinds.items() if kind is frame.kinds[name])
            possible = (alias for other in alike for alias in aliases(other))
            return Place((module_name(call.node) or call.node.name,), doubt=doubt, possible=tuple(possible))
        if name in self.repeated:
            return Place(names, doubt=APPLIED_AGAIN if _numbered(name) else "its module has no number")
        return self.numbering.place(name, names)


def _leads_to(frame: Frame, node: Node) -> bool:
    """Whether the way by which Dynamo found a node's module goes through registered modules alone.

    Dynamo guards that way, and of the module only what it looks like. As an argument, or as a member of a list that the
    model keeps besides its layers, the next call may have another layer there.
    """
    module = None if frame.module is None else frame.module()
    found = str(next(reversed(node.meta.get("nn_module_stack") or {}), "")).partition("@")[0]
    if module is None or found not in frame.names:
        return True
    parts = [*filter(None, module_name(node).split("."))]
    while parts and parts[0].isdigit() and parts[0] not in module._modules:
        parts = parts[1:]  # the frame's module is in a list of arguments
    for part in parts:
        module = None if module is None else module._modules.get(part)
    return str(id(module)) == found


def unwrapped(name: str) -> str:
    """A module's name without the wrappers around the model: "module.layers.3" of DDP is "layers.3"."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    for prefix in _PREFIXES:
        while tuple(parts[: len(prefix)]) == prefix:
            parts = parts[len(prefix) :]
    return ".".join(parts)


def aliases(name: str) -> list[str]:
    """All names that a pattern may mean by a module: with and without wrappers."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    inner = parts[1:] if parts[:1] in (["module"], ["base_model"]) else parts
    return [found for found in (unwrapped(name), name, ".".join(parts), ".".join(inner)) if found]


def select_layers(places: list[Place], config: TSAConfig) -> list[Reason | None]:
    """For each place: None if its layer may be sparse, else the reason code why not.

    By default that is the upper half of each stack, the middle one of an odd number included.
    """
    return [_unselected(place, config.layers) for place in places]


def _unselected(place: Place, layers: Layers | None) -> Reason | None:
    if layers is None:
        if place.number is None or place.count is None:
            return Reason.LAYER_COUNT_UNKNOWN
        return None if place.number in upper_half(place.count) else Reason.LAYER_NOT_SELECTED
    if any(is_named(layer, place.number, place.names) for layer in layers):
        return None
    numbers = any(isinstance(layer, int) for layer in layers)
    perhaps = any(is_named(layer, None, place.possible) for layer in layers)
    unknown = perhaps or (numbers and place.number is None)
    return Reason.LAYER_COUNT_UNKNOWN if unknown else Reason.LAYER_NOT_SELECTED


def not_found(places: list[Place], config: TSAConfig, graph_module: GraphModule, frame: Frame | None) -> str | None:
    """What to say of layers that were named and are nowhere in the model; None if there are none, or it cannot be known.

    A graph that is part of a model need not have them: they count as missing if no module of the model is named so. A
    stage of a pipeline has some of the layers too, so this is never an error.
    """
    unused = unused_layers(places, config)
    if not unused or not places:
        return None
    if not is_model(graph_module, frame):
        unused = [layer for layer in unused if frame is not None and frame.outside and not is_among(layer, frame.outside)]
    if any(place.number is None for place in places):
        unused = [layer for layer in unused if isinstance(layer, str)]
    return said_of_unused(unused, places) if unused else None


def unused_layers(places: list[Place], config: TSAConfig) -> list[int | str]:
    """The entries of `layers` that none of the places has."""
    named = (layer for layer in config.layers or () for place in places if is_named(layer, place.number, place.names))
    found = set(named)
    return [layer for layer in config.layers or () if layer not in found]


def said_of_unused(unused: list[int | str], places: list[Place]) -> str:
    """What to say of layers that were named and are nowhere."""
    return f"layers={unused!r} not found: the attention calls here are {_present(places)}"


def is_among(layer: int | str, names: Iterable[str]) -> bool:
    """Whether an entry of `layers` may mean one of these modules, by a part of its name."""
    if isinstance(layer, int):
        return any(str(layer) in name.split(".") for name in names)
    parts = (name.split(".") for name in names)
    return is_named(layer, None, (".".join(part[start:]) for part in parts for start in range(len(part))))


def _present(places: list[Place]) -> str:
    """The layers that there are: "0..31 (model.layers.*.self_attn)" for each stack, calls outside stacks one by one."""
    stacks: dict[str, list[int]] = {}
    for place in places:
        stacks.setdefault(place.stack or place.names[0], []).extend([] if place.number is None else [place.number])
    return ", ".join(f"{spans(sorted(found))} ({name})" if found else name for name, found in stacks.items())
