"""Reads the attention calls of a function, and holds what was read against what the call computed.

The oracle computes attention from the normal form (operands, masks, scale).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tsa_compile.passes.find import find_calls
from tsa_compile.testing import capture_all, run_nodes

B, H, G, L, D = 2, 4, 2, 6, 8
sdpa = F.scaled_dot_product_attention


def inputs(heads=H, kv_heads=H, keys=L):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, heads, L, D), (B, kv_heads, keys, D), (B, kv_heads, keys, D))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def lowest():
    return torch.finfo(torch.float32).min


def triangle(n=L):
    return torch.arange(n) <= torch.arange(n)[:, None]


def bias(n=L):
    return torch.zeros(n, n).masked_fill(~triangle(n), lowest())


def read(function, *args, dynamic=None, export=False):
    """The graph of a call, its calls and every node's real value."""
    if export:
        program = torch.export.export(Wrapped(function), args, strict=False)
        graph = program.graph_module
        state = [program.state_dict.get(name) for name in program.graph_signature.inputs_to_parameters.values()]
        constants = [program.constants[name] for name in program.graph_signature.inputs_to_lifted_tensor_constants.values()]
        calls = find_calls(graph)
        return graph, calls, run_nodes(graph, (*state, *constants, *args), next(iter(calls), None))
    captured = capture_all(function, *args, dynamic=dynamic)
    (graph,) = captured.graphs
    calls = find_calls(graph)
    return graph, calls, run_nodes(graph, captured.inputs[0], next(iter(calls), None))


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def attention_of(call, values):
    """softmax(scale * q k^T, masked) v from a call's normal form."""
    query, key, value = (values[node.name] for node in (call.query, call.key, call.value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scale = values.get(getattr(call.scale, "name", None), call.scale)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    for term in reversed(call.masks):
        mask = values[term.mask.name]
        if term.role == "bias":
            scores = scores + mask
        else:
            scores = scores.masked_fill(~mask if term.role == "keep" else mask, term.fill)
    if call.is_causal is True:
        scores = scores.masked_fill(~triangle(scores.shape[-1])[: scores.shape[-2]], -math.inf)
    if call.sink_logits is not None:
        column = values[call.sink_logits.name][:, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value
    return scores.softmax(-1) @ value


def expect(function, *args, form, peeled=False, **options):
    """One call without a problem, in which the call's whole meaning is found."""
    _, calls, values = read(function, *args, **options)
    (call,) = calls
    assert call.problem is None, call.problem
    assert call.form == form
    assert call.peeled is peeled
    output = values[call.node.name]
    torch.testing.assert_close(attention_of(call, values).reshape(output.shape), output)
    return call


def repeat_kv(x, n):
    batch, heads, length, width = x.shape
    return x[:, :, None, :, :].expand(batch, heads, n, length, width).reshape(batch, heads * n, length, width)
