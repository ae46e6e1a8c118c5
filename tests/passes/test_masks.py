"""What each kind of mask is inferred to mean, with a near-miss beside each match.

Every mask is traced by Dynamo out of plain torch code, and whatever is inferred is also held against the real mask.
"""

import pytest
import sympy
import torch
import torch.nn.functional as F

from tsa_compile.passes.find import find_calls
from tsa_compile.passes.masks.infer import infer_mask
from tsa_compile.passes.masks.predicate import KV, Atoms, B, Q
from tsa_compile.passes.padding import PaddingBuilder
from tsa_compile.testing import capture_all, run_nodes

from .mask_spellings import (
    BATCH,
    CAUSAL,
    CAUSAL_PADDING,
    CAUSAL_SPELLINGS,
    CHUNKED,
    FILLED,
    FILLED_PADDING,
    HEADS,
    INF,
    LENGTH,
    NONE,
    OPAQUE,
    OPAQUE_MASKS,
    PACKED,
    PADDING,
    PADDING_FORMS,
    PADDING_NEAR_MISSES,
    SLIDING,
    Inferred,
    additive,
    behind_with_padding,
    causal,
    documents,
    expect,
    looked_up,
    padding_mask,
    positions,
)


class TestCausal:
    @pytest.mark.parametrize("name", CAUSAL_SPELLINGS)
    def test_spelling(self, name):
        expect(CAUSAL, CAUSAL_SPELLINGS[name][0])

    @pytest.mark.parametrize("name", CAUSAL_SPELLINGS)
    def test_near_miss(self, name):
        kind, build = CAUSAL_SPELLINGS[name][1]
        expect(kind, build)

    @pytest.mark.parametrize(
        "name", ["kv <= q", "tril", "triu of -inf", "one document", "offset positions", "counted positions"]
    )
    def test_symbolic_lengths(self, name):
        match, (kind, miss) = CAUSAL_SPELLINGS[name]
        result = expect(CAUSAL, match, dynamic=True)
        assert isinstance(result.call.query.meta["example_value"].shape[2], torch.SymInt)
        expect(kind, miss, dynamic=True)

    def test_is_causal_needs_no_mask(self):
        def attention(query):
            return F.scaled_dot_product_attention(query, query, query, is_causal=True)

        (graph,) = capture_all(attention, torch.randn(1, 2, 4, 8)).graphs
        assert infer_mask(find_calls(graph)[0]).kind is CAUSAL

    def test_no_mask_is_none(self):
        expect(NONE, lambda n, m, pad: None)

    def test_half_precision_positions_are_really_not_causal(self):
        # 2049 is 2048 in float16: a proof over the integers would be wrong from there on.
        rounded = torch.arange(2050).half()
        assert not torch.equal(rounded <= rounded[:, None], torch.ones(2050, 2050, dtype=torch.bool).tril())


