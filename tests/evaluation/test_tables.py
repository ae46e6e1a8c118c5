"""What a reader of a study sees: comparisons where dense can do a task, and a remark where it cannot."""

import json
import math
from dataclasses import replace

import pytest

from tsa_compile.config import Coverage, TSAConfig
from tsa_compile.evaluation import Cell, Setting, Study
from tsa_compile.evaluation.tables import markdown, notes, remark, rows, summary, text

pytest.importorskip("statsmodels")
LONG = "coverage:0.005,floor=none,layers=2-29,min_tokens=1024,select=random"


def cell(task, setting, right, nll, length=4096, kept=0.5):
    count = len(nll)
    kl = (0.0 if setting == "dense" else 0.25,) * count
    return Cell(task, length, setting, right, nll, kl, (kept,) * count, ("",) * count)


@pytest.fixture
def study():
    right = [True] * 9 + [False]
    worse = [False] * 6 + [True] * 3 + [True]
    return Study(
        {},
        cells=(
            cell("needle", "dense", tuple(right), (0.1,) * 10, kept=1.0),
            cell("needle", LONG, tuple(worse), tuple(0.1 + 0.1 * place for place in range(10))),
            cell("variables", "dense", (False,) * 10, (3.0,) * 10, kept=1.0),
            cell("variables", LONG, (True,) * 10, (2.0,) * 10),
            cell("copy", "dense", (), (0.5,) * 10, kept=1.0),
            cell("copy", LONG, (), (0.75,) * 10),
        ),
    )


def test_a_setting_is_compared_with_dense_on_the_same_samples(study):
    dense, other = rows(study, "needle", 4096)
    assert (dense.setting, dense.accuracy.right, dense.paired, dense.kl) == ("dense", 9, None, None)
    assert (other.accuracy.right, other.paired.lost, other.paired.won, other.samples) == (4, 6, 1, 10)
    assert other.paired.p_value == pytest.approx(2 * (1 + 7) / 2**7)
    assert other.difference.value == pytest.approx(0.45) and other.difference.low < 0.45 < other.difference.high
    assert (other.kl, other.kept, dense.kept) == (0.25, 0.5, 1.0)


def shortened(study, count):
    """The study where the setting ran fewer samples of one task."""
    short = study.find("needle", 4096, LONG)
    fields = ("right", "nll", "kl", "kept", "output")
    return study.with_cell(Cell("needle", 4096, LONG, **{name: getattr(short, name)[:count] for name in fields}))


def test_fewer_samples_than_dense_has_are_compared_with_these(study):
    row = rows(shortened(study, 3), "needle", 4096)[1]
    assert (row.samples, row.paired.lost, row.paired.won) == (3, 3, 0)


def test_both_tables_say_how_many_samples_those_were(study):
    assert "**4,096 tokens**, 10 samples of each task\n" in markdown(study)
    study = shortened(study, 3)
    lines = text(study).splitlines()
    start = lines.index("needle, 4,096 tokens, 10 samples")
    end = lines.index("copy, 4,096 tokens, 10 samples")
    assert "".join(line.split("  ")[0] for line in lines[start + 4 : end]).count("n 3") == 1
    assert "n 10" not in "".join(lines) and "n 3" not in "".join(lines[end:]) and max(map(len, lines)) <= 80
    assert "| 0%, 0.200 (+0.100), n 3 |" in markdown(study) and "10 samples of each task, or n\n" in markdown(study)


@pytest.mark.parametrize(("right", "says"), [(0, True), (1, True), (2, False)])
def test_a_task_that_dense_cannot_do_says_nothing(study, right, says):
    found = (True,) * right + (False,) * (20 - right)
    study = study.with_cell(cell("variables", "dense", found, (3.0,) * 20))
    said = f"dense itself finds {right} of 20; this task says nothing about this model at this length"
    assert remark(study, "variables", 4096) == (said if says else None)
    assert (said in " ".join(text(study).split())) == (said in markdown(study)) == says
    assert bool(rows(study, "variables", 4096)) != says


def test_likelihoods_need_no_right_answers(study):
    assert remark(study, "copy", 4096) is None
    dense, other = rows(study, "copy", 4096)
    assert dense.accuracy is other.accuracy is other.paired is None and other.difference.value == 0.25


def test_tables_fit_a_terminal(study):
    lines = text(study).splitlines()
    assert max(map(len, lines)) <= 80 and "needle, 4,096 tokens, 10 samples" in lines
    names = "".join(line.split()[0] for line in lines if line)
    assert names.count(LONG) == 2, "a long name is folded, not cut"
    copied = lines[lines.index("copy, 4,096 tokens, 10 samples") + 1]
    assert copied.split() == ["setting", "kept", "nll", "-", "dense", "[95%]", "KL"], "nothing is right or wrong there"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "29% and not 15%. To measure the ratio itself, choose min_tokens=0"),
        ({"min_tokens": 4000}, "all of them, so this is dense attention"),
        ({"min_tokens": 0}, ""),
        ({"budget": Coverage(0.1)}, ""),
        ({"budget": Coverage(0.1), "min_tokens": 4000}, "all of them"),
        ({"min_tokens": 4000, "layers": []}, ""),
        ({"layers": {2: 0.5}}, ""),
        ({"layers": {2: 0.5, 3: 0.1, 4: 0.2, 5: 0.1}}, "29% and not 10% or 20%. To measure the ratio itself"),
        ({"layers": {2: Coverage(0.1)}}, ""),
    ],
)
def test_it_is_said_where_more_is_kept_than_the_budget_says(study, changes, said):
    config = TSAConfig(**{"min_tokens": 1050, **changes})
    study = replace(study, settings={LONG: Setting(LONG, config).to_dict()})
    (note,) = notes(study) or [""]
    assert (said in note) and (note == "") == (said == "")
    assert ("note:" in text(study)) == bool(said)


def test_markdown_has_a_table_for_each_length(study):
    more = study.with_cell(cell("needle", "dense", (True,) * 4, (0.2,) * 4, length=512, kept=1.0))
    found = markdown(more)
    assert found.index("**512 tokens**") < found.index("**4,096 tokens**")
    assert f"| {LONG} | 50% | 40%, 0.550 (+0.450) |  | 0.750 (+0.250) |" in found
    assert "- variables: dense itself finds 0 of 10" in found


def test_a_star_marks_what_differs(study):
    worse = cell("needle", LONG, (False,) * 10, (1.0,) * 10)
    assert "| 0%*, 1.000 (+0.900) |" in markdown(study.with_cell(worse))


def test_the_summary_is_plain(study):
    found = summary(study)
    assert [(row["task"], row.get("setting")) for row in found] == [
        ("needle", "dense"), ("needle", LONG), ("variables", None), ("copy", "dense"), ("copy", LONG),
    ]  # fmt: skip
    assert found[1]["paired"]["lost"] == 6 and "remark" in found[2]


def test_the_summary_is_json_where_there_is_no_number(study):
    """One sample has no interval, and an answer that is NaN no likelihood."""
    found = summary(shortened(study, 1).with_cell(cell("copy", LONG, (), (math.nan,) * 10)))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found[1]["difference"] == {"value": pytest.approx(0.0), "low": None, "high": None}
    assert found[1]["kl"] == 0.25 and found[-1]["nll"] is None is found[-1]["difference"]["value"]
