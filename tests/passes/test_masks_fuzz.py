"""Random mask programs: what is inferred from the graph must be what the graph computes.

Each case draws a program that builds a mask out of real torch calls, propagates fake tensors through it as tracing does,
infers the meaning of an SDPA call that reads it, runs the program on real tensors of several kinds, and compares. A mask
may be called opaque; it may never be called something that it is not.
"""

import operator
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from tsa_compile.kernels import reference
from tsa_compile.passes.find import find_calls
from tsa_compile.passes.graph import fake
from tsa_compile.passes.masks.infer import infer_mask
from tsa_compile.passes.masks.info import FILLED_KINDS, MaskKind
from tsa_compile.passes.padding import PaddingBuilder
from tsa_compile.testing import evaluate_mask, run_nodes

from ..support import exhaustive_but
from .mask_programs import HALF, HEADS, HIDDEN, Pieces, draw_padding


class Masks(Pieces):
    """Draws a program that ends in a mask for attention over [B, H, L, D]."""

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
        family = self.rng.randrange(13)
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
        if family == 10:
            return self.conjunction(self.causal(), self.window(), *([self.padding()] if self.maybe(0.5) else []))
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
        p, query = self.p, self.query
        if self.maybe(0.25):  # the last queries alone, as behind a cache
            query = p.call(operator.getitem, query, (slice(None), slice(None), slice(2, None)))
            mask = p.call("expand", mask, *[-1] * (fake(mask).dim() - 2), self.length, self.length)
            mask = p.call(operator.getitem, mask, (Ellipsis, slice(2, None), slice(None)))
        qkv = (query, self.key, self.value)
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
    graph_module, _ = masks.build()
    (call,) = find_calls(graph_module)
    assert call.problem is None
    info = infer_mask(call)
    if info.kind is MaskKind.OPAQUE:
        return info
    padding = None
    if info.padding is not None and (info.kind is not MaskKind.SLIDING_WINDOW or info.window is not None):
        with graph_module.graph.inserting_before(call.node):
            padding = PaddingBuilder(graph_module.graph).padding(call, info)
    sizes = [masks.p.traced] * 3 + ([(3, 11), (2, 5)] if symbolic else [])
    for batch, length in sizes:
        inputs = masks.p.draw(batch, length)
        values = run_nodes(graph_module, inputs, call)
        hold_against(info, call, values, call.masks[0].mask.name, padding, shape_symbols(graph_module, inputs))
    return info


def hold_against(info, call, values, mask, padding, symbols):
    """The meaning of a mask against the real one, and against what attention makes of it."""
    query, key, value = (values[node.name] for node in (call.query, call.key, call.value))
    real = values[mask].expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    allowed = real if real.dtype == torch.bool else real == 0
    if real.dtype != torch.bool:
        assert (real[~allowed] <= HIDDEN[real.dtype]).all(), "a score is shifted, not hidden"
    inferred = evaluate_mask(info, tuple(real.shape), values, symbols)
    assert torch.equal(inferred, allowed)
    valid = None if padding is None else values[padding.name]
    triangle = torch.ones(real.shape[2:], dtype=torch.bool).tril(key.shape[2] - query.shape[2]).expand_as(allowed)
    if info.kind is MaskKind.NONE:
        assert allowed.all()
    elif info.kind is MaskKind.PADDING:
        assert torch.equal(allowed, valid[:, None, None].expand_as(allowed))
    elif info.kind in FILLED_KINDS:
        at = torch.arange(query.shape[2]) if info.positions is None else values[info.positions]
        reach = torch.arange(key.shape[2]) <= at[:, None]
        assert torch.equal(allowed, (reach if valid is None else reach & valid[:, None, None]).expand_as(allowed))
    elif info.kind is MaskKind.CAUSAL:
        assert valid is None
        assert torch.equal(allowed, triangle)
    elif info.kind is MaskKind.CAUSAL_PADDING or info.window is not None:
        seen = triangle if info.window is None else triangle.triu(key.shape[2] - query.shape[2] + 1 - info.window)
        assert torch.equal(allowed, seen if valid is None else seen & valid[:, None, None])
        scale = query.shape[3] ** -0.5
        expected = reference.padded_attention(query, key, value, valid, scale, info.mean_rows, info.window)
        actual = values[call.node.name]
        tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(query.dtype, 1e-4)
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("block", exhaustive_but(range(6), 0))
def test_random_masks(block, symbolic):
    cases = 30 if symbolic else 320
    kinds = Counter()
    for seed in range(block * cases, (block + 1) * cases):
        seed = seed + (1_000_000 if symbolic else 0)
        try:
            info = check(seed, symbolic)
            kinds["window" if info.window is not None else info.kind] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    # Enough of each, or the comparison above would compare nothing.
    assert kinds[MaskKind.CAUSAL] >= cases * 0.1, kinds
    assert kinds[MaskKind.CAUSAL_PADDING] >= cases * 0.1, kinds
    assert kinds["window"] >= cases * 0.02, kinds
    assert kinds[MaskKind.OPAQUE] <= cases * 0.6, kinds
    assert len(kinds) >= (4 if symbolic else 6), kinds
