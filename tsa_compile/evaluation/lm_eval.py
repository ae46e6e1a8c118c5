"""The model type `tsa` of lm-evaluation-harness: any of its tasks behind a sparse prefill.

    python -m tsa_compile.evaluation.lm_eval --model tsa --model_args pretrained=FOLDER,budget=keep:0.15 --tasks ruler

The harness knows no plug-ins: a model type is there once its module is imported. So this module is its command line too.

    loglikelihood     prefill(context), sparse; the continuation behind it, through its cache, dense
    generate_until    prefill(prompt), sparse; what follows by `model.generate`, through its cache, dense

A context that several continuations share runs once. loglikelihood_rolling has no prompt but one token, so it is dense.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsa_compile.backend import tsa_backend
from tsa_compile.commands import texts
from tsa_compile.commands.loading import unpacked
from tsa_compile.config import TSAConfig
from tsa_compile.errors import ConfigError, TSAWarning
from tsa_compile.evaluation.cached import CachedModel, check_model, dynamo_remembers
from tsa_compile.kernels import registry
from tsa_compile.kernels.kept import never_dropped

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as missing:
    raise ImportError(f"the model type 'tsa' needs {missing.name}: pip install 'tsa-compile[eval]'") from missing

_FIELDS = ("budget", "floor", "layers", "window", "min_tokens", "granularity", "kernel", "compiler", "config")


@register_model("tsa")
class TSALM(HFLM):
    """A causal language model of transformers whose prompts are prefilled by a `TSAConfig`.

    Args:
        pretrained: as for the harness's `hf`: a folder, also of one .gguf file, a name on the hub, or a model.
        given: fields of the configuration, written as behind `tsa-compile eval --setting` (budget=keep:0.15, floor=256+16,
            layers=none for dense), config=FILE.json, compiler=NAME; everything else as for `hf`.

    Raises:
        ConfigError: a field is not allowed, the model is no causal language model with a cache, or a calibration whose
            layers are named is of a model of another architecture or of other sizes.
    """

    def __init__(self, pretrained: Any, **given: Any) -> None:
        fields = {name: given.pop(name) for name in _FIELDS if name in given}
        self.tsa_config = read_config(fields)  # what is wrong is found before the model is loaded
        if isinstance(pretrained, str) and Path(pretrained).is_dir() and (file := texts.gguf_file(Path(pretrained))):
            given.setdefault("gguf_file", file)
        super().__init__(pretrained, **given)
        if self.backend != "causal":
            raise ConfigError(f"{type(self.model).__name__} is no decoder-only model: only such are prefilled")
        check_model(self.model)
        self.tsa_config = read_config(fields, self.model)
        options: dict[str, Any] = {"config": self.tsa_config}
        self._prefill = torch.compile(self.model.forward, backend=tsa_backend, dynamic=True, options=options)
        self._cached = CachedModel(self.model, self._prefill)

    def _create_model(self, *args: Any, gguf_file: str | None = None, **given: Any) -> None:
        super()._create_model(*args, gguf_file=gguf_file, **{**given, **unpacked(gguf_file)})

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **ignored: Any
    ) -> list[tuple[float, bool]]:
        """For each (strings, context, continuation): the continuation's log-likelihood, and whether it is the likeliest."""
        from tqdm import tqdm

        places: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, (_, context, answer) in enumerate(requests):
            places[tuple(self._cut(context, answer))].append(place)
        found: dict[int, tuple[float, bool]] = {}
        hidden = disable_tqdm or self.rank != 0
        with self._running(), tqdm(total=len(requests), disable=hidden, desc="Running loglikelihood requests") as bar:
            for prompt in sorted(places, key=len, reverse=True):  # what does not fit into memory is found at once
                logits, cache = self._cached.prefill(self._tensor(prompt))
                for place in places[prompt]:
                    strings, _, answer = requests[place]
                    found[place] = _likelihood(self._cached.score(logits, cache, self._tensor(answer)), answer)
                    if strings is not None:  # of loglikelihood_rolling, which keeps its sums itself
                        self.cache_hook.add_partial("loglikelihood", strings, found[place])
                    bar.update(1)
        self._check_lengths(list(map(len, places)))
        return [found[place] for place in range(len(requests))]

    def _cut(self, context: list[int], answer: list[int]) -> list[int]:
        """The context's end that fits in front of the answer, as the harness has it: the answer's last token is not read."""
        room = self.max_length + 1 - len(answer)
        if not answer or room < 1:
            raise ConfigError(f"a continuation of {len(answer):,} tokens: there must be 1 to {self.max_length:,}")
        return context[-room:]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **given: Any) -> Tensor:
        """Token ids of the prompts [B, L], padded on the left, and of what is written behind them."""
        mask = given.get("attention_mask")
        self._check_lengths([context.shape[1]] if mask is None else mask.sum(1).tolist())
        with self._running(), self._sparse_prefill():
            return super()._model_generate(context, max_length, stop, **given)

    @contextlib.contextmanager
    def _sparse_prefill(self) -> Iterator[None]:
        """Inside, the first call of the model is its prefill."""
        model, dense = self.model, self.model.forward
        hooked = "forward" in vars(model)  # by accelerate
        calls = iter([self._prefill])

        @functools.wraps(dense)  # whose parameters `generate` reads
        def forward(*args: Any, **given: Any) -> Any:
            return next(calls, dense)(*args, **given)

        model.forward = forward
        try:
            yield
        finally:
            del model.forward
            if hooked:
                model.forward = dense

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        kind = self.mixed_precision_dtype
        mixed = torch.autocast(self.device.type, kind) if kind is not None else contextlib.nullcontext()
        with torch.no_grad(), mixed, dynamo_remembers():
            yield

    def _tensor(self, ids: Any) -> Tensor:
        return torch.tensor([list(ids)], device=self.device)

    def _check_lengths(self, lengths: list[int]) -> None:
        """Says so where no prompt is long enough for a token to be dropped: figures are dense attention's then."""
        config = self.tsa_config
        kept = never_dropped(config.window, config.min_tokens)
        if lengths and config.layers != () and max(lengths) <= kept:
            warnings.warn(
                f"{len(lengths)} prompts have at most {max(lengths):,} tokens, and {kept:,} are always kept (window + "
                "min_tokens): what is measured is dense attention. Choose longer prompts, or a smaller min_tokens",
                TSAWarning,
                stacklevel=2,
            )


