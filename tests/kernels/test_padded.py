"""tsa::padded_attention: every row, pad rows included, equals dense attention with the mask that it stands for."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from tsa_compile.kernels import cached, padded, reference
from tsa_compile.kernels.padded import padded_attention, padded_attention_aten, valid_ranges

from .support import TOLERANCE, qkv

SEQ_LEN = 41


def mask_of(*valid):
    """bool [B, L], one argument for each item: the positions that are valid."""
    padding = torch.zeros(len(valid), SEQ_LEN, dtype=torch.bool)
    for row, positions in zip(padding, valid):
        row[list(positions)] = True
    return padding


ALL = range(SEQ_LEN)
LEFT, RIGHT, BOTH, NONE = range(7, SEQ_LEN), range(29), range(5, 31), ()
HOLES = [t for t in range(3, 36) if t % 5]
MASKS = {
    "all": mask_of(ALL),
    "all, twice": mask_of(ALL, ALL),
    "left": mask_of(LEFT),
    "right": mask_of(RIGHT),
    "both sides": mask_of(BOTH),
    "left, twice": mask_of(LEFT, LEFT),
    "holes": mask_of(HOLES),
    "nothing": mask_of(NONE),
    "one token": mask_of([17]),
    "last token": mask_of([SEQ_LEN - 1]),
    "mixed": mask_of(LEFT, ALL, RIGHT),
    "mixed with holes": mask_of(HOLES, NONE, ALL),
    "different holes": mask_of(HOLES, [t for t in HOLES if t != 11], HOLES),
}


operands = functools.partial(qkv, seq_len=SEQ_LEN)


def dense(query, key, value, padding, scale, mean_rows):
    """The attention as a model writes it, in float64: a boolean mask, or an additive one of finfo.min."""
    query, key, value = (t.double() for t in (query, key, value))
    rows, keys = query.shape[2], key.shape[2]
    allowed = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows) & padding[:, None, None]
    mask = allowed
    if mean_rows:
        mask = torch.zeros_like(allowed, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def check(inputs, padding, mean_rows, scale=0.2):
    query, _, value = inputs
    out = padded_attention(*inputs, padding, valid_ranges(padding), scale, mean_rows)
    heads = query.shape[1]
    dim = value.shape[3]
    assert out.dtype == query.dtype
    assert out.stride()[1:] == (dim, heads * dim, 1)
    expected = dense(*inputs, padding, scale, mean_rows)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[query.dtype])
    reaches = (padding.cumsum(1) > 0)[:, padding.shape[1] - query.shape[2] :]
    nowhere = out.transpose(1, 2)[~reaches]
    assert mean_rows or (nowhere == 0).all(), "rows that may attend to no token are exactly 0"


@pytest.mark.parametrize("mean_rows", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_every_row_equals_the_masked_attention(device, name, mean_rows):
    padding = MASKS[name].to(device)
    check(operands(len(padding), device=device), padding, mean_rows)


@pytest.mark.parametrize("mean_rows", [False, True])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("rows", [1, 9, 25, 40])
def test_queries_behind_a_cache(device, name, mean_rows, rows, monkeypatch):
    monkeypatch.setattr(cached, "ROWS", 8)
    padding = MASKS[name].to(device)
    query, key, value = operands(len(padding), device=device)
    check((query[:, :, -rows:], key, value), padding, mean_rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "heads, kv_heads, dim, value_dim", [(4, 4, 64, 64), (4, 1, 80, 80), (6, 2, 96, 32), (2, 1, 32, 256), (2, 1, 512, 512)]
)
def test_dtypes_and_head_sizes(device, dtype, heads, kv_heads, dim, value_dim):
    padding = MASKS["mixed with holes"].to(device)
    inputs = operands(3, heads, kv_heads, dim=dim, value_dim=value_dim, dtype=dtype, device=device)
    check(inputs, padding, mean_rows=False, scale=dim**-0.5)
    check(inputs, padding, mean_rows=True, scale=dim**-0.5)


@pytest.mark.parametrize("hidden", [torch.nan, torch.inf])
def test_hidden_keys_reach_no_row(device, hidden):
    """As where a model replaces their scores. Their values are left out only where scores are."""
    padding = MASKS["mixed with holes"].to(device)
    query, key, value = operands(3, device=device)
    key = key.masked_fill(~padding[:, None, :, None], hidden)
    out = padded_attention(query, key, value, padding, valid_ranges(padding), 0.2, False)
    assert torch.isfinite(out.transpose(1, 2)[padding]).all()


class TestAtenForm:
    """What exports and ONNX files are made of."""

    @pytest.mark.parametrize("dim, value_dim", [(32, 32), (64, 48), (256, 256)])
    @pytest.mark.parametrize("mean_rows", [False, True])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_every_row_equals_the_masked_attention(self, device, dtype, mean_rows, dim, value_dim):
        for padding in MASKS.values():
            inputs = operands(len(padding), dim=dim, value_dim=value_dim, dtype=dtype, device=device)
            out = padded_attention_aten(*inputs, padding.to(device), None, 0.2, mean_rows)
            expected = dense(*inputs, padding.to(device), 0.2, mean_rows)
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])

    @pytest.mark.parametrize("dim", [32, 256])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_keys_that_are_not_valid_are_below_the_lowest_logit(self, device, dtype, dim):
        padding = MASKS["mixed with holes"].to(device)
        query, key, value = operands(3, dim=dim, dtype=dtype, device=device)
        query, key = query.abs() * 100, -key.abs() * 100  # logits down to some -1e5, which float32 rounds by up to 2^-8
        expected = dense(query, key, value, padding, 0.2, False)
        out = padded_attention_aten(query, key, value, padding, None, 0.2, False)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * TOLERANCE[dtype] + 2**-8)

    @pytest.mark.parametrize("dim", [32, 256])
    def test_what_lies_in_pads_reaches_no_valid_row(self, device, dim):
        padding = MASKS["mixed with holes"].to(device)
        query, key, value = operands(3, dim=dim, device=device)
        before = padded_attention_aten(query, key, value, padding, None, 0.2, False)
        pads = ~padding[:, None, :, None]
        poisoned = (tensor.masked_fill(pads, torch.nan) for tensor in (query, key, value))
        after = padded_attention_aten(*poisoned, padding, None, 0.2, False)
        assert torch.equal(before.transpose(1, 2)[padding], after.transpose(1, 2)[padding])

    @pytest.mark.parametrize("dim", [32, 256])
    def test_a_whole_prompt_needs_no_tensor_of_its_length_squared(self, dim):
        length = 2048
        query, key, value = qkv(1, heads=2, kv_heads=1, seq_len=length, dim=dim, value_dim=dim)
        padding = torch.arange(length)[None] >= 7

        def sizes(rows):
            form = functools.partial(padded_attention_aten, valid_ranges=None, scale=0.2, mean_rows=True)
            graph = make_fx(form, tracing_mode="fake")(query[:, :, -rows:], key, value, padding).graph
            found = (node.meta.get("val") for node in graph.nodes)
            return max(tensor.numel() for tensor in found if isinstance(tensor, torch.Tensor))

        # The largest are the queries of twice the heads.
        assert sizes(length) <= 4 * dim * length < length**2 <= sizes(length - 1) + length

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("valid", ["left", "right", "few", "a long hole"])
    def test_much_padding_costs_wide_heads_no_accuracy(self, device, dtype, valid):
        """Half precision's smallest number is 2^-24: values of 2^-10, shared with 500 copies, would be a few of them."""
        tokens = {"left": range(500, 600), "right": range(40), "few": range(3, 600, 10), "a long hole": [*range(9), 550]}
        padding = torch.zeros(1, 600, dtype=torch.bool, device=device)
        padding[:, list(tokens[valid])] = True
        query, key, value = qkv(1, seq_len=600, dim=256, value_dim=256, dtype=dtype, device=device)
        query, key = query + 1, 0.1 * key
        key[:, :, tokens[valid][0]] = 0.5  # its logits are the highest by far
        out = padded_attention_aten(query, key, value / 1024, padding, None, 1 / 16, False) * 1024
        expected = dense(query, key, value, padding, 1 / 16, False)
        error = torch.where(padding[:, None, :, None], out.double() - expected, 0.0).abs().max()
        assert error <= 2 * TOLERANCE[dtype]

    @pytest.mark.parametrize("scale", [0.0, -0.2, 1e-4])
    def test_scales_that_lower_nothing_take_no_column(self, device, scale):
        padding = MASKS["mixed"].to(device)
        inputs = operands(3, device=device)
        out = padded_attention_aten(*inputs, padding, None, scale, False)
        torch.testing.assert_close(out.double(), dense(*inputs, padding, scale, False), rtol=0, atol=1e-5)


