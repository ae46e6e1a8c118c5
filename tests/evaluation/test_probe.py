"""What the probe sees and changes of a compiled model's selections, against the reference."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tsa_compile.backend import tsa_backend
from tsa_compile.config import Coverage, KeepRatio, TSAConfig
from tsa_compile.evaluation.probe import Probe
from tsa_compile.kernels import reference
from tsa_compile.testing import count_ops

LENGTH, WINDOW = 150, 16


class Layer(nn.Module):
    """Causal attention of 4 heads over 2, sharp enough that scores differ."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, hidden, is_causal=True):
        query, key, value = (
            project(hidden).unflatten(2, (heads, 8)).transpose(1, 2)
            for project, heads in ((self.query, 4), (self.key, 2), (self.value, 2))
        )
        mixed = functional.scaled_dot_product_attention(4 * query, key, value, is_causal=is_causal, enable_gqa=True)
        return hidden + mixed.transpose(1, 2).flatten(2)


class Stack(nn.Module):
    """Token ids [B, L] -> hidden states [B, L, 32]."""

    def __init__(self, layers=3, vocabulary=64):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 32)
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


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
        scores = reference.score(query, key, None, 8**-0.5, WINDOW, 7, "max")
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


def test_a_dense_graph_has_nothing_to_see(model, ids):
    spy = Spy()
    probe = Probe(compiler=spy)
    run(model, ids, probe, layers=[])
    assert probe.take() == [] and probe.graphs == 1
    assert count_ops(spy.graphs[0], "score", "select") == {"score": 0, "select": 0}
