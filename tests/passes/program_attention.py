"""Attention calls as lines of source text: SDPA in its spellings, written-out attention, and what may stand around both."""

from __future__ import annotations

from collections.abc import Sequence

from .program_pieces import (
    ADDITIVE,
    BOOLEAN_STEP,
    BOOLEAN_WRITE,
    BROADCAST,
    CAUSAL,
    FLOAT_STEP,
    FLOAT_WRITE,
    GIVEN,
    GIVEN_WRITE,
    JOINED,
    PAD_WRITE,
    POSITIONS,
    VALID,
    WINDOW,
    Due,
    MaskLines,
    Table,
)

SDPA = Table(
    (
        "F.scaled_dot_product_attention({q}, {k}, {v}, {m})", "F.scaled_dot_product_attention({q}, {k}, {v}, attn_mask={m})",
        "F.scaled_dot_product_attention({q}, {k}, {v}, attn_mask={m}, dropout_p=0.0, is_causal=False)",
        "F.scaled_dot_product_attention(query={q}, key={k}, value={v}, attn_mask={m})",
        "F.scaled_dot_product_attention({q}, {k}, {v}, {m}, 0.0, False)", "sdpa({q}, {k}, {v}, {m}, scale=0.4)",
        "torch.ops.aten.scaled_dot_product_attention.default({q}, {k}, {v}, {m})", "sdpa({q}, {k}, {v}, is_causal=True)",
        "torch.ops.aten.scaled_dot_product_attention({q}, {k}, {v}, attn_mask={m})",
        "torch._C._nn.scaled_dot_product_attention({q}, {k}, {v}, {m}, 0.0, False, scale=1 / D)",
        "checkpoint(lambda a, b, c, d: sdpa(a, b, c, attn_mask=d), {q}, {k}, {v}, {m}, use_reentrant=False)",
        "sdpa(attn_mask={m}, value={v}, key={k}, query={q}.contiguous())", "sdpa({q} * 0.7, {k}, {v}, {m})",
    ),
    (
        "sdpa({q}, {k}, {v}, {m}, scale=-0.5)", "sdpa({q}, {k}, {v}, {m}, scale=0.0)", "sdpa({q}, {k}, {v}, {m}, 0.4)",
        "scaled_dot_product_attention({q}, {k}, {v}, {m})", "sdpa({q}, {k}, {v})", "sdpa({q}, {k}.flip(2), {v}, {m})",
        "torch.cond({q}.sum() > 0, sdpa, lambda a, b, c, d: sdpa(a, b, c, d) + 1, ({q}, {k}, {v}, {m}))",
        "checkpoint(lambda a, b, c: sdpa(a, b, c) * 2, {q}, {k}, {v}, use_reentrant=False)", "sdpa({q}, {k}, {v}, {m}.mT)",
        "sdpa({q}[:, :, :1].expand(B, H, M, D), {k}, {v}, {m})", "sdpa({q}, {k}, {v}, {m}, dropout_p=0.3)",
        "sdpa({q}, {k}, {v}, is_causal=True, scale=-0.2)", "sdpa({k}, {q}, {v}, {m})", "sdpa({q}, {k}, {v}.flip(1), {m})",
    ),
)  # fmt: skip
GROUPED = Table(
    (
        "{x}.repeat_interleave(n, 1)", "{x}.repeat_interleave(n, dim=1)", "torch.repeat_interleave({x}, n, dim=-3)",
        "{x}[:, :, None, :, :].expand(B, G, n, L, {x}.shape[-1]).reshape(B, H, L, -1)",
        "{x}[:, :, None].expand(-1, -1, n, -1, -1).flatten(1, 2)",
        "{x}.unsqueeze(2).expand(B, G, n, L, -1).reshape(B, H, L, -1)",
        "{x}[..., None, :, :].expand(B, G, n, L, -1).reshape(B, H, L, -1)",
        "torch.repeat_interleave(input={x}, repeats=n, dim=1).contiguous()",
    ),
    (
        "{x}.repeat(1, n, 1, 1)", "{x}[:, None].expand(B, n, G, L, -1).reshape(B, H, L, -1)", "torch.cat([{x}] * n, 1)",
        "{x}.repeat_interleave(n, 1).flip(1)", "{x}[:, None, ...].expand(B, n, G, L, -1).flatten(1, 2)",
        "{x}[:, :, None].expand(B, G, n, L, -1).transpose(1, 2).reshape(B, H, L, -1)",
        "{x}.unsqueeze(1).expand(B, n, G, L, -1).reshape(B, H, L, -1)", "{x}[:, torch.arange(H) % G]",
        "{x}[:, ..., None, :, :].mT.mT.expand(B, G, n, L, -1).reshape(B, H, L, -1)",
    ),
)  # fmt: skip

