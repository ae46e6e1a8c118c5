"""Which calls are planned sparse, which dense, and with which reason code."""

import pytest
import torch
from torch import nn

from tsa_compile.config import Coverage, KeepRatio, TSAConfig
from tsa_compile.errors import ConfigError, KernelError, TSAWarning
from tsa_compile.export.program import PlanExported
from tsa_compile.passes.find import FindCalls
from tsa_compile.passes.masks.infer import InferMasks
from tsa_compile.pipeline import WHOLE, run_passes
from tsa_compile.reasons import Decision, Reason
from tsa_compile.testing import capture, capture_all

from .stacks import SPARSE, Layer, Stack, masked, rows, sparse_layers


@pytest.mark.filterwarnings("ignore:no attention call")
def test_a_symbolic_head_size_stays_dense():
    """A kernel cannot be asked about a head size that is not known."""
    (row,) = rows(Stack(1), SPARSE, dynamic=True)
    assert (row.decision, row.reason) == (Decision.DENSE, Reason.HEAD_DIM)


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (2, [1]), (3, [1, 2]), (4, [2, 3]), (5, [2, 3, 4])])
def test_the_upper_half_is_sparse_by_default(count, expected):
    assert sparse_layers(Stack(count), SPARSE) == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [([0], [0]), ([0, 2], [0, 2]), (["layers.1"], [1]), (["layers.[12]"], [1, 2]), (["*"], [0, 1, 2])],
)
def test_layers_are_chosen_by_number_or_by_name(layers, expected):
    assert sparse_layers(Stack(3), SPARSE.replace(layers=layers)) == expected


@pytest.mark.parametrize("layers", [[3], [0, 99], ["decoder.*"], ["layers.0", "layers.7"]])
def test_a_layer_that_does_not_exist_is_said_with_those_that_do(layers):
    """A warning: a stage of a pipeline is given the numbers of other stages too."""
    with pytest.warns(TSAWarning, match=r"layers=.*not found.*0\.\.1 \(layers\.\*\)"):
        rows(Stack(2), SPARSE.replace(layers=layers))


def test_no_layers_means_exact():
    assert {row.decision for row in rows(Stack(2), SPARSE.replace(layers=[]))} == {Decision.DENSE}


def test_part_of_a_model_leaves_the_default_layers_unknown():
    class Broken(Stack):
        def forward(self, hidden):
            hidden = self.layers[1](self.layers[0](hidden))
            torch._dynamo.graph_break()
            return self.layers[3](self.layers[2](hidden))

    first, second = capture_all(Broken(4), torch.randn(1, 32, 32)).graphs
    with pytest.warns(match="LAYER_COUNT_UNKNOWN"):
        report = run_passes(first, SPARSE)
    assert {row.reason for row in report} == {Reason.LAYER_COUNT_UNKNOWN}
    assert [row.layer_index for row in run_passes(second, SPARSE).sparse_calls] == [2, 3]


def test_a_layer_compiled_by_itself_does_not_know_where_it_stands():
    with pytest.warns(match="LAYER_COUNT_UNKNOWN"):
        (row,) = rows(Layer(), SPARSE)
    assert (row.decision, row.reason) == (Decision.DENSE, Reason.LAYER_COUNT_UNKNOWN)
    (row,) = rows(Layer(), SPARSE.replace(layers=["*"]))
    assert row.decision is Decision.SPARSE


def test_explicit_layers_of_another_graph_are_no_error():
    class Broken(Stack):
        def forward(self, hidden):
            hidden = self.layers[0](hidden)
            torch._dynamo.graph_break()
            return self.layers[1](hidden)

    first, second = capture_all(Broken(2), torch.randn(1, 32, 32)).graphs
    assert not run_passes(first, SPARSE.replace(layers=[1])).sparse_calls
    assert [row.layer_index for row in run_passes(second, SPARSE.replace(layers=[1])).sparse_calls] == [1]


@pytest.mark.parametrize(
    ("config", "length", "reason"),
    [
        (SPARSE, 32, Reason.SPARSE),
        (SPARSE, 9, Reason.SPARSE),
        (SPARSE, 8, Reason.TOO_SHORT),  # min_tokens + window: nothing can be dropped
        (SPARSE.replace(min_length=32), 32, Reason.SPARSE),
        (SPARSE.replace(min_length=33), 32, Reason.TOO_SHORT),
        (TSAConfig(), 1024, Reason.TOO_SHORT),
        (TSAConfig(budget=Coverage(0.0), min_tokens=0, window=1), 2, Reason.SPARSE),
    ],
)
@pytest.mark.filterwarnings("ignore:no attention call")
def test_the_length_decides(config, length, reason):
    (row,) = rows(Stack(1), config, length=length)
    assert row.reason is reason
    assert row.decision is (Decision.SPARSE if reason is Reason.SPARSE else Decision.DENSE)


