"""`prefill(model, config)`: a model whose prompts run compiled, and whose decode steps run as they did.

    model(ids [B, 8192])    the compiled model: attention is rewritten and reported
    model(ids [B, 1])       the model itself: nothing is traced, compiled or reported

`model.compile(backend="tsa")` compiles both, although decode steps gain nothing from this backend.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from inspect import getsource, isfunction, signature
from types import TracebackType
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from torch import Tensor
from torch.nn import Module

from tsa_compile.backend import tsa_backend
from tsa_compile.calibration.fingerprint import text_config
from tsa_compile.chunk_cache import carried, find, serves
from tsa_compile.config import TSAConfig, given
from tsa_compile.costs.breakeven import FEW_QUERIES
from tsa_compile.errors import ConfigError, TSAWarning, check_type
from tsa_compile.tracing import is_traced

_TOKENS = ("input_ids", "inputs_embeds")
_CACHED = ("keys", "values")
_MASK = "attention_mask"


class Prefill:
    """A model whose prefill is compiled, until `remove()`; as a context manager, until the block ends. A block inside the
    block of another one leaves the model as the outer one has it.

    Attributes:
        model: the module.
        config: what its prefill is compiled with.
    """

    def __init__(self, model: Module, config: TSAConfig, *, dynamic: bool | None, fullgraph: bool) -> None:
        self.model, self.config, self.dynamic = model, config, dynamic
        self._inside = [Prefill(part, config, dynamic=dynamic, fullgraph=fullgraph) for part in _run_by_generate(model)]
        self._is_entered = False
        earlier = model._compiled_call_impl
        self._around = earlier if isinstance(earlier, Prefill) and earlier._is_entered else None
        self._plain = model._call_impl
        options: dict[str, Any] = {"config": config}
        if dynamic and config.regional is None and isinstance(config.compiler, str):  # a callable is given whole graphs
            options["regional"] = True
        self._compiled = torch.compile(
            _with_own_code(model._call_impl), backend=tsa_backend, options=options, dynamic=dynamic, fullgraph=fullgraph
        )
        model._compiled_call_impl = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call; calls of fewer than 32 tokens are decode steps, and run as without `prefill`."""
        if is_traced():  # somebody else compiles or exports the model: with one compiler, theirs
            return self._plain(*args, **kwargs)
        tokens = _tokens(args, kwargs)
        if tokens.shape[1] < FEW_QUERIES:
            return self._plain(*args, **kwargs)
        kwargs = {**kwargs, **_mask_of_each_item(kwargs, tokens)}
        # Dynamo would leave out hooks of modules that are registered later; decode steps, which are not compiled, run them.
        if not self.dynamic:
            with dynamo_config.patch(skip_nnmodule_hook_guards=False):
                return self._compiled(*args, **kwargs)
        # Floats of modules, as the epsilon of a norm, are no lengths. As symbols they would be inputs of the graph, and
        # Inductor, which takes them for constants in the end, would send Dynamo back to trace everything once more.
        with dynamo_config.patch(skip_nnmodule_hook_guards=False, specialize_float=True), ExitStack() as stack:
            cache = None if torch.is_grad_enabled() or not serves(self.config) else find(args, kwargs)
            if cache is not None:
                kwargs = {**kwargs, **_mask_of_ones(self.model, args, kwargs, tokens, cache.get_seq_length())}
                stack.enter_context(carried(cache, self.model, tokens.device))
            own = [value if value is cache else _prepared(value) for value in args]
            given = {name: value if value is cache else _prepared(value) for name, value in kwargs.items()}
            result = self._compiled(*own, **given)
            _copy_back((*args, *kwargs.values()), (*own, *given.values()))
            return result

    def remove(self) -> None:
        """Makes the model what it was. Does nothing if it is that already, or if a later `prefill` took over."""
        self._is_entered = False
        if self.model._compiled_call_impl is self:
            self.model._compiled_call_impl = None
        for part in self._inside:
            part.remove()

    def __enter__(self) -> Prefill:
        if self.model._compiled_call_impl is not self:
            raise ConfigError(
                f"this prefill of a {type(self.model).__name__} was removed, or another replaced it: call prefill() again"
            )
        self._is_entered = True
        for part in self._inside:
            part.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        around = self._around if self._around is not None and self._around._is_entered else None
        if self.model._compiled_call_impl is self:
            self.model._compiled_call_impl = around
        for part in self._inside:
            part.__exit__(kind, error, trace)
        self.remove()

    def __repr__(self) -> str:
        return f"<prefill of {type(self.model).__name__} by {self.config}>"


