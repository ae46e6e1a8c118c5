"""Which sites are planned sparse, which dense, and with which reason code."""

import pytest
import torch
from torch import nn

from tsa_compile.config import Coverage, KeepRatio, TSAConfig
from tsa_compile.errors import KernelError, TSAWarning
from tsa_compile.passes import costs, plan
from tsa_compile.passes.costs import SiteShape, break_even
from tsa_compile.passes.devices import H200
from tsa_compile.passes.plan import minimum_length
from tsa_compile.pipeline import run_passes
from tsa_compile.report import Decision, Reason, reports
from tsa_compile.testing import capture, capture_all

SPARSE = TSAConfig(budget=KeepRatio(0.5), window=4, min_tokens=4)


class Layer(nn.Module):
    """Attention over [B, L, H * D] with query = key = value and a causal mask."""

    def __init__(self, heads=2, **options):
        super().__init__()
        self.heads, self.options = heads, {"is_causal": True, **options}

    def forward(self, hidden):
        x = hidden.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(x, x, x, **self.options)
        return hidden + out.transpose(1, 2).flatten(2)


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
    assert (row.decision, row.reason) == (Decision.CAUSAL, Reason.HEAD_DIM)


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
    assert {row.decision for row in rows(Stack(2), SPARSE.replace(layers=[]))} == {Decision.CAUSAL}


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
    assert [row.layer_index for row in run_passes(second, SPARSE).sparse_sites] == [2, 3]


def test_a_layer_compiled_by_itself_does_not_know_where_it_stands():
    with pytest.warns(match="LAYER_COUNT_UNKNOWN"):
        (row,) = rows(Layer(), SPARSE)
    assert (row.decision, row.reason) == (Decision.CAUSAL, Reason.LAYER_COUNT_UNKNOWN)
    (row,) = rows(Layer(), SPARSE.replace(layers=["*"]))
    assert row.decision is Decision.SPARSE


def test_explicit_layers_of_another_graph_are_no_error():
    class Broken(Stack):
        def forward(self, hidden):
            hidden = self.layers[0](hidden)
            torch._dynamo.graph_break()
            return self.layers[1](hidden)

    first, second = capture_all(Broken(2), torch.randn(1, 32, 32)).graphs
    assert not run_passes(first, SPARSE.replace(layers=[1])).sparse_sites
    assert [row.layer_index for row in run_passes(second, SPARSE.replace(layers=[1])).sparse_sites] == [1]


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
    assert row.decision is (Decision.SPARSE if reason is Reason.SPARSE else Decision.CAUSAL)


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
def test_a_kernel_that_does_not_fit_leaves_the_site_dense():
    (row,) = rows(Stack(1), SPARSE.replace(kernel="cudnn"))  # on a CPU
    assert (row.decision, row.reason) == (Decision.CAUSAL, Reason.KERNEL)


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LLAMA = SiteShape(batch=1, heads=32, kv_heads=8, head_dim=128, value_head_dim=128, itemsize=2, window=128)


@pytest.fixture
def on_an_h200(monkeypatch):
    """Sites of graphs on the CPU are planned as if they were on an H200."""

    def planned(config, device, *shape):
        return minimum_length(config, CUDA, *shape)

    monkeypatch.setattr(plan, "for_device", lambda device: H200)
    monkeypatch.setattr(plan, "minimum_length", planned)


def test_on_a_cpu_the_minimum_is_where_something_can_be_dropped():
    assert minimum_length(TSAConfig(min_tokens=100, window=28), CPU, LLAMA)[0] == 129
    assert minimum_length(TSAConfig(budget=Coverage(0)), CPU, LLAMA)[0] == 1024 + 128 + 1
    assert minimum_length(TSAConfig(min_length=7), CPU, LLAMA)[0] == 7


def test_on_a_gpu_it_is_also_where_the_site_gains(on_an_h200, monkeypatch):
    config = TSAConfig(budget=KeepRatio(0.5))
    minimum, why = minimum_length(config, CUDA, LLAMA)
    assert minimum == break_even(H200, LLAMA, config) > 1024 + 128 + 1
    assert "NVIDIA H200" in why
    assert minimum_length(config.replace(min_tokens=100_000), CUDA, LLAMA)[0] > 100_128
    assert minimum_length(config.replace(min_length=7), CUDA, LLAMA)[0] == 7
    monkeypatch.setattr(plan, "break_even", lambda *arguments: 256)
    assert minimum_length(config, CUDA, LLAMA) == (1024 + 128 + 1, "where tokens can be dropped")


