"""The fused ops: what the single ops compute, for every way in which the count can be known."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.errors import KernelError
from tsa_compile.kernels import fused, reference, registry
from tsa_compile.kernels.fused import padded_sparse_triton, sparse_triton
from tsa_compile.kernels.padded import valid_ranges
from tsa_compile.kernels.registry import AttentionKernel

from .layers import COVER, HALF, OPTIONS, expected
from .support import close, damaged, qkv

# The interpreter computes with numpy, which warns of what faulty numbers bring.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|All-NaN slice):RuntimeWarning")

L = 50


def ones():
    return torch.ones(3, L, dtype=torch.bool)


def sided():
    padding = ones()
    padding[1, :11] = False
    padding[2, 41:] = False
    return padding


def holes():
    padding = sided()
    padding[1, 20:25] = False
    return padding


def nothing_valid():
    padding = ones()
    padding[:2] = False
    return padding


PADDINGS = [None, ones, sided, holes, nothing_valid]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("padding", PADDINGS, ids=lambda make_: "unpadded" if make_ is None else make_.__name__)
def test_op_equals_the_reference_layer(device, padding, options):
    inputs = qkv(3, 4, 2, L, 32, 48, device=device)
    scalars = dataclasses.astuple(options)
    if padding is None:
        out = torch.ops.tsa.sparse_attention(*inputs, *scalars)
    else:
        padding = padding()
        out = torch.ops.tsa.padded_sparse_attention(*inputs, padding.to(device), valid_ranges(padding.to(device)), *scalars)
    assert out.transpose(1, 2).is_contiguous()
    close(out.cpu(), expected(*inputs, padding, options))


def check_launched_steps(inputs, make_padding, options):
    """The launchers against the reference, where the inputs are."""
    padding = None if make_padding is None else make_padding()
    if padding is None:
        out = sparse_triton(*inputs, options)
    else:
        out = padded_sparse_triton(*inputs, padding.to(inputs[0].device), valid_ranges(padding), options)
    close(out.cpu(), expected(*inputs, padding, options))


@pytest.mark.parametrize("name", ["keep_ratio", "coverage", "group", "capacity", "floor", "floor_coverage", "floor_group"])
@pytest.mark.parametrize("padding", PADDINGS, ids=lambda make_: "unpadded" if make_ is None else make_.__name__)
def test_launched_steps_equal_the_reference_layer(triton_device, padding, name):
    inputs = qkv(3, 4, 2, L, 32, 32, device=triton_device)
    check_launched_steps(inputs, padding, OPTIONS[name])


BEHIND = [
    "keep_ratio",
    "coverage",
    "group",
    "capacity_of_a_ratio",
    "floor",
    "floor_coverage",
    "floor_group",
    "floor_keep_all",
]


@pytest.mark.parametrize("padding", PADDINGS, ids=lambda make_: "unpadded" if make_ is None else make_.__name__)
class TestQueriesBehindACache:
    """A chunk's rows, also where its window is cut short by its own beginning or by padding."""

    def inputs(self, rows, device):
        query, key, value = qkv(3, 4, 2, L, 32, 32, device=device)
        return query[:, :, L - rows :], key, value

    @pytest.mark.parametrize("name", BEHIND)
    @pytest.mark.parametrize("rows", [3, 21])
    def test_op(self, rows, padding, name):
        inputs, scalars = self.inputs(rows, "cpu"), dataclasses.astuple(OPTIONS[name])
        if padding is None:
            out = torch.ops.tsa.sparse_attention(*inputs, *scalars)
        else:
            padding = padding()
            out = torch.ops.tsa.padded_sparse_attention(*inputs, padding, valid_ranges(padding), *scalars)
        assert out.transpose(1, 2).is_contiguous()
        close(out, expected(*inputs, padding, OPTIONS[name]))

    @pytest.mark.parametrize(
        "rows, name",
        [(3, "floor"), (21, "coverage"), (21, "capacity_of_a_ratio"), (21, "floor_coverage"), (21, "floor_group")],
    )
    def test_launched_steps(self, rows, padding, name, triton_device):
        inputs = self.inputs(rows, triton_device)
        check_launched_steps(inputs, padding, OPTIONS[name])


def test_a_chunk_gathers_the_selected_rows_once(triton_device, monkeypatch):
    """Those before the chunk among them, of all heads together."""
    gathered, compress = [], fused._compressed_behind
    monkeypatch.setattr(fused, "_compressed_behind", lambda *given: (gathered.append(given), compress(*given))[1])
    query, key, value = qkv(1, 4, 2, L, 32, 32, device=triton_device)
    sparse_triton(query[:, :, L - 24 :], key, value, HALF)
    ((asked, held, *_),) = gathered
    assert (asked.shape[:3], held.shape[:3]) == ((1, 4, 24), (1, 2, L))


