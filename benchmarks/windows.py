"""Models with sliding windows on a GPU: one layer's window, heads of 512, whole prefills of two models' shapes.

    python benchmarks/windows.py --out benchmarks/results             everything, in some ten minutes on an H200
    python benchmarks/windows.py --parts window heads --lengths 8192  a part of it

    window   attention over a sliding window: SDPA under the mask of L x L that models write, FlexAttention, and ours
             (kernels/sliding.py), all exact
    heads    heads of 512, as Gemma 4's full-attention layers have: torch's SDPA, our dense kernel, and sparse with the floor
    model    time to first token of Gemma 3's shape (4B, of which 12 layers: two without a window), random weights:
             plain, torch.compile, and torch.compile(backend="tsa"), exact and with one of the two layers sparse
    sinks    the same of gpt-oss's shape (20B, of which 12 layers and 8 experts: six layers without a window), whose
             softmaxes have a sink, so that transformers has no SDPA for it

Times are medians of methods that take turns; memory is the peak beyond inputs and output. Outputs of layers are held against
float64 on a sample of rows, those of the exact model against the plain one. A method that cannot run says why.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from attention_checks import check_output
from attention_methods import BLOCK, FLOOR, Inputs, Shape, compiled_flex, make_inputs, options, tsa
from attention_report import markdown, size_of
from attention_timing import peak_of, take_turns
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from tsa_compile import Floor, KeepRatio, TSAConfig, reports
from tsa_compile.kernels import sliding
from tsa_compile.kernels.registry import get
from tsa_compile.kernels.sdpa import fastest_first
from tsa_compile.shapes import build

assert sliding
Row = dict[str, Any]
Call = Callable[[], Tensor]
WINDOWS = (
    (Shape(), 4096),  # Mistral 7B
    (Shape(heads=8, kv_heads=4, head_dim=256), 1024),  # Gemma 3 4B
    (Shape(heads=64, head_dim=64), 128),
)
WIDE = Shape(heads=8, kv_heads=4, head_dim=512)
KEEPS = (0.15, 0.3)
FIRST_TOKEN = "time to first token, and the change of the last logits"
PARTS = ("window", "heads", "model", "sinks")


def repeated(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Key and value with as many heads as the query, which torch's fused kernels want."""
    group = inputs.query.shape[1] // inputs.key.shape[1]
    return inputs.key.repeat_interleave(group, 1), inputs.value.repeat_interleave(group, 1)


def window_methods(inputs: Inputs, window: int) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Each method's name, and what builds its call."""
    length, device = inputs.length, inputs.query.device

    def masked() -> Call:
        positions = torch.arange(length, device=device)
        mask = (positions <= positions[:, None]) & (positions > positions[:, None] - window)
        key, value = repeated(inputs)
        return lambda: _sdpa(inputs.query, key, value, inputs.scale, mask[None, None])

    def flex() -> Call:
        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (query - key < window)

        mask = torch.compile(create_block_mask)(seen, None, None, length, length, device=device, BLOCK_SIZE=BLOCK)
        call = functools.partial(compiled_flex(), *inputs.tensors, block_mask=mask, scale=inputs.scale, enable_gqa=True)
        return lambda: call()

    yield "SDPA under a mask", masked
    yield "FlexAttention", flex
    yield "ours", lambda: lambda: tsa.sliding_attention(*inputs.tensors, inputs.scale, window)


