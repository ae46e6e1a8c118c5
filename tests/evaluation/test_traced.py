"""One trace of a model for all settings: the numbers of separate compilations, and one run of Dynamo."""

import pytest
import torch
from torch._dynamo.utils import counters

from tsa_compile.backend import tsa_backend
from tsa_compile.budgets import Floor, KeepRatio
from tsa_compile.evaluation.traced import Traced
from tsa_compile.report import reports

from .small import CONFIG

pytestmark = pytest.mark.usefixtures("fresh")
CONFIGS = [
    CONFIG.replace(compiler="eager"),
    CONFIG.replace(compiler="eager", layers=(1,), budget=KeepRatio(0.5), floor=Floor(8, 2)),
]


def prompts(seed, length=120):
    return torch.randint(1, 400, (2, length), generator=torch.Generator().manual_seed(seed))


def test_configurations_share_one_trace_and_give_what_they_give_alone(model):
    traced = Traced(model)
    shared = [traced.by(config) for config in CONFIGS]
    alone = [torch.compile(model, backend=tsa_backend, dynamic=False, options={"config": config}) for config in CONFIGS]
    with torch.no_grad():
        for seed in range(2):  # each is called again after the other
            found = [run(input_ids=prompts(seed)).logits for run in shared]
            assert not torch.equal(*found)
            for run, logits in zip(alone, found, strict=True):
                assert torch.equal(logits, run(input_ids=prompts(seed)).logits)


def test_each_is_rewritten_at_its_first_call(model):
    traced = Traced(model)
    shared = [traced.by(config) for config in CONFIGS]
    before, graphs = len(reports()), counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for calls, run in ((1, shared[0]), (1, shared[0]), (2, shared[1])):
            run(input_ids=prompts(0))
            assert len(reports()) == before + calls
        assert [report.sparse for report in reports()[before:]] == [2, 1]
        assert counters["stats"]["unique_graphs"] == graphs + 1
        shared[1](input_ids=prompts(0, 130))  # another length is traced anew
    assert counters["stats"]["unique_graphs"] == graphs + 2 and len(reports()) == before + 3


def test_an_error_is_that_of_the_configuration_alone(model):
    traced = Traced(model)
    broken = CONFIGS[0].replace(compiler=lambda graph, inputs: 1 / 0, strict=True)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            traced.by(broken)(input_ids=prompts(0))
        assert traced.by(CONFIGS[0])(input_ids=prompts(0)).logits.isfinite().all()
