"""What one attention call costs, dense and sparse, and what the rest of its layer does.

    dense(L)     = attention over L rows
    with `past` keys before them        over L + past keys, of which s are kept
    sparse(L, s) = launches + score + budget + select + compress + attention over s L rows + decompress, or the floor
    rest(L)      = a layer's projections and MLP, and what is between them

FLOPs, bytes and milliseconds are sympy expressions in `LENGTH` (L, tokens) and `KEPT` (s, the kept share of them), and in
`PAST` where a chunk is judged, behind a cache of any length. Everything else is a number: B, H, G, D, Dv, bytes per
element and the window come from a `CallShape`; rates come from devices.py, the only place with measured figures.
Attention over n rows takes t0 + B H (D + Dv) (n^2 + h n) / rate, at n = h (the half length) twice what its causal pairs
are worth: short rows do not fill the GPU, diagonal tiles are half empty. The rate is that of D = Dv = 128; a pair's
exponential takes as long whatever the head size, so narrower heads are slower.

What is unknown is assumed so that the sparse path looks slower than it is, or dense attention faster: see `CallShape`
and, for devices, devices.py. Not foreseen are padded batches of very unequal items (the dense path skips their padding too),
padding with holes, and a kernel asked for by name that is slower than the dense one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from tsa_compile.config import Coverage, TSAConfig
from tsa_compile.costs.devices import DeviceCosts

LENGTH, KEPT, PAST = sympy.symbols("L s P", positive=True)
ROUNDED_ROWS = sympy.Rational(33, 32)  # rows computed for a count read on the host (kernels/attend.py), at most
SCORED_DIM = 128  # narrower heads score no faster: their exponentials are as many
FLOOR_RATE = sympy.Rational(57, 100)  # of dense attention's: a program of the floor's kernel has few tiles
FLOOR_MS = sympy.Rational(2, 100)  # its launches
# Of dense attention's, by the kernel behind a cache: `benchmarks/attention.py --parts behind` prints this ratio under its
# table. The lowest of an H100 at 16K to 128K keys (benchmarks/results/behind-h100.md).
BEHIND_RATE = sympy.Rational(72, 100)
FLOOR_TILES = 128  # keys that a row computes beyond its window and the sinks, in tiles that are half empty
LONG_WINDOW, WINDOW_RATE = 512, sympy.Rational(7, 10)  # of the same kernel, over more (benchmarks/results/windows.md)
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
    past: int | sympy.Symbol = 0
    """How many keys lie before those of the L queries: a chunk of a prompt, or a prefill onto a filled cache. Or `PAST`."""

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
    """Floating-point operations, bytes read and written, and the time that they take in ms: expressions in L and s."""

    flops: sympy.Expr
    bytes: sympy.Expr
    ms: sympy.Expr

    def ms_at(self, length: float, kept: float = 1.0) -> float:
        """Milliseconds at a length and a kept share."""
        return float(_function(self.ms)(length, kept))


NOTHING = Work(sympy.Integer(0), sympy.Integer(0), sympy.Integer(0))


def attention_work(
    call: CallShape, costs: DeviceCosts, rows: sympy.Expr, kv_heads: int, keys: sympy.Expr | None = None
) -> Work:
    """Causal attention of [B,H,rows,D] over as many keys, or as the last of `keys`, at `kv_heads` heads. Its bytes hide
    behind its FLOPs.
    """
    keys = rows if keys is None else keys
    width = call.head_dim + call.value_head_dim
    per_pair = call.batch * call.heads * width  # 2 FLOPs, for half of the pairs
    seen = rows * (2 * keys - rows)
    pairs = seen + rows * costs.attention_half_length
    running = per_pair * slowness(width, costs.attention_exponential) * pairs / (costs.attention_tflops * 1e9)
    slower = costs.attention_slowdown * sympy.Max(0, running - costs.attention_sustained_ms)
    moved = call.batch * (call.heads * rows + kv_heads * keys) * width * call.itemsize
    return Work(per_pair * seen, moved, costs.attention_ms + running + slower)


def slowness(width: int, exponential: float) -> float:
    """What a product of heads of D + Dv = `width` takes, relative to `MEASURED_WIDTH`."""
    return (1 + exponential / width) / (1 + exponential / MEASURED_WIDTH)


@functools.lru_cache(maxsize=512)
def dense_work(call: CallShape, costs: DeviceCosts) -> Work:
    """The call as the model wrote it, by the fastest dense kernel."""
    return attention_work(call, costs, LENGTH, call.kv_heads, LENGTH + call.past)


def sparse_work(call: CallShape, costs: DeviceCosts) -> dict[str, Work]:
    """The sparse path by steps, of which "launches" is what it takes at any length."""
    batch, heads, size = call.batch, call.heads, call.itemsize
    keys, selections, zero = LENGTH + call.past, call.selections, sympy.Integer(0)
    kept, rows = KEPT * keys, _kept_rows(call)

    def moved(count: sympy.Expr, rate: float, flops: sympy.Expr = zero) -> Work:
        return Work(flops, count, count / (rate * 1e9) + flops / (costs.score_tflops * 1e9))

    indices = 4 * batch * selections * kept
    # Key is read twice and the products are made twice, since the weights are too many to keep; the scores are written,
    # read for pooling and written again.
    products = 4 * batch * heads * max(call.head_dim, SCORED_DIM) * call.window * keys
    scored = (2 * call.kv_heads * call.head_dim * size + 12 * heads) * batch * keys
    # A row of key and value is read from memory once, for however many heads of its group.
    pair = call.head_dim + call.value_head_dim
    pair_in = keys * sympy.Min(1, KEPT * (heads // call.kv_heads)) * call.kv_heads * pair
    gathered = 2 * rows * heads * call.head_dim + pair_in + kept * selections * pair
    scattered = batch * heads * call.value_head_dim * size * (LENGTH + rows)
    return {
        "launches": Work(zero, zero, sympy.Float(costs.sparse_ms + (costs.count_ms if call.counted else 0.0))),
        "score": moved(scored, costs.bandwidth_tbs, products),
        "budget": moved(batch * (4 * heads + 12) * keys if call.counted else zero, costs.bandwidth_tbs),
        "select": moved(4 * batch * heads * (5 * keys + kept), costs.select_tbs),
        "compress": moved(batch * size * gathered + indices, costs.bandwidth_tbs),
        "attend": _attend_work(call, costs),
        "decompress": moved(scattered + indices, costs.bandwidth_tbs) if not call.floor else _floor_work(call, costs),
    }


@functools.lru_cache(maxsize=512)
def window_work(call: CallShape, costs: DeviceCosts, window: int) -> Work:
    """Dense attention in which a row sees `window` tokens, by the floor's kernel (kernels/sliding.py)."""
    width, seen = call.head_dim + call.value_head_dim, sympy.Min(sympy.Integer(window), LENGTH / 2 + call.past)
    flops = 2 * call.batch * call.heads * width * LENGTH * (seen + FLOOR_TILES)
    rate = (WINDOW_RATE if window > LONG_WINDOW else FLOOR_RATE) * costs.attention_tflops
    ms = flops * slowness(width, costs.attention_exponential) / (rate * 1e9)
    return Work(flops, call.batch * (call.heads + call.kv_heads) * width * call.itemsize * LENGTH, FLOOR_MS + ms)


