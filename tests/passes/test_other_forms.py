"""Attention that no rewrite reads has a row with a reason, wherever it stands; and one call's trouble is its own."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from tsa_compile import Decision, KeepRatio, Reason, TSAConfig, tsa_backend
from tsa_compile.report import reports

from ..support import heads

ALL = TSAConfig(budget=KeepRatio(1.0), layers=["*"], window=3, min_tokens=1, min_length=1, compiler="eager")
L, LOW = 8, float("-inf")


def causal():
    return torch.arange(L) <= torch.arange(L)[:, None]


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal())


def written_out(q, k, v, between=lambda scores: scores):
    return torch.softmax(between(q @ k.mT * 0.3).masked_fill(~causal(), LOW), -1) @ v


def rows(function, *inputs, config=ALL):
    torch._dynamo.reset()
    with torch.no_grad():
        expected = function(*(tensor.clone() for tensor in inputs))
        result = torch.compile(function, backend=tsa_backend, options={"config": config})(*inputs)
    torch.testing.assert_close(result, expected, equal_nan=True)
    return [row for report in reports() for row in report.rows]


def qkv():
    return heads(kv_heads=4, length=L, head_dim=8)


@torch.library.custom_op("tsa_tests::some_attention", mutates_args=())
def some_attention(query: torch.Tensor) -> torch.Tensor:
    return query.clone()


some_attention.register_fake(torch.empty_like)
multihead = nn.MultiheadAttention(32, 4, batch_first=True).eval()
encoder = nn.TransformerEncoder(
    nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False
).eval()
triangle = nn.Transformer.generate_square_subsequent_mask(L)

FORMS = {
    "flex_attention": (lambda q, k, v: flex_attention(q, k, v, score_mod=lambda score, *_: score.tanh()), qkv),
    "checkpoint": (lambda q, k, v: checkpoint(plain, q, k, v, use_reentrant=False), qkv),
    "cond": (lambda q, k, v: torch.cond(q.sum() > 0, plain, lambda q, k, v: plain(q, k, v) + 1, (q, k, v)), qkv),
    "vmap": (lambda q, k, v: torch.vmap(lambda a, b, c: F.scaled_dot_product_attention(a, b, c))(q, k, v), qkv),
    "products by hand": (
        lambda q, k, v: (torch.softmax((q @ k.mT).masked_fill(~causal(), LOW), -1)[..., None] * v[:, :, None]).sum(3),
        qkv,
    ),
    "an operator of somebody": (lambda q, k, v: some_attention(q) + k + v, qkv),
    "MultiheadAttention": (
        lambda x: multihead(x, x, x, attn_mask=triangle, is_causal=True, need_weights=False)[0],
        lambda: (torch.randn(2, L, 32),),
    ),
    "TransformerEncoder": (lambda x: encoder(x, mask=triangle, is_causal=True), lambda: (torch.randn(2, L, 32),)),
}


@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore::tsa_compile.TSAWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", FORMS)
class TestForms:
    def test_a_row(self, name):
        function, inputs = FORMS[name]
        found = rows(function, *inputs())
        assert found
        for row in found:
            assert (row.decision, row.reason) == (Decision.UNCHANGED, Reason.UNSUPPORTED_FORM)
            assert row.detail

    def test_an_error_where_it_is_asked_for(self, name):
        function, inputs = FORMS[name]
        torch._dynamo.reset()
        with torch.no_grad(), pytest.raises(Exception, match="strict=True"):
            torch.compile(function, backend=tsa_backend, options={"config": ALL.replace(strict=True)})(*inputs())


@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore::tsa_compile.TSAWarning")
class TestOneCallAlone:
    """The second call is plain; what stands in the first one must not touch it."""

    @pytest.mark.parametrize(
        "first",
        [
            lambda q, k, v: written_out(q, k, v, lambda scores: scores / 0.0),
            lambda q, k, v: torch.vmap(lambda a, b, c: F.scaled_dot_product_attention(a, b, c))(q, k, v),
            lambda q, k, v: F.scaled_dot_product_attention(
                q,
                torch.repeat_interleave(input=k[:, :1], repeats=4, dim=1),
                torch.repeat_interleave(input=v[:, :1], repeats=4, dim=1),
            ),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=causal(), scale=-0.5),
        ],
        ids=["divided by zero", "vmap", "by name", "negative scale"],
    )
    def test_it_is_still_rewritten(self, first):
        def function(q, k, v):
            return plain(q + torch.nan_to_num(first(q, k, v)) * 0, k, v)

        assert rows(function, *qkv())[-1].decision is Decision.SPARSE


@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore::tsa_compile.TSAWarning")
@pytest.mark.parametrize("join", [torch.logical_xor, lambda m, p: torch.where(m, p, ~p)], ids=["xor", "where"])
def test_the_work_for_a_mask_is_bounded(join):
    def function(q, k, v, pad):
        mask = causal()
        for i in range(40):
            mask = join(mask, (pad == i)[:, None, None, :])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    began = time.perf_counter()
    (row,) = rows(function, *qkv(), torch.arange(L).repeat(2, 1), config=ALL.replace(layers=[]))
    assert row.reason is Reason.MASK_OPAQUE
    assert time.perf_counter() - began < 20  # half an hour once
