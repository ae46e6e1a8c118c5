"""Whoever reads an attention call's output finds it laid out as the model's own call would leave it."""

import pytest
import torch

from tsa_compile import Coverage, TSAConfig

from .support import Attention, difference, heads

pytestmark = pytest.mark.usefixtures("fresh")
ATOL = 1e-5


def kept_whole(model, layers):
    """Compiled with a budget that keeps all tokens, so that the values are the model's too."""
    config = TSAConfig(budget=Coverage(0), floor=None, layers=layers, window=4, min_tokens=4, compiler="eager")
    return torch.compile(model, backend="tsa", options={"config": config})


@pytest.mark.parametrize("rows_first", [True, False], ids=["BLHD", "BHLD"])
@pytest.mark.parametrize(
    "finish",
    [
        lambda out: out,
        lambda out: out.transpose(1, 2),
        lambda out: out.transpose(1, 2).reshape(*out.shape[0:1], out.shape[2], -1),
        lambda out: out.as_strided((2, 3), (7, 5)),
        lambda out: (out, out.flatten(2)),
        lambda out: out * out.stride(1),
        lambda out: out[:, :2, 1:],
        lambda out: out.contiguous().view(2, -1),
        lambda out: out.reshape(2, -1, 40, 16),
        lambda out: torch.relu(out.double() + 1),
        lambda out: out.unbind(1)[1],
        lambda out: torch.empty_like(out).fill_(1),
    ],
    ids=[
        "output",
        "transpose",
        "reshape",
        "as_strided",
        "two outputs",
        "stride()",
        "slice",
        "contiguous-view",
        "reshape to itself",
        "pointwise",
        "unbind",
        "empty_like",
    ],
)
@pytest.mark.parametrize("layers", [[], [0]], ids=["exact", "sparse"])
def test_strides_are_the_models(finish, rows_first, layers):
    inputs = heads(rows_first=rows_first)
    model = Attention(finish)
    with torch.no_grad():
        out = kept_whole(model, layers)(*inputs)
        wanted = model(*inputs)
    for found, expected in zip(*((x if isinstance(x, tuple) else (x,)) for x in (out, wanted)), strict=True):
        assert found.shape == expected.shape and found.stride() == expected.stride()
        assert difference(found, expected) < ATOL


@pytest.mark.parametrize("layers", [[], [0]], ids=["exact", "sparse"])
@pytest.mark.parametrize(
    "finish",
    [
        lambda out: out.view(2, 160, 16),
        lambda out: (out * 2).view(2, 160, 16),
        lambda out: out.reshape(2, 4, 40, 16).view(2, 160, 16),
        lambda out: out.to(torch.float64).relu().view(2, 160, 16),
        lambda out: out.split(1)[1].view(160, 16),
        lambda out: (out + out.sin()).unflatten(1, (2, 2)).view(4, 80, 16),
    ],
    ids=["view", "product", "reshape", "cast", "split", "sum"],
)
def test_a_view_that_needs_the_models_strides(finish, layers):
    """With [B, L, H, D] rows, which the new ops leave, `view` would raise."""
    inputs = heads(rows_first=False)
    model = Attention(finish)
    with torch.no_grad():
        out = kept_whole(model, layers)(*inputs)
        assert difference(out, model(*inputs)) < ATOL
