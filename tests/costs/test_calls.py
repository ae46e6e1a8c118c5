"""The cost model: it repeats what was measured, and errs to the side on which nothing becomes slower."""

import dataclasses
import itertools
import math
import types
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsa_compile.config import Coverage, Floor, KeepRatio, TSAConfig
from tsa_compile.costs import breakeven
from tsa_compile.costs.breakeven import (
    LONGEST,
    MARGIN,
    break_even,
    expected_share,
    gains,
    kept_share,
    largest_share,
)
from tsa_compile.costs.calls import (
    CallShape,
    dense_work,
    rest_work,
    slowness,
    sparse_path,
    sparse_work,
    window_work,
)
from tsa_compile.costs.devices import H100, H200, for_device

K = 1024
LLAMA = CallShape(1, 32, 8, 128, 128, itemsize=2, window=128, counted=False)
COUNTED = dataclasses.replace(LLAMA, counted=True)
AHEAD = dataclasses.replace(H200, host_ms=0.0)
"""An H200 whose host is always ahead: what the GPU's work alone decides."""

# ms on an H200 (bf16, causal, B=1 H=32 G=8 D=128): dense cuDNN, and cuDNN over the rows of keep .675, .5, .3.
DENSE = {4 * K: 0.27, 8 * K: 1.00, 16 * K: 3.8, 32 * K: 14.8, 64 * K: 58.5, 128 * K: 249}
COMPRESSED = {
    4 * K: (0.138, 0.086, 0.044),
    8 * K: (0.483, 0.274, 0.119),
    16 * K: (1.76, 1.01, 0.385),
    32 * K: (6.72, 3.84, 1.41),
    64 * K: (26.9, 14.7, 5.32),
    128 * K: (105, 57.7, 21.1),
}
ATTENTION = list(DENSE.items()) + [
    (length * keep, ms) for length, row in COMPRESSED.items() for keep, ms in zip((0.675, 0.5, 0.3), row, strict=True)
]


def steps(call, length, keep):
    return {name: work.ms for name, work in sparse_work(call, H200, length, keep).items()}


def fit_attention(call, times):
    """Measured (rows, ms) of attention -> attention_tflops, attention_half_length, attention_ms.

    Least squares of t0 + a n + b n^2 in relative errors; times at a lowered clock do not belong here.
    """
    rows, ms = (torch.tensor(column, dtype=torch.float64) for column in zip(*times, strict=True))
    terms = torch.stack([torch.ones_like(rows), rows, rows**2], dim=1) / ms[:, None]
    launch, linear, square = torch.linalg.lstsq(terms, torch.ones_like(ms)[:, None]).solution.flatten().tolist()
    width = call.head_dim + call.value_head_dim
    per_pair = call.batch * call.heads * width * slowness(width, H200.attention_exponential)
    return per_pair / square / 1e9, linear / square, launch


@pytest.mark.parametrize(("rows", "ms"), ATTENTION)
def test_attention_takes_what_was_measured(rows, ms):
    assert dense_work(LLAMA, H200, rows).ms == pytest.approx(ms, rel=0.035)


def test_the_h200s_attention_is_the_fit_of_the_measured_times():
    fitted = fit_attention(LLAMA, ATTENTION)
    given = (H200.attention_tflops, H200.attention_half_length, H200.attention_ms)
    assert fitted == pytest.approx(given, rel=0.02)


# ms of dense cuDNN at 32K tokens for other head sizes: narrower heads make as many exponentials.
@pytest.mark.parametrize(("heads", "head_dim", "ms"), [(32, 64, 9.49), (16, 256, 12.7), (64, 128, 27.4)])
def test_other_heads_take_what_was_measured(heads, head_dim, ms):
    call = dataclasses.replace(LLAMA, heads=heads, head_dim=head_dim, value_head_dim=head_dim)
    assert dense_work(call, H200, 32 * K).ms == pytest.approx(ms, rel=0.1)


def test_long_runs_are_slower_than_the_curve():
    """The clock drops: three times the rows take more than nine times as long, of short ones less."""
    assert dense_work(LLAMA, H200, 120 * K).ms > 9.2 * dense_work(LLAMA, H200, 40 * K).ms
    assert dense_work(LLAMA, H200, 30 * K).ms < 9 * dense_work(LLAMA, H200, 10 * K).ms


