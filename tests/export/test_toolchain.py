"""The compiler and the libraries that a package is built with."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tsa_compile import ConfigError
from tsa_compile.export import _toolchain, aoti, export_program

from ..support import Attention, difference, heads
from .support import QUICK, SMALL


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


@pytest.mark.slow
def test_a_compiler_with_only_the_static_cpp_library(tmp_path, monkeypatch):
    """As one that was moved: it linked a second libstdc++ into the package, which then crashed at its first use."""
    static = Path(subprocess.run(["g++", "-print-file-name=libstdc++.a"], capture_output=True, text=True).stdout.strip())
    if not static.is_absolute():
        pytest.skip("g++ has no static library here: there is none that could be linked by mistake")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libstdc++.a").symlink_to(static)
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\nexec g++ -B{tmp_path}/lib/ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    config = SMALL.replace(layers=(0,))
    program = export_program(Attention().eval(), heads(length=40), config, dynamic_lengths=(16, 200))
    inputs = heads(length=50)
    result = aoti.load(aoti.save(program, tmp_path / "model.pt2", **QUICK))(*inputs)
    assert difference(result, program.module()(*inputs)) < 1e-5
