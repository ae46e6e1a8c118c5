"""transformers' AttentionInterface and AttentionMaskInterface: the attention of a model that is not compiled.

    the model asks for a mask     causal, nothing else hidden  None
                                  causal and padding           bool [B, tokens so far], with its valid ranges
                                  causal, behind a cache       the same, with or without padding
                                  causal over a window         int32 [B, tokens so far] (calls.py), of a whole prompt
                                  anything else                [B, 1, Lq, Lk], as SDPA or eager attention has it
    a layer asks for attention    prefill, layer selected      tsa.sparse_attention, tsa.padded_sparse_attention
                                  prefill, layer dense         SDPA, tsa.cached_attention, tsa.padded_attention
                                  prefill, over a window       tsa.sliding_attention, tsa.padded_sliding_attention
                                  anything else                as the model wrote it: SDPA, or its own eager function

What a mask means is not inferred here but known: transformers says how it is made of causality, a window, chunks, padding.
Under `torch.compile` and `torch.export` all of it is SDPA, whose calls the compiler finds.
"""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tsa_compile import pipeline  # registers the ops
from tsa_compile.config import Coverage, TSAConfig
from tsa_compile.costs.breakeven import FEW_QUERIES
from tsa_compile.engines.calls import (
    MASK_KIND,
    VALID_RANGES,
    WINDOW,
    Call,
    as_written,
    asks_the_interface,
    computes_attention_alone,
    knows_flash_by_name,
    knows_sdpa_by_name,
    read,
    with_ranges,
)
from tsa_compile.engines.stacks import Seat, Seats
from tsa_compile.errors import ConfigError, RewriteError, TSAWarning
from tsa_compile.kernels.registry import TRITON, KernelRequest, of_window
from tsa_compile.passes.frame import running_modules
from tsa_compile.passes.masks.info import MaskKind
from tsa_compile.passes.plan import decide, kernel_obstacle
from tsa_compile.passes.ranks import group_of_module
from tsa_compile.passes.rewrite import keeping_all, options_of
from tsa_compile.reasons import NOT_UNDERSTOOD, Decision, Reason
from tsa_compile.report import CallRow, RewriteReport
from tsa_compile.tracing import is_traced

assert pipeline.OPS
tsa = torch.ops.tsa

_ORDINARY = (Reason.LAYER_NOT_SELECTED, Reason.NOT_CAUSAL)

_rows: weakref.WeakKeyDictionary[Module, tuple[CallRow, TSAConfig]] = weakref.WeakKeyDictionary()


def add(name: str, config: TSAConfig) -> None:
    """Registers an implementation under a name."""
    import transformers
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise ConfigError(
            f"attn_implementation={name!r} needs transformers 5.4 or newer, which says where the queries of a mask stand; "
            f'this is {transformers.__version__}: upgrade it, or compile the model with backend="tsa"'
        )
    implementation = Implementation(name, config)
    AttentionInterface.register(name, implementation.attention)
    AttentionMaskInterface.register(name, implementation.mask)


def report_of(model: Module) -> RewriteReport:
    """One row for each attention module that had a prefill, and has not been given another implementation since."""
    found = [_rows[module] for module in model.modules() if module in _rows and _has(module, _rows[module][0].form)]
    rows = (replace(row, index=index) for index, (row, _) in enumerate(found))
    return RewriteReport(rows=tuple(rows), config=found[-1][1].to_dict() if found else {})


def _has(module: Module, name: str) -> bool:
    """Whether a module asks for the implementation of this name; one that says nothing of it does."""
    return getattr(getattr(module, "config", None), "_attn_implementation", name) == name


