"""`attn_implementation="tsa"` beside the compiled model, and beside the same model over the method's reference."""

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tsa_compile import (
    ConfigError,
    Coverage,
    Decision,
    KernelError,
    Reason,
    RewriteError,
    TSAConfig,
    TSAWarning,
    attention,
    reports,
)

from ..support import (
    chunks,
    difference,
    exhaustive_but,
    mixed_padding,
    oracle,
    tiny,
    tokens,
    with_sinks,
    without_interpreter,
)
from .transformers_support import ATOL, FLOOR, LENGTH, SMALL, logits, no_warning, numbers, reasons, rows_of, sparse

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),  # its new name is too new
]

COVERAGE = TSAConfig(budget=Coverage(0.2), layers=[0, 2], floor=None, **SMALL)
GROUPS = FLOOR.replace(granularity="group")
KEEP_ALL = COVERAGE.replace(budget=Coverage(0))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*is SDPA in a compiled:tsa_compile.TSAWarning")
@pytest.mark.parametrize("tracer", ["make_fx", "jit", "fake"])
def test_it_is_sdpa_for_other_tracers_too(tracer):
    """Padding that they are shown is none that they may know of every call."""

    def run(ids, mask):
        return model(ids, attention_mask=mask, use_cache=False).logits

    model, ids = sparse("llama").requires_grad_(False), tokens(2, LENGTH)
    mask, ones = mixed_padding(LENGTH, (0, 9)), torch.ones_like(ids)
    wanted = tiny("llama")(ids, attention_mask=mask).logits
    with torch.no_grad():
        if tracer == "fake":
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                assert run(mode.from_tensor(ids), mode.from_tensor(mask)).shape == wanted.shape
            return
        if tracer == "jit":
            traced = torch.jit.trace(run, (ids, ones), check_trace=False)
        else:
            traced = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(ids, ones)
        assert difference(traced(ids, mask), wanted, mask) < ATOL


@pytest.mark.filterwarnings("ignore::tsa_compile.TSAWarning")
@pytest.mark.parametrize("name", exhaustive_but(["llama", "qwen3", "mistral", "gemma3"], "llama", "gemma3"))
def test_equal_to_the_compiled_model(name):
    """Logits, decisions and reasons, over left and right padding in one batch."""
    inputs = dict(input_ids=tokens(3, LENGTH), attention_mask=mixed_padding(LENGTH))
    model = sparse(name)
    found = logits(model, **inputs)
    wanted = logits(torch.compile(tiny(name), backend="tsa", options={"config": FLOOR}), **inputs)
    assert difference(found, wanted, inputs["attention_mask"]) < ATOL
    (report,) = reports()
    assert rows_of(attention.report(model)) == rows_of(report)
    for mine, compiled in zip(attention.report(model), report, strict=True):
        assert (mine.layer, mine.query, mine.key, mine.kernel) == (
            compiled.layer,
            compiled.query,
            compiled.key,
            compiled.kernel,
        )
    assert attention.report(model).summary == report.summary


@pytest.mark.parametrize("mask", [None, mixed_padding(LENGTH)], ids=["plain", "padded"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "phi3"])
def test_equal_to_the_reference(name, mask):
    inputs = dict(input_ids=tokens(3, LENGTH), attention_mask=mask)
    dense = logits(tiny(name), **inputs)
    assert difference(logits(sparse(name, KEEP_ALL), **inputs), dense, mask) < ATOL
    layers = {0, 2}
    for config, settings in [
        (FLOOR, {"keep_ratio": 0.5, "floor_window": 8, "floor_sinks": 2}),
        (COVERAGE, {"coverage": 0.2}),
    ]:
        with oracle(layers, window=4, min_tokens=4, **settings):
            wanted = logits(tiny(name, "oracle"), **inputs)
        assert difference(wanted, dense, mask) > 100 * ATOL, "or nothing was tested"
        assert difference(logits(sparse(name, config), **inputs), wanted, mask) < ATOL


