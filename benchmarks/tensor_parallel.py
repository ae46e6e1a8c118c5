"""transformers' tensor parallel: what a layer of Llama-3.1-70B's shape takes on one GPU, and on two that share its heads.

    python benchmarks/tensor_parallel.py --layers 3 --length 131072 --output benchmarks/results/tensor-parallel

A model of a few layers with random bfloat16 weights and a small vocabulary is written to a folder that is deleted at the
end.
Processes, one for each GPU, load it (`tp_plan="auto"`), and measure prefills of one prompt with a mask of ones: eager, exact
mode, and all layers sparse with the default budget and floor. What the layers do not take (embeddings, one row of logits) is
small, so the time of a layer is that of a prefill over the number of layers. Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODES = {
    "eager": "eager PyTorch",
    "exact": '`backend="tsa"`, exact',
    "sparse": '`backend="tsa"`, keep 0.15 in all layers',
}
VOCABULARY = 1024


def write_checkpoint(folder: str, layers: int, hidden: int) -> None:
    """Writes a checkpoint of Llama-3.1-70B's shape, but for its number of layers, its vocabulary and its width."""
    import torch
    from transformers import LlamaConfig

    from tsa_compile.shapes import build

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=max(hidden // 1024, 2), head_dim=128,
        max_position_embeddings=131072, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, dtype="bfloat16",
    )  # fmt: skip
    build(config, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16).save_pretrained(folder)


def timed(model: Any, length: int, repeats: int) -> dict[str, Any]:
    """Seconds of a first prefill, and of further ones, with the peak memory of the last."""
    import torch

    cuda = torch.cuda.is_available()
    ids = torch.randint(1, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    times = []
    for _ in range(1 + repeats):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        started = time.perf_counter()
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {
        "key_heads": out.past_key_values.layers[0].keys.shape[1], "first_call_s": times[0],
        "seconds": statistics.median(times[1:]), "range_s": [min(times[1:]), max(times[1:])],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }  # fmt: skip


def measure(folder: str, length: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of one process, one for each mode."""
    import torch
    from transformers import AutoModelForCausalLM

    import tsa_compile

    world, cuda = int(os.environ["WORLD_SIZE"]), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=120))
    how: dict[str, Any] = {"tp_plan": "auto"} if world > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how).eval().to(device)
    configs = {"exact": tsa_compile.TSAConfig(layers=[]), "sparse": tsa_compile.TSAConfig(layers=["*"])}
    conditions = {
        "devices": world, "device": torch.cuda.get_device_name() if cuda else "CPU", "torch": str(torch.__version__),
        "layers": model.config.num_hidden_layers, "length": length,
    }  # fmt: skip
    rows = []
    for mode in MODES:
        torch._dynamo.reset()
        compiled = tsa_compile.prefill(model, configs[mode]) if mode in configs else None
        row = {"mode": mode, **conditions, **timed(model, length, repeats)}
        rows.append(row | {"sparse": tsa_compile.reports()[-1].sparse if compiled else 0})
        if compiled:
            compiled.remove()
        torch.cuda.empty_cache()
    if world > 1:
        torch.distributed.destroy_process_group()
    return rows


def measure_on(folder: str, devices: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the first of so many processes, all of which end a prefill at the same time.

    Raises:
        SystemExit: one of them failed, with what it said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = ["--length", str(arguments.length), "--repeats", str(arguments.repeats)]
    logs = [Path(folder, f"{rank}.log") for rank in range(devices)]
    processes = []
    for rank, log in enumerate(logs):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-P", __file__, "--one", folder, *options]
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    for process, log in zip(processes, logs, strict=True):
        if process.wait():
            for other in processes:
                other.kill()
            raise SystemExit(f"a process on {devices} GPU(s) failed:\n{log.read_text()}")
    lines = logs[0].read_text().splitlines()
    return json.loads(next(line for line in reversed(lines) if line.startswith("[{")))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each mode, with milliseconds of a layer on one GPU and on two, and what the second brings."""
    by = {(row["mode"], row["devices"]): row for row in rows}
    lines = [
        "| one layer | one GPU, ms | two GPUs, ms | speedup by the second | speedup over eager, one GPU | two GPUs |",
        "|---|---|---|---|---|---|",
    ]
    for mode, name in MODES.items():
        one, two = (1e3 * by[mode, count]["seconds"] / by[mode, count]["layers"] for count in (1, 2))
        eager = [1e3 * by["eager", count]["seconds"] / by["eager", count]["layers"] for count in (1, 2)]
        lines.append(
            f"| {name} | {one:,.0f} | {two:,.0f} | {one / two:.2f}x | {eager[0] / one:.2f}x | {eager[1] / two:.2f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    """Reads the command line; measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=8192, help="a multiple of 512: smaller than 70B's, to try it")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    parser.add_argument("--one", metavar="FOLDER", help="one process's part: what the others are started with")
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one, arguments.length, arguments.repeats)))
        return
    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(
            target=write_checkpoint, args=(folder, arguments.layers, arguments.hidden)
        )
        writer.start()  # a process of its own, whose memory on the GPU is free afterwards
        writer.join()
        if writer.exitcode:
            raise SystemExit("the checkpoint could not be written: see above")
        rows = [row for devices in (1, 2) for row in measure_on(folder, devices, arguments)]
    first = rows[0]
    text = (
        f"# Tensor parallel\n\nLlama-3.1-70B's shape, {first['layers']} layers, random bfloat16 weights, one prompt of "
        f"{first['length']:,} tokens with a mask of ones: {first['device']}, torch {first['torch']}, over NCCL "
        f"(`benchmarks/tensor_parallel.py`, medians of {arguments.repeats}).\n\n{table(rows)}\n"
    )
    print(text)
    if arguments.output is not None:
        arguments.output.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
