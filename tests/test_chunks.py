"""Prompts in chunks through the caches of transformers: tiny models with random weights, against the whole prompt."""

import copy
import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tsa_compile import Coverage, Decision, Floor, KeepRatio, Reason, TSAConfig, TSAWarning, reports, tsa_backend

from .support import chunks, difference, mixed_padding, oracle, slow_but, tiny, tokens

pytestmark = pytest.mark.usefixtures("fresh")

EXACT = TSAConfig(layers=[], compiler="eager")
SPARSE = TSAConfig(layers=[0, 1], window=6, min_tokens=4, budget=Coverage(0), compiler="eager")
ATOL = 1e-5
CHUNK, LENGTH = 20, 110
PADDING = mixed_padding(LENGTH, (0, 30, 4))
"""On the left alone: over a whole chunk of one item."""
BEHIND = {False: "causal (behind a cache)", True: "causal+padding (behind a cache)"}


def whole(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def read_masks(graph_module, rows=CHUNK):
    """The Boolean tensors with a row for each query in a graph: masks of chunks."""
    values = [node.meta.get("example_value") for node in graph_module.graph.nodes]
    return [
        v for v in values if isinstance(v, torch.Tensor) and v.dim() > 1 and v.dtype == torch.bool and v.shape[-2] == rows
    ]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "name, form", slow_but([("llama", "sdpa"), ("llama", "eager"), ("qwen3", "sdpa"), ("gpt2", "sdpa")], ("llama", "sdpa"))
)
def test_chunks_equal_the_whole_prompt(name, form, padded):
    """Three graphs serve all chunks: the first, the second, and from the third on one of any length of the cache."""
    model, graphs = tiny(name, form), []

    def keep(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    config = EXACT.replace(compiler=keep)
    compiled = torch.compile(model, backend="tsa", options={"config": config})
    ids, mask = tokens(3, LENGTH), PADDING if padded and form == "sdpa" else None
    got = chunks(compiled, ids[:, :100], None if mask is None else mask[:, :100], CHUNK)
    assert difference(got, whole(model, ids, mask)[:, :100], None if mask is None else mask[:, :100]) < ATOL
    _, *behind = reports()
    assert len(behind) == 2, "nothing is compiled from the third chunk on"
    decision = Decision.DENSE if mask is None else Decision.DENSE_PADDED
    for report in behind:
        assert {(row.decision, row.mask) for row in report} == {(decision, BEHIND[mask is not None])}
    assert not any(map(read_masks, graphs)), "no mask of a chunk is left"


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=128),
}
WINDOWS = [
    (name, cache, padded, sparse)
    for name in ("gemma3", "mistral")
    for cache in CACHES
    for padded in (False, True)
    for sparse in (False, True)
]
QUICK = [("gemma3", "dynamic", True, True), ("gemma3", "static", False, False)]


def into(cache, model, ids, mask=None, size=CHUNK):
    """The logits of a prompt that goes through a model in chunks, into a cache."""
    found = []
    with torch.no_grad():
        for low in range(0, ids.shape[1], size):
            seen = {} if mask is None else {"attention_mask": mask[:, : low + size]}
            found.append(model(ids[:, low : low + size], past_key_values=cache, **seen).logits)
    return torch.cat(found, dim=1)


@pytest.mark.filterwarnings("ignore::tsa_compile.TSAWarning")
@pytest.mark.parametrize("name, cache, padded, sparse", slow_but(WINDOWS, *QUICK))
def test_windows_of_caches_stay_as_they_are(name, cache, padded, sparse):
    """Layers whose cache holds a window keep their mask, and the reason says so; full ones lose it, or are sparse."""
    model, mask = tiny(name), PADDING[:, :80] if padded else None
    config = SPARSE.replace(layers=[0, 1, 2]) if sparse else EXACT
    compiled, ids = torch.compile(model, backend="tsa", options={"config": config}), tokens(3, 80)
    found = into(CACHES[cache](model.config), compiled, ids, mask)
    assert difference(found, whole(model, ids, mask), mask) < ATOL
    full = {Decision.SPARSE} if sparse else {Decision.DENSE, Decision.DENSE_PADDED}
    for row in (row for report in reports() for row in report):
        if name == "gemma3" and row.layer != "model.layers.1.self_attn":
            assert row.decision in full
        else:
            assert (row.decision, row.reason) == (Decision.UNCHANGED, Reason.SLIDING_WINDOW)


def test_a_prefix_that_is_used_again():
    """Each question behind a copy of one prefilled context, as if its prompt were whole; the context's cache stays."""
    model = tiny("llama", num_hidden_layers=2)
    compiled = torch.compile(model, backend="tsa", options={"config": EXACT})
    cache, ids = DynamicCache(config=model.config), tokens(3, LENGTH)
    into(cache, compiled, ids[:, :60])
    for seed, length in ((1, 20), (2, 31)):
        question = tokens(3, length, seed)
        found = into(copy.deepcopy(cache), compiled, question, size=length)
        assert difference(found, whole(model, torch.cat([ids[:, :60], question], dim=1))[:, 60:]) < ATOL
    assert cache.get_seq_length() == 60
    assert all(report.dense == 2 for report in reports())


