"""A full disk: one line, exit code 1, and what was there before stays."""

import json
import os
import subprocess
import sys

import pytest

from .support import QUICK, TINY

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits the sizes of files")

SMALL = ["--shape", "tiny", "--layers", "1"]
# No sparse layer, whose steps the compilers would take long for: what is tested is how files are written.
EXPORT = ["export", *SMALL, "--lengths", "64", "128", "--sparse-layers", "none"]
WRITERS = {
    "report.json": ["explain", *TINY, *QUICK, "--out"],
    "drift.png": ["calibrate", *TINY, "--length", "64", "--figure"],
    "model.pt2": [*EXPORT, "--out"],
    "model.onnx": [*EXPORT, "--format", "onnx", "--out"],
    "package.pt2": [*EXPORT, "--format", "aoti", "--out"],
}


FORKS = """
import json, os, resource, signal, sys
import torch, transformers
from tsa_compile.cli import main
from tsa_compile.commands import export

make, programs = export._program, []


def program(*given):  # the same for all exports: what is written to the disk differs, and that is what is tested
    programs or programs.append(make(*given))
    return programs[0]


def unlimited(arguments):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def run(arguments):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
    return unlimited(arguments)


def forked(arguments):
    pipes = {stream: os.pipe() for stream in (1, 2)}
    child = os.fork()
    if child == 0:
        for stream, (_, end) in pipes.items():
            os.dup2(end, stream)
        code = 70
        try:
            code = run(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    for _, end in pipes.values():
        os.close(end)
    said = [open(end).read() for end, _ in pipes.values()]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *said]


export._program = program
first, *commands = json.loads(sys.argv[1])
assert unlimited(first) == 0
print(json.dumps([forked(arguments) for arguments in commands]))
"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """Each command, on top of a file that is there, in a process in which no file may grow beyond some bytes: by name, the
    path and (exit code, stdout, stderr). One process imports torch and exports the model, without a limit, and each command
    runs in a fork of it."""
    folder = tmp_path_factory.mktemp("full")
    paths = {name: folder / name.replace(".", "-") / name for name in WRITERS}
    for path in paths.values():
        path.parent.mkdir()
        path.write_text("precious")
    commands = [[*WRITERS[name], str(path), "--device", "cpu"] for name, path in paths.items()]
    environment = {
        **os.environ,
        "COLUMNS": "200",
        "TERM": "dumb",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        # In an empty cache Inductor would first try out every vector extension and compile its headers.
        "TORCHINDUCTOR_VEC_ISA_OK": "0",
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        "PYTHONDONTWRITEBYTECODE": "1",  # cut off at the limit, a module's bytecode would fail every later process
    }
    first = [*EXPORT, "--out", str(folder / "first.pt2"), "--device", "cpu"]
    command = [sys.executable, "-P", "-c", FORKS, json.dumps([first, *commands])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])  # behind what the first export says
    return dict(zip(WRITERS, zip(paths.values(), results, strict=True), strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", WRITERS)
def test_what_was_there_stays(name, limited):
    path, (code, stdout, stderr) = limited[name]
    assert (code, stdout) == (1, ""), stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("error: ") and "File too large" in last and "free some space" in last
    assert "report it" not in last and "Traceback" not in stderr
    assert path.read_text() == "precious"
    assert not [file.name for file in path.parent.iterdir() if file.name.startswith(".")]
