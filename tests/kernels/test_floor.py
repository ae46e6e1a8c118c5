"""The floor: equal to dense attention under the mask A(i), for any selection, padding and shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.kernels import reference
from tsa_compile.kernels.attend import attend_lse, attend_lse_aten
from tsa_compile.kernels.attend_floor import attend_floor, attend_floor_aten
from tsa_compile.kernels.floor import merge_floor, merge_floor_aten, merge_floor_triton

PADDINGS = {
    "none": lambda length: None,
    "left": lambda length: torch.arange(length) >= length // 3,
    "right": lambda length: torch.arange(length) < length - length // 4,
    "holes": lambda length: torch.arange(length) % 3 != 1,
    "one": lambda length: torch.arange(length) == length // 2,
    "nothing": lambda length: torch.zeros(length, dtype=torch.bool),
}


class Case:
    """Random inputs, a random selection of valid tokens, and NaN in all that must not be read."""

    def __init__(
        self, length, *, paddings=("none",), heads=4, groups=2, selections=4, dims=(16, 16), keep=0.4, dtype=torch.float32,
        device="cpu", seed=0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        batch = len(paddings)
        self.padding = None
        if set(paddings) != {"none"}:
            rows = [PADDINGS[name](length) for name in paddings]
            self.padding = torch.stack([torch.ones(length, dtype=torch.bool) if row is None else row for row in rows])
        shapes = ((heads, dims[0]), (groups, dims[0]), (groups, dims[1]))
        self.inputs = [torch.randn(batch, n, length, d, generator=generator).to(dtype) for n, d in shapes]
        valid = torch.ones(batch, length, dtype=torch.bool) if self.padding is None else self.padding
        counts = (keep * valid.sum(1)).ceil().to(torch.int32)
        noise = torch.rand(batch, selections, length, generator=generator).masked_fill(~valid[:, None], -1)
        self.capacity = max(int(counts.max()) + 1, 1)
        self.indices = torch.full((batch, selections, self.capacity), length - 1, dtype=torch.int32)
        self.selected = torch.zeros(batch, heads, length, dtype=torch.bool)
        for b, count in enumerate(counts.tolist()):
            for s in range(selections):
                best = noise[b, s].topk(count).indices.sort().values
                self.indices[b, s, :count] = best
                self.selected[b, s * heads // selections : (s + 1) * heads // selections, best] = True
        self.count, self.scale = counts, dims[0] ** -0.5
        rows = reference.compress(*self.inputs, self.indices, counts)
        self.compressed = reference.attend(*(row.double() for row in rows), counts, self.scale).to(dtype)
        self.lse = reference.log_sum_exp(rows[0].double(), rows[1].double(), counts, self.scale).float()
        for b, count in enumerate(counts.tolist()):
            self.compressed[b, :, count:], self.lse[b, :, count:] = float("nan"), float("nan")
            for tensor in self.inputs:
                tensor[b, :, ~valid[b]] = float("nan")
        self.device = device

    def expected(self, window, sinks):
        mask = reference.floor_mask(self.padding, self.selected, window, sinks)
        inputs = [x.double().nan_to_num() for x in self.inputs]
        return reference.attention_under(mask, *inputs, self.scale)

    def arguments(self, window, sinks):
        moved = (*self.inputs, self.compressed, self.lse, self.indices, self.count, self.padding)
        return (*(None if x is None else x.to(self.device) for x in moved), self.scale, window, sinks)

    def attending(self, function):
        """A function that attends to the rows itself, called as those are that are handed the rows' attention."""

        def call(query, key, value, compressed, lse, indices, count, padding, *options):
            return function(*self.uncompressed(), indices, count, padding, *with_kernel(options))

        return call

    def uncompressed(self):
        rows = reference.compress(*self.inputs, self.indices, self.count)
        return [x.to(self.device) for x in (*self.inputs, *rows)]

    def check(self, function, window, sinks, tolerance=2e-5):
        found = function(*self.arguments(window, sinks))
        wanted = self.expected(window, sinks)
        assert found.dtype == self.inputs[0].dtype and found.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=tolerance, atol=tolerance)


def with_kernel(options):
    """(scale, window, sinks), with the name of an attention kernel."""
    return options[0], "auto", *options[1:]


@pytest.mark.parametrize("length", [1, 5, 31, 32, 33, 100, 130])
@pytest.mark.parametrize(("window", "sinks"), [(8, 2), (40, 5), (1, 0), (500, 16), (3, 64)])
def test_kernel_equals_dense_attention_under_the_mask(triton_device, length, window, sinks):
    Case(length, device=triton_device).check(merge_floor_triton, window, sinks)


@pytest.mark.parametrize("function", [merge_floor_triton, merge_floor_aten])
def test_more_sinks_than_tokens_take_no_memory(triton_device, function):
    Case(70, device=triton_device).check(function, 2**31 - 1, 2**31 - 1)


