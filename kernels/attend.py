"""Causal attention over the compressed rows, by whichever registered kernel fits best.

    out[b, h, i] = sum_{j <= i} softmax_j(scale * <query[b, h, i], key[b, g, j]>) value[b, g, j]     i < count[b]

    query [B, H, C, D], key [B, Hk, C, D], value [B, Hk, C, Dv], g = h // (H / Hk), count int32 [B] or None
    ->  out [B, H, C, Dv], contiguous

Compression keeps the tokens' order, so causality among rows is causality among tokens (arXiv 2602.03216, section 3) and
any causal kernel serves. Rows from `count` on are filler: unspecified in the output, and unable to reach a real row,
because attention is causal. A kernel whose key tile straddles `count` multiplies filler by a probability of exactly 0,
which a NaN would survive; compress therefore writes zeros behind `count`, and who calls attend on CUDA without compress
does the same for `compress.FILLER_ROWS` rows.

The work follows the count in one of three ways:

- count None: every row is real, one call.
- a count, and the host may look at it (nothing captures): one read of B integers, then one call for each different
  count, on `[:, :, :n]` views. This is the only synchronisation on the sparse path.
- a count while a CUDA graph is captured: a kernel with `device_count` reads it on the device, as "triton" does (see
  flash.py); without such a kernel all C rows are computed, which is correct and no cheaper than a count of C.

Adding a kernel takes one `register` call and nothing in this package changes:

    from tsa_compile.kernels.attend import AttentionKernel, KernelRequest, register

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

From then on `TSAConfig(kernel="flash3")` asks for it by name, and "auto" takes it where it fits and nothing of a higher
priority does.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.backends import cuda as cuda_backends
from torch.nn.attention import SDPBackend, sdpa_kernel

from tsa_compile.errors import KernelError
from tsa_compile.kernels import flash
from tsa_compile.kernels._aten import slots_below

AUTO = "auto"


@dataclass(frozen=True)
class KernelRequest:
    """What a kernel is asked to run: what may decide whether it can; no lengths, which vary from call to call."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    value_head_dim: int
    heads: int
    kv_heads: int
    capability: tuple[int, int] | None = None
    """CUDA compute capability, e.g. (9, 0) for Hopper; None off CUDA."""

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> "KernelRequest":
        """The request that these [B, heads, rows, head_dim] tensors make."""
        capability = _capability(query.device) if query.is_cuda else None
        heads, kv_heads = query.shape[1], key.shape[1]
        return cls(query.device.type, query.dtype, query.shape[3], value.shape[3], heads, kv_heads, capability)

    def with_kv_heads(self, kv_heads: int) -> "KernelRequest":
        """The same with another number of key and value heads."""
        return dataclasses.replace(self, kv_heads=kv_heads)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _exact_rows(rows: int) -> int:
    return rows


@dataclass(frozen=True)
class AttentionKernel:
    """A causal attention kernel and what is known about it.

    run: `(query, key, value, scale) -> out`, causal over all rows given, query head h reading key head h // (H / Hk).
        The inputs may be views of longer buffers (last stride 1). With `device_count` it is called with a fifth
        argument, `count` (int32 [B] on the device, or None), must not synchronise, and returns all C rows.
    supports: None if the request fits, else a sentence that says why not.
    priority: "auto" takes the fitting kernel of the highest; the built-in ones have 30, 20, 0 and -10.
    round_rows: the rows to hand over for a count that the host knows, at least as many; for kernels that are planned anew
        for every shape, or, with `device_count`, that read some numbers of rows faster.
    exact: False for a kernel that leaves attention out, as a block-sparse one does: it runs only where it is named.
    stream_bytes: compressed rows of how many heads it is handed at a time, in bytes; None: fused.STREAM_BYTES. More suits a
        kernel of which a call has a cost of its own.
    """

    name: str
    run: Callable[..., Tensor]
    supports: Callable[[KernelRequest], str | None]
    priority: int
    device_count: bool = False
    round_rows: Callable[[int], int] = _exact_rows
    exact: bool = True
    stream_bytes: int | None = None

    def causal(self, query: Tensor, key: Tensor, value: Tensor, scale: float, count: Tensor | None = None) -> Tensor:
        """Causal attention; the count is handed on to a kernel that reads it, any other computes all rows."""
        return self.run(query, key, value, scale, *([count] if self.device_count else []))