def _floor_work(call: CallShape, costs: DeviceCosts) -> Work:
    """The kernel that writes every row with its floor: its bytes hide behind its FLOPs."""
    width = call.head_dim + call.value_head_dim
    flops = 2 * call.batch * call.heads * width * LENGTH * (call.floor + FLOOR_TILES)
    rows = call.heads * (width + KEPT * call.value_head_dim) + call.kv_heads * width
    ms = flops * slowness(width, costs.attention_exponential) / (FLOOR_RATE * costs.attention_tflops * 1e9)
    return Work(flops, call.batch * rows * call.itemsize * LENGTH, FLOOR_MS + ms)


@functools.lru_cache(maxsize=512)
def sparse_path(call: CallShape, costs: DeviceCosts) -> Work:
    """All steps of the sparse path together."""
    return added(sparse_work(call, costs).values())


def _kept_rows(call: CallShape, kept: sympy.Expr = KEPT) -> sympy.Expr:
    """How many of the L rows are kept, of `kept` of all keys: of a chunk's the whole window is."""
    return kept * LENGTH + call.window * call.past / (LENGTH + call.past) if call.past else kept * LENGTH


def _attend_work(call: CallShape, costs: DeviceCosts) -> Work:
    """Attention over the kept rows; with a count, at worst one call per item, on as many more rows as are rounded up.

    A chunk's runs by our own kernel, at `BEHIND_RATE` of the fastest one's rate.
    """
    keys = LENGTH + call.past
    exact = attention_work(call, costs, _kept_rows(call), call.selections, KEPT * keys)
    if call.past:
        return replace(exact, ms=exact.ms / BEHIND_RATE)
    if not call.counted:
        return exact
    rounded = attention_work(call, costs, LENGTH * sympy.Min(1, KEPT * ROUNDED_ROWS), call.selections)
    return replace(exact, ms=rounded.ms + (call.batch - 1) * costs.attention_ms)


