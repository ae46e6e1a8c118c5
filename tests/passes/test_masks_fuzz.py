"""Random mask programs: what is inferred from the graph must be what the graph computes.

Each case draws a program that builds a mask out of real torch calls, propagates fake tensors through it as tracing does,
infers the meaning of an SDPA call that reads it, runs the program on real tensors of several kinds, and compares. A mask
may be called opaque; it may never be called something that it is not.
"""

import operator
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tsa_compile.kernels import reference
from tsa_compile.passes.graph import fake
from tsa_compile.passes.masks import MaskKind, infer_mask
from tsa_compile.passes.padding import PaddingBuilder
from tsa_compile.passes.sites import find_sites
from tsa_compile.testing import evaluate_mask, graph_text, run_nodes

HEADS, WIDTH = 4, 8
HALF = (torch.float16, torch.bfloat16)
# No score outweighs bfloat16's lowest number; of a float16 score its own lowest is all there is.
HIDDEN = {
    dtype: max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min) for dtype in (torch.float32, torch.float64, *HALF)
}


def map_arguments(function, arguments):
    """Applies a function to every leaf of a node's arguments, those of slices included."""
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(map_arguments(function, argument) for argument in arguments)
    if isinstance(arguments, dict):
        return {name: map_arguments(function, argument) for name, argument in arguments.items()}
    if isinstance(arguments, slice):
        return slice(*(map_arguments(function, part) for part in (arguments.start, arguments.stop, arguments.step)))
    return function(arguments)


class Program:
    """A graph in the making: each call records its fake value, as Dynamo does, and inputs remember how to be drawn."""

    def __init__(self, symbolic, batch, length):
        self.graph, self.symbolic = Graph(), symbolic
        self.mode = FakeTensorMode(shape_env=ShapeEnv() if symbolic else None, allow_non_fake_inputs=True)
        self.mode.cache_enabled = not symbolic  # keys of symbolic shapes cost more than they save
        self.traced = (batch, length)
        self.drawers = []
        self.values = {}

    def input(self, name, draw):
        """A placeholder; `draw(batch, length)` makes a real tensor for it. Batch and length are symbolic, if any."""
        node = self.graph.placeholder(name)
        real = draw(*self.traced)
        context = None
        if self.symbolic:
            sizes = [DimDynamic.DUCK if extent in self.traced else DimDynamic.STATIC for extent in real.shape]
            context = StatelessSymbolicContext(dynamic_sizes=sizes)
        value = self.mode.from_tensor(real, symbolic_context=context, source=ConstantSource(name))
        node.meta["example_value"] = value
        self.drawers.append(draw)
        return node

    def call(self, target, *args, **kwargs):
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(kind, target, args, kwargs)
        values, keywords = map_arguments(fake, (args, kwargs))
        with self.mode:
            call = getattr(values[0], target) if kind == "call_method" else target
            node.meta["example_value"] = call(*(values[1:] if kind == "call_method" else values), **keywords)
        return node

    def finish(self, output):
        self.graph.output((output,))
        return GraphModule(torch.nn.Module(), self.graph)

    def draw(self, batch, length):
        return tuple(draw(batch, length) for draw in self.drawers)


def draw_padding(generator, batch, length):
    """Right, left and scattered padding, everything valid, nothing valid: bool [B, L]."""
    rows = []
    for _ in range(batch):
        row, cut = torch.ones(length, dtype=torch.bool), int(torch.randint(0, length, (), generator=generator))
        kind = int(torch.randint(0, 6, (), generator=generator))
        if kind == 0:
            row[:cut] = False
        elif kind == 1:
            row[cut:] = False
        elif kind == 2:
            row = torch.rand(length, generator=generator) < 0.6
        elif kind == 3:
            row[:] = False
        rows.append(row)
    return torch.stack(rows)


