"""Everything that depends on vLLM's version: its backends, with the prompts of the chosen layers taken out.

    metadata of a batch      as vLLM builds it; beside it those of its other requests alone, if it has both kinds
    a sparse layer           prompts and chunks by core.attend; the others by vLLM's own kernel, from its paged cache
    any other layer          vLLM's own

Keys and values are in the cache before attention runs, so later chunks and decode steps find all tokens there. `Builder` and
`Impl` are what both platforms share; below them are vLLM's classes for each, and how its cache is read.
"""

from __future__ import annotations

import abc
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention import selector
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends import cpu_attn, flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from tsa_compile.config import Coverage, TSAConfig
from tsa_compile.costs.calls import CallShape
from tsa_compile.engines.vllm.core import (
    WINDOW,
    Layers,
    Request,
    Rule,
    attend,
    check_kernels,
    choose_layers,
    complaints,
    gather,
    rehearse,
    split,
    strictest,
)
from tsa_compile.engines.vllm.settings import CONFIG, KEY, own_config
from tsa_compile.errors import ConfigError

SUPPORTED = {"cpu": ("0.32",), "cuda": ("0.26", "0.32")}
PREFIXES = "TSA_ALLOW_PREFIX_CACHING"
_DRAFTS = {"draft_model", "mtp"}  # in the names of a draft model's layers, where these are not numbered on
_CACHES = ("_num_computed_tokens_cache", "_token_to_req_indices_cache", "_seq_lens_cpu", "_num_computed_tokens_cpu")
"""What vLLM's metadata of a batch remember of it, by version."""

_BESIDE: Any = object
"""For type checkers: `Builder` and `Impl` stand before a class of vLLM, whose methods and attributes they have."""
_log = init_logger("vllm.tsa_compile")


def install() -> None:
    """Overrides vLLM's backend for this platform, in this process: for engines without a configuration all is vLLM's own.

    Raises:
        ConfigError: another version or platform.
    """
    platform = "cpu" if current_platform.is_cpu() else "cuda" if current_platform.is_cuda() else None
    if platform is None:
        raise ConfigError(
            f"sparse attention is asked for, but vLLM runs on {current_platform.device_name!r}: the plug-in supports its "
            f"platforms {' and '.join(SUPPORTED)}"
        )
    known = SUPPORTED[platform]
    if not vllm.__version__.startswith(tuple(f"{version}." for version in known)):
        raise ConfigError(
            f"sparse attention is asked for, but vLLM {vllm.__version__} is not supported on {platform!r}: its interfaces "
            f"change with its version, and this package knows {', '.join(known)} there. Install one of them, or leave out "
            f'{CONFIG} and "{KEY}" in the additional config'
        )
    if platform == "cpu":
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{CPUBackend.__name__}")
    else:
        register_backend(AttentionBackendEnum.FLASH_ATTN, f"{__name__}.{CUDABackend.__name__}")
    _say_what_else_is_chosen()
    selector._cached_get_attn_backend.cache_clear()  # it may have what was chosen for an earlier engine


def _say_what_else_is_chosen() -> None:
    """One line of the log for layers that vLLM gives to another backend, as it does with MLA: nothing here sees them."""
    choose = current_platform.get_attn_backend_cls
    if hasattr(choose, "__wrapped__"):
        return

    @functools.wraps(choose)
    def get_attn_backend_cls(*args: Any, **kwargs: Any) -> str:
        path = choose(*args, **kwargs)
        if not path.startswith(f"{__name__}."):
            _log.info_once("Token Sparse Attention: dense in layers for which vLLM chose %s", path)
        return path

    current_platform.get_attn_backend_cls = get_attn_backend_cls


@dataclass(frozen=True)
class Plan:
    """What a batch is for sparse layers.

    Attributes:
        layers: the configurations of the sparse layers, by their names.
        prompts: the requests that are computed by `core.attend`.
        others: vLLM's metadata of the other requests alone, and which tokens are theirs; None if there are none.
        group: the process group that has the other heads, where they matter.
    """

    layers: Mapping[str, TSAConfig]
    prompts: tuple[Request, ...]
    others: tuple[Any, Tensor] | None
    group: str | None


