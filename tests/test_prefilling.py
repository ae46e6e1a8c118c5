"""`prefill`: prompts run compiled, decode steps as before, through transformers' `generate` and its caches."""

import copy
import io
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

import tsa_compile
from tsa_compile import ConfigError, KeepRatio, Prefill, TSAConfig, attention, reports

from .support import Stack, chunks, difference, exhaustive_but, heads, mixed_padding, tiny, tokens

pytestmark = pytest.mark.usefixtures("fresh")

CONFIG = TSAConfig(window=8, min_tokens=8, layers=[1, 2], compiler="eager")
PROMPT = tokens(3, 70)
MASK = mixed_padding(70, (0, 9, 4))


def generate(model, **options):
    return model.generate(PROMPT, attention_mask=MASK, max_new_tokens=4, do_sample=False, **options)


@pytest.mark.parametrize(
    "options, graphs, sparse",
    [
        ({}, 1, 2),
        ({"cache_implementation": "static"}, 1, 0),  # generate builds the mask itself, outside the model
        ({"prefill_chunk_size": 35}, 2, 2),
    ],
    ids=["dynamic cache", "static cache", "chunks"],
)
@pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse")
def test_generate_compiles_prompts_alone_and_only_once(options, graphs, sparse):
    config = CONFIG if sparse else CONFIG.replace(layers=[])
    expected = generate(tiny("llama", attention.register(config, name="tsa_prefilling")), **options)
    model = tiny("llama")
    tsa_compile.prefill(model, CONFIG)
    assert torch.equal(generate(model, **options), expected)
    assert [report.sparse for report in reports()] == [sparse] * graphs
    assert reports(prefill=True) == reports()
    assert torch.equal(generate(model, **options), expected)
    assert len(reports()) == graphs, "a second prompt of that length compiles nothing"


