"""The compiler and the libraries that a package is built with."""

import os
from pathlib import Path

import pytest
import torch

from tsa_compile import ConfigError
from tsa_compile.export import _toolchain


def test_cuda_headers_are_found_or_named(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setattr(_toolchain, "_cuda_candidates", lambda: [tmp_path / "nothing", tmp_path / "toolkit"])
    with (
        pytest.raises(ConfigError, match=r"cuda_runtime_api\.h.*nvidia-cuda-runtime.*CUDA_HOME"),
        _toolchain.toolchain("cuda"),
    ):
        pass
    (tmp_path / "toolkit" / "include").mkdir(parents=True)
    for name in ("cuda.h", "cuda_runtime_api.h"):
        (tmp_path / "toolkit" / "include" / name).touch()
    with _toolchain.toolchain("cuda"):
        found = torch.utils.cpp_extension.CUDA_HOME
        assert found == str(tmp_path / "toolkit")
    assert torch.utils.cpp_extension.CUDA_HOME is None
    with _toolchain.toolchain("cpu"):
        assert torch.utils.cpp_extension.CUDA_HOME is None


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_the_library_path_is_as_it_was(before, monkeypatch):
    monkeypatch.delenv("LIBRARY_PATH", raising=False)
    if before:
        monkeypatch.setenv("LIBRARY_PATH", before)
    with _toolchain.toolchain("cpu"):
        inside = os.environ["LIBRARY_PATH"].split(os.pathsep)
        assert inside[1:] == ([before] if before else []) and Path(inside[0]).is_dir()
    assert os.environ.get("LIBRARY_PATH") == before


def test_a_loaded_library_is_found_by_its_name():
    (path,) = _toolchain.loaded_libraries("libtorch_cpu.so")
    assert Path(path).is_file() and _toolchain.loaded_libraries("libtorch_cp.so") == []