class Implementation:
    """The attention function and the mask function of one registered name."""

    def __init__(self, name: str, config: TSAConfig) -> None:
        self.name, self.config = name, config
        self.seats = Seats(f'attn_implementation="{name}"', config)
        self._masks: weakref.WeakKeyDictionary[Module, str] = weakref.WeakKeyDictionary()

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: Any = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        **others: Any,
    ) -> Tensor | None:
        """The mask that all layers of one kind share. `attention_mask` is bool [B, tokens so far], if there is one.

        `allow_is_causal_skip` is transformers' word that nothing but causality, a window or chunks of `local_size` tokens,
        and padding hides anything.
        """
        from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

        tracing = is_traced()
        whole = "" if tracing else self._whole_masks()
        first = -1 if tracing or q_length == 1 else int(q_offset)  # a static cache has it on the device
        so_far = first + q_length
        prefill = first == 0 or (first > 0 and q_length >= FEW_QUERIES)
        ours = prefill and allow_is_causal_skip and not whole
        if ours and not kv_offset and so_far <= kv_length and (local_size is None or so_far <= local_size):
            return _padding(attention_mask, batch_size, so_far, q_length == kv_length, others.get("device"))
        ends = kv_offset + kv_length == so_far  # the last key is the last query's own
        if ours and ends and local_size is not None and _is_window(mask_function, local_size, first, q_length):
            # `generate` makes masks for a static cache, and the model hands them over once more: one of as many columns as
            # there are keys is cut already.
            cut = attention_mask is not None and attention_mask.shape[1] == kv_length
            seen = attention_mask if attention_mask is None or cut else attention_mask[:, kv_offset:]
            return _windowed(_padding(seen, batch_size, kv_length, False, others.get("device")), local_size)
        mask = (eager_mask if whole == "eager" else sdpa_mask)(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=causal_mask_function if mask_function is None else mask_function, attention_mask=attention_mask,
            local_size=local_size, allow_is_causal_skip=allow_is_causal_skip and not whole, **others,
        )  # fmt: skip
        if mask is None or tracing:
            return mask
        if whole:
            setattr(mask, MASK_KIND, MaskKind.OPAQUE)
        elif allow_is_causal_skip and local_size is not None:
            setattr(mask, MASK_KIND, MaskKind.SLIDING_WINDOW)
        elif others.get("allow_is_bidirectional_skip") and local_size is None:  # nothing but padding hides anything
            setattr(mask, MASK_KIND, MaskKind.PADDING)
        return mask

    def _whole_masks(self) -> str:
        """Whose masks the running model gets, whole: "sdpa" or "eager"; "" if ours tell it what it needs.

        A model may do something else with masks where the implementation's name is not "sdpa", such as cut them (Gemma 4).
        One that transformers gives no SDPA may add to its masks (DeepSeek V4), or rely on them for causality, unless it can
        have FlashAttention, which knows no such masks (gpt-oss).

        Raises:
            ConfigError: the running model, or a module in it, does not ask the interface for its attention. It would take
                our masks for other ones.
        """
        from transformers import PreTrainedModel

        model = next((module for module in running_modules() if isinstance(module, PreTrainedModel)), None)
        if model is None:
            return ""
        if model in self._masks:
            return self._masks[model]
        kinds = dict.fromkeys(map(type, _of_its_own(model)))
        alone = [kind.__name__ for kind in kinds if computes_attention_alone(kind)]
        if alone or not (any(map(asks_the_interface, kinds)) or model._can_set_attn_implementation()):
            named = f" ({', '.join(alone)})" if alone else ""
            raise ConfigError(
                f'attn_implementation="{self.name}" is not possible for {type(model).__name__}, whose attention{named} does '
                'not come from transformers\' AttentionInterface. Compile it: torch.compile(model, backend="tsa")'
            )
        by_name = any(map(knows_sdpa_by_name, (type(model), *kinds)))
        flash = model._supports_flash_attn and not any(map(knows_flash_by_name, (type(model), *kinds)))
        unknown = not (model._supports_sdpa or flash)
        return self._masks.setdefault(model, "eager" if unknown else "sdpa" if by_name else "")

    def attention(
        self,
        module: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Query [B,H,Lq,D] over key and value [B,G,Lk,D] gives [B,Lq,H,Dv], and the weights where they are asked for."""
        traced = is_traced()
        if traced:
            _say_that_it_is_compiled(self.name, query.shape[2] == 1)
            _check_sdpa(self.name, _without_sdpa(type(module).__module__))
        call = read(module, query, key, value, attention_mask, dropout, scaling, is_causal, others)
        if query.shape[2] == 1 or traced:
            return as_written(call)
        _check_keys(key, attention_mask)
        seat = self.seats.of(module)
        config = self.config.of_layer(seat.place.number, seat.place.names)
        obstacle = call.obstacle()
        if obstacle is not None:
            decision, reason, detail, kernel = Decision.UNCHANGED, *obstacle, ""
            operands = (call.query, call.key, call.value)
            if reason is Reason.SLIDING_WINDOW and call.window is not None and kernel_obstacle(*operands) is None:
                decision, kernel = Decision.WINDOW, of_window(KernelRequest.of(*operands))
        else:
            decision, reason, detail, kernel = decide(
                (call.query, call.key, call.value), config, seat.unselected, seat.place.doubt, seat.stack.share,
                padded=call.padding is not None, behind=call.is_behind,
                sinks=call.sink_logits is not None,
            )  # fmt: skip
        budget = pipeline.own_budget(config) if decision is Decision.SPARSE else None
        self._note(call, seat, decision, reason, detail, kernel, budget)
        return self._run(call, decision, kernel, config)

    def _note(
        self, call: Call, seat: Seat, decision: Decision, reason: Reason, detail: str, kernel: str, budget: Any
    ) -> None:
        """For the report, and for whoever asked for something that did not happen."""
        place = seat.place
        query, key, value = (tuple(tensor.shape) for tensor in (call.query, call.key, call.value))
        row = CallRow(
            index=0, layer=place.names[0], layer_index=place.number, query=query, key=key, value=value,
            dtype=str(call.query.dtype).removeprefix("torch."), form=self.name, mask=str(call.kind), decision=decision,
            reason=reason, kernel=kernel, detail=detail, budget=budget,
            window=call.window if decision is Decision.WINDOW else None,
        )  # fmt: skip
        assisted = call.is_chunk and query[2] < FEW_QUERIES  # a step of assisted decoding is no prefill
        if not assisted or call.module not in _rows:
            _rows[call.module] = (row, self.config)
        asked = self.config.layers != () and (seat.unselected is None or seat.unselected is Reason.LAYER_COUNT_UNKNOWN)
        missed = asked and reason is not Reason.SPARSE and reason not in _ORDINARY
        if self.config.strict and asked and reason in NOT_UNDERSTOOD:
            raise RewriteError(
                f"not sparse although asked for, because not understood: {place.names[0]}: {reason} ({detail}) (strict=True)"
            )
        if reason is Reason.NOT_SELF_ATTENTION:  # of a prompt's part it is said, not of a decode step's few rows
            missed = missed and call.is_chunk and query[2] >= FEW_QUERIES
        seat.stack.note(place, reason, detail, missed)

    def _group(self, call: Call, config: TSAConfig) -> str | None:
        """The process group that has the other heads of a layer, if `Coverage` must ask it for its scores.

        Raises:
            ConfigError: the heads are split, and nothing says over which processes.
        """
        budget, module = config.budget, call.module
        if not isinstance(budget, Coverage) or not budget.tau or not _is_distributed():
            return None
        group = group_of_module(module)
        heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
        if group is None and isinstance(heads, int) and call.query.shape[1] < heads:
            raise ConfigError(
                f"budget={budget!r} is not possible in a {type(module).__name__} that has {call.query.shape[1]} of {heads} "
                "heads: Coverage keeps what matters in the mean over all heads, and no parameter of the module says over "
                "which processes they are split. Choose budget=KeepRatio(...), which each head follows by itself, or "
                "layers=[] for none"
            )
        return group

    def _run(self, call: Call, decision: Decision, kernel: str, config: TSAConfig) -> tuple[Tensor, Tensor | None]:
        operands, sink = (call.query, call.key, call.value), call.sink_logits
        if decision is Decision.SPARSE:
            return _sparse(call, config, self._group(call, config)), None
        if decision is Decision.KERNEL and call.padding is not None:
            return _sparse(call, keeping_all(config, kernel)), None
        if decision is Decision.KERNEL:
            return _rows_first(tsa.attend(*operands, None, call.scale, kernel, sink)), None
        if decision is Decision.WINDOW and call.padding is None:
            return _rows_first(tsa.sliding_attention(*operands, call.scale, call.window, sink)), None
        if decision is Decision.WINDOW:
            masked = (*operands, call.padding, _valid_ranges(call.padding))
            return _rows_first(tsa.padded_sliding_attention(*masked, call.scale, call.window, False, sink)), None
        if decision is Decision.DENSE_PADDED:
            padding = call.padding
            out = tsa.padded_attention(*operands, padding, _valid_ranges(padding), call.scale, False, sink)
            return _rows_first(out), None
        if call.is_behind and decision is Decision.DENSE:
            return _rows_first(tsa.cached_attention(*operands, call.scale, sink)), None
        if decision is Decision.DENSE and (kernel == TRITON or sink is not None):  # SDPA has no fast one, or none
            return _rows_first(tsa.attend(*operands, None, call.scale, kernel, sink)), None
        return as_written(call)


def _of_its_own(model: Module) -> Iterator[Module]:
    """The modules that get the masks that a model asks for: not those of a model within it, as a tower for images."""
    from transformers import PreTrainedModel

    for child in model.children():
        if not isinstance(child, PreTrainedModel):
            yield child
            yield from _of_its_own(child)


def _check_keys(key: Tensor, mask: Tensor | None) -> None:
    """Raises ConfigError where a mask [B, tokens so far] speaks of more tokens than there are keys [B, G, Lk, D]."""
    if mask is not None and mask.dim() == 2 and mask.shape[1] > key.shape[2]:
        raise ConfigError(
            f"an attention_mask of {mask.shape[1]} tokens for {key.shape[2]} keys: the cache of this layer holds less, as "
            "after an error in the middle of a prompt. Begin the prompt with a new cache"
        )


@torch.compiler.assume_constant_result
def _without_sdpa(home: str) -> str:
    """The name of a model in a file whose models transformers gives no SDPA. Which one runs is not known in a trace."""
    from transformers import PreTrainedModel

    classes = (each for each in vars(sys.modules[home]).values() if isinstance(each, type) and each.__module__ == home)
    models: list[type[PreTrainedModel]] = [each for each in classes if issubclass(each, PreTrainedModel)]
    return "" if any(model._supports_sdpa for model in models) or not models else models[0].__name__


def _check_sdpa(name: str, without: str) -> None:
    if without:
        raise ConfigError(
            f'attn_implementation="{name}" is SDPA in a compiled or exported model, and {without} has none: load the model '
            'with attn_implementation="eager", and compile it with backend="tsa"'
        )


@torch.compiler.assume_constant_result
def _say_that_it_is_compiled(name: str, decoding: bool) -> None:
    """Called while a model is traced."""
    if not decoding:
        warnings.warn(
            f'attn_implementation="{name}" is SDPA in a compiled or exported model: backend="tsa" makes it sparse, other '
            "backends leave it dense",
            TSAWarning,
            stacklevel=2,
        )


def _padding(attention_mask: Tensor | None, batch: int, so_far: int, plain: bool, device: Any) -> Tensor | None:
    """The valid ones of the tokens so far, bool [B, so_far], with their ranges. The host waits once, if there is a mask.

    Where all are valid: None if the mask is `plain`, which says enough; else what says that it is causal, and of how many.
    """
    if attention_mask is None and plain:
        return None
    if attention_mask is None:
        padding = torch.ones(1, 1, dtype=torch.bool, device=device).expand(batch, so_far)
        setattr(padding, MASK_KIND, MaskKind.CAUSAL)
        return padding
    if attention_mask.shape[0] not in (1, batch):
        raise ConfigError(f"an attention_mask of {attention_mask.shape[0]} items does not fit a batch of {batch}")
    padding = attention_mask[:, :so_far].to(torch.bool, copy=True)  # whatever is written to the model's own later
    padding = padding.expand(batch, -1)
    padding = torch.nn.functional.pad(padding, (0, so_far - padding.shape[1]))
    ranges = tsa.valid_ranges(padding)
    whole = all(row == [0, so_far, 1] for row in ranges.tolist())
    if whole and plain:
        return None
    setattr(padding, VALID_RANGES, ranges)
    setattr(padding, MASK_KIND, MaskKind.CAUSAL if whole else MaskKind.CAUSAL_PADDING)
    return padding


def _is_window(mask_function: Callable[..., Any] | None, size: int, first: int, length: int) -> bool:
    """Whether a mask that hides by position alone hides what is before the last `size` tokens, and not by chunks.

    It is asked where the two differ: at the edges of the window of every query, of `length` ones from position `first` on.
    """
    if mask_function is None:
        return False
    query, nothing, stop = torch.arange(first, first + length), torch.zeros((), dtype=torch.int64), first + length
    for distance in (-1, 0, size - 1, size):
        key = query - distance
        inside = (key >= 0) & (key < stop)
        seen = torch.as_tensor(mask_function(nothing, nothing, query, key.clamp(0, stop - 1))).expand(length)
        if not bool((seen[inside] == (0 <= distance < size)).all()):
            return False
    return True


def _windowed(padding: Tensor | None, window: int) -> Tensor:
    """A mask [B, tokens so far] as `calls.py` describes it, out of a padding mask with its attributes."""
    assert padding is not None
    mask = padding.to(torch.int32) * -window
    setattr(mask, WINDOW, window)
    setattr(mask, MASK_KIND, getattr(padding, MASK_KIND))
    return with_ranges(mask, padding)


def _valid_ranges(padding: Tensor | None) -> Tensor:
    assert padding is not None
    ranges = getattr(padding, VALID_RANGES, None)
    return tsa.valid_ranges(padding) if ranges is None else ranges


def _sparse(call: Call, config: TSAConfig, group: str | None = None) -> Tensor:
    operands, options = (call.query, call.key, call.value), options_of(config, call.scale, group)
    if call.padding is None:
        return _rows_first(tsa.sparse_attention(*operands, *options, sink_logits=call.sink_logits))
    masked = (*operands, call.padding, _valid_ranges(call.padding))
    return _rows_first(tsa.padded_sparse_attention(*masked, *options, sink_logits=call.sink_logits))


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _rows_first(output: Tensor) -> Tensor:
    """[B, H, L, Dv] as [B, L, H, Dv]; no copy, as the ops write it so."""
    return output.transpose(1, 2).contiguous()
