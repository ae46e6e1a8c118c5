"""Models by shape: the sizes of well-known decoders with random weights, for questions about time, memory and structure.

    config = model_config("llama-3.1-8b", layers=4)         a transformers configuration with the published sizes
    model = build(config, "cuda", torch.bfloat16)           weights made on the device, in that dtype
    explain_weightless(config, 32768)                       a report at any length, without any memory
    check_memory(config, torch.bfloat16, "cuda", 32768)     before a model is built or loaded

Sizes are those of the `config.json` files on the Hugging Face Hub (tests hold the number of parameters against the published
one). Phi-3's positions are plain RoPE instead of the 128K model's LongRoPE, which changes factors but no size.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tsa_compile.config import TSAConfig
from tsa_compile.errors import ConfigError, RewriteError, TSAError
from tsa_compile.explanation import explain
from tsa_compile.passes.base import summary
from tsa_compile.report import RewriteReport


class MemoryShortage(TSAError, MemoryError):
    """A model and its prefill are estimated to need more memory than a device has free."""


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
        near = difflib.get_close_matches(shape.lower(), SHAPES, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"{shape!r} is not a built-in shape{hint}: the shapes are {', '.join(SHAPES)}")
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
        return _from_config(config, dtype=dtype).eval()


def _from_config(config: Any, trust_remote_code: bool = False, **options: Any) -> Any:
    """A causal language model on the device of the context; ConfigError where the configuration is of something else."""
    if trust_remote_code:
        options["trust_remote_code"] = True
    try:
        return require_transformers().AutoModelForCausalLM.from_config(config, **options)
    except ValueError as error:
        name, why = type(config).__name__, re.split(r"[.:]\s", str(error))[0]  # a list of all models follows
        raise ConfigError(f"no causal language model can be made of this {name}: {why}") from error


def prompts(config: Any, count: int, length: int, device: Any = "cpu", seed: int = 0) -> torch.Tensor:
    """Random token ids [count, length], int64, without the first three, which the shapes use as special tokens."""
    generator = torch.Generator().manual_seed(seed)
    vocab = config.get_text_config().vocab_size
    return torch.randint(min(3, vocab - 1), vocab, (count, length), generator=generator).to(device)


def explain_weightless(
    model_config: Any,
    length: int,
    config: TSAConfig | None = None,
    *,
    batch: int = 1,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> RewriteReport:
    """`explain` for a transformers configuration: tensors have shapes, dtypes and devices, but no memory.

    What is decided hangs on these alone, so the report is that of the real model. An `attention_mask` of ones is passed, as
    every tokenizer does.

    Raises:
        RewriteError: the model's own code looks at values (remote code may), so it runs with weights alone.
    """
    with FakeTensorMode():
        with torch.device(device):
            model = _from_config(model_config, trust_remote_code, dtype=dtype).eval()
            ids = torch.zeros(batch, length, dtype=torch.int64)
            mask = torch.ones_like(ids)
        try:
            return explain(model, input_ids=ids, attention_mask=mask, config=config)
        except Exception as error:
            if isinstance(error, TSAError) or isinstance(getattr(error, "inner_exception", None), TSAError):
                raise
            raise RewriteError(
                f"{type(model).__name__} cannot be traced without weights ({summary(error)}): load it and call "
                "explain(model, ...), at the command line --weights"
            ) from error


def weight_count(config: Any, trust_remote_code: bool = False) -> int:
    """Parameters of the model of a configuration, shared ones once; no memory is needed."""
    with torch.device("meta"):
        model = _from_config(config, trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def prefill_bytes(config: Any, dtype: torch.dtype, length: int, batch: int = 1) -> int:
    """About how much memory a dense prefill needs above the weights: the key-value cache and one layer's activations.

    Without L x L masks and without logits but the last. On an H200 an 8B-shaped Llama's peak was 1.9 GiB at 8K tokens and
    30.6 GiB at 128K (benchmarks/results/prefill.md); this says 2.1 and 33.5.
    """
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    intermediate = getattr(text, "intermediate_size", None) or 4 * hidden
    cache = 2 * text.num_hidden_layers * kv_heads * head_dim
    activations = 4 * hidden + 3 * intermediate + 2 * (heads + 2 * kv_heads) * head_dim
    return batch * (length * (cache + activations) + text.vocab_size) * dtype.itemsize


def free_bytes(device: Any) -> int | None:
    """Memory that a device has free, in bytes; None where it cannot be told.

    On CUDA also what PyTorch holds without using it. On Linux's CPU also what a control group allows.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = [size for size in (_available(), _group_left()) if size is not None]
    return min(found, default=None)


def check_memory(
    config: Any, dtype: torch.dtype, device: Any, length: int, batch: int = 1, *, trust_remote_code: bool = False
) -> None:
    """Holds what a model and a dense prefill need against the free memory of a device.

    Raises:
        MemoryShortage: there is too little; the message says how much, and what would need less.
    """
    free = free_bytes(device)
    if free is None:
        return
    weights = weight_count(config, trust_remote_code) * dtype.itemsize
    work = prefill_bytes(config, dtype, length, batch)
    if weights + work <= free:
        return
    raise MemoryShortage(
        f"about {_gib(weights + work)} are needed on {device} ({_gib(weights)} of weights in "
        f"{str(dtype).removeprefix('torch.')}, {_gib(work)} for a prefill of {batch} x {length} tokens), {_gib(free)} are "
        "free: take fewer layers, a shorter length, a smaller batch or dtype, or another device"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _available(path: Path = Path("/proc/meminfo")) -> int | None:
    """MemAvailable of the Linux kernel, in bytes."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(sizes[0][1]) * 1024 if sizes else None


def _group_left(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a control group (version 2), a container for example, may still take, in bytes; caches it could drop count."""
    try:
        limit, current = ((folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - int(current) + int(cached.get("inactive_file", 0)))


def require_transformers() -> Any:
    """The package; ImportError with the command that installs it where it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("models need the package 'transformers': pip install 'tsa-compile[transformers]'") from error
    return transformers
