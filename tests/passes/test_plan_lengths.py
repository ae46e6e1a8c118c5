"""How graphs are planned by the rule of lengths (tests/costs/test_breakeven.py): what rows say, guards, and ranges."""

import pytest
import torch

from tsa_compile.config import Coverage, KeepRatio, TSAConfig
from tsa_compile.costs import breakeven
from tsa_compile.costs.breakeven import break_even, expected_share, minimum
from tsa_compile.costs.calls import CallShape
from tsa_compile.costs.devices import H200
from tsa_compile.passes import plan
from tsa_compile.pipeline import run_passes
from tsa_compile.reasons import Decision, Reason
from tsa_compile.report import reports

from .stacks import SPARSE, Stack, rows, sparse_layers


@pytest.fixture
def on_an_h200(monkeypatch):
    """Calls of graphs on the CPU are planned as if they were on an H200."""

    monkeypatch.setattr(plan, "minimum", lambda config, shape, share, _: minimum(config, shape, share, H200))


def test_a_chunk_needs_fewer_rows_the_longer_its_cache_is(on_an_h200):
    """The same 3,072 rows: alone they are too short, behind 32K keys they gain; in a static cache nobody knows."""

    def obstacle(keys, **options):
        query, key = (torch.empty(1, count, rows, 128, dtype=torch.half) for count, rows in ((32, 3072), (8, keys)))
        return plan.sparse_obstacle(query, key, key, TSAConfig(), 0.5, H200, **options)

    assert obstacle(3072)[0] is Reason.TOO_SHORT
    assert obstacle(3072 + 32 * 1024) is None
    assert obstacle(3072 + 32 * 1024, filled=True)[0] is Reason.TOO_SHORT


@pytest.mark.filterwarnings("ignore:no attention call")
def test_a_call_below_its_break_even_length_says_the_numbers(on_an_h200):
    config = TSAConfig(budget=KeepRatio(0.5), layers=[0])
    shape = CallShape(1, 32, 32, 16, 16, itemsize=2, window=128, counted=False)
    least = break_even(H200, shape, config, sparse_layers=1.0)

    def row(length):
        hidden = torch.empty(1, length, 32 * 16, dtype=torch.bfloat16)  # exported, as that runs nothing: these are long
        return run_passes(torch.export.export(Stack(1, heads=32), (hidden,)).graph_module, config).rows[0]

    short, enough = row(least - 1), row(least)
    assert (short.decision, short.reason) == (Decision.DENSE, Reason.TOO_SHORT)
    assert {str(least - 1), str(least), "H200"} <= set(short.detail.replace(",", "").split())
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
