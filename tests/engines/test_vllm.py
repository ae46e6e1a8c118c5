"""The vLLM plug-in: its core on plain tensors, and, where vLLM is installed (`tox -e vllm`), real engines on the CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from tsa_compile import ConfigError, Coverage, Floor, KeepRatio, Reason, TSAConfig, attention
from tsa_compile.engines import vllm as plugin
from tsa_compile.engines.vllm import core
from tsa_compile.kernels import reference

from ..support import VOCAB, heads, tiny
from .vllm_run import BATCH, CALLS, prompts

SMALL = dict(window=4, min_tokens=4, layers=[0, 2], floor=Floor(8, 2))
HALF = TSAConfig(budget=KeepRatio(0.5), **SMALL)
COVERAGE = TSAConfig(budget=Coverage(0.2), **SMALL)

has_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: tox -e vllm")


@pytest.mark.parametrize(
    "starts, lengths, shortest, prompts, others",
    [
        ([0, 9, 12], [9, 3], 3, ((0, 9), (9, 12)), ()),
        ([0, 1, 10, 14], [20, 9, 11], 3, ((1, 10),), (0, 2)),  # a decode step, a prompt, a later chunk
        ([0, 9, 11], [9, 2], 3, ((0, 9),), (1,)),  # too short
        ([0, 1], [1], 1, (), (0,)),  # a prompt of one token
        ([0, 9, 9], [9, 0], 3, ((0, 9),), ()),  # an empty request
        ([0, 9], [9], None, (), (0,)),
    ],
)
def test_which_requests_are_prompts(starts, lengths, shortest, prompts, others):
    assert core.split(starts, lengths, shortest) == core.Split(prompts, others)


def test_layers_by_the_compilers_rule():
    names = {f"model.layers.{number}.self_attn.attn": torch.nn.Module for number in range(4)}
    upper = core.choose_layers(names, {}, TSAConfig())
    assert sorted(upper.sparse) == sorted(names)[2:]
    named = core.choose_layers(names, {"model.layers.1.self_attn.attn": "a sliding window"}, TSAConfig(layers=[1, 3, 9]))
    assert [*named.sparse] == ["model.layers.3.self_attn.attn"]
    each = core.choose_layers(names, {}, TSAConfig(layers={1: 0.25, 3: Coverage(0.1)})).sparse
    assert [own.budget for own in each.values()] == [KeepRatio(0.25), Coverage(0.1)]
    assert named.reasons["model.layers.1.self_attn.attn"] == (Reason.UNSUPPORTED_FORM, "a sliding window")
    assert "a sliding window" in named.summary and "layers=[9] not found" in named.summary
    stage = {name: kind for name, kind in names.items() if name > "model.layers.2"}
    assert {reason for reason, _ in core.choose_layers(stage, {}, TSAConfig()).reasons.values()} == {
        Reason.LAYER_COUNT_UNKNOWN
    }


def test_a_prompt_is_computed_as_the_reference_does():
    query, key, value = heads(1)
    flat = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    output = torch.full_like(flat[0], float("nan"))
    core.attend(*flat, output, 0.3, HALF, None)
    settings = dict(keep_ratio=0.5, window=4, min_tokens=4, floor_window=8, floor_sinks=2, reduce="max")
    wanted = reference.token_sparse_attention(query, key, value, None, scale=0.3, **settings)
    assert torch.allclose(output, wanted[0].transpose(0, 1), atol=1e-5)


def test_without_a_configuration_nothing_happens(monkeypatch):
    monkeypatch.delenv(plugin.CONFIG, raising=False)
    assert plugin.register() is None
    monkeypatch.setenv(plugin.CONFIG, '{"budget": 3}')
    with pytest.raises(ConfigError, match="budget"):
        plugin.register()


def engine(folder, config, processes):
    """What `vllm_run.py` found."""
    output = folder / "found.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {plugin.CONFIG: config.to_json(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(Path(__file__).with_name("vllm_run.py")), str(folder), str(output), str(processes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert "Token Sparse Attention: sparse: model.layers.0" in done.stdout + done.stderr
    return json.loads(output.read_text())


def wanted(model, ids, tokens):
    """The log-probabilities of each step, of a model that is not compiled: a prompt's first chunk by its own attention, and
    what vLLM leaves dense, later chunks and decode steps, by SDPA."""
    cache, found, own = transformers.DynamicCache(), [], model.config._attn_implementation
    for part in [*torch.tensor(ids).split(BATCH), *(torch.tensor([token]) for token in tokens[:-1])]:
        with torch.no_grad():
            found.append(model(part[None], past_key_values=cache).logits[0, -1].log_softmax(-1))
        model.set_attn_implementation("sdpa")
    model.set_attn_implementation(own)
    return torch.stack(found[-len(tokens) :])


@has_vllm
@pytest.mark.timeout(1000)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config, processes", [(HALF, 1), (COVERAGE, 2)], ids=["keep ratio", "coverage over two processes"])
def test_engine_equals_one_process(tmp_path, config, processes):
    """Whole prompts, a short one, one in chunks; a batch with another prompt's decode step."""
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.unflatten(0, (4, -1)).mul_(torch.tensor([1, 2, 4, 8])[:, None, None])
    model.save_pretrained(tmp_path)
    sparse = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=attention.register(config, name="tsa-vllm"), dtype=torch.float32
    ).eval()
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for call, ids, found in zip(CALLS, prompts(), engine(tmp_path, config, processes), strict=True):
        for (length, count), prompt, each in zip(call, ids, found, strict=True):
            steps = torch.tensor(each["logprobs"])
            assert steps.shape == (count, VOCAB)
            assert float((steps - wanted(sparse, prompt, each["tokens"])).abs().max()) < 1e-4, length
            if length > 3:
                assert float((steps - wanted(dense, prompt, each["tokens"])).abs().max()) > 1e-3, "or nothing was tested"


@has_vllm
class TestRefused:
    def settings(self, **changes):
        scheduler = SimpleNamespace(enable_chunked_prefill=True, max_num_batched_tokens=64)
        cache = SimpleNamespace(enable_prefix_caching=changes.pop("prefixes", False))
        parallel = SimpleNamespace(decode_context_parallel_size=changes.pop("context", 1), prefill_context_parallel_size=1)
        return SimpleNamespace(
            scheduler_config=scheduler, cache_config=cache, parallel_config=parallel,
            model_config=SimpleNamespace(max_model_len=128),
        )  # fmt: skip

    def test_prefix_caching(self, monkeypatch):
        from tsa_compile.engines.vllm.interface import check

        with pytest.raises(ConfigError, match=r"enable_prefix_caching=True.*TSA_ALLOW_PREFIX_CACHING"):
            check(self.settings(prefixes=True), HALF)
        check(self.settings(prefixes=True), HALF.replace(layers=[]))
        monkeypatch.setenv("TSA_ALLOW_PREFIX_CACHING", "1")
        check(self.settings(prefixes=True), HALF)

    def test_context_parallel(self):
        from tsa_compile.engines.vllm.interface import check

        with pytest.raises(ConfigError, match="decode_context_parallel_size=2"):
            check(self.settings(context=2), HALF)

    def test_other_versions(self, monkeypatch):
        from tsa_compile.engines.vllm import interface

        monkeypatch.setattr(interface.vllm, "__version__", "0.1.0")
        with pytest.raises(ConfigError, match=r"vLLM 0.1.0 is not supported.*0\.32"):
            interface.install(HALF)