class Wrapper(torch.nn.Module):
    """As PEFT's: `generate` is that of a model inside, which never calls what is around it."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config

    def forward(self, *args, **kwargs):
        return self.base_model.forward(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


def test_the_model_that_generate_runs_is_compiled():
    expected, inner = generate(tiny("llama")), tiny("llama")
    with tsa_compile.prefill(Wrapper(inner), CONFIG.replace(layers=[])) as handle:
        assert torch.equal(generate(handle.model), expected)
        assert len(reports()) == 1, "the prompt of generate"
        handle.model(PROMPT)
        assert len(reports()) == 2, "a call of the model that was given"
    assert inner._compiled_call_impl is None


def test_an_encoder_that_generate_runs_is_named():
    inner = tiny("llama")
    model = Wrapper(inner)
    model.config, inner.config.is_encoder_decoder = None, True
    with pytest.warns(tsa_compile.TSAWarning, match=r"a Wrapper runs its LlamaForCausalLM, which has an encoder"):
        tsa_compile.prefill(model, CONFIG).remove()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_the_model_writes_to_its_arguments_is_there(mode):
    class Noting(torch.nn.Module):
        def forward(self, inputs_embeds, sums):
            rows = inputs_embeds.unflatten(-1, (2, -1)).transpose(1, 2)
            out = torch.nn.functional.scaled_dot_product_attention(rows, rows, rows, is_causal=True)
            sums.copy_(out.sum((1, 3)))
            return out

    model, embeds, buffer = Noting(), torch.randn(2, 40, 32), torch.zeros(2, 64)
    with mode():
        wanted = model(inputs_embeds=embeds, sums=torch.zeros(2, 40)).sum((1, 3))
        with tsa_compile.prefill(model, CONFIG.replace(layers=[]), dynamic=True):
            model(inputs_embeds=embeds, sums=buffer[:, :40])
    assert difference(buffer[:, :40], wanted) < 1e-5


class Caches(DynamicCache):
    """Of a class of its own, which is passed to the model as it is."""


def chunks_of_another_cache(model, ids, mask, size):
    cache, found = Caches(config=model.config), []
    with torch.no_grad():
        for low in range(0, ids.shape[1], size):
            seen = {} if mask is None else {"attention_mask": mask[:, : low + size]}
            found.append(model(ids[:, low : low + size], past_key_values=cache, **seen).logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("masked", exhaustive_but([False, True], True))
def test_two_graphs_serve_chunks_of_any_prompt_in_other_caches(masked):
    """Of equal lengths too: the second chunk is as long as the cache before it. Of a DynamicCache: test_chunk_cache.py."""
    config = CONFIG.replace(min_length=1)
    expected = tiny("llama", attention.register(config, name="tsa_chunks"))
    model = tiny("llama")
    tsa_compile.prefill(model, config, dynamic=True)
    for length in (108, 106):
        ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long) if masked else None
        assert difference(chunks_of_another_cache(model, ids, mask, 36), chunks(expected, ids, mask, 36)) < 1e-4
    assert [report.sparse for report in reports()] == [2, 2]


def test_layers_of_chunks_are_compiled_once():
    """All caches have one length, and the epsilon of a norm is a constant: so layers behind a cache are alike."""
    given = []

    def keep(graph_module, inputs):
        given.extend(value for value in inputs if isinstance(value, torch.Tensor))
        return graph_module

    config = CONFIG.replace(layers=[2, 3], regional=True, compiler=keep)
    expected = tiny("llama", attention.register(config, name="tsa_regional"), num_hidden_layers=4)
    model, prompt = tiny("llama", num_hidden_layers=4), (tokens(1, 72), torch.ones(1, 72, dtype=torch.long), 36)
    tsa_compile.prefill(model, config, dynamic=True)
    assert difference(chunks_of_another_cache(model, *prompt), chunks(expected, *prompt)) < 1e-4
    assert [report.notes[-1].partition(",")[0] for report in reports()] == ["regional: 6 parts of the graph"] * 2
    assert given and not [value for value in given if value.dim() == 0 and value.is_floating_point()]


def test_a_cache_of_any_layout_is_made_dense():
    """What Inductor leaves of a first chunk may be a view of [B, L, G, D]: of later ones it would be another case."""
    from tsa_compile.prefilling import _prepared

    cache, (key, value) = DynamicCache(), (torch.randn(1, 30, 2, 8).transpose(1, 2) for _ in range(2))
    cache.update(key, value, 0)
    cache.layers[0].keys, cache.layers[0].values = key, value
    assert _prepared(cache) is cache
    layer = cache.layers[0]
    assert torch.equal(layer.keys, key) and torch.equal(layer.values, value)
    assert layer.keys.is_contiguous() and layer.values.is_contiguous()
    held = layer.keys.data_ptr()
    assert _prepared(cache).layers[0].keys.data_ptr() == held, "no copy of what is dense"


@pytest.mark.slow
def test_inductor_compiles_two_graphs_for_chunks_in_other_caches():
    model, plain = tiny("llama", num_hidden_layers=1), tiny("llama", num_hidden_layers=1)
    tsa_compile.prefill(model, CONFIG.replace(layers=[], compiler="inductor"), dynamic=True)
    ids, mask = tokens(1, 144), torch.ones(1, 144, dtype=torch.long)
    assert difference(chunks_of_another_cache(model, ids, mask, 36), plain(ids, attention_mask=mask).logits) < 1e-4
    assert len(reports()) == 2


def test_what_is_marked_is_not_the_users_tensor():
    model, ids = tiny("llama"), tokens(1, 40)
    embeddings = model.get_input_embeddings()(ids)  # which needs a gradient
    with tsa_compile.prefill(model, CONFIG.replace(layers=[]), dynamic=True):
        model(ids)
        model(inputs_embeds=embeddings).logits.sum().backward()
    assert not hasattr(ids, "_dynamo_weak_dynamic_indices") and model.get_input_embeddings().weight.grad is not None


def test_short_calls_are_the_models_own():
    model, ran = tiny("llama"), []
    model.register_forward_hook(lambda *_: ran.append(torch.compiler.is_compiling()))
    with tsa_compile.prefill(model, CONFIG), torch.no_grad():
        model(PROMPT[:, :31])
        assert not reports()
        model(PROMPT[:, :33])
        model(inputs_embeds=model.get_input_embeddings()(PROMPT))
    assert [report.rows[0].query[2] for report in reports()] == [33, 70]
    assert len(ran) == 3, "hooks run in both forms"


def test_any_module_whose_first_tensor_has_a_length():
    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = Stack(2)

        def forward(self, rows, training=False):
            split = rows.view(*rows.shape[:2], 4, 16).transpose(1, 2)
            return self.stack(split, split, split)

    tower, rows = Tower(), heads(length=40)[0].transpose(1, 2).flatten(2)
    with tsa_compile.prefill(tower, TSAConfig(layers=[], compiler="eager")), torch.no_grad():
        torch.testing.assert_close(tower(rows), tower.forward(rows))
    assert len(reports()) == 1


def test_it_can_be_undone_and_done_again():
    model = tiny("llama")
    dense = generate(model)
    first = tsa_compile.prefill(model, CONFIG)
    second = tsa_compile.prefill(model, CONFIG.replace(layers=[]))
    first.remove()
    assert torch.equal(generate(model), dense)
    assert [report.sparse for report in reports()] == [0], "the second one is in place"
    second.remove()
    second.remove()
    generate(model)
    assert len(reports()) == 1
    with pytest.raises(ZeroDivisionError), tsa_compile.prefill(model, CONFIG) as handle:
        assert isinstance(handle, Prefill) and handle.model is model and handle.config == CONFIG
        raise ZeroDivisionError
    generate(model)
    assert len(reports()) == 1, "an error in the block undoes it too"


def test_a_block_in_a_block_leaves_the_outer_one_in_place():
    model = tiny("llama")
    with tsa_compile.prefill(model, CONFIG) as outer:
        with tsa_compile.prefill(model, CONFIG.replace(layers=[])) as inner:
            assert model._compiled_call_impl is inner
        assert model._compiled_call_impl is outer
        later = tsa_compile.prefill(model, CONFIG)
        with later:
            outer.remove()
        assert model._compiled_call_impl is None
    assert model._compiled_call_impl is None


@pytest.mark.exhaustive
def test_every_model_and_setting_is_compiled_however_many_there_are():
    """Dynamo runs a function as it is from its ninth graph on."""
    models, ids = [tiny("llama", num_hidden_layers=1) for _ in range(2)], tokens(1, 40)
    budgets = [KeepRatio(0.1 + 0.05 * number) for number in range(10)]
    for number, budget in enumerate(budgets):
        with torch.no_grad(), tsa_compile.prefill(models[number % 2], CONFIG.replace(layers=[0], budget=budget)):
            models[number % 2](ids)
    assert [report.sparse for report in reports()] == [1] * len(budgets)


def test_copies_and_files_are_not_compiled():
    model = tiny("llama")
    handle = tsa_compile.prefill(model, CONFIG)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        generate(other)
    assert not reports()
    gone = weakref.ref(handle)
    handle.remove()
    del handle
    assert gone() is None


def test_somebody_elses_compiler_compiles_the_model_itself():
    model = tiny("llama")
    tsa_compile.prefill(model, CONFIG)
    with torch.no_grad():
        torch.compile(model.__call__, backend="eager", fullgraph=True)(PROMPT)
    assert not reports()


def compiled(model, how):
    if how == "module":
        model.compile(backend="tsa")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="tsa")
    return torch.compile(model, backend="tsa") if how == "wrapper" else model


@pytest.mark.parametrize("how", ["module", "forward", "wrapper"])
def test_a_model_that_is_compiled_already_is_refused(how):
    with pytest.raises(ConfigError, match="compiled already"):
        tsa_compile.prefill(compiled(tiny("llama"), how), CONFIG)


def test_errors_say_what_to_do():
    model = tiny("llama")
    with pytest.raises(ConfigError, match="takes a TSAConfig"):
        tsa_compile.prefill(model, {"layers": []})
    with pytest.raises(ConfigError, match=r"torch\.compile\(function"):
        tsa_compile.prefill(model.forward)
    model.config.is_encoder_decoder = True
    with pytest.raises(ConfigError, match="an encoder"):
        tsa_compile.prefill(model)
    model.config.is_encoder_decoder = False
    with tsa_compile.prefill(model), pytest.raises(ConfigError, match=r"0 by position, labels by name.*input_ids"):
        model(labels=None)


@pytest.mark.parametrize("dynamic", exhaustive_but([None, True], True))
def test_one_mask_holds_for_all_items(dynamic):
    """transformers reads a row of the mask for every item: it would raise an IndexError."""
    model, mask, ids = tiny("llama"), mixed_padding(96, (9,)), tokens(3, 96)
    wanted = chunks(tiny("llama"), ids, mask.expand(3, -1), 32)
    tsa_compile.prefill(model, CONFIG.replace(layers=[]), dynamic=dynamic)
    assert difference(chunks(model, ids, mask, 32), wanted, mask.expand(3, -1)) < 1e-4


def test_arguments_may_be_anything():
    class Model(torch.nn.Module):
        def forward(self, rows, settings):
            return rows * settings.layers

    class Settings:
        layers = 3

    with tsa_compile.prefill(model := Model(), CONFIG.replace(layers=[]), dynamic=True), torch.no_grad():
        assert model(torch.ones(1, 20), settings=Settings()).sum() == 60


def test_images_have_no_length():
    """[B, 3, H, W]: three channels would pass for three tokens, and each call for a decode step."""
    model = torch.nn.Conv2d(3, 4, 2)
    tsa_compile.prefill(model)
    with pytest.raises(ConfigError, match=r"no tensor \[B, L\] or \[B, L, D\]"):
        model(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("dynamic", exhaustive_but([None, True], True))
def test_a_model_that_is_not_causal_stays_so(dynamic):
    """A mask of ones, which costs a causal model nothing, would make it causal. Plain `torch.compile` makes it so with
    transformers before 5.24."""
    models = [tiny("llama", num_hidden_layers=2) for _ in range(2)]
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    models[0].compile(backend="eager", dynamic=dynamic)
    tsa_compile.prefill(models[1], CONFIG.replace(layers=[]), dynamic=dynamic)
    with torch.no_grad():
        expected, found = (model(PROMPT, past_key_values=DynamicCache()).logits for model in models)
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("dynamic", exhaustive_but([None, True], True))
def test_hooks_that_are_registered_later_run(dynamic):
    """Decode steps, which are not compiled, run them as well."""
    model, plain = tiny("llama", num_hidden_layers=2), tiny("llama", num_hidden_layers=2)
    tsa_compile.prefill(model, CONFIG.replace(layers=[]), dynamic=dynamic)
    with torch.no_grad():
        for steered in (False, True, False):
            hooks = [
                each.model.layers[0].register_forward_hook(lambda *given: given[2] + 1) for each in (model, plain) if steered
            ]
            assert difference(model(PROMPT).logits, plain(PROMPT).logits) < 1e-5
            for hook in hooks:
                hook.remove()


def test_a_handle_without_effect_is_no_context():
    model = tiny("llama", num_hidden_layers=1)
    first = tsa_compile.prefill(model)
    second = tsa_compile.prefill(model)
    with pytest.raises(ConfigError, match="another replaced it"), first:
        pass
    second.remove()
    with pytest.raises(ConfigError, match="was removed"), second:
        pass


@pytest.mark.parametrize("option", [{"dynamic": "yes"}, {"fullgraph": 5}])
def test_switches_are_true_or_false(option):
    with pytest.raises(ConfigError, match=f"{next(iter(option))} is a"):
        tsa_compile.prefill(tiny("llama", num_hidden_layers=1), **option)


@pytest.mark.exhaustive
def test_head_sizes_that_differ_between_models_are_numbers():
    """Dynamo takes a size for symbolic that another model had differently at the same line of code."""
    for head_dim in (32, 16):
        model = tiny("llama", num_hidden_layers=2, head_dim=head_dim)
        cache = StaticCache(config=model.config, max_cache_len=96)
        tsa_compile.prefill(model, CONFIG)
        with torch.no_grad():
            for part in tokens(1, 80).split(40, dim=1):
                model(part, past_key_values=cache)
        report = reports()[-1]
        assert report.sparse > 0 and report.rows[0].key == (1, 2, 96, head_dim)
