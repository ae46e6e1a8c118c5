"""The block-sparse kernels in the registry of attend, alone and over compressed rows."""

import functools
import math

import pytest
import torch

from tsa_compile.errors import KernelError
from tsa_compile.kernels import attend, fused, reference, registry  # noqa: F401, fused registers its op
from tsa_compile.kernels.registry import KernelRequest, choose, unregister
from tsa_compile.kernels.sparse import block_sparse, flashprefill_lists, flexprefill_lists, lists_of, xattention_lists

from ..support import qkv

NAMES = ("flashprefill", "xattention", "flexprefill")


operands = functools.partial(qkv, seq_len=700, dim=16, layout="BHLD")


def every_fourth(query, key, scale, count):
    blocks = torch.arange(-(-query.shape[2] // 128), device=query.device)
    mask = (blocks % 4 == 0) & (blocks <= blocks[:, None])
    return lists_of(mask.expand(*query.shape[:2], -1, -1))


@pytest.fixture
def registered():
    """Registers for the time of a test."""
    names = []

    def register(name, *args, **options):
        names.append(name)
        return block_sparse(name, *args, **options)

    yield register
    for name in names:
        unregister(name)


def test_they_are_there_and_never_chosen_unasked():
    request = KernelRequest("cpu", torch.float32, 16, 16, 4, 2)
    assert choose(request).name == "sdpa"
    for name in NAMES:
        kernel = choose(request, name)
        assert kernel.device_count and kernel.priority == -20 and choose(request, name, lse=True) is kernel
    cuda = KernelRequest("cuda", torch.float64, 16, 16, 4, 2, (9, 0))
    with pytest.raises(KernelError, match="float64"):
        choose(cuda, "xattention")
    wide = KernelRequest("cuda", torch.bfloat16, 512, 512, 4, 2, (9, 0))
    with pytest.raises(KernelError, match=r"'flexprefill' cannot run .* takes heads of at most 256, not 512 and 512"):
        choose(wide, "flexprefill")


@pytest.mark.parametrize(
    "name, options", [("flashprefill", {"alpha": 0.0}), ("xattention", {"mass": 1.1}), ("flexprefill", {"gamma": 1.1})]
)
def test_a_variant_that_leaves_nothing_out_is_dense(registered, name, options):
    selectors = {"flashprefill": flashprefill_lists, "xattention": xattention_lists, "flexprefill": flexprefill_lists}
    registered("everything", selectors[name], **options)
    inputs, count = operands(), torch.tensor([700, 333], dtype=torch.int32)
    out = attend.attend(*inputs, count, 0.25, "everything")
    torch.testing.assert_close(out, reference.attend(*inputs, count, 0.25))


def test_a_selector_of_ones_own(registered):
    registered("fourth", every_fourth)
    query, key, value = operands()
    out = attend.attend(query, key, value, None, 0.25, "fourth")
    rows = torch.arange(700)
    seen = (rows <= rows[:, None]) & ((rows // 128 % 4 == 0) | (rows // 128 == rows[:, None] // 128))
    key, value = (t.repeat_interleave(2, 1) for t in (key, value))
    weights = (0.25 * query @ key.transpose(2, 3)).masked_fill(~seen, -math.inf).softmax(-1)
    torch.testing.assert_close(out, weights @ value)


@pytest.mark.parametrize(
    ("selector", "options", "said"),
    [
        (
            flashprefill_lists,
            {"alhpa": 0.1},
            r"flashprefill.* cannot be called with query, key, scale, count, alhpa=0\.1 \(.*'alhpa'.*: it takes alpha",
        ),
        (every_fourth, {"alpha": 0.1}, r"every_fourth cannot be called with .*count, alpha=0\.1 .*: it takes no options"),
        (flashprefill_lists, {"scale": 0.1}, "scale=0.1 .*multiple values"),
        (lambda query, key: None, {}, "too many positional arguments"),
        (5, {}, "the selector is a int: pass a function"),
        (xattention_lists, {"stride": 24}, "stride=24 .* must divide the block of 128 rows"),
        (xattention_lists, {"stride": 16, "block": 40}, "stride=16 .* must divide the block of 40 rows"),
        (xattention_lists, {"stride": 0}, "stride=0 .* must divide the block of 128 rows"),
        (xattention_lists, {"stride": 8.0}, r"stride=8\.0 .* must divide the block of 128 rows"),
    ],
)
def test_options_that_a_selector_cannot_take_are_refused_at_once(selector, options, said):
    with pytest.raises(KernelError, match=f"(?s)cannot register attention kernel 'mistaken': .*{said}"):
        block_sparse("mistaken", selector, **options)
    assert "mistaken" not in registry.names()


@pytest.mark.parametrize("name", [*NAMES, "band"])
def test_composed_with_token_selection(registered, name):
    """The fused op equals its steps, with the same selector between them."""
    registered("band", flashprefill_lists, alpha=1.0, sinks=0, window=1, last=0)
    inputs = operands(seq_len=1500)
    scores = torch.ops.tsa.score(inputs[0], inputs[1], None, 0.25, 64, 7)
    scalars = (0.25, 64, 7, None, 0.5, 256, None, False, name)
    found = torch.ops.tsa.sparse_attention(*inputs, *scalars)
    kept = math.ceil(0.5 * (1500 - 64)) + 64
    indices = torch.ops.tsa.select(scores, None, kept)
    rows = torch.ops.tsa.compress(*inputs, indices, None)
    out = torch.ops.tsa.attend(*rows, None, 0.25, name)
    torch.testing.assert_close(found, torch.ops.tsa.decompress(out, indices, None, 1500))
    assert torch.allclose(out, torch.ops.tsa.attend(*rows, None, 0.25, "sdpa")) == (name != "band")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_captured_with_a_count_on_the_device(name):
    inputs = operands(2, 8, 2, seq_len=3000, dim=128, dtype=torch.bfloat16, device="cuda")
    count = torch.tensor([3000, 3000], dtype=torch.int32, device="cuda")
    kernel = registry.get(name)
    kernel.causal_lse(*inputs, 0.1, count)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = kernel.causal_lse(*inputs, 0.1, count)
    for counts in ([3000, 2000], [1001, 0]):
        count.copy_(torch.tensor(counts, dtype=torch.int32))
        graph.replay()
        expected, expected_lse = kernel.causal_lse(*inputs, 0.1, count)
        alone = kernel.causal(*inputs, 0.1, count)
        for b, n in enumerate(counts):
            assert torch.equal(out[b, :, :n], expected[b, :, :n]) and torch.equal(alone[b, :, :n], expected[b, :, :n])
            assert torch.equal(lse[b, :, :n], expected_lse[b, :, :n])
