"""What calls are told of their masks is of the values that hold in front of each call, whatever is written to between."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tsa_compile import TSAConfig, reports
from tsa_compile.reasons import Decision

pytestmark = pytest.mark.usefixtures("fresh")
QUERIES, KEYS = 32, 64


def heads(length, count=4):
    return torch.randn(2, count, length, 16, generator=torch.Generator().manual_seed(length))


OPERANDS = heads(QUERIES), heads(KEYS), heads(KEYS)


def difference(function, *others, operands=OPERANDS, plain=None):
    """Between the compiled function and a plain one, by default itself, each with tensors of its own."""
    fresh = [[tensor.clone() for tensor in (*operands, *others)] for _ in range(2)]
    with torch.no_grad():
        wanted = (plain or function)(*fresh[0])
        config = TSAConfig(layers=[], compiler="eager")
        found = torch.compile(function, backend="tsa", options={"config": config})(*fresh[1])
    return (found - wanted).abs().max()


def attention(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def until(positions):
    return (torch.arange(KEYS) <= positions[:, None])[None, None]


def rewritten():
    return [row.decision is not Decision.UNCHANGED for row in reports()[-1].rows]


class TestPositions:
    def test_written_to_in_front_of_the_mask(self):
        def function(q, k, v, positions):
            positions += 5
            return attention(q, k, v, until(positions))

        assert difference(function, torch.arange(QUERIES)) < 1e-5
        assert rewritten() == [True]

    def test_written_to_between_two_calls(self):
        def function(q, k, v, positions):
            first = attention(q, k, v, until(positions))
            positions.add_(5)
            return first + 2 * attention(q, k, v, until(positions))

        assert difference(function, torch.arange(QUERIES)) < 1e-5
        assert rewritten() == [True, True]

    def test_written_to_behind_the_mask(self):
        def function(q, k, v, positions):
            mask = until(positions)
            first = attention(q, k, v, mask)
            positions.add_(5)
            return first + 2 * attention(q, k, v, mask)

        assert difference(function, torch.arange(QUERIES)) < 1e-5
        assert rewritten() == [True, False]

    def test_more_positions_than_queries(self):
        def function(q, k, v, positions):
            return attention(q, k, v, until(positions[:QUERIES]))

        positions = torch.zeros(KEYS, dtype=torch.long)
        positions[:QUERIES] = torch.arange(QUERIES) + 3
        assert difference(function, positions) < 1e-5
        assert rewritten() == [True]


@pytest.mark.parametrize("shift", [0, -5])
def test_rows_that_see_no_key_are_nan_in_written_out_attention(shift):
    """Whether there is one, nobody knows before the graph runs."""

    def function(q, k, v, positions):
        bias = torch.zeros(QUERIES, KEYS).masked_fill(torch.arange(KEYS) > positions[:, None], float("-inf"))
        return ((q @ k.mT * 0.25 + bias).softmax(-1) @ v).nan_to_num(1e3)

    assert difference(function, torch.arange(QUERIES) + shift) < 1e-5
    assert rewritten() == [False]


def test_padding_is_no_view_of_memory_that_is_written_to():
    """Two nodes hold one value; one of them is written to, and with it a view of it that the first call reads."""

    def function(q, k, v, numbers):
        causal = torch.arange(QUERIES) <= torch.arange(QUERIES)[:, None]
        one, other = numbers.sin() > 0, numbers.sin() > 0
        first = attention(q, k, v, causal & one[:, None, None])
        one.logical_not_()
        return first + 2 * attention(q, k, v, causal & other[:, None, None])

    operands = heads(QUERIES), heads(QUERIES), heads(QUERIES)
    assert difference(function, torch.arange(2 * QUERIES).view(2, QUERIES) * 1.0 + 0.5, operands=operands) < 1e-5
    assert rewritten() == [True, True]


def test_lists_of_blocks_written_to_between_two_calls():
    length, block = 256, 64
    causal = create_block_mask(lambda b, h, q, kv: kv <= q, 1, 1, length, length, device="cpu", BLOCK_SIZE=block)
    count, others = causal.kv_num_blocks, (causal.kv_indices, causal.full_kv_num_blocks, causal.full_kv_indices)

    def function(q, k, v, count):
        mask = BlockMask.from_kv_blocks(count, *others, BLOCK_SIZE=block, mask_mod=lambda b, h, q, kv: kv <= q)
        first = flex_attention(q, k, v, block_mask=mask)
        count.sub_(1)
        return first + 2 * flex_attention(q, k, v, block_mask=mask)

    def by_the_lists(q, k, v, count):
        """FlexAttention's kernel goes over the lists; where it is not compiled, it does not look at them."""
        rows, columns = torch.arange(length)[:, None], torch.arange(length)
        without_diagonal = torch.where(rows // block > columns // block, 0.0, float("-inf"))
        second = attention(q, k, v, without_diagonal).nan_to_num(0.0)  # 0 where nothing is listed
        return attention(q, k, v, columns <= rows) + 2 * second

    operands = heads(length), heads(length), heads(length)
    assert difference(function, count, operands=operands, plain=by_the_lists) < 1e-5
    assert rewritten() == [True, True]
