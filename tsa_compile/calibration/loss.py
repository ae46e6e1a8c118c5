"""What sparse layers cost in the answers: KL(dense || sparse) behind a prefill of which some layers are sparse.

    before   o = tsa.sparse_attention(q, k, v, scale, window, pool, None, keep ratio, ...)     every layer that can be sparse
    after    o = the same at the ratio that is set for its layer now, or dense attention

So a model is traced once for any lengths, and every choice of layers and ratios runs in that one graph, op by op. Which
layer an op belongs to is known by its ratio: each is traced with one of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from tsa_compile.backend import tsa_backend
from tsa_compile.calibration.base import checked, running
from tsa_compile.calibration.token_ids import rows_of
from tsa_compile.config import TSAConfig
from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.cached import CachedModel, divergence, dynamo_remembers
from tsa_compile.evaluation.prompts import Sample
from tsa_compile.report import reports

Choice = Mapping[int, float]
"""Sparse layers by index, and what each keeps."""
_SPARSE = torch.ops.tsa.sparse_attention.default
_RATIO = next(place for place, argument in enumerate(_SPARSE._schema.arguments) if argument.name == "keep_ratio")


class Dial:
    """A `compiler` for `TSAConfig` whose sparse layers may be set anew before every call.

    Args:
        layers: indices of those that may be sparse.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self.choice: Choice = {}
        chosen = list(layers)
        self._layer_of = {(place + 1) / (len(chosen) + 1): layer for place, layer in enumerate(chosen)}
        self.found: set[int] = set()
        """The layers that can be sparse in what has been traced."""

    def config(self, base: TSAConfig) -> TSAConfig:
        """The configuration with which the model is traced."""
        marks = {layer: mark for mark, layer in self._layer_of.items()}
        return base.replace(layers=marks, compiler=self, skip_passes=("Decompose",), min_length=1)

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        layers = {node: self._layer_of[node.args[_RATIO]] for node in graph_module.graph.nodes if node.target is _SPARSE}
        self.found |= set(layers.values())
        return _Run(graph_module, layers, self).run

    def attend(self, layer: int, operands: Sequence[Any]) -> Tensor:
        """Attention of one layer as it is set now, [B, H, L, Dv] in the memory layout [B, L, H, Dv]."""
        if layer in self.choice:
            return _SPARSE(*operands[:_RATIO], self.choice[layer], *operands[_RATIO + 1 :])
        query, key, value, scale = operands[:4]
        dense = torch.ops.tsa.attend(query, key, value, None, scale, "auto")
        return dense.transpose(1, 2).contiguous().transpose(1, 2)


class _Run(Interpreter):
    """Runs a graph op by op, its sparse layers by a dial."""

    def __init__(self, graph_module: GraphModule, layers: Mapping[Node, int], dial: Dial) -> None:
        super().__init__(graph_module)
        self._layers, self._dial = layers, dial

    def run_node(self, node: Node) -> Any:
        if node not in self._layers:
            return super().run_node(node)
        operands, named = self.fetch_args_kwargs_from_env(node)
        assert not named
        return self._dial.attend(self._layers[node], operands)


@dataclass(frozen=True)
class Costs:
    """What choices cost.

    Attributes:
        kl: of each, the mean over the answers' tokens.
        tokens: of all answers.
        errors: of each, the standard error of its KL over the samples; NaN for a single sample.
    """

    kl: tuple[float, ...]
    tokens: int
    errors: tuple[float, ...] = ()

    @classmethod
    def of(cls, sums: Tensor, tokens: Tensor) -> Costs:
        """From each sample's sum over its answer's tokens, float64 [choices, samples], and how many these are, [samples].

        The mean over all tokens is a ratio of two sums over samples, whose standard error is that of its linear form.
        """
        means = sums.sum(1) / tokens.sum()
        spread = (sums - means[:, None] * tokens).square().sum(1)
        count = len(tokens)
        factor = math.sqrt(count / (count - 1)) if count > 1 else math.nan
        errors = factor * spread.sqrt() / tokens.sum()
        return cls(tuple(means.tolist()), int(tokens.sum()), tuple(errors.tolist()))


