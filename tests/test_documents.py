"""The README and the pages in docs are true: their code runs, their tables are those of the code and of the last runs."""

import contextlib
import io
import itertools
import re
import tomllib
from pathlib import Path

import pytest
import torch

import tsa_compile.backend
from tsa_compile import Floor, KeepRatio, Reason, TSAConfig, reports
from tsa_compile.config import OPTIONS
from tsa_compile.kernels import registry

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fresh")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
}
BLOCKS = {page: re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for page, text in PAGES.items()}

# Of each page that runs: what holds after the block in which the first text stands.
CLAIMS = {
    "README.md": [
        ("model.generate(**prompt", "reports()[0].sparse == 2 and len(reports()[0].rows) == 4 and len(reports()) == 1"),
        ("explain(model, **prompt", "isinstance(tokens, torch.Tensor) and tokens.shape[1] == prompt.input_ids.shape[1] + 4"),
    ],
    "docs/guide.md": [
        ("print(reports()[-1])", "reports()[-1].sparse == 2"),
        ("TSAConfig.from_json", "again == config"),
        ("print(report.sparse", "report.sparse == report.dense_padded == 2"),
        ("model.generate", "tokens.shape[1] == ids.shape[1] + 2 and reports()[-1].sparse == 2"),
        ("delta=0.5", "len(found.sparse_layers) == 2"),
        ("preset(", "preset('llama-3.1-8b-instruct').layers == tuple(range(15, 31))"),
        ('objective="loss"', "found.kl <= 0.01"),
    ],
    "docs/report.md": [("explain(", "explain(model, input_ids=ids, config=config).sparse == 2")],
    "docs/exports.md": [
        (
            "export_program(",
            "len(program.range_constraints) == 1 and 'torch.ops.tsa.select' in str(program.graph_module.code)",
        )
    ],
    "docs/kernels.md": [
        ('"kernel": "mine"', "reports()[-1].sparse_calls[0].kernel == 'mine'"),
        ('"dense_kernel": "fourth"', "{row.kernel for row in reports()[-1]} == {'fourth'}"),
    ],
}
SHOWN = {"docs/report.md": 1}  # how often what a block prints stands behind it


def lines(text):
    return [line.rstrip() for line in text.strip().splitlines()]


def table(name):
    """The lines between a table's markers, and the one page where they stand."""
    marked = rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->"
    found = [(page, text) for page in PAGES for text in re.findall(marked, PAGES[page], re.DOTALL)]
    assert len(found) == 1, found
    return lines(found[0][1])


@pytest.fixture
def without_inductor(monkeypatch):
    """Compiling takes Inductor minutes on two cores; what is rewritten and computed is the same without it."""
    lookup = tsa_compile.backend.lookup_backend
    monkeypatch.setattr(tsa_compile.backend, "lookup_backend", lambda name: lookup("eager"))


@pytest.mark.slow
@pytest.mark.parametrize("page", CLAIMS)
def test_python_blocks_run_in_order_and_print_what_the_page_shows(page, without_inductor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace, held, shown = {}, [], 0
    blocks = [*BLOCKS[page], ("", "")]
    try:
        for position, ((language, block), (following, text)) in enumerate(itertools.pairwise(blocks)):
            if language != "python":
                continue
            torch._dynamo.reset()
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(block, f"{page}, block {position}", "exec"), namespace)
            if following == "text":
                assert lines(output.getvalue()) == lines(text), "the page's example is out of date"
                shown += 1
            for mark, claim in CLAIMS[page]:
                if mark in block:
                    assert eval(claim, {"torch": torch, "reports": reports, **namespace}), claim
                    held.append(claim)
    finally:
        for name in {"mine", "fourth"} & {*registry.names()}:
            registry.unregister(name)
    assert held == [claim for _, claim in CLAIMS[page]]
    assert shown == SHOWN.get(page, 0)


def test_every_page_with_code_runs():
    with_code = {page for page, blocks in BLOCKS.items() if any(language == "python" for language, _ in blocks)}
    assert with_code == {*CLAIMS, "docs/serving.md"}, "docs/serving.md has a test of its own, test_serving.py"


def commands(*pages):
    return [line for page in pages for language, block in BLOCKS[page] if language == "console" for line in lines(block)]


def test_the_readmes_commands_are_those_of_tox_and_ci():
    assert {"python -m pip install tox && tox -e demo", "python -m pip install tox && tox"} < {*commands("README.md")}
    assert "-m pip install tox && tox" in (ROOT / ".ci" / "run").read_text()
    assert "commands = python examples/quickstart.py" in (ROOT / "tox.ini").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"dev", "transformers"} <= set(project["optional-dependencies"])
    for extras in re.findall(r"'\.\[(\w+)\]'", PAGES["README.md"]):
        assert extras in project["optional-dependencies"]