class TestPadding:
    @pytest.mark.parametrize("form", PADDING_FORMS)
    def test_causal_and_padding(self, form):
        numbered = padding_mask(LENGTH) + F.one_hot(torch.tensor(5), LENGTH)
        result = expect(CAUSAL_PADDING, lambda n, m, pad: causal(n, m) & PADDING_FORMS[form](pad), pad=numbered)
        self.check_tensor(result)

    @pytest.mark.parametrize("form", ["!= 0", "bool", "not == 0"])
    def test_padding_alone(self, form):
        result = expect(PADDING, lambda n, m, pad: PADDING_FORMS[form](pad))
        self.check_tensor(result, is_causal=False)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_advanced_indexing(self, dynamic):
        self.check_tensor(expect(CAUSAL_PADDING, looked_up, dynamic=dynamic))

    def test_additive(self):
        def build(n, m, pad):
            return additive(causal(n, m)[None, None] & pad.bool()[:, None, None])

        self.check_tensor(expect(CAUSAL_PADDING, build))

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_part_of_a_larger_mask(self, dynamic):
        def build(n, m, pad, larger):
            return causal(n, m) & larger.bool()[1 : BATCH + 1, None, None, 2 : m + 2]

        larger = torch.randint(0, 2, (BATCH + 3, LENGTH + 5))
        self.check_tensor(expect(CAUSAL_PADDING, build, extra=(larger,), dynamic=dynamic))

    def test_transposed_mask(self):
        def build(n, m, pad, mask):
            return causal(n, m) & mask.t().bool()[:, None, None]

        self.check_tensor(expect(CAUSAL_PADDING, build, extra=(padding_mask(LENGTH).t().contiguous(),)))

    def test_one_mask_for_all_items(self):
        def build(n, m, pad, keys):
            return causal(n, m) & keys

        self.check_tensor(expect(CAUSAL_PADDING, build, extra=(torch.arange(LENGTH) % 3 > 0,)))

    def test_one_switch_per_item(self):
        def build(n, m, pad, switch):
            return causal(n, m) & switch[:, None, None, None]

        self.check_tensor(expect(CAUSAL_PADDING, build, extra=(torch.tensor([True, False]),)))

    def test_positions_as_padding(self):
        self.check_tensor(expect(CAUSAL_PADDING, lambda n, m, pad: causal(n, m) & (torch.arange(m) >= 2)))

    @pytest.mark.parametrize("name", PADDING_NEAR_MISSES)
    def test_near_miss(self, name):
        expect(OPAQUE, PADDING_NEAR_MISSES[name])

    def test_two_calls_share_one_tensor(self):
        def attention(query, pad):
            mask = causal(LENGTH, LENGTH) & pad.bool()[:, None, None]
            query = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
            return F.scaled_dot_product_attention(query, query, query, attn_mask=mask)

        (graph,) = capture_all(attention, torch.randn(BATCH, HEADS, LENGTH, 8), padding_mask(LENGTH)).graphs
        builder, nodes = PaddingBuilder(graph.graph), set()
        for call in find_calls(graph):
            with graph.graph.inserting_before(call.node):
                nodes.add(builder.padding(call, infer_mask(call)))
        assert len(nodes) == 1

    def check_tensor(self, result, is_causal=True):
        """The emitted tensor [B, L] says exactly what the mask says about keys, and no emitted node is wider."""
        graph = result.graph_module.graph
        before = set(graph.nodes)
        with graph.inserting_before(result.call.node):
            node = PaddingBuilder(graph).padding(result.call, result.mask)
        inputs = [result.values[placeholder.name] for placeholder in graph.nodes if placeholder.op == "placeholder"]
        values = run_nodes(result.graph_module, tuple(inputs))
        padding = values[node.name]
        assert padding.shape == (BATCH, LENGTH) and padding.dtype == torch.bool
        assert not padding.all(), "a test of padding needs some"
        expected = padding[:, None, None].expand_as(result.allowed)
        past = result.allowed.shape[3] - result.allowed.shape[2]
        assert torch.equal(result.allowed, expected.tril(past) if is_causal else expected)
        made = [values[new.name] for new in graph.nodes if new not in before]
        assert all(value.numel() <= BATCH * LENGTH for value in made if isinstance(value, torch.Tensor))


def near(n, m, window):
    """Not further than that before the query; what is behind it is near."""
    q, kv = positions(n, m)
    return q - kv < window


