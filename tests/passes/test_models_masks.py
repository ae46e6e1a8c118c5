"""What real transformers models mask: the inferred predicate, evaluated densely, is the mask that the model builds.

A tiny model is captured by a backend that does nothing, its graph is run node by node, and at each attention call the
mask's real values are held against what was inferred from the graph.
"""

import pytest
import torch
import transformers

from tsa_compile.passes.find import find_calls
from tsa_compile.passes.masks.infer import infer_mask
from tsa_compile.passes.masks.info import MaskKind
from tsa_compile.passes.padding import PaddingBuilder
from tsa_compile.testing import capture_all, evaluate_mask, run_nodes

from ..support import exhaustive_but, mixed_padding, tiny, tokens

BATCH, LENGTH = 3, 24  # longer than the windows of 16
PADDED = dict(attention_mask=mixed_padding(LENGTH, (0, 5, -7)))
CASES = {
    "plain": dict(use_cache=False),
    "cache": dict(use_cache=True),
    "ones": dict(attention_mask=torch.ones(BATCH, LENGTH, dtype=torch.long), use_cache=False),
    "padded": dict(use_cache=False, **PADDED),
    "padded-cache": dict(use_cache=True, **PADDED),
}
KINDS = {
    "plain": MaskKind.CAUSAL,
    "cache": MaskKind.CAUSAL,
    "ones": MaskKind.CAUSAL_PADDING,
    "padded": MaskKind.CAUSAL_PADDING,
    "padded-cache": MaskKind.CAUSAL_PADDING,
}

# One layer each is enough, two where layers differ; True is a layer with a sliding window.
SHORT = dict(num_hidden_layers=1)
MIXED = dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
MODELS = {
    "llama": (SHORT, [False]),
    "mistral": (SHORT, [True]),
    "qwen2": (SHORT, [False]),
    "gemma3": (MIXED, [True, False]),
    "phi3": (SHORT, [False]),
    "gpt_neox": (SHORT, [False]),
    "gpt2": (dict(n_layer=1), [False]),
    "mixtral": (SHORT, [False]),
}
# Each model meets each spelling and each way of masking; llama meets all of them.
COVERING = [
    *((name, "sdpa", case) for name in MODELS for case in ("plain", "padded-cache")),
    *((name, "eager", case) for name in MODELS for case in ("cache", "padded")),
    *(("llama", form, case) for form in ("sdpa", "eager") for case in ("cache", "plain", "ones", "padded")),
    ("gemma3", "sdpa", "cache"),
    ("mistral", "sdpa", "ones"),
    ("gpt2", "sdpa", "ones"),
]
DYNAMIC = [
    ("llama", "sdpa", "padded"),
    ("llama", "sdpa", "plain"),
    ("llama", "eager", "padded-cache"),
    ("gemma3", "sdpa", "padded"),
    ("gpt2", "eager", "padded"),
]


QUICK = [("llama", "sdpa", "plain"), ("llama", "sdpa", "padded-cache"), ("llama", "eager", "padded")]


def capture(model, length=LENGTH, dynamic=None, **inputs):
    """The graph of a call, its calls, and every node's real value."""
    if "pixel_values" not in inputs:
        inputs.setdefault("input_ids", tokens(BATCH, length))
    captured = capture_all(model, dynamic=dynamic, **inputs)
    (graph,) = captured.graphs
    return graph, find_calls(graph), run_nodes(graph, captured.inputs[0])


def real_mask(call, values):
    """What the model lets through at a call: bool [B, H, Lq, Lk]."""
    query, key = (values[node.name] for node in (call.query, call.key))
    allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    if call.is_causal is True:
        allowed = allowed.tril()
    for term in call.masks:
        mask = values[term.mask.name]
        allowed = allowed & (mask == 0 if term.role in ("bias", "drop") else mask != 0)
    return allowed.expand(*query.shape[:3], key.shape[2])


def symbols_of(graph, values):
    """The value of each shape symbol."""
    found = {}
    for node in graph.graph.nodes:
        traced, real = node.meta.get("example_value"), values.get(node.name)
        if isinstance(traced, torch.SymInt):
            found[str(traced)] = real
        elif isinstance(traced, torch.Tensor) and isinstance(real, torch.Tensor):
            found.update({str(symbol): extent for symbol, extent in zip(traced.shape, real.shape, strict=True)})
    return found


