"""tsa::score: the Triton kernels and the ATen form equal the reference, infinities included."""

import pytest
import torch

from tsa_compile.kernels import reference
from tsa_compile.kernels.score import score, score_aten, score_triton
from tsa_compile.kernels.select import select

from .support import FAULTS, FLOATS, PADDINGS, damaged, make_padding, poison_padding, qkv

# The interpreter computes with numpy, which warns of log2(0) and 0 / 0 in lanes that are masked later.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|All-NaN slice):RuntimeWarning")


def query_and_key(seq_len=100, sharpness=2.0, **options):
    """query and key; a larger sharpness concentrates the attention."""
    query, key, _ = qkv(seq_len=seq_len, **options)
    return sharpness * query, key


REDUCED = pytest.mark.parametrize("reduce", ["mean", "max"])


def assert_scores(got, query, key, padding, scale, window, pool, reduce="mean", rtol=2e-5):
    """Against a float64 evaluation: infinities in the same places, candidates to float32's accuracy."""
    want = reference.score(query.double(), key.double(), padding, scale, window, pool, reduce)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-12, equal_nan=True)


@REDUCED
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("window", [1, 20, 40])
def test_kernels_equal_reference_under_every_padding(triton_device, kind, window, reduce):
    padding = make_padding(kind, 2, 100, triton_device)
    query, key = (poison_padding(t, padding) for t in query_and_key(device=triton_device))
    got = score_triton(query, key, padding, 0.2, window, 7, reduce)
    assert_scores(got, query, key, padding, 0.2, window, 7, reduce)


@pytest.mark.parametrize("layout", ["BLHD", "BHLD", "packed", "strided"])
def test_kernels_equal_reference_in_every_layout(triton_device, layout):
    query, key = query_and_key(layout=layout, device=triton_device)
    assert_scores(score_triton(query, key, None, 0.2, 16, 3), query, key, None, 0.2, 16, 3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [32, 33, 80, 96, 256, 512])
def test_kernels_equal_reference_at_every_head_size(triton_device, dtype, dim):
    if triton_device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    query, key = query_and_key(batch=1, heads=2, kv_heads=1, dim=dim, dtype=dtype, device=triton_device)
    assert_scores(score_triton(query, key, None, 0.1, 16, 7), query, key, None, 0.1, 16, 7)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (8, 2), (6, 1)])
@pytest.mark.parametrize("seq_len, window, pool", [(1, 1, 1), (7, 20, 7), (64, 64, 3), (65, 64, 7), (200, 70, 1)])
def test_kernels_equal_reference_at_every_length(triton_device, heads, kv_heads, seq_len, window, pool):
    query, key = query_and_key(seq_len, batch=1, heads=heads, kv_heads=kv_heads, device=triton_device)
    got = score_triton(query, key, None, 0.2, window, pool, "max")
    assert_scores(got, query, key, None, 0.2, window, pool, "max")


@REDUCED
@pytest.mark.parametrize("kind", [None, "left", "holes"])
def test_kernels_equal_reference_over_several_splits(triton_device, kind, reduce):
    padding = make_padding(kind, 2, 300, triton_device)
    query, key = (poison_padding(t, padding) for t in query_and_key(seq_len=300, device=triton_device, sharpness=6.0))
    got = score_triton(query, key, padding, 0.2, 40, 7, reduce, split_len=64)
    assert_scores(got, query, key, padding, 0.2, 40, 7, reduce)


@pytest.mark.parametrize("kind", [None, "left", "holes"])
def test_an_item_scores_alone_as_in_its_batch(triton_device, kind):
    padding = make_padding(kind, 2, 150, triton_device)
    query, key = query_and_key(seq_len=150, device=triton_device)
    together = score_triton(query, key, padding, 0.2, 20, 7, split_len=64)
    for b in range(2):
        item = slice(b, b + 1)
        mask = None if padding is None else padding[item]
        assert torch.equal(score_triton(query[item], key[item], mask, 0.2, 20, 7, split_len=64), together[item])


@REDUCED
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("window, pool", [(1, 1), (40, 7), (70, 5), (200, 3)])
def test_aten_form_equals_reference(device, kind, window, pool, reduce):
    padding = make_padding(kind, 2, 100, device)
    query, key = (poison_padding(t, padding) for t in query_and_key(device=device))
    assert_scores(score_aten(query, key, padding, 0.2, window, pool, reduce), query, key, padding, 0.2, window, pool, reduce)


@REDUCED
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", [None, "left", "holes"])
def test_kernels_equal_reference_with_faulty_numbers(triton_device, kind, fault, reduce):
    padding = make_padding(kind, 2, 100, triton_device)
    query, key = (poison_padding(t, padding) for t in damaged(fault, *query_and_key(device=triton_device)))
    got = score_triton(query, key, padding, 0.2, 20, 7, reduce, split_len=64)
    assert_scores(got, query, key, padding, 0.2, 20, 7, reduce)


@REDUCED
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", [None, "left", "holes"])
@pytest.mark.parametrize("window", [20, 40])
def test_aten_form_equals_reference_with_faulty_numbers(device, kind, fault, window, reduce):
    padding = make_padding(kind, 2, 100, device)
    query, key = (poison_padding(t, padding) for t in damaged(fault, *query_and_key(device=device)))
    assert_scores(score_aten(query, key, padding, 0.2, window, 7, reduce), query, key, padding, 0.2, window, 7, reduce)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", [None, "left", "holes"])
