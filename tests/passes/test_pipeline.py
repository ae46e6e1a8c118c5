"""The order of the passes: what holds after each, which can be left out, what is logged."""

import logging
from contextlib import nullcontext

import pytest
import torch

from tsa_compile import Decision, Reason, TSAWarning
from tsa_compile.errors import ConfigError
from tsa_compile.passes.graph import fake
from tsa_compile.pipeline import PASSES, WHOLE, run_passes
from tsa_compile.testing import capture_all, count_ops

from .support import EXACT, SPARSE, inputs, padded_attention, padding, written_out

OPTIONAL = [kind.__name__ for kind in PASSES if kind.optional]


def captured(function=padded_attention):
    found = capture_all(function, *inputs(), padding())
    return found.graphs[0], found.inputs[0]


@pytest.mark.parametrize("function", [padded_attention, written_out])
@pytest.mark.parametrize("passes", [PASSES, WHOLE], ids=["steps", "whole"])
@pytest.mark.parametrize("config", [EXACT, SPARSE], ids=["exact", "sparse"])
def test_after_every_pass_the_graph_is_sound(function, passes, config):
    """Sparse attention is another value, from RewriteSparse on; all other passes leave the value as it is."""
    graph, given = captured(function)
    wanted = {"value": graph(*given)[0]}
    seen = []

    def check(step, graph_module):
        graph_module.graph.lint()
        assert all(fake(node) is not None for node in graph_module.graph.nodes if node.op != "output")
        graph_module.recompile()
        if step.name == "RewriteSparse" and config is SPARSE:
            wanted["value"] = graph_module(*given)[0]
        torch.testing.assert_close(graph_module(*given)[0], wanted["value"])
        seen.append((step.name, step.matched))

    run_passes(graph, config, passes, after=check)
    assert [name for name, _ in seen] == [kind.__name__ for kind in passes]
    sparse = int(config is SPARSE)
    assert dict(seen)["FindCalls"] == 1 and dict(seen)["RewriteSparse"] == sparse
    assert dict(seen)["CanonicalizeDense"] == 1 - sparse and dict(seen).get("Decompose", sparse) == sparse


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("config", [EXACT, SPARSE], ids=["exact", "sparse"])
def test_a_pass_can_be_left_out(name, config):
    graph, given = captured()
    wanted = graph(*given)[0]
    with pytest.warns(TSAWarning) if (config, name) == (SPARSE, "RewriteSparse") else nullcontext():
        (row,) = run_passes(graph, config.replace(skip_passes=[name]))
    carried_out = {"RewriteSparse": SPARSE, "CanonicalizeDense": EXACT}.get(name) is config
    assert (row.reason is Reason.PASS_SKIPPED) == carried_out
    assert (row.decision is Decision.UNCHANGED) == carried_out
    if carried_out or config is EXACT:
        torch.testing.assert_close(graph(*given)[0], wanted)
    whole = count_ops(graph, "padded_sparse_attention")["padded_sparse_attention"]
    assert whole == int(name == "Decompose" and config is SPARSE)


@pytest.mark.parametrize("name", ["EmitPadding", "Verify", "FindCalls", "NoSuchPass"])
def test_others_cannot(name):
    graph, _ = captured()
    with pytest.raises(ConfigError, match=f"skip_passes='{name}' is not allowed: .* are Validate, RewriteSparse, "):
        run_passes(graph, SPARSE.replace(skip_passes=[name]))


def test_what_a_pass_found_is_logged(caplog):
    graph, _ = captured()
    with caplog.at_level(logging.DEBUG, "tsa_compile.pipeline"):
        run_passes(graph, SPARSE)
    said = caplog.text  # formatted when it was said, with the graph as it was then
    assert "RewriteSparse: 1 matched, " in said
    before, after = said.split("after RewriteSparse")[:2]
    assert "before the passes" in before and "padded_sparse_attention" not in before
    assert "padded_sparse_attention" in after
