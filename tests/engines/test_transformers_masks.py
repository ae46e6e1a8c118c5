"""The masks that `attn_implementation="tsa"` makes, and models that read them in ways of their own."""

import pytest
import torch
import transformers
from packaging.version import Version

from tsa_compile import ConfigError, Coverage, Decision, Reason, TSAConfig, TSAWarning, attention
from tsa_compile.engines.calls import as_written, read
from tsa_compile.engines.transformers import _is_window
from tsa_compile.passes.masks.info import MaskKind

from ..support import difference, mixed_padding, short, tiny, tokens
from .transformers_support import ATOL, FLOOR, LENGTH, SMALL, logits, reasons

pytestmark = pytest.mark.usefixtures("fresh")

KEEP_ALL = TSAConfig(budget=Coverage(0), layers=[0, 2], floor=None, **SMALL)


@pytest.mark.parametrize("config", [FLOOR.replace(layers=[]), KEEP_ALL], ids=["exact", "sparse"])
def test_a_causal_mask_is_one_in_modules_that_say_they_are_not_causal(config):
    """PaliGemma's modules and those of Gemma with this option: what SDPA is given hides the future all the same."""
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=64)
    shape = transformers.GemmaConfig(
        **sizes, num_key_value_heads=2, head_dim=16, pad_token_id=0, use_bidirectional_attention=True
    )
    attention.register(config, name="tsa_not_causal")
    torch.manual_seed(0)
    model = transformers.GemmaModel(shape).eval()
    assert not model.layers[0].self_attn.is_causal
    ids, pads = tokens(3, LENGTH), mixed_padding(LENGTH)
    for mask in (pads, None, torch.ones_like(pads)):
        found = {}
        for name in ("sdpa", "tsa_not_causal"):
            model.set_attn_implementation(name)
            with torch.no_grad():
                whole = model(ids, attention_mask=mask).last_hidden_state
                first = model(ids[:, :30], attention_mask=None if mask is None else mask[:, :30])
                rest = model(ids[:, 30:], attention_mask=mask, past_key_values=first.past_key_values).last_hidden_state
            found[name] = torch.cat([whole, rest], 1)
        valid = (torch.ones_like(pads) if mask is None else mask).bool()
        valid = torch.cat([valid, valid[:, 30:]], 1)
        assert difference(found["sdpa"][valid], found["tsa_not_causal"][valid]) < ATOL


@pytest.mark.parametrize("name", ["bloom (ALiBi)", "mpt (ALiBi)"])
def test_models_that_compute_attention_by_themselves_are_refused(name):
    with pytest.raises(ConfigError, match=r"AttentionInterface.*backend"):
        model = tiny(name, attention.register(FLOOR, name="tsa-alone"))
        logits(model, tokens(1, LENGTH), attention_mask=mixed_padding(LENGTH, (9,)))


@pytest.mark.parametrize("padded", [False, True])
def test_the_copy_of_a_window_is_a_window(padded, monkeypatch):
    """Masks that a model or a hook moves to another device lose their attributes, not what they say."""
    ids, mask = tokens(3, LENGTH), mixed_padding(LENGTH) if padded else None
    expected = logits(tiny("mistral"), ids, attention_mask=mask)
    model = tiny("mistral", attention.register(FLOOR.replace(layers=[]), name="tsa-copied"))
    made = []

    def copied(module, query, key, value, mask, *others):
        made.append(mask)
        return read(module, query, key, value, mask.clone(), *others)

    monkeypatch.setattr("tsa_compile.engines.transformers.read", copied)
    assert difference(logits(model, ids, attention_mask=mask), expected, mask) < ATOL
    assert reasons(model) == [Reason.SLIDING_WINDOW] * len(made) and {mask.dtype for mask in made} == {torch.int32}
    assert {row.decision for row in attention.report(model)} == {Decision.WINDOW}


