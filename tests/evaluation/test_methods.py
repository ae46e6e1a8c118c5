"""What each method asks of the compiler, and what the probe sees and changes, against the reference."""

import pytest
import torch

from tsa_compile.backend import tsa_backend
from tsa_compile.config import Coverage, KeepRatio, TSAConfig
from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.methods import STANDARD, parse
from tsa_compile.evaluation.probe import Probe, Selection
from tsa_compile.kernels import reference
from tsa_compile.testing import count_ops

from .toys import Stack

LENGTH, WINDOW = 150, 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Stack().eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def run(model, ids, probe, **options):
    """The output of a compiled model whose attention a probe looks at."""
    torch._dynamo.reset()
    config = TSAConfig(window=WINDOW, min_tokens=8, min_length=1, strict=True, compiler=probe).replace(**options)
    with torch.inference_mode():
        return torch.compile(model, backend=tsa_backend, dynamic=False, options={"config": config})(ids)


class Spy:
    """A further compiler: runs the graph and keeps what the score ops read."""

    def __init__(self):
        self.scored, self.graphs = [], []

    def __call__(self, graph_module, example_inputs):
        self.graphs.append(graph_module)
        interpreter = torch.fx.Interpreter(graph_module)
        outer = self

        def call_function(target, args, kwargs):
            if target is torch.ops.tsa.score.default:
                outer.scored.append(args[:2])
            return torch.fx.Interpreter.call_function(interpreter, target, args, kwargs)

        interpreter.call_function = call_function
        return interpreter.run


@pytest.mark.parametrize("budget", [Coverage(0.3), KeepRatio(0.4)])
def test_the_probe_sees_what_the_reference_selects(model, ids, budget):
    spy = Spy()
    probe = Probe(compiler=spy)
    hidden = run(model, ids, probe, budget=budget, layers=[1, 2])
    selections = probe.take()
    assert len(selections) == len(spy.scored) == 2 and probe.take() == []
    for selection, (query, key) in zip(selections, spy.scored, strict=True):
        scores = reference.score(query, key, None, 8**-0.5, WINDOW, 7)
        if isinstance(budget, Coverage):
            count = reference.budget(scores, budget.tau, None, 8)
        else:
            count = torch.full((2,), selection.indices.shape[2], dtype=torch.int32)
        assert selection.kept().tolist() == count.tolist()
        wanted = reference.select(scores, count, selection.indices.shape[2])
        for item in range(2):
            kept = int(count[item])
            assert WINDOW + 8 <= kept < LENGTH
            assert torch.equal(selection.indices[item, :, :kept], wanted[item, :, :kept])
    # Looking changes nothing.
    assert torch.equal(
        hidden, run(model, ids, lambda graph_module, inputs: graph_module.forward, budget=budget, layers=[1, 2])
    )


@pytest.mark.parametrize("budget", [Coverage(0.3), KeepRatio(0.4)])
def test_shuffling_keeps_the_number_and_the_window_and_chooses_at_random(model, ids, budget):
    plain, shuffled = Probe(), Probe(shuffle=True)
    run(model, ids, plain, budget=budget, layers=[0])
    torch.manual_seed(1)
    first_hidden = run(model, ids, shuffled, budget=budget, layers=[0])
    (best,), (random,) = plain.take(), shuffled.take()
    assert best.kept().tolist() == random.kept().tolist()
    for item, kept in enumerate(random.kept().tolist()):
        rows = random.indices[item, :, :kept].long()
        assert (rows[:, -WINDOW:] == torch.arange(LENGTH - WINDOW, LENGTH)).all()
        assert (rows.diff() > 0).all() and rows.unique().numel() > kept, "each head draws for itself"
        # Positions drawn without regard to scores: their mean is the middle of the candidates, within four deviations.
        drawn = rows[:, :-WINDOW].double()
        assert abs(drawn.mean() - (LENGTH - WINDOW) / 2) < 4 * LENGTH / (12 * drawn.numel()) ** 0.5
    torch.manual_seed(1)
    assert torch.equal(first_hidden, run(model, ids, shuffled, budget=budget, layers=[0]))
    assert not torch.equal(random.indices, best.indices)


