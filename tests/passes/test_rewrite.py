"""Each sparse call becomes one op, whose steps compute the same; calls share one padding mask."""

# ruff: noqa: E501  (golden graphs have long lines)

import copy

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from tsa_compile.config import Coverage, Floor, KeepRatio, TSAConfig
from tsa_compile.pipeline import WHOLE, run_passes
from tsa_compile.testing import capture_all, count_ops

from ..support import tiny, tokens
from .support import SPARSE, Rewritten, calls, causal_attention, inputs, merge_heads, padded_attention, padding

STEPS = ("score", "budget", "select", "compress", "attend", "decompress")


def whole(function, *arguments, config):
    """The graph after the passes; its outputs are those of the graph with the single steps."""
    steps = Rewritten(function, *arguments, config=config)
    made = Rewritten(function, *arguments, config=config, passes=WHOLE)
    torch.testing.assert_close(steps.after(*steps.inputs), made.after(*made.inputs))
    return made.after


def test_without_padding():
    config = SPARSE.replace(granularity="group")
    graph = whole(causal_attention, *inputs(), config=config)
    assert_expected_inline(
        calls(graph),
        """sparse_attention_default: float32[2, 4, 12, 8] = sparse_attention(l_q_, l_k_, l_v_, 0.353553, 3, 3, 0.005, None, 2, None, True, auto)""",
    )
    graph = whole(causal_attention, *inputs(), config=config.replace(floor=Floor(2, 1)))
    assert_expected_inline(
        calls(graph),
        """sparse_attention_default: float32[2, 4, 12, 8] = sparse_attention(l_q_, l_k_, l_v_, 0.353553, 3, 3, 0.005, None, 2, None, True, auto, 2, 1)""",
    )


def test_with_padding():
    config = SPARSE.replace(budget=Coverage(0.3), capacity=9)
    graph = whole(padded_attention, *inputs(), padding(), config=config)
    assert_expected_inline(
        calls(graph),
        """\
eq: bool[2, 12] = eq(l_pad_, 0)
logical_not: bool[2, 12] = not(eq)
expand: bool[2, 12] = expand(logical_not, 2, 12)
valid_ranges_default: int64[2, 3] = valid_ranges(expand)
padded_sparse_attention_default: float32[2, 4, 12, 8] = padded_sparse_attention(l_q_, l_k_, l_v_, expand, valid_ranges_default, 0.353553, 3, 3, 0.3, None, 2, 9, False, auto)""",
    )
    graph = whole(padded_attention, *inputs(), padding(), config=config.replace(capacity=None, floor=Floor(2, 1)))
    assert_expected_inline(
        calls(graph),
        """\
eq: bool[2, 12] = eq(l_pad_, 0)
logical_not: bool[2, 12] = not(eq)
expand: bool[2, 12] = expand(logical_not, 2, 12)
valid_ranges_default: int64[2, 3] = valid_ranges(expand)
padded_sparse_attention_default: float32[2, 4, 12, 8] = padded_sparse_attention(l_q_, l_k_, l_v_, expand, valid_ranges_default, 0.353553, 3, 3, 0.3, None, 2, None, False, auto, 2, 1)""",
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
    for dynamic in (False, True):
        captured = capture_all(
            tiny("llama", num_hidden_layers=2), ids, attention_mask=mask, use_cache=False, dynamic=dynamic
        )
        for layers in ([1], [0]):
            graph = copy.deepcopy(captured.graphs[0])
            config = TSAConfig(layers=layers, budget=KeepRatio(0.5), window=4, min_tokens=4, min_length=1)
            report = run_passes(graph, config, WHOLE)
            assert len(report.sparse_calls) == 1
            wanted = {"valid_ranges": 1, "padded_attention": 1, "padded_sparse_attention": 1}
            assert count_ops(graph, *wanted) == wanted
