"""FlexAttention: its functions are read by what they say; what is not proven of them, or of its lists, stays as it was."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import StaticCache

from tsa_compile import Decision, KeepRatio, Reason, TSAConfig, reports, tsa_backend
from tsa_compile.passes.masks.info import MaskKind
from tsa_compile.passes.validate import Case
from tsa_compile.testing import capture_all

from ..support import chunks, difference, exhaustive_but, heads, mixed_padding, tiny, tokens

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore::tsa_compile.TSAWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]

L, PAST, BLOCK = 36, 60, 16
EXACT = TSAConfig(layers=(), compiler="eager")
ALL = TSAConfig(budget=KeepRatio(1.0), layers=["*"], window=3, min_tokens=1, min_length=1, compiler="eager")
PAD = mixed_padding(PAST + L, (3, -5)).bool()
DOCUMENTS = (torch.arange(PAST + L) // 9).expand(2, -1)
HOLES = torch.rand(PAST + L, PAST + L, generator=torch.Generator().manual_seed(0)) < 0.5


def attend(query, key, value, block_mask, **options):
    return flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True, **options)


def inputs(queries=L, keys=L):
    query, key, value = heads(length=keys, head_dim=16)
    return query[:, :, keys - queries :], key, value


def masked(mask_mod, queries=L, keys=L, by_head=None):
    return create_block_mask(mask_mod, 2, by_head, queries, keys, device="cpu", BLOCK_SIZE=BLOCK)


def ask_everywhere(queries, keys):
    """Lists by which the function is asked for every pair."""
    rows, columns = [(length + BLOCK - 1) // BLOCK for length in (queries, keys)]
    indices = torch.arange(columns, dtype=torch.int32).expand(1, 1, rows, columns).contiguous()
    return torch.full((1, 1, rows), columns, dtype=torch.int32), indices, None, None


def run(function, *args, config=EXACT, **options):
    """The one row of a compiled call, whose result is that of the call as it was."""
    with torch.no_grad():
        plain = function(*args)
        found = torch.compile(function, backend=tsa_backend, options={"config": config}, **options)(*args)
    torch.testing.assert_close(found, plain, atol=2e-6, rtol=1e-5)
    (row,) = reports()[-1]
    return row


def causal(b, h, q, kv):
    return q >= kv


READ = {
    "causal": (causal, MaskKind.CAUSAL),
    "the other way round": (lambda b, h, q, kv: ~(kv > q), MaskKind.CAUSAL),
    "said twice": (lambda b, h, q, kv: (kv <= q) & (q + 1 > kv) & (q >= 0), MaskKind.CAUSAL),
    "padded": (lambda b, h, q, kv: (kv <= q) & PAD[b, kv], MaskKind.CAUSAL_PADDING),
    "padded by numbers": (lambda b, h, q, kv: (kv <= q) & (PAD.long()[b, kv] != 0), MaskKind.CAUSAL_PADDING),
    "a window that is no window": (lambda b, h, q, kv: (kv <= q) & (q - kv < 100), MaskKind.CAUSAL),
}
KEPT = {
    "a window": (lambda b, h, q, kv: (kv <= q) & (q - kv < 7), Reason.SLIDING_WINDOW),
    "documents": (lambda b, h, q, kv: (kv <= q) & (DOCUMENTS[b, q] == DOCUMENTS[b, kv]), Reason.PACKED),
    "chunks": (lambda b, h, q, kv: (kv <= q) & (kv // 8 == q // 8), Reason.CHUNKED),
    "everything": (lambda b, h, q, kv: q == q, Reason.NOT_CAUSAL),
    "padding alone": (lambda b, h, q, kv: PAD[b, kv], Reason.NOT_CAUSAL),
    "a prefix": (lambda b, h, q, kv: (kv <= q) | (kv < 5), Reason.MASK_OPAQUE),
    "not itself": (lambda b, h, q, kv: (kv < q) | (q == 0), Reason.MASK_OPAQUE),
    "one ahead": (lambda b, h, q, kv: kv <= q + 1, Reason.MASK_OPAQUE),
    "one row ahead": (lambda b, h, q, kv: (kv <= q) | (q == 5), Reason.MASK_OPAQUE),
    "some heads": (lambda b, h, q, kv: (kv <= q) | (h == 1), Reason.MASK_OPAQUE),
    "some items": (lambda b, h, q, kv: (kv <= q) | (b == 1), Reason.MASK_OPAQUE),
    "padding of queries": (lambda b, h, q, kv: (kv <= q) & (PAD[b, q] | (q == kv)), Reason.MASK_OPAQUE),
    "a mask that is given": (lambda b, h, q, kv: (kv <= q) & HOLES[q, kv], Reason.MASK_OPAQUE),
    "not understood": (lambda b, h, q, kv: (kv <= q) & (torch.sin(q * 1.0) < 2), Reason.MASK_OPAQUE),
    "not understood of keys": (lambda b, h, q, kv: (kv <= q) & (torch.sin(kv * 1.0) < 0.9), Reason.MASK_OPAQUE),
    "remainders": (lambda b, h, q, kv: (kv <= q) & (kv % 3 != 2), Reason.MASK_OPAQUE),
    "numbers that wrap": (lambda b, h, q, kv: kv.to(torch.uint8) * 16 <= q * 16, Reason.MASK_OPAQUE),
}


class TestMaskFunctions:
    @pytest.mark.parametrize("name", READ)
    def test_read(self, name):
        function, kind = READ[name]
        row = run(attend, *inputs(), masked(function))
        assert (row.mask, row.form) == (kind, "flex")
        assert row.decision is (Decision.DENSE if kind is MaskKind.CAUSAL else Decision.DENSE_PADDED)

    @pytest.mark.parametrize("name", KEPT)
    def test_kept(self, name):
        function, reason = KEPT[name]
        row = run(attend, *inputs(), masked(function, by_head=4))
        assert (row.decision, row.reason) == (Decision.UNCHANGED, reason)

    @pytest.mark.parametrize("name", exhaustive_but(KEPT, "a window", "one ahead", "not understood of keys"))
    def test_kept_where_it_would_be_sparse(self, name):
        function, reason = KEPT[name]
        row = run(attend, *inputs(), masked(function, by_head=4), config=ALL)
        assert (row.decision, row.reason) == (Decision.UNCHANGED, reason)

    def test_sparse(self):
        assert run(attend, *inputs(), masked(causal), config=ALL).decision is Decision.SPARSE

    def test_none(self):
        row = run(lambda q, k, v: flex_attention(q, k, v, enable_gqa=True), *inputs())
        assert row.reason is Reason.NOT_CAUSAL

    @pytest.mark.parametrize("offset, kind", [(PAST, "behind a cache"), (PAST - 1, None), (PAST + 1, None), (-1, None)])
    def test_behind_a_cache(self, offset, kind):
        row = run(attend, *inputs(L, PAST + L), masked(lambda b, h, q, kv: kv <= q + offset, L, PAST + L))
        assert row.decision is (Decision.UNCHANGED if kind is None else Decision.DENSE)
        assert kind is None or kind in row.mask

    def test_at_a_number_that_is_told(self):
        """A number that the function captures, which is another one in the next call: also one that is no cache's."""

        def function(query, key, value, count):
            mask = BlockMask.from_kv_blocks(*ask_everywhere(L, PAST + L), BLOCK, told(count), seq_lengths=(L, PAST + L))
            return attend(query, key, value, mask)

        def told(count):
            return lambda b, h, q, kv: (kv <= q + count) & PAD[b, kv]

        compiled = torch.compile(function, backend=tsa_backend, options={"config": EXACT})
        for count in (1, 2, PAST, 7, 0, PAST + 9, -3):
            args = (*inputs(L, PAST + L), count)
            with torch.no_grad():
                torch.testing.assert_close(compiled(*args), function(*args), atol=2e-6, rtol=1e-5)
        assert "causal+padding (filled cache)" in reports()[-1].rows[0].mask
        assert len(reports()) < 5, "one graph for all numbers but those that Dynamo takes for constants"

    @pytest.mark.parametrize(
        "function",
        [lambda b, h, q, kv: (q >= kv) & ((q - kv).float() < 20), lambda b, h, q, kv: q.float() >= kv.float()],
    )
    def test_positions_as_floats(self, function):
        """What they give depends on the positions, and is no padding."""
        row = run(attend, *inputs(), masked(function))
        assert row.reason is Reason.MASK_OPAQUE and "written" not in row.detail

    def test_any_length(self):
        """Behind caches of any length, in one graph."""

        def function(new, past, pad):
            key = torch.cat([past, new], dim=2)
            queries, keys = new.shape[2], key.shape[2]

            def mask_mod(b, h, q, kv):
                return (kv <= q + keys - queries) & pad[b, kv]

            mask = BlockMask.from_kv_blocks(*ask_everywhere(queries, keys), BLOCK, mask_mod, seq_lengths=(queries, keys))
            return attend(new.repeat_interleave(2, dim=1), key, key, mask)

        compiled = torch.compile(function, backend=tsa_backend, options={"config": EXACT})
        for queries, keys in ((L, PAST), (L + 1, PAST + L), (L + 3, PAST + L - 2)):
            new, past = inputs(keys, keys)[1].split([queries, keys - queries], dim=2)
            args = (new.clone(), past.clone(), PAD[:, :keys].clone())
            for tensor, dim in zip(args, (2, 2, 1), strict=True):
                torch._dynamo.mark_dynamic(tensor, dim)
            with torch.no_grad():
                torch.testing.assert_close(compiled(*args), function(*args), atol=2e-6, rtol=1e-5)
        (report,) = reports()
        assert (report.rows[0].decision, report.rows[0].mask) == (Decision.DENSE_PADDED, "causal+padding (behind a cache)")

    def test_captured_and_written_to(self):
        """What a function captures is what it is where the call stands."""

        def function(query, key, value, pad):
            def mask():
                return BlockMask.from_kv_blocks(
                    *ask_everywhere(L, L), BLOCK, lambda b, h, q, kv: (kv <= q) & pad[b, kv], seq_lengths=(L, L)
                )

            first = attend(query, key, value, mask())
            pad.logical_not_()
            return first + attend(query, key, value, mask())

        pads = [PAD[:, :L].clone() for _ in range(2)]
        with torch.no_grad():
            plain = function(*inputs(), pads[0])
            found = torch.compile(function, backend=tsa_backend, options={"config": EXACT})(*inputs(), pads[1])
        torch.testing.assert_close(found, plain, atol=2e-6, rtol=1e-5)
        assert [row.reason for row in reports()[-1]] == [Reason.LAYER_NOT_SELECTED, Reason.MASK_OPAQUE]


