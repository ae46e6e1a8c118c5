"""The vLLM plug-in: its core on plain tensors, and, where vLLM is installed (`tox -e vllm`), engines on CPUs."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tsa_compile import ConfigError, Coverage, KeepRatio, KernelError, Reason, TSAConfig
from tsa_compile.costs.devices import H200
from tsa_compile.engines import vllm as plugin
from tsa_compile.engines.vllm import core, settings
from tsa_compile.kernels import reference
from tsa_compile.passes.layers import place_in, select_layers

from ..support import heads
from .vllm_support import ANY, COVERAGE, CPU, HALF, SHAPE, compare, flat, has_vllm

LLAMA = replace(SHAPE, heads=32, kv_heads=8, head_dim=128, value_head_dim=128, itemsize=2, window=128, floor=272)


def by(where=CPU, **options):
    """The rule on a CPU for small layers, with costs of a GPU for those of Llama-3.1-8B."""
    config = TSAConfig(**({"window": 2, "min_tokens": 0} if where is CPU else {}) | options)
    return core.Rule(config, SHAPE if where is CPU else LLAMA, 0.5, where)


@pytest.mark.parametrize(
    "starts, lengths, prefilling, rule, prompts, others",
    [
        ([0, 9, 12], [9, 3], [True, True], ANY, [(0, 9), (9, 12)], ()),
        ([0, 1, 10, 42], [20, 9, 52], [False, True, True], ANY, [(1, 10), (10, 42)], (0,)),  # decode step, prompt, chunk
        ([0, 20, 40], [40, 20], None, ANY, [(20, 40)], (0,)),  # whether it is a chunk is not known
        ([0, 20, 51], [20, 51], [True, True], ANY, [(0, 20)], (1,)),  # a chunk of few queries
        ([0, 9, 11], [9, 2], [True, True], ANY, [(0, 9)], (1,)),  # too short
        ([0, 33, 70], [50, 80], [True, True], by(min_length=35), [(33, 70)], (0,)),
        ([0, 33, 70], [50, 80], [True, True], by(min_tokens=57), [(33, 70)], (0,)),
        ([0, 20, 60, 80], [20, 400, 30], [True] * 3, by(min_tokens=297), [(20, 60)], (0, 2)),
        ([0, 3000, 6000, 9000], [3000, 33_000, 6000], [True] * 3, by(H200), [(3000, 6000)], (0, 2)),  # where a GPU gains
        ([0, 1], [1], [True], by(min_length=1), (), (0,)),  # a prompt of one token
        ([0, 9, 9], [9, 0], [True], ANY, [(0, 9)], ()),  # an empty request
        ([0, 9], [9], [True], by(H200, budget=KeepRatio(1)), (), (0,)),
    ],
)
def test_which_requests_are_prompts(starts, lengths, prefilling, rule, prompts, others):
    found, rest = core.split(starts, lengths, prefilling, rule)
    assert [(each.start, each.stop) for each in found] == [*prompts]
    assert rest == others
    assert all(lengths[each.number] == each.length for each in found)


def test_layers_with_budgets_of_their_own_are_sparse_where_all_of_them_gain():
    rules = [by(H200, budget=KeepRatio(ratio)) for ratio in (0.15, 0.9, 0.3)]
    assert core.strictest(rules) is rules[1]
    assert rules[0].minimum().tokens < rules[1].minimum().tokens
    never = by(H200, budget=KeepRatio(1))
    assert never.minimum().tokens is None and core.strictest([*rules, never]) is never


def attention(numbers, name="model.layers.{}.self_attn.attn"):
    return {name.format(number): torch.nn.Module for number in numbers}


def upper_half(names, count=None, **more):
    """The numbers of the layers that are sparse by default."""
    found = core.choose_layers(names, {}, TSAConfig(), count, **more).sparse
    return [int(part) for name in found for part in name.split(".") if part.isdigit()]


def test_layers_by_the_compilers_rule():
    names = attention(range(4))
    upper = core.choose_layers(names, {}, TSAConfig())
    assert sorted(upper.sparse) == sorted(names)[2:]
    named = core.choose_layers(names, {"model.layers.1.self_attn.attn": "a sliding window"}, TSAConfig(layers=[1, 3, 9]))
    assert [*named.sparse] == ["model.layers.3.self_attn.attn"]
    each = core.choose_layers(names, {}, TSAConfig(layers={1: 0.25, 3: Coverage(0.1)})).sparse
    assert [own.budget for own in each.values()] == [KeepRatio(0.25), Coverage(0.1)]
    assert named.reasons["model.layers.1.self_attn.attn"] == (Reason.SLIDING_WINDOW, "a sliding window")
    assert "a sliding window" in named.summary and "layers=[9] not found" in named.summary
    stage = {name: kind for name, kind in names.items() if name > "model.layers.2"}
    assert {reason for reason, _ in core.choose_layers(stage, {}, TSAConfig()).reasons.values()} == {
        Reason.LAYER_COUNT_UNKNOWN
    }


class TestTheUpperHalf:
    """Of all layers that the model has, whichever are here: the numbers come from its configuration."""

    def test_of_a_stage_of_a_pipeline(self):
        stages = [range(4), range(4, 7), [7]]
        assert [upper_half(attention(stage), 8, whole=False) for stage in stages] == [[], [4, 5, 6], [7]]

    def test_of_a_hybrid_model_is_what_a_compiled_one_has(self):
        assert upper_half(attention([4, 12, 20, 28]), 32) == [20, 28]
        held = attention(range(32), "model.layers.{}") | attention([4, 12, 20, 28])
        places = [place_in(held, name) for name in held if name.endswith(".attn")]
        found = select_layers(places, TSAConfig())
        assert [place.number for place, reason in zip(places, found, strict=True) if reason is None] == [20, 28]

    def test_of_two_stacks_is_of_each(self):
        """A count of one number cannot be that of both."""
        names = attention(range(4), "model.decoder.layers.{}.attn") | attention(range(2), "model.encoder.layers.{}.attn")
        assert upper_half(names, 4) == [2, 3, 1]

    def test_a_layer_without_a_number_is_no_stack(self):
        names = attention([0, 1, 2, 4, 5]) | attention([5], "model.layers.{}.global_attn.attn")
        assert upper_half(names, 6) == [4, 5]

    @pytest.mark.parametrize("name", ["model.layers.{}.self_attn.attn", "language_model.model.layers.{}.self_attn.attn"])
    @pytest.mark.parametrize("config", [TSAConfig(layers=["*"]), TSAConfig(layers=[4, 5, 6, 7]), TSAConfig()])
    def test_and_never_a_draft_models(self, name, config):
        """Which vLLM numbers on."""
        found = core.choose_layers(attention(range(7), name) | attention([7]), {}, config, 7)
        chosen = {"*": range(7), None: range(3, 7), 4: range(4, 7)}[config.layers[0] if config.layers else None]
        assert [*found.sparse] == [*attention(chosen, name)]
        assert "a draft model's: model.layers.7.self_attn.attn" in found.summary
        assert ("layers=[7] not found" in found.unused) == (config.layers == (4, 5, 6, 7))


class TestWhatIsSaid:
    NAMES: ClassVar = attention(range(4))

    def said(self, config, obstacles=(), **more):
        return core.complaints(core.choose_layers(self.NAMES, dict(obstacles), config, **more), config)

    @pytest.mark.parametrize("layers", [None, [], [0, 3], ["model.layers.?.*"]])
    def test_nothing(self, layers):
        assert self.said(TSAConfig(layers=layers, strict=True)) == []

    @pytest.mark.parametrize("layers", [[9, 1], ["model.layerz.*", "*.1.*"]])
    def test_of_layers_that_are_not_there(self, layers):
        (said,) = self.said(TSAConfig(layers=layers))
        assert f"layers=[{layers[0]!r}] not found" in said and "0..3 (model.layers.*.self_attn.attn)" in said
        with pytest.raises(ConfigError, match=r"not found: .*strict=True"):
            self.said(TSAConfig(layers=layers, strict=True))

    def test_in_a_stage_of_a_pipeline(self):
        """What is not here may be in another process."""
        assert self.said(TSAConfig(layers=[7], strict=True), count=8, whole=False) == []
        assert self.said(TSAConfig(layers=["*.7.*"], strict=True), count=8, whole=False) == []
        assert "layers=[8] not found" in self.said(TSAConfig(layers=[7, 8]), count=8, whole=False)[0]

    def test_where_nothing_is_sparse(self):
        windows = dict.fromkeys(self.NAMES, core.WINDOW)
        (said,) = self.said(TSAConfig(strict=True), windows)
        assert "no layer is sparse" in said and "SLIDING_WINDOW" in said
        assert self.said(TSAConfig(strict=True), [*windows.items()][:3]) == []

    def test_of_what_the_plug_in_cannot_do(self):
        found = {"model.layers.3.self_attn.attn": "a soft cap"}
        assert self.said(TSAConfig(), found) == []
        with pytest.raises(ConfigError, match=r"a soft cap: model.layers.3.*strict=True"):
            self.said(TSAConfig(strict=True), found)
        self.said(TSAConfig(strict=True, layers=[2]), found)

    def test_of_options_without_a_meaning(self):
        assert self.said(TSAConfig(compiler="inductor", regional=None)) == []
        (said,) = self.said(TSAConfig(dense_kernel="a_shape", skip_passes=["Validate"]))
        assert "dense_kernel='a_shape', skip_passes=('Validate',)" in said and "vLLM's own kernel runs" in said
        assert "compiler='eager'" in self.said(TSAConfig(compiler="eager"))[0]
        assert self.said(TSAConfig(layers=[], dense_kernel="a_shape"))


@pytest.mark.parametrize("options", [dict(kernel="flashh"), dict(kernel="flash"), dict(dense_kernel="flashh")])
def test_kernels_are_checked_before_a_prompt_comes(options):
    sizes = dict(heads=4, kv_heads=2, width=32, dtype=torch.float32, where=CPU, sinks=False)
    core.check_kernels(HALF, **sizes)
    core.check_kernels(HALF.replace(kernel="sdpa"), **sizes)
    with pytest.raises(KernelError, match=r"'flash+'"):
        core.check_kernels(HALF.replace(**options), **sizes)


def paged(tokens, size, blocks):
    """Tokens [L, ...] in a cache of blocks of `size` that has them in those `blocks`; what else is in it is NaN."""
    cache = tokens.new_full((max(blocks) + 2, size, *tokens.shape[1:]), float("nan"))
    for number, part in zip(blocks, tokens.split(size), strict=True):
        cache[number, : len(part)] = part
    return cache


@pytest.mark.parametrize("sinks", [None, torch.linspace(-3, 4, 4)], ids=["plain", "sinks"])
@pytest.mark.parametrize("rows", [50, 20])
def test_a_prompt_is_computed_as_the_reference_does(rows, sinks):
    query, key, value = heads(1, length=50)
    query = query[:, :, -rows:]
    output = torch.full_like(flat(query)[0], float("nan"))
    core.attend(*flat(query, key, value), output, 0.3, HALF, None, sinks)
    settings = dict(keep_ratio=0.5, window=4, min_tokens=4, floor_window=8, floor_sinks=2, reduce="max")
    wanted = reference.token_sparse_attention(query, key, value, None, scale=0.3, sink_logits=sinks, **settings)
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
        core.rehearse(torch.randn(40, 4, 8), 2, 90, ANY, 0.3, HALF)
        core.rehearse(torch.randn(40, 4, 8), 2, 90, by(min_length=91), 0.3, HALF)
    assert seen == [[(1, 4, 40, 8), (1, 2, 90, 8), (1, 2, 90, 8)]]


def test_a_wrong_configuration_is_refused_at_once(monkeypatch):
    monkeypatch.setenv(settings.CONFIG, '{"budget": 3}')
    with pytest.raises(ConfigError, match="budget"):
        plugin.register()


class TestAnEnginesConfiguration:
    GIVEN: ClassVar = {settings.KEY: {"budget": {"keep_ratio": 0.25}, "layers": [1]}, "of another plug-in": 3}
    WANTED: ClassVar = TSAConfig(budget=KeepRatio(0.25), layers=[1])

    @pytest.fixture(autouse=True)
    def nothing_in_the_environment(self, monkeypatch):
        monkeypatch.delenv(settings.CONFIG, raising=False)

    def test_is_in_the_additional_config(self):
        assert settings.config_of(SimpleNamespace(additional_config=self.GIVEN)) == self.WANTED
        as_text = {settings.KEY: self.WANTED.to_json()}
        assert settings.config_of(SimpleNamespace(additional_config=as_text)) == self.WANTED

    @pytest.mark.parametrize("additional", [{}, {"other": 1}, None, object()])
    def test_or_nowhere(self, additional):
        assert settings.config_of(SimpleNamespace(additional_config=additional)) is None
        assert settings.config_of(None) is None

    def test_or_in_the_environment_and_not_in_both(self, monkeypatch):
        monkeypatch.setenv(settings.CONFIG, self.WANTED.to_json())
        assert settings.config_of(SimpleNamespace(additional_config={})) == self.WANTED
        with pytest.raises(ConfigError, match=r'TSA_CONFIG is set.*"tsa".*Leave out one'):
            settings.config_of(SimpleNamespace(additional_config=self.GIVEN))

    def test_that_is_wrong_is_refused(self):
        with pytest.raises(ConfigError, match="keep_ratios"):
            settings.config_of(SimpleNamespace(additional_config={settings.KEY: {"budget": {"keep_ratios": 1}}}))


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_configurations_of_the_pages_are_valid(page):
    text = (Path(__file__).parents[2] / page).read_text()
    configs = re.findall(rf"^{settings.CONFIG}='(.*?)'", text, re.MULTILINE)
    configs += [json.loads(given)[settings.KEY] for given in re.findall(r"--additional-config '(.*?)'", text)]
    assert configs and {TSAConfig.from_json(config) for config in configs} == {TSAConfig(budget=KeepRatio(0.3))}


SINKS, MIDDLE = "gpt_oss (sinks)", HALF.replace(layers=[1])


@has_vllm
@pytest.mark.timeout(1000)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, config, processes, additional",
    [("llama", HALF, 1, False), ("llama", HALF, 1, True), ("qwen3", COVERAGE, 2, True), (SINKS, MIDDLE, 1, True)],
)
def test_engine_equals_one_process(tmp_path, name, config, processes, additional):
    """Whole prompts, a short one, some in chunks; in a batch with another prompt's decode step. By heads, and by a coverage
    that two processes decide together."""
    gaps = compare(tmp_path, name, config, processes, "float32", CPU, additional)
    assert all(gap < 1e-4 for gap, *_ in gaps.values()), gaps
    assert all(dense > 1e-3 and first > 1e-3 for _, dense, first in gaps.values()), f"or nothing was tested: {gaps}"
