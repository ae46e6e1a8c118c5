"""A new length compiles nothing, neither a graph nor a Triton kernel; and the sparse path leaves the host alone."""

import contextlib
import random

import pytest
import torch

from tsa_compile import Coverage, KeepRatio, TSAConfig, pipeline, reports
from tsa_compile.kernels import reference
from tsa_compile.kernels.attend import attend
from tsa_compile.kernels.budget import budget
from tsa_compile.kernels.compress import compress
from tsa_compile.kernels.decompress import decompress
from tsa_compile.kernels.score import score
from tsa_compile.kernels.select import select

from .support import difference, exhaustive_but, heads, mixed_padding, tiny, tokens

assert pipeline.OPS
tsa = torch.ops.tsa
LONG = random.Random(0).sample(range(4096, 40961), 40)
SHORT = random.Random(0).sample(range(40, 241), 40)
SCALE, WINDOW, POOL, MIN_TOKENS = 0.2, 128, 7, 256
BUDGETS = {"half": KeepRatio(0.5), "coverage": Coverage(0.2)}


@pytest.fixture
def triton_compilations(monkeypatch):
    """The kernels that Triton compiles, or loads from its cache on disk, while the test runs."""
    import triton

    compiled = []

    def hook(*, fn, **_):
        compiled.append(f"{fn.module}.{fn.name}")

    # Called for every specialization that a kernel meets for the first time in this process.
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
    return compiled


@contextlib.contextmanager
def no_synchronization():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def options(budget_, kernel="auto"):
    """The scalars of the fused ops, from scale on."""
    coverage = budget_.tau if isinstance(budget_, Coverage) else None
    ratio = budget_.ratio if isinstance(budget_, KeepRatio) else None
    return SCALE, WINDOW, POOL, coverage, ratio, MIN_TOKENS, None, False, kernel