# Every fault meets every budget and every padding, and every budget meets every padding; test_score has all faults alone.
BUDGETS, SIDES = ["keep_ratio", "coverage", "group", "capacity"], [None, sided, holes]
FAULTS = ["NaN key", "NaN key in the window", "inf key", "-inf key", "NaN query in the window"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fault", "padding"),
    [(name, fault, SIDES[(b + f) % 3]) for b, name in enumerate(BUDGETS) for f, fault in enumerate(FAULTS)],
    ids=lambda value: value if isinstance(value, str) else "unpadded" if value is None else value.__name__,
)
def test_faulty_numbers_show_as_in_the_reference_layer(triton_device, name, fault, padding):
    query, key, value = qkv(3, 4, 2, L, 32, 32, device=triton_device)
    query, key = damaged(fault, query, key, window=4)
    # Of fewer than 16 rows torch's kernel for CPUs makes 0 where all logits of one are NaN.
    options = dataclasses.replace(OPTIONS[name], capacity=20 if name == "capacity" else None)
    if padding is None:
        out = sparse_triton(query, key, value, options)
        op = torch.ops.tsa.sparse_attention(query, key, value, *dataclasses.astuple(options))
    else:
        padding = padding()
        masks = padding.to(triton_device), valid_ranges(padding)
        out = padded_sparse_triton(query, key, value, *masks, options)
        op = torch.ops.tsa.padded_sparse_attention(query, key, value, *masks, *dataclasses.astuple(options))
    want = expected(query, key, value, padding, options)
    assert want.isnan().any()
    for got in (out, op):
        close(got.cpu(), want, equal_nan=True)


# Every pair of values of the three.
@pytest.mark.parametrize(
    ("limit", "shared", "floor"),
    [(1, False, None), (1, True, 7), (40_000, False, 7), (40_000, True, None), (10**9, False, None), (10**9, True, 7)],
)
def test_heads_stream_through_small_buffers(triton_device, monkeypatch, limit, shared, floor):
    monkeypatch.setattr(fused, "STREAM_BYTES", limit)
    inputs = qkv(2, 6, 3, L, 32, 16, device=triton_device)
    options = dataclasses.replace(COVER, shared=shared, floor_window=floor)
    close(sparse_triton(*inputs, options).cpu(), expected(*inputs, None, options))


@pytest.mark.parametrize("limit, calls", [(None, 4), (60_000, 2), (10**9, 1)])
def test_a_kernel_says_how_much_it_is_handed_at_a_time(triton_device, monkeypatch, own_kernel, limit, calls):
    """Four groups of two heads, of 28 kB each."""
    monkeypatch.setattr(fused, "STREAM_BYTES", 1)
    seen = []

    def run(query, key, value, scale):
        seen.append(query.shape[1])
        return registry.get("sdpa").causal(query, key, value, scale)

    own_kernel(AttentionKernel("streamed", run, lambda request: None, priority=-50, stream_bytes=limit))
    inputs = qkv(1, 8, 4, L, 32, 32, device=triton_device)
    sparse_triton(*inputs, dataclasses.replace(HALF, kernel="streamed"))
    assert seen == [8 // calls] * calls


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 20), st.sampled_from([0.1, 0.5, 0.675, 1.0]))
def test_a_count_known_beforehand_is_the_budgets(valid, window, min_tokens, ratio):
    options = dataclasses.replace(HALF, window=window, min_tokens=min_tokens, keep_ratio=ratio)
    scores = torch.full((1, 2, 60), -torch.inf)
    scores[..., :valid] = torch.rand(1, 2, valid)
    scores[..., max(0, valid - window) : valid] = torch.inf
    assert options.kept(valid, valid) == int(reference.budget(scores, None, ratio, min_tokens)[0])
    covered = dataclasses.replace(options, keep_ratio=None, coverage=0.3)
    assert covered.kept(valid, valid) in (None, int(reference.budget(scores, 0.3, None, min_tokens)[0]))


def test_opcheck(device):
    inputs = qkv(3, 4, 2, L, 32, 48, device=device)
    scalars = dataclasses.astuple(HALF)
    torch.library.opcheck(torch.ops.tsa.sparse_attention, (*inputs, *scalars))
    padding = sided().to(device)
    torch.library.opcheck(torch.ops.tsa.padded_sparse_attention, (*inputs, padding, valid_ranges(padding), *scalars))
    floor = dataclasses.astuple(OPTIONS["floor_coverage"])
    torch.library.opcheck(torch.ops.tsa.padded_sparse_attention, (*inputs, padding, valid_ranges(padding), *floor))


