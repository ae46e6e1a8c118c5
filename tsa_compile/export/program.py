"""`export_program`: a model's graph from torch.export, rewritten by the same passes as torch.compile's.

    model, example inputs [B, L]
        torch.export         masks [B, 1, L, L] are materialised; L and B symbolic within their ranges
        the passes           masks recovered, layers sparse
        lower                tsa ops opened, or kept
    -> ExportedProgram

A compiled model has one graph for short inputs and another for long ones; an exported program has one. So whether a layer
is sparse is decided for the whole range of lengths, and where that would change what is computed, it is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import sympy
import torch
from torch import Tensor
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tsa_compile.calibration.fingerprint import text_config, unwrapped
from tsa_compile.config import TSAConfig, given
from tsa_compile.costs.breakeven import minimum
from tsa_compile.costs.calls import CallShape
from tsa_compile.errors import ConfigError, RewriteError, check_inference, check_type, unknown
from tsa_compile.evaluation.limits import check_positions
from tsa_compile.passes.base import CallPlan, PassResult, summary
from tsa_compile.passes.graph import fake, known
from tsa_compile.passes.lower import Form, lower_program
from tsa_compile.passes.minima import simplified_minima
from tsa_compile.passes.plan import PlanCalls, all_kept_below
from tsa_compile.passes.retrace import remember_sizes
from tsa_compile.pipeline import PASSES, run_passes
from tsa_compile.report import record

_SHORTEST, _LONGEST = 1024, 131072
Range = tuple[int, int]
Inputs = Mapping[str, Any] | Sequence[Any]


def export_program(
    model: torch.nn.Module,
    example_inputs: Inputs,
    config: TSAConfig | None = None,
    *,
    dynamic_lengths: Range | Literal["auto"] | None = "auto",
    dynamic_batch: Range | None = None,
    lower: Form | None = None,
) -> ExportedProgram:
    """A model's prefill with Token Sparse Attention, as a torch.export program.

    What was done with each attention call is appended to `tsa_compile.reports()`.

    Args:
        model: in evaluation mode. Models of transformers are exported without a cache.
        example_inputs: keyword inputs by name, or positional ones: token ids and masks [B, L], embeddings [B, L, E]. L and
            B are read from `input_ids`, `inputs_embeds` or else the first input. None stands for an input left out.
        config: which layers become sparse, and how; the defaults if None.
        dynamic_lengths: shortest and longest length: every dimension of an input that is L in the example. "auto": from
            1,024 to 131,072 tokens, or as many as the model has positions. None: L as it is.
        dynamic_batch: the same for the first dimension, B.
        lower: None: the tsa ops stay, to be read, or lowered by `aoti.save` and `onnx.save`. "aten": plain ATen operators.
            "triton" (CUDA): triton_ops around our kernels, which AOTInductor compiles in.

    Returns:
        A program that takes the inputs of the example. A model output with names becomes a dict of them.

    Raises:
        ConfigError: an input or option that is not allowed, or a range of lengths across which a layer would change
            between dense and sparse.
        RewriteError: torch.export cannot trace the model with these ranges.
    """
    config = given(config, "export_program")
    check_type("model", model, torch.nn.Module, "a torch.nn.Module")
    check_inference(model, "exported programs are for inference")
    model = unwrapped(model)
    if dynamic_lengths == "auto":
        dynamic_lengths = default_lengths(text_config(model))
    args, kwargs, shapes = _Example(example_inputs, dynamic_lengths, dynamic_batch).for_export(model)
    if dynamic_lengths is not None:
        check_positions(model, dynamic_lengths[1])
    with torch.no_grad(), _without_cache(model), _unaligned_masks(), simplified_minima():
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            of_sizes = isinstance(error, UserError) or any(
                word in str(error) for word in ("onstrain", "dynamic", "specializ")
            )
            sizes = (
                ". If a size of the model equals the example's length or batch, choose another; if the model itself fixes a "
                "size, pass None for it"
            )
            raise RewriteError(
                f"torch.export cannot trace the model with dynamic_lengths={dynamic_lengths} and "
                f"dynamic_batch={dynamic_batch}: {summary(error)}{sizes * of_sizes}"
            ) from error
        _freeze(program)
        _write_constants(program)
        free = _free_sizes(program)
        report = run_passes(program.graph_module, config, _EXPORTED)
        _describe_outputs(program)
        _name_layers(program)
        program = lower_program(program, lower)
        _check_sizes(program, free)
        _check_ends(program)
        remember_sizes(program)
    record(report)
    return program


def default_lengths(config: Any) -> Range:
    """The shortest and the longest length of an export where none are named, by a model's configuration."""
    positions = getattr(config, "max_position_embeddings", None)
    longest = min(_LONGEST, positions) if isinstance(positions, int) and positions > 1 else _LONGEST
    return min(_SHORTEST, longest // 2), longest


def _unaligned_masks() -> AbstractContextManager[Any]:
    """On CUDA, tracing asks SDPA for a kernel, and the fused ones align masks to 8: a guard on the length (torch's #177495).

    The call itself stays in the graph, and whoever compiles it asks again.
    """
    return sdpa_kernel(SDPBackend.MATH) if torch.cuda.is_available() else nullcontext()


def _check_sizes(program: ExportedProgram, free: set[str]) -> None:
    """What was symbolic when torch.export was through is symbolic still: a size that a pass fixed would be one length's.

    Raises:
        RewriteError: it is not.
    """
    fixed = sorted(free - _free_sizes(program))
    if fixed:
        raise RewriteError(
            f"a rewrite fixed sizes that the export left free, at {', '.join(fixed)}: please report it, and export with "
            "dynamic_lengths=None meanwhile"
        )


def _check_ends(program: ExportedProgram) -> None:
    """What the rewrite was traced under holds at both ends of each range. A sparse layer may not run with one token, say.

    Raises:
        ConfigError: it does not, so that such a call of the program would fail.
    """
    sizes = (size for node in program.graph.find_nodes(op="placeholder") for size in getattr(fake(node), "shape", ()))
    symbolic = next((size for size in sizes if isinstance(size, torch.SymInt)), None)
    guards = [] if symbolic is None else [guard.expr for guard in symbolic.node.shape_env.guards]
    for symbol, extents in program.range_constraints.items():
        for end, other in ((extents.lower, f"begin at {extents.lower + 1}"), (extents.upper, f"end at {extents.upper - 1}")):
            if any(guard.free_symbols == {symbol} and guard.xreplace({symbol: end}) == sympy.false for guard in guards):
                raise ConfigError(f"with these settings a size of {end} cannot be exported: let the range {other}")


def _free_sizes(program: ExportedProgram) -> set[str]:
    """The dimensions of a program's inputs that may vary, as "input_ids:1"."""
    free: set[str] = set()
    for node in program.graph.find_nodes(op="placeholder"):
        shape = getattr(fake(node), "shape", ())
        free.update(f"{node.name}:{dim}" for dim, size in enumerate(shape) if not str(size).isdigit())
    return free


def bounds(program: ExportedProgram, size: int | torch.SymInt) -> tuple[int, int]:
    """The smallest and the largest value that a size of a program's inputs may have."""
    if isinstance(size, int):
        return size, size
    extents = program.range_constraints[size.node.expr]
    return int(extents.lower), int(extents.upper)


class _Example:
    """Example inputs, and which of their dimensions are the length and the batch."""

    def __init__(self, inputs: Inputs, lengths: Range | None, batches: Range | None) -> None:
        check_type("example_inputs", inputs, (Mapping, Sequence), "a dict of inputs by name, or a tuple of positional ones")
        named = isinstance(inputs, Mapping)
        self.inputs: dict[Any, Any] = dict(inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs))
        self.named = named
        for name, value in list(self.inputs.items()):
            if value is None and named:
                del self.inputs[name]
            elif value is not None and not isinstance(value, (Tensor, int, float, bool, str)):
                raise ConfigError(f"example input {name!r} is a {type(value).__name__}: inputs must be tensors or constants")
            elif isinstance(value, Tensor):
                self.inputs[name] = value.contiguous()  # whoever compiles the program compiles these strides in
        self.batch, self.length = self._sizes()
        self.lengths = _dimension("dynamic_lengths", "length", lengths, self.length)
        if batches is not None and self.batch == 1:
            self._double_batch()  # torch.export takes a size of 1 for a constant
        self.batches = _dimension("dynamic_batch", "batch", batches, self.batch if batches is None else None)

    def _sizes(self) -> tuple[int, int]:
        """B and L."""
        candidates = [self.inputs.get(name) for name in ("input_ids", "inputs_embeds")] + list(self.inputs.values())
        for value in candidates:
            if isinstance(value, Tensor) and value.dim() >= 2:
                return value.shape[0], value.shape[1 if value.dim() <= 3 else -2]
        raise ConfigError("example_inputs has no tensor [B, L]: token ids or embeddings are needed to tell the length")

    def _double_batch(self) -> None:
        for name, value in self.inputs.items():
            if isinstance(value, Tensor) and self._is_batched(value):
                self.inputs[name] = value.repeat(2, *[1] * (value.dim() - 1))
        self.batch = 2

    def _is_batched(self, value: Tensor) -> bool:
        return value.dim() >= 2 and value.shape[0] == self.batch

    def _dims(self, value: Any) -> dict[int, Any] | None:
        if not isinstance(value, Tensor):
            return None
        first = 1 if value.dim() >= 2 else 0
        dims = {dim: self.lengths for dim in range(first, value.dim()) if value.shape[dim] == self.length}
        dims = {} if self.lengths is None else dims
        if self.batches is not None and self._is_batched(value):
            dims[0] = self.batches
        return dims

    def for_export(self, model: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """args, kwargs and dynamic_shapes of torch.export.

        Raises:
            ConfigError: the model takes no input of a name, or the example asks for a cache, which a program has none of.
        """
        shapes: dict[Any, Any] = {name: self._dims(value) for name, value in self.inputs.items()}
        if not self.named:
            return tuple(self.inputs.values()), {}, tuple(shapes.values())
        if self.inputs.get("use_cache"):
            raise ConfigError("use_cache=True is not possible: exported programs have no cache. Leave it out")
        known = inspect.signature(model.forward).parameters
        extra = next((str(name) for name in self.inputs if name not in known), None)
        if extra is not None and all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in known.values()):
            raise unknown(extra, "an input", known)
        if extra is not None:  # torch.export flattens these in one place and not in another
            raise ConfigError(
                f"{type(model).__name__}.forward takes {extra!r} through **kwargs, for which torch.export takes no dynamic "
                "shapes: leave it out, or give forward a parameter of this name"
            )
        return (), self.inputs, shapes


