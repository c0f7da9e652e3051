"""The `demotools` command line: the command group, and the options that commands share.

Each command is a thin function in `commands` that is imported when called, and imports its job only
inside: `demotools --help` answers at once, and no command waits for what another one needs.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

from demotools.errors import StoreError, exit_with_message, from_os_error, printable_text
from demotools.output import log_to_stderr

_GROUPS = {
    "Get data": ("get", ("fetch", "generate", "play", "convert", "import")),
    "Shape it": ("shape", ("select", "merge", "split", "shrink", "archive", "unarchive", "remove")),
    "Look at it": ("look", ("list", "info", "show", "report", "verify")),
    "Share it": ("share", ("export", "card", "push")),
}
"""The groups that `--help` shows: a module of `commands`, and its commands: `NAME_command`."""
_MODULES = {name: module for module, names in _GROUPS.values() for name in names}
# What people type who have not read the help; the tests list whole lines.
_GUESSES = {
    "fetch": "download get",
    "generate": "record gen",
    "select": "filter",
    "merge": "concat concatenate join combine cat",
    "shrink": "subset sample",
    "archive": "zip pack",
    "unarchive": "unzip unpack restore",
    "remove": "rm delete",
    "list": "ls levels",
    "info": "inspect describe",
    "show": "view watch",
    "verify": "check validate",
    "push": "upload publish",
}
_OPTION_GUESSES = {
    "overwrite": "force replace",
    "workers": "processes jobs num-workers num-processes",
    "episodes": "num-episodes count",
    "output": "out file",
    "min-len": "min-length",
    "max-len": "max-length",
    "first": "limit",
    "dedupe": "dedup drop-duplicates unique",
    "valid": "fraction",
    "name": "save record",
    "ended": "end ends outcome result",
    "solved": "success successful",
}
_COMMANDS = {guess: name for name, guesses in _GUESSES.items() for guess in guesses.split()}
_OPTIONS = {guess: name for name, guesses in _OPTION_GUESSES.items() for guess in guesses.split()}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        name = _COMMANDS.get(cmd_name, cmd_name)
        if name not in _MODULES:
            return None
        module = import_module(f"demotools.commands.{_MODULES[name]}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, (_module, names) in _GROUPS.items():
            with formatter.section(title):
                commands = [(name, self.get_command(ctx, name)) for name in names]
                rows = [
                    (name, command.get_short_help_str(200)) for name, command in commands if command
                ]
                formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        with exit_with_message():  # `--help` is printed here
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with exit_with_message():
            return super().invoke(ctx)


@click.group(
    cls=_Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: _OPTIONS.get(token, token),
    },
)
@click.version_option(None, "-V", "--version", package_name="demotools")
def main() -> None:
    """BabyAI demonstrations as memory-mapped Zarr stores.

    \b
    Example:
      demotools generate GoToLocal --episodes 1000
      demotools shrink --episodes 100
      demotools list
    """
    log_to_stderr()


Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Shell:
    """What every command gets: the folder of the stores, and what to print."""

    folder: Path
    quiet: bool
    as_json: bool

    def store(self, name: str) -> Path:
        """The folder of a store, given its name or its path."""
        from demotools.store.reading import store_path

        return store_path(name, self.folder)

    def new_store(self, name: str) -> Path:
        """The folder of a store that is to be made."""
        from demotools.store.reading import new_store_path

        return new_store_path(name, self.folder)

    def print(self, figures: Any, *lines: str) -> None:
        """What was done: for a program, for a person, or not at all."""
        if self.as_json:
            print_json(figures)
        elif not self.quiet:
            say(*lines)

    def print_result(self, result: Result) -> None:
        """The same of a job's own summary."""
        self.print(result, *result.text().split("\n"))


class Result(Protocol):
    """What a job has done, in lines for a person; its texts of others are printable."""

    def text(self) -> str:
        """The lines."""