SCORES = {
    "the score": (lambda score, b, h, q, kv: score, Decision.DENSE),
    "twice the score": (lambda score, b, h, q, kv: score * 2, Decision.DENSE),
    "scaled from both sides": (lambda score, b, h, q, kv: 0.5 * (score / 4.0), Decision.DENSE),
    "far and back": (lambda score, b, h, q, kv: score * 1e5 * 1e-5, Decision.UNCHANGED),
    "near and back": (lambda score, b, h, q, kv: score / 1e5 * 1e5, Decision.UNCHANGED),
    "less": (lambda score, b, h, q, kv: score * -1.0, Decision.UNCHANGED),
    "nothing": (lambda score, b, h, q, kv: score * 0.0, Decision.UNCHANGED),
    "a number more": (lambda score, b, h, q, kv: score + 1.0, Decision.UNCHANGED),
    "distances": (lambda score, b, h, q, kv: score - 0.1 * (q - kv), Decision.UNCHANGED),
    "by head": (lambda score, b, h, q, kv: score * torch.exp2(-h), Decision.UNCHANGED),
    "by a tensor": (lambda score, b, h, q, kv: score * HOLES[q, kv], Decision.UNCHANGED),
    "soft cap": (lambda score, b, h, q, kv: 5 * torch.tanh(score / 5), Decision.UNCHANGED),
    "a mask": (lambda score, b, h, q, kv: torch.where(kv < q, score, -float("inf")), Decision.UNCHANGED),
    "itself squared": (lambda score, b, h, q, kv: score * score, Decision.UNCHANGED),
    "rounded": (lambda score, b, h, q, kv: score.to(torch.int32) * 1.0, Decision.UNCHANGED),
}


