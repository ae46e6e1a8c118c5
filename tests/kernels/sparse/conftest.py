"""The block-sparse kernels are registered while these tests run; before and after only if the package does it itself."""

import pytest

from tsa_compile import pipeline
from tsa_compile.kernels import registry

assert pipeline.OPS
_before = registry.names()

from tsa_compile.kernels import sparse  # noqa: E402

assert sparse.PRIORITY < 0
_added = [registry.get(name) for name in registry.names() if name not in _before]
for _kernel in _added:
    registry.unregister(_kernel.name)


@pytest.fixture(autouse=True, scope="module")
def registered_kernels():
    for kernel in _added:
        registry.register(kernel)
    yield
    for kernel in _added:
        registry.unregister(kernel.name)
