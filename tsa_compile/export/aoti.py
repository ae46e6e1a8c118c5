"""AOTInductor packages: a compiled program in one file, which runs from C++ without Python.

    save(program, "model.pt2")        lowers what is not lowered yet, compiles, packs kernels and weights
    load("model.pt2")(input_ids=...)  the same file in Python

The compiled code checks nothing: at a length for which it was not made its results are wrong. So the package carries what it
was exported for (`INPUTS_KEY` in its metadata, JSON), and the loaded package holds every call against that:

    [{"name": "input_ids", "dtype": "int64", "device": "cpu", "shape": [["s43", 1, 8], ["s53", 1024, 131072]]}, ...]

A number is a fixed size; a symbol with its range is one size wherever it stands. An input that was no tensor is compiled in:
{"name": "keep", "value": 3}. A C++ program reads the same key from `AOTIModelPackageLoader::get_metadata()`. It passes the
tensors alone, and contiguous ones: the compiled code asks none for its strides.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind

from tsa_compile.backend import dense_kernels
from tsa_compile.errors import ConfigError, check_type
from tsa_compile.export._toolchain import require_compiler, toolchain
from tsa_compile.export.program import bounds
from tsa_compile.files import StrPath, stream, writable
from tsa_compile.passes.base import summary
from tsa_compile.passes.graph import fake
from tsa_compile.passes.lower import default_form, device_of, is_lowered, lower_program
from tsa_compile.passes.minima import simplified_minima
from tsa_compile.passes.traces import without_stacks

SUFFIX = ".pt2"
INPUTS_KEY = "tsa_inputs"
LIBRARIES = "aot_inductor.custom_op_libs"  # Inductor's option for what to link as well


def save(program: ExportedProgram, path: StrPath, **inductor_options: Any) -> str:
    """Compiles a program into a package.

    Args:
        program: from `export_program`; where tsa ops are left in it, they are lowered here, on CUDA to our kernels.
        path: the file to write, ending in .pt2.
        inductor_options: torch._inductor's options, {"max_autotune": True} for example.

    Returns:
        The path.

    Raises:
        ConfigError: no program, a path that cannot be written, no C++ compiler, for CUDA no headers of it, or an option that
            Inductor does not have.
        WriteError: the package could not be written whole, as on a full disk; a file at `path` is unchanged.
    """
    check_type("program", program, ExportedProgram, "what export_program returns")
    target = writable(path, SUFFIX)
    require_compiler()
    known = torch._inductor.config.get_config_copy()
    for option in inductor_options:
        if option not in known:
            raise ConfigError(f"{option!r} is not an option of torch._inductor {torch.__version__} (see `config.py` there)")
    _check_strides(program)
    if not is_lowered(program):
        program = lower_program(program, default_form(program))
    metadata = {**inductor_options.get("aot_inductor.metadata", {}), INPUTS_KEY: json.dumps(describe_inputs(program))}
    options = {**inductor_options, "aot_inductor.metadata": metadata}
    with (
        torch.no_grad(),
        dense_kernels(),
        simplified_minima(),
        without_stacks(),
        toolchain(device_of(program)) as libraries,
    ):
        options[LIBRARIES] = [*(inductor_options.get(LIBRARIES) or ()), *libraries]
        with stream(target) as file:
            torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=options)
    return str(target)


def load(path: StrPath) -> Package:
    """A package that `save` wrote, as a function of the program's inputs.

    Raises:
        ConfigError: there is no such file, or it is not such a package.
    """
    check_type("path", path, (str, os.PathLike), "the path of a package")
    if not Path(path).is_file():
        raise ConfigError(f"there is no package {str(path)!r}")
    try:
        loaded = torch._inductor.aoti_load_package(str(path))
        metadata = loaded.get_metadata()
    except Exception as error:  # whatever torch makes of a file that is cut off, changed, or something else
        raise ConfigError(
            f"{str(path)!r} cannot be loaded as an AOTInductor package ({summary(error)}): write it again with "
            "tsa_compile.export.aoti.save"
        ) from error
    if INPUTS_KEY not in metadata:
        raise ConfigError(f"{str(path)!r} does not say which inputs it takes: write it with tsa_compile.export.aoti.save")
    return Package(loaded, json.loads(metadata[INPUTS_KEY]))


class Package:
    """A loaded package: called with the inputs of the example, by position or by name as they were."""

    def __init__(self, loaded: Any, inputs: list[dict[str, Any]]) -> None:
        self.loaded = loaded
        self.inputs = inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the package; ConfigError where an input is not what the program was exported for.

        Tensors may have any strides: those that are not contiguous are copied.
        """
        check_inputs(self.inputs, args, kwargs)
        try:
            return self.loaded(*map(_contiguous, args), **{name: _contiguous(value) for name, value in kwargs.items()})
        except ValueError as error:  # torch's comparison of the call with the example's
            names = ", ".join(entry["name"] for entry in self.inputs)
            raise ConfigError(
                f"the package takes {names} as the example passed them, by position or by name: {summary(error)}"
            ) from error


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _check_strides(program: ExportedProgram) -> None:
    """Raises ConfigError where a program takes an input that is not contiguous, as only one of another exporter may."""
    names = set(program.graph_signature.user_inputs)
    for node in program.graph.find_nodes(op="placeholder"):
        value = fake(node)
        if node.name in names and isinstance(value, Tensor) and not value.is_contiguous():
            raise ConfigError(
                f"input {node.name!r} of the program has strides {tuple(value.stride())}, which would be compiled in: "
                "export it with a contiguous example"
            )


