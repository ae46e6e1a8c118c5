"""Triton's interpreter, Dynamo and exports without work whose results nobody sees: a quarter of the suite's time."""

import dataclasses
import functools
import inspect
import logging
import struct
from collections.abc import Callable
from typing import Any


def with_room_for_frames(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which runs with room for the frames of all that it calls.

    CPython keeps the frames of Python functions in chunks of 16 KiB, and returns a chunk to the system as soon as the last
    frame in it ends. Where a deep recursion, as Dynamo's and FX's are, stands at the end of a chunk, each call from there
    maps a chunk and unmaps it again. A chunk is made larger if a frame needs it, so a frame that declares a stack of a
    little over a mebibyte comes with a chunk of two, and what is called below it has almost a mebibyte.
    """

    @functools.wraps(function)
    def roomy(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    slots = 2**20 // struct.calcsize("P")  # the stack is counted in pointers
    roomy.__code__ = roomy.__code__.replace(co_stacksize=slots)
    return roomy


def interpreter() -> None:
    """Makes Triton's interpreter quicker, if there is a Triton."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    # Each sum, difference and product of int32 is computed again in int64, for an assertion that only `debug` would make.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _remembered_types(interpreter)
    interpreter.tl.block_type.with_element_ty = _remembered_blocks(interpreter)
    interpreter._patch_builtin = _patched_once(interpreter)
    _patched_in_a_launch(interpreter)
    interpreter.tl.tensor.__init__ = _remembered_shapes(interpreter)


def _remembered_types(interpreter: Any) -> Any:
    """numpy's type for one of Triton's, for which a table of all types is built each time."""
    look_up, blocks, pointers = interpreter._get_np_dtype, interpreter.tl.block_type, interpreter.tl.pointer_type
    known: dict[str, Any] = {}

    def numpy_type(kind: Any) -> Any:
        scalar = kind.element_ty if isinstance(kind, blocks) else kind
        if isinstance(scalar, pointers):
            return look_up(scalar)
        if scalar.name not in known:
            known[scalar.name] = look_up(scalar)
        return known[scalar.name]

    return numpy_type


def _patched_once(interpreter: Any) -> Any:
    """All of `triton.language` is looked through at every call of a device function, for what is not yet replaced. All
    builtins of a module are replaced at once: one look at the first tells, in a third less time."""
    is_builtin, patch_builtin = interpreter.tl.core.is_builtin, interpreter._patch_builtin
    first: dict[Any, str] = {}

    def patch_unless_patched(package: Any, *arguments: Any) -> None:
        if package not in first:
            names = (name for name, member in inspect.getmembers(package) if is_builtin(member))
            first[package] = next(names, "")
        if first[package] and is_builtin(getattr(package, first[package])):
            patch_builtin(package, *arguments)

    return patch_unless_patched


def _patched_in_a_launch(interpreter: Any) -> None:
    """The same is replaced for a launch and at every call of a device function in it. The first time is enough: kernels
    take a seventh less time."""
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    running: list[set[Any]] = []  # the modules that are replaced, for each launch that runs

    def launching(self: Any, *arguments: Any, **named: Any) -> Any:
        running.append(set())
        try:
            return launch(self, *arguments, **named)
        finally:
            running.pop()

    def patch_unless_patched(function: Any) -> Any:
        languages = _languages(interpreter, function)
        if running and languages <= running[-1]:
            return interpreter._LangPatchScope()
        if running:
            running[-1].update(languages)
        return patch(function)

    interpreter.GridExecutor.__call__ = launching
    interpreter._patch_lang = patch_unless_patched


@functools.cache
def _languages(interpreter: Any, function: Any) -> set[Any]:
    """The modules among a function's names that are replaced."""
    names = function.__globals__.values()
    return {name for name in names if inspect.ismodule(name) and name in (interpreter.tl, interpreter.tl.core)}


def _remembered_blocks(interpreter: Any) -> Any:
    """The type of a block with elements of another type, of which there are few and which is made for every operator."""
    make, plain = interpreter.tl.block_type.with_element_ty, interpreter.tl.dtype

    def with_element_ty(self: Any, kind: Any) -> Any:
        if type(kind) is not plain:
            return make(self, kind)
        known = self.__dict__.setdefault("_tests_blocks", {})  # a dictionary by shapes would wrap each to compare them
        if kind.name not in known:
            known[kind.name] = make(self, kind)
        return known[kind.name]

    return with_element_ty


def _remembered_shapes(interpreter: Any) -> Any:
    """The shape and the number of elements of a tensor, which are wrapped for each tensor anew, are kept with its type."""
    make = interpreter.tl.tensor.__init__
    all_that_it_has = {"handle", "type", "dtype", "shape", "numel"}

    def init(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("_tests_shape")
        if known is not None:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known
            return
        make(self, handle, type)
        if vars(self).keys() == all_that_it_has:  # or another version of Triton has more to do
            type._tests_shape = self.shape, self.numel

    return init


def dynamo() -> None:
    """Makes compilations quicker. Behind each, Dynamo measures its guards with a flushed cache, for a log: more than half of
    the time that the compilation of a small function takes."""
    import torch._dynamo.guards
    import torch._inductor.config
    import torch.fx.config
    from torch._dynamo import symbolic_convert

    if hasattr(torch._dynamo.guards, "profile_guard_manager"):
        torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
    # Garbage is collected behind each as well, and a function's side effects are told with the stack of each.
    torch._dynamo.config.run_gc_after_compile = False
    if hasattr(torch._dynamo.config, "side_effect_replay_policy"):
        torch._dynamo.config.side_effect_replay_policy = "silent"
    # Inductor's kernels are not what is tested: of no vector length, and so without vector instructions, they compile in two
    # thirds of the time.
    torch._inductor.config.cpp.simdlen = 1
    # To each node are written the lines of the model that it comes of, those in torch's modules left out, and for a log in
    # which function they stand, for which their files are read: a tenth of the time that a trace takes.
    translator: Any = symbolic_convert.InstructionTranslatorBase
    translator.is_co_filename_from_nn_modules = lambda _: True
    if hasattr(symbolic_convert, "get_funcname"):
        symbolic_convert.get_funcname = lambda *_: None
    # Exports and Inductor's traces look for a line of the model on the stack for each node, as programs of users do.
    if hasattr(torch.fx.config, "do_not_emit_stack_traces"):
        torch.fx.config.do_not_emit_stack_traces = True
    # Its trace is written only where somebody listens, and pytest does, to show it beside a test that fails.
    logging.getLogger("torch.__trace").addHandler = lambda handler: None  # type: ignore[method-assign]  # replaced on purpose
