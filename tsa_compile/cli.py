"""The command `tsa-compile`: explain, calibrate, bench, export, eval. See `tsa-compile --help`.

Nothing heavy is imported before a command runs, so that help and usage errors come at once.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from tsa_compile.commands import bench, calibrate, evaluate, explain, export
from tsa_compile.commands.errors import Commands
from tsa_compile.commands.output import result

app = typer.Typer(
    name="tsa-compile",
    cls=Commands,
    help="Token Sparse Attention for transformers models: what it would do, which layers, how fast, how accurate.\n\n"
    "Every command takes a model folder, or --shape with random weights: tiny, llama-3.1-8b, qwen3-8b, ...",
    epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted.",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

COMMANDS = {
    "explain": explain.explain,
    "calibrate": calibrate.calibrate,
    "bench": bench.bench,
    "export": export.export,
    "eval": evaluate.evaluate,
}
for _name, _command in COMMANDS.items():
    app.command(_name, epilog=_command.epilog)(_command)


def _version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        result(f"tsa-compile {version('tsa-compile')}")
    except PackageNotFoundError:
        result("tsa-compile, not installed")
    raise typer.Exit()


@app.callback()
def common(
    show: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version.")] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """The entry point of `tsa-compile`."""
    app(prog_name="tsa-compile")
