"""What the tests of the kernels share: operands in every layout, padding of every kind, faulty numbers, poison."""

import math

import torch

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FLOATS = [*TOLERANCE]


def tensor(batch, heads, seq_len, dim, layout="BLHD", dtype=torch.float32, device="cpu", generator=None):
    """Random numbers [batch, heads, seq_len, dim] that lie in memory as the layout says."""

    def numbers(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    if layout == "BHLD":
        return numbers(batch, heads, seq_len, dim)
    if layout == "strided":  # the last dimension is not dense
        return numbers(batch, heads, dim, seq_len).transpose(2, 3)
    if layout == "odd":  # dense rows, at odd steps
        return numbers(batch, heads, seq_len, dim + 1)[..., :dim]
    if layout == "shared":  # one head, expanded
        return numbers(batch, 1, seq_len, dim).expand(-1, heads, -1, -1)
    if layout == "packed":  # a slice of one projection's output, as in Phi-3
        return numbers(batch, seq_len, heads + 1, dim)[:, :, 1:].transpose(1, 2)
    assert layout == "BLHD"  # as projections leave it
    return numbers(batch, seq_len, heads, dim).transpose(1, 2)


def qkv(
    batch=2, heads=4, kv_heads=2, seq_len=40, dim=32, value_dim=None, dtype=torch.float32, device="cpu", layout="BLHD",
    seed=0,
):  # fmt: skip
    """query, key and value; a value's width is the key's unless it is given."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim)
    return tuple(tensor(batch, count, seq_len, size, layout, dtype, device, generator) for count, size in sizes)


def counts_of(counts, device="cpu"):
    """A count for each item as the ops take it; None stays."""
    return None if counts is None else torch.tensor(counts, dtype=torch.int32, device=device)


def choose_tokens(counts, selections, seq_len, capacity, device="cpu"):
    """Random ascending indices int32 [B, Hs, C] with filler L - 1, and count int32 [B]."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.full((len(counts), selections, capacity), seq_len - 1, dtype=torch.int32)
    for b, count in enumerate(counts):
        for s in range(selections):
            indices[b, s, :count] = torch.randperm(seq_len, generator=generator)[:count].sort().values
    return indices.to(device), counts_of(counts, device)


def poison_behind(tensor, counts):
    """The same tensor in the same layout, NaN from each count on; one that repeats its memory is left as it is."""
    if 0 in tensor.stride():
        return tensor
    poisoned = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    for b, n in enumerate(counts or []):
        poisoned[b, :, n:] = math.nan
    return poisoned


def poison_padding(tensor, padding):
    """NaN at the invalid tokens: whoever lets one in shows it."""
    return tensor if padding is None else tensor.masked_fill(~padding[:, None, :, None], math.nan)


PADDINGS = [None, "all valid", "left", "right", "holes", "one valid", "none valid"]


def make_padding(kind, batch, seq_len, device="cpu"):
    """bool [B, L], True at valid tokens; None for no padding."""
    positions = torch.arange(seq_len).expand(batch, -1)
    if kind is None:
        return None
    if kind == "all valid":
        padding = positions >= 0
    elif kind == "left":
        padding = positions >= torch.arange(batch)[:, None] * (seq_len // 3)
    elif kind == "right":
        padding = positions < seq_len - torch.arange(batch)[:, None] * (seq_len // 3)
    elif kind == "holes":
        padding = torch.rand(batch, seq_len, generator=torch.Generator().manual_seed(1)) < 0.7
    elif kind == "one valid":
        padding = positions == seq_len // 2
    elif kind == "none valid":
        padding = (positions >= 0) & (torch.arange(batch) > 0)[:, None]
    return padding.to(device)


FAULTS = [
    "NaN key", "NaN keys", "NaN key in the window", "inf key", "-inf key", "infinite number", "unseen infinite number",
    "NaN query in the window", "NaN query before it", "inf query in the window", "one head",
]  # fmt: skip


def damaged(fault, query, key, window=20):
    """Copies of query and key with a numerical fault; where one has a position, it is one quarter of the way along."""
    query, key = query.clone(), key.clone()
    seq_len = key.shape[2]
    place = seq_len // 4
    if fault == "NaN key":
        key[:, :, place] = math.nan
    elif fault == "NaN keys":
        key[:, :, place : place + 30 : 4] = math.nan
    elif fault == "NaN key in the window":
        key[:, :, seq_len - window // 2] = math.nan
    elif fault == "inf key":
        key[:, :, place] = math.inf
    elif fault == "-inf key":
        key[:, :, place] = -math.inf
    elif fault == "infinite number":  # logits of both signs: some rows of the window give it all, others nothing
        key[:, :, place, 0] = math.inf
        query[:, :, place, 0] = 1.0
    elif fault == "unseen infinite number":
        key[:, :, place, 0] = math.inf
        query[:, :, seq_len - 2 * window :, 0] = -1.0
    elif fault == "NaN query in the window":
        query[:, :, seq_len - 2, 0] = math.nan
    elif fault == "NaN query before it":
        query[:, :, place] = math.nan
    elif fault == "inf query in the window":
        query[:, :, seq_len - 2] = math.inf
    elif fault == "one head":
        key[0, 0, place] = math.nan
    return query, key


def close(got, expected, dtype=torch.float32, equal_nan=False):
    tolerance = TOLERANCE[dtype]  # relative as well: bfloat16 keeps 8 bits of a value of any size
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=equal_nan)
