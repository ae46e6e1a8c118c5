"""Models by shape: the sizes of well-known decoders with random weights, for questions about time, memory and structure.

    config = model_config("llama-3.1-8b", layers=4)         a transformers configuration with the published sizes
    model = build(config, "cuda", torch.bfloat16)           weights made on the device, in that dtype
    explain_weightless(config, 32768)                       a report at any length, without any memory

Sizes are those of the `config.json` files on the Hugging Face Hub (tests hold the number of parameters against the published
one). Phi-3's positions are plain RoPE instead of the 128K model's LongRoPE, which changes factors but no size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tsa_compile.config import TSAConfig
from tsa_compile.costs.devices import DeviceCosts
from tsa_compile.costs.models import causal_model, require_transformers
from tsa_compile.errors import ConfigError, RewriteError, TSAError, unknown
from tsa_compile.evaluation.limits import check_positions
from tsa_compile.explanation import explain
from tsa_compile.passes.base import summary
from tsa_compile.report import RewriteReport


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
        "max_position_embeddings": 131072, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


_LLAMA3 = {"rope_parameters": _llama3_rope(8.0)}
_GEMMA3_ROPE = {
    "sliding_attention": _rope(1e4),
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}

# Class of the transformers configuration, and its arguments.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("LlamaConfig", _sizes(64, 128, 4, 4, 2, 16, 4096, rope_parameters=_rope(5e5))),
    "small": ("LlamaConfig", _sizes(512, 1408, 8, 8, 2, 64, 4096, rope_parameters=_rope(5e5))),
    "llama-3.2-1b": (
        "LlamaConfig",
        _sizes(2048, 8192, 16, 32, 8, 64, 128256, rope_parameters=_llama3_rope(32.0), tie_word_embeddings=True),
    ),
    "llama-3.2-3b": (
        "LlamaConfig",
        _sizes(3072, 8192, 28, 24, 8, 128, 128256, rope_parameters=_llama3_rope(32.0), tie_word_embeddings=True),
    ),
    "llama-3.1-8b": ("LlamaConfig", _sizes(4096, 14336, 32, 32, 8, 128, 128256, **_LLAMA3)),
    "llama-3.1-70b": ("LlamaConfig", _sizes(8192, 28672, 80, 64, 8, 128, 128256, **_LLAMA3)),
    "mistral-7b": (
        "MistralConfig",
        _sizes(4096, 14336, 32, 32, 8, 128, 32768, rope_parameters=_rope(1e6), sliding_window=None),
    ),
    "mistral-nemo": (
        "MistralConfig",
        _sizes(5120, 14336, 40, 32, 8, 128, 131072, rope_parameters=_rope(1e6), sliding_window=None),
    ),
    "qwen2.5-7b": ("Qwen2Config", _sizes(3584, 18944, 28, 28, 4, 128, 152064, rope_parameters=_rope(1e6))),
    "qwen3-0.6b": (
        "Qwen3Config",
        _sizes(1024, 3072, 28, 16, 8, 128, 151936, rope_parameters=_rope(1e6), tie_word_embeddings=True),
    ),
    "qwen3-8b": ("Qwen3Config", _sizes(4096, 12288, 36, 32, 8, 128, 151936, rope_parameters=_rope(1e6))),
    "gemma-3-12b": (
        "Gemma3TextConfig",
        _sizes(3840, 15360, 48, 16, 8, 256, 262208, sliding_window=1024, rope_parameters=_GEMMA3_ROPE),
    ),
    "gpt-oss-20b": (
        "GptOssConfig",
        _sizes(2880, 2880, 24, 64, 8, 64, 201088, sliding_window=128, num_local_experts=32, num_experts_per_tok=4),
    ),
    "phi-3-mini": (
        "Phi3Config",
        _sizes(3072, 8192, 32, 32, 32, 96, 32064, rope_parameters=_rope(1e4), sliding_window=None),
    ),
}


def model_config(shape: str, layers: int | None = None) -> Any:
    """The transformers configuration of a built-in shape.

    Args:
        shape: a name in `SHAPES`.
        layers: how many decoder layers instead of the model's own number.

    Raises:
        ConfigError: no shape has that name (the nearest one is suggested), or the number of layers is below 1.
        ImportError: transformers is missing.
    """
    if shape not in SHAPES:
        raise unknown(shape, "a built-in shape", SHAPES)
    if layers is not None and layers < 1:
        raise ConfigError(f"layers={layers} is not allowed: a model has at least 1 layer")
    kind, sizes = SHAPES[shape]
    if layers is not None:
        sizes = {**sizes, "num_hidden_layers": layers}
    return getattr(require_transformers(), kind)(**sizes)


def build(config: Any, device: Any = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A causal language model with random weights, in evaluation mode.

    The weights are made on the device and in the dtype at once: nothing passes through the host or through float32.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        return causal_model(config, dtype=dtype).eval()


def prompts(config: Any, count: int, length: int, device: Any = "cpu", seed: int = 0) -> torch.Tensor:
    """Random token ids [count, length], int64, without the first three, which the shapes use as special tokens."""
    generator = torch.Generator().manual_seed(seed)
    vocab = config.get_text_config().vocab_size
    return torch.randint(min(3, vocab - 1), vocab, (count, length), generator=generator).to(device)


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Torch logs the traceback of an operator that fails on fake tensors; the error that follows says enough."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def explain_weightless(
    model_config: Any,
    length: int,
    config: TSAConfig | None = None,
    *,
    batch: int = 1,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    costs: DeviceCosts | None = None,
) -> RewriteReport:
    """`explain` for a transformers configuration: tensors have shapes, dtypes and devices, but no memory.

    Decisions depend on these alone, so the report is that of the real model. An `attention_mask` of ones is passed, as
    every tokenizer does. With `costs` it is decided for the device that has them, which need not be there.

    Raises:
        ConfigError: an argument is not allowed, or the model has fewer positions than that and so cannot be traced.
        RewriteError: the model's own code looks at values (remote code may), so it runs with weights alone.
    """
    with FakeTensorMode():
        with torch.device(device):
            model = causal_model(model_config, trust_remote_code, dtype=dtype).eval()
            ids = torch.zeros(batch, length, dtype=torch.int64)
            mask = torch.ones_like(ids)
        try:
            with _without_tracebacks():
                return explain(model, input_ids=ids, attention_mask=mask, config=config, device=costs)
        except Exception as error:
            if isinstance(error, TSAError) or isinstance(getattr(error, "inner_exception", None), TSAError):
                raise
            check_positions(model, length)
            raise RewriteError(
                f"{type(model).__name__} cannot be traced without weights ({summary(error)}): load it and call "
                "explain(model, ...), at the command line --weights"
            ) from error
