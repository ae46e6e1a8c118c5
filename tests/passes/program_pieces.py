"""What random programs are put together from: masks and padding as lines of source text, each kind a table of spellings.

A table has two parts: ways to write the same thing, and near misses that look like it. Both go into programs; which is
which decides only how often. Nothing here needs to know what a line means: plain eager Python says so.

Lines may use B, H, M, L, D, Dv (sizes; M queries and L keys), i (the keys' positions), n (queries of a key head), one (a
scalar input), q, k, v, pad and at (up to which key each query sees).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Spellings of one thing, and what is nearly that thing."""

    same: tuple[str, ...]
    near: tuple[str, ...] = ()


POSITIONS = Table(
    (
        "i", "i", "i", "torch.arange(L)", "torch.arange(0, L)", "torch.arange(0, L, 1)", "torch.arange(end=L, start=0)",
        "torch.arange(L, dtype=torch.int32)", "torch.arange(L).to(torch.int32)", "torch.arange(2, L + 2) - 2",
        "torch.ones(L, dtype=torch.long).cumsum(0) - 1", "torch.arange(-2, L)[2:]", "torch.arange(L + 3)[:L]",
        "(i + 2**32).to(torch.int32)", "i.to(torch.uint8)", "i.float().to(torch.bfloat16)", "i.clamp(min=0)", "i[...]",
        "i.to(torch.float8_e4m3fn).float()", "torch.arange(L)[::1]", "i.clamp(max=L - 1)",
        "torch.ops.aten.arange.default(L)",
    ),
    (
        "torch.arange(L - 1, -1, -1)", "i.flip(0)", "torch.arange(1, L + 1)", "torch.arange(0, 2 * L, 2)", "i // 2", "-i",
        "(i + 250).to(torch.uint8)", "(i + 125).to(torch.int8)", "(i + 2**31 - 4).to(torch.int32)", "i.clamp(max=5)",
        "torch.arange(L, dtype=torch.int32) + (2**31 - 5)", "i.to(torch.int32) - (2**31 - 3)", "i.to(torch.uint8) // 257",
        "i.roll(1)", "torch.arange(L + 2)[2:]", "i % 5", "i.to(torch.uint8) - 3", "torch.randperm(L)", "i * 0",
        "i[i.flip(0)]", "(i + 2045).to(torch.float16)", "(i * 2**28).to(torch.int32)", "i - i",
    ),
)  # fmt: skip

# Up to which key each query sees, out of the input `at`. A tensor of any numbers says so to a mask `kv <= x[q]`.
GIVEN = Table(
    (
        "{at}", "{at}", "{at}", "{at}.clone()", "{at}[:M]", "{at}.abs()", "{at}[...]", "{at}.view(-1)", "{at}.flip(0)",
        "{at}.sort()[0]", "{at}.cumsum(0)", "{at}[None].squeeze(0)", "{at}[i[:M]]", "{at}.long()", "{at} + 0",
        "torch.where({at} > 1, {at}, 1)", "{at}.clamp(max=L - 1)", "{at}.contiguous()", "{at}.roll(1)", "torch.relu({at})",
    ),
    (
        "{at} + 3", "{at} - 2", "{at} + 2**62 + 2**62", "{at}.int()", "{at}.float()", "{at} // 2", "-{at}", "{at} * 2",
        "{at}.to(torch.uint8)", "{at}.to(torch.int8).long()", "{at}[:1].expand(M)", "{at}[i[:M] // 2]", "{at} + i[:M]",
        "torch.randint(0, L, (M,))", "{at}.to(torch.int32).long()", "at[-M:]", "i[:M] + {at}[0]", "{at}.maximum(i[:M])",
    ),
)  # fmt: skip

