"""What meets vLLM's interfaces: the plug-in's classes with vLLM's own metadata and caches (`tox -e vllm`)."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from tsa_compile import ConfigError, KernelError, TSAConfig
from tsa_compile.engines.vllm import core
from tsa_compile.kernels import reference
from tsa_compile.kernels.cached import cached_attention_aten

from ..support import heads
from .vllm_support import ANY, HALF, flat

pytest.importorskip("vllm", reason="needs vLLM: tox -e vllm")


class TestCUDA:
    """Its classes on plain tensors, with vLLM's own metadata, and FlashAttention over a paged cache written out."""

    LENGTHS: ClassVar = {0: (1, 21), 1: (34, 50), 2: (30, 30), 3: (3, 3), 4: (1, 17)}  # tokens in the batch, and in all
    LAYER = "model.layers.0.self_attn.attn"

    def batch(self):
        """Metadata, query, key, value and the cache [blocks, G, 16, 2 D]; each request's heads."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        lengths = [length for _, length in self.LENGTHS.values()]
        starts = torch.tensor([0, *(rows for rows, _ in self.LENGTHS.values())]).cumsum(0).to(torch.int32)
        free, table = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist(), []
        requests, cache = [], torch.full((20, 2, 16, 64), float("nan"))
        for number, (rows, length) in self.LENGTHS.items():
            query, key, value = heads(1, length=length, head_dim=32)
            requests.append((query[:, :, -rows:] + number, key, value))
            table.append([free.pop() for _ in range(0, length, 16)])
            tokens = torch.cat(flat(key, value), dim=-1)
            for block, part in zip(table[-1], tokens.split(16), strict=True):
                cache[block, :, : len(part)] = part.transpose(0, 1)
        blocks = torch.tensor([(row + [0] * 4)[:4] for row in table], dtype=torch.int32)
        lengths_there = torch.tensor(lengths, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths_there, num_reqs=5,
            num_actual_tokens=int(starts[-1]), max_query_len=30, max_seq_len=50, block_table_tensor=blocks,
            slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64), seq_lens_cpu_upper_bound=lengths_there,
            is_prefilling=torch.tensor([False, True, True, True, False]),
        )  # fmt: skip
        joined = [torch.cat([flat(each[part][:, :, -rows:])[0] for each, (rows, _) in zip(requests, self.LENGTHS.values())])
                  for part in range(3)]  # fmt: skip
        return common, joined, cache, requests

    def builder(self, interface):
        made = interface.CUDABuilder.__new__(interface.CUDABuilder)
        plain = dict.fromkeys(("aot_schedule", "use_full_cuda_graph", "fa4_hd256"), False)
        nothing = dict.fromkeys(("aot_sliding_window", "max_cudagraph_size", "rswa_window", "mm_prefix_query_ranges_np"))
        made.__dict__.update(plain, **nothing, dcp_world_size=1, kv_cache_spec=SimpleNamespace(sliding_window=None))
        made.cache_config, made.kv_cache_dtype = SimpleNamespace(cache_dtype="auto"), torch.float32
        made.rule, made.group, made.sparse_layers = replace(ANY, config=HALF), None, {self.LAYER: HALF}
        return made

    def forward(self, impl, layer, query, key, value, cache, metadata, output, *_):
        """FlashAttention with a paged cache."""
        assert metadata.scheduler_metadata is None
        for number, (start, stop) in enumerate(itertools.pairwise(metadata.query_start_loc.tolist())):
            length = int(metadata.seq_lens[number])
            tokens = core.gather(cache.transpose(1, 2), metadata.block_table[number], length)
            keys, values = (half.transpose(0, 1)[None] for half in tokens.chunk(2, dim=-1))
            asked = query[start:stop].transpose(0, 1)[None]
            output[start:stop] = flat(cached_attention_aten(asked, keys, values, impl.scale))[0]
        return output

    def run(self, monkeypatch, name):
        """The output of a layer for each request, and what the requests were."""
        from tsa_compile.engines.vllm import interface

        common, joined, cache, requests = self.batch()
        metadata = self.builder(interface).build(0, common)
        monkeypatch.setattr(interface.flash_attn.FlashAttentionImpl, "forward", lambda *given: self.forward(*given))
        impl = interface.CUDAImpl.__new__(interface.CUDAImpl)
        impl.scale, impl.sinks, impl._rehearsed = 0.3, None, True
        output = torch.full_like(joined[0], float("nan"))
        impl.forward(SimpleNamespace(layer_name=name), *joined, cache, metadata, output)
        return output.split([rows for rows, _ in self.LENGTHS.values()]), requests

    def test_prompts_and_chunks_are_sparse_beside_decode_steps(self, monkeypatch):
        found, requests = self.run(monkeypatch, self.LAYER)
        settings = dict(keep_ratio=0.5, window=4, min_tokens=4, floor_window=8, floor_sinks=2, reduce="max")
        for number, (each, request) in enumerate(zip(found, requests, strict=True)):
            sparse = reference.token_sparse_attention(*request, None, scale=0.3, **settings)
            dense = cached_attention_aten(*request, 0.3)
            assert not torch.allclose(sparse, dense, atol=1e-2) or number not in (1, 2), "or nothing was tested"
            assert torch.allclose(each, flat(sparse if number in (1, 2) else dense)[0], atol=1e-5), number

    def test_other_layers_are_vllms(self, monkeypatch):
        for each, request in zip(*self.run(monkeypatch, "model.layers.1.self_attn.attn"), strict=True):
            assert torch.allclose(each, flat(cached_attention_aten(*request, 0.3))[0], atol=1e-5)

    def test_graphs_of_whole_steps_have_no_plan(self):
        from tsa_compile.engines.vllm import interface

        common, *_ = self.batch()
        assert not hasattr(self.builder(interface).build_for_cudagraph_capture(common), "tsa")
        assert hasattr(self.builder(interface).build(0, common), "tsa")
        assert interface.CUDABuilder.get_cudagraph_support(None, None).name == "UNIFORM_BATCH"
        assert not interface.CUDABuilder.supports_update_block_table

    def test_profiling_sees_the_largest_request(self, monkeypatch):
        from tsa_compile.engines.vllm import interface

        seen = []
        monkeypatch.setattr(interface, "rehearse", lambda query, *given: seen.append((len(query), *given[:2])))
        monkeypatch.setattr(interface, "layers_of", lambda _: core.Layers({self.LAYER: None}, {self.LAYER: HALF}))
        monkeypatch.setattr(interface, "own_config", lambda _: HALF)
        monkeypatch.setattr(interface.flash_attn.FlashAttentionImpl, "forward", lambda *given: given[-3].fill_(0))
        impl = interface.CUDAImpl.__new__(interface.CUDAImpl)
        impl.__dict__.update(scale=0.3, num_heads=4, num_kv_heads=2, head_size=32, sinks=None, _rehearsed=not impl.rehearses)
        impl._vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=90))
        rows = torch.randn(64, 4, 32)
        for _ in range(2):
            impl.forward(SimpleNamespace(layer_name=self.LAYER), rows, None, None, None, None, torch.empty_like(rows))
        assert seen == [(64, 2, 90)], "once"


@pytest.mark.parametrize("isa", ["vec", "vec16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_of_cpus_is_read(isa, dtype):
    from vllm import _custom_ops as ops

    from tsa_compile.engines.vllm.interface import CPUImpl

    key, value = (torch.randn(45, 2, 64).to(dtype) for _ in range(2))
    cache, blocks = torch.full((6, 2, 32, 128), float("nan"), dtype=dtype), torch.tensor([4, 1, 0], dtype=torch.int32)
    halves = cache.view(6, 2, 64, 64).chunk(2, dim=2)
    positions = torch.arange(45)
    ops.cpu_attn_reshape_and_cache(key, value, *halves, blocks[positions // 32].long() * 32 + positions % 32, isa)
    for length in (45, 32, 7):
        found = CPUImpl.read(None, SimpleNamespace(isa=isa), cache, blocks, length)
        assert all(torch.equal(each, tokens[:length]) for each, tokens in zip(found, (key, value), strict=True))


class TestObstacles:
    def found(self, model=None, kind=None, **changes):
        from vllm.model_executor.layers.attention import Attention

        from tsa_compile.engines.vllm import interface

        impl = interface.CUDAImpl.__new__(interface.CUDAImpl)
        impl.__dict__.update(
            attn_type="decoder", sliding_window=(-1, -1), alibi_slopes=None, logits_soft_cap=0, sinks=None,
            kv_sharing_target_layer_name=None, kv_cache_dtype="auto",
        )  # fmt: skip
        impl.__dict__.update(changes)
        layer = (kind or Attention).__new__(kind or Attention)
        object.__setattr__(layer, "impl", impl)
        settings = SimpleNamespace(**{"runner_type": "generate", **(model or {})})
        return interface._obstacle(layer, SimpleNamespace(model_config=settings))

    def test_a_plain_layer_has_none(self):
        assert self.found() is None
        assert self.found(sliding_window=-1, logits_soft_cap=None) is None
        assert self.found(sinks=torch.ones(4)) is None

    @pytest.mark.parametrize(
        "changes, said",
        [
            (dict(sliding_window=(15, 0)), "a sliding window"),
            (dict(sliding_window=16), "a sliding window"),
            (dict(alibi_slopes=torch.ones(4)), "ALiBi"),
            (dict(logits_soft_cap=30.0), "a soft cap"),
            (dict(kv_sharing_target_layer_name="model.layers.0"), "keys of another layer"),
            (dict(kv_cache_dtype="fp8_e4m3"), "a quantised cache"),
            (dict(attn_type="encoder_only"), "attention of type encoder_only"),
            (dict(model=dict(runner_type="pooling")), "a pooling model"),
            (dict(model=dict(is_mm_prefix_lm=True)), "not causal"),
        ],
    )
    def test_said(self, changes, said):
        assert said in self.found(**changes)

    def test_layers_of_other_classes(self):
        from vllm.model_executor.layers.attention import Attention

        assert self.found(kind=type("ChunkedLocalAttention", (Attention,), {})) == "attention by ChunkedLocalAttention"


class TestAnEnginesStart:
    """The metadata builder, the first of our classes that sees the whole engine: what it takes, says and refuses."""

    def builder(self, monkeypatch, config, numbers=range(4), more=(), count=4, **settings):
        from vllm.model_executor.layers.attention import Attention

        from tsa_compile.engines.vllm import interface

        impl = interface.CPUImpl.__new__(interface.CPUImpl)
        impl.__dict__.update(
            attn_type="decoder", sliding_window=(-1, -1), alibi_slopes=None, logits_soft_cap=0, sinks=None, num_heads=4,
            kv_sharing_target_layer_name=None, kv_cache_dtype="auto", num_kv_heads=2, head_size=32,
        )  # fmt: skip
        held = {}
        for name in [*(f"model.layers.{number}.self_attn.attn" for number in numbers), *more]:
            held[name] = Attention.__new__(Attention)
            object.__setattr__(held[name], "impl", impl)
        parallel = SimpleNamespace(pipeline_parallel_size=settings.pop("stages", 1))
        model = SimpleNamespace(
            runner_type=settings.pop("runner_type", "generate"), is_encoder_decoder=False, dtype=torch.float32,
            get_total_num_hidden_layers=lambda: count,
        )  # fmt: skip
        engine = SimpleNamespace(
            additional_config={"tsa": config.to_dict()}, model_config=model, parallel_config=parallel,
            cache_config=SimpleNamespace(enable_prefix_caching=settings.pop("prefixes", False)), kv_transfer_config=None,
            compilation_config=SimpleNamespace(static_forward_context=held),
        )  # fmt: skip
        self.warned = []
        monkeypatch.delenv("TSA_CONFIG", raising=False)
        monkeypatch.setattr(interface.cpu_attn.CPUAttentionMetadataBuilder, "__init__", lambda *_: None)
        monkeypatch.setattr(interface, "_group", lambda _: None)
        monkeypatch.setattr(interface, "_log", SimpleNamespace(
            warning_once=lambda text, *given: self.warned.append(text % given), info_once=lambda *_: None,
        ))  # fmt: skip
        return interface.CPUBuilder(None, [*held], engine, torch.device("cpu"))

    def sparse(self, *given, **settings):
        return [int(name.split(".")[2]) for name in self.builder(*given, **settings).sparse_layers]

    def test_takes_the_upper_half_of_the_model(self, monkeypatch):
        config = TSAConfig()
        assert self.sparse(monkeypatch, config) == [2, 3] and not self.warned
        assert self.sparse(monkeypatch, config, range(4, 8), count=8, stages=2) == [4, 5, 6, 7]
        assert self.sparse(monkeypatch, config, range(4), count=8, stages=2) == [] and not self.warned
        assert self.sparse(monkeypatch, config, [4, 12, 20, 28], count=32) == [20, 28]

    def test_leaves_drafts_alone(self, monkeypatch):
        drafts = ["model.layers.4.self_attn.attn", *(f"draft_model.model.layers.{n}.self_attn.attn" for n in range(2))]
        drafts += ["mtp.layers.0.self_attn.attn", "model.mtp.layers.1.attn"]
        for layers, chosen in ((None, [2, 3]), (["*"], [0, 1, 2, 3]), ([0, 1], [0, 1])):
            assert self.sparse(monkeypatch, TSAConfig(layers=layers, strict=True), more=drafts) == chosen

    def test_warns_of_what_has_no_effect(self, monkeypatch):
        self.builder(monkeypatch, TSAConfig(dense_kernel="a_shape", layers=[1, 9]))
        missing, kernel = self.warned
        assert "layers=[9] not found" in missing and "dense_kernel='a_shape'" in kernel

    def test_refuses_what_strict_forbids(self, monkeypatch):
        with pytest.raises(ConfigError, match=r"model\.layerz.*not found.*strict=True"):
            self.builder(monkeypatch, TSAConfig(layers=["model.layerz.*"], strict=True))

    @pytest.mark.parametrize("options", [dict(kernel="flashh"), dict(kernel="flash"), dict(dense_kernel="flashh")])
    def test_refuses_kernels_that_cannot_run(self, monkeypatch, options):
        with pytest.raises(KernelError, match=r"'flash+'"):
            self.builder(monkeypatch, TSAConfig(**options))

    def test_refuses_prefix_caching_where_a_layer_is_sparse(self, monkeypatch):
        with pytest.raises(ConfigError, match="enable_prefix_caching=True"):
            self.builder(monkeypatch, TSAConfig(), prefixes=True)
        self.builder(monkeypatch, TSAConfig(), prefixes=True, runner_type="pooling")
        assert "no layer is sparse" in self.warned[0]


class TestRefused:
    SPARSE, DENSE = core.Layers({"0": None}, {"0": HALF}), core.Layers({}, {})

    def settings(self, prefixes=False, context=1, connector=None):
        parallel = SimpleNamespace(decode_context_parallel_size=context, prefill_context_parallel_size=1)
        return SimpleNamespace(
            cache_config=SimpleNamespace(enable_prefix_caching=prefixes), parallel_config=parallel,
            kv_transfer_config=None if connector is None else SimpleNamespace(kv_connector=connector),
        )  # fmt: skip

    @pytest.mark.parametrize(
        "settings, said",
        [
            (dict(prefixes=True), "enable_prefix_caching=True"),
            (dict(connector="LMCacheConnectorV1"), "kv_transfer_config with LMCacheConnectorV1"),
        ],
    )
    def test_keys_of_other_prompts(self, monkeypatch, settings, said):
        from tsa_compile.engines.vllm.interface import check

        with pytest.raises(ConfigError, match=rf"{said}.*another prompt.*TSA_ALLOW_PREFIX_CACHING"):
            check(self.settings(**settings), self.SPARSE)
        check(self.settings(**settings), self.DENSE)
        monkeypatch.setenv("TSA_ALLOW_PREFIX_CACHING", "1")
        check(self.settings(**settings), self.SPARSE)

    def test_nothing_else(self):
        from tsa_compile.engines.vllm.interface import check

        check(self.settings(), self.SPARSE)

    def test_context_parallel(self):
        from tsa_compile.engines.vllm.interface import check

        with pytest.raises(ConfigError, match="decode_context_parallel_size=2"):
            check(self.settings(context=2), self.SPARSE)
        check(self.settings(context=2), self.DENSE)

    def test_other_versions(self, monkeypatch):
        from tsa_compile.engines.vllm import interface

        monkeypatch.setattr(interface.vllm, "__version__", "0.1.0")
        with pytest.raises(ConfigError, match=r"vLLM 0.1.0 is not supported.*0\.32"):
            interface.install()


class TestWatched:
    """Without TSA_CONFIG vLLM's choice of a backend is watched, and stays what it was unless an engine asks for more."""

    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch):
        from vllm.platforms import current_platform
        from vllm.v1.attention import selector

        from tsa_compile.engines import vllm as plugin
        from tsa_compile.engines.vllm import interface, settings

        self.installed = []
        monkeypatch.delenv(settings.CONFIG, raising=False)
        monkeypatch.setattr(
            current_platform, "get_attn_backend_cls", lambda *_, **__: "ours" if self.installed else "vllm's"
        )
        monkeypatch.setattr(selector, "resolve_obj_by_qualname", lambda path: path)
        monkeypatch.setattr(selector, "_cached_get_attn_backend", selector._cached_get_attn_backend)
        monkeypatch.setattr(interface, "register_backend", lambda *_: self.installed.append(True))
        selector._cached_get_attn_backend.cache_clear()
        plugin.register()
        yield
        selector._cached_get_attn_backend.cache_clear()

    def chosen(self, additional):
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.v1.attention import selector

        config = VllmConfig.__new__(VllmConfig)
        object.__setattr__(config, "additional_config", additional)
        with set_current_vllm_config(config):
            return selector._cached_get_attn_backend(None, None)

    @pytest.mark.parametrize("additional", [{}, {"other": {}}])
    def test_an_engine_without_a_configuration(self, additional):
        assert self.chosen(additional) == "vllm's" and not self.installed

    def test_an_engine_with_one(self):
        assert self.chosen({"tsa": {}}) == "ours" and self.installed == [True]
        assert self.chosen({"tsa": {}}) == "ours" and self.installed == [True], "once"

    def test_an_engine_with_one_after_one_without(self):
        """What vLLM remembers of the first engine does not hold for the second."""
        assert [self.chosen(additional) for additional in ({}, {"tsa": {}}, {})] == ["vllm's", "ours", "ours"]

    def test_the_environment_after_an_engine_without(self, monkeypatch):
        assert self.chosen({}) == "vllm's"
        monkeypatch.setenv("TSA_CONFIG", "{}")
        assert self.chosen({}) == "ours"

    def test_a_version_that_is_refused_is_refused_again(self, monkeypatch):
        from tsa_compile.engines.vllm import interface

        monkeypatch.setattr(interface.vllm, "__version__", "0.1.0")
        for _ in range(2):
            with pytest.raises(ConfigError, match="not supported"):
                self.chosen({"tsa": {}})

    def test_outside_of_an_engine(self):
        from vllm.v1.attention import selector

        assert selector._cached_get_attn_backend(None, None) == "vllm's" and not self.installed
