"""The harness's model type against the study's runner, against the harness's own model type, and on local tasks."""

import json

import pytest
import torch

from tsa_compile.calibration.calibrate import calibrate
from tsa_compile.config import Coverage, Floor, KeepRatio, TSAConfig
from tsa_compile.errors import ConfigError, TSAWarning
from tsa_compile.evaluation.cached import CachedModel
from tsa_compile.evaluation.prompts import Sample
from tsa_compile.evaluation.running import MORE, Runner
from tsa_compile.evaluation.settings import Setting
from tsa_compile.report import reports

from .small import TEXT, llama

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'tsa-compile[eval]'")
from lm_eval import evaluator, tasks
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tsa_compile.evaluation.lm_eval import TSALM, read_config

pytestmark = pytest.mark.usefixtures("fresh")
GIVEN = {"budget": "keep:0.1", "floor": "4+1", "window": 8, "min_tokens": 0, "layers": "0+1", "compiler": "eager"}
CONTEXTS, ANSWERS = [TEXT[:500], TEXT[100:900]], [" one fox", " the old lamp"]


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=place) for place, each in enumerate(arguments)]


PAIRS = requests("loglikelihood", *((context, answer) for answer in ANSWERS for context in CONTEXTS))


@pytest.fixture(scope="module")
def expected(model, words):
    """By the study's runner, for one length each: (context, answer) -> (log-likelihood, greedy), context -> text."""
    likelihoods, written = {}, {}
    for context in CONTEXTS:
        ids, answers = words(context)["input_ids"], [words(answer)["input_ids"] for answer in ANSWERS]
        samples = [Sample(ids, answer, ("never written",)) for answer in answers]
        outcomes, scored = Runner(model, words, Setting("sparse", read_config(GIVEN))).run(samples)
        for text, ids, outcome, row in zip(ANSWERS, answers, outcomes, scored, strict=True):
            likelihoods[context, text] = (-outcome.nll * len(ids), row.argmax(-1)[: len(ids)].tolist() == ids)
        written[context] = outcomes[0].output
    return likelihoods, written


def test_likelihoods_are_those_behind_a_sparse_prefill(model, words, expected):
    found = TSALM(model, tokenizer=words, **GIVEN).loglikelihood(PAIRS, disable_tqdm=True)
    assert len(reports()) == 1 and reports()[0].sparse == 2  # one graph for all lengths
    assert found == [
        (pytest.approx(total, rel=1e-4), greedy) for total, greedy in (expected[0][pair.args] for pair in PAIRS)
    ]
    dense = HFLM(model, tokenizer=words).loglikelihood(PAIRS, disable_tqdm=True)
    assert all(abs(one - other) > 1e-3 for (one, _), (other, _) in zip(found, dense, strict=True))


def test_without_layers_all_is_as_the_harness_has_it(model, words):
    """Likelihoods, of contexts that are cut and of none; sums over a text; and what is written."""
    plain, ours = HFLM(model, tokenizer=words), TSALM(model, tokenizer=words, layers=None, compiler="eager")
    for lm in (plain, ours):
        lm._max_length = 150
    pairs = [*PAIRS, *requests("loglikelihood", ("", " a fox"))]
    for kind, given in (
        ("loglikelihood", pairs),
        ("loglikelihood_rolling", requests("loglikelihood_rolling", (TEXT[:700],))),
    ):
        found, wanted = (getattr(lm, kind)(given, disable_tqdm=True) for lm in (ours, plain))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    writing = requests("generate_until", *((text, {"until": ["zzz"], "max_gen_toks": 6}) for text in CONTEXTS))
    assert ours.generate_until(writing, disable_tqdm=True) == plain.generate_until(writing, disable_tqdm=True)


def test_what_is_written_follows_a_sparse_prefill(model, words, expected):
    """Two prompts of different lengths at once, padded."""
    steps = MORE + max(len(words(answer)["input_ids"]) for answer in ANSWERS)
    gen = {"until": ["zzz"], "max_gen_toks": steps, "do_sample": False}
    writing = requests("generate_until", *((text, gen) for text in CONTEXTS))
    found = TSALM(model, tokenizer=words, batch_size=2, **GIVEN).generate_until(writing, disable_tqdm=True)
    assert [report.sparse for report in reports()] == [2]  # decode steps are not compiled
    assert "forward" not in vars(model)
    assert found == [expected[1][text] for text in CONTEXTS]
    assert found != HFLM(model, tokenizer=words, batch_size=2).generate_until(writing, disable_tqdm=True)


