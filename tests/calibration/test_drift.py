"""Drift against the hidden states that transformers returns; layers found by structure; what is refused."""

import copy
import itertools

import pytest
import torch
from torch import nn

from tsa_compile import ConfigError
from tsa_compile.calibration.calibrate import calibrate
from tsa_compile.calibration.drift import drift_sum, find_layers

from ..support import DECODERS, VOCAB, mixed_padding, tiny, tokens


def measured(model, prompts, **options):
    return calibrate(model, prompts, progress=False, **options)


def hidden_drift(model, ids, mask=None):
    """The oracle: the definition over `output_hidden_states`, of which transformers normalises the last."""
    base = copy.deepcopy(model.base_model)
    for name in ("norm", "ln_f", "final_layer_norm"):
        if hasattr(getattr(base, "decoder", base), name):
            setattr(getattr(base, "decoder", base), name, nn.Identity())
    with torch.no_grad():
        states = base(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    kept = torch.ones_like(ids).bool() if mask is None else mask.bool()
    pairs = [(one[kept].double(), other[kept].double()) for one, other in itertools.pairwise(states)]
    return [float(((other - one).norm(dim=-1) / (one.norm(dim=-1) + 1e-6)).mean()) for one, other in pairs]


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Block(nn.Module):
    """A layer in one of the ways in which layers are written."""

    def __init__(self, size=8, form="tensor"):
        super().__init__()
        self.linear, self.form = nn.Linear(size, size), form

    def forward(self, hidden_states, scale=1.0):
        change = self.linear(hidden_states) * scale
        if self.form == "in place":
            return hidden_states.add_(change)
        made = hidden_states + change
        return (made, None) if self.form == "tuple" else made


class Net(nn.Module):
    """Embedding and blocks, not of transformers: no config, no base_model, no keyword input_ids."""

    def __init__(self, layers=4, form="tensor", keyword=False, repeat=1):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 8)
        self.others = nn.ModuleList(nn.Linear(8, 3) for _ in range(9))  # longer, but no hidden states
        self.blocks = nn.ModuleList(Block(form=form) for _ in range(layers))
        self.keyword, self.repeat = keyword, repeat

    def forward(self, ids):
        hidden = self.embed(ids)
        for block in self.blocks:
            for _ in range(self.repeat):
                hidden = block(scale=0.5, hidden_states=hidden) if self.keyword else block(hidden)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        for other in self.others:
            other(hidden)
        return hidden


