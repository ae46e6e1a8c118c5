"""Block-sparse kernels under a floor: the log-sum-exp over what they look at, and what each row sees, are the oracles'."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from tsa_compile.kernels import reference, reference_sparse, registry, sparse
from tsa_compile.kernels.fused import Options, padded_sparse_triton, sparse_triton
from tsa_compile.kernels.padded import valid_ranges
from tsa_compile.kernels.sparse.blocks import blocks_aten, blocks_triton
from tsa_compile.kernels.sparse.flashprefill import flashprefill_aten
from tsa_compile.kernels.sparse.flexprefill import flexprefill_aten
from tsa_compile.kernels.sparse.minference import a_shape_lists, minference_aten
from tsa_compile.kernels.sparse.vertical_slash import vertical_slash_aten, vertical_slash_triton
from tsa_compile.kernels.sparse.xattention import xattention_aten
from tsa_compile.kernels.tiles import Tiles

from ..support import close, counts_of, make_padding, poison_padding
from .support import log_sums, poisoned, query_and_key

# The interpreter computes with numpy, which warns of the logarithm of a window's sum over no token.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")

SCALE, BLOCK = 0.3, 16
ATTENTION = {
    "aten": (blocks_aten, vertical_slash_aten),
    "triton": tuple(functools.partial(f, tiles=Tiles(16, 16, 4, 2)) for f in (blocks_triton, vertical_slash_triton)),
}
NAMES = ("flashprefill", "xattention", "flexprefill", "minference", "a_shape")


class Method(NamedTuple):
    """A selector, the oracle of which keys each row sees under it, and settings with which it leaves some out."""

    selector: Callable[..., Any]
    oracle: Callable[..., torch.Tensor]
    options: dict[str, Any]


def of_blocks(oracle):
    def keys(query, key, scale, count, *, block, **options):
        return reference_sparse.keys_of(
            oracle(query, key, scale, count, block=block, **options), block, query.shape[2], count
        )

    return keys


def of_columns_and_diagonals(query, key, scale, count, *, vertical, slash, a_shape=False, **options):
    numbers = {"vertical": vertical, "slash": slash, "a_shape": a_shape}
    per_head = {name: [number] * query.shape[1] for name, number in numbers.items()}
    return reference_sparse.minference_mask(query, key, scale, count, **per_head, **options)


def of_a_shape(query, key, scale, count, *, sinks, window, block):
    options = dict(vertical=sinks, slash=window, a_shape=True, sinks=0, near=0, last=1, block=block)
    return of_columns_and_diagonals(query, key, scale, count, **options)


METHODS = {
    "flashprefill": Method(
        flashprefill_aten, of_blocks(reference_sparse.flashprefill), dict(alpha=0.6, sinks=0, window=1, last=0)
    ),
    "xattention": Method(xattention_aten, of_blocks(reference_sparse.xattention), dict(stride=8, mass=0.5)),
    "flexprefill": Method(
        flexprefill_aten, of_blocks(reference_sparse.flexprefill_mask), dict(gamma=0.6, tau=0.25, min_budget=16)
    ),
    "minference": Method(
        minference_aten, of_columns_and_diagonals, dict(vertical=9, slash=6, sinks=3, near=6, last=16)
    ),
    "a_shape": Method(a_shape_lists, of_a_shape, dict(sinks=7, window=20)),
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Registers methods, in blocks of BLOCK rows that ATen operators or Triton kernels compute, for the time of a test."""
    names = []

    def register(name, form):
        for attribute, function in zip(("block_sparse_attention", "vertical_slash_attention"), ATTENTION[form], strict=True):
            monkeypatch.setattr(sparse, attribute, functools.partial(function, block=BLOCK))
        names.append(f"small {name}")
        return sparse.block_sparse(names[-1], METHODS[name].selector, block=BLOCK, **METHODS[name].options)

    yield register
    for name in names:
        registry.unregister(name)


def operands(batch=3, heads=2, kv_heads=1, length=90, value_dim=24, device="cpu"):
    query, key = query_and_key(batch, heads, kv_heads, length, device=device)
    return query, key, torch.randn(batch, kv_heads, length, value_dim, device=device)


def seen_by(name, query, key, count, block=BLOCK):
    """What the method's oracle lets each row see, bool [B, H, C, C]; neither nothing but itself nor everything."""
    method = METHODS[name]
    seen = method.oracle(query, key, SCALE, count, block=block, **method.options)
    everything = torch.ones_like(seen[0, 0]).tril()
    assert 0.1 < seen[0].sum() / (len(seen[0]) * everything.sum()) < 0.9
    return seen