CAUSAL = Table(
    (
        "{kv}[None, :] <= {qi}[:, None]", "{kv} <= {qi}[:, None]", "{qi}[:, None] >= {kv}", "{kv}[None] < {qi}[:, None] + 1",
        "torch.le({kv}, {qi}.unsqueeze(1))", "~({kv}[None, :] > {qi}[:, None])",
        "({qi}.view(-1, 1) - {kv}.view(1, -1)) >= 0", "{kv}.le({qi}[..., None])",
        "torch.ones(M, L, dtype=torch.bool).tril()", "torch.tril(torch.ones(M, L)).bool()",
        "~torch.ones(M, L, dtype=torch.bool).triu(1)", "torch.ones(M, L).triu(diagonal=1) == 0",
        "torch.where({kv} > {qi}[:, None], 0, 1) == 1", "torch.ones(M, L, dtype=torch.uint8).tril() > 0",
        "torch.ones(M, L, dtype=torch.bool).where({kv} <= {qi}[:, None], torch.zeros(M, L, dtype=torch.bool))",
        "torch.vmap(lambda a: torch.vmap(lambda b: b <= a)({kv}))({qi})", "torch.full((M, L), True).tril(0)",
        "torch.logical_not(torch.gt({kv}, {qi}[:, None]))",
        "torch.ones(M, L, dtype=torch.bool) ^ torch.full((M, L), True).triu(1)",
        "{kv}[None, None, None][0, 0] <= {qi}[None, :, None][0]", "torch.less_equal({kv}, other={qi}[:, None])",
        "(torch.ones(M, L).cumsum(-1) - 1) <= {qi}[:, None]",
        "torch.zeros(M, L, dtype=torch.bool).masked_fill({kv} <= {qi}[:, None], True)",
        "torch.ones(M, L, dtype=torch.bool).tril(diagonal=L - M)",
    ),
    (
        "{kv}[None, :] < {qi}[:, None]", "{kv}[:, None] <= {qi}[None, :]",
        "({kv} <= {qi}[:, None]) & ({kv} > {qi}[:, None] - 4)", "torch.ones(M, L, dtype=torch.bool).triu()",
        "torch.ones(M, L, dtype=torch.bool).tril(-1)", "{kv} <= {qi}[:, None] + 1",
        "torch.full((M, L), True).where({kv} > {qi}[:, None], torch.zeros(M, L, dtype=torch.bool))", "{kv} != {qi}[:, None]",
        "({kv}.to(torch.uint8) - {qi}.to(torch.uint8)[:, None]) <= 0",
        "({qi}[:, None].to(torch.int8) * 20 - {kv} * 20) >= 0", "torch.rand(M, L) > 0.3",
        "({kv} // 4) <= ({qi}[:, None] // 4)", "torch.vmap(lambda a: {kv} >= a)({qi})",
        "tril(torch.ones(M, L, dtype=torch.bool))", "torch.ones(M, L, dtype=torch.bool).tril() == 0",
        "torch.full((M, L), True)", "(2**30 * ({qi}[:, None] - {kv}).to(torch.int32)) >= 0",
        "{kv}.to(torch.int32) + (2**31 - 5) <= {qi}[:, None].to(torch.int32) + (2**31 - 5)",
        "torch.ones(M, L).tril().cumsum(0) > 1",
    ),
)  # fmt: skip

# A causal mask without what lies further back than a window.
WINDOW = Table(
    (
        "{c} & ({kv} > {qi}[:, None] - 4)", "{c} & ({qi}[:, None] - {kv} < 3)", "({kv} >= {qi}[:, None] - 2) & {c}",
        "{c} & ~torch.ones(M, L, dtype=torch.bool).tril(-3)", "{c}.triu(-2)", "torch.triu({c}, diagonal=-4)",
        "torch.logical_and({c}, {qi}[:, None] <= {kv} + 1)", "{c}.masked_fill({qi}[:, None] - {kv} > 2, False)",
        "torch.where({kv} + 5 > {qi}[:, None], {c}, False)", "{c} & ({kv} > {qi}[:, None] - 40)",
        "{c} & ({kv} == {qi}[:, None])", "{c} & ({kv} >= {qi}[:, None])", "{c} & (({qi}[:, None] - {kv}) // 3 == 0)",
        "~(~{c} | ({qi}[:, None] >= {kv} + 4))",
        "{c} & ({qi}[:, None] - {kv} < 3) & ({qi}[:, None] - {kv} < 5)", "({qi}[:, None] - {kv}).abs().lt(3) & {c}",
    ),
    (
        "{c} | ({qi}[:, None] - {kv} < 3)", "{c} & ({kv} < {qi}[:, None] - 3)", "{c} & ({kv} > {qi}[:, None] + 1)",
        "{c} & ({qi}[:, None] - {kv} < 0)", "{c} & ({qi}[:, None] - {kv} < L // 2)", "{c} & ({kv} > {qi}[:, None] // 2)",
        "{c} & ({qi}[:, None] - {kv} < pad.sum().long())", "{c} & (({kv} > {qi}[:, None] - 3) | ({kv} < 2))",
        "({qi}[:, None] - {kv} < 3) & ({kv} - {qi}[:, None] < 3)", "{c} & ({qi}[:, None] - {kv} != 3)", "{c}.triu(1)",
        "{c} & ({qi}[:, None].to(torch.uint8) - {kv}.to(torch.uint8) < 3)", "{c}.triu(-2).tril(-1)",
    ),
)  # fmt: skip