def test_the_oracle_agrees_with_sdpa():
    for padding in MASKS.values():
        query, key, value = (t.double() for t in operands(len(padding)))
        for mean_rows, rows in ((False, SEQ_LEN), (True, SEQ_LEN), (False, 12), (True, 30)):
            inputs = (query[:, :, -rows:], key, value)
            expected = dense(*inputs, padding, 0.2, mean_rows)
            torch.testing.assert_close(reference.padded_attention(*inputs, padding, 0.2, mean_rows), expected)


def test_several_chunks(device, monkeypatch):
    monkeypatch.setattr(cached, "ROWS", 8)
    padding = MASKS["different holes"].to(device)
    check(operands(3, device=device), padding, mean_rows=False)
    check(operands(3, device=device), padding, mean_rows=True)


def test_pads_may_hold_anything_finite_and_do_not_reach_valid_rows(device):
    padding = MASKS["mixed"].to(device)
    query, key, value = operands(3, device=device)
    before = padded_attention(query, key, value, padding, valid_ranges(padding), 0.2, False)
    for tensor in (key, value):
        tensor.masked_fill_(~padding[:, None, :, None], 1e4)
    after = padded_attention(query, key, value, padding, valid_ranges(padding), 0.2, False)
    assert torch.equal(before, after)