class LossMeter:
    """Measures choices of layers and ratios by the answers behind samples.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        base: everything but layers and budgets.
        candidates: the layers that may be sparse.
    """

    def __init__(self, model: nn.Module, base: TSAConfig, candidates: Iterable[int], batch_size: int = 1) -> None:
        self.model, self.dial, self.batch_size = model, Dial(candidates), batch_size
        self.device = next(model.parameters()).device
        options: dict[str, Any] = {"config": self.dial.config(base)}
        self._cached = CachedModel(model, torch.compile(model, backend=tsa_backend, dynamic=True, options=options))

    def costs(
        self, samples: Sequence[Sample], choices: Sequence[Choice], step: Callable[[float], None] = lambda share: None
    ) -> Costs:
        """The cost of every choice over all samples.

        Args:
            step: is told what share of the work is done.
        """
        sums = torch.zeros(len(choices), len(samples), dtype=torch.float64)
        done, work = 0, len(samples) * max(len(choices), 1)
        with torch.no_grad(), dynamo_remembers():
            for place, batch in _batches(samples, self.batch_size):
                with running(len(batch), len(batch[0].prompt), place, self.device):
                    dense = self._answers(batch, {})
                    for number, choice in enumerate(choices):
                        found = divergence(dense, self._answers(batch, choice)).double().sum(1)
                        sums[number, place + 1 - len(batch) : place + 1] = found.cpu()
                        done += len(batch)
                        step(done / work)
        return Costs.of(sums, torch.tensor([len(sample.answer) for sample in samples], dtype=torch.float64))

    def eligible(self, sample: Sample) -> list[int]:
        """The candidates that the compiler can make sparse, ascending; found out by one prefill.

        Raises:
            ConfigError: there is none.
        """
        with torch.no_grad(), dynamo_remembers():
            self._answers([sample], {})
        if not self.dial.found:
            rows = reports()[-1].rows if reports() else ()
            reasons = ", ".join(sorted({str(row.reason) for row in rows})) or "no attention call was found"
            raise ConfigError(f"no layer of {type(self.model).__name__} can be sparse ({reasons}): see what explain says")
        return sorted(self.dial.found)

    def _answers(self, batch: Sequence[Sample], choice: Choice) -> Tensor:
        """Log-probabilities [B, A, V] at the answers' positions, behind prefills by a choice."""
        self.dial.choice = choice
        prompts, answers = (
            torch.tensor([getattr(sample, name) for sample in batch], device=self.device) for name in ("prompt", "answer")
        )
        logits, cache = self._cached.prefill(prompts)
        return self._cached.score(logits, cache, answers)


def _batches(samples: Sequence[Sample], size: int) -> Iterator[tuple[int, list[Sample]]]:
    """Up to `size` neighbours with prompts of one length and answers of one length, with the last one's place."""
    place = -1
    for _, alike in itertools.groupby(samples, key=lambda sample: (len(sample.prompt), len(sample.answer))):
        rest = iter(alike)
        while batch := list(itertools.islice(rest, size)):
            place += len(batch)
            yield place, batch


def read_samples(model: nn.Module, prompts: Iterable[Any], tokenizer: Any, answer: int) -> list[Sample]:
    """Every prompt with its answer: that of a `Sample` or of a mapping with answer_ids, else its last `answer` tokens.

    Raises:
        ConfigError: something is no prompt, too long or too short, or there is none.
    """
    found: list[Sample] = []
    for place, prompt in enumerate(prompts):
        for sample in _samples_of(place, prompt, tokenizer, answer):
            if not sample.prompt or not sample.answer:
                raise ConfigError(
                    f"prompt {place} is too short: its last {answer} tokens are the answer, and tokens must stand before "
                    "them. Pass longer prompts, a smaller answer, or answers of their own (answer_ids)"
                )
            checked(model, place, torch.tensor(sample.prompt + sample.answer))
            found.append(sample)
    if not found:
        raise ConfigError(
            "no prompts were given: losses are measured on some, best on long texts of the kind that will be used"
        )
    return found


def _samples_of(place: int, prompt: Any, tokenizer: Any, answer: int) -> list[Sample]:
    """Every row of a prompt, with its answer."""
    if isinstance(prompt, Sample):
        return [prompt]
    rows = [ids.tolist() for ids in rows_of(place, prompt, tokenizer)]
    if not (isinstance(prompt, Mapping) and "answer_ids" in prompt):
        return [Sample(ids[:-answer], ids[-answer:]) for ids in rows]
    answers = [ids.tolist() for ids in rows_of(place, prompt["answer_ids"], tokenizer)]
    if len(rows) != len(answers):
        raise ConfigError(
            f"prompt {place} has {len(rows)} rows of input_ids and {len(answers)} of answer_ids: pass an answer for each row"
        )
    return [Sample(*pair) for pair in zip(rows, answers, strict=True)]
