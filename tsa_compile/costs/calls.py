"""What one attention call costs, dense and sparse, and what the rest of its layer does.

    dense(L)     = attention over L rows
    with `past` keys before them        over L + past keys, of which s are kept
    sparse(L, s) = launches + score + budget + select + compress + attention over s L rows + decompress, or the floor
    rest(L)      = a layer's projections and MLP, and what is between them

L is the number of tokens, s the kept share of them. B, H, G, D, Dv, bytes per element, the window and the keys before the
call's come from a `CallShape`; rates come from devices.py, the only place with measured figures.
Attention over n rows takes t0 + B H (D + Dv) (n^2 + h n) / rate, at n = h (the half length) twice what its causal pairs
are worth: short rows do not fill the GPU, diagonal tiles are half empty. The rate is that of D = Dv = 128; a pair's
exponential takes as long whatever the head size, so narrower heads are slower.

What is unknown is assumed so that the sparse path looks slower than it is, or dense attention faster: see `CallShape`
and, for devices, devices.py. Not foreseen are padded batches of very unequal items (the dense path skips their padding too),
padding with holes, and a kernel asked for by name that is slower than the dense one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tsa_compile.config import Coverage, TSAConfig
from tsa_compile.costs.devices import DeviceCosts

ROUNDED_ROWS = 33 / 32  # rows computed for a count read on the host (kernels/attend.py), at most
SCORED_DIM = 128  # narrower heads score no faster: their exponentials are as many
FLOOR_RATE = 0.57  # of dense attention's: a program of the floor's kernel has few tiles
FLOOR_MS = 0.02  # its launches
# Of dense attention's, by the kernel behind a cache: `benchmarks/attention.py --parts behind` prints this ratio under its
# table. The lowest of an H100 at 16K to 128K keys (benchmarks/results/behind-h100.md).
BEHIND_RATE = 0.72
FLOOR_TILES = 128  # keys that a row computes beyond its window and the sinks, in tiles that are half empty
LONG_WINDOW, WINDOW_RATE = 512, 0.7  # of the same kernel, over more (benchmarks/results/windows.md)
MEASURED_WIDTH = 256  # D + Dv of which `attention_tflops` is the rate


@dataclass(frozen=True)
class CallShape:
    """What the costs of one attention call depend on besides its length."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    itemsize: int
    """Bytes per element. Attention in float32 is charged at the speed of half precision, though it is far slower."""
    window: int
    grouped: bool = False
    """Whether the heads of a group select together. `score` and `select` are charged per query head all the same."""
    counted: bool = True
    """Whether the number of kept rows is known on the device only, as with Coverage."""
    floor: int = 0
    """How many tokens every row sees besides the selected ones: window and sinks. 0: none, and no floor."""
    past: int = 0
    """How many keys lie before those of the L queries: a chunk of a prompt, or a prefill onto a filled cache."""

    @property
    def selections(self) -> int:
        """How many heads select for themselves: so many heads of key and value are gathered."""
        return self.kv_heads if self.grouped else self.heads

    @classmethod
    def configured(
        cls,
        config: TSAConfig,
        batch: Any,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_head_dim: int,
        itemsize: int,
        past: Any = 0,
    ) -> CallShape:
        """A call of these sizes as the configuration makes it sparse. A symbolic batch is 1.

        Launches weigh most there, and the graph that is compiled for one batch size serves the others. A cache of symbolic
        length is as long as it is when this is asked: behind longer ones a chunk gains more.
        """
        hint = past.node.hint if isinstance(past, torch.SymInt) else past
        return cls(
            batch if isinstance(batch, int) else 1, heads, kv_heads, head_dim, value_head_dim, itemsize, config.window,
            grouped=config.granularity == "group", counted=isinstance(config.budget, Coverage),
            floor=0 if config.floor is None else config.floor.window + config.floor.sinks, past=max(0, int(hint or 0)),
        )  # fmt: skip

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, config: TSAConfig) -> CallShape:
        """The call on these [B,H,Lq,D], [B,G,Lk,D], [B,G,Lk,Dv]."""
        batch, past = query.shape[0], key.shape[2] - query.shape[2]
        # Static; int, because Dynamo leaves a size that a guard has fixed symbolic by type, which cannot be hashed.
        heads, kv_heads = int(query.shape[1]), int(key.shape[1])
        width, value_width = int(query.shape[3]), int(value.shape[3])
        return cls.configured(config, batch, heads, kv_heads, width, value_width, query.dtype.itemsize, past)


@dataclass(frozen=True)
class Work:
    """Floating-point operations, bytes read and written, and the time that they take in ms."""

    flops: float
    bytes: float
    ms: float


NOTHING = Work(0, 0, 0.0)


def attention_work(call: CallShape, costs: DeviceCosts, rows: float, kv_heads: int, keys: float) -> Work:
    """Causal attention of [B,H,rows,D] over the last of `keys`, at `kv_heads` heads. Its bytes hide behind its FLOPs."""
    width = call.head_dim + call.value_head_dim
    per_pair = call.batch * call.heads * width  # 2 FLOPs, for half of the pairs
    seen = rows * (2 * keys - rows)
    pairs = seen + rows * costs.attention_half_length
    running = per_pair * slowness(width, costs.attention_exponential) * pairs / (costs.attention_tflops * 1e9)
    slower = costs.attention_slowdown * max(0, running - costs.attention_sustained_ms)
    moved = call.batch * (call.heads * rows + kv_heads * keys) * width * call.itemsize
    return Work(per_pair * seen, moved, costs.attention_ms + running + slower)