SCORES = Table(
    (
        "{q} @ {k}.mT", "torch.matmul({q}, {k}.transpose(-1, -2))", "{q}.matmul({k}.transpose(2, 3))",
        "{q} @ {k}.swapaxes(-2, -1)", "{q} @ {k}.permute(0, 1, 3, 2)", "torch.einsum('bhqd,bhkd->bhqk', {q}, {k})",
        "{q}.__matmul__({k}.mT)", "torch.bmm({q}.flatten(0, 1), {k}.flatten(0, 1).mT).view(B, H, M, L)",
        "torch.ops.aten.matmul.default({q}, {k}.mT)",
        "torch.baddbmm({q}.new_zeros(()), {q}.flatten(0, 1), {k}.flatten(0, 1).mT, beta=0, alpha=0.5).view(B, H, M, L)",
        "torch.matmul(input={q}, other={k}.transpose(dim0=-1, dim1=-2))",
        "torch.einsum('b h i d, b h j d -> b h i j', {q}, {k})",
    ),
    (
        "{q} @ {k}.flip(2).mT", "torch.einsum('bhqd,bhkd->bhkq', {q}, {k})", "{q} @ {q}.mT", "{k} @ {q}.mT",
        "({k} @ {q}.mT).mT", "{q} @ {k}.mT.abs()", "{q} @ {k}.mT.flip(1)", "torch.matmul({q}, {k}.mT).flip(-1)",
        "({q} @ {k}.mT).view(B, H, M, L).mT",
        "torch.baddbmm(torch.ones(L).to(q.dtype), {q}.flatten(0, 1), {k}.flatten(0, 1).mT).view(B, H, M, L)",
        "torch.einsum('bhqd,bgkd->bhqk', {q}, {k})", "torch.bmm({k}.flatten(0, 1), {q}.flatten(0, 1).mT).view(B, H, M, L)",
    ),
)  # fmt: skip
SCALED = Table(
    (
        "{s} * 0.35", "{s} / math.sqrt(D)", "{s} * D**-0.5", "{s}.mul(0.35)", "{s}.div(2.0)", "torch.mul({s}, 0.35)",
        "0.35 * {s}", "{s} * torch.tensor(0.35)", "torch.div({s}, 2.5)", "{s} * torch.full((), 0.35)", "{s} * 0.5 * 0.7",
        "{s} / torch.tensor(2.0)", "torch.multiply(other={s}, input=torch.tensor(0.5))", "{s} * 1", "{s}.mul_(0.35)",
        "{s} * torch.tensor(2.0).rsqrt()",
    ),
    (
        "{s} * -0.5", "{s} * 0.0", "{s} * torch.tensor(0.31, dtype=torch.bfloat16)",
        "torch.div({s}, 2.0, rounding_mode='floor')", "{s} * torch.tensor(0.31, dtype=torch.float16)", "{s} * one",
        "{s}.to(torch.float8_e4m3fn).to(q.dtype)", "{s} // 1", "{s} * torch.tensor(0.3).to(torch.float8_e4m3fn).float()",
        "{s}.tanh()", "{s}.abs()", "{s} - {s}.amax(-1, keepdim=True)", "{s} * torch.rand(())", "{s} * torch.tensor(2)",
        "{s} / 0.0", "{s}.bfloat16().to(q.dtype)", "{s} / torch.arange(1, L + 1)", "{s} * torch.full((L,), 0.35)", "{s} + 1",
        "{s} * 1e-30 * 1e-30 * 1e30 * 1e30", "{s} * 1e38 * 1e-38",
        "torch.add({s}, {s}, alpha=-0.5)", "{s} ** 2", "{s}.roll(1, 1)", "{s} / one.item()",
    ),
)  # fmt: skip
BIASED = Table(
    (
        "{s} + {m}", "{m} + {s}", "torch.add({s}, {m})", "{s}.add({m})", "{s} + {m}[..., :L]",
        "torch.add(input={s}, other={m})",
    ),
    (
        "{s} - {m}", "torch.add({s}, {m}, alpha=2)", "{s} + {m} * 0.5", "{s} * {m}", "{s} + {m}.mT",
        "{s}.add({m}, alpha=-1)", "({s} + {m}) * 0.5", "{s} + {m} + {m}", "{s} + {m} + torch.rand(L)", "{s} + {m}.flip(-1)",
    ),
)  # fmt: skip
FILLED = Table(
    (
        "{s}.masked_fill(~{m}, {neg})", "torch.where({m}, {s}, {neg})", "{s}.where({m}, {neg})",
        "{s}.masked_fill_(~{m}, {neg})", "torch.masked_fill({s}, ~{m}, {neg})",
        "{s}.masked_fill(mask={m}.logical_not(), value={neg})", "torch.where({m}, {s}, torch.tensor({neg}).to(q.dtype))",
        "torch.where(~{m}, {neg}, {s})", "{s}.masked_fill({m} == 0, {neg})",
        "torch.where(condition={m}, input={s}, other={neg})",
    ),
    (
        "{s}.masked_fill({m}, {neg})", "torch.where({m}, {neg}, {s})", "{s}.where(~{m}, {neg})",
        "{s}.masked_fill(~{m}.mT, {neg})", "torch.where({m}, {s}, 0.0)", "torch.full_like({s}, {neg}).where({m}, {s})",
        "torch.where({m}, {s}, {s} * {neg})", "{s}.masked_fill(~{m}, {neg}) * 2 * 0.5",
    ),
)  # fmt: skip
# A further column of scores, z a tensor of numbers for the heads, and what is done with it.
SINK = Table(
    (
        "torch.linspace(-1, 2, H).to(q.dtype)", "one.expand(H)", "torch.full((H,), 0.3).to(q.dtype)", "q[0, :, 0, 0]",
        "torch.arange(H).to(q.dtype) / 3", "k.amax((0, 1, 2, 3)).expand(H).clone()",
    ),
    ("torch.arange(H)", "torch.ones(H).to(torch.float16)", "torch.ones(1).to(q.dtype).expand(H)"),
)  # fmt: skip
JOINED_SINK = Table(
    (
        "torch.cat([{s}, {z}.reshape(1, -1, 1, 1).expand(B, H, M, 1)], dim=-1)",
        "torch.cat([{s}, {z}.view(1, H, 1, 1).expand(B, -1, M, -1)], -1)",
        "torch.concat(({s}, {z}[None, :, None, None].expand(B, H, M, 1)), dim=3)",
        "torch.cat([{s}, {z}[:, None, None].expand(B, H, M, 1)], 3)",
        "torch.cat([{s}, {z}.reshape(1, -1, 1, 1).expand(*{s}.shape[:-1], 1)], -1).float()",
        "torch.cat(tensors=[{s}, {z}.unsqueeze(-1).unsqueeze(-1)[None].expand(B, H, M, 1).contiguous()], dim=-1)",
    ),
    (
        "torch.cat([{s}, {z}.view(1, H, 1, 1).expand(B, H, M, 1).flip(1)], -1)", "torch.cat([{s}, q[..., :1]], -1)",
        "torch.cat([{z}.view(1, H, 1, 1).expand(B, H, M, 1), {s}], -1)", "torch.cat([{s}, {s}[..., :1]], -1)",
        "torch.cat([{s}, {z}.view(1, H, 1, 1).expand(B, H, M, 2)], -1)[..., :-1]",
        "torch.cat([{s}, {z}.view(1, H, 1, 1).expand(B, H, M, 1)], -1) * 0.5",
        "torch.cat([{s} - {s}.amax(-1, keepdim=True), {z}.view(1, H, 1, 1).expand(B, H, M, 1)], -1)",
        "torch.cat([{s}, 2 * {z}.view(1, H, 1, 1).expand(B, H, M, 1)], -1)",
        "torch.cat([{s}, {z}.view(1, H, 1, 1).expand(B, H, M, 1).bfloat16()], -1)",
        "torch.cat([{s}, {z}.view(1, 1, 1, H).expand(B, M, H, H)[..., :1].mT.expand(B, H, H, M).mT[:, :, :M, :1]], -1)",
        "torch.cat([{s}, {z}.view(1, H, 1, 1).expand(B, H, M, 1)], -1).flip(-1)",
        "torch.cat([{s}, {z}.view(H, 1, 1, 1).expand(H, B, M, 1).reshape(B, H, M, 1)], -1)",
        "torch.cat([{s}, {z}.view(1, H, 1, 1).expand(B, H, M, 1) + q[..., :1]], -1)",
    ),
)  # fmt: skip
SHIFTED = Table(
    (
        "{s} - {s}.max(dim=-1, keepdim=True).values", "{s} - {s}.amax(-1, keepdim=True)", "{s} - torch.max({s}, 3, True)[0]",
        "{s}.sub({s}.amax([-1], True))", "{s}",
    ),
    (
        "{s} - {s}.amax(-2, keepdim=True)", "{s} - {s}.max()", "{s} - {s}[..., :1]", "{s} + {s}.amax(-1, keepdim=True)",
        "{s} - {s}[..., :-1].amax(-1, keepdim=True)", "torch.sub({s}, {s}.amax(-1, keepdim=True), alpha=2)",
        "{s} - {s}.max(-1, keepdim=True)[1]", "{s} - {s}.amax(1, keepdim=True)", "{s}.amax(-1, keepdim=True) - {s}",
    ),
)  # fmt: skip
DROPPED = Table(
    ("{w}[..., :-1]", "{w}[:, :, :, :L]", "{w}.narrow(3, 0, L)", "{w}[..., 0:-1]", "{w}.split([L, 1], -1)[0]"),
    ("{w}[..., 1:]", "{w}[..., :-1].flip(-1)", "{w}[..., -L:]", "{w}.flip(-1)[..., :-1]", "{w}[..., :-1] + {w}[..., -1:]"),
)  # fmt: skip
SOFTMAX = Table(
    (
        "torch.softmax({s}, -1)", "{s}.softmax(-1)", "F.softmax({s}, dim=-1)", "{s}.softmax(dim=-1)",
        "torch.softmax({s}, axis=-1)", "F.softmax({s}, -1, dtype=torch.float32).to(q.dtype)", "torch.softmax({s}, 3)",
        "F.softmax({s}.float(), dim=-1).to(q.dtype)", "torch.nn.Softmax(-1)({s})",
        "torch.ops.aten._softmax.default({s}, -1, False)", "torch.ops.aten.softmax.int({s}, -1)",
        "torch.softmax(input={s}, dim=-1)", "torch.softmax({s}.double(), -1).to(q.dtype)", "torch.special.softmax({s}, -1)",
        "F.softmax({s}, -1, 3)", "F.softmax({s}, dim=-1, dtype={s}.dtype)",
    ),
    (
        "softmax({s}, -1)", "softmax({s}, dim=-1)", "torch.softmax({s}, -2)", "F.softmax({s}, dim=1)", "torch.sigmoid({s})",
        "torch.exp({s})", "torch.softmax({s}, -1, torch.float16).to(q.dtype)", "torch.softmax(-{s}, -1)",
        "torch.log_softmax({s}, -1)", "torch.softmax({s}, axis=-2)", "F.softmin({s}, dim=-1)",
        "torch.softmax({s}.mT, -2).mT", "F.gumbel_softmax({s}, dim=-1)", "torch.softmax({s}.flip(-1), -1)",
        "torch.softmax({s}.bfloat16(), -1).to(q.dtype)",
    ),
)  # fmt: skip
WEIGHTS = Table(
    (
        "{w}.to(q.dtype)", "{w}[...]", "{w}.contiguous()", "{w} * 1.0", "{w}.view(B, H, M, L)", "{w}[:, :, :L]",
        "{w}.clone()", "F.dropout({w}, 0.0, True)", "F.dropout({w}, p=0.0, training=False)", "F.dropout({w}, 0.5, False)",
        "{w}[:, :, 0:, :]", "F.dropout({w}, 0.0, True, True)", "torch.dropout({w}, 0.0, False)", "{w}.type_as(v)",
        "F.dropout({w}, training=False)", "torch.nn.functional.dropout(input={w}, p=0.0, training=True)",
        "torch.dropout({w}, 0.3, train=False)", "{w}.float().to(q.dtype)",
    ),
    (
        "{w}[..., i.flip(0)]", "{w}[:, :, i[:M].flip(0)]", "{w}.flip(-1)", "{w} * 2", "{w}.mT",
        "{w}.to(torch.float8_e4m3fn).to(q.dtype)", "{w}.bfloat16().to(q.dtype)", "{w}.to(torch.float16).to(q.dtype)",
        "{w}.roll(1, -1)", "{w}.int().to(q.dtype)", "{w} / 3", "F.dropout({w}, 0.5)", "F.dropout({w}, p=0.4, training=True)",
        "F.dropout(F.dropout({w}, 0.5), 0.0)", "{w} + 0.01", "{w} * one", "F.dropout(F.dropout({w}, 0.0), 0.5)",
        "torch.dropout({w}, 0.5, True)", "{w}[torch.arange(B).flip(0)]", "{w}.tril()", "-{w}",
        "{w}[:, torch.arange(H).flip(0)]", "{w}.transpose(0, 1).reshape(B, H, M, L)",
        "{w}.view(H, B, M, L).reshape(B, H, M, L)", "F.dropout({w}, 1.0, True)", "F.alpha_dropout({w}, 0.5, True)",
        "{w}.masked_fill({w} < 0.2, 0.0)", "{w}.round(decimals=1)", "{w}[:, :, :1].expand(B, H, M, L)",
        "{w}.mT.reshape(B, H, M, L)", "{w} / {w}.amax(-1, keepdim=True)", "{w}.narrow(3, 0, L).cumsum(-1)",
    ),
)  # fmt: skip
OUTPUT = Table(
    (
        "{w} @ {v}", "torch.matmul({w}, {v})", "{w}.matmul({v})", "torch.matmul({w}, other={v})",
        "torch.bmm({w}.flatten(0, 1), {v}.flatten(0, 1)).view(B, H, M, -1)", "torch.ops.aten.matmul.default({w}, {v})",
        "torch.einsum('bhqk,bhkd->bhqd', {w}, {v})",
    ),
    (
        "{w} @ {v}.flip(2)", "torch.einsum('bhkq,bhkd->bhqd', {w}, {v})", "{w} @ {v}.abs()", "{w}.mT @ {v}",
        "{w} @ {v}.flip(1)", "({w}[..., None] * {v}[:, :, None]).sum(3)", "torch.einsum('bhqk,bgkd->bhqd', {w}, {v})",
    ),
)  # fmt: skip

