"""Likelihoods, outputs and divergences against hand-computed ones, and against whole passes without a cache."""

import math

import pytest
import torch

from tsa_compile.config import KeepRatio
from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.cached import check_model, divergence
from tsa_compile.evaluation.prompts import Sample, Writer
from tsa_compile.evaluation.running import MORE, Runner
from tsa_compile.evaluation.settings import DENSE, Setting

from .small import CONFIG, TEXT, Told

pytestmark = pytest.mark.usefixtures("fresh")
LENGTH = 12


@pytest.fixture(scope="module")
def samples(words):
    writer = Writer(words, TEXT)
    return [writer.sample("needle", 300, 0, index) for index in range(3)]


def planted(words, written, answer, expected, sure=0.9):
    """The outcome of one sample whose model writes a text."""
    script = words(written)["input_ids"]
    told = Told(LENGTH, [script], sure)
    sample = Sample([5] * LENGTH, words(answer)["input_ids"], expected)
    (outcome,), scored = Runner(told, words, DENSE).run([sample])
    return outcome, scored, told


@pytest.mark.parametrize(
    ("written", "expected", "right"),
    [
        (" 1234567", ("1234567",), True),
        (" the number 1234567, I think", ("1234567",), True),
        (" 1234568", ("1234567",), False),
        (" 222, 111", ("111", "222"), True),
        (" 222, 112", ("111", "222"), False),
        (" Amber Fox", ("amber fox",), True),
        ("", ("7",), False),
    ],
)
def test_an_output_is_right_if_everything_expected_is_in_it(words, written, expected, right):
    outcome, _, _ = planted(words, written, " 1234567", expected)
    assert outcome.right is right and outcome.output == ("" if right else written)


def test_what_lies_behind_the_end_does_not_count(words):
    told = Told(LENGTH, [[9, 0, *words("777")["input_ids"]]])
    (outcome,), _ = Runner(told, words, DENSE).run([Sample([5] * LENGTH, [8], ("777",))])
    assert outcome.right is False and "777" not in outcome.output


def test_an_output_may_be_a_little_longer_than_the_answer(words):
    for more, right in ((MORE - 1, True), (MORE + 2, False)):
        told = Told(LENGTH, [[9] * more + words("7")["input_ids"]])
        (outcome,), _ = Runner(told, words, DENSE).run([Sample([5] * LENGTH, [8, 8], ("7",))])
        assert outcome.right is right


def test_the_likelihood_is_that_of_every_token_of_the_answer(words):
    outcome, scored, told = planted(words, " 1234567", " 1234567", ("1234567",), sure=0.8)
    count = len(words(" 1234567")["input_ids"])
    assert outcome.nll == pytest.approx(-math.log(0.8), rel=1e-5) and scored.shape == (1, count, 400)
    assert told.steps == 1, "an answer that is the likeliest is written without a step"
    other, _, _ = planted(words, " 1234567", " 7654321", ("7654321",), sure=0.8)
    rest, same = -math.log(0.2 / 399), -math.log(0.8)
    ids, wanted = words(" 1234567")["input_ids"], words(" 7654321")["input_ids"]
    hits = sum(one == two for one, two in zip(ids, wanted, strict=False))
    assert other.nll == pytest.approx((hits * same + (len(wanted) - hits) * rest) / len(wanted), rel=1e-5)


def test_the_divergence_is_that_of_dense_from_the_setting(words):
    answer = words(" 12")["input_ids"]
    sample = Sample([5] * LENGTH, answer, ("12",))
    _, dense = Runner(Told(LENGTH, [answer], 0.9), words, DENSE).run([sample])
    (outcome,), _ = Runner(Told(LENGTH, [answer], 0.6), words, DENSE).run([sample], dense)
    assert outcome.kl == pytest.approx(0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4), rel=1e-4)


def test_the_divergence_of_what_is_no_number_is_none():
    """A setting whose answers are NaN is not close to dense attention; a probability of 0 in dense adds nothing."""
    dense = torch.tensor([[[0.5, 0.5, 0.0]]]).log()
    nan = torch.full_like(dense, float("nan"))
    assert divergence(dense, nan).isnan().all() and divergence(nan, dense).isnan().all()
    assert divergence(dense, dense) == 0 and divergence(torch.tensor([[[0.0, -200.0]]]), dense[..., 1:]) == math.log(2)
    assert divergence(dense, torch.tensor([[[1.0, 0.0, 0.0]]]).log()) == math.inf


