"""ONNX files of small models: what they hold, and that onnxruntime computes with them what torch does."""

import collections
import importlib
import itertools
import math
from pathlib import Path

import pytest
import torch

from tsa_compile.config import Coverage, Floor, KeepRatio, TSAConfig
from tsa_compile.errors import ConfigError, RewriteError
from tsa_compile.export import export_program, tensorrt
from tsa_compile.export import onnx as tsa_onnx
from tsa_compile.export._onnx_domain import schema_table
from tsa_compile.kernels import reference
from tsa_compile.passes.lower import lower_program, with_joined_floors

from ..support import exhaustive_but
from .support import Call, CallWithSinks

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")

LENGTHS = (40, 300)
CONFIG = TSAConfig(budget=KeepRatio(0.5), window=8, min_tokens=8, layers=[1], min_length=1, floor=None)
SINGLE = CONFIG.replace(layers=[0])
CHUNK = 34
WIDE = 256
# configuration, padded, and of what: a whole model, one attention call, which is traced in a third of the time, one whose
# queries are the last CHUNK positions, or one with heads of WIDE
CASES = {
    "padded model": (CONFIG.replace(floor=Floor(8, 3)), True, "model"),
    "plain": (SINGLE, False, "call"),
    "floor of a group": (SINGLE.replace(floor=Floor(9, 0), granularity="group"), False, "call"),
    "coverage within a capacity": (SINGLE.replace(budget=Coverage(0.2), capacity=36, granularity="group"), True, "call"),
    "chunk": (SINGLE.replace(floor=Floor(8, 3)), True, "chunk"),
    "sinks": (SINGLE.replace(floor=Floor(8, 3)), True, "sinks"),
    "sinks, published": (SINGLE, True, "sinks"),
    "sinks, dense": (SINGLE.replace(layers=[]), True, "sinks"),
    "dense with wide heads": (SINGLE.replace(layers=[]), True, "wide"),
}

NODES = {"plain": 290}
"""At most so many; 33 comparisons behind each other, which TensorRT cannot build, made 392 of it."""


def make_inputs(batch, length, *, padded=True, of="model", seed=0):
    """Token ids, or key, value and query; and a mask whose items are padded left, right and not at all."""
    generator = torch.Generator().manual_seed(seed)
    if of == "model":
        inputs = {"input_ids": torch.randint(0, 97, (batch, length), generator=generator)}
    else:
        sizes = {"key": (2, length), "value": (2, length), "query": (4, CHUNK if of == "chunk" else length)}
        dim = WIDE if of == "wide" else 8
        inputs = {name: torch.randn(batch, *size, dim, generator=generator) for name, size in sizes.items()}
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :11] = 0
    mask[-1, length - 5 :] = 0 if batch > 1 else 1
    return {**inputs, "attention_mask": mask} if padded else inputs


def small_llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, vocab_size=97, **shape)).eval()


def make_program(config, padded, of):
    inputs = make_inputs(2, 80, padded=padded, of=of)
    made = small_llama() if of == "model" else CallWithSinks().eval() if of == "sinks" else Call().eval()
    return export_program(made, inputs, config, dynamic_lengths=LENGTHS, dynamic_batch=(1, 8))


def output_of(program, inputs):
    result = program.module()(**inputs)
    return result["logits"] if isinstance(result, dict) else result


def op_types(model):
    return collections.Counter((node.domain, node.op_type) for node in model.graph.node)