def describe_inputs(program: ExportedProgram) -> list[dict[str, Any]]:
    """Name, dtype, device and shape of each tensor that a program takes; name and value of each constant. In JSON."""
    values = {node.name: fake(node) for node in program.graph.find_nodes(op="placeholder")}
    specs = (spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT)
    entries: list[dict[str, Any]] = []
    for arg in (spec.arg for spec in specs):
        value = arg.value if isinstance(arg, ConstantArgument) else values[arg.name]
        if isinstance(value, Tensor):
            entries.append({"name": arg.name, **_describe_tensor(program, value)})
        elif isinstance(value, (int, float, str)):
            entries.append({"name": arg.name, "value": value})
    return entries


def _describe_tensor(program: ExportedProgram, value: Tensor) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else [str(size), *bounds(program, size)] for size in value.shape]
    return {"dtype": str(value.dtype).removeprefix("torch."), "device": value.device.type, "shape": shape}


def check_inputs(expected: list[dict[str, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Holds a call against what `describe_inputs` said.

    Raises:
        ConfigError: an input too many or too few, another dtype, device, size or constant, or a size outside its range.
    """
    names = [entry["name"] for entry in expected]
    constants = any("value" in entry for entry in expected)  # older packages do not name them

    def is_input(value: Any) -> bool:  # None is none
        return isinstance(value, Tensor) or (constants and value is not None)

    values = list(filter(is_input, args))
    given = dict(zip(names, values, strict=False))
    given.update({name: value for name, value in kwargs.items() if is_input(value)})
    if len(values) > len(names) or sorted(given) != sorted(names):
        raise ConfigError(f"the package takes {', '.join(names)}; found {', '.join(given) or 'nothing'}")
    sizes: dict[str, int] = {}
    for entry in expected:
        value = given[entry["name"]]
        if isinstance(value, Tensor) and "shape" in entry:
            _check_tensor(entry, value, sizes)
        else:
            _check_constant(entry, value)


def _check_constant(entry: dict[str, Any], value: Any) -> None:
    found = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
    wanted = repr(entry["value"]) if "value" in entry else "a tensor"
    if found != wanted:
        raise ConfigError(
            f"input {entry['name']!r} is {found}; the package was exported for {wanted}: what is no tensor is compiled "
            "in, so export a package for each constant"
        )


def _check_tensor(entry: dict[str, Any], value: Tensor, sizes: dict[str, int]) -> None:
    name, shape = entry["name"], entry["shape"]
    found = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device.type}"
    if (str(value.dtype), value.device.type) != (f"torch.{entry['dtype']}", entry["device"]) or value.dim() != len(shape):
        raise ConfigError(
            f"input {name!r} is {found}; the package was exported for {entry['dtype']} with {len(shape)} dimensions "
            f"on {entry['device']}"
        )
    for dim, (size, wanted) in enumerate(zip(value.shape, shape, strict=True)):
        symbol, low, high = wanted if isinstance(wanted, list) else (f"{name}:{dim}", wanted, wanted)
        if not low <= size <= high:
            allowed = f"{low}" if low == high else f"{low} to {high}"
            raise ConfigError(
                f"input {name!r} is {found}: dimension {dim} is {size}, but the package was exported for {allowed}; "
                "export with dynamic_lengths and dynamic_batch that hold it, or split or pad the input"
            )
        if sizes.setdefault(symbol, size) != size:
            raise ConfigError(f"input {name!r} is {found}: dimension {dim} must be {sizes[symbol]}, as in another input")
