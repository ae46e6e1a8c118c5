"""The study's model: the shift, its cache and padding, its folder, and its way through the compiler."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3ForCausalLM, StaticCache

from tsa_compile import Decision, KeepRatio, TSAConfig, explain
from tsa_compile.evaluation.study import evaluate

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"
MODULES = {"checkpoint", "modeling_recall", "starts"}
TINY = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    max_position_embeddings=256,
)  # fmt: skip
LENGTH = 40
ATOL = 1e-5


@pytest.fixture(scope="module")
def checkpoint():
    """benchmarks/accuracy/checkpoint.py, imported as its neighbours import it."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("checkpoint")
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint.build_model(**TINY).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(input_ids=ids, **inputs).logits


def error(found, wanted):
    return (found - wanted).abs().max().item()


def test_the_full_size_is_what_the_study_promises(checkpoint):
    with torch.device("meta"):
        model = checkpoint.RecallForCausalLM(checkpoint.RecallConfig(**checkpoint.SIZES, tie_word_embeddings=True))
    count = checkpoint.parameter_count(model)
    assert 10e6 <= count <= 26e6
    assert 2 * count <= checkpoint.LIMIT == 50_000_000


def test_the_shift_is_the_formula(model, ids):
    """The model is Qwen3's layers over E[x[t]] + W E[x[t-1]], written out here for each token."""
    embeddings = model.model.embed_tokens(ids)
    before = torch.cat((torch.zeros_like(embeddings[:, :1]), embeddings[:, :-1]), 1)
    shifted = embeddings + before @ model.shift.weight.T
    with torch.no_grad():
        wanted = model.lm_head(model.model(inputs_embeds=shifted).last_hidden_state)
        unshifted = model.lm_head(model.model(inputs_embeds=embeddings).last_hidden_state)
    assert error(logits(model, ids), wanted) < ATOL
    assert error(logits(model, ids), unshifted) > 100 * ATOL  # or the shift did nothing
    with torch.no_grad():
        assert error(model(inputs_embeds=embeddings).logits, wanted) < ATOL