def test_answers_of_different_lengths_share_a_batch(words):
    scripts = [words(text)["input_ids"] for text in (" 12", " 1234567", " 3")]
    told = Told(LENGTH, scripts)
    samples = [Sample([5] * LENGTH, script, (words.decode(script).strip(),)) for script in scripts]
    outcomes, _ = Runner(told, words, DENSE).run(samples)
    assert [outcome.right for outcome in outcomes] == [True] * 3
    assert [outcome.nll for outcome in outcomes] == pytest.approx([-math.log(0.9)] * 3, rel=1e-5)


def test_the_likelihood_equals_that_of_a_pass_without_a_cache(model, words, samples):
    outcomes, _ = Runner(model, words, DENSE).run(samples)
    for sample, outcome in zip(samples, outcomes, strict=True):
        ids = torch.tensor([sample.prompt + sample.answer])
        with torch.inference_mode():
            scored = model(ids).logits[0, len(sample.prompt) - 1 : -1].log_softmax(-1)
            written = model.generate(
                torch.tensor([sample.prompt]), max_new_tokens=MORE + len(sample.answer), do_sample=False, pad_token_id=0
            )[0, len(sample.prompt) :]
        assert outcome.nll == pytest.approx(-float(scored.gather(1, ids[0, -len(sample.answer) :, None]).mean()), rel=1e-4)
        longest = MORE + max(len(other.answer) for other in samples)
        text = words.decode([token for token in written.tolist()[:longest] if token != 0], skip_special_tokens=True)
        assert outcome.output.startswith(text) and outcome.right is False


def test_keeping_everything_equals_dense(model, words, samples):
    _, dense = Runner(model, words, DENSE).run(samples)
    whole = Setting("all", CONFIG.replace(budget=KeepRatio(1)))
    found, scored = Runner(model, words, whole).run(samples, dense)
    torch.testing.assert_close(scored, dense, rtol=1e-3, atol=1e-3)
    assert all(outcome.kept == 1.0 and outcome.kl < 1e-5 for outcome in found)


def test_a_sparse_prefill_is_seen_in_the_answers_likelihood(model, words, samples):
    plain, dense = Runner(model, words, DENSE).run(samples)
    sparse, _ = Runner(model, words, Setting("sparse", CONFIG)).run(samples, dense)
    kept = (math.ceil(0.25 * 292) + 8) / 300
    for outcome, before in zip(sparse, plain, strict=True):
        assert outcome.kept == pytest.approx(kept) and before.kept == 1.0
        assert outcome.kl > 1e-3 and outcome.nll != before.nll


@pytest.mark.exhaustive
def test_a_random_selection_keeps_as_many_and_is_the_same_again(model, words, samples):
    sparse, _ = Runner(model, words, Setting("sparse", CONFIG)).run(samples)
    runner = Runner(model, words, Setting("random", CONFIG, random=True))
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(runner.run(samples)[0])
    assert found[0] == found[1] and [o.kept for o in found[0]] == [o.kept for o in sparse]
    assert [outcome.nll for outcome in found[0]] != [outcome.nll for outcome in sparse]


@pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse")
def test_a_setting_that_makes_no_layer_sparse_is_refused(model, words, samples):
    with pytest.raises(ConfigError, match=r"long at 300 tokens: no layer became sparse. TOO_SHORT"):
        Runner(model, words, Setting("long", CONFIG.replace(min_length=1000))).run(samples)


def test_a_model_without_a_cache_is_refused(words):
    class NoCache(Told):
        def forward(self, **given):
            found = super().forward(**given)
            del found.past_key_values
            return found

    with pytest.raises(ConfigError, match="NoCache gave logits at 1 positions and no cache"):
        Runner(NoCache(LENGTH, [[1]]), words, DENSE).run([Sample([5] * LENGTH, [1])])
    with pytest.raises(ConfigError, match="forward takes no logits_to_keep"):
        check_model(torch.nn.Linear(2, 2))