@pytest.mark.filterwarnings("ignore:no attention call")
@pytest.mark.parametrize(
    ("options", "call", "reason"),
    [
        ({"dropout_p": 0.1}, {}, Reason.DROPOUT),
        ({"is_causal": False}, {}, Reason.NOT_CAUSAL),
        ({}, {"grad": True}, Reason.NEEDS_GRAD),
    ],
)
def test_what_is_not_safe_stays_as_written(options, call, reason):
    (row,) = rows(Stack(1, **options), SPARSE, **call)
    assert (row.decision, row.reason) == (Decision.UNCHANGED, reason)


@pytest.mark.filterwarnings("ignore:no attention call")
@pytest.mark.parametrize(
    ("call", "reason"),
    [({"dtype": torch.float64}, Reason.DTYPE), ({"width": 2 * 520}, Reason.HEAD_DIM), ({"width": 2 * 512}, Reason.SPARSE)],
)
def test_what_the_kernels_cannot_take_is_dense_all_the_same(call, reason):
    (row,) = rows(Stack(1), SPARSE, **call)
    assert row.reason is reason


@pytest.mark.filterwarnings("ignore:no attention call")
@pytest.mark.parametrize(
    ("grad", "causal", "reason"),
    [(True, True, Reason.NEEDS_GRAD), (False, True, Reason.SPARSE), (False, False, Reason.NOT_CAUSAL)],
)
def test_a_view_of_a_parameter_needs_a_gradient_where_one_is_computed(grad, causal, reason):
    """Under no_grad its fake says that it needs one all the same."""

    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys = nn.Parameter(torch.randn(1, 2, 32, 8))

        def forward(self, query):
            keys = self.keys.expand(2, -1, -1, -1)
            return nn.functional.scaled_dot_product_attention(query, keys, keys, is_causal=causal)

    graph = capture(Learned(), torch.randn(2, 2, 32, 8), grad=grad)
    assert run_passes(graph, SPARSE.replace(layers=["*"])).rows[0].reason is reason


def test_cross_attention_is_not_self_attention():
    def cross(query, key):
        return nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True)

    graph = capture(cross, torch.randn(1, 2, 16, 8), torch.randn(1, 2, 32, 8))
    (row,) = run_passes(graph, SPARSE.replace(layers=[0])).rows
    assert (row.decision, row.reason) == (Decision.UNCHANGED, Reason.NOT_SELF_ATTENTION)


def test_a_selected_layer_that_stays_dense_beside_sparse_ones_is_said():
    def two(x, given):
        positions = torch.arange(32)
        return masked(x, x, positions <= positions[:, None]) + masked(x, x, given)

    graph = capture(two, torch.randn(1, 2, 32, 8), torch.ones(32, 32).tril().bool())
    with pytest.warns(TSAWarning, match="1 of the 2 attention calls of this graph stay dense .* MASK_OPAQUE"):
        report = run_passes(graph, SPARSE.replace(layers=["*"]))
    assert report.sparse == 1


@pytest.mark.parametrize("queries, said", [(1, False), (3, False), (32, True)])
def test_only_a_prefill_warns(queries, said, recwarn):
    """A form that nobody reads, of one query, of a few and of many."""

    def attention(query, key):
        scores = (query @ key.transpose(-1, -2)).tanh()  # a soft cap
        return scores.softmax(-1) @ key

    report = run_passes(
        capture(attention, torch.randn(1, 2, queries, 8), torch.randn(1, 2, 32, 8)), SPARSE.replace(layers=["*"])
    )
    assert report.rows[0].reason is Reason.UNSUPPORTED_FORM
    assert bool(recwarn.list) is said and report.is_prefill is (queries > 1)