# Lines that write to the operands, between layers or between the two products; the last ones are harmless.
OPERAND_WRITE = (
    "F.relu({x}, True)", "{x}.mul_(0.5)", "{x}[..., 1:] = 0", "torch.add({x}, 1, out={x})", "{x}.zero_()",
    "F.dropout({x}, 1.0, True, True)", "{x}.numpy().fill(0.5)", "{x}.copy_({x} * 0.5)", "{x} *= 0.5",
    "{x}[:, :, 1:3].neg_()", "{x}.index_put_((torch.tensor(0),), one)", "torch.nn.init.ones_({x})", "{x}.clone().zero_()",
    "F.relu({x})", "{x}.mul(2)",
)  # fmt: skip
# What shares their memory.
VIEWS = (
    "{x}[:, :, 1:]", "{x}.mT", "{x}[..., ::2]", "{x}.detach()", "{x}.flatten(2)", "{x}[:1]", "{x}.transpose(1, 2)",
    "{x}.view(B, -1, *{x}.shape[2:])", "{x}.unflatten(3, (2, -1))", "{x}[...]",
)  # fmt: skip
FINISHED = ("{o} * 1.5", "{o}.transpose(1, 2).contiguous().transpose(1, 2)", "{o} + 0.1", "torch.tanh({o})", "{o}.clone()")
# Through numbers that stay small: one layer's NaN would hide what the next ones do.
CHAINED = (
    "q + {o}.nan_to_num(0.0, 0.0, 0.0).mean(-1, keepdim=True).clamp(-9, 9)",
    "q + {o}[..., :1].nan_to_num(0.0, 0.0, 0.0).clamp(-2, 2)",
    "0.5 * q - {o}.nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True).tanh()", "q * 0.9",
)  # fmt: skip
SINKS = (SINK, JOINED_SINK, SHIFTED, DROPPED)
WRITTEN = (SCORES, SCALED, SOFTMAX, WEIGHTS, OUTPUT, OPERAND_WRITE, *SINKS)
MASK_TABLES = (
    POSITIONS, CAUSAL, WINDOW, VALID, BROADCAST, JOINED, BOOLEAN_STEP, ADDITIVE, FLOAT_STEP, BOOLEAN_WRITE, FLOAT_WRITE,
    PAD_WRITE, GIVEN, GIVEN_WRITE,
)  # fmt: skip
ATTENTION_TABLES = (
    SDPA, GROUPED, SCORES, SCALED, BIASED, FILLED, *SINKS, SOFTMAX, WEIGHTS, OUTPUT, OPERAND_WRITE,
)  # fmt: skip