@pytest.mark.parametrize("name", slow_but(["llama", "qwen3", "gemma3"], "qwen3"))
def test_assisted_decoding(name):
    """Its steps of a few tokens stay dense, exact and without a warning; it generates what plain decoding does."""
    model = tiny(name, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    ids = tokens(1, 12).repeat(1, 4)  # what comes next stands in the prompt
    settings = dict(max_new_tokens=10, do_sample=False)
    plain = model.generate(ids, **settings)
    model.forward = torch.compile(model.forward, backend=tsa_backend, options={"config": SPARSE})
    with warnings.catch_warnings():
        warnings.simplefilter("error", TSAWarning)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **settings), plain)
    prefill, *steps = reports()
    assert prefill.sparse and steps and not any(report.sparse for report in steps)


def test_a_filled_cache_goes_on():
    """A conversation's next turn is prefilled behind what the cache holds, whatever was there before."""
    model = tiny("llama", num_hidden_layers=2)
    compiled = torch.compile(model, backend="tsa", options={"config": EXACT}, dynamic=True)
    cache, ids = DynamicCache(config=model.config), tokens(3, LENGTH)
    expected = whole(model, ids)
    low = 0
    for high in (40, 41, 42, 67, LENGTH):
        with torch.no_grad():
            logits = compiled(ids[:, low:high], past_key_values=cache).logits
        assert difference(logits, expected[:, low:high]) < ATOL
        low = high
    assert reports()[-1].dense == 2


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_static_cache_is_prefilled_as_far_as_it_is_filled(padded, sparse):
    """The graph knows the buffer's length and a tensor of positions; one serves all chunks from the third on."""
    model = tiny("llama", num_hidden_layers=2)
    compiled = torch.compile(model, backend="tsa", options={"config": SPARSE if sparse else EXACT})
    cache, ids = StaticCache(config=model.config, max_cache_len=128), tokens(3, 100)
    mask, found = PADDING[:, :100] if padded else None, []
    with torch.no_grad():
        for low in range(0, 100, 25):
            seen = {} if mask is None else {"attention_mask": mask[:, : low + 25]}
            found.append(compiled(ids[:, low : low + 25], past_key_values=cache, **seen).logits)
    assert difference(torch.cat(found, dim=1), whole(model, ids, mask), mask) < ATOL
    decision = Decision.SPARSE if sparse else Decision.DENSE_PADDED if padded else Decision.DENSE
    assert {row.decision for report in reports() for row in report} == {decision}
    assert len(reports()) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3"])
def test_generate(name):
    """`prefill_chunk_size` is all that a user sets."""
    model = tiny(name, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    inputs = dict(input_ids=tokens(3, LENGTH), attention_mask=PADDING)
    settings = dict(max_new_tokens=4, do_sample=False)
    plain = model.generate(**inputs, **settings)
    model.forward = torch.compile(model.forward, backend=tsa_backend, options={"config": EXACT})
    assert torch.equal(model.generate(**inputs, prefill_chunk_size=CHUNK, **settings), plain)
    full = {"mistral": 0, "gemma3": 2}.get(name, 3)
    prefill = [report for report in reports() if report.dense_padded]
    assert [report.dense_padded for report in prefill] == [full] * len(prefill) and len(prefill) <= 4


BUDGETS = {
    "floor": (dict(budget=KeepRatio(0.3), floor=Floor(8, 2)), dict(keep_ratio=0.3, floor_window=8, floor_sinks=2), False),
    "coverage": (dict(budget=Coverage(0.3), floor=Floor(8, 2)), dict(coverage=0.3, floor_window=8, floor_sinks=2), True),
    "published": (dict(budget=KeepRatio(0.5), floor=None), dict(keep_ratio=0.5), True),
}


@pytest.mark.parametrize(
    "name, budget",
    slow_but([("llama", "floor"), ("llama", "coverage"), ("llama", "published"), ("qwen3", "floor")], ("llama", "floor")),
)
def test_sparse_chunks_equal_the_reference(name, budget):
    """Each chunk selects among all tokens so far, by its own last rows."""
    options, scalars, padded = BUDGETS[budget]
    ids, mask = tokens(3, LENGTH)[:, :100], PADDING[:, :100] if padded else None
    compiled = torch.compile(tiny(name, num_hidden_layers=2), backend="tsa", options={"config": SPARSE.replace(**options)})
    got = chunks(compiled, ids, mask, CHUNK)
    with oracle([0, 1], window=6, min_tokens=4, **scalars):
        expected = chunks(tiny(name, "oracle", num_hidden_layers=2), ids, mask, CHUNK)
    assert difference(got, expected, mask) < ATOL
    assert [report.sparse for report in reports()] == [2] * 3, "nothing is compiled from the third chunk on"


def test_chunks_of_which_all_is_kept_equal_the_whole_prompt():
    model = tiny("llama", num_hidden_layers=2)
    compiled = torch.compile(model, backend="tsa", options={"config": SPARSE})
    ids, mask = tokens(3, 60), mixed_padding(60, (0, 30, 4))
    assert difference(chunks(compiled, ids, mask, CHUNK), whole(model, ids, mask), mask) < ATOL
    assert all(report.sparse == 2 for report in reports())