class TestWhereAMaskComesFrom:
    def plan(self, function, *inputs):
        with pytest.warns(TSAWarning):
            (row,) = run_passes(capture(function, *inputs), SPARSE.replace(layers=["*"])).rows
        return row.reason, row.detail

    @pytest.mark.parametrize("form", [lambda mask: mask, lambda mask: mask[:, :, :, :32].to(torch.float32)])
    def test_an_input_is_said_to_be_one(self, form):
        def given(x, mask):
            return masked(x, x, form(mask))

        reason, detail = self.plan(given, torch.randn(1, 2, 32, 8), torch.zeros(1, 1, 32, 32))
        assert reason is Reason.MASK_OPAQUE and "input of this graph" in detail

    def test_one_that_is_built_inside_is_not(self):
        def built(x, bias):
            triangle = torch.arange(32) <= torch.arange(32)[:, None]
            return masked(x, x, torch.zeros(32, 32).masked_fill(~triangle, float("-inf")) + bias[:, None, None, :])

        reason, detail = self.plan(built, torch.randn(1, 2, 32, 8), torch.randn(1, 32))
        assert reason is Reason.MASK_OPAQUE and "input of this graph" not in detail

    def test_packed_sequences_name_what_they_are_read_from(self):
        def packed(x, position_ids):
            document = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
            causal = torch.arange(32) <= torch.arange(32)[:, None]
            return masked(x, x, (causal & (document[:, None, :] == document[:, :, None]))[:, None])

        reason, detail = self.plan(packed, torch.randn(1, 2, 32, 8), torch.arange(32)[None])
        assert (reason, detail) == (Reason.PACKED, "computed from position_ids")


def hidden_by_rows(at, ids):
    hidden = torch.zeros(2, 32, dtype=torch.bool)
    for item in range(2):
        hidden[item] = ids[item] == 0
    return hidden


def hidden_by_a_view(at, ids):
    hidden = torch.zeros(2, 32, dtype=torch.bool)
    hidden.view(-1).masked_fill_((ids == 0).view(-1), True)
    return hidden


def hidden_by_items(at, ids):
    return torch.vmap(lambda count: at >= count)(ids.sum(-1))


class TestKeysThatAMaskHides:
    def plan(self, hides, config=SPARSE):
        def attention(x, ids):
            causal = torch.arange(32) <= torch.arange(32)[:, None]
            return masked(x, x, causal & ~hides(torch.arange(32), ids)[:, None, None, :])

        graph = capture(attention, torch.randn(2, 2, 32, 8), torch.ones(2, 32))
        (row,) = run_passes(graph, config.replace(layers=["*"])).rows
        return row.decision, row.reason

    def test_what_an_input_says_is_padding(self):
        assert self.plan(lambda at, ids: ids == 0) == (Decision.SPARSE, Reason.SPARSE)

    @pytest.mark.filterwarnings("ignore:no attention call")
    @pytest.mark.parametrize("config", [SPARSE, SPARSE.replace(dense_kernel="sdpa")])
    @pytest.mark.parametrize(
        "hides",
        [lambda at, ids: (at % 4 == 1)[None], lambda at, ids: (at == 3)[None], lambda at, ids: (ids == 0) | (at == 3)],
    )
    def test_tokens_at_fixed_positions_have_rows_of_their_own(self, hides, config):
        """Every fourth token is hidden, say, and still looks at the others: a sparse layer would make its row 0."""
        assert self.plan(hides, config) == (Decision.DENSE_PADDED, Reason.MASK_FIXED)

    @pytest.mark.parametrize("hides", [hidden_by_rows, hidden_by_a_view, hidden_by_items])
    def test_what_an_input_says_may_be_written_into_a_mask(self, hides):
        assert self.plan(hides) == (Decision.SPARSE, Reason.SPARSE)

    @pytest.mark.filterwarnings("ignore:no attention call")
    def test_a_mask_into_which_a_constant_is_written_hides_fixed_positions(self):
        def hides(at, ids):
            hidden = torch.zeros(ids.shape, dtype=torch.bool)
            hidden[:, 3] = True
            return hidden

        assert self.plan(hides) == (Decision.DENSE_PADDED, Reason.MASK_FIXED)

    @pytest.mark.filterwarnings("ignore:no attention call")
    @pytest.mark.parametrize(
        ("past", "sees", "reason"),
        [
            (0, lambda at: at < 32, Reason.SPARSE),  # the rest of a static cache, which no query sees either way
            (0, lambda at: at < 31, Reason.MASK_FIXED),
            (16, lambda at: at >= 16, Reason.SPARSE),  # tokens in a cache, whose rows are not asked for
            (16, lambda at: at >= 17, Reason.MASK_FIXED),
        ],
    )
    def test_keys_that_are_no_querys_own_may_be_hidden(self, past, sees, reason):
        def attention(query, key):
            at = torch.arange(48)
            return masked(query, key, (at <= torch.arange(32)[:, None] + past) & sees(at))

        graph = capture(attention, torch.randn(2, 2, 32, 8), torch.randn(2, 2, 48, 8))
        assert run_passes(graph, SPARSE.replace(layers=["*"])).rows[0].reason is reason


