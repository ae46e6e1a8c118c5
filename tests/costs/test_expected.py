"""The expected times of a report's rows."""

import pytest

from tsa_compile import Decision, Reason, TSAConfig
from tsa_compile.costs.expected import with_expectations
from tsa_compile.report import CallRow, RewriteReport


def row(queries, keys, **changes):
    values = dict(
        index=0, layer="layers.0.attn", layer_index=0, query=(1, 8, queries, 256), key=(1, 4, keys, 256),
        value=(1, 4, keys, 256), dtype="bfloat16", form="sdpa", mask="causal", decision=Decision.DENSE,
        reason=Reason.LAYER_NOT_SELECTED, kernel="cudnn",
    )  # fmt: skip
    return CallRow(**(values | changes))


def window(queries, keys, tokens):
    return row(queries, keys, decision=Decision.WINDOW, reason=Reason.SLIDING_WINDOW, window=tokens)


def expected(*rows):
    return [row.expected_ms for row in with_expectations(RewriteReport(rows), TSAConfig(), "h200")]


@pytest.mark.parametrize(("queries", "keys"), [(32768, 32768), (8192, 32768)])
def test_a_window_takes_its_tokens_whatever_precedes_them(queries, keys):
    dense, short, long = expected(row(queries, keys), window(queries, keys, 1024), window(queries, keys, 4096))
    assert 0 < short < long / 2 < dense / 2
    (alone,) = expected(window(queries, queries, 1024))
    assert short == pytest.approx(alone, rel=0.1)


def test_a_window_of_unknown_length_has_none():
    assert expected(window("s0", "s0", 1024)) == [None]
