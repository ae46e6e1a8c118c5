"""What is compared: dense attention, token sparse attention at several budgets, and controls.

| name | kept in a sparse layer | sparse layers |
|---|---|---|
| dense | everything | none |
| coverage-T | what `Coverage(T)` keeps | the selected ones |
| keep-R | what `KeepRatio(R)` keeps | the selected ones |
| random-coverage-T, random-keep-R | as many tokens as the budget keeps there, but random ones | the selected ones |
| rescue-coverage-T, rescue-keep-R | as many, evidence and questions first, in every head | the selected ones |
| early-coverage-T, early-keep-R | what the budget keeps | as many, from the first layer on |
| keep-R@W, and any other with @W | the same, scored by the last W tokens instead of 128 | the same |

The selected layers are the upper half, or what a calibration chose. A method that is no better than its random twin selects
nothing of worth. One that its rescue twin beats loses because it drops evidence, not because it drops tokens. One that loses
as much as its early twin has the wrong layers.

Where a question is shorter than the scoring window, most of the queries that score ask nothing, and each weighs as much as
one that does. A method that gains by a window as short as the question loses for that reason otherwise.

`min_tokens` is a 16th of the length: the published 1024 (arXiv 2602.03216) at 16K tokens, and the same share of shorter
contexts, of which 1024 tokens would be so much that nothing were dropped. The window is the published 128 tokens at every
length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsa_compile.backend import tsa_backend
from tsa_compile.config import Budget, Coverage, KeepRatio, TSAConfig
from tsa_compile.errors import ConfigError
from tsa_compile.evaluation.probe import Compiler, Probe

MIN_SHARE = 16  # min_tokens is the length divided by this
CONTROLS = ("random", "rescue", "early")
# The most useful first, since a study may be stopped: the baseline, the published setting, the controls, then the others.
STANDARD = (
    "dense", "coverage-0.005", "keep-0.5", "coverage-0.01", "random-coverage-0.01", "random-keep-0.5",
    "rescue-keep-0.5", "keep-0.7", "coverage-0.02", "coverage-0.002", "early-coverage-0.01", "keep-0.3", "keep-0.5@8",
    "keep-0.7@8",
)  # fmt: skip
_FORM = re.compile(rf"(?:({'|'.join(CONTROLS)})-)?(coverage|keep)-([0-9.e-]+)(?:@([0-9]+))?")


@dataclass(frozen=True)
class Method:
    """One way to run a model.

    Attributes:
        name: as in the table above.
        budget: how many tokens a sparse layer keeps; None if no layer is sparse.
        control: "random", "rescue" or "early" for a control, else None.
        window: how many of the last tokens score; None: the published 128.
    """

    name: str
    budget: Budget | None
    control: str | None = None
    window: int | None = None

    def layers(self, selected: Sequence[int]) -> tuple[int, ...]:
        """Which layers are sparse, given those that were selected."""
        if self.budget is None:
            return ()
        return tuple(range(len(selected))) if self.control == "early" else tuple(sorted(selected))

    def config(self, length: int, selected: Sequence[int]) -> TSAConfig:
        """The configuration for inputs of this length; every length is compressed, whether it gains time or not."""
        scaled = TSAConfig(layers=self.layers(selected), min_tokens=length // MIN_SHARE, min_length=1, strict=True)
        scaled = scaled if self.budget is None else scaled.replace(budget=self.budget)
        return scaled if self.window is None else scaled.replace(window=self.window)

    def probe(self, compiler: Compiler | None = None) -> Probe:
        """What compiles the model so that its selections are seen, and are others where the method says so."""
        return Probe(shuffle=self.control == "random", rescue=self.control == "rescue", compiler=compiler)


def parse(name: str) -> Method:
    """The method of a name, such as "dense", "coverage-0.005", "keep-0.5" or "random-keep-0.5".

    Raises:
        ConfigError: no method has that name, or its number is not allowed.
    """
    if name == "dense":
        return Method(name, None)
    found = _FORM.fullmatch(str(name))
    try:
        if found is None:
            raise ValueError
        control, kind, number, window = found.groups()
        amount = float(number)
    except ValueError:
        allowed = (
            '"dense", "coverage-T" or "keep-R" with a number, or one of these behind "random-", "rescue-" or "early-" '
            'and before "@W" with the tokens that score'
        )
        raise ConfigError(
            f"method {name!r} is not known: a method is {allowed}, such as {', '.join(STANDARD[1:5])}"
        ) from None
    budget = KeepRatio(amount) if kind == "keep" else Coverage(amount)
    return Method(name, budget, control, None if window is None else TSAConfig(window=int(window)).window)


def compiled(model: nn.Module, config: TSAConfig) -> Callable[[Tensor, int | Tensor], Any]:
    """The model under a configuration, for inputs of one shape: of tokens [B, L], and of the positions that need logits.

    Dynamo forgets what it compiled before: graphs of earlier methods would count against its limit.
    """
    torch._dynamo.reset()
    options: dict[str, Any] = {"config": config}
    function = torch.compile(model, backend=tsa_backend, dynamic=False, options=options)

    def call(tokens: Tensor, logits_to_keep: int | Tensor) -> Any:
        with torch.inference_mode():
            return function(input_ids=tokens, use_cache=False, logits_to_keep=logits_to_keep)

    return call
