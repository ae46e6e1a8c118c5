"""The tasks against a solver in plain Python that reads nothing but the tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.errors import ConfigError
from tsa_compile.evaluation import tasks
from tsa_compile.evaluation.tasks import BOS, IGNORED, KEYS, NOISE, QUERY, SET, TASKS, VALUES, generate

ASKED = {
    "mqar": 16,
    "niah_single": 1,
    "niah_multikey": 1,
    "niah_multivalue": 4,
    "niah_multiquery": 4,
    "variable_tracking": 4,
}


def solve(tokens):
    """Labels and evidence of one sample, from its tokens: what each name reads, up to a value."""
    pairs = {}
    for at, token in enumerate(tokens):
        if token == SET:
            pairs.setdefault(tokens[at + 1], []).append((tokens[at + 2], at))
    labels, evidence = [IGNORED] * len(tokens), [False] * len(tokens)
    for at in (at for at, token in enumerate(tokens) if token == QUERY):
        name, answers = tokens[at + 1], []
        while name not in VALUES:
            for read, place in pairs[name]:
                evidence[place + 1] = evidence[place + 2] = True
                answers.append(read)
            name = answers[-1]
        labels[at + 1 : at + 1 + len(answers)] = answers
    return labels, evidence


@pytest.mark.parametrize("question", ["last", "early"])
@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=25)
@given(length=st.integers(288, 700), seed=st.integers(0, 2**40), batch=st.integers(1, 4))
def test_labels_and_evidence_follow_from_the_tokens(task, question, length, seed, batch):
    samples = generate(task, batch=batch, length=length, seed=seed, question=question)
    for tensor, dtype in ((samples.tokens, torch.int64), (samples.labels, torch.int64), (samples.evidence, torch.bool)):
        assert tensor.shape == (batch, length) and tensor.dtype == dtype
    for row in range(batch):
        labels, evidence = solve(samples.tokens[row].tolist())
        assert samples.labels[row].tolist() == labels
        assert samples.evidence[row].tolist() == evidence


@pytest.mark.parametrize("length", [128, 129, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_a_haystack_and_a_question_at_its_end(task, length):
    samples = generate(task, batch=3, length=length, seed=1)
    asked = samples.labels != IGNORED
    assert asked.sum(1).tolist() == [ASKED[task]] * 3
    assert not asked[:, :-96].any(), "a label outside the last 96 tokens"
    first = KEYS if task == "variable_tracking" else VALUES
    assert samples.labels[asked].min() >= first.start and samples.labels[asked].max() < VALUES.stop
    # Teacher forcing: the token behind a label is the answer.
    assert torch.equal(samples.tokens[:, 1:][asked[:, :-1]], samples.labels[asked])
    assert (samples.tokens[:, 0] == BOS).all()
    assert samples.tokens.max() < tasks.VOCABULARY


@pytest.mark.parametrize("task", TASKS)
def test_an_early_question_lies_before_the_scoring_window(task):
    samples = generate(task, batch=3, length=600, seed=1, question="early")
    tail = samples.tokens[:, -160:]
    assert (tail >= NOISE.start).all()
    assert (samples.labels[:, -160:] == IGNORED).all() and not samples.evidence[:, -160:].any()
    assert (samples.labels != IGNORED).sum(1).tolist() == [ASKED[task]] * 3


@pytest.mark.parametrize(
    ("task", "pairs"), [("mqar", 256), ("niah_multikey", 256), ("niah_single", 1), ("niah_multivalue", 8)]
)
def test_keys_and_values_differ_within_a_sample(task, pairs):
    tokens = generate(task, batch=2, length=4096, seed=3).tokens
    for row in tokens.tolist():
        places = [at for at, token in enumerate(row) if token == SET]
        keys, values = [row[at + 1] for at in places], [row[at + 2] for at in places]
        assert len(places) == pairs and len(set(values)) == pairs
        assert len(set(keys)) == (5 if task == "niah_multivalue" else pairs)
        assert set(keys) <= set(KEYS) and set(values) <= set(VALUES)


def test_a_chain_is_followed_from_its_last_variable():
    samples = generate("variable_tracking", batch=20, length=256, seed=0)
    assert samples.evidence.sum(1).tolist() == [4 * 2] * 20  # four assignments of two tokens
    for tokens, labels in zip(samples.tokens.tolist(), samples.labels.tolist(), strict=True):
        answers = [label for label in labels if label != IGNORED]
        assert [answer in KEYS for answer in answers] == [True, True, True, False]
        assert tokens[-5] in KEYS and tokens[-5] not in answers
        assert tokens[: tokens.index(QUERY)].count(tokens[-5]) == 1, "nothing reads the last variable"


def test_needles_lie_everywhere():
    samples = generate("niah_single", batch=2000, length=256, seed=0)
    places = samples.evidence.int().argmax(1).double() / 256
    assert abs(places.mean() - 0.5) < 0.03 and abs(places.std() - (1 / 12) ** 0.5) < 0.02


def test_seeds_lengths_and_questions_have_their_own_samples():
    first = generate("mqar", batch=4, length=300, seed=5)
    again = generate("mqar", batch=4, length=300, seed=5)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.evidence, again.evidence)
    others = [
        generate("mqar", batch=4, length=300, seed=6),
        generate("mqar", batch=4, length=300, seed=5, question="early"),
        generate("niah_multikey", batch=4, length=300, seed=5),
    ]
    assert all((first.tokens == other.tokens).float().mean() < 0.1 for other in others)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "mqr"}, "the tasks are mqar"),
        ({"question": "first"}, "last, early"),
        ({"batch": 0}, "at least 1 sample"),
        ({"length": 127}, "at least 128"),
        ({"length": 287, "question": "early"}, "at least 288"),
    ],
)
def test_what_cannot_be_made_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        generate(**{"task": "mqar", "batch": 1, "length": 300, "seed": 0, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("task", TASKS)
def test_samples_are_made_on_the_gpu(task):
    samples = generate(task, batch=16, length=4096, seed=0, device="cuda")
    assert samples.tokens.is_cuda
    labels, evidence = solve(samples.tokens[3].tolist())
    assert samples.labels[3].tolist() == labels and samples.evidence[3].tolist() == evidence