def test_a_graph_without_causal_attention_is_no_miss(recwarn):
    """A vision tower beside the language model, which Dynamo compiles by itself."""
    for layers in (None, ["*"]):
        assert {row.reason for row in rows(Stack(2, is_causal=False), SPARSE.replace(layers=layers))} == {Reason.NOT_CAUSAL}
    assert not [warning for warning in recwarn if issubclass(warning.category, TSAWarning)]


class TestTensorParallel:
    """Each device has some of the heads; Coverage decides by the mean over all of them."""

    @pytest.fixture(autouse=True)
    def group(self, tmp_path):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()

    class Parallel(Stack):
        """What is summed: the heads' outputs by their weights, or, as nobody would, the residual with them."""

        def __init__(self, count, how="sum", residual=False):
            super().__init__(count, residual=residual)
            self.how = how
            self.weight, self.gate = nn.Parameter(torch.eye(32)), nn.Linear(32, 32)

        def forward(self, hidden):
            for layer in self.layers:
                out = (layer(hidden) * self.gate(hidden).sigmoid()) @ self.weight.T
                out = torch.distributed._functional_collectives.all_reduce(out, self.how, torch.distributed.group.WORLD)
                hidden = hidden + out
            return hidden

    def test_coverage_asks_the_group_that_sums_the_output(self):
        graph_module = capture(self.Parallel(2), torch.randn(1, 32, 32))
        run_passes(graph_module, SPARSE.replace(budget=Coverage(0.1)), WHOLE)
        (call,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.tsa.sparse_attention.default)
        assert call.args[-2] == torch.distributed.group.WORLD.group_name
        graph_module = capture(self.Parallel(2), torch.randn(1, 32, 32))
        run_passes(graph_module, SPARSE.replace(budget=Coverage(0.1)))
        (mean,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.tsa.mean_over_ranks.default)
        assert [user.target for user in mean.users] == [torch.ops.tsa.budget.default]

    @pytest.mark.parametrize("options", [{"residual": True}, {"how": "avg"}], ids=str)
    def test_coverage_is_refused_where_no_group_is_named(self, options):
        with pytest.raises(ConfigError, match=r"Coverage\(tau=0.1\).*'layers.1'.*all_reduce.*KeepRatio"):
            rows(self.Parallel(2, **options), SPARSE.replace(budget=Coverage(0.1)))

    def test_coverage_is_refused_in_exported_programs(self):
        graph_module = capture(self.Parallel(2), torch.randn(1, 32, 32))
        with pytest.raises(ConfigError, match=r"'layers.1'.*all_reduce.*KeepRatio"):
            run_passes(graph_module, SPARSE.replace(budget=Coverage(0.1)), (FindCalls, InferMasks, PlanExported))

    @pytest.mark.parametrize("budget", [KeepRatio(0.5), Coverage(0)], ids=str)
    def test_what_needs_no_other_head_is_not(self, budget):
        assert rows(self.Parallel(2), SPARSE.replace(budget=budget))[1].decision is Decision.SPARSE

    def test_exact_mode_is_not(self):
        chosen = rows(self.Parallel(2), SPARSE.replace(budget=Coverage(0.1), layers=[]))
        assert {row.decision for row in chosen} == {Decision.DENSE}


def test_autocast_inside_the_call_is_seen():
    def cast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    with pytest.warns(match="DTYPE"):
        (row,) = run_passes(capture(cast, torch.randn(1, 2, 32, 8)), SPARSE.replace(layers=[0])).rows
    assert (row.decision, row.reason) == (Decision.UNCHANGED, Reason.DTYPE)


def test_an_unknown_kernel_is_an_error_and_names_the_known_ones():
    with pytest.raises(KernelError, match="sdpa"):
        rows(Stack(1), SPARSE.replace(kernel="nonexistent"))


@pytest.mark.filterwarnings("ignore:no attention call")
def test_a_kernel_that_does_not_fit_leaves_the_call_dense():
    (row,) = rows(Stack(1), SPARSE.replace(kernel="cudnn"))  # on a CPU
    assert (row.decision, row.reason) == (Decision.DENSE, Reason.KERNEL)
