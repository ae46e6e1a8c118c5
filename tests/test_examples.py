"""Each example runs, and shows what it says."""

from pathlib import Path
from types import ModuleType

import pytest

from tsa_compile import Decision
from tsa_compile.kernels import registry

from .support import script

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fresh")
FOLDER = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    return script(FOLDER / f"{name}.py")


def test_every_example_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"quickstart", "custom_kernel", "write_a_pass"}


@pytest.mark.exhaustive
def test_quickstart_compares_exact_and_sparse_with_the_plain_model(monkeypatch):
    quickstart = load("quickstart")
    monkeypatch.setattr(quickstart, "ON_GPU", quickstart.ON_CPU)  # the small size, on a GPU machine too
    arguments = ["--length", "512", "--layers", "2", "--compiler", "eager"]
    plain, stock, exact, ratio, coverage = quickstart.main(arguments)
    assert quickstart.difference(stock.logits, plain.logits) < 1e-5
    assert quickstart.difference(exact.logits, plain.logits) < 1e-5
    assert exact.kept is None and exact.report.sparse == 0 and exact.report.unchanged == 0
    assert ratio.kept == pytest.approx((144 + 32) / 512)  # ceil(0.3 * 480) candidates and the window
    for sparse in (ratio, coverage):
        assert 0 < sparse.kept < 1
        assert [row.decision for row in sparse.report] == [Decision.DENSE_PADDED, Decision.SPARSE]
        assert quickstart.difference(sparse.logits, plain.logits) > 1e-4


@pytest.mark.slow
def test_custom_kernel_computes_what_the_built_in_one_does():
    example = load("custom_kernel")
    try:
        assert example.main() < 1e-5
    finally:
        registry.unregister("tiled")


@pytest.mark.slow
def test_write_a_pass_understands_the_mask_and_halves_the_selections():
    understood, (before, after) = load("write_a_pass").main()
    assert understood
    assert before == {"score": 8, "select": 8, "compress": 8}
    assert after == {"score": 4, "select": 4, "compress": 8}
