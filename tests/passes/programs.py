"""Random whole programs with attention, as source text that can be printed, reproduced by its seed and shrunk.

    def program(q, k, v, pad, one):
        B, H, L, D = q.shape
        ...                                   masks, writes, 2 to 4 attention calls, each feeding the next one's query
        return a4, a9, q

Most are small deviations from something that is readable attention.
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

from .program_attention import ATTENTION_TABLES, CHAINED, GROUPED, MASK_TABLES, OPERAND_WRITE, AttentionLines, spellings
from .program_pieces import BOOLEAN_WRITE, FLOAT_WRITE, PAD_WRITE

HEADER = (
    "B, H, L, D = q.shape",
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
    """What the inputs of a program are like."""

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
        lines = [*HEADER, *self.lines, f"return {', '.join(self.outputs)}"]
        return "def program(q, k, v, pad, one):\n" + "".join(f"    {line}\n" for line in lines)

    def function(self):
        """The program as a Python function."""
        names = dict(NAMES)
        exec(compile(self.source, f"<program {self.seed}>", "exec"), names)
        return names["program"]

    def inputs(self, call: int) -> tuple[torch.Tensor, ...]:
        """The arguments of its first or second call."""
        s, length = self.sizes, self.sizes.lengths[call]
        generator = torch.Generator().manual_seed(self.seed + call)

        def normal(heads, width):
            return torch.randn(s.batch, heads, length, width, generator=generator).to(s.dtype)

        q, k, v = s.loud * normal(s.heads, s.head_dim), normal(s.kv_heads, s.head_dim), normal(s.kv_heads, s.value_dim)
        return q, k, v, self.padding(length), torch.tensor(0.4, dtype=s.dtype)

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


def _sizes(seed: int, rng: random.Random, dynamic: str) -> Sizes:
    """Shapes are those of the neighbouring seeds, as Dynamo remembers what an operator makes of a shape."""
    shapes = random.Random(f"shapes {seed // 50}")
    lengths, head_dim = shapes.sample(range(5, 18), 2), shapes.choice([4, 8])
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
    )


_SPELLINGS = [
    random.Random("order").sample(each, len(each)) for each in (spellings(MASK_TABLES), spellings(ATTENTION_TABLES))
]


def generate(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(f"sizes {seed}")
    dynamic = rng.choice(["maybe", "maybe", "maybe", "mark", "all"]) if rng.random() < 0.08 else ""
    sizes, due = _sizes(seed, rng, dynamic), [each[seed % len(each)] for each in _SPELLINGS]
    if due[1][0] is GROUPED:
        sizes = replace(sizes, kv_heads=2)
    p = AttentionLines(seed, due, sizes.kv_heads < sizes.heads)
    p.half = sizes.dtype in (torch.float16, torch.bfloat16)
    writes = rng.choice([0.0, 0.0, 0.0, 0.0, 0.15])
    recipe: list[str] = []
    mask, additive = "", False
    for layer in range(2 if dynamic else rng.choice([2, 2, 2, 2, 3, 3, 4])):
        kind = 0.5 if due[0][0] is PAD_WRITE else rng.random()
        if not layer or kind > 0.75:  # a mask of its own
            start = len(p.lines)
            mask, additive = p.mask(writes)
            recipe = p.lines[start:]
        elif kind > 0.35:  # the same once more, computed anew
            p.lines += recipe
        output = p.attention(mask, additive, writes / 2)
        _between(p, rng, mask, additive, output, writes * 2)
    return Program(seed, tuple(p.lines), sizes, dynamic, p.local)


def _between(p: AttentionLines, rng: random.Random, mask: str, additive: bool, output: str, writes: float) -> None:
    """What happens between two layers."""
    if p.wants(PAD_WRITE) or rng.random() < writes:
        p.do(p.draw(PAD_WRITE), pad="pad")
    if rng.random() < writes / 2:
        p.do(p.draw(FLOAT_WRITE if additive else BOOLEAN_WRITE), m=mask)
    if rng.random() < writes / 2:
        p.do(p.draw(OPERAND_WRITE), x=rng.choice("qkv"))
    if rng.random() < 0.7:
        p.lines.append(f"q = {p.draw(CHAINED).format(o=output)}")
    if not p.grouped and rng.random() < 0.1:
        p.local = False
        p.lines.append(f"k = 0.5 * k + {output}.nan_to_num(0.0, 0.0, 0.0).mean(-1, keepdim=True).tanh()")


_NAME = re.compile(r"\b(?:[a-z]\d+|q|k|v|pad)\b")
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
