"""What torch.compile keeps: options as they were when it was called, and nothing that another process compiled."""

import functools
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from tsa_compile import KeepRatio, TSAConfig, reports, tsa_backend

from .support import Attention, Stack, heads

pytestmark = pytest.mark.usefixtures("fresh")

SMALL = {"floor": None, "layers": [0], "compiler": "eager", "window": 4, "min_tokens": 1, "min_length": 1}
RATIOS = (0.9, 0.5, 0.1)
ROWS = [37, 22, 8]  # of 40: the window, and the ratio of the others


def attention(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def rows(function):
    """How many rows each head of the first item keeps."""
    with torch.no_grad():
        out = function(*heads(kv_heads=4))
    return (out[0, 0] != 0).any(-1).sum().item()


def by_name(options):
    return torch.compile(attention, backend="tsa", options=options)


def by_function(options):
    return torch.compile(attention, backend=tsa_backend, options=options)


def by_partial(options):
    return torch.compile(attention, backend=functools.partial(tsa_backend, options=options))


SPELLINGS = pytest.mark.parametrize("compiled", [by_name, by_function, by_partial])


@SPELLINGS
@pytest.mark.parametrize("when", ["run at once", "run later", "run again"])
def test_options_are_those_of_the_call_of_torch_compile(compiled, when):
    """A mapping that is changed between two compilations, wherever the first call of what is compiled stands."""
    options, functions, found = dict(SMALL), [], []
    for ratio in RATIOS:
        options["budget"] = KeepRatio(ratio)
        functions.append(compiled(options))
        if when != "run later":
            found.append(rows(functions[-1]))
    if when != "run at once":
        found = [rows(function) for function in functions]
    assert found == ROWS


def test_one_partial_whose_options_change():
    options = {**SMALL, "budget": KeepRatio(0.9)}
    backend = functools.partial(tsa_backend, options=options)
    first = torch.compile(attention, backend=backend)
    assert rows(first) == 37
    options["budget"] = KeepRatio(0.1)
    second = torch.compile(attention, backend=backend)
    assert [rows(second), rows(first)] == [8, 37]


@SPELLINGS
def test_a_list_inside_the_options_is_copied_too(compiled):
    layers = []
    exact = compiled({**SMALL, "budget": KeepRatio(0.1), "layers": layers})
    layers.append(0)
    sparse = compiled({**SMALL, "budget": KeepRatio(0.1), "layers": layers})
    assert [rows(exact), rows(sparse)] == [40, 8]


def test_a_graph_that_is_compiled_later_has_the_same_options():
    """A second length compiles again, after the mapping was changed."""
    options = {**SMALL, "budget": KeepRatio(0.1)}
    function = by_name(options)
    rows(function)
    options["budget"] = KeepRatio(0.9)
    with torch.no_grad():
        function(*heads(kv_heads=4, length=60))
    assert [report.config["budget"] for report in reports()] == [{"keep_ratio": 0.1}] * 2


def test_equal_options_share_what_was_compiled():
    """In any spelling: layers that are compiled one by one would run into Dynamo's limit of recompilations."""
    whole = {"config": TSAConfig(budget=KeepRatio(0.5), **SMALL)}
    as_json, as_tuple = {**SMALL, "budget": {"keep_ratio": 0.5}}, {**SMALL, "layers": (0,), "budget": KeepRatio(0.5)}
    for compiled in (by_name, by_function, by_partial):
        assert [rows(compiled(options)) for options in (whole, as_json, as_tuple)] == [22, 22, 22]
    assert len(reports()) == 1


def test_the_callers_options_are_left_as_they_were():
    options = {**SMALL, "budget": KeepRatio(0.5)}
    before = dict(options)
    rows(by_name(options))
    assert options == before


def test_options_that_are_not_allowed_are_so_at_the_first_call():
    options = {"window": 0}
    function = by_name(options)
    options["window"] = 4
    with pytest.raises(BackendCompilerFailed, match="window=0 is not allowed"):
        rows(function)


def test_modules_that_are_compiled_in_place():
    options = {**SMALL, "layers": ["*"], "budget": KeepRatio(0.9)}
    module = Attention()
    module.compile(backend="tsa", options=options)
    options["budget"] = KeepRatio(0.1)
    assert rows(module) == 37


def test_layers_share_one_graph_and_a_mapping():
    """A mapping that every layer is compiled with, as regional compilation does it."""
    options = {**SMALL, "layers": [], "budget": KeepRatio(0.5)}
    stack = Stack()
    for module in stack.modules():
        if isinstance(module, Attention):
            module.compile(backend="tsa", options=options)
    query, key, value = heads(kv_heads=4)
    with torch.no_grad():
        stack(query, key, value)
    assert len(reports()) <= 2


def test_other_backends_are_left_alone():
    options = {}
    given = []

    def backend(graph_module, inputs, *, options=None):
        given.append(options)
        return graph_module.forward

    options["anything"] = [1]
    torch.compile(attention, backend=backend, options=options)(*heads(kv_heads=4))
    assert given[0] is options


# Across processes

PROCESSES = """
    import json, os, sys
    import torch, torch._inductor.compile_fx
    from tsa_compile import KeepRatio, pipeline, reports
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def attention(query, key, value):
        return sdpa(query, key, value, is_causal=True)

    def run(backend, ratio):
        query, key, value = torch.randn(3, 1, 2, 40, 8)
        options = {"layers": [0], "compiler": "inductor", "window": 4, "floor": None, "min_tokens": 1, "min_length": 1}
        options = {**options, "budget": KeepRatio(ratio)} if backend == "tsa" else None
        with torch.no_grad():
            out = torch.compile(attention, backend=backend, options=options)(query, key, value)
        torch.compiler.save_cache_artifacts()
        return [(out[0, 0] != 0).any(-1).sum().item(), len(reports())]

    for call in json.loads(sys.argv[1]):
        ours, theirs = os.pipe()
        if not os.fork():
            os.dup2(theirs, 2)
            print(json.dumps(run(*call)), flush=True)
            os._exit(0)
        os.close(theirs)
        said = open(ours).read()
        code = os.waitstatus_to_exitcode(os.wait()[1])
        switched_off = "caching_precompile (TORCH_CACHING_PRECOMPILE) is switched off" in said
        print(json.dumps([code, switched_off, said[-2000:]]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_no_process_runs_what_another_compiled(tmp_path):
    """Neither with other options nor with another backend: (rows kept, reports) of processes that share
    torch's caches on the disk. They are forks of one that has imported torch and compiled nothing."""
    calls = [("tsa", 0.9), ("tsa", 0.1), ("inductor", 0)]
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(PROCESSES))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TORCH_CACHING_PRECOMPILE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    # In an empty cache Inductor would first try out every vector extension and compile its headers: a fifth of the time.
    environment |= {"TORCHINDUCTOR_VEC_ISA_OK": "0", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    command = [sys.executable, "-P", str(script), json.dumps(calls)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 * len(calls), done.stdout + done.stderr
    assert lines[::2] == [[37, 1], [8, 1], [40, 0]]
    for (backend, _), (code, switched_off, said) in zip(calls, lines[1::2], strict=True):
        assert (code, switched_off) == (0, backend == "tsa"), said


def test_a_graph_of_a_backend_around_this_one_is_not_kept():
    """Without the name that torch saves it by, nothing of it is recorded."""
    seen = []

    def compiler(graph_module, inputs):
        seen.append(hasattr(graph_module, "_backend_id"))
        return graph_module.forward

    def wrapping(graph_module, inputs):
        return tsa_backend(graph_module, inputs, options={**SMALL, "compiler": compiler})

    with torch._dynamo.config.patch(caching_precompile=True):
        rows(torch.compile(attention, backend=wrapping))
    assert seen == [False]
