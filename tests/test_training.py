"""Where a gradient could be needed nothing is rewritten, and training goes on as before."""

import pytest
import torch

from tsa_compile import Decision, KeepRatio, Reason, TSAConfig, TSAWarning, reports

from .support import Attention, difference, exhaustive_but, heads, mixed_padding, tiny, tokens

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse"),
]

CONFIG = TSAConfig(budget=KeepRatio(0.5), window=4, min_tokens=4, layers=[0, 2], compiler="aot_eager")
ATOL = 1e-5


def compiled(model, **changes):
    return torch.compile(model, backend="tsa", options={"config": CONFIG, **changes})


@pytest.mark.parametrize("form", exhaustive_but(["sdpa", "eager"], "sdpa"))
def test_gradients_equal_the_plain_models(form):
    model, plain = tiny("llama", form).train(), tiny("llama", form).train()
    inputs = dict(input_ids=tokens(3, 40), attention_mask=mixed_padding(40), labels=tokens(3, 40))
    loss, wanted = compiled(model)(**inputs).loss, plain(**inputs).loss
    loss.backward()
    wanted.backward()
    assert abs(float(loss - wanted)) < ATOL
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert difference(found.grad, expected.grad) < ATOL
    assert {(row.decision, row.reason) for report in reports() for row in report} == {
        (Decision.UNCHANGED, Reason.NEEDS_GRAD)
    }


class Weighted(torch.nn.Module):
    """Attention whose query and output have a factor to learn."""

    def __init__(self):
        super().__init__()
        self.attention, self.factor = Attention(), torch.nn.Parameter(torch.ones(()))

    def forward(self, query, key, value):
        return self.attention(query * self.factor, key, value) * self.factor


@pytest.mark.slow
def test_a_training_step_under_inductor():
    model, plain = Weighted(), Weighted()
    fast = compiled(model, compiler="inductor", layers=[0])
    losses = []
    for one in (fast, plain):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss = one(*heads()).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < ATOL < losses[0]
    assert model.factor != 1 and reports()[-1].rows[0].reason is Reason.NEEDS_GRAD


def test_the_warning_says_that_gradients_are_the_reason():
    with pytest.warns(TSAWarning, match="NEEDS_GRAD"):
        compiled(tiny("llama"))(tokens(2, 40))


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_a_gradient_through_one_operand_is_enough(which):
    inputs = dict(zip(("query", "key", "value"), heads(), strict=True))
    inputs[which].requires_grad_()
    out = compiled(Attention(), layers=[0])(**inputs)
    assert difference(out, Attention()(**inputs)) < ATOL
    out.sum().backward()
    assert inputs[which].grad is not None
    assert reports()[-1].rows[0].reason is Reason.NEEDS_GRAD


@pytest.mark.parametrize("stop", [torch.Tensor.detach, torch.no_grad()(torch.clone)])
def test_weights_without_a_gradient_leave_the_call_as_it_is(stop):
    """The output needs no gradient then, and what took its place would have one to compute, as its query has."""

    def attention(query, key, value):
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        scores = scores + torch.full((40, 40), float("-inf")).triu(1)
        return stop(scores.softmax(-1)) @ value

    query, key, value = heads(kv_heads=4)
    out = compiled(attention, layers=["*"], min_length=1)(query.requires_grad_(), key, value)
    assert not out.requires_grad
    assert reports()[-1].rows[0].reason is Reason.NEEDS_GRAD


@pytest.mark.parametrize("mode", exhaustive_but([torch.no_grad, torch.inference_mode], torch.no_grad))
def test_without_gradients_trainable_parameters_do_not_matter(mode):
    model = tiny("llama")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with mode():
        compiled(model)(tokens(2, 40))
    assert reports()[-1].sparse == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inductor_without_gradients(mode):
    model = tiny("llama", num_hidden_layers=1)
    with mode():
        logits = compiled(model, compiler="inductor", layers=[0], budget=KeepRatio(1.0))(tokens(2, 40)).logits
        assert difference(logits, model(tokens(2, 40)).logits) < ATOL
    assert reports()[-1].sparse == 1


def test_frozen_parameters_need_no_gradient():
    """Without no_grad, but nothing to differentiate: rewritten."""
    model = tiny("llama").requires_grad_(False)
    compiled(model)(tokens(2, 40))
    assert reports()[-1].sparse == 2


@pytest.mark.exhaustive
def test_the_mode_may_change_from_call_to_call():
    """One compiled model, evaluated and trained in turns: Dynamo's guards keep the graphs apart."""
    model, plain = tiny("llama"), tiny("llama")
    fast = compiled(model, layers=[])
    ids = tokens(2, 40)
    for grad in (False, True, False, True):
        with torch.set_grad_enabled(grad):
            logits = fast(ids).logits
        assert logits.requires_grad == grad
        assert difference(logits, plain(ids).logits) < ATOL
    assert [report.dense for report in reports()] == [3, 0]


def test_dropout_stays_the_models():
    """Dropout under no_grad (Monte Carlo dropout) keeps its call."""
    inputs = heads()
    with torch.no_grad():
        torch.manual_seed(1)
        out = compiled(Attention(dropout_p=0.3), layers=[0], compiler="eager")(*inputs)
        torch.manual_seed(1)
        assert difference(out, Attention(dropout_p=0.3)(*inputs)) < ATOL
    assert reports()[-1].rows[0].reason is Reason.DROPOUT
