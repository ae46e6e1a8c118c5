"""AOTInductor packages: run in Python, and by the C++ program of examples/aoti_cpp without it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tsa_compile import ConfigError, Floor, KeepRatio, TSAConfig
from tsa_compile.export import aoti, export_program
from tsa_compile.testing import count_ops

from ..support import Attention, difference, heads, script
from .support import QUICK, SMALL

EXAMPLE = Path(__file__).parents[2] / "examples" / "aoti_cpp"
BENCHMARK = EXAMPLE.parents[1] / "benchmarks" / "export.py"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the example writes; its one compilation serves every test."""
    path = tmp_path_factory.mktemp("package")
    script(EXAMPLE / "export_model.py").main([str(path)], **QUICK)
    return path


@pytest.fixture(scope="module")
def package(folder):
    return aoti.load(folder / "model.pt2")


def case(folder, number):
    saved = torch.load(folder / f"case_{number}.pt")
    return dict(zip(("input_ids", "attention_mask"), saved["inputs"], strict=True)), saved["outputs"][0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [0, 1])
def test_equals_the_program(folder, package, number):
    inputs, expected = case(folder, number)
    result = package(**inputs)
    assert list(result) == ["logits"]
    assert difference(result["logits"], expected) < TOLERANCE
    columns_first = {name: value.t().contiguous().t() for name, value in inputs.items()}
    assert difference(package(**columns_first)["logits"], expected) < TOLERANCE, "the compiled code ignores strides"


def only_static_libraries(folder, monkeypatch):
    """Lets g++ find its static C++ library first, as one that was moved does; without one there is nothing to be found."""
    static = Path(subprocess.run(["g++", "-print-file-name=libstdc++.a"], capture_output=True, text=True).stdout.strip())
    if not static.is_absolute():
        return
    (folder / "lib").mkdir()
    (folder / "lib" / "libstdc++.a").symlink_to(static)
    compiler = folder / "g++"
    compiler.write_text(f'#!/bin/sh\nexec g++ -B{folder}/lib/ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


@pytest.mark.slow
def test_a_floor_without_padding_by_a_compiler_with_only_the_static_cpp_library(tmp_path, monkeypatch):
    """The example has a floor with padding. Such a compiler linked a second libstdc++ into the package, which crashed at its
    first use."""
    only_static_libraries(tmp_path, monkeypatch)
    config = SMALL.replace(budget=KeepRatio(0.5), layers=(0,), floor=Floor(6, 2))
    exported = export_program(Attention().eval(), heads(), config, dynamic_lengths=(16, 200), dynamic_batch=(1, 8))
    assert count_ops(exported.graph_module, "merge_floor") == {"merge_floor": 1}
    loaded = aoti.load(aoti.save(exported, tmp_path / "model.pt2", **QUICK))
    for batch, length in ((2, 40), (1, 16), (3, 133)):
        inputs = heads(batch, length=length)
        assert difference(loaded(*inputs), exported.module()(*inputs)) < TOLERANCE


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake (pip install cmake)")
def test_runs_from_cpp(folder, tmp_path):
    root = Path(torch.__file__).parent
    configure = ["cmake", "-S", EXAMPLE, "-B", tmp_path, f"-DTORCH_ROOT={root}"]
    for command in (configure, ["cmake", "--build", tmp_path]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    cases = [folder / "case_0.pt", folder / "case_1.pt"]
    done = run(tmp_path, folder / "model.pt2", *cases)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("max error") == 2 and "times_ms" not in done.stdout
    done = run(tmp_path, "--time", "3", "--tolerance", "1e-9", folder / "model.pt2", *cases)
    rows = [{"case": str(path), "compiled_ms": [1.0, 2.0, 3.0]} for path in cases]
    assert script(BENCHMARK).read_output(done.stdout, rows) > 0
    assert [len(row["package_ms"]) for row in rows] == [3, 3] and all(0 <= row["error"] < 1e-3 for row in rows)
    assert done.returncode == int(max(row["error"] for row in rows) >= 1e-9)
    inputs, output = case(folder, 1)
    torch.save({"inputs": list(inputs.values()), "outputs": [output + 1]}, tmp_path / "wrong.pt")
    assert run(tmp_path, folder / "model.pt2", tmp_path / "wrong.pt").returncode == 1
    assert run(tmp_path, folder / "model.pt2", tmp_path / "missing.pt").returncode == 2


def run(build, *arguments):
    """Without anything that could lead it to a Python interpreter."""
    return subprocess.run(
        [build / "run_package", *arguments], capture_output=True, text=True, check=False, env={"TMPDIR": str(build)}
    )


@pytest.mark.exhaustive
def test_a_call_outside_the_range_says_the_range(package):
    short = {"input_ids": torch.ones(2, 63, dtype=torch.long), "attention_mask": torch.ones(2, 63, dtype=torch.long)}
    with pytest.raises(
        ConfigError, match=r"'input_ids' is int64 \[2, 63\] on cpu: dimension 1 is 63.*exported for 64 to 512"
    ):
        package(**short)
    many = {name: torch.ones(9, 64, dtype=torch.long) for name in short}
    with pytest.raises(ConfigError, match=r"dimension 0 is 9, but the package was exported for 1 to 8"):
        package(**many)


@pytest.mark.exhaustive
def test_inputs_that_do_not_fit_each_other_or_the_program(folder, package):
    inputs, _ = case(folder, 0)
    with pytest.raises(ConfigError, match=r"takes input_ids, attention_mask; found input_ids"):
        package(input_ids=inputs["input_ids"])
    with pytest.raises(ConfigError, match=r"'attention_mask' is bool .* exported for int64"):
        package(**{**inputs, "attention_mask": inputs["attention_mask"].bool()})
    with pytest.raises(
        ConfigError, match="takes input_ids, attention_mask as the example passed them, by position or by name"
    ):
        package(*inputs.values())
    with pytest.raises(ConfigError, match="dimension 1 must be 100, as in another input"):
        package(**{**inputs, "attention_mask": inputs["attention_mask"][:, 1:]})


def program():
    return export_program(Attention().eval(), heads(length=40), dynamic_lengths=(16, 200), lower=None)


@pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse")
def test_the_strides_of_an_example_are_not_compiled_in(tmp_path):
    """One mask for all items, as `ones(1, L).expand(B, L)`, would be the mask of every item for ever."""
    examples = torch.randn(4, 2).t(), torch.ones(1, 4).expand(2, 4)
    program = export_program(torch.nn.Bilinear(4, 4, 3).eval(), examples, TSAConfig(layers=[]), dynamic_lengths=None)
    strides = [node.meta["val"].stride() for node in program.graph.find_nodes(op="placeholder")]
    assert strides[-2:] == [(4, 1)] * 2
    with pytest.raises(ConfigError, match=r"'input1' of the program has strides \(1, 2\)"):
        aoti.save(torch.export.export(torch.nn.Bilinear(4, 4, 3).eval(), examples), tmp_path / "a.pt2")


def test_what_cannot_be_saved(tmp_path):
    exported = program()
    with pytest.raises(ConfigError, match=r"must end in \.pt2"):
        aoti.save(exported, tmp_path / "model.so")
    with pytest.raises(ConfigError, match=r"there is no folder '.*nowhere'"):
        aoti.save(exported, tmp_path / "nowhere" / "model.pt2")
    with pytest.raises(ConfigError, match=r"'max_autotuning' is not an option of torch\._inductor"):
        aoti.save(exported, tmp_path / "model.pt2", max_autotuning=True)
    missing = torch._inductor.config.patch({"cpp.cxx": (None, os.fspath(tmp_path / "no-compiler"))})
    with missing, pytest.raises(ConfigError, match=r"no C\+\+ compiler was found.*install g"):
        aoti.save(exported, tmp_path / "model.pt2")


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(ConfigError, match="there is no package"):
        aoti.load(tmp_path / "model.pt2")
    (tmp_path / "model.pt2").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="cannot be loaded as an AOTInductor package"):
        aoti.load(tmp_path / "model.pt2")


@pytest.mark.exhaustive
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_package_that_was_cut_off_is_named(share, folder, tmp_path):
    content = (folder / "model.pt2").read_bytes()
    (tmp_path / "model.pt2").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConfigError, match=r"model\.pt2' cannot be loaded as an AOTInductor package.*write it again"):
        aoti.load(tmp_path / "model.pt2")


