"""All steps of token sparse attention as one op: what a compiled graph calls once a layer.

    out = decompress(attend(compress(query, key, value, select(score(query, key), count))))

    query [B, H, Lq, D], key [B, G, L, D], value [B, G, L, Dv], any strides; padding bool [B, L] (True = valid); the queries
    are those of the last Lq positions: all L, or a chunk of a prompt behind a cache (flash.py)
    ->  out [B, H, Lq, Dv] in the memory layout [B, Lq, H, Dv]

It computes what the single ops compute one after the other, and saves what they cost as single calls:

- One call through torch's dispatcher instead of six, and launches without what leads to them (`launch.remembered`): at 8K
  the steps take the GPU less time than six calls the host.
- Buffers of exactly as many rows as are kept, because the count, where it lies on the device, is read before they are
  allocated; while it travels, `select` runs. Large ones exist for some heads at a time (STREAM_BYTES).
- With padding, each item is cut to its valid range, which `valid_ranges` has told the host once for all layers. So the mask
  of ones that every tokenizer passes adds no work, and a keep ratio's count is known without asking the device.
- An item of which everything is kept takes plain causal attention.
- With `group`, the name of a process group, a coverage is decided by the mean over all heads of its processes (ranks.py).
- With `sink_logits` [H] each softmax, that of the scores too, has a number more in its denominator (sink.py).
- With `floor_window` every row also sees its neighbourhood and the sinks (floor.py); without, rows that are not kept are 0.

`sparse_attention` can be captured in a CUDA graph: the count then stays on the device, and a kernel that reads it there
does the work (`AttentionKernel.device_count`). `padded_sparse_attention` cannot, as its valid ranges live on the host.

Method: Token Sparse Attention, arXiv 2602.03216, section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from inspect import Signature, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tsa_compile.kernels._aten import as_rows
from tsa_compile.kernels.attend import attend, attend_lse, runs_of
from tsa_compile.kernels.budget import budget_aten, budget_cuda, check_numbers
from tsa_compile.kernels.cached import behind, check_operands
from tsa_compile.kernels.compress import compress_aten, compress_behind_triton, compress_triton
from tsa_compile.kernels.decompress import attention_output, decompress_aten, decompress_triton
from tsa_compile.kernels.define import define
from tsa_compile.kernels.flash import behind_triton
from tsa_compile.kernels.floor import merge_floor_by_heads, merge_floor_triton
from tsa_compile.kernels.launch import HAS_TRITON, remembered
from tsa_compile.kernels.options import Options
from tsa_compile.kernels.padded import HOST, runs_of_ranges
from tsa_compile.kernels.ranks import mean_over_ranks
from tsa_compile.kernels.registry import AttentionKernel, KernelRequest, choose
from tsa_compile.kernels.score import check_window, score_aten, score_cuda
from tsa_compile.kernels.select import select_by_sorting, select_triton
from tsa_compile.kernels.sink import with_sink

STREAM_BYTES = 2**30
"""The compressed rows of as many heads as fit in this are in memory at a time, unless the kernel asks for more."""


def define_op(function: Callable[..., Tensor], *tags: torch.Tag) -> None:
    """Registers an op of tensors, query, key and value first, of `*options`, which are the fields of Options, and a sink."""
    given = list(signature(function).parameters.values())
    tensors, by_name = given[:-2], given[-1]
    parameters = [*tensors, *signature(Options).parameters.values(), by_name]
    vars(function)["__signature__"] = Signature(parameters, return_annotation=Tensor)
    define(attention_output, *tags)(function)


@functools.lru_cache(maxsize=256)
def _checked(*options: Any) -> Options:
    """An op's options by name; ValueError if one is not allowed. Remembered: those of a layer are the same in each call."""
    named = Options(*options)
    check_numbers("sparse_attention", named.coverage, named.keep_ratio, named.min_tokens)
    check_window("sparse_attention", named.window, named.pool, named.reduce)
    if named.capacity is not None and named.capacity < 1:
        raise ValueError(f"tsa::sparse_attention: capacity is {named.capacity}; expected at least 1, or None")
    if named.floor_window is not None and (named.floor_window < 1 or named.floor_sinks < 0):
        raise ValueError(
            f"tsa::sparse_attention: a floor of {named.floor_window} tokens and {named.floor_sinks} sinks; expected at "
            "least 1 and 0"
        )
    return named