def hold_against(graph, call, values):
    """Infers a call's mask and compares it, and the padding tensor that is made of it, with the real one."""
    info, real = infer_mask(call), real_mask(call, values)
    assert info.predicate is not None, f"{call.layer}: {info}"
    inferred = evaluate_mask(info, tuple(real.shape), values, symbols_of(graph, values))
    assert torch.equal(inferred, real)
    if info.kind in (MaskKind.CAUSAL, MaskKind.CAUSAL_PADDING):
        padding = torch.ones(real.shape[0], real.shape[3], dtype=torch.bool)
        if info.padding is not None:
            padding = emitted(graph, call, info, values)
        assert torch.equal(real, padding[:, None, None].expand_as(real).tril(real.shape[3] - real.shape[2]))
    return info


def emitted(graph, call, info, values):
    with graph.graph.inserting_before(call.node):
        node = PaddingBuilder(graph.graph).padding(call, info)
    inputs = tuple(values[node.name] for node in graph.graph.nodes if node.op == "placeholder")
    return run_nodes(graph, inputs)[node.name]


def check(name, form, case, dynamic=None):
    changes, windows = MODELS[name]
    graph, calls, values = capture(tiny(name, form, **changes), dynamic=dynamic, **CASES[case])
    assert [call.problem for call in calls] == [None] * len(windows)
    for call, window in zip(calls, windows, strict=True):
        assert call.form == form
        info = hold_against(graph, call, values)
        assert info.kind is (MaskKind.SLIDING_WINDOW if window else KINDS[case])


@pytest.mark.parametrize("name, form, case", exhaustive_but(sorted(set(COVERING)), *QUICK))
def test_decoders(name, form, case):
    check(name, form, case)


@pytest.mark.parametrize("name, form, case", exhaustive_but(DYNAMIC, DYNAMIC[1]))
def test_symbolic_lengths(name, form, case):
    check(name, form, case, dynamic=True)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_window_as_long_as_the_sequence_is_causal(name):
    graph, calls, values = capture(tiny(name, **MODELS[name][0]), length=16, use_cache=False)
    assert {hold_against(graph, call, values).kind for call in calls} == {MaskKind.CAUSAL}


@pytest.mark.parametrize("form", exhaustive_but(["sdpa", "eager"], "sdpa"))
def test_packed_sequences(form):
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(BATCH, -1)
    graph, (call,), values = capture(tiny("llama", form, **SHORT), position_ids=positions, use_cache=False)
    assert hold_against(graph, call, values).kind is MaskKind.PACKED


@pytest.mark.parametrize("form", exhaustive_but(["sdpa", "eager"], "sdpa"))
@pytest.mark.parametrize("new", [1, 5], ids=["decode", "chunk"])
def test_after_a_prefill(form, new):
    """One more token sees all; several are causal from the end of the cache on, and not from its beginning."""
    model = tiny("llama", form, **SHORT)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(BATCH, LENGTH), past_key_values=cache)
    graph, (call,), values = capture(model, length=new, past_key_values=cache, use_cache=True)
    assert real_mask(call, values).shape[2:] == (new, LENGTH + new)
    info = hold_against(graph, call, values)
    assert str(info) == ("none" if new == 1 else "causal (behind a cache)")


def encoder(kind, form):
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(image_size=16, patch_size=4, **sizes)
        return transformers.ViTModel._from_config(config, attn_implementation=form).eval()
    config = transformers.BertConfig(vocab_size=64, **sizes)
    return transformers.BertModel._from_config(config, attn_implementation=form).eval()


@pytest.mark.parametrize("form", exhaustive_but(["sdpa", "eager"], "sdpa"))
@pytest.mark.parametrize(
    "kind, inputs, expected",
    [
        ("bert", {}, MaskKind.NONE),
        ("bert", PADDED, MaskKind.PADDING),
        ("vit", dict(pixel_values=torch.rand(2, 3, 16, 16)), MaskKind.NONE),
    ],
    ids=["bert", "bert-padded", "vit"],
)
def test_encoders(kind, inputs, expected, form):
    graph, (call,), values = capture(encoder(kind, form), **inputs)
    assert call.form == form
    assert hold_against(graph, call, values).kind is expected


@pytest.mark.parametrize("name, case", [("llama", "plain"), ("llama", "padded"), ("gemma3", "padded")])
def test_exported(name, case):
    changes, windows = MODELS[name]
    model = tiny(name, **changes)
    inputs = {"input_ids": tokens(BATCH, LENGTH), **CASES[case]}
    with torch.no_grad():
        graph = torch.export.export(model, (), inputs, strict=False).graph_module
    kinds = [infer_mask(call).kind for call in find_calls(graph)]
    assert kinds == [MaskKind.SLIDING_WINDOW if window else KINDS[case] for window in windows]