def test_heads_of_a_group_select_together():
    ids = tokens(2, LENGTH)
    compiled = torch.compile(tiny("llama"), backend="tsa", options={"config": GROUPS})
    assert difference(logits(sparse("llama", GROUPS), ids), logits(compiled, ids)) < ATOL


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(cache):
    """Sparse prefill, dense decoding: as the reference generates, also into a cache that is longer than the prompt."""
    pads = mixed_padding(LENGTH, (0, 9, 20))
    inputs = dict(input_ids=tokens(3, LENGTH) * pads, attention_mask=pads)
    how = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    model = sparse("llama")
    found = model.generate(**inputs, **how, cache_implementation=cache)
    with oracle({0, 2}, window=4, min_tokens=4, keep_ratio=0.5, floor_window=8, floor_sinks=2):
        wanted = tiny("llama", "oracle").generate(**inputs, **how)
    assert torch.equal(found.sequences, wanted.sequences)
    assert max(map(difference, found.logits, wanted.logits)) < ATOL
    assert reasons(model) == [Reason.SPARSE, Reason.LAYER_NOT_SELECTED, Reason.SPARSE], "a decode step leaves no row"


@pytest.mark.parametrize("pads", [None, (0, 9, 35)], ids=["plain", "padded"])
def test_prompts_in_chunks(pads):
    """Each chunk selects among all tokens so far; one item has no valid token in the first."""
    length = 96
    ids, mask = tokens(3, length), None if pads is None else mixed_padding(length, pads)
    model = sparse("llama")
    found = chunks(model, ids, mask, 32)
    assert reasons(model) == [Reason.SPARSE, Reason.LAYER_NOT_SELECTED, Reason.SPARSE]
    assert {row.key[2] for row in attention.report(model)} == {length}
    with oracle({0, 2}, window=4, min_tokens=4, keep_ratio=0.5, floor_window=8, floor_sinks=2):
        wanted = chunks(tiny("llama", "oracle"), ids, mask, 32)
    assert difference(found, wanted, mask) < ATOL
    assert (
        difference(chunks(sparse("llama", KEEP_ALL), ids, mask, 32), logits(tiny("llama"), ids, attention_mask=mask), mask)
        < ATOL
    )


def test_autocast_is_left_to_sdpa_as_in_a_compiled_model():
    """It casts what SDPA is given; rotated queries and keys of a float32 model are float32, its values bfloat16."""
    ids, model = tokens(2, LENGTH), sparse("llama")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(TSAWarning, match=r"DTYPE.*float32,.* torch.bfloat16"):
            found = logits(model, ids)
        assert difference(found, logits(tiny("llama"), ids)) == 0
    assert set(reasons(model)) == {Reason.DTYPE}
    model = sparse("llama").to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), no_warning():
        logits(model, ids)
    assert Reason.SPARSE in reasons(model), "whose types are all that of autocast"


def test_windows_in_a_static_cache_that_generate_makes_masks_for():
    """A prompt in chunks, and a second turn: the model hands the masks to the interface once more."""
    ids, settings, found = tokens(1, 90), dict(max_new_tokens=2, do_sample=False), []
    scores = dict(return_dict_in_generate=True, output_logits=True)
    exact = attention.register(FLOOR.replace(layers=[]), name=f"tsa-{next(numbers)}")
    for name in ("sdpa", exact):
        model = tiny("mistral", name, num_hidden_layers=1, pad_token_id=0, eos_token_id=None)
        static = dict(cache_implementation="static", prefill_chunk_size=40)
        cache = transformers.StaticCache(config=model.config, max_cache_len=100)
        model.generate(ids[:, :40], past_key_values=cache, **settings)
        for kind in (static, dict(past_key_values=cache)):
            found.append(torch.stack(model.generate(ids, **kind, **settings, **scores).logits))
    assert difference(found[2], found[0]) < ATOL and difference(found[3], found[1]) < ATOL


