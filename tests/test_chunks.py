"""Prompts in chunks through the caches of transformers: tiny models with random weights, against the whole prompt."""

import copy
import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tsa_compile import Coverage, Decision, Floor, KeepRatio, Reason, TSAConfig, TSAWarning, reports, tsa_backend

from .support import chunks, difference, exhaustive_but, in_turn, mixed_padding, oracle, short, tokens

pytestmark = pytest.mark.usefixtures("fresh")

EXACT = TSAConfig(layers=[], compiler="eager")
SPARSE = TSAConfig(layers=[0, 1], window=6, min_tokens=4, budget=Coverage(0), compiler="eager")
ATOL = 1e-5
CHUNK, LENGTH = 32, 140
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


BUDGETS = {
    "floor": (dict(budget=KeepRatio(0.3), floor=Floor(8, 2)), dict(keep_ratio=0.3, floor_window=8, floor_sinks=2)),
    "coverage": (dict(budget=Coverage(0.3), floor=Floor(8, 2)), dict(coverage=0.3, floor_window=8, floor_sinks=2)),
    "published": (dict(budget=KeepRatio(0.5), floor=None), dict(keep_ratio=0.5)),
}
WHOLE = [
    ("llama", "sdpa", False),
    ("llama", "sdpa", True),
    ("llama", "eager", False),
    ("qwen3", "sdpa", True),
    ("gpt2", "sdpa", False),
    ("gpt2", "sdpa", True),
]
"""qwen3 has norms of its own on the way to a cache, and else llama's code: padded, which is the harder case."""


@pytest.mark.parametrize("name, form, padded", exhaustive_but(WHOLE, WHOLE[1]))
def test_chunks_equal_the_whole_prompt_or_the_reference(name, form, padded):
    """Three graphs serve all chunks: the first, the second, and from the third on one of any length of the cache. What is
    exact, or keeps all, equals the whole prompt; where tokens are dropped, each chunk selects among all tokens so far, by
    its own last rows."""
    model, graphs = short(name, form), []

    def keep(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    configs = {"exact": EXACT.replace(compiler=keep), "all": SPARSE}
    configs |= {budget: SPARSE.replace(**options) for budget, (options, _) in BUDGETS.items()}
    ids, mask = tokens(3, LENGTH), PADDING if padded else None
    expected = whole(model, ids, mask)[:, :128]
    ids, mask = ids[:, :128], None if mask is None else mask[:, :128]
    for kind, compiled in zip(configs, in_turn(model, configs.values()), strict=True):
        if kind in BUDGETS:
            with oracle([0, 1], window=6, min_tokens=4, **BUDGETS[kind][1]):
                expected = chunks(short(name, "oracle"), ids, mask, CHUNK)
        assert difference(chunks(compiled, ids, mask, CHUNK), expected, mask) < ATOL, kind
    assert len(reports()) == 3 * len(configs), "nothing is compiled from the third chunk on"
    for kind, report in zip(list(configs) * 3, reports(), strict=True):
        assert kind == "exact" or report.sparse == 2
    decision = Decision.DENSE if mask is None else Decision.DENSE_PADDED
    for report in reports()[len(configs) :: len(configs)]:
        assert {(row.decision, row.mask) for row in report} == {(decision, BEHIND[mask is not None])}
    assert not any(map(read_masks, graphs)), "no mask of a chunk is left"


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=128),
}
WINDOWS = [(name, cache, padded) for name in ("gemma3", "mistral") for cache in CACHES for padded in (False, True)]
QUICK = [("gemma3", "dynamic", True), ("mistral", "static", False)]


def into(cache, model, ids, mask=None, size=CHUNK):
    """The logits of a prompt that goes through a model in chunks, into a cache."""
    found = []
    with torch.no_grad():
        for low in range(0, ids.shape[1], size):
            seen = {} if mask is None else {"attention_mask": mask[:, : low + size]}
            found.append(model(ids[:, low : low + size], past_key_values=cache, **seen).logits)
    return torch.cat(found, dim=1)


