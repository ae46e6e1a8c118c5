"""What is almost an attention call that the passes rewrite: its graph stays as it is, with the reason in the report."""

import pytest
import torch
import torch.nn.functional as F

from tsa_compile.pipeline import run_passes
from tsa_compile.reasons import Decision, Reason
from tsa_compile.testing import capture_all, graph_text

from .support import (
    EXACT,
    SPARSE,
    Rewritten,
    causal,
    causal_attention,
    inputs,
    merge_heads,
    padded_attention,
    padding,
    repeat_kv,
)

pytestmark = pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse")


def shifted(q, k, v, pad):
    positions = torch.arange(q.shape[2])
    mask = positions[None, :] <= positions[:, None] + 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def windowed_both_ways(q, k, v, pad):
    positions = torch.arange(q.shape[2])
    distance = positions[:, None] - positions
    mask = (distance < 4) & (distance > -4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def bidirectional(q, k, v, pad):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=pad.bool()[:, None, None], enable_gqa=True)


def with_dropout(q, k, v, pad):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1, enable_gqa=True)


def with_a_cache(q, k, v, pad):
    return F.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True)


def set_to_other_memory(q, k, v, pad):
    key = repeat_kv(k).clone().mul_(2)
    scores = (q @ key.mT).masked_fill(~causal(q.shape[2]), float("-inf"))
    key.set_(repeat_kv(v).clone())
    return scores.softmax(-1) @ repeat_kv(v)


def mask_cast_by_autocast(q, k, v, pad):
    """Its lowest number becomes -inf, so that rows which see nothing are 0 and no mean."""
    mask = torch.where(causal(q.shape[2]) & pad.bool()[:, None, None], 0.0, torch.finfo(torch.float32).min)
    with torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), attn_mask=mask, enable_gqa=True)
    return out


def capped(q, k, v, pad):
    scores = torch.tanh(q @ repeat_kv(k).mT) + torch.where(causal(q.shape[2]), 0.0, float("-inf"))
    return scores.softmax(-1) @ repeat_kv(v)


NEAR_MISSES = {
    shifted: Reason.MASK_OPAQUE,
    windowed_both_ways: Reason.SLIDING_WINDOW,
    bidirectional: Reason.NOT_CAUSAL,
    with_dropout: Reason.DROPOUT,
    with_a_cache: Reason.NOT_SELF_ATTENTION,
    capped: Reason.UNSUPPORTED_FORM,
    set_to_other_memory: Reason.UNSUPPORTED_FORM,
    mask_cast_by_autocast: Reason.DTYPE,
}


@pytest.mark.parametrize("config", [EXACT, SPARSE.replace(layers=None)], ids=["dense", "sparse"])
@pytest.mark.parametrize("function", NEAR_MISSES, ids=lambda function: function.__name__)
def test_near_miss_stays(function, config):
    rewritten = Rewritten(function, *inputs(), padding(), config=config)
    assert graph_text(rewritten.after) == graph_text(rewritten.before)
    assert [(row.decision, row.reason) for row in rewritten.report] == [(Decision.UNCHANGED, NEAR_MISSES[function])]


def hidden_by(pad, length, low):
    return torch.where(causal(length) & pad.bool()[:, None, None], 0.0, low)


LOW = torch.finfo(torch.float32).min
ROUNDED = {
    "cast": lambda q, k, v, pad: (
        (q.bfloat16() @ repeat_kv(k).bfloat16().mT).float().add(hidden_by(pad, q.shape[2], LOW)).bfloat16().softmax(-1)
        @ repeat_kv(v).bfloat16()
    ),
    "softmax in half precision": lambda q, k, v, pad: (
        torch.softmax(
            (q.bfloat16() @ repeat_kv(k).bfloat16().mT).float() + hidden_by(pad, q.shape[2], LOW), -1, torch.bfloat16
        )
        @ repeat_kv(v).bfloat16()
    ),
    "softmax in single precision": lambda q, k, v, pad: (
        torch.softmax(
            (q @ repeat_kv(k).mT).double().masked_fill(hidden_by(pad, q.shape[2], 1.0).bool(), -1e300), -1, torch.float32
        )
        @ repeat_kv(v)
    ),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_hidden_scores_that_a_later_cast_makes_infinite(name):
    """A row that sees nothing is NaN then, and not the mean of all values."""
    rewritten = Rewritten(ROUNDED[name], *inputs(), padding(), config=EXACT)
    assert [(row.decision, row.reason) for row in rewritten.report] == [(Decision.UNCHANGED, Reason.LAYER_NOT_SELECTED)]


def test_a_near_miss_beside_a_match():
    def both(q, k, v, pad):
        return merge_heads(shifted(q, k, v, pad)) + padded_attention(q, k, v, pad)

    rewritten = Rewritten(both, *inputs(), padding(), config=EXACT)
    assert [row.decision for row in rewritten.report] == [Decision.UNCHANGED, Decision.DENSE_PADDED]
    rewritten.check_same()


def test_gradients_keep_the_graph():
    q, k, v = (x.requires_grad_() for x in inputs())
    captured = capture_all(causal_attention, q, k, v, grad=True)
    before = graph_text(captured.graphs[0])
    report = run_passes(captured.graphs[0], SPARSE)
    assert [row.reason for row in report] == [Reason.NEEDS_GRAD]
    assert graph_text(captured.graphs[0]) == before
