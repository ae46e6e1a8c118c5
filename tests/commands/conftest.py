"""A model folder, a calibration and a report, for the commands that take or give one."""

import json

import pytest

from tsa_compile import RewriteReport, shapes

from .support import QUICK, TINY, run


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


@pytest.fixture(scope="module")
def report():
    """What `explain TINY QUICK` really finds."""
    done = run("explain", *TINY, *QUICK, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    return RewriteReport.from_json(json.loads(done.stdout)["report"])


@pytest.fixture
def traced(report, monkeypatch):
    """In place of tracing: the report above, for tests of what is around it. The configurations that were asked for."""
    asked = []

    def explain_weightless(model_config, length, config, **options):
        asked.append(config)
        return report

    monkeypatch.setattr(shapes, "explain_weightless", explain_weightless)
    return asked
