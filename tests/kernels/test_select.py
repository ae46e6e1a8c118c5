"""tsa::budget and tsa::select: radix select against sorting, with ties, infinities and nothing to choose from."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.config import ceil_fraction
from tsa_compile.kernels import reference
from tsa_compile.kernels.budget import budget, budget_aten, coverage_triton
from tsa_compile.kernels.select import select, select_by_sorting, select_triton

# The interpreter computes with numpy, which warns of conversions in lanes that are masked later.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


NANS = [0x7FC00000, 0x7F800001, -0x400000, -0x7FFFFF]  # the bits of quiet and signaling ones, of both signs


def make_scores(kind="smooth", batch=2, heads=3, seq_len=300, window=5, device="cpu"):
    """What tsa::score hands over: candidates, +inf in the window, -inf where padded (the same in every head)."""
    torch.manual_seed(0)
    scores = torch.rand(batch, heads, seq_len)
    if kind == "peaked":
        scores = (torch.randn(batch, heads, seq_len) * 5).softmax(dim=-1)
    elif kind == "tiny":  # down to denormal numbers
        scores = 10.0 ** (-45 + 10 * scores)
    elif kind == "few values":
        scores = (scores * 4).floor() / 4
    elif kind == "all equal":
        scores = torch.full_like(scores, 1 / seq_len)
    elif kind == "signed zeros":
        scores = torch.where(scores < 0.5, 0.0, -0.0)
    elif kind == "faulty":  # a head that is NaN throughout, and NaN of every sign and payload here and there
        scores[0, 0] = math.nan
        scores[1, -1, 4::9] = -math.nan
        scores[-1, :, 7:247:60] = torch.tensor(NANS, dtype=torch.int32).view(torch.float32)
    scores[..., seq_len - window :] = math.inf
    if kind == "padded":
        scores[0, :, : seq_len // 3] = -math.inf
        scores[-1, :, 3::2] = -math.inf
    elif kind == "no candidates":
        scores[0, :, :-window] = -math.inf
    elif kind == "nothing valid":
        scores[0] = -math.inf
    return scores.to(device)


KINDS = ["smooth", "peaked", "tiny", "few values", "all equal", "signed zeros", "padded", "no candidates"]
KINDS += ["nothing valid", "faulty"]


def counts(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


# Interpreted, a program takes its time: rows are few, and splits as short as their blocks allow.
ROW, SPLIT = {"short": 512}, {"short": 0, "splits": 2, "block": 32}


@pytest.mark.parametrize("path", [ROW, SPLIT])
@pytest.mark.parametrize("kind", KINDS)
def test_select_kernel_equals_reference(triton_device, kind, path):
    scores = make_scores(kind, heads=1, seq_len=253, device=triton_device)
    count = counts([120, 67], triton_device)
    want = reference.select(scores, count, 253)
    assert torch.equal(select_triton(scores, count, 253, **path), want)


@pytest.mark.parametrize("path", [ROW, {"short": 0, "splits": 16, "block": 128}])
@pytest.mark.parametrize("capacity, count", [(0, [3, 4]), (60, None), (60, [0, 128]), (150, [200, 1]), (150, None)])
def test_select_kernel_with_any_count_and_capacity(triton_device, capacity, count, path):
    scores = make_scores("few values", heads=2, seq_len=129, device=triton_device)
    count = None if count is None else counts(count, triton_device)
    want = reference.select(scores, count, capacity)
    assert torch.equal(select_triton(scores, count, capacity, **path), want)


def make_ties(kind, seq_len):
    """One row whose equal scores lie in several blocks and splits."""
    torch.manual_seed(1)
    row = torch.zeros(seq_len)
    if kind == "few above":
        row[::47] = torch.rand(row[::47].shape)
    elif kind == "runs":
        row = (torch.arange(seq_len) // 75 % 3) / 3
    elif kind == "below zero":
        row = -torch.randint(0, 3, (seq_len,)).float()
    elif kind == "third digit":  # floats that differ in the middle of their fractions alone
        row = 1 + torch.randint(0, 50, (seq_len,)) * 2.0**-14
    elif kind == "last digit":
        row = 1 + torch.randint(0, 50, (seq_len,)) * 2.0**-23
    return row


@pytest.mark.parametrize("path", [ROW, {"short": 0, "splits": 4, "block": 32}])
@pytest.mark.parametrize("kind", ["few above", "runs", "below zero", "third digit", "last digit"])
def test_ties_are_cut_in_any_block(triton_device, kind, path):
    count = counts([33, 116], triton_device)
    scores = make_ties(kind, 251).to(triton_device).expand(len(count), 1, 251)
    indices = select_triton(scores, count, 251, **path)
    assert torch.equal(indices, reference.select(scores, count, 251))


@pytest.mark.parametrize("seq_len", [8192, 8193, 32801])
def test_select_kernel_as_it_is_launched(triton_device, seq_len):
    scores = make_scores("padded", batch=1, heads=1, seq_len=seq_len, device=triton_device)
    count = counts([seq_len // 5], triton_device)
    indices = select_triton(scores, count, seq_len // 3)
    assert torch.equal(indices, select_by_sorting(scores, count, seq_len // 3))
    assert torch.equal(indices, select_triton(scores, count, seq_len // 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [[120, 7], [0, 1], [301, 150], None])
def test_select_by_sorting_form_equals_reference(device, kind, count):
    scores = make_scores(kind, device=device)
    count = None if count is None else counts(count, device)
    for capacity in (310, 300, 130, 1):
        assert torch.equal(select_by_sorting(scores, count, capacity), reference.select(scores, count, capacity))


@pytest.mark.parametrize("path", [ROW, SPLIT])
@pytest.mark.parametrize("seq_len", [1, 2, 31, 129])
def test_select_at_small_lengths(triton_device, seq_len, path):
    scores = make_scores("few values", batch=3, heads=1, seq_len=seq_len, window=1, device=triton_device)
    count = counts([seq_len, seq_len // 2, 1], triton_device)
    want = reference.select(scores, count, seq_len)
    assert torch.equal(select_triton(scores, count, seq_len, **path), want)


@settings(max_examples=25)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=40),
    count=st.integers(0, 45),
)
def test_any_floats_are_ordered_as_floats(values, count):
    scores = torch.tensor(values)[None, None]
    want = reference.select(scores, counts([count]), 40)
    assert torch.equal(select(scores, counts([count]), 40), want)
    if not torch.cuda.is_available():
        for short in (64, 0):
            assert torch.equal(select_triton(scores, counts([count]), 40, short=short, block=64), want)


def assert_budget(got, scores, coverage, min_tokens):
    """Equal to the reference, or to what it gives within float32 rounding of the coverage."""
    wants = [reference.budget(scores, coverage * (1 + e), None, min_tokens) for e in (-1e-6, 1e-6)]
    assert got.dtype == torch.int32
    assert ((torch.minimum(*wants) <= got) & (got <= torch.maximum(*wants))).all(), (got, wants)


COVERAGES = [1e-9, 0.005, 0.1, 0.5, 0.99]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coverage", COVERAGES)
def test_coverage_kernels_agree_with_reference(triton_device, kind, coverage):
    scores = make_scores(kind, device=triton_device)
    for min_tokens in (0, 250):
        assert_budget(coverage_triton(scores, coverage, min_tokens), scores, coverage, min_tokens)


@pytest.mark.parametrize("seq_len", [1, 6, 2500])
def test_coverage_kernels_over_several_tiles(triton_device, seq_len):
    scores = make_scores("peaked", batch=3, heads=1, seq_len=seq_len, window=1, device=triton_device)
    assert_budget(coverage_triton(scores, 0.3, 0), scores, 0.3, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coverage", [0.0, *COVERAGES])
def test_coverage_aten_form_agrees_with_reference(device, kind, coverage):
    scores = make_scores(kind, device=device)
    for min_tokens in (0, 250):
        assert_budget(budget_aten(scores, coverage, None, min_tokens), scores, coverage, min_tokens)


def test_nan_is_the_largest_finite_number(device):
    scores = make_scores("faulty", device=device)
    finite = scores.masked_fill(scores.isnan(), torch.finfo(torch.float32).max)
    for count in ([120, 7], [5, 6], None):
        count = None if count is None else counts(count, device)
        assert torch.equal(select(scores, count, 150), select(finite, count, 150))


@pytest.mark.parametrize("coverage", COVERAGES)
def test_an_item_with_nan_scores_keeps_everything_under_a_coverage(device, coverage):
    sound, scores = make_scores("padded", batch=3, device=device), make_scores("padded", batch=3, device=device)
    scores[1, 2, 100] = math.nan
    for min_tokens in (0, 250):
        want = budget(sound, coverage, None, min_tokens)
        want[1] = sound[1, 0].isfinite().sum() + 5
        assert torch.equal(budget(scores, coverage, None, min_tokens), want)


@pytest.mark.parametrize("kind", ["smooth", "padded", "no candidates", "nothing valid", "faulty"])
@pytest.mark.parametrize("keep_ratio", [0.01, 1 / 3, 0.5, 0.675, 1.0])
def test_keep_ratio_equals_reference(device, kind, keep_ratio):
    scores = make_scores(kind, device=device)
    for min_tokens in (0, 250):
        assert torch.equal(
            budget(scores, None, keep_ratio, min_tokens), reference.budget(scores, None, keep_ratio, min_tokens)
        )


@given(ratio=st.one_of(st.floats(1e-6, 1.0), st.integers(1, 100).map(lambda n: 1 / n)), limit=st.integers(1, 10**6))
def test_ceil_fraction_rounds_every_product_as_the_decimal_does(ratio, limit):
    exact, short = Fraction(str(ratio)), ceil_fraction(ratio, limit)
    assert short >= exact and short.denominator <= limit
    for n in {1, limit // 3, limit // 2, limit - 1, limit}:
        assert math.ceil(n * short) == math.ceil(n * exact)


def test_a_keep_ratio_with_many_digits_does_not_overflow():
    scores = torch.zeros(1, 1, 300_000)
    assert budget(scores, None, 1 / 3, 0).item() == math.ceil(Fraction(str(1 / 3)) * 300_000)


def test_opcheck(device):
    scores = make_scores(device=device)
    torch.library.opcheck(budget, (scores, 0.1, None, 20))
    torch.library.opcheck(budget, (scores, None, 0.5, 20))
    torch.library.opcheck(select, (scores, counts([120, 7], device), 200))
    torch.library.opcheck(select, (scores, None, 200))


def test_what_does_not_fit_is_refused():
    scores = make_scores()
    for wrong, message in (
        ((scores, None, None, 0), "exactly one"),
        ((scores, 0.1, 0.5, 0), "exactly one"),
        ((scores, 1.0, None, 0), "coverage is 1.0"),
        ((scores, None, -0.1, 0), "keep_ratio is -0.1"),
        ((scores, None, 1.5, 0), "keep_ratio is 1.5"),
        ((scores, 0.1, None, -1), "min_tokens is -1"),
        ((scores[0], 0.1, None, 0), r"\(3, 300\)"),
    ):
        with pytest.raises(ValueError, match=message):
            budget(*wrong)
    for wrong, message in (
        ((scores.double(), None, 9), "float64"),
        ((scores, counts([1]), 9), r"\(1,\)"),
        ((scores, counts([1, 2]).long(), 9), "int64"),
        ((scores, None, -1), "capacity is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            select(*wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_real_sizes(poisoned_empty, kind):
    scores = make_scores(kind, batch=2, heads=8, seq_len=70001, window=128, device="cuda")
    count = budget(scores, 0.02, None, 1024)
    assert_budget(count, scores, 0.02, 1024)
    indices = select(scores, count, 70001)
    assert torch.equal(indices, select_by_sorting(scores, count, 70001))
    for path in ({"splits": 8, "block": 4096}, {"splits": 32, "block": 4096}):
        assert torch.equal(select_triton(scores, count, 70001, **path), indices)
    for short in (8192, 16384):
        head = scores[..., -8001:].contiguous()
        assert torch.equal(select_triton(head, count, 9000, short=short), select_by_sorting(head, count, 9000))
    assert torch.equal(budget(scores, 0.02, None, 1024), count)
    assert torch.equal(select(scores, count, 70001), indices)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    scores = make_scores(device="cuda")

    def run():
        for chosen in (budget(scores, 0.1, None, 20), budget(scores, None, 0.5, 20)):
            select(scores, chosen, 300)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("seq_len", [5000, 20001])
def test_a_captured_chain_replays_with_another_count(seq_len):
    scores = make_scores("peaked", seq_len=seq_len, device="cuda")
    other = make_scores("padded", seq_len=seq_len, device="cuda")

    def run():
        count = budget(scores, 0.1, None, 20)
        return count, select(scores, count, seq_len)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        count, indices = run()
    scores.copy_(other)
    graph.replay()
    assert torch.equal(count, budget(other, 0.1, None, 20))
    assert torch.equal(indices, select_by_sorting(other, count, seq_len))


@pytest.mark.gpu
def test_a_new_length_compiles_nothing():
    from tsa_compile.kernels import budget as budget_module
    from tsa_compile.kernels import select as select_module

    modules = (budget_module, select_module)
    kernels = [value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")]

    def run(seq_len):
        scores = make_scores(seq_len=seq_len, device="cuda")
        select(scores, budget(scores, 0.1, None, 20), seq_len)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    # Two lengths of either path of select: one program per row, and rows that are split.
    warm = [run(seq_len) for seq_len in (512, 1001, 10001, 16384)][-1]
    assert [run(seq_len) for seq_len in (600, 777, 1024, 4097, 20000, 33333, 70001)][-1] == warm
