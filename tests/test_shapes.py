"""Built-in shapes: their sizes, how they are built, what they need, and reports without weights."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig

from tsa_compile import Coverage, Reason, RewriteError, TSAConfig, TSAWarning, explain, shapes
from tsa_compile.costs import memory, models
from tsa_compile.errors import ConfigError, KernelError
from tsa_compile.shapes import build, explain_weightless, model_config, prompts

pytestmark = pytest.mark.usefixtures("fresh")

CONFIG = TSAConfig(budget=Coverage(0.2), window=4, min_tokens=4)

# As the Hugging Face Hub counts the parameters of the safetensors files; of Gemma 3 the text model's with its vocabulary of
# 262208, of gpt-oss, whose files are quantized, the 20.91 billion of its model card.
PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo": 12_247_782_400,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-3-12b": 11_766_034_176,
    "gpt-oss-20b": 20_914_757_184,
    "phi-3-mini": 3_821_079_552,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    assert memory.weight_count(model_config(name)) == PUBLISHED[name]


def test_every_shape_is_held_against_a_published_count():
    assert set(shapes.SHAPES) - set(PUBLISHED) == {"tiny", "small"}


def test_fewer_layers_and_the_same_otherwise():
    whole, part = model_config("gemma-3-12b"), model_config("gemma-3-12b", layers=7)
    assert part.num_hidden_layers == len(part.layer_types) == 7
    assert part.layer_types == whole.layer_types[:7]
    assert (part.hidden_size, part.vocab_size) == (whole.hidden_size, whole.vocab_size)


@pytest.mark.parametrize(
    ("name", "near"), [("llama-3.1-8B", "'llama-3.1-8b'"), ("llama31-8b", "'llama-3.1-8b'"), ("qwen3", "'qwen3-8b'")]
)
def test_a_wrong_name_names_the_nearest(name, near):
    with pytest.raises(ConfigError, match=f"did you mean {near}"):
        model_config(name)


def test_no_name_is_near():
    with pytest.raises(ConfigError, match="the shapes are tiny") as caught:
        model_config("zzz")
    assert "did you mean" not in str(caught.value)


def test_no_layers():
    with pytest.raises(ConfigError, match="layers=0"):
        model_config("tiny", layers=0)


class Dtypes(TorchDispatchMode):
    """The floating-point dtypes of large tensors that operators make."""

    def __init__(self, at_least):
        super().__init__()
        self.at_least, self.found = at_least, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() >= self.at_least:
            self.found.add(out.dtype)
        return out


def test_weights_never_pass_through_float32():
    config = model_config("tiny")
    with Dtypes(at_least=config.hidden_size * config.num_key_value_heads * config.head_dim) as dtypes:
        model = build(config, dtype=torch.bfloat16)
    assert dtypes.found == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_weights_are_random_finite_and_seeded():
    first, again, other = (build(model_config("tiny", layers=1), seed=seed) for seed in (1, 1, 2))
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].isfinite().all() and weights[0].std() > 0


def test_prompts():
    config = model_config("tiny")
    ids = prompts(config, 3, 50, seed=1)
    assert ids.shape == (3, 50) and ids.dtype == torch.int64
    assert int(ids.min()) >= 3 and int(ids.max()) < config.vocab_size
    assert torch.equal(ids, prompts(config, 3, 50, seed=1)) and not torch.equal(ids, prompts(config, 3, 50, seed=2))


def test_a_report_without_weights_is_that_of_the_real_model():
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = model_config("gemma-3-12b", layers=2)
    kinds = ["sliding_attention", "full_attention"]
    config.update({**sizes, "vocab_size": 512, "sliding_window": 16, "layer_types": kinds})
    ids = prompts(config, 2, 60)
    with torch.no_grad():
        real = explain(build(config), input_ids=ids, attention_mask=torch.ones_like(ids), config=CONFIG)
    found = explain_weightless(config, 60, CONFIG, batch=2)
    assert found.sparse > 0
    assert found.to_dict() == real.to_dict()


def test_a_report_at_a_size_that_no_machine_holds():
    report = explain_weightless(model_config("llama-3.1-70b", layers=2), 2**20, dtype=torch.bfloat16)
    assert [row.reason for row in report] == [Reason.LAYER_NOT_SELECTED, Reason.SPARSE]
    assert report.rows[1].query == (1, 64, 2**20, 128)


def test_errors_of_the_configuration_pass_through():
    with pytest.raises(Exception, match="absent") as caught:
        explain_weightless(model_config("tiny", layers=1), 60, CONFIG.replace(kernel="absent"))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), KernelError)


def test_a_layer_that_the_model_does_not_have():
    with pytest.warns(TSAWarning, match="not found"):
        report = explain_weightless(model_config("tiny", layers=1), 60, CONFIG.replace(layers=[7]))
    assert report.sparse == 0


class Looks(torch.nn.Module):
    def forward(self, input_ids, attention_mask):
        return input_ids * 2 if input_ids.sum().item() > 0 else input_ids


def test_a_model_that_looks_at_values_needs_weights(monkeypatch):
    auto = SimpleNamespace(from_config=lambda config, **options: Looks())
    monkeypatch.setattr(models, "require_transformers", lambda: SimpleNamespace(AutoModelForCausalLM=auto))
    with pytest.raises(RewriteError, match=r"Looks cannot be traced without weights .*--weights"):
        explain_weightless(None, 60, CONFIG)


@pytest.mark.gpu
def test_a_shape_on_the_gpu():
    config = model_config("small", layers=2)
    model = build(config, "cuda", torch.bfloat16)
    ids = prompts(config, 1, 300, "cuda")
    found = explain_weightless(config, 300, CONFIG, device="cuda", dtype=torch.bfloat16)
    real = explain(model, input_ids=ids, attention_mask=torch.ones_like(ids), config=CONFIG)
    assert found.to_dict() == real.to_dict()


@pytest.mark.gpu
def test_free_memory_counts_what_pytorch_holds_without_using_it(monkeypatch):
    torch.empty(2**20, device="cuda")
    assert 0 < memory.free_bytes("cuda") <= torch.cuda.mem_get_info()[1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))  # other processes change the real one meanwhile
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    assert unused > 0
    assert memory.free_bytes("cuda") == 7 + unused


def test_a_prompt_beyond_the_positions_of_a_model_that_cannot_be_traced_with_it(caplog):
    """BERT cuts a table of token types, which has its positions."""
    config = BertConfig(num_hidden_layers=1, is_decoder=True, max_position_embeddings=64)
    with pytest.raises(ConfigError, match="prompts of 80 tokens do not fit: BertLMHeadModel has 64 positions"):
        explain_weightless(config, 80, CONFIG)
    assert not caplog.records
