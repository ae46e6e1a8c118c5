"""The checker against TensorRT's documented support, and what torch-tensorrt is handed, without it."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tsa_compile.config import Floor, KeepRatio, TSAConfig
from tsa_compile.errors import ConfigError
from tsa_compile.export import _trt_support as support
from tsa_compile.export import export_program, tensorrt
from tsa_compile.export import onnx as tsa_onnx

from ..support import Attention, heads

onnx = pytest.importorskip("onnx")
FLOAT, INT64, BOOL = (getattr(onnx.TensorProto, name) for name in ("FLOAT", "INT64", "BOOL"))


def model_of(*nodes, inputs, outputs=(("y", FLOAT, None),), constants=(), opset=23, functions=()):
    """A model of nodes (op_type, inputs, outputs, attributes); constants are (name, numbers)."""
    made = [onnx.helper.make_node(op, ins, outs, name=f"the_{op}", **attributes) for op, ins, outs, attributes in nodes]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        made,
        "graph",
        [info(*value) for value in inputs],
        [info(*value) for value in outputs],
        [onnx.numpy_helper.from_array(torch.tensor(numbers).numpy(), name) for name, numbers in constants],
    )
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in (("", opset), ("tsa", 1))]
    return onnx.helper.make_model(graph, opset_imports=imports, functions=functions)


def topk(k, **attributes):
    node = ("TopK", ["x", "k"], ["y", "i"], attributes)
    return model_of(node, inputs=[("x", FLOAT, ["batch", "length"])], constants=[("k", [k])])


def check(model):
    return tensorrt.check(model, runtime="tables")


X = [("x", FLOAT, ["batch", "length"])]
N = [("n", INT64, ["length"])]
REFUSED = {
    "topk": (topk(4096), "the_TopK", "k is 4096; at most 3840"),
    "topk computed": (
        model_of(("Shape", ["x"], ["k"], {"start": 1}), ("TopK", ["x", "k"], ["y", "i"], {}), inputs=X),
        "the_TopK",
        "k is computed",
    ),
    "topk unsorted": (topk(16, sorted=0), "the_TopK", "sorted is 0"),
    "nonzero": (model_of(("NonZero", ["x"], ["y"], {}), inputs=X), "the_NonZero", "depends on data"),
    "int64": (
        model_of(("CumSum", ["n", "axis"], ["y"], {}), inputs=N, constants=[("axis", 0)]),
        "the_CumSum",
        "data of type INT64",
    ),
    "bool": (
        model_of(("Cast", ["x"], ["b"], {"to": BOOL}), ("Equal", ["b", "b"], ["y"], {}), inputs=X),
        "the_Equal",
        "data of type BOOL",
    ),
    "not supported": (
        model_of(("BitwiseAnd", ["n", "n"], ["y"], {}), inputs=N),
        "the_BitwiseAnd",
        "listed as not supported",
    ),
    "unknown": (model_of(("Swish", ["x"], ["y"], {}), inputs=X, opset=24), "the_Swish", "not among the documented"),
    "custom": (
        model_of(("Score", ["x"], ["y"], {"domain": "tsa"}), inputs=X),
        "the_Score",
        "looks for a plugin named 'Score'",
    ),
    "computed axes": (
        model_of(("Shape", ["x"], ["axes"], {}), ("ReduceSum", ["x", "axes"], ["y"], {}), inputs=X),
        "the_ReduceSum",
        "axes is computed",
    ),
    "pooling": (
        model_of(("AveragePool", ["x"], ["y"], {"kernel_shape": [7]}), inputs=[("x", FLOAT, [1, 2, "length"])]),
        "the_AveragePool",
        "pools over 1 dimensions",
    ),
    "attention": (
        model_of(
            ("Attention", ["x", "x", "x"], ["y"], {"q_num_heads": 2, "kv_num_heads": 2, "softcap": 30.0}),
            inputs=[("x", FLOAT, [1, "length", 64])],
        ),
        "the_Attention",
        "the attribute softcap is not supported",
    ),
    "rank": (model_of(("Abs", ["x"], ["y"], {}), inputs=[("x", FLOAT, [1] * 9)]), "the_Abs", "9 dimensions"),
    "scatter": (
        model_of(
            ("ScatterND", ["x", "n", "x"], ["y"], {"reduction": "add"}), inputs=[*X, ("n", INT64, ["batch", "length", 1])]
        ),
        "the_ScatterND",
        "the reduction 'add'",
    ),
    "elements": (
        model_of(("TopK", ["x", "k"], ["y", "i"], {}), inputs=[("x", FLOAT, [2**20, 2**12])], constants=[("k", [5])]),
        "the_TopK",
        "4294967296 elements",
    ),
    "opset": (model_of(("Abs", ["x"], ["y"], {}), inputs=X, opset=25), "the model", "opset 25"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    model, node, reason = REFUSED[case]
    findings = [finding for finding in check(model) if finding.node == node]
    assert any(reason in finding.reason for finding in findings), findings
    assert all("https://" in str(finding) and support.VERSION in str(finding) for finding in findings)


def test_takes_what_is_documented():
    assert check(topk(3840)) == []
    assert check(model_of(("CumSum", ["x", "a"], ["y"], {}), inputs=X, constants=[("a", 1)])) == []


def test_looks_into_branches_and_functions():
    then, otherwise = (topk(k).graph for k in (5, 5000))
    for graph in (then, otherwise):
        del graph.input[:]
    branch = ("If", ["c"], ["y"], {"then_branch": then, "else_branch": otherwise})
    found = check(model_of(branch, inputs=[*X, ("c", BOOL, [])]))
    assert [finding.operator for finding in found] == ["TopK"]

    body = [onnx.helper.make_node("BitwiseNot", ["x"], ["y"])]
    function = onnx.helper.make_function("tsa", "Inner", ["x"], ["y"], body, [onnx.helper.make_opsetid("", 23)])
    call = ("Inner", ["n"], ["y"], {"domain": "tsa"})
    found = check(model_of(call, inputs=N, functions=[function]))
    assert [finding.operator for finding in found] == ["BitwiseNot"]


def test_what_it_does_not_evaluate_is_named_and_marked():
    (finding,) = check(model_of(("Hardmax", ["x"], ["y"], {}), inputs=X))
    assert not finding.certain and "(not checked)" in str(finding)


def test_the_table_is_disjoint_and_known_to_onnx():
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    beyond = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # experimental operators of ONNX 1.0
    assert set(support.TYPES) - known <= beyond
    assert not set(support.TYPES) & support.UNSUPPORTED
    assert set(support.CONSTANT_INPUTS) | set(support.DATA_DEPENDENT) | set(support.UNCHECKED) <= set(support.TYPES)


class Layer(torch.nn.Module):
    """Sparse attention with padding, plain and with a floor, and a dense padded layer, as an export has them."""

    def forward(self, query, key, value, padding):
        tsa, length = torch.ops.tsa, query.shape[2]
        scores = tsa.score(query, key, padding, 0.25, 8, 7)
        count = tsa.budget(scores, None, 0.3, 3)
        kept = ((length - 8) * 3 + 9) // 10 + 8
        indices = tsa.select(scores, count, kept)
        rows = tsa.compress(query, key, value, indices, count)
        sparse = tsa.decompress(tsa.attend(*rows, count, 0.25, "auto"), indices, count, length)
        near = (indices, count, padding, 0.25, 5, 2)
        floored = tsa.merge_floor(query, key, value, *tsa.attend_lse(*rows, count, 0.25, "auto"), *near)
        return sparse + floored + tsa.padded_attention(query, key, value, padding, tsa.valid_ranges(padding), 0.25, True)


def layer_program():
    batch, length = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("length", min=16, max=300)
    tensors = tuple(torch.randn(2, heads, 40, 16) for heads in (4, 2, 2))
    shapes = tuple({0: batch, 2: length} for _ in range(3))
    padding = torch.ones(2, 40, dtype=torch.bool)
    return torch.export.export(Layer(), (*tensors, padding), dynamic_shapes=(*shapes, {0: batch, 1: length}))


def test_a_file_that_is_no_model_is_named(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"something else")
    with pytest.raises(ConfigError, match=r"model.onnx' cannot be read as an ONNX model .*export it again"):
        check(tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match=r"none.onnx' cannot be read \(No such file or directory\)"):
        check(tmp_path / "none.onnx")


@pytest.mark.exhaustive
def test_an_exported_layer_passes_and_the_domain_needs_plugins(tmp_path):
    pytest.importorskip("onnxscript")
    program, path = layer_program(), tmp_path / "model.onnx"
    tsa_onnx.save(program, path, opset=24)
    assert check(path) == []
    tsa_onnx.save(program, path, domain="tsa")
    found = {finding.operator for finding in check(path)}
    assert found == {f"tsa::{schema.name}" for schema in tsa_onnx.schemas()}


@pytest.mark.gpu
@pytest.mark.parametrize("floor", [None, Floor(6, 2)], ids=str)
def test_an_engine_computes_what_torch_does(floor, tmp_path):
    pytest.importorskip("torch_tensorrt")
    config = TSAConfig(budget=KeepRatio(0.5), window=8, min_tokens=8, layers=(0,), min_length=16, floor=floor)
    inputs = heads(length=40, device="cuda", dtype=torch.float16)
    program = export_program(Attention().eval(), inputs, config, dynamic_lengths=(16, 300))
    tensorrt.save(program, tmp_path / "model.ts")
    longer = heads(length=200, device="cuda", dtype=torch.float16)
    result = torch.jit.load(tmp_path / "model.ts")(*longer)
    torch.testing.assert_close(result, program.module()(*longer), rtol=1e-2, atol=1e-2)


def test_engines_are_built_for_the_programs_ranges(monkeypatch, tmp_path):
    """torch-tensorrt is played by a recorder: what it is handed."""
    calls = []

    def build(program, **options):
        calls.append((program, options))
        return b"engine"

    def compile(program, *, arg_inputs, kwarg_inputs, optimization_level=None, **_):
        """What torch-tensorrt reads of its options; it ignores others."""

    dynamo = SimpleNamespace(convert_exported_program_to_serialized_trt_engine=build, compile=compile)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", SimpleNamespace(Input=lambda **shape: shape, dynamo=dynamo))
    program = layer_program()
    tensorrt.save(program, tmp_path / "model.engine", optimization_level=5)
    assert (tmp_path / "model.engine").read_bytes() == b"engine"
    ((lowered, options),) = calls
    shapes = [(given["min_shape"], given["max_shape"], given["dtype"]) for given in options["arg_inputs"]]
    assert shapes[0] == ((1, 4, 16, 16), (8, 4, 300, 16), torch.float32)
    assert shapes[3] == ((1, 16), (8, 300), torch.bool)
    assert options["attn_bias_is_causal"] is False and options["optimization_level"] == 5
    assert not any(str(node.target).startswith("tsa") for node in lowered.graph.nodes)
    with pytest.raises(ConfigError, match=r"'plugins' is not an option of torch_tensorrt\.dynamo\.compile"):
        tensorrt.save(program, tmp_path / "model.engine", plugins=False)


def test_without_torch_tensorrt_the_extra_is_named(tmp_path):
    program = layer_program()
    with pytest.raises(ConfigError, match=r"must end in \.engine or \.ts or \.pt2"):
        tensorrt.save(program, tmp_path / "model.onnx")
    try:
        import torch_tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"tsa-compile\[torch-tensorrt\]"):
            tensorrt.save(program, tmp_path / "model.engine")
