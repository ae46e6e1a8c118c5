"""What the tests of the selectors share."""

import torch

from tsa_compile.kernels.sparse.blocks import blocks_mask

from ..support import poison_behind


def query_and_key(batch=2, heads=2, kv_heads=1, capacity=150, dim=16, dtype=torch.float32, device="cpu"):
    """Query and key. Keys have much in common with their neighbours, so that their means differ."""
    torch.manual_seed(0)
    query, key = (torch.randn(batch, h, capacity, dim, device=device) for h in (heads, kv_heads))
    key += 2 * torch.randn(batch, kv_heads, -(-capacity // 16), dim, device=device).repeat_interleave(16, 2)[:, :, :capacity]
    return query.to(dtype), key.to(dtype)


def poisoned(inputs, counts):
    """Copies with NaN behind the counts."""
    return tuple(poison_behind(tensor, counts) for tensor in inputs)


SENTINEL = 77.0


def log_sums(query):
    """Room for a log-sum-exp of each row, full of what none of them is."""
    return query.new_full(query.shape[:3], SENTINEL, dtype=torch.float32)


def compare(found, expected, counts, tolerance=2e-5):
    """Output and log-sum-exp of the rows before the counts agree, and no log-sum-exp was written behind them."""
    (out, lse), (wanted, wanted_lse) = found, expected
    for b, n in enumerate(counts or [out.shape[2]] * len(out)):
        torch.testing.assert_close(out[b, :, :n].double(), wanted[b, :, :n].double(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse[b, :, :n].double(), wanted_lse[b, :, :n].double(), rtol=tolerance, atol=tolerance)
        assert (lse[b, :, n:] == SENTINEL).all()


def mask_of(lists):
    """The mask of lists; each is ascending and ends with its diagonal, those behind the count are empty."""
    for row, (num, indices) in enumerate(zip(lists.kv_num_blocks.flatten(), lists.kv_indices.flatten(0, 2), strict=True)):
        chosen = indices[: int(num)].tolist()
        assert chosen == sorted(set(chosen)) and chosen[-1:] in ([], [row % lists.kv_indices.shape[2]])
    return blocks_mask(*lists) & (lists.kv_num_blocks > 0)[..., None]
