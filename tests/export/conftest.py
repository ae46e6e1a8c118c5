"""Exports of small models, whose operators hardly repeat."""

from collections.abc import Iterator

import pytest
import torch._dynamo.config


@pytest.fixture(scope="module", autouse=True)
def without_remembered_shapes() -> Iterator[None]:
    """What an operator makes of a shape is computed anew: with symbolic sizes, of which an export consists, remembering it
    takes longer than computing it, and so does looking it up. Other tests export with torch's default."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield
