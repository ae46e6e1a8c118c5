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

    place, name = _choice()
    choose = getattr(place, name, None)
    current = getattr(configs, "get_current_vllm_config_or_none", None) or configs.get_current_vllm_config
    if choose is None:  # of some other version: whoever did not ask for sparse attention must not notice
        return

    @functools.wraps(choose)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if config_of(current()) is None:
            return choose(*args, **kwargs)
        from tsa_compile.engines.vllm.interface import install

        install()
        setattr(place, name, choose)
        return choose(*args, **kwargs)

    for of_cache in ("cache_clear", "cache_info"):
        if hasattr(choose, of_cache):
            setattr(watched, of_cache, getattr(choose, of_cache))
    setattr(place, name, watched)


def _choice() -> tuple[Any, str]:
    """The function of vLLM's that chooses a backend, and what has it.

    The one in front of its cache, behind which nobody is asked again: what was chosen for an engine without a configuration
    would hold for all later ones of its process. A version that has no such function is one that `install` refuses.
    """
    from vllm.platforms import current_platform

    try:
        from vllm.v1.attention import selector
    except ImportError:
        return current_platform, "get_attn_backend_cls"
    name = "_cached_get_attn_backend"
    return (selector, name) if hasattr(selector, name) else (current_platform, "get_attn_backend_cls")
