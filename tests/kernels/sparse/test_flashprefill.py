"""FlashPrefill's lists equal the reference's, whatever the count."""

import pytest
import torch

from tsa_compile.kernels import reference_sparse
from tsa_compile.kernels.sparse.flashprefill import flashprefill_aten, flashprefill_lists, flashprefill_triton
from tsa_compile.kernels.sparse.lists import density, lists_of

from ..support import counts_of
from .support import mask_of, poisoned, query_and_key

OPTIONS = dict(alpha=0.3, sinks=1, window=1, last=1, block=16)


@pytest.mark.parametrize("counts", [None, [150, 33], [0, 128]])
@pytest.mark.parametrize("options", [OPTIONS, {**OPTIONS, "alpha": 0.0}, {**OPTIONS, "sinks": 2, "window": 3, "last": 0}])
def test_the_aten_version_equals_the_reference(counts, options):
    inputs, count = query_and_key(), counts_of(counts)
    found = flashprefill_aten(*poisoned(inputs, counts), 0.2, count, **options)
    assert torch.equal(mask_of(found), reference_sparse.flashprefill(*inputs, 0.2, count, **options))


@pytest.mark.parametrize("counts", [None, [150, 33], [0, 128]])
def test_triton_equals_aten(triton_device, counts):
    inputs, count = query_and_key(device=triton_device), counts_of(counts, triton_device)
    expected = flashprefill_aten(*inputs, 0.2, count, **OPTIONS)
    found = flashprefill_triton(*poisoned(inputs, counts), 0.2, count, block_n=16, chunk=4, **OPTIONS)
    densities = density(expected, count, 150, 16)
    assert densities.max() > 0.3 and densities.min() < 0.9
    assert torch.equal(mask_of(found), mask_of(expected))


def test_energies_beyond_float32(triton_device):
    query, key = query_and_key(1, device=triton_device)
    inputs, options = (40 * query, 5 * key), {**OPTIONS, "alpha": 1e-9}
    expected = reference_sparse.flashprefill(*inputs, 0.1, None, **options)
    assert torch.equal(mask_of(flashprefill_triton(*inputs, 0.1, block_n=16, **options)), expected)


def test_defaults_and_layout(triton_device):
    query, key = (
        t.transpose(1, 2).contiguous().transpose(1, 2) for t in query_and_key(1, capacity=1100, device=triton_device)
    )
    assert torch.equal(*(mask_of(f(query, key, 1.0)) for f in (flashprefill_aten, flashprefill_triton)))
    if triton_device == "cpu":
        assert torch.equal(mask_of(flashprefill_lists(query, key, 1.0)), mask_of(flashprefill_aten(query, key, 1.0)))


def test_nothing_to_do(triton_device):
    query, key = query_and_key(0, device=triton_device)
    assert flashprefill_triton(query, key, 1.0).kv_num_blocks.shape == (0, 2, 2)


def test_lists_of_a_mask_and_their_density():
    mask = torch.tensor([[[[1, 0, 0], [1, 1, 0], [0, 1, 1]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]]], dtype=torch.bool)
    lists = lists_of(mask)
    assert lists.kv_num_blocks.tolist() == [[[1, 2, 2], [1, 1, 1]]] and lists.kv_indices[0, 0, 2].tolist() == [1, 2, 0]
    assert density(lists).tolist() == pytest.approx([8 / 12])
    assert density(lists, torch.tensor([200])).tolist() == pytest.approx([5 / 6])


@pytest.mark.gpu
def test_on_the_gpu():
    query, key = query_and_key(2, 8, 2, 5000, 128, torch.bfloat16, "cuda")
    count = counts_of([5000, 3333], "cuda")
    found, expected = (mask_of(f(query, key, 0.3, count)) for f in (flashprefill_triton, flashprefill_aten))
    assert (found != expected).float().mean() < 1e-3  # a score may lie on the threshold
