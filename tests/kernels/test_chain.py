"""The whole chain, score -> budget -> select -> compress -> attend -> decompress: the invariants of the method."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.kernels import reference
from tsa_compile.kernels.attend import attend, attend_aten
from tsa_compile.kernels.budget import budget
from tsa_compile.kernels.compress import compress, compress_aten
from tsa_compile.kernels.decompress import decompress, decompress_aten
from tsa_compile.kernels.score import score
from tsa_compile.kernels.select import select

from .support import FAULTS, TOLERANCE, close, damaged, make_padding, qkv

SCALE = 0.25


def chain(
    query,
    key,
    value,
    padding=None,
    *,
    coverage=None,
    keep_ratio=None,
    window=4,
    min_tokens=3,
    granularity="head",
    capacity=None,
):
    """The graph that the rewrite writes: output, indices and count."""
    capacity = query.shape[2] if capacity is None else capacity
    scores = score(query, key, padding, SCALE, window, 7)
    if granularity == "group":
        scores = scores.unflatten(1, (key.shape[1], -1)).mean(2)
    count = budget(scores, coverage, keep_ratio, min_tokens).clamp(max=capacity)
    indices = select(scores, count, capacity)
    rows = compress(query, key, value, indices, count)
    out = attend(*rows, count, SCALE, "auto")
    return decompress(out, indices, count, query.shape[2]), indices, count


def restricted(query, key, value, indices, count):
    """Dense attention in float64 whose queries and keys are the selected tokens of each head; other rows are 0."""
    batch, heads, seq_len, _ = query.shape
    query, key, value = (t.double() for t in (query, key, value))
    share = heads // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    chosen = torch.zeros(batch, heads, seq_len, dtype=torch.bool, device=query.device)
    for b in range(batch):
        for h in range(heads):
            chosen[b, h, indices[b, h * indices.shape[1] // heads, : count[b]].long()] = True
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=query.device).tril()
    allowed = causal & chosen[:, :, None, :] & chosen[:, :, :, None]
    logits = (SCALE * query @ key.transpose(2, 3)).masked_fill(~allowed, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0) @ value


shapes = st.builds(
    lambda batch, kv_heads, group, seq_len, seed: {
        "batch": batch, "heads": kv_heads * group, "kv_heads": kv_heads, "seq_len": seq_len, "seed": seed,
    },
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    seq_len=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)  # fmt: skip
budgets = st.one_of(
    st.fixed_dictionaries({"keep_ratio": st.sampled_from([0.1, 0.3, 0.5, 0.675, 1.0])}),
    st.fixed_dictionaries({"coverage": st.sampled_from([0.0, 0.05, 0.2, 0.5])}),
)
options = st.fixed_dictionaries(
    {
        "window": st.integers(1, 9),
        "min_tokens": st.integers(0, 6),
        "granularity": st.sampled_from(["head", "group"]),
    }
)


@st.composite
def padding_of_items(draw, batch, seq_len):
    """bool [B, L]: padding to the left, to the right or on both sides; an item may be all padding."""
    padding = torch.zeros(batch, seq_len, dtype=torch.bool)
    for row in padding:
        start = draw(st.integers(0, seq_len))
        row[start : draw(st.integers(start, seq_len))] = True
    return padding


@settings(deadline=None, max_examples=60)
@given(shapes, budgets, options)
def test_selected_rows_are_attention_among_themselves_and_others_zero(shape, budget_, option):
    inputs = qkv(**shape)
    out, indices, count = chain(*inputs, **budget_, **option)
    close(out, restricted(*inputs, indices, count))
    for b, n in enumerate(count.tolist()):
        for h in range(inputs[0].shape[1]):
            kept = indices[b, h * indices.shape[1] // inputs[0].shape[1], :n].long()
            assert (kept.diff() > 0).all()
            skipped = torch.ones(shape["seq_len"], dtype=torch.bool).index_fill(0, kept, False)
            assert (out[b, h, skipped] == 0).all()


@settings(deadline=None, max_examples=30)
@given(shapes, options)
def test_keep_all_is_dense_attention(shape, option):
    inputs = qkv(**shape)
    out, _, count = chain(*inputs, coverage=0.0, **option)
    assert count.tolist() == [shape["seq_len"]] * shape["batch"]
    close(out, reference.padded_attention(*(t.double() for t in inputs), None, SCALE))


@settings(deadline=None, max_examples=40)
@given(st.data(), shapes, budgets, options)
def test_a_batch_equals_its_items_unpadded_and_alone(data, shape, budget_, option):
    inputs = qkv(**shape)
    padding = data.draw(padding_of_items(shape["batch"], shape["seq_len"]))
    out, _, count = chain(*inputs, padding, **budget_, **option)
    for b, valid in enumerate(padding):
        assert (out[b][:, ~valid] == 0).all(), "pad rows are 0"
        if not valid.any():
            assert count[b] == 0
            continue
        alone, _, alone_count = chain(*(t[b : b + 1, :, valid] for t in inputs), **budget_, **option)
        assert alone_count[0] == count[b]
        close(out[b][:, valid], alone[0])


@settings(deadline=None, max_examples=20)
@given(shapes, budgets, options)
def test_the_same_inputs_give_the_same_bits(shape, budget_, option):
    inputs = qkv(**shape)
    first, second = (chain(*inputs, **budget_, **option) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("granularity", ["head", "group"])
@pytest.mark.parametrize("budget_", [{"keep_ratio": 0.5}, {"coverage": 0.1}, {"coverage": 0.0}])
@pytest.mark.parametrize("capacity", [None, 30, 9])
def test_equals_the_reference_layer(budget_, granularity, capacity):
    inputs = qkv(2, 4, 2, 50, 80, 96)
    padding = torch.ones(2, 50, dtype=torch.bool)
    padding[1, :11] = False
    given_ = {"window": 4, "min_tokens": 3, "granularity": granularity, "capacity": capacity}
    out, _, _ = chain(*inputs, padding, **budget_, **given_)
    wide = (t.double() for t in inputs)
    budget_ = {"coverage": None, **budget_}
    close(out, reference.token_sparse_attention(*wide, padding, scale=SCALE, pool=7, **budget_, **given_))


@pytest.mark.parametrize("kind", [None, "left", "holes"])
@pytest.mark.parametrize("budget_", [{"keep_ratio": 0.2}, {"keep_ratio": 0.01}, {"coverage": 0.3}, {"coverage": 0.0}])
@pytest.mark.parametrize("granularity", ["head", "group"])
@pytest.mark.parametrize("places", [[3], [10], [33, 12], [37], [39]])
def test_what_a_nan_key_does_to_dense_attention_shows_in_the_kept_rows(kind, budget_, granularity, places):
    """A NaN key leaves no row behind it finite: neither where it is a candidate nor where it lies in the window.

    It is never the first row here, which sees nothing else: torch's kernel for CPUs makes 0 of that, sparse or dense.
    """
    query, key, value = qkv(2, 4, 2, 40)
    padding = make_padding(kind, 2, 40)
    sound = chain(query, key, value, padding, **budget_, granularity=granularity)
    key[1, 0, places] = float("nan")
    out, indices, count = chain(query, key, value, padding, **budget_, granularity=granularity)
    dense = reference.padded_attention(query, key, value, padding, SCALE)

    real = torch.ones(40, dtype=torch.bool) if padding is None else padding[1]
    valid = int(real.sum())
    assert count[0] == sound[2][0] and torch.equal(out[0], sound[0][0]), "items do not influence each other"
    assert count[1] >= min(3 + 4, valid)
    for h in range(4):
        kept = indices[1, h * indices.shape[1] // 4, : count[1]].long()
        assert torch.equal(out[1, h, kept].isnan(), dense[1, h, kept].isnan())
    if "coverage" in budget_ and any(place < 30 and real[place] for place in places):
        assert count[1] == valid
        assert torch.equal(out[1, :, real].isnan(), dense[1, :, real].isnan())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", [None, "left", "holes"])
@pytest.mark.parametrize("budget_", [{"keep_ratio": 0.5}, {"coverage": 0.1}])
@pytest.mark.parametrize("granularity", ["head", "group"])
def test_equals_the_reference_layer_with_faulty_numbers(fault, kind, budget_, granularity):
    query, key, value = qkv(2, 4, 2, 50)
    query, key = damaged(fault, query, key, window=8)
    padding = make_padding(kind, 2, 50)
    options_ = {"window": 8, "min_tokens": 12, "granularity": granularity}
    out, _, count = chain(query, key, value, padding, **budget_, **options_)
    valid = torch.tensor([50, 50]) if padding is None else padding.sum(1)
    assert (count >= torch.minimum(valid, torch.tensor(12 + 8))).all()
    wide = (t.double() for t in (query, key, value))
    want = reference.token_sparse_attention(*wide, padding, scale=SCALE, **{"coverage": None, **budget_}, **options_)
    close(out, want, equal_nan=True)
    again, _, _ = chain(query, key, value, padding, **budget_, **options_)
    assert torch.equal(out.nan_to_num(7.0), again.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim, value_dim", [(64, 64), (80, 96), (256, 128), (512, 512)])
@pytest.mark.parametrize("granularity", ["head", "group"])
def test_dtypes_and_head_sizes(device, dtype, dim, value_dim, granularity):
    """The selection is the ops' own, so that rounding in a score cannot fail the comparison of the outputs."""
    inputs = qkv(3, 4, 2, 45, dim, value_dim, dtype, device)
    padding = torch.ones(3, 45, dtype=torch.bool, device=device)
    padding[0, :20] = False
    padding[2, 41:] = False
    out, indices, count = chain(*inputs, padding, keep_ratio=0.5, granularity=granularity)
    assert len(set(count.tolist())) == 3
    close(out, restricted(*inputs, indices, count), dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("budget_", [{"keep_ratio": 0.5}, {"coverage": 0.1}])
def test_one_compilation_serves_every_length(device, budget_):
    def layer(query, key, value):
        return chain(query, key, value, **budget_)[0].transpose(1, 2).flatten(2) + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True)
    for seq_len in (40, 61, 33):
        inputs = qkv(2, 4, 2, seq_len, device=device)
        with torch.compiler.set_stance("default" if seq_len == 40 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(*inputs), layer(*inputs))


