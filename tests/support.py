"""Tiny real models with random weights, batches with padding, and the oracle: a model whose attention is the reference.

The oracle is the same transformers model with another attention function, registered under its own name: in the layers
that are asked for it calls `kernels/reference.py`, in the others the model's own SDPA. It shares no code with the passes
or the ops, and padding reaches it through the mask that the model builds.
"""

import contextlib
import copy
import importlib.util
import os
import statistics
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from tsa_compile import TSAConfig
from tsa_compile.backend import tsa_backend
from tsa_compile.kernels import reference

VOCAB = 64
_SIZES = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256)
_LLAMA = dict(vocab_size=VOCAB, num_key_value_heads=2, head_dim=32, pad_token_id=0, **_SIZES)
_GPT = dict(vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=256)
_NO_HEAD_DIM = {name: size for name, size in _LLAMA.items() if name != "head_dim"}
_ALTERNATING = ["full_attention", "sliding_attention", "full_attention"]

# Class of the configuration and its arguments. The first eight are the models that are promised to gain.
DECODERS = {
    "llama": ("LlamaConfig", _LLAMA),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", _NO_HEAD_DIM),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA, "sliding_window": 16, "layer_types": _ALTERNATING}),
    "phi3": ("Phi3Config", _NO_HEAD_DIM),
    "gpt_neox": ("GPTNeoXConfig", dict(vocab_size=VOCAB, **_SIZES)),
    "gpt2": ("GPT2Config", _GPT),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
}
OTHERS = {
    "bloom (ALiBi)": ("BloomConfig", dict(vocab_size=VOCAB, hidden_size=64, n_layer=3, n_head=4)),
    "mpt (ALiBi)": ("MptConfig", dict(vocab_size=VOCAB, d_model=64, n_layers=3, n_heads=4, max_seq_len=256)),
    "falcon": ("FalconConfig", dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)),
    "falcon (ALiBi)": (
        "FalconConfig",
        dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, alibi=True),
    ),
    "gemma2 (soft capping)": ("Gemma2Config", {**_LLAMA, "sliding_window": 16, "layer_types": _ALTERNATING}),
    "opt": ("OPTConfig", dict(vocab_size=VOCAB, ffn_dim=64, word_embed_proj_dim=64, **_SIZES)),
    "qwen3": ("Qwen3Config", _LLAMA),
    "gpt2 (scaled by layer)": ("GPT2Config", {**_GPT, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2 (upcast)": ("GPT2Config", {**_GPT, "reorder_and_upcast_attn": True}),
    "llama4 (chunked)": (
        "Llama4TextConfig",
        {**_LLAMA, "attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 64},
    ),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 8}),
    "gpt_neo (local)": (
        "GPTNeoConfig",
        dict(
            vocab_size=VOCAB,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=16,
            max_position_embeddings=256,
        ),
    ),
    "gpt_oss (sinks)": (
        "GptOssConfig",
        {**_LLAMA, "num_local_experts": 4, "sliding_window": 16, "layer_types": _ALTERNATING},
    ),
    "deepseek_v3 (latent)": (
        "DeepseekV3Config",
        dict(
            vocab_size=VOCAB, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=16,
            qk_nope_head_dim=16, v_head_dim=24, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            first_k_dense_replace=1, moe_intermediate_size=32, **_SIZES,
        ),
    ),
}  # fmt: skip

MEDIUM = dict(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, head_dim=64,
    max_position_embeddings=65536,
)  # fmt: skip
"""Sizes of a model for GPUs."""


def exhaustive_but(names, *quick):
    """The parameters, single ones or tuples, of which all but a few are for `tox -e full` alone."""

    def parameter(name):
        values = name if isinstance(name, tuple) else (name,)
        return pytest.param(*values, marks=() if name in quick else pytest.mark.exhaustive)

    return [parameter(name) for name in names]


transformers.logging.set_verbosity_error()  # pad tokens, generation flags: nothing that a test is about
transformers.logging.disable_progress_bar()


