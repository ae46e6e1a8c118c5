"""The attention kernels by name, and which of them runs.

Adding a kernel takes one `register` call and nothing in this package changes:

    from tsa_compile.kernels.registry import AttentionKernel, KernelRequest, register

    def supports(request: KernelRequest) -> str | None:
        if request.device_type != "cuda":
            return "runs on CUDA devices only"
        if request.head_dim != request.value_head_dim:
            return "needs value heads of the same size as query heads"
        return None

    def run(query, key, value, scale):  # causal over all rows given; key and value may have fewer heads than query
        rows = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return flash_attn_func(*rows, softmax_scale=scale, causal=True).transpose(1, 2)

    register(AttentionKernel("flash3", run, supports, priority=50))

From then on `TSAConfig(kernel="flash3")` names it, and "auto" takes it where it fits and no kernel of a higher priority
does.
"""

from __future__ import annotations

import functools
import warnings

from tsa_compile.errors import KernelError, TSAWarning
from tsa_compile.kernels import flash, sdpa
from tsa_compile.kernels.interface import AttentionKernel, KernelRequest

__all__ = ["AUTO", "AttentionKernel", "KernelRequest", "choose", "get", "names", "register", "unregister"]

AUTO = "auto"
TRITON = flash.KERNEL.name
_PACKAGE = __name__.partition(".")[0]

_registry: dict[str, AttentionKernel] = {}


def register(kernel: AttentionKernel) -> AttentionKernel:
    """Add a kernel under its name; KernelError if it is no AttentionKernel, or if the name is taken or is "auto".

    KernelError too if a field is not what `AttentionKernel` says: "auto" asks all kernels, so that one would disturb all.

    The same function once more, as from a notebook's cell that is run again, replaces the kernel, with a TSAWarning.
    """
    if not isinstance(kernel, AttentionKernel):
        raise KernelError(
            f"a {type(kernel).__name__} is no kernel: register(AttentionKernel(name, run, supports, priority=...))"
        )
    _check_fields(kernel)
    if kernel.name in _registry and _same_function(kernel, _registry[kernel.name]):
        said = f"attention kernel {kernel.name!r} was registered before by the same function: the new one replaces it"
        warnings.warn(said, TSAWarning, stacklevel=2)
    elif kernel.name == AUTO or kernel.name in _registry:
        taken = ", ".join((AUTO, *names()))
        raise KernelError(f"cannot register attention kernel {kernel.name!r}: the names {taken} are taken: choose another")
    _registry[kernel.name] = kernel
    choose.cache_clear()
    return kernel


def _check_fields(kernel: AttentionKernel) -> None:
    number = isinstance(kernel.priority, (int, float)) and not isinstance(kernel.priority, bool)
    wrong = {"name": not isinstance(kernel.name, str) or not kernel.name, "priority": not number}
    wrong |= {field: not callable(getattr(kernel, field)) for field in ("run", "supports", "round_rows")}
    optional = {field: getattr(kernel, field) for field in ("run_lse", "run_behind")}
    wrong |= {field: value is not None and not callable(value) for field, value in optional.items()}
    for field in (field for field, is_wrong in wrong.items() if is_wrong):
        expected = {"name": "a text", "priority": "a number"}.get(field, "a function")
        raise KernelError(
            f"cannot register attention kernel {kernel.name!r}: {field}={getattr(kernel, field)!r}; expected {expected}"
        )


def _same_function(kernel: AttentionKernel, before: AttentionKernel) -> bool:
    """Whether two kernels were defined at the same place outside of this package, which replaces none of its own."""
    places = [(getattr(each.run, "__module__", None), getattr(each.run, "__qualname__", None)) for each in (kernel, before)]
    own = f"{places[0][0]}.".startswith(f"{_PACKAGE}.")
    return not own and places[0] == places[1] and None not in places[0]


def unregister(name: str) -> None:
    """Remove a kernel; KernelError if there is none of that name."""
    get(name)
    del _registry[name]
    choose.cache_clear()


def get(name: str) -> AttentionKernel:
    """The kernel of that name; KernelError if there is none."""
    if name not in _registry:
        raise KernelError(f"unknown attention kernel {name!r}; registered: {', '.join(names())} (or {AUTO!r})")
    return _registry[name]


def check(*names: str | None) -> None:
    """KernelError if one of the names that a configuration may give is no kernel's."""
    for name in names:
        if name not in (AUTO, None):
            get(str(name))


def names() -> tuple[str, ...]:
    """The registered names, the one "auto" tries first in front."""
    return tuple(k.name for k in sorted(_registry.values(), key=lambda k: -k.priority))


@functools.lru_cache(maxsize=256)
def choose(
    request: KernelRequest | None, name: str = AUTO, *, device_count: bool = False, lse: bool = False, behind: bool = False
) -> AttentionKernel:
    """The kernel to run for a request.

    With "auto" the fitting exact one of the highest priority; with `device_count`, one that reads the count on the device
    if any fits. With `lse` one that gives the log-sum-exp, with `behind` one that takes queries behind a cache. With a
    name that kernel, or KernelError if it does not fit or does not exist; the request is None where the device that is
    meant is not here to be asked.
    """
    if name != AUTO:
        kernel = get(name)
        reason = _refusal(kernel, request, lse, behind)
        if reason is not None:
            raise KernelError(f"attention kernel {name!r} cannot run {request or 'a call'}: {reason}")
        return kernel
    exact = [kernel for kernel in _registry.values() if kernel.exact]
    candidates = sorted(exact, key=lambda k: (device_count and k.device_count, k.priority), reverse=True)
    refusals = []
    for kernel in candidates:
        reason = _refusal(kernel, request, lse, behind)
        if reason is None:
            return kernel
        refusals.append(f"{kernel.name}: {reason}")
    raise KernelError(f"no attention kernel can run {request}: {'; '.join(refusals)}")


def of_dense(request: KernelRequest) -> str:
    """The kernel that dense attention runs by, whatever else is registered: torch's, and where that is slow ours."""
    fast = (kernel.name for kernel in (sdpa.CUDNN, sdpa.FLASH) if kernel.supports(request) is None)
    return next(fast, sdpa.SDPA.name if sdpa.SDPA.supports(request) is None else TRITON)


def of_window(request: KernelRequest) -> str:
    """The kernel that runs a sliding window (sliding.py)."""
    return TRITON if flash.supports(request) is None else sdpa.SDPA.name


def _refusal(kernel: AttentionKernel, request: KernelRequest | None, lse: bool, behind: bool) -> str | None:
    if behind and kernel.run_behind is None:
        return "it takes as many queries as keys alone: register it with run_behind, or prefill the whole prompt at once"
    if lse and kernel.run_lse is None:
        return "it gives no log-sum-exp, which a floor and sinks are merged by: register it with run_lse, or set floor=None"
    return None if request is None else _asked(kernel, request)


def _asked(kernel: AttentionKernel, request: KernelRequest) -> str | None:
    """What a kernel's `supports` says; where it fails the kernel does not fit, which is said: "auto" takes another."""
    try:
        said: object = kernel.supports(request)
    except Exception as error:  # noqa: BLE001 whatever a user's function raises
        problem = f"supports() raised {type(error).__name__}: {error}"
    else:
        if said is None or isinstance(said, str):
            return said
        problem = f"supports() returned {said!r}; expected None where the request fits, else a sentence that says why not"
    warnings.warn(f"attention kernel {kernel.name!r} is left out: {problem}", TSAWarning, stacklevel=2)
    return problem


for _kernel in (sdpa.CUDNN, sdpa.FLASH, sdpa.SDPA, flash.KERNEL):
    register(_kernel)
