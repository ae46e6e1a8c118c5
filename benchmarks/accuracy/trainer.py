"""One training run: data from the step's number, a bfloat16 model with float32 masters, a state that a cut cannot corrupt.

A step is a function of its number, the ladder's rung and the weights, so a resumed run computes what an uninterrupted one
would have (bit for bit where the device's kernels are deterministic; only decisions by the clock may fall differently).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoint import build_model, cast_parameters, load_checkpoint, parameter_count
from ladder import Ladder, Rules
from torch import Tensor, nn
from torch.nn import functional

from tsa_compile.evaluation.tasks import IGNORED, TASKS, generate

# Seeds: below all of these a study is free to choose, and meets no sample again.
HELD_OUT = 1 << 40
TRAINING = 1 << 41


@dataclass(frozen=True)
class Settings:
    """What the result of a run depends on, beside `Rules`.

    Attributes:
        token_shift: see modeling_recall.py.
        aligned: see `starts.align`.
        tokens: of a step; a step at length L has tokens // L samples, at least one of them for some task.
        learning_rate, weight_decay, betas, clip: of AdamW; norms' gains do not decay.
        evaluate_every: steps between evaluations.
        held_out: samples of each task in an evaluation, at least.
        tasks: the mixture, in equal numbers of samples.
        sizes: what replaces `checkpoint.SIZES`.
        start: a checkpoint folder whose weights replace the random ones; a ladder that it knows is climbed fast.
    """

    token_shift: bool = True
    aligned: bool = True
    seed: int = 0
    tokens: int = 131072
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    evaluate_every: int = 100
    held_out: int = 64
    tasks: tuple[str, ...] = TASKS
    sizes: dict[str, int] = field(default_factory=dict)
    start: str | None = None


class MasterAdamW:
    """AdamW on float32 copies of a model's parameters, which may be bfloat16: there an update of 2^-9 would be lost."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.parameters = list(model.parameters())
        self.masters = [parameter.detach().float().clone() for parameter in self.parameters]
        self.clip = settings.clip
        decayed = [master for master in self.masters if master.dim() > 1]
        others = [master for master in self.masters if master.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)

    def step(self, learning_rate: float) -> Tensor:
        """One update from the parameters' gradients; returns their norm before clipping, a scalar on the device."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters, self.clip)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.publish()
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the masters into the parameters."""
        torch._foreach_copy_(self.parameters, self.masters)


