"""Sinks of written-out attention: read where they are a number for each head, rewritten exactly, left alone otherwise."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from tsa_compile import Floor, KeepRatio, TSAConfig
from tsa_compile.errors import TSAWarning
from tsa_compile.kernels import reference, registry
from tsa_compile.pipeline import run_passes
from tsa_compile.reasons import Decision, Reason
from tsa_compile.testing import capture_all

from .call_reading import B, H, L, bias, expect, inputs, read, repeat_kv, triangle

tsa = torch.ops.tsa


def scores(q, k):
    return q @ k.mT * 0.35 + bias(k.shape[2])


def column(z, q):
    return z.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)


def joined(q, k, z):
    return torch.cat([scores(q, k), column(z, q)], dim=-1)


def shifted(c):
    return c - c.max(dim=-1, keepdim=True).values


SPELLINGS = {
    "gpt-oss": lambda q, k, v, z: F.softmax(shifted(joined(q, k, z)), dim=-1, dtype=q.dtype)[..., :-1] @ v,
    "without a shift": lambda q, k, v, z: joined(q, k, z).softmax(-1)[..., :-1] @ v,
    "amax": lambda q, k, v, z: ((c := joined(q, k, z)) - c.amax(-1, keepdim=True)).softmax(-1)[..., :L] @ v,
    "shifted in place": lambda q, k, v, z: (c := joined(q, k, z)).sub_(c.amax(-1, True)).softmax(-1)[..., :-1] @ v,
    "indexed by None": lambda q, k, v, z: (
        torch.cat([scores(q, k), z[None, :, None, None].expand(B, H, L, 1)], 3).softmax(-1)[..., :-1] @ v
    ),
    "expanded in front": lambda q, k, v, z: (
        torch.cat([scores(q, k), z[:, None, None].expand(B, H, L, 1)], 3).softmax(-1)[..., :-1] @ v
    ),
    "in float32": lambda q, k, v, z: joined(q, k, z.float()).float().softmax(-1)[..., :-1].to(q.dtype) @ v,
    "dropout in evaluation": lambda q, k, v, z: F.dropout(joined(q, k, z).softmax(-1)[..., :-1], 0.5, False) @ v,
    "computed": lambda q, k, v, z: joined(q, k, z * 2 - 1).softmax(-1)[..., :-1] @ v,
    "masked with minus infinity": lambda q, k, v, z: (
        torch.cat([(q @ k.mT).masked_fill(~triangle(), float("-inf")), column(z, q)], -1).softmax(-1)[..., :-1] @ v
    ),
}

# Each is one step away from a spelling above.
NEAR_MISSES = {
    "a number for each token": lambda q, k, v, z: torch.cat([scores(q, k), q[..., :1]], -1).softmax(-1)[..., :-1] @ v,
    "two columns": lambda q, k, v, z: (
        torch.cat([scores(q, k), column(z, q).expand(-1, -1, -1, 2)], -1).softmax(-1)[..., :-2] @ v
    ),
    "two columns, one left out": lambda q, k, v, z: (
        torch.cat([scores(q, k), column(z, q).expand(-1, -1, -1, 2)], -1).softmax(-1)[..., :-1]
        @ torch.cat([v, v[:, :, :1]], 2)
    ),
    "its weight is read": lambda q, k, v, z: joined(q, k, z).softmax(-1) @ torch.cat([v, v[:, :, :1]], 2),
    "the first column is left out": lambda q, k, v, z: joined(q, k, z).softmax(-1)[..., 1:] @ v,
    "the sink comes first": lambda q, k, v, z: torch.cat([column(z, q), scores(q, k)], -1).softmax(-1)[..., 1:] @ v,
    "nothing is joined": lambda q, k, v, z: scores(q, k).softmax(-1)[..., :-1] @ v[:, :, 1:],
    "shifted before it is joined": lambda q, k, v, z: (
        torch.cat([shifted(scores(q, k)), column(z, q)], -1).softmax(-1)[..., :-1] @ v
    ),
    "shifted by the maximum of the others": lambda q, k, v, z: (
        ((c := joined(q, k, z)) - c[:, :, :1].amax(-1, True)).softmax(-1)[..., :-1] @ v
    ),
    "shifted by the maximum over queries": lambda q, k, v, z: (
        ((c := joined(q, k, z)) - c.amax(-2, True)).softmax(-1)[..., :-1] @ v
    ),
    "shifted by the place of the maximum": lambda q, k, v, z: (
        ((c := joined(q, k, z)) - c.max(-1, keepdim=True).indices).softmax(-1)[..., :-1] @ v
    ),
    "shifted by twice the maximum": lambda q, k, v, z: (
        torch.sub(c := joined(q, k, z), c.amax(-1, True), alpha=2).softmax(-1)[..., :-1] @ v
    ),
    "scaled together": lambda q, k, v, z: (joined(q, k, z) * 0.5).softmax(-1)[..., :-1] @ v,
    "masked together": lambda q, k, v, z: (joined(q, k, z) + bias(L + 1)[:L]).softmax(-1)[..., :-1] @ v,
    "joined twice": lambda q, k, v, z: torch.cat([joined(q, k, z), column(z, q)], -1).softmax(-1)[..., :-2] @ v,
    "another order of heads": lambda q, k, v, z: (
        torch.cat([scores(q, k), column(z, q).flip(1)], -1).softmax(-1)[..., :-1] @ v
    ),
    "a number for each item and head": lambda q, k, v, z: (
        torch.cat([scores(q, k), q[:, :, :1, :1].expand(-1, -1, L, -1)], -1).softmax(-1)[..., :-1] @ v
    ),
    "rounded": lambda q, k, v, z: (
        torch.cat([scores(q, k), column(z, q).to(torch.float8_e4m3fn).float()], -1).softmax(-1)[..., :-1] @ v
    ),
    "the maximum is read elsewhere": lambda q, k, v, z: (
        ((c := joined(q, k, z)) - (m := c.amax(-1, True))).softmax(-1)[..., :-1] @ v, m
    ),
}  # fmt: skip


def sink():
    return torch.linspace(-3, 3, H)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    call = expect(SPELLINGS[name], *inputs(), sink(), form="eager")
    assert call.sink_logits is not None


@pytest.mark.parametrize("options", [{"dynamic": True}, {"export": True}], ids=["symbolic", "exported"])
def test_captured_otherwise(options):
    call = expect(SPELLINGS["gpt-oss"], *inputs(), sink(), form="eager", **options)
    assert call.sink_logits is not None


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    _, (call,), _ = read(NEAR_MISSES[name], *inputs(), sink())
    assert call.sink_logits is None and call.problem is not None and call.problem[0] is Reason.UNSUPPORTED_FORM


def test_repeated_heads_are_peeled():
    def attention(q, k, v, z):
        return SPELLINGS["gpt-oss"](q, repeat_kv(k, 2), repeat_kv(v, 2), z)

    assert expect(attention, *inputs(kv_heads=2), sink(), form="eager", peeled=True).sink_logits is not None


def test_a_sink_that_is_written_to():
    def attention(q, k, v, z):
        z = z.clone()
        c = joined(q, k, z)
        z.add_(5)
        return c.softmax(-1)[..., :-1] @ v

    _, (call,), _ = read(attention, *inputs(), sink())
    assert call.problem == (Reason.UNSUPPORTED_FORM, "its sinks are written to in place, or are made inside")


def test_a_sink_that_is_trained():
    z = sink().requires_grad_()
    for grad in (True, False):
        (graph,) = capture_all(SPELLINGS["gpt-oss"], *inputs(), z, grad=grad).graphs
        row = run_passes(graph, TSAConfig(layers=[])).rows[0]
        assert (row.reason is Reason.NEEDS_GRAD) is grad and (row.decision is Decision.DENSE) is not grad


LENGTH = 70
EXACT = TSAConfig(layers=[])
SPARSE = TSAConfig(layers=["*"], budget=KeepRatio(0.2), min_tokens=1, min_length=1, window=4, floor=Floor(6, 2))


def longer(heads=H):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, count, LENGTH, 8, generator=generator) for count in (heads, 2, 2))


def attention_with(mask, window=None):
    """Attention as models write it, causal, perhaps over a window, with padding [B, L] if there is one."""

    def attention(q, k, v, z, padding):
        at = torch.arange(LENGTH)
        allowed = (at <= at[:, None])[None, None]
        if window is not None:
            allowed = allowed & (at > at[:, None] - window)
        if padding is not None:
            allowed = allowed & (padding != 0)[:, None, None]
        c = q @ repeat_kv(k, 2).mT * 0.35
        c = c.masked_fill(~allowed, mask)
        c = torch.cat([c, column(z, q)], -1)
        return shifted(c).softmax(-1)[..., :-1] @ repeat_kv(v, 2)

    return attention


def ragged():
    padding = torch.ones(2, LENGTH, dtype=torch.int64)
    padding[0, :9] = 0
    return padding


def rewritten(function, config, *args):
    captured = capture_all(function, *args)
    (graph,) = captured.graphs
    report = run_passes(graph, config)
    return graph, report.rows[0], graph(*captured.inputs[0])


CASES = [
    (None, None, "dense", tsa.cached_attention), (ragged, None, "dense (padding)", tsa.padded_attention),
    (None, 11, "dense (window)", tsa.sliding_attention), (ragged, 11, "dense (window)", tsa.padded_sliding_attention),
]  # fmt: skip


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, float("-inf")], ids=["lowest", "infinite"])
@pytest.mark.parametrize("padding, window, decision, op", CASES)
def test_dense_calls_are_exact(padding, window, decision, op, fill):
    """Pad rows too: beside a sink what is hidden has no weight, whatever it is filled with."""
    args = (*longer(), sink(), padding and padding())
    function = attention_with(fill, window)
    graph, row, (out,) = rewritten(function, EXACT.replace(strict=True), *args)
    assert (str(row.decision), row.reason is not Reason.PASS_FAILED) == (decision, True)
    assert [node for node in graph.graph.nodes if node.target is op.default]
    torch.testing.assert_close(out, function(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("floor", [Floor(6, 2), None], ids=str)
@pytest.mark.parametrize("padding", [None, ragged])
@pytest.mark.parametrize("opened", [False, True])
def test_sparse_calls_equal_the_reference(padding, floor, opened):
    args = (*longer(), sink(), padding and padding())
    config = SPARSE.replace(floor=floor, skip_passes=[] if opened else ["Decompose"], strict=True)
    graph, row, (out,) = rewritten(attention_with(torch.finfo(torch.float32).min), config, *args)
    assert row.decision is Decision.SPARSE
    assert any(node.target is tsa.score.default for node in graph.graph.nodes) is opened
    wide = (tensor.double() for tensor in args[:3])
    scalars = {"floor_window": 6, "floor_sinks": 2} if floor else {}
    wanted = reference.token_sparse_attention(
        *wide, None if padding is None else args[4] != 0, scale=0.35, keep_ratio=0.2, window=4, pool=config.pool,
        min_tokens=1, reduce=config.score, sink_logits=args[3].double(), **scalars,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), wanted, rtol=2e-5, atol=2e-5)


def test_a_dense_kernel_that_is_named():
    args = (*longer(), sink(), None)
    function = attention_with(torch.finfo(torch.float32).min)
    graph, row, (out,) = rewritten(function, EXACT.replace(dense_kernel="sdpa"), *args)
    assert row.decision is Decision.KERNEL and [n for n in graph.graph.nodes if n.target is tsa.attend.default]
    torch.testing.assert_close(out, function(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [EXACT.replace(dense_kernel="mute"), SPARSE.replace(floor=None, kernel="mute")])
def test_a_kernel_without_a_log_sum_exp_is_not_asked_for_sinks(config):
    kernel = registry.get("sdpa")
    registry.register(registry.AttentionKernel("mute", lambda *rows: kernel.run(*rows), lambda request: None, priority=-50))
    try:
        args = (*longer(), sink(), None)
        function = attention_with(torch.finfo(torch.float32).min)
        with pytest.warns(TSAWarning) if config.kernel == "mute" else nullcontext():
            _, row, (out,) = rewritten(function, config, *args)
        assert (row.decision, row.reason) == (Decision.DENSE, Reason.KERNEL)
        torch.testing.assert_close(out, function(*args), rtol=1e-5, atol=1e-5)
    finally:
        registry.unregister("mute")
