"""Causal attention over the compressed rows, by whichever registered kernel fits best.

    out[b, h, i] = sum_{j <= i} softmax_j(scale * <query[b, h, i], key[b, g, j]>) value[b, g, j]     i < count[b]

    query [B, H, C, D], key [B, Hk, C, D], value [B, Hk, C, Dv], g = h // (H / Hk), count int32 [B] or None
    ->  out [B, H, C, Dv], contiguous

Compression keeps the tokens' order, so causality among rows is causality among tokens (arXiv 2602.03216, section 3) and
any causal kernel serves. Rows from `count` on are filler: unspecified in the output, and unable to reach a real row,
because attention is causal. A kernel whose key tile straddles `count` multiplies filler by a probability of exactly 0,
which a NaN would survive; compress therefore writes zeros behind `count`, and who calls attend on CUDA without compress
does the same for `compress.FILLER_ROWS` rows.

The work follows the count in one of three ways:

- count None: every row is real, one call.
- a count, and the host may look at it (nothing captures): one read of B integers, then one call for each different
  count, on `[:, :, :n]` views. This is the only synchronisation on the sparse path.
- a count while a CUDA graph is captured: a kernel with `device_count` reads it on the device, as "triton" does (see
  flash.py); without such a kernel all C rows are computed, which is correct and no cheaper than a count of C.

registry.py decides which kernel runs. With sink_logits [H] (sink.py) it is one that gives the log-sum-exp.
"""

from typing import Any

import torch
from torch import Tensor

from tsa_compile.kernels._aten import repeat_heads, slots_below
from tsa_compile.kernels.define import define
from tsa_compile.kernels.registry import AttentionKernel, KernelRequest, choose
from tsa_compile.kernels.sink import check_sink, sink_as_key_aten, with_sink


@define(lambda query, key, value, *others, **options: query.new_empty((*query.shape[:3], value.shape[3])))
def attend(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention over the first count rows of each item; ValueError where shapes do not fit."""
    if sink_logits is not None:
        check_sink("attend", query, sink_logits)
        out, lse = attend_lse(query, key, value, count, scale, kernel)
        return with_sink(out, lse, sink_logits)
    _check(query, key, value, count)
    capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
    chosen = choose(KernelRequest.of(query, key, value), kernel, device_count=count is not None and capturing)
    if chosen.device_count:
        return chosen.causal(query, key, value, scale, count).contiguous()
    if count is None or capturing:
        return chosen.causal(query, key, value, scale).contiguous()
    capacity = query.shape[2]
    counts = [min(n, capacity) for n in count.tolist()]
    if len(set(counts)) == 1 and min(chosen.round_rows(counts[0]), capacity) == capacity == counts[0]:
        return chosen.causal(query, key, value, scale).contiguous()
    return _attend_counts(chosen, query, key, value, counts, scale)


def _with_lse(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@define(_with_lse)
def attend_lse(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """As `attend`, and the log-sum-exp of each row's scaled logits, natural: [B,H,C,Dv], float32 [B,H,C]."""
    _check(query, key, value, count)
    capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
    device_count = count is not None and capturing
    chosen = choose(KernelRequest.of(query, key, value), kernel, device_count=device_count, lse=True)
    out, lse = chosen.causal_lse(query, key, value, scale, count)  # rows from the count on are in no real row's way
    return out.contiguous(), lse.contiguous()


def attend_lse_aten(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """The same in ATen ops, for any exact kernel; holds [B, H, C, C] logits."""
    wide, heads = torch.promote_types(query.dtype, torch.float32), query.shape[1]
    key, value = (repeat_heads(tensor, heads).to(wide) for tensor in (key, value))
    slots = torch.arange(query.shape[2], device=query.device)
    logits = torch.where(slots <= slots[:, None], scale * query.to(wide) @ key.transpose(2, 3), float("-inf"))
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights @ value / total).to(query.dtype), (top + total.log())[..., 0].to(torch.float32)


def _check(query: Tensor, key: Tensor, value: Tensor, count: Tensor | None) -> None:
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    if key.shape != (batch, kv_heads, rows, dim) or value.shape[:3] != key.shape[:3] or heads % kv_heads != 0:
        raise ValueError(
            f"tsa::attend: key {tuple(key.shape)} and value {tuple(value.shape)} do not fit query "
            f"{tuple(query.shape)}; expected [B,Hk,C,D] and [B,Hk,C,Dv] with the query's heads a multiple of Hk"
        )
    if count is not None and count.shape != (batch,):
        raise ValueError(f"tsa::attend: count {tuple(count.shape)}; expected {(batch,)}")


def attend_aten(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in ATen ops, for any exact kernel: all C rows, whatever the count, then zeros behind it."""
    out = sink_as_key_aten(query, key, value, scale, sink_logits)
    if count is not None:
        out = torch.where(slots_below(count, query.shape[2])[..., None], out, 0.0)
    return out.contiguous()


def runs_of(counts: list[int]) -> list[tuple[slice, int]]:
    """The items that are computed together, with their count: all if their counts are equal, else each by itself."""
    return [(slice(None), counts[0])] if len(set(counts)) == 1 else [(slice(b, b + 1), n) for b, n in enumerate(counts)]


def _attend_counts(
    kernel: AttentionKernel, query: Tensor, key: Tensor, value: Tensor, counts: list[int], scale: float
) -> Tensor:
    """A call for each of `runs_of`."""
    shape = (*query.shape[:3], value.shape[3])
    # On CUDA filler is left unwritten: at 128K the zeros alone would cost as much as decompress.
    output = query.new_empty(shape) if query.is_cuda else query.new_zeros(shape)
    for items, n in runs_of(counts):
        if n == 0:
            continue
        rows = min(kernel.round_rows(n), query.shape[2])
        result = kernel.causal(query[items, :, :rows], key[items, :, :rows], value[items, :, :rows], scale)
        output[items, :, :n] = result[:, :, :n]
    return output
