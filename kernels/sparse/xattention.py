"""XAttention's choice of blocks: the fewest that hold most of the attention, judged by sums along antidiagonals.

    x[b,h,r,c]     = scale / s * sum over u < s of <query[b, h, r s + s - 1 - u], key[b, g, c s + u]>         c <= r
    w[b,h,r,c]     = softmax over c of x[b,h,r,c]
    S[b,h,i,j]     = sum of w over the rows of block i and the columns of block j, 128 / s of each            j <= i
    list of i      = block 0, block i, and of the others the fewest, so that their S adds up to `mass` of row i's

    query [B, H, C, D], key [B, Hk, C, D], strides and dtypes as in flash.py; count int32 [B] or None; s = `stride`, 8 or 16
    -> kv_num_blocks int32 [B, H, Q], kv_indices int32 [B, H, Q, Q], Q = ceil(C / 128); empty lists behind count

Rows from `count` on are zeros in x; a group of s rows takes part if its first row does. Blocks of equal S are chosen
together. Two launches, none of them read back:

    _energy    a program per tile of x: log2 of the sum of exp(x) over the columns of each block, [B, H, C / s, Q] float32
    _choose    a program per query block: the rows' normalisation, S, the smallest S on the list, and the list

x itself, 128 / s times as large as what `_energy` writes, never leaves the chip, and is computed once. The smallest S on the
list is found bit by bit, as select.py does: the largest number such that the blocks that reach it hold the mass.

n^2 / s * H * D flops and n^2 / s^2 * H / 2 exponentials: at H = 32, D = 128, n = 128K and stride 16, 4.4 TFLOP, 1/32 of
dense attention: at its rate 3 % of its time, at stride 8 twice that. `_energy` writes 0.5 GB at stride 16.

XAttention, arXiv 2503.16428, with the defaults of its published code: stride 16, mass .9.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tsa_compile.kernels._triton import HAS_TRITON, tl, triton
from tsa_compile.kernels.compress import row_alignment
from tsa_compile.kernels.flash import _aligned_rows, _block_dim, _tma_fits
from tsa_compile.kernels.sparse.blocks import BLOCK
from tsa_compile.kernels.sparse.lists import CHUNK, Lists, _write_list, empty_lists, forced, lists_of, real_blocks

STRIDE, MASS = 16, 0.9


class Tiling(NamedTuple):
    """How `_energy` is cut, for tuning."""

    rows: int = 128
    """Rows of x that a program computes; a multiple of a block's."""
    columns: int = 128
    """Columns of a step; a multiple of a block's."""
    dims: int = 64
    """Of the head size, in a step of the product."""
    num_warps: int = 4
    num_stages: int = 2
    use_tma: bool = False
    """Tiles by TMA, if strides allow it."""


