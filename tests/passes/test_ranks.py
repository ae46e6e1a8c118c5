"""Which process group has a call's other heads: what is computed from its output alone is followed, and nothing else."""

import pytest
import torch
from torch.fx import Graph

from tsa_compile.passes.ranks import group_of_heads

matmul, add, cat = torch.matmul, torch.add, torch.cat


def group_of(build):
    """The group of a graph that `build` makes of nodes: the call's output, weights [2], and another activation."""
    graph = Graph()
    query, key, value, weights, other = (graph.placeholder(name) for name in ("q", "k", "v", "weights", "other"))
    out = graph.call_function(torch.nn.functional.scaled_dot_product_attention, (query, key, value))
    given = graph.call_function(torch.t, (weights,))
    other = graph.call_function(add, (other, weights))

    def reduced(value, name="0"):
        return graph.call_function(torch.ops._c10d_functional.all_reduce.default, (value, "sum", name))

    build(lambda *args: graph.call_function(*args), reduced, out, given, other)
    return group_of_heads(out)


@pytest.mark.parametrize(
    "build, group",
    [
        (lambda call, reduced, o, w, x: reduced(call(matmul, (o, w))), "0"),
        (lambda call, reduced, o, w, x: reduced(call(matmul, (call(cat, ([o, o],)), w))), "0"),
        (lambda call, reduced, o, w, x: reduced(call(add, (o, x))), None),
        (lambda call, reduced, o, w, x: (reduced(o), reduced(o, "1")), None),
        # Of what is not followed nothing comes, also beside what is.
        (lambda call, reduced, o, w, x: reduced(call(cat, ([o, call(add, (o, x))],))), None),
        (lambda call, reduced, o, w, x: reduced(call(cat, ([o, reduced(o)],)), "1"), "0"),
    ],
)
def test_group_of_heads(build, group):
    assert group_of(build) == group
