"""Everything that depends on vLLM's version: its backend for CPUs, with prompts of the chosen layers taken out.

    metadata of a batch      as vLLM builds it; beside it those of its other requests alone, if it has both kinds
    a sparse layer           prompts by core.attend; the others by vLLM's own kernel, from its paged cache
    any other layer          vLLM's own

Keys and values are in the cache before attention runs, so later steps find all tokens there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from tsa_compile.config import Coverage, TSAConfig
from tsa_compile.costs.calls import CallShape
from tsa_compile.engines.vllm import core
from tsa_compile.errors import ConfigError
from tsa_compile.passes.plan import minimum_length

SUPPORTED = ("0.32",)
PREFIXES = "TSA_ALLOW_PREFIX_CACHING"

_log = init_logger("vllm.tsa_compile")
_installed: TSAConfig | None = None


def install(config: TSAConfig) -> None:
    """Overrides vLLM's backend for CPUs in this process.

    Raises:
        ConfigError: another version or platform.
    """
    global _installed
    if not vllm.__version__.startswith(tuple(f"{version}." for version in SUPPORTED)):
        raise ConfigError(
            f"TSA_CONFIG is set, but vLLM {vllm.__version__} is not supported: its interfaces change with its version, and "
            f"this package knows {', '.join(SUPPORTED)}. Install one of them, or unset TSA_CONFIG"
        )
    if not current_platform.is_cpu():
        raise ConfigError(
            f"TSA_CONFIG is set, but vLLM runs on {current_platform.device_name!r}: the plug-in supports its CPU platform"
        )
    _installed = config
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.SparseBackend")


def installed() -> TSAConfig:
    """The configuration of this process."""
    assert _installed is not None, "vLLM asked for a backend that was not installed"
    return _installed


@dataclass(frozen=True)
class Plan:
    """What a batch is for sparse layers.

    Attributes:
        layers: the names of the sparse layers.
        prompts: the token ranges of the requests that are computed by `core.attend`.
        others: vLLM's metadata of the other requests alone, and which tokens are theirs; None if there are none.
        group: the process group that has the other heads, where they matter.
    """

    layers: frozenset[str]
    prompts: tuple[tuple[int, int], ...]
    others: tuple[CPUAttentionMetadata, Tensor] | None
    group: str | None


class SparseBuilder(CPUAttentionMetadataBuilder):
    """vLLM's metadata, with a `Plan` as attribute `tsa` for batches that have prompts."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        config = installed()
        check(vllm_config, config)
        layers = get_layers_from_vllm_config(vllm_config, Attention)
        obstacles = {name: obstacle for name, layer in layers.items() if (obstacle := _obstacle(layer.impl)) is not None}
        chosen = core.choose_layers({name: type(layer) for name, layer in layers.items()}, obstacles, config)
        _log.info("Token Sparse Attention: %s", chosen.summary)
        self.sparse_layers = chosen.sparse & set(layer_names)
        self.group = _group(config)
        shape = CallShape.configured(
            config, 1, self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim, self.dtype.itemsize
        )
        share = len(chosen.sparse) / max(len(layers), 1)
        self.shortest = minimum_length(config, device, shape, share)[0] if self.sparse_layers else None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        starts, lengths = _on_host(common_attn_metadata)
        batch = core.split(starts, lengths, self.shortest if metadata.causal is True else None)
        if batch.prompts:
            others = self._others(common_attn_metadata, batch, starts, fast_build) if batch.others else None
            metadata.tsa = Plan(self.sparse_layers, batch.prompts, others, self.group)  # type: ignore[attr-defined]
        return metadata

    def _others(
        self, common: CommonAttentionMetadata, batch: core.Split, starts: list[int], fast_build: bool
    ) -> tuple[CPUAttentionMetadata, Tensor]:
        """The metadata of some requests, as if the batch had no others."""
        device = common.seq_lens.device
        requests = torch.tensor(batch.others, device=device)
        tokens = torch.cat([torch.arange(starts[number], starts[number + 1], device=device) for number in batch.others])
        rows = [starts[number + 1] - starts[number] for number in batch.others]
        offsets = torch.tensor([0, *rows], dtype=common.query_start_loc_cpu.dtype).cumsum(0, dtype=torch.int32)
        some = common.replace(
            query_start_loc=offsets.to(device), query_start_loc_cpu=offsets, seq_lens=common.seq_lens[requests],
            num_reqs=len(rows), num_actual_tokens=sum(rows), max_query_len=max(rows),
            block_table_tensor=common.block_table_tensor[requests], slot_mapping=common.slot_mapping[tokens],
            seq_lens_cpu_upper_bound=_some(common.seq_lens_cpu_upper_bound, requests),
            is_prefilling=_some(common.is_prefilling, requests), positions=_some(common.positions, tokens),
            logits_indices_padded=None, _num_computed_tokens_cache=None, _token_to_req_indices_cache=None,
        )  # fmt: skip
        return super().build(0, some, fast_build), tokens