# The padding input [B, L] as a condition. On values other than 0 and 1 these differ from each other.
VALID = Table(
    (
        "{pad} != 0", "{pad} > 0", "{pad} == 1", "{pad}.long().clamp(max=1).bool()", "{pad}.long().abs() > 0",
        "{pad}.bool()", "{pad}.to(torch.bool)", "{pad} >= 1", "~({pad} == 0)", "(1 - {pad}.long()) != 1", "{pad}.eq(1)",
        "{pad}.to(torch.int32) != 0", "{pad}.clamp(0, 1) == 1", "{pad}.gt(0)", "torch.ne({pad}, 0)",
        "{pad}.to(torch.int64) == 1", "{pad}.float() > 0.5", "{pad}.type(torch.bool)", "{pad}.logical_not().logical_not()",
        "torch.where({pad} > 0, True, False)", "torch.isclose({pad}.float(), torch.ones(()))",
        "({pad}.float() * 0.7).sin() > 0",
    ),
    (
        "{pad} > -1", "{pad} != 256", "{pad} < 200", "{pad}.to(torch.int8) != 0", "{pad}.to(torch.uint8) > 0", "{pad} == 0",
        "{pad}.to(torch.int32) + (2**31 - 1) > 0", "({pad} * 200).to(torch.uint8) // 257 > 0",
        "{pad}.cumsum(-1) > 0", "{pad}.float() - {pad}.float() == 0",
        "{pad}.float() * 0 == 0", "{pad}.half() != 0", "{pad}.to(torch.float8_e4m3fn).float() != 0", "({pad} * {pad}) > 0",
        "torch.rand(B, L) > 0.3", "F.dropout(torch.ones(B, L), 0.3) > 0", "torch.randint(0, 3, (B, L)) > 0",
        "{pad}.roll(1, -1) > 0", "{pad}.flip(-1) > 0", "(-{pad}.to(torch.uint8)) < 0",
        "({pad}.long() * 2**32).to(torch.int32) != 0", "{pad}.to(torch.uint8) - 1 < 0", "({pad}.to(torch.int8) + 127) > 0",
        "{pad}.to(torch.uint8) != -1", "({pad} + 1) > {pad}", "torch.rand(L) > 0.3", "torch.empty(B, L).bernoulli_(0.7) > 0",
        "{pad}.numpy() > 0 if False else {pad} > 0", "({pad} - 1).to(torch.uint8) == 0", "{pad}.to(torch.int16) * 256 != 0",
        "(~{pad}.to(torch.uint8)) != -1", "{pad}.view(B, L)[:, i.flip(0)] > 0",
    ),
)  # fmt: skip

BROADCAST = Table(
    (
        "{x}[:, None, None, :]", "{x}[:, None, None]", "{x}.unsqueeze(1).unsqueeze(2)", "{x}.view(B, 1, 1, L)",
        "{x}[:, None][..., None, :]", "{x}[:, None, None, ...]", "{x}.reshape(-1, 1, 1, L)", "{x}[..., None, None, :]",
        "{x}[:, None, None, :].expand(B, 1, M, L)", "{x}[torch.arange(B)[:, None, None, None], i[None, None, None, :]]",
        "{x}[:, None, None, i]", "{x}[:, None, None, 0:L]", "{x}.t()[None, None].permute(3, 0, 1, 2)",
    ),
    (
        "{x}[:, None, :, None]", "{x}[:, None, None, :].flip(-1)", "{x}[None, None, :1]", "{x}[:1, None, None]",
        "{x}[:, None, None, i.flip(0)]", "{x}[:, None, None].expand(B, H, M, L).mT", "{x}.flip(0)[:, None, None, :]",
    ),
)  # fmt: skip

