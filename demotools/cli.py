"""The `demotools` command line: a group whose commands are imported when they are called.

Each is a thin module of `commands`, and imports its job only inside: so `demotools --help` answers
at once, and no command waits for what another one needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from demotools.errors import exit_with_message

_MODULES = {
    **{name: name for name in ("archive", "card", "convert", "diff", "export", "fetch")},
    **{name: name for name in ("generate", "info", "list", "push", "remove", "report", "show")},
    **{name: name for name in ("shrink", "unarchive", "verify")},
    "import": "import_minari",
}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _MODULES:
            return None
        module = import_module(f"demotools.commands.{_MODULES[cmd_name]}")
        command: click.Command = module.command
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
