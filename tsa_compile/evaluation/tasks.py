"""The tasks: what is hidden in a text, what is asked about it, and what the answer is.

| task | in the context | asked |
|---|---|---|
| needle | one number, under a name | the number |
| needle_keys | six numbers, each under its name | the number of one name |
| needle_values | four numbers of one name | all four |
| needle_queries | four numbers, each under its name | all four |
| question_first | one number, under a name | the number; the question stands only before the text |
| variables | a variable with a number, four that are set to one another in a chain | the five variables |
| common_words | a list; five of its entries are there ten times as often as the others | these five |
| frequent_words | coined words, the one of rank k in proportion to k^-2 | the three most frequent |
| copy | a passage of sentences that cannot be guessed | the passage; scored by its likelihood alone |
| continuation | the text that was given | how it goes on; scored by its likelihood alone |

All but the last two are families of RULER (arXiv 2404.06654, section 3) in words of this project. As there, the answer's
first words are given: a model need not be told in which form to answer, and the likelihood of the expected one means
something.

Every sample is drawn from a seed of its own: sample i of a task, length and seed is the same whatever else is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tsa_compile.errors import ConfigError
from tsa_compile.evaluation import words
from tsa_compile.evaluation.words import Haystack

KEYS, VALUES, QUERIES, HOPS = 6, 4, 4, 4
COMMON, OFTEN, SELDOM = 5, 30, 3
FREQUENT = 3
SENTENCES = 6  # of a passage to copy
CONTINUED = 64  # tokens of which the likelihood is taken


@dataclass(frozen=True)
class Draft:
    """A sample before it is tokens.

    Attributes:
        before, after: what stands in front of the context and behind it.
        context: the context, as a function of about how many characters it should have and how many of its first ones must
            hold nothing that is needed.
        lead: the answer's first words, which are given.
        answer: how the expected answer goes on, for its likelihood.
        expected: what an answer must contain to be right; empty where the likelihood alone is asked for.
    """

    before: str
    context: Callable[[int, int], str]
    after: str
    lead: str
    answer: str
    expected: tuple[str, ...] = ()


Task = Callable[[Random, Haystack], Draft]


def draft(task: str, seed: int, length: int, index: int, haystack: Haystack) -> Draft:
    """Sample `index` of a task other than "continuation"."""
    return _TASKS[task](Random(f"{seed}/{task}/{length}/{index}"), haystack)


def check(task: str) -> None:
    """Raises ConfigError where a task is not known."""
    if task not in TASKS:
        raise ConfigError(f"task={task!r} is not allowed: the tasks are {', '.join(TASKS)}")


def is_scored(task: str) -> bool:
    """Whether answers are right or wrong, rather than likely alone."""
    return task not in ("copy", "continuation")


def _hidden(draw: Random, haystack: Haystack, sentences: list[str]) -> Callable[[int, int], str]:
    """A context in which sentences lie at random depths, in their order."""
    place = draw.random()
    depths = sorted(draw.random() for _ in sentences)
    return lambda size, free: haystack.hide(place, size, free, list(zip(depths, sentences, strict=True)))


def _listed(items: list[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"


def _fact(key: str, value: str) -> str:
    return f"The special number for {key} is {value}."


_FACTS = "Some special numbers are hidden in the following text. Remember them, you will be asked about them.\n\n"
_FACT = "A special number is hidden in the following text. Remember it, you will be asked about it.\n\n"


def _needle(draw: Random, haystack: Haystack) -> Draft:
    key, (value,) = words.name(draw), words.numbers(draw, 1)
    return Draft(
        _FACT, _hidden(draw, haystack, [_fact(key, value)]), f"\n\nWhat is the special number for {key} in the text above?",
        f"The special number for {key} in the text is", f" {value}", (value,),
    )  # fmt: skip


def _needle_keys(draw: Random, haystack: Haystack) -> Draft:
    keys, values = words.names(draw, KEYS), words.numbers(draw, KEYS)
    asked = draw.randrange(KEYS)
    facts = [_fact(key, value) for key, value in zip(keys, values, strict=True)]
    return Draft(
        _FACTS, _hidden(draw, haystack, facts), f"\n\nWhat is the special number for {keys[asked]} in the text above?",
        f"The special number for {keys[asked]} in the text is", f" {values[asked]}", (values[asked],),
    )  # fmt: skip


def _needle_values(draw: Random, haystack: Haystack) -> Draft:
    key, values = words.name(draw), words.numbers(draw, VALUES)
    facts = [f"One of the special numbers for {key} is {value}." for value in values]
    return Draft(
        _FACTS, _hidden(draw, haystack, facts),
        f"\n\nWhat are all the {VALUES} special numbers for {key} in the text above?",
        f"The special numbers for {key} in the text are", f" {_listed(values)}", tuple(values),
    )  # fmt: skip


def _needle_queries(draw: Random, haystack: Haystack) -> Draft:
    keys, values = words.names(draw, QUERIES), words.numbers(draw, QUERIES)
    facts = [_fact(key, value) for key, value in zip(keys, values, strict=True)]
    order = draw.sample(range(QUERIES), QUERIES)
    asked, answers = _listed([keys[place] for place in order]), [values[place] for place in order]
    return Draft(
        _FACTS, _hidden(draw, haystack, facts), f"\n\nWhat are the special numbers for {asked} in the text above?",
        f"The special numbers for {asked} in the text are", f" {_listed(answers)}", tuple(answers),
    )  # fmt: skip


def _question_first(draw: Random, haystack: Haystack) -> Draft:
    key, (value,) = words.name(draw), words.numbers(draw, 1)
    return Draft(
        f"What is the special number for {key} in the following text?\n\n", _hidden(draw, haystack, [_fact(key, value)]),
        "\n\nThe text ends here.", "The special number that was asked for is", f" {value}", (value,),
    )  # fmt: skip


def _variables(draw: Random, haystack: Haystack) -> Draft:
    chain, (value,) = words.letters(draw, HOPS + 1), words.numbers(draw, 1)
    sources = [value, *(f"the value of {variable}" for variable in chain[:-1])]
    lines = [f"Variable {variable} is set to {source}." for variable, source in zip(chain, sources, strict=True)]
    return Draft(
        "Variables are set in the following text, to numbers or to one another. Follow them.\n\n",
        _hidden(draw, haystack, lines), f"\n\nWhich {len(chain)} variables have the value {value} in the text above?",
        f"The variables with the value {value} are", f" {_listed(chain)}", tuple(chain),
    )  # fmt: skip


def _common_words(draw: Random, haystack: Haystack) -> Draft:
    seed, pool = draw.random(), words.names(draw, words.MOST_NAMES)
    common = pool[:COMMON]

    def context(size: int, free: int) -> str:
        entries = max(2 * COMMON * OFTEN // SELDOM, size // 15)
        seldom = SELDOM if entries >= 2 * COMMON * OFTEN else 1
        often = seldom * OFTEN // SELDOM
        rare = max(1, entries - COMMON * often)
        others = [pool[COMMON + place // seldom % (len(pool) - COMMON)] for place in range(rare)]
        listed = common * often + others
        Random(seed).shuffle(listed)
        return ", ".join(listed)

    return Draft(
        "Some entries of the following list are there much more often than the others.\n\n", context,
        f"\n\nWhich {COMMON} entries are there most often in the list above?",
        "The most common entries are", f" {_listed(common)}", tuple(common),
    )  # fmt: skip


def _frequent_words(draw: Random, haystack: Haystack) -> Draft:
    seed, pool = draw.random(), words.coined(draw, 200)

    def context(size: int, free: int) -> str:
        total = max(1, size // 7)
        counts = [max(1, int(total * 6 / 9.87 / rank**2)) for rank in range(1, len(pool) + 1)]
        text = [word for word, count in zip(pool, counts, strict=True) for _ in range(count)][:total]
        text += pool[:1] * (total - len(text))
        Random(seed).shuffle(text)
        return " ".join(text)

    asked = pool[:FREQUENT]
    return Draft(
        "Count how often each word is there in the following text of invented words.\n\n", context,
        f"\n\nWhich {FREQUENT} words are there most often in the text above?",
        "The most frequent words are", f" {_listed(asked)}", tuple(asked),
    )  # fmt: skip


def _copy(draw: Random, haystack: Haystack) -> Draft:
    passage = words.sentences(draw, SENTENCES)
    marked = f'The passage to remember is: "{passage}"'
    return Draft(
        "A passage to remember is hidden in the following text. You will be asked to write it down, word for word.\n\n",
        _hidden(draw, haystack, [marked]), "\n\nWrite down the passage to remember, word for word.",
        'The passage to remember is: "', passage,
    )  # fmt: skip


_TASKS: dict[str, Task] = {
    "needle": _needle,
    "needle_keys": _needle_keys,
    "needle_values": _needle_values,
    "needle_queries": _needle_queries,
    "question_first": _question_first,
    "variables": _variables,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
    "copy": _copy,
}
TASKS = (*_TASKS, "continuation")
