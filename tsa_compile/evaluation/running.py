"""One prefill by a setting, and the answer through its cache.

logits, cache = prefill(prompt)                     [B, V], under the setting
likelihood    = of the expected answer behind it                   cached.py
output        = model(token, cache), token after token             where the expected answer is not the likeliest anyway
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.cached import CachedModel, divergence, dynamo_remembers
from tsa_compile.evaluation.probe import Probe
from tsa_compile.evaluation.prompts import Sample
from tsa_compile.evaluation.settings import Setting
from tsa_compile.evaluation.traced import Traced
from tsa_compile.reasons import Decision
from tsa_compile.report import reports

MORE = 16  # tokens of an output beyond the expected answer: a model may say it in other words


@dataclass(frozen=True)
class Outcome:
    """What one setting made of one sample.

    Attributes:
        right: whether the output contains everything expected; None where the likelihood alone counts.
        nll: mean negative log-likelihood of the expected answer's tokens.
        kl: mean over these tokens of KL(dense || this setting), in nats.
        kept: share of the tokens that sparse layers kept, on average; 1 where none is sparse.
        output: what the model wrote where that is not right; else empty.
    """

    right: bool | None
    nll: float
    kl: float
    kept: float
    output: str = ""


class Runner:
    """One setting for prompts of one shape, compiled once.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        traced: that model, if settings share its trace.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, setting: Setting, traced: Traced | None = None) -> None:
        self.model, self.tokenizer, self.setting = model, tokenizer, setting
        self.device = next(model.parameters()).device
        self.probe = Probe(shuffle=setting.random)
        prefill: Any = None
        if setting.config is not None:
            prefill = (traced or Traced(model)).by(setting.config.replace(compiler=self.probe, strict=True))
        self._cached = CachedModel(model, prefill)
        self._checked = False

    def run(self, samples: Sequence[Sample], dense: Tensor | None = None) -> tuple[list[Outcome], Tensor]:
        """Outcomes of samples whose prompts have one length, and the logarithms of the answer's probabilities.

        Args:
            dense: these of dense attention, for `kl`, which is 0 without.

        Returns:
            The outcomes, and float32 [B, A, V] for answers of at most A tokens.

        Raises:
            ConfigError: no layer became sparse or runs by `dense_kernel` under a setting with a configuration, or there is
                too little memory.
        """
        with torch.inference_mode(), dynamo_remembers():
            try:
                prompts = torch.tensor([sample.prompt for sample in samples], device=self.device)
                logits, cache = self._cached.prefill(prompts)
                kept = self._kept(len(samples), len(samples[0].prompt))
                answers, known = _padded([sample.answer for sample in samples], self.device)
                scored = self._cached.score(logits, cache, answers)
                nll = _means(-scored.gather(2, answers[:, :, None])[:, :, 0], known)
                kl = torch.zeros(len(samples)) if dense is None else _means(divergence(dense, scored), known)
                greedy = ((scored.argmax(-1) == answers) | ~known).all(1).tolist()
                outputs = self._outputs(samples, greedy, logits, cache)
            except torch.OutOfMemoryError as error:
                length = len(samples[0].prompt)
                raise ConfigError(
                    f"{len(samples)} x {length} tokens do not fit {self.device}: lower batch_tokens"
                ) from error
        rights = [_right(sample, output) for sample, output in zip(samples, outputs, strict=True)]
        wrong = [output if right is False else "" for right, output in zip(rights, outputs, strict=True)]
        return list(map(Outcome, rights, nll.tolist(), kl.tolist(), kept.tolist(), wrong)), scored

    def _kept(self, batch: int, length: int) -> Tensor:
        """[B] the kept share, and once whether there is any sparse layer."""
        selections = self.probe.take()
        if self.setting.config is not None and not self._checked:
            made = reports()[-self.probe.graphs :] if self.probe.graphs else []
            rows = [row for report in made for row in report.rows]
            if not any(row.decision in (Decision.SPARSE, Decision.KERNEL) for row in rows):
                reasons = " ".join(reason.said() for reason in sorted({row.reason for row in rows}))
                raise ConfigError(
                    f"{self.setting.name} at {length:,} tokens: no layer became sparse. "
                    f"{reasons or 'No attention call was found.'} `tsa-compile explain` shows each call"
                )
            self._checked = True
        if not selections:
            return torch.ones(batch)
        return torch.stack([selection.kept() for selection in selections]).float().mean(0).cpu() / length

    def _outputs(self, samples: Sequence[Sample], greedy: list[bool], logits: Tensor, cache: Any) -> list[str]:
        """What the model writes, greedily: known already where every token of the expected answer is the likeliest."""
        if not any(sample.expected for sample in samples):
            return [""] * len(samples)
        texts = [self._text(sample.answer) for sample in samples]
        if all(greedy):
            return texts
        steps = MORE + max(len(sample.answer) for sample in samples)
        tokens = [logits.argmax(-1)]
        ends = torch.tensor(_ends(self.model, self.tokenizer), device=self.device)
        over = torch.isin(tokens[0], ends) | torch.tensor(greedy, device=self.device)
        while len(tokens) < steps and not bool(over.all()):
            tokens.append(self._cached.follow(tokens[-1][:, None], cache)[:, -1].argmax(-1))
            over |= torch.isin(tokens[-1], ends)
        written = [_until(row, set(ends.tolist())) for row in torch.stack(tokens, 1).tolist()]
        return [text if known else self._text(row) for text, known, row in zip(texts, greedy, written, strict=True)]

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _padded(answers: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, A], and which of them are real."""
    longest = max(map(len, answers))
    rows = [answer + answer[-1:] * (longest - len(answer)) for answer in answers]
    lengths = torch.tensor([len(answer) for answer in answers])
    known = torch.arange(longest) < lengths[:, None]
    return torch.tensor(rows, device=device), known.to(device)


def _means(values: Tensor, known: Tensor) -> Tensor:
    """[B] the means of [B, A] over what is real."""
    return (values.masked_fill(~known, 0.0).sum(1) / known.sum(1)).cpu()


def _right(sample: Sample, output: str) -> bool | None:
    if not sample.expected:
        return None
    said = output.lower()
    return all(text.lower() in said for text in sample.expected)


def _ends(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens behind which nothing more is written."""
    found: list[int] = []
    for owner in (getattr(model, "generation_config", None), tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return found


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first that ends the output."""
    return next((ids[:place] for place, token in enumerate(ids) if token in ends), ids)
