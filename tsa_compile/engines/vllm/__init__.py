"""Token Sparse Attention in vLLM: `TSA_CONFIG` names a configuration, as a JSON file or JSON text, and vLLM finds the rest.

    TSA_CONFIG='{"budget": {"keep_ratio": 0.3}}' vllm serve MODEL --no-enable-prefix-caching

`register` is the entry point of `vllm.general_plugins`, which vLLM calls in each of its processes. Without `TSA_CONFIG` it
does nothing. core.py knows nothing of vLLM, interface.py all that changes with its versions.
"""

from __future__ import annotations

import os

from tsa_compile.config import TSAConfig

CONFIG = "TSA_CONFIG"


def register() -> None:
    """Puts sparse attention in the place of vLLM's own backend for this platform, if `TSA_CONFIG` is set.

    Raises:
        ConfigError: the configuration is not valid, or vLLM's version or platform is not supported.
    """
    source = os.environ.get(CONFIG)
    if source is None:
        return
    config = TSAConfig.from_json(source)
    from tsa_compile.engines.vllm.interface import install

    install(config)
