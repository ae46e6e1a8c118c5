"""Every spelling of written-out attention reads into the normal form, and what only looks like it does not."""

import math

import pytest
import torch
import torch.nn.functional as F

from tsa_compile.pipeline import run_passes
from tsa_compile.reasons import Reason
from tsa_compile.testing import capture_all

from .call_reading import B, D, G, H, L, attention_of, bias, expect, inputs, lowest, read, repeat_kv, triangle
from .support import EXACT


def scores(q, k):
    return torch.matmul(q, k.transpose(2, 3)) * 0.35


EAGER_SPELLINGS = {
    "scale by mul": lambda q, k, v: (q @ k.transpose(-2, -1) * 0.35).softmax(-1) @ v,
    "scale by div": lambda q, k, v: F.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D), dim=-1).matmul(v),
    "scale from the left": lambda q, k, v: torch.softmax(0.35 * (q @ k.transpose(2, 3)), 3) @ v,
    "scale of the query": lambda q, k, v: ((q * 0.35) @ k.transpose(2, 3)).softmax(-1) @ v,
    "scale as a tensor": lambda q, k, v: ((q @ k.transpose(2, 3)) / torch.full([], 3.0)).softmax(-1) @ v,
    "scale of the queries' type": lambda q, k, v: ((q @ k.mT) * q.new_full([], 0.3)).softmax(-1) @ v,
    "scale as a tensor that is cast": lambda q, k, v: (
        ((q @ k.mT) / torch.full([], 3.0, dtype=torch.float64).to(q.dtype)).softmax(-1) @ v
    ),
    "two factors": lambda q, k, v: ((q @ k.transpose(2, 3)) * 0.5 / 2.0).softmax(-1) @ v,
    "softmax by name": lambda q, k, v: torch.matmul(F.softmax(input=scores(q, k), dim=-1), v),
    "linalg.matmul": lambda q, k, v: torch.linalg.matmul(torch.linalg.matmul(q, k.mT).softmax(-1), v),
    "no scale": lambda q, k, v: (q @ k.transpose(2, 3)).softmax(-1) @ v,
    "mT": lambda q, k, v: (q @ k.mT * 0.35).softmax(-1) @ v,
    "permuted key": lambda q, k, v: (q @ k.permute(0, 1, 3, 2) * 0.35).softmax(-1) @ v,
    "added mask": lambda q, k, v: (scores(q, k) + bias()).softmax(-1) @ v,
    "added from the left": lambda q, k, v: (bias() + scores(q, k)).softmax(-1) @ v,
    "torch.add": lambda q, k, v: torch.add(scores(q, k), bias()).softmax(-1) @ v,
    "masked_fill": lambda q, k, v: scores(q, k).masked_fill(~triangle(), lowest()).softmax(-1) @ v,
    "masked_fill with -inf": lambda q, k, v: scores(q, k).masked_fill(~triangle(), -math.inf).softmax(-1) @ v,
    "where": lambda q, k, v: torch.where(triangle(), scores(q, k), lowest()).softmax(-1) @ v,
    "where with a tensor": lambda q, k, v: torch.where(triangle(), scores(q, k), torch.full([], lowest())).softmax(-1) @ v,
    "where with the number first": lambda q, k, v: torch.where(~triangle(), lowest(), scores(q, k)).softmax(-1) @ v,
    "where with a tensor first": lambda q, k, v: (
        torch.where(~triangle(), torch.full([], -math.inf), scores(q, k)).softmax(-1) @ v
    ),
    "where and an added mask": lambda q, k, v: (torch.where(triangle(), scores(q, k), lowest()) + bias()).softmax(-1) @ v,
    "added in place": lambda q, k, v: scores(q, k).add_(bias()).softmax(-1) @ v,
    "filled in place": lambda q, k, v: scores(q, k).masked_fill_(~triangle(), lowest()).softmax(-1) @ v,
    "scaled in place": lambda q, k, v: (q @ k.mT).mul_(0.35).softmax(-1) @ v,
    "method where": lambda q, k, v: scores(q, k).where(triangle(), -math.inf).softmax(-1) @ v,
    "softmax with axis": lambda q, k, v: torch.softmax(scores(q, k), axis=-1) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.35 + bias()).softmax(-1), v
    ),
    "bmm": lambda q, k, v: torch.bmm(
        (torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(B, H, L, L) + bias()).softmax(-1).flatten(0, 1), v.flatten(0, 1)
    ),
    "baddbmm": lambda q, k, v: torch.bmm(
        torch.baddbmm(bias(), q.flatten(0, 1), k.reshape(-1, L, D).transpose(1, 2), alpha=0.35).softmax(-1), v.flatten(0, 1)
    ),
    "scale in bfloat16": lambda q, k, v: ((q @ k.mT) * torch.tensor(0.31, dtype=torch.bfloat16)).softmax(-1) @ v,
    "two added masks": lambda q, k, v: (scores(q, k) + bias() + bias()).softmax(-1) @ v,
    "float32 softmax": lambda q, k, v: F.softmax(scores(q, k) + bias(), dim=-1, dtype=torch.float32).to(q.dtype) @ v,
    "cast around softmax": lambda q, k, v: F.softmax((scores(q, k) + bias()).float(), -1).type_as(q) @ v,
    "dropout of zero": lambda q, k, v: F.dropout(scores(q, k).softmax(-1), p=0.0, training=True) @ v,
    "dropout in evaluation": lambda q, k, v: F.dropout(scores(q, k).softmax(-1), p=0.5, training=False) @ v,
    "contiguous": lambda q, k, v: scores(q, k).contiguous().softmax(-1) @ v,
    "returned transposed": lambda q, k, v: (scores(q, k).softmax(-1) @ v).transpose(1, 2).contiguous(),
}

