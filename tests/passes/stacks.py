"""Numbered stacks of attention layers, and the rows of what is planned for them."""

import torch
from torch import nn

from tsa_compile.config import KeepRatio, TSAConfig
from tsa_compile.pipeline import run_passes
from tsa_compile.reasons import Decision
from tsa_compile.testing import capture

SPARSE = TSAConfig(budget=KeepRatio(0.5), window=4, min_tokens=4, floor=None)


class Layer(nn.Module):
    """Attention over [B, L, H * D] with query = key = value and a causal mask."""

    def __init__(self, heads=2, residual=True, **options):
        super().__init__()
        self.heads, self.residual, self.options = heads, residual, {"is_causal": True, **options}

    def forward(self, hidden):
        x = hidden.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(x, x, x, **self.options).transpose(1, 2).flatten(2)
        return hidden + out if self.residual else out


class Stack(nn.Module):
    """A numbered stack of layers, as every decoder has."""

    def __init__(self, count, **options):
        super().__init__()
        self.layers = nn.ModuleList([Layer(**options) for _ in range(count)])

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def rows(module, config, length=32, width=32, dtype=torch.float32, grad=False, **options):
    hidden = torch.randn(1, length, width, dtype=dtype)
    if grad:
        hidden.requires_grad_(True)
    return run_passes(capture(module, hidden, grad=grad, **options), config).rows


def sparse_layers(module, config):
    return [row.layer_index for row in rows(module, config) if row.decision is Decision.SPARSE]


def masked(query, key, mask):
    return nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask)
