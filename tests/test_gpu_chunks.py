"""Prompts in chunks on CUDA through Inductor: right, without memory for a chunk's mask, and at the rate of whole prompts."""

import pytest
import torch

import tsa_compile
from tsa_compile import Coverage, Floor, KeepRatio, TSAConfig, reports
from tsa_compile.kernels.cached import cached_attention
from tsa_compile.kernels.fused import Options, sparse_triton

from .support import MEDIUM, chunks, difference, heads, medians, mixed_padding, oracle, tiny, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh")]


SMALL = dict(window=16, min_tokens=16, min_length=1, layers=[0, 2])
EXACT = TSAConfig(layers=[])
KEEP_ALL = TSAConfig(budget=Coverage(0), **SMALL)
FLOOR = TSAConfig(budget=KeepRatio(0.3), floor=Floor(20, 4), **SMALL)
LENGTH, CHUNK = 900, 200


def prompt(padded):
    """On the left alone: over a whole chunk of one item."""
    return tokens(3, LENGTH), mixed_padding(LENGTH, (0, 260, 4)) if padded else None


@pytest.mark.parametrize("config", [EXACT, KEEP_ALL], ids=["exact", "keep-all"])
@pytest.mark.parametrize("padded", [False, True])
def test_bfloat16_chunks_are_as_exact_as_the_plain_model(config, padded):
    """Measured against float32: chunks of the compiled model err no more than half again as much as the plain one."""
    ids, mask = prompt(padded)
    true = chunks(tiny("llama", **MEDIUM), ids, mask, CHUNK)
    model, cuda = tiny("llama", **MEDIUM).to("cuda", torch.bfloat16), None if mask is None else mask.cuda()
    plain = chunks(model, ids.cuda(), cuda, CHUNK).float().cpu()
    compiled = torch.compile(model, backend="tsa", options={"config": config})
    found = chunks(compiled, ids.cuda(), cuda, CHUNK).float().cpu()
    assert not any(report.unchanged for report in reports())
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert (found - true)[valid].norm() < 1.5 * (plain - true)[valid].norm()


@pytest.mark.parametrize("padded", [False, True])
def test_sparse_chunks_equal_the_oracle(padded):
    """float32, so that the same tokens are selected."""
    ids, mask = prompt(padded)
    compiled = torch.compile(tiny("llama").cuda(), backend="tsa", options={"config": FLOOR})
    found = chunks(compiled, ids.cuda(), None if mask is None else mask.cuda(), CHUNK).cpu()
    with oracle([0, 2], window=16, min_tokens=16, keep_ratio=0.3, floor_window=20, floor_sinks=4):
        wanted = chunks(tiny("llama", "oracle"), ids, mask, CHUNK)
    assert difference(found, wanted, mask) < 1e-4


@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config", [EXACT, FLOOR], ids=["exact", "sparse"])
def test_prefill_compiles_one_graph_for_all_chunks(config, padded, regional):
    """The first chunk's, behind an empty cache, and another prompt's; in float32, so that the same tokens are selected."""
    model = tiny("llama").cuda()
    tsa_compile.prefill(model, config.replace(regional=regional), dynamic=True)
    for length in (LENGTH, 470):
        ids, mask = tokens(3, length), mixed_padding(length, (0, 260, 4)) if padded else None
        found = chunks(model, ids.cuda(), None if mask is None else mask.cuda(), CHUNK).cpu()
        with oracle([0, 2], window=16, min_tokens=16, keep_ratio=0.3, floor_window=20, floor_sinks=4):
            wanted = chunks(tiny("llama", "sdpa" if config is EXACT else "oracle"), ids, mask, CHUNK)
        assert difference(found, wanted, mask) < 1e-4
    assert [report.sparse for report in reports()] == [0 if config is EXACT else 2]


def test_bfloat16_chunks_of_one_graph_are_as_exact_as_the_plain_model():
    """By the kernels for half precision, of which the first chunk, without keys before it, takes another than the others."""
    ids, _ = prompt(False)
    true, model = chunks(tiny("llama", **MEDIUM), ids, None, CHUNK), tiny("llama", **MEDIUM).to("cuda", torch.bfloat16)
    plain = chunks(model, ids.cuda(), None, CHUNK).float().cpu()
    tsa_compile.prefill(model, EXACT, dynamic=True)
    found = chunks(model, ids.cuda(), None, CHUNK).float().cpu()
    assert len(reports()) == 1
    assert (found - true).norm() < 1.5 * (plain - true).norm()


def chunk_of(rows, keys):
    query, key, value = heads(1, 32, 8, keys, 128, device="cuda", dtype=torch.bfloat16)
    return query[:, :, keys - rows :], key, value


def test_a_chunk_takes_no_memory_for_its_mask():
    query, key, value = chunk_of(4096, 262144)
    cached_attention(query, key, value, 0.1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cached_attention(query, key, value, 0.1)
    torch.cuda.synchronize()
    mask = query.shape[2] * key.shape[2]
    assert torch.cuda.max_memory_allocated() - before < mask / 4, "a few copies of the rows"


@pytest.mark.timing
def test_chunks_cost_what_the_whole_prompt_does():
    """64K tokens in chunks of 8K, exact: at most a tenth more than one causal call."""
    length, size = 65536, 8192
    query, key, value = chunk_of(length, length)
    parts = [(query[:, :, i : i + size], key[:, :, : i + size], value[:, :, : i + size]) for i in range(0, length, size)]

    def whole():
        return cached_attention(query, key, value, 0.1)

    def chunked():
        return [cached_attention(*part, 0.1) for part in parts]

    assert difference(torch.cat(chunked(), dim=2), whole()) < 1e-2
    baseline, measured = medians(whole, chunked, rounds=10, calls=1)
    assert measured <= 1.1 * baseline, f"{measured:.2f} ms in chunks, {baseline:.2f} ms whole"


@pytest.mark.timing
def test_a_sparse_chunk_can_be_captured_and_costs_less_than_a_dense_one():
    query, key, value = chunk_of(8192, 65536)
    options = Options(0.1, 128, 7, None, 0.3, 1024, None, False, "auto", 256, 16)
    wanted = sparse_triton(query, key, value, options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sparse_triton(query, key, value, options)
    found.zero_()
    graph.replay()
    assert torch.equal(found, wanted)
    dense, sparse = medians(lambda: cached_attention(query, key, value, 0.1), graph.replay, rounds=10, calls=1)
    assert sparse < 0.6 * dense, f"{sparse:.2f} ms sparse, {dense:.2f} ms dense"
