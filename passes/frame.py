"""The frame that Dynamo traced a graph from: whose modules the graph names, and what runs around it.

    model(ids) -> Model.forward -> Tower.forward -> Layer.forward       a graph each, where graph breaks lie between

A graph names modules from its own frame on: "layers.3" in the tower's, "attention" in the layer's. What is a layer's number
there is known only with the modules at hand, which Dynamo has while it compiles: the frame's module, and on Python's stack
the modules whose calls are running. Code is shared by modules of one class, so a frame that was compiled for layer 0 also
runs for layer 1: names of the whole model hold only for a module that is the only one of its class.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType
from typing import Any

import torch
from torch.fx import GraphModule
from torch.nn import Module

_RECORD = "tsa_frame"
_CALL = Module._call_impl.__code__
_RESUMED = "torch_dynamo_resume_in"
_GLOBAL = re.compile(r"^G\['([^']+)'\]")


@dataclass(frozen=True)
class Frame:
    """What was known of a graph's modules while it was compiled.

    Attributes:
        model: the outermost running module that holds the frame's, without the wrapper of `torch.compile`.
        names: each module's name by its id: in `model` if the frame's module is the only one of its class there, else in
            the frame's module.
        kinds: the class of each such name.
        module: the frame's module, which holds all those that the graph names.
        root: the name of the frame's module; "" if it is `model`, or one of several of its class.
        repeated: the frame's module is one of several of its class side by side, so that its code may run for any of them.
        siblings: the names in `model` of all modules of that class, if it is repeated.
        part: more of the model runs around the frame than wrappers of its module.
        begins: the graph begins where the function does, not behind a graph break.
        outside: the names of all modules of `model`.
        sharded: parameters of `model` are split over devices, other than by FSDP, which gathers them for each call.
    """

    model: weakref.ref[Module] | None
    names: Mapping[str, str]
    kinds: Mapping[str, type]
    module: weakref.ref[Module] | None = None
    root: str = ""
    repeated: bool = False
    siblings: tuple[str, ...] = ()
    part: bool = False
    begins: bool = True
    outside: tuple[str, ...] = ()
    sharded: bool = False


def frame_of(graph_module: GraphModule) -> Frame | None:
    """The frame that a graph was traced from; None where Dynamo is not compiling it now, nor was asked to remember."""
    recorded = graph_module.meta.get(_RECORD)
    if recorded is not None:
        return recorded
    translator = _translator()
    return None if translator is None else _read(graph_module, translator)


def remember_frame(graph_module: GraphModule) -> None:
    """Records the frame of a graph that is compiled now, for passes that run later."""
    graph_module.meta[_RECORD] = frame_of(graph_module)


def _translator() -> Any:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # nothing was compiled yet
        return None


def _read(graph_module: GraphModule, translator: Any) -> Frame:
    begins = not translator.f_code.co_name.startswith(_RESUMED)
    running = list(running_modules())
    root = _root(graph_module, translator)
    if root is None:
        return Frame(None, {}, {}, part=bool(running), begins=begins)
    around = [module for module in running if module is not root and any(inner is root for inner in module.modules())]
    model = around[-1] if around else root
    within = {id(module) for module in root.modules()}
    alike = [module for module in model.modules() if type(module) is type(root) and id(module) not in within]
    alone = all(_only_wraps(module, root) for module in alike)
    base = model if alone else root
    names = {str(id(module)): name for name, module in base.named_modules()}
    return Frame(
        model=weakref.ref(getattr(model, "_orig_mod", model)),
        names=names,
        kinds={name: type(module) for name, module in base.named_modules()},
        module=weakref.ref(root),
        root=names[str(id(root))],
        repeated=not alone,
        siblings=() if alone else tuple(name for name, module in model.named_modules() if type(module) is type(root)),
        part=not all(_only_wraps(module, root) for module in around),
        begins=begins,
        outside=tuple(name for name, _ in model.named_modules()),
        sharded=_is_sharded(model),
    )


def running_modules() -> Iterator[Module]:
    """The modules whose calls are on Python's stack, the innermost first."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _CALL:
            yield frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]


def _only_wraps(module: Module, root: Module) -> bool:
    """Whether a module holds another by a chain of only children, as `torch.compile`, DDP and PEFT wrap it."""
    while module is not root:
        children = list(module.children())
        if len(children) != 1:
            return False
        module = children[0]
    return True


def _root(graph_module: GraphModule, translator: Any) -> Module | None:
    """The module in the frame's scope that holds all those that the graph names; None if several share them."""
    stacks = [node.meta.get("nn_module_stack") or {} for node in graph_module.graph.nodes]
    called = {key.partition("@")[0] for stack in stacks for key in stack}
    paths = {str(path) for stack in stacks for path, _ in stack.values()}
    scope = [*translator.f_locals.values()]
    scope += [translator.f_globals.get(match[1]) for path in paths if (match := _GLOBAL.match(path))]
    candidates = list({id(module): module for value in scope for module in _modules_of(value)}.values())
    within = {id(module): {str(id(inner)) for inner in module.modules()} for module in candidates}
    if called:
        candidates = [module for module in candidates if called & within[id(module)]]
    tops = [
        module
        for module in candidates
        if not any(str(id(module)) in within[id(other)] for other in candidates if other is not module)
    ]
    return tops[0] if len(tops) == 1 else None


def _modules_of(value: Any) -> Iterable[Module]:
    """The modules in a variable: itself, its method's owner, a closure's content, the members of a sequence or mapping."""
    if isinstance(value, CellType):
        try:
            value = value.cell_contents
        except ValueError:  # empty
            return []
    members = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    owners = (getattr(member, "__self__", member) if callable(member) else member for member in members)
    return [owner for owner in owners if isinstance(owner, Module)]


def _is_sharded(model: Module) -> bool:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return False
    return any(is_split(parameter) for parameter in model.parameters())


def is_split(value: Any) -> bool:
    """Whether a tensor is spread over devices in parts."""
    placements = getattr(value, "placements", ())
    return isinstance(value, torch.Tensor) and any(placement.is_shard() for placement in placements)