def test_aten_forms_export_with_a_dynamic_length():
    class Layer(torch.nn.Module):
        def forward(self, query, key, value, indices, count):
            rows = compress_aten(query, key, value, indices, count)
            return decompress_aten(attend_aten(*rows, count, SCALE, "auto"), indices, count, query.shape[2])

    def example(seq_len):
        inputs = qkv(2, 4, 2, seq_len)
        _, indices, count = chain(*inputs, keep_ratio=0.5)
        return *inputs, indices, count

    length = torch.export.Dim("length", min=8, max=4096)
    dims = ({2: length}, {2: length}, {2: length}, {2: length}, {})
    exported = torch.export.export(Layer(), example(40), dynamic_shapes=dims).module()
    for seq_len in (40, 23):
        query, key, value, indices, count = example(seq_len)
        expected = chain(query, key, value, keep_ratio=0.5)[0]
        torch.testing.assert_close(exported(query, key, value, indices, count), expected)


@pytest.mark.gpu
def test_captured_chain_replays_with_other_data_and_another_count():
    inputs = qkv(2, 8, 2, 3000, 64, 64, torch.bfloat16, "cuda")
    options_ = {"coverage": 0.1, "window": 128, "min_tokens": 64}
    chain(*inputs, **options_)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, indices, count = chain(*inputs, **options_)
    counts = set()
    for seed in range(3):
        for tensor, fresh in zip(inputs, qkv(2, 8, 2, 3000, 64, 64, torch.bfloat16, "cuda", seed=seed)):
            tensor.copy_(fresh * (seed + 1))
        graph.replay()
        counts.add(tuple(count.tolist()))
        close(out, restricted(*inputs, indices, count), torch.bfloat16)
    assert len(counts) == 3


@pytest.mark.gpu
def test_only_attend_looks_at_the_count():
    inputs = qkv(2, 8, 2, 3000, 64, 64, torch.bfloat16, "cuda")
    options_ = {"coverage": 0.1, "window": 128, "min_tokens": 64}
    _, indices, count = chain(*inputs, **options_)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = score(*inputs[:2], None, SCALE, 128, 7)
        select(scores, budget(scores, 0.1, None, 64), 3000)
        rows = compress(*inputs, indices, count)
        decompress(rows[0], indices, count, 3000)
        attend(*rows, None, SCALE, "auto")
    finally:
        torch.cuda.set_sync_debug_mode("default")
