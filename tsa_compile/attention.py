"""`attn_implementation="tsa"`: Token Sparse Attention in a transformers model that is not compiled.

    from tsa_compile import TSAConfig, attention

    attention.register(TSAConfig(layers=range(15, 31)))
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tsa")
    model.generate(**inputs)
    print(attention.report(model))

The layers, the ops and the reasons are those of `torch.compile(model, backend="tsa")`. transformers is imported when
`register` is called.
"""

from __future__ import annotations

import re

import torch

from tsa_compile.config import TSAConfig, given
from tsa_compile.errors import ConfigError, check_type
from tsa_compile.kernels import registry
from tsa_compile.report import RewriteReport

_NAME = re.compile(r"[A-Za-z][\w.-]*")
_TAKEN = ("eager", "flash", "flex", "paged", "sdpa")  # transformers looks for these within a name


def register(config: TSAConfig | None = None, *, name: str = "tsa") -> str:
    """Makes `attn_implementation=name` sparse attention by a configuration, for all models of this process.

    Args:
        config: what is sparse, and how; the defaults if None. `compiler` and `skip_passes` have no meaning here.
        name: models ask for it by this. One that was registered before follows the new configuration from now on, so
            configurations that are used side by side need a name each.

    Returns:
        The name.

    Raises:
        ConfigError: the name is not allowed, an argument is no configuration, or transformers is older than 5.4.
        KernelError: the configuration names a kernel that is not registered.
        ImportError: transformers is not installed.
    """
    config = given(config, "register")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or any(taken in name for taken in _TAKEN):
        raise ConfigError(
            f"name={name!r} is not allowed: it must be letters, digits, '.', '-' and '_', and may not contain "
            f"{', '.join(_TAKEN)}, by which transformers knows its own implementations"
        )
    from tsa_compile.engines.transformers import add  # which registers this package's kernels

    registry.check(config.kernel, config.dense_kernel)
    add(name, config)
    return name


def report(model: torch.nn.Module) -> RewriteReport:
    """What became of each attention call of a model in its last prefill: a row a layer, as a compilation reports them.

    Without a prefill, or with another attention implementation, there are no rows.
    """
    check_type("model", model, torch.nn.Module, "a model of transformers")
    from tsa_compile.engines.transformers import report_of

    return report_of(model)