JOINED = Table(
    (
        "{c} & {p}", "{c} & {p}", "{p} & {c}", "torch.logical_and({c}, {p})", "{c} * {p}", "{p}.logical_and({c})",
        "~(~{c} | ~{p})", "torch.where({c}, {p}, False)", "{p}.where({c}, False)", "{c}.where({p}, False)",
        "{c}.masked_fill(~{p}, False)", "{c} ^ ({c} & ~{p})", "torch.bitwise_and({c}, {p})",
        "({c}.int() * {p}.int()).bool()", "({c}.long() + {p}.long()) == 2",
        "({c}.to(torch.uint8) + {p}.to(torch.uint8)) > 1", "torch.vmap(lambda a: {c} & a)({p})",
        "torch.logical_and({c}, {p}, out=torch.empty(B, 1, M, L, dtype=torch.bool))",
        "torch.where(condition={p}, input={c}, other=torch.zeros_like({c}))", "{c}.__and__({p})",
    ),
    (
        "{c} | {p}", "{c} ^ {p}", "torch.ones_like({c}).where({c}, {p})", "torch.where({p}, {c}, True)", "{c} & {p}.mT",
        "{c} & ~{p}", "{c} & {p}.flip(-1)", "({c}.to(torch.uint8) - {p}.to(torch.uint8)) == 0", "{p}.where({c}, True)",
        "({c}.to(torch.int8) * 127 + {p}.to(torch.int8) * 127) < 0", "({c}.to(torch.uint8) - 2 * {p}.to(torch.uint8)) > 1",
        "({c} & {p}) | torch.eye(L, dtype=torch.bool)", "torch.where({c}, {p}, {p})", "{c} & (torch.rand(B, 1, 1, L) > 0.3)",
    ),
)  # fmt: skip

# A Boolean mask, once more.
BOOLEAN_STEP = Table(
    (
        "{m}.expand(B, H, M, L)", "{m}.clone()", "{m}.contiguous()", "{m}[..., :L]", "{m}[..., :, :]", "{m} & True",
        "{m} ^ False", "~~{m}", "{m}.to(torch.uint8).bool()", "{m}.float() != 0", "{m}.float() > 0.5",
        "{m}.int().clamp(0, 1) == 1", "{m}.to(torch.float8_e4m3fn).float().bool()", "{m}.masked_fill({m}, True)",
        "torch.where({m}, {m}, False)", "{m}[..., i]", "({m}.to(torch.uint8) - 1) == 0", "{m}.mT.mT", "{m}.view({m}.shape)",
        "{m}.to(dtype=torch.bool)", "{m}.broadcast_to((B, 1, M, L))", "{m}.to(torch.int8) == 1", "torch.clone({m})",
        "{m}.cumsum(-1).bool() & {m}",
    ),
    (
        "~{m}", "{m}.mT", "{m}.flip(-1)", "{m}.cumsum(-1) > 0", "{m}[..., i.flip(0)]", "{m} ^ True", "{m} | {m}.mT",
        "{m}.roll(1, -1)", "{m}.to(torch.uint8) > -1", "({m}.to(torch.uint8) - 1) < 0", "(-{m}.to(torch.uint8)) < 0",
        "({m}.long() * 2**32).to(torch.int32) != 0", "{m}.to(torch.int8) != 256", "({m}.to(torch.int8) * -128) > 0",
        "({m}.to(torch.int8) * 64 * 2) > 0", "({m}.to(torch.int8) - 1) * 2 != -2",
        "({m}.long() + 2**31).to(torch.int32) < 0", "{m}[..., :1]", "{m} & (torch.rand(M, L) > 0.1)", "{m}.__xor__({m}.mT)",
        "{m} | (i == 3)", "{m} & (i != 2)",
    ),
)  # fmt: skip

NEVER = (
    'float("-inf")', "-math.inf", "torch.finfo(q.dtype).min", "torch.finfo(torch.bfloat16).min",
    "torch.finfo(torch.float32).min",
)  # fmt: skip
HARDLY = ("-1e9", "-1e4", "-10000.0", "torch.finfo(torch.float16).min", "-1e38", "-8.0", "0.0", "-5")