class TestDrift:
    @pytest.mark.parametrize("name", [*DECODERS, "qwen3", "opt", "gpt_oss (sinks)"])
    def test_it_is_that_of_the_hidden_states(self, name):
        model = tiny(name, "eager")
        found = measured(model, tokens(2, 24))
        assert found.drift == pytest.approx(hidden_drift(model, tokens(2, 24)), rel=1e-4)
        assert len(found.layers) == len(found.drift) == 3
        assert all(type(model.get_submodule(layer)).__name__ == found.fingerprint.layer for layer in found.layers)
        assert (found.tokens, found.prompts) == (48, 2)

    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_pad_tokens_do_not_count_and_batches_change_nothing(self, batch_size):
        model, ids, mask = tiny("llama"), tokens(3, 40), mixed_padding(40)
        found = measured(model, {"input_ids": ids, "attention_mask": mask}, batch_size=batch_size)
        assert found.drift == pytest.approx(hidden_drift(model, ids, mask), rel=1e-4)
        assert (found.tokens, found.prompts) == (int(mask.sum()), 3)

    def test_prompts_in_every_form_are_the_same_prompts(self):
        model, ids = tiny("llama"), tokens(2, 20)
        expected = measured(model, ids)
        forms = [
            list(ids),
            ids.tolist(),
            [ids.tolist()],
            iter(ids.int()),
            [{"input_ids": row} for row in ids],
            [{"input_ids": ids[:1], "attention_mask": torch.ones(1, 20)[:, :].long()}, ids[1]],
        ]
        assert all(measured(model, form) == expected for form in forms)

    def test_text_goes_through_the_tokenizer(self):
        model = tiny("llama")

        def tokenizer(text):
            return {"input_ids": [ord(letter) - 96 for letter in text], "attention_mask": [1] * len(text)}

        expected = measured(model, [[1, 2, 3, 4]])
        assert measured(model, ["abcd"], tokenizer=tokenizer) == measured(model, "abcd", tokenizer=tokenizer) == expected

    def test_the_mean_is_over_tokens_not_over_prompts(self):
        model = tiny("llama")
        one, other = tokens(1, 50), tokens(1, 10, seed=1)
        first, second = measured(model, one), measured(model, other)
        both = measured(model, [one[0], other[0]])
        assert both.drift == pytest.approx([(50 * a + 10 * b) / 60 for a, b in zip(first.drift, second.drift)], rel=1e-5)

    @pytest.mark.parametrize("form", ["tensor", "tuple", "in place"])
    @pytest.mark.parametrize("keyword", [False, True])
    def test_modules_that_are_not_of_transformers(self, form, keyword):
        net = Net(form=form, keyword=keyword)
        with torch.no_grad():
            states, scale = [net.embed(tokens(1, 30))], 0.5 if keyword else 1.0
            for block in net.blocks:
                states.append(states[-1] + scale * block.linear(states[-1]))
        expected = [float(((b - a).norm(dim=-1) / (a.norm(dim=-1) + 1e-6)).mean()) for a, b in itertools.pairwise(states)]
        found = measured(net, tokens(1, 30))
        assert found.drift == pytest.approx(expected, rel=1e-5)
        assert found.layers == tuple(f"blocks.{index}" for index in range(4))

    def test_what_a_model_adds_around_its_base_counts(self):
        """The base model alone would skip a shift of the embeddings, and another head than the one transformers knows of."""

        class Shifted(type(tiny("llama"))):
            def __init__(self, config):
                super().__init__(config)
                self.shift = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

            def forward(self, input_ids, **kwargs):
                embeddings = self.model.embed_tokens(input_ids)
                return super().forward(inputs_embeds=embeddings + 5 * self.shift(embeddings.roll(1, 1)), **kwargs)

        model, shapes = Shifted(tiny("llama").config).eval(), []
        model.model.layers[0].register_forward_hook(lambda layer, args, output: shapes.append(args[0].detach()))
        found = measured(model, tokens(1, 20))
        plain = model.model.embed_tokens(tokens(1, 20))
        assert shapes and not torch.allclose(shapes[-1], plain)
        assert found.drift != measured(tiny("llama"), tokens(1, 20)).drift

    def test_in_inference_mode(self):
        expected = measured(tiny("llama"), tokens(1, 20))
        with torch.inference_mode():
            assert measured(tiny("llama"), tokens(1, 20)) == expected

    def test_a_compiled_model_is_the_model(self):
        model = tiny("llama")
        assert measured(torch.compile(model, backend="eager"), tokens(1, 20)) == measured(model, tokens(1, 20))

    def test_half_precision_sums_up_in_float32(self):
        """A thousand equal changes of 1%: in bfloat16 neither the norms nor the sum would hold them."""
        before = torch.full((1, 3000, 64), 100.0).bfloat16()
        assert float(drift_sum(before, before + 1)) == pytest.approx(3000 * 0.01, rel=1e-4)

    def test_rows_are_taken_in_chunks(self, monkeypatch):
        before, after = torch.randn(2, 50, 16), torch.randn(2, 50, 16)
        valid = torch.rand(2, 50) < 0.7
        after[~valid] = float("nan")
        expected = ((after - before).norm(dim=-1) / before.norm(dim=-1))[valid].sum()
        monkeypatch.setattr("tsa_compile.calibration.drift.CHUNK", 16 * 7)
        assert float(drift_sum(before, after, valid)) == pytest.approx(float(expected), rel=1e-5)


class TestTheModelIsLeftAsItWas:
    def test_hooks_modes_and_weights(self):
        model = tiny("llama")
        model.train()
        model.model.layers[1].eval()
        before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
        first = measured(model, tokens(1, 20))
        assert hooks(model) == 0
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert measured(model.eval(), tokens(1, 20)) == first, "dropout is off"

    @pytest.mark.parametrize("call", [0, 1])
    def test_also_after_an_error(self, call, monkeypatch):
        """In the call that finds the layers, and in one that measures them."""
        model = tiny("llama")
        model.train()
        layer, calls = model.model.layers[1], []

        def fail(*args, forward=layer.forward, **kwargs):
            calls.append(1)
            if len(calls) > call:
                raise ZeroDivisionError
            return forward(*args, **kwargs)

        monkeypatch.setattr(layer, "forward", fail)
        with pytest.raises(ZeroDivisionError):
            measured(model, tokens(1, 20))
        assert hooks(model) == 0 and model.training and torch.is_grad_enabled()

    def test_neither_logits_nor_caches_are_made(self, monkeypatch):
        model = tiny("llama")
        lengths = []
        model.lm_head.register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
        measured(model, tokens(3, 50))
        assert lengths == []

    def test_prompts_are_taken_one_by_one(self):
        model, taken, run = tiny("llama"), [], []
        model.model.register_forward_hook(lambda *_: run.append(len(taken)))

        def prompts():
            for ids in tokens(4, 20):
                taken.append(1)
                yield ids

        measured(model, prompts())
        assert run == [1, 1, 2, 3, 4], "the first of which finds the layers"


