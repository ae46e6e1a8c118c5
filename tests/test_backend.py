"""`torch.compile(..., backend="tsa")`: options, errors, reports, and graphs of every kind."""

import functools

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from tsa_compile import (
    ConfigError,
    Coverage,
    Decision,
    Floor,
    KeepRatio,
    Reason,
    RewriteReport,
    TSAConfig,
    TSAWarning,
    reports,
    tsa_backend,
)
from tsa_compile.backend import dense_kernels
from tsa_compile.kernels import reference, registry
from tsa_compile.kernels.sparse import a_shape_lists, block_sparse
from tsa_compile.testing import count_ops, widest_elements

from .support import Attention, Stack, difference, exhaustive_but, heads, mixed_padding, oracle, run_each, tiny, tokens

pytestmark = pytest.mark.usefixtures("fresh")

SMALL = dict(window=4, min_tokens=4, compiler="eager")
HALF = TSAConfig(budget=KeepRatio(0.5), floor=None, **SMALL)
ATOL = 1e-5


def compiled(model, backend="tsa", **options):
    return torch.compile(model, backend=backend, options={"config": HALF, **options})


def half_of(query, key, value, **settings):
    """What the reference computes for one causal call under `HALF`."""
    settings = {"window": 4, "min_tokens": 4, "reduce": "max", **settings}
    return reference.token_sparse_attention(query, key, value, keep_ratio=0.5, **settings)


class Keeper:
    """A compiler that keeps the graph it is given."""

    def __call__(self, graph_module, example_inputs):
        self.graph_module = graph_module
        return graph_module.forward


# How it is asked for


@pytest.mark.parametrize("backend", ["tsa", tsa_backend], ids=["entry point", "function"])
def test_both_spellings_of_the_backend(backend):
    inputs = heads()
    with torch.no_grad():
        out = compiled(Attention(), backend, layers=[0])(*inputs)
    assert difference(out, half_of(*inputs)) < ATOL


@pytest.mark.parametrize("padded", exhaustive_but([False, True], True))
def test_a_floor_leaves_no_valid_row_blind(padded):
    model, ids = tiny("llama"), tokens(2, 60)
    mask = mixed_padding(60, (0, 11)) if padded else torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask}
    config = HALF.replace(layers=["*"], budget=KeepRatio(0.1), min_tokens=0)
    with torch.no_grad():
        wanted = model(**inputs).logits
    configs = [config.replace(floor=floor) for floor in (None, Floor(60, 0), Floor(20, 2))]
    blind, whole, near = (output.logits for output in run_each(model, configs, **inputs))
    valid = mask.bool()
    assert difference(whole[valid], wanted[valid]) < ATOL  # a window of the whole length is dense attention
    assert difference(near[valid], wanted[valid]) < 0.5 * difference(blind[valid], wanted[valid])
    assert [row.decision for row in reports()[-1]] == [Decision.SPARSE] * 3


def test_entry_point_is_listed():
    assert "tsa" in torch._dynamo.list_backends()


@pytest.mark.slow
def test_defaults_leave_short_sequences_alone():
    stack, inputs = Stack(2), heads()
    with torch.no_grad(), pytest.warns(TSAWarning, match="TOO_SHORT"):
        out = torch.compile(stack, backend="tsa")(*inputs)
    assert difference(out, stack(*inputs)) < ATOL
    (report,) = reports()
    assert [row.reason for row in report] == [Reason.LAYER_NOT_SELECTED, Reason.TOO_SHORT]
    assert report.dense == 2
    assert report.config["compiler"] == "inductor"


def test_options_override_the_config():
    """A field beside a whole config wins: nothing is dropped."""
    inputs = heads()
    with torch.no_grad():
        out = compiled(Attention(), layers=[0], budget=Coverage(0))(*inputs)
    assert difference(out, Attention()(*inputs)) < ATOL
    assert reports()[-1].config["budget"] == {"coverage": 0.0}