@pytest.mark.parametrize("batch", [1, 4])
def test_a_layer_of_llama_without_attention_takes_what_was_measured(batch):
    """347 ms a layer at 128K in an exact prefill of an H200, of which attention takes 249 to 256."""
    sizes = dict(active=218_103_808, weights=218_112_000, itemsize=2, elements=86_016)
    assert rest_work(H200, batch * 128 * K, **sizes).ms == pytest.approx(batch * (346.5 - 253), rel=0.1)
    work = rest_work(H200, batch * 1000, **sizes)
    assert work.flops == batch * 2 * 1000 * 218_103_808
    assert work.bytes == 2 * (218_112_000 + batch * 1000 * 86_016)


def test_a_head_multiplies_one_token_of_each_item():
    head = rest_work(H200, 3, active=10**9, weights=10**9, itemsize=2)
    assert head.flops == 6 * 10**9
    assert head.ms == pytest.approx(2e9 / (H200.bandwidth_tbs * 1e9)), "reading the weights takes longer"


def test_a_fit_finds_the_figures_that_made_the_times():
    call = CallShape(2, 16, 4, 256, 64, itemsize=4, window=16)
    fitted = fit_attention(call, [(rows, dense_work(call, H200, rows).ms) for rows in (1000, 2000, 7000, 50_000)])
    assert fitted == pytest.approx((H200.attention_tflops, H200.attention_half_length, H200.attention_ms))


@pytest.mark.parametrize(
    ("step", "keep", "ms"),
    [
        ("score", 0.5, 0.717),
        ("select", 0.5, 0.126),
        ("compress", 0.5, 0.684),
        ("compress", 0.675, 0.893),
        ("decompress", 0.5, 0.405),
        ("decompress", 0.675, 0.46),
        ("attend", 0.5, 57.7),
    ],
)
def test_each_step_takes_at_128k_what_was_measured(step, keep, ms):
    assert steps(LLAMA, 128 * K, keep)[step] == pytest.approx(ms, rel=0.1)


# From 32K on, below which the launches of this run came from the host and cost more than in a model.
@pytest.mark.parametrize(
    ("length", "keep", "counted", "ms"),
    [
        (32 * K, 0.5, False, 4.25),
        (32 * K, 0.5, True, 5.39),
        (32 * K, 0.675, False, 7.29),
        (32 * K, 0.675, True, 8.58),
        (128 * K, 0.5, False, 60.5),
        (128 * K, 0.5, True, 66.4),
        (128 * K, 0.675, False, 109),
        (128 * K, 0.675, True, 117),
    ],
)
def test_whole_chains_take_what_was_measured(length, keep, counted, ms):
    share = kept_share(TSAConfig(), length, keep)
    assert sparse_path(COUNTED if counted else LLAMA, H200, length, share).ms == pytest.approx(ms, rel=0.1)


def test_steps_add_up_to_the_chain_and_work_is_counted():
    assert sum(steps(COUNTED, 10_000, 0.4).values()) == pytest.approx(sparse_path(COUNTED, H200, 10_000, 0.4).ms)
    dense, sparse = dense_work(LLAMA, H200, 10_000), sparse_work(LLAMA, H200, 10_000, 0.4)
    assert dense.flops == 4 * 32 * 128 * 10_000**2 / 2  # two products of 2 D, half of the pairs
    assert sparse["attend"].flops == pytest.approx(0.16 * 4 * 32 * 128 * 10_000**2 / 2)
    assert sparse["score"].flops == 2 * 2 * 128 * 10_000 * 128 * 32
    kept = 4000
    moved = 2 * 128 * (2 * 32 * kept + 2 * 8 * 10_000 + 2 * 32 * kept) + 4 * 32 * kept  # every key row is in some head's
    assert sparse["compress"].bytes == pytest.approx(moved)
    assert sparse["decompress"].bytes == pytest.approx(2 * 128 * 32 * 14_000 + 4 * 32 * kept)


@pytest.mark.parametrize("change", [dict(batch=3), dict(itemsize=4), dict(window=256), dict(counted=True), dict(heads=64)])
def test_more_of_anything_takes_longer(change):
    assert sparse_path(dataclasses.replace(LLAMA, **change), H200, 8 * K, 0.5).ms > sparse_path(LLAMA, H200, 8 * K, 0.5).ms


def test_groups_that_select_together_move_less():
    together = dataclasses.replace(LLAMA, grouped=True)
    assert steps(together, 8 * K, 0.5)["compress"] < steps(LLAMA, 8 * K, 0.5)["compress"]
    assert steps(together, 8 * K, 0.5)["select"] == steps(LLAMA, 8 * K, 0.5)["select"]


# What is kept.


