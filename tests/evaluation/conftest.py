"""A tokenizer and a model of two layers, once for a module."""

import pytest

from .small import llama, tokenizer


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.fixture(scope="module")
def model():
    return llama()