def _dimension(option: str, name: str, extents: Range | None, example: int | None) -> Dim | None:
    """The symbolic dimension of a range that holds the example's size."""
    if extents is None:
        return None
    pair = tuple(extents) if isinstance(extents, Sequence) else ()
    numbers = [size for size in pair if isinstance(size, int) and not isinstance(size, bool)]
    if len(pair) != 2 or len(numbers) != 2 or not 1 <= pair[0] < pair[1]:
        ends = "(shortest, longest)" if name == "length" else "(smallest, largest)"
        raise ConfigError(
            f"{option}={extents!r} is not allowed: {option} must be {ends}, the first below the second, or None for the "
            "example's own alone"
        )
    if example is not None and not pair[0] <= example <= pair[1]:
        raise ConfigError(
            f"the example's {name} is {example}, outside {option}={extents!r}: pass an example within it, or another range"
        )
    return Dim(name, min=pair[0], max=pair[1])


@contextmanager
def _without_cache(model: torch.nn.Module) -> Iterator[None]:
    """A model of transformers returns no key-value cache inside, which torch.export could not describe."""
    configs = {id(found): found for module in model.modules() if (found := getattr(module, "config", None)) is not None}
    changed = [found for found in configs.values() if getattr(found, "use_cache", None)]
    for found in changed:
        found.use_cache = False
    try:
        yield
    finally:
        for found in changed:
            found.use_cache = True


