"""The `demotools` command line: one thin function per command; the work is in the job modules.

Job modules are imported inside the commands, so that `demotools --help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from demotools.errors import exit_with_message
from demotools.store import data_folder

Command = TypeVar("Command", bound=Callable[..., Any])


class _Group(click.Group):
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


def _common(command: Command) -> Command:
    """The options that every command has."""
    folder = click.option(
        "--data-dir",
        "folder",
        type=click.Path(file_okay=False, path_type=Path),
        callback=lambda _ctx, _param, value: data_folder(value),
        help="Folder of the stores [default: $DEMOTOOLS_DATA, else the user's data folder].",
    )
    quiet = click.option("--quiet", "-q", is_flag=True, help="No progress bar, no summary.")
    return folder(quiet(command))


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine to read.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace a store of the same name.")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))
