"""What the tests of the vLLM plug-in share: configurations, and an engine compared with one process of transformers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tsa_compile import Coverage, Floor, KeepRatio, TSAConfig, attention
from tsa_compile.costs.calls import CallShape
from tsa_compile.engines.vllm import core, settings

from ..support import VOCAB, tiny
from .vllm_run import CALLS, prompts

SMALL = dict(window=4, min_tokens=4, layers=[0, 2], floor=Floor(8, 2))
HALF = TSAConfig(budget=KeepRatio(0.5), **SMALL)
COVERAGE = TSAConfig(budget=Coverage(0.2), **SMALL)

CPU = torch.device("cpu")

has_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: tox -e vllm")


SHAPE = CallShape(1, 4, 2, 8, 8, itemsize=4, window=2)
ANY = core.Rule(TSAConfig(window=2, min_tokens=0), SHAPE, 0.5, CPU)
"""From three tokens on."""


def flat(*tensors):
    """Heads [1, H, L, D] as an engine has them: [L, H, D]."""
    return [tensor[0].transpose(0, 1).contiguous() for tensor in tensors]


def engine(folder, config, processes, dtype="float32", additional=False):
    """What `vllm_run.py` found, with the configuration in the environment, or in vLLM's additional one."""
    output = folder / "found.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | (
        {} if additional else {settings.CONFIG: config.to_json()}
    )
    run = str(Path(__file__).with_name("vllm_run.py"))
    command = [sys.executable, "-P", run, str(folder), str(output), str(processes), dtype]
    command += [json.dumps({settings.KEY: config.to_dict()})] if additional else []
    # In that folder: vLLM starts `python -m`, for which a checkout's `kernels` would stand for Hugging Face's package.
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    said = [line for line in (done.stdout + done.stderr).splitlines() if "Token Sparse Attention: " in line]
    assert any(f"sparse: model.layers.{config.layers[0]}." in line for line in said), said
    return json.loads(output.read_text())


def wanted(model, ids, chunks, tokens, later=None):
    """The log-probabilities of each step, of a model that is not compiled and runs its prompt in the same chunks; behind the
    first one with the attention `later`, if it is given."""
    cache, found, own = transformers.DynamicCache(), [], model.config._attn_implementation
    for part in [*torch.tensor(ids).split(chunks), *(torch.tensor([token]) for token in tokens[:-1])]:
        with torch.no_grad():
            logits = model(part[None].to(model.device), past_key_values=cache).logits[0, -1]
        found.append(logits.float().log_softmax(-1).cpu())
        model.set_attn_implementation(later or own)
    model.set_attn_implementation(own)
    return torch.stack(found[-len(tokens) :])


def compare(folder, name, config, processes, dtype, device, additional=False):
    """For each prompt of an engine's calls, by its chunks, the largest differences of log-probabilities: from one process
    that is sparse, from one that is dense, and from one that is sparse in the first chunk alone; infinite where that is
    the same."""
    own = "eager" if "sinks" in name else "sdpa"
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}  # as vLLM has it for gpt-oss
    model = tiny(name, own, **(kinds if "sinks" in name else {}))
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.unflatten(0, (4, -1)).mul_(torch.tensor([1, 2, 4, 8])[:, None, None])
        if "sinks" in name:
            layer.self_attn.sinks.data = torch.linspace(-3, 4, 4)
    model.save_pretrained(folder)
    sparse, dense = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=which, dtype=getattr(torch, dtype))
        .to(device)
        .eval()
        for which in (attention.register(config, name="tsa-vllm"), own)
    )
    gaps, nothing = {}, float("inf")
    for call, ids, found in zip(CALLS, prompts(), engine(folder, config, processes, dtype, additional), strict=True):
        for (chunks, count), prompt, each in zip(call, ids, found, strict=True):
            steps = torch.tensor(each["logprobs"])
            assert steps.shape == (count, VOCAB)
            case = (prompt, chunks, each["tokens"])
            gaps[tuple(chunks)] = (
                float((steps - wanted(sparse, *case)).abs().max()),
                float((steps - wanted(dense, *case)).abs().max()) if sum(chunks) > 3 else nothing,
                float((steps - wanted(sparse, *case, later=own)).abs().max()) if len(chunks) > 1 else nothing,
            )
    return gaps
