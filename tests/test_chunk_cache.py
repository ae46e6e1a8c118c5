"""Prompts in chunks through `prefill(dynamic=True)`: one graph, and the cache that the plain model leaves."""

import pytest
import torch
from transformers import DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer, QuantizedCache

import tsa_compile
from tsa_compile import Coverage, Decision, Floor, KeepRatio, TSAConfig, attention, reports
from tsa_compile.chunk_cache import carried, find, serves
from tsa_compile.passes.validate import Case

from .support import chunks, difference, exhaustive_but, mixed_padding, oracle, tiny, tokens

pytestmark = pytest.mark.usefixtures("fresh")

EXACT = TSAConfig(layers=[], compiler="eager")
SPARSE = TSAConfig(layers=[0, 1], window=6, min_tokens=4, budget=KeepRatio(0.3), floor=Floor(8, 2), compiler="eager")
CHUNK = 40
PROMPTS = (155, 115)
"""Their last chunks are shorter than the others."""
ATOL = 1e-5
TWO = dict(num_hidden_layers=2)


def compiled(name, config, attention="sdpa", **changes):
    model = tiny(name, attention, **{**TWO, **changes})
    tsa_compile.prefill(model, config, dynamic=True)
    return model


def padding(length):
    """On the left: over more than the first chunk of one item."""
    return mixed_padding(length, (0, 47))


def fill(model, cache, ids, mask=None):
    """The logits of tokens that go through a model behind what a cache holds."""
    return chunks(model, ids, mask, CHUNK, cache)


def assert_same(cache, plain):
    """Layers, their attributes, what they hold and how it lies in memory."""
    assert type(cache) is DynamicCache and len(cache.layers) == len(plain.layers)
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert type(layer) is DynamicLayer and vars(layer).keys() == vars(other).keys()
        assert layer.get_seq_length() == other.get_seq_length()
        for name in ("keys", "values"):
            held, wanted = getattr(layer, name), getattr(other, name)
            assert held.shape == wanted.shape and held.dtype == wanted.dtype and held.is_contiguous()
            assert held.untyped_storage().nbytes() == held.numel() * held.itemsize, "no more memory than its numbers"
            assert difference(held, wanted) < ATOL


@pytest.mark.parametrize("padded", exhaustive_but([False, True], False))
@pytest.mark.parametrize("form", exhaustive_but(["sdpa", "eager"], "sdpa"))
def test_one_graph_equals_the_whole_prompt(form, padded):
    graphs = []

    def keep(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    model = compiled("llama", EXACT.replace(compiler=keep), form)
    for length in PROMPTS:
        ids, mask = tokens(2, length), padding(length) if padded else None
        with torch.no_grad():
            whole = tiny("llama", form, **TWO)(ids, attention_mask=mask).logits
        assert difference(chunks(model, ids, mask, CHUNK), whole, mask) < ATOL
    (report,) = reports()
    assert {row.decision for row in report} == {Decision.DENSE_PADDED if form == "sdpa" or padded else Decision.DENSE}
    values = [node.meta.get("example_value") for graph in graphs for node in graph.graph.nodes]
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.dtype == torch.bool]
    assert graphs and not any(value.dim() > 2 for value in tensors), "no mask with a row for each query is left"


REFERENCE = [("llama", KeepRatio(0.3)), ("llama", Coverage(0.3)), ("qwen3", KeepRatio(0.3))]
"""qwen3 has norms of its own between projections and cache, and else llama's code."""


@pytest.mark.parametrize("name, budget", exhaustive_but(REFERENCE, REFERENCE[1]))
def test_one_graph_equals_the_reference(name, budget):
    """Each chunk selects among all tokens so far, by its own last rows; the first one among its own."""
    model = compiled(name, SPARSE.replace(budget=budget))
    kept = {"keep_ratio": 0.3} if isinstance(budget, KeepRatio) else {"coverage": 0.3}
    for length in PROMPTS:
        ids, mask = tokens(2, length), padding(length)
        found = chunks(model, ids, mask, CHUNK)
        with oracle([0, 1], window=6, min_tokens=4, floor_window=8, floor_sinks=2, **kept):
            wanted = chunks(tiny(name, "oracle", **TWO), ids, mask, CHUNK)
        assert difference(found, wanted, mask) < ATOL
    assert [report.sparse for report in reports()] == [2]