@pytest.mark.parametrize("budget", [Coverage(0.3), KeepRatio(0.4)])
def test_a_rescue_keeps_the_number_and_the_marked_tokens(model, ids, budget):
    plain, rescuing = Probe(), Probe(rescue=True)
    marked = torch.zeros(2, LENGTH, dtype=torch.bool)
    marked[0, 3:20], marked[1, -WINDOW - 5 :] = True, True
    rescuing.mark(marked)
    run(model, ids, plain, budget=budget, layers=[0])
    run(model, ids, rescuing, budget=budget, layers=[0])
    (best,), (rescued,) = plain.take(), rescuing.take()
    assert rescued.kept().tolist() == best.kept().tolist()
    assert rescued.share_of(marked).tolist() == [1.0, 1.0] != best.share_of(marked).tolist()
    for item, kept in enumerate(best.kept().tolist()):
        for head in range(4):
            chosen, wanted = (set(found.indices[item, head, :kept].tolist()) for found in (rescued, best))
            others = set(range(LENGTH)) - set(marked[item].nonzero()[:, 0].tolist())
            assert chosen & others <= wanted, "the best of the others fill the rest"


def test_a_dense_graph_has_nothing_to_see(model, ids):
    spy = Spy()
    probe = Probe(compiler=spy)
    run(model, ids, probe, layers=[])
    assert probe.take() == [] and probe.graphs == 1
    assert count_ops(spy.graphs[0], "score", "select") == {"score": 0, "select": 0}


def test_the_share_of_marked_tokens_is_counted_over_real_slots():
    indices = torch.tensor([[[0, 2, 4], [1, 2, 4]], [[0, 1, 4], [3, 4, 4]]], dtype=torch.int32)
    selection = Selection(indices, torch.tensor([3, 2], dtype=torch.int32))
    marked = torch.tensor([[True, False, True, False, False], [False, False, False, False, True]])
    # Item 0: heads find 2 and 1 of 2. Item 1: slot 2 is filler, so head 0 misses token 4 and head 1 finds it.
    assert selection.share_of(marked).tolist() == [0.75, 0.5]
    assert Selection(indices, None).share_of(marked).tolist()[0] == 0.75
    assert selection.share_of(torch.zeros_like(marked)).tolist() == [1.0, 1.0]


def test_methods_ask_for_their_budget_and_layers():
    selected = (3, 5, 4)
    dense, coverage, keep = (parse(name).config(4096, selected) for name in ("dense", "coverage-0.005", "keep-0.5"))
    assert dense.layers == () and coverage.layers == keep.layers == (3, 4, 5)
    assert coverage.budget == Coverage(0.005) and keep.budget == KeepRatio(0.5)
    assert coverage.min_tokens == 256 and parse("keep-0.5").config(16384, selected).min_tokens == 1024
    early, random = parse("early-coverage-0.01"), parse("random-keep-0.5")
    assert early.config(4096, selected).layers == (0, 1, 2) and early.budget == Coverage(0.01)
    assert random.config(4096, selected) == keep and random.probe().shuffle
    narrow = parse("rescue-keep-0.5@8")
    assert narrow.config(4096, selected) == keep.replace(window=8) and narrow.probe().rescue
    assert not early.probe().shuffle and not random.probe().rescue and parse("rescue-keep-0.5").probe().rescue
    assert [parse(name).name for name in STANDARD] == list(STANDARD) and STANDARD[0] == "dense"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "sparse",
        "coverage",
        "coverage-",
        "coverage-x",
        "keep-1.2.3",
        "late-keep-0.5",
        "random-dense",
        "keep-0.5@",
        "dense@8",
    ],
)
def test_an_unknown_method_is_refused(name):
    with pytest.raises(ConfigError, match="is not known"):
        parse(name)


@pytest.mark.parametrize("name", ["coverage-1", "keep-1.1", "early-keep-2", "keep-0.5@0"])
def test_a_number_that_no_budget_allows_is_refused(name):
    with pytest.raises(ConfigError, match="is not allowed"):
        parse(name)
