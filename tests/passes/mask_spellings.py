"""Masks as they are spelled, each match beside near-misses, and how one is traced and inferred."""

import torch
import torch.nn.functional as F

from tsa_compile.passes.find import find_calls
from tsa_compile.passes.masks.infer import infer_mask
from tsa_compile.passes.masks.info import MaskKind
from tsa_compile.testing import capture_all, evaluate_mask, graph_text, run_nodes

BATCH, HEADS, LENGTH = 2, 3, 8
LOW = torch.finfo(torch.float32).min
INF = float("-inf")

NONE, CAUSAL, CAUSAL_PADDING, FILLED, FILLED_PADDING, PADDING, SLIDING, CHUNKED, PACKED, OPAQUE = (
    MaskKind.NONE, MaskKind.CAUSAL, MaskKind.CAUSAL_PADDING, MaskKind.FILLED, MaskKind.FILLED_PADDING, MaskKind.PADDING,
    MaskKind.SLIDING_WINDOW, MaskKind.CHUNKED, MaskKind.PACKED, MaskKind.OPAQUE,
)  # fmt: skip


class Inferred:
    """A traced attention call with one mask: its graph, its call, what the mask was said to mean, all real values."""

    def __init__(self, build, *, length=LENGTH, keys=None, dtype=torch.float32, pad=None, dynamic=None, mark=None, extra=()):
        query = torch.randn(BATCH, HEADS, length, 8, dtype=dtype)
        key = torch.randn(BATCH, HEADS, length if keys is None else keys, 8, dtype=dtype)
        pad = padding_mask(key.shape[2]) if pad is None else pad
        if mark is not None:
            mark(query, key, pad)

        def attention(query, key, pad, *extra):
            mask = build(query.shape[2], key.shape[2], pad, *extra)
            return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)

        captured = capture_all(attention, query, key, pad, *extra, dynamic=dynamic)
        (self.graph_module,) = captured.graphs
        (self.call,) = find_calls(self.graph_module)
        self.mask = infer_mask(self.call)
        self.values = run_nodes(self.graph_module, captured.inputs[0], self.call)
        self.symbols = {
            str(symbolic): extent
            for node in self.graph_module.graph.nodes
            if isinstance(node.meta.get("example_value"), torch.Tensor)
            for symbolic, extent in zip(node.meta["example_value"].shape, self.values[node.name].shape, strict=True)
        }

    @property
    def allowed(self):
        """The mask that the model really builds."""
        query, key = (self.values[node.name] for node in (self.call.query, self.call.key))
        mask = torch.ones(1, dtype=torch.bool)
        for term in self.call.masks:
            real = self.values[term.mask.name]
            mask = mask & (real if real.dtype == torch.bool else real == 0)
        return mask.expand(*query.shape[:3], key.shape[2])

    def inferred(self):
        return evaluate_mask(self.mask, tuple(self.allowed.shape), self.values, self.symbols)


def padding_mask(length):
    pad = torch.ones(BATCH, length, dtype=torch.long)
    pad[0, :3] = 0
    pad[1, -2:] = 0
    return pad


def positions(n, m):
    return torch.arange(n)[:, None], torch.arange(m)[None, :]


def causal(n, m):
    q, kv = positions(n, m)
    return kv <= q


def expect(kind, build, **options):
    """Infers a mask's meaning, checks its kind, and checks whatever it says against the real mask."""
    result = Inferred(build, **options)
    assert result.mask.kind is kind, f"{result.mask}\n{graph_text(result.graph_module)}"
    if kind is not OPAQUE:
        assert torch.equal(result.inferred(), result.allowed)
    rows, keys = result.allowed.shape[2:]
    triangle = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    if kind is CAUSAL:
        assert torch.equal(result.allowed, triangle.expand_as(result.allowed))
    return result


def additive(allowed, fill=LOW, dtype=torch.float32):
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, fill)


def documents(n, m, document):
    return document[:, None, :, None] == document[:, None, None, :]


