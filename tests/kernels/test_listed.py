"""tsa::listed and as_listed_: lists of blocks beside a causal mask, against pairs that are counted one by one."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from tsa_compile.kernels.listed import as_listed_, listed

from .support import close, make_padding, qkv

LENGTH, BLOCK = 150, 32
CASES = {  # queries, padding, positions
    "whole prompt": (LENGTH, None, None),
    "padded": (LENGTH, "holes", None),
    "behind a cache": (70, None, None),
    "padded, behind a cache": (70, "left", None),
    "into a static cache": (40, None, torch.arange(50, 90)),
    "padded, into a static cache": (40, "holes", torch.arange(50, 90)),
    "positions in any order": (40, None, torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))[:40]),
}


def allowed(queries, padding, positions):
    """[B, 1, Lq, Lk], from the definition."""
    seen = torch.arange(LENGTH - queries, LENGTH) if positions is None else positions
    mask = (torch.arange(LENGTH) <= seen[:, None])[None, None]
    return mask if padding is None else mask & padding[:, None, None]


def lists_of(mask):
    """As FlexAttention makes them of a mask."""
    block_mask = create_block_mask(
        lambda b, h, q, kv: mask[b, 0, q, kv], mask.shape[0], None, *mask.shape[2:], device="cpu", BLOCK_SIZE=BLOCK
    )
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    return [getattr(block_mask, name).clone() for name in names]


def told(lists, padding, positions, queries):
    return listed(*lists, padding, positions, queries, LENGTH, BLOCK, BLOCK).tolist()


@pytest.mark.parametrize("name", CASES)
def test_lists_of_the_mask_are_alike(name):
    queries, kind, positions = CASES[name]
    padding = make_padding(kind, 3, LENGTH)
    assert told(lists_of(allowed(queries, padding, positions)), padding, positions, queries) == [1]


@pytest.mark.parametrize("name", CASES)
def test_lists_of_another_mask_are_not(name):
    """One pair more or less, in a block that is not listed, listed in part or in full, or in one item alone."""
    queries, kind, positions = CASES[name]
    padding = make_padding(kind, 3, LENGTH)
    mask = allowed(queries, padding, positions).expand(3, -1, -1, -1)
    lists = lists_of(mask)
    for which in (0, 2):
        for item in range(3):
            rows = lists[which][item, 0].nonzero()[:, 0]
            if len(rows):
                fewer = [part.clone() for part in lists]
                fewer[which][item, 0, rows[-1]] -= 1
                assert told(fewer, padding, positions, queries) == [0]
    everywhere = lists_of(torch.ones_like(mask))
    assert told(everywhere, padding, positions, queries) == [0], "blocks in full that are allowed in part"
    twice = [part.clone() for part in lists]
    some = (twice[0] > 0) & (twice[0] < twice[1].shape[3])
    if not some.any():
        return
    item, _, row = some.nonzero()[0].tolist()
    times = twice[0][item, 0, row]
    twice[1][item, 0, row, times] = twice[1][item, 0, row, 0]
    twice[0][item, 0, row] += 1
    assert told(twice, padding, positions, queries) == [0], "a block that is listed twice"


def test_one_block_for_everything_is_asked_everywhere():
    """What FlexAttention is given without a BlockMask."""
    empty = (torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32), None, None)
    assert listed(*empty, None, None, LENGTH, LENGTH, 1 << 30, 1 << 30).tolist() == [1]


def test_too_few_rows_of_blocks():
    lists = [part[:, :, :2] for part in lists_of(allowed(LENGTH, None, None))]
    with pytest.raises(ValueError, match="2 blocks of rows"):
        told(lists, None, None, LENGTH)


def expected(query, key, value, lists, mask):
    """Softmax over what is listed, pair by pair; what is listed twice counts twice."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    for b, h, q in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        times = torch.zeros(LENGTH, dtype=torch.float64)
        for count, indices, mine in ((*lists[:2], mask[b, 0, q]), (*lists[2:], torch.ones(LENGTH, dtype=torch.bool))):
            at = (min(b, len(count) - 1), min(h, count.shape[1] - 1), q // BLOCK)
            for block in indices[at][: count[at]].tolist():
                times[block * BLOCK : (block + 1) * BLOCK] += mine[block * BLOCK : (block + 1) * BLOCK]
        weights = times * (0.2 * key[b, h // 2] @ query[b, h, q]).exp()
        if weights.sum() > 0:
            out[b, h, q] = weights / weights.sum() @ value[b, h // 2]
    return out


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("by_head", [False, True])
def test_other_lists_are_computed_as_they_are(name, by_head, monkeypatch):
    monkeypatch.setattr("tsa_compile.kernels.listed._MASK_ELEMENTS", 20_000)  # several parts
    queries, kind, positions = CASES[name]
    padding, generator = make_padding(kind, 3, LENGTH), torch.Generator().manual_seed(0)
    query, key, value = qkv(3, 4, 2, LENGTH, 8)
    query, mask = query[:, :, :queries], allowed(queries, padding, positions).expand(3, -1, -1, -1)
    shape = (3 if by_head else 1, 4 if by_head else 1, -(-queries // BLOCK))
    lists = []
    for _ in range(2):
        lists.append(torch.randint(0, 4, shape, generator=generator, dtype=torch.int32))
        lists.append(torch.randint(0, -(-LENGTH // BLOCK), (*shape, 4), generator=generator, dtype=torch.int32))
    out = torch.full_like(query, 7.0)
    operands = (query, key, value, *lists, padding, positions, 0.2, BLOCK, BLOCK)
    as_listed_(out, torch.ones(1, dtype=torch.int64), *operands)
    assert (out == 7).all(), "alike: the output is what it is to be already"
    as_listed_(out, torch.zeros(1, dtype=torch.int64), *operands)
    close(out, expected(query, key, value, lists, mask))


def test_opcheck():
    query, key, value = qkv(3, 4, 2, LENGTH, 8)
    lists = lists_of(allowed(LENGTH, None, None))
    torch.library.opcheck(listed, (*lists, None, None, LENGTH, LENGTH, BLOCK, BLOCK))
    told_so = torch.zeros(1, dtype=torch.int64)
    torch.library.opcheck(as_listed_, (query.clone(), told_so, query, key, value, *lists, None, None, 0.2, BLOCK, BLOCK))