def head_methods(inputs: Inputs) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Dense attention by torch and by our kernel, and sparse attention with the floor."""

    def torchs() -> Call:
        key, value = repeated(inputs)
        return lambda: _sdpa(inputs.query, key, value, inputs.scale, None)

    yield "SDPA", torchs
    yield "ours, dense", lambda: lambda: get("triton").causal(*inputs.tensors, inputs.scale)
    for keep in KEEPS:
        scalars = options(inputs.scale, keep=keep)
        yield f"ours, keep {keep}", lambda scalars=scalars: lambda: tsa.sparse_attention(*inputs.tensors, *scalars)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    with fastest_first():
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)


def layer_rows(
    what: Row, inputs: Inputs, methods: Iterator[tuple[str, Callable[[], Call]]], checked: Callable[[str, Tensor], float]
) -> list[Row]:
    """Times, memory and errors of one layer's methods on one set of inputs."""
    rows, calls = [], {}
    for name, make in methods:
        row = what | {"method": name}
        rows.append(row)
        try:
            call = make()
            call()
            out, memory = peak_of(call)
            row |= {"memory_gib": round(memory, 3), "error": checked(name, out)}
            calls[name] = [call]
        except (RuntimeError, ValueError) as error:  # out of memory, or no kernel takes it
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        torch.cuda.empty_cache()
    times = take_turns(calls, 0.2) if calls else {}
    for row in rows:
        if row["method"] in times:
            row |= times[row["method"]].row()
    return rows


def checked_window(inputs: Inputs, window: int, name: str, out: Tensor) -> float:
    """The error of a sample of rows: a floor of which no token is selected is a window."""
    nothing = torch.zeros(inputs.query.shape[:3], dtype=torch.bool, device=inputs.query.device)
    return check_output(*inputs.tensors, out, inputs.scale, name, nothing, Floor(window, 0))


def window_part(length: int) -> list[Row]:
    """Sliding windows at one length."""
    rows = []
    for shape, window in WINDOWS:
        inputs = make_inputs(shape, length)
        checked = functools.partial(checked_window, inputs, window)
        what = {"shape": f"{shape}, window {window:,}", "length": length}
        rows += layer_rows(what, inputs, window_methods(inputs, window), checked)
    return rows


def heads_part(length: int) -> list[Row]:
    """Heads of 512 at one length. What sparse rows see is tested elsewhere: here they must see their own floor."""
    inputs = make_inputs(WIDE, length)

    def checked(name: str, out: Tensor) -> float:
        if "keep" in name:
            return float("nan") if bool(out.isnan().any()) else 0.0
        return check_output(*inputs.tensors, out, inputs.scale, name)

    return layer_rows({"shape": str(WIDE), "length": length}, inputs, head_methods(inputs), checked)


def gemma() -> Any:
    """Gemma 3's 4B shape with 12 layers and random bfloat16 weights; every sixth layer sees everything."""
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=32768, hidden_size=2560, intermediate_size=10240, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, sliding_window=1024, max_position_embeddings=131072, pad_token_id=0,
    )  # fmt: skip
    return build(config, "cuda", torch.bfloat16)


def gpt_oss() -> Any:
    """gpt-oss's 20B shape with 12 layers, 8 experts and random bfloat16 weights; every other layer sees everything."""
    from transformers import GptOssConfig

    config = GptOssConfig(
        vocab_size=32768, hidden_size=2880, intermediate_size=2880, num_hidden_layers=12, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, sliding_window=128, num_local_experts=8, num_experts_per_tok=4, pad_token_id=0,
    )  # fmt: skip
    return build(config, "cuda", torch.bfloat16)


MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "model": (gemma, ("plain", "torch.compile", "tsa, exact", "tsa, layer 11 sparse")),
    "sinks": (gpt_oss, ("plain", "tsa, exact", "tsa, layer 11 sparse")),
}
"""What builds a model, and its modes. In both, layer 11 sees everything. Inductor takes minutes for gpt-oss's written-out
attention, of which 32K tokens do not fit into memory."""


MODES: dict[str, TSAConfig | None] = {
    "plain": None,
    "torch.compile": None,
    "tsa, exact": TSAConfig(layers=[]),
    "tsa, layer 11 sparse": TSAConfig(layers=[11], budget=KeepRatio(0.15)),
}