def sparse_attention(query: Tensor, key: Tensor, value: Tensor, *options: Any, sink_logits: Tensor | None = None) -> Tensor:
    """Token sparse attention without padding. See the module's docstring.

    KernelError if the kernel cannot run it, ValueError where tensors do not fit or an option is not allowed.
    """
    check_operands("sparse_attention", query, key, value, sink_logits)
    if not (query.is_cuda and HAS_TRITON):
        return _plain(query, key, value, None, _checked(*options), sink_logits)
    with torch.cuda.device_of(query):
        return sparse_triton(query, key, value, _checked(*options), sink_logits)


define_op(sparse_attention)


def padded_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, valid_ranges: Tensor, *options: Any,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Token sparse attention with padding; `valid_ranges` [B, 3] as `tsa::valid_ranges` makes them of it. Pad rows are 0."""
    check_operands("padded_sparse_attention", query, key, value, sink_logits, padding, valid_ranges)
    if not (query.is_cuda and HAS_TRITON):
        return _plain(query, key, value, padding, _checked(*options), sink_logits)
    with torch.cuda.device_of(query):
        return padded_sparse_triton(query, key, value, padding, valid_ranges, _checked(*options), sink_logits)


define_op(padded_sparse_attention, *HOST)


def sparse_triton(query: Tensor, key: Tensor, value: Tensor, options: Options, sink_logits: Tensor | None = None) -> Tensor:
    """Without padding; also runs on CPU tensors in the Triton interpreter."""
    if options.kept(key.shape[2], query.shape[2]) == key.shape[2]:
        return _dense(query, key, value, options, sink_logits)
    output = attention_output(query, key, value)
    _sparse(output, query, key, value, None, options, sink_logits)
    return output


def padded_sparse_triton(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, valid_ranges: Tensor, options: Options,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """With padding: runs of items with equal valid ranges are computed together."""
    items = [(start, stop, contiguous) for start, stop, contiguous in valid_ranges.tolist()]
    if all(item == (0, key.shape[2], 1) for item in items):
        return sparse_triton(query, key, value, options, sink_logits)
    output = attention_output(query, key, value)
    for group, (start, stop, contiguous) in runs_of_ranges(items):
        parts = (output[group], query[group], key[group], value[group])
        if contiguous:
            _fill_range(*parts, start, stop, options, sink_logits)
        else:
            _sparse(*parts, padding[group], options, sink_logits)
    return output


def _plain(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, options: Options, sink_logits: Tensor | None = None
) -> Tensor:
    """The steps in ATen ops. For the keys before a chunk there are queries of zeros, whose rows are computed in vain."""
    rows, seq_len = query.shape[2], key.shape[2]
    scores = score_aten(query, key, padding, options.scale, options.window, options.pool, options.reduce, sink_logits)
    if rows < seq_len:
        longer = F.pad(query, (0, 0, seq_len - rows, 0))
        whole = _kept_rows(longer, key, value, padding, scores, rows, options, sink_logits)
        return as_rows(whole[:, :, seq_len - rows :])
    return _kept_rows(query, key, value, padding, scores, rows, options, sink_logits)


def _kept_rows(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, scores: Tensor, rows: int, options: Options,
    sink_logits: Tensor | None,
) -> Tensor:  # fmt: skip
    """What follows the scores, in ATen ops; `rows` of the queries are the model's."""
    seq_len = key.shape[2]
    scores = _grouped(scores, key, options)
    kept = options.kept(seq_len, rows) if padding is None else None
    count = None
    if kept is None:
        kept = options.limit(seq_len)
        weighed = _of_all_heads(scores, options)
        count = budget_aten(weighed, options.coverage, options.keep_ratio, options.min_tokens).clamp(max=kept)
    indices = select_by_sorting(scores, count, kept)
    compressed = compress_aten(query, key, value, indices, count)
    if options.floor_window is None:
        out = attend(*compressed, count, options.scale, options.kernel, sink_logits)
        return decompress_aten(out, indices, count, seq_len)
    out, lse = attend_lse(*compressed, count, options.scale, options.kernel)
    near = (options.scale, options.floor_window, options.floor_sinks, sink_logits)
    return merge_floor_by_heads(query, key, value, out, lse, indices, count, padding, *near)


def _grouped(scores: Tensor, key: Tensor, options: Options) -> Tensor:
    return scores.unflatten(1, (key.shape[1], -1)).mean(2) if options.shared else scores


def _of_all_heads(scores: Tensor, options: Options) -> Tensor:
    """What decides how many tokens are kept: the scores, or their mean where other processes have heads too."""
    return scores if options.group is None or not options.coverage else mean_over_ranks(scores, options.group)


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, options: Options, device_count: bool, sink_logits: Tensor | None
) -> AttentionKernel:
    """The kernel for the compressed rows, which have a key head for every selection."""
    request = KernelRequest.of(query, key if options.shared else query, value)
    lse = options.floor_window is not None or sink_logits is not None
    return choose(request, options.kernel, device_count=device_count, lse=lse)


