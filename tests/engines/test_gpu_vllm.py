"""Engines of vLLM on GPUs against one process of transformers, with vLLM's compilation and CUDA graphs around attention."""

import pytest
import torch

from .test_vllm import COVERAGE, HALF, compare, has_vllm

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1000), pytest.mark.filterwarnings("ignore")]
NEAR = 0.02
"""What float16 leaves of the difference of two orders of summation, on log-probabilities around -4."""


@has_vllm
@pytest.mark.parametrize("name, config, processes", [("llama", HALF, 1), ("qwen3", COVERAGE, 2)])
def test_engine_equals_one_process(tmp_path, name, config, processes):
    """Whole prompts, a short one, some in chunks, beside decode steps that are replayed from CUDA graphs."""
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    gaps = compare(tmp_path, name, config.replace(min_length=9), processes, "float16", torch.device("cuda"))
    assert all(gap < NEAR for gap, *_ in gaps.values()), gaps
    assert all(dense > 2 * gap and first > 2 * gap for gap, dense, first in gaps.values()), f"or nothing was tested: {gaps}"
