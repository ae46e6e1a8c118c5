"""A reading that is wrong is found by computing it; what is right, or cannot be run alone, is left alone."""

import logging

import pytest
import torch
import torch.nn.functional as F

from tsa_compile import Decision, Reason, RewriteError, TSAConfig, TSAWarning, tsa_backend
from tsa_compile.passes.masks import infer
from tsa_compile.passes.masks.info import MaskInfo
from tsa_compile.passes.masks.symbolic import RULES
from tsa_compile.report import reports

from ..support import heads, mixed_padding, tiny, tokens

aten = torch.ops.aten
EXACT = TSAConfig(layers=[], compiler="eager")


def attention(q, k, v, pad):
    i = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(i <= i[:, None]) & (pad != 0)[:, None, None, :])


def written_out(q, k, v, pad):
    i = torch.arange(q.shape[2])
    scores = (q @ k.mT * 0.3).masked_fill(~((i <= i[:, None]) & (pad != 0)[:, None, None, :]), torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


def put_together(q, k, v, pad):
    """A key that is written into fresh memory through views of it, as DeepSeek's latent attention does."""
    key = k.new_empty(k.shape)
    for own, part in zip(key.split(8, -1), (2.0 * k).split(8, -1), strict=True):
        own.copy_(part)
    return attention(q, key, v, pad)


def run(function, *, length=20, config=EXACT, any_length=False, **options):
    torch._dynamo.reset()
    inputs = (*heads(kv_heads=4, length=length), torch.ones(2, length, dtype=torch.long))
    for tensor in inputs if any_length else ():
        torch._dynamo.mark_dynamic(tensor, 2 if tensor.dim() == 4 else 1)
    with torch.no_grad():
        torch.compile(function, backend=tsa_backend, options={"config": config}, **options)(*inputs)
    (row,) = reports()[-1].rows
    return row


def skipped(caplog):
    return [record for record in caplog.records if record.name == "tsa_compile.passes.validate"]


@pytest.fixture
def wrong_comparison(monkeypatch):
    """`x != y` read as `x == y`."""
    monkeypatch.setitem(RULES, aten.ne.Scalar, RULES[aten.eq.Scalar])


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("function", "length"),
    [(attention, 20), (attention, 200), (written_out, 20), (written_out, 200), (put_together, 20)],
)  # at length 200 a short one is run
class TestWrongReadings:
    @pytest.mark.parametrize("dynamic", [None, True])
    def test_a_wrong_rule_is_found(self, function, length, dynamic, wrong_comparison):
        with pytest.warns(TSAWarning, match="validation failed"):
            row = run(function, length=length, dynamic=dynamic)
        assert (row.decision, row.reason) == (Decision.UNCHANGED, Reason.PASS_FAILED)
        assert "differ" in row.detail

    def test_a_lost_padding_is_found(self, function, length, monkeypatch):
        monkeypatch.setattr(MaskInfo, "padding", property(lambda self: None, lambda self, value: None), raising=False)
        with pytest.warns(TSAWarning, match="validation failed"):
            assert run(function, length=length).reason is Reason.PASS_FAILED

    def test_strict(self, function, length, wrong_comparison):
        with pytest.raises(Exception, match="validation failed") as raised:
            run(function, length=length, config=EXACT.replace(strict=True))
        assert isinstance(raised.value.__cause__ or raised.value, RewriteError) or "RewriteError" in str(raised.value)

    def test_it_can_be_switched_off(self, function, length, wrong_comparison):
        assert run(function, length=length, config=EXACT.replace(skip_passes=["Validate"])).decision is Decision.DENSE_PADDED

    def test_right_readings_pass(self, function, length, caplog):
        with caplog.at_level(logging.DEBUG, "tsa_compile.passes.validate"):
            assert run(function, length=length).decision is Decision.DENSE_PADDED
        assert not skipped(caplog)


def windowed(q, k, v, pad):
    q, k, v = torch.cat([q, k, v], -1).chunk(3, -1)  # of one length for certain
    i = torch.arange(q.shape[2])
    seen = (i <= i[:, None]) & (i > i[:, None] - 100)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen & (pad != 0)[:, None, None, :])


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("any_length", [False, True])
class TestWindows:
    """A short prompt shows a window only if that is made short too."""

    def test_right_readings_pass(self, any_length, caplog):
        with caplog.at_level(logging.DEBUG, "tsa_compile.passes.validate"):
            assert run(windowed, length=200, any_length=any_length).decision is Decision.WINDOW
        assert not skipped(caplog)

    def test_a_mask_that_is_written_to(self, any_length, caplog):
        def written(q, k, v, pad):
            pad.numpy()[:, :5] = 0
            return windowed(q, k, v, pad)

        with caplog.at_level(logging.DEBUG, "tsa_compile.passes.validate"):
            assert run(written, length=200, any_length=any_length).decision is Decision.WINDOW

    def test_a_wrong_width_is_found(self, any_length, monkeypatch):
        read = infer._Reading.window
        monkeypatch.setattr(infer._Reading, "window", lambda self, kind: read(self, kind) + 1)
        with pytest.warns(TSAWarning, match="validation failed"):
            assert run(windowed, length=200, any_length=any_length).reason is Reason.PASS_FAILED


