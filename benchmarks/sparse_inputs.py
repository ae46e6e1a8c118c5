"""What sparse.py computes on any device: inputs with planted structure, and what a method keeps of dense attention.

Attention logits of head h, query t and key s, of which trained models show all:

    noise          normal, of standard deviation 1.1, and more from the noise of queries and keys along what the others show
    sinks          + 13.5 where s is one of the first 4 tokens
    heavy columns  + 9 at 24 tokens that all queries look at, different ones for each key head
    topics         + 6 where s lies in a segment of 512 tokens on the same topic of 16 as t's, different for each key head;
                   topics come in pairs, and where s is on the other topic of t's pair it is .72 of that
    local band     + 2.5 where s is t, less with the distance, about 0 from 512 tokens on, with faint echoes further away

All but the noise are times a factor between .7 and 1 that each head draws for each of them.

The structure was chosen so that FlashPrefill and Token Sparse Attention err about as much as they did on the data that
published code was measured on: some 90 settings were tried on seed 0, by these figures and not by any method's speed.
Seed 1 was looked at after the choice; the default seed was not looked at. FlexPrefill errs about twice as much here. What
the sinks get differs between heads, most of all at short lengths: their factor alone changes a weight up to 50 times, and
four keys have little noise to average. At 128K, 32 heads, 8 key heads, from a sample of rows, for FlexPrefill of five
heads and two seeds:

                                                    here                  there
    FlashPrefill, alpha 0.1, .05, .02: error         .33, .23-.25, .15     .32, .24, .16
                                      density       6-7 %, 8-9 %, 13 %    4-5 %, 6-8 %, 12-15 % (from times)
    FlexPrefill, gamma 0.95, .9: error               .4-.5, .6-.7          .22, .31
    Token Sparse Attention, .675 kept: error        .08                   .093
    kept at coverage .005, .01, .02, .05            .88, .79, .65, .46    .85, .77, .66, .45

Here the sinks get about a third of the attention, distant segments on the same topic two fifths, and the heavy columns and
the nearest 512 tokens a tenth each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from attention_methods import Inputs, Shape
from torch import Tensor

from tsa_compile import Floor
from tsa_compile.kernels.sparse import Lists, VerticalSlash
from tsa_compile.kernels.sparse.blocks import BLOCK
from tsa_compile.kernels.sparse.vertical_slash import vertical_slash_mask

AnyLists = Lists | VerticalSlash


@dataclass(frozen=True)
class Structure:
    """How strong and how wide everything is."""

    noise: float = 1.1
    sinks: int = 4
    sink_logit: float = 13.5
    heavy: int = 24
    heavy_logit: float = 9.0
    segment: int = 512
    topic_logit: float = 6.0
    alike: float = 0.72
    band: int = 512
    band_logit: float = 2.5


def planted_inputs(
    shape: Shape, length: int, device: str = "cuda", structure: Structure | None = None, seed: int = 2
) -> Inputs:
    """Query, key and value of a batch of one, in memory as projections leave them, [B, L, heads, D]."""
    assert shape.batch == 1
    structure = structure or Structure()
    generator = torch.Generator(device).manual_seed(seed)
    query, key, value = (
        torch.empty(1, length, heads, shape.head_dim, dtype=shape.dtype, device=device).transpose(1, 2)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    group, scale = shape.heads // shape.kv_heads, shape.head_dim**-0.5
    for kv_head in range(shape.kv_heads):
        features, kinds = key_features(length, shape.head_dim, structure, scale, generator)
        basis = torch.linalg.qr(_normal(generator, shape.head_dim, shape.head_dim)).Q[: features.shape[1]]
        spread = math.sqrt(structure.noise)
        key[0, kv_head] = (features @ basis + spread * _normal(generator, length, shape.head_dim)).to(shape.dtype)
        wanted = query_features(features, kinds, structure, scale)
        for head in range(kv_head * group, (kv_head + 1) * group):
            strengths = 0.7 + 0.3 * torch.rand(4, generator=generator, device=device)
            noise = spread * _normal(generator, length, shape.head_dim)
            query[0, head] = ((wanted * strengths[kinds]) @ basis + noise).to(shape.dtype)
        value[0, kv_head] = _normal(generator, length, shape.head_dim).to(shape.dtype)
    return Inputs(query, key, value, scale)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def key_features(
    length: int, head_dim: int, structure: Structure, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What keys show, [L, F], and of what kind each feature is: 0 sinks, 1 heavy columns, 2 topics, 3 band."""
    device, topics, waves = generator.device, max(1, head_dim // 8), max(1, head_dim * 3 // 16)
    pairs = (topics + 1) // 2
    positions = torch.arange(length, device=device)
    sinks = (positions < structure.sinks).float() * math.sqrt(structure.sink_logit / scale)
    heavy = torch.zeros(length, device=device)
    columns = torch.randperm(length, generator=generator, device=device)[: structure.heavy]
    heavy[columns] = math.sqrt(structure.heavy_logit / scale)
    segments = torch.randint(topics, (-(-length // structure.segment),), generator=generator, device=device)
    topic_of = segments.repeat_interleave(structure.segment)[:length]
    # What a topic shares with the other of its pair, and what is its own.
    shares = (structure.alike, 1 - structure.alike)
    topic = torch.cat(
        [
            torch.nn.functional.one_hot(places, count).float() * math.sqrt(share * structure.topic_logit / scale)
            for places, count, share in zip((topic_of // 2, topic_of), (pairs, topics), shares, strict=True)
        ],
        dim=1,
    )
    # Waves of many lengths agree where the distance is 0, and about a band's width further no more.
    lengths = torch.rand(waves, generator=generator, device=device) * 2 * math.pi / structure.band
    angles = positions[:, None].double() * lengths.double()
    band = torch.cat([angles.cos(), angles.sin()], dim=1).float() * math.sqrt(structure.band_logit / scale / waves)
    kinds = torch.tensor([0, 1] + [2] * (pairs + topics) + [3] * 2 * waves, device=device)
    return torch.cat([sinks[:, None], heavy[:, None], topic, band], dim=1), kinds


def query_features(features: Tensor, kinds: Tensor, structure: Structure, scale: float) -> Tensor:
    """What queries look for: sinks and heavy columns from everywhere, their own topic and neighbourhood."""
    wanted = features.clone()
    wanted[:, kinds == 0] = math.sqrt(structure.sink_logit / scale)
    wanted[:, kinds == 1] = math.sqrt(structure.heavy_logit / scale)
    return wanted


def relative_error(out: Tensor, dense: Tensor, positions: Tensor | None = None) -> float:
    """|out - dense| / |dense| over all rows, or those at positions [1, H, n]; a head at a time, to save memory."""
    wrong = total = 0.0
    for head in range(out.shape[1]):
        rows = slice(None) if positions is None else positions[0, head].long()
        expected = dense[0, head, rows].float()
        wrong += float((out[0, head, rows].float() - expected).square().sum(dtype=torch.float64))
        total += float(expected.square().sum(dtype=torch.float64))
    return math.sqrt(wrong / total)


def mass_kept(
    inputs: Inputs, lists: AnyLists | None, positions: Tensor | None, floor: Floor | None = None, heads: int = 8,
    samples: int = 64, block: int = BLOCK,
) -> float:  # fmt: skip
    """The share of dense attention that goes to keys that a method computes, on average over a sample of its rows.

    Args:
        lists: of the rows that are attended to, or None for all of them.
        positions: of these rows, [1, H, n], or None: all.
        floor: what these rows see of the tokens that are not among them.
    """
    device, shares = inputs.query.device, []
    count = inputs.length if positions is None else positions.shape[2]
    for head in torch.linspace(0, inputs.query.shape[1] - 1, min(heads, inputs.query.shape[1])).long().tolist():
        rows = torch.linspace(0, count - 1, min(samples, count)).long().to(device)
        places = torch.arange(count, device=device) if positions is None else positions[0, head].long()
        key = inputs.key[0, head * inputs.key.shape[1] // inputs.query.shape[1]].float()
        logits = inputs.scale * inputs.query[0, head, places[rows]].float() @ key.T
        keys = torch.arange(inputs.length, device=device)
        behind = places[rows][:, None] - keys
        weights = logits.masked_fill(behind < 0, -math.inf).softmax(dim=1)
        seen = torch.arange(count, device=device) <= rows[:, None]
        if isinstance(lists, VerticalSlash):
            of_head = VerticalSlash(*(tensor[:, head : head + 1] for tensor in lists))
            seen &= vertical_slash_mask(of_head, count, rows)[0, 0]
        elif lists is not None:
            seen &= listed(lists, head, rows // block).repeat_interleave(block, 1)[:, :count]
        share = (weights[:, places] * seen).sum(dim=1)
        if floor is not None:
            near = (behind < floor.window) | (keys < floor.sinks)
            near[:, places] = False
            share += (weights * near).sum(dim=1)
        shares.append(float(share.mean()))
    return sum(shares) / len(shares)


def listed(lists: Lists, head: int, query_blocks: Tensor) -> Tensor:
    """Which key blocks some query blocks of a head see, bool [n, Q]."""
    num, indices = lists.kv_num_blocks[0, head, query_blocks], lists.kv_indices[0, head, query_blocks].long()
    blocks = lists.kv_num_blocks.shape[2]
    inside = torch.arange(indices.shape[1], device=num.device) < num[:, None]
    mask = torch.zeros(len(num), blocks + 1, dtype=torch.bool, device=num.device)
    return mask.scatter_(1, torch.where(inside, indices, blocks), True)[:, :-1]


def random_lists(heads: int, blocks: int, density: float, device: str, seed: int = 0) -> Lists:
    """Lists of one item with about this share of the causal blocks, the diagonal among them."""
    from tsa_compile.kernels.sparse import lists_of

    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.rand(1, heads, blocks, blocks, generator=generator, device=device) < density
    own = torch.arange(blocks, device=device)
    return lists_of(mask.tril_(-1) | (own == own[:, None]))
