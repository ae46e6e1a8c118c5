"""Masks that are written to: from there on they have another value, the operator's or one that nobody knows."""

import operator

import pytest
import torch
import torch.nn.functional as F

from tsa_compile.errors import RewriteError
from tsa_compile.passes.masks.infer import still_held
from tsa_compile.passes.padding import PaddingBuilder

from .mask_spellings import CAUSAL, CAUSAL_PADDING, INF, LENGTH, NONE, OPAQUE, additive, causal, expect, padding_mask


@torch.library.custom_op("tsa_tests::clear", mutates_args=("mask",))
def clear(mask: torch.Tensor) -> None:
    mask.zero_()


class TestWrites:
    """What is written to has another value from there on: the operator's, or one that nobody knows."""

    def write(write):
        def build(n, m, pad):
            mask = causal(n, m)
            write(mask)
            return mask

        return build

    @pytest.mark.parametrize(
        "build",
        [
            write(lambda mask: mask.logical_not_()),
            write(lambda mask: mask.__setitem__((0, 0), False)),
            write(lambda mask: mask[:, :2].fill_(True)),
            write(lambda mask: mask.t().masked_fill_(~mask, True)),
            write(lambda mask: torch.logical_not(mask, out=mask)),
            write(clear),
            write(torch.ops.tsa_tests.clear),
        ],
        ids=["logical_not_", "setitem", "slice", "transposed", "out", "custom", "packet"],
    )
    def test_opaque(self, build):
        expect(OPAQUE, build)

    @pytest.mark.parametrize(
        "build",
        [
            write(lambda mask: mask.fill_(True)),
            write(lambda mask: mask.__ior__(torch.ones_like(mask))),
            write(lambda mask: operator.ior(mask, torch.ones_like(mask))),
        ],
        ids=["fill_", "ior", "operator"],
    )
    def test_whole(self, build):
        expect(NONE, build)

    @pytest.mark.filterwarnings("ignore:Use of masked_fill_ on expanded tensors")
    def test_rows_that_are_one_row(self):
        """Of what is written to one place, one number stays."""
        expect(OPAQUE, lambda n, m, pad: torch.ones(1, m).bool().expand(n, m).masked_fill_(~causal(n, m), False))
        expect(OPAQUE, lambda n, m, pad: torch.zeros(1, m).expand(n, m).masked_fill_(~causal(n, m), INF))

    def test_other_memory(self):
        """`set_` leaves what was there; that each piece of memory was written to once says nothing."""

        def build(n, m, pad):
            mask = causal(n, m)
            mask &= True
            return mask.set_(torch.ones_like(mask) | mask)

        def replaced(n, m, pad):
            mask = build(n, m, pad)
            return mask.fill_(True)

        expect(OPAQUE, build)
        expect(NONE, replaced)

    def test_filled_in_place(self):
        expect(CAUSAL, lambda n, m, pad: torch.zeros(n, m).masked_fill_(~causal(n, m), INF))

    @pytest.mark.parametrize(
        "write",
        [
            lambda mask: F.threshold(mask, -1.0, 5.0, inplace=True),
            lambda mask: F.relu(mask, True),
            lambda mask: F.hardtanh(mask, -1.0, 1.0, True),
            lambda mask: F.dropout(mask, 1.0, True, True),
            lambda mask: F.embedding(torch.tensor([0, 1, 2]), mask, max_norm=1.0),
            lambda mask: torch.batch_norm(
                torch.randn(4, LENGTH), None, None, mask[3], torch.ones(LENGTH), True, 0.1, 1e-5, False
            ),
            lambda mask: mask.numpy().fill(0.0),
            lambda mask: mask.numpy().sort(),
        ],
        ids=["threshold", "relu", "hardtanh", "dropout", "embedding", "batch_norm", "numpy fill", "numpy sort"],
    )
    def test_arguments_that_say_so(self, write):
        def build(n, m, pad):
            mask = additive(causal(n, m))
            write(mask)
            return mask

        expect(OPAQUE, build)

    def test_numpy_operator(self):
        def build(n, m, pad):
            mask = causal(n, m).clone()
            array = mask.numpy()
            array |= True
            return mask

        expect(OPAQUE, build)

    def test_padding_mask_written_to(self):
        def build(n, m, pad):
            pad = pad.clone()
            pad[:, 0] = 1
            return causal(n, m) & pad.bool()[:, None, None]

        expect(CAUSAL_PADDING, build)

    def test_padding_is_what_it_was_where_the_mask_was_built(self):
        def build(n, m, pad):
            mask = causal(n, m) & (pad != 0)[:, None, None]
            pad[:, 0] = 1
            return mask

        result = expect(CAUSAL_PADDING, build, pad=padding_mask(LENGTH))
        builder = PaddingBuilder(result.graph_module.graph)
        with result.graph_module.graph.inserting_before(result.call.node), pytest.raises(RewriteError):
            builder.padding(result.call, result.mask)
        assert still_held(result.mask, result.call).kind is OPAQUE

    def test_a_write_elsewhere_does_not_matter(self):
        def build(n, m, pad):
            other = torch.zeros(3)
            other.fill_(1)
            return causal(n, m)

        expect(CAUSAL, build)