def test_upper_half_by_default():
    model = tiny("llama", num_hidden_layers=4)
    with torch.no_grad():
        compiled(model)(tokens(2, 40))
    (report,) = reports()
    assert [row.layer_index for row in report.sparse_calls] == [2, 3]
    assert [row.layer for row in report] == [f"model.layers.{i}.self_attn" for i in range(4)]


def test_layers():
    asked = {
        (0, 2): [0, 2],
        (): [],
        ("model.layers.1.*",): [1],
        ("model.layers.[02].self_attn",): [0, 2],
        ("*",): [0, 1, 2],
    }
    run_each(tiny("llama"), [HALF.replace(layers=layers) for layers in asked], input_ids=tokens(2, 40))
    assert [[row.layer_index for row in report.sparse_calls] for report in reports()] == [*asked.values()]


def test_group_granularity():
    ids = tokens(3, 50)
    mask = mixed_padding(50)
    with torch.no_grad():
        logits = compiled(tiny("llama"), granularity="group", layers=[0, 2])(ids, attention_mask=mask).logits
        with oracle([0, 2], window=4, min_tokens=4, keep_ratio=0.5, granularity="group"):
            wanted = tiny("llama", "oracle")(ids, attention_mask=mask).logits
    assert difference(logits, wanted, mask) < ATOL


@pytest.mark.parametrize("capacity", exhaustive_but([12, 24, 100], 12))
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.5}, {"coverage": 0.2}], ids=str)
def test_capacity(capacity, budget):
    """A static size of the selection: what exceeds it is dropped, a larger one changes nothing."""
    ids, mask, one = tokens(3, 50), mixed_padding(50), {"num_hidden_layers": 1}
    with torch.no_grad():
        model = compiled(tiny("llama", **one), budget=budget, capacity=capacity, layers=[0])
        logits = model(ids, attention_mask=mask).logits
        with oracle([0], window=4, min_tokens=4, capacity=capacity, **budget):
            wanted = tiny("llama", "oracle", **one)(ids, attention_mask=mask).logits
    assert difference(logits, wanted, mask) < ATOL


@pytest.fixture
def registered():
    """Kernels to be taken out of the registry when the test is over."""
    kernels = []
    yield kernels
    for kernel in kernels:
        registry.unregister(kernel.name)


def test_a_registered_kernel_by_name():
    calls = []

    def run(query, key, value, scale):
        calls.append(query.shape)
        return registry.get("sdpa").run(query, key, value, scale)

    registry.register(registry.AttentionKernel("test kernel", run, lambda request: None, priority=-1))
    try:
        inputs = heads()
        with torch.no_grad():
            out = compiled(Attention(), layers=[0], kernel="test kernel")(*inputs)
        assert difference(out, half_of(*inputs)) < ATOL
        assert calls and reports()[-1].rows[0].kernel == "test kernel"
    finally:
        registry.unregister("test kernel")


@pytest.mark.exhaustive
def test_block_sparse_kernels_under_a_floor(registered):
    """Over the kept rows, and over all rows in the layer that is not sparse: of few rows two see all, the third does not."""
    registered.append(block_sparse("narrow", a_shape_lists, sinks=1, window=1))
    ids, mask = tokens(2, 150), mixed_padding(150, (0, 11))
    with torch.no_grad():
        with oracle([1, 2], window=4, min_tokens=4, keep_ratio=0.5, floor_window=10, floor_sinks=2):
            wanted = tiny("llama", "oracle")(ids, attention_mask=mask).logits
        for kernel in ("xattention", "minference", "narrow"):
            options = dict(layers=[1, 2], floor=Floor(10, 2), kernel=kernel, dense_kernel=kernel)
            logits = compiled(tiny("llama"), **options)(ids, attention_mask=mask).logits
            assert [(row.decision, row.kernel) for row in reports()[-1]] == [
                (Decision.KERNEL, kernel), (Decision.SPARSE, kernel), (Decision.SPARSE, kernel)
            ]  # fmt: skip
            assert (difference(logits, wanted, mask) < ATOL) == (kernel != "narrow")


