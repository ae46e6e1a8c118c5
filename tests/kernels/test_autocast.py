"""Under torch.autocast our ops compute in the types of their arguments."""

import pytest
import torch

from tsa_compile import KeepRatio, TSAConfig, pipeline

from ..support import Attention, heads

CONFIG = TSAConfig(budget=KeepRatio(0.2), layers=["*"], min_length=1, window=3, min_tokens=4, compiler="eager")


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_sparse_layer_is_the_same(dtype):
    """Float32 scores in half precision would select other tokens, and the floor's least logit would overflow."""
    inputs = heads(length=200, dtype=dtype)
    model = torch.compile(Attention(), backend="tsa", options={"config": CONFIG})
    with torch.no_grad():
        expected = model(*inputs)
        torch._dynamo.reset()
        with torch.autocast("cpu", dtype):
            assert torch.equal(model(*inputs), expected)


def test_every_op_is_told():
    assert pipeline.OPS
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tsa::")]
    told = [name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA")]
    assert {"tsa::sparse_attention", "tsa::score", "tsa::padded_attention", "tsa::merge_floor"} <= {*told}
    assert {*names} - {*told} <= {"tsa::extend_cache"}, "which computes nothing"
