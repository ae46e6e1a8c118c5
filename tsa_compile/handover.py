"""What torch.compile keeps for this backend: options as they were when it was called, and no graphs of other processes.

    torch.compile(f, backend="tsa", options=options)     torch keeps the mapping itself, and compares it with itself:
    options["budget"] = KeepRatio(0.1)                   this changed what was asked for above, and
    torch.compile(f, backend="tsa", options=options)     this ran what was compiled there

So torch gets a copy, in the one form that stands for the same options however they were given: {"config": TSAConfig}.

With caching_precompile (TORCH_CACHING_PRECOMPILE=1) torch.compile installs what any process compiled for a function of that
name and line, before a backend is asked and whatever its name and options were. It is bypassed: nothing of this backend
is kept, and a torch.compile for this backend switches it off.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import torch
from torch.fx import GraphModule

from tsa_compile.config import TSAConfig
from tsa_compile.errors import ConfigError, TSAWarning


def take_over(backend: Any) -> None:
    """From now on, torch.compile keeps copies of the options for this backend."""
    # Its __init__ cannot be wrapped: backend="tsa" imports this package in the midst of the first one.
    torch._TorchCompileWrapper.kwargs = _Keeper(backend)  # type: ignore[assignment]


def keep_out_of_packages(graph_module: GraphModule) -> None:
    """No process is handed this graph: without the name that torch saves it by, it is compiled anew."""
    vars(graph_module).pop("_backend_id", None)


class _Keeper:
    """The attribute `kwargs` of what torch.compile makes of a backend: its keyword arguments."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __get__(self, wrapper: Any, owner: type | None = None) -> Any:
        if wrapper is None:
            return self
        if "kwargs" not in vars(wrapper):
            raise AttributeError("kwargs")
        return vars(wrapper)["kwargs"]

    def __set__(self, wrapper: Any, arguments: dict[str, Any]) -> None:
        given = wrapper.compiler_fn
        if isinstance(given, functools.partial) and given.func is self.backend and not given.args:
            wrapper.compiler_fn = self.backend  # partials are compared by identity, their options not at all
            arguments = {**given.keywords, **arguments}
        if wrapper.compiler_fn is self.backend:
            _bypass_precompile()
            arguments = _Arguments(arguments)
        vars(wrapper)["kwargs"] = arguments


class _Arguments(dict[str, Any]):
    """Keyword arguments of the backend, into which options come as a copy."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        for name, value in arguments.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, _copied(value) if name == "options" else value)


def _copied(options: Any) -> Any:
    try:
        return {"config": TSAConfig.from_options(options)}
    except ConfigError:  # which the backend raises, where torch.compile's callers expect it: at the first call
        return copy.copy(options)


def _bypass_precompile() -> None:
    config = torch._dynamo.config
    if not getattr(config, "caching_precompile", False):
        return
    config.caching_precompile = False
    text = (
        "torch._dynamo.config.caching_precompile (TORCH_CACHING_PRECOMPILE) is switched off in this process: it runs what "
        "another process compiled for a function, whatever its backend and options were"
    )
    warnings.warn(text, TSAWarning, stacklevel=5)