class TestOtherShapes:
    """Masks with a name of their own, which stay as the model wrote them."""

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_sliding_window(self, dynamic):
        def build(n, m, pad):
            q, kv = positions(n, m)
            return (kv <= q) & (q - kv < 4)

        result = expect(SLIDING, build, dynamic=dynamic)
        assert result.mask.detail == "kv <= q and kv >= q - 3"
        assert result.mask.window == 4 and result.mask.padding is None

    @pytest.mark.parametrize(
        "build, window",
        [
            (lambda n, m, pad: torch.ones(n, m, dtype=torch.bool).tril().triu(-2), 3),
            (lambda n, m, pad: causal(n, m) & ~torch.ones(n, m, dtype=torch.bool).tril(-5), 5),
            (lambda n, m, pad: causal(n, m) & (torch.arange(m) > torch.arange(n)[:, None] - 2), 2),
            (lambda n, m, pad: causal(n, m) & (torch.arange(m) >= torch.arange(n)[:, None]), 1),
            (lambda n, m, pad: additive(causal(n, m) & near(n, m, 4)), 4),
            (lambda n, m, pad: looked_up(n, m, pad) & near(n, m, 3), 3),
            (lambda n, m, pad: additive(looked_up(n, m, pad) & near(n, m, 3)), 3),
            # what is no causal window, or hides tokens in ways that the rewrite does not know
            (lambda n, m, pad: near(n, m, 3) & (torch.arange(m) - torch.arange(n)[:, None] < 3), None),
            (lambda n, m, pad: additive(looked_up(n, m, pad) & near(n, m, 3), -1e38), None),
            (lambda n, m, pad: additive(looked_up(n, m, pad), INF) + additive(near(n, m, 3)), None),
        ],
    )
    def test_how_many_tokens_a_window_has(self, build, window):
        result = expect(SLIDING, build) if window is not None else Inferred(build)
        assert result.mask.window == window
        if window is not None:
            seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(1 - window)
            valid = padding_mask(LENGTH).bool()[:, None, None] if result.mask.padding is not None else True
            assert torch.equal(result.allowed, (seen & valid).expand_as(result.allowed))

    def test_a_window_wider_than_any_length_is_causal(self):
        def build(n, m, pad):
            q, kv = positions(n, m)
            return (kv <= q) & (kv > q - 16)

        def mark(query, key, pad):
            for tensor, dim in ((query, 2), (key, 2), (pad, 1)):
                torch._dynamo.mark_dynamic(tensor, dim, min=2, max=limit)

        limit = 16
        expect(FILLED, build, mark=mark)  # query and key have a symbol each
        limit = 17
        expect(SLIDING, build, mark=mark)

    def test_window_and_padding(self):
        expect(SLIDING, lambda n, m, pad: looked_up(n, m, pad) & (torch.arange(m) > torch.arange(n)[:, None] - 4))

    def test_chunks(self):
        def build(n, m, pad):
            q, kv = positions(n, m)
            return (kv <= q) & (q // 4 == kv // 4)

        expect(CHUNKED, build)

    def test_packed(self):
        document = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1]])
        expect(PACKED, lambda n, m, pad, document: causal(n, m) & documents(n, m, document), extra=(document,))

    def test_packed_by_given_positions(self):
        def build(n, m, pad, ids):
            document = (torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
            return causal(n, m) & documents(n, m, document)

        ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
        expect(PACKED, build, extra=(ids,))

    @pytest.mark.parametrize("name", OPAQUE_MASKS)
    def test_opaque(self, name):
        expect(OPAQUE, OPAQUE_MASKS[name])

    def test_float_mask_from_outside(self):
        bias = torch.where(padding_mask(LENGTH).bool(), 0.0, INF)[:, None, None]
        expect(OPAQUE, lambda n, m, pad, bias: additive(causal(n, m)) + bias, extra=(bias,))

    def test_bool_mask_from_outside(self):
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        expect(OPAQUE, lambda n, m, pad, mask: mask, extra=(mask,))


class TestQueriesAndKeysOfOtherLengths:
    def test_upper_left(self):
        expect(FILLED, lambda n, m, pad: causal(n, m), length=4, keys=8)
        expect(FILLED_PADDING, looked_up, length=4, keys=8)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_lower_right(self, dynamic):
        def build(n, m, pad):
            return torch.arange(m) <= torch.arange(n)[:, None] + (m - n)

        result = expect(CAUSAL, build, length=4, keys=8, dynamic=dynamic)
        assert str(result.mask) == "causal (behind a cache)"
        TestPadding().check_tensor(expect(CAUSAL_PADDING, behind_with_padding, length=4, keys=8, dynamic=dynamic))

    @pytest.mark.parametrize("shift", [-1, 1])
    def test_lower_right_but_for_one(self, shift):
        expect(OPAQUE, lambda n, m, pad: torch.arange(m) <= torch.arange(n)[:, None] + (m - n + shift), length=4, keys=8)

    @pytest.mark.parametrize("keys", [4, 8])
    def test_positions_that_are_given_say_how_far_a_cache_is_filled(self, keys):
        at = torch.tensor([3, 0, -1, 9])

        def build(n, m, pad, at):
            return torch.arange(m) <= at[:, None]

        result = expect(FILLED, build, length=4, keys=keys, extra=(at,))
        assert result.mask.leaves[result.mask.positions].name == "l_extra_0_"
        expect(
            FILLED_PADDING,
            lambda n, m, pad, at: build(n, m, pad, at) & pad.bool()[:, None, None],
            length=4,
            keys=keys,
            extra=(at,),
        )

    def test_positions_of_another_type_are_not_read(self):
        at = torch.tensor([3, 0, 1, 2], dtype=torch.int32)
        expect(OPAQUE, lambda n, m, pad, at: torch.arange(m) <= at[:, None], length=4, keys=8, extra=(at,))

    @pytest.mark.parametrize(
        "build",
        [
            lambda n, m, pad, at: torch.arange(m) < at[:, None],
            lambda n, m, pad, at: torch.arange(m) >= at[:, None],
            lambda n, m, pad, at: torch.arange(m) + 1 <= at[:, None],
            lambda n, m, pad, at: torch.arange(m) * 2 <= at[:, None],
            lambda n, m, pad, at: (torch.arange(m) <= at[:, None]) & (torch.arange(m) <= at.flip(0)[:, None]),
            lambda n, m, pad, at: (torch.arange(m) <= at[:, None]) & causal(n, m),
        ],
        ids=["before", "from", "one more", "every second", "two", "and causal"],
    )
    def test_near_misses_of_given_positions(self, build):
        at = torch.tensor([3, 0, 9, 1])
        expect(OPAQUE, build, length=4, keys=8, extra=(at,))

    def test_sliding_window_behind_a_cache(self):
        def build(n, m, pad):
            q, kv = torch.arange(n)[:, None] + (m - n), torch.arange(m)
            return (kv <= q) & (kv > q - 3)

        mask = expect(SLIDING, build, length=4, keys=8).mask
        assert "q + 4 - 2" in mask.detail and mask.window == 3

    def test_lower_right_of_a_square_is_causal(self):
        expect(CAUSAL, lambda n, m, pad: torch.arange(m) <= torch.arange(n)[:, None] + (m - n))

    def test_one_query_sees_all_keys(self):
        expect(NONE, lambda n, m, pad: torch.arange(m) <= torch.arange(n)[:, None] + (m - n), length=1, keys=8)


@torch.library.custom_op("tsa_tests::tril", mutates_args=())
def tril(mask: torch.Tensor) -> torch.Tensor:
    """Of the same name as an operator of torch, but not the same."""
    return mask.tril(2)


@tril.register_fake
def _(mask):
    return torch.empty_like(mask)


@pytest.mark.parametrize("call", [tril, torch.ops.tsa_tests.tril], ids=["overload", "packet"])
def test_another_librarys_operators_are_not_torchs(call):
    expect(OPAQUE, lambda n, m, pad: call(torch.ones(n, m, dtype=torch.bool)))


class TestRowsWithoutKeys:
    """A padded row before the first valid key: zeros, the mean of all values, or neither."""

    def mean_rows(self, build, **options):
        return expect(CAUSAL_PADDING, build, **options).mask.mean_rows

    @staticmethod
    def padded(n, m, pad):
        return causal(n, m) & pad.bool()[:, None, None]

    def test_bool(self):
        assert self.mean_rows(self.padded) is False

    def test_minus_infinity(self):
        assert self.mean_rows(lambda n, m, pad: additive(self.padded(n, m, pad), INF)) is False

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lowest(self, dtype):
        low = torch.finfo(dtype).min
        assert self.mean_rows(lambda n, m, pad: additive(self.padded(n, m, pad), low, dtype), dtype=dtype) is True

    def test_float16_lowest_lets_scores_show(self):
        # -65504 + 40 is another float16 than -65504 + 4: such a row is a softmax of its scores.
        low = torch.finfo(torch.float16).min
        expect(OPAQUE, lambda n, m, pad: additive(self.padded(n, m, pad), low, torch.float16), dtype=torch.float16)
        expect(OPAQUE, lambda n, m, pad: additive(causal(n, m), low, torch.float16), dtype=torch.float16)
        assert not self.mean_rows(
            lambda n, m, pad: additive(self.padded(n, m, pad), INF, torch.float16), dtype=torch.float16
        )

    def test_two_masks_add_up(self):
        # The lowest number twice is -inf, so that such a row is the mean of some values only.
        expect(OPAQUE, lambda n, m, pad: additive(causal(n, m)) + additive(pad.bool()[:, None, None]))

    def test_two_masks_of_minus_infinity(self):
        assert not self.mean_rows(lambda n, m, pad: additive(causal(n, m), INF) + additive(pad.bool()[:, None, None], INF))


class TestAtoms:
    """Equal statements are equal symbols, opposite ones negations of each other."""

    @staticmethod
    def atoms(length=8):
        return Atoms({B: sympy.Integer(2), Q: sympy.Integer(length), KV: sympy.Integer(length)}, lambda expr: sympy.oo)

    def test_one_form(self):
        atoms = self.atoms()
        assert atoms.le(KV, Q) == atoms.lt(KV, Q + 1) == atoms.le(KV - Q, sympy.Integer(0)) == sympy.Not(atoms.lt(Q, KV))
        assert atoms.le(KV, Q) != atoms.lt(KV, Q)
        assert len(atoms.table) == 2
        assert atoms.eq(KV, Q) == atoms.eq(Q, KV)

    def test_bounds_fold(self):
        atoms = self.atoms()
        assert atoms.le(KV, Q + 7) == sympy.true
        assert atoms.le(KV, Q + 6) != sympy.true
        assert atoms.lt(KV, sympy.Integer(0)) == sympy.false
        assert atoms.eq(KV, sympy.Integer(8)) == sympy.false
        assert atoms.eq(KV, sympy.Integer(7)) not in (sympy.true, sympy.false)

    def test_shape_symbols_fold_by_their_range(self):
        length = sympy.Symbol("s0", integer=True, positive=True)
        sizes = {Q: length, KV: length}
        assert Atoms(sizes, lambda expr: sympy.oo).le(KV, Q + 15) != sympy.true
        assert Atoms(sizes, lambda expr: expr.subs(length, 16)).le(KV, Q + 15) == sympy.true

    def test_products_of_positions_do_not_fold(self):
        assert self.atoms().le(KV * Q, sympy.Integer(49)) not in (sympy.true, sympy.false)
        assert not self.atoms().never_positive(sympy.Function("x", integer=True)(KV))