@pytest.mark.parametrize("name", SCORES)
def test_score_functions(name):
    function, decision = SCORES[name]
    row = run(lambda *args: attend(*args, score_mod=function), *inputs(), masked(causal))
    assert row.decision is decision
    if decision is Decision.UNCHANGED:
        assert (row.reason, "score_mod" in row.detail) == (Reason.UNSUPPORTED_FORM, True)


def test_with_a_scale():
    assert run(lambda *args: attend(*args, scale=0.3), *inputs(), masked(causal)).decision is Decision.DENSE


def test_what_was_read_is_run_on_small_inputs(monkeypatch):
    """Validate does not skip these calls: what it needs to run them is read, the function's body too."""
    normal_form, seen = Case._normal_form, []

    def spy(self, *arguments, **named):
        seen.append(self)
        return normal_form(self, *arguments, **named)

    monkeypatch.setattr(Case, "_normal_form", spy)
    assert run(attend, *inputs(), masked(causal)).decision is Decision.DENSE
    assert seen


def test_what_else_it_returns_is_read():
    row = run(lambda *args: attend(*args, return_lse=True), *inputs(), masked(causal))
    assert row.reason is Reason.UNSUPPORTED_FORM and "besides its output" in row.detail


def test_what_else_it_returns_and_nobody_reads():
    """As transformers' models have it on a GPU: the log-sum-exp is asked for, converted and dropped."""

    def function(query, key, value, block_mask):
        out, lse = attend(query, key, value, block_mask, return_lse=True)
        lse.to(torch.float64).exp()
        return out

    graphs = []
    config = EXACT.replace(compiler=lambda graph_module, inputs: graphs.append(graph_module) or graph_module)
    assert run(function, *inputs(), masked(causal), config=config).decision is Decision.DENSE
    assert not any("flex_attention" in str(node.target) for node in graphs[0].graph.nodes), "what is dropped is not computed"