_registry: dict[str, AttentionKernel] = {}


def register(kernel: AttentionKernel) -> AttentionKernel:
    """Add a kernel under its name; KernelError if the name is taken or is "auto"."""
    if kernel.name == AUTO or kernel.name in _registry:
        taken = ", ".join((AUTO, *names()))
        raise KernelError(f"cannot register attention kernel {kernel.name!r}: the names {taken} are taken")
    _registry[kernel.name] = kernel
    choose.cache_clear()
    return kernel


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


def names() -> tuple[str, ...]:
    """The registered names, the one "auto" tries first in front."""
    return tuple(k.name for k in sorted(_registry.values(), key=lambda k: -k.priority))


@functools.lru_cache(maxsize=256)
def choose(request: KernelRequest, name: str = AUTO, *, device_count: bool = False) -> AttentionKernel:
    """The kernel to run for a request.

    With "auto" the fitting exact one of the highest priority; with `device_count`, one that reads the count on the device
    if any fits. With a name that kernel, or KernelError if it does not fit or does not exist.
    """
    if name != AUTO:
        kernel = get(name)
        reason = kernel.supports(request)
        if reason is not None:
            raise KernelError(f"attention kernel {name!r} cannot run {request}: {reason}")
        return kernel
    exact = [kernel for kernel in _registry.values() if kernel.exact]
    candidates = sorted(exact, key=lambda k: (device_count and k.device_count, k.priority), reverse=True)
    refusals = []
    for kernel in candidates:
        reason = kernel.supports(request)
        if reason is None:
            return kernel
        refusals.append(f"{kernel.name}: {reason}")
    raise KernelError(f"no attention kernel can run {request}: {'; '.join(refusals)}")


