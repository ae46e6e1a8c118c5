"""A prompt in chunks through a cache against the whole prompt at once: what `prefill.py --chunk 8192` measures.

    python benchmarks/prefill.py --chunk 8192 --lengths 65536 131072 --modes exact sparse --masks ones

For each mode, length and kind of mask: milliseconds of the whole prompt and of the chunks, their ratio, the seconds of each
one's first call, how many graphs the first prompt in chunks was compiled in and how many later ones needed, and peak memory.
The cache is a DynamicCache, which is new for each prompt, and whose every growth copies it, as `generate` has it.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from prefill_report import Row, describe, mask_name

from tsa_compile import reports


def prefill(call: Callable[..., Any], config: Any, ids: torch.Tensor, masked: bool, chunk: int) -> Any:
    """The last chunk's output; a mask covers all tokens so far."""
    from transformers import DynamicCache

    cache, out = DynamicCache(config=config), None
    for low in range(0, ids.shape[1], chunk):
        part = ids[:, low : low + chunk]
        mask = {"attention_mask": torch.ones(1, low + part.shape[1], dtype=torch.long, device=ids.device)} if masked else {}
        out = call(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1, **mask)
    return out


def timed(call: Callable[..., Any]) -> tuple[float, int, Any]:
    """Milliseconds, peak memory above what was allocated before, in bytes, and what was computed."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    started = time.perf_counter()
    out = call()
    if cuda:
        torch.cuda.synchronize()
    milliseconds = 1e3 * (time.perf_counter() - started)
    return milliseconds, (torch.cuda.max_memory_allocated() if cuda else 0) - before, out


def measure(
    make: Callable[[bool], Callable[..., Any]], config: Any, ids: torch.Tensor, masked: bool, chunk: int, repeats: int
) -> Row:
    """One row: the whole prompt, then its chunks, each compiled anew by `make(chunked)`: neither knows of the other."""
    row: Row = {"length": ids.shape[1], "mask": masked, "chunk": chunk}
    logits = []
    for name, size in {"whole": ids.shape[1], "chunked": chunk}.items():
        torch._dynamo.reset()
        call, graphs = make(name == "chunked"), len(reports())

        def once(call: Callable[..., Any] = call, size: int = size) -> tuple[float, int, Any]:
            return timed(lambda: prefill(call, config, ids, masked, size))

        milliseconds, _, out = once()
        logits.append(out.logits.float())
        row |= {f"{name}_first_call_s": round(milliseconds / 1e3, 1), f"{name}_graphs": len(reports()) - graphs}
        row |= {f"{name}_report": reports()[-1].summary} if len(reports()) > graphs else {}
        graphs, found = len(reports()), [once() for _ in range(repeats)]
        times = [milliseconds for milliseconds, *_ in found]
        row |= {
            f"{name}_ms": round(statistics.median(times), 1),
            f"{name}_range_ms": [round(min(times), 1), round(max(times), 1)],
            f"{name}_peak_gib": round(max(peak for _, peak, _ in found) / 2**30, 2),
            f"{name}_graphs_later": len(reports()) - graphs,
        }
    whole, chunked = logits
    row["ratio"] = round(row["chunked_ms"] / row["whole_ms"], 3)
    return row | {"relative_difference": round(float((chunked - whole).norm() / whole.norm()), 4)}


def run(
    model: Any, compiled: Callable[[Any, str, bool], Any], modes: list[str], masks: tuple[bool, ...], lengths: list[int],
    chunk: int, repeats: int, rows: list[Row],
) -> Iterator[list[Row]]:  # fmt: skip
    """All rows so far after each mode, kind of mask and length not among `rows`; running out of memory is a result."""
    device = next(model.parameters()).device
    torch._dynamo.config.recompile_limit = 64
    known = [(row["mode"], row["mask"], row["length"]) for row in rows]
    for mode, masked, length in itertools.product(modes, masks, lengths):
        if (mode, masked, length) in known:
            continue
        ids = torch.randint(1, model.config.vocab_size, (1, length), device=device)
        try:
            with torch.no_grad():
                made = functools.partial(compiled, model, mode)
                row = measure(made, model.config, ids, masked, chunk, repeats)
        except torch.OutOfMemoryError as error:
            row = {"length": length, "mask": masked, "chunk": chunk, "error": "out of memory: " + str(error).split(".")[0]}
        rows = [*rows, {"mode": mode, **row}]
        print(json.dumps(rows[-1]), flush=True)
        yield rows
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def table(rows: list[Row]) -> str:
    """Markdown: a row a measurement."""
    names = ("", "tokens", "whole, ms", "in chunks, ms", "ratio", "first call, s: whole / chunks", "graphs", "peak, GiB")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        start = f"| {describe(row['mode'])}, {mask_name(row['mask'])} | {row['length']} "
        if "error" in row:
            lines.append(f"{start}| {row['error']} |" + " |" * 5)
            continue
        lines.append(
            f"{start}| {row['whole_ms']} | {row['chunked_ms']} | {row['ratio']:.2f} | {row['whole_first_call_s']} / "
            f"{row['chunked_first_call_s']} | {row['chunked_graphs']}, then {row['chunked_graphs_later']} | "
            f"{row['whole_peak_gib']} / {row['chunked_peak_gib']} |"
        )
    return "\n".join(lines)


def earlier(conditions: Row, target: Path) -> list[Row]:
    """The rows of `target`.json, if it was measured under the same conditions."""
    path = target.with_suffix(".json")
    found = json.loads(path.read_text()) if path.is_file() else {"conditions": None}
    return found["rows"] if found["conditions"] == conditions else []


def write(rows: list[Row], conditions: Row, target: Path) -> None:
    """`target`.json and `target`.md."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
    said = ", ".join(f"{name}: {value}" for name, value in conditions.items())
    target.with_suffix(".md").write_text(f"# A prompt in chunks\n\n{said}\n\n{table(rows)}\n")