ADDITIVE = Table(
    (
        "torch.zeros({m}.shape, dtype=q.dtype).masked_fill(~{m}, {neg})", "torch.where({m}, 0.0, {neg})",
        "(1.0 - {m}.float()) * {low}", "q.new_zeros(B, 1, M, L).masked_fill(~{m}, {neg})",
        "torch.zeros_like({m}, dtype=q.dtype).masked_fill_(~{m}, {neg})",
        "torch.full({m}.shape, {neg}, dtype=q.dtype).masked_fill({m}, 0.0)",
        "torch.full({m}.shape, {neg}, dtype=q.dtype).where(~{m}, q.new_zeros(()))", "q.new_zeros(()).where({m}, {neg})",
        "{m}.float().log()", "(~{m}).float() * {low}", "{m}.logical_not().float().mul({low})",
        "torch.masked_fill(input=torch.zeros({m}.shape, dtype=q.dtype), mask=~{m}, value={neg})",
        "torch.where({m}, torch.tensor(0.0), {neg})",
        "torch.zeros({m}.shape, dtype=q.dtype).masked_fill({m}.logical_not(), torch.tensor({neg}))",
    ),
    (
        "torch.full({m}.shape, {neg}, dtype=q.dtype).where({m}, q.new_zeros(()))",
        "torch.zeros({m}.shape, dtype=q.dtype).masked_fill({m}, {neg})", "torch.where({m}, 0.0, {neg}) * 0.0",
        "torch.where({m}, 0.0, {neg}) - torch.where({m}, 0.0, {neg})", "{m}.float()", "(1.0 - {m}.float()) * -3.0",
        "torch.where({m}, 1.0, {neg})", "(~{m}).float() * float('-inf')",
        "torch.where({m}, 0.0, {neg}).masked_fill({m}, 0.5)", "torch.where({m}, {neg}, 0.0)",
    ),
)  # fmt: skip

# A float mask, once more.
FLOAT_STEP = Table(
    (
        "{m} + 0.0", "{m} * 1.0", "{m}[..., :L, :L]", "{m}.contiguous()", "{m}.to(torch.bfloat16).to(q.dtype)", "{m} - 0",
        "{m}.expand(B, H, M, L)", "{m}.clone()", "{m}.double().to(q.dtype)", "{m}.minimum(torch.zeros(()).to(q.dtype))",
    ),
    (
        "{m} - {m}", "{m} * 0.0", "0 * {m}", "{m} + {m} * 0", "{m}.to(torch.float8_e5m2).to(q.dtype)", "{m} * 0.5",
        "{m}.to(torch.float8_e4m3fn).to(q.dtype)", "{m}.clamp(min=-5.0)", "{m} / 1e38", "{m}.nan_to_num()", "{m} * -1",
        "torch.maximum({m}, torch.tensor(-10.0).to(q.dtype))", "{m} + 1.0", "{m}.to(torch.float16).to(q.dtype)", "{m}.abs()",
        "{m}.mT", "{m}.flip(-1)", "{m} + torch.rand(L)", "{m} * {m}", "{m}[..., i.flip(0)]", "{m} + i", "{m}.exp() - 1.0",
        "{m}.masked_fill({m} == 0, -0.5)", "{m}.relu()", "{m} * one", "torch.add({m}, {m}, alpha=-1)",
    ),
)  # fmt: skip

