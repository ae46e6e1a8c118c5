"""tsa::extend_cache: what a cache holds and a chunk's keys and values behind it, also where it holds nothing."""

import pytest
import torch

from tsa_compile.kernels.extend import extend_cache

extend = torch.ops.tsa.extend_cache


def chunk(length, device="cpu", dtype=torch.float32, seed=0):
    """Keys [2, 3, L, 4] and values [2, 3, L, 6], in memory [B, L, G, D], as projections leave them."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(2, length, 3, size, generator=generator).transpose(1, 2) for size in (4, 6))
    return [each.to(device, dtype) for each in made]


def packed(keys, values):
    return keys.contiguous().view(-1).data, values.contiguous().view(-1, 2).data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("past", [0, 1, 7])
def test_it_is_a_concatenation(device, dtype, past):
    before, new = chunk(past, device, dtype), chunk(5, device, dtype, seed=1)
    cached = packed(*before) if past else (torch.full((2,), torch.nan), torch.full((3, 2), torch.nan))
    found = extend(*cached, past, *new)
    for out, old, added in zip(found, before, new, strict=True):
        assert torch.equal(out, torch.cat([old, added], dim=2)) and out.is_contiguous()
        assert out.untyped_storage().data_ptr() not in (added.untyped_storage().data_ptr(), old.data_ptr())


def test_what_is_cached_must_fit():
    new, cached = chunk(5), packed(*chunk(7))
    with pytest.raises(
        ValueError, match=r"168 torch.float32 numbers cached; expected those of 6 tokens of 2 items, 3 heads"
    ):
        extend_cache(*cached, 6, *new)
    with pytest.raises(ValueError, match=r"numbers of torch\.float64"):
        extend_cache(*cached, 7, *(each.double() for each in new))


@pytest.mark.parametrize("past", [0, 7])
def test_opcheck(device, past):
    cached = packed(*chunk(max(past, 1), device))
    torch.library.opcheck(extend, (*cached, past, *chunk(5, device)))


def test_one_graph_has_any_length_of_the_cache():
    """None of its sizes is asked for: what is traced with an empty cache serves a filled one."""
    graphs = []

    def keep(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    @torch.compile(backend=keep, dynamic=True)
    def step(keys, values, marker, new_keys, new_values):
        return extend(keys, values, marker.shape[0] - 2, new_keys, new_values)

    for past in (0, 9, 1, 2):
        marker = torch.empty(past + 2, 0)
        torch._dynamo.maybe_mark_dynamic(marker, [0])
        cached = packed(*chunk(past)) if past else (torch.empty(2), torch.empty(3, 2))
        torch._dynamo.mark_static(cached[1], 1)
        new = [each.data for each in chunk(5, seed=1)]
        for each in new:  # in a model, weights say how many heads there are; items are marked
            torch._dynamo.mark_static(each, [1, 3])
            torch._dynamo.maybe_mark_dynamic(each, [0, 2])
        keys, _ = step(*cached, marker, *new)
        assert keys.shape == (2, 3, past + 5, 4)
    assert len(graphs) == 1
