"""A tokenizer trained on the spot, and models: a tiny Llama with random weights, and one that writes what it is told to."""

import math
from pathlib import Path
from random import Random
from types import SimpleNamespace

import tokenizers
import torch
import transformers
from torch import nn

from tsa_compile.config import KeepRatio, TSAConfig
from tsa_compile.evaluation import words

CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = words.sentences(Random(7), 400)
CONFIG = TSAConfig(
    budget=KeepRatio(0.25), window=8, min_tokens=0, min_length=1, layers=(0, 1), floor=None, skip_passes=("Validate",)
)
"""As published, for `llama()` and prompts of a few hundred tokens."""


def tokenizer(chat=True):
    """Byte-level BPE of 400 tokens, so that any text is spelt; with a chat template or without."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([words.FILLER, TEXT, *["=" * 64] * 200], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")
    wrapped.chat_template = CHAT if chat else None
    return wrapped


def llama(layers=2, positions=4096, seed=0):
    """In evaluation mode; its probabilities are far from uniform."""
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, initializer_range=0.3, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval()


def save(folder: Path, layers):
    """Writes a `llama` of some layers, its tokenizer, its chat template and a text, book.txt."""
    llama(layers).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "book.txt").write_text(TEXT)
    return folder


class Told(nn.Module):
    """Writes given token ids behind prompts of a given length, each with probability `sure`, the rest evenly; then token 0.

    Args:
        scripts: what each row of a batch writes.
    """

    def __init__(self, length, scripts, sure=0.9, vocabulary=400):
        super().__init__()
        self.length, self.scripts, self.sure, self.vocabulary = length, scripts, sure, vocabulary
        self.weight = nn.Parameter(torch.zeros(1))
        self.steps = 0

    def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        cache = [0] if past_key_values is None else past_key_values
        self.steps += past_key_values is not None
        batch, new = input_ids.shape
        logits = torch.full((batch, new, self.vocabulary), math.log((1 - self.sure) / (self.vocabulary - 1)))
        for row, script in enumerate(self.scripts):
            for place in range(new):
                at = cache[0] + place + 1 - self.length
                if at >= 0:
                    logits[row, place, script[at] if at < len(script) else 0] = math.log(self.sure)
        cache[0] += new
        return SimpleNamespace(logits=logits[:, -logits_to_keep:], past_key_values=cache)
