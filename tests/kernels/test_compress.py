"""tsa::compress: gathered rows equal the reference's, from any layout, at any sharing of heads."""

import functools

import pytest
import torch

from tsa_compile.kernels import reference
from tsa_compile.kernels.compress import compress, compress_aten, compress_triton
from tsa_compile.kernels.tiles import row_alignment

from .support import FLOATS, choose_tokens, qkv

operands = functools.partial(qkv, seq_len=37)


def assert_gathered(outputs, expected, counts):
    """Equal up to the zeros that follow count: 256 of them, or to the end."""
    for got, want in zip(outputs, expected):
        assert got.is_contiguous() and got.shape == want.shape and got.dtype == want.dtype
        for b, count in enumerate(counts):
            torch.testing.assert_close(got[b, :, : count + 256], want[b, :, : count + 256], rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["BLHD", "BHLD", "packed", "strided"])
@pytest.mark.parametrize("selections", [4, 2])
def test_kernel_equals_reference_in_every_layout(triton_device, layout, selections):
    inputs = operands(layout=layout, device=triton_device)
    counts = [23, 5]
    indices, count = choose_tokens(counts, selections, 37, 30, triton_device)
    assert_gathered(compress_triton(*inputs, indices, count), reference.compress(*inputs, indices, count), counts)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim, value_dim", [(32, 32), (64, 80), (80, 96), (96, 48), (33, 32), (256, 128), (512, 512)])
def test_kernel_equals_reference_at_every_head_size(triton_device, dtype, dim, value_dim):
    inputs = operands(
        batch=1, heads=2, kv_heads=1, seq_len=19, dim=dim, value_dim=value_dim, dtype=dtype, device=triton_device
    )
    indices, count = choose_tokens([11], 2, 19, 19, triton_device)
    assert_gathered(compress_triton(*inputs, indices, count), reference.compress(*inputs, indices, count), [11])


@pytest.mark.parametrize("counts", [[0, 1], [300, 256], [257, 700]])
def test_rows_behind_count_are_zero_and_tiles_beyond_are_skipped(triton_device, counts):
    inputs = operands(heads=1, kv_heads=1, seq_len=701, device=triton_device)
    indices, count = choose_tokens(counts, 1, 701, 701, triton_device)
    outputs = compress_triton(*inputs, indices, count)
    assert_gathered(outputs, reference.compress(*inputs, indices, count), counts)
    if min(counts) == 0:
        assert outputs[0][0, :, 512:].isnan().all(), "work does not follow the count"


def test_without_count_every_slot_is_real(triton_device):
    inputs = operands(device=triton_device)
    indices, _ = choose_tokens([20, 20], 4, 37, 20, triton_device)
    assert_gathered(compress_triton(*inputs, indices, None), reference.compress(*inputs, indices, None), [20, 20])


def test_filler_may_point_at_poison(triton_device, device):
    """Filler holds L - 1, and that token may be NaN where it is padding."""
    for run, where in ((compress_triton, triton_device), (compress, device)):
        inputs = operands(device=where)
        for tensor in inputs:
            tensor[:, :, -1] = float("nan")
        indices, count = choose_tokens([0, 0], 4, 37, 30, where)
        assert all((out == 0).all() for out in run(*inputs, indices, count))


def test_sliced_indices_and_heads(triton_device):
    """A group of heads at a time, as streaming needs it: every input a view."""
    query, key, value = operands(heads=8, kv_heads=4, device=triton_device)
    indices, count = choose_tokens([9, 30], 8, 37, 37, triton_device)
    part = query[:, 2:6], key[:, 1:3], value[:, 1:3], indices[:, 2:6], count
    assert_gathered(compress_triton(*part), reference.compress(*part), [9, 30])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kv_heads, selections", [(4, 4), (2, 4), (2, 2), (1, 4), (1, 1)])
def test_op_equals_reference(device, dtype, kv_heads, selections):
    inputs = operands(batch=3, kv_heads=kv_heads, dim=80, value_dim=96, dtype=dtype, device=device)
    counts = [37, 0, 12]
    indices, count = choose_tokens(counts, selections, 37, 37, device)
    expected = reference.compress(*inputs, indices, count)
    assert_gathered(compress(*inputs, indices, count), expected, counts)


def test_aten_form_equals_reference(device):
    inputs = operands(value_dim=48, device=device)
    indices, count = choose_tokens([20, 7], 2, 37, 30, device)
    expected = reference.compress(*inputs, indices, count)
    for got, want in zip(compress_aten(*inputs, indices, count), expected):
        assert torch.equal(got, want)


def test_what_does_not_fit_is_refused():
    query, key, value = operands()
    indices, count = choose_tokens([20, 7], 4, 37, 30)
    for wrong, message in (
        ((query, key[:, :, 1:], value, indices, count), r"key \(2, 2, 36, 32\)"),
        ((query, key, value.half(), indices, count), "float16"),
        ((query, key, value, indices[:, :3], count), r"indices \(2, 3, 30\)"),
        ((query, key, value, indices, count[:1]), r"count \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(*wrong)


@pytest.mark.parametrize("capacity", [0, 1])
def test_empty_and_single_slots(device, capacity):
    inputs = operands(device=device)
    indices, count = choose_tokens([capacity, 0], 4, 37, capacity, device)
    assert_gathered(compress(*inputs, indices, count), reference.compress(*inputs, indices, count), [capacity, 0])


@pytest.mark.parametrize("with_count", [True, False])
@pytest.mark.parametrize("selections", [4, 2])
def test_opcheck(device, with_count, selections):
    inputs = operands(device=device)
    indices, count = choose_tokens([20, 20], selections, 37, 20, device)
    torch.library.opcheck(compress, (*inputs, indices, count if with_count else None))


def test_row_alignment_sees_rows_that_are_not_aligned():
    assert row_alignment(torch.empty(2, 3, 5, 64, dtype=torch.bfloat16)) == 8
    assert row_alignment(torch.empty(2, 3, 5, 64)) == 4
    assert row_alignment(torch.empty(2, 3, 5, 63)) == 1
    assert row_alignment(torch.empty(2, 3, 5, 65)[..., :64]) == 1


@pytest.mark.gpu
def test_a_new_length_compiles_nothing():
    from tsa_compile.kernels.compress import _compress_kernel

    def run(seq_len):
        inputs = operands(batch=1, seq_len=seq_len, dim=128, dtype=torch.bfloat16, device="cuda")
        indices, count = choose_tokens([seq_len // 2], 4, seq_len, seq_len, "cuda")
        compress_triton(*inputs, indices, count)
        return sum(len(cache[0]) for cache in _compress_kernel.device_caches.values())

    compiled = run(1000)
    assert [run(n) for n in (1, 16, 17, 1024, 2000, 4096)] == [compiled] * 6
