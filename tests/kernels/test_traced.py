"""The triton_ops compute what the opaque ops compute; that a compiler can open them is shown in tests/export."""

import pytest
import torch

from tsa_compile.kernels import traced
from tsa_compile.kernels.padded import padded_attention, spans

pytest.importorskip("triton")
tsa = torch.ops.tsa
SCALE = 0.25


def make(device, length=70):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, length, 16) for heads in (4, 2, 2))
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[0, :9] = False
    padding[1, 20:22] = False
    padding[1, -5:] = False
    return *(torch.randn(shape, generator=generator).to(device) for shape in shapes), padding.to(device)


@pytest.mark.parametrize("budget", [(0.2, None), (None, 0.5)], ids=["coverage", "keep ratio"])
@pytest.mark.parametrize("padded", [True, False])
def test_the_steps(device, budget, padded):
    query, key, value, padding = make(device)
    length, padding = query.shape[2], padding if padded else None
    scores = tsa.score(query, key, padding, SCALE, 4, 7)
    torch.testing.assert_close(traced.OPS["score"](query, key, padding, SCALE, 4, 7), scores)
    count = tsa.budget(scores, *budget, 3)
    torch.testing.assert_close(traced.OPS["budget"](scores, *budget, 3), count)
    indices = tsa.select(scores, count, length)
    assert torch.equal(traced.OPS["select"](scores, count, length), indices)
    rows = tsa.compress(query, key, value, indices, count)
    opened = traced.OPS["compress"](query, key, value, indices, count)
    out = traced.OPS["attend"](*opened, count, SCALE, "auto")
    out = traced.OPS["decompress"](out, indices, count, length)
    expected = tsa.decompress(tsa.attend(*rows, count, SCALE, "auto"), indices, count, length)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert out.stride() == expected.stride()


def test_padded_attention_at_valid_tokens(device):
    query, key, value, padding = make(device)
    expected = padded_attention(query, key, value, padding, spans(padding), SCALE, True)
    actual = traced.OPS["padded_attention"](query, key, value, padding, None, SCALE, True)
    torch.testing.assert_close(actual, expected.masked_fill(~padding[:, None, :, None], 0), rtol=1e-4, atol=1e-4)
    assert actual.stride() == expected.stride()
