"""Calibration by loss: what is measured against plain compilation, what is chosen against brute force, and its files."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsa_compile import ConfigError, TSAWarning
from tsa_compile.backend import tsa_backend
from tsa_compile.calibration.base import evaluating
from tsa_compile.calibration.calibrate import Calibration, calibrate, load_calibration
from tsa_compile.calibration.fingerprint import Fingerprint
from tsa_compile.calibration.loss import Costs, LossMeter, read_samples
from tsa_compile.calibration.loss_search import TRIES, LossCalibration, Search, bisect, calibrate_loss, fill, path
from tsa_compile.config import Floor, KeepRatio, TSAConfig
from tsa_compile.evaluation.prompts import Sample

from ..support import exhaustive_but, tiny, tokens

BASE = TSAConfig(window=4, min_tokens=0, floor=Floor(4, 1))
RATIOS = (0.5, 0.1)
LAYERS = range(3)
PROMPTS = [tokens(1, 60), tokens(1, 60).flip(1), tokens(1, 44)]
ANSWER = 8


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=3, initializer_range=0.1)


@pytest.fixture(scope="module")
def samples():
    return [Sample(ids[0, :-ANSWER].tolist(), ids[0, -ANSWER:].tolist()) for ids in PROMPTS]


@pytest.fixture(scope="module")
def meter(model):
    torch._dynamo.reset()
    return LossMeter(model, BASE, LAYERS, batch_size=2)


@pytest.fixture(scope="module")
def brute(meter, samples):
    """Every choice of layers and ratios -> its KL as a whole."""
    every = [
        {layer: ratio for layer, ratio in zip(LAYERS, each, strict=True) if ratio}
        for each in itertools.product((None, *RATIOS), repeat=3)
    ]
    costs = meter.costs(samples, every)
    assert costs.tokens == 3 * ANSWER
    return [(choice, kl) for choice, kl in zip(every, costs.kl, strict=True)]


def by_plain_compilation(model, choice, sample):
    """KL of one answer, compiled for just this choice, and answered token by token."""

    def scored(layers):
        torch._dynamo.reset()
        options = {"config": BASE.replace(layers=layers, compiler="eager", min_length=1)}
        call = torch.compile(model, backend=tsa_backend, dynamic=False, options=options)
        with torch.no_grad():
            made = call(torch.tensor([sample.prompt]), use_cache=True)
            logits, cache = [made.logits[:, -1]], made.past_key_values
            for token in sample.answer[:-1]:
                logits.append(model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[:, -1])
        return torch.stack(logits, 1).double().log_softmax(-1)

    dense, sparse = scored(()), scored(choice)
    return float((dense.exp() * (dense - sparse)).sum(-1).mean())


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:no attention call")
def test_costs_are_those_of_the_compiled_configuration(model, meter, samples):
    choice = {0: 0.5, 2: 0.1}
    (found,) = meter.costs(samples[:1], [choice]).kl
    assert found == pytest.approx(by_plain_compilation(model, choice, samples[0]), rel=1e-3) and found > 1e-3
    assert meter.costs(samples[:1], [{}]).kl == (0.0,)
    assert meter.eligible(samples[0]) == [0, 1, 2]


def test_costs_are_means_over_all_answers(meter, samples):
    choice = {1: 0.1}
    together, alone = meter.costs(samples, [choice]).kl[0], [meter.costs([each], [choice]).kl[0] for each in samples]
    assert together == pytest.approx(sum(alone) / 3, rel=1e-4)


def test_the_error_of_a_cost_is_that_of_its_mean_over_samples():
    sums = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]], dtype=torch.float64)
    alike = Costs.of(sums, torch.full((3,), 2.0, dtype=torch.float64))
    assert alike.kl == (1.5, 2.0) and alike.tokens == 6
    assert alike.errors == pytest.approx(((sums[0] / 2).std().item() / 3**0.5, 0.0))
    longer = Costs.of(torch.tensor([[2.0, 6.0]], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert longer.kl == (2.0,) and longer.errors == (0.0,), "both samples have the same mean, whatever their length"
    assert math.isnan(Costs.of(sums[:, :1], torch.ones(1, dtype=torch.float64)).errors[0])


def saved_by(choice, length):
    """The share of pairs left out, from how many of the tokens each ratio keeps."""
    kept = {ratio: (4 + -(-(length - 4) * ratio // 1)) / length for ratio in choice.values()}
    return sum(1 - kept[ratio] ** 2 for ratio in choice.values()) / 3


@pytest.mark.parametrize("max_kl", exhaustive_but([0.0065, 10.0], 0.0065))
def test_what_is_chosen_against_all_choices(model, brute, max_kl):
    found = calibrate(
        model,
        PROMPTS,
        objective="loss",
        max_kl=max_kl,
        ratios=RATIOS,
        config=BASE,
        answer=ANSWER,
        progress=False,
        batch_size=2,
    )
    chosen = {layer: budget.ratio for layer, budget in found.sparse_layers.items()}
    assert found.kl == pytest.approx(dict_of(brute, chosen), rel=1e-4, abs=1e-9) and found.kl <= max_kl
    assert (found.tokens, found.prompts, found.length) == (24, 3, 47) and 0 < found.kl_error < found.kl
    assert found.saved == pytest.approx(saved_by(chosen, 47))
    best = max(saved_by(choice, 47) for choice, kl in brute if kl <= max_kl)
    assert found.saved == pytest.approx(best)
    for layer, ratio in itertools.product(LAYERS, RATIOS):
        assert found.alone[layer][ratio] == pytest.approx(dict_of(brute, {layer: ratio}), rel=1e-4, abs=1e-9)


def dict_of(brute, choice):
    return next(kl for other, kl in brute if other == choice)


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4), st.floats(0, 3))
def test_a_path_is_nested_and_close_to_the_best_where_costs_add_up(costs, limit):
    ratios = (0.5, 0.3, 0.1)
    saved = {ratio: 1 - ratio**2 for ratio in ratios}
    alone = {layer: dict(zip(ratios, itertools.accumulate(each), strict=True)) for layer, each in enumerate(costs)}

    def total(choice):
        return sum(alone[layer][ratio] for layer, ratio in choice.items())

    def value(choice):
        return sum(saved[ratio] for ratio in choice.values())

    steps = path(alone, saved)
    for before, after in itertools.pairwise([{}, *steps]):
        (changed,) = [layer for layer in after if before.get(layer) != after[layer]]
        assert before.keys() <= after.keys() and after[changed] < before.get(changed, 1)
    assert steps[-1] == dict.fromkeys(alone, 0.1)
    place, cost = bisect(len(steps), lambda place: total(steps[place]), limit)
    chosen = steps[place] if place >= 0 else {}
    assert cost == total(chosen) <= limit
    every = itertools.product((None, *ratios), repeat=len(alone))
    choices = [{layer: ratio for layer, ratio in enumerate(each) if ratio} for each in every]
    best = max(value(choice) for choice in choices if total(choice) <= limit)
    assert value(chosen) >= best - max(saved.values())  # what one step may miss
    filled, cost = fill(chosen, cost, total, alone, saved, limit)
    assert cost == total(filled) <= limit and value(filled) >= value(chosen)
    assert all(filled.get(layer, 1) <= ratio for layer, ratio in chosen.items())


def test_what_is_left_is_used_in_a_few_measurements():
    """Layer 0 at .1 is beyond the limit and at .5 within; of 20 other layers each costs more with the others than alone."""
    saved = {0.5: 0.75, 0.1: 0.99}
    alone = {0: {0.5: 0.5, 0.1: 0.6}, **{layer: {0.1: 0.3} for layer in range(1, 21)}}
    seen = []

    def cost(choice):
        seen.append(choice)
        return sum(2 * alone[layer][ratio] for layer, ratio in choice.items())

    assert fill({}, 0.0, lambda choice: cost(choice) / 2, alone, saved, 0.55) == ({1: 0.1}, 0.3)
    assert fill({}, 0.0, cost, {0: alone[0]}, saved, 1.0) == ({0: 0.5}, 1.0)
    del seen[:]
    assert fill({}, 0.0, cost, alone, saved, 0.55) == ({}, 0.0) and len(seen) == TRIES


@given(st.lists(st.integers(0, 9), max_size=12).map(sorted), st.integers(-1, 10))
def test_bisection_finds_the_last_within(values, limit):
    seen = []
    place, value = bisect(len(values), lambda at: seen.append(at) or values[at], limit)
    within = [at for at, each in enumerate(values) if each <= limit]
    assert place == (within[-1] if within else -1) and value == (values[place] if within else 0)
    assert len(seen) == len(set(seen)) <= len(values).bit_length()


def options(**changes):
    return {"max_kl": 0.1, "ratios": (0.5,), "config": BASE, "answer": 4, "progress": False, **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_kl": None}, "max_kl=None is not allowed"),
        ({"max_kl": -1}, "max_kl=-1"),
        ({"max_kl": float("nan")}, "max_kl=nan"),
        ({"ratios": ()}, r"ratios=\(\)"),
        ({"ratios": (0.5, 1)}, "ratios="),
        ({"ratios": (2,)}, "KeepRatio.ratio=2"),
        ({"answer": 0}, "answer=0"),
        ({"answer": 80}, "prompt 0 is too short"),
        ({"config": TSAConfig()}, "1,152 are always kept"),
        ({"config": BASE.replace(layers=[3])}, r"indices of the layers 0 to 2"),
        ({"config": BASE.replace(layers=["a*"])}, "indices of the layers"),
        ({"config": BASE.replace(dense_kernel="a_shape")}, "config.dense_kernel='a_shape'"),
        ({"nonsense": 1, "more": 2}, "nonsense, more: objective='loss' has no such option; its options are max_kl, ratios"),
        ({"ratios": 0.5}, "ratios=0.5 is not allowed"),
        ({"config": "x"}, r"config='x' is not allowed: calibrate_loss\(\) takes a TSAConfig"),
        ({"delta": 7.0}, "delta=7.0: objective='loss' has no such option"),
        ({"delta": 0.5}, "delta=0.5: objective='loss' has no such option"),
    ],
)
def test_what_is_not_allowed_is_named(model, changes, said):
    with pytest.raises(ConfigError, match=said):
        calibrate(model, PROMPTS, objective="loss", **options(**changes))


def test_options_of_the_other_objective_are_named(model):
    with pytest.raises(ConfigError, match="max_kl: objective='drift' has no such option"):
        calibrate(model, PROMPTS, max_kl=0.1)
    with pytest.raises(ConfigError, match="objective='mean'"):
        calibrate(model, PROMPTS, objective="mean")
    with pytest.raises(ConfigError, match="no prompts were given"):
        calibrate(model, [], objective="loss", **options())
    with pytest.raises(ConfigError, match="prompt 1 has the token id 9999"):
        calibrate(model, [PROMPTS[0], [9999] * 60], objective="loss", **options())


def test_every_row_of_a_prompt_is_checked(model):
    ids = torch.ones(2, 20, dtype=torch.long)
    mask = ids.clone()
    mask[0, 8:] = 0  # the first row is no longer than its answer
    with pytest.raises(ConfigError, match="prompt 0 is too short"):
        read_samples(model, [{"input_ids": ids, "attention_mask": mask}], None, 8)
    wrong = ids.clone()
    wrong[0, 3] = 9999
    with pytest.raises(ConfigError, match="prompt 1 has the token id 9999"):
        read_samples(model, [ids, wrong], None, 8)


def test_rows_have_answers_of_their_own(model):
    ids, answers = torch.arange(24).view(2, 12), torch.arange(6).view(2, 3)
    found = read_samples(model, [{"input_ids": ids, "answer_ids": answers}], None, 8)
    assert found == [Sample(ids[row].tolist(), answers[row].tolist()) for row in range(2)]
    with pytest.raises(ConfigError, match="prompt 1 has 2 rows of input_ids and 1 of answer_ids"):
        read_samples(model, [[1] * 20, {"input_ids": ids, "answer_ids": answers[0]}], None, 8)


def test_what_is_not_finite_is_no_candidate():
    def search(*kl):
        return Search(SimpleNamespace(costs=lambda samples, choices, step: Costs(kl, 8)), [], lambda *told: None)

    found = search(0.1, math.nan, math.inf, math.nan).alone([2, 5], [0.5, 0.3])
    assert found == {2: {0.5: 0.1}, 5: {}}
    assert path(found, {0.5: 0.75, 0.3: 0.9}) == [{2: 0.5}]
    with pytest.raises(ConfigError, match="no layer alone has a finite KL"):
        search(math.nan, math.inf).alone([2], [0.5, 0.3])


@pytest.mark.filterwarnings("ignore:no attention call")
def test_a_model_whose_layers_cannot_be_sparse():
    with pytest.raises(ConfigError, match=r"no layer of MistralForCausalLM can be sparse \(SLIDING_WINDOW\)"):
        calibrate(tiny("mistral", sliding_window=8), PROMPTS[:1], objective="loss", **options())


def test_layers_that_are_no_candidates_stay_dense(model, samples):
    """Answers of their own as well, in both forms, and what the progress bar is told."""
    told = {"input_ids": samples[0].prompt, "answer_ids": samples[0].answer}
    given = options(max_kl=10.0, config=BASE.replace(layers=[1, 2], budget=KeepRatio(0.9)))
    found = calibrate_loss(model, [samples[0], told], **given)
    assert found.ratios == (None, 0.5, 0.5) and found.alone[0] == {} and found.tokens == 2 * ANSWER
    assert found.config() == BASE.replace(layers={1: 0.5, 2: 0.5}, budget=KeepRatio(0.9))
    assert model.training is False and next(model.parameters()).requires_grad


def made(ratios=(None, 0.5, 0.1)):
    names = tuple(f"model.layers.{index}" for index in range(3))
    alone = ({}, {0.5: 0.1, 0.1: 0.2}, {0.5: 1e-5, 0.1: 0.0})
    prints = Fingerprint("Model", "Layer", 3, {"hidden_size": 8}, {"0.w": [1.0]})
    return LossCalibration(names, ratios, alone, 0.01, 0.02, 0.4, 64, 2, 1000, BASE, prints)


def test_files(tmp_path):
    found = made()
    found.save(tmp_path / "c.json")
    assert LossCalibration.load(tmp_path / "c.json") == load_calibration(tmp_path / "c.json") == found
    assert TSAConfig.from_json(json.loads((tmp_path / "c.json").read_text())["config"]) == found.config()
    assert found.config(window=8) == BASE.replace(layers={1: 0.5, 2: 0.1}, window=8)
    told = dataclasses.replace(found, kl_error=0.002)
    told.save(tmp_path / "e.json")
    assert load_calibration(tmp_path / "e.json") == told != found
    assert made((None, None, None)).config().layers == ()
    drift = Calibration(("a",), (1.0,), 1.0, 1, 1, found.fingerprint)
    drift.save(tmp_path / "d.json")
    assert load_calibration(tmp_path / "d.json") == drift
    with pytest.raises(ConfigError, match=r"d\.json.*expected 'tsa_compile.loss_calibration/1'"):
        LossCalibration.load(tmp_path / "d.json")
    for change, said in (
        ({"kl": None}, "calibrate again"),
        ({"kl": math.nan}, "kl=nan is not allowed"),
        ({"max_kl": -1}, "max_kl=-1.0 is not allowed"),
        ({"max_kl": 10**400}, "calibrate again"),
        ({"kl_error": -0.1}, "kl_error=-0.1 is not allowed"),
        ({"saved": 7.0}, "saved=7.0 is not allowed"),
        ({"tokens": -5}, "tokens=-5 is not allowed"),
        ({"prompts": math.inf}, "calibrate again"),
        ({"layers": []}, "0 layers"),
        ({"config": {"a": 1}}, "not an option"),
        ({"config": {**found.to_dict()["config"], "layers": {"2": {"keep_ratio": 0.3}}}}, "to choose layers by hand"),
        ({"layers": found.to_dict()["layers"][:2]}, "and by its ratios"),
        ({"layers": [*found.to_dict()["layers"], found.to_dict()["layers"][0]]}, "4 layers, and its model 3"),
    ):
        (tmp_path / "c.json").write_text(json.dumps(found.to_dict() | change))
        with pytest.raises(ConfigError, match=said):
            load_calibration(tmp_path / "c.json")


def test_another_model_is_noticed(model):
    found = dataclasses.replace(made(), fingerprint=Fingerprint.of(model, list(model.model.layers)))
    assert found.check(model)
    with pytest.warns(TSAWarning, match="belongs to another model"):
        assert not found.check(tiny("llama", num_hidden_layers=4))


def test_evaluation_mode_is_put_back(model):
    model.train()
    with evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training
    model.eval()
