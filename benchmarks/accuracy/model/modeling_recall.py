"""Qwen3's decoder behind a learned shift by one token, as code that travels with a checkpoint.

    h[t] = E[x[t]] + W E[x[t-1]]        [batch, seq_len, hidden]; the predecessor of a first token, or a padding one, is 0

Then the layers of `Qwen3ForCausalLM` follow as they are: QK norm, grouped key/value heads, RoPE. Thanks to the shift a value
carries its key's name before any attention, which the first of the two heads of an induction circuit must otherwise learn
(Olsson et al., arXiv 2209.11895; H3's shift, arXiv 2212.14052, does the same for state space models). A model without it is
a plain `Qwen3ForCausalLM`.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` imports this file from the folder, so it needs nothing
but torch and transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM, initialization
from transformers.cache_utils import Cache, DynamicLayer


class RecallConfig(Qwen3Config):
    """Qwen3's configuration under a model type of its own: loaded without this code it is refused, not misread."""

    model_type = "recall"


class RecallForCausalLM(Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` whose embeddings are `h` above. Padding, on either side, is known from a 2-D `attention_mask`.

    A cache holds the embeddings of its tokens in one layer behind the model's own, so that cropping, reordering and
    repeating it do the same to them.
    """

    config: RecallConfig
    config_class = RecallConfig

    def __init__(self, config: RecallConfig) -> None:
        super().__init__(config)
        self.shift = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "shift", None):  # both terms of the sum as large: the other layers' 0.02 would hide it
            initialization.normal_(module.weight, std=self.config.hidden_size**-0.5)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Qwen3ForCausalLM.forward`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; a mask that is not [batch, tokens]; a cache
                that does not grow, such as `StaticCache`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass input_ids or inputs_embeds, one of them")
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = self._new_cache()
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=self.embed(inputs_embeds, attention_mask, past_key_values),
            use_cache=use_cache,
            **kwargs,
        )

    def embed(self, embeddings: Tensor, attention_mask: Tensor | None = None, past: Cache | None = None) -> Tensor:
        """`h` for the embeddings [batch, seq_len, hidden] of new tokens."""
        new = embeddings.shape[1]
        known = embeddings if past is None else self._remember(embeddings, past)
        before = functional.pad(known, (0, 0, 1, 0))[:, -new - 1 : -1]
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
                found = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
                raise ValueError(f"attention_mask must be [batch, tokens], or padding is not known; found {found}")
            valid = functional.pad(attention_mask, (1, 0))[:, -new - 1 : -1]
            before = before * valid[:, :, None].to(before.dtype)
        return embeddings + self.shift(before)

    def _new_cache(self) -> Cache:
        from transformers import DynamicCache

        return DynamicCache(config=self.config)

    def _remember(self, embeddings: Tensor, past: Cache) -> Tensor:
        """The embeddings of all tokens so far, [batch, past + seq_len, hidden], which the cache then holds."""
        place = self.config.num_hidden_layers
        if len(past.layers) == place:
            past.layers.append(DynamicLayer())
        if any(not isinstance(layer, DynamicLayer) for layer in past.layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in past.layers}))
            raise ValueError(f"the token shift needs a cache that grows: pass a DynamicCache; found layers of {kinds}")
        heads = embeddings[:, None]  # as one head of keys, with values of no size
        return past.update(heads, heads[..., :0], place)[0][:, 0]
