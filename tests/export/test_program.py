"""`export_program`: the passes on torch.export's graph, for every length and batch of a range."""

import functools
import importlib.util
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim
from torch.nn.attention import SDPBackend, sdpa_kernel

from tsa_compile import ConfigError, Coverage, Decision, Floor, KeepRatio, RewriteError, TSAConfig, clear_reports, reports
from tsa_compile.export import export_program
from tsa_compile.export import onnx as tsa_onnx
from tsa_compile.kernels import sliding
from tsa_compile.passes.lower import lower_program
from tsa_compile.pipeline import run_passes
from tsa_compile.testing import count_ops

from ..support import Attention, difference, exhaustive_but, heads, mixed_padding, tiny, tokens, with_sinks
from .support import SMALL

HALF = SMALL.replace(budget=KeepRatio(0.5))
LENGTHS, BATCHES = (16, 200), (1, 8)
ATOL = 1e-5
PADS = {40: (0, 9), 70: (5, -7, 0), 33: (0, -20)}

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec.*:FutureWarning"),
]


def model_inputs(length, padded):
    ids = tokens(len(PADS[length]), length)
    return {"input_ids": ids, "attention_mask": mixed_padding(length, PADS[length])} if padded else {"input_ids": ids}


def wide_values(program):
    """The calls that make something with two dimensions of the length."""
    length = max(program.range_constraints, key=lambda symbol: program.range_constraints[symbol].upper)
    made = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "call_function"}
    shapes = {name: list(map(str, value.shape)) for name, value in made.items() if isinstance(value, torch.Tensor)}
    return [name for name, shape in shapes.items() if shape.count(str(length)) > 1]


