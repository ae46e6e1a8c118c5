"""How much memory a model and its prefill need, and how much a device has free: asked before a model is built or loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tsa_compile.costs.models import attention_sizes, causal_model
from tsa_compile.errors import TSAError


class MemoryShortage(TSAError, MemoryError):
    """A model and its prefill are estimated to need more memory than a device has free."""


def weight_count(config: Any, trust_remote_code: bool = False) -> int:
    """Parameters of the model of a configuration, shared ones once; no memory is needed."""
    with torch.device("meta"):
        model = causal_model(config, trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def prefill_bytes(config: Any, dtype: torch.dtype, length: int, batch: int = 1) -> int:
    """About how much memory a dense prefill needs above the weights: the key-value cache and one layer's activations.

    Without L x L masks and without logits but the last. On an H100 an 8B-shaped Llama's peak was 1.9 GiB at 8K tokens and
    30.6 GiB at 128K (benchmarks/results/prefill-h100.md); this says 2.1 and 33.5.
    """
    text = config.get_text_config()
    hidden, heads, kv_heads, head_dim, value_head_dim = attention_sizes(text)
    intermediate = getattr(text, "intermediate_size", None) or 4 * hidden
    cached = kv_heads * (head_dim + value_head_dim)
    activations = 4 * hidden + 3 * intermediate + 2 * (heads * head_dim + cached)
    return batch * (length * (text.num_hidden_layers * cached + activations) + text.vocab_size) * dtype.itemsize


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