class Masks:
    """Draws a program that ends in a mask for attention over [B, H, L, D]."""

    def __init__(self, seed, symbolic):
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.rng.choice([torch.float32] * 5 + [torch.float64, *HALF])
        self.p = Program(symbolic, batch=2, length=self.rng.choice([6, 7, 9]))
        self.expect_opaque = False
        self.pads = 0
        p, loud = self.p, self.rng.choice([1.0, 4.0])  # loud scores outweigh what only looks like a mask

        def normal(b, n):
            return torch.randn(b, HEADS, n, WIDTH, generator=self.generator).to(self.dtype)

        self.query = p.input("query", lambda b, n: loud * normal(b, n))
        self.key, self.value = p.input("key", lambda b, n: loud * normal(b, n)), p.input("value", normal)
        self.batch, self.length = p.traced
        if symbolic:
            self.batch, self.length = p.call("size", self.query, 0), p.call("size", self.query, 2)

    def pick(self, *options):
        return self.rng.choice(options)

    def maybe(self, chance):
        return self.rng.random() < chance

    # -- positions [L] ----------------------------------------------------------------------------------------------

    def sum_of(self, left, right):
        if isinstance(left, int) and isinstance(right, int):
            return left + right
        return self.p.call(operator.add, left, right)

    def positions(self):
        p, n = self.p, self.length
        kind = self.rng.randrange(14)
        if kind == 0:
            return p.call(torch.arange, 0, n)
        if kind == 1:
            return p.call(torch.arange, 0, n, 1)
        if kind == 2:
            return p.call(torch.arange, n, dtype=torch.int32)
        if kind == 3:
            return p.call(torch.arange, start=0, end=n)
        if kind == 4:
            shift = self.pick(1, 2, 5)
            return p.call(operator.sub, p.call(torch.arange, shift, self.sum_of(n, shift)), shift)
        if kind == 5:
            ones = p.call(torch.ones, n, dtype=torch.int64)
            return p.call(operator.sub, p.call(torch.cumsum, ones, 0), 1)
        if kind == 6:
            return p.call("to", p.call(torch.arange, n), self.pick(torch.int32, torch.int64))
        if kind == 7:
            return p.call(operator.getitem, p.call(torch.arange, self.sum_of(n, 3)), slice(None, n))
        if kind == 8:
            return p.call(torch.ops.aten.arange.start_step, 0, n, 1)
        if kind == 9:
            shift = self.pick(1, 3)
            return p.call(operator.getitem, p.call(torch.arange, -shift, n), slice(shift, None))
        return p.call(torch.arange, n)

    def trap_positions(self):
        """Positions that are not the index, or not exactly."""
        p, n = self.p, self.length
        kind = self.rng.randrange(9)
        if kind == 0:
            return p.call(torch.arange, n, dtype=self.pick(torch.float16, torch.bfloat16, torch.float32))
        if kind == 1:
            return p.call("to", p.call(torch.arange, 2045, self.sum_of(n, 2045)), self.pick(*HALF))
        if kind == 2:
            double = self.sum_of(n, n)
            return p.call(torch.arange, 0, double, 2)
        if kind == 3:
            return p.call(torch.arange, 1, self.sum_of(n, 1))
        if kind == 4:
            return p.call(torch.flip, p.call(torch.arange, n), [0])
        if kind == 5:
            return p.call(operator.floordiv, p.call(torch.arange, n), 2)
        if kind == 6:
            return p.call(operator.neg, p.call(torch.arange, n))
        if kind == 7:
            return p.call("to", p.call(torch.arange, n), torch.uint8)
        return p.input(f"ids_{len(self.p.drawers)}", lambda b, n: torch.randperm(n, generator=self.generator))

    def pair(self, trap=0.0):
        """Positions of queries and keys, ready to be broadcast against each other, in two or four dimensions."""
        q, kv = (self.trap_positions() if self.maybe(trap) else self.positions() for _ in range(2))
        p, full = self.p, slice(None)
        if self.maybe(0.5):
            kv = self.pick(
                lambda: kv,
                lambda: p.call("unsqueeze", kv, 0),
                lambda: p.call(operator.getitem, kv, (None, full)),
                lambda: p.call("view", kv, 1, -1),
            )()
            q = self.pick(
                lambda: p.call("unsqueeze", q, -1),
                lambda: p.call(torch.unsqueeze, q, dim=1),
                lambda: p.call(operator.getitem, q, (full, None)),
                lambda: p.call("reshape", q, -1, 1),
                lambda: p.call("transpose", p.call("unsqueeze", q, 0), 0, 1),
                lambda: p.call("t", p.call("unsqueeze", q, 0)),
            )()
            return q, kv
        kv = p.call(operator.getitem, kv, self.pick((None, None, None, full), (None, None, None, Ellipsis)))
        q = self.pick(
            lambda: p.call(operator.getitem, q, (None, None, full, None)),
            lambda: p.call("view", q, 1, 1, -1, 1),
            lambda: p.call("permute", p.call(operator.getitem, q, (None, None, None, full)), 0, 1, 3, 2),
            lambda: p.call("unsqueeze", p.call(operator.getitem, q, (None, None)), -1),
        )()
        return q, kv

    # -- conditions, bool tensors that broadcast to [B, H, L, L] ------------------------------------------------------

    def compare(self, name, left, right):
        word = {"le": "less_equal", "lt": "less", "ge": "greater_equal", "gt": "greater", "eq": "eq", "ne": "ne"}[name]
        target = self.pick(getattr(operator, name), getattr(torch, name), name, word)
        return self.p.call(target, left, right)

    def invert(self, m):
        return self.p.call(self.pick(operator.invert, torch.logical_not, torch.bitwise_not, "logical_not"), m)

    def join(self, left, right, word):
        spellings = {
            "and": (operator.and_, torch.logical_and, torch.bitwise_and, operator.mul, "logical_and"),
            "or": (operator.or_, torch.logical_or, torch.bitwise_or, operator.add, "logical_or"),
            "xor": (operator.xor, torch.logical_xor, operator.ne),
        }
        return self.p.call(self.pick(*spellings[word]), left, right)

    def square(self, dtype, fill=1):
        n = self.length
        if fill == 1 and self.maybe(0.5):
            return self.p.call(torch.ones, n, n, dtype=dtype)
        return self.p.call(torch.full, (n, n), fill, dtype=dtype)

    def causal(self, trap=0.0):
        """kv <= q, in one of its spellings."""
        p, kind = self.p, self.rng.randrange(13)
        if kind == 0:
            return p.call(self.pick("tril", torch.tril), self.square(torch.bool))
        if kind == 1:
            return self.invert(p.call("triu", self.square(torch.bool), 1))
        if kind == 2:
            return p.call("bool", p.call(torch.tril, self.square(self.pick(torch.int64, torch.float32, torch.uint8))))
        if kind == 3:
            return self.compare("eq", p.call(torch.triu, self.square(torch.float32), diagonal=1), 0)
        q, kv = self.pair(trap)
        if kind == 4:
            return self.compare("ge", q, kv)
        if kind == 5:
            return self.compare("lt", kv, p.call(operator.add, q, 1))
        if kind == 6:
            return self.invert(self.compare("gt", kv, q))
        if kind == 7:
            return self.compare("le", p.call(self.pick(operator.sub, torch.sub), kv, q), 0)
        if kind == 8:
            return self.compare("ge", p.call("sub", q, kv), 0)
        if kind == 9:
            return self.compare("gt", p.call(operator.sub, q, kv), -1)
        if kind == 10:
            return self.compare("ne", p.call(torch.where, self.compare("gt", kv, q), 0, 1), 0)
        return self.compare("le", kv, q)

    def bound(self):
        """A comparison of positions at a random distance."""
        q, kv = self.pair(trap=0.15)
        q = self.p.call(self.pick(operator.add, operator.sub), q, self.rng.randrange(0, 4))
        sides = (q, kv) if self.maybe(0.5) else (kv, q)
        return self.compare(self.pick("le", "lt", "ge", "gt", "eq", "ne"), *sides)

    def window(self, large=False):
        q, kv = self.pair()
        width = 64 if large and not self.p.symbolic else self.rng.randrange(1, 6)
        if self.maybe(0.5):
            return self.compare("gt", kv, self.p.call(operator.sub, q, width))
        return self.compare("lt", self.p.call(operator.sub, q, kv), width)

    def chunk(self):
        q, kv = self.pair()
        size = self.rng.randrange(2, 5)
        split = self.pick(
            lambda x: self.p.call(operator.floordiv, x, size),
            lambda x: self.p.call(torch.div, x, size, rounding_mode="floor"),
        )
        return self.compare("eq", split(q), split(kv))

    def padding(self):
        """Valid keys, bool [B, 1, 1, L], out of a padding mask in one of the forms in which models are given it."""
        p, full, name = self.p, slice(None), f"pad_{self.pads}"
        self.pads += 1

        def draw(b, n):
            return draw_padding(self.generator, b, n)

        dtype = self.pick(torch.int64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float16)
        if self.maybe(0.15):
            pad = p.input(name, lambda b, n: draw(b, n)[:, None, None].to(dtype))
        else:
            levels = self.pick(1, 1, 1, 3)  # some masks number their segments
            more, start = self.pick((0, 0), (0, 0), (3, 0), (3, 1))  # some are cut out of a larger one

            def numbered(b, n):
                b, n = b + more, n + more
                return (draw(b, n) * torch.randint(1, levels + 1, (b, n), generator=self.generator)).to(dtype)

            pad = p.input(name, numbered)
            if more:
                rows, columns = (slice(start, self.sum_of(extent, start)) for extent in (self.batch, self.length))
                pad = p.call(operator.getitem, pad, (rows, columns))
            elif self.maybe(0.1):
                pad = p.call("t", p.call("t", pad))
        if dtype == torch.bool:
            valid = pad
        else:
            whole = not dtype.is_floating_point
            valid = self.pick(
                lambda: self.compare("ne", pad, 0),
                lambda: self.compare("gt", pad, 0),
                lambda: self.compare("eq", pad, 1),
                lambda: self.compare("gt", pad, 1),
                lambda: self.compare("ge", pad, 1) if whole else self.compare("gt", pad, 0.5),
                lambda: p.call("bool", pad),
                lambda: p.call("to", pad, torch.bool),
                lambda: self.invert(self.compare("eq", pad, 0)),
                lambda: self.compare("ne", p.call(operator.sub, 1, pad), 1),
            )()
        if fake(valid).dim() == 4:
            return valid
        kind = self.rng.randrange(6)
        if kind == 0:
            return p.call("unsqueeze", p.call("unsqueeze", valid, 1), 2)
        if kind == 1:
            return p.call("view", valid, self.batch, 1, 1, self.length)
        if kind == 2:
            rows = p.call(operator.getitem, p.call(torch.arange, self.batch), (full, None, None, None))
            columns = p.call(operator.getitem, self.positions(), (None, None, None, full))
            return p.call(operator.getitem, valid, (rows, columns))
        if kind == 3:
            rows = p.call("view", p.call(torch.arange, self.batch), -1, 1, 1, 1)
            columns = p.call("view", self.positions(), 1, 1, 1, -1)
            return p.call(torch.ops.aten.index.Tensor, valid, [rows, columns])
        if kind == 4:
            wide = p.call(
                "expand", p.call(operator.getitem, valid, (full, None, None)), self.batch, 1, self.length, self.length
            )
            return wide
        return p.call(operator.getitem, valid, (full, None, None, full))

    def query_padding(self):
        """Not padding: it depends on the query."""
        return self.p.call("transpose", self.padding(), -1, -2) if self.maybe(0.8) else self.padding()

    def per_head(self):
        name = f"heads_{len(self.p.drawers)}"
        node = self.p.input(name, lambda b, n: torch.rand(HEADS, generator=self.generator) < 0.5)
        return self.p.call("view", node, 1, HEADS, 1, 1)

    def documents(self, constant=False):
        p, full = self.p, slice(None)
        if constant:  # a document ends where positions do not go up by one: nowhere
            ids = p.call("unsqueeze", self.positions(), 0)
            before = p.call(operator.sub, p.call(operator.getitem, ids, (full, slice(None, 1))), 1)
            jumps = self.compare("ne", p.call(torch.diff, ids, prepend=before, dim=-1), 1)
            document = p.call("cumsum", jumps, -1)
        else:
            name = f"document_{len(p.drawers)}"
            document = p.input(name, lambda b, n: torch.randint(0, 3, (b, n), generator=self.generator).sort(-1).values)
        left = p.call(operator.getitem, document, (full, None, full, None))
        return self.compare("eq", left, p.call(operator.getitem, document, (full, None, None, full)))

    def constant(self):
        return self.square(torch.bool, self.pick(True, True, False))

    def disguise(self, m):
        """The same condition, written differently."""
        p = self.p
        floats = self.pick(torch.float32, *HALF)
        if self.maybe(0.03):
            return self.misread(m)
        return self.pick(
            lambda: m,
            lambda: m,
            lambda: m,
            lambda: self.invert(self.invert(m)),
            lambda: self.join(m, self.square(torch.bool, True), "and"),
            lambda: self.join(m, self.square(torch.bool, False), "or"),
            lambda: p.call(torch.where, m, True, False),
            lambda: self.invert(p.call(torch.where, m, False, True)),
            lambda: p.call("to", p.call("to", m, self.pick(torch.int64, torch.int32, torch.uint8)), torch.bool),
            lambda: self.compare("eq", p.call("to", m, floats), 1.0),
            lambda: self.compare("lt", p.call(operator.sub, 1, p.call("to", m, floats)), 0.5),
            lambda: p.call(self.pick("contiguous", "clone", "detach"), m),
            lambda: p.call("masked_fill", m, self.invert(m), False),
            lambda: p.call(operator.getitem, m, (Ellipsis, slice(None, self.length))),
            lambda: p.call("transpose", p.call("transpose", m, -1, -2), -2, -1),
            lambda: self.join(m, m, self.pick("and", "or")),
        )()

    def misread(self, m):
        """Operators whose further arguments change what they do."""
        p, one = self.p, lambda dtype: self.p.call("to", m, dtype)
        return self.pick(
            lambda: p.call("view", one(torch.uint8), torch.bool),
            lambda: self.compare("ge", p.call("view", one(torch.float32), torch.int32), 2),
            lambda: self.compare("ge", p.call(torch.ops.aten.rsub.Scalar, one(torch.int64), 1, 2), 0),
            lambda: self.compare("gt", p.call(torch.add, one(torch.int64), one(torch.int64), alpha=-1), 0),
            lambda: self.compare("ne", p.call(torch.div, one(torch.int64), 2, rounding_mode="floor"), 0),
            lambda: self.compare("ne", p.call(torch.div, one(torch.int64), 2, rounding_mode="trunc"), 0),
        )()

    def tree(self, depth):
        if depth == 0 or self.maybe(0.2):
            leaf = self.pick(
                self.causal, self.causal, self.bound, self.bound, self.window, self.chunk, self.padding,
                self.query_padding, self.per_head, self.documents, self.constant,
            )  # fmt: skip
            return self.disguise(leaf())
        if self.maybe(0.2):
            return self.invert(self.tree(depth - 1))
        if self.maybe(0.1):
            return self.p.call(torch.where, *(self.tree(depth - 1) for _ in range(3)))
        return self.join(self.tree(depth - 1), self.tree(depth - 1), self.pick("and", "and", "or", "xor"))

    def conjunction(self, *terms):
        terms = list(terms)
        self.rng.shuffle(terms)
        result = self.disguise(terms[0])
        for term in terms[1:]:
            if self.maybe(0.2):  # De Morgan
                result = self.invert(self.join(self.invert(result), self.invert(self.disguise(term)), "or"))
            else:
                result = self.join(result, self.disguise(term), "and")
        return result

    def condition(self):
        family = self.rng.randrange(12)
        if family < 3:
            return self.conjunction(self.causal())
        if family < 6:
            return self.conjunction(self.causal(), self.padding())
        if family == 6:
            return self.conjunction(self.causal(), self.window(large=True), self.documents(constant=True))
        if family == 7:
            return self.conjunction(self.causal(), self.padding(), self.pick(self.padding, self.constant, self.window)())
        if family == 8:
            return self.conjunction(self.causal(trap=0.5), *([self.padding()] if self.maybe(0.3) else []))
        if family == 9:
            other = self.pick(self.window, self.chunk, self.documents, self.query_padding, self.per_head, self.bound)
            return self.conjunction(self.causal(), other())
        return self.tree(self.rng.randrange(1, 4))

    # -- masks --------------------------------------------------------------------------------------------------------

    def fill(self):
        lowest = torch.finfo(self.dtype).min
        return self.pick(float("-inf"), float("-inf"), lowest, lowest, lowest, -1e4)

    def additive(self, m, fill=None):
        p, dtype = self.p, self.dtype
        fill = self.fill() if fill is None else fill

        def zeros():
            return p.call(torch.zeros_like, m, dtype=dtype)

        kind = self.rng.randrange(8)
        if kind == 0 and dtype != torch.float64:  # scalars make a float32 tensor
            mask = p.call(torch.where, m, 0.0, fill)
        elif kind == 1:
            low = p.call(torch.tensor, fill, dtype=dtype)
            mask = p.call(torch.where, m, p.call(torch.tensor, 0.0, dtype=dtype), low)
        elif kind == 2 and fill != float("-inf"):
            mask = p.call(operator.mul, p.call(operator.sub, 1.0, p.call("to", m, dtype)), fill)
        elif kind == 3:
            mask = p.call("masked_fill", p.call(torch.full_like, m, fill, dtype=dtype), m, 0.0)
        elif kind == 4:
            number = p.call(self.pick("to", "type"), m, dtype)
            number = p.call("masked_fill", number, self.compare("eq", number, 0), fill)
            mask = p.call("masked_fill", number, self.compare("eq", number, 1.0), 0.0)
        elif kind == 5:
            mask = p.call(operator.mul, p.call("masked_fill", zeros(), self.invert(m), fill), self.pick(1.0, 1.0, 0.5, 2.0))
        else:
            mask = p.call(self.pick("masked_fill", torch.masked_fill), zeros(), self.invert(m), fill)
        return p.call("to", mask, dtype) if fake(mask).dtype != dtype else mask

    def float_leaf(self):
        def draw(b, n):
            return torch.where(draw_padding(self.generator, b, n), 0.0, float("-inf"))[:, None, None].to(self.dtype)

        return self.p.input(f"bias_{len(self.p.drawers)}", draw)

    def mutate(self, m):
        """Something behind the mask is written to."""
        p = self.p
        self.expect_opaque = True
        m = p.call("clone", m)
        target = m if self.maybe(0.5) else p.call(operator.getitem, m, (Ellipsis, slice(0, 1)))
        self.pick(
            lambda: p.call("fill_", target, True),
            lambda: p.call("logical_not_", target),
            lambda: p.call(operator.setitem, m, (Ellipsis, 0), True),
            lambda: p.call("masked_fill_", m, p.call("clone", m), True),
            lambda: p.call(torch.ops.aten.copy_.default, target, p.call(torch.ones_like, target)),
            lambda: p.call(torch.logical_not, target, out=target),
        )()
        return self.disguise(m)

    def mask(self):
        m = self.condition()
        if self.maybe(0.06):
            m = self.mutate(m)
        if self.maybe(0.55):
            mask = m
        elif self.maybe(0.15):  # two additive masks
            mask = self.p.call(operator.add, self.additive(m), self.additive(self.pick(self.padding, self.causal)()))
        elif self.maybe(0.05):
            mask = self.p.call(operator.add, self.additive(m), self.float_leaf())
        else:
            mask = self.additive(m)
        if self.maybe(0.6) or fake(mask).dim() not in (2, 4):
            heads = (
                1 if fake(mask).dim() < 4 or (isinstance(fake(mask).shape[1], int) and fake(mask).shape[1] == 1) else HEADS
            )
            mask = self.p.call("expand", mask, self.batch, self.pick(heads, HEADS), self.length, self.length)
        return mask

    def build(self):
        """(graph, mask node)"""
        mask = self.mask()
        p, qkv = self.p, (self.query, self.key, self.value)
        if self.maybe(0.5):
            output = p.call(F.scaled_dot_product_attention, *qkv, mask)
        else:
            output = p.call(F.scaled_dot_product_attention, *qkv, attn_mask=mask, dropout_p=0.0, is_causal=False)
        return p.finish(output), mask