# (what is wrong, the call): each is one step away from a spelling above.
EAGER_NEAR_MISSES = {
    "softmax over the queries": lambda q, k, v: (scores(q, k) + bias()).softmax(-2) @ v,
    "weights are returned too": lambda q, k, v: ((w := (scores(q, k) + bias()).softmax(-1)) @ v, w),
    "scores are returned too": lambda q, k, v: ((s := scores(q, k) + bias()).softmax(-1) @ v, s),
    "tanh soft cap": lambda q, k, v: (torch.tanh(scores(q, k) / 5) * 5 + bias()).softmax(-1) @ v,
    "tanh soft cap after the mask": lambda q, k, v: torch.tanh(scores(q, k) + bias()).softmax(-1) @ v,
    "sink column": lambda q, k, v: torch.cat([scores(q, k), q[..., :1]], -1).softmax(-1)[..., :-1] @ v,
    "mask is scaled too": lambda q, k, v: ((q @ k.transpose(2, 3) + bias()) * 0.35).softmax(-1) @ v,
    "filled scores are scaled": lambda q, k, v: ((q @ k.mT).masked_fill(~triangle(), lowest()) * 0.35).softmax(-1) @ v,
    "filled scores are doubled and halved": lambda q, k, v: (
        ((q @ k.mT).masked_fill(~triangle(), lowest()) * 2 * 0.5).softmax(-1) @ v
    ),
    "scores that are 0 in between": lambda q, k, v: (q @ k.mT * 1e-30 * 1e-30 * 1e30 * 1e30).softmax(-1) @ v,
    "mask of items and heads in one": lambda q, k, v: (
        ((q.flatten(0, 1) @ k.flatten(0, 1).mT).view(B * H, 1, L, L) + bias().expand(B * H, 1, L, L)).squeeze(1).softmax(-1)
        @ v.flatten(0, 1)
    ),
    "key of all items": lambda q, k, v: (q[:, :B] @ k[:, :1].squeeze(1).mT).softmax(-1) @ v[:, :B],
    "value of all items": lambda q, k, v: (q[:, :B] @ k[:, :B].mT).softmax(-1) @ v[:, :1].squeeze(1),
    "other heads in the weights": lambda q, k, v: (
        (q.flatten(0, 1) @ k.flatten(0, 1).mT).view(H, B, L, L).softmax(-1) @ v.view(H, B, L, D)
    ),
    "scale per head": lambda q, k, v: (q @ k.mT * torch.arange(1.0, H + 1)[:, None, None]).softmax(-1) @ v,
    "floor division": lambda q, k, v: torch.div(q @ k.mT, 0.25, rounding_mode="floor").softmax(-1) @ v,
    "add with alpha": lambda q, k, v: torch.add(scores(q, k), bias(), alpha=2).softmax(-1) @ v,
    "added number": lambda q, k, v: (scores(q, k) + 1.0).softmax(-1) @ v,
    "squared scores": lambda q, k, v: ((s := q @ k.mT) * s).softmax(-1) @ v,
    "weights are scaled": lambda q, k, v: (scores(q, k).softmax(-1) * 2.0) @ v,
    "weights are masked": lambda q, k, v: (scores(q, k).softmax(-1) * triangle()) @ v,
    "weights are renormalised": lambda q, k, v: ((w := scores(q, k).softmax(-1)) / w.sum(-1, keepdim=True)) @ v,
    "key is not transposed": lambda q, k, v: (q @ k.reshape(B, H, D, L)).softmax(-1) @ v,
    "weights are permuted": lambda q, k, v: scores(q, k).softmax(-1)[..., torch.arange(L - 1, -1, -1)] @ v,
    "weights of other heads": lambda q, k, v: scores(q, k).softmax(-1)[:, [1, 0, 3, 2]] @ v,
    "weights of other items": lambda q, k, v: scores(q, k).softmax(-1)[torch.tensor([1, 0])] @ v,
    "weights in another order": lambda q, k, v: scores(q, k).softmax(-1).transpose(0, 1).reshape(B, H, L, L) @ v,
    "weights through float8": lambda q, k, v: scores(q, k).softmax(-1).to(torch.float8_e4m3fn).float() @ v,
    "scores through float8": lambda q, k, v: scores(q, k).to(torch.float8_e4m3fn).float().softmax(-1) @ v,
    "two dropouts": lambda q, k, v: F.dropout(F.dropout(scores(q, k).softmax(-1).mT, 0.0).mT, 0.5, False) @ v,
    "einsum of other layout": lambda q, k, v: torch.einsum("bhqd,bhkd->bhkq", q, k).softmax(-1) @ v,
    "einsum over queries": lambda q, k, v: torch.einsum("bhkq,bhkd->bhqd", scores(q, k).softmax(-1), v),
    "added to the output": lambda q, k, v: torch.baddbmm(
        v.flatten(0, 1), scores(q, k).softmax(-1).flatten(0, 1), v.flatten(0, 1)
    ),
    "products by hand": lambda q, k, v: (scores(q, k).softmax(-1)[..., None] * v[:, :, None]).sum(3),
    "heads are reversed": lambda q, k, v: (q @ k.flip(1).transpose(2, 3)).softmax(-1).flip(1) @ v,
    "scores are rounded": lambda q, k, v: F.softmax(scores(q, k).int(), -1, dtype=torch.float32) @ v,
    "log_softmax": lambda q, k, v: F.log_softmax(scores(q, k), -1) @ v,
    "sigmoid": lambda q, k, v: scores(q, k).sigmoid() @ v,
    "relu of weights": lambda q, k, v: F.relu(scores(q, k).softmax(-1) - 0.1) @ v,
    "rolled scores": lambda q, k, v: (scores(q, k).roll(1, -1) + bias()).softmax(-1) @ v,
    "filled with a tensor": lambda q, k, v: torch.where(triangle(), scores(q, k), q[..., :1]).softmax(-1) @ v,
    "negated": lambda q, k, v: (-scores(q, k)).softmax(-1) @ v,
    "subtracted mask": lambda q, k, v: (scores(q, k) - bias()).softmax(-1) @ v,
    "soft cap behind the mask": lambda q, k, v: (bias() + 30 * torch.tanh(scores(q, k) / 30)).softmax(-1) @ v,
    "special softmax": lambda q, k, v: torch.special.softmax(scores(q, k), -1) @ v,
    "added to the query": lambda q, k, v: torch.bmm(
        q[..., :L].flatten(0, 1).clone().baddbmm_(k[..., :L].flatten(0, 1).mT, v[..., :L].flatten(0, 1)).softmax(-1),
        v.flatten(0, 1),
    ),
    "query of width 1": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q[..., :1], k).softmax(-1), v
    ),
    "key of width 1": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k[..., :1]).softmax(-1), v
    ),
}

