"""lower="triton": kernels that a compiler can look into. Traced here without a GPU; run on one."""

import pytest
import torch

from tsa_compile import ConfigError, Coverage, Decision, Floor, KeepRatio, reports
from tsa_compile.export import aoti, export_program

from ..support import Attention, difference, heads, mixed_padding, tiny, tokens, with_sinks, without_interpreter
from .support import SMALL

TRACE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from tsa_compile import Coverage, Floor, KeepRatio, TSAConfig
from tsa_compile.export import export_program
from tsa_compile.passes import lower


class Driver:  # Triton's frontend wants to know for which GPU; nothing is launched
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Attention(torch.nn.Module):
    def forward(self, query, key, value, padding=None):
        mask = None if padding is None else torch.ones_like(query[0, 0, :, :1] @ query[0, 0, :, :1].mT).tril().bool()
        mask = None if padding is None else mask & padding[:, None, None]
        for _ in range(2):
            query = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        return query


class WithSinks(torch.nn.Module):
    def forward(self, query, key, value, sinks, padding):
        mask = torch.ones_like(query[0, 0, :, :1] @ query[0, 0, :, :1].mT).tril().bool() & padding[:, None, None]
        key, value = (each.repeat_interleave(2, 1) for each in (key, value))
        scores = (query @ key.mT).masked_fill(~mask, float("-inf"))
        column = sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], -1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value


class Windowed(torch.nn.Module):
    def forward(self, query, key, value):
        row = torch.arange(query.shape[2])[:, None]
        mask = (row.mT <= row) & (row.mT > row - 5)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


triton.runtime.driver.set_active(Driver())
lower._require_cuda = lambda program: None
query, key, value = (torch.randn(2, n, 40, 16) for n in (4, 2, 2))
padding = torch.ones(2, 40, dtype=torch.bool)
common = TSAConfig(window=4, min_tokens=3, layers=(1,))
padded_config = common.replace(budget=Coverage(0.2), granularity="head")
plain = common.replace(budget=KeepRatio(0.5), granularity="group")
for config, floor in ((padded_config, None), (plain, None), (padded_config, Floor(5, 2)), (plain, Floor(5, 2))):
    config, padded = config.replace(floor=floor), config is padded_config
    inputs = (query, key, value, padding) if padded else (query, key, value)
    program = export_program(
        Attention().eval(), inputs, config, dynamic_lengths=(16, 20000), dynamic_batch=(1, 8), lower="triton"
    )
    opened = program.run_decompositions({}, decompose_custom_triton_ops=True) if padded else program
    for found in dict.fromkeys((program, opened)):
        targets = {str(node.target) for node in found.graph.nodes}
        print(*sorted(name for name in targets if "tsa" in name or "triton" in name))
with_sinks = padded_config.replace(floor=None, layers=(0,))
program = export_program(
    WithSinks().eval(), (query, key, value, torch.ones(4), padding), with_sinks, dynamic_lengths=(16, 20000),
    dynamic_batch=(1, 8), lower="triton",
)
print(*sorted(name for name in {str(node.target) for node in program.graph.nodes} if "tsa" in name))
program = export_program(
    Windowed().eval(), (query, key, value), common.replace(layers=()), dynamic_lengths=(16, 20000), dynamic_batch=(1, 8),
    lower="triton",
)
print(*sorted(name for name in {str(node.target) for node in program.graph.nodes} if "tsa" in name))
"""


def named(*steps):
    return " ".join(sorted(f"tsa_triton.{step}.default" for step in steps))


@pytest.mark.exhaustive
def test_the_kernels_can_be_traced_for_all_lengths_at_once():
    pytest.importorskip("triton")
    printed = without_interpreter(TRACE)
    common = ("compress", "score", "select")
    steps = [
        ("attend", "budget", "decompress"),
        None,
        ("decompress",),  # attention is SDPA; every slot is filled
        # The padded dense layer attends and decompresses, too.
        ("attend", "attend_lse", "budget", "decompress", "merge_floor"),
        None,
        ("attend_lse", "merge_floor"),
        ("attend_lse", "budget", "decompress"),  # sinks
    ]
    assert printed.splitlines() == [
        *("triton_kernel_wrapper_functional" if names is None else named(*common, *names) for names in steps),
        named("sliding_attention"),
    ]


def test_on_a_cpu_it_is_refused():
    with pytest.raises(ConfigError, match=r'lower="triton" is not allowed on cpu.*lower="aten"'):
        export_program(
            Attention().eval(), heads(length=40), SMALL.replace(layers=(0,)), dynamic_lengths=(16, 200), lower="triton"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss"])
def test_windows_in_a_cuda_package(name, padded, tmp_path):
    """Against the plain model: a window in every layer, in some, and beside sinks."""
    model = (with_sinks() if name == "gpt_oss" else tiny(name)).cuda()

    def inputs(length, pads):
        made = {"input_ids": tokens(len(pads), length)}
        made |= {"attention_mask": mixed_padding(length, pads)} if padded else {}
        return {name: value.cuda() for name, value in made.items()}

    exact = SMALL.replace(layers=())
    program = export_program(model, inputs(40, (0, 9)), exact, dynamic_lengths=(16, 200), dynamic_batch=(1, 8), lower=None)
    assert any(row.decision is Decision.WINDOW for row in reports()[-1])
    package = aoti.load(aoti.save(program, tmp_path / "model.pt2"))
    for length, pads in ((170, (5, -7, 0)), (33, (0, 0))):
        made = inputs(length, pads)
        with torch.no_grad():
            result, expected = package(**made)["logits"], model(**made, use_cache=False).logits
        assert difference(result, expected, made.get("attention_mask")) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("budget", [Coverage(0.2), KeepRatio(0.5)])
@pytest.mark.parametrize("floor", [None, Floor(6, 2)], ids=str)
def test_a_cuda_package_equals_the_compiled_model(floor, budget, padded, tmp_path):
    model = tiny("llama", num_hidden_layers=2).cuda()
    config = SMALL.replace(budget=budget, floor=floor, min_length=16)

    def inputs(length, pads):
        made = {"input_ids": tokens(len(pads), length)}
        made |= {"attention_mask": mixed_padding(length, pads)} if padded else {}
        return {name: value.cuda() for name, value in made.items()}

    program = export_program(model, inputs(40, (0, 9)), config, dynamic_lengths=(16, 200), dynamic_batch=(1, 8), lower=None)
    package = aoti.load(aoti.save(program, tmp_path / "model.pt2"))
    compiled = torch.compile(model, backend="tsa", options={"config": config}, dynamic=True)
    for length, pads in ((70, (5, -7, 0)), (33, (0, 0))):
        made = inputs(length, pads)
        with torch.no_grad():
            result, expected = package(**made)["logits"], compiled(**made, use_cache=False).logits
        assert difference(result, expected, made.get("attention_mask")) < 1e-3