@pytest.mark.parametrize("rows", [33, 21])
def test_chunks_in_a_static_cache(rows):
    """As in one that grows. As many rows as transformers has in a step of assisted decoding keep their mask, and stay
    dense without a word."""
    ids, mask, start = tokens(3, LENGTH), mixed_padding(LENGTH, (0, 9, 20)), LENGTH - rows
    model, found = sparse("llama"), []
    for cache in (transformers.DynamicCache(), transformers.StaticCache(config=model.config, max_cache_len=64)):
        logits(model, ids[:, :start], attention_mask=mask[:, :start], past_key_values=cache)
        with no_warning():
            found.append(logits(model, ids[:, start:], attention_mask=mask, past_key_values=cache))
    assert difference(*found, mask[:, start:]) < ATOL
    row, *_ = attention.report(model)
    assert row.reason is Reason.SPARSE and row.query[2] == (rows if rows == 33 else start), "the last prefill's"


@pytest.mark.parametrize("name, reason", [("gemma2 (soft capping)", "a soft cap"), ("mistral", "SLIDING_WINDOW")])
@pytest.mark.parametrize("mask", [None, mixed_padding(LENGTH)], ids=["plain", "padded"])
def test_what_is_no_plain_softmax_stays_exact(name, reason, mask):
    """Said once, not in each layer or call; equal to the model's own eager attention."""
    inputs = dict(input_ids=tokens(3, LENGTH), attention_mask=mask)
    model = sparse(name)
    with pytest.warns(TSAWarning, match=reason) as said:
        found = logits(model, **inputs)
        logits(model, **inputs)
    assert len(said) == 1
    assert difference(found, logits(tiny(name, "eager"), **inputs), mask) < ATOL
    assert difference(logits(model, tokens(3, 1)), logits(tiny(name, "eager"), tokens(3, 1))) < ATOL


@pytest.mark.parametrize("config", [FLOOR.replace(layers=[]), FLOOR, COVERAGE], ids=["exact", "floor", "published"])
@pytest.mark.parametrize(
    "mask",
    [pytest.param(None, id="plain", marks=pytest.mark.exhaustive), pytest.param(mixed_padding(LENGTH), id="padded")],
)
def test_sinks_as_in_the_compiled_model(config, mask):
    inputs, plain = dict(input_ids=tokens(3, LENGTH), attention_mask=mask), with_sinks()
    config = config.replace(layers=[0] if config.layers else [])
    compiled = torch.compile(plain, backend="tsa", options={"config": config})
    model = with_sinks(attention.register(config, name=f"tsa-{next(numbers)}"))
    with torch.no_grad():
        found, wanted = logits(model, **inputs), compiled(**inputs, use_cache=False).logits
    assert difference(found, wanted, mask) < ATOL
    if not config.layers:
        assert difference(found, logits(plain, **inputs), mask) < ATOL
    dense = Reason.SPARSE if config.layers else Reason.LAYER_NOT_SELECTED
    assert reasons(model) == [dense, Reason.SLIDING_WINDOW]
    assert difference(logits(model, tokens(3, 1)), logits(plain, tokens(3, 1))) < ATOL


def test_a_window_that_holds_the_whole_prompt_is_none():
    model = sparse("mistral", sliding_window=LENGTH)
    inputs = dict(input_ids=tokens(3, LENGTH), attention_mask=mixed_padding(LENGTH))
    with no_warning():
        found = logits(model, **inputs)
    assert reasons(model).count(Reason.SPARSE) == 2
    assert difference(found, logits(sparse("mistral", sliding_window=None), **inputs), inputs["attention_mask"]) < ATOL


