"""What the tests of the exports share."""

import torch

from tsa_compile import TSAConfig

SMALL = TSAConfig(window=4, min_tokens=3, layers=(1,), floor=None)
# Code for a test to run a few times is not worth optimising: g++ takes a third less time for the whole of it.
# Nor is its vectorisation, by which Inductor compiles each loop twice over; what it computes is the same.
QUICK = {"aot_inductor.debug_compile": True, "cpp.simdlen": 1}


class CallWithSinks(torch.nn.Module):
    """The same written out, with a sink in the softmax of each of four heads."""

    def __init__(self):
        super().__init__()
        self.sinks = torch.nn.Parameter(torch.linspace(-2, 3, 4))

    def forward(self, query, key, value, attention_mask):
        positions = torch.arange(key.shape[2])
        mask = (positions <= positions[:, None])[None, None] & attention_mask[:, None, None].bool()
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = (query @ key.mT * 0.3).masked_fill(~mask, torch.finfo(query.dtype).min)
        column = self.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], -1)
        return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1] @ value


class Call(torch.nn.Module):
    """One attention call, causal, and padded if there is a mask [B, L]; the queries are those of the last positions."""

    def forward(self, query, key, value, attention_mask=None):
        positions = torch.arange(key.shape[2])
        mask = (positions <= positions[key.shape[2] - query.shape[2] :, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None].bool()
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
