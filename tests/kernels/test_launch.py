"""Remembered functions of launches: a replay computes what the function would, and what cannot be replayed runs.

A launch here is a Python function that computes on addresses, as a kernel would.
"""

import contextlib
import ctypes
import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tsa_compile.kernels import fused
from tsa_compile.kernels import launch as launching
from tsa_compile.kernels.fused import Options, sparse_triton
from tsa_compile.kernels.launch import by_device, remembered, watching


def add_scaled(target, source, factor, size, stream):
    """target += factor * source, float32 numbers one after the other; nothing for a null source."""
    numbers = (ctypes.c_float * size).from_address(target)
    if source is not None:
        for i, number in enumerate((ctypes.c_float * size).from_address(source)):
            numbers[i] += factor * number


def clear(target, size, stream):
    ctypes.memset(target, 0, 4 * size)


def launch(runner, tensors, *numbers):
    runner(*(None if tensor is None else tensor.data_ptr() for tensor in tensors), *numbers, stream=None)
    if watching() is not None:
        watching().add(runner, tensors, numbers)


class Counted:
    """A remembered function that counts how often it runs itself."""

    def __init__(self, function):
        self.ran = 0
        self.function = function
        self.call = remembered(self.run)

    def run(self, *arguments):
        self.ran += 1
        return self.function(*arguments)


def weighted_sum(x, y, factor):
    """x + factor * y in a temporary; then twice that."""
    total, result = torch.empty_like(x), torch.empty_like(x)
    for target in (total, result):
        launch(clear, (target,), x.numel())
    launch(add_scaled, (total, x), 1.0, x.numel())
    launch(add_scaled, (total, y), factor, x.numel())
    launch(add_scaled, (result, total), 2.0, x.numel())
    return result


def test_a_replay_computes_the_same_from_other_arguments():
    counted = Counted(weighted_sum)
    for size, ran in ((5, 1), (5, 1), (7, 2), (5, 2)):
        x, y = torch.randn(size), torch.randn(size)
        torch.testing.assert_close(counted.call(x, y, 0.5), 2 * (x + 0.5 * y))
        assert counted.ran == ran
    torch.testing.assert_close(counted.call(x, y, 0.25), 2 * (x + 0.25 * y))
    torch.testing.assert_close(counted.call(x, None, 0.5), 2 * x)
    assert counted.ran == 4
    torch.testing.assert_close(counted.call(y, None, 0.5), 2 * y)
    assert counted.ran == 4


def test_descriptors_are_replayed_on_other_tensors_and_keep_none_alive():
    def described(descriptor, source, stream):
        add_scaled(descriptor.base.data_ptr(), source, 1.0, descriptor.shape[0], stream)

    def copied(x):
        result = torch.empty_like(x)
        descriptor = SimpleNamespace(base=result, shape=[x.numel()])
        launch(clear, (result,), x.numel())
        described(descriptor, x.data_ptr(), None)
        if watching() is not None:
            watching().add(described, (descriptor, x), ())
        return result

    counted, dead = Counted(copied), []
    for _ in range(3):
        x = torch.randn(5)
        result = counted.call(x)
        assert torch.equal(result, x) and counted.ran == 1 and not any(earlier() is not None for earlier in dead)
        dead.append(weakref.ref(result))


def test_results_keep_their_layout_and_arguments_that_are_written_are_returned():
    def transposed(x, output):
        result = x.new_empty(3, 2).transpose(0, 1)
        launch(clear, (result,), 6)
        launch(add_scaled, (result, x), 1.0, 6)
        launch(add_scaled, (output, x), 1.0, 6)
        return result, output

    counted = Counted(transposed)
    for _ in range(2):
        x, output = torch.randn(6), torch.ones(6)
        result, returned = counted.call(x, output)
        assert returned is output and result.shape == (2, 3) and result.stride() == (1, 2)
        torch.testing.assert_close(output, 1 + x)
        torch.testing.assert_close(result.t().flatten(), x)
    assert counted.ran == 1


def test_zeros_are_zeros_in_each_replay():
    def doubled(x):
        zeros, result = x.new_zeros(4), torch.empty_like(x)
        launch(add_scaled, (zeros, x), 2.0, 4)
        launch(clear, (result,), 4)
        launch(add_scaled, (result, zeros), 1.0, 4)
        return result

    counted = Counted(doubled)
    for _ in range(3):
        x = torch.randn(4)
        torch.testing.assert_close(counted.call(x), 2 * x)
    assert counted.ran == 1


def test_a_part_of_an_argument_is_found_in_the_next_one():
    def first_and_last(x):
        result = x.new_empty(2)
        launch(clear, (result,), 2)
        launch(add_scaled, (result, x[:2]), 1.0, 2)
        launch(add_scaled, (result, x[-2:]), 1.0, 2)
        return result

    counted = Counted(first_and_last)
    for start in (0, 4):
        x = torch.randn(12)[start : start + 6]
        torch.testing.assert_close(counted.call(x), x[:2] + x[-2:])
    assert counted.ran == 1


