"""The mean of the scores over all heads, where each process of a group has some of them (tensor parallel).

    mean[b, 0, t] = sum over processes and their heads of scores[b, h, t] / number of all heads

    scores [B, Hs, L] float32, +inf in the window, -inf at pad tokens  ->  [B, 1, L] float32, the same in every process

What `budget` makes of it is what it makes of the scores of all heads, whose mean alone it looks at. Every process of the
group must call it, with the same B and L. Moves B (L + 1) float32 through one all-reduce: 512 KB at 128K tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsa_compile.kernels.define import define


def summed(scores: Tensor) -> Tensor:
    """The local part: [B, L + 1], the sum over the heads here, and how many they are."""
    batch, heads, _ = scores.shape
    return torch.cat([scores.sum(dim=1), scores.new_full((batch, 1), heads)], dim=1)


@define(lambda scores, group: scores.new_empty((scores.shape[0], 1, scores.shape[2])))
def mean_over_ranks(scores: Tensor, group: str) -> Tensor:
    """See the module's docstring; `group` is the name of a process group, as `_c10d_functional.all_reduce` takes it."""
    distributed: Any = torch.distributed.distributed_c10d
    sums = summed(scores)
    torch.distributed.all_reduce(sums, group=distributed._resolve_process_group(group))
    return (sums[:, :-1] / sums[:, -1:])[:, None]