CACHES = {
    "dynamic": lambda config: transformers.DynamicCache(config=config),
    "static": lambda config: transformers.StaticCache(config=config, max_cache_len=160),
}


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss (sinks)"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_window_behind_a_cache_has_no_mask(name, cache, padded):
    """The chunks of a prompt: what a layer's cache holds of a window, and the chunk."""
    ids, mask = tokens(3, 136), mixed_padding(136) if padded else None
    model = short(name, attention.register(TSAConfig(layers=[]), name="tsa-window"))
    held, found = CACHES[cache](model.config), []
    with torch.no_grad():
        for low, high in ((0, 40), (40, 80), (80, 136)):
            seen = None if mask is None else mask[:, :high]
            found.append(model(ids[:, low:high], attention_mask=seen, past_key_values=held).logits)
        wanted = short(name, "eager")(ids, attention_mask=mask).logits
    assert difference(torch.cat(found, 1), wanted, mask) < 1e-5
    decisions = {row.decision for row in attention.report(model) if row.reason is Reason.SLIDING_WINDOW}
    assert decisions == {Decision.WINDOW}


def test_chunks_are_no_window():
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    padding = torch.zeros(3, dtype=torch.long)
    for size in (1, 7, 16):
        for first in (0, 33):
            assert _is_window(sliding_window_causal_mask_function(size), size, first, LENGTH)
            assert not _is_window(sliding_window_causal_mask_function(size + 1), size, first, LENGTH)
            assert size == 1 or not _is_window(chunked_causal_mask_function(size, padding), size, first, LENGTH)
    assert not _is_window(None, 7, 0, LENGTH)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_a_mask_of_ones_is_padding(dtype):
    query = torch.randn(2, 4, 9, 8)
    call = read(torch.nn.Module(), query, query, query, torch.ones(2, 9, dtype=dtype), 0.0, None, True, {})
    assert call.kind is MaskKind.CAUSAL_PADDING and call.window is None


PEGASUS = dict(vocab_size=64, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, pad_token_id=0)


V4 = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, vocab_size=64, n_routed_experts=4, q_lora_rank=8,
    qk_rope_head_dim=8, num_experts_per_tok=2, moe_intermediate_size=16, sliding_window=16, pad_token_id=0,
    layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
)  # fmt: skip
WITHOUT_SDPA = [
    pytest.param(
        "BigBirdPegasus", dict(PEGASUS, is_decoder=True), [Reason.MASK_OPAQUE] * 2, id="relies on the mask",
        marks=pytest.mark.exhaustive,
    ),
    pytest.param("DeepseekV4", V4, [Reason.MASK_OPAQUE, Reason.NOT_SELF_ATTENTION], id="adds to the mask"),
]  # fmt: skip


@pytest.mark.parametrize("name, sizes, said", WITHOUT_SDPA)
def test_models_that_transformers_gives_no_sdpa_get_the_masks_of_eager_attention(name, sizes, said):
    """BigBirdPegasus' modules do not say that they are causal; DeepSeek V4 joins numbers to its masks."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"needs a transformers with {name}")
    config = getattr(transformers, f"{name}Config")(**sizes, max_position_embeddings=256)
    torch.manual_seed(0)
    model, ids = getattr(transformers, f"{name}ForCausalLM")(config).eval(), tokens(2, LENGTH)
    assert model.config._attn_implementation == "eager"
    masks = [{}, dict(attention_mask=torch.ones_like(ids)), dict(attention_mask=mixed_padding(LENGTH, (0, 9)))]
    expected = [logits(model, ids, **inputs) for inputs in masks]
    model.set_attn_implementation(attention.register(FLOOR.replace(layers=[0, 1]), name="tsa-whole-masks"))
    with pytest.warns(TSAWarning, match="no attention call became sparse|none became sparse"):
        found = [logits(model, ids, **inputs) for inputs in masks]
    for plain, other, inputs in zip(expected, found, masks, strict=True):
        assert difference(plain, other, inputs.get("attention_mask")) < ATOL
    assert reasons(model) == said
    with pytest.raises(ConfigError, match=rf'{name}\w+ has none.*attn_implementation="eager"'), pytest.warns(TSAWarning):
        logits(torch.compile(model, backend="eager"), ids)


def test_a_model_of_which_only_the_tower_asks_the_interface_is_refused():
    """GIT's text layers add the mask to their scores. transformers goes by the file, which has its vision layers too."""
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    vision = dict(**sizes, image_size=16, patch_size=8)
    config = transformers.GitConfig(**sizes, vocab_size=64, pad_token_id=0, vision_config=vision)
    model = transformers.GitForCausalLM(config).eval()
    model.set_attn_implementation(attention.register(FLOOR, name="tsa-tower"))
    with pytest.raises(ConfigError, match=r"GitModel, whose attention \(GitSelfAttention\) does not come from"):
        logits(model, tokens(1, LENGTH))


