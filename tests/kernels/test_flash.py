"""flash_triton: real rows equal the reference's whatever the count, the layout and the tiles; the others are not touched."""

import functools

import pytest
import torch

from tsa_compile.kernels import reference
from tsa_compile.kernels.flash import _flash_kernel, flash_triton, run, supports
from tsa_compile.kernels.registry import KernelRequest
from tsa_compile.kernels.tiles import Tiles, choose_tiles, descriptor, tma_fits

from .support import TOLERANCE, poison_behind, qkv, tensor

SENTINEL = 77.0

PLAIN = Tiles(32, 16, 4, 2)
VARIANTS = {
    "plain": PLAIN,
    "tma": PLAIN._replace(use_tma=True),
    "lag": PLAIN._replace(lag=True),
    "one diagonal tile": Tiles(16, 16, 4, 2, lag=True),
    "all": PLAIN._replace(use_tma=True, lag=True, heads_inner=True),
}


operands = functools.partial(qkv, heads=2, kv_heads=1, seq_len=70, layout="BHLD")


def check(inputs, counts, tiles=PLAIN, scale=0.2, tolerance=None):
    """Filler is NaN on the way in and not written on the way out."""
    query, _, value = inputs
    count = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=query.device)
    expected = reference.attend(*(t.double() for t in inputs), count, scale)
    counts = counts or [query.shape[2]] * len(query)
    tolerance = tolerance or TOLERANCE[query.dtype]
    inputs = tuple(poison_behind(t, counts) for t in inputs)
    out = query.new_full((*query.shape[:3], value.shape[3]), SENTINEL)
    assert flash_triton(*inputs, scale, count, out=out, tiles=tiles) is out
    for b, n in enumerate(counts):
        error = (out[b, :, :n].double() - expected[b, :, :n]).abs()
        assert (error <= tolerance * (1 + expected[b, :, :n].abs())).all(), f"item {b}: {error.max()}"
        assert (out[b, :, n:] == SENTINEL).all()


@pytest.mark.parametrize("tiles", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("counts", [None, [70, 33], [0, 64], [1, 69]])
def test_equals_reference(triton_device, tiles, counts):
    check(operands(device=triton_device), counts, tiles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (3, 3)])
@pytest.mark.parametrize("dim, value_dim", [(80, 80), (96, 48), (64, 128), (8, 33), (256, 256), (512, 320)])
def test_dtypes_sharing_and_head_sizes(triton_device, dtype, heads, kv_heads, dim, value_dim):
    if dtype == torch.bfloat16 and triton_device == "cpu":
        pytest.skip("the interpreter's bfloat16 products are wrong")
    inputs = qkv(1, heads, kv_heads, 41, dim, value_dim, dtype, triton_device, "BHLD")
    check(inputs, [37], VARIANTS["all"])


@pytest.mark.parametrize("capacity", [1, 2, 15, 16, 17, 32, 33, 65])
def test_lengths(triton_device, capacity):
    inputs = operands(1, heads=2, kv_heads=2, seq_len=capacity, device=triton_device)
    check(inputs, None, VARIANTS["all"])
    check(inputs, [capacity // 2], VARIANTS["plain"])


@pytest.mark.parametrize("layout", ["BLHD", "packed", "strided", "odd", "shared"])
@pytest.mark.parametrize("tiles", [VARIANTS["plain"], VARIANTS["all"]], ids=["plain", "all"])
def test_layouts(triton_device, layout, tiles):
    check(operands(seq_len=40, device=triton_device, layout=layout), [40, 21], tiles)


def test_layouts_may_differ(triton_device):
    query, _, value = operands(1, heads=2, kv_heads=2, seq_len=40, dim=32, value_dim=48, device=triton_device, layout="BLHD")
    _, key, _ = operands(1, heads=2, kv_heads=2, seq_len=40, dim=32, value_dim=48, device=triton_device, layout="odd")
    check((query, key, value), [37], VARIANTS["all"])


def test_out_of_any_layout(triton_device):
    inputs = operands(1, heads=2, kv_heads=2, seq_len=40, device=triton_device)
    out = torch.full((1, 40, 2, 32), SENTINEL, device=triton_device).transpose(1, 2)
    count = torch.tensor([33], dtype=torch.int32, device=triton_device)
    flash_triton(*inputs, 0.2, count, out=out, tiles=PLAIN)
    expected = flash_triton(*inputs, 0.2, count, tiles=PLAIN)
    assert expected.is_contiguous()
    assert torch.equal(out[:, :, :33], expected[:, :, :33]) and (out[:, :, 33:] == SENTINEL).all()


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("lag", [False, True])
def test_scales(triton_device, scale, lag):
    check(operands(1, heads=2, kv_heads=1, seq_len=40, device=triton_device), None, PLAIN._replace(lag=lag), scale)


def test_large_logits(triton_device):
    """Scores whose exponentials would leave float32 on either side: the maximum is that of real scores alone."""
    query, key, value = operands(1, device=triton_device)
    for shift in (-5.0, 5.0):
        check((torch.ones_like(query), key + shift, value), [68], VARIANTS["all"], scale=1.0, tolerance=1e-3)


def test_counts_beyond_the_capacity_and_strided_counts(triton_device):
    inputs = operands(device=triton_device)
    counts = torch.tensor([[99, 0], [33, 0]], dtype=torch.int32, device=triton_device)[:, 0]
    out = flash_triton(*inputs, 0.2, counts, tiles=PLAIN)
    assert torch.equal(out[0], flash_triton(*inputs, 0.2, tiles=PLAIN)[0])
    assert torch.equal(out[1, :, :33], flash_triton(*inputs, 0.2, tiles=PLAIN)[1, :, :33])


def test_tiles_by_default(triton_device):
    check(operands(1, heads=2, kv_heads=1, seq_len=40, device=triton_device), [37], tiles=None)


def test_nothing_to_do(triton_device):
    query, key, value = operands(0, device=triton_device)
    assert flash_triton(query, key, value, 0.2).shape == (0, 2, 70, 32)


def test_tma_fits_where_steps_are_of_16_bytes():
    def fits(layout, dim=32, dtype=torch.float16):
        return tma_fits(tensor(2, 2, 20, dim, layout, dtype, "cpu"))

    assert fits("BHLD") and fits("BLHD") and fits("packed") and fits("BHLD", 36, torch.float32)
    assert not fits("odd") and not fits("shared") and not fits("BHLD", 36)
    assert not tma_fits(torch.zeros(2 * 20 * 32 + 1, dtype=torch.float16)[1:].view(1, 2, 20, 32))


def test_descriptor_of_dimensions_of_one_element():
    pytest.importorskip("triton")
    one = torch.zeros(1000, dtype=torch.float16).as_strided((1, 1, 20, 40), (7, 3, 40, 1))
    assert tma_fits(one)
    view = descriptor(one, 16)
    assert view.block_shape == [1, 1, 16, 64]
    assert all(stride % 8 == 0 for stride in view.strides[:3])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("hopper", [False, True])
def test_every_default_has_whole_diagonals(dtype, hopper):
    for block_d in (16, 32, 64, 128, 256, 512):
        tiles = choose_tiles(dtype, block_d, hopper)
        assert tiles.block_m % tiles.block_n == 0


def request(**changes):
    fields = dict(device_type="cuda", dtype=torch.bfloat16, head_dim=128, value_head_dim=64, heads=8, kv_heads=2)
    return KernelRequest(**{**fields, "capability": (9, 0), **changes})


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(device_type="cpu", capability=None), "CUDA devices only, not on cpu"),
        (dict(dtype=torch.float64), "not torch.float64"),
        (dict(value_head_dim=513), "at most 512, not 128 and 513"),
        (dict(capability=(7, 5)), "8.0, not 7.5"),
    ],
)
def test_what_it_does_not_support(changes, reason):
    pytest.importorskip("triton")
    assert supports(request()) is None and supports(request(dtype=torch.float32, head_dim=512)) is None
    assert reason in supports(request(**changes))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["BHLD", "BLHD", "shared", "odd"])