def long_dimensions(model):
    """How many dimensions of a value grow with the length, at most."""
    shapes = [[dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in model.graph.value_info]
    assert any(len(shape) == 4 for shape in shapes)
    return max(sum("length" in dim for dim in shape) for shape in shapes)


@pytest.fixture(scope="module")
def programs():
    """Exports by case: each serves every form that a test writes of it."""
    made = {}

    def get(case):
        if case not in made:
            made[case] = make_program(*CASES[case])
        return made[case]

    return get


@pytest.mark.parametrize("case", exhaustive_but(CASES, "plain"))
def test_standard_operators_equal_torch_at_other_lengths_and_batches(case, programs, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    padded, of = CASES[case][1:]
    program, path = programs(case), tmp_path / "model.onnx"
    tsa_onnx.save(program, path)

    model = onnx.load(path)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert long_dimensions(inferred) == 1, "no mask of L x L, and no logits"
    assert {domain for domain, _ in op_types(model)} == {""}
    assert tensorrt.check(path, runtime="tables") == []
    assert not {"TopK", "NonZero", "Unique", "Compress", "Loop", "RotaryEmbedding"} & {op for _, op in op_types(model)}
    assert {entry.key: entry.value for entry in model.metadata_props}["tsa_compile.length"] == "40..300"
    if case in NODES:
        assert len(model.graph.node) <= NODES[case]

    session = onnxruntime.InferenceSession(path)
    rows = [(2, "length"), (2, "length"), (4, CHUNK if of == "chunk" else "length")]
    dim = WIDE if of == "wide" else 8
    shapes = [["batch", "length"]] if of == "model" else [["batch", *sizes, dim] for sizes in rows]
    assert [tensor.name for tensor in session.get_outputs()] == ["logits" if of == "model" else "output"]
    assert [tensor.shape for tensor in session.get_inputs()] == shapes + [["batch", "length"]] * padded
    for batch, length in ((2, 80), (1, 41), (3, 150)):
        inputs = make_inputs(batch, length, padded=padded, of=of, seed=length)
        expected = output_of(program, inputs)
        got = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def op_run(name, compute):
    """An operator of the domain for onnx's reference evaluator, which hands over arrays, None and attributes."""
    from onnx.reference.op_run import OpRun

    def run(self, *inputs, **attributes):
        tensors = [None if value is None else torch.from_numpy(value.copy()) for value in inputs]
        results = compute(*tensors, **attributes)
        return tuple(result.numpy() for result in (results if isinstance(results, tuple) else (results,)))

    return type(name, (OpRun,), {"op_domain": "tsa", "_run": run})


def merge_floor(query, key, value, rows, lse, indices, count=None, padding=None, sink=None, *, scale, window, sinks):
    """Row for row what MergeFloor's schema says."""
    batch, heads, length, _ = query.shape
    count = torch.full((batch,), indices.shape[2]) if count is None else count
    selected = reference.is_selected(indices, count, heads, length)
    mask = reference.floor_mask(padding, selected, window, sinks) & ~(selected[..., None] & selected[:, :, None])
    output = reference.attention_under(mask, query, key, value, scale, sink)
    keys = key.repeat_interleave(heads // key.shape[1], 1)
    near = (scale * query @ keys.mT).masked_fill(~mask, -math.inf).logsumexp(-1)
    near = near if sink is None else torch.logaddexp(near, sink[:, None])
    for b, h in itertools.product(range(batch), range(heads)):
        places = indices[b, h * indices.shape[1] // heads, : count[b]].long()
        shares = torch.stack((lse[b, h, : count[b]], near[b, h, places])).softmax(0)[..., None]
        output[b, h, places] = shares[0] * rows[b, h, : count[b]] + shares[1] * output[b, h, places]
    return output


def reference_ops():
    """The domain's operators by the oracle, called as the schemas say."""

    def budget(scores, coverage=None, keep_numerator=None, keep_denominator=None, min_tokens=None):
        ratio = None if keep_numerator is None else keep_numerator / keep_denominator
        return reference.budget(scores, coverage, ratio, min_tokens)

    def padded_attention(query, key, value, padding, sink=None, *, scale, mean_rows):
        return reference.padded_attention(query, key, value, padding, scale, bool(mean_rows), sink_logits=sink)

    def attend(query, key, value, count=None, sink=None, *, scale):
        rows = reference.attend(query, key, value, count, scale)
        if sink is None:
            return rows
        return rows * torch.sigmoid(reference.log_sum_exp(query, key, count, scale) - sink[:, None])[..., None]

    def attend_lse(query, key, value, count=None, scale=None):
        return reference.attend(query, key, value, count, scale), reference.log_sum_exp(query, key, count, scale)

    return [
        op_run(
            "Score",
            lambda q, k, padding=None, sink=None, **options: reference.score(q, k, padding, **options, sink_logits=sink),
        ),
        op_run("Budget", budget),
        op_run("Select", lambda scores, capacity, count=None: reference.select(scores, count, int(capacity))),
        op_run("CompressRows", lambda *rows: reference.compress(*(*rows, None)[:5])),
        op_run("Attend", attend),
        op_run("AttendLse", attend_lse),
        op_run("MergeFloor", merge_floor),
        op_run("DecompressRows", lambda rows, i, length, n=None: reference.decompress(rows, i, n, int(length))),
        op_run("PaddedAttention", padded_attention),
    ]


BEFORE_ATTENTION = ("Score", "Select", "CompressRows")
DOMAIN = {
    "padded model": (*BEFORE_ATTENTION, "AttendLse", "MergeFloor", "Budget", "PaddedAttention"),
    "plain": (*BEFORE_ATTENTION, "Attend", "DecompressRows"),
    "floor of a group": (*BEFORE_ATTENTION, "AttendLse", "MergeFloor"),
    "chunk": (*BEFORE_ATTENTION, "AttendLse", "MergeFloor", "Budget"),
    "sinks": (*BEFORE_ATTENTION, "AttendLse", "MergeFloor", "Budget"),
    "sinks, published": (*BEFORE_ATTENTION, "Attend", "DecompressRows", "Budget"),
    "sinks, dense": ("PaddedAttention",),
}


@pytest.mark.parametrize("case", exhaustive_but(DOMAIN, "padded model", "plain", "chunk", "sinks"))
def test_domain_has_one_node_for_each_op_that_means_what_its_schema_says(case, programs, tmp_path):
    from onnx.reference import ReferenceEvaluator

    padded, of = CASES[case][1:]
    program, path = programs(case), tmp_path / "model.onnx"
    tsa_onnx.save(program, path, domain="tsa")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {op: count for (domain, op), count in op_types(model).items() if domain == "tsa"} == dict.fromkeys(
        DOMAIN[case], 1
    )

    evaluator = ReferenceEvaluator(model, new_ops=reference_ops())
    for batch, length in ((2, 60), (1, 41)):
        inputs = make_inputs(batch, length, padded=padded, of=of)
        got = evaluator.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
        expected = output_of(program, inputs)
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", exhaustive_but([case for case in CASES if "sinks" in case], "sinks"))
def test_sinks_become_aten_operators(case, programs):
    program = programs(case)
    lowered = lower_program(program)
    for batch, length in ((2, 60), (1, 41)):
        inputs = make_inputs(batch, length, of="sinks")
        torch.testing.assert_close(output_of(lowered, inputs), output_of(program, inputs), rtol=1e-4, atol=1e-5)


def test_schemas_are_registered_and_documented():
    found = {schema.name: schema for schema in tsa_onnx.schemas()}
    assert set(found) == {operator for operators in DOMAIN.values() for operator in operators}
    assert all(schema.domain == "tsa" and schema.doc for schema in found.values())
    assert found["Budget"].attributes["min_tokens"].required
    assert not found["Budget"].attributes["coverage"].required
    assert [output.name for output in found["AttendLse"].outputs] == ["rows", "lse"]
    assert [output.name for output in found["CompressRows"].outputs] == ["query_rows", "key_rows", "value_rows"]
    assert tsa_onnx.schemas()[0].name == "Score", "a second call registers nothing twice"


def test_the_page_on_exports_has_the_table_of_schemas():
    table = schema_table()
    assert "| `Budget` | scores float [B,S,L] | count int32 [B] | coverage? float, keep_denominator? int, " in table
    page = (Path(__file__).parents[2] / "docs" / "exports.md").read_text()
    found = page.split("<!-- schemas:begin -->")[1].split("<!-- schemas:end -->")[0].strip()
    assert found == table


class Layer(torch.nn.Module):
    """A module whose attention was rewritten: what an export has for a layer, without a model around it."""

    def __init__(self, coverage=None, kernel="auto", capacity=None):
        super().__init__()
        self.coverage, self.kernel, self.capacity = coverage, kernel, capacity

    def forward(self, query, key, value):
        tsa, length = torch.ops.tsa, query.shape[2]
        capacity = length if self.capacity is None else torch.sym_min(length, self.capacity)
        scores = tsa.score(query, key, None, 0.25, 8, 7)
        count = tsa.budget(scores, self.coverage, None if self.coverage else 0.5, 3)
        indices = tsa.select(scores, count, capacity)
        rows = tsa.attend(*tsa.compress(query, key, value, indices, count), count, 0.25, self.kernel)
        return tsa.decompress(rows, indices, count, length)


class Model(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(**options)])

    def forward(self, query, key, value):
        return self.layers[0](query, key, value)


def program_of(model):
    tensors = (torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16))
    shapes = ({2: torch.export.Dim("length", min=16, max=300)},) * 3
    return torch.export.export(model, tensors, dynamic_shapes=shapes)


def test_a_coverage_without_capacity_names_the_layer_and_the_remedy(tmp_path):
    program = program_of(Model(coverage=0.1))
    with pytest.raises(ConfigError, match=r"layers\.0: a Coverage budget .*KeepRatio.*capacity"):
        tsa_onnx.save(program, tmp_path / "model.onnx")
    tsa_onnx.to_portable(program_of(Model(coverage=0.1, capacity=20)))


def test_the_layer_of_a_transformers_model_is_named():
    config = CONFIG.replace(budget=Coverage(0.2))
    program = export_program(small_llama(), make_inputs(2, 80), config, dynamic_lengths=None)
    with pytest.raises(ConfigError, match=r"^model\.layers\.1\.self_attn: a Coverage budget"):
        tsa_onnx.to_portable(program)


@pytest.mark.parametrize(
    ("kernel", "why"),
    [("flash3", "it is not registered here"), ("xattention", "it leaves attention out, as its selector says")],
)
def test_a_foreign_kernel_is_named_and_written_to_the_domain(kernel, why, tmp_path):
    program, path = program_of(Model(kernel=kernel)), tmp_path / "model.onnx"
    with pytest.raises(
        ConfigError, match=rf"layers\.0: kernel='{kernel}' has no form for standard operators: {why}.*domain=\"tsa\""
    ):
        tsa_onnx.save(program, path)
    tsa_onnx.save(program, path, domain="tsa")
    (attend,) = (node for node in onnx.load(path).graph.node if node.op_type == "Attend")
    assert {a.name: onnx.helper.get_attribute_value(a) for a in attend.attribute}["kernel"] == kernel.encode()


def test_an_exact_kernel_needs_no_name(tmp_path):
    tsa_onnx.save(program_of(Model(kernel="cudnn")), tmp_path / "model.onnx", domain="tsa")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert [[a.name for a in node.attribute] for node in nodes if node.op_type == "Attend"] == [["scale"]]


def test_a_lowered_program_is_refused(tmp_path):
    lowered = lower_program(program_of(Model()))
    with pytest.raises(ConfigError, match="lower=None"):
        tsa_onnx.save(lowered, tmp_path / "model.onnx")


def test_what_only_a_lowering_makes_is_refused(programs, tmp_path):
    joined = with_joined_floors(programs("floor of a group"))
    for domain in (None, "tsa"):
        with pytest.raises(ConfigError, match=r"the program holds tsa\.attend_floor\.default; pass one from export_program"):
            tsa_onnx.save(joined, tmp_path / "model.onnx", domain=domain)


def test_options_and_paths(tmp_path):
    program = program_of(Model())
    for path, found in [("model.pt", "must end in .onnx"), ("nowhere/model.onnx", "there is no folder")]:
        with pytest.raises(ConfigError, match=found):
            tsa_onnx.save(program, tmp_path / path)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        tsa_onnx.save(program, tmp_path / "folder.onnx")
    with pytest.raises(ConfigError, match="opset=18 is not allowed: opset must be one of 23, 24"):
        tsa_onnx.save(program, tmp_path / "model.onnx", opset=18)
    with pytest.raises(ConfigError, match="domain="):
        tsa_onnx.save(program, tmp_path / "model.onnx", domain="com.microsoft")


def test_a_missing_package_is_named_with_the_extra():
    with pytest.raises(ImportError, match=r"'not_there': pip install 'tsa-compile\[onnx\]'"):
        tsa_onnx.require("json", "not_there")


class HandsThrough(torch.nn.Module):
    def forward(self, input_ids):
        doubled = input_ids * 2
        return {"input_ids": input_ids, "mul": doubled + 1, "parts": [doubled]}


def test_inputs_and_outputs_have_the_models_names_unless_they_are_taken(tmp_path):
    program = export_program(
        HandsThrough().eval(), {"input_ids": torch.ones(1, 80, dtype=torch.int64)}, dynamic_lengths=LENGTHS
    )
    tsa_onnx.save(program, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    names = [value.name for value in model.graph.output]
    assert names[0] == "output.input_ids" and names[-1] == "parts.0" and len(set(names)) == 3
    assert [value.name for value in model.graph.input] == ["input_ids"]


class Experts(torch.nn.Module):
    def forward(self, rows, weight, offsets):
        return torch.ops.transformers.grouped_mm_fallback(rows, weight, offsets)


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    """With what to do, where it is that of a mixture of experts."""
    importlib.import_module("transformers.integrations.moe")  # which registers it
    inputs = (torch.randn(6, 4), torch.randn(2, 4, 5), torch.tensor([2, 6]))
    program = torch.export.export(Experts(), inputs)
    said = r'no form for the operator transformers\.grouped_mm_fallback.*set_experts_implementation\("batched_mm"\)'
    with pytest.raises(RewriteError, match=said):
        tsa_onnx.save(program, tmp_path / "model.onnx")
