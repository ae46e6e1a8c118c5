"""The steps of sparse attention, opened into operators that run where there is no Python.

    before   scores  = tsa.score(q, k, padding, scale, window, pool, reduce)              opaque ops [B, H, L]
             count   = tsa.budget(scores, tau, None, min_tokens)                          [B]
             ...
             o       = tsa.decompress(o^, indices, count, L)                              [B, H, L, Dv]
    after    "aten"    matmul, softmax, avg_pool2d, sort, index, scaled_dot_product_attention, scatter, ...
             "triton"  tsa_triton.score, ...: the same steps as triton_ops, which a compiler opens into our kernels (CUDA)

No shape depends on data before, and none does afterwards: lengths and batch stay as symbolic as they were, the count stays
on the device, and all C rows are attended to, although those behind the count are not used. A capacity, or KeepRatio, makes
C smaller.

With a floor, "aten" and ONNX's standard operators take its two steps in one, as their attention gives no log-sum-exp:

    before   o^, lse = tsa.attend_lse(q^, k^, v^, count, scale, kernel)
             o       = tsa.merge_floor(q, k, v, o^, lse, indices, count, padding, scale, window, sinks)
    between  o       = tsa.attend_floor(q, k, v, q^, k^, v^, indices, count, padding, scale, kernel, window, sinks)

"aten" gives padded dense attention a mask [B, 1, L, L]; "triton" moves the valid tokens together instead, and leaves zeros
in the rows of pad tokens, which no valid token reads.

The program is traced anew by `ExportedProgram.run_decompositions` (retrace.py), so that its signature, weights and ranges
stay right.
"""

from __future__ import annotations

import operator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from tsa_compile.errors import ConfigError
from tsa_compile.kernels.forms import CAUSAL_KERNELS, FORMS, why_not
from tsa_compile.kernels.launch import HAS_TRITON
from tsa_compile.passes.graph import fake, given, insert
from tsa_compile.passes.layers import module_name
from tsa_compile.passes.minima import simplified_minima
from tsa_compile.passes.operators import arguments
from tsa_compile.passes.retrace import for_all_sizes, retraced
from tsa_compile.passes.traces import without_stacks

Form = Literal["aten", "triton"]

tsa = torch.ops.tsa


def lower_program(program: ExportedProgram, form: Form | None = "aten") -> ExportedProgram:
    """A new program without tsa ops; with None, the same graph in operators of the ATen dialect and tsa ops alone.

    Raises:
        ConfigError: there is no such form, or none for an attention kernel that a step names.
        RewriteError: the result would hold for a part of the lengths only.
    """
    if form is None:
        with without_stacks():
            return retraced(program, {})
    if form not in get_args(Form):
        allowed = ", ".join(map(repr, get_args(Form)))
        raise ConfigError(f"lower={form!r} is not allowed: lower must be one of {allowed}, or None")
    if form == "triton":
        _require_cuda(program)
    check_opened(program, f"lower={form!r}")
    check_kernels(program, f"lower={form!r}", "keep the ops with lower=None")
    with simplified_minima(), without_stacks(), for_all_sizes(program):
        if form == "aten":
            return retraced(with_joined_floors(program), FORMS[form])
        lowered = retraced(program, FORMS[form])
        retraced(lowered, {}, decompose_custom_triton_ops=True)  # as a compiler will open them, for what is asked on the way
        return lowered


def with_joined_floors(program: ExportedProgram) -> ExportedProgram:
    """The program with tsa.attend_floor for each attend_lse and merge_floor that belong together; itself without a floor."""
    if not program.graph.find_nodes(op="call_function", target=tsa.merge_floor.default):
        return program
    program = retraced(program, {})  # a copy
    graph = program.graph
    for merge in graph.find_nodes(op="call_function", target=tsa.merge_floor.default):
        query, key, value, compressed, lse, indices, count, padding, scale, window, sinks, sink_logits = arguments(merge)
        attended = compressed.args[0]
        if [compressed.target, lse.target] != [operator.getitem] * 2 or lse.args != (attended, 1) or compressed.args[1] != 0:
            continue
        if attended.target is not tsa.attend_lse.default:
            continue
        *rows, attended_count, attended_scale, kernel = arguments(attended)
        if attended_count is not count or attended_scale != scale:
            continue
        operands = (query, key, value, *rows, indices, count, padding, scale, kernel, window, sinks)
        with graph.inserting_before(merge):
            joined = insert(graph, tsa.attend_floor.default, *operands, **given(sink_logits=sink_logits))
        joined.meta = dict(merge.meta)
        merge.replace_all_uses_with(joined)
        graph.erase_node(merge)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