@given(st.floats(0.01, 1), st.integers(1, 200_000), st.integers(1, 512), st.integers(0, 4096))
def test_keep_ratio_keeps_exactly_what_the_specification_says(ratio, length, window, min_tokens):
    config = TSAConfig(budget=KeepRatio(ratio), window=window, min_tokens=min_tokens)
    candidates = max(length - window, 0)
    kept = min(candidates, max(min_tokens, math.ceil(Fraction(str(ratio)) * candidates))) + min(window, length)
    assert kept_share(config, length, expected_share(config.budget, length)) == kept / length


def test_a_capacity_bounds_what_is_kept():
    config = TSAConfig(budget=KeepRatio(0.5), capacity=4096)
    assert kept_share(config, 128 * K, expected_share(config.budget, 128 * K)) == 4096 / (128 * K)


def test_coverage_is_expected_to_keep_what_was_published():
    assert 1 - expected_share(Coverage(0.005), 4 * K) ** 2 == pytest.approx(0.17)
    assert 1 - expected_share(Coverage(0.005), 128 * K) ** 2 == pytest.approx(0.54)
    assert expected_share(Coverage(0.005), 512) == expected_share(Coverage(0.005), 4 * K)
    assert expected_share(Coverage(0.005), 1024 * K) == expected_share(Coverage(0.005), 128 * K)
    assert expected_share(Coverage(0), 128 * K) == largest_share(Coverage(0)) == 1


@given(st.floats(0, 0.99), st.floats(0, 0.99), st.integers(512, LONGEST))
def test_a_larger_coverage_keeps_no_more_and_never_more_than_equal_scores_would(one, other, length):
    small, large = sorted((one, other))
    assert expected_share(Coverage(large), length) <= expected_share(Coverage(small), length) + 1e-12
    assert expected_share(Coverage(large), length) <= largest_share(Coverage(large)) + 1e-12


# From which length a call gains.


def length_of(budget, call=LLAMA, device=AHEAD, sparse_layers=0.5, **options):
    config = TSAConfig(budget=budget, window=call.window, **options)
    call = dataclasses.replace(call, counted=call.counted or isinstance(budget, Coverage))
    return break_even(device, call, config, sparse_layers)


# Narrow, wide and many heads, batches, float32, tiny models: near misses of the shape that was measured.
SITES = [
    LLAMA,
    COUNTED,
    dataclasses.replace(LLAMA, head_dim=64, value_head_dim=64),
    dataclasses.replace(LLAMA, heads=64),
    dataclasses.replace(LLAMA, heads=16, head_dim=256, value_head_dim=256),
    dataclasses.replace(LLAMA, batch=4),
    dataclasses.replace(LLAMA, itemsize=4),
    dataclasses.replace(LLAMA, grouped=True),
    dataclasses.replace(LLAMA, kv_heads=32, value_head_dim=96),
    CallShape(1, 4, 2, 32, 32, itemsize=4, window=4),
]


@pytest.mark.parametrize("call", SITES)
@pytest.mark.parametrize("budget", [KeepRatio(0.5), KeepRatio(0.9), Coverage(0.005), Coverage(0.3)])
def test_every_length_from_the_break_even_on_gains_and_the_one_before_does_not(call, budget):
    config = TSAConfig(budget=budget, window=call.window)
    minimum = break_even(H200, call, config)
    assert minimum is not None and minimum % breakeven.STEP == 0
    assert not gains(H200, call, config, minimum - breakeven.STEP)
    for length in {*range(minimum, minimum + 4 * K, 131), *(int(minimum * 1.07**step) for step in range(60))}:
        assert gains(H200, call, config, length), length


@pytest.mark.parametrize("call", SITES)
def test_the_more_is_kept_the_longer_it_must_be(call):
    lengths = [length_of(KeepRatio(keep), call) or math.inf for keep in (0.1, 0.3, 0.5, 0.675, 0.9, 0.95)]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("call", SITES)
@pytest.mark.parametrize("budget", [KeepRatio(1), KeepRatio(0.999), Coverage(0)])
def test_what_keeps_all_or_nearly_all_never_gains(call, budget):
    assert length_of(budget, call) is None


def test_what_costs_more_gains_later_and_what_saves_more_sooner():
    half = KeepRatio(0.5)
    assert length_of(half) < length_of(half, COUNTED)
    assert length_of(half) < length_of(half, SITES[2]), "64 of 128 head sizes: half of the work, all of the launches"
    assert length_of(half) < length_of(half, dataclasses.replace(LLAMA, itemsize=4)), "at float16's attention speed"
    assert length_of(half, dataclasses.replace(LLAMA, batch=4)) < length_of(half)
    assert length_of(half, dataclasses.replace(LLAMA, heads=64)) < length_of(half)
    assert length_of(half, min_tokens=8 * K) > length_of(half), "where the minimum keeps more than the ratio"
    assert length_of(KeepRatio(0.9), capacity=2 * K) < length_of(KeepRatio(0.9))


