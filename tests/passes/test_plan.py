"""Which calls are planned sparse, which dense, and with which reason code."""

import pytest
import torch
from torch import nn

from tsa_compile.config import Coverage, KeepRatio, TSAConfig
from tsa_compile.costs import breakeven
from tsa_compile.costs.breakeven import break_even, expected_share
from tsa_compile.costs.calls import CallShape
from tsa_compile.costs.devices import H200
from tsa_compile.errors import ConfigError, KernelError, TSAWarning
from tsa_compile.export.program import PlanExported
from tsa_compile.passes import plan
from tsa_compile.passes.find import FindCalls
from tsa_compile.passes.masks import InferMasks
from tsa_compile.passes.plan import minimum_length
from tsa_compile.pipeline import WHOLE, run_passes
from tsa_compile.reasons import Decision, Reason
from tsa_compile.report import reports
from tsa_compile.testing import capture, capture_all

SPARSE = TSAConfig(budget=KeepRatio(0.5), window=4, min_tokens=4, floor=None)


class Layer(nn.Module):
    """Attention over [B, L, H * D] with query = key = value and a causal mask."""

    def __init__(self, heads=2, residual=True, **options):
        super().__init__()
        self.heads, self.residual, self.options = heads, residual, {"is_causal": True, **options}

    def forward(self, hidden):
        x = hidden.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(x, x, x, **self.options).transpose(1, 2).flatten(2)
        return hidden + out if self.residual else out


class Stack(nn.Module):
    """A numbered stack of layers, as every decoder has."""

    def __init__(self, count, **options):
        super().__init__()
        self.layers = nn.ModuleList([Layer(**options) for _ in range(count)])

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def rows(module, config, length=32, width=32, dtype=torch.float32, grad=False, **options):
    hidden = torch.randn(1, length, width, dtype=dtype)
    if grad:
        hidden.requires_grad_(True)
    return run_passes(capture(module, hidden, grad=grad, **options), config).rows


def sparse_layers(module, config):
    return [row.layer_index for row in rows(module, config) if row.decision is Decision.SPARSE]


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
    [({"dtype": torch.float64}, Reason.DTYPE), ({"width": 2 * 264}, Reason.HEAD_DIM), ({"width": 2 * 256}, Reason.SPARSE)],
)
def test_what_the_kernels_cannot_take_is_dense_all_the_same(call, reason):
    (row,) = rows(Stack(1), SPARSE, **call)
    assert row.reason is reason


def test_cross_attention_is_not_self_attention():
    def cross(query, key):
        return nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True)

    graph = capture(cross, torch.randn(1, 2, 16, 8), torch.randn(1, 2, 32, 8))
    (row,) = run_passes(graph, SPARSE.replace(layers=[0])).rows
    assert (row.decision, row.reason) == (Decision.UNCHANGED, Reason.NOT_SELF_ATTENTION)


def masked(query, key, mask):
    return nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask)


class TestPrefillBehindACache:
    """Several queries over more keys than their own: not a decode step, so it is said that it stays dense."""

    def plan(self, queries, mask):
        graph = capture(masked, torch.randn(1, 2, queries, 8), torch.randn(1, 2, 40, 8), mask)
        (row,) = run_passes(graph, SPARSE.replace(layers=["*"])).rows
        assert (row.decision, row.reason) == (Decision.UNCHANGED, Reason.NOT_SELF_ATTENTION)
        return row.detail

    def test_is_said(self):
        with pytest.warns(TSAWarning, match="30 queries over 40 keys: a prefill behind a cache"):
            self.plan(30, torch.ones(30, 40).tril().bool())

    @pytest.mark.parametrize("queries, decision", [(16, Decision.DENSE), (15, Decision.UNCHANGED)])
    def test_is_exact_without_its_mask_unless_it_is_of_a_few_tokens(self, queries, decision):
        assert self.behind(queries, 40, layers=[]) == (decision, "causal (behind a cache)")

    def behind(self, queries, keys, **options):
        def step(query, key):
            positions = torch.arange(query.shape[2]) + (key.shape[2] - query.shape[2])
            return masked(query, key, torch.arange(key.shape[2]) <= positions[:, None])

        graph = capture(step, torch.randn(1, 2, queries, 8), torch.randn(1, 2, keys, 8))
        (row,) = run_passes(graph, SPARSE.replace(**{"layers": ["*"], **options})).rows
        self.reason = row.reason
        return row.decision, row.mask

    def test_is_sparse_where_tokens_of_all_can_be_dropped(self):
        assert self.behind(20, 60, window=20, min_tokens=20)[0] is Decision.SPARSE
        with pytest.warns(TSAWarning, match="60 < 200"):
            assert self.behind(20, 60, window=100, min_tokens=99)[0] is Decision.DENSE
        assert self.reason is Reason.TOO_SHORT

    def test_a_configured_minimum_is_of_the_chunk(self):
        with pytest.warns(TSAWarning, match="length 20 < 30"):
            assert self.behind(20, 60, window=4, min_tokens=4, min_length=30)[0] is Decision.DENSE

    def test_a_kernel_that_takes_no_queries_behind_a_cache_leaves_it_dense(self):
        with pytest.warns(TSAWarning, match="run_behind"):
            assert self.behind(20, 60, window=4, min_tokens=4, floor=None, kernel="a_shape")[0] is Decision.DENSE
        assert self.reason is Reason.KERNEL

    def test_another_dense_kernel_is_for_whole_prompts(self):
        assert self.behind(20, 60, layers=[], dense_kernel="sdpa")[0] is Decision.DENSE

    @pytest.mark.parametrize(
        "queries, mask",
        [(1, torch.ones(1, 40, dtype=torch.bool)), (30, None), (30, torch.ones(1, 1, 1, 40, dtype=torch.bool))],
        ids=["a decode step", "cross-attention", "cross-attention with padding"],
    )
    def test_near_misses_are_not(self, queries, mask, recwarn):
        assert self.plan(queries, mask) == f"{queries} queries over 40 keys"
        assert not recwarn.list


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
        assert call.args[-1] == torch.distributed.group.WORLD.group_name
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


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LLAMA = CallShape(batch=1, heads=32, kv_heads=8, head_dim=128, value_head_dim=128, itemsize=2, window=128)


