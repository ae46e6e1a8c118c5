"""ONNX models of exported programs: standard operators alone, or one node of the domain "tsa" for each op.

    save(program, "model.onnx")                  ai.onnx operators: runs in onnxruntime, parses in TensorRT
    save(program, "model.onnx", domain="tsa")    tsa::Score, tsa::Select, ...: for a runtime with kernels of its own

`program` comes from `export_program(model, inputs, config, lower=None)`, which keeps the tsa ops in the graph. Standard
operators are those of the form "standard" (kernels/forms.py): no TopK, no sort, no NonZero, no shape that depends on data.
Every selected row is attended to, whether it counts or not, so that form needs a budget that bounds the rows beforehand:
KeepRatio, or a capacity. Attention is ONNX's own operator (hence opset 23), over the C compressed rows and in dense layers
over all L: a runtime that fuses it (TensorRT) needs no further memory; onnxruntime's CPU kernel holds the [B, H, C, C]
logits in float32, 0.5 GiB at C = 2048 and H = 32, and four times that for every doubling. A floor adds one key to it, and
blocks of logits that grow with L alone (kernels/attend_floor.py).

Batch and length stay dynamic, named "batch" and "length"; the ranges that the program was exported for are written to
the model's metadata ("tsa_compile.length" = "1024..131072"), as ONNX has no place for them.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from tsa_compile.errors import ConfigError, RewriteError, check_type
from tsa_compile.export._onnx_domain import DOMAIN, registered, translations
from tsa_compile.files import StrPath, replacing, writable
from tsa_compile.kernels.forms import FORMS
from tsa_compile.passes.graph import fake, known
from tsa_compile.passes.lower import check_kernels, check_opened, layer_of, with_joined_floors
from tsa_compile.passes.retrace import for_all_sizes, retraced
from tsa_compile.passes.traces import without_stacks

if TYPE_CHECKING:
    import onnx

OPSETS = (23, 24)

tsa = torch.ops.tsa
_LOWERED = {"aten.avg_pool2d.default", "aten.sort.stable"}


def save(program: ExportedProgram, path: StrPath, *, opset: int = OPSETS[0], domain: str | None = None) -> None:
    """Writes a program as an ONNX model, checked by onnx.checker. Weights beyond 2 GB go to a file beside it.

    Args:
        program: from `export_program(..., lower=None)`.
        path: where to write; ends in ".onnx".
        opset: version of ONNX's operators, 23 or 24.
        domain: None for standard operators alone; "tsa" for one node of that domain for each op (`schemas` lists them).

    Raises:
        ConfigError: an option, path or program that is not allowed; with standard operators also a coverage without a
            capacity. The message names the layer and the remedy.
        RewriteError: torch.onnx.export has no form for an operator of the model; the message names it.
        WriteError: the model could not be written whole, as on a full disk; a file at `path` is unchanged.
        ImportError: the packages onnx and onnxscript are missing.
    """
    check_type("program", program, ExportedProgram, "what export_program returns")
    onnx = packages()[0]
    if opset not in OPSETS:
        raise ConfigError(
            f"opset={opset!r} is not allowed: opset must be one of {', '.join(map(str, OPSETS))} "
            "(Attention is an operator from 23 on)"
        )
    if domain not in (None, DOMAIN):
        raise ConfigError(f'domain={domain!r} is not allowed: domain must be None (standard operators) or "{DOMAIN}"')
    target = writable(path, ".onnx")
    with torch.no_grad(), without_stacks():
        exported = _export(program, opset) if domain is None else _export_domain(program, opset)
    _name_axes(exported, program)
    _name_inputs(exported, program)
    _name_outputs(exported, program)
    with replacing(target) as beside:
        exported.save(str(beside))
        onnx.checker.check_model(str(beside), full_check=True)


def schemas() -> list[onnx.defs.OpSchema]:
    """The schemas of the domain "tsa", registered with onnx: what a runtime's kernels implement."""
    return registered(require("onnx")[0])


def packages() -> list[Any]:
    """The packages onnx and onnxscript, by which files are written; ImportError where one is missing."""
    return require("onnx", "onnxscript")


def require(*modules: str, extra: str = "onnx") -> list[Any]:
    """The modules; ImportError with the command that installs them."""
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise ImportError(
            f"this export needs the package {error.name or modules[0]!r}: pip install 'tsa-compile[{extra}]'"
        ) from error


def to_portable(program: ExportedProgram) -> ExportedProgram:
    """The program in standard operators; ConfigError where a layer has no such form. See `save`."""
    _check_form(program)
    check_kernels(program, "standard operators", f'export with domain="{DOMAIN}" for a runtime that has this kernel')
    for node in program.graph.nodes:
        if node.target is tsa.select.default and _is_unbounded(node):
            raise ConfigError(
                f"{layer_of(node)}: a Coverage budget decides at run time how many tokens are kept, and standard "
                "operators compute as many rows as the shapes say: all of them. Use TSAConfig(budget=KeepRatio(...)), or "
                f'set a capacity below the length, or export with domain="{DOMAIN}" for a runtime with kernels'
            )
    with for_all_sizes(program):
        return retraced(with_joined_floors(program), FORMS["standard"])


def _check_form(program: ExportedProgram) -> None:
    """Ops that only a compiled graph has, or that an earlier lowering joined or opened."""
    check_opened(program, "ONNX")
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    steps = {str(op) for op in FORMS["standard"] if op is not tsa.attend_floor.default}
    foreign = sorted(name for name in targets if name.startswith("tsa.") and name not in steps)
    # The ATen forms of score and select have these.
    lowered = not any(name.startswith("tsa.") for name in targets) and targets >= _LOWERED
    if foreign or lowered:
        found = f"holds {', '.join(foreign)}" if foreign else "was lowered to ATen operators"
        raise ConfigError(f"the program {found}; pass one from export_program(model, inputs, config, lower=None)")