def test_an_error_leaves_the_model_as_it_was(model, words, monkeypatch):
    lm = TSALM(model, tokenizer=words, **GIVEN)
    monkeypatch.setattr(lm, "_prefill", lambda **given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.generate_until(
            requests("generate_until", (CONTEXTS[0], {"until": ["zzz"], "max_gen_toks": 2})), disable_tqdm=True
        )
    assert "forward" not in vars(model)


def test_prompts_too_short_to_be_sparse_are_said(model, words):
    lm = TSALM(model, tokenizer=words, **{**GIVEN, "min_tokens": 1000})
    lm._cached = CachedModel(model)
    with pytest.warns(TSAWarning, match="2 prompts have at most 3.. tokens, and 1,008 are always kept"):
        lm.loglikelihood(PAIRS, disable_tqdm=True)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {data}.cache}}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
"""
WRITTEN = """
output_type: generate_until
doc_to_target: "{{text}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_tasks_of_the_harness_run(model, words, expected, tmp_path):
    """As `--model tsa` runs them: from a folder, through the registry, with a local task of each kind."""
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    documents = [{"text": text, "choices": [answer.strip() for answer in ANSWERS], "answer": 1} for text in CONTEXTS]
    data.write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    for name, more in (("choose", CHOICE), ("write", WRITTEN)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + more, encoding="utf-8")
    found = evaluator.simple_evaluate(
        model="tsa", model_args={"pretrained": str(tmp_path / "model"), **GIVEN}, tasks=["choose", "write"], device="cpu",
        task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    assert len(reports()) == 2 and all(report.sparse == 2 for report in reports())  # with a padding mask and without
    for place, sample in enumerate(found["samples"]["choose"]):
        wanted = [expected[0][CONTEXTS[place], answer][0] for answer in ANSWERS]
        assert [total for total, _ in sample["filtered_resps"]] == pytest.approx(wanted, rel=1e-4)
        assert sample["acc"] == (wanted[1] > wanted[0])
    assert found["results"]["write"]["exact_match,none"] == 0


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, TSAConfig(min_length=1, strict=True)),
        (
            GIVEN,
            TSAConfig(
                KeepRatio(0.1), 8, Floor(4, 1), min_tokens=0, layers=(0, 1), min_length=1, strict=True, compiler="eager"
            ),
        ),
        ({"budget": "coverage:0.01", "floor": None}, TSAConfig(Coverage(0.01), floor=None, min_length=1, strict=True)),
        ({"layers": 3}, TSAConfig(layers=(3,), min_length=1, strict=True)),
        ({"layers": "1+4-6"}, TSAConfig(layers=(1, 4, 5, 6), min_length=1, strict=True)),
        ({"layers": None}, TSAConfig(layers=(), min_length=1, strict=True)),
    ],
)
def test_fields_are_read_as_the_harness_hands_them_over(given, wanted):
    assert read_config(given) == wanted


def test_a_configuration_of_a_file_is_taken(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(TSAConfig(pool=3, min_length=64, window=16).to_json(), encoding="utf-8")
    assert read_config({"config": path, "window": 32}) == TSAConfig(pool=3, min_length=64, window=32, strict=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budget": 0.5}, "'0.5' is not a budget"),
        ({"floor": "256"}, "floor=256 is not understood"),
        ({"window": -1}, "window=-1 is not understood"),
        ({"kernel": "nobody"}, "nobody"),
    ],
)
def test_what_is_not_understood_is_named(given, said):
    with pytest.raises(Exception, match=said):
        read_config(given)


def test_layers_of_another_models_calibration_are_refused(model, words, tmp_path):
    """Of another size; other weights warn, as they may be the same model's in another form."""
    for name, measured in (("same", model), ("larger", llama(layers=3)), ("other", llama(seed=1))):
        calibrate(measured, [[5] * 20], progress=False).save(tmp_path / f"{name}.json")
    given = {**GIVEN, "layers": tmp_path / "larger.json"}
    with pytest.raises(ConfigError, match="a model with 3 layers, LlamaForCausalLM has 2: calibrate this one"):
        TSALM(model, tokenizer=words, **given)
    with pytest.warns(TSAWarning, match="belongs to another model"):
        TSALM(model, tokenizer=words, **{**given, "layers": tmp_path / "other.json"})
    found = TSALM(model, tokenizer=words, **{**given, "layers": tmp_path / "same.json"}).tsa_config
    assert found == read_config({**given, "layers": tmp_path / "same.json"}) and len(found.layers) == 1


def test_encoder_decoders_are_refused(words):
    import transformers

    config = transformers.T5Config(
        vocab_size=400, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(ConfigError, match="no decoder-only model"):
        TSALM(transformers.T5ForConditionalGeneration(config), tokenizer=words, **GIVEN)