def _with_own_code(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call as a function that has its code to itself.

    Dynamo keeps the graphs of a function with its code, and after eight of them runs it as it is. The code of a module's
    call is that of all modules, so that the ninth model or setting of a process would stay dense.
    """

    def prefilled(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    prefilled.__code__ = prefilled.__code__.replace()
    return prefilled


def prefill(
    model: Module, config: TSAConfig | None = None, *, dynamic: bool | None = None, fullgraph: bool = False
) -> Prefill:
    """Compiles the prefill of a model, in place: `model(...)` and `model.generate(...)` use it from now on.

    A call of 32 tokens or more is a prefill, or a chunk of one (`generate(prefill_chunk_size=...)`). Shorter calls are
    decode steps: the model runs them as before, so they are neither compiled nor reported. Where `model.generate` runs a
    model inside (PEFT, BLIP-2), that one's prefill is compiled as well. Copies of the model, and models that are loaded from
    a file, are not compiled.

    Args:
        model: a module whose calls hold token ids [B, L] as `input_ids`, or embeddings [B, L, D] as `inputs_embeds`, or have
            one of these as the first tensor.
        config: the options of the backend; the defaults if None.
        dynamic, fullgraph: as for `torch.compile`. With `dynamic=True` one graph serves all chunks of prompts of any length,
            in transformers' DynamicCache (chunk_cache.py), and layers that are alike are compiled once in it, unless
            `config.regional` is False or `config.compiler` a callable. Two graphs, one for the first chunk and one for all
            others, are taken where a cache is of a subclass, offloaded, or has layers that are no plain DynamicLayers, as
            those of sliding windows; where the model asks whether its cache is empty, to read the first chunk in another
            way; where `config` names a kernel that takes whole prompts alone, as `dense_kernel`; where the first chunk is
            shorter than what pays on a GPU; and where gradients are on.

    Returns:
        A handle. `handle.remove()` undoes it, and so does leaving `with prefill(model):`. A second `prefill` of the same
        model replaces the first.

    Raises:
        ConfigError: an argument is not allowed, or the model is compiled already. A later call of the model raises it as
            well if none of its tensors has a length, which tells a prompt from a decode step.
    """
    config = given(config, "prefill")
    check_type("dynamic", dynamic, (bool, type(None)), "True, False or None")
    check_type("fullgraph", fullgraph, bool, "True or False")
    _check(model)
    return Prefill(model, config, dynamic=dynamic, fullgraph=fullgraph)


def _run_by_generate(model: Module) -> list[Module]:
    """The models inside that `model.generate` runs in its place, as those of PEFT and BLIP-2 do.

    Encoders among them are said to stay as they are.
    """
    generate = getattr(type(model), "generate", None)
    source = getsource(generate) if isfunction(generate) else ""
    parts = [getattr(model, name, None) for name in dict.fromkeys(re.findall(r"\bself\.(\w+)\.generate\(", source))]
    found = []
    for part in parts:
        inner = (
            next((each for each in part.modules() if hasattr(type(each), "generate")), None)
            if isinstance(part, Module)
            else None
        )
        if inner is not None and _has_encoder(inner):
            warnings.warn(
                f"generate() of a {type(model).__name__} runs its {type(inner).__name__}, which has an encoder for the "
                "prompt, and stays as it is; calls of the model itself are compiled",
                TSAWarning,
                stacklevel=4,
            )
        elif inner is not None:
            found.append(inner)
    return found


def _has_encoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _check(model: Any) -> None:
    """Whether the prefill of a model can be compiled by itself."""
    if not isinstance(model, Module):
        raise ConfigError(
            f"a {type(model).__name__} is not allowed: prefill() takes a torch.nn.Module; for a function, use "
            'torch.compile(function, backend="tsa")'
        )
    compiled = hasattr(model, "_orig_mod") or hasattr(model.forward, "_torchdynamo_orig_callable")
    if compiled or not isinstance(model._compiled_call_impl, (Prefill, type(None))):
        raise ConfigError(
            f"the {type(model).__name__} is compiled already, by torch.compile or model.compile(): its decode steps would "
            "be compiled too. Pass the model as it was before"
        )
    if _has_encoder(model):
        raise ConfigError(
            f"a {type(model).__name__} is not allowed: prefill() is for models that read the prompt in the decoder, and "
            'this one has an encoder for it; compile it with torch.compile(model, backend="tsa")'
        )


def _prepared(value: Any) -> Any:
    """An argument so that one graph serves all chunks. Of a cache, which `carried` does not take: all but the first."""
    layers = getattr(value, "layers", None)
    for layer in layers if isinstance(layers, list) else ():  # of a transformers cache
        for name in _CACHED:
            cached = getattr(layer, name, None)
            if isinstance(cached, Tensor) and cached.dim() == 4:
                setattr(layer, name, _one_for_all_layers(cached))
    return _with_own_lengths(value) if isinstance(value, Tensor) else value


def _copy_back(values: Sequence[Any], prepared: Sequence[Any]) -> None:
    """What the model has written to its arguments, where it was given copies of them."""
    for value, own in zip(values, prepared, strict=True):
        if not isinstance(value, Tensor) or own.data_ptr() == value.data_ptr():
            continue
        # Tensors of the inference mode do not tell. Ids and masks, which are integers, are left alone there.
        written = own.is_floating_point() and 0 not in value.stride() if own.is_inference() else own._version > 0
        if written:
            value.copy_(own)


def _with_own_lengths(value: Tensor) -> Tensor:
    """The tensor, whose lengths Dynamo keeps apart from all that happen to be equal.

    The second chunk is as long as the cache before it. Dynamo would take both for one length, and the third for a new case:
    a graph more. So would it a mask [B, L] that is a piece of a longer one, until it is all of it: of one item, too, which
    counts as contiguous whatever the stride of its one row is.
    """
    if value.requires_grad:
        return value
    own = value.detach()  # what is marked is not the user's tensor
    if value.layout is torch.strided and (value.dim() == 2 or value.is_contiguous()):
        own = own.reshape(-1).view(value.shape)
    own = own.data  # a tensor of its own of that memory: of a view, Dynamo reads the sizes of what it is a view of as well
    torch._dynamo.maybe_mark_dynamic(own, [*range(own.dim())])
    return own


def _one_for_all_layers(cached: Tensor) -> Tensor:
    """Keys or values [B, G, L, D] of a cache, dense as those that later chunks leave are; G and D are no lengths.

    That L is the same in all layers Dynamo finds by itself, so that layers that are alike have one form.
    """
    cached = cached.contiguous()
    torch._dynamo.mark_static(cached, [1, 3])
    return cached


def _mask_of_each_item(kwargs: Mapping[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    """One mask [1, L] for several items as [B, L]: transformers reads a row of it for every item."""
    mask = kwargs.get(_MASK)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == 1 < tokens.shape[0]:
        return {_MASK: mask.expand(tokens.shape[0], -1)}
    return {}


def _mask_of_ones(
    model: Module, args: Sequence[Any], kwargs: Mapping[str, Any], tokens: Tensor, past: int
) -> dict[str, Tensor]:
    """The padding mask that a call without one stands for, where its absence would cost the first chunk its own graph.

    Without a padding mask, transformers asks whether there are as many keys as queries while it builds the causal mask for
    SDPA, and Dynamo compiles for the answer. With one it does not ask. In a trace a mask hides the future also in modules
    that say that they are not causal, so they get none. Nor does a model that reads the mask for more than attention:
    the loss of a router takes it for one of the call's tokens alone, and models with images compute positions from it.
    """
    parameters = list(signature(model.forward).parameters)
    config = getattr(model, "config", None)
    if _MASK not in parameters[len(args) :] or kwargs.get(_MASK) is not None:
        return {}
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return {}
    routed = {**dict(zip(parameters, args, strict=False)), **kwargs}.get("output_router_logits")
    if getattr(config, "output_router_logits", False) if routed is None else routed:
        return {}
    if text_config(model) is not config or not all(getattr(module, "is_causal", True) for module in model.modules()):
        return {}
    shape = (tokens.shape[0], past + tokens.shape[1])
    return {_MASK: torch.ones(shape, dtype=torch.long, device=tokens.device)}


def _tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The token ids [B, L] or embeddings [B, L, D] of a call, or else its first tensor of such a form."""
    named = (kwargs.get(name) for name in _TOKENS)
    for value in (*named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() in (2, 3):
            return value
    raise ConfigError(
        f"no tensor [B, L] or [B, L, D] found among the arguments of a call ({len(args)} by position, "
        f"{', '.join(kwargs) or 'none'} by name), so nothing says whether it is a prefill: pass {' or '.join(_TOKENS)}, "
        'or compile all calls with model.compile(backend="tsa")'
    )