@pytest.mark.parametrize("made_for", [True, False], ids=["of the configuration", "of nothing"])
def test_the_cache_is_what_the_plain_model_leaves(made_for):
    """Chunks, a second turn, and decode steps, whose queries are the model's own."""
    model, plain = compiled("llama", EXACT), tiny("llama", **TWO)
    caches = [DynamicCache(config=model.config) if made_for else DynamicCache() for _ in range(2)]
    for ids in (tokens(2, 80), tokens(2, 75, 1), tokens(2, 1, 2), tokens(2, 21, 3), tokens(2, 50, 4)):
        found, wanted = (fill(each, cache, ids) for each, cache in zip((model, plain), caches, strict=True))
        assert difference(found, wanted) < ATOL
        assert_same(*caches)
    assert len(reports()) == 1


def test_a_cache_that_holds_views_is_compiled_for_as_well():
    model, plain = compiled("llama", EXACT), tiny("llama", **TWO)
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for each, cache in zip((model, plain), caches, strict=True):
        fill(each, cache, tokens(2, 80))
        cache.crop(-25)  # a view of each layer
        fill(each, cache, tokens(2, 40, 1))
    assert_same(*caches)
    assert len(reports()) == 1


def test_an_error_leaves_the_cache_as_it_was():
    """In the second layer, when the first one's keys are in its cache. Without Dynamo, which would compile each part of the
    model by itself in front of the error and behind it; what the cache is does not hang on that."""
    model, plain = compiled("llama", EXACT), tiny("llama", **TWO)
    cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)

    def fail(*_):
        raise ZeroDivisionError

    for ids in (tokens(2, 40), tokens(2, 35, 1)):
        before = [(layer.is_initialized, layer.keys) for layer in cache.layers]
        hook = model.model.layers[1].mlp.register_forward_hook(fail)
        with torch.compiler.set_stance("force_eager"), pytest.raises(ZeroDivisionError):
            fill(model, cache, ids)
        hook.remove()
        assert [(layer.is_initialized, layer.keys) for layer in cache.layers] == before
        assert difference(fill(model, cache, ids), fill(plain, other, ids)) < ATOL
        assert_same(cache, other)


def add_hooks(model, change):
    """In front of each attention module, `change` is given its arguments, the cache's layer among them."""

    def hook(module, args, kwargs):
        (cache,) = [value for value in (*args, *kwargs.values()) if isinstance(value, DynamicCache)]
        return args, change(kwargs, cache.layers[module.layer_idx]) or kwargs

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)


def louder_at_first(kwargs, layer):
    """As in models that read the first chunk in another way than later ones, and ask the cache which one it is."""
    if not layer.is_initialized:
        return {**kwargs, "hidden_states": kwargs["hidden_states"] * 2}


def weighted(kwargs, layer):
    """What is cached is read, as it is by layers that share it, and changed."""
    if layer.get_seq_length():
        layer.keys = layer.keys * torch.arange(layer.keys.shape[2])[:, None]


def replaced(kwargs, layer):
    """What is cached is not read, but written."""
    if layer.get_seq_length():
        layer.keys = torch.ones(2, 2, layer.get_seq_length(), 32)


@pytest.mark.parametrize("change", exhaustive_but([louder_at_first, weighted, replaced], louder_at_first))
def test_who_asks_a_layer_what_it_holds_is_told(change):
    model, plain = compiled("llama", EXACT), tiny("llama", **TWO)
    for each in (model, plain):
        add_hooks(each, change)
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    found, wanted = (fill(each, cache, tokens(2, 80)) for each, cache in zip((model, plain), caches, strict=True))
    assert difference(found, wanted) < ATOL
    assert len(reports()) == 2, "whether a layer is empty is a case of its own"


def test_a_layer_that_is_asked_is_a_plain_one():
    """Whatever it is asked, as long as its rows stand for keys and values."""
    for length in (0, 5):
        cache, plain = DynamicCache(config=tiny("llama", **TWO).config), DynamicLayer()
        held = torch.randn(2, 3, length, 4), torch.randn(2, 3, length, 6)
        for at in range(len(cache.layers)) if length else ():
            cache.update(*held, at)
        if length:
            plain.update(*held)
        with carried(cache, tiny("llama"), torch.device("cpu")):
            for at, name in enumerate(("keys", "is_initialized")):
                layer = cache.layers[at]
                assert layer.rows is not None and layer.get_seq_length() == length
                found, wanted = getattr(layer, name), getattr(plain, name)
                assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found is wanted
                assert layer.rows is None and layer.get_seq_length() == length and not hasattr(layer, "another")
        assert [layer.is_initialized for layer in cache.layers] == [length > 0] * 2


