"""Files are written whole or not at all; what is read is named where it is wrong."""

import os
import stat
import subprocess
import sys
import textwrap

import pytest
import torch

from tsa_compile.errors import ConfigError, WriteError
from tsa_compile.files import read_json, replacing, save_figure, stream, write

FULL = "/dev/full"  # every write to it fails as on a full disk


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_nothing_stays_beside_it(tmp_path):
    write(tmp_path / "a.json", "first")
    write(tmp_path / "a.json", b"second")
    assert (tmp_path / "a.json").read_text() == "second" and listing(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a fault"), KeyboardInterrupt()])
def test_what_was_there_stays_where_anything_goes_wrong(error, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("precious")
    with pytest.raises((WriteError, RuntimeError, KeyboardInterrupt)), replacing(path) as beside:
        beside.write_text("half of")
        raise error
    assert path.read_text() == "precious" and listing(tmp_path) == ["model.onnx"]


def test_files_that_belong_together_come_together(tmp_path):
    """A model and its weights, which it names."""
    with replacing(tmp_path / "model.onnx") as beside:
        assert beside.name == "model.onnx"
        beside.write_text("model.onnx.data")
        beside.with_name("model.onnx.data").write_text("weights")
        assert not (tmp_path / "model.onnx").exists()
    assert listing(tmp_path) == ["model.onnx", "model.onnx.data"]


def test_permissions_and_links_stay(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "real.json").chmod(0o640)
    (tmp_path / "link.json").symlink_to("real.json")
    write(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real.json").stat().st_mode) == 0o640


@pytest.mark.skipif(not os.path.exists(FULL), reason="needs /dev/full")
def test_a_device_is_written_to_and_stays_one():
    write(os.devnull, "text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(WriteError, match=r"'/dev/full' could not be written \(No space left on device\).*free some space"):
        write(FULL, "text")


def test_where_nothing_can_be_written(tmp_path):
    for path in (tmp_path / "none" / "a.json", tmp_path, tmp_path / ("a" * 300)):
        with pytest.raises(ConfigError, match=r"cannot be written .*choose another path"):
            write(path, "text")
    assert listing(tmp_path) == []


def test_the_disk_of_a_compilers_files_is_named(tmp_path):
    """Not the file that would have been written."""
    said = r"'/scratch/x.cpp' could not be written.*what was at '.*model.pt2' is as it was"
    with pytest.raises(WriteError, match=said), replacing(tmp_path / "model.pt2"):
        raise OSError(28, "No space left on device", "/scratch/x.cpp")


def test_a_figure_of_no_format(tmp_path):
    from matplotlib.figure import Figure

    with pytest.raises(ConfigError, match=r"figure.doc' cannot be written \(.*choose another name, as figure.png"):
        save_figure(Figure(), tmp_path / "figure.doc")
    assert listing(tmp_path) == []


class Leaking:
    """A file on a disk with little space."""

    def __init__(self, file, space):
        self.file, self.space = file, space

    def write(self, data):
        self.space -= len(data)
        if self.space < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("space", [0, 100, 1000])
def test_torchs_archives_fail_in_python(space, tmp_path):
    """Its writer in C++ ends the process where a write fails, to a path or in a Python file."""
    path = tmp_path / "tensors.pt"
    path.write_text("precious")
    with pytest.raises(WriteError, match=r"tensors.pt' could not be written \(No space left"), stream(path) as file:
        file.file = Leaking(file.file, space)
        torch.save(torch.arange(1000), file)
    assert path.read_text() == "precious" and listing(tmp_path) == ["tensors.pt"]


def test_torchs_archives(tmp_path):
    with stream(tmp_path / "tensors.pt") as file:
        torch.save(torch.arange(1000), file)
    assert torch.equal(torch.load(tmp_path / "tensors.pt"), torch.arange(1000))


@pytest.mark.skipif(sys.platform == "win32", reason="limits the sizes of files")
def test_a_limit_on_file_sizes(tmp_path):
    """A process of its own, in which no file may grow beyond 4 KiB."""
    source = """
        import resource, signal, sys, torch
        from tsa_compile.errors import WriteError
        from tsa_compile.files import stream, write

        def save_text(path):
            write(path, "x" * 5000)

        def save_tensor(path):
            with stream(path) as file:
                torch.save(torch.zeros(5000), file)

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for save in (save_text, save_tensor):
            try:
                save(sys.argv[1])
            except WriteError as error:
                print("File too large" in str(error))
    """
    path = tmp_path / "a.pt"
    path.write_text("precious")
    command = [sys.executable, "-P", "-c", textwrap.dedent(source), str(path)]
    whole = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # bytecode cut off at the limit would fail later processes
    done = subprocess.run(command, env=whole, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["True", "True"]), done.stderr
    assert path.read_text() == "precious"


NO_JSON = {"empty": "", "half": "{", "deep": "[" * 100_000, "a number of thousands of digits": "1" * 5000}


@pytest.mark.parametrize("kind", NO_JSON)
def test_what_is_no_json(kind, tmp_path):
    (tmp_path / "a.json").write_text(NO_JSON[kind])
    with pytest.raises(ConfigError, match=r"a\.json' is not JSON .*: write it again"):
        read_json(tmp_path / "a.json", "write it again")