def test_a_batch_equals_its_items_alone(device):
    padding = MASKS["mixed with holes"].to(device)
    inputs = operands(3, device=device)
    together = padded_attention(*inputs, padding, valid_ranges(padding), 0.2, True)
    for b in range(3):
        alone = [t[b : b + 1] for t in inputs]
        one = padded_attention(*alone, padding[b : b + 1], valid_ranges(padding[b : b + 1]), 0.2, True)
        torch.testing.assert_close(together[b : b + 1], one)


def test_all_valid_costs_one_causal_call(device, monkeypatch):
    calls = []
    behind = padded.behind
    monkeypatch.setattr(padded, "behind", lambda *args: calls.append(args[0].shape) or behind(*args))
    monkeypatch.setattr(padded, "shared_keys", None)
    padding = MASKS["all, twice"].to(device)
    query, key, value = operands(2, device=device)
    check((query, key, value), padding, mean_rows=False)
    check((query[:, :, 9:], key, value), padding, mean_rows=False)
    assert calls == [(2, 4, SEQ_LEN, 32), (2, 4, SEQ_LEN - 9, 32)]


@pytest.mark.parametrize("name", MASKS)
def test_valid_ranges(device, name):
    found = valid_ranges(MASKS[name].to(device))
    assert found.dtype == torch.int64 and found.device.type == "cpu" and found.is_contiguous()
    for row, (start, stop, contiguous) in zip(MASKS[name], found.tolist()):
        positions = row.nonzero().flatten().tolist()
        expected = (positions[0], positions[-1] + 1) if positions else (0, 0)
        assert (start, stop) == expected
        assert contiguous == (len(positions) == stop - start)


def test_valid_ranges_of_empty_masks(device):
    assert valid_ranges(torch.ones(2, 0, dtype=torch.bool, device=device)).tolist() == [[0, 0, 1]] * 2
    assert valid_ranges(torch.ones(0, 4, dtype=torch.bool, device=device)).shape == (0, 3)


def test_valid_ranges_of_an_expanded_mask(device):
    padding = torch.ones(1, 1, dtype=torch.bool, device=device).expand(3, 5)
    assert valid_ranges(padding).tolist() == [[0, 5, 1]] * 3


@pytest.mark.parametrize("name", ["all, twice", "mixed", "mixed with holes"])
def test_opcheck(device, name):
    padding = MASKS[name].to(device)
    torch.library.opcheck(valid_ranges, (padding,))
    inputs = operands(len(padding), value_dim=48, device=device)
    torch.library.opcheck(padded_attention, (*inputs, padding, valid_ranges(padding), 0.2, False))
    inputs = (inputs[0][:, :, 11:], *inputs[1:])
    torch.library.opcheck(padded_attention, (*inputs, padding, valid_ranges(padding), 0.2, False))


@pytest.mark.exhaustive
def test_inductor_compiles_it_for_every_length(device):
    def attention(query, key, value, padding):
        out = padded_attention(query, key, value, padding, valid_ranges(padding), 0.2, False)
        return out.transpose(1, 2).flatten(2) * 2

    compiled = torch.compile(attention, dynamic=True, fullgraph=True)
    for name, batch in (("mixed", 3), ("all, twice", 2)):
        padding = MASKS[name].to(device)
        for seq_len in (SEQ_LEN, 23):
            inputs = *operands(batch, device=device, seq_len=seq_len), padding[:, :seq_len]
            torch.testing.assert_close(compiled(*inputs), attention(*inputs))


@pytest.mark.parametrize("change", [lambda mask: mask[:1], lambda mask: mask[:, 1:], lambda mask: mask.int()])
def test_padding_that_does_not_fit_is_refused(device, change):
    inputs, padding = operands(3, 4, 2, dim=16, device=device), change(MASKS["mixed"]).to(device)
    with pytest.raises(ValueError, match=r"for 3 items of 41 keys; expected torch.bool \[3, 41\]"):
        padded_attention(*inputs, padding, valid_ranges(padding), 0.2, False)