@pytest.mark.exhaustive
def test_generate_with_chunks_and_with_assistance():
    """What `generate` makes of a cache besides: it crops it, and looks for what comes next in the prompt."""
    settings = dict(max_new_tokens=8, do_sample=False)
    special = dict(pad_token_id=0, eos_token_id=None, bos_token_id=None)
    ids = tokens(1, 20).repeat(1, 4)
    model, plain = compiled("llama", EXACT, **special), tiny("llama", **TWO, **special)
    for options, graphs in (({}, 1), ({"prefill_chunk_size": CHUNK}, 1), ({"prompt_lookup_num_tokens": 3}, 2)):
        assert torch.equal(model.generate(ids, **settings, **options), plain.generate(ids, **settings))
        assert len(reports()) == graphs, "a whole prompt is its only chunk; assistance calls the model in another way"


@pytest.mark.parametrize("regional", exhaustive_but([None, False], None))
def test_layers_of_one_graph_are_compiled_once_unless_that_is_switched_off(regional):
    config = SPARSE.replace(layers=[2, 3], regional=regional)
    model, prompt = tiny("llama", num_hidden_layers=4), (tokens(1, 80), torch.ones(1, 80, dtype=torch.long), CHUNK)
    expected = tiny("llama", attention.register(config, name=f"tsa_one_graph_{regional}"), num_hidden_layers=4)
    tsa_compile.prefill(model, config, dynamic=True)
    assert difference(chunks(model, *prompt), chunks(expected, *prompt)) < 1e-4
    (report,) = reports()
    said = "regional: 6 parts of the graph, of which 5 were compiled"  # the first layer's finds the padding for all
    assert [note.startswith(said) for note in report.notes] == ([] if regional is False else [True])


@pytest.mark.exhaustive
@pytest.mark.parametrize(("regional", "layers"), [(False, 2), (None, 3)])
def test_inductor_compiles_one_graph(regional, layers):
    config = SPARSE.replace(compiler="inductor", regional=regional, layers=range(1, layers))
    model = tiny("llama", num_hidden_layers=layers)
    expected = tiny("llama", attention.register(config, name=f"tsa_inductor_{regional}"), num_hidden_layers=layers)
    tsa_compile.prefill(model, config, dynamic=True)
    for length in PROMPTS:
        ids, mask = tokens(2, length), padding(length)
        assert difference(chunks(model, ids, mask, CHUNK), chunks(expected, ids, mask, CHUNK), mask) < 1e-4
    assert [report.sparse for report in reports()] == [layers - 1]


def test_a_minimum_is_of_the_prompt_so_far():
    """A last chunk that is shorter than the minimum is sparse as the others are, in the same graph."""
    model = compiled("llama", SPARSE.replace(min_length=38))
    chunks(model, tokens(2, 115), None, CHUNK)
    assert [report.sparse for report in reports()] == [2]
    chunks(model, tokens(2, 35), None, CHUNK)
    assert [report.sparse for report in reports()] == [2, 0], "a shorter prompt is another graph"


def test_a_minimum_that_the_second_chunk_reaches_holds_for_shorter_ones_behind_it():
    """All keys so far are counted there, too. The first chunk is too short to be compiled at all."""
    model = compiled("llama", SPARSE.replace(min_length=38))
    chunks(model, tokens(2, 104), None, [20, 50, 34])
    assert [report.sparse for report in reports()] == [2]


@pytest.mark.parametrize("by", exhaustive_but(["argument", "configuration"], "configuration"))
def test_a_mask_that_is_read_for_more_than_attention_is_not_made_up(by):
    """The loss of a router takes a mask for one of the chunk's tokens, and not of all so far."""
    model, plain = compiled("mixtral", EXACT), tiny("mixtral", **TWO)
    given = {"output_router_logits": True} if by == "argument" else {}
    if not given:
        model.config.output_router_logits = plain.config.output_router_logits = True
    ids, losses = tokens(2, 90), []
    for called in (model, plain):
        cache = DynamicCache(config=called.config)
        with torch.no_grad():
            losses.append([called(part, past_key_values=cache, **given).aux_loss for part in ids.split(CHUNK, dim=1)])
    assert torch.allclose(torch.stack(losses[0]), torch.stack(losses[1]), atol=ATOL)


@pytest.mark.exhaustive
def test_prompts_of_which_all_is_kept_need_no_graph_of_their_own():
    model, plain = compiled("llama", SPARSE.replace(min_tokens=50)), tiny("llama", **TWO)
    ids = tokens(2, 36)
    assert difference(chunks(model, ids, None, CHUNK), chunks(plain, ids, None, CHUNK)) < ATOL
    chunks(model, tokens(2, 110), None, CHUNK)
    assert [report.sparse for report in reports()] == [2]