def _dense(query: Tensor, key: Tensor, value: Tensor, options: Options, sink_logits: Tensor | None) -> Tensor:
    """Everything is kept; no copy where the kernel keeps the layout of a query that is [B, L, H, D] in memory."""
    if query.shape[2] < key.shape[2]:
        return as_rows(behind(query, key, value, options.scale, sink_logits))
    kernel = choose(KernelRequest.of(query, key, value), options.kernel, lse=sink_logits is not None)
    if sink_logits is not None:
        return as_rows(with_sink(*kernel.causal_lse(query, key, value, options.scale), sink_logits))
    return as_rows(kernel.causal(query, key, value, options.scale))


def _fill_range(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, start: int, stop: int, options: Options,
    sink_logits: Tensor | None,
) -> None:  # fmt: skip
    """Items whose valid tokens are exactly [start, stop): unpadded ones, between rows of zeros."""
    past = key.shape[2] - query.shape[2]
    first, last = max(start - past, 0), max(stop - past, 0)
    output[:, :, :first].zero_()
    output[:, :, last:].zero_()
    output, query = output[:, :, first:last], query[:, :, first:last]
    key, value = key[:, :, start:stop], value[:, :, start:stop]
    if first >= last:
        return
    if options.kept(stop - start, last - first) == stop - start:
        output.copy_(_dense(query, key, value, options, sink_logits))
    else:
        _sparse(output, query, key, value, None, options, sink_logits)


def _sparse(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, options: Options,
    sink_logits: Tensor | None,
) -> None:  # fmt: skip
    """Scores, decides how many rows there are, and attends to them."""
    seq_len = query.shape[2]
    if seq_len < key.shape[2]:
        return _sparse_behind(output, query, key, value, padding, options, sink_logits)
    kept = options.kept(seq_len, seq_len) if padding is None else None
    if kept is not None:
        kernel = _kernel(query, key, value, options, False, sink_logits)
        rows, count = kept, None
        if kernel.device_count:  # of the rows it is given, it computes no more than the count
            rows = min(kernel.round_rows(kept), seq_len)
            count = None if rows == kept else torch.full(query.shape[:1], kept, dtype=torch.int32, device=query.device)
        best = _best(query, key, count, options, rows, sink_logits)
        return _attend(output, query, key, value, best, count, padding, kernel, options, sink_logits)
    scores, count, limit = _scored(query, key, padding, options, sink_logits)
    capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
    kernel = _kernel(query, key, value, options, capturing, sink_logits)
    if capturing or kernel.device_count:
        chosen = _selected(scores, count, limit)
        return _attend(output, query, key, value, chosen, count, padding, kernel, options, sink_logits)
    on_host = _Fetched(count)
    indices = _selected(scores, count, limit)  # while the count travels
    for items, n in runs_of(on_host.get()):
        if n == 0:
            output[items].zero_()
            continue
        chosen = indices[items, :, : min(kernel.round_rows(n), limit)]
        # With the count even where it equals the rows: kernels without it are other kernels, to be compiled on some day.
        apart = None if padding is None else padding[items]
        parts = (output[items], query[items], key[items], value[items], chosen, count[items], apart)
        _attend(*parts, kernel, options, sink_logits)
    return None


def _sparse_behind(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, options: Options,
    sink_logits: Tensor | None,
) -> None:  # fmt: skip
    """Of a chunk behind a cache, which heads selected different numbers of rows: by the kernel that finds them itself."""
    seq_len = key.shape[2]
    kept = options.kept(seq_len, query.shape[2]) if padding is None else None
    if kept is not None:
        count, indices = None, _best(query, key, None, options, kept, sink_logits)
    else:
        scores, count, limit = _scored(query, key, padding, options, sink_logits)
        capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
        on_host = None if capturing else _Fetched(count)
        indices = _selected(scores, count, limit)  # while the count travels
        most = limit if on_host is None else max(on_host.get(), default=0)
        indices = indices[:, :, : max(most, 1)]
    for tensors, sink in _streamed(output, query, key, value, indices, sink_logits, STREAM_BYTES):
        _, query_part, key_part, value_part, chosen = tensors
        asked, keys, values, first = _compressed_behind(query_part, key_part, value_part, chosen, count)
        out, lse = _attended_behind(asked, keys, values, count, first, options.scale)
        _place(tensors, out, lse, count, padding, options, sink)