@triton.jit
def _corner(stride_b, stride_h, stride_l, item, head, STRIDE: tl.constexpr, ALIGN: tl.constexpr):
    """Where a head begins in the view of `_groups`: its row and column."""
    offset, group = item.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h, STRIDE * stride_l
    return (offset // group).to(tl.int32), (offset % group).to(tl.int32) * ALIGN


@triton.jit
def _load_groups(
    descriptor, corner, column, p_rows, stride_row, first, step, start_d, count, USE_TMA: tl.constexpr,
    GROUPS: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Row `step` of each group from `first` on, [GROUPS, DIMS] of its dimensions; zeros behind the count."""
    if USE_TMA:
        return descriptor.load([corner + first, column + step * stride_row * ALIGN + start_d])
    else:
        rows = (first + tl.arange(0, GROUPS)) * STRIDE + step
        dims = start_d + tl.arange(0, DIMS)
        pointers = p_rows + (rows.to(tl.int64) * stride_row * ALIGN)[:, None] + dims[None, :]
        return tl.load(pointers, mask=(rows < count)[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def _tile_energies(
    desc_query, desc_key, corner_query, column_query, corner_key, column_key, p_query, p_key, p_energy, stride_ql, stride_kl,
    start_m, count, blocks, scale_log2,
    USE_TMA: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The rows [start_m, start_m + ROWS) of x, up to the diagonal."""
    PER_BLOCK: tl.constexpr = BLOCK // STRIDE
    rows = start_m + tl.arange(0, ROWS)
    for start in range(0, tl.minimum(start_m + ROWS, tl.cdiv(count, STRIDE)), COLUMNS):
        b_x = tl.zeros([ROWS, COLUMNS], tl.float32)
        for part in tl.range(0, STRIDE * (BLOCK_D // DIMS)):
            step, start_d = part // (BLOCK_D // DIMS), part % (BLOCK_D // DIMS) * DIMS
            b_query = _load_groups(
                desc_query, corner_query, column_query, p_query, stride_ql, start_m, STRIDE - 1 - step, start_d, count,
                USE_TMA, ROWS, STRIDE, DIM, DIMS, ALIGN,
            )  # fmt: skip
            b_key = _load_groups(
                desc_key, corner_key, column_key, p_key, stride_kl, start, step, start_d, count,
                USE_TMA, COLUMNS, STRIDE, DIM, DIMS, ALIGN,
            )  # fmt: skip
            b_x = tl.dot(b_query, tl.trans(b_key), b_x, input_precision="ieee")
        columns = start + tl.arange(0, COLUMNS)
        b_seen = (columns[None, :] <= rows[:, None]) & (columns * STRIDE < count)[None, :]
        b_x = tl.reshape(tl.where(b_seen, b_x * scale_log2, float("-inf")), [ROWS, COLUMNS // PER_BLOCK, PER_BLOCK])
        b_max = tl.max(b_x, axis=2)
        b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_energy = tl.log2(tl.sum(tl.exp2(b_x - b_max[:, :, None]), axis=2)) + b_max
        keys = start // PER_BLOCK + tl.arange(0, COLUMNS // PER_BLOCK)
        b_wanted = (keys[None, :] <= (rows // PER_BLOCK)[:, None]) & (rows * STRIDE < count)[:, None]
        tl.store(p_energy + (rows.to(tl.int64) * blocks)[:, None] + keys[None, :], b_energy, mask=b_wanted)


@triton.jit(
    do_not_specialize=[
        *("stride_qb", "stride_qh", "stride_ql", "stride_kb", "stride_kh", "stride_kl"),
        *("capacity", "blocks", "heads_per_kv"),
    ]
)
def _energy_kernel(
    p_query, p_key, p_count, p_energy, desc_query, desc_key,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, capacity, blocks, heads_per_kv, scale_log2,
    STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of x; those that see most first. TMA fetches whole tiles: the last ones come by pointers."""
    head, item = tl.program_id(1), tl.program_id(2)
    count = capacity
    if p_count is not None:
        count = tl.minimum(tl.load(p_count + item), capacity)
    tile = tl.cdiv(count, STRIDE * ROWS) - 1 - tl.program_id(0)
    if tile < 0:
        return
    start_m, kv_head = tile * ROWS, head // heads_per_kv
    far_item, far_head, far_kv_head = item.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    corner_query, column_query = _corner(stride_qb, stride_qh, stride_ql, item, head, STRIDE, ALIGN)
    corner_key, column_key = _corner(stride_kb, stride_kh, stride_kl, item, kv_head, STRIDE, ALIGN)
    p_query += (far_item * stride_qb + far_head * stride_qh) * ALIGN
    p_key += (far_item * stride_kb + far_kv_head * stride_kh) * ALIGN
    p_energy += (far_item * tl.num_programs(1) + far_head) * (BLOCK // STRIDE) * blocks * blocks
    by_tma = USE_TMA
    if USE_TMA:
        by_tma = tl.cdiv(start_m + ROWS, COLUMNS) * COLUMNS * STRIDE <= count
    if by_tma:
        _tile_energies(
            desc_query, desc_key, corner_query, column_query, corner_key, column_key, p_query, p_key, p_energy, stride_ql,
            stride_kl, start_m, count, blocks, scale_log2, USE_TMA, STRIDE, DIM, BLOCK_D, ALIGN, BLOCK, ROWS, COLUMNS, DIMS,
        )  # fmt: skip
    else:
        _tile_energies(
            desc_query, desc_key, corner_query, column_query, corner_key, column_key, p_query, p_key, p_energy, stride_ql,
            stride_kl, start_m, count, blocks, scale_log2, False, STRIDE, DIM, BLOCK_D, ALIGN, BLOCK, ROWS, COLUMNS, DIMS,
        )  # fmt: skip


@triton.jit
def _load_energies(p_energy, blocks, own, start, real_rows, PER_BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """[PER_BLOCK, CHUNK] of the rows of query block `own`; -inf where there is nothing to see."""
    rows, keys = tl.arange(0, PER_BLOCK), start + tl.arange(0, CHUNK)
    pointers = p_energy + (rows * blocks)[:, None] + keys[None, :]
    return tl.load(pointers, mask=(rows < real_rows)[:, None] & (keys <= own)[None, :], other=float("-inf"))


@triton.jit
def _block_sums(p_energy, blocks, own, real_rows, PER_BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Writes S where the energies of the block's first row were."""
    b_max = tl.full([PER_BLOCK], float("-inf"), tl.float32)
    b_sum = tl.zeros([PER_BLOCK], tl.float32)
    for start in range(0, own + 1, CHUNK):
        b_energy = _load_energies(p_energy, blocks, own, start, real_rows, PER_BLOCK, CHUNK)
        b_new_max = tl.maximum(b_max, tl.max(b_energy, axis=1))
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)  # a row behind the count
        b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_energy - b_shift[:, None]), axis=1)
        b_max = b_new_max
    b_norm = tl.where(b_max == float("-inf"), 0.0, b_max + tl.log2(b_sum))
    for start in range(0, own + 1, CHUNK):
        b_energy = _load_energies(p_energy, blocks, own, start, real_rows, PER_BLOCK, CHUNK)
        keys = start + tl.arange(0, CHUNK)
        tl.store(p_energy + keys, tl.sum(tl.exp2(b_energy - b_norm[:, None]), axis=0), mask=keys <= own)


@triton.jit
def _others(p_sums, own, at_least, CHUNK: tl.constexpr):
    """What the blocks between the first and the diagonal hold, of those whose S has at least these bits."""
    b_held = tl.zeros([CHUNK], tl.float32)
    for start in range(0, own, CHUNK):
        keys = start + tl.arange(0, CHUNK)
        b_sums = tl.load(p_sums + keys, mask=(keys > 0) & (keys < own), other=0.0)
        b_held += tl.where(b_sums.to(tl.int32, bitcast=True) >= at_least, b_sums, 0.0)
    return tl.sum(b_held, axis=0)


@triton.jit(do_not_specialize=["capacity", "blocks"])
def _choose_kernel(
    p_energy, p_count, p_num, p_indices, capacity, blocks, mass,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The list of one query block. S is not negative, so that its bits are integers of the same order."""
    PER_BLOCK: tl.constexpr = BLOCK // STRIDE
    own, item = tl.program_id(0), tl.program_id(2)
    row = (item * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * blocks + own
    count = capacity
    if p_count is not None:
        count = tl.minimum(tl.load(p_count + item), capacity)
    if own * BLOCK >= count:
        tl.store(p_num + row, 0)
        return
    p_energy += row * PER_BLOCK * blocks
    _block_sums(p_energy, blocks, own, tl.cdiv(count - own * BLOCK, STRIDE), PER_BLOCK, CHUNK)
    tl.debug_barrier()

    always = tl.load(p_energy) + tl.load(p_energy + own, mask=own > 0, other=0.0)
    wanted = (always + _others(p_energy, own, 0, CHUNK)) * mass
    threshold = tl.zeros([], tl.int32)
    bit = tl.full([], 1 << 30, tl.int32)
    for _ in range(31):
        held = always + _others(p_energy, own, threshold | bit, CHUNK)
        threshold = tl.where(held >= wanted, threshold | bit, threshold)
        bit = bit >> 1
    # If the two blocks that are always chosen hold the mass, the threshold is a NaN, which no block reaches.
    reach = threshold.to(tl.float32, bitcast=True)
    _write_list(p_energy, p_indices + row * blocks, p_num + row, own, reach, 1, 1, CHUNK)


def xattention_triton(
    query: Tensor,
    key: Tensor,
    scale: float,
    count: Tensor | None = None,
    *,
    stride: int = STRIDE,
    mass: float = MASS,
    block: int = BLOCK,
    tiling: Tiling | None = None,
    chunk: int = CHUNK,
) -> Lists:
    """Launch the kernels; also runs on CPU tensors in the Triton interpreter. tiling, chunk: see Tiling and lists.CHUNK."""
    count = None if count is None else count.contiguous()
    energy = energies_triton(query, key, scale, count, stride=stride, block=block, tiling=tiling)
    batch, heads, _, blocks = energy.shape
    lists = empty_lists(batch, heads, blocks, query.device)
    if energy.numel() == 0:
        return lists
    _choose_kernel[(blocks, heads, batch)](
        energy, count, *lists, query.shape[2], blocks, mass, STRIDE=stride, BLOCK=block, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return lists


def energies_triton(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None = None, *,
    stride: int = STRIDE, block: int = BLOCK, tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """The first of the two launches: log2 of the sum of exp(x) over each block's columns that a row sees.

    Returns:
        float32 [B, H, Q * block / s, Q]; what lies above the diagonal or behind the count is not written.
    """
    query, key = _aligned_rows(query), _aligned_rows(key)
    (batch, heads, capacity, dim), kv_heads = query.shape, key.shape[1]
    blocks = triton.cdiv(capacity, block)
    energy = torch.empty(batch, heads, blocks * (block // stride), blocks, dtype=torch.float32, device=query.device)
    if energy.numel() == 0:
        return energy
    tiling = _tiling(query, key, stride, tiling)
    align = row_alignment(query, key)
    _energy_kernel[(triton.cdiv(capacity, stride * tiling.rows), heads, batch)](
        query, key, count, energy,
        _groups(query, stride, tiling.rows, tiling.dims) if tiling.use_tma else None,
        _groups(key, stride, tiling.columns, tiling.dims) if tiling.use_tma else None,
        *(s // align for tensor in (query, key) for s in tensor.stride()[:3]), capacity, blocks, heads // kv_heads,
        scale / stride * math.log2(math.e), STRIDE=stride, DIM=dim, BLOCK_D=_block_dim(dim), ALIGN=align, BLOCK=block,
        ROWS=tiling.rows, COLUMNS=tiling.columns, DIMS=tiling.dims, USE_TMA=tiling.use_tma,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return energy


def _tiling(query: Tensor, key: Tensor, stride: int, tiling: Tiling | None) -> Tiling:
    """What was asked for, or what fits the GPU, adapted to the head size and to strides."""
    use_tma = _groups_fit(query, stride) and _groups_fit(key, stride)
    if tiling is None and query.dtype == torch.float32:
        tiling = Tiling(32, 32, 32, 4, 1)
    elif tiling is None:
        hopper = use_tma and query.is_cuda and torch.cuda.get_device_capability(query.device) == (9, 0)
        tiling = Tiling(128, 256, 64, 8, 3, use_tma=True) if hopper else Tiling(128, 128, 32, 8, 2)
    return tiling._replace(dims=min(tiling.dims, _block_dim(query.shape[3])), use_tma=tiling.use_tma and use_tma)


def _groups_fit(tensor: Tensor, stride: int) -> bool:
    """Whether `_groups` has a view of the tensor: a head's groups of rows are whole rows of it, or a range of columns."""
    (batch, heads, capacity, dim), (stride_b, stride_h, stride_l) = tensor.shape, tensor.stride()[:3]
    if capacity < stride or dim != _block_dim(dim) or not _tma_fits(tensor):
        return False  # columns behind the head size are no zeros, but the next head's
    group = stride * stride_l
    whole_items = batch == 1 or stride_b % group == 0
    whole_heads = heads == 1 or stride_h % group == 0 or (heads - 1) * stride_h + dim <= stride_l
    return whole_items and whole_heads


def _groups(tensor: Tensor, stride: int, groups: int, dims: int):
    """TMA's view of a tensor as a matrix, a group of `stride` tokens a row, in tiles of `groups` rows.

    A matrix, as a tile of more dimensions is reshaped in registers: then the query is an operand from registers, which
    Triton 3.6 overwrites while products of the step before still read it.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor  # here, as the package imports without Triton

    (batch, heads, capacity, _), (stride_b, stride_h, stride_l) = tensor.shape, tensor.stride()[:3]
    group = stride * stride_l
    rows = ((batch - 1) * stride_b + (heads - 1) * stride_h) // group + capacity // stride
    return TensorDescriptor(tensor, [rows, group], [group, 1], [groups, dims])


def xattention_lists(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None = None, *, stride: int = STRIDE, mass: float = MASS
) -> Lists:
    """The lists, by the Triton kernels on CUDA. See the module's docstring."""
    if not (query.is_cuda and HAS_TRITON):
        return xattention_aten(query, key, scale, count, stride=stride, mass=mass)
    with torch.cuda.device_of(query):
        return xattention_triton(query, key, scale, count, stride=stride, mass=mass)


def xattention_aten(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None = None, *,
    stride: int = STRIDE, mass: float = MASS, block: int = BLOCK,
) -> Lists:  # fmt: skip
    """The same in ATen ops alone, on any device: x is in memory."""
    blocks = -(-query.shape[2] // block)
    real = real_blocks(count, query.shape[2], block, query.device)
    x, behind = _strided_logits(query, key, scale, count, stride, block)
    weights = x.softmax(dim=3).masked_fill(behind[..., None], 0)
    sums = weights.unflatten(3, (blocks, -1)).sum(dim=4).unflatten(2, (blocks, -1)).sum(dim=3)
    candidates, always = forced(blocks, real, sinks=1, window=1)
    others = sums.masked_fill(~candidates | always, 0).sort(dim=3, descending=True).values
    held = (sums * always).sum(dim=3, keepdim=True)
    needed = held + others.cumsum(dim=3) - others < mass * (held + others.sum(dim=3, keepdim=True))
    smallest = others.masked_fill(~needed, math.inf).amin(dim=3, keepdim=True)
    return lists_of(candidates & ((sums >= smallest) | always))


def energies_aten(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None = None, *, stride: int = STRIDE, block: int = BLOCK
) -> Tensor:
    """What `energies_triton` computes, -inf where nothing is seen; NaN in rows behind the count."""
    x, _ = _strided_logits(query, key, scale, count, stride, block)
    return x.unflatten(3, (-1, block // stride)).logsumexp(dim=4) * math.log2(math.e)


def _strided_logits(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None, stride: int, block: int
) -> tuple[Tensor, Tensor]:
    """`x`, [B, H, n, n] with n = Q * block / stride, -inf where a row doesn't see; the rows behind the count, [B, 1, n]."""
    capacity, blocks = query.shape[2], -(-query.shape[2] // block)
    rows = torch.arange(blocks * block, device=query.device)
    filler = (rows >= (rows.new_tensor([capacity]) if count is None else count.clamp(max=capacity))[:, None])[:, None]
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = (
        torch.nn.functional.pad(t.to(wide), (0, 0, 0, len(rows) - capacity)).masked_fill(filler[..., None], 0)
        .unflatten(2, (-1, stride)) for t in (query, key)
    )  # fmt: skip
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    x = scale / stride * (query.flip(3).flatten(3) @ key.flatten(3).transpose(2, 3))
    behind = filler[..., ::stride]
    future = torch.ones(x.shape[2:], dtype=torch.bool, device=x.device).triu(1)
    return x.masked_fill(future | behind[:, :, None], -math.inf), behind