def test_training_is_dense():
    model, plain = sparse("llama", attention_dropout=0.5).train(), tiny("llama", attention_dropout=0.5).train()
    inputs = dict(input_ids=tokens(3, LENGTH), attention_mask=mixed_padding(LENGTH), labels=tokens(3, LENGTH))
    with pytest.warns(TSAWarning, match="NEEDS_GRAD"):
        torch.manual_seed(0)
        model(**inputs).loss.backward()
    torch.manual_seed(0)
    plain(**inputs).loss.backward()
    gradients = [(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]
    assert all(torch.allclose(*pair, atol=1e-6) for pair in gradients)
    with torch.no_grad(), pytest.warns(TSAWarning, match="DROPOUT"):
        model(**inputs)


@pytest.mark.filterwarnings("ignore::tsa_compile.TSAWarning")
def test_checkpoints_that_run_a_layer_without_gradients_are_training():
    found = []
    for name in ("sdpa", attention.register(FLOOR, name=f"tsa-{next(numbers)}")):
        model = tiny("llama", name, num_hidden_layers=1).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=True))
        rows = model.get_input_embeddings()(tokens(1, LENGTH))
        model(inputs_embeds=rows, labels=tokens(1, LENGTH), use_cache=False).loss.backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*found)


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that come about, outside of opaque ops."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen.update(tuple(t.shape) for t in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(t))
        return out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_no_mask_of_length_by_length(name, padded):
    """Padding stays two-dimensional, in dense layers as well, and a mask of ones is none. So do windows."""
    length = 300
    mask = mixed_padding(length) if padded else torch.ones(3, length, dtype=torch.long)
    window = name == "mistral"
    model = sparse(name, FLOOR.replace(layers=[])) if window else sparse(name)
    with Shapes() as shapes:
        logits(model, tokens(3, length), attention_mask=mask)
    assert (3, length, 64) in shapes.seen
    assert not [shape for shape in shapes.seen if shape[-2:] == (length, length)]
    assert {row.mask for row in attention.report(model)} == {
        "sliding window" if window else "causal+padding" if padded else "causal"
    }


