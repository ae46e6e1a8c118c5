"""tsa::attend and the registry of attention kernels."""

import dataclasses
import functools

import pytest
import torch

from tsa_compile.errors import KernelError, TSAWarning
from tsa_compile.kernels import flash, reference, sdpa
from tsa_compile.kernels.attend import attend, attend_aten, attend_lse
from tsa_compile.kernels.registry import AttentionKernel, KernelRequest, choose, get, names, register, unregister
from tsa_compile.kernels.sdpa import plan_rows

from .support import TOLERANCE, qkv

REQUEST = KernelRequest("cpu", torch.float32, 64, 64, 8, 2)


operands = functools.partial(qkv, seq_len=33, layout="BHLD")


def check(inputs, counts, kernel="auto"):
    """The real rows equal a float64 evaluation; on the CPU the others are zeros."""
    query = inputs[0]
    count = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=query.device)
    out = attend(*inputs, count, 0.2, kernel)
    assert out.is_contiguous() and out.dtype == query.dtype
    expected = reference.attend(*(t.double() for t in inputs), count, 0.2)
    assert out.shape == expected.shape
    for b, n in enumerate(counts or [query.shape[2]] * len(query)):
        torch.testing.assert_close(out[b, :, :n].double(), expected[b, :, :n], rtol=0, atol=TOLERANCE[query.dtype])
        assert query.is_cuda or (out[b, :, n:] == 0).all()


@pytest.mark.parametrize("counts", [None, [33, 33], [20, 20], [33, 5], [0, 7], [0, 0], [1, 32]])
def test_equals_reference(device, counts):
    check(operands(device=device), counts)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("dim, value_dim", [(32, 32), (80, 80), (96, 48), (64, 128), (256, 256), (512, 512)])
def test_dtypes_sharing_and_head_sizes(device, dtype, heads, kv_heads, dim, value_dim):
    inputs = operands(3, heads, kv_heads, dim=dim, value_dim=value_dim, dtype=dtype, device=device)
    check(inputs, [33, 12, 1])
    check(inputs, None)


def test_aten_form_equals_the_op(device):
    inputs = operands(device=device)
    for tensor in inputs:
        tensor[1, :, 5:] = 0
    count = torch.tensor([33, 5], dtype=torch.int32, device=device)
    out = attend_aten(*inputs, count, 0.2, "auto")
    assert out.is_contiguous() and (out[1, :, 5:] == 0).all()
    torch.testing.assert_close(out[1, :, :5], attend(*inputs, count, 0.2, "auto")[1, :, :5])
    torch.testing.assert_close(attend_aten(*inputs, None, 0.2, "auto"), attend(*inputs, None, 0.2, "auto"))


def test_what_does_not_fit_is_refused():
    query, key, value = operands()
    with pytest.raises(ValueError, match=r"value \(2, 2, 32, 32\)"):
        attend(query, key, value[:, :, 1:], None, 0.2, "auto")
    with pytest.raises(ValueError, match=r"count \(1,\)"):
        attend(query, key, value, torch.ones(1, dtype=torch.int32), 0.2, "auto")


