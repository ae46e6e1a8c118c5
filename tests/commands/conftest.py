"""A model folder and a calibration, for the commands that take one."""

import pytest

from tsa_compile import shapes

from .support import TINY, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("models") / "my-llama"
    shapes.build(shapes.model_config("tiny", layers=2)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrations") / "layers.json"
    done = run("calibrate", *TINY, "--random", "1", "--length", "16", "--out", str(path))
    assert done.exit_code == 0, done.output
    return path