@pytest.mark.parametrize("form", ATTENTION)
@pytest.mark.parametrize("name", NAMES)
def test_log_sum_exp_over_what_each_row_saw(triton_device, small, name, form):
    counts = [60, 23, 0]
    inputs, count = operands(length=70, device=triton_device), counts_of(counts, triton_device)
    seen, wide = seen_by(name, *inputs[:2], count), [tensor.double() for tensor in inputs]
    wanted = reference.attention_under(seen, *wide, SCALE), reference_sparse.log_sum_exp(seen, *wide[:2], SCALE)
    kernel = small(name, form)
    out, lse = kernel.causal_lse(*poisoned(inputs, counts), SCALE, count)
    alone = kernel.causal(*poisoned(inputs, counts), SCALE, count)
    assert lse.dtype == torch.float32 and lse.shape == inputs[0].shape[:3] and lse.is_contiguous()
    for b, n in enumerate(counts):
        close(out[b, :, :n], wanted[0][b, :, :n])
        close(lse[b, :, :n], wanted[1][b, :, :n])
        assert torch.equal(out[b, :, :n], alone[b, :, :n])


def test_without_a_count_and_by_default_tiles(triton_device):
    """Both kernels, with a key head for each head."""
    query, key, value = operands(1, 1, 1, 140, device=triton_device)
    seen = torch.ones(1, 1, 140, 140, dtype=torch.bool, device=triton_device).tril()
    blocks = sparse.lists_of(torch.ones(1, 1, 2, 2, dtype=torch.bool, device=triton_device).tril())
    tiles = sparse.VerticalSlash(
        torch.tensor([[[0, 64, 128]]], dtype=torch.int32, device=triton_device),
        torch.empty(1, 1, 0, dtype=torch.int32, device=triton_device),
    )
    wanted = reference_sparse.log_sum_exp(seen, query, key, -SCALE)
    for launched, lists in ((blocks_triton, blocks), (vertical_slash_triton, tiles)):
        lse = log_sums(query)
        launched(query, key, value, -SCALE, *lists, lse=lse)
        close(lse, wanted)


def composed(name, inputs, padding, options, block):
    """Dense attention under the mask of the floor, with those of the selected tokens at which the method's oracle looks."""
    query, key, value = (tensor.cpu() for tensor in inputs)
    length, settings = query.shape[2], (options.coverage, options.keep_ratio, options.min_tokens)
    scores = reference.score(query, key, padding, SCALE, options.window, options.pool)
    scores = reference.group_scores(scores, key.shape[1]) if options.shared else scores
    count = reference.budget(scores, *settings)
    indices = reference.select(scores, count, length)
    rows = reference.compress(query, key, value, indices, count)
    seen = seen_by(name, *rows[:2], count, block)
    mask = reference_sparse.floor_mask(seen, indices, count, padding, length, options.floor_window, options.floor_sinks)
    wide = [tensor.double().nan_to_num() for tensor in (query, key, value)]
    return reference.attention_under(mask, *wide, SCALE)


RATIO = Options(SCALE, 4, 7, None, 0.6, 3, None, False, "", floor_window=6, floor_sinks=2)
COVERAGE = dataclasses.replace(RATIO, keep_ratio=None, coverage=0.2)


@pytest.mark.parametrize("name, padding", [*zip(NAMES, (None, "left", "holes", "left", None), strict=True)])
def test_launched_under_a_floor(triton_device, small, name, padding):
    """A count that the host knows, one on the device, and heads that share their selection."""
    inputs, mask = operands(2, 4, 2, 60, device=triton_device), make_padding(padding, 2, 60)
    options = {None: RATIO, "left": COVERAGE, "holes": dataclasses.replace(COVERAGE, shared=True)}[padding]
    options = dataclasses.replace(options, kernel=small(name, "triton").name)
    wanted = composed(name, inputs, mask, options, BLOCK)
    if mask is None:
        out = sparse_triton(*inputs, options)
    else:
        there = mask.to(triton_device)
        faulty = (poison_padding(tensor, there) for tensor in inputs)
        out = padded_sparse_triton(*faulty, there, valid_ranges(there), options)
    close(out.cpu(), wanted)


@pytest.mark.parametrize("options", [RATIO, COVERAGE], ids=["ratio", "coverage"])
@pytest.mark.parametrize("name", NAMES)
def test_op_under_a_floor(device, small, name, options):
    inputs, padding = operands(2, 4, 2, 80, device=device), make_padding("right", 2, 80)
    options = dataclasses.replace(options, kernel=small(name, "aten").name)
    there, scalars = padding.to(device), dataclasses.astuple(options)
    out = torch.ops.tsa.padded_sparse_attention(*inputs, there, valid_ranges(there), *scalars)
    close(out.cpu(), composed(name, inputs, padding, options, BLOCK))
    out = torch.ops.tsa.sparse_attention(*inputs, *scalars)
    close(out.cpu(), composed(name, inputs, None, options, BLOCK))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_of_short_inputs_they_see_all_that_was_selected(device, name, shared):
    inputs = operands(1, 4, 2, 200, device=device)
    settings = dict(coverage=None, keep_ratio=0.5, min_tokens=10, window=16, floor_window=30, floor_sinks=3)
    scalars = dataclasses.astuple(Options(scale=SCALE, pool=7, capacity=None, shared=shared, kernel=name, **settings))
    granularity = "group" if shared else "head"
    wide = [tensor.cpu().double() for tensor in inputs]
    wanted = reference.token_sparse_attention(*wide, scale=SCALE, granularity=granularity, **settings)
    close(torch.ops.tsa.sparse_attention(*inputs, *scalars).cpu(), wanted)