class Builder(_BESIDE):
    """vLLM's metadata, with a `Plan` as attribute `tsa` for batches that have prompts."""

    supports_update_block_table = False  # layers of another group would get this one's plan

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        config, layers = own_config(vllm_config), layers_of(vllm_config)
        check(vllm_config, layers)
        warned = complaints(layers, config)
        for said in warned:
            _log.warning_once("Token Sparse Attention: %s", said)
        self.sparse_layers = {name: own for name, own in layers.sparse.items() if name in layer_names}
        self.group = _group(config)
        self.rule: Rule | None = None
        for name in self.sparse_layers:  # which have one shape, that of their cache
            impl, dtype = get_layers_from_vllm_config(vllm_config, Attention)[name].impl, vllm_config.model_config.dtype
            sizes = (impl.num_heads, impl.num_kv_heads, impl.head_size)
            check_kernels(config, *sizes, dtype, device, impl.sinks is not None)
            self.rule = rule_of(impl, dtype, layers, device)
            break
        if self.rule is not None:
            _log.info_once("Token Sparse Attention: %s; %s", layers.summary, self.rule.minimum())
        elif not layers.sparse and not warned:
            _log.info_once("Token Sparse Attention: %s", layers.summary)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.rule is None or metadata.causal is not True:
            return metadata
        starts, lengths, prefilling = _on_host(common_attn_metadata)
        prompts, others = split(starts, lengths, prefilling, self.rule)
        if prompts:
            rest = self._others(common_attn_metadata, others, starts) if others else None
            metadata.tsa = Plan(self.sparse_layers, prompts, rest, self.group)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """Without a plan: a graph of a whole step is replayed for decode steps only."""
        return super().build(0, common_attn_metadata)

    def _others(self, common: CommonAttentionMetadata, others: Sequence[int], starts: list[int]) -> tuple[Any, Tensor]:
        """The metadata of some requests, as if the batch had no others, and their tokens.

        By `fast_build`: what vLLM schedules ahead lies in a buffer that the metadata of the whole batch use.
        """
        device = common.seq_lens.device
        requests = torch.tensor(others, device=device)
        tokens = torch.cat([torch.arange(starts[number], starts[number + 1], device=device) for number in others])
        rows = [starts[number + 1] - starts[number] for number in others]
        offsets = torch.tensor([0, *rows], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        some = common.replace(
            query_start_loc=offsets.to(device), query_start_loc_cpu=offsets, seq_lens=common.seq_lens[requests],
            num_reqs=len(rows), num_actual_tokens=sum(rows), max_query_len=max(rows),
            block_table_tensor=common.block_table_tensor[requests], slot_mapping=common.slot_mapping[tokens],
            seq_lens_cpu_upper_bound=_some(common.seq_lens_cpu_upper_bound, requests),
            is_prefilling=_some(common.is_prefilling, requests), positions=_some(common.positions, tokens),
            logits_indices_padded=None, **{name: None for name in _CACHES if hasattr(common, name)},
        )  # fmt: skip
        return super().build(0, some, True), tokens


class Impl(_BESIDE):
    """vLLM's attention, with the prompts of sparse layers taken out."""

    rehearses = False
    scale: float
    sinks: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config, self._rehearsed = get_current_vllm_config(), not self.rehearses

    @abc.abstractmethod
    def read(self, layer: Any, kv_cache: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values [length, G, D] of a request, from its blocks of the paged cache."""

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
        output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        own_forward = super().forward
        plan = getattr(attn_metadata, "tsa", None)
        config = None if plan is None else plan.layers.get(layer.layer_name)
        if plan is None or config is None:
            if attn_metadata is None and not self._rehearsed:
                self._rehearse(layer, query)
            more = (output_scale, output_block_scale)
            return own_forward(layer, query, key, value, kv_cache, attn_metadata, output, *more)
        for request in plan.prompts:
            rows = slice(request.start, request.stop)
            keys, values = key[rows], value[rows]
            if request.is_behind:
                keys, values = self.read(layer, kv_cache, attn_metadata.block_table[request.number], request.length)
            attend(query[rows], keys, values, output[rows], self.scale, config, plan.group, self.sinks)
        if plan.others is not None:
            metadata, tokens = plan.others
            found = torch.empty_like(output[tokens])
            own_forward(layer, query[tokens], key[tokens], value[tokens], kv_cache, metadata, found)
            output[tokens] = found
        return output

    def _rehearse(self, layer: Any, query: Tensor) -> None:
        """Called when vLLM runs a batch without metadata, once, to see how much memory is left for its cache."""
        self._rehearsed, vllm_config = True, self._vllm_config
        layers = layers_of(vllm_config)
        config = layers.sparse.get(layer.layer_name)
        if config is not None:
            rule = rule_of(self, query.dtype, layers, query.device)
            longest = vllm_config.model_config.max_model_len
            rehearse(query[:longest], self.num_kv_heads, longest, rule, self.scale, config, self.sinks)


class CPUBuilder(Builder, cpu_attn.CPUAttentionMetadataBuilder):
    """Its cache is as large as it is told to be, not as memory is left: nothing is rehearsed."""


class CPUImpl(Impl, cpu_attn.CPUAttentionBackendImpl):
    """Attention on a CPU."""

    def read(self, layer: Any, kv_cache: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """A block of a head holds its keys and then its values, each in the order that the kernels of the CPU like."""
        size, width = kv_cache.shape[2], kv_cache.shape[3] // 2
        some = kv_cache[blocks[: -(-length // size)].long()].flatten(2)
        key, value = (
            half[..., places].unflatten(-1, (size, width)).transpose(1, 2).flatten(0, 1)[:length]
            for half, places in zip(some.chunk(2, dim=-1), cpu_places(layer.isa, size, width, some.dtype), strict=True)
        )
        return key, value


class CPUBackend(cpu_attn.CPUAttentionBackend):
    """What vLLM asks for both."""

    @staticmethod
    def get_impl_cls() -> type[CPUImpl]:
        return CPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUBuilder]:
        return CPUBuilder


@functools.cache
def cpu_places(isa: str, size: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where vLLM's kernels for CPUs keep element (token, dimension) of a block's keys, and of its values: [size * width].

    The order depends on the instruction set and is nowhere told, so vLLM is asked to write a block of numbered elements.
    """
    numbers = torch.arange(size * width).view(size, 1, width)
    found = torch.zeros(2, size * width, dtype=torch.int64)
    for unit in (1, 64, 64**2):  # digits are exact in every type
        digits = (numbers // unit % 64).to(dtype)
        block = torch.zeros(1, 1, 2 * size, width, dtype=dtype)
        ops.cpu_attn_reshape_and_cache(digits, digits, *block.chunk(2, dim=2), torch.arange(size), isa)
        found += block.view(2, -1).long() * unit
    if not bool((found.sort(dim=1).values == torch.arange(size * width)).all()):
        raise ConfigError(
            f"vLLM's cache for CPUs (instruction set {isa!r}, blocks of {size} tokens, heads of {width}, {dtype}) does not "
            "hold each element once, as this package expects: chunks of a prompt cannot be sparse. Pass another block_size, "
            "or a max_num_batched_tokens of at least max_model_len"
        )
    key, value = found.argsort(dim=1)
    return key, value


class CUDABuilder(Builder, flash_attn.FlashAttentionMetadataBuilder):
    """Graphs hold attention for decode steps; of other batches attention runs between the graphs."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH


class CUDAImpl(Impl, flash_attn.FlashAttentionImpl):
    """Attention on a GPU."""

    rehearses = True

    def read(self, layer: Any, kv_cache: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """A token of a head holds its key and then its value."""
        key, value = gather(kv_cache.transpose(1, 2), blocks, length).chunk(2, dim=-1)
        return key, value


class CUDABackend(flash_attn.FlashAttentionBackend):
    """What vLLM asks for both."""

    @staticmethod
    def get_impl_cls() -> type[CUDAImpl]:
        return CUDAImpl

    @staticmethod
    def get_builder_cls() -> type[CUDABuilder]:
        return CUDABuilder


def layers_of(vllm_config: Any) -> Layers:
    """Which layers of a model are sparse, and why the others are not."""
    held, model = get_layers_from_vllm_config(vllm_config, Attention), vllm_config.model_config
    layers = {name: layer for name, layer in held.items() if _DRAFTS.isdisjoint(name.split("."))}
    count = None if model.is_encoder_decoder else model.get_total_num_hidden_layers() or None
    whole = vllm_config.parallel_config.pipeline_parallel_size == 1
    obstacles = {name: found for name, layer in layers.items() if (found := _obstacle(layer, vllm_config)) is not None}
    kinds = {name: type(layer) for name, layer in layers.items()}
    return choose_layers(kinds, obstacles, own_config(vllm_config), count, whole)


def rule_of(impl: Any, dtype: torch.dtype, layers: Layers, device: torch.device) -> Rule:
    """Which requests are sparse in layers like this one, whatever the budget of each is."""
    sizes = (impl.num_heads, impl.num_kv_heads, impl.head_size, impl.head_size)
    share = len(layers.sparse) / max(len(layers.reasons), 1)
    configs = dict.fromkeys(layers.sparse.values())
    return strictest(Rule(own, CallShape.configured(own, 1, *sizes, dtype.itemsize), share, device) for own in configs)


def check(vllm_config: Any, layers: Layers) -> None:
    """Raises ConfigError where the engine's settings cannot go together with sparse layers, if it has any."""
    if not layers.sparse:
        return
    connector = getattr(vllm_config.kv_transfer_config, "kv_connector", None)
    shared = {
        "enable_prefix_caching=True": (vllm_config.cache_config.enable_prefix_caching, "Pass enable_prefix_caching=False"),
        f"kv_transfer_config with {connector}": (connector, "Leave it out, and kv_offloading_size, which implies it"),
    }
    for what, (is_there, remedy) in shared.items():
        if is_there and os.environ.get(PREFIXES) != "1":
            raise ConfigError(
                f"{what} is not possible with sparse layers: above one a token's keys depend on the whole prompt, on the "
                "question at its end as well, so that another prompt with the same beginning would get keys that are not "
                f"its own. {remedy}, or set {PREFIXES}=1 if you accept that"
            )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        found = getattr(parallel, name, 1)
        if found > 1:
            raise ConfigError(f"{name}={found} is not possible with sparse layers: a prompt must be in one process")


def _obstacle(layer: Any, vllm_config: Any) -> str | None:
    """What a layer asks for that sparse attention does not do."""
    impl, model = layer.impl, vllm_config.model_config
    found = {
        "a pooling model": model.runner_type == "pooling",
        f"attention by {type(layer).__name__}": type(layer) is not Attention,
        f"attention of type {impl.attn_type}": impl.attn_type != AttentionType.DECODER,
        f"attention by {type(impl).__name__}": not isinstance(impl, Impl),
        WINDOW: impl.sliding_window not in (None, -1, (-1, -1)),
        "a window behind the prompt": getattr(model, "rswa_window", None) is not None,
        "parts of a prompt that are not causal": bool(getattr(model, "is_mm_prefix_lm", False)),
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap on the logits": bool(impl.logits_soft_cap),
        "keys of another layer": impl.kv_sharing_target_layer_name is not None,
        "a quantised cache": is_quantized_kv_cache(impl.kv_cache_dtype),
    }
    return next((what for what, is_so in found.items() if is_so), None)


def _group(config: TSAConfig) -> str | None:
    """The process group of tensor parallel, whose mean of the scores a coverage is decided by."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    needed = any(isinstance(budget, Coverage) and budget.tau > 0 for budget in config.budgets)
    return group.device_group.group_name if needed and group.world_size > 1 else None


def _on_host(common: CommonAttentionMetadata) -> tuple[list[int], list[int], list[bool] | None]:
    """Where each request's tokens begin in the batch, how many it has in all, and whether they are its prompt's."""
    lengths = common.seq_lens if common.seq_lens_cpu_upper_bound is None else common.seq_lens_cpu_upper_bound
    prefilling = None if common.is_prefilling is None else common.is_prefilling[: common.num_reqs].tolist()
    return common.query_start_loc_cpu[: common.num_reqs + 1].tolist(), lengths[: common.num_reqs].tolist(), prefilling


def _some(values: Tensor | None, which: Tensor) -> Tensor | None:
    return None if values is None else values[which.to(values.device)]
