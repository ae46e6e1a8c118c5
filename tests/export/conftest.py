"""What the export tests share."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "tensorrt: needs TensorRT and torch-tensorrt; skipped where they are not installed")
