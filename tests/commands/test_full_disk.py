"""A full disk: one line, exit code 1, and what was there before stays."""

import os
import subprocess
import sys

import pytest

from .support import QUICK, TINY

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits the sizes of files")

SMALL = ["--shape", "tiny", "--layers", "1"]
EXPORT = ["export", *SMALL, "--lengths", "64", "128", "--budget", "keep:0.5", "--min-length", "1"]
WRITERS = {
    "report.json": ["explain", *TINY, *QUICK, "--out"],
    "drift.png": ["calibrate", *TINY, "--length", "64", "--figure"],
    "model.pt2": [*EXPORT, "--out"],
    "model.onnx": [*EXPORT, "--format", "onnx", "--out"],
    "package.pt2": [*EXPORT, "--format", "aoti", "--out"],
}


@pytest.fixture
def limited(tmp_path):
    """A command in a process in which no file may grow beyond some bytes, on top of a file that is there."""

    def limit():
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))

    def run(name):
        path = tmp_path / name
        path.write_text("precious")
        command = [sys.executable, "-P", "-c", "from tsa_compile.cli import main; main()", *WRITERS[name], str(path)]
        environment = {
            **os.environ,
            "COLUMNS": "200",
            "TERM": "dumb",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
            "PYTHONDONTWRITEBYTECODE": "1",  # cut off at the limit, a module's bytecode would fail every later process
        }
        done = subprocess.run(
            [*command, "--device", "cpu"], preexec_fn=limit, env=environment, capture_output=True, text=True, check=False
        )
        return path, done

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_what_was_there_stays(name, limited):
    path, done = limited(name)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "File too large" in last and "free some space" in last
    assert "report it" not in last and "Traceback" not in done.stderr
    assert path.read_text() == "precious"
    assert not [file.name for file in path.parent.iterdir() if file.name.startswith(".")]