def test_commands_and_their_options_exist():
    import typer

    from tsa_compile import cli

    known = typer.main.get_command(cli.app).commands
    calls = [line for line in commands(*PAGES) if line.startswith("tsa-compile ")]
    assert {line.split()[1] for line in calls} == {*known}
    for line in calls:
        options = {name for parameter in known[line.split()[1]].params for name in parameter.opts}
        assert {*re.findall(r"(?<= )--[\w-]+", line)} <= options, line


def test_reason_table_is_complete_and_in_the_reports_words():
    for reason in Reason:
        row = f"| `{reason}` | {reason.explanation} | {reason.remedy or ''}".rstrip()
        assert row in PAGES["docs/report.md"], reason


def test_reason_codes_that_the_readme_explains_exist():
    codes = re.findall(r"^\| `([A-Z_]+)` \|", PAGES["README.md"], re.MULTILINE)
    assert len(codes) == 5 and {*codes} < {reason.name for reason in Reason}


def test_option_table_names_every_option_and_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", PAGES["docs/options.md"], re.MULTILINE))
    defaults = {name: eval(text, {"Floor": Floor, "KeepRatio": KeepRatio}) for name, text in rows.items()}
    assert defaults == {name: getattr(TSAConfig(), name) for name in OPTIONS}


@pytest.mark.parametrize(
    "name, file",
    [
        ("prefill", "prefill-h100"),
        ("prefill-long", "prefill-long"),
        ("attention", "attention-h100"),
        ("export", "export"),
        ("sparse", "sparse"),
        ("accuracy", "pretrained"),
        ("accuracy-qwen", "pretrained_qwen"),
        ("windows", "windows"),
        ("wide-heads", "windows"),
        ("gemma", "windows"),
        ("gpt-oss", "windows"),
        ("chunks", "prefill-h200_chunks"),
        ("first-call", "first-call"),
        ("compile-time", "compile-time"),
        ("vllm", "vllm"),
        ("tensor-parallel", "tensor-parallel"),
        ("onnx", "onnx_files"),
    ],
)
def test_tables_are_those_of_the_last_runs(name, file):
    results = (RESULTS / f"{file}.md").read_text()
    assert all(line in results for line in table(name))


# The README's rows: where the times stand in prefill-h100.md, and where the points of both models stand in STUDIES.
FRONT = {
    "eager PyTorch": ("eager", "reference"),
    "torch.compile": ("torch.compile", "as eager"),
    "`tsa`, exact": ('backend="tsa", exact', "as eager"),
    "`tsa`, keep 0.15 in the upper half (default)": (
        'backend="tsa", keep 0.15 in the upper half',
        "floor, keep 0.15, upper half",
    ),
    "`tsa`, keep 0.15 in the last two thirds": (
        'backend="tsa", keep 0.15 in the last 21 layers',
        "floor, keep 0.15, upper two thirds",
    ),
    "the same, and `a_shape` in the other layers": (
        'backend="tsa", keep 0.15 in the last 21 layers, a_shape in the others',
        "floor, keep 0.15, upper two thirds, a_shape in the others",
    ),
}


STUDIES = ("pretrained.md", "pretrained_qwen.md")


def cells(line):
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def first_row(file, label):
    """The cells of a result's first row with that label, by the heading above each."""
    rows = [cells(line) for line in lines((RESULTS / file).read_text()) if line.startswith("|")]
    position = next(index for index, row in enumerate(rows) if row[0] == label)
    heading = next(rows[index - 1] for index in range(position, 0, -1) if set("".join(rows[index])) <= set("-| "))
    return dict(zip(heading, rows[position], strict=True))


def marked(change):
    """+1.0 for +1.0 (p 0.74), and +1.0* where McNemar's test rejects equality."""
    points, _, probability = change.partition(" (p ")
    return points + "*" * (probability != "" and float(probability.rstrip(")")) < 0.05)


def test_the_readmes_table_joins_the_times_and_the_accuracy_of_the_last_runs():
    heading, _, *rows = map(cells, table("front"))
    assert heading == ["setting", "8K tokens", "32K", "128K", "needle", "needle_keys", "question_first", "KL"]
    assert [row[0] for row in rows] == [*FRONT]
    for label, *found in rows:
        timed, judged = FRONT[label]
        times = first_row("prefill-h100.md", timed)
        # What follows the bracket is the memory.
        expected = [re.sub(r"\), .*", ")", times[length]) for length in ("8K", "32K", "128K")]
        points = [] if judged in ("reference", "as eager") else [first_row(study, judged) for study in STUDIES]
        expected += [" / ".join(marked(study[task]) for study in points) or judged for task in heading[4:]]
        assert found == expected, label


def slugs(text):
    """The anchors of a page's headings, as GitHub and GitLab make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", PAGES[page]):
        if target.startswith("http"):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in slugs(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_every_page_stands_in_the_contents():
    listed = re.findall(r"^- \[.*?\]\((\w[\w-]*\.md)\)", PAGES["docs/README.md"], re.MULTILINE)
    assert {*listed} == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