def model_part(build: Callable[[], Any], modes: tuple[str, ...], lengths: list[int]) -> list[Row]:
    """Time to first token by mode and length, with a mask of ones as tokenizers pass it."""
    model, rows, wanted = build(), [], {}
    for mode in modes:
        config = MODES[mode]
        torch._dynamo.reset()
        how: dict[str, Any] = {} if config is None else {"backend": "tsa", "options": {"config": config}}
        call = model if mode == "plain" else torch.compile(model, **how)
        for length in lengths:
            row: Row = {"mode": mode, "length": length}
            rows.append(row)
            try:
                row |= first_token(call, length, mode, wanted)
            except RuntimeError as error:
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
            print(row, file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
        if config is not None:
            print(reports()[-1].summary, file=sys.stderr, flush=True)
    return rows


def first_token(call: Callable[..., Any], length: int, mode: str, wanted: dict[int, Tensor]) -> Row:
    """Median milliseconds, peak GiB, and how far the last logits are from the plain model's, relative to their norm."""
    generator = torch.Generator("cuda").manual_seed(length)
    ids = torch.randint(1, 32768, (1, length), device="cuda", generator=generator)
    torch._dynamo.maybe_mark_dynamic(ids, 1)
    mask = torch.ones_like(ids)
    torch._dynamo.maybe_mark_dynamic(mask, 1)
    times = []
    for turn in range(5):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        logits = call(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=True).logits.float()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        if turn == 2 and times[-1] > 3000:
            break
    plain = wanted.setdefault(length, logits) if mode == "plain" else wanted.get(length)
    change = None if plain is None else float((logits - plain).norm() / plain.norm())
    return {"ms": round(sorted(times[1:])[len(times[1:]) // 2], 2), "memory_gib": round(peak, 2), "change": change}


def table(rows: list[Row], line: str, column: str) -> str:
    """A line for each shape or length and method, a column for each length: milliseconds and peak GiB."""
    lengths = sorted({row["length"] for row in rows})
    by_key = {(row.get(line), row[column], row["length"]): row for row in rows}
    lines = []
    for name, method in dict.fromkeys((row.get(line), row[column]) for row in rows):
        cells = [_cell(by_key.get((name, method, length))) for length in lengths]
        lines.append([*([] if name is None else [name]), method, *cells])
    head = [*([] if line not in rows[0] else [line]), column, *(f"{size_of(length)}: ms, GiB" for length in lengths)]
    return markdown(head, lines)


def _cell(row: Row | None) -> str:
    if row is None or "failed" in row:
        failed = "" if row is None else row["failed"]
        return "out of memory" if failed.startswith("OutOfMemoryError") else failed and f"failed: {failed[:60]}"
    change = row.get("change")
    return f"{row['ms']:.4g}, {row['memory_gib']:.2f}" + (f" ({change:.0e})" if change else "")


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--out", type=Path, help="folder for windows.json and windows.md")
    given = parser.parse_args()
    if min(given.lengths) < 1:
        parser.error(f"--lengths {min(given.lengths)}: a prompt has at least one token")
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    torch._inductor.config.compile_threads = 1
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "floor": str(FLOOR)}
    titles = {"window": "One layer over a sliding window", "heads": "One layer with heads of 512",
              "model": f"Gemma 3's shape, 12 layers: {FIRST_TOKEN}",
              "sinks": f"gpt-oss's shape, 12 layers, 8 experts: {FIRST_TOKEN}"}  # fmt: skip
    texts = [f"{found['device']}, torch {found['torch']}, bfloat16"]
    with torch.no_grad():
        for part in given.parts:
            measure = {"window": window_part, "heads": heads_part}.get(part)
            if measure is None:
                rows = model_part(*MODELS[part], given.lengths)
            else:
                rows = [row for length in given.lengths for row in measure(length)]
            found[part] = rows
            texts.append(f"**{titles[part]}**\n\n{table(rows, 'shape', 'method' if measure else 'mode')}")
            print(texts[-1], flush=True)
            if given.out is not None:  # after each part: a later one may be cut off
                given.out.mkdir(parents=True, exist_ok=True)
                (given.out / "windows.json").write_text(json.dumps(found, indent=2) + "\n")
                (given.out / "windows.md").write_text("\n\n".join(texts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