def constant_documents(n, m, pad):
    """A packed batch is recognised by positions that do not go up by one; these always do."""
    ids = torch.arange(n)[None]
    document = (torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return document[:, None, :, None] == document[:, None, None, :]


def looked_up(n, m, pad):
    """Padding as transformers' index-free masks read it: by advanced indexing."""
    b, kv = torch.arange(pad.shape[0])[:, None, None, None], torch.arange(m)[None, None, None, :]
    return causal(n, m) & pad.bool()[b, kv]


def behind_with_padding(n, m, pad):
    """As transformers builds it for a chunk: positions from the cache's length on."""
    b, kv = torch.arange(pad.shape[0])[:, None, None, None], torch.arange(m)[None, None, None, :]
    return (kv <= (torch.arange(n) + (m - n))[None, None, :, None]) & pad.bool()[b, kv]


# Each spelling of a causal mask, and beside it what looks like it but is something else.
CAUSAL_SPELLINGS = {
    "kv <= q": (
        lambda n, m, pad: causal(n, m),
        (OPAQUE, lambda n, m, pad: positions(n, m)[1] < positions(n, m)[0]),
    ),
    "q >= kv": (
        lambda n, m, pad: torch.arange(n)[:, None] >= torch.arange(m),
        (OPAQUE, lambda n, m, pad: torch.arange(n)[:, None] <= torch.arange(m) - 1),
    ),
    "kv < q + 1": (
        lambda n, m, pad: torch.arange(m) < torch.arange(n)[:, None] + 1,
        (OPAQUE, lambda n, m, pad: torch.arange(m) <= torch.arange(n)[:, None] + 1),
    ),
    "not kv > q": (
        lambda n, m, pad: ~(torch.arange(m) > torch.arange(n)[:, None]),
        (OPAQUE, lambda n, m, pad: ~(torch.arange(m) >= torch.arange(n)[:, None])),
    ),
    "kv - q <= 0": (
        lambda n, m, pad: torch.arange(m) - torch.arange(n)[:, None] <= 0,
        (OPAQUE, lambda n, m, pad: torch.arange(m) + torch.arange(n)[:, None] <= 0),
    ),
    "tril": (
        lambda n, m, pad: torch.ones(n, m, dtype=torch.bool).tril(),
        (OPAQUE, lambda n, m, pad: torch.ones(n, m, dtype=torch.bool).tril(diagonal=1)),
    ),
    "tril, shifted down": (
        lambda n, m, pad: torch.tril(torch.ones(n, m)) == 1,
        (OPAQUE, lambda n, m, pad: torch.tril(torch.ones(n, m), -1) == 1),
    ),
    "not triu": (
        lambda n, m, pad: ~torch.ones(n, m, dtype=torch.bool).triu(1),
        (OPAQUE, lambda n, m, pad: torch.ones(n, m, dtype=torch.bool).triu(1)),
    ),
    "transposed triu": (
        lambda n, m, pad: torch.ones(n, m, dtype=torch.bool).triu().transpose(0, 1),
        (OPAQUE, lambda n, m, pad: torch.ones(n, m, dtype=torch.bool).tril().transpose(0, 1)),
    ),
    "triu of -inf": (
        lambda n, m, pad: torch.triu(torch.full((n, m), INF), diagonal=1),
        (OPAQUE, lambda n, m, pad: torch.triu(torch.full((n, m), INF), diagonal=2)),
    ),
    "additive, lowest": (
        lambda n, m, pad: additive(causal(n, m)),
        (OPAQUE, lambda n, m, pad: additive(causal(n, m), -1e4)),
    ),
    "additive, where": (
        lambda n, m, pad: torch.where(causal(n, m), 0.0, INF),
        (OPAQUE, lambda n, m, pad: torch.where(causal(n, m), 1.0, INF)),
    ),
    "(1 - m) * lowest": (
        lambda n, m, pad: (1.0 - causal(n, m).float()) * LOW,
        (OPAQUE, lambda n, m, pad: (1.0 - causal(n, m).float()) * LOW * 0.5),
    ),
    "filled twice": (
        lambda n, m, pad: (t := causal(n, m).float()).masked_fill(t == 0, INF).masked_fill(t == 1, 0.0),
        (OPAQUE, lambda n, m, pad: (t := causal(n, m).float()).masked_fill(t == 0, INF)),
    ),
    "through integers": (
        lambda n, m, pad: causal(n, m).long().ne(0),
        (NONE, lambda n, m, pad: causal(n, m).long().ne(2)),
    ),
    "int32 positions": (
        lambda n, m, pad: torch.arange(m, dtype=torch.int32) <= torch.arange(n, dtype=torch.int32)[:, None],
        (OPAQUE, lambda n, m, pad: torch.arange(m, dtype=torch.bfloat16) <= torch.arange(n, dtype=torch.bfloat16)[:, None]),
    ),
    "positions of half precision": (
        lambda n, m, pad: torch.arange(m).to(torch.int32) <= torch.arange(n)[:, None],
        (OPAQUE, lambda n, m, pad: torch.arange(m).half() <= torch.arange(n).half()[:, None]),
    ),
    "counted positions": (
        lambda n, m, pad: torch.arange(m) <= torch.ones(n, dtype=torch.long).cumsum(0)[:, None] - 1,
        (OPAQUE, lambda n, m, pad: torch.arange(m) <= torch.ones(n, dtype=torch.long).cumsum(0)[:, None]),
    ),
    "offset positions": (
        lambda n, m, pad: torch.arange(3, m + 3) <= torch.arange(3, n + 3)[:, None],
        (OPAQUE, lambda n, m, pad: torch.arange(2, m + 2) <= torch.arange(3, n + 3)[:, None]),
    ),
    "step of one": (
        lambda n, m, pad: torch.arange(0, m, 1) <= torch.arange(0, n, 1)[:, None],
        (OPAQUE, lambda n, m, pad: torch.arange(0, 2 * m, 2) <= torch.arange(n)[:, None]),
    ),
    "cut out of a larger mask": (
        lambda n, m, pad: torch.ones(64, 64, dtype=torch.bool).tril()[:n, :m],
        (OPAQUE, lambda n, m, pad: torch.ones(64, 64, dtype=torch.bool).tril()[1 : n + 1, :m]),
    ),
    "every second element": (
        lambda n, m, pad: torch.ones(n, m, dtype=torch.bool).tril()[::1, ::1],
        (OPAQUE, lambda n, m, pad: torch.ones(2 * n, m, dtype=torch.bool).tril()[::2]),
    ),
    "a window that is not narrower": (
        lambda n, m, pad: causal(n, m) & (torch.arange(m) > torch.arange(n)[:, None] - LENGTH),
        (SLIDING, lambda n, m, pad: causal(n, m) & (torch.arange(m) > torch.arange(n)[:, None] - LENGTH + 1)),
    ),
    "one document": (
        lambda n, m, pad: causal(n, m) & constant_documents(n, m, pad),
        (PACKED, lambda n, m, pad: causal(n, m) & documents(n, m, pad)),
    ),
    "and true": (
        lambda n, m, pad: causal(n, m) & torch.ones(n, m, dtype=torch.bool),
        (NONE, lambda n, m, pad: causal(n, m) | torch.ones(n, m, dtype=torch.bool)),
    ),
    "not and not": (
        lambda n, m, pad: ~(~causal(n, m) | ~causal(n, m)),
        (OPAQUE, lambda n, m, pad: causal(n, m) ^ causal(n, m)),
    ),
    "expanded": (
        lambda n, m, pad: causal(n, m)[None, None].expand(BATCH, HEADS, n, m),
        (OPAQUE, lambda n, m, pad: causal(n, m)[None, None].expand(BATCH, HEADS, n, m).flip(-1)),
    ),
}

PADDING_FORMS = {
    "!= 0": lambda pad: (pad != 0)[:, None, None, :],
    "== 1": lambda pad: pad.eq(1)[:, None, None],
    "> 0": lambda pad: (pad > 0).unsqueeze(1).unsqueeze(1),
    "> 1 of uint8": lambda pad: (pad.to(torch.uint8) > 1)[:, None, None],
    "bool": lambda pad: pad.bool().view(BATCH, 1, 1, LENGTH),
    "not == 0": lambda pad: ~(pad == 0)[:, None, None, :],
    "float": lambda pad: pad.float()[:, None, None].bool(),
    "expanded": lambda pad: pad[:, None, None, :].expand(BATCH, 1, LENGTH, LENGTH).bool(),
    "1 - pad": lambda pad: ~(1 - pad)[:, None, None].bool(),
    "of two masks": lambda pad: ((pad != 0) & (torch.arange(LENGTH) != 4))[:, None, None],
}

PADDING_NEAR_MISSES = {
    "or padding": lambda n, m, pad: causal(n, m) | pad.bool()[:, None, None],
    "padding of queries": lambda n, m, pad: causal(n, m) & pad.bool()[:, None, :, None],
    "padding of both": lambda n, m, pad: causal(n, m) & pad.bool()[:, None, None] & pad.bool()[:, None, :, None],
    "padding shifted by the query": lambda n, m, pad: causal(n, m) & (pad[:, None, None] <= torch.arange(n)[:, None]),
    "differs between heads": lambda n, m, pad: causal(n, m) & (torch.arange(HEADS) > 0)[:, None, None],
    "additive padding of one": lambda n, m, pad: additive(causal(n, m)) + pad.float()[:, None, None],
    "a mask from outside": lambda n, m, pad: causal(n, m) & (pad[:, None, :, None] * pad[:, None, None]).bool(),
    "strictly causal": lambda n, m, pad: (torch.arange(m) < torch.arange(n)[:, None]) & pad.bool()[:, None, None],
}

OPAQUE_MASKS = {
    "prefix": lambda n, m, pad: causal(n, m) | (torch.arange(m) < 3),
    "band": lambda n, m, pad: (torch.arange(m) - torch.arange(n)[:, None]).abs() < 3,
    "diagonal": lambda n, m, pad: torch.arange(m) == torch.arange(n)[:, None],
    "stripes": lambda n, m, pad: causal(n, m) & (torch.arange(m) % 2 == torch.arange(n)[:, None] % 2),
    "ALiBi": lambda n, m, pad: additive(causal(n, m)) - (torch.arange(n)[:, None] - torch.arange(m)).float(),
    "random": lambda n, m, pad: torch.rand(n, m) < 0.5,
    "nothing": lambda n, m, pad: torch.zeros(n, m, dtype=torch.bool),
    "list of rows": lambda n, m, pad: causal(n, m)[list(reversed(range(LENGTH)))],
    "permuted rows": lambda n, m, pad: causal(n, m)[(pad[0] * 0 + torch.arange(n)).flip(0)],
    "bits": lambda n, m, pad: torch.ones(n, m).tril().view(torch.int32) > 1,
    "doubled": lambda n, m, pad: torch.ones(n, m).tril().add(torch.ones(n, m), alpha=-1) >= 0.5,
}
