"""Writes what main.cpp runs: a package of a small model with Token Sparse Attention, and two calls with their results.

    python export_model.py FOLDER [--device cuda]
    -> FOLDER/model.pt2, FOLDER/case_0.pt, FOLDER/case_1.pt     {"inputs": [tensors], "outputs": [tensors]}

The inputs are padded batches of different lengths. The outputs are those of the exported program, run in Python.
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tsa_compile import Coverage, Floor, TSAConfig
from tsa_compile.export import aoti, export_program

CONFIG = TSAConfig(budget=Coverage(0.2), window=8, min_tokens=8, layers=[1], floor=Floor(window=16, sinks=4))
LENGTHS = (64, 512)
CASES = ((2, 100), (3, 67))  # batch, length


def small_model(device: str) -> LlamaForCausalLM:
    """Two layers with random weights."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).eval().to(device)


def padded_batch(batch: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Token ids [batch, length], and a mask that pads all but the first item on the left."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for item in range(1, batch):
        mask[item, : 7 * item] = 0
    return {"input_ids": torch.randint(128, (batch, length)).to(device), "attention_mask": mask.to(device)}


def main(arguments: list[str] | None = None, **inductor_options: object) -> None:
    """Exports, compiles, and saves the two calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    example = padded_batch(2, 80, options.device)
    program = export_program(small_model(options.device), example, CONFIG, dynamic_lengths=LENGTHS, dynamic_batch=(1, 8))
    print(aoti.save(program, options.folder / "model.pt2", **inductor_options))
    run = program.module()
    for number, (batch, length) in enumerate(CASES):
        inputs = padded_batch(batch, length, options.device)
        with torch.no_grad():
            outputs = run(**inputs)
        tensors = {"inputs": list(inputs.values()), "outputs": [output.detach() for output in outputs.values()]}
        torch.save(tensors, options.folder / f"case_{number}.pt")


if __name__ == "__main__":
    main()