@dataclass(frozen=True)
class RestShape:
    """What the costs of a layer without its attention, or of the head, depend on besides the length."""

    batch: int
    tokens: int | None
    """How many tokens of each item pass; None for all L."""
    active: int
    """Weights that each token is multiplied with: of a mixture of experts those of its experts."""
    weights: int
    """Weights that are read."""
    elements: int
    """Elements per token that kernels between the products read and write: norms, residuals, positions, activations."""
    itemsize: int


@functools.lru_cache(maxsize=512)
def rest_work(rest: RestShape, costs: DeviceCosts) -> Work:
    """Projections and MLP, at the rate of the products or of reading the weights, and the kernels between them."""
    tokens = rest.batch * (LENGTH if rest.tokens is None else sympy.Integer(rest.tokens))
    flops, read, moved = 2 * rest.active * tokens, rest.weights * rest.itemsize, rest.elements * rest.itemsize * tokens
    products = sympy.Max(flops / (costs.matmul_tflops * 1e9), read / (costs.bandwidth_tbs * 1e9))
    return Work(flops, read + moved, products + moved / (costs.bandwidth_tbs * 1e9))


def added(works: Iterable[Work]) -> Work:
    """Several works, one after the other."""
    several = [NOTHING, *works]
    return Work(*(sympy.Add(*(getattr(work, name) for work in several)) for name in ("flops", "bytes", "ms")))


@functools.lru_cache(maxsize=512)
def _function(expression: sympy.Expr) -> Callable[[float, float], float]:
    return sympy.lambdify((LENGTH, KEPT), expression, "math")


@functools.lru_cache(maxsize=512)
def _milliseconds(
    work: Callable[[CallShape, DeviceCosts], Work], call: CallShape, costs: DeviceCosts
) -> Callable[[float, float, float], float]:
    """Of a length, a kept share and `PAST`."""
    return sympy.lambdify((LENGTH, KEPT, PAST), work(call, costs).ms, "math")


def _of_any_past(call: CallShape) -> CallShape:
    """The call behind a cache of any length, if it is behind one: what takes 0.2 s is done once."""
    return replace(call, past=PAST) if call.past else call


def dense_ms(call: CallShape, costs: DeviceCosts) -> Callable[[float], float]:
    """Milliseconds of the dense call, of its length."""
    ms = _milliseconds(dense_work, _of_any_past(call), costs)
    return lambda length: float(ms(length, 1.0, call.past))


def sparse_ms(call: CallShape, costs: DeviceCosts) -> Callable[[float, float], float]:
    """Milliseconds of the whole sparse path, of the length and the kept share."""
    ms = _milliseconds(sparse_path, _of_any_past(call), costs)
    return lambda length, kept: float(ms(length, kept, call.past))
