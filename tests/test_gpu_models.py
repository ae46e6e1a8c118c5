"""Models on CUDA through Inductor: right in every mode, no L x L memory, and no slower where nothing is padded."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tsa_compile import Coverage, KeepRatio, TSAConfig, reports
from tsa_compile.kernels.padded import padded_attention, valid_ranges

from .support import MEDIUM, difference, heads, medians, mixed_padding, oracle, tiny, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse"),
]

SMALL = dict(window=16, min_tokens=16, min_length=1, layers=[0, 2])
EXACT = TSAConfig(layers=[])
KEEP_ALL = TSAConfig(budget=Coverage(0), **SMALL)
HALF = TSAConfig(budget=KeepRatio(0.5), floor=None, **SMALL)  # the oracle is the published method
COVERAGE = TSAConfig(budget=Coverage(0.2), floor=None, **SMALL)


def with_cuda_graphs(graph_module, example_inputs):
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph_module, example_inputs, config_patches={"triton.cudagraphs": True})


def logits_of(model, length, padded=True):
    """Logits for three items, in float32 on the CPU; `padded` None passes no mask at all."""
    mask = mixed_padding(length) if padded else torch.ones(3, length, dtype=torch.long)
    with torch.no_grad():
        device = next(model.parameters()).device
        given = {} if padded is None else {"attention_mask": mask.to(device)}
        logits = model(tokens(3, length).to(device), use_cache=False, **given).logits
    return logits.float().cpu(), mask


def as_exact(found, plain, true, mask):
    """Whether what was found errs no more than half again as much as the plain model, both in bfloat16."""
    valid = mask.bool()
    return (found - true)[valid].norm() < 1.5 * (plain - true)[valid].norm()


@pytest.mark.parametrize("sizes", [{}, MEDIUM], ids=["tiny", "medium"])
@pytest.mark.parametrize("config", [EXACT, KEEP_ALL], ids=["exact", "keep-all"])
def test_bfloat16_is_as_exact_as_the_plain_model(config, sizes):
    true, mask = logits_of(tiny("llama", **sizes), 200)
    model = tiny("llama", **sizes).to("cuda", torch.bfloat16)
    plain, _ = logits_of(model, 200)
    found, _ = logits_of(torch.compile(model, backend="tsa", options={"config": config}), 200)
    assert reports()[-1].sparse == (2 if config is KEEP_ALL else 0)
    assert reports()[-1].unchanged == 0
    assert as_exact(found, plain, true, mask)


@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [HALF, COVERAGE], ids=["half", "coverage"])
def test_dropped_tokens_equal_the_oracle(config, form):
    """float32, so that the same tokens are selected."""
    model = tiny("llama", form).cuda()
    found, mask = logits_of(torch.compile(model, backend="tsa", options={"config": config}), 200)
    budget = {"keep_ratio": 0.5} if config is HALF else {"coverage": 0.2}
    with oracle([0, 2], window=16, min_tokens=16, **budget):
        wanted, _ = logits_of(tiny("llama", "oracle"), 200)
    assert difference(found, wanted, mask) < 1e-4
    plain, _ = logits_of(model, 200)
    assert difference(wanted, plain, mask) > 1e-2


@pytest.mark.parametrize("padded", [False, True], ids=["ones", "padded"])
def test_one_compilation_serves_many_lengths(padded):
    model = tiny("llama", **MEDIUM).to("cuda", torch.bfloat16)
    fast = torch.compile(model, backend="tsa", options={"config": KEEP_ALL}, dynamic=True)
    for length in (300, 257, 513, 129):
        true, mask = logits_of(tiny("llama", **MEDIUM), length, padded)
        plain, _ = logits_of(model, length, padded)
        found, _ = logits_of(fast, length, padded)
        assert as_exact(found, plain, true, mask), length
    assert [report.sparse for report in reports()] == [2]


@pytest.mark.parametrize("config", [EXACT, KEEP_ALL, HALF], ids=["exact", "keep-all", "half"])
@pytest.mark.parametrize("padded", [None, False, True], ids=["no mask", "ones", "padded"])
def test_cuda_graphs(config, padded):
    """Captured and replayed, or, where the graph reads the padding on the host, left out of the capture: right."""
    model = tiny("llama", **MEDIUM).cuda()
    captured = torch.compile(model, backend="tsa", options={"config": config, "compiler": with_cuda_graphs})
    wanted = logits_of(torch.compile(model, backend="tsa", options={"config": config}), 200, padded)[0]
    for _ in range(4):
        found, mask = logits_of(captured, 200, padded)
    assert difference(found, wanted, mask) < 1e-3
    if padded is not None:  # another mask in the same shapes: what was captured must not remember the first
        found, mask = logits_of(captured, 200, not padded)
        wanted = logits_of(torch.compile(model, backend="tsa", options={"config": config}), 200, not padded)[0]
        assert difference(found, wanted, mask) < 1e-3


@pytest.mark.parametrize("config", [EXACT, HALF], ids=["exact", "half"])
def test_regional_compilation(config):
    """Layers that are alike are compiled once, by Inductor: what the graph that is compiled as a whole computes."""
    model = tiny("llama", num_hidden_layers=6).cuda()
    config = config if config is EXACT else config.replace(layers=[3, 4, 5])
    wanted, mask = logits_of(torch.compile(model, backend="tsa", options={"config": config}), 200)
    regional = torch.compile(model, backend="tsa", options={"config": config.replace(regional=True)})
    found, _ = logits_of(regional, 200)
    assert difference(found, wanted, mask) < 1e-4
    assert any(note.startswith("regional") for note in reports()[-1].notes), "it was compiled by regions"
    assert reports()[-1].sparse == (0 if config.layers == () else 3)


def test_layers_with_work_enough_are_compiled_once_by_default():
    sizes = {"hidden_size": 2048, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 16}
    model = tiny("llama", num_hidden_layers=4, max_position_embeddings=8192, **sizes).cuda().bfloat16()
    ids = tokens(1, 8192).cuda()
    with torch.no_grad():
        torch.compile(model, backend="tsa", options={"config": EXACT})(input_ids=ids, logits_to_keep=1)
    assert any("parts of the graph" in note for note in reports()[-1].notes)


def test_generate():
    model = tiny("llama", eos_token_id=None).cuda()
    inputs = dict(input_ids=tokens(3, 60).cuda(), attention_mask=mixed_padding(60, (0, 9, 4)).cuda())
    settings = dict(max_new_tokens=8, do_sample=False)
    plain = model.generate(**inputs, **settings)
    model.forward = torch.compile(model.forward, backend="tsa", options={"config": KEEP_ALL})
    assert torch.equal(model.generate(**inputs, **settings), plain)
    assert reports()[0].sparse == 2


@pytest.mark.parametrize("config", [EXACT, KEEP_ALL.replace(layers=[0])], ids=["exact", "keep-all"])
def test_no_quadratic_memory_under_a_mask_of_ones(config):
    """32K tokens, where one bool mask is 1 GiB: a quarter of that holds everything else."""
    length = 32768
    sizes = {**MEDIUM, "num_hidden_layers": 1, "intermediate_size": 256, "hidden_size": 256, "num_attention_heads": 4}
    model = tiny("llama", **sizes).to("cuda", torch.bfloat16)
    inputs = dict(input_ids=tokens(1, length).cuda(), attention_mask=torch.ones(1, length, dtype=torch.long).cuda())
    fast = torch.compile(model, backend="tsa", options={"config": config})
    with torch.no_grad():
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            fast(**inputs, use_cache=False, logits_to_keep=1)
            torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < length * length / 4
    assert reports()[-1].unchanged == 0


@pytest.mark.timing
def test_a_mask_of_ones_costs_nothing():
    """Padded attention where nothing is padded, against causal attention by the fastest kernel: at most 5% more."""
    length = 16384
    query, key, value = heads(1, 32, 8, length, 128, device="cuda", dtype=torch.bfloat16)
    padding = torch.ones(1, length, dtype=torch.bool, device="cuda")
    ranges, scale = valid_ranges(padding), 128**-0.5
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def causal():
        with sdpa_kernel(kernels, set_priority=True):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def padded():
        return padded_attention(query, key, value, padding, ranges, scale, False)

    assert difference(padded(), causal()) < 1e-2
    baseline, measured = medians(causal, padded)
    assert measured <= 1.05 * baseline, f"{measured:.3f} ms with a mask of ones, {baseline:.3f} ms causal"