def test_no_fault_looks_like_the_window_or_padding(device, kind, fault):
    padding = make_padding(kind, 2, 100, device)
    query, key = query_and_key(device=device)
    sound = score(query, key, padding, 0.2, 20, 7)
    faulty = score(*damaged(fault, query, key), padding, 0.2, 20, 7)
    assert torch.equal(faulty.isposinf(), sound.isposinf())
    assert torch.equal(faulty.isneginf(), sound.isneginf())


@REDUCED
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_pads_that_a_chunk_begins_with_are_no_rows_of_the_window(device, fault, reduce):
    """Fewer rows than the window has are valid: in the places of the others stands the chunk's first row."""
    query, key = query_and_key(24, batch=1, device=device)
    query, padding = query[:, :, -6:].clone(), torch.ones(1, 24, dtype=torch.bool, device=device)
    query[:, :, :2], padding[:, 18:20] = fault, False
    assert_scores(score(query, key, padding, 0.3, 5, 3, reduce), query, key, padding, 0.3, 5, 3, reduce)


def test_a_nan_score_says_where_the_fault_is(device):
    """One key's NaN is its own, whatever the pooling; one query's is nobody's, so that all candidates share it."""
    query, key = query_and_key(device=device)
    for fault, places in (("NaN key", [25]), ("NaN keys", range(25, 55, 4)), ("NaN query in the window", range(80))):
        nan = score(*damaged(fault, query, key), None, 0.2, 20, 7).isnan()
        wanted = torch.zeros(100, dtype=torch.bool, device=device)
        wanted[list(places)] = True
        assert torch.equal(nan, wanted.expand_as(nan))
    assert not score(*damaged("NaN key in the window", query, key), None, 0.2, 20, 7).isnan().any()


@REDUCED
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", [None, "holes"])
def test_op_equals_reference(device, dtype, kind, reduce):
    padding = make_padding(kind, 3, 100, device)
    query, key = query_and_key(batch=3, heads=6, kv_heads=2, dim=64, dtype=dtype, device=device)
    assert_scores(score(query, key, padding, 0.1, 24, 7, reduce), query, key, padding, 0.1, 24, 7, reduce)


@pytest.mark.parametrize("dtype", FLOATS)
def test_selected_sets_agree_with_float64_but_for_ties(device, dtype):
    query, key = query_and_key(seq_len=400, dtype=dtype, device=device)
    wide = reference.score(query.double(), key.double(), None, 0.2, 16, 7)
    got = select(score(query, key, None, 0.2, 16, 7), None, 200)
    want = reference.select(wide, None, 200)
    for row, mine, theirs in zip(wide.flatten(0, 1), got.flatten(0, 1).tolist(), want.flatten(0, 1).tolist()):
        threshold = row[theirs].min()
        disputed = row[sorted(set(mine) ^ set(theirs))]
        assert ((disputed - threshold).abs() <= 1e-5 * threshold).all()


@REDUCED
@pytest.mark.parametrize("kind", [None, "left"])
def test_opcheck(device, kind, reduce):
    query, key = query_and_key(device=device)
    torch.library.opcheck(score, (query, key, make_padding(kind, 2, 100, device), 0.2, 16, 7, reduce))


def test_what_does_not_fit_is_refused():
    query, key = query_and_key()
    padding = make_padding("left", 2, 100)
    for wrong, message in (
        ((query, key[:, :, 1:], None, 0.2, 16, 7), r"key \(2, 2, 99, 32\)"),
        ((query[:, :3], key, None, 0.2, 16, 7), r"query \(2, 3, 100, 32\)"),
        ((query, key, padding[:, 1:], 0.2, 16, 7), r"\(2, 99\)"),
        ((query, key, padding.int(), 0.2, 16, 7), "int32"),
        ((query, key, None, 0.2, 0, 7), "window 0"),
        ((query, key, None, 0.2, 16, 4), "pool 4"),
        ((query, key, None, 0.2, 16, 7, "median"), "reduce is 'median'; expected one of mean, max"),
    ):
        with pytest.raises(ValueError, match=message):
            score(*wrong)


@REDUCED
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, "left", "holes"])
@pytest.mark.parametrize(
    "heads, kv_heads, dim, window", [(8, 2, 128, 128), (4, 4, 64, 500), (4, 1, 256, 128), (4, 2, 512, 128)]
)
def test_real_sizes(poisoned_empty, dtype, kind, heads, kv_heads, dim, window, reduce):
    padding = make_padding(kind, 2, 9001, "cuda")
    query, key = (
        poison_padding(t, padding)
        for t in query_and_key(9001, 4.0, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, device="cuda")
    )
    got = score(query, key, padding, dim**-0.5, window, 7, reduce)
    want = score_aten(query.double(), key.double(), padding, dim**-0.5, window, 7, reduce)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-12)
    assert torch.equal(score(query, key, padding, dim**-0.5, window, 7, reduce), got)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    padding = make_padding("left", 2, 1000, "cuda")
    query, key = query_and_key(seq_len=1000, device="cuda")
    score(query, key, padding, 0.2, 16, 7)
    torch.cuda.set_sync_debug_mode("error")
    try:
        score(query, key, padding, 0.2, 16, 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "left"])
def test_a_new_length_compiles_nothing(kind):
    from tsa_compile.kernels import score as module

    kernels = [value for name, value in vars(module).items() if name.endswith("_kernel")]

    def run(seq_len):
        query, key = query_and_key(seq_len=seq_len, dim=64, dtype=torch.bfloat16, device="cuda")
        score(query, key, make_padding(kind, 2, seq_len, "cuda"), 0.2, 100, 7)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    warm = [run(seq_len) for seq_len in (512, 1001)][-1]
    assert [run(seq_len) for seq_len in (600, 777, 1024, 4097, 20000, 33333)][-1] == warm