def test_none_among_the_arguments_is_no_input():
    entries = [{"name": name, "dtype": "int64", "device": "cpu", "shape": [1, 8]} for name in ("ids", "mask")]
    ids = torch.zeros(1, 8, dtype=torch.long)
    aoti.check_inputs(entries, (ids, None, ids), {})
    with pytest.raises(ConfigError, match="the package takes ids, mask; found ids"):
        aoti.check_inputs(entries, (ids, None), {})


class Constants(torch.nn.Module):
    def forward(self, input_ids, keep: int = 0, mode: str = "a", share: float = 1.0, flag: bool = False):
        return input_ids[:, -keep:] * (share if mode == "a" and flag else 2)


def entries_with_constants():
    ids = {"input_ids": torch.ones(2, 40, dtype=torch.long)}
    constants = {"keep": 3, "mode": "b", "share": 0.1, "flag": True}
    program = export_program(Constants().eval(), {**ids, **constants}, TSAConfig(layers=()), dynamic_lengths=(16, 90))
    return json.loads(json.dumps(aoti.describe_inputs(program))), ids, constants


def test_a_constant_that_is_not_the_examples_is_refused():
    entries, ids, constants = entries_with_constants()
    assert entries[1:] == [{"name": name, "value": value} for name, value in constants.items()]
    aoti.check_inputs(entries, (), {**ids, **constants})
    aoti.check_inputs(entries, (*ids.values(), *constants.values()), {})
    for name, value in {"keep": 5, "mode": "a", "share": 0.2, "flag": 1}.items():
        message = f"input '{name}' is {value!r}; the package was exported for {constants[name]!r}: what is no tensor is comp"
        with pytest.raises(ConfigError, match=message):
            aoti.check_inputs(entries, (), {**ids, **constants, name: value})
        with pytest.raises(ConfigError, match=message):
            aoti.check_inputs(entries, (*ids.values(), *{**constants, name: value}.values()), {})
    with pytest.raises(ConfigError, match="takes input_ids, keep, mode, share, flag; found input_ids"):
        aoti.check_inputs(entries, (), ids)
    with pytest.raises(ConfigError, match="'input_ids' is 3; the package was exported for a tensor"):
        aoti.check_inputs(entries, (3, *constants.values()), {})
    with pytest.raises(ConfigError, match="'keep' is a Tensor; the package was exported for 3"):
        aoti.check_inputs(entries, (), {**ids, **constants, "keep": torch.ones(2)})
    aoti.check_inputs(entries[:1], (*ids.values(), 5), {"mode": "c"})  # as older packages are, which do not say