def test_a_position_bias_in_a_static_cache_is_cut_as_the_keys_are():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    inputs = dict(input_ids=tokens(2, 9), decoder_input_ids=tokens(2, 30, 1))
    how = dict(max_new_tokens=3, do_sample=False, cache_implementation="static", disable_compile=True)
    expected = model.generate(**inputs, **how)
    model.set_attn_implementation(attention.register(FLOOR.replace(layers=[]), name="tsa-bias"))
    assert torch.equal(model.generate(**inputs, **how), expected)


@pytest.mark.parametrize("rows, kind", [(LENGTH, MaskKind.OPAQUE), (1, MaskKind.PADDING)])
def test_a_mask_that_is_not_known_is_not_taken_for_padding(rows, kind):
    """Of a module that is not causal, as PaliGemma's, which reads its prefix in both directions and the rest as usual."""
    module, operand = torch.nn.Module(), torch.randn(1, 2, LENGTH, 8)
    module.is_causal = False
    mask = torch.ones(1, 1, rows, LENGTH, dtype=torch.bool)
    assert read(module, operand, operand, operand, mask, 0.0, None, None, {}).kind is kind


@pytest.mark.skipif(not hasattr(transformers, "Gemma4ForCausalLM"), reason="needs a transformers with Gemma 4")
def test_a_model_that_asks_for_sdpa_by_name_gets_its_masks_whole():
    """Gemma 4 cuts queries and masks of its last layers to the logits that are kept, but not under SDPA without a mask."""
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    layers = dict(num_hidden_layers=2, num_kv_shared_layers=1, layer_types=["full_attention"] * 2, global_head_dim=16)
    small = dict(vocab_size=64, vocab_size_per_layer_input=64, hidden_size_per_layer_input=16, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**sizes, **layers, **small)).eval()
    ids, found = tokens(2, LENGTH), {}
    for name in ("sdpa", attention.register(FLOOR.replace(layers=[]), name="tsa-by-name")):
        model.set_attn_implementation(name)
        masks = (None, mixed_padding(LENGTH, (0, 9)))
        found[name] = [logits(model, ids, attention_mask=mask, logits_to_keep=keep) for mask in masks for keep in (0, 1, 20)]
    for plain, other in zip(*found.values(), strict=True):
        assert difference(plain[:, -20:], other[:, -20:]) < ATOL
    compiled = torch.compile(model, backend="eager")  # the names of a trace are those of its model
    with pytest.warns(TSAWarning, match="SDPA in a compiled"):
        if Version(transformers.__version__) < Version("5.24"):  # cuts nothing in a trace
            assert difference(logits(compiled, ids, logits_to_keep=20), found["sdpa"][2]) < ATOL
        else:
            with pytest.raises(ConfigError, match="20 queries over 50 keys and no mask"):
                logits(compiled, ids, logits_to_keep=20)


def test_keys_that_a_model_chose_by_index_are_not_lost():
    """DeepSeek V3.2 hides the others by the mask alone where the implementation is SDPA; else it passes their indices."""
    module, operand = torch.nn.Module(), torch.randn(1, 2, LENGTH, 8)
    call = read(module, operand, operand, operand, None, 0.0, None, None, {"indices": torch.zeros(1, LENGTH, 4)})
    assert call.obstacle() == (Reason.UNSUPPORTED_FORM, "keys that were chosen by index")
    with pytest.raises(ConfigError, match=r'Module passes indices to its attention.*attn_implementation="sdpa"'):
        as_written(call)


def test_a_class_without_source_is_what_it_inherits_from():
    """As one that is made in a shell."""
    mine = type("Mine", (transformers.LlamaModel,), {})
    shape = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    model = mine(transformers.LlamaConfig(**shape)).eval()
    model.set_attn_implementation(attention.register(KEEP_ALL.replace(layers=[0]), name="tsa-mine"))
    with torch.no_grad():
        model(tokens(1, LENGTH))
    assert reasons(model) == [Reason.SPARSE]


def test_versions_whose_masks_do_not_say_where_their_queries_stand_are_refused(monkeypatch):
    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", lambda batch_size, cache_position, kv_length: None)
    with pytest.raises(ConfigError, match=r"needs transformers 5\.4 or newer.*backend"):
        attention.register(FLOOR, name="tsa-too-old")
