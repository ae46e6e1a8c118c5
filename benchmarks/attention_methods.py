"""What attention.py compares: each method as a call without arguments on given inputs, with what its output must equal.

All are causal attention of query [B, H, L, D] over key and value [B, G, L, D], which lie in memory as projections leave
them, [B, L, heads, D]. Dense: cuDNN, FlashAttention-2, FlexAttention. Sparse: this package's op, called as a compiled
graph calls it, with the default floor and, as published, without; and the paper's pipeline written plainly in torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from attention_timing import replayed
from torch import Tensor
from torch.backends import cuda as cuda_backends
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import avg_pool1d, scaled_dot_product_attention

from tsa_compile import Floor, TSAConfig, pipeline  # pipeline registers the ops
from tsa_compile.kernels.kept import kept_tokens

assert pipeline.OPS
tsa = torch.ops.tsa
WINDOW, POOL = 128, 7
MIN_TOKENS = 0
"""Not the default 1024, which at 8K would keep more than a small share asks for."""
FLOOR = Floor()
SCORE = TSAConfig().score
BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """Everything about an attention call but its length; the defaults are Llama-3.1-8B's.

    uneven: the items of the batch attend more sharply one after the other, and a Coverage keeps fewer tokens of each.
    """

    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    uneven: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"B={self.batch} H={self.heads} G={self.kv_heads} D={self.head_dim} {dtype}"
        return sizes + ", Coverage, items keep different numbers" * self.uneven

    def input_bytes(self, length: int) -> int:
        """Of query, key and value."""
        return self.batch * length * (self.heads + 2 * self.kv_heads) * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """query, key, value and the scale of one attention call."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def length(self) -> int:
        return self.query.shape[2]


