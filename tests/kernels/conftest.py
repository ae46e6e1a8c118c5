"""Where the Triton kernels run: on the GPU if there is one (marker `gpu`), else in Triton's interpreter on the CPU."""

import pytest
import torch

from tsa_compile.kernels.registry import names, register, unregister


@pytest.fixture
def poisoned_empty():
    """torch.empty hands out NaN, so that a row which nobody writes, or which somebody reads too much, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request, poisoned_empty):
    """The device of the tensors that a launcher is called with, which finds NaN in what it allocates."""
    pytest.importorskip("triton")
    if request.param == "cuda":
        return "cuda"
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    return "cpu"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The device of the tensors that an op is called with."""
    return request.param


@pytest.fixture
def own_kernel():
    """Registers kernels for the length of a test."""
    added = []

    def add(kernel):
        added.append(register(kernel).name)
        return kernel

    yield add
    for name in added:
        if name in names():
            unregister(name)