def test_rows_are_rounded_for_a_kernel_that_reads_the_count(triton_device, own_kernel):
    """27 of 50 tokens are kept: 32 rows and their number; at most as many rows as there are tokens."""
    seen = []

    def run(query, key, value, scale, count=None):
        seen.append((query.shape[2], None if count is None else count.tolist()))
        return registry.get("sdpa").causal(query, key, value, scale)

    inputs = qkv(2, 4, 2, L, 32, 48, device=triton_device)
    plain = sparse_triton(*inputs, HALF)
    for step, rows, count in ((1, 27, None), (16, 32, [27, 27]), (60, 50, [27, 27])):
        own_kernel(
            AttentionKernel(
                f"steps of {step}", run, lambda request: None, priority=-50, device_count=True,
                round_rows=lambda rows, step=step: -(-rows // step) * step,
            )
        )  # fmt: skip
        close(sparse_triton(*inputs, dataclasses.replace(HALF, kernel=f"steps of {step}")), plain)
        assert seen.pop() == (rows, count)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_captured_op_replays_with_other_data_and_another_count(kernel):
    inputs = qkv(2, 8, 2, 3000, 64, 64, torch.bfloat16, "cuda")
    scalars = dataclasses.astuple(dataclasses.replace(COVER, window=128, min_tokens=64, kernel=kernel))
    torch.ops.tsa.sparse_attention(*inputs, *scalars)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.tsa.sparse_attention(*inputs, *scalars)
    kept = set()
    for seed in range(3):
        for tensor, fresh in zip(inputs, qkv(2, 8, 2, 3000, 64, 64, torch.bfloat16, "cuda", seed=seed)):
            tensor.copy_(fresh * (seed + 1))
        graph.replay()
        close(out, torch.ops.tsa.sparse_attention(*inputs, *scalars), torch.bfloat16)
        kept.add(int(out.any(dim=-1).sum()))
    assert len(kept) == 3, "the counts differ"


@pytest.mark.gpu
def test_a_known_count_needs_no_synchronisation():
    inputs = qkv(2, 8, 2, 3000, 64, 64, torch.bfloat16, "cuda")
    padding = torch.ones(2, 3000, dtype=torch.bool, device="cuda")
    padding[0, :700] = False
    scalars = dataclasses.astuple(HALF)
    arguments = (*inputs, padding, valid_ranges(padding), *scalars)
    torch.ops.tsa.padded_sparse_attention(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.tsa.sparse_attention(*inputs, *scalars)
        torch.ops.tsa.padded_sparse_attention(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_kernel_without_a_log_sum_exp_is_refused_under_a_floor(device, own_kernel):
    own_kernel(AttentionKernel("mute", lambda *rows: rows[0], lambda request: None, priority=99))
    inputs = qkv(1, 4, 2, L, 32, 32, device=device)
    options = dataclasses.replace(HALF, floor_window=6)
    out = torch.ops.tsa.sparse_attention(*inputs, *dataclasses.astuple(options))
    close(out.cpu(), expected(*inputs, None, options))
    with pytest.raises(KernelError, match=r"'mute' cannot run .*: it gives no log-sum-exp"):
        torch.ops.tsa.sparse_attention(*inputs, *dataclasses.astuple(dataclasses.replace(options, kernel="mute")))


WRONG = {
    "two budgets": (dict(keep_ratio=0.5, coverage=0.1), "exactly one"),
    "no budget": (dict(keep_ratio=None, coverage=None), "exactly one"),
    "all tokens dropped": (dict(keep_ratio=None, coverage=1.0), "coverage is 1.0"),
    "no window": (dict(window=0), "window 0"),
    "a sum": (dict(reduce="sum"), "'sum'"),
    "fewer than none": (dict(min_tokens=-1), "min_tokens is -1"),
    "no room": (dict(capacity=0), "capacity is 0"),
    "no neighbours": (dict(floor_window=0), "a floor of 0"),
}


@pytest.mark.parametrize("change, said", WRONG.values(), ids=WRONG)
def test_options_that_are_not_allowed_are_refused(device, change, said):
    options = dataclasses.astuple(dataclasses.replace(OPTIONS["floor"], **change))
    with pytest.raises(ValueError, match=rf"tsa::sparse_attention: .*{said}"):
        torch.ops.tsa.sparse_attention(*qkv(1, 4, 2, L, 32, 32, device=device), *options)


def test_a_floor_far_wider_than_the_prompt_takes_no_memory_for_it():
    """Its rows of logits would be 2,000,000,000 numbers long."""
    inputs, options = qkv(1, 4, 2, L, 32, 32), dataclasses.replace(OPTIONS["floor"], floor_window=10**9)
    out = torch.ops.tsa.sparse_attention(*inputs, *dataclasses.astuple(options))
    whole = dataclasses.replace(options, floor_window=L)
    close(out, torch.ops.tsa.sparse_attention(*inputs, *dataclasses.astuple(whole)))


def test_operands_that_do_not_fit_are_refused(device):
    query, key, value = qkv(3, 4, 2, L, 32, 32, device=device)
    padding, scalars = sided().to(device), dataclasses.astuple(OPTIONS["floor"])
    with pytest.raises(ValueError, match=f"{L - 1} keys and {L} values"):
        torch.ops.tsa.sparse_attention(query[:, :, 1:], key[:, :, 1:], value, *scalars)
    with pytest.raises(ValueError, match=rf"expected torch.bool \[3, {L}\]"):
        torch.ops.tsa.padded_sparse_attention(query, key, value, padding[:1], valid_ranges(padding[:1]), *scalars)
