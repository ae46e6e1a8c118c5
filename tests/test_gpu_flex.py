"""FlexAttention on CUDA through Inductor: lists of blocks are compared and followed there, and models are right."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tsa_compile import Decision, TSAConfig, reports, tsa_backend

from .support import MEDIUM, difference, heads, mixed_padding, tiny, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore::tsa_compile.TSAWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]

EXACT = TSAConfig(layers=[])
BLOCK, BLOCKS = 128, 5
LENGTH = BLOCK * BLOCKS


def causal(b, h, q, kv):
    return q >= kv


def attend(query, key, value, block_mask):
    return flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)


def listed(blocks_of):
    """A BlockMask by hand: for each block of rows, the blocks of columns whose pairs the function is asked for."""
    counts = torch.zeros(1, 1, BLOCKS, dtype=torch.int32, device="cuda")
    indices = torch.zeros(1, 1, BLOCKS, BLOCKS, dtype=torch.int32, device="cuda")
    for row in range(BLOCKS):
        blocks = sorted(blocks_of(row))
        counts[0, 0, row] = len(blocks)
        indices[0, 0, row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return BlockMask.from_kv_blocks(counts, indices, None, None, BLOCK, causal)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"])
def test_lists_are_followed(dtype, atol):
    """One graph for lists of all blocks, and for those of a block-sparse method: the sinks' block and the last two."""
    query, key, value = heads(2, 4, 2, LENGTH, 64, device="cuda", dtype=dtype)
    compiled = torch.compile(attend, backend=tsa_backend, options={"config": EXACT})
    row, column = torch.arange(LENGTH, device="cuda")[:, None], torch.arange(LENGTH, device="cuda")
    near = (column // BLOCK == 0) | (row // BLOCK - column // BLOCK <= 1)
    whole, fewer = listed(lambda row: range(BLOCKS)), listed(lambda row: {0, max(row - 1, 0), row})
    for block_mask, seen in ((whole, True), (fewer, near), (whole, True)):
        with torch.no_grad():
            found = compiled(query, key, value, block_mask)
            wanted = torch.nn.functional.scaled_dot_product_attention(
                query.float(), key.float(), value.float(), attn_mask=(column <= row) & seen, enable_gqa=True
            )
        torch.testing.assert_close(found.float(), wanted, atol=atol, rtol=0)
    (report,) = reports()
    assert report.rows[0].decision is Decision.DENSE


def test_padded_models():
    """As the same model by SDPA: dense layers with the padding, whose mask function was read."""
    ids, mask = tokens(3, 300), mixed_padding(300)
    model = tiny("llama", "flex_attention", **MEDIUM).cuda()
    with torch.no_grad():
        plain = tiny("llama", **MEDIUM)(ids, attention_mask=mask).logits
        compiled = torch.compile(model, backend="tsa", options={"config": EXACT})
        found = compiled(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()
    assert difference(found, plain, mask) < 1e-3
    assert {row.decision for report in reports() for row in report} == {Decision.DENSE_PADDED}