def slowness(width: int, exponential: float) -> float:
    """What a product of heads of D + Dv = `width` takes, relative to `MEASURED_WIDTH`."""
    return (1 + exponential / width) / (1 + exponential / MEASURED_WIDTH)


def dense_work(call: CallShape, costs: DeviceCosts, length: int) -> Work:
    """The call as the model wrote it, by the fastest dense kernel."""
    return attention_work(call, costs, length, call.kv_heads, length + call.past)


def sparse_work(call: CallShape, costs: DeviceCosts, length: int, share: float) -> dict[str, Work]:
    """The sparse path by steps, of which "launches" is what it takes at any length; `share` of all tokens is kept."""
    batch, heads, size, selections = call.batch, call.heads, call.itemsize, call.selections
    keys, rows = length + call.past, _kept_rows(call, length, share)
    kept = share * keys

    def moved(count: float, rate: float, flops: float = 0) -> Work:
        return Work(flops, count, count / (rate * 1e9) + flops / (costs.score_tflops * 1e9))

    indices = 4 * batch * selections * kept
    # Key is read twice and the products are made twice, since the weights are too many to keep; the scores are written,
    # read for pooling and written again.
    products = 4 * batch * heads * max(call.head_dim, SCORED_DIM) * call.window * keys
    scored = (2 * call.kv_heads * call.head_dim * size + 12 * heads) * batch * keys
    # A row of key and value is read from memory once, for however many heads of its group.
    pair = call.head_dim + call.value_head_dim
    pair_in = keys * min(1, share * (heads // call.kv_heads)) * call.kv_heads * pair
    gathered = 2 * rows * heads * call.head_dim + pair_in + kept * selections * pair
    scattered = batch * heads * call.value_head_dim * size * (length + rows)
    floor = call.floor + FLOOR_TILES
    return {
        "launches": Work(0, 0, costs.sparse_ms + (costs.count_ms if call.counted else 0.0)),
        "score": moved(scored, costs.bandwidth_tbs, products),
        "budget": moved(batch * (4 * heads + 12) * keys if call.counted else 0, costs.bandwidth_tbs),
        "select": moved(4 * batch * heads * (5 * keys + kept), costs.select_tbs),
        "compress": moved(batch * size * gathered + indices, costs.bandwidth_tbs),
        "attend": _attend_work(call, costs, length, share),
        "decompress": (
            _near_work(call, costs, length, floor, FLOOR_RATE, share)
            if call.floor
            else moved(scattered + indices, costs.bandwidth_tbs)
        ),
    }


def window_work(call: CallShape, costs: DeviceCosts, window: int, length: int) -> Work:
    """Dense attention in which a row sees `window` tokens, by the floor's kernel (kernels/sliding.py)."""
    seen = min(window, length / 2 + call.past) + FLOOR_TILES
    return _near_work(call, costs, length, seen, WINDOW_RATE if window > LONG_WINDOW else FLOOR_RATE)


def _near_work(call: CallShape, costs: DeviceCosts, length: int, seen: float, rate: float, selected: float = 0) -> Work:
    """The kernel that writes every row with what is near it: its bytes hide behind its FLOPs."""
    width = call.head_dim + call.value_head_dim
    flops = 2 * call.batch * call.heads * width * length * seen
    moved = call.heads * (width + selected * call.value_head_dim) + call.kv_heads * width
    ms = flops * slowness(width, costs.attention_exponential) / (rate * costs.attention_tflops * 1e9)
    return Work(flops, call.batch * moved * call.itemsize * length, FLOOR_MS + ms)


def sparse_path(call: CallShape, costs: DeviceCosts, length: int, share: float) -> Work:
    """All steps of the sparse path together."""
    return added(sparse_work(call, costs, length, share).values())


def _kept_rows(call: CallShape, length: int, share: float) -> float:
    """How many of the L rows are kept, of `share` of all keys: of a chunk's the whole window is."""
    return share * length + call.window * call.past / (length + call.past)


def _attend_work(call: CallShape, costs: DeviceCosts, length: int, share: float) -> Work:
    """Attention over the kept rows; with a count, at worst one call per item, on as many more rows as are rounded up.

    A chunk's runs by our own kernel, at `BEHIND_RATE` of the fastest one's rate.
    """
    keys, rows = share * (length + call.past), _kept_rows(call, length, share)
    exact = attention_work(call, costs, rows, call.selections, keys)
    if call.past:
        return replace(exact, ms=exact.ms / BEHIND_RATE)
    if not call.counted:
        return exact
    most = length * min(1, share * ROUNDED_ROWS)
    rounded = attention_work(call, costs, most, call.selections, most)
    return replace(exact, ms=rounded.ms + (call.batch - 1) * costs.attention_ms)


def rest_work(costs: DeviceCosts, tokens: int, active: int, weights: int, itemsize: int, elements: int = 0) -> Work:
    """Projections and MLP, at the rate of the products or of reading the weights, and the kernels between them.

    Args:
        tokens: how many pass, of all items.
        active, weights: those that each token is multiplied with, of a mixture of experts those of its experts; all, read.
        elements: per token that kernels between the products read and write: norms, residuals, positions, activations.
    """
    flops, read, moved = 2 * active * tokens, weights * itemsize, elements * itemsize * tokens
    products = max(flops / (costs.matmul_tflops * 1e9), read / (costs.bandwidth_tbs * 1e9))
    return Work(flops, read + moved, products + moved / (costs.bandwidth_tbs * 1e9))


def added(works: Iterable[Work]) -> Work:
    """Several works, one after the other."""
    several = [*works]
    return Work(*(sum(getattr(work, name) for work in several) for name in ("flops", "bytes", "ms")))
