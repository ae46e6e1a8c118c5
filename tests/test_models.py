"""Real transformers models, tiny and with random weights: exact and sparse, SDPA and eager, padded or not, cached or not.

Every padded batch holds one item without padding, one padded on the left and one on the right. "Plain" is the model
without this package; the oracle for sparse layers is the same model over `kernels/reference.py` (`support.oracle`).
"""

import pytest
import torch
import transformers

from tsa_compile import (
    Coverage,
    Decision,
    Floor,
    KeepRatio,
    Reason,
    TSAConfig,
    TSAWarning,
    clear_reports,
    reports,
)

from .support import (
    DECODERS,
    OTHERS,
    VOCAB,
    difference,
    exhaustive_but,
    mixed_padding,
    oracle,
    run_each,
    short,
    tiny,
    tokens,
    with_sinks,
)

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse"),
]

LENGTH = 50
SPARSE_LAYERS = [0, 2]
SMALL = dict(window=4, min_tokens=4, floor=None, compiler="eager")
EXACT = TSAConfig(layers=[], **SMALL)
KEEP_ALL = TSAConfig(budget=Coverage(0), layers=SPARSE_LAYERS, **SMALL)
HALF = TSAConfig(budget=KeepRatio(0.5), layers=SPARSE_LAYERS, **SMALL)
COVERAGE = TSAConfig(budget=Coverage(0.2), layers=SPARSE_LAYERS, **SMALL)
FLOOR = HALF.replace(floor=Floor(8, 2))
BUDGETS = {
    "half": {"keep_ratio": 0.5},
    "coverage": {"coverage": 0.2},
    "floor": {"keep_ratio": 0.5, "floor_window": 8, "floor_sinks": 2},
}
"""As the oracle takes them, of the configurations under which tokens are dropped."""
ATOL = 1e-5

INPUTS = {
    "plain": dict(use_cache=False),
    "cache": dict(use_cache=True),
    "padded": dict(attention_mask=mixed_padding(LENGTH), use_cache=False),
    "padded-cache": dict(attention_mask=mixed_padding(LENGTH), use_cache=True),
}

# Each model goes through two of the inputs with SDPA and through the others with eager attention.
FORMS = ["sdpa", "eager"]
CASES = [("sdpa", "padded-cache"), ("eager", "padded"), ("sdpa", "plain"), ("eager", "cache")]
LIKE_LLAMA = ("qwen2", "phi3", "mixtral")
"""They differ in projections and feed-forward layers; masks, caches and the call of attention are llama's code. So they are
tried with padding alone, of which the mask without is a part."""
DECODER_CASES = [(name, *case) for name in DECODERS for case in (CASES[:2] if name in LIKE_LLAMA else CASES)]


def run(model, config, **inputs):
    """Logits of the compiled model, and the report."""
    compiled = torch.compile(model, backend="tsa", options={"config": config})
    with torch.no_grad():
        logits = compiled(**inputs).logits
    (report,) = reports()
    return logits, report


def reported(model, configs, **inputs):
    """The same for each configuration."""
    found = [output.logits for output in run_each(model, configs, **inputs)]
    return zip(found, reports(), strict=True)  # one report each: one graph


