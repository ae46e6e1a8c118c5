"""Reports: counts, JSON, the history, and what the table says (its cells, never its exact layout)."""

import dataclasses
import json
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsa_compile.errors import ConfigError
from tsa_compile.reasons import EXPLANATIONS, REMEDIES, Decision, Reason
from tsa_compile.report import MAX_REPORTS, CallRow, RewriteReport, clear_reports, record, reports


def row(index=0, **changes):
    values = dict(
        index=index, layer=f"model.layers.{index}.self_attn", layer_index=index, query=(1, 32, "s0", 128),
        key=(1, 8, "s0", 128), value=(1, 8, "s0", 128), dtype="bfloat16", form="sdpa", mask="causal",
        decision=Decision.DENSE, reason=Reason.LAYER_NOT_SELECTED, kernel="cudnn",
    )  # fmt: skip
    return CallRow(**(values | changes))


def sparse(index):
    return row(index, decision=Decision.SPARSE, reason=Reason.SPARSE)


def lines_with(report, text):
    return [line for line in str(report).splitlines() if text in line]


@pytest.fixture(autouse=True)
def own_history():
    before = reports()
    clear_reports()
    yield
    clear_reports()
    for report in before:
        record(report)


class TestReasons:
    def test_each_has_one_sentence(self):
        assert set(EXPLANATIONS) == set(Reason)
        for reason in Reason:
            assert reason.explanation.endswith(".") and reason.explanation.count(". ") == 0

    def test_remedies_are_optional(self):
        assert set(REMEDIES) < set(Reason)
        assert Reason.DROPOUT.remedy and Reason.SPARSE.remedy is None

    def test_said_with_what_was_found_and_what_to_do(self):
        assert Reason.DROPOUT.said("dropout 0.1").startswith("DROPOUT: The attention uses dropout. (dropout 0.1) Call")
        assert Reason.NOT_CAUSAL.said() == "NOT_CAUSAL: The attention is not causal."

    def test_codes_are_their_own_text(self):
        assert all(str(reason) == reason.name for reason in Reason)
        assert Decision("dense (padding)") is Decision.DENSE_PADDED


class TestCounts:
    report = RewriteReport(
        [
            sparse(3),
            sparse(4),
            row(0),
            row(1, decision=Decision.DENSE_PADDED),
            row(2, decision=Decision.UNCHANGED, reason=Reason.MASK_OPAQUE),
        ]
    )

    def test_by_decision(self):
        report = self.report
        assert (report.sparse, report.dense, report.dense_padded, report.unchanged) == (2, 1, 1, 1)
        assert [row.index for row in report.sparse_calls] == [3, 4]

    def test_as_a_sequence(self):
        assert len(self.report) == 5
        assert [row.index for row in self.report] == [3, 4, 0, 1, 2]

    def test_summary(self):
        assert self.report.summary.startswith("2 of 5 attention calls sparse, 1 dense with the mask removed, ")
        assert RewriteReport([sparse(i + 16) for i in range(16)] + [row(i) for i in range(16)]).summary == (
            "16 of 32 attention calls sparse, 16 dense with the mask removed"
        )
        assert RewriteReport([row()]).summary == "1 of 1 attention call dense with the mask removed"

    def test_an_empty_report_is_a_report(self):
        report = RewriteReport(())
        assert report and len(report) == 0 and list(report) == []
        assert str(report) == "no attention calls found"


def test_rows_normalise_shapes_and_codes():
    made = row(query=[1, torch.tensor(2), "s0", True], decision="sparse", reason="SPARSE")
    assert made.query == (1, "tensor(2)", "s0", "True")
    assert made.decision is Decision.SPARSE and made.reason is Reason.SPARSE


def test_rows_and_reports_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        row().layer = "x"
    with pytest.raises(dataclasses.FrozenInstanceError):
        RewriteReport(()).rows = ()


