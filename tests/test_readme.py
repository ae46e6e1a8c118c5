"""The README is true: its code runs, in order and in one namespace, and its tables name what exists."""

import contextlib
import io
import re
import tomllib
from pathlib import Path

import pytest
import torch

import tsa_compile.backend
from tsa_compile import Floor, KeepRatio, Reason, TSAConfig
from tsa_compile.config import OPTIONS
from tsa_compile.kernels import registry

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fresh")
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def small_llama(layers):
    """What the README calls `model`: so many layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts():
    """What it calls `ids` and `mask`: two prompts, of which the first is padded."""
    ids = torch.randint(1, 64, (2, 1400))
    mask = torch.ones_like(ids)
    mask[0, :200] = 0
    return {"ids": ids, "mask": mask}


# Blocks that name layers or count them; of what the others say, two layers show as much.
OF_SOME_LAYERS = re.compile(r"layers=|\"layers\"|layers\)|report\.sparse\b")


def lines(text):
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.fixture
def without_inductor(monkeypatch):
    """Compiling takes Inductor minutes on two cores; what is rewritten and computed is the same without it."""
    lookup = tsa_compile.backend.lookup_backend
    monkeypatch.setattr(tsa_compile.backend, "lookup_backend", lambda name: lookup("eager"))


@pytest.mark.slow
def test_python_blocks_run_and_print_what_the_readme_shows(without_inductor):
    models, namespace, shown = {size: small_llama(size) for size in (2, 18)}, prompts(), []
    try:
        for position, (language, block) in enumerate(BLOCKS):
            if language != "python":
                continue
            torch._dynamo.reset()
            namespace["model"] = models[18 if OF_SOME_LAYERS.search(block) else 2]
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(block, f"README.md, block {position}", "exec"), namespace)
            following, text = BLOCKS[position + 1] if position + 1 < len(BLOCKS) else ("", "")
            if following == "text" and output.getvalue():
                assert lines(output.getvalue()) == lines(text), "the README's example report is out of date"
                shown.append(position)
    finally:
        for name in {"mine", "fourth"} & {*registry.names()}:
            registry.unregister(name)
    assert len(shown) == 1


def test_commands_are_those_of_tox_and_ci():
    commands = [line for language, block in BLOCKS if language == "console" for line in lines(block)]
    assert commands[:2] == ["python -m pip install tox && tox -e demo", "python -m pip install tox && tox"]
    assert "-m pip install tox && tox" in (ROOT / ".ci" / "run").read_text()
    assert "commands = python examples/quickstart.py" in (ROOT / "tox.ini").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"dev", "transformers"} <= set(project["optional-dependencies"])


def test_reason_table_is_complete_and_in_the_reports_words():
    for reason in Reason:
        assert f"| `{reason}` | {reason.explanation} | {reason.remedy or ''}".rstrip() in README, reason


def test_option_table_names_every_option_and_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, re.MULTILINE))
    defaults = {name: eval(text, {"Floor": Floor, "KeepRatio": KeepRatio}) for name, text in rows.items() if name in OPTIONS}
    assert defaults == {name: getattr(TSAConfig(), name) for name in OPTIONS}


@pytest.mark.parametrize(
    "name, file",
    [
        ("prefill", "prefill-h100"),
        ("attention", "attention-h100"),
        ("export", "export"),
        ("sparse", "sparse"),
        ("accuracy", "pretrained"),
    ],
)
def test_tables_are_those_of_the_last_runs(name, file):
    (table,) = re.findall(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", README, re.DOTALL)
    results = (ROOT / "benchmarks" / "results" / f"{file}.md").read_text()
    assert all(line in results for line in table.strip().splitlines())


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/semantics.md", "docs/architecture.md", "docs/serving.md"]
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), target