@pytest.mark.parametrize("budget", [Coverage(0), KeepRatio(1)])
def test_a_budget_that_keeps_everything_has_no_minimum_on_a_gpu(on_an_h200, budget):
    assert minimum_length(TSAConfig(budget=budget), CUDA, LLAMA)[0] is None
    assert minimum_length(TSAConfig(budget=budget, min_length=2), CUDA, LLAMA)[0] == 2


@pytest.mark.filterwarnings("ignore:no attention call")
def test_a_site_below_its_break_even_length_says_the_numbers(on_an_h200):
    config = TSAConfig(budget=KeepRatio(0.5), layers=[0])
    shape = SiteShape(1, 32, 32, 16, 16, itemsize=2, window=128, counted=False)
    minimum = break_even(H200, shape, config, sparse_layers=1.0)
    stack, call = Stack(1, heads=32), {"width": 32 * 16, "dtype": torch.bfloat16}
    (short,), (enough,) = (rows(stack, config, length=length, **call) for length in (minimum - 1, minimum))
    assert (short.decision, short.reason) == (Decision.CAUSAL, Reason.TOO_SHORT)
    assert {str(minimum - 1), str(minimum), "H200"} <= set(short.detail.replace(",", "").split())
    assert (enough.decision, enough.reason) == (Decision.SPARSE, Reason.SPARSE)


@pytest.mark.filterwarnings("ignore:no attention call")
@pytest.mark.parametrize("budget", [Coverage(0), KeepRatio(1)])
def test_a_site_that_never_gains_stays_dense(on_an_h200, budget):
    (row,) = rows(Stack(1), SPARSE.replace(budget=budget))
    assert (row.decision, row.reason) == (Decision.CAUSAL, Reason.TOO_SHORT)
    (row,) = rows(Stack(1), SPARSE.replace(budget=budget, min_length=1))
    assert row.decision is Decision.SPARSE


@pytest.mark.parametrize(("layers", "share"), [(None, 0.5), ([3], 0.25), ([0, 1, 2, 3], 1.0)])
def test_the_share_of_sparse_layers_is_counted(on_an_h200, monkeypatch, layers, share):
    asked = []
    monkeypatch.setattr(plan, "break_even", lambda costs, site, config, sparse_layers: asked.append(sparse_layers) or 1)
    assert len(sparse_layers(Stack(4), SPARSE.replace(layers=layers))) == 4 * share == 4 * asked[0]


@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore:no attention call")
def test_a_symbolic_length_is_guarded_once_at_the_break_even_length(on_an_h200, monkeypatch):
    monkeypatch.setattr(plan, "break_even", lambda *arguments: 48)
    config = SPARSE.replace(layers=[0, 1, 2], compiler="eager")
    compiled = torch.compile(Stack(3), backend="tsa", options={"config": config})
    decisions = []
    for length in (60, 50, 48, 47, 30, 49):
        hidden = torch.randn(1, length, 32)
        torch._dynamo.mark_dynamic(hidden, 1)
        with torch.no_grad():
            compiled(hidden)
        decisions.append([[row.decision for row in report] for report in reports()])
    sparse, dense = [Decision.SPARSE] * 3, [Decision.CAUSAL] * 3
    assert decisions == [[sparse]] * 3 + [[sparse, dense]] * 3


def test_shapes_of_sites_are_read_from_their_tensors():
    query, key, value = (torch.empty(2, heads, 8, size, dtype=torch.bfloat16) for heads, size in ((4, 8), (2, 8), (2, 6)))
    config = TSAConfig(budget=KeepRatio(0.5), window=4)
    assert SiteShape.of(query, key, value, config) == SiteShape(2, 4, 2, 8, 6, 2, 4, grouped=False, counted=False)
    assert SiteShape.of(query, key, value, config.replace(granularity="group")).selections == 2
    assert SiteShape.of(query, key, value, config.replace(budget=Coverage())).counted
    assert costs.expected_share(config.budget, 8) == 0.5