class SparseImpl(CPUAttentionBackendImpl):
    """vLLM's attention, with the prompts of sparse layers taken out."""

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
        output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        plan = getattr(attn_metadata, "tsa", None)
        if plan is None or layer.layer_name not in plan.layers:
            more = (output_scale, output_block_scale)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *more)
        for start, stop in plan.prompts:
            rows = (query[start:stop], key[start:stop], value[start:stop], output[start:stop])
            core.attend(*rows, self.scale, installed(), plan.group)
        if plan.others is not None:
            metadata, tokens = plan.others
            found = torch.empty_like(output[tokens])
            super().forward(layer, query[tokens], key[tokens], value[tokens], kv_cache, metadata, found)
            output[tokens] = found
        return output


class SparseBackend(CPUAttentionBackend):
    """vLLM's backend for CPUs with the two above."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return SparseImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return SparseBuilder


def check(vllm_config: Any, config: TSAConfig) -> None:
    """Raises ConfigError where the engine's settings cannot go together with sparse layers; warns where they spoil them."""
    if config.layers == ():
        return
    if vllm_config.cache_config.enable_prefix_caching and os.environ.get(PREFIXES) != "1":
        raise ConfigError(
            "enable_prefix_caching=True is not possible with TSA_CONFIG: above a sparse layer a token's keys depend on the "
            "whole prompt, on the question at its end as well, so that another prompt with the same beginning would get "
            f"keys that are not its own. Pass enable_prefix_caching=False, or set {PREFIXES}=1 if you accept that"
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        found = getattr(parallel, name, 1)
        if found > 1:
            raise ConfigError(f"{name}={found} is not possible with TSA_CONFIG: a prompt must be in one process")
    scheduler = vllm_config.scheduler_config
    if scheduler.enable_chunked_prefill and scheduler.max_num_batched_tokens < vllm_config.model_config.max_model_len:
        _log.warning_once(
            "Token Sparse Attention: prompts that do not fit into a batch of %d tokens are run in chunks, of which the "
            "first is sparse; the others run vLLM's own attention. Pass a larger max_num_batched_tokens",
            scheduler.max_num_batched_tokens,
        )


def _obstacle(impl: Any) -> str | None:
    """What a layer asks for that sparse attention does not do."""
    if impl.attn_type != AttentionType.DECODER:
        return f"attention of type {impl.attn_type}"
    found = {
        "a sliding window": impl.sliding_window != -1,
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap on the logits": bool(impl.logits_soft_cap),
        "a sink in each softmax": impl.sinks is not None,
        "keys of another layer": impl.kv_sharing_target_layer_name is not None,
        "a quantised cache": impl.is_fp8_kv_cache,
    }
    return next((what for what, is_so in found.items() if is_so), None)


def _group(config: TSAConfig) -> str | None:
    """The process group of tensor parallel, whose mean of the scores a coverage is decided by."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    needed = isinstance(config.budget, Coverage) and config.budget.tau > 0 and group.world_size > 1
    return group.device_group.group_name if needed else None


def _on_host(common: CommonAttentionMetadata) -> tuple[list[int], list[int]]:
    """Where each request's tokens begin in the batch, and how many it has in all."""
    lengths = common.seq_lens if common.seq_lens_cpu_upper_bound is None else common.seq_lens_cpu_upper_bound
    return common.query_start_loc_cpu[: common.num_reqs + 1].tolist(), lengths[: common.num_reqs].tolist()


def _some(values: Tensor | None, which: Tensor) -> Tensor | None:
    return None if values is None else values[which.to(values.device)]
