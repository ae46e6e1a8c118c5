"""How long compiling takes, with the layers compiled each by itself and compiled once (`regional=True`).

    python benchmarks/compile_time.py --layers 32 --output benchmarks/results/compile-time

A small Llama with random weights, whose number of layers is a large model's: how long a graph takes to compile follows from
its operators, not from their sizes. Each figure is from a process of its own, with Inductor's caches switched off and one
compiling process. Seconds are CPU seconds, of Python and of the compilers that it starts, so that what else the
machine does hardly matters; those of a second prompt, which compiles nothing, are taken off. Writes OUTPUT.json and
OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

FORMS: dict[str, dict[str, Any]] = {
    'backend="inductor"': {"backend": "inductor"},
    'backend="tsa"': {"backend": "tsa"},
    'backend="tsa", regional=True': {"backend": "tsa", "options": {"regional": True}},
}
LENGTH = 1280


def seconds() -> tuple[float, float]:
    """CPU seconds of this process, and of those that it started and that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, children = (usage.ru_utime + usage.ru_stime for usage in used)
    return own, children


def measure(form: str, layers: int) -> dict[str, Any]:
    """Compiles a model of so many layers in one form, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tsa_compile import reports

    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.randint(1, 64, (1, LENGTH), device=model.device)
    fast: Any = torch.compile(model, **FORMS[form])
    with torch.no_grad():
        marks = [seconds()]
        for _ in range(2):
            fast(input_ids=ids, attention_mask=torch.ones_like(ids))
            marks.append(seconds())
    python, compilers = (after - before - (again - after) for before, after, again in zip(*marks, strict=True))
    notes = [note for report in reports() for note in report.notes]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "form": form, "layers": layers, "python_s": round(python, 1), "compilers_s": round(compilers, 1),
        "graphs": len(reports()), "sparse": sum(report.sparse for report in reports()), "notes": notes, "device": device,
        "torch": torch.__version__,
    }  # fmt: skip


def measure_apart(form: str, layers: int) -> dict[str, Any]:
    """The same in a process of its own."""
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-P", __file__, "--one", form, "--layers", str(layers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{form} with {layers} layers failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a row for each form, a column for each number of layers."""
    counts = sorted({row["layers"] for row in found})
    by = {(row["form"], row["layers"]): row for row in found}
    lines = ["| | " + " | ".join(f"{count} layers" for count in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for form in dict.fromkeys(row["form"] for row in found):
        cells = [f"{by[form, count]['python_s']} s + {by[form, count]['compilers_s']} s" for count in counts]
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Reads the command line; measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[32])
    parser.add_argument("--output", type=Path, default=None, help="write OUTPUT.json and OUTPUT.md")
    parser.add_argument("--one", choices=[*FORMS], help="one form, in this process: what the others are started with")
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one, arguments.layers[0])))
        return
    found = [measure_apart(form, count) for count in arguments.layers for form in FORMS]
    text = (
        f"# Compile time\n\nCompiling a small Llama for a prefill with a mask of ones: CPU seconds of Python + of the "
        f"compilers that it starts ({found[0]['device']}, torch {found[0]['torch']}; `benchmarks/compile_time.py`).\n\n"
        f"{table(found)}\n"
    )
    print(text)
    if arguments.output is not None:
        arguments.output.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