# No softmax over the keys of a product.
NO_ATTENTION = {"softmax over the queries", "log_softmax", "sigmoid"}


class TestEager:
    @pytest.mark.parametrize("name", EAGER_SPELLINGS)
    def test_spelling(self, name):
        expect(EAGER_SPELLINGS[name], *inputs(), form="eager")

    @pytest.mark.parametrize("name", EAGER_NEAR_MISSES)
    def test_near_miss(self, name):
        """Attention with a reason why it stays; or none at all where the weights are no plain softmax over the keys."""
        _, calls, _ = read(EAGER_NEAR_MISSES[name], *inputs())
        assert len(calls) == (0 if name in NO_ATTENTION else 1)
        for call in calls:
            assert call.problem is not None and call.problem[0] is Reason.UNSUPPORTED_FORM

    def test_where_says_by_its_order_what_is_hidden(self):
        seen, hidden = (
            lambda q, k, v: torch.where(triangle(), scores(q, k), lowest()).softmax(-1) @ v,
            lambda q, k, v: torch.where(triangle(), lowest(), scores(q, k)).softmax(-1) @ v,
        )
        assert [read(each, *inputs())[1][0].masks[0].role for each in (seen, hidden)] == ["keep", "drop"]

    @pytest.mark.parametrize("dtype, read_as_one", [(torch.float16, False), (torch.bfloat16, True), (torch.float32, True)])
    def test_scores_that_grow_before_they_shrink(self, dtype, read_as_one):
        """Scores in float16 may be infinite in between."""
        _, (call,), _ = read(lambda q, k, v: (q @ k.mT * 9000 / 9000).softmax(-1) @ v, *(x.to(dtype) for x in inputs()))
        assert (call.problem is None) == read_as_one

    @torch._dynamo.config.patch(capture_scalar_outputs=True)
    def test_a_length_that_is_known_later(self):
        def attention(q, k, v, number):
            length = number.sum().item()
            torch._check(length >= 0)
            torch._check(length <= q.shape[2])
            q, k, v = (x[:, :, :length] for x in (q, k, v))
            seen = torch.arange(length)[None] <= torch.arange(length)[:, None]
            return scores(q, k).masked_fill(~seen, float("-inf")).softmax(-1) @ v

        graph = capture_all(attention, *inputs(), torch.ones(5, dtype=torch.long)).graphs[0]
        row = run_passes(graph, EXACT).rows[0]
        assert row.reason is Reason.LENGTH_UNKNOWN

    @pytest.mark.parametrize("name", ["added mask", "masked_fill", "where", "dropout in evaluation"])
    def test_exported(self, name):
        expect(EAGER_SPELLINGS[name], *inputs(), form="eager", export=True)

    @pytest.mark.parametrize("name", ["added mask", "where and an added mask", "scale of the query"])
    def test_symbolic_sizes(self, name):
        expect(EAGER_SPELLINGS[name], *inputs(), form="eager", dynamic=True)

    def test_scale_node(self):
        def attention(q, k, v):
            return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias()).softmax(-1) @ v

        call = expect(attention, *inputs(), form="eager", dynamic=True)
        assert isinstance(call.scale, (float, torch.fx.Node))

    def test_repeated_heads_are_peeled(self):
        def attention(q, k, v):
            k, v = repeat_kv(k, 2), repeat_kv(v, 2)
            return (scores(q, k) + bias()).softmax(-1) @ v

        expect(attention, *inputs(kv_heads=G), form="eager", peeled=True)

    def test_dropout_is_kept(self):
        def attention(q, k, v):
            return F.dropout(scores(q, k).softmax(-1), 0.5) @ v

        _, (call,), _ = read(attention, *inputs())
        assert call.dropout == 0.5

    @pytest.mark.parametrize("target", range(3), ids=["query", "key", "value"])
    def test_operand_is_written_to_in_between(self, target):
        def attention(*qkv):
            q, k, v = (x.clone() for x in qkv)
            weights = scores(q, k).softmax(-1)
            (q, k, v)[target].mul_(2)
            return weights @ v

        _, (call,), values = read(attention, *inputs())
        if call.problem is None:
            torch.testing.assert_close(attention_of(call, values), values[call.node.name])

    def test_dropped_twice(self):
        def attention(q, k, v):
            return F.dropout(F.dropout(scores(q, k).softmax(-1), 0.5), 0.0, False) @ v

        _, (call,), _ = read(attention, *inputs())
        assert call.dropout == 0.5

    def test_three_dimensions_are_not_rewritten(self):
        q, k, v = (x.flatten(0, 1) for x in inputs())
        _, (call,), _ = read(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, q, k, v)
        assert call.problem is not None and call.problem[0] is Reason.UNSUPPORTED_FORM

    def test_two_products_without_softmax_are_no_call(self):
        assert read(lambda q, k, v: (q @ k.mT) @ v, *inputs())[1] == []