def _is_unbounded(select: Node) -> bool:
    """Whether a coverage decides the count and nothing but the sequence length bounds it."""
    scores, count, capacity = select.args
    while isinstance(count, Node) and count.target is not tsa.budget.default:
        count = next(iter(count.all_input_nodes), None)  # a clamp to the capacity
    if not isinstance(count, Node) or not count.args[1]:
        return False
    return known(fake(capacity) >= fake(scores).shape[2])


def _export(program: ExportedProgram, opset: int, table: dict[Any, Any] | None = None) -> Any:
    """By torch's exporter, over standard operators or with a table of others."""
    optimize = require("onnxscript.optimizer")[0].optimize
    lowered = to_portable(program) if table is None else program
    table = {**(table or {}), torch.ops.aten.floor_divide.default: _floor_divide(opset)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own pytree
        # Not `optimize=True`, which at opset 23 also makes a RotaryEmbedding of rotary positions: with caches [1, L, D/2]
        # for all items where the operator wants [B, L, D/2], so that onnxruntime refuses batches.
        try:
            exported: Any = torch.onnx.export(
                lowered, dynamo=True, opset_version=opset, custom_translation_table=table, verbose=False, optimize=False
            )
        except torch.onnx.OnnxExporterError as error:
            raise RewriteError(_why_not(error)) from error
    optimize(exported.model)
    return exported


def _why_not(error: Exception) -> str:
    """What torch's exporter has no form for, and what to do about it."""
    found = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(error))
    if found is None:
        return f"torch.onnx.export failed: {str(error).strip().splitlines()[0]}"
    experts = (
        '; mixtures of experts have a form in ONNX after model.set_experts_implementation("batched_mm"), which copies its '
        "experts' weights for each token"
    )
    return f"torch.onnx.export has no form for the operator {found[1]}{experts * ('grouped_mm' in found[1])}"


def _floor_divide(opset: int) -> Callable[..., Any]:
    """Exact for integers of any sign, as torch's own translation is, but without its Equal on BOOL (TensorRT has none)."""
    ops: Any = require("onnxscript")[0].values.Opset("", opset)

    def floor_divide(dividend, divisor):  # type: ignore[no-untyped-def]
        quotient = ops.Div(dividend, divisor)
        if dividend.dtype.is_floating_point():
            return ops.Floor(quotient)
        rest = ops.Sub(dividend, ops.Mul(quotient, divisor))
        apart = ops.And(ops.Not(ops.Equal(rest, 0)), ops.Xor(ops.Less(rest, 0), ops.Less(divisor, 0)))
        return ops.Sub(quotient, ops.Cast(apart, to=dividend.dtype))

    return floor_divide


def _export_domain(program: ExportedProgram, opset: int) -> Any:
    schemas()
    _check_form(program)
    # What valid_ranges tells the host is no part of the model: it becomes a constant that nobody reads, and is removed.
    ops = (
        tsa.valid_ranges, tsa.cached_attention, tsa.filled, tsa.filled_attention, tsa.sliding_attention,
        tsa.padded_sliding_attention,
    )  # fmt: skip
    with for_all_sizes(program):
        program = retraced(program, {op.default: FORMS["standard"][op.default] for op in ops})
    table = {getattr(tsa, name).default: form for name, form in translations(require("onnxscript")[0].values, opset).items()}
    return _export(program, opset, table)


def _name_axes(exported: Any, program: ExportedProgram) -> None:
    """Calls symbolic sizes "batch" (the first dimension of an input) and "length" (the only other one)."""
    shapes = [value.shape for value in exported.model.graph.inputs if value.shape is not None and len(value.shape) > 1]
    batch = {shape[0].value for shape in shapes if not isinstance(shape[0], int)}
    others = {dim.value for shape in shapes for dim in shape if not isinstance(dim, int)} - batch
    names = dict.fromkeys(batch, "batch") if len(batch) == 1 else {}
    names.update(dict.fromkeys(others, "length") if len(others) == 1 else {})
    ranges = {str(symbol): extent for symbol, extent in program.range_constraints.items()}
    for symbol, name in names.items():
        if symbol in ranges:
            exported.model.metadata_props[f"tsa_compile.{name}"] = f"{ranges[symbol].lower}..{ranges[symbol].upper}"
    exported.rename_axes(names)


def _name_inputs(exported: Any, program: ExportedProgram) -> None:
    """An input that the model hands through has its name back, which torch's exporter gives to the output."""
    names = set(program.graph_signature.user_inputs)
    outputs = {value.name: value for value in exported.model.graph.outputs}
    for value in exported.model.graph.inputs:
        name = value.name.removesuffix("_orig")
        if value.name not in names and name in names:
            if name in outputs:
                outputs[name].name = f"output.{name}"
            value.name = name


def _name_outputs(exported: Any, program: ExportedProgram) -> None:
    """Calls outputs what the model calls them: "logits", "hidden_states.0"; "output" and a number where it has no names."""
    spec = program.call_spec.out_spec
    outputs = exported.model.graph.outputs
    if spec is None or spec.num_leaves != len(outputs):
        return
    paths = tree_flatten_with_path(tree_unflatten(range(spec.num_leaves), spec))[0]
    names = [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in paths]
    names = [f"output.{name}".rstrip(".") if name.isdigit() or not name else name for name in names]
    graph = exported.model.graph
    given = {value.name for value in graph.inputs} | {*graph.initializers}
    taken = given | {value.name for node in graph for value in node.outputs}
    for value, name in zip(outputs, names, strict=True):
        if value.name not in given and name not in taken:  # an input may be handed through
            value.name = name
