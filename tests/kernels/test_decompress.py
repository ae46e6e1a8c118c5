"""tsa::decompress: every row in its place, every other row exactly 0, the layout [B, L, H, Dv]."""

import pytest
import torch

from tsa_compile.kernels import reference
from tsa_compile.kernels.decompress import decompress, decompress_aten, decompress_triton
from tsa_compile.kernels.launch import tl, triton
from tsa_compile.kernels.tiles import lower_bound

from .support import FLOATS, choose_tokens, poison_behind, tensor


def make_rows(
    counts, heads=4, selections=4, capacity=30, seq_len=37, dim=32, dtype=torch.float32, device="cpu"
):  # fmt: skip
    """Compressed rows, NaN from count on, with random ascending indices and the count."""
    rows = tensor(len(counts), heads, capacity, dim, "BHLD", dtype, device)
    return poison_behind(rows, counts), *choose_tokens(counts, selections, seq_len, capacity, device)


def assert_scattered(got, rows, indices, count, seq_len):
    _, heads, _, dim = rows.shape
    expected = reference.decompress(rows, indices, count, seq_len)
    assert got.dtype == rows.dtype and got.shape == expected.shape
    assert got.stride() == (seq_len * heads * dim, dim, heads * dim, 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("counts", [[23, 5], [0, 30], [1, 29]])
@pytest.mark.parametrize("selections", [4, 2, 1])
def test_kernel_equals_reference(triton_device, counts, selections):
    inputs = make_rows(counts, selections=selections, device=triton_device)
    assert_scattered(decompress_triton(*inputs, 37), *inputs, 37)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [33, 48, 80, 96, 128, 256, 512])
def test_kernel_equals_reference_at_every_head_size(triton_device, dtype, dim):
    inputs = make_rows([17], heads=2, selections=2, dim=dim, dtype=dtype, device=triton_device)
    assert_scattered(decompress_triton(*inputs, 37), *inputs, 37)


@pytest.mark.parametrize(
    "count, capacity, seq_len", [(700, 700, 700), (1030, 1100, 1101), (3, 1100, 1101), (900, 900, 1101)]
)
def test_search_over_long_rows(triton_device, count, capacity, seq_len):
    """More indices than the search asks for at once, on both sides of its powers."""
    inputs = make_rows([count], heads=1, selections=1, capacity=capacity, seq_len=seq_len, device=triton_device)
    assert_scattered(decompress_triton(*inputs, seq_len), *inputs, seq_len)


@triton.jit(do_not_specialize=["size"])
def search(p_sorted, p_targets, p_found, size, FAN: tl.constexpr):
    target = tl.load(p_targets + tl.program_id(0))
    tl.store(p_found + tl.program_id(0), lower_bound(p_sorted, target, size, FAN))


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 700, 1025])
def test_search_agrees_with_searchsorted(triton_device, size):
    torch.manual_seed(0)
    row = torch.randperm(2 * size + 1)[:size].sort().values.to(triton_device, torch.int32)
    targets = torch.randint(2 * size + 2, (100,), device=triton_device, dtype=torch.int32)
    found = torch.empty_like(targets)
    search[(100,)](row, targets, found, size, FAN=32)
    assert torch.equal(found, torch.searchsorted(row, targets, out_int32=True))


@pytest.mark.parametrize("where", ["front", "back", "both"])
def test_runs_of_neighbours(triton_device, where):
    """Tiles that are full, tiles that are empty."""
    rows, indices, count = make_rows([128], heads=1, selections=1, capacity=200, seq_len=320, device=triton_device)
    front, back = torch.arange(128), torch.arange(192, 320)
    chosen = {"front": front, "back": back, "both": torch.cat([front[:64], back[64:]])}[where]
    indices[0, 0, :128] = chosen.to(indices)
    assert_scattered(decompress_triton(rows, indices, count, 320), rows, indices, count, 320)


def test_without_count_every_slot_is_real(triton_device):
    rows, indices, _ = make_rows([30, 30], device=triton_device)
    assert_scattered(decompress_triton(rows, indices, None, 37), rows, indices, None, 37)


def test_any_strides(triton_device):
    """A group of heads at a time, and rows in another layout."""
    rows, indices, count = make_rows([9, 20], heads=8, selections=8, device=triton_device)
    part = rows[:, 2:6], indices[:, 2:6], count
    assert_scattered(decompress_triton(*part, 37), *part, 37)
    turned = rows.transpose(1, 2).contiguous().transpose(1, 2), indices, count
    assert_scattered(decompress_triton(*turned, 37), *turned, 37)
    strided = rows.transpose(2, 3).contiguous().transpose(2, 3), indices, count
    assert_scattered(decompress_triton(*strided, 37), *strided, 37)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("selections", [4, 2, 1])
def test_op_equals_reference(device, dtype, selections):
    inputs = make_rows([30, 0, 12], selections=selections, dim=80, dtype=dtype, device=device)
    assert_scattered(decompress(*inputs, 37), *inputs, 37)


def test_aten_form_equals_reference(device):
    inputs = make_rows([30, 3], selections=2, device=device)
    assert_scattered(decompress_aten(*inputs, 37), *inputs, 37)


def test_what_does_not_fit_is_refused():
    rows, indices, count = make_rows([30, 3])
    with pytest.raises(ValueError, match=r"indices \(2, 4, 29\)"):
        decompress(rows, indices[:, :, 1:], count, 37)
    with pytest.raises(ValueError, match=r"indices \(2, 3, 30\)"):
        decompress(rows, indices[:, :3], count, 37)
    with pytest.raises(ValueError, match=r"count \(1,\)"):
        decompress(rows, indices, count[:1], 37)


@pytest.mark.parametrize("capacity", [0, 1])
def test_empty_and_single_slots(device, capacity):
    inputs = make_rows([capacity, 0], capacity=capacity, device=device)
    assert_scattered(decompress(*inputs, 37), *inputs, 37)


@pytest.mark.parametrize("with_count", [True, False])
def test_opcheck(device, with_count):
    rows, indices, count = make_rows([30, 30], selections=2, device=device)
    torch.library.opcheck(decompress, (rows, indices, count if with_count else None, 37))


@pytest.mark.gpu
def test_a_new_length_compiles_nothing():
    from tsa_compile.kernels.decompress import _decompress_kernel

    def run(seq_len):
        inputs = make_rows([seq_len // 2], capacity=seq_len, seq_len=seq_len, dim=128, dtype=torch.bfloat16, device="cuda")
        decompress_triton(*inputs, seq_len)
        return sum(len(cache[0]) for cache in _decompress_kernel.device_caches.values())

    compiled = run(1000)
    assert [run(n) for n in (1, 16, 17, 1024, 2000, 4096)] == [compiled] * 6
