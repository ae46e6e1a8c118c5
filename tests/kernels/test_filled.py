"""tsa::filled_attention and its sparse sister: queries into a cache of a fixed size, whose filled part the device knows."""

import pytest
import torch

from tsa_compile.kernels import filled as module
from tsa_compile.kernels import reference
from tsa_compile.kernels.filled import filled, filled_attention, filled_attention_aten
from tsa_compile.kernels.padded import valid_ranges

from .support import close, make_padding, qkv

KEYS, ROWS = 60, 18
POSITIONS = {
    "at first": torch.arange(ROWS),
    "behind a cache": torch.arange(22, 22 + ROWS),
    "at last": torch.arange(KEYS - ROWS, KEYS),
    "too far": torch.arange(50, 50 + ROWS),
    "before the first key": torch.arange(-5, ROWS - 5),
    "any": torch.tensor([3, 59, 0, -4, 100, *range(13)]),
    "backwards": torch.arange(40, 40 - ROWS, -1),
}
OPTIONS = (6, 7, None, 0.3, 4, None, False, "auto", 5, 2)


def operands(device="cpu"):
    query, key, value = qkv(3, 4, 2, KEYS, 32, device=device)
    return query[:, :, :ROWS], key, value


def expected(query, key, value, padding, positions, mean_rows):
    """Row by row: softmax over what the row sees, 0 or the mean of all where that is nothing."""
    query, key, value = (tensor.cpu().double() for tensor in (query, key, value))
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    for b in range(len(query)):
        for i, last in enumerate(positions.tolist()):
            seen = torch.arange(KEYS) <= last
            seen = seen if padding is None else seen & padding[b]
            for h in range(4):
                if seen.any():
                    out[b, h, i] = (0.2 * key[b, h // 2, seen] @ query[b, h, i]).softmax(0) @ value[b, h // 2, seen]
                elif mean_rows:
                    out[b, h, i] = value[b, h // 2].mean(0)
    return out


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("padding", [None, "left", "holes", "none valid"])
@pytest.mark.parametrize("mean_rows", [False, True])
def test_equals_its_definition(device, name, padding, mean_rows):
    tensors, mask = operands(device), make_padding(padding, 3, KEYS, device)
    at = POSITIONS[name].to(device)
    ranges = None if mask is None else valid_ranges(mask)
    wanted = expected(*tensors, None if mask is None else mask.cpu(), POSITIONS[name], mean_rows)
    for attention in (filled_attention, filled_attention_aten):
        out = attention(*tensors, mask, ranges, at, filled(at), 0.2, mean_rows)
        assert out.stride()[1:] == (32, 128, 1), "[B, L, H, D] in memory"
        close(out.cpu(), wanted)


def test_the_host_is_told_the_first_position_and_whether_the_others_follow(device):
    told = {name: filled(at.to(device)).tolist() for name, at in POSITIONS.items()}
    assert told["behind a cache"] == [22, 1] and told["before the first key"] == [-5, 1]
    assert told["any"] == [3, 0] and told["backwards"] == [40, 0]


@pytest.mark.parametrize("padding", [None, "left", "holes"])
@pytest.mark.parametrize("name", ["at first", "behind a cache", "at last"])
def test_a_sparse_layer_sees_the_filled_part(device, name, padding):
    query, key, value = operands(device)
    at, mask = POSITIONS[name], make_padding(padding, 3, KEYS)
    stop = int(at[-1]) + 1
    for tensor in (key, value):
        tensor[:, :, stop:] = torch.nan
    given = (None, None) if mask is None else (mask.to(device), valid_ranges(mask.to(device)))
    at = at.to(device)
    out = torch.ops.tsa.filled_sparse_attention(query, key, value, *given, at, filled(at), 0.2, *OPTIONS)
    used = (tensor[:, :, :stop].cpu().double() for tensor in (key, value))
    settings = dict(scale=0.2, window=6, pool=7, keep_ratio=0.3, min_tokens=4, floor_window=5, floor_sinks=2)
    seen = None if mask is None else mask[:, :stop]
    close(out.cpu(), reference.token_sparse_attention(query.cpu().double(), *used, seen, **settings))


def test_a_sparse_layer_with_other_positions_is_dense():
    tensors, at = operands(), POSITIONS["any"]
    out = torch.ops.tsa.filled_sparse_attention(*tensors, None, None, at, filled(at), 0.2, *OPTIONS)
    close(out, expected(*tensors, None, at, False))


def test_ranges_end_where_the_keys_do():
    ranges = torch.tensor([[3, 50, 1], [40, 60, 0], [0, 10, 1]])
    assert module.ranges_until(ranges, 40) == [(3, 40, 1), (0, 0, 1), (0, 10, 1)]


@pytest.mark.parametrize("padding", [None, "left"])
def test_opcheck(device, padding):
    at = POSITIONS["behind a cache"].to(device)
    mask = make_padding(padding, 3, KEYS, device)
    given = (mask, None if mask is None else valid_ranges(mask), at, filled(at), 0.2)
    torch.library.opcheck(filled, (at,))
    torch.library.opcheck(filled_attention, (*operands(device), *given, False))
    torch.library.opcheck(torch.ops.tsa.filled_sparse_attention.default, (*operands(device), *given, *OPTIONS))


@pytest.mark.parametrize("op, options", [("filled_attention", (0.2, False)), ("filled_sparse_attention", (0.2, *OPTIONS))])
def test_operands_that_do_not_fit_are_refused(device, op, options):
    (query, key, value), call = operands(device), getattr(torch.ops.tsa, op)
    at, mask = POSITIONS["behind a cache"].to(device), make_padding("left", 3, KEYS, device)
    with pytest.raises(ValueError, match=f"{KEYS - 1} keys and {KEYS} values"):
        call(query, key[:, :, 1:], value, None, None, at, filled(at), *options)
    with pytest.raises(ValueError, match=f"{ROWS - 1} positions for {ROWS} queries"):
        call(query, key, value, None, None, at[1:], filled(at[1:]), *options)
    with pytest.raises(ValueError, match="for 3 items"):
        call(query, key, value, mask[:1], valid_ranges(mask[:1]), at, filled(at), *options)
    with pytest.raises(ValueError, match="both or neither"):
        call(query, key, value, mask, None, at, filled(at), *options)
