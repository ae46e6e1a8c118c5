"""Weights to start from: projections that are usually drawn apart are related, so that retrieval is learned in minutes.

Outputs start as the transpose of values, W_o = W_v^T: what is attended to is written as it was read, which the tied head
reads as that token. And a query by a token meets the keys of its successors. How a key knows its predecessor differs:

    with a token shift W    it is in the embeddings. W becomes orthogonal, and W_k = W_q W^T.
    without                 layer 0 attends to the token before, and writes R W_v^T W_v of it, R orthogonal; W_k = W_q R^T in
                            the layers above. See `without_shift`.

Mimetic initialization (Trockman and Kolter, arXiv 2305.09828) draws both products near the identity alike, from what trained
transformers look like; all weights are trained.

Drawn apart, 15M parameters on an H200 stayed at 1 of 8 keys for 3,200 steps of 1,024 samples (learning rate 2e-3), their
keys' embeddings much alike by then (mean cosine 0.6). Whether that is the reason is open: two narrow layers learned all the
same. Without a shift, two narrow layers did not learn pairs of tokens in 3,000 steps of 32 samples at 128 tokens; started
like this, 15M parameters on an H200 had .99 of every task right after 1,300 steps of 1,024 samples.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from modeling_recall import RecallForCausalLM
from torch import Tensor, nn
from torch.nn import functional

COMMON = 2.0  # what all embeddings share, relative to what they don't: without a shift, heads find positions by it
POSITIONAL = 3.0  # queries and keys of previous-token heads, relative to their weights' content
QUIET = 0.1  # of the MLPs' outputs at the start, without a shift: they would drown what layer 0 says


@torch.no_grad()
def align(model: Any) -> None:
    """Relates the projections of a model with random weights."""
    groups, head_dim = model.config.num_key_value_heads, model.config.head_dim
    for layer in model.model.layers:
        value, out = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
        out.view(len(out), groups, -1, head_dim).copy_(value.view(groups, 1, head_dim, -1).permute(3, 0, 1, 2))
    if isinstance(model, RecallForCausalLM):
        with_shift(model)
    else:
        without_shift(model)


def with_shift(model: Any) -> None:
    """The shift becomes orthogonal, and every layer's queries meet the keys of successors."""
    nn.init.orthogonal_(model.shift.weight)
    for layer in model.model.layers:
        _meet_successors(layer.self_attn, model.shift.weight)


def without_shift(model: Any) -> None:
    """Layer 0 starts with heads that attend to the token before; the layers above meet successors through what they write.

    A head attends by position alone if its queries and keys are the same for all tokens. So embeddings get a part in common,
    u, which those of layer 0 are made from: q = a and k = rotated a, by one position of RoPE, so that the product is largest
    one token back. Values, and what the layers above read, leave u out. Layer 0 writes as much as the embeddings hold.
    """
    embeddings = model.model.embed_tokens.weight
    common = torch.randn(embeddings.shape[1])
    own = embeddings.norm(dim=1).mean()
    embeddings += COMMON * embeddings.std() * common
    unit = common / common.norm()
    turn = nn.init.orthogonal_(torch.empty(len(unit), len(unit)))
    first, *others = (layer.self_attn for layer in model.model.layers)
    _leave_out(first.v_proj.weight, unit)
    values = _values(first, model.config)
    first.o_proj.weight.copy_(turn @ values.T)
    said = functional.rms_norm(embeddings, unit.shape) @ (first.o_proj.weight @ values).T
    first.o_proj.weight *= own / said.norm(dim=1).mean()
    _attend_to_previous(first, common, model.config)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight *= QUIET
    for attention in others:
        _meet_successors(attention, turn)
        for name in "qkv":
            _leave_out(attention.get_submodule(f"{name}_proj").weight, unit)


def _meet_successors(attention: Any, previous: Tensor) -> None:
    """W_k = W_q previous^T for the first head of each key/value group; the group's other heads start half alike."""
    query, key = attention.q_proj.weight, attention.k_proj.weight
    head_dim, hidden = attention.head_dim, query.shape[1]
    heads = query.view(len(key) // head_dim, -1, head_dim, hidden)
    key.copy_((heads[:, 0] @ previous.T).flatten(0, 1))
    heads[:, 1:] = (heads[:, :1] + heads[:, 1:]) / 2**0.5


def _attend_to_previous(attention: Any, common: Tensor, config: Any) -> None:
    """Queries and keys from the common part: RoPE's product over pairs of dimensions is largest one position back."""
    half = config.head_dim // 2
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    sizes = frequencies**0.25  # fast pairs tell neighbours apart, slow ones keep the far away
    query = torch.cat((sizes, torch.zeros(half)))
    key = torch.cat((sizes * frequencies.cos(), sizes * frequencies.sin()))
    reads = common / common.square().sum() * math.hypot(1, COMMON) / COMMON  # 1 for a normalised embedding
    for weight, direction in ((attention.q_proj.weight, query), (attention.k_proj.weight, key)):
        direction = POSITIONAL * direction / direction.square().mean().sqrt()
        weight += torch.outer(direction.repeat(len(weight) // len(direction)), reads)


def _leave_out(weight: Tensor, unit: Tensor) -> None:
    """A projection's weight [out, hidden] that no longer sees a direction."""
    weight -= torch.outer(weight @ unit, unit)


def _values(attention: Any, config: Any) -> Tensor:
    """W_v of every head, [heads * head_dim, hidden]."""
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    value = attention.v_proj.weight.view(groups, 1, config.head_dim, -1)
    return value.expand(-1, heads // groups, -1, -1).flatten(0, 2)
