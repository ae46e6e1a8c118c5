"""Every spelling of attention reads into one normal form, and what only looks like attention does not.

Written-out attention: test_eager.py.
"""

import functools
import math

import pytest
import torch
from torch import nn

from tsa_compile.passes.find import find_calls
from tsa_compile.passes.graph import fake
from tsa_compile.reasons import Reason
from tsa_compile.testing import capture_all

from .call_reading import B, D, G, H, L, bias, expect, inputs, read, repeat_kv, sdpa, triangle

SDPA_SPELLINGS = {
    "plain": lambda q, k, v: sdpa(q, k, v),
    "positional": lambda q, k, v: sdpa(q, k, v, triangle(), 0.0, False),
    "keywords": lambda q, k, v: sdpa(query=q, key=k, value=v, attn_mask=triangle(), dropout_p=0.0, is_causal=False),
    "keyword mask": lambda q, k, v: sdpa(q, k, v, attn_mask=bias()),
    "keyword is_causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "positional is_causal": lambda q, k, v: sdpa(q, k, v, None, 0.0, True),
    "scale": lambda q, k, v: sdpa(q, k, v, scale=0.3),
    "scale of the width": lambda q, k, v: sdpa(q, k, v, scale=q.shape[-1] ** -0.25),
    "grouped flag without groups": lambda q, k, v: sdpa(q, k, v, enable_gqa=True, is_causal=True),
    "aten": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v, triangle(), 0.0, False, scale=0.3),
    "aten overload": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v, attn_mask=bias()),
    "float64 mask of zero and -inf": lambda q, k, v: sdpa(q, k, v, torch.where(triangle(), 0.0, -math.inf)),
}


class TestSDPA:
    @pytest.mark.parametrize("name", SDPA_SPELLINGS)
    def test_spelling(self, name):
        expect(SDPA_SPELLINGS[name], *inputs(), form="sdpa")

    @pytest.mark.parametrize("name", ["positional", "keywords", "keyword is_causal", "scale"])
    def test_exported(self, name):
        call = expect(SDPA_SPELLINGS[name], *inputs(), form="sdpa", export=True)
        assert isinstance(call.node.target, torch._ops.OpOverload)

    def test_scale_of_a_symbolic_width(self):
        """torch guards on the number that SDPA is handed."""

        def attention(q, k, v):
            return sdpa(q, k, v, scale=1 / math.sqrt(q.shape[-1] / 2), is_causal=True)

        assert expect(attention, *inputs(), form="sdpa", dynamic=True).scale == pytest.approx(1 / math.sqrt(D / 2))

    def test_the_mask_may_be_alone_in_broadcasting(self):
        for mask in (triangle(), triangle()[None], triangle()[None, None], triangle().expand(B, 1, L, L), triangle()[:1]):
            expect(lambda q, k, v, mask=mask: sdpa(q, k, v, attn_mask=mask), *inputs(), form="sdpa")

    def test_grouped(self):
        call = expect(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), *inputs(kv_heads=G), form="sdpa")
        assert fake(call.key).shape[1] == G

    def test_one_head_for_all_queries_by_broadcasting(self):
        """Falcon's multi-query attention: a group of all heads."""
        call = expect(lambda q, k, v: sdpa(q, k, v, is_causal=True), *inputs(kv_heads=1), form="sdpa")
        assert fake(call.key).shape[1] == 1

    def test_other_lengths(self):
        expect(lambda q, k, v: sdpa(q, k, v), *inputs(keys=L + 3), form="sdpa")

    def test_dropout_is_kept(self):
        _, (call,), _ = read(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), *inputs())
        assert call.dropout == 0.5

    @pytest.mark.parametrize(
        "shapes, reason",
        [
            ([(H, L, D)] * 3, Reason.RANK),
            ([(1, B, H, L, D)] * 3, Reason.RANK),
            ([(B, H, L, D), (1, H, L, D), (1, H, L, D)], Reason.UNSUPPORTED_FORM),
            ([(B, H, L, D), (B, 1, L, D), (B, H, L, D)], Reason.UNSUPPORTED_FORM),
            ([(B, H, L, D), (B, H, L, D), (B, 1, L, D)], Reason.UNSUPPORTED_FORM),
            ([(B, 1, L, D), (B, H, L, D), (B, H, L, D)], Reason.UNSUPPORTED_FORM),
            ([(B, H, L, D), (1, 1, L, D), (1, 1, L, D)], Reason.UNSUPPORTED_FORM),
        ],
        ids=["three dimensions", "five dimensions", "batch", "key head", "value head", "query head", "batch and heads"],
    )
    def test_what_cannot_be_rewritten_has_a_reason(self, shapes, reason):
        _, (call,), _ = read(sdpa, *(torch.randn(shape) for shape in shapes))
        assert call.problem is not None and call.problem[0] is reason

    def test_a_call_that_cannot_run_has_a_row(self):
        graph, (call,), _ = read(lambda q, k, v: sdpa(q, k, v, is_causal=True), *inputs())
        call.node.kwargs = {"is_causal": next(iter(graph.graph.nodes))}
        (call,) = find_calls(graph)
        assert call.problem is not None and call.problem[0] is Reason.UNSUPPORTED_FORM