def test_the_goals_of_the_benchmark_are_on_the_right_side():
    """Wanted on an H200: a gain at 8K with half or .675 of the tokens; other shapes at .5 from 16K on."""
    assert length_of(KeepRatio(0.5), device=H200) <= length_of(KeepRatio(0.675), device=H200) <= 8 * K
    for change in (dict(head_dim=64, value_head_dim=64), dict(heads=64), dict(batch=4)):
        assert length_of(KeepRatio(0.5), dataclasses.replace(LLAMA, **change), H200) <= 16 * K


def test_a_slow_host_does_not_slow_the_model_by_much():
    """At 4K the GPU is done with .18 ms of work, and dense attention with .26, before a slow host has launched it."""
    config = TSAConfig(budget=KeepRatio(0.5))
    minimum = break_even(H200, LLAMA, config)
    assert minimum > 4 * K >= break_even(AHEAD, LLAMA, config)
    layer = dense_work(LLAMA, H200, minimum).ms + 2 * minimum * 218e6 / (H200.matmul_tflops * 1e9)
    assert 0.5 * (H200.host_ms - dense_work(LLAMA, H200, minimum).ms) < 0.02 * layer


def test_coverage_that_finds_little_to_drop_does_not_slow_the_model_by_much():
    """A layer of Llama-3.1-8B: 218 million weights beside attention. Equal scores, as with random weights: .995 is kept."""
    config = TSAConfig.published()
    minimum = break_even(H200, COUNTED, config)
    for length in (minimum, 2 * minimum, 128 * K):
        layer = DENSE.get(length, dense_work(LLAMA, H200, length).ms) + 2 * length * 218e6 / (H200.matmul_tflops * 1e9)
        worst = sparse_path(COUNTED, H200, length, kept_share(config, length, 0.995)).ms
        assert 0.5 * (worst - dense_work(LLAMA, H200, length).ms) < 0.02 * layer
    assert length_of(Coverage(), sparse_layers=1.0) > minimum > length_of(Coverage(), sparse_layers=0.1)


def test_a_large_coverage_is_as_safe_as_a_ratio():
    assert length_of(Coverage(0.3)) <= length_of(KeepRatio(0.7), COUNTED)
    assert length_of(Coverage(0.005)) <= length_of(Coverage(0.002))


def test_answers_are_cached_also_for_configs_that_cannot_be_hashed():
    class Unhashable:
        __hash__ = None

        def __call__(self, graph_module, inputs):
            return graph_module

    config = TSAConfig(budget=KeepRatio(0.61), compiler=Unhashable())
    first = break_even(H200, LLAMA, config)
    hits = breakeven._break_even.cache_info().hits
    assert break_even(H200, LLAMA, config.replace(layers=[3], strict=True)) == first
    assert breakeven._break_even.cache_info().hits == hits + 1


# Other devices.


