"""Models so small that compiling them takes a fraction of a second, with the interface of transformers' causal LMs."""

from types import SimpleNamespace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional


class Layer(nn.Module):
    """Causal attention of 4 heads over 2, sharp enough that scores differ."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, hidden, is_causal=True):
        query, key, value = (
            project(hidden).unflatten(2, (heads, 8)).transpose(1, 2)
            for project, heads in ((self.query, 4), (self.key, 2), (self.value, 2))
        )
        mixed = functional.scaled_dot_product_attention(4 * query, key, value, is_causal=is_causal, enable_gqa=True)
        return hidden + mixed.transpose(1, 2).flatten(2)


class Stack(nn.Module):
    """Token ids [B, L] -> hidden states [B, L, 32]."""

    def __init__(self, layers=3, vocabulary=64):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 32)
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Output(NamedTuple):
    logits: Tensor


class Toy(Stack):
    """A causal language model of two layers."""

    def __init__(self, vocabulary=4096, positions=1024):
        super().__init__(layers=2, vocabulary=vocabulary)
        self.config = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=positions)
        self.lm_head = nn.Linear(32, vocabulary)

    def forward(self, input_ids, use_cache=False, logits_to_keep=0):
        hidden = super().forward(input_ids)
        places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return Output(self.lm_head(hidden[:, places]))
