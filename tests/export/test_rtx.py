"""TensorRT-RTX, where it is installed, parses the exported forms and builds engines of them; and what is said elsewhere."""

import resource
import signal

import pytest
import torch

from tsa_compile import reports
from tsa_compile.config import Coverage, Floor, KeepRatio, TSAConfig
from tsa_compile.errors import ConfigError
from tsa_compile.export import _rtx, export_program, tensorrt
from tsa_compile.export import onnx as tsa_onnx

from ..commands.support import run
from ..support import DECODERS, exhaustive_but, mixed_padding, tiny, tokens
from .support import Call

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
library = pytest.mark.skipif(not _rtx.installed(), reason=f"TensorRT-RTX is not installed: {_rtx.INSTALL}")

LENGTHS = (40, 300)
FLOOR = TSAConfig(budget=KeepRatio(0.5), window=8, min_tokens=8, layers=[0], min_length=1, floor=Floor(8, 3))
BARE = FLOOR.replace(floor=None)
CALLS = {
    "dense": (FLOOR.replace(layers=[]), torch.float16, False),
    "dense, padded": (FLOOR.replace(layers=[]), torch.bfloat16, True),
    "dense with wide heads, padded": (FLOOR.replace(layers=[]), torch.bfloat16, True),
    "dense chunk": (FLOOR.replace(layers=[]), torch.float16, False),
    "sparse": (BARE, torch.float16, False),
    "sparse, padded": (BARE, torch.bfloat16, True),
    "floor": (FLOOR, torch.bfloat16, False),
    "floor, padded": (FLOOR, torch.float16, True),
    "groups": (FLOOR.replace(granularity="group"), torch.float16, True),
    "coverage": (FLOOR.replace(budget=Coverage(0.2), capacity=36), torch.float16, True),
    "chunk": (FLOOR, torch.float16, True),
}
BUILT = {
    **{name: (name, torch.float16, True) for name in DECODERS},
    "llama, not padded": ("llama", torch.float16, False),
    "llama, bfloat16": ("llama", torch.bfloat16, True),
    "llama, bfloat16, not padded": ("llama", torch.bfloat16, False),
}
PARSED = {
    f"{name}, {'floor' if config.floor else 'no floor'}, {'padded' if padded else 'not padded'}": (name, config, padded)
    for name in DECODERS
    for config, padded in ((FLOOR, False), (BARE, True), (BARE, False))
}
ROWS = {"chunk": 34, "dense chunk": 34}
WIDTH = {"dense with wide heads, padded": 256}
SECONDS = 60
"""Of one core, which two layers may take to build."""


def save_call(path, config, dtype, padded, rows=80, dim=16):
    """Queries are those of the last `rows` of 80 positions: of all, or as many at every length."""
    sizes = {"key": (2, 80), "value": (2, 80), "query": (4, rows)}
    inputs = {name: torch.randn(3, *size, dim, dtype=dtype) for name, size in sizes.items()}
    if padded:
        inputs["attention_mask"] = mixed_padding(80)
    program = export_program(Call().eval(), inputs, config, dynamic_lengths=LENGTHS, dynamic_batch=(1, 8))
    tsa_onnx.save(program, path)
    return path


def save_graph(path, nodes=(), inputs=(), outputs=()):
    graph = onnx.helper.make_graph(nodes, "graph", inputs, outputs)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10), path)
    return path


@library
@pytest.mark.parametrize("case", exhaustive_but(CALLS, "floor, padded"))
def test_calls_are_parsed_and_built(case, tmp_path):
    path = save_call(tmp_path / "model.onnx", *CALLS[case], ROWS.get(case, 80), WIDTH.get(case, 16))
    assert tensorrt.check(path) == tensorrt.check(onnx.load(path), runtime="rtx") == []
    tensorrt.build(path, tmp_path / "model.engine", capabilities=["8.9", "12.0"])
    assert (tmp_path / "model.engine").stat().st_size > 100_000


def save_model(path, name, config, dtype, padded):
    """A model of two layers, the second sparse."""
    inputs = {"input_ids": tokens(3, 80), **({"attention_mask": mixed_padding(80)} if padded else {})}
    layers = {"n_layer": 2} if name == "gpt2" else {"num_hidden_layers": 2}
    if name == "gemma3":
        layers["layer_types"] = ["sliding_attention", "full_attention"]
    if name == "mistral":
        layers["sliding_window"] = None  # with which no layer can be sparse
    model = tiny(name, **layers).to(dtype)
    if name == "mixtral":
        model.set_experts_implementation("batched_mm")  # transformers' default is an operator that ONNX has not
    program = export_program(model, inputs, config.replace(layers=[1]), dynamic_lengths=(70, 200), dynamic_batch=(1, 8))
    assert reports()[-1].sparse == 1
    tsa_onnx.save(program, path)
    return path


