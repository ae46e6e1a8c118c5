"""A second check besides the proofs: each accepted call is computed twice on small random inputs, and must agree.

    original      the graph's own nodes behind the call, run as they are: mask, repeated heads, written-out products
    normal form   softmax(scale * q k^T where kv <= q + Lk - Lq and padding[b, kv]) v, in float64, of the same inputs;
                  of a sliding window where kv > q - window besides

The graph's inputs get random numbers, those of masks the extremes of their types among them. Long static lengths are run
short: every number in the graph that equals the length, or a window's, becomes a small one. A call that differs is left as
the model wrote it, PASS_FAILED, with the case in the report. A call that cannot be run in this way (its mask depends on half
of the model, say) has been proven all the same.

Calls that are computed alike, node by node, are computed once. `TSAConfig(skip_passes=["Validate"])` switches this pass off.
"""

from __future__ import annotations

import copy
import logging
import math
from operator import attrgetter
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils._python_dispatch import _disable_current_modes

from tsa_compile.errors import RewriteError
from tsa_compile.passes.base import CallPlan, Pass, PassResult
from tsa_compile.passes.flex import FLEX, flex_arguments
from tsa_compile.passes.graph import fake, static
from tsa_compile.passes.masks.info import FILLED_KINDS
from tsa_compile.passes.operators import aten
from tsa_compile.reasons import Decision