_WHOLE = {
    tsa.sparse_attention.default: "the pass Decompose was left out (skip_passes)",
    tsa.padded_sparse_attention.default: "the pass Decompose was left out (skip_passes)",
    tsa.filled_sparse_attention.default: "it attends into a static cache, whose filled part only the running host knows; "
    "leave the layer out of `layers`, or export with keys that are all filled",
}


def check_opened(program: ExportedProgram, form: str) -> None:
    """Every sparse layer of a program must be opened into its steps; `form` is what it is to become, for the message.

    Raises:
        ConfigError: one is a single op still, which runs through Python.
    """
    for node in program.graph.nodes:
        if node.target in _WHOLE:
            raise ConfigError(f"{layer_of(node)}: {node.target} has no form for {form}: {_WHOLE[node.target]}")


def check_kernels(program: ExportedProgram, form: str, otherwise: str) -> None:
    """Every attention kernel that a program names must be one that causal attention over all rows stands for.

    Args:
        form: what the program is to become, and
        otherwise: what to do instead: for the message.

    Raises:
        ConfigError: another one is named, as block-sparse kernels and those that users register are.
    """
    for node in program.graph.nodes:
        if node.target not in (tsa.attend.default, tsa.attend_lse.default):
            continue
        name: Any = arguments(node)[5]
        why = why_not(name)
        if why is not None:
            raise ConfigError(
                f"{layer_of(node)}: kernel={name!r} has no form for {form}: {why}, and it is called through "
                f"Python, which the exported program does without; use one of {', '.join(map(repr, CAUSAL_KERNELS))}, or "
                f"{otherwise}"
            )


def layer_of(node: Node) -> str:
    """The name of the module that a node belongs to, or else that of what it is computed from."""
    queue = [node]
    for current in queue:
        paths = [path for path, _ in current.meta.get("nn_module_stack", {}).values()]
        # What a pass inserted has no module; torch.export then writes a name of its own.
        if paths and not paths[-1].startswith("_empty_nn_module_stack"):
            return module_name(current) or "the model"
        queue.extend(source for source in current.all_input_nodes if source not in queue)
    return node.name


def _require_cuda(program: ExportedProgram) -> None:
    """The kernels are CUDA's."""
    for node in program.graph.nodes:
        value = fake(node)
        if node.target is tsa.score.default and value.device.type != "cuda":
            raise ConfigError(
                f'lower="triton" is not allowed on {value.device.type}: the Triton kernels run on CUDA devices; move the '
                'model and the example to one, or use lower="aten"'
            )
    if not HAS_TRITON:
        raise ConfigError('lower="triton" needs Triton, which is not installed: install it, or use lower="aten"')


def device_of(program: ExportedProgram) -> str:
    """Where a program runs: "cuda" if anything of it does."""
    devices = {value.device.type for node in program.graph.nodes if isinstance(value := fake(node), Tensor)}
    return "cuda" if "cuda" in devices else next(iter(devices), "cpu")


def default_form(program: ExportedProgram) -> Form:
    """What runs fastest where a program runs: our kernels on CUDA, ATen elsewhere."""
    return "triton" if device_of(program) == "cuda" and HAS_TRITON else "aten"


def is_lowered(program: ExportedProgram) -> bool:
    """Whether a program has no tsa ops, and so needs none of this package to run."""
    return not any(str(node.target).startswith("tsa.") for node in program.graph.nodes)