@library
@pytest.mark.exhaustive
@pytest.mark.parametrize("case", BUILT)
def test_models_are_parsed_and_built(case, tmp_path):
    name, dtype, padded = BUILT[case]
    path = save_model(tmp_path / "model.onnx", name, FLOOR, dtype, padded)
    assert tensorrt.check(path, runtime="rtx") == []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    tensorrt.build(path, tmp_path / "model.engine", [{"batch": (1, 2), "length": (100, 150)}])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS


@library
@pytest.mark.exhaustive
@pytest.mark.parametrize("case", PARSED)
def test_the_other_forms_of_models_are_parsed(case, tmp_path):
    name, config, padded = PARSED[case]
    path = save_model(tmp_path / "model.onnx", name, config, torch.float16, padded)
    assert tensorrt.check(path, runtime="rtx") == []


@library
def test_attention_without_a_kernel_is_named_and_decomposed_on_request(tmp_path):
    path, engine = save_call(tmp_path / "model.onnx", BARE, torch.float32, False), tmp_path / "model.engine"
    (finding,) = tensorrt.check(path)
    assert finding.operator == "Attention" and finding.library.startswith("TensorRT-RTX ")
    assert "no kernel for attention in FLOAT with heads of 16" in finding.reason
    with pytest.raises(ConfigError, match=r"builds no engine of .*: export the model in float16 or bfloat16"):
        tensorrt.build(path, engine)
    assert not engine.exists()
    tensorrt.build(path, engine, decompose=True)
    assert engine.exists()


@library
def test_the_command_line_builds_an_engine(tmp_path):
    engine, small = tmp_path / "tiny.engine", ["--shape", "tiny", "--layers", "2", "--dtype", "float16"]
    done = run("export", *small, "--format", "tensorrt", "--out", str(engine), "--lengths", "1K", "2K", "--min-length", "1K")
    assert done.exit_code == 0 and "1 of 2 attention calls sparse" in done.stdout, done.output
    assert engine.stat().st_size > 0 and [*tmp_path.iterdir()] == [engine]


@library
def test_what_the_parser_refuses_is_named_node_by_node(tmp_path):
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["length"])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [None])
    node = onnx.helper.make_node("Unique", ["x"], ["values", "first", "inverse", "y"], name="the_node")
    path = save_graph(tmp_path / "model.onnx", [node], [x], [y])
    found = tensorrt.check(path, runtime="rtx")
    assert [(finding.node, finding.operator) for finding in found] == [("the_node", "Unique")]
    with pytest.raises(ConfigError, match=r"builds no engine of .*the_node \(Unique\)"):
        tensorrt.build(path, tmp_path / "model.engine", [{"length": (1, 8)}])


def test_a_crash_is_a_finding(monkeypatch, tmp_path):
    program = tmp_path / "crashes.py"
    program.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(_rtx, "PROGRAM", program)
    (finding,) = _rtx.parse("model.onnx")
    assert f"signal {int(signal.SIGSEGV)}" in str(finding) and finding.certain
    with pytest.raises(ConfigError, match=r"built no engine of 'model.onnx': its process ended without an answer: signal"):
        _rtx.build("model.onnx", tmp_path / "model.engine", [], [], False)


def test_where_it_is_missing_the_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(_rtx, "PACKAGE", "no_such_package")
    path = save_graph(tmp_path / "model.onnx")
    assert tensorrt.check(path) == []
    for ask in (lambda: tensorrt.check(path, runtime="rtx"), lambda: tensorrt.build(path, tmp_path / "model.engine")):
        with pytest.raises(ImportError, match=r"tensorrt-rtx-cu13-bindings"):
            ask()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"profiles": [{"batch": (1, 8)}]}, r"input 'x' has a size 'length' that varies, and no range of it is given"),
        ({"profiles": [{"batch": (1, 8), "length": (9, 3)}]}, r"'length'.*no range"),
        ({}, r"input 'x' has a size 'batch' that varies"),
        ({"capabilities": ["9.0"]}, r"\['9.0'\] are not allowed: TensorRT-RTX builds for 7.5, 8.0"),
    ],
)
def test_what_an_engine_cannot_be_built_for(options, message, tmp_path):
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", "length"])
    path = save_graph(tmp_path / "model.onnx", [], [x], [x])
    with pytest.raises(ConfigError, match=message):
        tensorrt.build(path, tmp_path / "model.engine", **options)


def test_a_runtime_of_another_name():
    with pytest.raises(ConfigError, match=r"runtime='trt' is not allowed: runtime must be one of auto, rtx, tables"):
        tensorrt.check("model.onnx", runtime="trt")
