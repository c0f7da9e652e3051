"""The `demotools` command line: a group whose commands are imported when called, and their options.

Each is a thin function in `commands`, and imports its job only inside: so `demotools --help`
answers at once, and no command waits for what another one needs.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import click

from demotools.errors import StoreError, exit_with_message, from_os_error, printable_text

_MODULES = {
    "get": ("fetch", "generate", "convert", "import"),
    "shape": ("shrink", "remove"),
    "look": ("list", "info", "show", "report", "verify"),
    "share": ("export", "archive", "unarchive", "card", "push"),
}
"""The modules of `commands`, and the commands in each: `NAME_command`."""
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(_PLACES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _PLACES:
            return None
        module = import_module(f"demotools.commands.{_PLACES[cmd_name]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def invoke(self, ctx: click.Context) -> Any:
        with exit_with_message():
            return super().invoke(ctx)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="demotools")
def main() -> None:
    """BabyAI demonstrations as memory-mapped Zarr stores.

    \b
    Example:
      demotools generate GoToLocal --episodes 1000
      demotools shrink --episodes 100
      demotools list
    """


Command = TypeVar("Command", bound=Callable[..., Any])


def _data_folder(_context: click.Context, _option: click.Parameter, value: Path | None) -> Path:
    from demotools.output import data_folder

    return data_folder(value)


def common(command: Command) -> Command:
    """The options that every command has."""
    folder = click.option(
        "--data-dir",
        "folder",
        type=click.Path(file_okay=False, path_type=Path),
        callback=_data_folder,
        help="Folder of the stores [default: $DEMOTOOLS_DATA, else the user's data folder].",
    )
    quiet = click.option("--quiet", "-q", is_flag=True, help="No progress bar, no summary.")
    return folder(quiet(command))


json_output = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON for a machine to read."
)
dask_address = click.option(
    "--dask", metavar="ADDRESS", help="Use the Dask cluster at tcp://HOST:PORT (docs/cluster.md)."
)
overwrite_store = click.option(
    "--overwrite", is_flag=True, help="Replace a store of the same name."
)


@contextmanager
def lasting_imports() -> Iterator[None]:
    """What is imported inside is never looked through for garbage, nor copied by a fork for that.

    A seventh of a short conversion went into such searches (docs/log.md).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def check_dask(dask: str | None, workers: int | None) -> None:
    """Click's own error for options that do not go together."""
    if dask and workers:
        raise click.UsageError("--workers goes without --dask")


def confirmed(question: str, path: Path) -> bool:
    """What the user answers; StoreError where nobody can be asked."""
    try:
        return click.confirm(question)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        say()
        raise StoreError(
            "nobody answered the question, so nothing was removed",
            path=path,
            fix="say --yes to remove without being asked",
        ) from None


def say(*lines: str) -> None:
    """Print lines of text, with escapes for all in them that is not printable.

    DemotoolsError  they cannot be written: standard output is a file on a full disk, say
    """
    try:
        click.echo("\n".join(printable_text(line, None) for line in lines))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise from_os_error(error, "standard output") from error


def print_json(value: Any) -> None:
    """Print a value for a machine to read."""
    # the one control character that JSON leaves as it is
    text = json.dumps(value, indent=2, default=str).replace("\x7f", "\\u007f")
    say(*text.split("\n"))