@pytest.mark.exhaustive
def test_both_forms_are_validated(monkeypatch):
    """The call is computed with keys before the queries, and without any."""
    seen, normal_form = [], Case._normal_form

    def spy(self, operands, *others):
        seen.append((operands[0].shape[2], operands[1].shape[2]))
        return normal_form(self, operands, *others)

    monkeypatch.setattr(Case, "_normal_form", spy)
    chunks(compiled("llama", EXACT), tokens(2, 80), padding(80), CHUNK)
    assert {keys - queries == 0 for queries, keys in seen} == {False, True}


@pytest.mark.parametrize(
    "options",
    exhaustive_but(
        [dict(kernel="a_shape", floor=None), dict(layers=[1], dense_kernel="sdpa")], dict(kernel="a_shape", floor=None)
    ),
)
def test_kernels_of_whole_prompts_run_in_first_chunks(options):
    config = SPARSE.replace(**options)
    assert serves(EXACT) and not serves(config)
    chunks(compiled("llama", config), tokens(2, 80), None, CHUNK)
    first, *_ = reports()
    assert {row.kernel for row in first} & {"a_shape", "sdpa"} and len(reports()) == 2


class Own(DynamicCache):
    pass


def offloaded():
    cache = DynamicCache(config=tiny("llama").config)
    cache.offloading = True  # what its streams need is a GPU
    return cache


OTHERS = {
    "a subclass": lambda: Own(config=tiny("llama").config),
    "offloaded": offloaded,
    "layers of a window": lambda: DynamicCache(config=tiny("gemma3").config),
    "static": lambda: StaticCache(config=tiny("llama").config, max_cache_len=64),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_caches_are_left_alone(name):
    cache = OTHERS[name]()
    assert find((), {"past_key_values": cache}) is None


def test_layers_of_different_lengths_are_left_alone():
    cache = DynamicCache(config=tiny("llama").config)
    assert find((tokens(1, 3), cache), {}) is cache
    cache.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0)
    assert find((), {"past_key_values": cache}) is None


@pytest.mark.slow
def test_windows_take_two_graphs():
    model, plain = compiled("gemma3", EXACT, num_hidden_layers=3), tiny("gemma3")
    ids = tokens(2, 80)
    assert difference(chunks(model, ids, None, CHUNK), chunks(plain, ids, None, CHUNK)) < ATOL
    assert len(reports()) >= 2


@pytest.mark.exhaustive
def test_another_dtype_than_the_weights_have():
    """Of autocast: the first chunk is compiled for itself, and later ones are right."""
    model, plain = compiled("llama", EXACT), tiny("llama", **TWO)
    ids = tokens(2, 80)
    with torch.autocast("cpu", torch.bfloat16):
        caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
        found, wanted = (fill(each, cache, ids) for each, cache in zip((model, plain), caches, strict=True))
    assert difference(found.float(), wanted.float()) < 5e-2
    for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert (layer.keys.dtype, layer.values.dtype) == (other.keys.dtype, other.values.dtype)
        assert layer.get_seq_length() == 80
    assert len(reports()) == 2


def test_the_layers_of_a_call_are_its_own():
    """What a graph reads is gone behind the call, also where nothing was filled."""
    cache = DynamicCache(config=tiny("llama").config)
    own = cache.layers
    with carried(cache, tiny("llama"), torch.device("cpu")):
        assert cache.layers is not own and cache.get_seq_length() == 0 and cache.get_mask_sizes(7, 0) == (7, 0)
        cache.update(torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 6), 1)
        assert cache.get_seq_length(1) == 7
        cache.update(torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 6), 1)
    assert cache.layers is own and [layer.get_seq_length() for layer in own] == [0, 9, 0]
    assert [layer.is_initialized for layer in own] == [False, True, False]


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no such cache")
def test_a_cache_that_quantizes_what_it_holds():
    """Later chunks see less precise keys and values of earlier ones, as they do in the plain model."""
    plain, model = tiny("llama", **TWO), compiled("llama", SPARSE.replace(budget=Coverage(0)))
    ids, mask = tokens(2, PROMPTS[0]), padding(PROMPTS[0])
    wanted = fill(plain, QuantizedCache("fp8", plain.config), ids, mask)
    found = fill(model, QuantizedCache("fp8", model.config), ids, mask)
    assert difference(found, wanted, mask) < ATOL < difference(fill(plain, DynamicCache(), ids, mask), wanted, mask)
    assert {row.decision for report in reports() for row in report} == {Decision.SPARSE}
