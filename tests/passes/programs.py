"""Random whole programs with attention, as source text that can be printed, reproduced by its seed and shrunk.

    def program(q, k, v, pad, at, one):
        B, H, M, D = q.shape
        ...                                   masks, writes, 2 to 4 attention calls, each feeding the next one's query
        return a4, a9, q

Most are small deviations from something that is readable attention. Some read keys and values as from a cache: there are
more of them than queries, and a tensor of positions may say up to which key each query sees.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .program_attention import (
    ATTENTION_TABLES,
    CHAINED,
    GROUPED,
    MASK_TABLES,
    OPERAND_WRITE,
    VIEWS,
    AttentionLines,
    spellings,
)
from .program_pieces import BOOLEAN_WRITE, FLOAT_WRITE, GIVEN, GIVEN_WRITE, PAD_WRITE

HEADER = (
    "B, H, M, D = q.shape",
    "L = {keys}",
    "G, n, Dv = k.shape[1], q.shape[1] // k.shape[1], v.shape[3]",
    "i = torch.arange(L)",
)
PAD_DTYPES = ("int64", "int64", "int64", "int32", "int16", "int8", "uint8", "bool", "bool", "float32", "float16")


# Functions of a user's that Dynamo puts into the graph as they are, under names of torch's that they do not honour.
def softmax(scores, dim):
    """Not torch's."""
    return torch.sigmoid(scores)


def scaled_dot_product_attention(query, key, value, attn_mask=None):
    """Not torch's: every key is seen."""
    return torch.softmax(query @ key.mT, -1) @ value


def tril(mask):
    """Not torch's."""
    return mask.triu()


NAMES = {
    "torch": torch, "F": F, "np": np, "math": math, "checkpoint": checkpoint, "sdpa": F.scaled_dot_product_attention,
    "softmax": softmax, "scaled_dot_product_attention": scaled_dot_product_attention, "tril": tril,
}  # fmt: skip
for look_alike in (softmax, scaled_dot_product_attention, tril):
    torch._dynamo.allow_in_graph(look_alike)


@dataclass(frozen=True)
class Sizes:
    """What the inputs of a program are like.

    lengths: how many keys there are in each call. past: how many of them are more than the queries.
    spare: how many positions are given besides those of the queries; None: the program is given none.
    """

    batch: int
    heads: int
    kv_heads: int
    lengths: tuple[int, ...]
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    pad_dtype: torch.dtype
    extremes: bool
    loud: float
    past: int = 0
    spare: int | None = None