class Trainer:
    """Trains in a folder: `state.pt`, `log.jsonl`. A folder with a state is gone on with."""

    def __init__(
        self, settings: Settings, rules: Rules, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32,
        compiled: bool = False, say: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.settings, self.rules, self.folder, self.device, self.say = settings, rules, folder, device, say
        model = build_model(settings.token_shift, settings.seed, aligned=settings.aligned, **settings.sizes).to(device)
        if settings.start is not None:
            model.load_state_dict(load_checkpoint(settings.start, torch.float32).state_dict())
        self.optimizer = MasterAdamW(model, settings)
        self.model = cast_parameters(model, dtype).train()
        self.optimizer.parameters = list(self.model.parameters())
        self.optimizer.publish()
        self.ladder = Ladder(rules)
        self.step, self.seconds = 0, 0.0
        self.first_calls: dict[int, float] = {}
        self.times: dict[int, list[float]] = {}
        self.last_evaluation: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._restore()
        if compiled:
            for layer in self.model.model.layers:  # one compilation a length serves all layers
                layer.compile(dynamic=False)

    # What a step is made of

    def batch(self, step: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and labels [samples, length] of a step, and the task of each sample [samples]."""
        tasks, samples = self.settings.tasks, max(1, self.settings.tokens // length)
        counts = [samples // len(tasks)] * len(tasks)
        for extra in range(samples % len(tasks)):  # what does not divide goes round
            counts[(step * (samples % len(tasks)) + extra) % len(tasks)] += 1
        return self._generate({task: count for task, count in zip(tasks, counts) if count}, length, TRAINING + step)

    def _generate(self, counts: dict[str, int], length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        parts = [generate(task, batch=count, length=length, seed=seed, device=self.device) for task, count in counts.items()]
        numbers = [self.settings.tasks.index(task) for task, count in counts.items() for _ in range(count)]
        tokens, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "labels"))
        return tokens, labels, torch.tensor(numbers).to(self.device, non_blocking=True)

    def answers(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [n, vocabulary] at the n labels, those labels [n], and the sample of each [n]."""
        samples, places = (labels != IGNORED).nonzero(as_tuple=True)
        embeddings = self.model.model.embed_tokens(tokens)
        if self.settings.token_shift:
            embeddings = self.model.embed(embeddings)
        hidden = self.model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden[samples, places]).float(), labels[samples, places], samples

    def loss(self, tokens: Tensor, labels: Tensor, task: Tensor) -> Tensor:
        """The mean over tasks of their labels' mean cross-entropy: a task with 16 labels weighs as much as one with one."""
        logits, targets, samples = self.answers(tokens, labels)
        entropy = functional.cross_entropy(logits, targets, reduction="none")
        kind = task[samples]
        sums = torch.zeros(2, len(self.settings.tasks), device=self.device)
        sums = sums.index_add(1, kind, torch.stack((entropy, torch.ones_like(entropy))))
        present = sums[1] > 0
        return (sums[0] / sums[1].clamp(min=1)).sum() / present.sum()

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One update; the loss and the gradients' norm, scalars on the device."""
        loss = self.loss(*self.batch(self.step, self.ladder.length(self.step)))
        loss.backward()
        norm = self.optimizer.step(self.settings.learning_rate * self.ladder.rate(self.step))
        self.step += 1
        return loss.detach(), norm

    def evaluate(self, length: int) -> dict[str, dict[str, float]]:
        """Held-out accuracy of each task: the share of right labels, and of samples whose labels are all right.

        It runs with gradients, though none are taken, since that is the graph that training has compiled.
        """
        samples = max(1, self.settings.tokens // length)
        found: dict[str, dict[str, float]] = {"labels": {}, "samples": {}}
        for task in self.settings.tasks:
            right, wrong_samples, seen = [], 0, 0
            for part in range(-(-self.settings.held_out // samples)):
                tokens, labels, _ = self._generate({task: samples}, length, HELD_OUT + part)
                logits, targets, sample = self.answers(tokens, labels)
                hits = logits.detach().argmax(-1) == targets
                right.append(hits)
                wrong_samples += int(sample[~hits].unique().numel())
                seen += samples
            found["labels"][task] = round(float(torch.cat(right).float().mean()), 4)
            found["samples"][task] = round(1 - wrong_samples / seen, 4)
        return found

    def evaluate_all(self) -> list[dict[str, Any]]:
        """`evaluate` at every length up to the rung's."""
        return [{"length": length, **self.evaluate(length)} for length in self.rules.lengths[: self.ladder.rung + 1]]

    # The run

    def run(self, pause_after: float | None = None, save_every: float = 60.0) -> bool:
        """Trains until the ladder is done, the minutes are over, or `pause_after` seconds of this call.

        Returns:
            Whether training is over; False: a later run goes on.

        Raises:
            FloatingPointError: the loss is no longer finite. The last saved state is from before.
        """
        started = last = saved = time.perf_counter()
        while True:
            self.ladder.tick(self.step, self.seconds, self._seconds_per_step())
            if self.ladder.phase == "done" or self._out_of_time():
                if self.last_evaluation.get("step") != self.step:
                    self._evaluate_and_log()
                self.save()
                return True
            if pause_after is not None and time.perf_counter() - started >= pause_after:
                self.save()
                return False
            length = self.ladder.length(self.step)
            loss, norm = self.train_step()
            if length not in self.first_calls or self.step % 20 == 0:
                self._log_step(length, float(loss), float(norm))
            if self.step % self.settings.evaluate_every == 0:
                self._count(length, last)
                last = time.perf_counter()
                self._evaluate_and_log()
                self.seconds += time.perf_counter() - last
            else:
                self._count(length, last)
            last = time.perf_counter()
            if last - saved >= save_every:
                self.save()
                self.seconds += time.perf_counter() - last
                saved = last = time.perf_counter()

    def _count(self, length: int, since: float) -> None:
        spent = time.perf_counter() - since
        self.seconds += spent
        if length in self.first_calls:
            self.times.setdefault(length, []).append(spent)
        else:  # compilation, mostly
            self.first_calls[length] = round(spent, 2)

    def _seconds_per_step(self) -> float:
        """Of the mixture at the present rung, the rung's own length weighing as much as its share of the steps."""
        lengths = self.rules.lengths[: self.ladder.rung + 1]
        recent = [spent for length in lengths for spent in self.times.get(length, [])[-50:]]
        own = self.times.get(self.ladder.top, [])
        return max(statistics.fmean(recent), statistics.fmean(own[-50:]) if own else 0.0) if recent else 0.0

    def _out_of_time(self) -> bool:
        return self.rules.minutes is not None and self.seconds >= 60 * self.rules.minutes

    def _log_step(self, length: int, loss: float, norm: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss at step {self.step} is {loss}; lower the learning rate ({self.settings.learning_rate}) and start "
                f"anew, or run again to go on from {self.folder / 'state.pt'}"
            )
        times = self.times.get(length, [])[-20:]
        rate = round(self.settings.tokens // length * length / statistics.median(times)) if times else None
        self._log(kind="step", length=length, loss=round(loss, 4), norm=round(norm, 3), tokens_per_s=rate)

    def _evaluate_and_log(self) -> None:
        length = self.ladder.top
        found = self.evaluate(length)
        self.last_evaluation = {"length": length, "step": self.step, **found}
        self._log(kind="evaluation", length=length, **found)
        top = self.ladder.rung + 1 == len(self.rules.lengths)  # the study counts samples; below, labels are enough to go on
        reason = self.ladder.observe(self.step, self.seconds, found["samples" if top else "labels"])
        if reason is not None:
            self._log(kind="rung", **self.ladder.rungs[-1])

    def _log(self, **line: Any) -> None:
        place = {"step": self.step, "rung": self.ladder.rung, "phase": self.ladder.phase}
        text = json.dumps(place | {"seconds": round(self.seconds, 1)} | line)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(text + "\n")
        self.say(text)

    # The state

    def save(self) -> None:
        """Replaces `state.pt` by renaming, so that there is always a whole one."""
        state = {
            "asked": self._asked(), "step": self.step, "seconds": self.seconds, "ladder": self.ladder.state(),
            "masters": self.optimizer.masters, "adamw": self.optimizer.adamw.state_dict(),
            "first_calls": self.first_calls, "times": self.times, "last_evaluation": self.last_evaluation,
        }  # fmt: skip
        path = self.folder / "state.pt"
        with open(path.with_suffix(".new"), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".new"), path)

    def _asked(self) -> dict[str, Any]:
        """What must be the same when a run is gone on with: all but the limits."""
        rules = {name: value for name, value in asdict(self.rules).items() if name not in ("minutes", "steps")}
        return json.loads(json.dumps({"settings": asdict(self.settings), "rules": rules}))

    def _restore(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            (self.folder / "log.jsonl").unlink(missing_ok=True)
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["asked"] != self._asked():
            raise ValueError(
                f"{path} was trained with other settings: {state['asked']}, now asked: {self._asked()}. Choose another "
                "folder, or delete that file"
            )
        for master, saved in zip(self.optimizer.masters, state["masters"], strict=True):
            master.copy_(saved)
        self.optimizer.publish()
        self.optimizer.adamw.load_state_dict(state["adamw"])
        self.ladder = Ladder.restore(self.rules, state["ladder"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.first_calls, self.times = state["first_calls"], state["times"]
        self.last_evaluation = state["last_evaluation"]
        self._drop_lines_after(self.step)

    def _drop_lines_after(self, step: int) -> None:
        """Lines that a cut run logged beyond its last state, a half-written one included, would come twice."""
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        path.with_suffix(".new").write_text("".join(line + "\n" for line in kept))
        os.replace(path.with_suffix(".new"), path)

    def facts(self) -> dict[str, Any]:
        """What is known about the run, as JSON."""
        return {
            "device": torch.cuda.get_device_name() if self.device.startswith("cuda") else "CPU", "torch": torch.__version__,
            "parameters": parameter_count(self.model), "steps": self.step, "minutes": round(self.seconds / 60, 2),
            "phase": self.ladder.phase, "held_out": self.last_evaluation, "rungs": self.ladder.rungs,
            "lengths": [
                {
                    "length": length, "first_call_s": self.first_calls[length], "steps": len(times) + 1,
                    "ms": round(1e3 * statistics.median(times), 1) if times else None,
                }
                for length, times in ((length, self.times.get(length, [])) for length in sorted(self.first_calls))
            ],
            "rules": asdict(self.rules), "settings": asdict(self.settings),
        }  # fmt: skip
