"""The checker against TensorRT's documented support; the plugins and what torch-tensorrt is handed, without it."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tsa_compile.config import KeepRatio, TSAConfig
from tsa_compile.errors import ConfigError, KernelError, TSAWarning
from tsa_compile.export import _trt_describe as describe
from tsa_compile.export import _trt_plugins as plugins
from tsa_compile.export import _trt_rows as rows_plugins
from tsa_compile.export import _trt_support as support
from tsa_compile.export import export_program, tensorrt
from tsa_compile.export import onnx as tsa_onnx
from tsa_compile.kernels import reference

from ..support import Attention, heads, without_interpreter

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
    findings = [finding for finding in tensorrt.check(model) if finding.node == node]
    assert any(reason in finding.reason for finding in findings), findings
    assert all("https://" in str(finding) and support.VERSION in str(finding) for finding in findings)


def test_takes_what_is_documented():
    assert tensorrt.check(topk(3840)) == []
    assert tensorrt.check(model_of(("CumSum", ["x", "a"], ["y"], {}), inputs=X, constants=[("a", 1)])) == []


def test_looks_into_branches_and_functions():
    then, otherwise = (topk(k).graph for k in (5, 5000))
    for graph in (then, otherwise):
        del graph.input[:]
    branch = ("If", ["c"], ["y"], {"then_branch": then, "else_branch": otherwise})
    found = tensorrt.check(model_of(branch, inputs=[*X, ("c", BOOL, [])]))
    assert [finding.operator for finding in found] == ["TopK"]

    body = [onnx.helper.make_node("BitwiseNot", ["x"], ["y"])]
    function = onnx.helper.make_function("tsa", "Inner", ["x"], ["y"], body, [onnx.helper.make_opsetid("", 23)])
    call = ("Inner", ["n"], ["y"], {"domain": "tsa"})
    found = tensorrt.check(model_of(call, inputs=N, functions=[function]))
    assert [finding.operator for finding in found] == ["BitwiseNot"]


def test_what_it_does_not_evaluate_is_named_and_marked():
    (finding,) = tensorrt.check(model_of(("Hardmax", ["x"], ["y"], {}), inputs=X))
    assert not finding.certain and "(not checked)" in str(finding)


def test_the_table_is_disjoint_and_known_to_onnx():
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    beyond = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # experimental operators of ONNX 1.0
    assert set(support.TYPES) - known <= beyond
    assert not set(support.TYPES) & support.UNSUPPORTED
    assert set(support.CONSTANT_INPUTS) | set(support.DATA_DEPENDENT) | set(support.UNCHECKED) <= set(support.TYPES)


class Layer(torch.nn.Module):
    """Sparse attention with padding and a dense padded layer, as an export has them."""

    def forward(self, query, key, value, padding):
        tsa, length = torch.ops.tsa, query.shape[2]
        scores = tsa.score(query, key, padding, 0.25, 8, 7)
        count = tsa.budget(scores, None, 0.3, 3)
        kept = ((length - 8) * 3 + 9) // 10 + 8
        indices = tsa.select(scores, count, kept)
        rows = tsa.attend(*tsa.compress(query, key, value, indices, count), count, 0.25, "auto")
        sparse = tsa.decompress(rows, indices, count, length)
        return sparse + tsa.padded_attention(query, key, value, padding, tsa.spans(padding), 0.25, True)


class Rows(torch.nn.Module):
    """Every second token gathered and scattered again, at most a given number of them."""

    def forward(self, query, key, value, count):
        tsa, length = torch.ops.tsa, query.shape[2]
        indices = (torch.arange(length // 2, dtype=torch.int32) * 2).expand(query.shape[0], 4, length // 2)
        rows = tsa.attend(*tsa.compress(query, key, value, indices, count), count, 0.25, "auto")
        scattered = tsa.decompress(rows, indices, count, length) + tsa.decompress(rows, indices, None, length)
        return scattered.transpose(1, 2).flatten(2)


def layer_program(model=None):
    batch, length = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("length", min=16, max=300)
    tensors = tuple(torch.randn(2, heads, 40, 16) for heads in (4, 2, 2))
    shapes = tuple({0: batch, 2: length} for _ in range(3))
    if model is None:
        last, dims = torch.ones(2, 40, dtype=torch.bool), {0: batch, 1: length}
    else:
        last, dims = torch.tensor([9, 20], dtype=torch.int32), {0: batch}
    return torch.export.export(model or Layer(), (*tensors, last), dynamic_shapes=(*shapes, dims))


def test_a_file_that_is_no_model_is_named(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"something else")
    for name in ("model.onnx", "none.onnx"):
        with pytest.raises(ConfigError, match=rf"{name}' cannot be read as an ONNX model .*export it again"):
            tensorrt.check(tmp_path / name)


def test_an_exported_layer_passes_and_the_domain_needs_plugins(tmp_path):
    pytest.importorskip("onnxscript")
    program, path = layer_program(), tmp_path / "model.onnx"
    tsa_onnx.save(program, path, opset=24)
    assert tensorrt.check(path) == []
    tsa_onnx.save(program, path, domain="tsa")
    found = {finding.operator for finding in tensorrt.check(path)}
    assert found == {f"tsa::{schema.name}" for schema in tsa_onnx.schemas()}


COMPRESS = rows_plugins.compress_plugin(4, 2, 4, 16, 24, torch.float32)
DECOMPRESS = rows_plugins.decompress_plugin(4, 4, 24, torch.float32)


def make_rows(selections=4):
    """query, key, value [2, heads, 50, D], indices and count: 30 slots of which 30 and 7 are real."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, heads, 50, dim, generator=generator) for heads, dim in ((4, 16), (2, 16), (2, 24))]
    count = torch.tensor([30, 7], dtype=torch.int32)
    return *rows, reference.select(torch.rand(2, selections, 50, generator=generator), count, 30), count