def read_config(given: Mapping[str, Any], model: torch.nn.Module | None = None) -> TSAConfig:
    """The configuration that fields of `--model_args` ask for; the harness has read numbers, and "none" as None, already.

    Args:
        model: what a calibration must be of; None: it is not known yet.

    Raises:
        ConfigError, KernelError: a field is not understood or not allowed.
    """
    written = {name: "none" if value is None else str(value) for name, value in given.items()}
    config = TSAConfig.from_json(Path(written.pop("config"))) if "config" in written else TSAConfig()
    changes: dict[str, Any] = {"strict": True}
    # It is accuracy that is asked for, not time.
    changes |= {"min_length": 1} if config.min_length is None else {}
    budget = written.pop("budget", None)
    changes |= {} if budget is None else {"budget": texts.budget(budget)}
    changes |= {"compiler": written.pop("compiler")} if "compiler" in written else {}
    known: dict[str, Any] = {} if model is None else {"config": model.config, "name": type(model).__name__, "model": model}
    read = functools.partial(texts.layers_of, **known)
    for name, value in written.items():
        change = texts.field(name, value, read)
        if change is None:
            raise ConfigError(f"--model_args {name}={value} is not understood: write budget=keep:0.15, {texts.FIELDS}")
        changes |= change
    texts.check_one_budget(budget, changes.get("layers"))
    config = config.replace(**changes)
    registry.check(config.kernel, config.dense_kernel)
    return config


def _likelihood(scored: Tensor, answer: list[int]) -> tuple[float, bool]:
    """Of log-probabilities [1, A, V]: the answer's sum, and whether each of its tokens is the likeliest."""
    wanted = torch.tensor(answer, device=scored.device)
    return float(scored[0].gather(1, wanted[:, None]).sum()), bool((scored[0].argmax(-1) == wanted).all())


def main() -> None:
    """The harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