class PlanExported(PlanCalls):
    """PlanCalls for a graph without a second version: no guard can send another length elsewhere.

    before   length s in [shortest, longest], a minimum in between        torch.compile: a guard, and two graphs
    after    sparse, where all shorter lengths keep every token anyway;   else a ConfigError
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        self.straddling: list[str] = []
        result = super().call(graph_module)
        if self.straddling:
            raise ConfigError(
                f"dynamic_lengths holds lengths on both sides of what is compressed: {'; '.join(self.straddling)}. "
                "An exported program has one version for all: raise the shortest of dynamic_lengths, or set min_length "
                "to it to compress every length"
            )
        return result

    def _group(self, plan: CallPlan) -> str | None:
        """None: a program that asks other processes is no part of what is exported."""
        return None

    def _say_what_was_not_found(self, text: str | None) -> None:
        """An error here: a program is exported once, and there is no other graph that could have the layer."""
        if text is not None:
            raise ConfigError(text)

    def _settled(self, plan: CallPlan, sparse_layers: float) -> TSAConfig:
        """A configuration with which no comparison of the length needs a guard."""
        config, call = plan.config, plan.call
        length = fake(call.query).shape[2]
        if not isinstance(length, torch.SymInt):
            return config
        query, key, value = (fake(node) for node in (call.query, call.key, call.value))
        widths = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        if not all(isinstance(width, int) for width in widths):
            return config  # refused for that
        least = minimum(config, CallShape.of(query, key, value, config), sparse_layers, query.device)
        if least.tokens is None or known(length >= least.tokens) or known(length < least.tokens):
            return config
        if least.tokens > all_kept_below(config):
            self.straddling.append(f"{call.layer} compresses from {least.tokens} on, {least.why}")
        return config.replace(min_length=1)


_EXPORTED = tuple(PlanExported if step is PlanCalls else step for step in PASSES)


def _freeze(program: ExportedProgram) -> None:
    """Its weights stay the model's in memory, but ask for no gradients: SDPA's layout with them is not the one traced."""
    frozen: dict[int, Tensor] = {}  # one for names that are tied
    for name, weight in program.state_dict.items():
        if weight.requires_grad:
            again = torch.nn.Parameter(weight.detach(), requires_grad=False)
            program.state_dict[name] = frozen.setdefault(id(weight), again)


def _write_constants(program: ExportedProgram) -> None:
    """Puts the numbers that a model makes tensors of back into its graph, where mask inference can read them.

    before   placeholder c; x = lift_fresh_copy(c); y = detach_(x)      of torch.tensor(0.0)
    after    y = full([], 0.0)
    """
    aten, graph = torch.ops.aten, program.graph_module.graph
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in list(graph.nodes):
        if node.target is aten.detach_.default:  # in place for autograd alone: the data stays
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.lift_fresh_copy.default and node.args[0].name in lifted:
            constant = program.constants[lifted[node.args[0].name]]
            if not isinstance(constant, Tensor) or constant.numel() != 1:
                continue
            with graph.inserting_before(node):
                options = {"dtype": constant.dtype, "device": constant.device}
                number = graph.call_function(aten.full.default, (list(constant.shape), constant.item()), options)
            number.meta = dict(node.meta)
            node.replace_all_uses_with(number)
            graph.erase_node(node)


def _name_layers(program: ExportedProgram) -> None:
    """What the passes inserted belongs to the module that reads it: a refusal of a later export names the layer."""
    for node in reversed(program.graph.nodes):
        if node.op in ("call_function", "call_method") and not node.meta.get("nn_module_stack"):
            stacks = (reader.meta.get("nn_module_stack") for reader in node.users)
            stack = next(filter(None, stacks), None)
            if stack is not None:
                node.meta["nn_module_stack"] = stack


def _describe_outputs(program: ExportedProgram) -> None:
    """The signature after the passes: the outputs' new nodes, and no class that a later Python would have to import."""
    outputs = program.graph.output_node().args[0]
    for spec, node in zip(program.graph_signature.output_specs, outputs, strict=True):  # type: ignore[arg-type]
        if isinstance(spec.arg, TensorArgument):
            spec.arg.name = node.name  # type: ignore[union-attr]
    signature = program.module_call_graph[0].signature
    if signature is not None:
        signature.out_spec = _plain(signature.out_spec)


def _plain(spec: TreeSpec) -> TreeSpec:
    """A ModelOutput's structure as that of a dict."""
    outputs = tree_unflatten([object() for _ in range(spec.num_leaves)], spec)
    if isinstance(outputs, dict) and type(outputs) is not dict:
        return tree_flatten(dict(outputs))[1]
    return spec
