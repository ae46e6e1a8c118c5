"""Whether a call is traced is asked of its own thread: a server's threads compile and run at the same time."""

import threading

import pytest
import torch

from tsa_compile import Floor, KeepRatio, Reason, TSAConfig, attention
from tsa_compile.tracing import is_traced

from .support import tiny, tokens

pytestmark = pytest.mark.usefixtures("fresh")

CONFIG = TSAConfig(budget=KeepRatio(0.3), floor=Floor(8, 2), window=6, min_tokens=4, min_length=1, layers=["*"])


class Told(torch.nn.Module):
    def forward(self, x):
        return x + 1 if is_traced() else x - 1


def while_another_compiles(work):
    """What a thread finds while this one compiles, and whether torch says that something is compiled."""
    found = []

    def backend(graph_module, inputs):
        thread = threading.Thread(target=lambda: found.append((work(), torch.compiler.is_compiling())))
        thread.start()
        thread.join()
        return graph_module.forward

    torch.compile(lambda x: x.relu(), backend=backend)(torch.ones(1))
    return found[0]


def test_what_is_traced_is_told():
    x = torch.ones(1)
    assert Told()(x) == 0 and torch.compile(Told(), backend="eager")(x) == 2
    for strict in (True, False):
        assert torch.export.export(Told(), (x,), strict=strict).module()(x) == 2


def test_another_threads_compilation_is_not_ours():
    traced, compiling = while_another_compiles(is_traced)
    assert compiling and not traced


def test_sparse_layers_stay_sparse_while_another_thread_compiles():
    model, ids = tiny("llama", attention.register(CONFIG, name="tsa-threads")), tokens(1, 60)
    with torch.no_grad():
        expected = model(ids).logits
        found, _ = while_another_compiles(lambda: run(model, ids))
    assert torch.equal(found, expected)
    assert {row.reason for row in attention.report(model)} == {Reason.SPARSE}


def run(model, ids):
    with torch.no_grad():  # of the thread
        return model(ids).logits
