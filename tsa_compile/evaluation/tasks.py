"""Retrieval tasks with one right answer, in a synthetic vocabulary: RULER's families and MQAR.

    [BOS] noise  SET key value  noise  SET key value  noise ...  QUERY key value  QUERY key value        question="last"
    [BOS] noise  SET key value  noise ...  QUERY key value  QUERY key value  160 noise tokens            question="early"

| task | planted in n tokens of context | asked |
|---|---|---|
| mqar | n / 8 pairs, at most 256 | the values of 16 keys |
| niah_single | one pair | its value |
| niah_multikey | n / 16 pairs, at most 256 | the value of one key |
| niah_multivalue | 4 values of one key, 4 pairs of other keys | the 4 values, in order of appearance |
| niah_multiquery | 8 pairs | the values of 4 keys |
| variable_tracking | 4 chains a = value, b = a, c = b, d = c | what d reads, what that reads, and so on: c, b, a, value |

Sources: RULER (arXiv 2404.06654, section 3 and appendix B) for the families, Zoology (arXiv 2312.04927, section 3) for
MQAR. RULER asks which variables hold a value; here a chain is followed back, which names them all, too. Asked for values
alone, without what lies between, models stayed at chance in training.

Special tokens, keys, values and noise have disjoint ranges, so noise never names a key. Within a sample all keys differ and
all values differ. Answers are scored teacher-forced: each answer token follows its question in the input, and the label sits
at the token that must predict it. A sample is right if the most probable token is right at every label.

With question="last", questions and answers take at most the last 48 tokens. With question="early" 160 tokens of noise
follow them, so that a scoring window of 128 tokens sees no question. The context before them is that of a sample 160
tokens shorter, and so is what a causal model without sparse layers answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tsa_compile.errors import ConfigError

VOCABULARY = 4096
TASKS = ("mqar", "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "variable_tracking")
QUESTIONS = ("last", "early")
IGNORED = -100

BOS, SET, QUERY = 0, 1, 2
KEYS, VALUES, NOISE = range(16, 1040), range(1040, 2064), range(2064, VOCABULARY)

MIN_CONTEXT = 128  # tokens that every task fits into
TAIL = 160  # noise behind an early question
_CHAINS = 4  # variable tracking: so many chains of so many variables


@dataclass(frozen=True)
class Samples:
    """A batch of one task; all tensors are [B, L].

    Attributes:
        tokens: int64.
        labels: int64: what `logits[b, t]` should predict; -100 where nothing is asked.
        evidence: bool: the planted keys and values that the answers depend on.
    """

    tokens: Tensor
    labels: Tensor
    evidence: Tensor


@dataclass(frozen=True)
class _Planted:
    """Pairs in order of appearance, and the question about them."""

    keys: Tensor  # [B, N]
    values: Tensor  # [B, N]
    needed: Tensor  # bool [B, N]
    question: Tensor  # [B, Q]
    labels: Tensor  # [B, Q]


class _Draw:
    """Seeded random choices for a batch, on its device."""

    def __init__(self, batch: int, seed: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def distinct(self, count: int, population: int) -> Tensor:
        """[B, count] different numbers below `population`, in random order."""
        weights = torch.rand(self.batch, population, generator=self.generator, device=self.device)
        return weights.topk(count).indices

    def tokens(self, count: int, kind: range) -> Tensor:
        """[B, count] different tokens of a range, in random order."""
        return self.distinct(count, len(kind)) + kind.start

    def noise(self, length: int) -> Tensor:
        size = (self.batch, length)
        return torch.randint(NOISE.start, NOISE.stop, size, generator=self.generator, device=self.device)


def generate(task: str, *, batch: int, length: int, seed: int, device: Any = "cpu", question: str = "last") -> Samples:
    """Samples of exactly `length` tokens, made on `device` without a loop over samples or tokens.

    The same task, length, seed, batch and question give the same samples on the same type of device.

    Raises:
        ConfigError: an unknown task or question, no sample, or a length that the task does not fit into.
    """
    check(task, batch, length, question)
    tail = TAIL if question == "early" else 0
    draw = _Draw(batch, _seed(task, batch, length, seed, question), torch.device(device))
    return _assemble(draw, _PLANT[task](draw, length - tail), length, tail)


def check(task: str, batch: int, length: int, question: str) -> None:
    """Raises what `generate` would raise."""
    if task not in TASKS:
        raise ConfigError(f"task={task!r} is not allowed: the tasks are {', '.join(TASKS)}")
    if question not in QUESTIONS:
        raise ConfigError(f"question={question!r} is not allowed: it must be one of {', '.join(QUESTIONS)}")
    if batch < 1:
        raise ConfigError(f"batch={batch!r} is not allowed: at least 1 sample must be asked for")
    minimum = MIN_CONTEXT + (TAIL if question == "early" else 0)
    if length < minimum:
        raise ConfigError(f"length={length!r} is not allowed: with question={question!r} it must be at least {minimum}")


def _seed(*parts: object) -> int:
    """Neighbouring seeds and lengths must not share a random stream, so the parts are hashed."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def _assemble(draw: _Draw, planted: _Planted, length: int, tail: int) -> Samples:
    pairs, asked = planted.keys.shape[1], planted.question.shape[1]
    end = length - tail
    tokens = draw.noise(length)
    tokens[:, 0] = BOS
    places = draw.distinct(pairs, end - asked - 1 - 2 * pairs).sort().values
    steps = torch.arange(3, device=draw.device)
    starts = 1 + places + 2 * torch.arange(pairs, device=draw.device)
    positions = (starts[:, :, None] + steps).flatten(1)
    needles = torch.stack((torch.full_like(planted.keys, SET), planted.keys, planted.values), 2)
    tokens.scatter_(1, positions, needles.flatten(1))
    evidence = torch.zeros_like(tokens, dtype=torch.bool)
    evidence.scatter_(1, positions, (planted.needed[:, :, None] & (steps > 0)).flatten(1))
    labels = torch.full_like(tokens, IGNORED)
    tokens[:, end - asked : end] = planted.question
    labels[:, end - asked : end] = planted.labels
    return Samples(tokens, labels, evidence)


