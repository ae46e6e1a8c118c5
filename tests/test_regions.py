"""Regional compilation: layers that are alike are compiled once, and compute what the whole graph computes."""

import pytest
import torch
from torch import nn

from tsa_compile import ConfigError, KeepRatio, TSAConfig, regions, reports

from .support import Attention, exhaustive_but, heads, mixed_padding, tiny, tokens

pytestmark = pytest.mark.usefixtures("fresh")

CONFIG = TSAConfig(window=8, min_tokens=8, budget=KeepRatio(0.3), layers=[1, 2], compiler="aot_eager")


def counting(compiled):
    """A compiler that appends each graph it is given."""

    def compiler(graph_module, inputs):
        compiled.append(graph_module)
        return graph_module

    return compiler


def run(model, config, *args, **kwargs):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend="tsa", options={"config": config})(*args, **kwargs)


def notes():
    return " ".join(note for report in reports() for note in report.notes if note.startswith("regional"))


@pytest.mark.parametrize("name", exhaustive_but(["llama", "gpt2", "gpt_neox"], "llama"))
def test_six_layers_are_compiled_as_two(name):
    """The parts: what precedes the layers, the padding included, 0 to 2, 3 to 5, what follows."""
    sizes = {"n_layer": 6} if name == "gpt2" else {"num_hidden_layers": 6}
    model, ids, mask = tiny(name, **sizes), tokens(3, 60), mixed_padding(60)
    config = CONFIG.replace(layers=[3, 4, 5], compiler="eager")
    whole = run(model, config, ids, attention_mask=mask)
    assert not notes()
    regional = run(model, config.replace(regional=True), ids, attention_mask=mask)
    assert torch.equal(regional.logits, whole.logits)
    for layer, its in zip(regional.past_key_values.layers, whole.past_key_values.layers, strict=True):
        assert torch.equal(layer.keys, its.keys) and torch.equal(layer.values, its.values)
    assert "8 parts of the graph, of which 4 were compiled" in notes()
    assert [report.sparse for report in reports()] == [3, 3]


class Padded(nn.Module):
    """Layers that read the graph's inputs, of which nothing is computed in front of them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention(is_causal=False) for _ in range(4))

    def forward(self, query, key, value, valid):
        for layer in self.layers:
            positions = torch.arange(query.shape[2])
            mask = (positions <= positions[:, None]) & valid[:, None, None]
            query = layer(query, key, value, mask)
        return query


def test_padding_is_in_front_of_layers_that_nothing_precedes():
    config = CONFIG.replace(layers=[], compiler="eager", strict=True)
    given = (*heads(3, length=60), mixed_padding(60).bool())
    whole = run(Padded(), config, *given)
    assert torch.equal(run(Padded(), config.replace(regional=True), *given), whole)
    assert "parts of the graph, of which" in notes() and reports()[-1].unchanged == 0


def test_the_padding_stays_where_it_is_if_the_graph_writes_to_an_input():
    compiled = []
    config = CONFIG.replace(layers=[], compiler=counting(compiled))
    run(tiny("llama"), config, tokens(3, 60), attention_mask=mixed_padding(60))
    (graph_module,) = compiled
    *formula, ranges = regions._shared(graph_module)
    assert formula and ranges.target is torch.ops.tsa.valid_ranges.default
    graph_module.meta["pieces_of_inputs"] = [([0], True)]
    assert not regions._shared(graph_module)


@pytest.mark.slow
def test_one_graph_serves_all_lengths():
    model, config = tiny("llama"), CONFIG.replace(min_length=1)
    expected = {length: run(model, config.replace(compiler="eager"), tokens(2, length)).logits for length in (60, 45)}
    torch._dynamo.reset()
    with torch.no_grad():
        fast = torch.compile(model, backend="tsa", options={"config": config.replace(regional=True)}, dynamic=True)
        for length, logits in expected.items():
            torch.testing.assert_close(fast(tokens(2, length)).logits, logits, atol=1e-5, rtol=0)
    assert len(reports()) == 3 and reports()[-1].sparse == 2
    assert "5 parts of the graph, of which 4 were compiled" in notes()


class Layer(nn.Module):
    """Attention over heads [B, H, L, D] and a step of its own."""

    def __init__(self, factor=1.0, in_place=False):
        super().__init__()
        self.attention, self.factor, self.in_place = Attention(), factor, in_place
        self.weight = nn.Parameter(torch.rand(16))

    def forward(self, x, seen):
        out = self.attention(x, x, x) * self.weight * self.factor
        return seen.add_(out) if self.in_place else x + out


class Model(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        x = x * 2
        seen = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        for layer in self.layers:
            x = layer(x, seen)
        return x.relu(), seen


def parts_of(model, x, config=CONFIG):
    """How many graphs are compiled; that the results are the model's is checked."""
    compiled = []
    config = config.replace(layers=[], skip_passes=("Validate",), regional=True)
    with torch.no_grad():
        expected = model(x.clone())
    found = run(model, config.replace(compiler=counting(compiled)), x.clone())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(run(model, config, x.clone()), expected)
    return len(compiled)


