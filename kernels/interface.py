"""What an attention kernel is, and what it is asked: plain data, which the kernels' own files and the registry share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from tsa_compile.errors import KernelError

MAX_HEAD_DIM = 512
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
        # int: a size that is symbolic by type alone, as Dynamo leaves one that a guard has fixed, cannot be hashed
        width, value_width = int(query.shape[3]), int(value.shape[3])
        heads, kv_heads = int(query.shape[1]), int(key.shape[1])
        return cls(query.device.type, query.dtype, width, value_width, heads, kv_heads, capability)


_capability = functools.cache(torch.cuda.get_device_capability)


@dataclass(frozen=True)
class AttentionKernel:
    """A causal attention kernel and what is known about it.

    run: `(query, key, value, scale) -> out`, causal over all rows given, query head h reading key head h // (H / Hk).
        The inputs may be views of longer buffers (last stride 1). With `device_count` it is called with a fifth
        argument, `count` (int32 [B] on the device, or None), must not synchronise, and returns all C rows. It must not write
        to its inputs, which may be the model's own tensors, and out is [B, H, rows, Dv] of the query's dtype.
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
        """Causal attention; the count is handed on to a kernel that reads it, any other computes all rows.

        Raises:
            KernelError: here and below, what the kernel returned is not what it promises.
        """
        out = self.run(query, key, value, scale, *([count] if self.device_count else []))
        if not self._fits(out, query, value):
            self._refuse(out, query, value)
        return out

    def causal_lse(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, count: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `causal`, with the log-sum-exp of each row."""
        assert self.run_lse is not None, f"{self.name} was chosen under a floor"
        found = self.run_lse(query, key, value, scale, *([count] if self.device_count else []))
        return self._with_lse(found, query, value)

    def causal_behind(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """As `causal_lse`, of queries that are the last of more keys' positions."""
        assert self.run_behind is not None, f"{self.name} was chosen for queries behind a cache"
        return self._with_lse(self.run_behind(query, key, value, scale), query, value)

    def _with_lse(self, found: Any, query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        match found:
            case tuple((out, Tensor(dtype=torch.float32) as lse)) if lse.shape == query.shape[:3]:
                if self._fits(out, query, value):
                    return out, lse
        self._refuse(found, query, value, lse=True)

    def _fits(self, out: Any, query: Tensor, value: Tensor) -> bool:
        """Whether an output is [B, H, rows, Dv] of the query's dtype, where the query is."""
        if not isinstance(out, Tensor) or out.dtype != query.dtype or out.device != query.device:
            return False
        return out.shape[:3] == query.shape[:3] and out.dim() == 4 and out.shape[3] == value.shape[3]

    def _refuse(self, found: Any, query: Tensor, value: Tensor, lse: bool = False) -> NoReturn:
        several = found if isinstance(found, tuple) else (found,)
        said = [_described(each) if isinstance(each, Tensor) else f"a {type(each).__name__}" for each in several]
        expected = f"{query.dtype} {[*query.shape[:3], value.shape[3]]} on {query.device}"
        if lse:
            expected = f"a pair of {expected} and the log-sum-exp, torch.float32 {[*query.shape[:3]]}"
        raise KernelError(f"attention kernel {self.name!r} returned {' and '.join(said)}; expected {expected}")


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {[*tensor.shape]} on {tensor.device}"
