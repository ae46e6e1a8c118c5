"""A prefill, compiled or not, and what follows through the cache that it left.

    logits, cache = prefill(prompt)                     [B, V]
    likelihood    = model(answer, a copy of the cache)                 what the answer's tokens are given, all at once

What follows is the model as it is: dense attention over the whole cache. Prefills differ in what they leave in it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tsa_compile.errors import ConfigError, check_type

_CACHES = ("cache", "past_key_values")  # what versions of transformers call it


class CachedModel:
    """A causal language model of transformers with a prefill of its own.

    Args:
        model: in evaluation mode.
        prefill: what is called with a prompt; None: the model itself.
    """

    def __init__(self, model: nn.Module, prefill: Callable[..., Any] | None = None) -> None:
        self.model, self._call = model, model if prefill is None else prefill
        known = inspect.signature(model.forward).parameters
        self._takes = next((name for name in _CACHES if name in known), _CACHES[-1])

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """Logits [B, V] of the token behind each prompt of token ids [B, L], and the cache."""
        found = self._call(input_ids=tokens, use_cache=True, logits_to_keep=1)
        cache = next((value for name in _CACHES if (value := getattr(found, name, None)) is not None), None)
        if cache is None or found.logits.shape[1] != 1:
            raise ConfigError(
                f"{type(self.model).__name__} gave logits at {found.logits.shape[1]} positions and "
                f"{'no' if cache is None else 'a'} cache: pass a causal language model of transformers 5 with a cache"
            )
        return found.logits[:, -1], cache

    def follow(self, tokens: Tensor, cache: Any) -> Tensor:
        """Logits [B, A, V] behind each of the token ids [B, A], which are added to the cache."""
        return self.model(input_ids=tokens, use_cache=True, **{self._takes: cache}).logits

    def score(self, logits: Tensor, cache: Any, answers: Tensor) -> Tensor:
        """Log-probabilities at each position of answers [B, A], float32 [B, A, V]; the cache stays as it is."""
        following = self.follow(answers[:, :-1], copy.deepcopy(cache)) if answers.shape[1] > 1 else logits[:, :0, None]
        return torch.cat((logits[:, None], following.view(len(logits), -1, logits.shape[1])), 1).float().log_softmax(-1)


def check_model(model: nn.Module) -> None:
    """Raises ConfigError for no model, or one whose forward cannot be asked for the last logits alone."""
    check_type("model", model, nn.Module, "a causal language model of transformers")
    known = inspect.signature(model.forward).parameters.values()
    if not any(p.name == "logits_to_keep" or p.kind is inspect.Parameter.VAR_KEYWORD for p in known):
        name = type(model).__name__
        raise ConfigError(f"{name}.forward takes no logits_to_keep: pass a causal language model of transformers 5")


def divergence(dense: Tensor, scored: Tensor) -> Tensor:
    """KL(dense || scored) in nats, [B, A], of log-probabilities [B, A, V]; a probability of 0 in `dense` adds nothing.

    NaN in either makes it NaN: a setting without an answer is not close to dense attention.
    """
    weight = dense.exp()
    return torch.where(weight == 0, 0.0, weight * (dense - scored)).sum(-1).clamp(min=0.0)


def dynamo_remembers() -> Any:
    """Settings share their code, so Dynamo counts each as a recompilation of it: this raises its limits."""
    return torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=8192)
