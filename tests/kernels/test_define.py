"""What all ops have in common: no gradient goes through them, in part or silently."""

import pytest
import torch

from tsa_compile.kernels.cached import cached_attention
from tsa_compile.kernels.compress import compress
from tsa_compile.kernels.decompress import decompress

from .support import qkv

INDICES = torch.arange(20, dtype=torch.int32).expand(1, 4, 20).contiguous()
CALLS = {
    "one tensor": lambda q, k, v: cached_attention(q, k, v, 0.3),
    "by name": lambda q, k, v: cached_attention(query=q, key=k, value=v, scale=0.3),
    "several tensors": lambda q, k, v: compress(q, k, v, INDICES, None),
    "of others' results": lambda q, k, v: decompress(
        cached_attention(q, k, v, 0.3)[:, :, :20].contiguous(), INDICES, None, 40
    ),
}


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("name", CALLS)
def test_a_backward_pass_is_an_error(name, which):
    call, given = CALLS[name], list(qkv(1, seq_len=40))
    with torch.no_grad():
        wanted = call(*given)
    given[which] = given[which].requires_grad_()
    made = call(*given)
    torch.testing.assert_close(made, wanted, rtol=0, atol=0)
    made = made if isinstance(made, torch.Tensor) else made[which]
    assert made.requires_grad
    with pytest.raises(RuntimeError, match=r"tsa::\w+ has no gradient"):
        made.sum().backward()
