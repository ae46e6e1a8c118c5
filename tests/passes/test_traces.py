import pytest
import torch
import torch.fx.config
import torch.fx.proxy

from tsa_compile.passes.traces import without_stacks

SWITCH = "do_not_emit_stack_traces"
needs_switch = pytest.mark.skipif(not hasattr(torch.fx.config, SWITCH), reason="this version of torch always notes stacks")
SILU = torch.ops.aten.silu.default


class Scaled(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.silu(x) * x.shape[0]


def opened(program):
    """The stacks of what stands for silu in a program that is traced anew."""
    with without_stacks():
        traced = program.run_decompositions({SILU: lambda x: x * torch.sigmoid(x + x.shape[0])})
    sums = (torch.ops.aten.sigmoid.default, torch.ops.aten.add.Tensor)
    stacks = [node.stack_trace for node in traced.graph.nodes if node.target in sums]
    assert len(stacks) == 2
    return stacks


@pytest.fixture
def program(monkeypatch):
    """Exported as for a user: the suite switches stacks off (quick.py)."""
    monkeypatch.setattr(torch.fx.config, SWITCH, False, raising=False)
    length = torch.export.Dim("length", min=2, max=64)
    return torch.export.export(Scaled().eval(), (torch.ones(8),), dynamic_shapes=({0: length},))


def test_what_is_made_of_a_models_line_keeps_the_line(program):
    (silu,) = program.graph.find_nodes(op="call_function", target=SILU)
    assert "torch.nn.functional.silu(x) * x.shape[0]" in silu.stack_trace
    assert opened(program) == [silu.stack_trace] * 2


@needs_switch
def test_no_stack_is_looked_at_where_there_is_none(program, monkeypatch):
    (silu,) = program.graph.find_nodes(op="call_function", target=SILU)
    del silu.meta["stack_trace"]
    monkeypatch.setattr(torch.fx.proxy, "CapturedTraceback", None)
    assert opened(program) == [None] * 2


@needs_switch
@pytest.mark.parametrize("before", [False, True])
def test_the_switch_is_as_it_was_behind_an_error(before, monkeypatch):
    monkeypatch.setattr(torch.fx.config, SWITCH, before)
    with pytest.raises(KeyError), without_stacks():
        assert getattr(torch.fx.config, SWITCH)
        raise KeyError
    assert getattr(torch.fx.config, SWITCH) is before
