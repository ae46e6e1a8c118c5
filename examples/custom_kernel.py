"""Your own attention kernel in the middle of Token Sparse Attention: written, registered and used.

    python examples/custom_kernel.py

The compressed rows keep their order, so every kernel that computes causal attention will do. This one goes over the
queries in tiles, in plain PyTorch; a real one would launch a GPU kernel from `run_lse`.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tsa_compile
from tsa_compile.kernels.registry import AttentionKernel, KernelRequest, names, register

TILE = 128


def supports(request: KernelRequest) -> str | None:
    """None if the kernel can run this, else a sentence that says why not."""
    return None if request.dtype == torch.float32 else f"takes float32 only, not {request.dtype}"


def run(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention [B,H,N,Dv] over all rows given; key and value may have fewer heads than query."""
    return run_lse(query, key, value, scale)[0]


def run_lse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same, and the logarithm of each row's sum of exponentials [B,H,N], by which its neighbourhood is added."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    tiles, sums = [], []
    for start in range(0, query.shape[2], TILE):
        rows = query[:, :, start : start + TILE]
        stop = start + rows.shape[2]
        future = torch.ones(rows.shape[2], stop, dtype=torch.bool, device=query.device).triu(start + 1)
        scores = (scale * rows @ key[:, :, :stop].mT).masked_fill(future, float("-inf"))
        tiles.append(scores.softmax(dim=-1) @ value[:, :, :stop])
        sums.append(scores.logsumexp(dim=-1))
    return torch.cat(tiles, dim=2), torch.cat(sums, dim=2)


def build_model(layers: int = 4) -> torch.nn.Module:
    """A small Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=layers, **shape)).eval()


def last_logits(model: torch.nn.Module, ids: Tensor, kernel: str) -> Tensor:
    """The model's answer with its sparse layers run by a kernel."""
    config = tsa_compile.TSAConfig(
        budget=tsa_compile.KeepRatio(0.5), window=32, min_tokens=64, kernel=kernel, compiler="eager"
    )
    torch._dynamo.reset()
    with torch.inference_mode():
        return torch.compile(model, backend="tsa", options={"config": config})(ids).logits[:, -1]


def main() -> float:
    """Registers the kernel, compiles with it, and compares it with a built-in one."""
    if "tiled" not in names():
        # Below the built-in ones: by name only.
        register(AttentionKernel("tiled", run, supports, priority=-1, run_lse=run_lse))
    model, ids = build_model(), torch.randint(256, (1, 700))
    mine = last_logits(model, ids, "tiled")
    print(tsa_compile.reports()[-1])
    builtin = last_logits(model, ids, "sdpa")
    difference = float((mine - builtin).abs().max())
    print(f"\nlargest difference of the logits between the kernels tiled and sdpa: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