def test_weights_depend_on_the_seed_alone(checkpoint):
    state = torch.random.get_rng_state()
    first, same, other = (checkpoint.build_model(seed=seed, **TINY).shift.weight for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    norms = checkpoint.build_model(**TINY).model.layers[1].self_attn
    assert norms.q_norm.weight.unique().tolist() == norms.k_norm.weight.unique().tolist() == [checkpoint.GAIN]


@torch.no_grad()
@pytest.mark.parametrize("aligned", [True, False])
def test_an_aligned_start_reads_the_token_behind_its_own(checkpoint, aligned):
    """A token that comes again meets the key of what followed it, by content alone: before any training, in every layer."""
    model = checkpoint.build_model(aligned=aligned, **(TINY | dict(hidden_size=256, head_dim=64)))
    ids = torch.randperm(64, generator=torch.Generator().manual_seed(0))[None]
    hidden = torch.nn.functional.normalize(model.embed(model.model.embed_tokens(ids))[0])
    successors = torch.arange(1, 64)
    for layer in model.model.layers:
        attention = layer.self_attn
        query, key, value = (attention.get_submodule(f"{name}_proj")(hidden) for name in "qkv")
        for head in range(4):
            scores = query[:, 64 * head :][:, :64] @ key[:, 64 * (head // 2) :][:, :64].T
            found = (scores[:-1].argmax(1) == successors).float().mean()
            written = value[:, 64 * (head // 2) :][:, :64] @ attention.o_proj.weight[:, 64 * head :][:, :64].T @ hidden.T
            copied = (written.argmax(1) == torch.arange(64)).float().mean()
            least = 0.7 if head % 2 == 0 else 0.3  # the second of a group is half its own
            assert (found > least and copied > 0.9) if aligned else (found < 0.2 and copied < 0.2), (head, found, copied)


@torch.no_grad()
@pytest.mark.parametrize("aligned", [True, False])
def test_without_a_shift_layer_0_starts_with_the_token_before(checkpoint, aligned):
    """And what layer 1 reads of it is met by a query of that token, whatever the positions."""
    sizes = TINY | dict(hidden_size=256, head_dim=64, vocab_size=512)
    model = checkpoint.build_model(token_shift=False, aligned=aligned, **sizes).eval()
    model.set_attn_implementation("eager")
    ids = torch.randperm(512, generator=torch.Generator().manual_seed(0))[None, :128]
    found = model.model(ids, output_attentions=True, output_hidden_states=True, use_cache=False)
    places = torch.arange(1, 128)
    previous = found.attentions[0][0, :, places, places - 1].mean(1)
    assert (previous > 0.7).all() if aligned else (previous < 0.1).all()

    layer = model.model.layers[1]
    hidden = layer.input_layernorm(found.hidden_states[1][0])
    query, key = (norm(proj(hidden).view(128, -1, 64)) for norm, proj in (
        (layer.self_attn.q_norm, layer.self_attn.q_proj), (layer.self_attn.k_norm, layer.self_attn.k_proj)
    ))  # fmt: skip
    for head in (0, 2):  # the first of each group
        scores = query[:, head] @ key[:, head // 2].T
        met = (scores[:-1].argmax(1) == places).float().mean()
        assert met > 0.15 if aligned else met < 0.05


@torch.no_grad()
def test_aligned_weights_are_as_large_as_drawn_ones(checkpoint):
    drawn = checkpoint.build_model(aligned=False, **TINY).state_dict()
    for name, weight in checkpoint.build_model(**TINY).state_dict().items():
        assert weight.std().item() == pytest.approx(drawn[name].std().item(), rel=0.1), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_item_equals_the_item_alone(model, ids, side):
    pads = 7
    mask = torch.ones_like(ids)
    mask[0, slice(0, pads) if side == "left" else slice(-pads, None)] = 0
    found = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    alone = logits(model, ids[:1, mask[0].bool()])
    assert error(found[:1, mask[0].bool()], alone) < ATOL
    assert error(found[1:], logits(model, ids[1:])) < ATOL
    if side == "left":  # the first token's predecessor is padding: without the mask it would be read
        embeddings = model.model.embed_tokens(ids)
        assert torch.equal(model.embed(embeddings, mask)[0, pads], embeddings[0, pads])
        assert not torch.equal(model.embed(embeddings)[0, pads], embeddings[0, pads])


@pytest.mark.parametrize("left", [0, 5])
@pytest.mark.parametrize("lazy", [False, True], ids=["config", "lazy"])
def test_decode_steps_with_a_cache_equal_one_prefill(model, ids, left, lazy):
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = logits(model, ids, attention_mask=mask, position_ids=positions)
    cache = DynamicCache() if lazy else DynamicCache(config=model.config)
    parts = []
    for start, end in ((0, 3), (3, 20), (20, 21), (21, LENGTH)):  # within the padding, then behind it
        inputs = dict(attention_mask=mask[:, :end], position_ids=positions[:, start:end], past_key_values=cache)
        parts.append(logits(model, ids[:, start:end], use_cache=True, **inputs))
    assert error(torch.cat(parts, 1)[mask.bool()], wanted[mask.bool()]) < ATOL


def test_a_cache_may_be_cropped_and_reordered(model, ids):
    """As assisted generation and beam search do: the tokens that the shift remembers follow."""
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :30], past_key_values=cache, use_cache=True)
    cache.crop(-10)
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = ids.flip(0)
    found = logits(model, swapped[:, 20:], past_key_values=cache, use_cache=True)
    assert error(found, logits(model, swapped)[:, 20:]) < ATOL


def test_generation_is_greedy_prefill_repeated(model, ids):
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(logits(model, tokens[:, :-1]).argmax(-1)[:, LENGTH - 1 :], tokens[:, LENGTH:])


@pytest.mark.parametrize(
    "inputs, message",
    [
        (lambda model, ids: dict(attention_mask=torch.ones(2, 1, LENGTH, LENGTH)), r"found \[2, 1, 40, 40\]"),
        (lambda model, ids: dict(attention_mask={"full_attention": None}), "found dict"),
        (lambda model, ids: dict(past_key_values=StaticCache(model.config, 64)), "pass a DynamicCache; found .*StaticLayer"),
        (lambda model, ids: dict(inputs_embeds=torch.zeros(2, LENGTH, 32)), "one of them"),
        (lambda model, ids: dict(input_ids=None), "one of them"),
    ],
    ids=["mask 4-D", "mask dict", "static cache", "both inputs", "no input"],
)
def test_what_the_shift_cannot_know_is_refused(model, ids, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": ids, "use_cache": True} | inputs(model, ids)))


def test_a_checkpoint_loads_through_auto_classes_and_computes_the_same(checkpoint, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD", "20KB")  # 40 KB of weights: several shards, as at full size
    model = checkpoint.build_model(**TINY).eval()
    folder = checkpoint.save_checkpoint(model, tmp_path / "model", {"steps": 3})
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 22_000 for shard in shards)
    rest = {path.name for path in folder.iterdir()} - {shard.name for shard in shards}
    assert rest == {"config.json", "model.safetensors.index.json", "modeling_recall.py", "training.json"}
    assert json.loads((folder / "training.json").read_text()) == {"steps": 3}

    loaded = checkpoint.load_checkpoint(folder, torch.float32)
    assert type(loaded).__name__ == "RecallForCausalLM"
    assert type(loaded) is not type(model)  # the folder's code, not this checkout's
    assert not loaded.training
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    rounded = checkpoint.cast_parameters(checkpoint.build_model(dtype=torch.bfloat16, **TINY), torch.float32).eval()
    assert torch.equal(logits(loaded, ids), logits(rounded, ids))
    assert 0 < error(logits(loaded, ids), logits(model, ids)) < 0.05
    narrow = checkpoint.load_checkpoint(folder)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert narrow.model.rotary_emb.inv_freq.dtype == torch.float32  # as in training: rounded, it is another encoding
    with pytest.raises(ValueError, match="trust_remote_code"):  # refused, rather than read as a Qwen3 without the shift
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_without_the_shift_it_is_a_plain_qwen3(checkpoint, ids, tmp_path):
    model = checkpoint.build_model(token_shift=False, dtype=torch.bfloat16, **TINY).eval()
    folder = checkpoint.save_checkpoint(model, tmp_path / "model")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    loaded = checkpoint.load_checkpoint(folder)
    assert type(loaded) is Qwen3ForCausalLM
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_a_folder_is_replaced_as_a_whole(checkpoint, tmp_path, monkeypatch):
    folder = checkpoint.save_checkpoint(checkpoint.build_model(**TINY), tmp_path / "model", {"run": 1})

    def cut(model, folder):
        (folder / "config.json").write_text("half of")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "_write", cut)
        checkpoint.save_checkpoint(checkpoint.build_model(**TINY), folder, {"run": 2})
    assert json.loads((folder / "training.json").read_text()) == {"run": 1}
    checkpoint.load_checkpoint(folder)
    checkpoint.save_checkpoint(checkpoint.build_model(token_shift=False, **TINY), folder, {"run": 3})
    assert not (folder / "modeling_recall.py").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_beyond_the_limit_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LIMIT", 10_000)
    with pytest.raises(ValueError, match="may have 0 MB"):
        checkpoint.save_checkpoint(checkpoint.build_model(**TINY), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("shift, padded, exact", [(True, True, True), (False, False, False)])
def test_every_layer_goes_through_the_compiler(checkpoint, ids, shift, padded, exact):
    inputs = dict(input_ids=ids, use_cache=False)
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :9] = 0
    config, decision = sparse_config(), Decision.SPARSE
    if exact:
        config, decision = TSAConfig(layers=[]), Decision.DENSE_PADDED
    report = explain(checkpoint.build_model(shift, **TINY).eval(), config=config, **inputs)
    assert [row.decision for row in report] == [decision] * 2
    assert not report.notes  # one graph: no break


def sparse_config(keep=0.5):
    return TSAConfig(budget=KeepRatio(keep), window=4, min_tokens=4, min_length=1, layers=[0, 1], compiler="aot_eager")


@pytest.mark.usefixtures("fresh")
def test_the_compiled_model_equals_the_plain_one_where_all_tokens_are_kept(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    compiled = torch.compile(model, backend="tsa", fullgraph=True, options={"config": sparse_config(keep=1.0)})
    found, wanted = (logits(call, ids, attention_mask=mask)[mask.bool()] for call in (compiled, model))
    assert error(found, wanted) < ATOL


def test_a_folder_without_a_model_is_named(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' has no config\.json: pass the folder of a trained model"):
        checkpoint.load_checkpoint(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_model_that_ships_retrieves_dense_and_sparse(checkpoint):
    folder = FOLDER / "model"
    sizes = [shard.stat().st_size for shard in folder.glob("*.safetensors")]
    assert max(sizes) < 15_000_000 and sum(sizes) < 50_000_000
    model = checkpoint.load_checkpoint(folder, torch.float32)
    assert type(model) is Qwen3ForCausalLM
    methods = ["dense", "keep-0.5@8", "random-keep-0.5@8"]
    study = evaluate(model, methods=methods, tasks=["niah_multivalue"], lengths=[512], samples=8, progress=False)
    right = {cell.method: sum(cell.right) for cell in study.cells}
    assert right["dense"] == 8 and right["keep-0.5@8"] >= 7
    assert right["random-keep-0.5@8"] <= 5  # these layers retrieve, and half of the tokens at random do not do
