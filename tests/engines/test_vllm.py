"""The vLLM plug-in: its core on plain tensors, and, where vLLM is installed (`tox -e vllm`), engines on CPUs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from tsa_compile import ConfigError, Coverage, Floor, KeepRatio, Reason, TSAConfig, attention
from tsa_compile.engines import vllm as plugin
from tsa_compile.engines.vllm import core
from tsa_compile.kernels import reference
from tsa_compile.passes import plan

from ..support import VOCAB, heads, tiny
from .vllm_run import CALLS, prompts

SMALL = dict(window=4, min_tokens=4, layers=[0, 2], floor=Floor(8, 2))
HALF = TSAConfig(budget=KeepRatio(0.5), **SMALL)
COVERAGE = TSAConfig(budget=Coverage(0.2), **SMALL)

CPU = torch.device("cpu")

has_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: tox -e vllm")


ANY = core.Minimum(3, plan._DROPPABLE)


@pytest.mark.parametrize(
    "starts, lengths, prefilling, minimum, prompts, others",
    [
        ([0, 9, 12], [9, 3], [True, True], ANY, [(0, 9), (9, 12)], ()),
        ([0, 1, 10, 30], [20, 9, 40], [False, True, True], ANY, [(1, 10), (10, 30)], (0,)),  # decode step, prompt, chunk
        ([0, 20, 40], [40, 20], None, ANY, [(20, 40)], (0,)),  # whether it is a chunk is not known
        ([0, 20, 35], [20, 35], [True, True], ANY, [(0, 20)], (1,)),  # a chunk of few queries
        ([0, 9, 11], [9, 2], [True, True], ANY, [(0, 9)], (1,)),  # too short
        ([0, 20, 50], [50, 80], [True, True], core.Minimum(25, plan._CONFIGURED), [(20, 50)], (0,)),
        ([0, 20, 50], [50, 80], [True, True], core.Minimum(60, plan._DROPPABLE), [(20, 50)], (0,)),
        ([0, 20, 40, 60], [20, 400, 30], [True] * 3, core.Minimum(30, "on a GPU"), [(20, 40)], (0, 2)),
        ([0, 1], [1], [True], core.Minimum(1), (), (0,)),  # a prompt of one token
        ([0, 9, 9], [9, 0], [True], ANY, [(0, 9)], ()),  # an empty request
        ([0, 9], [9], [True], core.Minimum(None), (), (0,)),
    ],
)
def test_which_requests_are_prompts(starts, lengths, prefilling, minimum, prompts, others):
    batch = core.split(starts, lengths, prefilling, minimum)
    assert [(each.start, each.stop) for each in batch.prompts] == [*prompts]
    assert batch.others == others
    assert all(lengths[each.number] == each.length for each in batch.prompts)


def test_what_the_log_says_of_lengths():
    assert str(core.Minimum(64, "where it gains")) == "from 64 tokens on, where it gains"
    assert str(core.Minimum(None, "it never gains")) == "for no length: it never gains"


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


def flat(*tensors):
    """Heads [1, H, L, D] as an engine has them: [L, H, D]."""
    return [tensor[0].transpose(0, 1).contiguous() for tensor in tensors]


def paged(tokens, size, blocks):
    """Tokens [L, ...] in a cache of blocks of `size` that has them in those `blocks`; what else is in it is NaN."""
    cache = tokens.new_full((max(blocks) + 2, size, *tokens.shape[1:]), float("nan"))
    for number, part in zip(blocks, tokens.split(size), strict=True):
        cache[number, : len(part)] = part
    return cache


@pytest.mark.parametrize("rows", [50, 20])
def test_a_prompt_is_computed_as_the_reference_does(rows):
    query, key, value = heads(1, 50)
    query = query[:, :, -rows:]
    output = torch.full_like(flat(query)[0], float("nan"))
    core.attend(*flat(query, key, value), output, 0.3, HALF, None)
    settings = dict(keep_ratio=0.5, window=4, min_tokens=4, floor_window=8, floor_sinks=2, reduce="max")
    wanted = reference.token_sparse_attention(query, key, value, None, scale=0.3, **settings)
    assert torch.allclose(output, flat(wanted)[0], atol=1e-5)


@pytest.mark.parametrize("length", [1, 16, 17, 45])
def test_tokens_are_gathered_from_their_blocks(length):
    tokens, blocks = torch.randn(45, 2, 6), [4, 0, 2]
    table = torch.tensor([*blocks, 99, 99], dtype=torch.int32)  # an engine's tables are as long as the longest request
    assert torch.equal(core.gather(paged(tokens, 16, blocks), table, length), tokens[:length])


def test_the_largest_request_is_rehearsed():
    """With as many keys as a request may have."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.tsa.sparse_attention.default:
                seen.append([tuple(each.shape) for each in args[:3]])
            return function(*args, **(kwargs or {}))

    with Watch():
        core.rehearse(torch.randn(20, 4, 8), 2, 90, ANY, 0.3, HALF)
        core.rehearse(torch.randn(20, 4, 8), 2, 90, core.Minimum(None), 0.3, HALF)
    assert seen == [[(1, 4, 20, 8), (1, 2, 90, 8), (1, 2, 90, 8)]]


