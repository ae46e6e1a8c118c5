"""What the tests of the passes share: attention functions in several spellings, their inputs, and a rewritten graph.

`pad` is [B, L]; the functions take [B, H, L, D] and [B, G, L, D].
"""

import copy
import re

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from tsa_compile.config import TSAConfig
from tsa_compile.passes.base import GraphState
from tsa_compile.pipeline import PASSES, run_passes
from tsa_compile.testing import capture_all, graph_text

B, H, G, L, D = 2, 4, 2, 12, 8
EXACT = TSAConfig(layers=())
SPARSE = TSAConfig.published(window=3, pool=3, min_tokens=2, layers=(0,))


def inputs(length=L, kv_heads=G):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(B, H, length, D, generator=generator)
    return query, *(torch.randn(B, kv_heads, length, D, generator=generator) for _ in range(2))


def padding(length=L):
    pad = torch.ones(B, length, dtype=torch.long)
    pad[0, :3] = 0
    pad[1, -2:] = 0
    return pad


def causal(length):
    positions = torch.arange(length)
    return positions[None, :] <= positions[:, None]


def repeat_kv(x):
    return x[:, :, None].expand(B, G, H // G, -1, D).reshape(B, H, -1, D)


def merge_heads(x):
    """As models do; any memory layout of x will do."""
    return x.transpose(1, 2).reshape(B, -1, H * D)


def causal_attention(q, k, v):
    mask = causal(q.shape[2])
    return merge_heads(F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask))


def padded_attention(q, k, v, pad):
    mask = causal(q.shape[2]) & pad.bool()[:, None, None, :]
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))


def written_out(q, k, v, pad):
    mask = causal(q.shape[2]) & pad.bool()[:, None, None, :]
    bias = torch.where(mask, 0.0, torch.finfo(q.dtype).min)
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3)) * 0.5 + bias
    return merge_heads(torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), repeat_kv(v)))


class Rewritten:
    """A captured graph, run through the passes; `before` is a copy that was not. With `passes=WHOLE` ops stay unopened."""

    def __init__(self, function, *args, config, dynamic=None, passes=PASSES):
        captured = capture_all(function, *args, dynamic=dynamic)
        (self.after,) = captured.graphs
        (self.inputs,) = captured.inputs
        self.before = GraphModule(self.after, copy.deepcopy(self.after.graph))
        self.report = run_passes(self.after, config, passes)

    def outputs(self):
        with torch.no_grad():
            return self.before(*self.inputs)[0], self.after(*self.inputs)[0]

    def check_same(self):
        before, after = self.outputs()
        torch.testing.assert_close(after, before)
        assert after.stride() == before.stride()


def calls(graph):
    """The text of a graph's calls for golden tests, one a line: without its inputs, and without the merge of the heads
    that ends the functions above."""
    text = graph_text(graph)
    last = re.search(r"\ntranspose\w*: [^\n]*\nreshape\w*: [^\n]*\nreturn [^\n]*$", text)
    lines = text[: last.start() if last else None].splitlines()
    return "\n".join(line for line in lines if " = " in line or line.startswith("return"))


def passed(last, function, *arguments, config):
    """A captured graph behind every pass up to `last`, what these share, and the inputs that the graph was run with."""
    captured = capture_all(function, *arguments)
    (graph,), state = captured.graphs, GraphState(config)
    for kind in PASSES[: PASSES.index(last) + 1]:
        kind(state)(graph)
    return graph, state, captured.inputs[0]


def hand_built(**values):
    """A graph in the making, and a placeholder with a fake value for each tensor; `passes.graph.insert` adds calls."""
    graph, mode = Graph(), FakeTensorMode()
    inputs = [graph.placeholder(name) for name in values]
    for node, value in zip(inputs, values.values(), strict=True):
        node.meta["example_value"] = mode.from_tensor(value)
    return graph, *inputs