def launch(plugin, inputs, outputs):
    """In the Triton interpreter, as TensorRT would: inputs, sizes, outputs, on the grid that the plugin describes."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    sizes = [inputs[position].shape[dim] for position, dim in plugin.sizes]
    plugin.kernel[programs(plugin, inputs)](*inputs, *sizes, *outputs, **dict(plugin.constants))


def programs(plugin, inputs):
    """The grid for these inputs."""
    axes = (axis if isinstance(axis, int) else (inputs[axis.size[0]].shape[axis.size[1]], axis) for axis in plugin.grid)
    return tuple(axis if isinstance(axis, int) else -(-axis[0] // axis[1].each) * axis[1].times for axis in axes)


@pytest.mark.parametrize("selections", [4, 2])
def test_plugins_kernels_equal_the_reference(selections):
    inputs = make_rows(selections)
    gather = rows_plugins.compress_plugin(4, 2, selections, 16, 24, torch.float32)
    outputs = [torch.full(shape.shape, torch.nan) for shape in gather.fake(*inputs)]
    launch(gather, inputs, outputs)
    for got, expected in zip(outputs, reference.compress(*inputs)):
        assert torch.equal(got, expected), "zeros from count on, whatever the attention kernel reads"

    attention = rows_plugins.attend_plugin(4, selections, 16, 24, torch.float32, 0.25)
    output = torch.full(attention.fake(*outputs, inputs[4]).shape, torch.nan)
    launch(attention, (*outputs, inputs[4]), [output])
    expected = reference.attend(*outputs, inputs[4], 0.25)
    for item, count in enumerate(inputs[4]):
        torch.testing.assert_close(output[item, :, :count], expected[item, :, :count])

    rows = (torch.randn(2, 4, 30, 24), *inputs[3:], torch.arange(50, dtype=torch.int32))
    scatter = rows_plugins.decompress_plugin(4, selections, 24, torch.float32)
    output = torch.full(scatter.fake(*rows).shape, torch.nan)
    launch(scatter, rows, [output])
    assert torch.equal(output.transpose(1, 2), reference.decompress(*rows[:3], 50))


PTX = """
import pathlib, subprocess, torch, triton
from tsa_compile.export import _trt_describe as describe, _trt_rows as plugins