def expanded(x, before, after):
    """Heads repeated by expanding a dimension inserted at `before`, merged at `after`."""
    batch, heads, length, width = x.shape
    shape = [batch, heads, length, width]
    wide = x.unsqueeze(before).expand(*shape[:before], H // G, *shape[before:])
    return wide.flatten(after, after + 1)


REPEATS = {
    "repeat_kv": lambda x: repeat_kv(x, H // G),
    "repeat_kv, contiguous": lambda x: repeat_kv(x, H // G).contiguous(),
    "flatten": lambda x: expanded(x, 2, 1),
    "negative dimension": lambda x: x.unsqueeze(-3).expand(B, G, H // G, L, D).reshape(B, H, L, D),
    "minus one": lambda x: x[:, :, None].expand(-1, -1, H // G, -1, -1).reshape(B, -1, L, D),
    "ellipsis": lambda x: x[:, :, None, ...].expand(B, G, H // G, L, D).reshape(B, H, L, D),
    "expand, clone, view": lambda x: x[:, :, None].expand(B, G, H // G, L, D).clone().view(B, H, L, D),
    "repeat_interleave": lambda x: x.repeat_interleave(H // G, dim=1),
    "repeat_interleave, negative": lambda x: torch.repeat_interleave(x, H // G, dim=-3),
    "repeat_interleave, positional": lambda x: x.repeat_interleave(H // G, 1),
}

NOT_REPEATS = {
    "repeat": lambda x: x.repeat(1, H // G, 1, 1),
    "expand in front": lambda x: expanded(x, 1, 1),
    "cat": lambda x: torch.cat([x, x], 1),
    "repeat_interleave by a tensor": lambda x: torch.repeat_interleave(x, torch.tensor([3, 1]), dim=1, output_size=H),
    "gathered heads": lambda x: x[:, [0, 1, 0, 1]],
    "split heads": lambda x: x.reshape(B, H, L // 2, D).repeat_interleave(2, dim=2),
    "repeated twice in other orders": lambda x: torch.stack([x, x], 2).transpose(1, 2).reshape(B, H, L, D),
}


class TestRepeatedHeads:
    @pytest.mark.parametrize("name", REPEATS)
    def test_peeled(self, name):
        def attention(q, k, v):
            return sdpa(q, REPEATS[name](k), REPEATS[name](v), is_causal=True)

        call = expect(attention, *inputs(kv_heads=G), form="sdpa", peeled=True)
        assert fake(call.key).shape == fake(call.value).shape == (B, G, L, D)
        assert fake(call.wide_key).shape == (B, H, L, D)

    @pytest.mark.parametrize("name", NOT_REPEATS)
    def test_near_miss(self, name):
        def attention(q, k, v):
            return sdpa(q, NOT_REPEATS[name](k), NOT_REPEATS[name](v), is_causal=True)

        call = expect(attention, *inputs(kv_heads=G), form="sdpa")
        assert fake(call.key).shape == (B, H, L, D)

    @pytest.mark.parametrize("name", ["repeat_kv", "repeat_interleave"])
    def test_exported(self, name):
        def attention(q, k, v):
            return sdpa(q, REPEATS[name](k), REPEATS[name](v), is_causal=True)

        expect(attention, *inputs(kv_heads=G), form="sdpa", peeled=True, export=True)

    def test_symbolic_sizes(self):
        def attention(x):
            return sdpa(torch.cat([x, -x], 1), repeat_kv(x, 2), repeat_kv(x, 2), is_causal=True)

        x = inputs(kv_heads=G)[1]
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 2)
        call = expect(attention, x, form="sdpa", peeled=True)
        assert isinstance(fake(call.key).shape[2], torch.SymInt)

    def test_repeated_once_more_by_the_call(self):
        def attention(q, k, v):
            return sdpa(q, repeat_kv(k, 2), repeat_kv(v, 2), is_causal=True, enable_gqa=True)

        call = expect(attention, *inputs(heads=8, kv_heads=G), form="sdpa", peeled=True)
        assert fake(call.key).shape[1] == G

    def test_key_alone(self):
        q, narrow, _ = inputs(kv_heads=G)
        v = inputs()[2]
        expect(lambda q, k, v: sdpa(q, repeat_kv(k, 2), v), q, narrow, v, form="sdpa")

    def test_along_another_dimension(self):
        def attention(q, k, v):
            return sdpa(q, k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2))

        expect(attention, *inputs(), form="sdpa")

    @pytest.mark.parametrize("write", [lambda k, wide: k.mul_(2), lambda k, wide: wide.mul_(2)], ids=["narrow", "wide"])
    def test_written_to_in_between(self, write):
        def attention(q, k, v):
            k = k.clone()
            wide = repeat_kv(k, 2)
            write(k, wide)
            return sdpa(q, wide, repeat_kv(v, 2), is_causal=True)

        expect(attention, *inputs(kv_heads=G), form="sdpa")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.linear = nn.Linear(H * D, H * D)

    def forward(self, x):
        return self.linear(self.attention(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(H * D, H * D)

    def forward(self, x):
        x = self.project(x).unflatten(-1, (H, D)).transpose(1, 2)
        return sdpa(x, x, x, is_causal=True).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.encoder = nn.ModuleList(Layer() for _ in range(layers))
        self.named = nn.ModuleDict({"only": Attention()})

    def forward(self, x):
        for layer in self.encoder:
            x = layer(x)
        return self.named["only"](x)


def passed_on(function):
    """A decorator as libraries write them."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class TestLayers:
    """A call is named after the module that it was traced from, the same by either tracer."""

    def names(self, graph):
        return tuple(call.layer for call in find_calls(graph))

    EXPECTED = ("encoder.0.attention", "encoder.1.attention", "encoder.2.attention", "named.only")

    def test_dynamo(self):
        (graph,) = capture_all(Model().eval(), torch.randn(B, L, H * D)).graphs
        assert self.names(graph) == self.EXPECTED

    def test_export(self):
        program = torch.export.export(Model().eval(), (torch.randn(B, L, H * D),), strict=False)
        assert self.names(program.graph_module) == self.EXPECTED

    def test_wrapped_in_a_function(self):
        model = Model().eval()
        (graph,) = capture_all(lambda x: model(x) + 1, torch.randn(B, L, H * D)).graphs
        assert self.names(graph) == self.EXPECTED

    def test_behind_a_decorator(self):
        """A decorated forward finds its module among the arguments: it is the root, not the first of several."""

        class Decorated(Model):
            forward = passed_on(Model.forward)

        (graph,) = capture_all(Decorated().eval(), torch.randn(B, L, H * D)).graphs
        assert self.names(graph) == self.EXPECTED

    def test_layers_among_the_arguments(self):
        """Near-miss: here the place among the arguments is the layer's number."""

        def run(x, *args):
            for layer in args:
                x = layer(x)
            return x

        (graph,) = capture_all(run, torch.randn(B, L, H * D), *Model().eval().encoder).graphs
        assert self.names(graph) == tuple(f"{i}.attention" for i in range(3))

    def test_outside_any_module(self):
        _, (call,), _ = read(lambda q, k, v: sdpa(q, k, v), *inputs())
        assert call.layer == call.node.name