# Lines that write to a mask; the last ones of each to something else, which does no harm.
BOOLEAN_WRITE = (
    "{m}[..., 0] = True", "{m}[..., -1:] = False", "{m}.logical_not_()", "{m}.fill_(True)", "{m}.numpy().fill(True)",
    "a = {m}.numpy(); a |= True", "a = {m}.numpy(); a[..., 0] = True", "torch.logical_not({m}, out={m})", "{m} |= (i < 3)",
    "{m}.copy_({m}.flip(-1))", "{m}.index_put_((torch.tensor(0),), torch.tensor(True))", "{m}.masked_fill_({m}, False)",
    "{m}.diagonal(0, -2, -1).fill_(False)", "{m}.mT.logical_not_()", "torch.bitwise_or({m}, True, out={m})", "{m} ^= True",
    "{m}.__setitem__((..., 0), False)", "{m}.__ior__(True)", "{m}.bitwise_xor_(True)", "{m}[..., 1:].zero_()",
    "torch.ops.aten.fill_.Scalar({m}, True)", "{m}.view(-1)[0] = False", "{m}.clone().fill_(True)", "(~{m}).zero_()",
    "a = {m}.numpy().copy(); a |= True",
)  # fmt: skip
FLOAT_WRITE = (
    "F.relu({m}, True)", "F.hardtanh({m}, -1.0, 1.0, True)", "F.elu({m}, 1.0, True)", "F.dropout({m}, 1.0, True, True)",
    "F.leaky_relu({m}, 0.01, True)", "F.threshold({m}, -1.0, 0.0, True)", "{m}.mul_(0.5)", "{m}.add_(1.0)", "{m}.zero_()",
    "{m}.numpy().fill(0.0)", "{m}.numpy().sort()", "a = {m}.numpy(); a *= 0.5", "{m}[..., 0] = 0.0", "{m}.clamp_(min=-1.0)",
    "F.embedding(torch.tensor([0, 1]), {m}.view(-1, L), max_norm=1.0)", "torch.mul({m}, 0.5, out={m})", "torch.relu_({m})",
    "torch.nn.init.zeros_({m})", "{m}.data.zero_()", "{m}.nan_to_num_()", "F.rrelu({m}, 0.1, 0.1, False, True)",
    "{m} /= 1e38",
    "torch.batch_norm(torch.ones(2, L), None, None, {m}.view(-1, L)[1], torch.ones(L), True, 0.5, 1e-5, False)",
    "{m}.copy_(torch.zeros(L))", "{m}.clone().zero_()", "F.relu({m})", "F.hardtanh({m}, -1.0, 1.0)", "({m} + 1).mul_(0.5)",
)  # fmt: skip
PAD_WRITE = (
    "{pad}[:, :2] = 0", "{pad}.mul_(False)", "{pad}.copy_({pad}.flip(1))", "{pad}.zero_()", "{pad}.numpy()[:] = 1",
    "{pad}.fill_(1)", "{pad}.index_fill_(1, torch.tensor([0, 3]), 0)", "{pad}.lt_(1)",
    "{pad}[:, -1] = 1 - {pad}[:, -1].long()", "torch.mul({pad}, {pad} != {pad}, out={pad})", "{pad}.view(-1)[1] = 0",
    "{pad}.t()[2] = 0", "a = {pad}.numpy(); a[:, 1:3] = 0",
    "{pad}.index_put_((torch.tensor(0), torch.tensor([1, 2])), torch.zeros((), dtype={pad}.dtype))", "F.relu({pad}, True)",
    "{pad}.clone().zero_()", "{pad}[0].logical_not_()", "{pad}.select(1, 0).fill_(0)",
)  # fmt: skip
GIVEN_WRITE = (
    "{t} += 1", "{t}.add_(3)", "{t}.sub_(2)", "{t}[0] = -1", "{t}[1:] += 2", "{t}.copy_({t}.flip(0))", "{t}.clamp_(max=3)",
    "{t}.numpy()[:] = 2", "torch.add({t}, 1, out={t})", "{t}.fill_(4)", "{t}[:M].mul_(2)", "a = {t}.numpy(); a += 2",
    "{t}.index_put_((torch.tensor(0),), torch.tensor(7))", "{t}.neg_()", "{t}.view(-1)[2:].zero_()", "{t}.data.add_(2)",
    "{t}.masked_fill_({t} > 4, 2)", "torch.ops.aten.add_.Scalar({t}, 2)", "{t}.detach().sub_(1)", "{t}.bitwise_not_()",
    "{t}.clone().add_(1)", "{t}.sort()[0].zero_()",
)  # fmt: skip


Due = tuple[Table | tuple[str, ...], str]


class Lines:
    """A program's lines in the making; `trap` is how often a near miss is drawn in place of the thing itself.

    `due` are tables and one spelling of each, which the first draw from that table gives: so no spelling is left out.
    """

    def __init__(self, seed: int, due: Sequence[Due]) -> None:
        self.rng = random.Random(seed)
        self.due = list(due)
        self.half = False  # whether scores are half precision
        self.lines: list[str] = []
        self.trap = self.rng.choice([0.0, 0.0, 0.03, 0.08])
        self.count = 0

    def maybe(self, chance: float) -> bool:
        return self.rng.random() < chance

    def wants(self, *tables: Table | tuple[str, ...]) -> bool:
        """Whether a spelling that is due is in one of these tables."""
        return any(due is table for due, _ in self.due for table in tables)

    def draw(self, table: Table | tuple[str, ...]) -> str:
        if self.wants(table):
            place = next(place for place, (due, _) in enumerate(self.due) if due is table)
            return self.due.pop(place)[1]
        if not isinstance(table, Table):
            return self.rng.choice(table)
        if table.near and self.maybe(self.trap):
            return self.rng.choice(table.near)
        return table.same[int(len(table.same) * self.rng.random() ** 2.5)]  # common spellings come first

    def let(self, prefix: str, template: str, **names: str) -> str:
        """Adds `name = <template>` and returns the name."""
        name = f"{prefix}{self.count}"
        self.count += 1
        self.lines.append(f"{name} = {template.format(**names)}")
        return name

    def do(self, template: str, **names: str) -> None:
        self.lines.append(template.format(**names))


