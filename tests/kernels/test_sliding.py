"""tsa::sliding_attention: every row, pad rows included, equals dense attention with the mask that it stands for."""

import functools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.kernels import reference, sliding
from tsa_compile.kernels.floor import near_triton
from tsa_compile.kernels.padded import valid_ranges
from tsa_compile.kernels.sliding import (
    padded_sliding_attention,
    padded_sliding_attention_aten,
    sliding_attention,
    sliding_attention_aten,
)

from .support import PADDINGS, TOLERANCE, close, make_padding, poison_padding, qkv

operands = functools.partial(qkv, seq_len=45)
WINDOWS = [1, 2, 9, 44, 45, 2**40]


def expected(inputs, padding, window, mean_rows=False, scale=0.2):
    wide = (tensor.cpu().double() for tensor in inputs)
    return reference.padded_attention(*wide, None if padding is None else padding.cpu(), scale, mean_rows, window)


def run(inputs, padding, window, mean_rows=False, scale=0.2):
    if padding is None:
        return sliding_attention(*inputs, scale, window)
    return padded_sliding_attention(*inputs, padding, valid_ranges(padding), scale, window, mean_rows)


def check(inputs, padding, window, mean_rows=False, scale=0.2):
    out = run(inputs, padding, window, mean_rows, scale)
    heads, width = out.shape[1], inputs[2].shape[3]
    assert out.dtype == inputs[0].dtype and out.stride()[1:] == (width, heads * width, 1)
    close(out.cpu(), expected(inputs, padding, window, mean_rows, scale), out.dtype)


@pytest.mark.parametrize("mean_rows", [False, True])
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("window", WINDOWS)
def test_every_row_equals_the_masked_attention(device, window, kind, mean_rows, monkeypatch):
    monkeypatch.setattr(sliding, "ROWS", 8)
    check(operands(device=device), make_padding(kind, 2, 45, device), window, mean_rows)


@pytest.mark.parametrize("mean_rows", [False, True])
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("rows, window", [(1, 1), (7, 9), (7, 2**40), (30, 2), (44, 20)])
def test_queries_behind_a_cache(device, rows, window, kind, mean_rows, monkeypatch):
    monkeypatch.setattr(sliding, "ROWS", 8)
    query, key, value = operands(device=device)
    check((query[:, :, 45 - rows :], key, value), make_padding(kind, 2, 45, device), window, mean_rows)


@pytest.mark.parametrize("window", [1, 9, 45, 200])
@pytest.mark.parametrize("layout", ["BLHD", "BHLD", "packed", "strided", "odd"])
def test_the_kernel_equals_the_reference(triton_device, window, layout):
    inputs = operands(device=triton_device, layout=layout, value_dim=48)
    close(near_triton(*inputs, 0.2, window).cpu(), expected(inputs, None, window))
    chunk = (inputs[0][:, :, 25:], *inputs[1:])
    close(near_triton(*chunk, 0.2, window).cpu(), expected(chunk, None, window))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads, kv_heads, dim, value_dim", [(4, 1, 80, 80), (3, 3, 96, 48), (2, 1, 512, 256)])
def test_dtypes_sharing_and_head_sizes(device, dtype, heads, kv_heads, dim, value_dim):
    inputs = operands(2, heads, kv_heads, dim=dim, value_dim=value_dim, dtype=dtype, device=device)
    for kind in (None, "left", "holes"):
        check(inputs, make_padding(kind, 2, 45, device), 9, scale=dim**-0.5)


@given(
    st.integers(1, 70), st.integers(1, 90), st.sampled_from(PADDINGS), st.booleans(), st.integers(1, 70),
    st.sampled_from([1, 8, 64]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_every_form_agrees(length, window, kind, mean_rows, rows, block):
    (query, *keys), padding = qkv(2, seq_len=length, dim=8), make_padding(kind, 2, length)
    inputs = (query[:, :, max(length - rows, 0) :], *keys)
    wanted = expected(inputs, padding, window, mean_rows)
    close(run(inputs, padding, window, mean_rows), wanted)
    with mock.patch.object(sliding, "LEAST_BLOCK", block):
        if padding is None:
            close(sliding_attention_aten(*inputs, 0.2, window), wanted)
        else:
            close(padded_sliding_attention_aten(*inputs, padding, None, 0.2, window, mean_rows), wanted)


@pytest.mark.parametrize("kind", ["left", "right"])
def test_what_lies_in_pads_reaches_no_valid_row(device, kind):
    padding = make_padding(kind, 2, 45, device)
    inputs = operands(device=device)
    before, after = run(inputs, padding, 9), run([poison_padding(x, padding) for x in inputs], padding, 9)
    assert torch.equal(before.transpose(1, 2)[padding], after.transpose(1, 2)[padding])


@pytest.mark.parametrize("kind", [None, "left", "holes"])
def test_opcheck(device, kind):
    padding, inputs = make_padding(kind, 2, 45, device), operands(device=device, value_dim=48)
    if padding is None:
        torch.library.opcheck(torch.ops.tsa.sliding_attention.default, (*inputs, 0.2, 9))
    else:
        arguments = (*inputs, padding, valid_ranges(padding), 0.2, 9, True)
        torch.library.opcheck(torch.ops.tsa.padded_sliding_attention.default, arguments)


def test_what_does_not_fit_is_refused():
    query, key, value = operands()
    with pytest.raises(ValueError, match=r"tsa::sliding_attention: 45 queries over 40 keys"):
        sliding_attention(query, key[:, :, 5:], value[:, :, 5:], 0.2, 9)
    with pytest.raises(ValueError, match="a window of 0 tokens; expected at least 1"):
        sliding_attention(query, key, value, 0.2, 0)
    with pytest.raises(ValueError, match="padding"):
        padded_sliding_attention(query, key, value, torch.ones(2, 9), torch.zeros(2, 3), 0.2, 9, False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim, window", [(64, 128), (128, 1024), (128, 4096), (256, 1024), (512, 512)])
def test_real_sizes(dtype, dim, window):
    inputs = qkv(1, 4, 2, 3001, dim, dtype=dtype, device="cuda")
    for kind in (None, "left"):
        check(inputs, make_padding(kind, 1, 3001, "cuda"), window, scale=dim**-0.5)


@pytest.mark.gpu
def test_a_new_length_compiles_nothing():
    from tsa_compile.kernels.floor import _floor_kernel

    def compiled():
        return sum(len(cache[0]) for cache in _floor_kernel.device_caches.values())

    def attend(length, window):
        sliding_attention(*qkv(1, 4, 2, length, 64, dtype=torch.bfloat16, device="cuda"), 0.125, window)

    attend(2048, 128)
    before = compiled()
    for length, window in ((4096, 128), (3001, 128), (2048, 1024), (17, 5)):
        attend(length, window)
    assert compiled() == before