CASES = {
    "llama": ("llama", "sdpa", SMALL.replace(budget=Coverage(0.2)), True, "aten"),
    "mistral-written-out": ("mistral", "eager", HALF, True, "aten"),
    "qwen2-groups": ("qwen2", "sdpa", HALF.replace(granularity="group"), False, "aten"),
    "llama-floor": ("llama", "sdpa", HALF.replace(floor=Floor(8, 2)), True, "aten"),
    "llama-written-out-ops": ("llama", "eager", SMALL.replace(budget=Coverage(0.2), capacity=30), True, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", exhaustive_but(CASES, "llama-floor"))
def test_equals_the_compiled_model(case, tmp_path):
    name, attention, config, padded, lower = CASES[case]
    changes = {"sliding_window": None} if name == "mistral" else {}
    model = tiny(name, attention, num_hidden_layers=2, **changes)
    program = export_program(
        model, model_inputs(40, padded), config, dynamic_lengths=LENGTHS, dynamic_batch=BATCHES, lower=lower
    )
    dense = Decision.DENSE_PADDED if padded else Decision.DENSE
    assert [row.decision for row in reports()[-1]] == [dense, Decision.SPARSE]
    assert count_ops(program.graph_module, "score") == {"score": 0 if lower else 1}
    if lower is None or not padded:
        assert wide_values(program) == []
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    options = {"config": config.replace(compiler="eager")}
    compiled = torch.compile(model, backend="tsa", options=options, dynamic=True)
    for length in (70, 33):
        inputs = model_inputs(length, padded)
        with torch.no_grad():
            result, expected = loaded(**inputs), compiled(**inputs, use_cache=False).logits
        assert type(result) is dict and list(result) == ["logits"]
        assert difference(result["logits"], expected) < ATOL, length


@pytest.mark.exhaustive
def test_exports_again_for_the_same_range():
    inputs = model_inputs(40, True)
    model = tiny("llama", num_hidden_layers=2)
    program = export_program(model, inputs, HALF, dynamic_lengths=LENGTHS, dynamic_batch=BATCHES)
    assert model.config.use_cache
    dims = {0: Dim("batch", min=1, max=8), 1: Dim("length", min=16, max=200)}
    again = torch.export.export(program.module(), (), inputs, dynamic_shapes=dict.fromkeys(inputs, dims))
    inputs = model_inputs(70, True)
    torch.testing.assert_close(again.module()(**inputs), program.module()(**inputs))


@pytest.mark.exhaustive
def test_an_unpadded_batch_of_one_is_no_constant():
    program = export_program(
        tiny("llama", num_hidden_layers=2),
        {"input_ids": tokens(1, 20)},
        HALF,
        dynamic_lengths=LENGTHS,
        dynamic_batch=BATCHES,
    )
    for batch in (1, 3):
        assert program.module()(input_ids=tokens(batch, 30))["logits"].shape == (batch, 30, 64)


def test_static_shapes_and_positional_inputs():
    program = export_program(tiny("llama", num_hidden_layers=2), (tokens(1, 20),), HALF, dynamic_lengths=None)
    assert program.range_constraints == {}
    assert program.module()(tokens(1, 20))["logits"].shape == (1, 20, 64)


def test_the_output_may_be_the_attention_itself():
    inputs = heads(length=40)
    config = HALF.replace(layers=(0,))
    program = export_program(Attention().eval(), inputs, config, dynamic_lengths=LENGTHS, lower=None)
    assert [row.decision for row in reports()[-1]] == [Decision.SPARSE]
    longer = heads(length=64)
    expected = torch.compile(Attention(), backend="tsa", options={"config": config.replace(compiler="eager")})(*longer)
    torch.testing.assert_close(program.module()(*longer), expected)


class Masked(torch.nn.Module):
    """Two calls under a mask that says "causal"."""

    def forward(self, query, key, value):
        positions = torch.arange(query.shape[2])
        mask = positions[None] <= positions[:, None]
        for _ in range(2):
            query = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return query


class Windowed(torch.nn.Module):
    """A sliding window of five tokens, with padding if there is any."""

    def forward(self, query, key, value, pad=None):
        positions = torch.arange(query.shape[2])
        mask = (positions <= positions[:, None]) & (positions > positions[:, None] - 5)
        mask = mask if pad is None else mask & (pad != 0)[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lower", exhaustive_but([None, "aten"], "aten"))
def test_windows(lower, padded, tmp_path, monkeypatch):
    """In operators of torch's and in ONNX files, in which no domain has one for them, they are blocks: no mask is L x L."""
    monkeypatch.setattr(sliding, "LEAST_BLOCK", 8)

    def inputs(length):
        return *heads(batch=3, length=length), *([mixed_padding(length)] if padded else [])

    module, exact = Windowed().eval(), HALF.replace(layers=())
    program = export_program(module, inputs(40), exact, dynamic_lengths=LENGTHS, dynamic_batch=BATCHES, lower=lower)
    assert [row.decision for row in reports()[-1]] == [Decision.WINDOW]
    assert wide_values(program) == []
    for length in (20, 64):
        torch.testing.assert_close(program.module()(*inputs(length)), module(*inputs(length)))
    for domain in (None, "tsa") if lower is None else ():
        onnx = pytest.importorskip("onnx")
        tsa_onnx.save(program, tmp_path / "model.onnx", domain=domain)
        file = onnx.load(tmp_path / "model.onnx")
        assert {node.domain for node in file.graph.node} == {""}
        run = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "model.onnx").run
        names = [value.name for value in file.graph.input]
        found = run(None, {name: value.numpy() for name, value in zip(names, inputs(33), strict=True)})[0]
        torch.testing.assert_close(torch.from_numpy(found), module(*inputs(33)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("example", exhaustive_but([7, 40], 7))
def test_windows_of_one_prompt(example, tmp_path, monkeypatch):
    """The shortest, and the example, may be a single block."""
    monkeypatch.setattr(sliding, "LEAST_BLOCK", 8)
    module, exact = Windowed().eval(), HALF.replace(layers=())
    program = export_program(module, heads(batch=1, length=example), exact, dynamic_lengths=(2, 90), lower=None)
    tsa_onnx.save(program, tmp_path / "model.onnx")
    run = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "model.onnx").run
    names = [node.name for node in program.graph.find_nodes(op="placeholder")]
    for inputs in (heads(batch=1, length=length) for length in (2, 8, 9, 41)):
        close = functools.partial(torch.testing.assert_close, module(*inputs), rtol=1e-4, atol=1e-5)
        close(lower_program(program).module()(*inputs))
        found = run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})[0]
        close(torch.from_numpy(found))


@pytest.mark.parametrize("padded", exhaustive_but([False, True], True))
def test_windows_beside_sinks(padded, monkeypatch):
    """gpt-oss: a layer has a window, and each softmax a learned logit besides."""
    monkeypatch.setattr(sliding, "LEAST_BLOCK", 8)
    model = with_sinks()
    program = export_program(
        model, model_inputs(40, padded), HALF.replace(layers=()), dynamic_lengths=(36, 200), dynamic_batch=BATCHES
    )
    assert Decision.WINDOW in {row.decision for row in reports()[-1]}
    assert wide_values(program) == []
    inputs = model_inputs(70, padded)
    with torch.no_grad():
        found, wanted = program.module()(**inputs)["logits"], model(**inputs, use_cache=False).logits
    assert difference(found, wanted, inputs.get("attention_mask")) < ATOL


class Biased(torch.nn.Module):
    """Attention with a learned bias, as T5's: SDPA lays its output out otherwise where the bias asks for a gradient."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.linspace(-1, 1, 4).reshape(1, 4, 1, 1))
        self.tied = self.bias

    def forward(self, query, key, value):
        positions = torch.arange(key.shape[2])
        bias = self.bias * (positions - positions[:, None]) + self.tied
        projected = (x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in (query, key, value))
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in projected), attn_mask=bias)
        return out.transpose(1, 2).contiguous().view(query.shape[0], query.shape[2], -1)


def test_programs_run_and_are_written_with_gradients_switched_on(tmp_path):
    module, example, inputs = Biased().eval(), heads(length=40, kv_heads=4), heads(length=64, kv_heads=4)
    program = export_program(module, example, HALF.replace(layers=()), dynamic_lengths=LENGTHS)
    with torch.no_grad():
        plain = torch.export.export(module, example, dynamic_shapes=({2: Dim("length", min=16, max=200)},) * 3)
        plain = plain.run_decompositions({})
    for each in (program, lower_program(program)):
        torch.testing.assert_close(each.module()(*inputs), module(*inputs))
    if importlib.util.find_spec("onnxscript"):
        tsa_onnx.save(plain, tmp_path / "model.onnx")
    assert module.bias.requires_grad and program.state_dict["bias"].data_ptr() == module.bias.data_ptr()
    assert program.state_dict["bias"] is program.state_dict["tied"]


def test_sizes_stay_free_where_sdpa_is_traced_by_its_plain_form(monkeypatch):
    """As on CUDA. In C++ that form reads symbolic sizes as numbers."""
    monkeypatch.setattr("tsa_compile.export.program._unaligned_masks", lambda: sdpa_kernel(SDPBackend.MATH))
    program = export_program(Masked().eval(), heads(length=40), HALF, dynamic_lengths=LENGTHS, dynamic_batch=BATCHES)
    assert [row.decision for row in reports()[-1]] == [Decision.DENSE, Decision.SPARSE]
    assert program.module()(*heads(batch=3, length=64)).shape == (3, 4, 64, 16)


def test_a_size_that_a_rewrite_fixed_is_an_error(monkeypatch):
    def fixing(graph_module, config, passes):
        value = next(iter(graph_module.graph.nodes)).meta["val"]
        assert value.shape[2] == 40  # a guard, which says so for all that follows
        return run_passes(graph_module, config, passes)

    monkeypatch.setattr("tsa_compile.export.program.run_passes", fixing)
    with pytest.raises(RewriteError, match=r"fixed sizes that the export left free, at key:2, query:2, value:2"):
        export_program(Attention().eval(), heads(length=40), HALF.replace(layers=(0,)), dynamic_lengths=LENGTHS)


def export_attention(config, lengths=(100, 200), **options):
    return export_program(
        Attention().eval(), heads(length=120), config.replace(layers=(0,)), dynamic_lengths=lengths, **options
    )


def decisions(config, lengths=(100, 200)):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_attention(config, lengths, lower=None)
    return [row.decision for row in reports()[-1]]


def test_one_decision_for_the_whole_range():
    assert decisions(HALF) == [Decision.SPARSE]
    assert decisions(HALF.replace(min_length=100)) == [Decision.SPARSE]
    assert decisions(HALF.replace(min_length=201)) == [Decision.DENSE]
    # up to 155 tokens nothing can be dropped, so that sparse and dense are the same there
    assert decisions(HALF.replace(min_tokens=150)) == [Decision.SPARSE]
    program = export_attention(HALF.replace(min_tokens=150))
    for length in (100, 154, 155, 200):
        expected = Attention()(*heads(length=length))
        (torch.testing.assert_close if length < 155 else assert_differs)(program.module()(*heads(length=length)), expected)


def assert_differs(left, right):
    assert difference(left, right) > 1e-3


def test_a_length_that_a_sparse_layer_cannot_run_is_refused():
    config = SMALL.replace(min_length=1)
    with pytest.raises(ConfigError, match="a size of 1 cannot be exported: let the range begin at 2"):
        export_program(Attention().eval(), heads(length=40), config.replace(layers=(0,)), dynamic_lengths=(1, 60))
    exact = export_program(Attention().eval(), heads(length=40), config.replace(layers=()), dynamic_lengths=(1, 60))
    assert exact.module()(*heads(length=1)).shape[2] == 1


def test_a_range_that_would_need_two_versions_is_refused():
    with pytest.raises(ConfigError, match=r"compresses from 150 on.*raise the shortest of dynamic_lengths.*min_length"):
        export_attention(HALF.replace(min_length=150))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic_lengths": (64, 200)}, "example's length is 20, outside dynamic_lengths"),
        ({"dynamic_lengths": (200, 16)}, r"dynamic_lengths must be \(shortest, longest\)"),
        ({"dynamic_lengths": (True, 200)}, r"dynamic_lengths must be \(shortest, longest\)"),
        ({"dynamic_lengths": LENGTHS, "dynamic_batch": (False, True)}, r"dynamic_batch must be \(smallest, largest\)"),
        ({"dynamic_lengths": LENGTHS, "dynamic_batch": (2, 2)}, r"dynamic_batch must be \(smallest, largest\)"),
        ({"dynamic_lengths": (16, 257)}, "prompts of 257 tokens do not fit: LlamaForCausalLM has 256 positions"),
        ({"dynamic_lengths": LENGTHS, "lower": "onnx"}, "lower='onnx' is not allowed"),
        ({"dynamic_lengths": LENGTHS, "config": TSAConfig(layers=(7,))}, r"layers=\[7\] not found"),
    ],
)
def test_options_that_are_not_allowed(options, message):
    options = {"config": HALF, **options}
    with pytest.raises(ConfigError, match=message):
        export_program(tiny("llama", num_hidden_layers=2), {"input_ids": tokens(1, 20)}, **options)


class Ids(torch.nn.Module):
    """Takes nothing else."""

    def forward(self, input_ids):
        return input_ids


def test_inputs_that_are_not_allowed():
    model = tiny("llama", num_hidden_layers=2)
    for wrong in (5, None, tokens(1, 20)):
        with pytest.raises(ConfigError, match=f"example_inputs is a {type(wrong).__name__}: pass a dict of inputs by name"):
            export_program(model, wrong, HALF)
    with pytest.raises(ConfigError, match="no tensor"):
        export_program(model, {"input_ids": None}, HALF)
    ids = {"input_ids": tokens(1, 20)}
    with pytest.raises(ConfigError, match="'past_key_values' is a list"):
        export_program(model, {**ids, "past_key_values": []}, HALF)
    with pytest.raises(ConfigError, match="use_cache=True is not possible"):
        export_program(model, {**ids, "use_cache": True}, HALF, dynamic_lengths=LENGTHS)
    with pytest.raises(ConfigError, match=r"takes 'output_hidden_states' through \*\*kwargs"):
        export_program(model, {**ids, "output_hidden_states": True}, HALF, dynamic_lengths=LENGTHS)
    with pytest.raises(ConfigError, match=r"'input_idz' is not an input .did you mean 'input_ids'"):
        export_program(Ids().eval(), {"input_idz": tokens(1, 20)}, HALF, dynamic_lengths=LENGTHS)
    with pytest.raises(ConfigError, match=r"call model\.eval\(\) first"):
        export_program(model.train(), ids, HALF)
    with pytest.raises(ConfigError, match=r"a program's module.* pass the model it was exported from"):
        export_program(torch.export.export(Ids().eval(), (), ids).module(), ids, HALF)


def test_default_lengths_are_those_that_a_model_has_positions_for():
    config = HALF.replace(min_length=1, layers=[0])
    for model in (tiny("llama", num_hidden_layers=1), torch.compile(tiny("llama", num_hidden_layers=1), backend="eager")):
        program = export_program(model, {"input_ids": tokens(1, 140)}, config)
        (extents,) = program.range_constraints.values()
        assert (extents.lower, extents.upper) == (128, 256)


def test_a_model_of_fixed_length_is_named():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.reshape(-1, 40, 8)

    with pytest.raises(RewriteError, match="if the model itself fixes a size, pass None"):
        export_program(Fixed().eval(), (torch.ones(2, 40, 8),), HALF, dynamic_lengths=LENGTHS)


class TestWrittenOut:
    """torch.export writes assertions about dtypes behind casts, which read what is to disappear."""

    def export(self, finish, as_tensor=False, dtype=torch.float32):
        class Written(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.as_tensor = as_tensor

            def forward(self, q, k, v):
                positions = torch.arange(q.shape[2])
                zero = torch.tensor(0.0) if self.as_tensor else 0.0  # transformers writes it either way
                bias = torch.where(positions[None] <= positions[:, None], zero, torch.finfo(q.dtype).min)
                weights = F.softmax(q @ k.mT + bias, dim=-1, dtype=torch.float32).to(q.dtype)
                return finish(F.dropout(weights, 0.0, training=False) @ v, weights)

        clear_reports()
        export_program(
            Written().eval(),
            heads(length=40, kv_heads=4, dtype=dtype),
            HALF.replace(layers=(0,)),
            dynamic_lengths=LENGTHS,
            lower=None,
        )
        return reports()[-1]

    @pytest.mark.parametrize(
        ("as_tensor", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)]
    )
    def test_is_sparse(self, as_tensor, dtype):
        report = self.export(lambda out, weights: out, as_tensor, dtype)
        assert [row.decision for row in report] == [Decision.SPARSE], report

    @pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse")
    def test_with_weights_that_are_read_stays(self):
        assert [row.decision for row in self.export(lambda out, weights: (out, weights))] == [Decision.UNCHANGED]