def make_inputs(shape: Shape, length: int, device: str = "cuda") -> Inputs:
    """Random; one token in a hundred has a key twice as long, so that every head has tokens that dominate."""
    sizes = [(shape.batch, length, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    query, key, value = (torch.randn(size, device=device, dtype=shape.dtype).transpose(1, 2) for size in sizes)
    heavy = torch.randperm(length, device=device)[: length // 100]
    key[:, :, heavy] *= 2
    if shape.uneven:
        query *= torch.linspace(0.7, 1.3, shape.batch, device=device, dtype=shape.dtype)[:, None, None, None]
    return Inputs(query, key, value, shape.head_dim**-0.5)


@dataclass(frozen=True)
class Runner:
    """A method on given inputs.

    selected: bool [B, H, L], the tokens that each head selects; None: all.
    floor: what every row sees besides; None: rows that are not selected are 0.
    twin: what computes the same in another way.
    """

    call: Callable[[], Tensor]
    selected: Tensor | None = None
    floor: Floor | None = None
    twin: Callable[[], Tensor] | None = None
    note: str = ""


def kept(length: int, keep: float) -> int:
    """The tokens that KeepRatio(keep) keeps, the window included."""
    count = kept_tokens(length, WINDOW, None, keep, MIN_TOKENS)
    assert count is not None
    return count


def marked(indices: Tensor, length: int, count: Tensor | None = None) -> Tensor:
    """The first `count` [B] (None: all) of the indices [B, H, n] as marks: bool [B, H, L]."""
    slots = torch.arange(indices.shape[2], device=indices.device)
    real = torch.ones_like(slots[None], dtype=torch.bool) if count is None else slots < count[:, None]
    marks = torch.zeros(*indices.shape[:2], length + 1, dtype=torch.bool, device=indices.device)
    return marks.scatter_(2, torch.where(real[:, None], indices.long(), length), True)[..., :length]


def dense(inputs: Inputs, backend: SDPBackend) -> Runner:
    """SDPA by one backend; where that takes equally many heads only, key and value are repeated outside the call."""
    query, key, value = inputs.tensors
    note = ""
    if query.is_cuda and backend is SDPBackend.FLASH_ATTENTION:
        gqa = cuda_backends.SDPAParams(query, key, value, None, 0.0, True, query.shape[1] != key.shape[1])
        if not cuda_backends.can_use_flash_attention(gqa):
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
            note = "key and value repeated beforehand"

    def call() -> Tensor:
        gqa = query.shape[1] != key.shape[1]
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=inputs.scale, enable_gqa=gqa)

    return Runner(call, note=note)


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """FlexAttention's form of the mask."""
    return query >= key


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """flex_attention for static shapes; each new length compiles, and none may fall back to a mask of L x L."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=False)


def block_indices(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a causal mask: for each row block the blocks that need the mask (one, on the diagonal), and the full ones."""
    blocks = torch.arange(-(-length // BLOCK), dtype=torch.int32, device=device)
    full = blocks.expand(1, 1, len(blocks), -1).contiguous()
    return blocks[:, None].expand_as(full).contiguous(), full


def causal_blocks(length: int, indices: tuple[Tensor, Tensor], count: Tensor | None = None) -> BlockMask:
    """A causal block mask over `length` rows; row blocks from `count` on, read on the device, have no blocks at all."""
    diagonal, full = indices
    numbers = full[:, :, 0]
    used = torch.ones_like(numbers) if count is None else (numbers * BLOCK < count[:, None, None]).to(torch.int32)
    return BlockMask.from_kv_blocks(
        used, diagonal, used * numbers, full, BLOCK_SIZE=BLOCK, mask_mod=causal, seq_lengths=(length, length),
        compute_q_blocks=False,
    )  # fmt: skip


def listed_blocks(length: int, lists: tuple[Tensor, Tensor]) -> BlockMask:
    """The block mask of lists (kv_num_blocks [B, H, Q], kv_indices [B, H, Q, N]) that all end with the diagonal."""
    numbers, indices = lists
    diagonal = block_indices(length, indices.device)[0].expand(*indices.shape[:3], -1).contiguous()
    return BlockMask.from_kv_blocks(
        torch.ones_like(numbers), diagonal, numbers - 1, indices, BLOCK_SIZE=BLOCK, mask_mod=causal,
        seq_lengths=(length, length), compute_q_blocks=False,
    )  # fmt: skip


def flex(inputs: Inputs, mask: BlockMask | None = None) -> Runner:
    """FlexAttention compiled by Inductor, with its default options; causal if no mask is given."""
    if mask is None:
        mask = causal_blocks(inputs.length, block_indices(inputs.length, inputs.query.device))
    gqa = inputs.query.shape[1] != inputs.key.shape[1]
    return Runner(lambda: compiled_flex()(*inputs.tensors, block_mask=mask, scale=inputs.scale, enable_gqa=gqa))


def options(
    scale: float, *, keep: float | None = None, coverage: float | None = None, kernel: str = "auto", shared: bool = False,
    floor: Floor | None = FLOOR, score: str = SCORE,
) -> tuple[object, ...]:  # fmt: skip
    """The scalars of tsa.sparse_attention, from scale on; shared: the heads of a group keep the same tokens."""
    near = (None, 0) if floor is None else (floor.window, floor.sinks)
    return scale, WINDOW, POOL, coverage, keep, MIN_TOKENS, None, shared, kernel, *near, None, score


def scored(inputs: Inputs, score: str = SCORE) -> Tensor:
    """The scores of all tokens, [B, H, L]."""
    return tsa.score(inputs.query, inputs.key, None, inputs.scale, WINDOW, POOL, score)


def ours(inputs: Inputs, keep: float, floor: Floor | None = FLOOR, score: str = SCORE) -> Runner:
    """The op that a compiled graph calls once a layer."""
    scalars = options(inputs.scale, keep=keep, floor=floor, score=score)
    scores = scored(inputs, score)
    selected = marked(tsa.select(scores, None, kept(inputs.length, keep)), inputs.length)
    return Runner(lambda: tsa.sparse_attention(*inputs.tensors, *scalars), selected, floor)


def ours_published(inputs: Inputs, keep: float) -> Runner:
    """Without the floor, and with the mean as score."""
    return replace(ours(inputs, keep, None, "mean"), note="no floor, rows that are not selected are 0")


def ours_padded(inputs: Inputs, keep: float) -> Runner:
    """The same with a padding mask of ones, whose valid_ranges a compiled graph reads once for all layers."""
    plain, scalars = ours(inputs, keep), options(inputs.scale, keep=keep)
    padding = torch.ones(inputs.query.shape[0], inputs.length, dtype=torch.bool, device=inputs.query.device)
    valid_ranges = tsa.valid_ranges(padding)
    call = functools.partial(tsa.padded_sparse_attention, *inputs.tensors, padding, valid_ranges, *scalars)
    return replace(plain, call=call, twin=plain.call)


def ours_captured(inputs: Inputs, keep: float) -> Runner:
    """The same as a CUDA graph."""
    plain = ours(inputs, keep)
    return replace(plain, call=replayed(plain.call), twin=plain.call)


def ours_coverage(inputs: Inputs, keep: float) -> Runner:
    """With Coverage, whose count is known on the device alone; the coverage at which items keep about `keep` on average."""
    scores = scored(inputs)
    coverage = coverage_for(scores[..., : inputs.length - WINDOW], kept(inputs.length, keep) - WINDOW)
    count = tsa.budget(scores, coverage, None, MIN_TOKENS)
    selected = marked(tsa.select(scores, count, int(count.max())), inputs.length, count)
    call = functools.partial(tsa.sparse_attention, *inputs.tensors, *options(inputs.scale, coverage=coverage))
    return Runner(call, selected, FLOOR)


def ours_coverage_captured(inputs: Inputs, keep: float) -> Runner:
    """The same as a CUDA graph, in which the count stays on the device."""
    plain = ours_coverage(inputs, keep)
    # Compiles what only a capture would launch: nothing may be compiled while it lasts.
    tsa.sparse_attention(*inputs.tensors, *options(inputs.scale, coverage=0.1, kernel="triton"))
    return replace(plain, call=replayed(plain.call), twin=plain.call)


def coverage_for(scores: Tensor, keep: int) -> float:
    """The coverage at which items, the scores [B, H, n] of whose candidates are given, keep `keep` of them on average.

    An item drops one more than have a cumulated mass below the coverage; so it is a quantile of all of them.
    """
    mass = scores.double().mean(dim=1)
    cumulated = (mass / mass.sum(dim=1, keepdim=True)).sort(dim=1).values.cumsum(dim=1)
    below = len(mass) * (mass.shape[1] - keep - 1)
    return float(cumulated.flatten().sort().values[below - 1 : below + 1].mean()) if below > 0 else 0.0


def paper_scores(query: Tensor, key: Tensor, scale: float, window: int = WINDOW, pool: int = POOL) -> Tensor:
    """Pooled mean attention [B, H, L - window] of the last window to every earlier token; key has H heads."""
    logits = query[:, :, -window:] @ key.transpose(2, 3) * scale
    future = torch.ones(window, window, dtype=torch.bool, device=query.device).triu(1)
    logits[..., -window:].masked_fill_(future, -math.inf)
    weights = logits.softmax(dim=-1, dtype=torch.float32)
    return avg_pool1d(weights[..., :-window].mean(dim=2), pool, stride=1, padding=pool // 2)


def paper_indices(scores: Tensor, coverage: float, length: int, min_tokens: int = MIN_TOKENS) -> Tensor:
    """Sort the heads' mean, cumulate, read the count on the host; each head's top tokens and the window, ascending."""
    mass = scores.mean(dim=1)
    cumulated = (mass / mass.sum(dim=-1, keepdim=True)).sort(dim=-1).values.cumsum(dim=-1)
    drop = int((cumulated < coverage).sum())
    candidates = scores.shape[2]
    keep = min(candidates, max(min_tokens, candidates - drop - (drop > 0)))
    window = torch.arange(candidates, length, device=scores.device).expand(*scores.shape[:2], -1)
    return torch.cat([scores.topk(keep, dim=-1).indices, window], dim=-1).sort(dim=-1).values


def paper_pipeline(
    query: Tensor, key: Tensor, value: Tensor, scale: float, coverage: float, window: int = WINDOW, pool: int = POOL,
    min_tokens: int = MIN_TOKENS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token Sparse Attention (arXiv 2602.03216, section 3) of a batch of one: the output and the indices.

    Repeat key and value heads; score, sort and top-k; gather; FlashAttention-2; zeros and scatter.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    indices = paper_indices(paper_scores(query, key, scale, window, pool), coverage, query.shape[2], min_tokens)
    rows = indices[..., None].expand(-1, -1, -1, query.shape[3])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        compressed = scaled_dot_product_attention(
            *(tensor.gather(2, rows) for tensor in (query, key, value)), is_causal=True, scale=scale
        )
    return torch.zeros_like(query).scatter_(2, rows, compressed), indices


def paper(inputs: Inputs, keep: float) -> Runner:
    """The pipeline with the coverage that makes it keep as many tokens as the others; its selection is its own."""
    repeated = inputs.key.repeat_interleave(inputs.query.shape[1] // inputs.key.shape[1], dim=1)
    scores = paper_scores(inputs.query, repeated, inputs.scale)
    coverage = coverage_for(scores, kept(inputs.length, keep) - WINDOW)
    _, indices = paper_pipeline(*inputs.tensors, inputs.scale, coverage)
    selected = marked(indices, inputs.length)
    return Runner(lambda: paper_pipeline(*inputs.tensors, inputs.scale, coverage)[0], selected, note="no floor")


DENSE: dict[str, Callable[[Inputs], Runner]] = {
    "dense cuDNN": functools.partial(dense, backend=SDPBackend.CUDNN_ATTENTION),
    "dense FlashAttention-2": functools.partial(dense, backend=SDPBackend.FLASH_ATTENTION),
    "FlexAttention": flex,
}
SPARSE: dict[str, Callable[[Inputs, float], Runner]] = {
    "paper's pipeline, plain torch": paper,
    "ours, published": ours_published,
    "ours": ours,
    "ours, padding mask of ones": ours_padded,
    "ours, CUDA graph": ours_captured,
    "ours, Coverage": ours_coverage,
    "ours, Coverage, CUDA graph": ours_coverage_captured,
}
FORM_KEEP = 0.3
"""The only share at which other forms than `ALL_KEEPS` are measured."""
ALL_KEEPS = ("ours, published", "ours", "ours, CUDA graph")
COVERAGE_LENGTHS = (32768, 131072)
"""Coverage is measured at these lengths alone."""
PEER_LENGTHS = (8192, 32768, 131072)
"""FlashAttention-2 and FlexAttention are measured at these lengths alone."""


def compared(length: int, keeps: Iterable[float]) -> Iterator[tuple[str, float | None, Callable[[Inputs], Runner]]]:
    """What is compared at a length: each method's name, its share of the tokens, and how it is built."""
    for name, build in DENSE.items():
        if name == "dense cuDNN" or length in PEER_LENGTHS:
            yield name, None, build
    for keep in keeps:
        for name, sparse in SPARSE.items():
            wanted = name in ALL_KEEPS or keep == FORM_KEEP
            if wanted and ("Coverage" not in name or length in COVERAGE_LENGTHS):
                yield name, keep, functools.partial(sparse, keep=keep)