@pytest.mark.filterwarnings("ignore::tsa_compile.TSAWarning")
@pytest.mark.parametrize("name, cache, padded", exhaustive_but(WINDOWS, *QUICK))
def test_windows_of_caches_have_no_mask(name, cache, padded):
    """Layers whose cache holds a window see it, and the chunk; full ones are dense without a mask, or sparse."""
    model, mask = short(name), PADDING[:, :96] if padded else None
    ids, configs = tokens(3, 96), (EXACT, SPARSE)
    expected = whole(model, ids, mask)
    for compiled in in_turn(model, configs):
        assert difference(into(CACHES[cache](model.config), compiled, ids, mask), expected, mask) < ATOL
    dense = {Decision.DENSE, Decision.DENSE_PADDED}
    for full, said in ((dense, reports()[::2]), ({Decision.SPARSE}, reports()[1::2])):
        for row in (row for report in said for row in report):
            if name == "gemma3" and row.layer == "model.layers.0.self_attn":
                assert row.decision in full
            else:
                assert (row.decision, row.reason) == (Decision.WINDOW, Reason.SLIDING_WINDOW)


def test_a_prefix_that_is_used_again():
    """Each question behind a copy of one prefilled context, as if its prompt were whole; the context's cache stays."""
    model = short("llama")
    compiled = torch.compile(model, backend="tsa", options={"config": EXACT})
    cache, ids = DynamicCache(config=model.config), tokens(3, LENGTH)
    into(cache, compiled, ids[:, :60])
    for seed, length in ((1, 32), (2, 43)):
        question = tokens(3, length, seed)
        found = into(copy.deepcopy(cache), compiled, question, size=length)
        assert difference(found, whole(model, torch.cat([ids[:, :60], question], dim=1))[:, 60:]) < ATOL
    assert cache.get_seq_length() == 60
    assert all(report.dense == 2 for report in reports())


@pytest.mark.parametrize(("name", "candidates"), exhaustive_but([("qwen3", 3), ("qwen3", 20), ("gemma3", 3)], ("qwen3", 3)))
def test_assisted_decoding(name, candidates):
    """Its steps stay dense, exact and without a warning, with transformers' default of 20 candidates too; it generates what
    plain decoding does."""
    model = short(name, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    ids = tokens(1, 12).repeat(1, 4)  # what comes next stands in the prompt
    settings = dict(max_new_tokens=7 + candidates, do_sample=False)
    plain = model.generate(ids, **settings)
    model.forward = torch.compile(model.forward, backend=tsa_backend, options={"config": SPARSE})
    with warnings.catch_warnings():
        warnings.simplefilter("error", TSAWarning)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=candidates, **settings), plain)
    prefill, *steps = reports()
    assert prefill.sparse and steps and not any(report.sparse for report in steps)


def test_a_filled_cache_goes_on():
    """A conversation's next turn is prefilled behind what the cache holds, whatever was there before."""
    model = short("llama")
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


@pytest.mark.parametrize("padded", exhaustive_but([False, True], True))
@pytest.mark.parametrize("name", exhaustive_but(["llama", "qwen3"], "llama"))
def test_a_static_cache_is_prefilled_as_far_as_it_is_filled(name, padded):
    """The graph knows the buffer's length and a tensor of positions; one serves all chunks from the third on."""
    model, ids, mask = short(name), tokens(3, 128), PADDING[:, :128] if padded else None
    expected = whole(model, ids, mask)
    for compiled in in_turn(model, (EXACT, SPARSE)):
        cache = StaticCache(config=model.config, max_cache_len=160)
        assert difference(into(cache, compiled, ids, mask), expected, mask) < ATOL
    exact, sparse = reports()[::2], reports()[1::2]
    assert {row.decision for report in exact for row in report} == {Decision.DENSE_PADDED if padded else Decision.DENSE}
    assert {row.decision for report in sparse for row in report} == {Decision.SPARSE}
    assert len(exact) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", exhaustive_but(["llama", "mistral", "gemma3"], "mistral"))
def test_generate(name):
    """`prefill_chunk_size` is all that a user sets; no layer, each and some have a window."""
    model = short(name, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    inputs = dict(input_ids=tokens(3, 70), attention_mask=PADDING[:, :70])
    settings = dict(max_new_tokens=3, do_sample=False)
    plain = model.generate(**inputs, **settings)
    model.forward = torch.compile(model.forward, backend=tsa_backend, options={"config": EXACT})
    assert torch.equal(model.generate(**inputs, prefill_chunk_size=CHUNK, **settings), plain)
    full = {"mistral": 0, "gemma3": 1}.get(name, 2)
    prefill = [report for report in reports() if report.dense_padded]
    assert [report.dense_padded for report in prefill] == [full] * len(prefill) and len(prefill) <= 4