made = [
    plugins.compress_plugin(32, 8, 32, 128, 128, torch.bfloat16),
    plugins.decompress_plugin(32, 8, 128, torch.float16),
    plugins.attend_plugin(32, 8, 128, 128, torch.bfloat16, 128**-0.5),
]
assembler = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
for plugin in made:
    compiled = describe.compile_ptx(plugin, 90)
    assert f".entry {compiled.kernel_name}(" in compiled.ptx and ".target sm_90" in compiled.ptx
    assert compiled.ptx.count(f"{compiled.kernel_name}_param_") >= len(plugin.signature)
    assert compiled.ptx.split(")")[0].count(".param .u") == len(plugin.signature)
    assert "ld.global.v4" in compiled.ptx, "rows are read 16 bytes at a time"
    assert (compiled.threads, compiled.shared <= 48 * 1024) == (128, True)
    if assembler.exists():
        run = ["-arch=sm_90a", "-o", "/dev/null", "-"]
        subprocess.run([assembler, *run], input=compiled.ptx.encode(), check=True)
"""


def test_plugins_compile_to_one_kernel_without_scratch_memory():
    pytest.importorskip("triton")
    without_interpreter(PTX)


def test_scratch_parameters_are_cut_or_refused():
    ptx = ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n{ ld.param.b64 %rd1, [k_param_0]; }"
    assert describe.without_scratch(ptx, "k", 1) == ptx.replace(",\n\t.param .u64 k_param_1", "")
    with pytest.raises(KernelError, match="scratch memory"):
        describe.without_scratch(ptx.replace("[k_param_0]", "[k_param_1]"), "k", 1)
    with pytest.raises(KernelError, match="has 2 parameters, not 3"):
        describe.without_scratch(ptx, "k", 3)
    with pytest.raises(KernelError, match=r"no TensorRT plugin for torch\.float64"):
        rows_plugins.decompress_plugin(4, 4, 24, torch.float64)


def test_a_program_with_plugins_computes_the_same():
    program, forms = layer_program(Rows()), plugins.PluginForms()
    lowered = tsa_onnx.to_portable(program, forms.table())
    assert sorted(forms.used) == [
        "tsa_trt::attend_h4_s4_d16_v16_fp32_by_0p25",
        "tsa_trt::compress_h4_g2_s4_d16_v16_fp32",
        "tsa_trt::decompress_h4_s4_d16_fp32",
    ]
    count = torch.tensor([35, 0, 11], dtype=torch.int32)
    inputs = (*(torch.randn(3, heads, 70, 16) for heads in (4, 2, 2)), count)
    assert torch.equal(lowered.module()(*inputs), program.module()(*inputs))


def test_plugins_stand_among_standard_operators():
    """Budget and select have no plugin: with their portable forms, nothing else is left in the program."""
    program, forms = layer_program(), plugins.PluginForms()
    lowered = tsa_onnx.to_portable(program, forms.table())
    targets = {str(node.target) for node in lowered.graph.nodes if node.op == "call_function"}
    assert {name.split("_h4")[0] for name in targets if not name.startswith(("aten.", "<", "sym_"))} == {
        "tsa_trt.score_window_w8.default", "tsa_trt.score_stats", "tsa_trt.score_rows", "tsa_trt.score_mean",
        "tsa_trt.score_pool", "tsa_trt.compress", "tsa_trt.attend", "tsa_trt.decompress",
    }  # fmt: skip
    padding = torch.ones(3, 70, dtype=torch.bool)
    padding[1, :9] = padding[2, 60:] = False
    inputs = (*(torch.randn(3, heads, 70, 16) for heads in (4, 2, 2)), padding)
    torch.testing.assert_close(lowered.module()(*inputs), program.module()(*inputs))


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("with_plugins", [True, False])
def test_an_engine_computes_what_torch_does(with_plugins, tmp_path):
    pytest.importorskip("torch_tensorrt")
    config = TSAConfig(budget=KeepRatio(0.5), window=8, min_tokens=8, layers=(0,), min_length=16)
    inputs = heads(length=40, device="cuda", dtype=torch.float16)
    program = export_program(Attention().eval(), inputs, config, dynamic_lengths=(16, 300))
    tensorrt.save(program, tmp_path / "model.ts", plugins=with_plugins)
    longer = heads(length=200, device="cuda", dtype=torch.float16)
    result = torch.jit.load(tmp_path / "model.ts")(*longer)
    torch.testing.assert_close(result, program.module()(*longer), rtol=1e-2, atol=1e-2)


class Symbols:
    """tensorrt.plugin, as far as a launch needs it, with strings for symbolic expressions."""

    KernelLaunchParams = SimpleNamespace
    SymInt32 = staticmethod(lambda expression: f"int32({expression})")
    SymIntExprs = staticmethod(lambda length: [None] * length)
    cdiv = staticmethod(lambda expression, by: f"cdiv({expression}, {by})")


def descriptions(*shapes):
    return [SimpleNamespace(shape_expr=shape.split()) for shape in shapes]


def test_a_plugin_is_registered_with_its_launch(monkeypatch):
    recorded = {}
    kernels = SimpleNamespace(ptx_op=lambda name, ptx, kernel, **options: recorded.update(options, call=(name, ptx, kernel)))
    monkeypatch.setattr(describe, "compile_ptx", lambda plugin, arch: describe.Compiled("the_kernel", f"sm_{arch}", 128, 64))
    describe.register(COMPRESS, 90, kernels, Symbols)
    assert recorded["call"] == (COMPRESS.name, b"sm_90", "the_kernel")
    assert recorded["supports_dynamic_shapes"] and recorded["schema"] == COMPRESS.schema
    inputs = descriptions("B H L D", "B G L D", "B G L V", "B H C", "B")
    params, sizes = recorded["aot_fn"](inputs, [], 0)
    assert (params.grid_x, params.grid_y, params.grid_z) == (4, "cdiv(C, 128)", "B")
    assert (params.block_x, params.shared_mem, sizes) == (128, 64, ["int32(L)", "int32(C)"])

    params, sizes = describe.launch(
        DECOMPRESS, describe.Compiled("k", "", 128, 0), Symbols, descriptions("B H C V", "B H C", "B", "L"), [], 0
    )
    assert (params.grid_x, params.grid_y, params.grid_z, sizes) == (4, "cdiv(L, 64)", "B", ["int32(L)", "int32(C)"])


def test_engines_are_built_for_the_programs_ranges(monkeypatch, tmp_path):
    """torch-tensorrt is played by a recorder: what it is handed, and that plugins fall back with a warning."""
    calls = []

    def build(program, **options):
        calls.append((program, options))
        return b"engine"

    fake = SimpleNamespace(
        Input=lambda **shape: shape,
        dynamo=SimpleNamespace(convert_exported_program_to_serialized_trt_engine=build, compile=build),
    )
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    program = layer_program(Rows())
    tensorrt.save(program, tmp_path / "model.engine", plugins=False, optimization_level=5)
    assert (tmp_path / "model.engine").read_bytes() == b"engine"
    options = calls[0][1]
    shapes = [(given["min_shape"], given["max_shape"], given["dtype"]) for given in options["arg_inputs"]]
    assert shapes[0] == ((1, 4, 16, 16), (8, 4, 300, 16), torch.float32)
    assert shapes[3] == ((1,), (8,), torch.int32)
    assert options["attn_bias_is_causal"] is False and options["optimization_level"] == 5

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.warns(TSAWarning, match="no TensorRT plugins"):
        tensorrt.save(program, tmp_path / "model.engine")
    targets = [{str(node.target) for node in used.graph.nodes} for used, _ in calls]
    assert targets[0] == targets[1] and not any(target.startswith("tsa") for target in targets[0])


def test_without_torch_tensorrt_the_extra_is_named(tmp_path):
    program = layer_program(Rows())
    with pytest.raises(ConfigError, match=r"must end in \.engine or \.ts or \.pt2"):
        tensorrt.save(program, tmp_path / "model.onnx")
    try:
        import torch_tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"tsa-compile\[tensorrt\]"):
            tensorrt.save(program, tmp_path / "model.engine")
