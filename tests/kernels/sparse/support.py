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


def mask_of(lists):
    """The mask of lists; each is ascending and ends with its diagonal, those behind the count are empty."""
    for row, (num, indices) in enumerate(zip(lists.kv_num_blocks.flatten(), lists.kv_indices.flatten(0, 2), strict=True)):
        chosen = indices[: int(num)].tolist()
        assert chosen == sorted(set(chosen)) and chosen[-1:] in ([], [row % lists.kv_indices.shape[2]])
    return blocks_mask(*lists) & (lists.kv_num_blocks > 0)[..., None]