def test_without_a_configuration_nothing_happens(monkeypatch):
    monkeypatch.delenv(plugin.CONFIG, raising=False)
    assert plugin.register() is None
    monkeypatch.setenv(plugin.CONFIG, '{"budget": 3}')
    with pytest.raises(ConfigError, match="budget"):
        plugin.register()


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_configurations_of_the_pages_are_valid(page):
    configs = re.findall(rf"^{plugin.CONFIG}='(.*?)'", (Path(__file__).parents[2] / page).read_text(), re.MULTILINE)
    assert [TSAConfig.from_json(config) for config in configs] == [TSAConfig(budget=KeepRatio(0.3))]


def engine(folder, config, processes, dtype="float32"):
    """What `vllm_run.py` found."""
    output = folder / "found.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {plugin.CONFIG: config.to_json(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = str(Path(__file__).with_name("vllm_run.py"))
    command = [sys.executable, "-P", run, str(folder), str(output), str(processes), dtype]
    # In that folder: vLLM starts `python -m`, for which a checkout's `kernels` would stand for Hugging Face's package.
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert "Token Sparse Attention: sparse: model.layers.0" in done.stdout + done.stderr
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


def compare(folder, name, config, processes, dtype, device):
    """For each prompt of an engine's calls, by its chunks, the largest differences of log-probabilities: from one process
    that is sparse, from one that is dense, and from one that is sparse in the first chunk alone; infinite where that is
    the same."""
    model = tiny(name)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.unflatten(0, (4, -1)).mul_(torch.tensor([1, 2, 4, 8])[:, None, None])
    model.save_pretrained(folder)
    sparse, dense = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=own, dtype=getattr(torch, dtype))
        .to(device)
        .eval()
        for own in (attention.register(config, name="tsa-vllm"), "sdpa")
    )
    gaps, nothing = {}, float("inf")
    for call, ids, found in zip(CALLS, prompts(), engine(folder, config, processes, dtype), strict=True):
        for (chunks, count), prompt, each in zip(call, ids, found, strict=True):
            steps = torch.tensor(each["logprobs"])
            assert steps.shape == (count, VOCAB)
            case = (prompt, chunks, each["tokens"])
            gaps[tuple(chunks)] = (
                float((steps - wanted(sparse, *case)).abs().max()),
                float((steps - wanted(dense, *case)).abs().max()) if sum(chunks) > 3 else nothing,
                float((steps - wanted(sparse, *case, later="sdpa")).abs().max()) if len(chunks) > 1 else nothing,
            )
    return gaps


@has_vllm
@pytest.mark.timeout(1000)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, config, processes", [("llama", HALF, 1), ("qwen3", COVERAGE, 2)])
def test_engine_equals_one_process(tmp_path, name, config, processes):
    """Whole prompts, a short one, some in chunks; in a batch with another prompt's decode step. By heads, and by a coverage
    that two processes decide together."""
    gaps = compare(tmp_path, name, config, processes, "float32", CPU)
    assert all(gap < 1e-4 for gap, *_ in gaps.values()), gaps
    assert all(dense > 1e-3 and first > 1e-3 for _, dense, first in gaps.values()), f"or nothing was tested: {gaps}"