def _ask(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """QUERY key value, for [B, A] keys; the label sits at the key."""
    question = torch.stack((torch.full_like(keys, QUERY), keys, values), 2)
    labels = torch.full_like(question, IGNORED)
    labels[:, :, 1] = values
    return question.flatten(1), labels.flatten(1)


def _ask_on(key: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """QUERY key answer answer ..., each predicting the next."""
    question = torch.cat((torch.full_like(key, QUERY), key, answers), 1)
    labels = torch.full_like(question, IGNORED)
    labels[:, 1:-1] = answers
    return question, labels


def _recall(draw: _Draw, pairs: int, asked: int) -> _Planted:
    """Pairs of different keys; the values of some are asked in random order."""
    keys, values = draw.tokens(pairs, KEYS), draw.tokens(pairs, VALUES)
    chosen = draw.distinct(asked, pairs)
    needed = torch.zeros_like(keys, dtype=torch.bool).scatter_(1, chosen, True)
    return _Planted(keys, values, needed, *_ask(keys.gather(1, chosen), values.gather(1, chosen)))


def _several_values(draw: _Draw, values_asked: int = 4, others: int = 4) -> _Planted:
    """One key with several values among pairs of other keys."""
    pairs = values_asked + others
    keys, values = draw.tokens(pairs, KEYS), draw.tokens(pairs, VALUES)
    chosen = draw.distinct(values_asked, pairs).sort().values
    key = keys.gather(1, chosen[:, :1])
    needed = torch.zeros_like(keys, dtype=torch.bool).scatter_(1, chosen, True)
    keys = torch.where(needed, key, keys)
    return _Planted(keys, values, needed, *_ask_on(key, values.gather(1, chosen)))


def _chains(draw: _Draw, chains: int = _CHAINS) -> _Planted:
    """Chains of `chains` variables; the last of one is asked: QUERY d c b a value."""
    names = draw.tokens(chains * chains, KEYS).view(-1, chains, chains)
    values = draw.tokens(chains, VALUES)
    sources = torch.cat((values[:, :, None], names[:, :, :-1]), 2)
    asked = torch.zeros_like(names, dtype=torch.bool)
    asked[:, 0] = True  # names and places are random: the first is any of them
    # Assignments of the chains interleave at random; within a chain each follows the one that it reads.
    order = draw.distinct(chains * chains, chains * chains).view(-1, chains, chains).sort().values.flatten(1)
    keys, read, needed = (item.flatten(1).gather(1, order.argsort()) for item in (names, sources, asked))
    trace = torch.cat((names[:, 0].flip(1), values[:, :1]), 1)
    return _Planted(keys, read, needed, *_ask_on(trace[:, :1], trace[:, 1:]))


_PLANT: dict[str, Callable[[_Draw, int], _Planted]] = {
    "mqar": lambda draw, context: _recall(draw, min(context // 8, 256), 16),
    "niah_single": lambda draw, context: _recall(draw, 1, 1),
    "niah_multikey": lambda draw, context: _recall(draw, min(context // 16, 256), 1),
    "niah_multivalue": lambda draw, context: _several_values(draw),
    "niah_multiquery": lambda draw, context: _recall(draw, 8, 4),
    "variable_tracking": lambda draw, context: _chains(draw),
}