def test_what_differs_is_compiled_apart():
    x = heads()[0]
    assert parts_of(Model(*(Layer() for _ in range(4))), x) == 3
    assert parts_of(Model(Layer(), Layer(2.0), Layer(), Layer(2.0)), x) == 4, "a constant"
    assert parts_of(Model(Layer(1.0), Layer(1), Layer(1.0), Layer(1)), x) == 4, "equal constants of other types"
    assert parts_of(Model(*(Layer(in_place=True) for _ in range(4))), x) == 4, "what the first writes to is not its input"


def test_tensors_that_share_memory():
    """The second layer is handed one tensor twice, or two views of one: the code of the first would not do."""

    class Shared(Model):
        def forward(self, x):
            first, second = x * 2, x * 3
            first = self.layers[0](first, second)
            both = x * 4
            return self.layers[1](both, both[:]), first, self.layers[2](second, first)

    layers = [Layer(in_place=True) for _ in range(3)]
    assert parts_of(Shared(*layers), heads()[0]) >= 3


def test_contexts_are_not_cut():
    """Both layers under autocast are one part, with what enters and leaves it."""

    class Cast(Model):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                x = self.layers[0](x, x)
                x = self.layers[1](x, x)
            return self.layers[3](self.layers[2](x, x), x)

    assert parts_of(Cast(*(Layer() for _ in range(4))), heads()[0]) == 2


@pytest.mark.parametrize(
    "model, why",
    [
        (Model(Layer()), "fewer than two"),
        (Model(Layer(), Layer(2.0)), "no two parts"),
        (Attention(), "fewer than two"),
    ],
    ids=["one layer", "different layers", "no layers"],
)
def test_what_is_compiled_as_a_whole_says_why(model, why):
    inputs = heads()[:1] if isinstance(model, Model) else heads()
    run(model, CONFIG.replace(regional=True, layers=[]), *inputs)
    assert "compiled as a whole" in notes() and why in notes()


def test_where_a_gradient_may_be_needed_nothing_is_cut():
    x, model = heads()[0].requires_grad_(), Model(Layer(), Layer(), Layer())
    torch.compile(model, backend="tsa", options={"config": CONFIG.replace(regional=True, layers=[])})(x)[0].sum().backward()
    assert x.grad is not None and "a gradient may be needed" in notes()


@pytest.mark.parametrize("setting", ["freezing", "triton.cudagraphs"])
def test_nothing_is_shared_where_inductor_holds_weights(setting):
    with torch._inductor.config.patch(setting, True):
        run(Model(Layer(), Layer(), Layer()), CONFIG.replace(regional=True, layers=[], compiler="eager"), heads()[0])
    assert "hold the weights of one layer" in notes()


def test_not_with_cuda_graphs():
    from tsa_compile.backend import resolve_compiler

    with pytest.raises(ConfigError, match=r"'reduce-overhead' is not allowed with regional=True"):
        resolve_compiler(TSAConfig(regional=True), "reduce-overhead")
    assert resolve_compiler(TSAConfig(regional=True), "max-autotune-no-cudagraphs")


@pytest.mark.exhaustive
def test_inductor():
    model, ids, mask = tiny("llama"), tokens(2, 60), mixed_padding(60, (0, 9))
    expected = run(model, CONFIG.replace(compiler="eager"), ids, attention_mask=mask).logits
    found = run(model, CONFIG.replace(compiler="inductor", regional=True), ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert "of which" in notes()


@pytest.mark.parametrize(("regional", "share", "cut"), [(None, 0.99, True), (None, 1.01, False), (False, 0.0, False)])
def test_by_itself_it_is_done_where_layers_have_work_enough(monkeypatch, regional, share, cut):
    """Two operations for each token and weight; where it is not done, there is nothing to say, as nobody asked for it."""
    model, ids, compiled = tiny("llama", num_hidden_layers=4), tokens(2, 30), []
    weights = sum(weight.numel() for weight in model.model.layers[0].parameters() if weight.dim() == 2)
    monkeypatch.setitem(regions.LEAST_WORK, "cpu", share * 2 * ids.numel() * weights)
    monkeypatch.setattr("tsa_compile.backend.lookup_backend", lambda name: counting(compiled))
    run(model, TSAConfig(layers=[], regional=regional), ids)
    assert (len(compiled) > 1, "parts of the graph" in notes()) == (cut, cut)
    assert cut or not notes()


def test_work_is_counted_where_a_weight_is_taken_apart(monkeypatch):
    class Split(Layer):
        def __init__(self):
            super().__init__()
            self.both = nn.Parameter(torch.rand(2, 16))

        def forward(self, x, seen):
            first, second = torch.split(self.both, 1)
            return super().forward(x, seen) * first + second.sum()

    monkeypatch.setitem(regions.LEAST_WORK, "cpu", 0.0)
    monkeypatch.setattr("tsa_compile.backend.lookup_backend", lambda name: lambda graph_module, inputs: graph_module)
    model, (x, *_) = Model(Split(), Split(), Split()), heads()
    with torch.no_grad():
        expected = model(x.clone())
    torch.testing.assert_close(run(model, TSAConfig(layers=[]), x.clone()), expected)
    assert "parts of the graph" in notes()
