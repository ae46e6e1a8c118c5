"""What the tests of the exports share."""

import torch

from tsa_compile import TSAConfig

SMALL = TSAConfig(window=4, min_tokens=3, layers=(1,), floor=None)
# Code for a test to run a few times is not worth optimising: g++ takes a third less time for the whole of it.
# Nor is its vectorisation, by which Inductor compiles each loop twice over; what it computes is the same.
QUICK = {"aot_inductor.debug_compile": True, "cpp.simdlen": 1}


class Call(torch.nn.Module):
    """One attention call, causal, and padded if there is a mask [B, L]; the queries are those of the last positions."""

    def forward(self, query, key, value, attention_mask=None):
        positions = torch.arange(key.shape[2])
        mask = (positions <= positions[key.shape[2] - query.shape[2] :, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None].bool()
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