@pytest.fixture
def on_an_h200(monkeypatch):
    """Calls of graphs on the CPU are planned as if they were on an H200."""

    def planned(config, device, *shape):
        return minimum_length(config, CUDA, *shape)

    monkeypatch.setattr(plan, "for_device", lambda device: H200)
    monkeypatch.setattr(plan, "minimum_length", planned)


def test_on_a_cpu_the_minimum_is_where_something_can_be_dropped():
    assert minimum_length(TSAConfig(min_tokens=100, window=28), CPU, LLAMA)[0] == 129
    assert minimum_length(TSAConfig(budget=Coverage(0)), CPU, LLAMA)[0] == 1024 + 128 + 1
    assert minimum_length(TSAConfig(min_length=7), CPU, LLAMA)[0] == 7


def test_on_a_gpu_it_is_also_where_the_call_gains(on_an_h200, monkeypatch):
    config = TSAConfig(budget=KeepRatio(0.5))
    minimum, why = minimum_length(config, CUDA, LLAMA)
    assert minimum == break_even(H200, LLAMA, config) > 1024 + 128 + 1
    assert "NVIDIA H200" in why
    assert minimum_length(config.replace(min_tokens=100_000), CUDA, LLAMA)[0] > 100_128
    assert minimum_length(config.replace(min_length=7), CUDA, LLAMA)[0] == 7
    monkeypatch.setattr(breakeven, "break_even", lambda *arguments: 256)
    assert minimum_length(config, CUDA, LLAMA) == (1024 + 128 + 1, "where tokens can be dropped")


def test_a_chunk_needs_fewer_rows_the_longer_its_cache_is(on_an_h200):
    """The same 3,072 rows: alone they are too short, behind 32K keys they gain; in a static cache nobody knows."""

    def obstacle(keys, **options):
        query, key = (torch.empty(1, count, rows, 128, dtype=torch.half) for count, rows in ((32, 3072), (8, keys)))
        return plan.sparse_obstacle(query, key, key, TSAConfig(), 0.5, H200, **options)[0]

    assert obstacle(3072) is Reason.TOO_SHORT
    assert obstacle(3072 + 32 * 1024) is None
    assert obstacle(3072 + 32 * 1024, filled=True) is Reason.TOO_SHORT


@pytest.mark.parametrize("budget", [Coverage(0), KeepRatio(1)])
def test_a_budget_that_keeps_everything_has_no_minimum_on_a_gpu(on_an_h200, budget):
    assert minimum_length(TSAConfig(budget=budget), CUDA, LLAMA)[0] is None
    assert minimum_length(TSAConfig(budget=budget, min_length=2), CUDA, LLAMA)[0] == 2


@pytest.mark.filterwarnings("ignore:no attention call")
def test_a_call_below_its_break_even_length_says_the_numbers(on_an_h200):
    config = TSAConfig(budget=KeepRatio(0.5), layers=[0])
    shape = CallShape(1, 32, 32, 16, 16, itemsize=2, window=128, counted=False)
    minimum = break_even(H200, shape, config, sparse_layers=1.0)

    def row(length):
        hidden = torch.empty(1, length, 32 * 16, dtype=torch.bfloat16)  # exported, as that runs nothing: these are long
        return run_passes(torch.export.export(Stack(1, heads=32), (hidden,)).graph_module, config).rows[0]

    short, enough = row(minimum - 1), row(minimum)
    assert (short.decision, short.reason) == (Decision.DENSE, Reason.TOO_SHORT)
    assert {str(minimum - 1), str(minimum), "H200"} <= set(short.detail.replace(",", "").split())
    assert (enough.decision, enough.reason) == (Decision.SPARSE, Reason.SPARSE)