class TestLists:
    """A BlockMask made by hand: FlexAttention's kernel goes over its lists, whatever its function would allow."""

    LENGTH = 5 * BLOCK

    def fewer(self):
        """The sinks' block and the last two: a block-sparse method."""
        counts, indices = torch.zeros(1, 1, 5, dtype=torch.int32), torch.zeros(1, 1, 5, 5, dtype=torch.int32)
        for row in range(5):
            blocks = sorted({0, max(row - 1, 0), row})
            counts[0, 0, row] = len(blocks)
            indices[0, 0, row, : len(blocks)] = torch.tensor(blocks)
        return BlockMask.from_kv_blocks(counts, indices, None, None, BLOCK, causal)

    def expected(self, query, key, value, dense):
        q, kv = torch.arange(self.LENGTH)[:, None], torch.arange(self.LENGTH)
        near = (kv // BLOCK == 0) | (q // BLOCK - kv // BLOCK <= 1)
        allowed = (kv <= q) & (near | dense)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True)

    @pytest.mark.parametrize("config", [EXACT, ALL], ids=["exact", "sparse"])
    def test_fewer_blocks_than_the_function_allows(self, config):
        """One graph, for lists of either kind: they are numbers of the moment."""
        args = inputs(self.LENGTH, self.LENGTH)
        compiled = torch.compile(attend, backend=tsa_backend, options={"config": config})
        block_sparse = self.fewer()
        whole = BlockMask.from_kv_blocks(*ask_everywhere(self.LENGTH, self.LENGTH), BLOCK, causal)
        for block_mask, dense in ((whole, True), (block_sparse, False), (whole, True)):
            with torch.no_grad():
                found = compiled(*args, block_mask)
            torch.testing.assert_close(found, self.expected(*args, dense), atol=2e-6, rtol=1e-5)
        assert len(reports()) == 1

    def test_they_are_compared_once_for_all_layers(self):
        def function(query, key, value, block_mask):
            return attend(attend(query, key, value, block_mask), key, value, block_mask)

        graphs = []
        config = EXACT.replace(compiler=lambda graph_module, inputs: graphs.append(graph_module) or graph_module)
        with torch.no_grad():
            torch.compile(function, backend=tsa_backend, options={"config": config})(*inputs(), masked(causal))
        names = [str(node.target) for node in graphs[0].graph.nodes]
        assert [names.count(f"tsa.{name}.default") for name in ("listed", "as_listed_")] == [1, 2]
        assert not any("flex_attention" in name for name in names)


