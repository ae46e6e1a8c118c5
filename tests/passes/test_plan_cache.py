"""What is planned for queries behind a cache: the last of more keys than their own."""

import pytest
import torch

from tsa_compile.errors import TSAWarning
from tsa_compile.pipeline import run_passes
from tsa_compile.reasons import Decision, Reason
from tsa_compile.testing import capture

from .stacks import SPARSE, masked


class TestPrefillBehindACache:
    """Several queries over more keys than their own: not a decode step, so it is said that it stays dense."""

    def plan(self, queries, mask):
        graph = capture(masked, torch.randn(1, 2, queries, 8), torch.randn(1, 2, 40, 8), mask)
        (row,) = run_passes(graph, SPARSE.replace(layers=["*"])).rows
        assert (row.decision, row.reason) == (Decision.UNCHANGED, Reason.NOT_SELF_ATTENTION)
        return row.detail

    def test_is_said(self):
        with pytest.warns(TSAWarning, match="35 queries over 40 keys: a prefill behind a cache"):
            self.plan(35, torch.ones(35, 40).tril().bool())

    @pytest.mark.parametrize("queries, decision", [(32, Decision.DENSE), (31, Decision.UNCHANGED)])
    def test_is_exact_without_its_mask_unless_it_is_of_a_few_tokens(self, queries, decision):
        assert self.behind(queries, 40, layers=[]) == (decision, "causal (behind a cache)")

    def behind(self, queries, keys, **options):
        def step(query, key):
            positions = torch.arange(query.shape[2]) + (key.shape[2] - query.shape[2])
            return masked(query, key, torch.arange(key.shape[2]) <= positions[:, None])

        graph = capture(step, torch.randn(1, 2, queries, 8), torch.randn(1, 2, keys, 8))
        (row,) = run_passes(graph, SPARSE.replace(**{"layers": ["*"], **options})).rows
        self.reason = row.reason
        return row.decision, row.mask

    def test_is_sparse_where_tokens_of_all_can_be_dropped(self):
        assert self.behind(40, 80, window=20, min_tokens=20)[0] is Decision.SPARSE
        with pytest.warns(TSAWarning, match="80 < 200"):
            assert self.behind(40, 80, window=100, min_tokens=99)[0] is Decision.DENSE
        assert self.reason is Reason.TOO_SHORT

    def test_a_configured_minimum_is_of_the_chunk(self):
        with pytest.warns(TSAWarning, match="length 40 < 50"):
            assert self.behind(40, 80, window=4, min_tokens=4, min_length=50)[0] is Decision.DENSE

    def test_a_kernel_that_takes_no_queries_behind_a_cache_leaves_it_dense(self):
        with pytest.warns(TSAWarning, match="run_behind"):
            assert self.behind(40, 80, window=4, min_tokens=4, floor=None, kernel="a_shape")[0] is Decision.DENSE
        assert self.reason is Reason.KERNEL

    def test_another_dense_kernel_is_for_whole_prompts(self):
        assert self.behind(40, 80, layers=[], dense_kernel="sdpa")[0] is Decision.DENSE

    @pytest.mark.parametrize(
        "queries, mask",
        [(1, torch.ones(1, 40, dtype=torch.bool)), (30, None), (30, torch.ones(1, 1, 1, 40, dtype=torch.bool))],
        ids=["a decode step", "cross-attention", "cross-attention with padding"],
    )
    def test_near_misses_are_not(self, queries, mask, recwarn):
        assert self.plan(queries, mask) == f"{queries} queries over 40 keys"
        assert not recwarn.list
