"""Which layers `attn_implementation="tsa"` makes sparse, and what the report of a model says."""

import pytest
import torch

from tsa_compile import Coverage, Reason, TSAWarning, attention, reports

from ..support import difference, tiny, tokens
from .transformers_support import ATOL, FLOOR, LENGTH, logits, no_warning, reasons, rows_of, sparse

pytestmark = pytest.mark.usefixtures("fresh")


def test_layers_by_default_by_number_and_by_name():
    ids, names = tokens(1, LENGTH), {}
    for layers in (None, [1], ["model.layers.0.*"], []):
        model = sparse("llama", FLOOR.replace(layers=layers))
        with no_warning():
            logits(model, ids)
        names[str(layers)] = [row.layer for row in attention.report(model).sparse_calls]
    layer = "model.layers.{}.self_attn".format
    assert [*names.values()] == [[layer(1), layer(2)], [layer(1)], [layer(0)], []]


def test_layers_with_a_budget_each():
    """As compiled, in logits and in what the report says that each keeps."""
    config = FLOOR.replace(layers={2: 0.25, 0: Coverage(0.3)})
    model, ids = sparse("llama", config), tokens(1, LENGTH)
    compiled = logits(torch.compile(tiny("llama"), backend="tsa", options={"config": config}), ids)
    assert difference(logits(model, ids), compiled) < ATOL
    found = [row.budget for row in attention.report(model)]
    assert found == [row.budget for row in reports()[-1]] == [("coverage", 0.3), None, ("keep_ratio", 0.25)]


def test_layers_that_there_are_not():
    model = sparse("llama", FLOOR.replace(layers=[1, 9]))
    with pytest.warns(TSAWarning, match=r"layers=\[9\] not found.*0..2") as said:
        logits(model, tokens(1, LENGTH))
        logits(model, tokens(1, LENGTH))
    assert len(said) == 1


def test_a_layer_alone_has_no_place():
    """It is not known of which model, so the default selects it not."""
    model = sparse("llama", FLOOR.replace(layers=None))
    hidden = torch.randn(1, LENGTH, 64)
    embeddings = model.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    with torch.no_grad(), pytest.warns(TSAWarning, match="LAYER_COUNT_UNKNOWN"):
        alone, _ = model.model.layers[2].self_attn(hidden, embeddings, None)
        plain, _ = tiny("llama").model.layers[2].self_attn(hidden, embeddings, None)
    assert difference(alone, plain) < ATOL
    with no_warning():
        logits(model, tokens(1, LENGTH))
    assert reasons(model)[2] is Reason.SPARSE, "and in the model it has one"


def test_short_prompts_are_dense():
    model = sparse("llama", FLOOR.replace(min_length=40))
    with pytest.warns(TSAWarning, match=r"TOO_SHORT.*length 39 < 40"):
        found = logits(model, tokens(1, 39))
    assert difference(found, logits(tiny("llama"), tokens(1, 39))) < ATOL
    with no_warning():
        logits(model, tokens(1, 40))
    assert reasons(model)[0] is Reason.SPARSE


@pytest.mark.parametrize("change", [lambda layers: layers[:2], lambda layers: torch.nn.ModuleList(reversed(layers))])
def test_layers_that_are_cut_off_or_change_places_are_looked_up_again(change):
    used, fresh, ids = *(sparse("llama", FLOOR.replace(layers=layers)) for layers in (None, None)), tokens(2, LENGTH)
    logits(used, ids)
    for model in (used, fresh):
        model.model.layers = change(model.model.layers)
    assert difference(logits(used, ids, use_cache=False), logits(fresh, ids, use_cache=False)) == 0
    assert rows_of(attention.report(used)) == rows_of(attention.report(fresh))
    assert Reason.SPARSE in reasons(used)


def test_without_a_prefill_there_are_no_rows():
    assert len(attention.report(tiny("llama"))) == 0


def test_the_report_is_of_the_prefill_when_decoding_is_assisted():
    model = sparse("llama", pad_token_id=0, eos_token_id=None, bos_token_id=None)
    ids = tokens(1, 12).repeat(1, 4)  # what comes next stands in the prompt
    model.generate(ids, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=20)
    assert reasons(model) == [Reason.SPARSE, Reason.LAYER_NOT_SELECTED, Reason.SPARSE]


def test_a_report_is_of_the_implementation_that_a_model_has():
    model, ids = sparse("llama"), tokens(2, LENGTH)
    logits(model, ids)
    assert len(attention.report(model)) == 3
    model.set_attn_implementation("sdpa")
    assert len(attention.report(model)) == 0