def make_padding(kind, batch, length):
    """bool [batch, length] on the GPU: ones, pads of a fifth on the left, or holes."""
    padding = torch.ones(batch, length, dtype=torch.bool, device="cuda")
    if kind == "left":
        padding[-1, : length // 5] = False
    if kind == "holes":
        padding[:, 1 : length // 2 : 3] = False
    return padding


def make_inputs(length, head_dim=64):
    """Made on the GPU, where 40 lengths cost nothing; in memory [B, L, heads, D], as projections leave them."""
    sizes = ((2, length, count, head_dim) for count in (6, 2, 2))
    return tuple(torch.randn(size, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for size in sizes)


CASES = [
    (None, "half", "auto"),
    (None, "coverage", "auto"),
    (None, "coverage", "triton"),
    ("ones", "half", "auto"),
    ("left", "half", "triton"),
    ("left", "coverage", "auto"),
    ("holes", "coverage", "auto"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ops_compile_no_kernel_for_a_new_length(triton_compilations, case):
    kind, name, kernel = case
    scalars = options(BUDGETS[name], kernel)
    head_dim = 40 + 8 * CASES.index(case)  # of its own, so that the first calls compile and the hook is seen to work

    def call(length, alike=False):
        inputs = make_inputs(length, head_dim)
        padding = None if kind is None else make_padding(kind, 2, length)
        for tensor in (*inputs, padding) if alike else ():
            if tensor is not None:
                tensor[0] = tensor[1]
        if padding is None:
            return tsa.sparse_attention(*inputs, *scalars)
        return tsa.padded_sparse_attention(*inputs, padding, tsa.valid_ranges(padding), *scalars)

    for length in (40960, 4099, 16384):
        call(length)
    call(16384, alike=True)  # items that keep equally many tokens, which random ones do now and then, need no counts
    assert triton_compilations
    triton_compilations.clear()
    for length in LONG:
        out = call(length)
    assert triton_compilations == []
    assert out.isfinite().all() and (out != 0).any()


def inputs_of(length, batch, padded, device="cpu"):
    given = {"input_ids": tokens(batch, length), "use_cache": False}
    if padded:
        given["attention_mask"] = mixed_padding(length, (0, 5, -4)[:batch])
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def run_lengths(model, config, lengths, warm_up, batch, padded, device):
    """Compiles a model, calls it with a few lengths, and then with others that may compile nothing."""
    compiled = torch.compile(model, backend="tsa", options={"config": config}, dynamic=True)
    graphs = 0
    for number, length in enumerate((*warm_up, *lengths)):
        if number == len(warm_up):
            graphs = len(reports())
        with torch.no_grad(), torch.compiler.set_stance("default" if number < len(warm_up) else "fail_on_recompile"):
            compiled(**inputs_of(length, batch, padded, device), logits_to_keep=1)
        yield number >= len(warm_up)
    assert graphs == len(reports()) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert reports()[0].sparse == 2


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name, padded", exhaustive_but([("half", False), ("coverage", True)], ("half", False)))
def test_a_model_compiles_one_graph_for_forty_lengths(name, padded):
    torch._dynamo.utils.counters.clear()
    config = TSAConfig(budget=BUDGETS[name], window=16, min_tokens=8, min_length=1, layers=[0, 1], compiler="eager")
    model = tiny("llama", num_hidden_layers=2, max_position_embeddings=512)
    list(run_lengths(model, config, SHORT, [64], 2, padded, "cpu"))


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("name", BUDGETS)
def test_a_model_compiles_no_kernel_for_forty_lengths(triton_compilations, name, padded):
    torch._dynamo.utils.counters.clear()
    config = TSAConfig(budget=BUDGETS[name], window=WINDOW, min_tokens=MIN_TOKENS, min_length=1, layers=[0, 1])
    model = tiny(
        "llama", num_hidden_layers=2, hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=65536
    ).to("cuda", torch.bfloat16)
    for warm in run_lengths(model, config, LONG, [40960, 4099, 16384], 2, padded, "cuda"):
        if not warm:
            triton_compilations.clear()
    assert triton_compilations == []


@pytest.mark.gpu
def test_a_captured_op_follows_the_count_of_other_data():
    """The count lies on the device: replayed on other data, the graph keeps another number of tokens."""
    scalars = options(Coverage(0.1))
    inputs = make_inputs(5000)
    tsa.sparse_attention(*inputs, *options(Coverage(0.1), "triton"))  # compiles what only a capture would launch
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tsa.sparse_attention(*inputs, *scalars)
    counts = set()
    for sharpness in (1, 2, 3):
        for tensor in inputs:
            tensor.normal_().mul_(sharpness)
        captured.fill_(torch.nan)
        graph.replay()
        wanted = tsa.sparse_attention(*inputs, *scalars)
        counts.add(tuple(budget(score(*inputs[:2], None, SCALE, WINDOW, POOL), 0.1, None, MIN_TOKENS).tolist()))
        assert torch.equal((captured != 0).any(-1), (wanted != 0).any(-1)), "the same rows are 0"
        torch.testing.assert_close(captured, wanted, rtol=5e-2, atol=5e-2)
    assert len(counts) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "left", "holes"])
@pytest.mark.parametrize("budget_", [{"coverage": 0.1, "keep_ratio": None}, {"coverage": None, "keep_ratio": 0.5}])
def test_no_stage_waits_for_the_device(kind, budget_):
    query, key, value = make_inputs(5000)
    padding = None if kind is None else make_padding(kind, 2, 5000)

    def stages():
        scores = score(query, key, padding, SCALE, WINDOW, POOL)
        count = budget(scores, min_tokens=MIN_TOKENS, **budget_)
        indices = select(scores, count, 5000)
        rows = compress(query, key, value, indices, count)
        return decompress(rows[0], indices, count, 5000)

    stages()
    with no_synchronization():
        stages()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "ones", "left"])
def test_a_keep_ratio_waits_for_nothing(kind):
    """The whole op: with padding its valid ranges are on the host already."""
    inputs = make_inputs(5000)
    scalars = options(KeepRatio(0.5))
    if kind is None:
        arguments, op = (*inputs, *scalars), tsa.sparse_attention
    else:
        padding = make_padding(kind, 2, 5000)
        arguments, op = (*inputs, padding, tsa.valid_ranges(padding), *scalars), tsa.padded_sparse_attention
    op(*arguments)
    with no_synchronization():
        op(*arguments)


@pytest.mark.gpu
def test_attention_by_a_count_on_the_device_waits_for_nothing():
    query, key, value = heads(2, 8, 8, 700, 64, device="cuda", dtype=torch.bfloat16)
    count = torch.tensor([300, 700], dtype=torch.int32, device="cuda")
    attend(query, key, value, count, SCALE, "triton")
    with no_synchronization():
        out = attend(query, key, value, count, SCALE, "triton")
    wanted = reference.attend(*(tensor.double() for tensor in (query, key, value)), count, SCALE)
    for item, n in enumerate((300, 700)):
        assert difference(out[item, :, :n].double(), wanted[item, :, :n]) < 2e-2