_log = logging.getLogger(__name__)
_LONGEST = 64  # a static length up to which nothing is shortened
_SHORT = 24
_WINDOW = 3
_SMALL = (5, 3, 7, 2, 6, 4)  # what symbolic sizes become, one after the other
_MOST_NODES = 300
_MOST_ELEMENTS = 2**22
_TRIALS = 3
_UNINITIALISED = (aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Skipped(Exception):
    """A call that cannot be computed in isolation, and why."""


class Validate(Pass):
    """Computes each accepted call by its own nodes and by its normal form; changes nothing."""

    optional = True

    def call(self, graph_module: GraphModule) -> PassResult:
        seen: set[Any] = set()
        for plan in self.state.plans:
            if plan.decision is Decision.UNCHANGED:
                continue
            with self.state.attempt(plan, graph_module.graph, "validation"):
                self._validate(graph_module, plan, seen)
        return self.result(graph_module, len(seen), modified=False)

    def _validate(self, graph_module: GraphModule, plan: CallPlan, seen: set[Any]) -> None:
        try:
            case = Case(graph_module, plan)
            signature = case.signature()
        except Skipped as why:
            _log.debug("%s is not validated: %s", plan.call.layer, why)
            return
        if signature in seen:
            return
        seen.add(signature)
        for trial in range(_TRIALS):
            try:
                difference = case.difference(trial)
            except Exception as error:  # noqa: BLE001  # the model's own code on inputs that it may not be made for
                _log.debug("%s is not validated in trial %d: %s", plan.call.layer, trial, error)
                continue
            if difference is not None:
                raise RewriteError(f"the call and what it was read as differ: {difference}")


class Case:
    """One call with the nodes that it is computed from.

    Args:
        plan: a call whose meaning is accepted, with its padding emitted.

    Raises:
        Skipped: it needs too much of the model.
    """

    def __init__(self, graph_module: GraphModule, plan: CallPlan) -> None:
        self.module, self.plan, self.call = graph_module, plan, plan.call
        self.operands = (self.call.query, self.call.key, self.call.value)
        given = self.operands if self.call.sink_logits is None else (*self.operands, self.call.sink_logits)
        self.operand_of = {self.call.aten.values.get(operand): operand for operand in given}
        self.upstream = any(map(self.call.aten.writers, self.operands))  # the model in front of them is run as well
        self.nodes = self._needed()
        self.sizes = self.usual = self._sizes()
        extents = (*fake(self.call.query).shape[:3], fake(self.call.key).shape[2])
        if math.prod(map(self.sizes.of, extents)) > _MOST_ELEMENTS:
            raise Skipped("it, or what writes its operands, is too long and cannot be run short")

    def _sizes(self, *, least: bool = False) -> _Sizes:
        """Those to run. The model in front of the operands is run as long as it is: its other sizes may equal the length."""
        window = None if self.plan.mask is None else self.plan.mask.window
        operands = [fake(operand) for operand in self.operands]
        return _Sizes(operands, self.nodes, least=least, whole=self.upstream, window=window)

    def _needed(self) -> list[Node]:
        """The nodes behind the call and its padding, in order, with whatever writes to them on the way."""
        aten, order = self.call.aten, {node: i for i, node in enumerate(self.module.graph.nodes)}
        several = (self.call.node, self.plan.padding, self.call.scale, self.call.sink_logits)
        ends = [end for end in several if isinstance(end, Node)]
        needed: set[Node] = set()
        pending = [*ends, *self.operands]
        while pending:
            node = pending.pop()
            if node in needed or order[node] > order[self.call.node]:
                continue
            needed.add(node)
            if len(needed) > _MOST_NODES:
                raise Skipped("too many nodes are behind it")
            if not self._is_given(node):
                pending.extend(_read(node))
            pending.extend(aten.writers(node))
        return sorted(needed, key=order.__getitem__)

    def signature(self) -> Any:
        """Equal for calls that are computed alike from inputs of the same shapes."""
        places = {node: i for i, node in enumerate(self.nodes)}
        lines = [
            (
                node.op if self._is_given(node) else str(node.target),
                str(map_arg((node.args, node.kwargs), lambda read: places.get(read, -1))) * (not self._is_given(node)),
                _described(fake(node)),
            )
            for node in self.nodes
        ]
        several = (*self.operands, self.plan.padding, self.call.sink_logits)
        ends = [places.get(end, -1) if isinstance(end, Node) else str(end) for end in several]
        bodies = [self._attribute(node).code for node in self.nodes if _is_body(node)]
        return tuple(lines), tuple(ends), str(self.call.scale), self.call.is_causal, tuple(bodies)

    def _is_given(self, node: Node) -> bool:
        number = isinstance(fake(node), (bool, int, float, torch.SymInt, torch.SymFloat))
        return number or self._operand(node) is not None or node.op in ("placeholder", "get_attr")

    def _operand(self, node: Node) -> Node | None:
        """The operand of the call that a node holds: it may have been computed twice."""
        value = self.call.aten.values.get(node)
        operand = self.operand_of.get(value) if isinstance(value, Node) else None
        return operand if operand is not None and not self.call.aten.writers(node) else None

    def difference(self, trial: int) -> str | None:
        """The largest difference of the call and its normal form, as a sentence; None if they agree."""
        generator = torch.Generator().manual_seed(trial)
        least = trial == _TRIALS - 1 and not self.usual.short
        self.sizes = self._sizes(least=True) if least else self.usual
        with unset_fake_temporarily(), _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(trial)  # not those of GPUs, which are the user's
            env: dict[Node, Any] = {}
            for node in self.nodes[: self.nodes.index(self.call.node)]:
                env[node] = self._run(node, env, generator, trial)
            operands = [env[operand].clone() for operand in self.operands]
            padding = None if self.plan.padding is None else env[self.plan.padding].clone()
            scale = operands[0].shape[3] ** -0.5 if self.call.scale is None else self.call.scale
            factor = float(env[scale] if isinstance(scale, Node) else scale)
            sink = None if self.call.sink_logits is None else env[self.call.sink_logits].double()
            normal, rows = self._normal_form(operands, padding, factor, self._positions(env), sink)
            original = self._run(self.call.node, env, generator, trial)
        return _compare(original.reshape(normal.shape), normal, rows, trial, self.sizes)

    def _run(self, node: Node, env: dict[Node, Any], generator: torch.Generator, trial: int) -> Any:
        operand = self._operand(node)
        if operand is not None and operand in env:
            return env[operand]
        if operand is not None:
            env[operand] = self._given(operand, generator, trial)
            return env[operand]
        if _is_body(node):
            return self._short_body(node)
        if self._is_given(node):
            return self._given(node, generator, trial)
        args, kwargs = map_arg((node.args, node.kwargs), env.get if node.target is FLEX else env.__getitem__)
        args, kwargs = map_aggregate((args, kwargs), self.sizes.shorten)
        call = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
        if not callable(call) or node.op not in ("call_function", "call_method"):
            raise Skipped(f"{node.name} is no call")
        result = call(*(args[1:] if node.op == "call_method" else args), **kwargs)
        if isinstance(result, Tensor) and result.numel() > _MOST_ELEMENTS:
            raise Skipped(f"{node.name} is too large")
        if getattr(self.call.aten.values.get(node), "target", None) in _UNINITIALISED:
            result.zero_()  # what this memory held before is nothing that an operand is made of
        return result

    def _attribute(self, node: Node) -> Any:
        return attrgetter(str(node.target))(self.module)

    def _short_body(self, node: Node) -> GraphModule:
        """A function of positions, for the lengths that are run."""
        body = self._attribute(node)
        short = GraphModule(body, copy.deepcopy(body.graph))
        for inner in short.graph.nodes:
            inner.args, inner.kwargs = map_aggregate((inner.args, inner.kwargs), self.sizes.shorten)
        short.recompile()
        return short

    def _given(self, node: Node, generator: torch.Generator, trial: int) -> Any:
        value = fake(node)
        if isinstance(value, Tensor):
            if node.op == "get_attr" and value.numel() == 1:
                raise Skipped("it reads a constant")  # which a random number would not stand for
            shape = [self.sizes.of(extent) for extent in value.shape]
            # Beside a sink of -3e38 a mask hides nothing; no model has one.
            ordinary = value.dtype.is_floating_point and (self.upstream or node is self.call.sink_logits)
            return random_tensor(shape, value.dtype, generator, 0 if ordinary else trial)
        if isinstance(value, torch.SymFloat):
            if value.node.hint is None:
                raise Skipped(f"{node.name} is computed from data")
            return value.node.hint
        return self.sizes.of(value) if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else value

    def _positions(self, env: dict[Node, Any]) -> Tensor | None:
        """Up to which key each query sees, where a tensor says so; None where the lengths do."""
        info = self.plan.mask
        if info is None or info.kind not in FILLED_KINDS:
            return None
        if info.positions is None:
            first = info.offset.xreplace({symbol: sympy.Integer(size) for symbol, size in self.sizes.symbols.items()})
            if not first.is_Integer:
                raise Skipped(f"{info.offset} is not known")
            return torch.arange(self.sizes.of(fake(self.call.query).shape[2])) + int(first)
        given = self.call.aten.source(info.leaves[info.positions], self.call.node)
        if given is None or given not in env:
            raise Skipped(f"{info.positions} is not computed on the way")
        return env[given]

    def _normal_form(
        self, operands: list[Tensor], padding: Tensor | None, scale: float, positions: Tensor | None, sink: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the call was read as, and which rows to compare: all but those that are NaN in written-out attention."""
        query, key, value = (operand.double() for operand in operands)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        length, past, info = query.shape[2], key.shape[2] - query.shape[2], self.plan.mask
        allowed = torch.ones(length, past + length, dtype=torch.bool).tril(past)
        if positions is not None:
            allowed = torch.arange(past + length) <= positions[:length, None]
        if info is not None and info.window is not None:
            allowed = allowed.triu(past + 1 - self.sizes.shorten(info.window))
        if padding is not None:
            allowed = allowed & padding[:, None, None, :]
        scores = (query @ key.mT * scale).masked_fill(~allowed, float("-inf"))
        some = allowed.any(-1, keepdim=True).expand(*query.shape[:3], 1)
        empty = value.mean(2, keepdim=True) if info is not None and info.mean_rows else torch.zeros(())
        if sink is not None:
            scores = torch.cat((scores, sink[:, None, None].expand(*scores.shape[:3], 1)), 3)
        weights = torch.nan_to_num(scores.softmax(-1))[..., : key.shape[2]]
        output = torch.where(some, weights @ value, empty)
        rows = some if info is not None and info.nan_rows else torch.ones_like(some)
        return output, rows


class _Sizes:
    """What the sizes of a graph become: symbols small numbers, a long static length a short one.

    Behind a cache three numbers are shortened: the queries, the keys before them, and their sum. With `least` there are as
    few keys before the queries as the graph admits, where that is a symbol: none, if the cache may be empty. With `whole`
    static lengths stay as they are. A `window` and the number before it become small where no size of the graph equals one.
    """

    def __init__(
        self, operands: list[Tensor], nodes: list[Node], *, least: bool = False, whole: bool = False,
        window: int | None = None,
    ) -> None:  # fmt: skip
        query, key, value = operands
        self.short = {} if whole else _shortened(query.shape[2], key.shape[2])  # static lengths that are run short
        others = (query.shape[0], query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        if any(static(size) in self.short for size in others):
            self.short = {}
        self.symbols: dict[sympy.Symbol, int] = {}
        extents = [size for node in nodes for size in getattr(fake(node), "shape", (fake(node),))]
        symbolic = [size for size in extents if isinstance(size, torch.SymInt)]
        numbers = {static(size) for size in extents if isinstance(size, (int, torch.SymInt))}
        before = static(key.shape[2] - query.shape[2])
        if window is not None and before != 0:  # symbols tell of a cache that is full of a window, whose numbers stay
            self.short, before = {}, window
        if window is not None and window > _WINDOW and not {window, window - 1} & {*numbers, *self.short, before}:
            bounds = {window: _WINDOW, window - 1: _WINDOW - 1}
            self.short |= bounds | {-wide: -narrow for wide, narrow in bounds.items()}
        for size in symbolic:
            ranges = size.node.shape_env.var_to_range
            for symbol in sorted(size.node.expr.free_symbols, key=str):
                if symbol not in self.symbols:
                    self.symbols[symbol] = _within(_SMALL[len(self.symbols) % len(_SMALL)], ranges.get(symbol))
        past: Any = key.shape[2] - query.shape[2]
        for symbol in past.node.expr.free_symbols & self.symbols.keys() if least and isinstance(past, torch.SymInt) else ():
            self.symbols[symbol] = _within(0, past.node.shape_env.var_to_range.get(symbol))
        self._raise(key.shape[2], query.shape[2], only_up=True)  # queries are the last of the keys
        self._raise(value.shape[2], key.shape[2])
        if symbolic:
            self._obey([guard.expr for guard in symbolic[0].node.shape_env.guards], [*query.shape, *key.shape, *value.shape])

    def _raise(self, extent: Any, other: Any, *, only_up: bool = False) -> None:
        """Makes one extent equal to another, or no less, where a graph has separate symbols for them."""
        if not isinstance(extent, torch.SymInt) or not isinstance(other, torch.SymInt):
            return
        alone = extent.node.expr.free_symbols - other.node.expr.free_symbols
        missing = self.of(other) - self.of(extent)
        for symbol in sorted(alone, key=str):
            if extent.node.expr.coeff(symbol) == 1 and (missing > 0 or not only_up):
                self.symbols[symbol] += missing
                return

    def _obey(self, guards: list[Any], extents: list[Any]) -> None:
        """Raises other symbols than the operands' until what the graph was traced under holds: a longer mask, say."""
        fixed = {symbol for size in extents if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}
        for guard in guards:
            free = sorted((guard.free_symbols & self.symbols.keys()) - fixed, key=str)
            while free and guard.xreplace(self.symbols) == sympy.false and self.symbols[free[0]] < 2 * _LONGEST:
                self.symbols[free[0]] += 1

    def of(self, extent: Any) -> int:
        """A size as it is run."""
        if isinstance(extent, torch.SymInt):
            expr = extent.node.expr.xreplace({symbol: sympy.Integer(value) for symbol, value in self.symbols.items()})
            if not expr.is_Integer:
                raise Skipped(f"its size {extent} is not known")
            return int(expr)
        return int(self.shorten(extent))

    def shorten(self, leaf: Any) -> Any:
        """An argument as it is run: on the CPU, and with short lengths in place of long ones."""
        if isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.startswith("cuda")):
            return torch.device("cpu")
        return self.short.get(leaf, leaf) if type(leaf) is int else leaf

    def __str__(self) -> str:
        said = [f"{symbol} = {value}" for symbol, value in self.symbols.items()]
        return ", ".join([*said, *(f"length {short} for {long}" for long, short in self.short.items())])


def _shortened(queries: Any, keys: Any) -> dict[int, int]:
    """What numbers of a graph become where its static lengths are long; nothing where they are not."""
    if not isinstance(queries, int) or not isinstance(keys, int) or max(queries, keys) <= _LONGEST:
        return {}
    if queries == keys:
        return {keys: _SHORT}
    past = keys - queries
    few, before = min(queries, _SHORT), min(past, _SHORT if past == queries else _SHORT + 5)
    return {queries: few, past: before, keys: few + before}


def _within(size: int, bounds: Any) -> int:
    """A small size within a symbol's range."""
    if bounds is None:
        return size
    low, high = (int(bound) if bound.is_Integer else None for bound in (bounds.lower, bounds.upper))
    if low is not None and low > 4 * _LONGEST:
        raise Skipped(f"its shortest length is {low}")
    return max(low or 0, size if high is None else min(size, high))


def random_tensor(shape: list[int], dtype: torch.dtype, generator: torch.Generator, trial: int) -> Tensor:
    """Random numbers: zeros and ones, from the second trial on extremes; a normal distribution for what is no mask."""
    if dtype.is_floating_point and (trial == 0 or len(shape) not in (1, 2)):
        return (0.7 * torch.randn(shape, generator=generator)).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.6
    if dtype.is_floating_point:
        choices = [0.0, 1.0, -1.0, torch.finfo(dtype).min, 2.5]
    elif dtype.is_complex:
        raise Skipped("it reads complex numbers")
    else:
        info = torch.iinfo(dtype)
        extremes = (2, -1, 255, 256, info.min, info.max)
        choices = [0, 1, *(value for value in extremes if trial > 0 and info.min <= value <= info.max)]
    picked = torch.randint(len(choices), shape, generator=generator)
    return torch.tensor(choices, dtype=dtype)[picked]


def _is_body(node: Node) -> bool:
    """Whether a node is a graph: a function that another operator is given."""
    return node.op == "get_attr" and fake(node) is None


def _read(node: Node) -> list[Node]:
    """What a node needs to run. FlexAttention in eager form needs no lists of blocks."""
    if node.target is not FLEX:
        return node.all_input_nodes
    others = flex_arguments(node)
    others["block_mask"] = others["block_mask"][-1]
    read: list[Node] = []
    map_arg(tuple(others.values()), read.append)
    return read


def _described(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _compare(original: Tensor, normal: Tensor, rows: Tensor, trial: int, sizes: _Sizes) -> str | None:
    """What differs, in a sentence; None if nothing does."""
    found, wanted = original.double(), normal
    gap = torch.where(found.isnan() & wanted.isnan(), 0.0, (found - wanted).abs())
    gap = torch.where(rows.expand_as(gap), torch.nan_to_num(gap, nan=float("inf")), 0.0)
    if gap.numel() == 0 or float(gap.max()) <= _TOLERANCE.get(original.dtype, 1e-3):
        return None
    row = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))[:3]
    ran = f" ({sizes})" if str(sizes) else ""
    return f"row (batch, head, query) {row} by {float(gap.max()):.3g} in trial {trial}{ran}"
