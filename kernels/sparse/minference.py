"""MInference's choice of keys: the diagonals and the columns that the last queries attend to most; and A-shape.

    A[b, h, r, j]     = softmax over j <= r of scale * <query[b, h, r], key[b, g, j]>, r the 64 last rows before the count
    columns[b, h]     = the `vertical` columns j of the largest sum_r A[r, j], the first 30 among them
    diagonals[b, h]   = the `slash` distances d of the largest sum_r A[r, r - d], the nearest 100 among them
    starts[b, h]      = 0, and from each t on max(t + 64, the next diagonal after t): tiles that cover the diagonals

    query [B, H, C, D], key [B, Hk, C, D], strides and dtypes as in flash.py; count int32 [B] or None; vertical, slash: a
    number, or one for each head -> VerticalSlash: starts int32 [B, H, ceil(C / 64)], columns int32 [B, H, N]

Of equal sums the lower column and the nearer diagonal are chosen. At least 30 columns and 50 diagonals are taken, and no
more than there are rows: with either number at least the length, this is dense attention. An A-shape head takes the first
`vertical` columns and the nearest `slash` diagonals whatever their sums; if all heads do, a_shape_lists makes the lists
without query and key. Its window is cut to tiles: each row sees up to 126 keys more than the window has.

    _norm, _sums   last_rows.py: A's columns and diagonals                  two reads of key; float32 [B, H, 2, C]
    select         select.py's radix select over all rows of sums           -> int32 [B, H, 2, max(N, M)], ascending
    _cover         a program per head follows t, a step for each tile       -> starts

Nothing is added in an order that varies, and nothing read on the host. At H = 32, G = 8, D = 128, n = 128K: 0.14 TFLOP, 0.54
G exponentials and 0.54 GB for the sums, of 33 MB: no less than 0.4 ms of an H200's time, 0.2 % of dense attention. As
written about 1.5 ms, estimated from parts: last_rows.py 0.8, select 0.2, the ops between them 0.2, and _cover 0.2 us for
each tile, of which there are at most 2048, and 240 to 310 on planted inputs (see vertical_slash.py).

Method: MInference 1.0, arXiv 2407.02490, and its published code, with the defaults there: 64 queries, 1000 columns, 6096
diagonals. There fewer than 100 diagonals are any of the nearest 100; here they are the nearest. A-shape is the mask of
StreamingLLM, arXiv 2309.17453, with MInference's defaults: 128 sinks and a window of 3968.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tsa_compile.kernels._aten import repeat_heads
from tsa_compile.kernels.launch import by_device, cdiv, launch, tl, triton
from tsa_compile.kernels.select import select_by_sorting, select_triton
from tsa_compile.kernels.sparse.last_rows import Splitting, last_rows_sums, last_rows_sums_aten
from tsa_compile.kernels.sparse.vertical_slash import BLOCK, NONE, VerticalSlash
from tsa_compile.kernels.tiles import aligned_rows, count_of

VERTICAL, SLASH = 1000, 6096
SINKS, NEAR, LAST = 30, 100, 64
A_SHAPE_SINKS, A_SHAPE_WINDOW = 128, 3968
SPLITTING = Splitting(span=16, dims=128, num_warps=4, num_stages=2)

Numbers = int | Sequence[int] | Tensor
"""One for all heads, or one for each. A tensor on a GPU is not read: room is made for as many as there are rows."""

# Triton reads a global only if it is a constexpr.
_NONE = tl.constexpr(NONE)


@triton.jit(do_not_specialize=["capacity", "width", "slots"])
def _cover_kernel(p_chosen, p_wanted, p_count, p_starts, capacity, width, slots, BLOCK: tl.constexpr):
    """The tiles of one head, from the nearest diagonal on."""
    line = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    count = count_of(p_count, tl.program_id(1), capacity)
    number = tl.load(p_wanted + line * 2 + 1)
    p_diagonals = p_chosen + (line * 2 + 1) * width
    p_starts += line * slots
    # At most BLOCK diagonals lie between a tile's start and the next one's, so that the one after these is in view, too.
    view = tl.arange(0, 2 * BLOCK)
    passed = tl.zeros([], tl.int32)
    found = tl.zeros([], tl.int32)
    start = tl.zeros([], tl.int32)
    while start < count:
        tl.store(p_starts + found, start)
        found += 1
        b_next = tl.load(p_diagonals + passed + view, mask=passed + view < number, other=_NONE)  # [2 * BLOCK]
        passed += tl.sum((b_next <= start).to(tl.int32), axis=0)
        start = tl.maximum(start + BLOCK, tl.min(tl.where(b_next <= start, _NONE, b_next), axis=0))
    for first in range(found, slots, 2 * BLOCK):
        tl.store(p_starts + first + view, tl.zeros([2 * BLOCK], tl.int32) + _NONE, mask=first + view < slots)


@functools.lru_cache(maxsize=256)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [n], copied once: copies from the host cannot be captured in a CUDA graph."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _per_head(numbers: Numbers, heads: int, capacity: int, device: torch.device) -> tuple[Tensor, int]:
    """Numbers as int32 [H] on the device, and the largest that the host knows of, at most `capacity`."""
    if isinstance(numbers, Tensor) and numbers.device.type == "cpu":
        numbers = numbers.flatten().tolist()
    if isinstance(numbers, int):
        return torch.full((heads,), numbers, dtype=torch.int32, device=device), min(numbers, capacity)
    given = (numbers.numel() if numbers.dim() == 1 else -1) if isinstance(numbers, Tensor) else len(numbers)
    if given != heads:
        found = tuple(numbers.shape) if isinstance(numbers, Tensor) else given
        raise ValueError(f"vertical-slash attention: numbers for {found} heads; expected one, or one for each of {heads}")
    if isinstance(numbers, Tensor):
        return numbers.to(device, torch.int32), capacity
    return _on_device(tuple(int(n) for n in numbers), device), min(max(numbers), capacity)


def _wanted(
    query: Tensor, count: Tensor | None, vertical: Numbers, slash: Numbers, sinks: int, near: int
) -> tuple[Tensor, tuple[int, int]]:
    """How many columns and diagonals to take, int32 [B, H, 2], and how much room they need."""
    batch, heads, capacity, _ = query.shape
    least = (sinks, near // 2)
    pairs = [_per_head(numbers, heads, capacity, query.device) for numbers in (vertical, slash)]
    wanted = torch.stack([numbers.clamp(min=floor, max=capacity) for (numbers, _), floor in zip(pairs, least)], dim=1)
    if count is not None:
        wanted = wanted.minimum(count[:, None, None])
    rooms = [min(max(most, floor), capacity) for (_, most), floor in zip(pairs, least)]
    return wanted.expand(batch, heads, 2).to(torch.int32).contiguous(), (rooms[0], rooms[1])


def _mark(sums: Tensor, count: Tensor | None, a_shape: Sequence[bool] | None, sinks: int, near: int) -> Tensor:
    """Sums [B, H, 2, C] as they are selected by: the forced ones highest, nothing behind the count, A-shapes by place."""
    (heads, _, capacity), places = sums.shape[1:], torch.arange(sums.shape[3], device=sums.device)
    if count is not None:
        sums = sums.masked_fill_(places >= count[:, None, None, None], -math.inf)
    sums[:, :, 0, :sinks] = math.inf
    sums[:, :, 1, :near] = math.inf
    if a_shape is None:
        return sums
    shaped, _ = _per_head([int(flag) for flag in a_shape], heads, capacity, sums.device)
    return torch.where(shaped[:, None, None] != 0, -places.to(sums.dtype), sums)


def _empty(query: Tensor) -> VerticalSlash:
    none = torch.empty((*query.shape[:2], 0), dtype=torch.int32, device=query.device)
    return VerticalSlash(none, none)


def minference_triton(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None = None, *,
    vertical: Numbers = VERTICAL, slash: Numbers = SLASH, a_shape: Sequence[bool] | None = None,
    sinks: int = SINKS, near: int = NEAR, last: int = LAST, block: int = BLOCK, splitting: Splitting = SPLITTING,
) -> VerticalSlash:  # fmt: skip
    """Launch the kernels; also runs on CPU tensors in the Triton interpreter. See the module's docstring.

    vertical, slash: how many columns and diagonals, for all heads or for each; ValueError for another number of heads.
    a_shape: for each head, whether it takes the first columns and the nearest diagonals; None if no head does.
    sinks, near: how many columns and diagonals are always taken. last: rows of the sums. splitting: see last_rows.py.
    """
    if query.numel() == 0:
        return _empty(query)
    batch, heads, capacity, _ = query.shape
    count = None if count is None else count.contiguous()
    wanted, rooms = _wanted(query, count, vertical, slash, sinks, near)
    sums, _ = last_rows_sums(aligned_rows(query), aligned_rows(key), scale, count, last, splitting)
    sums = _mark(sums, count, a_shape, sinks, near)
    chosen = select_triton(sums.view(-1, 1, capacity), wanted.view(-1), max(rooms)).view(batch, heads, 2, -1)
    starts = torch.empty(batch, heads, cdiv(capacity, block), dtype=torch.int32, device=query.device)
    launch(
        _cover_kernel, (heads, batch), (chosen, wanted, count, starts), (capacity, chosen.shape[3], starts.shape[2]),
        BLOCK=block, num_warps=1,
    )  # fmt: skip
    return VerticalSlash(starts, chosen[:, :, 0, : rooms[0]].contiguous())


def minference_aten(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None = None, *,
    vertical: Numbers = VERTICAL, slash: Numbers = SLASH, a_shape: Sequence[bool] | None = None,
    sinks: int = SINKS, near: int = NEAR, last: int = LAST, block: int = BLOCK,
) -> VerticalSlash:  # fmt: skip
    """The same in ATen ops alone, on any device."""
    if query.numel() == 0:
        return _empty(query)
    (batch, heads, capacity, _), device = query.shape, query.device
    wanted, rooms = _wanted(query, count, vertical, slash, sinks, near)
    rows = torch.full((batch,), capacity, device=device) if count is None else count.clamp(max=capacity).long()
    filler = (torch.arange(capacity, device=device) >= rows[:, None])[:, None, :, None]
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = (t.masked_fill(filler, 0).to(wide) for t in (query, key))
    sums = last_rows_sums_aten(query, repeat_heads(key, heads), scale, rows, last)
    sums = _mark(sums.to(torch.float32), count, a_shape, sinks, near)
    chosen = select_by_sorting(sums.view(-1, 1, capacity), wanted.view(-1), max(rooms)).view(batch, heads, 2, -1)
    behind = torch.arange(chosen.shape[3], device=device) >= wanted[:, :, 1:]
    diagonals = torch.nn.functional.pad(chosen[:, :, 1].masked_fill(behind, NONE), (0, 1), value=NONE)
    start, starts = torch.zeros_like(chosen[:, :, 0, :1]), []
    for _ in range(cdiv(capacity, block)):
        starts.append(start.masked_fill(start >= rows[:, None, None], NONE))
        place = torch.searchsorted(diagonals, start, right=True).clamp(max=diagonals.shape[2] - 1)
        start = diagonals.gather(2, place).maximum((start + block).clamp(max=NONE))
    return VerticalSlash(torch.cat(starts, dim=2), chosen[:, :, 0, : rooms[0]].contiguous())


minference_lists = by_device(minference_triton, minference_aten)


def a_shape_lists(
    query: Tensor, key: Tensor, scale: float, count: Tensor | None = None, *,
    sinks: Numbers = A_SHAPE_SINKS, window: Numbers = A_SHAPE_WINDOW, block: int = BLOCK,
) -> VerticalSlash:  # fmt: skip
    """For each row the first `sinks` keys and at least the last `window`, on any device; numbers as in minference_triton."""
    batch, heads, capacity, _ = query.shape
    (sinks_of, room), (window_of, _) = (_per_head(numbers, heads, capacity, query.device) for numbers in (sinks, window))
    starts = torch.arange(0, cdiv(capacity, block) * block, block, dtype=torch.int32, device=query.device)
    starts = starts.masked_fill((starts > 0) & (starts >= window_of[:, None] + block - 1), NONE)
    columns = torch.arange(room, dtype=torch.int32, device=query.device)
    columns = columns.masked_fill(columns >= sinks_of[:, None], capacity)
    return VerticalSlash(*(lists.expand(batch, -1, -1).contiguous() for lists in (starts, columns)))