def shape_symbols(graph_module, inputs):
    """The value of each shape symbol, read from the real inputs."""
    symbols = {}
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node, real in zip(placeholders, inputs, strict=True):
        for symbolic, extent in zip(fake(node).shape, real.shape, strict=True):
            if isinstance(symbolic, torch.SymInt):
                symbols[str(symbolic)] = extent
    return symbols


def check(seed, symbolic):
    """One case; returns what the mask was said to be."""
    masks = Masks(seed, symbolic)
    graph_module, mask = masks.build()
    (site,) = find_sites(graph_module)
    assert site.problem is None
    meaning = infer_mask(site)
    if masks.expect_opaque:
        assert meaning.kind is MaskKind.OPAQUE, graph_text(graph_module)
    if meaning.kind is MaskKind.OPAQUE:
        return meaning
    padding = None
    if meaning.padding is not None:
        with graph_module.graph.inserting_before(site.node):
            padding = PaddingBuilder(graph_module.graph).padding(site, meaning)
    sizes = [masks.p.traced] * 3 + ([(3, 11), (2, 5)] if symbolic else [])
    for batch, length in sizes:
        inputs = masks.p.draw(batch, length)
        values = run_nodes(graph_module, inputs)
        hold_against(meaning, site, values, mask.name, padding, shape_symbols(graph_module, inputs))
    return meaning


