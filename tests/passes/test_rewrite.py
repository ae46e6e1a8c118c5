"""Each sparse call becomes one op, whose steps compute the same; calls share one padding mask."""

# ruff: noqa: E501  (golden graphs have long lines)

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from tsa_compile.config import Coverage, KeepRatio, TSAConfig
from tsa_compile.pipeline import PASSES, WHOLE, run_passes
from tsa_compile.testing import capture_all, count_ops, graph_text

from ..support import tiny, tokens
from .support import SPARSE, causal_attention, inputs, merge_heads, padded_attention, padding

STEPS = ("score", "budget", "select", "compress", "attend", "decompress")


def whole(function, *arguments, config, dynamic=None):
    """The graph after the passes; its outputs are those of the graph with the single steps."""
    graphs = []
    for passes in (PASSES, WHOLE):
        captured = capture_all(function, *arguments, dynamic=dynamic)
        run_passes(captured.graphs[0], config, passes)
        graphs.append(captured.graphs[0])
        torch.testing.assert_close(graphs[0](*captured.inputs[0]), graphs[-1](*captured.inputs[0]))
    return graphs[-1]


def test_without_padding():
    graph = whole(causal_attention, *inputs(), config=SPARSE.replace(granularity="group"))
    assert_expected_inline(
        graph_text(graph),
        """\
l_q_: float32[2, 4, 12, 8]
l_k_: float32[2, 2, 12, 8]
l_v_: float32[2, 2, 12, 8]
sparse_attention_default: float32[2, 4, 12, 8] = sparse_attention(l_q_, l_k_, l_v_, 0.353553, 3, 3, 0.005, None, 2, None, True, auto)
transpose: float32[2, 12, 4, 8] = transpose(sparse_attention_default, 1, 2)
reshape_2: float32[2, 12, 32] = reshape(transpose, 2, -1, 32)
return (reshape_2)""",
    )


def test_with_padding():
    graph = whole(padded_attention, *inputs(), padding(), config=SPARSE.replace(budget=Coverage(0.3), capacity=9))
    assert_expected_inline(
        graph_text(graph),
        """\
l_q_: float32[2, 4, 12, 8]
l_pad_: int64[2, 12]
l_k_: float32[2, 2, 12, 8]
l_v_: float32[2, 2, 12, 8]
eq: bool[2, 12] = eq(l_pad_, 0)
logical_not: bool[2, 12] = not(eq)
expand: bool[2, 12] = expand(logical_not, 2, 12)
valid_ranges_default: int64[2, 3] = valid_ranges(expand)
padded_sparse_attention_default: float32[2, 4, 12, 8] = padded_sparse_attention(l_q_, l_k_, l_v_, expand, valid_ranges_default, 0.353553, 3, 3, 0.3, None, 2, 9, False, auto)
transpose: float32[2, 12, 4, 8] = transpose(padded_sparse_attention_default, 1, 2)
reshape: float32[2, 12, 32] = reshape(transpose, 2, -1, 32)
return (reshape)""",
    )


def test_a_symbolic_length():
    def attention(q):
        return merge_heads(F.scaled_dot_product_attention(q, q, q, is_causal=True))

    q = inputs()[0]
    torch._dynamo.mark_dynamic(q, 2)
    graph = whole(attention, q, config=SPARSE)
    assert count_ops(graph, "sparse_attention", "sym_max", *STEPS) == {
        "sparse_attention": 1,
        **dict.fromkeys(("sym_max", *STEPS), 0),
    }


def test_all_layers_share_one_padding_mask():
    """Dense and sparse layers in either order, with a symbolic length as well: one look at the batch."""
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    for layers in ([1], [0]):
        for dynamic in (False, True):
            captured = capture_all(
                tiny("llama", num_hidden_layers=2), ids, attention_mask=mask, use_cache=False, dynamic=dynamic
            )
            config = TSAConfig(layers=layers, budget=KeepRatio(0.5), window=4, min_tokens=4, min_length=1)
            report = run_passes(captured.graphs[0], config, WHOLE)
            assert len(report.sparse_calls) == 1
            wanted = {"valid_ranges": 1, "padded_attention": 1, "padded_sparse_attention": 1}
            assert count_ops(captured.graphs[0], *wanted) == wanted