def plain(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def decoder(name, attention):
    """Llama with three layers, of which two become sparse; the others with two, a sparse and a dense one."""
    return tiny(name, attention) if name == "llama" else short(name, attention)


def windowed(name):
    """The layers whose mask is a sliding window."""
    return {"mistral": {0, 1}, "gemma3": {1}}.get(name, set())


def expected_rows(name, sparse=(), padded=False):
    """(layer, decision, reason) of each row of a `decoder`."""
    dense = Decision.DENSE_PADDED if padded else Decision.DENSE
    rows = []
    for layer in range(3 if name == "llama" else 2):
        if layer in windowed(name):
            rows.append((layer, Decision.WINDOW, Reason.SLIDING_WINDOW))
        elif layer in sparse:
            rows.append((layer, Decision.SPARSE, Reason.SPARSE))
        else:
            rows.append((layer, dense, Reason.LAYER_NOT_SELECTED))
    return rows


def rows_of(report):
    return [(row.layer_index, row.decision, row.reason) for row in report]


@pytest.mark.parametrize("name, form, case", exhaustive_but(DECODER_CASES, *DECODER_CASES[:2]))
def test_decoders(name, form, case):
    """What is exact, or keeps all tokens, equals the plain model: in exact mode on every row, pad rows included, and each
    full-attention layer loses its mask. Where tokens are dropped, the model computes what the method's reference computes in
    its place."""
    model, chosen = decoder(name, form), SPARSE_LAYERS if name == "llama" else SPARSE_LAYERS[:1]
    inputs = dict(input_ids=tokens(3, LENGTH), **INPUTS[case])
    mask = inputs.get("attention_mask")
    same, padded = plain(model, **inputs), mask is not None
    configs = {"exact": EXACT, "all": KEEP_ALL, "half": HALF, "coverage": COVERAGE, "floor": FLOOR}
    configs = {kind: config.replace(layers=config.layers and chosen) for kind, config in configs.items()}
    for kind, (logits, report) in zip(configs, reported(model, [*configs.values()], **inputs), strict=True):
        assert rows_of(report) == expected_rows(name, () if kind == "exact" else chosen, padded), kind
        assert {row.form for row in report} == {form}
        wanted = same
        if kind in BUDGETS:
            with oracle(set(chosen) - windowed(name), window=4, min_tokens=4, **BUDGETS[kind]):
                wanted = plain(decoder(name, "oracle"), **inputs)
            if name != "mistral":
                assert difference(wanted, same, mask) > 100 * ATOL, "or nothing was tested"
        assert difference(logits, wanted, None if kind == "exact" else mask) < ATOL, kind


@pytest.mark.parametrize("side", exhaustive_but(["left", "right"], "left"))
def test_padding_changes_nothing_on_valid_rows(side):
    """A padded item of the sparse model equals the same item alone, without padding."""
    model, config, pads = short("gpt2"), HALF.replace(layers=[0]), 10
    mask = mixed_padding(LENGTH, [pads if side == "left" else -pads])
    ids = tokens(1, LENGTH)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded, _ = run(model, config, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    alone = ids[mask.bool()][None]
    compiled = torch.compile(model, backend="tsa", options={"config": config})
    with torch.no_grad():
        assert difference(padded[mask.bool()][None], compiled(alone, use_cache=False).logits) < ATOL


@pytest.mark.slow
def test_inductor_runs_the_sparse_graph():
    inputs = dict(input_ids=tokens(3, LENGTH), attention_mask=mixed_padding(LENGTH), use_cache=True)
    config = COVERAGE.replace(layers=[1], compiler="inductor")
    logits, report = run(tiny("llama", num_hidden_layers=2), config, **inputs)
    assert report.sparse == 1
    with oracle({1}, window=4, min_tokens=4, coverage=0.2):
        wanted = plain(tiny("llama", "oracle", num_hidden_layers=2), **inputs)
    assert difference(logits, wanted, inputs["attention_mask"]) < ATOL


@pytest.mark.exhaustive
def test_inductor_runs_the_exact_graph_of_mixed_windows():
    model = tiny("gemma3", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    inputs = dict(input_ids=tokens(3, LENGTH), attention_mask=mixed_padding(LENGTH), use_cache=False)
    logits, report = run(model, EXACT.replace(compiler="inductor"), **inputs)
    assert (report.dense_padded, report.count(Decision.WINDOW)) == (1, 1)
    assert difference(logits, plain(model, **inputs)) < ATOL


def test_mistral_without_a_window_is_compressed():
    inputs = dict(input_ids=tokens(3, LENGTH), **INPUTS["padded"])
    logits, report = run(tiny("mistral", sliding_window=None), HALF, **inputs)
    assert report.sparse == 2
    with oracle(set(SPARSE_LAYERS), window=4, min_tokens=4, keep_ratio=0.5):
        wanted = plain(tiny("mistral", "oracle", sliding_window=None), **inputs)
    assert difference(logits, wanted, inputs["attention_mask"]) < ATOL


def test_a_sliding_window_in_all_layers_warns_that_nothing_became_sparse():
    model = tiny("mistral")
    with pytest.warns(TSAWarning, match="SLIDING_WINDOW"):
        run(model, HALF, input_ids=tokens(1, LENGTH))


@pytest.mark.parametrize("dtype", exhaustive_but([torch.bfloat16, torch.float16], torch.bfloat16), ids=str)
def test_half_precision(dtype):
    """Against the plain model in the same precision, and no further from float32 than that is."""
    model = tiny("llama")
    inputs = dict(input_ids=tokens(3, LENGTH), attention_mask=mixed_padding(LENGTH), use_cache=False)
    exact = plain(model, **inputs)
    model = model.to(dtype)
    logits, report = run(model, KEEP_ALL, **inputs)
    assert report.sparse == 2
    allowed = 2 * difference(plain(model, **inputs).float(), exact, inputs["attention_mask"])
    assert difference(logits.float(), exact, inputs["attention_mask"]) < allowed


@pytest.mark.parametrize("padded", exhaustive_but([False, True], True))
def test_sinks_beside_the_softmax(padded):
    """gpt-oss: exact, published and with the floor, over a window as well."""
    inputs = dict(input_ids=tokens(3, LENGTH), use_cache=False)
    if padded:
        inputs["attention_mask"] = mixed_padding(LENGTH)
    configs = [EXACT, HALF.replace(layers=[0]), FLOOR.replace(layers=[0])]
    settings = [None, BUDGETS["half"], BUDGETS["floor"]]
    for (found, report), chosen in zip(reported(with_sinks(), configs, **inputs), settings, strict=True):
        with oracle([] if chosen is None else [0], window=4, min_tokens=4, **(chosen or {})):
            wanted = plain(with_sinks("oracle"), **inputs)
        assert difference(found, wanted, inputs.get("attention_mask")) < ATOL
        assert [row.reason for row in report][1] is Reason.SLIDING_WINDOW and report.unchanged == 0


ENCODERS = {
    "bert": lambda **kw: transformers.BertModel._from_config(
        transformers.BertConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ),
        **kw,
    ),
    "vit": lambda **kw: transformers.ViTModel._from_config(
        transformers.ViTConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
        ),
        **kw,
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name, padded", exhaustive_but([("bert", True), ("bert", False), ("vit", False)], ("bert", True)))
def test_encoders_stay_unchanged(name, padded, form):
    torch.manual_seed(0)
    model = ENCODERS[name](attn_implementation=form).eval()
    inputs = {"pixel_values": torch.rand(2, 3, 32, 32)} if name == "vit" else {"input_ids": tokens(3, LENGTH)}
    if padded:
        inputs["attention_mask"] = mixed_padding(LENGTH)
    compiled = torch.compile(model, backend="tsa", options={"config": HALF.replace(layers=None)})
    with torch.no_grad():
        out = compiled(**inputs).last_hidden_state
        wanted = model(**inputs).last_hidden_state
    (report,) = reports()
    assert [(row.decision, row.reason) for row in report] == 2 * [(Decision.UNCHANGED, Reason.NOT_CAUSAL)]
    assert torch.equal(out, wanted)


def forms_of(name):
    """SDPA, eager or both: what a model of another kind has."""
    try:
        tiny(name, "sdpa")
    except ValueError:
        return ["eager"]
    return FORMS


@pytest.mark.parametrize("name", exhaustive_but(OTHERS, "opt", "gpt_neo (local)"))
def test_any_other_model_computes_what_it_did(name):
    """Gains or not: it never breaks because of the backend."""
    inputs = dict(input_ids=tokens(3, LENGTH), attention_mask=mixed_padding(LENGTH))
    configs = [EXACT, KEEP_ALL.replace(layers=None)]  # the upper half: where layers are of two kinds, the full one
    mixed = {"layer_types": ["sliding_attention", "full_attention"]} if "layer_types" in OTHERS[name][1] else {}
    for form in forms_of(name):
        model, cache = short(name, form, **mixed), form == "sdpa"
        torch._dynamo.reset()
        clear_reports()
        wanted = plain(model, **inputs, use_cache=cache)
        for logits, report in reported(model, configs, **inputs, use_cache=cache):
            assert difference(logits, wanted, inputs["attention_mask"]) < ATOL, (form, cache, report)


def test_one_key_head_for_all_queries_becomes_sparse():
    """Falcon-7B's multi-query attention, which SDPA broadcasts."""
    inputs = dict(input_ids=tokens(3, LENGTH), attention_mask=mixed_padding(LENGTH))
    model = tiny("falcon", "sdpa")
    with torch.no_grad():
        compiled = torch.compile(model, backend="tsa", options={"config": KEEP_ALL})
        logits = compiled(**inputs, use_cache=False).logits
    assert difference(logits, plain(model, **inputs, use_cache=False), inputs["attention_mask"]) < ATOL
    assert reports()[-1].sparse == len(KEEP_ALL.layers) and reports()[-1].unchanged == 0


@pytest.mark.parametrize(
    "form, config",
    [
        pytest.param("sdpa", KEEP_ALL.replace(layers=None), id="sdpa-keep-all"),
        pytest.param("eager", EXACT, id="eager-exact", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("name", exhaustive_but(["t5", "bart"], "bart"))
def test_encoder_decoders_compute_what_they_did(name, config, form):
    """Encoder, decoder and cross-attention in one call; T5 adds a learned relative bias to the scores."""
    kinds = {
        "t5": lambda: transformers.T5Config(
            vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
        "bart": lambda: transformers.BartConfig(
            vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128,
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(kinds[name](), attn_implementation=form).eval()
    inputs = dict(
        input_ids=tokens(3, LENGTH), attention_mask=mixed_padding(LENGTH), decoder_input_ids=tokens(3, LENGTH, seed=1)
    )
    compiled = torch.compile(model, backend="tsa", options={"config": config})
    with torch.no_grad():
        logits = compiled(**inputs).logits
    assert difference(logits, plain(model, **inputs)) < ATOL
