"""What the tests of the command line share."""

from typer.testing import CliRunner

from tsa_compile.cli import COMMANDS, app

QUICK = ["--length", "40", "--window", "4", "--min-tokens", "4", "--no-predict"]
TINY = ["--shape", "tiny", "--layers", "2"]


def run(*arguments, **environment):
    """A command in this process, on the CPU unless a device is named."""
    if arguments and arguments[0] in COMMANDS and not {"--device", "--help"} & set(arguments):
        arguments = (*arguments, "--device", "cpu")
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb", **environment})


def fails(code, *arguments):
    """The one line on stderr of a command that ends with this code, and writes nothing to stdout."""
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]