@torch.library.custom_op("tsa::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str) -> Tensor:
    """Causal attention over the first count rows of each item; ValueError where shapes do not fit."""
    _check(query, key, value, count)
    capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
    chosen = choose(KernelRequest.of(query, key, value), kernel, device_count=count is not None and capturing)
    if chosen.device_count:
        return chosen.run(query, key, value, scale, count).contiguous()
    if count is None or capturing:
        return chosen.run(query, key, value, scale).contiguous()
    capacity = query.shape[2]
    counts = [min(n, capacity) for n in count.tolist()]
    if len(set(counts)) == 1 and min(chosen.round_rows(counts[0]), capacity) == capacity == counts[0]:
        return chosen.run(query, key, value, scale).contiguous()
    return _attend_counts(chosen, query, key, value, counts, scale)


def _check(query: Tensor, key: Tensor, value: Tensor, count: Tensor | None) -> None:
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    if key.shape != (batch, kv_heads, rows, dim) or value.shape[:3] != key.shape[:3] or heads % kv_heads != 0:
        raise ValueError(
            f"tsa::attend: key {tuple(key.shape)} and value {tuple(value.shape)} do not fit query "
            f"{tuple(query.shape)}; expected [B,Hk,C,D] and [B,Hk,C,Dv] with the query's heads a multiple of Hk"
        )
    if count is not None and count.shape != (batch,):
        raise ValueError(f"tsa::attend: count {tuple(count.shape)}; expected {(batch,)}")


def attend_aten(query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str) -> Tensor:
    """The same in ATen ops, for any exact kernel: all C rows, whatever the count, then zeros behind it."""
    gqa = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
    if count is not None:
        out = torch.where(slots_below(count, query.shape[2])[..., None], out, 0.0)
    return out.contiguous()


def _attend_counts(
    kernel: AttentionKernel, query: Tensor, key: Tensor, value: Tensor, counts: list[int], scale: float
) -> Tensor:
    """One call for all items if their counts are equal, else one for each item."""
    shape = (*query.shape[:3], value.shape[3])
    # On CUDA filler is left unwritten: at 128K the zeros alone would cost as much as decompress.
    output = query.new_empty(shape) if query.is_cuda else query.new_zeros(shape)
    runs = [(slice(None), counts[0])] if len(set(counts)) == 1 else [(slice(b, b + 1), n) for b, n in enumerate(counts)]
    for items, n in runs:
        if n == 0:
            continue
        rows = min(kernel.round_rows(n), query.shape[2])
        result = kernel.run(query[items, :, :rows], key[items, :, :rows], value[items, :, :rows], scale)
        output[items, :, :n] = result[:, :, :n]
    return output


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, backends: tuple[SDPBackend, ...]) -> Tensor:
    """Causal SDPA by the first of `backends` that takes these very tensors."""
    gqa = query.shape[1] != key.shape[1]
    with sdpa_kernel(list(backends), set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal cuDNN attention: its operator itself where it surely fits, as `sdpa_kernel` costs the host 30 to 60 us."""
    if query.shape[2] < _CUDNN_ROWS or query.shape[1] != key.shape[1] or not query.is_cuda:
        return _sdpa(query, key, value, scale, _FROM_CUDNN)
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    return attention(query, key, value, None, False, 0.0, True, False, scale=scale)[0]


def _run_plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    if query.is_cuda and group > 1:
        # Of the kernels left on CUDA only the one that builds L x L shares key heads: repeating them costs less.
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)


@functools.lru_cache(maxsize=256)
def _refusal(backend: SDPBackend, request: KernelRequest) -> str | None:
    """Why torch's SDPA backend cannot take a request: torch is asked, as versions and devices differ."""
    if request.device_type != "cuda":
        return f"runs on CUDA devices only, not on {request.device_type}"
    ask = {
        SDPBackend.CUDNN_ATTENTION: cuda_backends.can_use_cudnn_attention,
        SDPBackend.FLASH_ATTENTION: cuda_backends.can_use_flash_attention,
    }[backend]
    # Compilers ask while they trace, under a fake mode in which nothing real could be allocated.
    with unset_fake_temporarily(), sdpa_kernel(backend):
        query, key, value = (
            torch.empty(1, heads, 256, size, dtype=request.dtype, device="cuda")
            for heads, size in (
                (request.heads, request.head_dim),
                (request.kv_heads, request.head_dim),
                (request.kv_heads, request.value_head_dim),
            )
        )
        gqa = request.heads != request.kv_heads
        fits = ask(cuda_backends.SDPAParams(query, key, value, None, 0.0, True, gqa))
    return None if fits else f"torch {torch.__version__} refuses it ({ask.__name__})"


def _plan_rows(rows: int) -> int:
    """At most 1/32 more rows, from a grid of few: cuDNN builds a plan of tens of milliseconds for every new shape."""
    step = max(256, (1 << (rows - 1).bit_length()) // 64)
    return -(-rows // step) * step


_CUDNN_ROWS = 128
"""Below, SDPA is asked which kernel takes the rows: cuDNN takes no single one."""

# Later entries are what single calls fall back to.
_FROM_FLASH = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_FROM_CUDNN = (SDPBackend.CUDNN_ATTENTION, *_FROM_FLASH)

register(
    AttentionKernel(
        "cudnn",
        run=_cudnn,
        supports=functools.partial(_refusal, SDPBackend.CUDNN_ATTENTION),
        priority=30,
        round_rows=_plan_rows,
    )
)
register(
    AttentionKernel(
        "flash",
        run=functools.partial(_sdpa, backends=_FROM_FLASH),
        supports=functools.partial(_refusal, SDPBackend.FLASH_ATTENTION),
        priority=20,
    )
)
register(AttentionKernel("sdpa", run=_run_plain, supports=lambda request: None, priority=0))
# Behind the others, which are faster where the host knows the count; what "auto" captures in a CUDA graph.
register(AttentionKernel("triton", run=flash.run, supports=flash.supports, priority=-10, device_count=True))