def _scores(query: Tensor, key: Tensor, padding: Tensor | None, options: Options, sink_logits: Tensor | None) -> Tensor:
    """One line for each selection."""
    scalars = (options.scale, options.window, options.pool, options.reduce)
    return _grouped(score_cuda(query, key, padding, *scalars, sink_logits), key, options)


@remembered
def _best(
    query: Tensor, key: Tensor, count: Tensor | None, options: Options, rows: int, sink_logits: Tensor | None
) -> Tensor:
    """The indices of the best tokens, where their number does not depend on the scores."""
    return select_triton(_scores(query, key, None, options, sink_logits), count, rows)


def _scored(
    query: Tensor, key: Tensor, padding: Tensor | None, options: Options, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Scores, count, and what no count is above."""
    if options.group is None:
        scores, count = _scored_here(query, key, padding, options, sink_logits)
    else:
        scores = _scored_alone(query, key, padding, options, sink_logits)
        count = _counted(_of_all_heads(scores, options), options)
    limit = options.limit(key.shape[2])
    return scores, count.clamp_(max=limit) if limit < key.shape[2] else count, limit


def _count_of(scores: Tensor, options: Options) -> Tensor:
    return budget_cuda(scores, options.coverage, options.keep_ratio, options.min_tokens)


@remembered
def _scored_here(
    query: Tensor, key: Tensor, padding: Tensor | None, options: Options, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = _scores(query, key, padding, options, sink_logits)
    return scores, _count_of(scores, options)


_scored_alone = remembered(_scores)
_counted = remembered(_count_of)

_selected = remembered(select_triton)
_compressed = remembered(compress_triton)
_compressed_behind = remembered(compress_behind_triton)
_attended_behind = remembered(behind_triton)
_decompressed = remembered(decompress_triton)
_merged = remembered(merge_floor_triton)


class _Fetched:
    """A small tensor on its way to the host: `get` waits for what was launched before, not for what comes after."""

    def __init__(self, tensor: Tensor) -> None:
        self.host = tensor
        self.arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def get(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.tolist()


def _attend(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor | None,
    padding: Tensor | None, kernel: AttentionKernel, options: Options, sink_logits: Tensor | None,
) -> None:  # fmt: skip
    """Compresses, attends and decompresses, some groups of heads at a time."""
    stream_bytes = kernel.stream_bytes or STREAM_BYTES
    for tensors, sink in _streamed(output, query, key, value, indices, sink_logits, stream_bytes):
        _, query_part, key_part, value_part, chosen = tensors
        kept = _compressed(query_part, key_part, value_part, chosen, count)
        if options.floor_window is None and sink is None:
            _place(tensors, kernel.causal(*kept, options.scale, count), None, count, padding, options, None)
        else:
            _place(tensors, *kernel.causal_lse(*kept, options.scale, count), count, padding, options, sink)


def _place(
    tensors: list[Tensor], out: Tensor, lse: Tensor | None, count: Tensor | None, padding: Tensor | None, options: Options,
    sink_logits: Tensor | None,
) -> None:  # fmt: skip
    """Writes the compressed rows to their places: alone, or with a floor merged with what every row sees."""
    target, query, key, value, chosen = tensors
    if lse is None or options.floor_window is None:
        out = out if sink_logits is None or lse is None else with_sink(out, lse, sink_logits)
        _decompressed(out, chosen, count, key.shape[2], target, key.shape[2] - query.shape[2])
    else:
        near = (options.scale, options.floor_window, options.floor_sinks, sink_logits)
        _merged(query, key, value, out, lse, chosen, count, padding, *near, target)


def _streamed(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, indices: Tensor, sink_logits: Tensor | None,
    stream_bytes: int,
) -> Iterator[tuple[list[Tensor], Tensor | None]]:  # fmt: skip
    """The operands of as many heads at a time as have their compressed rows in `stream_bytes`, and their sink."""
    heads, groups = query.shape[1], key.shape[1]
    batch, selections, rows = indices.shape
    row_bytes = heads * (query.shape[3] + value.shape[3]) + selections * (key.shape[3] + value.shape[3])
    parts = max(1, -(-batch * rows * row_bytes * query.element_size() // stream_bytes))
    step = max(1, groups // parts)
    for first in range(0, groups, step):
        tensors, sink = [output, query, key, value, indices], sink_logits
        if step < groups:
            shares = (slice(first * t.shape[1] // groups, (first + step) * t.shape[1] // groups) for t in tensors)
            tensors = [tensor[:, share] for tensor, share in zip(tensors, shares, strict=True)]
            sink = sink if sink is None else sink.unflatten(0, (groups, -1))[first : first + step].flatten()
        yield tensors, sink
