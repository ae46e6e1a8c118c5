"""Block-sparse attention over the compressed rows: a selector says which blocks, blocks.py computes them.

    kernel              selector                          options and their defaults
    "flashprefill"      flashprefill.flashprefill_lists   alpha .1, sinks 2, window 4, last 2
    "xattention"        xattention.xattention_lists       stride 16, mass .9

Importing this package registers them as attention kernels, behind all others, so that they run where they are asked for by
name: `TSAConfig(kernel="xattention")`. The selector sees the compressed rows, reads their number on the device, and chooses
among the blocks before it; with a budget that keeps everything, it sees all rows, which is the method alone.

Variants are registered under names of their own, and so is any function that makes lists:

    block_sparse("flashprefill.02", flashprefill_lists, alpha=0.02)

    def every_fourth(query, key, scale, count):  # blocks of 128 rows: those a multiple of four before each query block
        blocks = torch.arange(-(-query.shape[2] // 128), device=query.device)
        mask = (blocks % 4 == 0) & (blocks <= blocks[:, None])
        return lists_of(mask.expand(*query.shape[:2], -1, -1))

    block_sparse("fourth", every_fourth)

What selectors leave out is gone: unlike the other kernels, these do not compute causal attention over all rows.
"""

import functools

from torch import Tensor

from tsa_compile.kernels import flash
from tsa_compile.kernels.attend import AttentionKernel, KernelRequest, register
from tsa_compile.kernels.sparse.blocks import block_sparse_attention
from tsa_compile.kernels.sparse.flashprefill import flashprefill_lists
from tsa_compile.kernels.sparse.lists import Lists, Selector, density, lists_of
from tsa_compile.kernels.sparse.xattention import xattention_lists

PRIORITY = -20

__all__ = ["Lists", "Selector", "block_sparse", "density", "flashprefill_lists", "lists_of", "xattention_lists"]


def block_sparse(name: str, selector: Selector, **options: float) -> AttentionKernel:
    """Registers block-sparse attention over what a selector chooses; KernelError if the name is taken.

    selector: `(query [B,H,C,D], key [B,Hk,C,D], scale, count int32 [B] or None, **options) -> (kv_num_blocks, kv_indices)`
        as blocks.py takes them. It must not synchronise, and query and key behind the count may hold anything.
    """
    chosen = functools.partial(selector, **options)
    run = functools.partial(run_blocks, selector=chosen)
    return register(AttentionKernel(name, run=run, supports=_supports, priority=PRIORITY, device_count=True, exact=False))


def run_blocks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, count: Tensor | None = None, *, selector: Selector
) -> Tensor:
    """Chooses blocks and computes them."""
    return block_sparse_attention(query, key, value, scale, *selector(query, key, scale, count), count)


def _supports(request: KernelRequest) -> str | None:
    """On CUDA what the Triton kernels take, on the CPU everything."""
    return None if request.device_type == "cpu" else flash.supports(request)


block_sparse("flashprefill", flashprefill_lists)
block_sparse("xattention", xattention_lists)
