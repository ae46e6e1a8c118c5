"""Which configuration an engine of vLLM's has: from the environment, or from vLLM's own additional configuration."""

from __future__ import annotations

import os
from typing import Any

from tsa_compile.config import TSAConfig
from tsa_compile.errors import ConfigError

CONFIG, KEY = "TSA_CONFIG", "tsa"


def from_environment() -> TSAConfig | None:
    """The configuration that `TSA_CONFIG` is or names; None if it is not set. ConfigError if it is not valid."""
    source = os.environ.get(CONFIG)
    return None if source is None else TSAConfig.from_json(source)


def config_of(vllm_config: Any) -> TSAConfig | None:
    """The configuration of an engine; None if it has none.

    Raises:
        ConfigError: it is not valid, or there are two.
    """
    additional = getattr(vllm_config, "additional_config", None)
    given = additional.get(KEY) if isinstance(additional, dict) else None
    if given is None:
        return from_environment()
    if CONFIG in os.environ:
        raise ConfigError(
            f'{CONFIG} is set, and vLLM\'s additional config has "{KEY}": {given!r}. Leave out one of them: the first holds '
            "for all engines, the second for one"
        )
    return TSAConfig.from_json(given)


def own_config(vllm_config: Any) -> TSAConfig:
    """The configuration of an engine. Without one no layer is sparse: another engine of this process may have some."""
    return config_of(vllm_config) or TSAConfig(layers=[])