text = st.text(max_size=12)
shapes = st.lists(st.integers(0, 1 << 40) | text, max_size=5).map(tuple)
call_rows = st.builds(
    CallRow,
    index=st.integers(0), layer=text, layer_index=st.none() | st.integers(0, 99), query=shapes, key=shapes,
    value=shapes, dtype=text, form=text, mask=text, decision=st.sampled_from(Decision),
    reason=st.sampled_from(Reason), kernel=text, detail=text, expected_dense_ms=st.none() | st.floats(0, 1e9),
    expected_ms=st.none() | st.floats(0, 1e9),
)  # fmt: skip
any_reports = st.builds(
    RewriteReport,
    rows=st.lists(call_rows, max_size=6),
    config=st.dictionaries(text, st.none() | st.integers() | text | st.lists(st.integers())),
    notes=st.lists(text, max_size=3),
    expected=st.just({}) | st.fixed_dictionaries({"device": text, "break_even": st.none() | st.integers(1)}),
)


class TestJson:
    @given(any_reports)
    def test_round_trip(self, report):
        assert RewriteReport.from_json(report.to_json()) == report
        assert RewriteReport.from_json(report.to_dict()) == report

    @pytest.mark.parametrize(
        "text",
        [
            *("[", "[]", "{}", '{"rows": [{}]}', '{"rows": [], "config": null}', '{"rows": [], "expected": 3}', "[" * 10**5),
            '{"rows": [], "expected": {"break_even": "x"}}',
        ],
    )
    def test_what_is_no_report(self, text):
        with pytest.raises(ConfigError, match=r"pass what RewriteReport\.to_json wrote"):
            RewriteReport.from_json(text)

    def test_one_entry_per_call_and_plain_codes(self):
        values = json.loads(RewriteReport([sparse(i) for i in range(40)], config={"window": 3}).to_json())
        assert len(values["rows"]) == 40
        assert values["rows"][7]["decision"] == "sparse" and values["rows"][7]["query"] == [1, 32, "s0", 128]
        assert values["config"] == {"window": 3} and values["torch_version"] == torch.__version__


class TestTable:
    @given(any_reports)
    def test_any_report_prints(self, report):
        assert report.summary in str(report)

    def test_like_neighbours_share_a_row(self):
        report = RewriteReport([*(row(i) for i in range(16)), *(sparse(i) for i in range(16, 32))])
        (dense,) = lines_with(report, "model.layers.0..15.self_attn")
        assert "x16" in dense and "causal" in dense
        (compressed,) = lines_with(report, "model.layers.16..31.self_attn")
        assert "x16" in compressed and "SPARSE" in compressed

    def test_a_gap_between_layers_is_shown(self):
        assert lines_with(RewriteReport([row(0), row(1), row(4), row(6)]), "model.layers.0..1,4,6.self_attn")

    def test_two_calls_of_one_layer(self):
        (line,) = lines_with(RewriteReport([row(0), row(0)]), "model.layers.0.self_attn")
        assert "x2" in line

    @pytest.mark.parametrize(
        "change",
        [
            {"layer": "model.other.1.self_attn"},
            {"layer": "model.layers.1.cross_attn"},
            {"query": (1, 4, "s0", 128)},
            {"mask": "opaque"},
            {"kernel": "flash"},
            {"detail": "something"},
        ],
    )
    def test_unlike_neighbours_do_not(self, change):
        report = RewriteReport([row(0), row(1, **change)])
        assert len(lines_with(report, "x1")) == 2

    def test_the_layer_number_is_the_one_that_counts(self):
        rows = [row(i, layer=f"block2.layers.{i}.attn8") for i in (3, 4)]
        assert lines_with(RewriteReport(rows), "block2.layers.3..4.attn8")

    def test_names_without_a_number(self):
        assert lines_with(RewriteReport([row(0, layer="attn", layer_index=None)]), "attn")
        assert lines_with(RewriteReport([row(0, layer="", layer_index=None)]), "?")

    def test_nothing_is_cut(self):
        name = "a" * 300
        assert lines_with(RewriteReport([row(0, layer=name, layer_index=None, kernel="k" * 300)]), name)

    def test_brackets_are_text_not_markup(self):
        assert lines_with(RewriteReport([row(0, mask="[bold]causal")]), "[bold]causal")

    def test_one_legend_line_for_each_reason(self):
        report = RewriteReport([sparse(0), row(1), row(2), row(3, reason=Reason.DROPOUT)])
        (line,) = lines_with(report, Reason.LAYER_NOT_SELECTED.explanation)
        assert line.startswith("LAYER_NOT_SELECTED: ")
        (line,) = lines_with(report, Reason.DROPOUT.explanation)
        assert "model.eval()" in line
        assert not lines_with(report, Reason.SPARSE.explanation)

    def test_notes(self):
        assert lines_with(RewriteReport([row()], notes=["two graphs"]), "note: two graphs")

    def test_a_detail_of_several_lines_keeps_the_row_whole(self):
        (line,) = lines_with(RewriteReport([row(detail="first\nsecond")]), "first")
        assert "first second" in line


