"""Token Sparse Attention in vLLM, which finds this package by itself and asks for no change of code.

    vllm serve MODEL --no-enable-prefix-caching --additional-config '{"tsa": {"budget": {"keep_ratio": 0.3}}}'
    TSA_CONFIG='{"budget": {"keep_ratio": 0.3}}' vllm serve MODEL --no-enable-prefix-caching

The configuration stands under "tsa" in vLLM's additional config, or `TSA_CONFIG` is JSON text or names a JSON file.
`register` is the entry point of `vllm.general_plugins`, which vLLM calls in each of its processes, before it has a
configuration. So without `TSA_CONFIG` vLLM's choice of a backend is watched, and nothing else happens unless the engine
was given "tsa". core.py knows nothing of vLLM, interface.py all that changes with its versions.
"""

from __future__ import annotations

import functools
from typing import Any

from tsa_compile.engines.vllm.settings import config_of, from_environment


def register() -> None:
    """Puts sparse attention in the place of vLLM's own backend for this platform, where it is asked for.

    Raises:
        ConfigError: `TSA_CONFIG` is not valid, or vLLM's version or platform is not supported.
    """
    if from_environment() is None:
        return _watch()
    from tsa_compile.engines.vllm.interface import install

    install()


def _watch() -> None:
    """Installs the backend as soon as vLLM chooses one for an engine that was given a configuration."""
    from vllm import config as configs
    from vllm.platforms import current_platform

    choose = getattr(current_platform, "get_attn_backend_cls", None)
    current = getattr(configs, "get_current_vllm_config_or_none", None) or configs.get_current_vllm_config
    if choose is None:  # of some other version: whoever did not ask for sparse attention must not notice
        return

    @functools.wraps(choose)
    def get_attn_backend_cls(*args: Any, **kwargs: Any) -> str:
        if config_of(current()) is None:
            return choose(*args, **kwargs)
        from tsa_compile.engines.vllm.interface import install

        current_platform.get_attn_backend_cls = choose
        install()
        return current_platform.get_attn_backend_cls(*args, **kwargs)

    current_platform.get_attn_backend_cls = get_attn_backend_cls
