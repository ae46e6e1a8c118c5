"""A small Llama, compiled with Token Sparse Attention and compared with the plain model.

    python examples/quickstart.py                                     a size that suits the device
    python examples/quickstart.py --length 512 --compiler eager       quicker: shorter, and without Inductor

The weights are random. So the figures speak of time and of rounding; they say nothing about quality.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from tsa_compile import Coverage, KeepRatio, RewriteReport, TSAConfig, reports

Model = Callable[..., Any]


@dataclass(frozen=True)
class Size:
    """The shape of a Llama, of its prompt, and how few tokens a sparse layer may keep."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    min_tokens: int
    window: int
    dtype: torch.dtype
    device: str


ON_CPU = Size(4, 256, 8, 2, 32, length=2048, min_tokens=64, window=32, dtype=torch.float32, device="cpu")
# Eight layers of Llama-3.1-8B's shape; the published window and minimum.
ON_GPU = Size(8, 4096, 32, 8, 128, length=32768, min_tokens=1024, window=128, dtype=torch.bfloat16, device="cuda")


@dataclass(frozen=True)
class Measurement:
    """One way to run the model."""

    name: str
    logits: Tensor
    seconds: float
    first_seconds: float
    report: RewriteReport | None = None
    kept: float | None = None


def build_model(size: Size) -> Model:
    """A Llama with random weights, made on its device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024, hidden_size=size.hidden, intermediate_size=size.hidden * 7 // 2, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, head_dim=size.head_dim,
        max_position_embeddings=size.length,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(size.device):
        return LlamaForCausalLM(config).to(size.dtype).eval()


def prompt(size: Size) -> dict[str, Any]:
    """Random tokens, and the mask of ones that every tokenizer returns with them."""
    ids = torch.randint(1, 1024, (1, size.length), device=size.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1}


def run(model: Model, inputs: dict[str, Any]) -> tuple[Tensor, float]:
    """The last token's logits in float32, and the seconds they took."""
    started = time.perf_counter()
    with torch.inference_mode():
        logits = model(**inputs).logits.float()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return logits, time.perf_counter() - started


def measure(name: str, model: Model, inputs: dict[str, Any], repeats: int = 5) -> Measurement:
    """Runs a model once, which compiles it, and then a few times."""
    logits, first = run(model, inputs)
    seconds = statistics.median(run(model, inputs)[1] for _ in range(repeats))
    return Measurement(name, logits, seconds, first)


def measure_tsa(name: str, model: Model, config: TSAConfig, inputs: dict[str, Any]) -> Measurement:
    """The same for the model compiled with a configuration; adds the report and the share of tokens kept."""
    torch._dynamo.reset()
    measured = measure(name, torch.compile(model, backend="tsa", options={"config": config}), inputs)
    return dataclasses.replace(measured, report=reports()[-1], kept=kept_share(model, config, inputs))


def kept_share(model: Model, config: TSAConfig, inputs: dict[str, Any]) -> float | None:
    """The share of tokens that the sparse layers keep, on average; None if no layer is sparse.

    The counts stay on the device, so the rewritten graph is run once node by node and looked into on the way.
    """
    shares: list[float] = []

    class Watch(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is torch.ops.tsa.compress.default:
                query, _, _, indices, count = args
                kept = indices.shape[2] if count is None else count.float().mean().item()
                shares.append(kept / query.shape[2])
            return super().call_function(target, args, kwargs)

    def watch(graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return Watch(graph).run

    torch._dynamo.reset()
    run(torch.compile(model, backend="tsa", options={"config": config.replace(compiler=watch)}), inputs)
    return statistics.mean(shares) if shares else None


def compare(size: Size, compiler: str) -> list[Measurement]:
    """The plain model, stock torch.compile, the exact mode and two sparse ones."""
    model, inputs = build_model(size), prompt(size)
    if size.device == "cpu":  # Inductor's pool of compilers starts in the background, on the cores that are being timed
        inductor_config.compile_threads = 1
    plain = measure("plain model", model, inputs)
    torch._dynamo.reset()
    stock = measure("torch.compile", torch.compile(model, backend=compiler), inputs)
    sparse = TSAConfig(min_tokens=size.min_tokens, window=size.window, compiler=compiler)
    configs = {
        "tsa, exact": sparse.replace(layers=[]),
        "tsa, KeepRatio(0.3)": sparse.replace(budget=KeepRatio(0.3)),
        "tsa, Coverage(0.3)": sparse.replace(budget=Coverage(0.3)),
    }
    return [plain, stock, *(measure_tsa(name, model, config, inputs) for name, config in configs.items())]


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def table(results: Sequence[Measurement]) -> str:
    """One line for each way to run the model."""
    plain = results[0]
    lines = [f"{'':<22}{'time':>10}{'speed':>8}{'difference':>13}{'kept':>7}{'first call':>13}"]
    for row in results:
        apart = "" if row is plain else f"{difference(row.logits, plain.logits):.1e}"
        kept = "" if row.kept is None else f"{row.kept:.0%}"
        lines.append(
            f"{row.name:<22}{1e3 * row.seconds:>7.0f} ms{plain.seconds / row.seconds:>7.2f}x"
            f"{apart:>13}{kept:>7}{row.first_seconds:>11.1f} s"
        )
    return "\n".join(lines)


def describe(size: Size) -> str:
    """What is run, in one line."""
    device = torch.cuda.get_device_name() if size.device == "cuda" else "CPU"
    dtype = str(size.dtype).removeprefix("torch.")
    return (
        f"Llama with random weights: {size.layers} layers, {size.heads} heads over {size.kv_heads}, head size "
        f"{size.head_dim}, {dtype}; a prompt of {size.length} tokens on {device}; torch {torch.__version__}"
    )


def notes(size: Size) -> str:
    """How to read the table."""
    rounding = torch.finfo(size.dtype).eps
    lines = [
        f"difference  of the last logits from the plain model's, relative to the largest; rounding is {rounding:.0e}",
        "kept        the share of tokens that are selected in the sparse layers, the upper half",
        "exact       computes what the model computes; its difference is rounding",
        "sparse      is an approximation; its difference here says nothing about quality, for the weights are random",
    ]
    if size.device == "cpu":
        lines.append("CPU         shows that everything works; speed is claimed on GPUs and for long prompts only")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    """Measures, prints, and returns what was measured."""
    size = ON_GPU if torch.cuda.is_available() else ON_CPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=size.length, help="tokens of the prompt")
    parser.add_argument("--layers", type=int, default=size.layers)
    parser.add_argument("--compiler", default="inductor", help="what compiles the rewritten graph")
    options = parser.parse_args(arguments)
    size = dataclasses.replace(size, length=options.length, layers=options.layers)

    print(describe(size), "\n")
    results = compare(size, options.compiler)
    for row in results:
        if row.report is not None:
            print(f"{row.name}\n{row.report}\n")
    print(table(results), "\n")
    print(notes(size))
    return results


if __name__ == "__main__":
    main()
