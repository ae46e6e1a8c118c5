"""One layer's attention on a GPU: the five steps of token sparse attention against dense attention, step by step.

Inputs are random with a few dominant tokens for each head. KeepRatio budgets, so that the share of tokens is the same on
any input; `count` stands for Coverage: the same share, but read from the device.

    python benchmarks/attention.py --lengths 4096 8192 16384 32768 131072 --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tsa_compile import pipeline  # registers the ops

assert pipeline.OPS
tsa = torch.ops.tsa
WINDOW, POOL, MIN_TOKENS = 128, 7, 1024


def median_ms(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of a call on the device, in milliseconds."""
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def make_inputs(length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value in the layout that projections produce: [B, L, heads, D] memory, seen as [B, heads, L, D]."""
    shapes = [(1, length, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for shape in shapes)
    heavy = torch.randint(0, length, (length // 100,), device="cuda")
    key[:, :, heavy] *= 2
    return query, key, value


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """With cuDNN where it fits, which is the fastest dense kernel on Hopper."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(order, set_priority=True):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def chain(
    query: Tensor, key: Tensor, value: Tensor, scale: float, keep: float, on_device: bool
) -> dict[str, Callable[[], Any]]:
    """The five steps as the compiled graph calls them, each over the results of the one before; and all together."""
    length = query.shape[2]
    capacity = length if on_device else WINDOW + min(length - WINDOW, max(MIN_TOKENS, -int(-keep * (length - WINDOW) // 1)))
    scores = tsa.score(query, key, None, scale, WINDOW, POOL)
    count = tsa.budget(scores, None, keep, MIN_TOKENS) if on_device else None
    indices = tsa.select(scores, count, capacity)
    rows = tsa.compress(query, key, value, indices, count)
    out = tsa.attend(*rows, count, scale, "auto")

    def whole() -> Tensor:
        scores = tsa.score(query, key, None, scale, WINDOW, POOL)
        count = tsa.budget(scores, None, keep, MIN_TOKENS) if on_device else None
        indices = tsa.select(scores, count, capacity)
        rows = tsa.compress(query, key, value, indices, count)
        return tsa.decompress(tsa.attend(*rows, count, scale, "auto"), indices, count, length)

    return {
        "score": lambda: tsa.score(query, key, None, scale, WINDOW, POOL),
        "budget": lambda: tsa.budget(scores, 0.005, None, MIN_TOKENS),
        "select": lambda: tsa.select(scores, count, capacity),
        "compress": lambda: tsa.compress(query, key, value, indices, count),
        "attend": lambda: tsa.attend(*rows, count, scale, "auto"),
        "decompress": lambda: tsa.decompress(out, indices, count, length),
        "chain": whole,
    }


def measure(length: int, keep: float, arguments: argparse.Namespace, on_device: bool) -> dict[str, Any]:
    """Milliseconds of dense attention, of each step and of the chain; and the memory that the chain needs, in GiB."""
    tensors = make_inputs(length, arguments.heads, arguments.kv_heads, arguments.head_dim, torch.bfloat16)
    scale = arguments.head_dim**-0.5
    steps = chain(*tensors, scale, keep, on_device)
    row: dict[str, Any] = {"length": length, "keep": keep, "count": on_device}
    row["dense"] = round(median_ms(lambda: dense(*tensors, scale)), 4)
    row |= {name: round(median_ms(step), 4) for name, step in steps.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = steps["chain"]()
    own = out.numel() * out.element_size()
    row["memory_gib"] = round((torch.cuda.max_memory_allocated() - before - own) / 2**30, 2)
    row["ratio"] = round(row["chain"] / row["dense"], 3)
    return row


COLUMNS = (
    "length", "keep", "count", "dense", "score", "budget", "select", "compress", "attend", "decompress", "chain", "ratio",
    "memory_gib",
)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a measurement; times in milliseconds, memory in GiB beyond inputs and output."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(str(row[column]) for column in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 131072])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.675])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--out", type=Path, help="folder for attention.json and attention.md")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    torch.manual_seed(0)
    rows = [
        measure(length, keep, arguments, on_device)
        for length in arguments.lengths
        for keep in arguments.keep
        for on_device in (False, True)
    ]
    text = table(rows)
    conditions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16"}
    conditions |= {name: getattr(arguments, name) for name in ("heads", "kv_heads", "head_dim")}
    print(f"{conditions}\n\n{text}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "attention.json").write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=2) + "\n")
        (arguments.out / "attention.md").write_text(f"{conditions}\n\n{text}\n")


if __name__ == "__main__":
    main()