@pytest.mark.filterwarnings("ignore:no attention call")
@pytest.mark.parametrize("budget", [Coverage(0), KeepRatio(1)])
def test_a_call_that_never_gains_stays_dense(on_an_h200, budget):
    (row,) = rows(Stack(1), SPARSE.replace(budget=budget))
    assert (row.decision, row.reason) == (Decision.DENSE, Reason.TOO_SHORT)
    (row,) = rows(Stack(1), SPARSE.replace(budget=budget, min_length=1))
    assert row.decision is Decision.SPARSE


@pytest.mark.parametrize(("layers", "share"), [(None, 0.5), ([3], 0.25), ([0, 1, 2, 3], 1.0)])
def test_the_share_of_sparse_layers_is_counted(on_an_h200, monkeypatch, layers, share):
    asked = []
    monkeypatch.setattr(breakeven, "break_even", lambda costs, call, config, sparse_layers: asked.append(sparse_layers) or 1)
    assert len(sparse_layers(Stack(4), SPARSE.replace(layers=layers))) == 4 * share == 4 * asked[0]


@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore:no attention call")
def test_a_symbolic_length_is_guarded_once_at_the_break_even_length(on_an_h200, monkeypatch):
    monkeypatch.setattr(breakeven, "break_even", lambda *arguments: 48)
    config = SPARSE.replace(layers=[0, 1, 2], compiler="eager")
    compiled = torch.compile(Stack(3), backend="tsa", options={"config": config})
    decisions = []
    for length in (60, 50, 48, 47, 30, 49):
        hidden = torch.randn(1, length, 32)
        torch._dynamo.mark_dynamic(hidden, 1)
        with torch.no_grad():
            compiled(hidden)
        decisions.append([[row.decision for row in report] for report in reports()])
    sparse, dense = [Decision.SPARSE] * 3, [Decision.DENSE] * 3
    assert decisions == [[sparse]] * 3 + [[sparse, dense]] * 3


class TestRangesThatTheUserMarked:
    """`mark_dynamic(x, 1, min=..., max=...)` promises one graph for the whole range: a guard inside it is Dynamo's error."""

    def decided(self, config, least=2, most=4096, lengths=(40, 12, 100)):
        compiled = torch.compile(Stack(2), backend="tsa", options={"config": config.replace(compiler="eager")})
        outputs = []
        for length in lengths:
            hidden = torch.randn(1, length, 32)
            torch._dynamo.mark_dynamic(hidden, 1, min=least, max=most)
            with torch.no_grad():
                outputs.append((compiled(hidden), Stack(2)(hidden)))
        (report,) = reports()
        return report.rows[1], [torch.allclose(found, plain, atol=1e-5) for found, plain in outputs]

    @pytest.mark.parametrize("budget", [Coverage(0.5), KeepRatio(0.5)], ids=str)
    def test_the_op_decides_where_it_keeps_all_of_the_short_ones(self, fresh, budget):
        row, dense = self.decided(SPARSE.replace(budget=budget, min_tokens=16))
        assert row.reason is Reason.SPARSE and dense == [False, True, False]

    def test_the_defaults_take_any_range(self, fresh):
        row, dense = self.decided(TSAConfig())
        assert row.reason is Reason.SPARSE and all(dense)

    @pytest.mark.filterwarnings("ignore:no attention call")
    @pytest.mark.parametrize("changes", [{"min_length": 64}, {"min_tokens": 16, "capacity": 12}], ids=str)
    def test_it_cannot_where_it_would_drop_tokens_of_the_short_ones(self, fresh, changes):
        row, dense = self.decided(SPARSE.replace(**changes))
        assert row.reason is Reason.LENGTH_UNKNOWN and "both sides" in row.detail and all(dense)

    @pytest.mark.filterwarnings("ignore:no attention call")
    @pytest.mark.parametrize(
        "least, most, reason", [(64, 512, Reason.SPARSE), (2, 63, Reason.TOO_SHORT), (63, 64, Reason.LENGTH_UNKNOWN)]
    )
    def test_a_range_on_one_side_decides(self, fresh, least, most, reason):
        row, _ = self.decided(SPARSE.replace(min_length=64), least, most, [least])
        assert row.reason is reason


def test_shapes_of_calls_are_read_from_their_tensors():
    query, key, value = (torch.empty(2, heads, 8, size, dtype=torch.bfloat16) for heads, size in ((4, 8), (2, 8), (2, 6)))
    config = TSAConfig(budget=KeepRatio(0.5), window=4, floor=None)
    assert CallShape.of(query, key, value, config) == CallShape(2, 4, 2, 8, 6, 2, 4, grouped=False, counted=False)
    assert CallShape.of(query, key, value, config.replace(granularity="group")).selections == 2
    assert CallShape.of(query, key, value, config.replace(budget=Coverage())).counted
    assert expected_share(config.budget, 8) == 0.5