def pretend(monkeypatch, **properties):
    """`for_device` on a machine whose only GPU has these properties."""
    for_device.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(**properties))
    return for_device(torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def forget_devices():
    yield
    for_device.cache_clear()


BUS = dict(memory_clock_rate=3_201_000, memory_bus_width=6144)


def test_a_measured_device_is_known_by_its_name(monkeypatch):
    for measured in (H200, H100):
        assert pretend(monkeypatch, name=measured.name, major=9, multi_processor_count=132, **BUS) is measured


def test_an_unknown_device_of_the_h200s_size_has_its_costs(monkeypatch):
    found = pretend(monkeypatch, name="NVIDIA H100 144G", major=9, multi_processor_count=132, **BUS)
    assert found.name == "NVIDIA H100 144G"
    assert dataclasses.astuple(found)[1:] == pytest.approx(dataclasses.astuple(H200)[1:], rel=0.01)
    assert (found.sparse_ms, found.count_ms, found.attention_ms) == (H200.sparse_ms, H200.count_ms, H200.attention_ms)


@pytest.mark.parametrize(
    "properties",
    [
        dict(name="slow memory", major=9, multi_processor_count=132, memory_clock_rate=1_600_000, memory_bus_width=6144),
        dict(name="tells no bandwidth", major=9, multi_processor_count=132),
        dict(name="tells a bandwidth of 0", major=9, multi_processor_count=132, memory_clock_rate=0, memory_bus_width=0),
        dict(name="Blackwell", major=10, multi_processor_count=148, memory_clock_rate=3_996_000, memory_bus_width=8192),
        dict(name="workstation", major=8, multi_processor_count=142, memory_clock_rate=9_001_000, memory_bus_width=384),
    ],
    ids=lambda properties: properties["name"],
)
def test_devices_that_multiply_faster_than_they_move_gain_later(monkeypatch, properties):
    found = pretend(monkeypatch, **properties)
    for budget in (KeepRatio(0.5), KeepRatio(0.675)):
        ahead = dataclasses.replace(found, host_ms=0.0)
        assert length_of(budget) < length_of(budget, device=ahead) <= length_of(budget, device=found) <= LONGEST
    assert length_of(KeepRatio(1), device=found) is None


def test_the_margin_is_kept():
    config = TSAConfig(budget=KeepRatio(0.5))
    minimum = break_even(H200, LLAMA, config)
    share = kept_share(config, minimum, 0.5)
    assert sparse_path(LLAMA, H200, minimum, share).ms <= (1 - MARGIN) * dense_work(LLAMA, H200, minimum).ms


def test_lengths_are_found_at_any_scale():
    """Not only between the first and the last length that are tried."""
    instant = dataclasses.replace(AHEAD, sparse_ms=0.0, score_tflops=1e9, bandwidth_tbs=1e9, select_tbs=1e9)
    found = [length_of(KeepRatio(0.5), device=instant, min_tokens=minimum) for minimum in (0, 1000, 10_000, 100_000)]
    assert found[0] == breakeven.STEP
    assert all(one < other for one, other in itertools.pairwise(found))
    assert length_of(KeepRatio(0.5), device=instant, min_tokens=LONGEST) is None


# One H100, torch 2.11, at keep .3: the stage "floor" of benchmarks/results/attention-h100.md.
@pytest.mark.parametrize(("length", "ms"), [(16 * K, 0.327), (32 * K, 0.653), (64 * K, 1.23), (128 * K, 2.73)])
def test_the_floor_takes_what_was_measured(length, ms):
    floor = dataclasses.replace(LLAMA, floor=272)
    assert sparse_work(floor, H100, length, 0.5)["decompress"].ms == pytest.approx(ms, rel=0.1)
    assert sparse_path(floor, H100, length, 0.5).ms > sparse_path(LLAMA, H100, length, 0.5).ms
    assert CallShape.configured(TSAConfig(floor=Floor(250, 22)), 1, 32, 8, 128, 128, 2).floor == 272


# -- chunks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8 * K, 16 * K])
def test_chunks_of_a_prompt_are_all_of_its_work(size):
    """Operations add up exactly; times nearly, by what each call takes to start."""
    whole = dense_work(LLAMA, H200, 64 * K)
    chunks = [dense_work(dataclasses.replace(LLAMA, past=past), H200, size) for past in range(0, 64 * K, size)]
    assert sum(work.flops for work in chunks) == whole.flops
    assert sum(work.ms for work in chunks) == pytest.approx(whole.ms, rel=0.06)


def test_a_chunk_of_which_all_is_kept_gains_nothing():
    call = dataclasses.replace(LLAMA, past=32 * K, floor=272)
    assert sparse_path(call, H200, 8 * K, 1.0).ms > dense_work(call, H200, 8 * K).ms


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "ms"),
    [(32, 8, 128, 4096, 20.38), (8, 4, 256, 1024, 2.412), (64, 8, 64, 128, 1.81)],
)
def test_a_sliding_window_takes_what_it_took(heads, kv_heads, dim, window, ms):
    """On an H200, 128K tokens (benchmarks/results/windows.md)."""
    call = CallShape(1, heads, kv_heads, dim, dim, itemsize=2, window=128)
    assert window_work(call, H200, window, 128 * K).ms == pytest.approx(ms, rel=0.15)
    assert window_work(call, H200, window, 64 * K).ms < dense_work(call, H200, 64 * K).ms


def test_a_chunk_keeps_its_window():
    """Bytes of the rows that are gathered: those of the window are in the chunk, whatever else is."""
    call = dataclasses.replace(LLAMA, past=60 * K, window=4 * K)
    few = dataclasses.replace(call, window=1)
    with_window, without = (sparse_work(each, H200, 4 * K, 0.1)["attend"].flops for each in (call, few))
    assert with_window > 5 * without