@pytest.mark.parametrize("capacity", [1, 2, 300])
def test_lengths(device, capacity):
    check(operands(1, seq_len=capacity, device=device), [capacity])
    check(operands(1, seq_len=capacity, device=device), [capacity // 2])


def test_a_count_beyond_the_capacity_is_the_capacity(device):
    inputs = operands(1, device=device)
    count = torch.tensor([50], dtype=torch.int32, device=device)
    assert torch.equal(attend(*inputs, count, 0.2, "auto"), attend(*inputs, None, 0.2, "auto"))


@pytest.mark.parametrize("counts", [[20, 20], [33, 5]])
def test_filler_does_not_reach_real_rows(counts):
    """On the CPU filler may be anything; on CUDA compress writes zeros behind count, see compress.FILLER_ROWS."""
    inputs = operands()
    for tensor in inputs:
        for b, n in enumerate(counts):
            tensor[b, :, n:] = float("nan")
    count = torch.tensor(counts, dtype=torch.int32)
    out = attend(*inputs, count, 0.2, "auto")
    assert out.isfinite().all()


def test_zeros_behind_count_shield_real_rows(device):
    """What compress guarantees is enough: 256 rows of zeros, then poison, even where all rows are computed."""
    inputs = operands(1, seq_len=700, device=device)
    for tensor in inputs:
        tensor[:, :, 300:556] = 0
        tensor[:, :, 556:] = float("nan")
    count = torch.tensor([300], dtype=torch.int32, device=device)
    expected = attend(*(t[:, :, :300] for t in inputs), None, 0.2, "auto")
    torch.testing.assert_close(attend(*inputs, count, 0.2, "auto")[:, :, :300], expected)
    torch.testing.assert_close(attend(*inputs, None, 0.2, "auto")[:, :, :300], expected)


@pytest.mark.parametrize("with_count", [True, False])
def test_opcheck(device, with_count):
    inputs = operands(value_dim=48, device=device)
    count = torch.tensor([33, 33], dtype=torch.int32, device=device)
    torch.library.opcheck(attend, (*inputs, count if with_count else None, 0.2, "auto"))


def test_builtin_names_by_priority():
    assert names()[:4] == ("cudnn", "flash", "sdpa", "triton")


def test_auto_passes_over_what_is_not_exact():
    register(AttentionKernel("rough", run=plain, supports=lambda request: None, priority=99, device_count=True, exact=False))
    try:
        assert choose(REQUEST).name == "sdpa" and choose(REQUEST, device_count=True).name == "sdpa"
        assert choose(REQUEST, "rough").name == "rough"
    finally:
        unregister("rough")


def test_auto_on_the_cpu_is_sdpa():
    assert choose(REQUEST).name == "sdpa"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(KernelError, match=r"'cuddn'.*cudnn, flash, sdpa"):
        choose(REQUEST, "cuddn")
    with pytest.raises(KernelError, match="cudnn, flash, sdpa"):
        attend(*operands(), None, 0.2, "cuddn")


def test_a_named_kernel_that_does_not_fit_says_why():
    with pytest.raises(KernelError, match="CUDA devices only, not on cpu"):
        choose(REQUEST, "cudnn")


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_taken_names_are_refused(name):
    with pytest.raises(KernelError, match="taken"):
        register(dataclasses.replace(get("sdpa"), name=name))


def test_a_function_alone_is_no_kernel():
    with pytest.raises(KernelError, match="a function is no kernel: register\\(AttentionKernel"):
        register(lambda query, key, value, scale: value)


def test_a_cell_of_a_notebook_that_is_run_again_replaces_its_kernel(own_kernel):
    def cell(priority):
        def run(query, key, value, scale):
            return query

        return AttentionKernel("mine", run, lambda request: None, priority)

    own_kernel(cell(1))
    with pytest.warns(TSAWarning, match="'mine' was registered before by the same function"):
        second = register(cell(2))
    assert get("mine") is second and names().count("mine") == 1
    other = dataclasses.replace(second, run=lambda *given: given[0])
    with pytest.raises(KernelError, match="are taken: choose another"):
        register(other)


def test_unregister_of_an_unknown_name():
    with pytest.raises(KernelError, match="nobody"):
        unregister("nobody")


def plain(query, key, value, scale):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def test_a_third_party_kernel_is_found_by_name_and_by_auto(own_kernel):
    calls = []

    def run(query, key, value, scale):
        calls.append(query.shape[2])
        return plain(query, key, value, scale)

    def supports(request):
        return None if request.head_dim == 32 else "takes heads of 32 only"

    own_kernel(AttentionKernel("theirs", run, supports, priority=99))
    check(operands(), [33, 5], kernel="theirs")
    check(operands(), [33, 5], kernel="auto")
    assert calls == [33, 5] * 2
    assert choose(REQUEST).name == "sdpa"
    with pytest.raises(KernelError, match="heads of 32 only"):
        check(operands(dim=64), None, kernel="theirs")


def test_heads_that_torch_has_no_fast_kernel_for_run_in_triton():
    pytest.importorskip("triton")
    wide = KernelRequest("cuda", torch.bfloat16, 512, 512, 8, 2, (9, 0))
    assert "heads of 512: kernel='triton' has" in sdpa.SDPA.supports(wide) and flash.supports(wide) is None
    for changes in ({"head_dim": 256, "value_head_dim": 256}, {"dtype": torch.float32}, {"device_type": "cpu"}):
        assert sdpa.SDPA.supports(dataclasses.replace(wide, **changes)) is None
    assert sdpa.SDPA.supports(dataclasses.replace(wide, head_dim=520)) is None, "no kernel of this package takes them"


def test_output_in_another_layout_is_made_contiguous(own_kernel):
    def run(query, key, value, scale):
        return plain(query, key, value, scale).transpose(1, 2).contiguous().transpose(1, 2)

    own_kernel(AttentionKernel("rows", run, lambda request: None, priority=-1))
    for counts in (None, [33, 33], [20, 4]):
        check(operands(), counts, kernel="rows")


def test_contiguous_output_is_not_copied(own_kernel):
    results = []

    def run(query, key, value, scale):
        results.append(plain(query, key, value, scale).contiguous())
        return results[-1]

    own_kernel(AttentionKernel("kept", run, lambda request: None, priority=-1))
    for count in (None, torch.tensor([33, 33], dtype=torch.int32)):
        assert attend(*operands(), count, 0.2, "kept").data_ptr() == results[-1].data_ptr()


def test_a_kernel_that_reads_the_count_on_the_device_gets_it(own_kernel):
    seen = []

    def run(query, key, value, scale, count):
        seen.append(count)
        return plain(query, key, value, scale)

    own_kernel(AttentionKernel("device", run, lambda request: None, priority=-1, device_count=True))
    count = torch.tensor([20, 4], dtype=torch.int32)
    inputs = operands()
    torch.testing.assert_close(attend(*inputs, count, 0.2, "device")[1, :, :4], plain(*inputs, 0.2)[1, :, :4])
    attend(*inputs, None, 0.2, "device")
    assert seen[0] is not None and seen[1] is None
    assert choose(REQUEST).name == "sdpa"
    assert choose(REQUEST, device_count=True).name == "device"


WRONG = {
    "rows and heads in the other order": lambda out: out.transpose(1, 2),
    "one head": lambda out: out[:, :1],
    "double": lambda out: out.double(),
    "nothing": lambda out: None,
    "a pair": lambda out: (out, out[..., 0].float()),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_a_kernel_returns_is_checked(own_kernel, change):
    """By shape, type and device: a forgotten transpose would give other numbers, and no error, further down."""
    own_kernel(AttentionKernel("careless", lambda *given: change(plain(*given)), lambda request: None, priority=-1))
    for count in (None, torch.tensor([20, 4], dtype=torch.int32)):
        with pytest.raises(KernelError, match=r"'careless' returned .*; expected torch.float32 \[\d, 4, \d+, 32\] on cpu"):
            attend(*operands(), count, 0.2, "careless")


@pytest.mark.parametrize("found", ["out", "of another length", "half"])
def test_the_log_sum_exp_that_a_kernel_returns_is_checked(own_kernel, found):
    def run_lse(query, key, value, scale):
        out, lse = plain(query, key, value, scale), torch.zeros(query.shape[:3])
        return {"out": out, "of another length": (out, lse[..., 1:]), "half": (out, lse.half())}[found]

    kernel = AttentionKernel("careless", plain, lambda request: None, priority=-1, run_lse=run_lse, run_behind=run_lse)
    own_kernel(kernel)
    with pytest.raises(KernelError, match=r"'careless' returned .*; expected a pair of .* and the log-sum-exp"):
        attend_lse(*operands(), None, 0.2, "careless")
    with pytest.raises(KernelError, match=r"'careless' returned .*; expected a pair"):
        kernel.causal_behind(*operands(), 0.2)


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("name", 5, "a text"), ("name", "", "a text"), ("priority", None, "a number"), ("priority", True, "a number"),
        ("run", "flash", "a function"), ("supports", None, "a function"), ("round_rows", 8, "a function"),
        ("run_lse", True, "a function"), ("run_behind", 1, "a function"),
    ],
)  # fmt: skip
def test_fields_of_a_kernel_are_checked(field, value, expected):
    """Where no kernel is named all are asked: one that cannot be asked would disturb every model."""
    kernel = AttentionKernel("odd", plain, lambda request: None, priority=-1)
    with pytest.raises(KernelError, match=f"{field}=.*expected {expected}"):
        register(dataclasses.replace(kernel, **{field: value}))
    assert "odd" not in names()


@pytest.mark.parametrize(
    "supports, said", [(lambda request: 1 / 0, "ZeroDivisionError"), (lambda request: True, "returned True")]
)
def test_a_kernel_that_cannot_say_whether_it_fits_is_left_out(own_kernel, supports, said):
    own_kernel(AttentionKernel("unsure", plain, supports, priority=99))
    with pytest.warns(TSAWarning, match=f"'unsure' is left out: .*{said}"):
        assert choose(REQUEST).name == "sdpa"
    with pytest.warns(TSAWarning), pytest.raises(KernelError, match=f"'unsure' cannot run .*{said}"):
        choose(REQUEST, "unsure")


def test_rounded_rows_are_cut_to_the_capacity_and_not_returned(own_kernel):
    calls = []

    def run(query, key, value, scale):
        calls.append(query.shape[2])
        return plain(query, key, value, scale)

    own_kernel(AttentionKernel("coarse", run, lambda r: None, priority=-1, round_rows=lambda n: -(-n // 16) * 16))
    check(operands(), [20, 33], kernel="coarse")
    check(operands(), [3, 3], kernel="coarse")
    assert calls == [32, 33, 16]


def test_plan_grid_is_coarse_and_close():
    grid = {plan_rows(n) for n in range(1, 131073, 7)}
    assert all(n <= plan_rows(n) <= max(n + 255, n * 33 / 32) for n in range(1, 131073, 7))
    assert len(grid) < 350 and all(n % 256 == 0 for n in grid)


@pytest.mark.exhaustive
def test_inductor_compiles_it_for_every_length(device):
    def attention(query, key, value, count):
        return attend(query * 2, key, value, count, 0.2, "auto") + 1

    compiled = torch.compile(attention, dynamic=True, fullgraph=True)
    for capacity in (33, 20):
        inputs = operands(seq_len=capacity, device=device)
        count = torch.tensor([20, 20], dtype=torch.int32, device=device)
        torch.testing.assert_close(compiled(*inputs, count)[:, :, :20], attention(*inputs, count)[:, :, :20])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cudnn", "flash", "sdpa"])
def test_each_builtin_kernel(name):
    for dtype in (torch.float16, torch.bfloat16):
        inputs = operands(2, 8, 2, seq_len=1000, dim=128, dtype=dtype, device="cuda")
        for tensor in inputs:  # as compress leaves them
            tensor[1, :, 411:667] = 0
        check(inputs, [1000, 411], kernel=name)
        check(inputs, None, kernel=name)


@pytest.mark.gpu
def test_auto_is_cudnn_on_hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("measured on Hopper only")
    assert choose(KernelRequest.of(*operands(dim=128, dtype=torch.bfloat16, device="cuda"))).name == "cudnn"
    assert choose(KernelRequest.of(*operands(device="cuda"))).name == "sdpa", "float32 is for neither cudnn nor flash"


@pytest.mark.gpu
def test_captured_graph_replays_with_another_count():
    inputs = operands(2, 8, 2, seq_len=700, dim=64, dtype=torch.bfloat16, device="cuda")
    count = torch.tensor([300, 700], dtype=torch.int32, device="cuda")
    attend(*inputs, None, 0.2, "auto")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*inputs, count, 0.2, "auto")
    for counts in ([300, 700], [700, 123]):
        count.copy_(torch.tensor(counts, dtype=torch.int32))
        graph.replay()
        expected = reference.attend(*(t.double() for t in inputs), count, 0.2)
        for b, n in enumerate(counts):
            torch.testing.assert_close(out[b, :, :n].double(), expected[b, :, :n], rtol=0, atol=2e-2)