@pytest.mark.parametrize("paddings", [("left", "right"), ("holes", "none"), ("one", "nothing", "holes")], ids=str)
@pytest.mark.parametrize("selections", [4, 2, 1])
def test_kernel_with_padding(triton_device, paddings, selections):
    Case(70, paddings=paddings, groups=min(2, selections), selections=selections, device=triton_device).check(
        merge_floor_triton, 9, 3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dims", [(16, 32), (40, 24), (128, 128), (256, 64), (64, 512), (512, 512)])
def test_kernel_at_every_head_size(triton_device, dtype, dims):
    if dtype == torch.bfloat16 and triton_device == "cpu":
        pytest.skip("the interpreter's bfloat16 products are wrong")
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    Case(80, dims=dims, dtype=dtype, device=triton_device).check(merge_floor_triton, 20, 4, tolerance)


SIZES = st.fixed_dictionaries(
    {
        "length": st.integers(1, 90),
        "paddings": st.lists(st.sampled_from(sorted(PADDINGS)), min_size=1, max_size=3),
        "dims": st.sampled_from([(16, 16), (16, 24)]),
        "keep": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        "seed": st.integers(0, 99),
    }
)
HEADS = st.sampled_from([(4, 2, 4), (4, 2, 2), (4, 4, 4), (4, 1, 1)])


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, counts=HEADS, window=st.integers(1, 40), sinks=st.integers(0, 40))
def test_aten_equals_dense_attention_under_the_mask(sizes, counts, window, sinks):
    heads, groups, selections = counts
    case = Case(**sizes, heads=heads, groups=groups, selections=selections)
    case.check(merge_floor_aten, window, sinks)
    case.check(case.attending(attend_floor_aten), window, sinks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_aten_in_every_dtype(device, dtype):
    tolerance = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    case = Case(80, paddings=("left", "holes"), dtype=dtype, device=device)
    for function in (merge_floor_aten, case.attending(attend_floor_aten)):
        case.check(function, 20, 4, tolerance)
        case.check(function, 1, 0, tolerance)  # nothing is left of the neighbourhood of a selected row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("boost", [20, 1000])
def test_large_logits(device, dtype, boost):
    """Of up to about 4 * `boost`: the two parts of a row are then apart by more than exp can say."""
    case = Case(80, paddings=("left", "none"), dtype=dtype, device=device)
    case.scale *= boost
    tolerance = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    case.check(case.attending(attend_floor_aten), 9, 3, tolerance * max(1, boost / 100))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", [1e-5, 0.125])
def test_large_products(sign, scale):
    """Of queries and keys of float16, up to 4e7: a row's own key has its largest logit, or one far below the others."""
    case = Case(80, paddings=("left", "none"), dtype=torch.float16)
    case.scale = scale
    query, key, value = case.inputs
    key = sign * query[:, : key.shape[1]]
    case.inputs = (query * 1000, key * 1000, value)
    case.check(case.attending(attend_floor_aten), 9, 3, 4e-3)


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_nothing_or_everything_is_selected(triton_device, keep):
    Case(70, paddings=("none", "left"), keep=keep, device=triton_device).check(merge_floor_triton, 9, 3)


@pytest.mark.parametrize("nothing", [float("-inf"), -1e30])
def test_a_compressed_row_that_saw_nothing_has_no_weight(triton_device, nothing):
    """Where all of its neighbourhood is selected, too, nothing is left, and the output is 0."""
    case = Case(70, paddings=("none", "left"), keep=0.7, device=triton_device)
    case.compressed, case.lse = torch.zeros_like(case.compressed), torch.full_like(case.lse, nothing)
    near = reference.floor_mask(case.padding, torch.zeros_like(case.selected), 3, 1)
    mask = near & ~(case.selected[..., None] & case.selected[..., None, :])
    wanted = reference.attention_under(mask, *(x.double().nan_to_num() for x in case.inputs), case.scale)
    assert (case.selected & ~mask.any(-1)).any() and (case.selected & mask.any(-1)).any()
    for function in (merge_floor_triton, merge_floor_aten):
        found = function(*case.arguments(3, 1)).cpu().double()
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_op(device):
    case = Case(70, paddings=("none", "left", "holes"), selections=2, device=device)
    case.check(merge_floor, 9, 3)
    torch.library.opcheck(torch.ops.tsa.merge_floor, case.arguments(9, 3))


def test_op_of_both_steps(device):
    case = Case(70, paddings=("none", "left", "holes"), selections=2, device=device)
    case.check(case.attending(attend_floor), 9, 3)
    options = case.arguments(9, 3)[5:]
    arguments = (*case.uncompressed(), *options[:3], *with_kernel(options[3:]))
    torch.library.opcheck(torch.ops.tsa.attend_floor, arguments)


def test_log_sum_exp(device):
    case = Case(70, paddings=("none", "left"), device=device)
    rows = reference.compress(*case.inputs, case.indices, case.count)
    wanted = reference.log_sum_exp(rows[0], rows[1], case.count, case.scale)
    rows = [x.to(device) for x in rows]
    count = case.count.to(device)
    for form in (attend_lse, attend_lse_aten):
        out, lse = form(*rows, count, case.scale, "auto")
        for b, kept in enumerate(case.count.tolist()):
            torch.testing.assert_close(lse[b, :, :kept].cpu(), wanted[b, :, :kept], rtol=2e-5, atol=2e-5)
            torch.testing.assert_close(out[b, :, :kept].cpu(), case.compressed[b, :, :kept], rtol=2e-5, atol=2e-5)
    torch.library.opcheck(torch.ops.tsa.attend_lse, (*rows, count, case.scale, "auto"))


WRONG = {
    "log-sum-exp": (4, lambda lse: lse[:, :, 1:]),
    "multiple": (5, lambda indices: indices[:, :3]),
    "window 0": (-2, lambda window: 0),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_does_not_fit_is_said(said):
    place, change = WRONG[said]
    arguments = list(Case(20).arguments(9, 3))
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=f"tsa::merge_floor: .*{said}"):
        torch.ops.tsa.merge_floor(*arguments)
