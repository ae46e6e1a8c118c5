"""Tasks through a tokenizer: prompts of exactly so many tokens, and the expected answers behind them.

    [chat template's beginning] before  context  after [its end] lead        exactly `length` tokens
                                        ^^^^^^^                              answer: tokens that follow

The prompt is tokenized as a whole, with a context that is a little too long; the tokens that are too many are then taken
from the context's beginning, where nothing is hidden. So all prompts have one length, which is compiled once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random
from typing import Any

from tsa_compile.errors import ConfigError
from tsa_compile.evaluation import tasks, words
from tsa_compile.evaluation.tasks import CONTINUED, Draft
from tsa_compile.evaluation.words import Haystack

_ATTEMPTS = 40
_MARK = "x"  # in place of a context: a prompt of it shows where contexts begin
_LONGEST_TOKEN = 8  # characters; only so many for each token that is cut off the context's beginning are kept free


@dataclass(frozen=True)
class Sample:
    """One question and its answer.

    Attributes:
        prompt: token ids, exactly as many as asked for.
        answer: token ids that the expected answer consists of.
        expected: texts that an answer must contain; empty where the likelihood alone counts.
    """

    prompt: list[int]
    answer: list[int]
    expected: tuple[str, ...] = ()


class Writer:
    """Writes samples with a tokenizer.

    Args:
        tokenizer: of transformers; its chat template is applied, if it has one.
        text: what things are hidden in, and what "continuation" continues; None: a few sentences, repeated.
    """

    def __init__(self, tokenizer: Any, text: str | None = None) -> None:
        if text is not None and not text.strip():
            raise ConfigError("the text is blank: pass one with words")
        self.tokenizer, self.text = tokenizer, text
        self.haystack = Haystack(text or words.FILLER)
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        piece = self.haystack.text[:20_000]
        self._per_token = len(piece) / max(1, len(self._ids(piece)))

    def identity(self) -> dict[str, Any]:
        """What samples depend on besides task, length and seed."""
        known = " ".join((words.FILLER, repr(getattr(self.tokenizer, "chat_template", None))))
        made = repr((self._ids(self._rendered(known)), len(self.tokenizer)))
        return {"tokenizer": _digest(made), "text": None if self.text is None else _digest(self.text)}

    def sample(self, task: str, length: int, seed: int, index: int) -> Sample:
        """Sample `index` of a task.

        Raises:
            ConfigError: the task or the text does not fit the length.
        """
        if task == "continuation":
            return self._continuation(length, Random(f"{seed}/{task}/{length}/{index}"))
        return self._fitted(tasks.draft(task, seed, length, index, self.haystack), task, length)

    def _fitted(self, draft: Draft, task: str, length: int) -> Sample:
        spare = min(64, max(8, length // 64))
        free = spare * _LONGEST_TOKEN
        bare = self._prompt(draft, _MARK)
        size = int((length - len(bare)) * self._per_token)
        short, long = -1, -1  # the nearest sizes that were too small and too large, once there are some
        for _ in range(_ATTEMPTS):
            ids = self._prompt(draft, draft.context(max(0, size), free))
            over = len(ids) - length
            if 0 <= over <= spare:
                return Sample(_shortened(ids, bare, over), self._answer(draft), draft.expected)
            if over > 0 and size <= 0:
                raise ConfigError(
                    f"{task} needs {len(ids):,} tokens of this tokenizer at least, found a length of {length:,}"
                )
            short, long = (short, size) if over > 0 else (size, long)
            size += round((spare // 2 - over) * max(size, 1) / max(len(ids) - len(bare), 1))
            if short >= 0 <= long and not short < size < long:  # text of very different density, as of tables and prose
                size = (short + long) // 2
        raise ConfigError(f"no text of {task} comes to {length:,} tokens of this tokenizer: choose another length or text")

    def _prompt(self, draft: Draft, context: str) -> list[int]:
        return self._ids(self._rendered(draft.before + context + draft.after, draft.lead), not self.chat)

    def _rendered(self, content: str, lead: str = "") -> str:
        """What the user says, behind which the answer begins."""
        if not self.chat:
            return f"{content}\n\n{lead}" if lead else content
        turns = [{"role": "user", "content": content}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except ImportError:
            raise
        except Exception as error:  # of Jinja, or what the template itself raises
            raise ConfigError(
                f"the tokenizer's chat template cannot be applied ({error}): remove it from the folder's files to do without"
            ) from error
        return str(text) + lead

    def _answer(self, draft: Draft) -> list[int]:
        """The answer's tokens as they follow its lead: alone, some tokenizers would begin it otherwise."""
        lead, whole = self._ids(draft.lead), self._ids(draft.lead + draft.answer)
        return whole[len(lead) :] if whole[: len(lead)] == lead else self._ids(draft.answer)

    def _continuation(self, length: int, draw: Random) -> Sample:
        if self.text is None:
            raise ConfigError("continuation goes on with a text of yours: pass one (--text FILE), or leave the task out")
        wanted = length + CONTINUED
        size, start = int(wanted * self._per_token * 1.25), 0
        while True:
            start = int(draw.random() * max(1, len(self.text) - size))
            ids = self._ids(self.text[start : start + size], True)
            if len(ids) >= wanted:
                return Sample(ids[:length], ids[length:wanted])
            if size >= len(self.text):
                raise ConfigError(
                    f"the text has {len(ids):,} tokens, continuation at {length:,} needs {wanted:,}: pass a longer text, or "
                    "shorter lengths"
                )
            size = int(size * 1.5)

    def _ids(self, text: str, special: bool = False) -> list[int]:
        try:
            ids = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        except Exception as error:  # of tokenizers, for a word that it cannot spell
            raise ConfigError(f"the tokenizer cannot encode the text ({error}): pass another text") from error
        while special and ids and ids[-1] == getattr(self.tokenizer, "eos_token_id", None):
            ids.pop()  # which would end the prompt
        return ids


def _shortened(ids: list[int], bare: list[int], over: int) -> list[int]:
    """The prompt without the first `over` tokens of its context, which begins where it differs from that of `_MARK`."""
    start = next(place for place, (one, other) in enumerate(zip(ids, bare)) if one != other)
    return ids[:start] + ids[start + over :]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
