"""How large the standard form of a layer is, and of which operators it consists, against standard_form.txt.

The file is rewritten by `EXPECTTEST_ACCEPT=1 pytest tests/export/test_standard_form.py`; read the difference. The page on
exports shows its numbers of nodes. What torch's exporter writes of one graph differs between versions, so the operators are
compared with the versions that the file names; with others, the numbers of nodes within a tenth.
"""

import collections
import os
import re
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tsa_compile.config import TSAConfig
from tsa_compile.export import export_program
from tsa_compile.export import onnx as tsa_onnx

from ..support import exhaustive_but
from .support import Call

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

GOLDEN = Path(__file__).with_name("standard_form.txt")
PAGE = Path(__file__).parents[2] / "docs" / "exports.md"
ACCEPT = bool(os.environ.get("EXPECTTEST_ACCEPT"))
DEFAULT = TSAConfig(layers=[0], min_length=1)
LAYERS = {
    "dense": DEFAULT.replace(layers=[]),
    "dense with heads of 256": DEFAULT.replace(layers=[]),
    "sparse": DEFAULT,
}
WIDTH = {"dense with heads of 256": 256}
CASES = [(layer, padded) for layer in LAYERS for padded in (False, True)]
IN_FULL = ("sparse", True)
"""Of which the file has every operator in its order."""


def operators(layer, padded, path):
    """The operators of an exported call with 4 heads over 2, at lengths of 1,024 to 131,072, in their order."""
    sizes = {"query": 4, "key": 2, "value": 2}
    inputs = {name: torch.zeros(2, heads, 1400, WIDTH.get(layer, 16)) for name, heads in sizes.items()}
    if padded:
        inputs["attention_mask"] = torch.ones(2, 1400, dtype=torch.long)
    tsa_onnx.save(export_program(Call().eval(), inputs, LAYERS[layer], dynamic_batch=(1, 8)), path)
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def summary(layer, padded, found):
    """As the file has it: the number of nodes, and how many there are of each operator, or all of them."""
    name = f"{layer}, {'padded' if padded else 'not padded'}: {len(found)} nodes"
    counts = collections.Counter(found)
    text = ", ".join(f"{counts[op]} {op}" for op in sorted(counts))
    if (layer, padded) == IN_FULL:
        text += "; in order: " + " ".join(found)
    return name + "\n" + textwrap.indent("\n".join(textwrap.wrap(text, 116)), "    ")


def versions():
    """Those that decide what is written: "torch 2.13, onnxscript 0.7"."""
    return ", ".join(f"{name} {'.'.join(version(name).split('.')[:2])}" for name in ("torch", "onnxscript"))


def golden():
    """The versions, and the summary of each case by its name."""
    head, *cases = GOLDEN.read_text().strip().split("\n\n")
    return head, {_case(case): case for case in cases}


def _case(text):
    layer, padded = re.match(r"(.*), (padded|not padded): \d+ nodes", text).groups()
    return layer, padded == "padded"


def nodes(text):
    return int(re.search(r": (\d+) nodes", text)[1])


def accept(layer, padded, found):
    cases = golden()[1] if GOLDEN.exists() else {}
    cases[layer, padded] = summary(layer, padded, found)
    GOLDEN.write_text("\n\n".join([versions(), *(cases[case] for case in CASES if case in cases)]) + "\n")


@pytest.mark.parametrize(("layer", "padded"), exhaustive_but(CASES, ("dense", True)))
def test_operators_of_a_layer(layer, padded, tmp_path):
    found = operators(layer, padded, tmp_path / "model.onnx")
    if ACCEPT:
        accept(layer, padded, found)
    made_by, cases = golden()
    expected = cases[layer, padded]
    assert abs(len(found) - nodes(expected)) <= nodes(expected) // 10
    if made_by == versions():
        assert summary(layer, padded, found) == expected


def test_the_page_on_exports_says_how_many_nodes():
    cases = golden()[1]
    assert [*cases] == CASES
    table = ["| layer | nodes | with padding |", "|---|---|---|"]
    table += [f"| {layer} | {nodes(cases[layer, False])} | {nodes(cases[layer, True])} |" for layer in LAYERS]
    shown = PAGE.read_text().split("<!-- nodes:begin -->\n")[1].split("\n<!-- nodes:end -->")[0]
    assert shown.splitlines() == table