def plus(x, y):
    """x + y by a launch."""
    result = torch.empty_like(x)
    launch(clear, (result,), x.numel())
    launch(add_scaled, (result, x), 1.0, x.numel())
    launch(add_scaled, (result, y), 1.0, x.numel())
    return result


def interpreted(x, y):
    result = plus(x, y)
    if watching() is not None:
        watching().replayable = False
    return result


def part_of_shared_memory(x, y):
    result = plus(x, x)
    launch(add_scaled, (result, y[:2]), 1.0, 2)
    return result


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: plus(x + 1, y),
        lambda x, y: (plus(x, y), x[:2]),
        lambda x, y: (plus(x, y), x.view(2, 2)),
        lambda x, y: (lambda found: (found, found[1:]))(plus(x, y)),
        lambda x, y: plus(x, y)[:2],
        lambda x, y: torch.empty_like(x).zero_(),
        lambda x, y: x,
        part_of_shared_memory,
        interpreted,
    ],
)
def test_what_cannot_be_replayed_runs_each_time(function):
    counted = Counted(function)
    for number in range(1, 4):
        both = torch.randn(2, 4)
        torch.testing.assert_close(counted.call(both[0], both[1]), function(both[0].clone(), both[1].clone()))
        assert counted.ran == number


def test_arguments_may_share_memory():
    counted = Counted(plus)
    for shift in (4, 8):
        base = torch.randn(12)
        torch.testing.assert_close(counted.call(base[:4], base[shift:][:4]), base[:4] + base[shift:][:4])
    assert counted.ran == 1


def test_alignment_strides_and_types_are_told_apart():
    counted = Counted(plus)
    base, other = torch.randn(64), torch.zeros(4)
    aligned = base[(-base.data_ptr() // 4) % 4 :]
    for start, ran in ((0, 1), (1, 2), (4, 2)):
        torch.testing.assert_close(counted.call(aligned[start:][:4], other), aligned[start:][:4])
        assert counted.ran == ran
    counted.call(aligned[:8:2], other)
    counted.call(aligned[:4].view(torch.int32), other)
    assert counted.ran == 4


def test_one_inside_another_and_under_a_compiler():
    inner = Counted(plus)
    outer = Counted(lambda x, y: inner.call(x, y))
    x, y = torch.randn(2, 4)
    inner.call(x, y)
    for _ in range(2):
        torch.testing.assert_close(outer.call(x, y), x + y)
    assert outer.ran == 1 and inner.ran == 2
    with FakeTensorMode() as mode:
        seen = remembered(lambda x: x.new_empty(3))(mode.from_tensor(x))
    assert seen.shape == (3,)
    assert watching() is None


def test_after_an_error_nobody_watches():
    def wrong(x):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        remembered(wrong)(torch.ones(1))
    assert watching() is None


def test_not_more_is_remembered_than_fits(monkeypatch):
    monkeypatch.setattr(launching, "_REMEMBERED", 2)
    counted = Counted(plus)
    for size in (1, 2, 3, 3, 1):
        counted.call(torch.ones(size), torch.ones(size))
    assert counted.ran == 4 and len(counted.call.programs) <= 2


@pytest.mark.parametrize(("on_gpu", "has_triton"), [(True, True), (True, False), (False, True)])
def test_an_op_runs_by_triton_on_the_gpu_of_its_first_tensor(monkeypatch, on_gpu, has_triton):
    devices, current = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(launching, "HAS_TRITON", has_triton)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    call = by_device(
        lambda first, number: devices.extend(current) or ("triton", number), lambda first, number: ("aten", number)
    )
    first = SimpleNamespace(is_cuda=on_gpu)
    by_triton = on_gpu and has_triton
    assert call(first, 3) == ("triton" if by_triton else "aten", 3)
    assert devices == ([first] if by_triton else [])


@pytest.mark.gpu
@pytest.mark.parametrize("length", [3000, 20000])
@pytest.mark.parametrize("floor", [None, 256])
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.5}, {"coverage": 0.02}])
def test_sparse_attention_is_replayed(budget, length, floor):
    options = Options(0.1, 128, 7, None, None, 256, None, False, "auto")
    options = dataclasses.replace(options, **budget, floor_window=floor)
    steps = (fused._best,) if "keep_ratio" in budget else (fused._scored_here, fused._selected)
    steps = (*steps, fused._compressed, fused._decompressed if floor is None else fused._merged)
    for step in steps:
        step.programs.clear()
    for seed in range(3):
        torch.manual_seed(seed)
        qkv = torch.randn(1, length, 12, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        query, key, value = qkv[:, :8], qkv[:, 8:10], qkv[:, 10:]
        found = sparse_triton(query, key, value, options)
        for step in steps:
            assert step.programs and None not in step.programs.values()
        with launching._Notes():  # who watches sees the functions themselves run
            expected = sparse_triton(query, key, value, options)
        assert torch.equal(found, expected)
