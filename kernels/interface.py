"""What an attention kernel is, and what it is asked: plain data, which the kernels' own files and the registry share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
"""Of the heads that this package's Triton kernels take."""


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
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> KernelRequest:
        """The request that these [B, heads, rows, head_dim] tensors make."""
        capability = _capability(query.device) if query.is_cuda else None
        heads, kv_heads = query.shape[1], key.shape[1]
        return cls(query.device.type, query.dtype, query.shape[3], value.shape[3], heads, kv_heads, capability)


_capability = functools.cache(torch.cuda.get_device_capability)


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
    run_lse: as `run`, and returns the log-sum-exp of each row's scaled logits as well, natural, float32 [B, H, rows], over
        the keys that it looked at; None: the kernel does not give it, and is refused under a floor (floor.py).
    run_behind: `(query [B, H, R, D], key [B, Hk, C, D], value, scale) -> (out, lse)`, as run_lse, of queries that are the
        last R of C > R positions: query i sees keys up to i + C - R; None: the kernel takes equal lengths alone.
    stream_bytes: compressed rows of how many heads it is handed at a time, in bytes; None: fused.STREAM_BYTES. More suits a
        kernel of which a call has a cost of its own.
    """

    name: str
    run: Callable[..., Tensor]
    supports: Callable[[KernelRequest], str | None]
    priority: int
    device_count: bool = False
    round_rows: Callable[[int], int] = lambda rows: rows
    exact: bool = True
    stream_bytes: int | None = None
    run_lse: Callable[..., tuple[Tensor, Tensor]] | None = None
    run_behind: Callable[..., tuple[Tensor, Tensor]] | None = None

    def causal(self, query: Tensor, key: Tensor, value: Tensor, scale: float, count: Tensor | None = None) -> Tensor:
        """Causal attention; the count is handed on to a kernel that reads it, any other computes all rows."""
        return self.run(query, key, value, scale, *([count] if self.device_count else []))

    def causal_lse(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, count: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `causal`, with the log-sum-exp of each row."""
        assert self.run_lse is not None, f"{self.name} was chosen under a floor"
        return self.run_lse(query, key, value, scale, *([count] if self.device_count else []))
