"""Which steps of a program become TensorRT plugins, one Triton kernel as PTX each.

    score        five plugins at most (_trt_score.py)        window, stats, rows, mean, pool
    compress, attend, decompress                             one each (_trt_rows.py)

What a plugin may be is told in _trt_describe.py. The others stay in standard operators (kernels/forms.py):

- budget: the kernels of kernels/budget.py add to histograms by atomics, in memory that must be zero before, and a plugin is
  one kernel whose output TensorRT does not clear. With a keep ratio it is arithmetic on [B] anyway.
- select: by the same rules it could be five plugins (a histogram of 8 bits each, and the write), without atomics in
  global memory; but kernels/select.py keeps the histograms of all steps in one state that each launch reads and writes,
  and a plugin may not write to its inputs. It needs kernels with the state before and the state after apart.
- score with heads beyond MAX_HEAD_DIM, for which there is no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tsa_compile.export import _trt_score
from tsa_compile.export._trt_describe import Plugin, torch_op
from tsa_compile.export._trt_rows import attend_plugin, compress_plugin, decompress_plugin
from tsa_compile.kernels._aten import running_count
from tsa_compile.kernels.attend import attend_aten
from tsa_compile.kernels.score import MAX_HEAD_DIM, score_aten


class PluginForms:
    """The steps that become plugins, in place of their portable forms; `used` collects which ones a program needs."""

    def __init__(self) -> None:
        self.used: dict[str, Plugin] = {}

    def table(self) -> dict[Any, Callable[..., Any]]:
        """Decompositions for ExportedProgram.run_decompositions."""
        tsa = torch.ops.tsa
        return {
            tsa.score.default: self.score,
            tsa.compress.default: self.compress,
            tsa.attend.default: self.attend,
            tsa.decompress.default: self.decompress,
        }

    def score(self, query: Tensor, key: Tensor, padding: Tensor | None, scale: float, window: int, pool: int) -> Tensor:
        """`tsa::score` by plugins where there are kernels for the heads."""
        if query.shape[3] > MAX_HEAD_DIM:
            return score_aten(query, key, padding, scale, window, pool)
        made = _trt_score.score_plugins(
            query.shape[1], key.shape[1], query.shape[3], query.dtype, scale, window, pool, padding is not None
        )
        rank = None if padding is None else running_count(padding)
        return _trt_score.score(lambda name: self._op(made[name]), query, key, padding, rank, window)

    def compress(
        self, query: Tensor, key: Tensor, value: Tensor, indices: Tensor, count: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`tsa::compress` by a plugin."""
        heads, kv_heads, selections = (tensor.shape[1] for tensor in (query, key, indices))
        plugin = compress_plugin(heads, kv_heads, selections, query.shape[3], value.shape[3], query.dtype)
        return self._op(plugin)(query, key, value, indices, _counted(indices, count))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, scale: float, kernel: str) -> Tensor:
        """`tsa::attend` by a plugin where there are rows that do not count."""
        if count is None:
            return attend_aten(query, key, value, count, scale, kernel)
        heads, selections, dims = query.shape[1], key.shape[1], (query.shape[3], value.shape[3])
        return self._op(attend_plugin(heads, selections, *dims, query.dtype, scale))(query, key, value, count)

    def decompress(self, compressed: Tensor, indices: Tensor, count: Tensor | None, seq_len: int) -> Tensor:
        """`tsa::decompress` by a plugin."""
        _, heads, _, dim = compressed.shape
        plugin = decompress_plugin(heads, indices.shape[1], dim, compressed.dtype)
        positions = torch.arange(seq_len, dtype=torch.int32, device=compressed.device)
        return self._op(plugin)(compressed, indices, _counted(indices, count), positions).transpose(1, 2)

    def _op(self, plugin: Plugin) -> Any:
        self.used[plugin.name] = plugin
        return torch_op(plugin)


def _counted(indices: Tensor, count: Tensor | None) -> Tensor:
    """A plugin has no optional inputs: without a count every slot counts."""
    if count is not None:
        return count
    return torch.full(indices.shape[:1], indices.shape[2], dtype=torch.int32, device=indices.device)
