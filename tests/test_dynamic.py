"""Lengths that change from call to call, and calls that are no prefill: decode steps, chunks, `model.generate`."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tsa_compile import Coverage, Decision, KeepRatio, Reason, TSAConfig, reports, tsa_backend

from .support import difference, exhaustive_but, mixed_padding, oracle, short, tiny, tokens

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse"),
]

LAYERS = [1]
HALF = TSAConfig(budget=KeepRatio(0.5), window=4, floor=None, min_tokens=4, layers=LAYERS, compiler="eager")
COVERAGE = HALF.replace(budget=Coverage(0.2))
KEEP_ALL = HALF.replace(budget=Coverage(0))
ATOL = 1e-5
SPARSE = [Reason.LAYER_NOT_SELECTED, Reason.SPARSE]
TOO_SHORT = [Reason.LAYER_NOT_SELECTED, Reason.TOO_SHORT]
DECODE = [Reason.NOT_SELF_ATTENTION] * 2
BEHIND_A_CACHE = [Reason.LAYER_NOT_SELECTED, Reason.NOT_SELF_ATTENTION]


def llama(form="sdpa", **changes):
    """Two layers, a dense one and one that may be sparse: what is tested here hangs on lengths, not on layers."""
    return tiny("llama", form, num_hidden_layers=2, **changes)


def reasons(report):
    return [row.reason for row in report]


def padding_for(length, padded):
    return {"attention_mask": mixed_padding(length, (0, 5, -4))} if padded else {}


def wanted_logits(config, length, **inputs):
    """By the reference where the length is compressed, by the plain model where it is not."""
    budget = {"keep_ratio": 0.5} if isinstance(config.budget, KeepRatio) else {"coverage": 0.2}
    minimum = config.min_length or config.min_tokens + config.window + 1
    with oracle(LAYERS if length >= minimum else [], window=4, min_tokens=4, **budget), torch.no_grad():
        return llama("oracle")(tokens(3, length), use_cache=False, **inputs).logits


@pytest.mark.parametrize(
    "config, padded",
    [
        pytest.param(HALF, False, id="half-plain"),
        pytest.param(COVERAGE, True, id="coverage-padded", marks=pytest.mark.exhaustive),
    ],
)
def test_one_compilation_serves_all_long_lengths(config, padded):
    """dynamic=True: a guard at the shortest compressed length, two graphs in all, each right on its side."""
    compiled = torch.compile(llama(), backend="tsa", options={"config": config}, dynamic=True)
    compilations = []
    for length in (50, 30, 64, 41, 9, 8, 7, 6):
        inputs = padding_for(length, padded and length > 9)
        inputs = inputs or ({"attention_mask": torch.ones(3, length, dtype=torch.long)} if padded else {})
        with torch.no_grad():
            logits = compiled(tokens(3, length), use_cache=False, **inputs).logits
        assert difference(logits, wanted_logits(config, length, **inputs), inputs.get("attention_mask")) < ATOL, length
        compilations.append(len(reports()))
    assert compilations == [1, 1, 1, 1, 1, 2, 2, 2]
    assert [reasons(report) for report in reports()] == [SPARSE, TOO_SHORT]


@pytest.mark.exhaustive
def test_short_calls_first_leave_long_ones_sparse():
    """The guard works from below, too: what was compiled as dense is not reused for a long sequence."""
    compiled = torch.compile(llama(), backend="tsa", options={"config": HALF}, dynamic=True)
    for length in (6, 40, 7, 33):
        with torch.no_grad():
            logits = compiled(tokens(3, length), use_cache=False).logits
        assert difference(logits, wanted_logits(HALF, length)) < ATOL, length
    assert [reasons(report) for report in reports()] == [TOO_SHORT, SPARSE]


@pytest.mark.exhaustive
def test_min_length_moves_the_guard():
    config = HALF.replace(min_length=32)
    compiled = torch.compile(llama(), backend="tsa", options={"config": config}, dynamic=True)
    plain = llama()
    for length in (32, 31):
        with torch.no_grad():
            logits = compiled(tokens(3, length), use_cache=False).logits
            changed = difference(logits, plain(tokens(3, length), use_cache=False).logits)
        assert (changed > ATOL) == (length == 32)
    assert [reasons(report) for report in reports()] == [SPARSE, TOO_SHORT]


@pytest.mark.parametrize("form", exhaustive_but(["sdpa", "eager"], "sdpa"))
def test_automatic_dynamic_shapes(form):
    """The first length is static, the second compiles a graph for all others."""
    compiled = torch.compile(llama(form), backend="tsa", options={"config": HALF})
    compilations = []
    for length in (40, 50, 33, 64, 21):
        inputs = padding_for(length, True)
        with torch.no_grad():
            logits = compiled(tokens(3, length), use_cache=False, **inputs).logits
        assert difference(logits, wanted_logits(HALF, length, **inputs), inputs["attention_mask"]) < ATOL, length
        compilations.append(len(reports()))
    assert compilations == [1, 2, 2, 2, 2]
    assert isinstance(reports()[-1].rows[0].query[2], str), "a symbolic length"


@pytest.mark.exhaustive
def test_batches_and_lengths_may_both_change():
    compiled = torch.compile(llama(), backend="tsa", options={"config": KEEP_ALL}, dynamic=True)
    model = llama()
    for batch, length in ((2, 40), (3, 33), (5, 50)):
        ids, mask = tokens(batch, length), mixed_padding(length, (0, 3, -3, 7, -7)[:batch])
        with torch.no_grad():
            logits, plain = (m(ids, attention_mask=mask, use_cache=False).logits for m in (compiled, model))
        assert difference(logits, plain, mask) < ATOL
    assert [report.sparse for report in reports()] == [1]


@pytest.mark.exhaustive
def test_inductor_serves_many_lengths_with_one_compilation():
    config = COVERAGE.replace(compiler="inductor")
    compiled = torch.compile(llama(), backend="tsa", options={"config": config}, dynamic=True)
    for length in (50, 33, 64):
        inputs = padding_for(length, True)
        with torch.no_grad():
            logits = compiled(tokens(3, length), use_cache=False, **inputs).logits
        assert difference(logits, wanted_logits(config, length, **inputs), inputs["attention_mask"]) < ATOL, length
    assert [report.sparse for report in reports()] == [1]


@pytest.mark.parametrize("form", exhaustive_but(["sdpa", "eager"], "sdpa"))
@pytest.mark.parametrize("padded", exhaustive_but([False, True], True))
def test_prefill_then_decode(form, padded):
    """The prefill is sparse and fills the cache with every token; decode steps are dense over all of it."""
    model = llama(form)
    compiled = torch.compile(model, backend="tsa", options={"config": HALF})
    mask = mixed_padding(40, (0, 9, 4)) if padded else torch.ones(3, 40, dtype=torch.long)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        given = {"attention_mask": mask} if padded else {}
        logits = compiled(tokens(3, 40), past_key_values=cache, **given).logits
        with oracle(LAYERS, window=4, min_tokens=4, keep_ratio=0.5):
            oracle_model = llama("oracle")
            oracle_cache = DynamicCache(config=model.config)
            wanted = oracle_model(tokens(3, 40), past_key_values=oracle_cache, **given).logits
        assert difference(logits, wanted, mask) < ATOL
        assert cache.get_seq_length() == 40
        model_cache = copy.deepcopy(oracle_cache)
        for step in range(3):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            given = {"attention_mask": mask} if padded else {}
            token = tokens(3, 1, seed=step)
            logits = compiled(token, past_key_values=cache, **given).logits
            assert difference(logits, model(token, past_key_values=model_cache, **given).logits) < ATOL
    assert [reasons(report) for report in reports()] == [SPARSE, DECODE, DECODE]


@pytest.mark.parametrize("padded", exhaustive_but([False, True], True), ids=["plain", "padded"])
def test_static_cache(padded):
    """Keys reach over the whole cache, of which the filled part counts; one decode graph serves all steps."""
    model = llama()
    compiled = torch.compile(model, backend="tsa", options={"config": KEEP_ALL})
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
    mask = mixed_padding(40, (0, 9, 4))
    for step in range(4):
        ids = tokens(3, 1 if step else 40, seed=step)
        given = {"attention_mask": mask} if padded else {}
        with torch.no_grad():
            logits, plain = (
                m(ids, past_key_values=cache, **given).logits for m, cache in zip((compiled, model), caches, strict=True)
            )
        assert difference(logits, plain, mask if padded and step == 0 else None) < ATOL, step
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
    assert reasons(reports()[0]) == SPARSE, "a dense layer comes before a sparse one"
    assert all(row.decision is not Decision.SPARSE for report in reports()[1:] for row in report)


@pytest.mark.parametrize("config", [KEEP_ALL, KEEP_ALL.replace(layers=[])], ids=["sparse", "exact"])
def test_prompts_of_several_lengths_in_static_caches(config):
    """The second length makes the number of queries symbolic; that it fits into the cache is a guard."""
    model = llama()
    compiled = torch.compile(model, backend="tsa", options={"config": config})
    for length in (40, 34, 50):
        ids, mask = tokens(3, length), mixed_padding(length, (0, 9, 4))
        caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
        with torch.no_grad():
            found, plain = (
                m(ids, attention_mask=mask, past_key_values=cache).logits
                for m, cache in zip((compiled, model), caches, strict=True)
            )
        assert difference(found, plain, mask) < ATOL, length
    assert {row.decision for report in reports() for row in report} <= {Decision.SPARSE, Decision.DENSE_PADDED}
    assert len(reports()) == 2
    assert reports()[0].sparse == reports()[1].sparse == len(config.layers)


@pytest.mark.parametrize("name", exhaustive_but(["llama", "gemma3", "gpt2"], "llama"))
def test_generate(name):
    """Greedy tokens equal the plain model's where every token is kept."""
    model = short(name, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    inputs = dict(input_ids=tokens(3, 40), attention_mask=mixed_padding(40, (0, 9, 4)))
    settings = dict(max_new_tokens=5, do_sample=False)
    plain = model.generate(**inputs, **settings)
    model.forward = torch.compile(model.forward, backend=tsa_backend, options={"config": KEEP_ALL.replace(layers=[0])})
    assert torch.equal(model.generate(**inputs, **settings), plain)
    sparse = [report.sparse for report in reports()]
    assert sparse[0] == 1 and not any(sparse[1:])


@pytest.mark.exhaustive
def test_generate_over_dropped_tokens():
    """Generation goes on from a sparse prefill: the same tokens as with the reference in its place."""
    settings = dict(max_new_tokens=6, do_sample=False)
    inputs = dict(input_ids=tokens(3, 40), attention_mask=mixed_padding(40, (0, 9, 4)))
    model = llama(eos_token_id=None)
    model.forward = torch.compile(model.forward, backend=tsa_backend, options={"config": HALF})
    found = model.generate(**inputs, **settings)
    model = llama()
    cache = DynamicCache(config=model.config)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with oracle(LAYERS, window=4, min_tokens=4, keep_ratio=0.5), torch.no_grad():
        prefill = llama("oracle", eos_token_id=None)
        logits = prefill(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    for _ in range(6):
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
        positions = mask.sum(-1, keepdim=True) - 1
        with torch.no_grad():
            logits = model(ids[:, -1:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    assert torch.equal(found, ids)