def common(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every command has; it gets them as its first argument."""

    @click.option(
        "--data-dir",
        "folder",
        type=click.Path(file_okay=False, path_type=Path),
        show_default="$DEMOTOOLS_DATA, or the user's data folder",
        help="Folder of the stores.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON.")
    @click.option("-q", "--quiet", is_flag=True, help="Print no progress bar and no summary.")
    @functools.wraps(command)
    def with_shell(folder: Path | None, quiet: bool, as_json: bool, **options: Any) -> None:
        from demotools.output import data_folder

        command(Shell(data_folder(folder), quiet, as_json), **options)

    return with_shell


def on_workers(command: Command) -> Command:
    """The options that say which processes do the work; see `check_dask`."""
    workers = click.option(
        "-m",
        "--workers",
        type=click.IntRange(min=1),
        metavar="N",
        show_default="one per processor",
        help="Use N worker processes; any N gives the same result.",
    )
    dask = click.option(
        "--dask",
        metavar="ADDRESS",
        help="Use the Dask cluster at tcp://HOST:PORT instead (docs/cluster.md).",
    )
    return workers(dask(command))


def output_option(help_text: str, default: str, **settings: Any) -> Callable[[Command], Command]:
    """`-o`, for a command that writes a file; `default` says what happens without it."""
    kind = click.Path(path_type=Path, **settings)
    return click.option("-o", "--output", type=kind, show_default=default, help=help_text)


def name_option(
    without: str | bool, help_text: str = "Name of the store.", **settings: Any
) -> Callable[[Command], Command]:
    """`-o`, for a command that makes a store; `without` says what its name is otherwise."""
    return click.option(
        "-o", "--name", metavar="NAME", show_default=without, help=help_text, **settings
    )


def episodes_option(help_text: str, **settings: Any) -> Callable[[Command], Command]:
    """`-n`, a number of episodes from 1 on."""
    settings = {"type": click.IntRange(min=1), **settings}
    return click.option("-n", "--episodes", metavar="N", help=help_text, **settings)


def ended_option(help_text: str) -> Callable[[Command], Command]:
    """`--ended`, kinds of end of an episode."""
    return click.option("--ended", metavar="HOW,...", callback=_ends, help=help_text)


def _ends(
    _context: click.Context, _option: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    from demotools.store.episodes import ENDS

    alike = {"solved": "success", "failed": "failure", "truncated": "truncation"}
    names = [] if value is None else [alike.get(it, it) for it in listed(value)]
    for name in names:
        if name not in ENDS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(ENDS)}")
    return None if value is None else tuple(dict.fromkeys(names))


def listed(value: str) -> list[str]:
    """The words of a list such as `pickup,toggle`."""
    return value.replace(",", " ").split()


def split_option(without: str | bool, **settings: Any) -> Callable[[Command], Command]:
    """`--split`; `without` says what it is otherwise."""
    kind = click.Choice(["train", "valid"])
    return click.option(
        "--split", type=kind, show_default=without, help="Split of the store.", **settings
    )


overwrite_store = click.option(
    "--overwrite", is_flag=True, help="Replace an existing store of this name."
)
overwrite_file = click.option(
    "--overwrite", is_flag=True, help="Replace an existing file of this name."
)
stores_argument = click.argument("stores", nargs=-1, required=True, metavar="STORE...")


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
        raise click.UsageError("--workers cannot be combined with --dask")


def confirmed(question: str, path: Path) -> bool:
    """What the user answers; StoreError where nobody can be asked."""
    try:
        return click.confirm(question)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        say()
        raise StoreError(
            "the question was not answered, so nothing was removed",
            path=path,
            fix="add --yes to remove without being asked",
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
    """Print a value for a program to read: JSON values, dataclasses, paths, ranges."""

    def plain(other: Any) -> object:
        if is_dataclass(other) and not isinstance(other, type):
            return asdict(other)
        if isinstance(other, range):
            return [other.start, other.stop]
        if isinstance(other, Path):
            return str(other)
        raise TypeError(f"a {type(other).__name__} is no JSON value")

    # the one control character that JSON leaves as it is
    text = json.dumps(value, indent=2, default=plain).replace("\x7f", "\\u007f")
    say(*text.split("\n"))