def tiny(name, attention="sdpa", **changes):
    """A causal language model with random weights, in evaluation mode; the same weights whatever the attention.

    The weights are larger than a model begins training with: attention would be nearly uniform, and scores would tie.
    """
    kind, sizes = {**DECODERS, **OTHERS}[name]
    config = getattr(transformers, kind)(**{"initializer_range": 0.1, **sizes, **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def with_sinks(attention="eager", **changes):
    """gpt-oss with a full layer and one with a window, whose sinks have from hardly any to most of the weight."""
    model = short("gpt_oss (sinks)", attention, **changes)
    for layer in model.model.layers:
        layer.self_attn.sinks.data = torch.linspace(-3, 4, 4)
    return model


def short(name, attention="sdpa", **changes):
    """The same with two layers; of mixed kinds, a full one and one with a window."""
    _, sizes = {**DECODERS, **OTHERS}[name]
    fewer = {key: 2 for key in ("n_layer", "n_layers", "num_layers", "num_hidden_layers") if key in sizes}
    if "layer_types" in sizes:
        fewer["layer_types"] = sizes["layer_types"][:2]
    return tiny(name, attention, **{**fewer, **changes})


def tokens(batch, length, seed=0):
    """Token ids [batch, length] without the pad token."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def mixed_padding(length, pads=(0, 9, -13)):
    """A padding mask [len(pads), length]: that many pad tokens on the left, negative ones on the right, 0 for none."""
    mask = torch.ones(len(pads), length, dtype=torch.long)
    for row, pad in zip(mask, pads, strict=True):
        row[pad:] = 0 if pad < 0 else 1
        row[: max(pad, 0)] = 0
    return mask


@contextlib.contextmanager
def oracle(layers, **settings):
    """Inside, a model built with attention="oracle" runs `token_sparse_attention(**settings)` in `layers`.

    With the default's score, unless `reduce` names another.
    """
    chosen = {"reduce": TSAConfig().score, **settings}

    def attention(module, query, key, value, attention_mask, scaling=None, s_aux=None, **kwargs):
        if s_aux is not None and module.layer_idx not in layers:
            seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
            seen = (seen if attention_mask is None else attention_mask).expand(*query.shape[:2], *key.shape[2:3] * 2)
            return reference.attention_under(seen, query, key, value, scaling, s_aux).transpose(1, 2).contiguous(), None
        if module.layer_idx not in layers or query.shape[2] == 1:  # decode steps are dense
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        padding = None
        if attention_mask is not None:  # the last query sees every valid key
            padding = attention_mask[:, 0, -1].expand(len(query), -1)
        out = reference.token_sparse_attention(query, key, value, padding, scale=scaling, sink_logits=s_aux, **chosen)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("oracle", attention)
    AttentionMaskInterface.register("oracle", sdpa_mask)
    yield


def difference(left, right, mask=None):
    """The largest absolute difference of two [B, L, ...] tensors, on valid rows."""
    gap = (left - right).abs()
    assert not gap.isnan().any()
    return float((gap if mask is None else gap[mask.bool()]).max())


def in_turn(model, configs):
    """The compiled model for each configuration, one after the other: each is to be called as the first one was. Dynamo,
    which takes longer than all else, traces it once; `reports` has of each graph one for each configuration."""
    graphs = []

    def backend(graph_module, example_inputs):
        compiled = [
            tsa_backend(copy.deepcopy(graph_module), example_inputs, options={"config": config}) for config in configs
        ]
        graphs.append(compiled)
        return lambda *given: compiled[turn](*given)

    traced = torch.compile(model, backend=backend)
    for turn in range(len(configs)):
        known = len(graphs)
        yield traced
        assert turn == 0 or len(graphs) == known, "nothing is traced again"


def run_each(model, configs, **inputs):
    """What the compiled model returns for each configuration."""
    found = []
    for compiled in in_turn(model, configs):
        with torch.no_grad():
            found.append(compiled(**inputs))
    return found


def chunks(model, ids, mask, size, cache=None):
    """The logits of a prompt in chunks, of one size or of those listed, behind what a cache holds."""
    cache = transformers.DynamicCache(config=model.config) if cache is None else cache
    found, past = [], cache.get_seq_length()
    with torch.no_grad():
        for part in ids.split(size, dim=1):
            past += part.shape[1]
            seen = {} if mask is None else {"attention_mask": mask[:, :past]}
            found.append(model(part, past_key_values=cache, **seen).logits)
    return torch.cat(found, dim=1)


class Attention(torch.nn.Module):
    """One attention call without projections; `finish` is applied to its output [B, H, L, D]."""

    def __init__(self, finish=lambda out: out, **settings):
        super().__init__()
        self.finish = finish
        self.settings = {"is_causal": True, **settings}

    def forward(self, query, key, value, attn_mask=None):
        grouped = query.shape[1] != key.shape[1]
        call = torch.nn.functional.scaled_dot_product_attention
        return self.finish(call(query, key, value, attn_mask=attn_mask, enable_gqa=grouped, **self.settings))


class Stack(torch.nn.Module):
    """Numbered attention layers, one after the other; a graph break behind those in `breaks`."""

    def __init__(self, count=4, breaks=(), **settings):
        super().__init__()
        self.layers = torch.nn.ModuleList(Attention(**settings) for _ in range(count))
        self.breaks = breaks

    def forward(self, query, key, value):
        query = self.layers[0](query, key, value)
        if 0 in self.breaks:
            torch._dynamo.graph_break()
        query = self.layers[1](query, key, value)
        if 1 in self.breaks:
            torch._dynamo.graph_break()
        for layer in self.layers[2:]:
            query = layer(query, key, value)
        return query


def heads(batch=2, query_heads=4, kv_heads=2, length=40, head_dim=16, rows_first=True, **options):
    """Random query, key and value; in memory [B, L, H, D], as projections leave them, or [B, H, L, D]."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for count in (query_heads, kv_heads, kv_heads):
        shape = (batch, length, count, head_dim) if rows_first else (batch, count, length, head_dim)
        tensor = torch.randn(shape, generator=generator).to(**options)
        made.append(tensor.transpose(1, 2) if rows_first else tensor)
    return tuple(made)


def script(path):
    """A Python file of benchmarks/ or examples/ as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def without_interpreter(source):
    """What Python `source` prints in a process of its own: the suite runs Triton's interpreter, whose kernels nothing
    can compile. `-P` keeps the working directory off its path: a checkout, where passes lie beside the package."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", textwrap.dedent(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def medians(*functions, rounds=40, calls=3):
    """Milliseconds a call of each: functions take turns, so that a change of clocks meets all alike."""
    times = [[] for _ in functions]
    for turn in range(rounds + 8):
        for function, found in zip(functions, times, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                function()
            stop.record()
            stop.synchronize()
            if turn >= 8:
                found.append(start.elapsed_time(stop) / calls)
    return [statistics.median(found) for found in times]
