"""What an AOTInductor package is compiled and linked with: where PyTorch runs, less is installed than its C++ asks for."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsa_compile.errors import ConfigError

_HEADERS = ("cuda.h", "cuda_runtime_api.h")
_CPP_LIBRARY = "libstdc++.so.6"


def require_compiler() -> None:
    """ConfigError where there is no C++ compiler, which AOTInductor says only inside a long traceback."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise ConfigError("no C++ compiler was found, which AOTInductor needs: install g++ or clang, or set CXX") from error


@contextmanager
def toolchain(device: str) -> Iterator[list[str]]:
    """Lets the linker find the libraries that this process has loaded, and the compiler CUDA's headers.

    Yields the libraries to name to the linker besides its own, as `-l` takes them. They are PyTorch's C++ library: a
    compiler that finds only the static one (one that was moved from where it was installed) would put a second copy of it
    into the package, and as the two share some of their symbols and not others, the package crashes when it is loaded.
    A driver installs libcuda.so.1 alone, where the linker wants libcuda.so.

    Raises:
        ConfigError: a CUDA package, and no headers of CUDA.
    """
    with tempfile.TemporaryDirectory() as folder, _cuda_headers(device):
        for name, link in (("libcuda.so", "libcuda.so"), ("libstdc++.so", _CPP_LIBRARY)):
            for path in loaded_libraries(name)[:1]:
                os.symlink(path, Path(folder) / link)
        before = os.environ.get("LIBRARY_PATH")
        os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, (folder, before)))
        try:
            yield [f":{_CPP_LIBRARY}"] if (Path(folder) / _CPP_LIBRARY).exists() else []
        finally:
            if before is None:
                del os.environ["LIBRARY_PATH"]
            else:
                os.environ["LIBRARY_PATH"] = before


@contextmanager
def _cuda_headers(device: str) -> Iterator[None]:
    """CUDA's headers, also where no toolkit is installed: PyTorch's wheels bring them along, and no nvcc is needed."""
    from torch.utils import cpp_extension

    before = cpp_extension.CUDA_HOME
    if device == "cuda" and before is None:
        found = (path for path in _cuda_candidates() if all((path / "include" / name).is_file() for name in _HEADERS))
        home = next(map(str, found), None)
        if home is None:
            raise ConfigError(
                f"a CUDA package is compiled with {' and '.join(_HEADERS)}, which were not found: pip install "
                "nvidia-cuda-runtime, or set CUDA_HOME to a CUDA toolkit"
            )
        cpp_extension.CUDA_HOME = home
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = before


def _cuda_candidates() -> list[Path]:
    """Where wheels put CUDA's headers: NVIDIA's of CUDA 13 and of 12, and Triton's."""
    roots = [Path(entry) for entry in sys.path if entry.endswith("packages")]
    places = ("nvidia/cu13", "nvidia/cu12", "nvidia/cuda_runtime", "triton/backends/nvidia")
    return [root / place for root in roots for place in places]


def loaded_libraries(name: str) -> list[str]:
    """Full paths of a library that this process has loaded, as CUDA's driver is once a tensor is on a GPU."""
    maps = Path("/proc/self/maps")
    paths = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    return sorted(path for path in paths if re.search(rf"/{re.escape(name)}(\.\d+)*$", path))
