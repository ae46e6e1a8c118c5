"""The last rows of a selection: the steps of a chunk behind a cache, one by one and with the selection forced."""

import pytest
import torch

from tsa_compile.kernels import reference
from tsa_compile.kernels.compress import compress_behind_triton, compress_triton
from tsa_compile.kernels.decompress import decompress_triton
from tsa_compile.kernels.flash import behind_triton
from tsa_compile.kernels.floor import merge_floor_triton

from .support import choose_tokens, close, counts_of, make_padding, poison_behind, qkv

SCALE = 0.3


def rows_of(query, key, value, counts, rows):
    """The reference's rows and log-sum-exp of the last `rows` slots, for queries that have a slot each."""
    keys = key.shape[2]
    counts = [keys] * query.shape[0] if counts is None else counts
    whole = query.new_zeros(*query.shape[:2], keys, query.shape[3])
    for b, n in enumerate(counts):
        whole[b, :, max(n - rows, 0) : n] = query[b, :, rows - min(n, rows) :]
    count = counts_of(counts)
    out, lse = reference.attend(whole, key, value, count, SCALE), reference.log_sum_exp(whole, key, count, SCALE)
    return [(out[b, :, max(n - rows, 0) : n], lse[b, :, max(n - rows, 0) : n]) for b, n in enumerate(counts)]


@pytest.mark.parametrize("rows, keys, counts", [(33, 70, None), (70, 150, [150, 91]), (40, 64, [64, 7]), (1, 130, [1, 130])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_equals_the_reference(triton_device, rows, keys, counts, dtype):
    query, key, value = qkv(2, 4, 2, keys, 32, 48, dtype=dtype, device=triton_device)
    query = query[:, :, keys - rows :]
    key, value = (poison_behind(x, counts) for x in (key, value))
    out, lse = behind_triton(query, key, value, counts_of(counts, triton_device), None, SCALE)
    wide = (tensor.cpu().double() for tensor in (query, key, value))
    for b, (wanted, wanted_lse) in enumerate(rows_of(*wide, counts, rows)):
        close(out[b, :, rows - wanted.shape[1] :].cpu(), wanted, dtype)
        close(lse[b, :, rows - wanted.shape[1] :].cpu(), wanted_lse, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_large_tiles(dim):
    query, key, value = qkv(2, 4, 2, 900, dim, dim, dtype=torch.bfloat16, device="cuda")
    query, counts = query[:, :, 600:] * 0.1, [900, 411]
    key, value = (poison_behind(x, counts) for x in (key, value))
    out, lse = behind_triton(query, key, value, counts_of(counts, "cuda"), None, SCALE)
    wide = (tensor.cpu().double() for tensor in (query, key, value))
    for b, (wanted, wanted_lse) in enumerate(rows_of(*wide, counts, 300)):
        close(out[b].cpu(), wanted, torch.bfloat16)
        close(lse[b].cpu(), wanted_lse, torch.bfloat16)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_programs_without_a_query_write_nothing(triton_device):
    query, key, value = qkv(1, 2, 1, 200, 32, device=triton_device)
    first = torch.tensor([[130]], dtype=torch.int32, device=triton_device)
    out, _ = behind_triton(query[:, :, 50:], key, value, None, first, SCALE)
    assert out[:, :, :128].isnan().all(), "what nobody writes is as it was allocated"
    whole, _ = behind_triton(query[:, :, 50:], key, value, None, None, SCALE)
    assert torch.equal(out[:, :, 130:], whole[:, :, 130:])


@pytest.mark.parametrize("counts", [None, [40, 17], [3, 40]])
@pytest.mark.parametrize("selections", [4, 2])
def test_rows_of_a_chunk_are_the_last_of_the_compressed_ones(triton_device, counts, selections):
    past, length = 30, 48
    query, key, value = qkv(2, 4, 2, length, 32, device=triton_device)
    indices, count = choose_tokens(counts or [40, 40], selections, length, 40, triton_device)
    count = None if counts is None else count
    query_rows, *cached, first = compress_behind_triton(query[:, :, past:], key, value, indices, count)
    whole = compress_triton(query, key, value, indices, count)
    rows = query_rows.shape[2]
    assert rows == length - past
    for b in range(2):
        n = 40 if counts is None else counts[b]
        for got, wanted in zip(cached, whole[1:], strict=True):
            assert torch.equal(got[b, :, :n], wanted[b, :, :n])
        for s in range(selections):
            inside = int((indices[b, s, :n] >= past).sum())
            assert int(first[b, s]) == rows - inside
            for h in range(s * 4 // selections, (s + 1) * 4 // selections):
                assert torch.equal(query_rows[b, h, rows - inside :], whole[0][b, h, n - inside : n])


CHUNKS = ((0, 30), (30, 47), (47, 90))


def forced_selection(mask, batch=2, heads=4):
    """Tokens for each head, as many of a chunk for one head as for another: bool [B, H, L]."""
    generator = torch.Generator().manual_seed(3)
    selected = torch.zeros(batch, heads, CHUNKS[-1][1], dtype=torch.bool)
    for b in range(batch):
        for start, stop in CHUNKS:
            valid = [t for t in range(start, stop) if mask is None or mask[b, t]]
            for h in range(heads):
                order = torch.randperm(len(valid), generator=generator)
                selected[b, h, [valid[i] for i in order[: len(valid) // 3]]] = True
    return selected


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("padding", [None, "left", "holes"])
@pytest.mark.parametrize("floor", [None, (6, 2)])
def test_chunks_of_a_forced_selection_equal_the_whole_prompt(triton_device, padding, floor):
    length = CHUNKS[-1][1]
    query, key, value = qkv(2, 4, 2, length, 32, device=triton_device)
    mask = make_padding(padding, 2, length)
    selected = forced_selection(mask)
    allowed = (selected[..., None] & selected[:, :, None]).tril()
    if floor is not None:
        allowed = reference.floor_mask(mask, selected, *floor)
    expected = reference.attention_under(allowed, *(tensor.cpu().double() for tensor in (query, key, value)), SCALE)
    for start, stop in CHUNKS[1:]:  # the first one is an ordinary prompt
        parts = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop])
        got = chunk(*parts, None if mask is None else mask[:, :stop], selected[:, :, :stop], floor)
        close(got.cpu(), expected[:, :, start:stop])


def chunk(query, key, value, mask, selected, floor):
    """The launched steps of one chunk, with its selection given."""
    counts = selected[:, 0].sum(-1).tolist()
    indices = torch.full((2, 4, max(max(counts), 1)), selected.shape[2] - 1, dtype=torch.int32)
    for b, n in enumerate(counts):
        for h in range(4):
            indices[b, h, :n] = selected[b, h].nonzero().flatten()
    indices, count = indices.to(query.device), counts_of(counts, query.device)
    *rows, first = compress_behind_triton(query, key, value, indices, count)
    out, lse = behind_triton(*rows, count, first, SCALE)
    if floor is None:
        return decompress_triton(out, indices, count, key.shape[2], past=key.shape[2] - query.shape[2])
    padding = None if mask is None else mask.to(query.device)
    return merge_floor_triton(query, key, value, out, lse, indices, count, padding, SCALE, *floor)
