"""What is compared: dense attention, configurations of the compiler, and the control of a random selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tsa_compile.config import TSAConfig


@dataclass(frozen=True)
class Setting:
    """One way to run a model's prefill.

    Attributes:
        name: how tables and files call it.
        config: of the compiler; None: the model as it is, uncompiled.
        random: whether random tokens take the place of the selected ones, as many as these: what selecting is worth.
    """

    name: str
    config: TSAConfig | None
    random: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, by which a file's setting of this name is the same or another."""
        if self.config is None:
            return {"config": None, "random": False}
        values = {name: value for name, value in self.config.to_dict().items() if name not in ("compiler", "strict")}
        return {"config": values, "random": self.random}


DENSE = Setting("dense", None)
