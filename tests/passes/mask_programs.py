"""Random mask programs: a graph in the making, and the pieces that masks are put together from."""

import operator
import random

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import map_aggregate

from tsa_compile.passes.graph import fake

HEADS, WIDTH = 4, 8
HALF = (torch.float16, torch.bfloat16)
# No score outweighs bfloat16's lowest number; a float16 score can be as low as its own lowest number.
HIDDEN = dict.fromkeys((torch.float32, torch.float64, *HALF), torch.finfo(torch.bfloat16).min)


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
        values, keywords = map_aggregate((args, kwargs), fake)
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


class Pieces:
    """Draws positions, comparisons, windows, chunks, padding, documents: what a mask over [B, H, L, D] is made of."""

    def __init__(self, seed, symbolic):
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.rng.choice([torch.float32] * 5 + [torch.float64, *HALF])
        self.p = Program(symbolic, batch=2, length=self.rng.choice([6, 7, 9]))
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