class MaskLines(Lines):
    """Adds the lines of masks.

    given: what says up to which key each query sees; "" for nothing. pieces: what the last mask is made of, with its writes.
    """

    def __init__(self, seed: int, due: Sequence[Due], given: str) -> None:
        super().__init__(seed, due)
        self.given = given
        self.pieces = self.inputs()

    def inputs(self) -> list[tuple[tuple[str, ...], str]]:
        """What masks are made of, with the writes to it."""
        return [(PAD_WRITE, "pad"), *[(GIVEN_WRITE, "at")] * bool(self.given)]

    def piece(self, prefix: str, template: str, writes: tuple[str, ...] = BOOLEAN_WRITE, **names: str) -> str:
        """Adds `name = <template>`, a part of a mask, and returns the name."""
        name = self.let(prefix, template, **names)
        self.pieces.append((writes, name))
        return name

    def queries(self) -> str:
        """The queries' positions: the keys', or their first or last ones, or what the program is given."""
        positions = self.draw(POSITIONS)
        if not self.given:
            return positions
        kind = 0.0 if self.wants(GIVEN, GIVEN_WRITE) else self.rng.random()
        if kind < 0.6:
            return self.piece("t", self.draw(GIVEN), GIVEN_WRITE, at=self.given)
        return f"({positions})[{':M' if kind < 0.8 else 'L - M:'}]"

    def causal(self) -> str:
        q, kv = self.queries(), self.draw(POSITIONS)
        names = {"qi": q if q.isidentifier() else f"({q})", "kv": kv if kv.isidentifier() else f"({kv})"}
        found = self.piece("c", self.draw(CAUSAL), **names)
        if self.wants(WINDOW) or self.maybe(0.12):
            found = self.piece("c", self.draw(WINDOW), c=found, **names)
        return found

    def padding(self) -> str:
        valid = self.piece("x", self.draw(VALID), pad="pad")
        return self.piece("p", self.draw(BROADCAST), x=valid)

    def condition(self, writes: float) -> str:
        """A Boolean mask that broadcasts to [B, H, M, L]."""
        self.pieces = self.inputs()
        kind = 0.5 if self.wants(VALID, BROADCAST, JOINED, PAD_WRITE) else self.rng.random()
        if kind < 0.4:
            m = self.causal()
        elif kind < 0.95:
            c, p = self.causal(), self.padding()
            self.write(writes)
            m = self.let("m", self.draw(JOINED), c=c, p=p)
            self.write(writes)
        else:
            m = self.padding()
        while self.wants(BOOLEAN_STEP) or self.maybe(0.25):
            m = self.let("m", self.draw(BOOLEAN_STEP), m=m)
        return self.written(m, BOOLEAN_WRITE, writes)

    def mask(self, writes: float, additive: float = 0.4) -> tuple[str, bool]:
        """(name, whether it is a float mask)"""
        m = self.condition(writes)
        if not (self.wants(ADDITIVE, FLOAT_STEP, FLOAT_WRITE) or self.maybe(additive)):
            return m, False
        low, neg = self.rng.choice(NEVER[2:]), self.never()
        m = self.let("m", f"({self.draw(ADDITIVE)}).to(q.dtype)", m=m, neg=neg, low=low)
        while self.wants(FLOAT_STEP) or self.maybe(0.2):
            m = self.let("m", self.draw(FLOAT_STEP), m=m)
        return self.written(m, FLOAT_WRITE, writes), True

    def never(self) -> str:
        """What a hidden score becomes: -inf or the lowest number; at times what does not hide for certain."""
        if self.half:  # others are no numbers there
            return self.rng.choice(NEVER[:3])
        return self.rng.choice(HARDLY if self.maybe(self.trap) else NEVER)

    def write(self, chance: float) -> None:
        """A write to what the last mask is made of."""
        if self.maybe(chance):
            table, name = self.rng.choice(self.pieces)
            self.do(self.draw(table), pad=name, t=name, m=name)

    def written(self, m: str, table: tuple[str, ...], chance: float) -> str:
        if self.wants(table) or self.maybe(chance):
            m = self.let("m", "{m}.clone()", m=m) if self.maybe(0.7) else m
            self.do(self.draw(table), m=m)
        return m
