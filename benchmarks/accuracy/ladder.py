"""Which length to train on, when to advance, how the learning rate falls. No tensors: a state is a few numbers.

    climb   the rung's own length with probability `own`, otherwise one of the shorter ones, so that they are not forgotten;
            the next rung follows when the worst task's held-out accuracy reaches `target`, or a cap is met
    decay   the top rung reached `target`, or time is nearly over: the rate falls to 0 as a cosine, the lengths stay mixed
    done

A rung that was left is never entered again.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rules:
    """When the ladder moves on.

    Attributes:
        lengths: of the rungs, ascending, in tokens.
        target: accuracy that the worst task must reach.
        floor: steps at a rung at least.
        cap: steps at a rung at most.
        share: of the minutes that are left when a rung begins, what it may take at most.
        own: probability of the rung's own length.
        warmup: steps until the learning rate is whole.
        decay: steps of the learning rate's fall at the end.
        decay_share: of all minutes, what the fall may take; it begins at the latest when no more are left.
        minutes: of training, evaluation and compilation in all, over all runs; None: no limit.
        steps: at most, the fall included; None: no limit.
    """

    lengths: tuple[int, ...] = (128, 512, 2048, 4096, 8192, 16384)
    target: float = 0.99
    floor: int = 100
    cap: int = 4000
    share: float = 0.25
    own: float = 0.7
    warmup: int = 100
    decay: int = 300
    decay_share: float = 0.15
    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths={self.lengths} is not allowed: they must ascend")
        if self.steps is not None and self.steps <= self.decay:
            raise ValueError(f"steps={self.steps} is not allowed: more than the {self.decay} steps of the decay are needed")


@dataclass
class Ladder:
    """Where training stands. `rungs` has a line for each rung that was left: why, when, and how well it was known."""

    rules: Rules
    rung: int = 0
    entered_step: int = 0
    entered_seconds: float = 0.0
    phase: str = "climb"
    decay_start: int = 0
    decay_steps: int = 0
    rungs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def top(self) -> int:
        """The rung's own length, the longest that is trained on."""
        return self.rules.lengths[self.rung]

    def length(self, step: int) -> int:
        """The length of a step: a function of the rung and the step alone."""
        draw = random.Random(step)
        if self.rung == 0 or draw.random() < self.rules.own:
            return self.top
        return draw.choice(self.rules.lengths[: self.rung])

    def rate(self, step: int) -> float:
        """What the learning rate is multiplied with at a step."""
        scale = min(1.0, (step + 1) / self.rules.warmup) if self.rules.warmup else 1.0
        if self.phase == "climb":
            return scale
        return scale * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - self.decay_start) / self.decay_steps)))

    def observe(self, step: int, seconds: float, accuracy: dict[str, float]) -> str | None:
        """Takes the held-out accuracy of each task at the rung's own length, after `step` steps.

        Returns:
            Why the rung was left: "target", "cap", "share"; None if it was not, or nothing is left to leave.
        """
        if self.phase != "climb" or not accuracy:
            return None
        reason = self._leaves(step, seconds, min(accuracy.values()))
        if reason is None:
            return None
        self._note(step, seconds, reason, accuracy)
        if self.rung + 1 == len(self.rules.lengths):
            self._fall(step, self.rules.decay)
        else:
            self.rung += 1
            self.entered_step, self.entered_seconds = step, seconds
        return reason

    def tick(self, step: int, seconds: float, seconds_per_step: float) -> None:
        """Called before each step: the fall begins when the rest of the time or of the steps is its, and ends."""
        if self.phase == "climb":
            steps = self.rules.decay
            late = self._left(seconds) <= self.rules.decay_share * self._left(0.0) < math.inf
            if late and seconds_per_step:
                steps = min(steps, int(0.9 * self._left(seconds) / seconds_per_step))
            if late or (self.rules.steps is not None and self.rules.steps - step <= steps):
                self._note(step, seconds, "end", {})
                self._fall(step, max(1, steps))
        if self.phase == "decay" and step >= self.decay_start + self.decay_steps:
            self.phase = "done"

    def _leaves(self, step: int, seconds: float, worst: float) -> str | None:
        spent = step - self.entered_step
        last = self.rung + 1 == len(self.rules.lengths)
        if spent >= self.rules.floor and worst >= self.rules.target:
            return "target"
        if spent >= self.rules.cap:
            return "cap"
        allowed = self.rules.share * self._left(self.entered_seconds)
        return "share" if not last and seconds - self.entered_seconds >= allowed else None

    def _left(self, seconds: float) -> float:
        return math.inf if self.rules.minutes is None else 60 * self.rules.minutes - seconds

    def _fall(self, step: int, steps: int) -> None:
        self.phase, self.decay_start, self.decay_steps = "decay", step, steps

    def _note(self, step: int, seconds: float, reason: str, accuracy: dict[str, float]) -> None:
        self.rungs.append(
            {
                "length": self.top,
                "left_at_step": step,
                "steps": step - self.entered_step,
                "took_s": round(seconds - self.entered_seconds, 1),
                "reason": reason,
                "accuracy": accuracy,
            }
        )

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {name: value for name, value in asdict(self).items() if name != "rules"}

    @classmethod
    def restore(cls, rules: Rules, state: dict[str, Any]) -> Ladder:
        """A ladder that goes on where `state` was taken."""
        return cls(rules, **state)