def test_a_kernel_without_a_log_sum_exp_leaves_the_layer_dense_under_a_floor(registered):
    kernel = registry.AttentionKernel("mute", registry.get("sdpa").run, lambda request: None, priority=-1)
    registered.append(registry.register(kernel))
    inputs = heads()
    with torch.no_grad(), pytest.warns(TSAWarning, match=r"'mute' cannot run .* no log-sum-exp"):
        out = compiled(Attention(), layers=[0], floor=Floor(10, 2), kernel="mute")(*inputs)
    assert difference(out, Attention()(*inputs)) < ATOL and reports()[-1].rows[0].reason is Reason.KERNEL


def test_a_kernel_that_does_not_fit_leaves_the_layer_dense():
    inputs = heads()
    with torch.no_grad(), pytest.warns(TSAWarning, match="KERNEL"):
        out = compiled(Attention(), layers=[0], kernel="cudnn")(*inputs)
    assert difference(out, Attention()(*inputs)) < ATOL
    assert reports()[-1].rows[0].reason is Reason.KERNEL


def test_a_callable_compiler_gets_the_rewritten_graph():
    keeper = Keeper()
    with torch.no_grad():
        compiled(Attention(), layers=[0], compiler=keeper)(*heads())
    steps = ("score", "select", "compress", "attend", "decompress")
    assert count_ops(keeper.graph_module, *steps) == dict.fromkeys(steps, 1)
    assert count_ops(keeper.graph_module, "scaled_dot_product_attention")["scaled_dot_product_attention"] == 0


@pytest.mark.parametrize("compiler", ["aot_eager", "eager"])
def test_compilers_by_name(compiler):
    inputs = heads()
    with torch.no_grad():
        out = compiled(Attention(), layers=[0], compiler=compiler)(*inputs)
    assert difference(out, half_of(*inputs)) < ATOL


def test_modes_of_inductor():
    inputs = heads()
    with torch.no_grad(), pytest.warns(TSAWarning, match="LAYER_COUNT_UNKNOWN"):
        out = torch.compile(Attention(), backend="tsa", mode="reduce-overhead")(*inputs)
    assert difference(out, Attention()(*inputs)) < ATOL


def test_modes_are_refused_for_other_compilers():
    backend = functools.partial(tsa_backend, options={"config": HALF})
    with pytest.raises(BackendCompilerFailed, match="mode='reduce-overhead' is not allowed with compiler='eager'"):
        torch.compile(Attention(), backend=backend, mode="reduce-overhead")(*heads())


# What is refused


