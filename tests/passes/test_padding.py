"""Padding predicates over symbolic sizes: written as tensors where an extent gives the symbol, opaque elsewhere."""

import pytest
import torch
import torch.nn.functional as F

from tsa_compile import KeepRatio, Reason, TSAConfig, clear_reports, reports
from tsa_compile.export import export_program

from ..support import heads

CONFIG = TSAConfig(budget=KeepRatio(0.5), window=4, min_tokens=3)
WRITTEN = {
    "all but the last three": lambda kv, length, counts: kv < length - 3,
    "aligned right": lambda kv, length, counts: kv >= length - counts[:, None],
    "even steps": lambda kv, length, counts: kv * 2 < length + counts[:, None],
    "half": lambda kv, length, counts: kv < length // 2,  # by the tensor that the model makes of it
    "square": lambda kv, length, counts: counts[:, None] < length * length + kv,
    "an element far away": lambda kv, length, counts: counts.repeat(1, 200)[:, kv + length // 2] > 0,
    "batch": lambda kv, length, counts: kv + counts.shape[0] < length,
}
OPAQUE = {"thirds": lambda kv, length, counts: kv // 3 < counts[:, None]}


def export(valid, layers):
    """The report's row, and the exported program beside the model at another length."""

    class Model(torch.nn.Module):
        def forward(self, query, key, value, counts):
            positions = torch.arange(query.shape[2])
            mask = (positions <= positions[:, None]) & valid(positions, query.shape[2], counts).expand(2, -1)[:, None, None]
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    clear_reports()
    model, counts = Model().eval(), torch.tensor([30, 20])
    config = CONFIG.replace(layers=layers)
    program = export_program(model, (*heads(length=40), counts), config, dynamic_lengths=(36, 200))
    inputs = (*heads(length=64), counts)
    return reports()[-1].rows[0], program.module()(*inputs), model(*inputs)


@pytest.mark.parametrize("name", WRITTEN)
def test_an_extent_gives_the_symbol(name):
    row, result, expected = export(WRITTEN[name], layers=())
    assert (row.reason, row.mask) == (Reason.LAYER_NOT_SELECTED, "causal+padding")
    torch.testing.assert_close(result, expected)


def test_in_a_sparse_layer_too():
    assert export(WRITTEN["aligned right"], layers=(0,))[0].reason is Reason.SPARSE


@pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse")
@pytest.mark.parametrize("name", OPAQUE)
def test_what_no_tensor_says_is_opaque(name):
    row, result, expected = export(OPAQUE[name], layers=(0,))
    assert row.reason is Reason.MASK_OPAQUE and "floor" in row.detail, row
    torch.testing.assert_close(result, expected)


EXTREMES = {
    "above minus one": lambda pad: pad > -1,
    "at least one": lambda pad: pad >= 1,
    "below the largest": lambda pad: pad < 2**63 - 1,
    "against another element": lambda pad: pad >= pad[:, :1],
    "another sum": lambda pad: pad + pad[:, :1] > 0,
}


@pytest.mark.parametrize("name", EXTREMES)
def test_elements_hold_any_number(name):
    """What is written for a comparison must not wrap where the comparison did not."""

    def attention(query, key, value, pad):
        positions = torch.arange(query.shape[2])
        mask = (positions <= positions[:, None]) & EXTREMES[name](pad)[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    pad = torch.tensor([[0, 1, 2**63 - 1, -(2**63), 5, -1, 2**62, 2**32]]).repeat(2, 1)
    pad[1, 0] = -(2**63)
    inputs = (*heads(kv_heads=4, length=8), pad)
    torch._dynamo.reset()
    compiled = torch.compile(
        attention, backend="tsa", options={"layers": [], "compiler": "eager", "skip_passes": ["Validate"]}
    )
    with torch.no_grad():
        result = compiled(*inputs)
    assert reports()[-1].rows[0].mask == "causal+padding"
    torch.testing.assert_close(result, attention(*inputs))
