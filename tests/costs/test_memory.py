"""What a model and its prefill need, and what there is."""

from pathlib import Path

import pytest
import torch

from tsa_compile.costs import memory
from tsa_compile.costs.memory import MemoryShortage, check_memory, prefill_bytes
from tsa_compile.shapes import model_config


@pytest.mark.parametrize(("length", "measured"), [(8192, 1.9), (32768, 7.6), (131072, 30.6)])
def test_a_prefill_needs_about_what_was_measured(length, measured):
    """Peaks of eager prefills on an H100, in GiB: benchmarks/results/prefill-h100.md."""
    estimate = prefill_bytes(model_config("llama-3.1-8b"), torch.bfloat16, length) / 2**30
    assert measured <= estimate <= 1.2 * measured


def test_free_memory_of_this_machine():
    free = memory.free_bytes("cpu")
    assert free is None or 2**20 < free < 2**50
    assert memory.free_bytes("meta") is None


def test_memory_as_linux_says_it(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       100 kB\nMemFree:         10 kB\nMemAvailable:    70 kB\n")
    assert memory._available(meminfo) == 70 * 1024
    assert memory._available(tmp_path / "none") is None


@pytest.mark.parametrize(("limit", "left"), [("1000", 1000 - 600 + 250), ("max", None), ("100", 0)])
def test_memory_that_a_control_group_leaves(tmp_path, limit, left):
    for name, text in {"max": limit, "current": "600", "stat": "anon 350\ninactive_file 250"}.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert memory._group_left(tmp_path) == left
    assert memory._group_left(Path(tmp_path / "none")) is None


def test_too_little_memory_is_said_with_sizes(monkeypatch):
    config = model_config("llama-3.1-8b")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 17 * 2**30)
    check_memory(config, torch.bfloat16, "cpu", 1024)
    with pytest.raises(
        MemoryShortage, match=r"about 17\.1 GiB .*15\.0 GiB of weights in bfloat16, 2\.1 GiB .* 17\.0 GiB are free"
    ):
        check_memory(config, torch.bfloat16, "cpu", 8192)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    check_memory(config, torch.bfloat16, "cpu", 8192)