def timed(index, dense, now, **changes):
    return row(index, expected_dense_ms=dense, expected_ms=now, **changes)


class TestExpectations:
    report = RewriteReport(
        [timed(0, 250.0, 250.0), timed(1, 250.0, 62.5, reason=Reason.SPARSE), row(2, reason=Reason.MASK_OPAQUE)],
        expected={"device": "NVIDIA H200", "break_even": 5120},
    )

    def test_in_all(self):
        assert (self.report.expected_dense_ms, self.report.expected_ms) == (500, 312.5)
        assert RewriteReport([row()]).expected_ms is RewriteReport(()).expected_dense_ms is None

    def test_in_the_table(self):
        (line,) = lines_with(self.report, "model.layers.1.self_attn")
        assert "250" in line and "62.5 (4.00x)" in line
        (line,) = lines_with(self.report, "expected on NVIDIA H200")
        assert "2 calls" in line and "(1.60x)" in line and "5,120" in line

    def test_no_figures_no_columns(self):
        plain = RewriteReport([row(0), sparse(1)])
        assert "expected" not in str(plain) and "dense ms" not in str(plain)
        assert "expected" not in plain.to_json()

    def test_calls_without_figures_have_empty_cells(self):
        (line,) = lines_with(self.report, "model.layers.2.self_attn")
        assert line.endswith("cudnn")

    def test_never(self):
        never = RewriteReport([timed(0, 1.0, 1.0)], expected={"device": "d", "break_even": None})
        assert lines_with(never, "at no length")

    def test_unlike_figures_do_not_share_a_row(self):
        assert len(lines_with(RewriteReport([timed(0, 1.0, 1.0), timed(1, 2.0, 1.0)]), "x1")) == 2

    def test_details_stay_in_their_column(self):
        for rows in ([timed(0, 1.0, 1.0, detail="said")], [row(0, detail="said")]):
            header, line, *_ = str(RewriteReport(rows)).splitlines()
            assert header.index("detail") == line.index("said")


class TestHistory:
    def test_newest_last(self):
        record(RewriteReport([sparse(0)]))
        record(RewriteReport([sparse(1)]))
        assert [report.rows[0].index for report in reports()] == [0, 1]

    def test_a_copy(self):
        record(RewriteReport(()))
        reports().clear()
        assert len(reports()) == 1

    def test_bounded(self):
        for index in range(MAX_REPORTS + 10):
            record(RewriteReport([sparse(index)]))
        assert len(reports()) == MAX_REPORTS == 256
        assert reports()[-1].rows[0].index == MAX_REPORTS + 9

    def test_from_many_threads(self):
        def work():
            for _ in range(20):
                record(RewriteReport(()))
                reports()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(reports()) == 160

    def test_clear(self):
        record(RewriteReport(()))
        clear_reports()
        assert reports() == []


@pytest.mark.parametrize("width", [0, -3, "80", True])
def test_a_width_is_a_number_of_characters(width):
    with pytest.raises(ConfigError, match=r"width=.* is not allowed"):
        RewriteReport((), {}).narrow(width)