@pytest.mark.parametrize(
    "options, said",
    [
        ({"windw": 3}, ["'windw' is not an option", "did you mean 'window'", "min_tokens"]),
        ({"budget": {"coverage": 1.0}}, ["Coverage.tau=1.0", r"[0, 1)"]),
        ({"budget": 0.5}, ["budget=0.5", "Coverage(tau)"]),
        ({"pool": 6}, ["pool=6", "odd"]),
        ({"window": 0}, ["window=0", ">= 1"]),
        ({"kernel": "fastest"}, ["kernel", "'fastest'", "cudnn, flash, sdpa", "auto"]),
        ({"compiler": "gcc"}, ["compiler='gcc'", "inductor"]),
        ({"compiler": "tsa"}, ["compiler='tsa'", "name another"]),
        ({"granularity": "token"}, ["granularity='token'", "head", "group"]),
        ({"config": {"window": 4}}, ["config=", "TSAConfig"]),
    ],
    ids=lambda value: ", ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_is_not_allowed_is_named(options, said):
    """The option, the value and what is allowed."""
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as failure:
        torch.compile(Attention(), backend="tsa", options=options)(*heads())
    for part in said:
        assert part in str(failure.value), part


@pytest.mark.parametrize("layers", exhaustive_but([[7], ["decoder.*"]], [7]), ids=str)
def test_layers_that_the_model_does_not_have_are_said_once(layers):
    """Once for a model, at whatever lengths it is compiled; a warning, as a stage of a pipeline has a part of them too."""
    model = tiny("llama")
    with torch.no_grad(), pytest.warns(TSAWarning) as said:
        for length in (20, 30):
            torch.compile(model, backend="tsa", options={"layers": layers, "compiler": "eager"})(tokens(1, length))
    (text,) = {str(warning.message) for warning in said}
    assert len(said) == 1 and f"layers={layers!r} not found" in text and "0..2 (model.layers.*.self_attn)" in text
    assert [report.notes for report in reports()] == [(text,)] * 2


def test_errors_are_of_this_package():
    """Called without Dynamo around it, the backend raises its own exceptions."""
    with pytest.raises(ConfigError, match="odd"):
        tsa_backend(None, (), options={"pool": 6})


# What is reported


def test_the_report_of_a_model():
    with torch.no_grad():
        compiled(tiny("llama"), layers=[1])(tokens(3, 50), attention_mask=mixed_padding(50))
    (report,) = reports()
    assert (report.sparse, report.dense, report.dense_padded, report.unchanged) == (1, 0, 2, 0)
    row = report.rows[1]
    assert (row.index, row.layer, row.layer_index) == (1, "model.layers.1.self_attn", 1)
    assert (row.query, row.key, row.value) == ((3, 4, 50, 32), (3, 2, 50, 32), (3, 2, 50, 32))
    assert (row.dtype, row.form, row.mask) == ("float32", "sdpa", "causal+padding")
    assert (row.decision, row.reason, row.kernel) == (Decision.SPARSE, Reason.SPARSE, "sdpa")
    assert report.config["layers"] == [1] and report.config["budget"] == {"keep_ratio": 0.5}
    assert RewriteReport.from_json(report.to_json()) == report
    assert "model.layers.1.self_attn" in str(report)


def test_one_report_a_compilation():
    model = compiled(Attention(), layers=[0])
    with torch.no_grad():
        for length in (40, 40, 50, 60):
            model(*heads(length=length))
    assert len(reports()) == 2  # a static length, then a symbolic one


# Graphs of every kind


def test_value_heads_of_another_size():
    query, key, value = heads()
    value = value[..., :8]
    with torch.no_grad():
        out = compiled(Attention(), layers=[0])(query, key, value)
    assert difference(out, half_of(query, key, value)) < ATOL


def test_a_scale_of_its_own():
    inputs = heads()
    with torch.no_grad():
        out = compiled(Attention(scale=0.7), layers=[0])(*inputs)
    assert difference(out, half_of(*inputs, scale=0.7)) < ATOL


def test_a_graph_without_attention():
    function = compiled(lambda x: x.relu() + 1)
    assert torch.equal(function(torch.ones(3)), 2 * torch.ones(3))
    assert [len(report) for report in reports()] == [0]


@pytest.mark.slow
def test_no_mask_is_built_in_exact_mode():
    """The largest tensor of the rewritten graph is far below L x L."""
    keeper = Keeper()
    length = 200
    with torch.no_grad():
        compiled(tiny("gpt2", n_embd=32, n_layer=1), layers=[], compiler=keeper)(
            tokens(1, length), attention_mask=torch.ones(1, length, dtype=torch.long), use_cache=False
        )
    assert widest_elements(keeper.graph_module) < length * length


def test_default_layers_in_several_graphs():
    """A graph that ends at a break cannot know how many layers follow; the last one does, by its numbers."""
    query, key, value = heads(kv_heads=4)
    with torch.no_grad(), pytest.warns(TSAWarning, match="LAYER_COUNT_UNKNOWN"):
        out = compiled(Stack(breaks=(0, 1)))(query, key, value)
        for call in (Attention(), Attention(), half_of, half_of):
            query = call(query, key, value)
    assert difference(out, query) < ATOL
    unknown, sparse = [Reason.LAYER_COUNT_UNKNOWN], [Reason.SPARSE] * 2
    assert [[row.reason for row in report] for report in reports()] == [unknown, unknown, sparse]


@pytest.mark.parametrize("layers", [[1, 3], ["*layers.1", "*layers.3"]], ids=["indices", "patterns"])
def test_named_layers_in_several_graphs(layers):
    query, key, value = heads(kv_heads=4)
    with torch.no_grad():
        out = compiled(Stack(breaks=(0, 1)), layers=layers)(query, key, value)
        for layer in range(4):
            call = half_of if layer in (1, 3) else Attention()
            query = call(query, key, value)
    assert difference(out, query) < ATOL
    assert [row.layer_index for report in reports() for row in report.sparse_calls] == [1, 3]


def broken_in_a_layer():
    """A Llama in which a hook breaks the graph inside one layer, so that Dynamo compiles every layer by itself."""
    model = tiny("llama")
    model.model.layers[1].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    return model


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse")
def test_layers_that_are_compiled_one_by_one():
    """Such a graph does not know which layer it is: no layer may be sparse that was not asked for, and none may fail."""
    model, ids = broken_in_a_layer(), tokens(2, 40)
    each = [None, [0], [2], ["model.layers.2.*"], []]
    found = run_each(model, [HALF.replace(layers=layers) for layers in each], input_ids=ids)
    with torch.no_grad():
        wanted = {1: tiny("llama")(ids).logits}
        for asked in ([0], [2]):
            with oracle(asked, window=4, min_tokens=4, keep_ratio=0.5):
                wanted[asked[0] * 10] = tiny("llama", "oracle")(ids).logits
    for layers, output in zip(each, found, strict=True):
        allowed = [wanted[1]]
        if layers == [0]:
            allowed.append(wanted[0])
        if layers in ([2], ["model.layers.2.*"]):
            allowed.append(wanted[20])
        assert min(difference(output.logits, one) for one in allowed) < ATOL, layers


class Chosen(Stack):
    """Applies the layers of a list that it keeps besides its layers, or one that it is given."""

    def forward(self, query, key, value):
        for layer in self.active:
            query = layer(query, key, value)
        return query

    def one(self, layer, query, key, value):
        return layer(query, key, value)


@pytest.mark.parametrize("layers", [[3], ["layers.3"], None], ids=["index", "pattern", "default"])
def test_a_layer_that_may_be_another_in_the_next_call_has_no_number(layers):
    """Dynamo guards the way to a module and what it looks like, so its graph of layer 3 runs for layer 0 as well."""
    (query, key, value), model = heads(kv_heads=4), Chosen()
    with torch.no_grad(), pytest.warns(TSAWarning, match="the next call may have another layer there"):
        model.active = [*model.layers]
        wanted = model(query, key, value)
        found = compiled(model, layers=layers)(query, key, value)
        one = compiled(model.one, layers=layers)(model.layers[3], query, key, value)
    assert difference(found, wanted) < ATOL and difference(one, Attention()(query, key, value)) < ATOL
    assert {row.reason for report in reports() for row in report} == {Reason.LAYER_COUNT_UNKNOWN}


def test_registered_layers_may_change_places():
    (query, key, value), model = heads(kv_heads=4), Stack()
    model.layers[0].settings["scale"] = 0.5
    run = compiled(model, layers=[0])
    with torch.no_grad():
        for scales in ((0.5, None, None, None), (None, None, None, 0.5)):
            expected = half_of(query, key, value, **({} if scales[0] is None else {"scale": scales[0]}))
            for scale in scales[1:]:
                expected = Attention(scale=scale)(expected, key, value)
            assert difference(run(query, key, value), expected) < ATOL
            model.layers = torch.nn.ModuleList(reversed(model.layers))


def test_layers_of_a_model_in_a_list_of_arguments_have_numbers():
    query, key, value = heads(kv_heads=4)
    with torch.no_grad():
        out = compiled(lambda models, *rows: models[0](*rows), layers=[1])([Stack()], query, key, value)
        for call in (Attention(), half_of, Attention(), Attention()):
            query = call(query, key, value)
    assert difference(out, query) < ATOL


def test_graphs_of_other_backends_keep_their_kernels(monkeypatch):
    """The order of kernels is no part of the keys of torch's caches, so what is compiled in ours has a mark of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tag = torch.compiler.config.cache_key_tag
    with dense_kernels():
        assert torch.compiler.config.cache_key_tag not in ("", tag)
    assert torch.compiler.config.cache_key_tag == tag
