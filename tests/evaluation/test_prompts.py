"""Prompts have the promised number of tokens, hold what is hidden in them, and are the same whatever else is run."""

from random import Random

import pytest

from tsa_compile.errors import ConfigError
from tsa_compile.evaluation import tasks, words
from tsa_compile.evaluation.prompts import Writer
from tsa_compile.evaluation.tasks import CONTINUED, TASKS, draft
from tsa_compile.evaluation.words import Haystack

from .small import TEXT, tokenizer

HIDING = [task for task in TASKS if task not in ("common_words", "frequent_words", "continuation")]
LENGTHS = (900, 1500, 4001)


@pytest.fixture(scope="module", params=["chat", "plain"])
def writer(request):
    return Writer(tokenizer(request.param == "chat"), TEXT)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_exactly_the_tokens_that_were_asked_for(writer, task, length):
    for index in range(3):
        assert len(writer.sample(task, length, 0, index).prompt) == length


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", HIDING)
def test_what_is_hidden_is_in_the_prompt(writer, task, length):
    for index in range(4):
        sample = writer.sample(task, length, 0, index)
        text = writer.tokenizer.decode(sample.prompt)
        made = draft(task, 0, length, index, writer.haystack)
        needed = made.expected or (made.answer,)
        assert all(part in text for part in needed) and text.endswith(made.lead)
        assert made.before in text and made.after.strip() in text
        answer = writer.tokenizer.decode(sample.answer)
        assert answer == made.answer and all(part in answer for part in sample.expected)


@pytest.mark.parametrize("task", ["needle_keys", "variables"])
def test_needles_lie_at_all_depths(writer, task):
    depths = []
    for index in range(40):
        made = draft(task, 0, 1500, index, writer.haystack)
        text = writer.tokenizer.decode(writer.sample(task, 1500, 0, index).prompt)
        depths.append(text.index(made.expected[0]) / len(text))
    assert min(depths) < 0.25 and max(depths) > 0.5


def test_the_question_first_is_not_repeated_behind_the_text(writer):
    made = draft("question_first", 0, 900, 0, writer.haystack)
    key = made.before.split(" for ")[1].split(" in ")[0]
    assert key not in made.after + made.lead
    assert writer.tokenizer.decode(writer.sample("question_first", 900, 0, 0).prompt).count(key) == 2


@pytest.mark.parametrize("length", [600, 3000, 20000])
def test_common_entries_are_ten_times_as_common(length):
    made = draft("common_words", 0, length, 0, Haystack(TEXT))
    entries = made.context(4 * length, 0).split(", ")
    counts = {entry: entries.count(entry) for entry in set(entries)}
    common = [counts.pop(entry) for entry in made.expected]
    assert len(set(common)) == 1 and max(counts.values()) * 5 <= common[0]


@pytest.mark.parametrize("size", [2000, 30000])
def test_frequent_words_are_the_most_frequent(size):
    made = draft("frequent_words", 0, size, 0, Haystack(TEXT))
    found = made.context(size, 0).split()
    ranked = sorted(set(found), key=found.count, reverse=True)
    assert tuple(ranked[:3]) == made.expected and found.count(ranked[2]) > found.count(ranked[3])


def test_a_chain_of_variables_leads_from_the_number_to_all_of_them():
    made = draft("variables", 0, 900, 0, Haystack(TEXT))
    value, text = made.lead.split()[5], made.context(5000, 0)
    places = [text.index(f"Variable {name} is set to") for name in made.expected]
    assert f"{made.expected[0]} is set to {value}." in text and places == sorted(places)
    for name, source in zip(made.expected[1:], made.expected, strict=False):
        assert f"Variable {name} is set to the value of {source}." in text


def test_a_continuation_is_the_text_itself(writer):
    sample = writer.sample("continuation", 900, 0, 1)
    whole = writer.tokenizer.decode(sample.prompt + sample.answer)
    assert whole in TEXT and len(sample.answer) == CONTINUED and sample.expected == ()


def test_samples_do_not_depend_on_each_other(writer):
    first, again = (writer.sample("needle", 900, 5, 3) for _ in range(2))
    others = [
        writer.sample("needle", 900, 5, 4),
        writer.sample("needle", 900, 6, 3),
        writer.sample("needle_keys", 900, 5, 3),
    ]
    assert first == again and all(other.answer != first.answer for other in others)


def test_a_chat_template_that_raises_is_named():
    words = tokenizer()
    words.chat_template = "{{ raise_exception('a system message is needed') }}"
    with pytest.raises(ConfigError, match=r"chat template cannot be applied .a system message is needed"):
        Writer(words, TEXT).sample("needle", 900, 0, 0)


def test_without_a_text_there_is_filler():
    writer = Writer(tokenizer())
    assert "A baker opened his shop" in writer.tokenizer.decode(writer.sample("needle", 900, 0, 0).prompt)
    with pytest.raises(ConfigError, match=r"pass one .--text FILE."):
        writer.sample("continuation", 900, 0, 0)


def test_a_short_text_is_read_in_a_circle_but_not_gone_on_with():
    writer = Writer(tokenizer(), "One sentence of a short text. And another one.")
    assert len(writer.sample("needle", 1500, 0, 0).prompt) == 1500
    with pytest.raises(ConfigError, match=r"the text has \d+ tokens, continuation at 900 needs 964"):
        writer.sample("continuation", 900, 0, 0)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "continuation"])
def test_a_length_that_is_too_short_is_refused(writer, task):
    with pytest.raises(ConfigError, match=f"{task} needs .* tokens of this tokenizer at least, found a length of 40"):
        writer.sample(task, 40, 0, 0)


def test_what_samples_depend_on_is_told_apart():
    known = [(tokenizer(), TEXT), (tokenizer(False), TEXT), (tokenizer(), TEXT + " More."), (tokenizer(), None)]
    found = [str(Writer(*given).identity()) for given in known]
    assert len(set(found)) == 4 and found[0] == str(Writer(tokenizer(), TEXT).identity())


def test_hiding_leaves_the_text_and_the_free_part_as_they_are():
    hidden = [(0.0, "FIRST."), (0.5, "SECOND."), (1.0, "THIRD.")]
    text = Haystack(TEXT).hide(0.3, 4000, 500, hidden)
    plain = text
    for _, sentence in hidden:
        plain = plain.replace(sentence + " ", "")
    assert plain in TEXT and text.index("FIRST.") >= 500
    assert text.index("FIRST.") < text.index("SECOND.") < text.index("THIRD.") and abs(len(text) - 4000) < 30


def test_names_and_numbers_differ():
    draw = Random(0)
    assert len(set(words.names(draw, words.MOST_NAMES))) == words.MOST_NAMES
    assert len(set(words.numbers(draw, 100))) == len(set(words.coined(draw, 200))) - 100 == 100
    assert tasks.is_scored("needle") and not tasks.is_scored("copy")
    with pytest.raises(ConfigError, match="task='poetry' is not allowed"):
        tasks.check("poetry")


def test_a_text_of_very_different_density_is_fitted():
    """Lines of a table, which are few tokens, between words that are many: one step is too short, the next too long."""
    draw = Random(0)
    text = "\n".join("=" * 128 + " " + "".join(draw.choice("qxzjkv") for _ in range(60)) + "." for _ in range(200))
    writer = Writer(tokenizer(), text)
    for index in range(20):
        assert len(writer.sample("needle", 1100, 0, index).prompt) == 1100