@pytest.fixture
def lists_in_eager_mode(monkeypatch):
    """transformers compiles the making of its lists, in a graph of its own, which takes most of a test's time."""

    @torch._dynamo.disable
    def made(_compile, **options):
        return create_block_mask(**options)

    monkeypatch.setattr("transformers.masking_utils.create_block_mask", made)


@pytest.mark.usefixtures("lists_in_eager_mode")
class TestModels:
    """Plain models by SDPA are what is expected: FlexAttention compiles its lists where it is not compiled itself."""

    def compiled(self, config=EXACT):
        return torch.compile(tiny("llama", "flex_attention", num_hidden_layers=2), backend="tsa", options={"config": config})

    def test_padded_prompts(self):
        ids, mask = tokens(2, 70), mixed_padding(70, (0, 9))
        with torch.no_grad():
            plain = tiny("llama", num_hidden_layers=2)(ids, attention_mask=mask).logits
            assert difference(self.compiled()(ids, attention_mask=mask).logits, plain, mask) < 1e-5
        assert [row.decision for report in reports() for row in report] == [Decision.DENSE_PADDED] * 2

    @pytest.mark.exhaustive
    def test_sparse_chunks(self):
        """As the same model by SDPA: the selection is of the same scores."""
        config = ALL.replace(layers=[0, 1], budget=KeepRatio(0.3), window=6)
        by_sdpa = torch.compile(tiny("llama", num_hidden_layers=2), backend="tsa", options={"config": config})
        found, ids = [], tokens(2, 120)
        for compiled in (by_sdpa, self.compiled(config)):
            found.append(chunks(compiled, ids, None, 40))
        assert difference(*found) < 1e-5
        assert {row.decision for report in reports() for row in report} == {Decision.SPARSE}

    @pytest.mark.exhaustive
    def test_a_static_cache(self, vectors):
        """Its mask function counts from a number that the cache moves on before it is asked, in transformers 5.24: whatever
        the model computes, it does."""
        found, ids = [], tokens(2, 40)
        for model in (tiny("llama", "flex_attention", num_hidden_layers=2), self.compiled()):
            cache = StaticCache(config=model.config, max_cache_len=64)
            with torch.no_grad():
                found += [model(ids[:, low : low + 20], past_key_values=cache).logits for low in (0, 20)]
        assert difference(torch.cat(found[:2], dim=1), torch.cat(found[2:], dim=1)) < 1e-5


def test_layers_share_what_their_function_says():
    """One value for all layers: the meaning is inferred once."""

    def function(query, key, value, block_mask):
        return attend(attend(query, key, value, block_mask), key, value, block_mask)

    from tsa_compile.passes.find import find_calls

    with torch.no_grad():
        captured = capture_all(function, *inputs(), masked(READ["padded"][0]))
    first, second = find_calls(captured.graphs[0])
    assert first.masks == second.masks
