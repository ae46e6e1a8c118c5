"""A folder with one .gguf file in place of config.json and weights: the same model, and its tokenizer."""

import json
import shutil

import pytest
import torch
import transformers

from tsa_compile.commands.loading import source

from .support import fails, run

gguf = pytest.importorskip("gguf")
LETTERS = [chr(code) for code in range(33, 127)]
SIZES = dict(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256,
)  # fmt: skip
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def interleaved(weight, heads):
    """Rows of a projection in the order of GGUF: the two halves that RoPE turns lie side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(model, path):
    """The model with a vocabulary of printable characters, in float32."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = ["<end>", *LETTERS, "Ġ", "th", "Ġt", "Ċ", "an"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    writer.add_token_merges(["t h", "Ġ t", "a n"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, weight in model.state_dict().items():
        number, _, rest = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}.get(rest)
        outside = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
        target = outside.get(name) or f"blk.{number}.{NAMES[rest]}"
        writer.add_tensor(f"{target}.weight", (weight if heads is None else interleaved(weight, heads)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    write(model, folder / "tiny.gguf")
    return folder


def test_it_is_the_same_model_with_its_tokenizer(model, packed):
    found = source(packed, None, None, "cpu", "auto", False)
    loaded, tokenizer = found.load(16), found.tokenizer()
    ids = tokenizer("the tan ant", return_tensors="pt").input_ids
    assert found.layers == 2 and loaded.dtype == torch.float32
    assert tokenizer.decode(ids[0]) == "the tan ant" and tokenizer.convert_ids_to_tokens(ids[0])[0] == "th"
    assert type(loaded.model.layers[0].mlp.up_proj.weight.data) is torch.Tensor
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_commands_take_it(packed):
    done = run("explain", str(packed), "--length", "64", "--no-predict", "--json", "--min-length", "1")
    assert done.exit_code == 0 and len(json.loads(done.stdout)["report"]["rows"]) == 2


def test_two_of_them_are_one_too_many(packed, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(packed / "tiny.gguf", tmp_path / name)
    assert "holds 2 .gguf files (a.gguf, b.gguf)" in fails(2, "explain", str(tmp_path))


def test_a_damaged_one_is_named(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(60))
    assert "tiny.gguf' is no causal language model's configuration" in fails(2, "explain", str(tmp_path))
