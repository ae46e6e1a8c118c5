"""The one rule of lengths: from which on a call is compressed, whole or behind a cache, for compilers and engines."""

from pathlib import Path

import pytest
import torch

from tsa_compile.config import Coverage, KeepRatio, TSAConfig
from tsa_compile.costs import breakeven
from tsa_compile.costs.breakeven import FEW_QUERIES, MARGIN, Minimum, break_even, expected_kept, minimum
from tsa_compile.costs.calls import CallShape, dense_work, sparse_path
from tsa_compile.costs.devices import H100, H200

K, CPU, CUDA = 1024, torch.device("cpu"), torch.device("cuda", 0)
CONFIG = TSAConfig()
DROPPABLE = 1024 + 128 + 1
"""Of the defaults: where tokens can be dropped."""


def shape(past=0, config=CONFIG, heads=32, kv_heads=8):
    return CallShape.configured(config, 1, heads, kv_heads, 128, 128, 2, past)


@pytest.fixture(autouse=True)
def on_an_h200(monkeypatch):
    monkeypatch.setattr(breakeven, "for_device", lambda device: H200)


@pytest.mark.parametrize("where", [CPU, None], ids=str)
@pytest.mark.parametrize("past", [0, 500, 100 * K])
def test_where_speed_does_not_count_a_call_is_compressed_if_tokens_can_be_dropped(where, past):
    """Of all keys so far: any chunk behind enough of them is."""
    found = minimum(TSAConfig(min_tokens=100, window=28), shape(past), where=where)
    assert found == Minimum(129, True, "where tokens can be dropped")
    assert minimum(TSAConfig(budget=Coverage(0)), shape(past), where=where).tokens == DROPPABLE
    assert found.length(7, 9) == 9 and found.reached_by(129, 129) and not found.reached_by(128, 128)
    assert found.reached_by(FEW_QUERIES, 129) and not found.reached_by(FEW_QUERIES, 128)


def test_a_configured_length_is_one_of_the_queries_everywhere():
    config = CONFIG.replace(min_length=700)
    found = {minimum(config, shape(past), where=where) for past in (0, 8 * K) for where in (None, CPU, CUDA, H200)}
    assert found == {Minimum(700, False, "the configured min_length")}
    assert found.pop().length(7, 9) == 7


@pytest.mark.parametrize("where", [CUDA, H200], ids=["device", "costs"])
def test_on_a_gpu_a_call_must_gain_as_well(where, monkeypatch):
    config = TSAConfig(budget=KeepRatio(0.5))
    found = minimum(config, shape(config=config), where=where)
    assert found.tokens == break_even(H200, shape(config=config), config) > DROPPABLE
    assert not found.of_keys and "breaks even on NVIDIA H200" in found.why
    late = minimum(config.replace(min_tokens=100_000), shape(config=config), where=where)
    assert late.length(1, 2) == 1 and late.tokens > 100_128
    monkeypatch.setattr(breakeven, "break_even", lambda *arguments: 256)
    assert minimum(config, shape(), where=where) == Minimum(DROPPABLE, True, "where tokens can be dropped")
    assert minimum(config, shape(past=DROPPABLE - 256), where=where).of_keys
    assert minimum(config, shape(past=DROPPABLE - 255), where=where).tokens == 256


@pytest.mark.parametrize("budget", [Coverage(0), KeepRatio(1)], ids=str)
@pytest.mark.parametrize("past", [0, 64 * K])
def test_a_budget_that_keeps_everything_gains_at_no_length(budget, past):
    config = TSAConfig(budget=budget)
    found = minimum(config, shape(past, config), where=CUDA)
    assert found.tokens is None and "never breaks even" in found.why and not found.reached_by(10**6, 10**6)


def test_a_chunk_needs_fewer_rows_the_longer_its_cache_is():
    pasts = (0, 8 * K, 32 * K, 128 * K)
    found = [minimum(CONFIG, shape(past), where=H200).tokens for past in pasts]
    assert found == sorted(found, reverse=True) and found[-1] < found[0] / 4
    for past, length in zip(pasts, found, strict=True):
        kept = expected_kept(CONFIG, length + past)
        assert sparse_path(shape(past), H200, length, kept).ms <= (1 - MARGIN) * dense_work(shape(past), H200, length).ms


@pytest.mark.parametrize("heads, lengths", [(32, (6144, 2560, 512)), (16, (9216, 4608, 768))])
def test_lengths_in_the_documentation(heads, lengths):
    """docs/serving.md: on an H100, alone and behind 8K and 64K tokens."""
    found = [minimum(CONFIG, shape(past, heads=heads, kv_heads=heads // 4), 0.5, H100).tokens for past in (0, 8 * K, 64 * K)]
    assert found == [*lengths]
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    assert all(f"{length:,}" in page for length in lengths)


def test_what_is_said_of_it():
    assert str(Minimum(64, False, "where it gains")) == "from 64 tokens on, where it gains"
    assert str(Minimum(None, False, "it never gains")) == "for no length: it never gains"


class TestOneRule:
    """The compiler's calls, the eager models' and vLLM's requests: alike for the same queries, keys, heads and device."""

    CASES = (
        (1152, 1152), (1153, 1153), (3072, 3072), (8 * K, 8 * K), (512, 9 * K), (3072, 35 * K), (8 * K, 16 * K),
        (31, 64 * K), (32, 64 * K), (600, 128 * K), (8 * K, 128 * K), (40, 1152), (40, 1153), (700, 4096), (699, 4096),
    )  # fmt: skip

    @pytest.mark.parametrize(
        "config", [CONFIG, TSAConfig.published(), CONFIG.replace(min_length=700)], ids=["default", "published", "700"]
    )
    @pytest.mark.parametrize("device", [None, CUDA], ids=["cpu", "gpu"])
    @pytest.mark.parametrize("heads", [8, 32])
    def test_all_decide_alike(self, config, device, heads):
        from tsa_compile.engines.vllm.core import Request, Rule
        from tsa_compile.passes.plan import sparse_obstacle

        rule = Rule(config, shape(0, config, heads), 0.5, CPU if device is None else H200)
        found = set()
        for rows, keys in self.CASES:
            query, key = (torch.empty(1, n, length, 128, dtype=torch.half) for n, length in ((heads, rows), (8, keys)))
            obstacle = sparse_obstacle(query, key, key, config, 0.5, None if device is None else H200)
            assert (obstacle is None) == rule.takes(Request(0, 5, 5 + rows, keys)), (rows, keys, obstacle)
            found.add(obstacle and obstacle[0])
        assert len(found) == 2 or config == TSAConfig.published(), "both sides are among the cases"