def test_masks_of_ones_own():
    """Four dimensions, or packed sequences: as SDPA computes them."""
    ids = tokens(2, LENGTH)
    given = torch.rand(2, 1, LENGTH, LENGTH) > 0.5
    given |= torch.eye(LENGTH, dtype=torch.bool)
    packed = torch.arange(LENGTH).remainder(LENGTH // 2).expand(2, -1)
    for inputs in (dict(attention_mask=given), dict(position_ids=packed, use_cache=False)):
        model = sparse("llama")
        with pytest.warns(TSAWarning, match="MASK_OPAQUE"):
            found = logits(model, ids, **inputs)
        assert difference(found, logits(tiny("llama"), ids, **inputs)) < ATOL
        assert reasons(model) == [Reason.MASK_OPAQUE] * 3
    with pytest.raises(RewriteError, match=r"MASK_OPAQUE.*strict=True"):
        logits(sparse("llama", FLOOR.replace(strict=True)), ids, attention_mask=given)


def test_a_bidirectional_encoder_stays_as_it_is():
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    config = transformers.BertConfig(**sizes)
    attention.register(FLOOR.replace(layers=None))
    models = []
    for name in ("sdpa", "tsa"):
        torch.manual_seed(0)
        models.append(transformers.BertModel._from_config(config, attn_implementation=name).eval())
    inputs = dict(input_ids=tokens(3, LENGTH), attention_mask=mixed_padding(LENGTH))
    with torch.no_grad(), no_warning():
        plain, found = (model(**inputs).last_hidden_state for model in models)
    assert difference(plain, found) < ATOL
    assert set(reasons(models[1])) == {Reason.NOT_CAUSAL}


def test_configurations_side_by_side():
    ids = tokens(1, LENGTH)
    attention.register(FLOOR, name="tsa-a")
    attention.register(FLOOR.replace(layers=[]), name="tsa-b")
    first, second = tiny("llama", "tsa-a"), tiny("llama", "tsa-b")
    assert difference(logits(second, ids), logits(tiny("llama"), ids)) < ATOL
    assert difference(logits(first, ids), logits(second, ids)) > 100 * ATOL
    second.set_attn_implementation("tsa-a")
    assert torch.equal(logits(first, ids), logits(second, ids))


def test_a_dense_kernel():
    model = sparse("llama", FLOOR.replace(dense_kernel="sdpa"))
    for mask in (None, mixed_padding(LENGTH)):
        found = logits(model, tokens(3, LENGTH), attention_mask=mask)
        assert rows_of(attention.report(model))[1] == (1, Decision.KERNEL, Reason.LAYER_NOT_SELECTED)
        wanted = logits(sparse("llama"), tokens(3, LENGTH), attention_mask=mask)
        assert difference(found, wanted, mask) < ATOL
    model = sparse("llama", FLOOR.replace(kernel="triton"))
    with pytest.warns(TSAWarning, match="KERNEL"):
        assert difference(logits(model, tokens(1, LENGTH)), logits(tiny("llama"), tokens(1, LENGTH))) < ATOL


@pytest.mark.exhaustive
def test_block_sparse_kernels_are_there_in_a_fresh_process():
    source = "from tsa_compile import TSAConfig, attention; print(attention.register(TSAConfig(dense_kernel='a_shape')))"
    assert without_interpreter(source).strip() == "tsa"


def test_compiled_it_is_what_the_backend_finds():
    model = sparse("llama")
    ids = tokens(1, LENGTH)
    eager = logits(model, ids)
    with pytest.warns(TSAWarning, match="SDPA in a compiled"):
        found = logits(torch.compile(model, backend="tsa", options={"config": FLOOR}), ids)
    assert reports()[0].sparse == 2
    assert difference(found, eager) < ATOL


def test_continuous_batching_is_refused():
    """By transformers itself, before anything is computed."""
    model = sparse("llama")
    with pytest.raises(ValueError, match=r"tsa.* is not supported"):
        model.init_continuous_batching()


@pytest.mark.parametrize("name", ["sdpa", "my-flash", "a/b", "paged|tsa", "", 3])
def test_names_that_are_not_allowed(name):
    with pytest.raises(ConfigError, match=r"name=.* is not allowed"):
        attention.register(name=name)


def test_configurations_that_are_not_allowed():
    with pytest.raises(ConfigError, match="takes a TSAConfig"):
        attention.register({"layers": [0]})
    with pytest.raises(KernelError, match="unknown attention kernel 'no'"):
        attention.register(FLOOR.replace(kernel="no"))


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
def test_on_a_gpu(padded):
    """bfloat16, kernels of the GPU: against float32, the error is not half again as large as the compiled model's."""
    length, config = 3000, TSAConfig(layers=[0, 2], window=64, min_tokens=128, min_length=1, compiler="eager")
    sizes = dict(max_position_embeddings=4096, head_dim=64)
    mask = mixed_padding(length, (0, 500, -700)).cuda() if padded else None
    inputs = dict(input_ids=tokens(3, length).cuda(), attention_mask=mask)
    model = sparse("llama", config, **sizes).to("cuda", torch.bfloat16)
    plain = tiny("llama", **sizes).to("cuda", torch.bfloat16)
    compiled = {"backend": "tsa", "options": {"config": config}}
    found = logits(model, **inputs)
    wanted = logits(torch.compile(plain, **compiled), **inputs)
    true = logits(torch.compile(tiny("llama", **sizes).cuda(), **compiled), **inputs)
    assert attention.report(model).sparse == reports()[0].sparse == 2
    valid = ... if mask is None else mask.bool()
    assert (found - true)[valid].norm() < 1.5 * (wanted - true)[valid].norm()


def test_one_mask_holds_for_all_items():
    model, ids, mask = sparse("llama"), tokens(2, LENGTH), mixed_padding(LENGTH, (7,))
    both = mask.expand(2, -1)
    assert difference(logits(model, ids, attention_mask=mask), logits(model, ids, attention_mask=both), both) < ATOL
    with pytest.raises(ConfigError, match="of 2 items does not fit a batch of 3"):
        logits(model, tokens(3, LENGTH), attention_mask=both)


def test_a_cache_that_holds_less_than_the_mask_says_is_refused():
    """As after an error in the middle of a chunk, when the last layers have not got it."""
    model, ids, cache = sparse("llama"), tokens(1, 72), transformers.DynamicCache()
    logits(model, ids[:, :36], past_key_values=cache)
    last = cache.layers[-1]
    last.keys, last.values = last.keys[:, :, :0], last.values[:, :, :0]
    with pytest.raises(ConfigError, match=r"an attention_mask of 72 tokens for 36 keys.*new cache"):
        logits(model, ids[:, 36:], past_key_values=cache, attention_mask=torch.ones(1, 72, dtype=torch.long))
