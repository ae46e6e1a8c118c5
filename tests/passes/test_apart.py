"""Inputs that come to share memory in a later call of a graph that writes to one of them."""

import pytest
import torch
import torch.nn.functional as F

from tsa_compile import reports

from .support import EXACT, causal

LENGTH = 20


def heads():
    return list(torch.randn(3, 2, 4, LENGTH, 8))


def written_out(query, key, value, spare):
    scores = query @ key.mT
    spare.zero_()
    return scores.masked_fill(~causal(LENGTH), float("-inf")).softmax(-1) @ value


def padded(query, key, value, valid, spare):
    mask = causal(LENGTH) & valid[:, None, None]
    spare.logical_not_()
    return F.scaled_dot_product_attention(query, key, value, mask)


def separate(share, valid):
    given = [*heads(), *([torch.rand(2, LENGTH) > 0.3] if valid else [])]
    return [*given, given[share].clone()]


def views(share, valid):
    given = separate(share, valid)
    given[share] = given[share].clone()
    return [*given[:-1], given[share].view(given[share].shape)]


def arrays(share, valid):
    given = separate(share, valid)
    array = given[share].numpy().copy()
    given[share] = torch.from_numpy(array)
    return [*given[:-1], torch.from_numpy(array)]


@pytest.mark.parametrize("compiler", ["eager", lambda graph_module, inputs: graph_module, "aot_eager"])
@pytest.mark.parametrize(("function", "share"), [(written_out, 1), (padded, 3)])
def test_the_model_is_right_in_later_calls(function, share, compiler):
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="tsa", options={"config": EXACT.replace(compiler=compiler)})
    with torch.no_grad():
        for make in (separate, views, separate, arrays):
            given = make(share, function is padded)
            if make is arrays and compiler == "aot_eager":  # two tensors over one array are nothing that it knows of
                continue
            wanted = function(*[x.clone() for x in given[:share]], *_together(given[share:]))
            torch.testing.assert_close(compiled(*given), wanted)
    assert reports()[-1].unchanged == 0


def test_weights_that_a_call_reads_are_looked_at():
    class Keys(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.key = torch.nn.Parameter(torch.randn(2, 4, LENGTH, 8), requires_grad=False)

        def forward(self, query, value, spare):
            return written_out(query, self.key, value, spare)

    torch._dynamo.reset()
    model, (query, value, spare) = Keys(), (x.clone() for x in heads())
    compiled = torch.compile(model, backend="tsa", options={"config": EXACT.replace(compiler="eager")})
    with torch.no_grad():
        wanted = written_out(query, model.key.clone(), value, spare)
        for given in (spare, model.key.data):
            torch.testing.assert_close(compiled(query, value, given), wanted)
    assert reports()[-1].unchanged == 0


def _together(tensors):
    """Copies of tensors, of which the first and the last are one tensor if they share their memory."""
    first, *others, last = (x.clone() for x in tensors)
    shared = tensors[0].data_ptr() == tensors[-1].data_ptr()
    return [first, *others, first if shared else last]