def behind_a_cache(q, past, k, v, pad):
    """A chunk: key and value are the cache's and the chunk's own, and the padding mask is longer than both."""
    k, v = torch.cat([past, k], dim=2), torch.cat([past, v], dim=2)
    i = torch.arange(k.shape[2])
    mask = (i <= (torch.arange(q.shape[2]) + past.shape[2])[:, None]) & (pad[:, : k.shape[2]] != 0)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("length, past", [(40, 40), (200, 200), (200, 300), (40, 300)])
@pytest.mark.parametrize("dynamic", [None, True])
class TestQueriesBehindACache:
    def run(self, length, past, dynamic):
        torch._dynamo.reset()
        query, key, value = heads(kv_heads=4, length=length)
        cached = heads(kv_heads=4, length=past)[1]
        pad = torch.ones(2, length + past + 3, dtype=torch.long)
        compiled = torch.compile(behind_a_cache, backend=tsa_backend, options={"config": EXACT}, dynamic=dynamic)
        with torch.no_grad():
            compiled(query, cached, key, value, pad)
        (row,) = reports()[-1].rows
        return row

    def test_right_readings_pass(self, length, past, dynamic, caplog):
        with caplog.at_level(logging.DEBUG, "tsa_compile.passes.validate"):
            assert self.run(length, past, dynamic).decision is Decision.DENSE_PADDED
        assert not skipped(caplog)

    def test_a_wrong_rule_is_found(self, length, past, dynamic, wrong_comparison):
        with pytest.warns(TSAWarning, match="validation failed"):
            assert self.run(length, past, dynamic).reason is Reason.PASS_FAILED


@pytest.mark.usefixtures("fresh")
def test_a_wrong_scale_is_found(monkeypatch):
    from tsa_compile.passes import eager

    monkeypatch.setitem(eager._FACTORS, aten.mul.Tensor, "div")
    with pytest.warns(TSAWarning, match="validation failed"):
        assert run(written_out).reason is Reason.PASS_FAILED


@pytest.mark.usefixtures("fresh")
def test_written_operands_are_computed_with_what_writes_them(caplog):
    def function(q, k, v, pad):
        q, v = q.clone(), v.clone()
        q.mul_(0.5)
        v[:, :, 3] = 0
        return attention(q, k, v, pad)

    with caplog.at_level(logging.DEBUG, "tsa_compile.passes.validate"):
        assert run(function).decision is Decision.DENSE_PADDED
    assert not skipped(caplog)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("length", [20, 80])
def test_calls_of_written_operands_are_checked_at_their_length(monkeypatch, length):
    from tsa_compile.passes import eager

    def function(q, k, v, pad):
        q = q.clone()
        q.mul_(0.5)
        return written_out(q, k, v, pad)

    monkeypatch.setitem(eager._FACTORS, aten.mul.Tensor, "div")
    with pytest.warns(TSAWarning, match="validation failed"):
        assert run(function, length=length).reason is Reason.PASS_FAILED


@pytest.mark.usefixtures("fresh")
def test_the_users_random_numbers_go_on(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.get_rng_state()
    assert run(attention).decision is Decision.DENSE_PADDED
    assert seeded == [] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("fresh")
def test_queries_are_the_last_of_the_keys_whatever_their_symbols():
    def function(q, k, v):
        rows = torch.ones(k.shape[2], k.shape[2]).tril().bool()[k.shape[2] - q.shape[2] :]
        return F.scaled_dot_product_attention(q, k, v, rows)

    compiled = torch.compile(function, backend=tsa_backend, dynamic=True, options={"config": EXACT})
    with torch.no_grad():
        compiled(heads(length=20)[0], *heads(kv_heads=4, length=40)[1:])
    assert reports()[-1].rows[0].decision is Decision.DENSE


@pytest.mark.usefixtures("fresh")
def test_layers_that_are_alike_are_computed_once(monkeypatch):
    from tsa_compile.passes.validate import _TRIALS, Case

    computed = []
    difference = Case.difference
    monkeypatch.setattr(Case, "difference", lambda self, trial: computed.append(trial) or difference(self, trial))
    model = tiny("llama", num_hidden_layers=6)
    with torch.no_grad():
        torch.compile(model, backend=tsa_backend, options={"config": EXACT})(tokens(3, 40), attention_mask=mixed_padding(40))
    assert 0 < len(computed) <= 2 * _TRIALS