def spellings(tables: tuple[Table | tuple[str, ...], ...]) -> list[Due]:
    """Every spelling once, with its table."""
    every = [(table, (*table.same, *table.near) if isinstance(table, Table) else table) for table in tables]
    return [(table, spelling) for table, texts in every for spelling in dict.fromkeys(texts)]


class AttentionLines(MaskLines):
    """Adds the lines of attention calls. `local`: an output's row depends on no other row of the query."""

    def __init__(self, seed: int, due: Sequence[Due], grouped: bool, given: str) -> None:
        super().__init__(seed, due, given)
        self.grouped = grouped
        self.local = True

    def draw(self, table: Table | tuple[str, ...]) -> str:
        template = super().draw(table)
        if table in (SDPA, BIASED, FILLED, *WRITTEN) and isinstance(table, Table) and template in table.near:
            self.local = False
        return template

    def attention(self, mask: str, additive: bool, writes: float) -> str:
        """Adds a call, whose output a1 [B, H, L, Dv] (a number) the program returns; the name of what goes on from it."""
        q, k, v = self.operands()
        written = self.wants(*WRITTEN) or (additive and self.wants(BIASED)) or (not additive and self.wants(FILLED))
        if not written and (self.wants(SDPA) or self.maybe(0.5)):
            output = self.sdpa(q, k, v, mask)
        else:
            output = self.written_out(q, k, v, mask, additive, writes)
        while self.maybe(0.2):
            output = self.let("o", self.draw(FINISHED), o=output)
        return output

    def operands(self) -> tuple[str, str, str]:
        k, v = "k", "v"
        if self.maybe(0.2):
            k, v = self.let("k", "{x} * 0.9", x=k), self.let("v", "{x} + 0.2", x=v)
        return "q", k, v

    def repeated(self, *tensors: str) -> tuple[str, ...]:
        """Key and value with as many heads as the query, both in one spelling as a rule."""
        if not self.grouped:
            return tensors
        spelling = self.draw(GROUPED)
        return tuple(self.let("r", self.draw(GROUPED) if self.maybe(0.1) else spelling, x=x) for x in tensors)

    def sdpa(self, q: str, k: str, v: str, mask: str) -> str:
        template = self.draw(SDPA)
        if self.grouped and template.startswith(("sdpa(", "F.")) and not self.wants(GROUPED) and self.maybe(0.5):
            return self.let("a", template[:-1] + ", enable_gqa=True)", q=q, k=k, v=v, m=mask)
        k, v = self.repeated(k, v)
        return self.let("a", template, q=q, k=k, v=v, m=mask)

    def written_out(self, q: str, k: str, v: str, mask: str, additive: bool, writes: float) -> str:
        k, v = self.repeated(k, v)
        if self.maybe(0.2):
            q = self.let("q", "{q} * 0.6", q=q)
        s = self.let("s", self.draw(SCORES), q=q, k=k)
        late = self.maybe(self.trap)  # the scale behind the mask
        if not late:
            s = self.let("s", self.draw(SCALED), s=s)
        s = self.let("s", self.draw(BIASED if additive else FILLED), s=s, m=mask, neg=self.never())
        if late:
            s = self.let("s", self.draw(SCALED), s=s)
        if self.wants(OPERAND_WRITE) or self.maybe(writes):
            self.do(self.draw(OPERAND_WRITE), x=self.rng.choice([q, k, v, s]))
        self.write(writes)
        sunk = self.wants(*SINKS) or self.maybe(0.15)
        if sunk:
            z = self.let("z", self.draw(SINK))
            s = self.let("s", self.draw(JOINED_SINK), s=s, z=z)
            if self.maybe(writes):
                self.do(self.draw(OPERAND_WRITE), x=z)
        if (sunk and self.maybe(0.5)) or self.wants(SHIFTED):
            s = self.let("s", self.draw(SHIFTED), s=s)
        w = self.let("w", self.draw(SOFTMAX), s=s)
        if sunk:
            w = self.let("w", self.draw(DROPPED), w=w)
        while self.wants(WEIGHTS) or self.maybe(0.4):
            w = self.let("w", self.draw(WEIGHTS), w=w)
        if self.maybe(writes):
            self.do(self.draw(OPERAND_WRITE), x=self.rng.choice([w, v]))
        self.write(writes)
        return self.let("a", self.draw(OUTPUT), w=w, v=v)