class TestLayers:
    def test_the_longest_list_of_hidden_states(self):
        stack = find_layers(Net(), tokens(1, 4))
        assert stack.names == ("blocks.0", "blocks.1", "blocks.2", "blocks.3") and not stack.overwrites
        assert find_layers(Net(form="in place"), tokens(1, 4)).overwrites
        assert find_layers(tiny("gpt2"), tokens(1, 4)).names == ("transformer.h.0", "transformer.h.1", "transformer.h.2")

    def test_the_outer_of_two_lists(self):
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(VOCAB, 8)
                self.layers = nn.ModuleList(nn.Sequential(Block(), Block()) for _ in range(2))

            def forward(self, ids):
                return self.layers[1](self.layers[0](self.embed(ids)))

        assert find_layers(Outer(), tokens(1, 4)).names == ("layers.0", "layers.1")

    @pytest.mark.parametrize(
        "net",
        [nn.Embedding(VOCAB, 8), nn.Linear(8, 8), Net(layers=0), Net(repeat=2)],
        ids=["none", "takes no token ids", "empty", "repeated"],
    )
    def test_no_layers(self, net):
        with pytest.raises(ConfigError, match="no decoder layers"):
            measured(net, tokens(1, 4))


class TestRefused:
    @pytest.mark.parametrize(
        ("prompts", "said"),
        [
            ([], "no prompts"),
            (iter(()), "no prompts"),
            (7, "prompts=7"),
            ([torch.zeros(0, dtype=torch.long)], "prompt 0 has no tokens"),
            ([[1, 2], []], "prompt 1 has no tokens"),
            ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "prompt 0 has no tokens"),
            ([{"input_ids": [1, 2], "attention_mask": [1]}], "make them equal"),
            ([{"ids": [1, 2]}], "must have input_ids"),
            (["text"], "pass tokenizer="),
            ("text", "pass tokenizer="),
            ([1, 2, 3], "prompt 0"),
            ([[0.5, 1.5]], "prompt 0"),
            ([[[[1]]]], "prompt 0"),
            ([[1, [2]]], "prompt 0"),
            ([None], "prompt 0"),
            ([["a"]], "prompt 0"),
            ([[1, VOCAB]], f"token id {VOCAB}"),
            ([[1, -1]], "token id -1"),
            ([[1] * 257], "has 257 tokens, the model takes 256"),
        ],
    )
    def test_prompts(self, prompts, said):
        model = tiny("gpt2")
        with pytest.raises(ConfigError, match=said):
            measured(model, prompts)
        assert hooks(model) == 0

    @pytest.mark.parametrize("delta", [0, -0.5, 1.01, float("nan"), float("inf"), "0.5", True])
    def test_delta(self, delta):
        with pytest.raises(ConfigError, match="delta"):
            calibrate(tiny("llama"), tokens(1, 8), delta)

    @pytest.mark.parametrize("size", [0, -1, 1.5, True, None])
    def test_batch_size(self, size):
        with pytest.raises(ConfigError, match="batch_size"):
            measured(tiny("llama"), tokens(1, 8), batch_size=size)

    def test_models(self):
        with pytest.raises(ConfigError, match="pass a causal language model"):
            measured(lambda ids: ids, tokens(1, 8))
        with torch.device("meta"), pytest.raises(ConfigError, match="meta device"):
            measured(Net(), [[1, 2]])
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = dict(vocab_size=VOCAB, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
        with pytest.raises(ConfigError, match="encoder-decoder"):
            measured(T5ForConditionalGeneration(T5Config(**sizes)), tokens(1, 8))

    @pytest.mark.parametrize("token", [-1, VOCAB])
    def test_tokens_that_a_model_without_a_configuration_does_not_know(self, token):
        net = Net()
        with pytest.raises(ConfigError, match="prompt 1"):
            measured(net, [[1, 2], [1, token]])
        with pytest.raises(ConfigError, match="prompt 0"):
            measured(net, [[token]])
        assert hooks(net) == 0

    def test_batches_need_a_mask(self):
        with pytest.raises(ConfigError, match="batch_size=1"):
            measured(Net(), [[1, 2, 3], [4, 5]], batch_size=2)
        assert measured(Net(), tokens(4, 6), batch_size=2).prompts == 4, "of equal lengths they need none"

    def test_numbers_that_are_none(self):
        model = tiny("llama")
        model.model.layers[1].mlp.up_proj.weight.data.fill_(float("nan"))
        with pytest.raises(ConfigError, match=r"model\.layers\.1"):
            measured(model, tokens(1, 8))

    def test_too_little_memory(self, monkeypatch):
        model = tiny("llama")

        def out(*args, **kwargs):
            raise torch.OutOfMemoryError("no")

        monkeypatch.setattr("tsa_compile.calibration.drift.drift_sum", out)
        with pytest.raises(ConfigError, match=r"1 x 30 tokens.*lower batch_size"):
            measured(model, tokens(1, 30))
