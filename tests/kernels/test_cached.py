"""tsa::cached_attention: queries behind a cache see all of the past and, of their own chunk, what is not after them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.errors import KernelError
from tsa_compile.kernels import cached, reference, sdpa
from tsa_compile.kernels.cached import cached_attention, cached_attention_aten
from tsa_compile.kernels.interface import AttentionKernel, KernelRequest
from tsa_compile.kernels.merge import merge_triton, merged
from tsa_compile.kernels.registry import choose, get

from .support import TOLERANCE, close, qkv, tensor

KERNELS = ["sdpa", pytest.param("flash", marks=pytest.mark.gpu), pytest.param("cudnn", marks=pytest.mark.gpu)]


def chunk(rows, device="cpu", dtype=torch.float32, **sizes):
    """Operands of which the query has the last rows alone."""
    query, key, value = qkv(device=device, dtype=dtype, **sizes)
    return query[:, :, query.shape[2] - rows :], key, value


def expected(query, key, value, scale):
    return reference.padded_attention(query.double(), key.double(), value.double(), None, scale)


@pytest.mark.parametrize("rows, keys", [(1, 2), (3, 40), (39, 40), (40, 40), (17, 33), (64, 65)])
@pytest.mark.parametrize("layout", ["BLHD", "BHLD", "packed"])
def test_equals_the_reference(device, rows, keys, layout, monkeypatch):
    monkeypatch.setattr(cached, "ROWS", 16)
    operands = chunk(rows, device, seq_len=keys, layout=layout)
    out = cached_attention(*operands, 0.2)
    assert out.stride()[1:] == (32, 128, 1), "[B, L, H, D] in memory"
    close(out, expected(*operands, 0.2))
    close(cached_attention_aten(*operands, 0.2), out)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads, kv_heads, dim, value_dim", [(4, 4, 64, 64), (8, 1, 80, 80), (6, 2, 96, 32)])
def test_dtypes_and_head_sizes(device, dtype, heads, kv_heads, dim, value_dim):
    sizes = dict(heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim, seq_len=500)
    operands = chunk(200, device, dtype, **sizes)
    close(cached_attention(*operands, dim**-0.5), expected(*operands, dim**-0.5), dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.integers(1, 40), st.integers(0, 40), st.integers(0, 9)
)
def test_any_sizes(batch, heads, rows, past, seed):
    operands = chunk(rows, batch=batch, heads=heads[0], kv_heads=heads[1], seq_len=rows + past, dim=8, seed=seed)
    close(cached_attention(*operands, 0.35), expected(*operands, 0.35))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rows, keys", [(200, 777), (300, 301), (5, 200)])
def test_kernels_give_the_log_sum_exp(name, rows, keys):
    device, dtype = ("cpu", torch.float32) if name == "sdpa" else ("cuda", torch.float16)
    query, key, value = chunk(rows, device, dtype, seq_len=keys, heads=4, kv_heads=2, dim=64)
    out, lse = get(name).run_behind(query, key, value, 0.125)
    close(out, expected(query, key, value, 0.125), dtype)
    wide = torch.zeros_like(key[:, :1]).expand(-1, 4, -1, -1).clone()
    wide[:, :, keys - rows :] = query
    counts = torch.full((2,), keys, dtype=torch.int32)
    close(lse, reference.log_sum_exp(wide, key, counts, 0.125)[:, :, keys - rows :].to(device), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "cudnn", "triton", "auto"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_rows_that_are_not_dense(name, kv_heads):
    """Each number of a row far from the next, as after a convolution."""
    query, key, value = (torch.randn(2, n, 64, 400, dtype=torch.bfloat16, device="cuda").mT for n in (4, kv_heads, kv_heads))
    kernel = choose(KernelRequest.of(query, key, value), name, lse=True, behind=True)
    wanted = expected(query, key, value, 0.1)
    close(kernel.causal(query, key, value, 0.1), wanted, query.dtype)
    close(kernel.causal_lse(query, key, value, 0.1)[0], wanted, query.dtype)
    close(kernel.causal_behind(query[:, :, 200:], key, value, 0.1)[0], wanted[:, :, 200:], query.dtype)


def test_two_sets_of_keys_are_merged():
    query, key, value = qkv(seq_len=50, heads=4, kv_heads=4)
    whole = sdpa.written_out_lse(query[:, :, 40:], key, value, 0.2)
    rows = query[:, :, 40:]
    own = sdpa.written_out_lse(rows, key[:, :, 40:], value[:, :, 40:], 0.2)
    logits = 0.2 * rows @ key[:, :, :40].mT
    found = merged(*own, logits.softmax(-1) @ value[:, :, :40], logits.logsumexp(-1))
    for got, wanted in zip(found, whole, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout, dim", [("BLHD", 64), ("BHLD", 80), ("odd", 32)])
def test_launched_merge(triton_device, dtype, layout, dim):
    out, other = (tensor(2, 3, 75, dim, layout, dtype, triton_device) for _ in range(2))
    lse, other_lse = (40 * torch.randn(2, 3, 75, device=triton_device) for _ in range(2))
    wide = [x.cpu().double() for x in (out, lse, other, other_lse)]
    rows, sums = merge_triton(out, lse, other, other_lse)
    for operand, before in zip((out, lse, other, other_lse), wide, strict=True):
        assert torch.equal(operand.cpu().double(), before), "threads that are behind read what was there"
    close(rows.cpu(), torch.lerp(wide[0], wide[2], torch.sigmoid(wide[3] - wide[1])[..., None]), dtype)
    close(sums.cpu(), torch.logaddexp(wide[1], wide[3]))


def test_extreme_logits_are_merged_without_overflow():
    out, other = torch.ones(1, 1, 2, 3), torch.full((1, 1, 2, 3), 5.0)
    lse, other_lse = torch.tensor([[[900.0, -900.0]]]), torch.tensor([[[-900.0, 900.0]]])
    rows, sums = merged(out, lse, other, other_lse)
    assert torch.equal(rows[0, 0, :, 0], torch.tensor([1.0, 5.0])) and torch.equal(sums, torch.full((1, 1, 2), 900.0))


def test_a_kernel_without_queries_behind_a_cache_is_refused(own_kernel):
    own_kernel(AttentionKernel("plain", run=sdpa._run_plain, supports=lambda request: None, priority=99))
    request = KernelRequest.of(*chunk(4))
    assert choose(request).name == "plain" and choose(request, behind=True).name != "plain"
    with pytest.raises(KernelError, match="run_behind"):
        choose(request, "plain", behind=True)


def test_lengths_that_do_not_fit_are_refused():
    query, key, value = qkv(seq_len=20)
    with pytest.raises(ValueError, match="20 queries over 19 keys and 20 values"):
        cached_attention(query, key[:, :, 1:], value, 0.2)
    with pytest.raises(ValueError, match="20 queries over 19 keys and 19 values"):
        cached_attention(query, key[:, :, 1:], value[:, :, 1:], 0.2)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[:1], k, v), lambda q, k, v: (q, k, v[:1]), lambda q, k, v: (q, k, v[:, :1]),
        lambda q, k, v: (q, k[..., :16], v), lambda q, k, v: (q[:, :3], k, v), lambda q, k, v: (q, k, v.double()),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit_are_refused(change):
    """One item, head or type for several would be read as something else."""
    with pytest.raises(ValueError, match=r"expected query \[B,H,Lq,D\], key \[B,G,L,D\] and value"):
        cached_attention(*change(*qkv(seq_len=20)), 0.2)
    with pytest.raises(ValueError, match="of 3, 4 and 4 dimensions; expected 4"):
        cached_attention(qkv(seq_len=20)[0][0], *qkv(seq_len=20)[1:], 0.2)


def test_opcheck(device):
    torch.library.opcheck(cached_attention, (*chunk(11, device, value_dim=48), 0.2))


@pytest.mark.usefixtures("fresh")  # or the other device's code would be compiled again
def test_one_compilation_serves_all_lengths(device):
    def attention(query, key, value):
        return cached_attention(query, key, value, 0.2).transpose(1, 2).flatten(2) * 2

    compiled = torch.compile(attention, dynamic=True, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, keys in ((11, 40), (12, 51), (40, 90)):
            operands = chunk(rows, device, seq_len=keys)
            torch.testing.assert_close(compiled(*operands), attention(*operands))
