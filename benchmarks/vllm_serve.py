"""Time to first token and decode speed in vLLM, with Token Sparse Attention beside vLLM's own FlashAttention.

    python benchmarks/vllm_serve.py --lengths 32768 131072
    python benchmarks/vllm_serve.py --lengths 131072 --tensor-parallel 2 --batch 8192

Needs vLLM and a GPU (a small shape also runs on vLLM's CPU platform). The model has a shape's published sizes and vLLM's
dummy weights, so it says something about time alone. Each attention has an engine in a process of its own, with the same
settings; one request runs at a time. Time to first token is that of a whole `generate` of one token, queue and scheduler
included, as the host sees it: the median after a first, unmeasured request of that length. Decode speed is that of the
tokens after the first one, of one request, behind a prompt of that length.

Rows go to `--json`, by default benchmarks/results/vllm.json, as soon as an engine is done; what the file has of other
settings stays. Beside it lies a table of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "vllm.json"
KEY = ("device", "vllm", "shape", "layers", "tensor_parallel", "batch", "eager", "length", "attention")


def measure(arguments: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """One engine's rows, one for each length."""
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    settings = {} if arguments.batch is None else {"max_num_batched_tokens": arguments.batch}
    engine = LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, dtype=arguments.dtype, enable_prefix_caching=False,
        max_model_len=max(arguments.lengths) + arguments.decode, tensor_parallel_size=arguments.tensor_parallel,
        enforce_eager=arguments.eager, gpu_memory_utilization=0.9, max_num_seqs=8, **settings,
    )  # fmt: skip
    config = engine.llm_engine.vllm_config
    generator = torch.Generator().manual_seed(0)
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "vllm": vllm.__version__, "torch": torch.__version__, "shape": arguments.shape, "layers": arguments.layers,
        "tensor_parallel": arguments.tensor_parallel, "eager": arguments.eager, "attention": arguments.measure,
        "batch": config.scheduler_config.max_num_batched_tokens,
    }  # fmt: skip

    def seconds(length: int, tokens: int) -> float:
        """Of one request, of other random tokens each time."""
        ids = torch.randint(1, config.model_config.get_vocab_size(), (length,), generator=generator).tolist()
        asked = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        engine.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
        return time.perf_counter() - started

    rows = []
    for length in arguments.lengths:
        first_call = seconds(length, 1)
        times = [seconds(length, 1) for _ in range(arguments.repeats)]
        whole = seconds(length, arguments.decode)
        first = statistics.median(times)
        rows.append({
            **found, "length": length, "first_call_s": round(first_call, 2), "first_token_s": round(first, 4),
            "range_s": [round(min(times), 4), round(max(times), 4)],
            "decode_tokens_per_s": round((arguments.decode - 1) / max(whole - first, 1e-9), 1),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def in_a_process(arguments: argparse.Namespace, name: str, folder: str) -> list[dict[str, Any]]:
    """The rows of an engine with Token Sparse Attention ("sparse"), or without ("dense")."""
    environment = {key: value for key, value in os.environ.items() if key != "TSA_CONFIG"}
    if name == "sparse":
        environment["TSA_CONFIG"] = arguments.config
    output = Path(folder) / f"{name}.json"
    command = [
        sys.executable,
        "-P",
        str(Path(__file__).resolve()),
        *sys.argv[1:],
        "--measure",
        name,
        "--folder",
        folder,
        "--json",
        str(output),
    ]
    # In that folder: vLLM starts `python -m`, for which a checkout's `kernels` would stand for Hugging Face's package.
    done = subprocess.run(command, env=environment, cwd=folder, timeout=arguments.timeout, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the engine with {name} attention ended with {done.returncode}; its log stands above")
    return json.loads(output.read_text())


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same settings are replaced."""
    measured = {tuple(row[name] for name in KEY) for row in new}
    return [row for row in old if tuple(row.get(name) for name in KEY) not in measured] + new


def table(rows: list[dict[str, Any]]) -> str:
    """Both kinds of attention side by side, in Markdown."""
    lines = [
        "| prompt | devices | batch | first token, dense (s) | sparse (s) | speedup | decode, dense (tokens/s) | sparse |",
        "|---|---|---|---|---|---|---|---|",
    ]
    pairs: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        pairs.setdefault(tuple(row[name] for name in KEY[:-1]), {})[row["attention"]] = row
    for pair in pairs.values():
        if set(pair) == {"dense", "sparse"}:
            dense, sparse = pair["dense"], pair["sparse"]
            lines.append(
                f"| {dense['length']:,} | {dense['tensor_parallel']} {dense['device']} | {dense['batch']:,} "
                f"| {dense['first_token_s']:.2f} | {sparse['first_token_s']:.2f} "
                f"| {dense['first_token_s'] / sparse['first_token_s']:.2f}x "
                f"| {dense['decode_tokens_per_s']:.1f} | {sparse['decode_tokens_per_s']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Runs both engines, or the one that `--measure` names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help="one of tsa_compile.shapes")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--batch", type=int, help="max_num_batched_tokens; vLLM's own choice if it is not given")
    parser.add_argument("--config", default="{}", help="TSA_CONFIG: JSON or a file; the default configuration if not given")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--decode", type=int, default=129, help="tokens to generate where decode speed is measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without vLLM's compilation and CUDA graphs")
    parser.add_argument("--timeout", type=float, default=540, help="seconds for each engine")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=["dense", "sparse"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        arguments.json.write_text(json.dumps(measure(arguments, arguments.folder)))
        return
    from tsa_compile.shapes import model_config

    with tempfile.TemporaryDirectory() as folder:
        config = model_config(arguments.shape, arguments.layers)
        config.max_position_embeddings = max(config.max_position_embeddings, max(arguments.lengths) + arguments.decode)
        config.architectures = [type(config).__name__.replace("TextConfig", "Config").replace("Config", "ForCausalLM")]
        config.save_pretrained(folder)
        rows: list[dict[str, Any]] = []
        for name in ("dense", "sparse"):
            rows += in_a_process(arguments, name, folder)
            old = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
            rows_of_all = merged(old, rows)
            arguments.json.write_text(json.dumps(rows_of_all, indent=1) + "\n")
            arguments.json.with_suffix(".md").write_text(table(rows_of_all) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