def hold_against(meaning, site, values, mask, padding, symbols):
    """The meaning of a mask against the real one, and against what attention makes of it."""
    query, key, value = (values[node.name] for node in (site.query, site.key, site.value))
    real = values[mask].expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    allowed = real if real.dtype == torch.bool else real == 0
    if real.dtype != torch.bool:
        assert (real[~allowed] <= HIDDEN[real.dtype]).all(), "a score is shifted, not hidden"
    inferred = evaluate_mask(meaning, tuple(real.shape), values, symbols)
    assert torch.equal(inferred, allowed)
    valid = None if padding is None else values[padding.name]
    triangle = torch.ones(real.shape[2:], dtype=torch.bool).tril().expand_as(allowed)
    if meaning.kind is MaskKind.NONE:
        assert allowed.all()
    elif meaning.kind is MaskKind.PADDING:
        assert torch.equal(allowed, valid[:, None, None].expand_as(allowed))
    elif meaning.kind is MaskKind.CAUSAL:
        assert valid is None
        assert torch.equal(allowed, triangle)
    elif meaning.kind is MaskKind.CAUSAL_PADDING:
        assert torch.equal(allowed, triangle & valid[:, None, None])
        expected = reference.padded_attention(query, key, value, valid, query.shape[3] ** -0.5, meaning.mean_rows)
        actual = values[site.node.name]
        tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(query.dtype, 1e-4)
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("block", range(6))
def test_random_masks(block, symbolic):
    cases = 30 if symbolic else 320
    kinds = Counter()
    for seed in range(block * cases, (block + 1) * cases):
        seed = seed + (1_000_000 if symbolic else 0)
        try:
            kinds[check(seed, symbolic).kind] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    # Enough of each, or the comparison above would compare nothing.
    assert kinds[MaskKind.CAUSAL] >= cases * 0.1, kinds
    assert kinds[MaskKind.CAUSAL_PADDING] >= cases * 0.1, kinds
    assert kinds[MaskKind.OPAQUE] <= cases * 0.6, kinds
    assert len(kinds) >= (4 if symbolic else 6), kinds