@pytest.mark.parametrize("dim, value_dim", [(128, 128), (64, 64), (80, 96), (256, 256), (192, 128), (512, 512), (320, 64)])
def test_default_tiles(layout, dim, value_dim):
    inputs = qkv(2, 4, 2, 1100, dim, value_dim, torch.bfloat16, "cuda", layout)
    check(inputs, [1100, 517], tiles=None, scale=dim**-0.5)
    check(inputs, [0, 1], tiles=None, scale=dim**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "block_n, num_stages, use_tma, lag",
    [(64, 3, False, False), (64, 3, True, True), (128, 2, True, True), (64, 3, False, True)],
)
def test_large_tiles(block_n, num_stages, use_tma, lag):
    """The pipelines that only large tiles have: many steps, asynchronous products."""
    inputs = operands(1, heads=4, kv_heads=2, seq_len=3000, dim=128, dtype=torch.bfloat16, device="cuda")
    check(inputs, [2900], Tiles(128, block_n, 8, num_stages, use_tma, lag), scale=128**-0.5)


@pytest.mark.gpu
def test_the_same_every_time():
    """A race between a tile's copy and its use would show as a difference."""
    inputs = operands(1, heads=16, kv_heads=4, seq_len=8000, dim=128, dtype=torch.bfloat16, device="cuda")
    first = flash_triton(*inputs, 128**-0.5)
    assert all(torch.equal(first, flash_triton(*inputs, 128**-0.5)) for _ in range(10))


@pytest.mark.gpu
def test_captured_graph_replays_with_another_count():
    inputs = operands(2, heads=8, kv_heads=2, seq_len=700, dim=64, dtype=torch.bfloat16, device="cuda")
    count = torch.tensor([300, 700], dtype=torch.int32, device="cuda")
    run(*inputs, 0.2, count)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*inputs, 0.2, count)
    for counts in ([300, 700], [700, 123], [0, 1]):
        count.copy_(torch.tensor(counts, dtype=torch.int32))
        graph.replay()
        expected = reference.attend(*(t.double() for t in inputs), count, 0.2)
        for b, n in enumerate(counts):
            torch.testing.assert_close(out[b, :, :n].double(), expected[b, :, :n], rtol=0, atol=2e-2)


@pytest.mark.gpu
def test_a_new_length_compiles_nothing():
    def compiled(capacity):
        inputs = operands(1, heads=4, kv_heads=2, seq_len=capacity, dim=128, dtype=torch.bfloat16, device="cuda")
        flash_triton(*inputs, 0.1, torch.tensor([capacity // 2], dtype=torch.int32, device="cuda"))
        return sum(len(cache[0]) for cache in _flash_kernel.device_caches.values())

    before = compiled(1000)
    assert [compiled(n) for n in (1, 16, 17, *range(100, 3700, 100), 4096)] == [before] * 40