@dataclass(frozen=True)
class Program:
    """A program, the inputs that it is called with, and how its length is marked ("", "maybe", "mark", "all")."""

    seed: int
    lines: tuple[str, ...]
    sizes: Sizes
    dynamic: str = ""
    local: bool = True

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the attention calls' outputs, and the query that came of them."""
        return (*dict.fromkeys(_OUTPUT.findall("\n".join(self.lines))), "q")

    @property
    def source(self) -> str:
        keys = "M" if self.sizes.spare is None else "k.shape[2]"
        header = (line.format(keys=keys) for line in HEADER)
        lines = [*header, *self.lines, f"return {', '.join(self.outputs)}"]
        return "def program(q, k, v, pad, at, one):\n" + "".join(f"    {line}\n" for line in lines)

    def function(self):
        """The program as a Python function."""
        names = dict(NAMES)
        exec(compile(self.source, f"<program {self.seed}>", "exec"), names)
        return names["program"]

    def inputs(self, call: int) -> tuple[torch.Tensor, ...]:
        """The arguments of its first or second call."""
        s, length = self.sizes, self.sizes.lengths[call]
        generator = torch.Generator().manual_seed(self.seed + call)

        def normal(heads, length, width):
            return torch.randn(s.batch, heads, length, width, generator=generator).to(s.dtype)

        q = s.loud * normal(s.heads, length - s.past, s.head_dim)
        k, v = normal(s.kv_heads, length, s.head_dim), normal(s.kv_heads, length, s.value_dim)
        return q, k, v, self.padding(length), self.positions(length), torch.tensor(0.4, dtype=s.dtype)

    def positions(self, length: int) -> torch.Tensor:
        """Up to which key each query sees: as in a cache, also before its first or behind its last one, or anything."""
        s, rng = self.sizes, random.Random(f"positions {self.seed} {length}")
        count = length - s.past + (s.spare or 0)
        kind, first = rng.randrange(7), rng.choice([0, s.past, s.past, rng.randrange(s.past + 1)])
        first = {0: -rng.randrange(1, 5), 1: s.past + rng.randrange(1, 4)}.get(kind, first)
        values = [first + step for step in range(count)]
        if kind in (2, 3):
            values = [rng.randrange(-2, length + 2) for _ in values]
        if kind == 3:
            values.sort()
        if s.extremes:
            values[rng.randrange(count)] = rng.choice([-1, -(2**63), 2**63 - 1, 2**32, 0])
        return torch.tensor(values)

    def padding(self, length: int) -> torch.Tensor:
        """Right, left or scattered padding; with extremes, numbers that are neither 0 nor 1."""
        s, rng = self.sizes, random.Random(self.seed + length)
        rows = torch.ones(s.batch, length, dtype=torch.float64)
        for row in rows:
            cut, kind = rng.randrange(1, length), rng.randrange(5)
            if kind == 0:
                row[:cut] = 0
            elif kind == 1:
                row[cut:] = 0
            elif kind == 2:
                row[rng.sample(range(length), length // 3)] = 0
        values = rows.to(s.pad_dtype)
        for odd in rng.sample(_odd_values(s.pad_dtype), 2) if s.extremes else ():
            values[rng.randrange(s.batch), rng.sample(range(length), 2)] = odd
        return values


def _odd_values(dtype: torch.dtype) -> list[int | float]:
    if dtype == torch.bool:
        return [False, True, True]
    if dtype.is_floating_point:
        return [2.0, -1.0, 0.25, float("inf"), float("nan"), torch.finfo(dtype).max, torch.finfo(dtype).tiny, -0.0]
    info = torch.iinfo(dtype)
    return [x for x in (0, 2, -1, 127, 128, 255, 256, 2**31, 2**32, info.min, info.max) if info.min <= x <= info.max]


def _sizes(seed: int, rng: random.Random, dynamic: str, cache: bool) -> Sizes:
    """Shapes are those of the neighbouring seeds, as Dynamo remembers what an operator makes of a shape."""
    shapes = random.Random(f"shapes {seed // 50}")
    lengths, head_dim = shapes.sample(range(5, 18), 2), shapes.choice([4, 8])
    if cache:  # of fewer than 32 queries, more keys are left as they are
        lengths = [length + 30 for length in lengths]
    return Sizes(
        batch=shapes.choice([1, 2, 2, 2, 3]),
        heads=4,
        kv_heads=shapes.choice([4, 4, 2, 1]),
        lengths=tuple(lengths) if dynamic else tuple(lengths[:1]),
        head_dim=head_dim,
        value_dim=shapes.choice([head_dim] * 3 + [6]),
        dtype=rng.choice([torch.float32] * 8 + [torch.float64, torch.bfloat16, torch.float16]),
        pad_dtype=getattr(torch, rng.choice(PAD_DTYPES)),
        extremes=rng.random() < 0.3,
        loud=rng.choice([1.0, 1.0, 2.0]),
        past=shapes.choice([0, 3, 3, 1]) if cache else 0,
        spare=rng.choice([0, 0, 2]) if cache else None,
    )


_SPELLINGS = [
    random.Random("order").sample(each, len(each)) for each in (spellings(MASK_TABLES), spellings(ATTENTION_TABLES))
]


def generate(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(f"sizes {seed}")
    dynamic = rng.choice(["maybe", "maybe", "maybe", "mark", "all"]) if rng.random() < 0.08 else ""
    due = [each[seed % len(each)] for each in _SPELLINGS]
    written = any(due[0][0] is table for table in (PAD_WRITE, GIVEN_WRITE))
    cache = any(due[0][0] is table for table in (GIVEN, GIVEN_WRITE))
    sizes = _sizes(seed, rng, dynamic, cache or rng.random() < 0.25)
    if due[1][0] is GROUPED:
        sizes = replace(sizes, kv_heads=2)
    given = {None: "", 0: "at"}.get(sizes.spare, "at[:M]")
    late = bool(given) and not (cache or written)  # what is due comes last: most of it is nothing that is rewritten
    p = AttentionLines(seed, [] if late else due, sizes.kv_heads < sizes.heads, given)
    p.half = sizes.dtype in (torch.float16, torch.bfloat16)
    writes = rng.choice([0.0, 0.0, 0.1, 0.1] if given else [0.0, 0.0, 0.0, 0.0, 0.15])
    between = writes * (5 if given else 2)
    view = p.let("u", p.draw(VIEWS), x=rng.choice("qkv")) if rng.random() < between / 2 else ""
    p.write(between)
    recipe: list[str] = []
    mask, additive = "", False
    layers = 2 if dynamic else 3 if late and writes else rng.choice([2, 2, 2, 2, 2, 2, 3, 3, 4])
    for layer in range(layers):
        kind = 0.5 if written else rng.random()
        if late and layer == layers - 1:
            p.due, kind = due, 1.0
        if not layer or kind > 0.75:  # a mask of its own
            start = len(p.lines)
            mask, additive = p.mask(writes)
            recipe = p.lines[start:]
        elif kind > 0.35:  # the same once more, computed anew
            p.lines += recipe
        output = p.attention(mask, additive, writes / 2)
        _between(p, rng, mask, additive, output, between)
        if view and rng.random() < between:
            p.do(p.draw(OPERAND_WRITE), x=view)
    return Program(seed, tuple(p.lines), sizes, dynamic, p.local)


def _between(p: AttentionLines, rng: random.Random, mask: str, additive: bool, output: str, writes: float) -> None:
    """What happens between two layers."""
    if p.wants(PAD_WRITE) or rng.random() < writes:
        p.do(p.draw(PAD_WRITE), pad="pad")
    if p.wants(GIVEN_WRITE):
        p.do(p.draw(GIVEN_WRITE), t="at")
    p.write(writes / 2)
    if rng.random() < writes / 2:
        p.do(p.draw(FLOAT_WRITE if additive else BOOLEAN_WRITE), m=mask)
    if rng.random() < writes / 2:
        p.do(p.draw(OPERAND_WRITE), x=rng.choice("qkv"))
    if rng.random() < 0.7:
        p.lines.append(f"q = {p.draw(CHAINED).format(o=output)}")
    if not (p.grouped or p.given) and rng.random() < 0.1:
        p.local = False
        p.lines.append(f"k = 0.5 * k + {output}.nan_to_num(0.0, 0.0, 0.0).mean(-1, keepdim=True).tanh()")


_NAME = re.compile(r"\b(?:[a-z]\d+|q|k|v|pad|at)\b")
_OUTPUT = re.compile(r"^(a\d+) =", re.MULTILINE)


def simpler(program: Program) -> Iterator[Program]:
    """Programs with a few lines less, with a name in place of a line's right side, or without an alias."""
    lines = program.lines
    for count in (6, 3, 1):
        for start in range(len(lines) - count, -1, -1):
            yield replace(program, lines=lines[:start] + lines[start + count :])
    for at, line in enumerate(lines):
        name, _, right = line.partition(" = ")
        words = _NAME.findall(right) if name.isidentifier() else []
        for word in dict.fromkeys(words) if words != [right] else ():
            yield replace(program, lines=(*lines[:at], f"{name} = {word}", *lines[at + 1 :]))
        if words == [right] and name != right and name[-1].isdigit() and not _OUTPUT.match(line):
            rest = (re.sub(rf"\b{name}\b", right, line) for line in lines[at + 1 :])
            yield replace(program, lines=(*lines[:at], *rest))
    if program.dynamic:
        yield replace(program, dynamic="", sizes=replace(program.sizes, lengths=program.sizes.lengths[:1]))


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The smallest program found for which `fails(program)` still holds."""
    while True:
        smaller = next((other for other in simpler(program) if fails(other)), None)
        if smaller is None:
            return program
        program = smaller
