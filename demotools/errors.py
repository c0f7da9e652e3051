"""Every failure a user can cause.

    DemotoolsError          what happened, which file, what to do next
    ├── FetchError          the network, a server, a downloaded file
    ├── PickleError         a legacy pickle that is damaged or not a demo file
    │   └── UnsafePickleError   a pickle that names something outside the allow-list
    ├── StoreError          a demo store: missing, unfinished, damaged, of another version
    ├── ManifestError       an unknown level, a manifest that does not parse
    ├── LevelError            a level without an environment, a bot that cannot solve it
    ├── SettingsError       a training file: unknown key, wrong value
    └── CheckpointError     a checkpoint: missing, damaged, of another network or vocabulary

Each is raised by the first line that knows all three parts; only the command lines print them.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pydantic import ValidationError


def printable_text(text: object, at_most: int | None = 4096) -> str:
    """The text on one line, safe to print: what is not printable becomes an escape.

    Texts of others (a store, a file name, a server's answer) can hold escape sequences that
    rewrite the terminal, line ends that forge messages, and marks that turn the direction of
    writing; bytes of file names that are no UTF-8 cannot be printed at all.

    at_most   characters; what is longer is cut

    >>> printable_text("go to\\x1b[2J the\\nball")
    'go to\\\\x1b[2J the\\\\nball'
    """
    shown = str(text)
    if at_most is not None and len(shown) > at_most:
        shown = shown[: at_most - 3] + "..."
    if shown.isprintable():
        return shown
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in shown)


def printable_values(value: Any) -> Any:
    """JSON values with every text in them as `printable_text`, the keys of tables, too."""
    if isinstance(value, str):
        return printable_text(value)
    if isinstance(value, dict):
        return {printable_values(key): printable_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable_values(item) for item in value]
    return value


class DemotoolsError(Exception):
    """A failure in three parts: what happened, which file (or level, or key), what to do next."""

    def __init__(self, what: str, *, path: Path | str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.path = str(path)
        self.fix = fix

    def __str__(self) -> str:
        what, path, fix = map(printable_text, (self.what, self.path, self.fix))
        return f"{what}\n  where: {path}\n  next:  {fix}"

    def __reduce__(self) -> tuple[object, ...]:
        # keyword-only arguments do not survive the default pickling between processes
        return partial(type(self), path=self.path, fix=self.fix), (self.what,)


class FetchError(DemotoolsError):
    """The network, a server, or a downloaded file."""


class PickleError(DemotoolsError):
    """A legacy pickle that is damaged or is not a demo file."""


class UnsafePickleError(PickleError):
    """A pickle that names something outside the allow-list; nothing of it was run."""


class StoreError(DemotoolsError):
    """A demo store that is missing, unfinished, damaged or of another version."""


class ManifestError(DemotoolsError):
    """An unknown level, or a manifest that does not parse."""


class LevelError(DemotoolsError):
    """A level without an environment, or one that the bot cannot solve."""


class SettingsError(DemotoolsError):
    """A training file with an unknown key or a wrong value."""


class CheckpointError(DemotoolsError):
    """A checkpoint that is missing, damaged, or of another network or vocabulary."""


MISSING = "it is missing"
_RULES = {
    "missing": MISSING,
    "extra_forbidden": "there is no such key",
    **dict.fromkeys(
        ("int_type", "int_parsing", "int_from_float", "int_parsing_size"),
        "it must be a whole number",
    ),
    **dict.fromkeys(("float_type", "float_parsing"), "it must be a number"),
    "finite_number": "it must be a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "it must be true or false"),
    "string_type": "it must be a string",
    **dict.fromkeys(
        ("dict_type", "model_type", "model_attributes_type"),
        "it must be {table}",
    ),
    **dict.fromkeys(("list_type", "tuple_type"), "it must be a list"),
    "greater_than": "it must be above {gt:g}",
    "greater_than_equal": "it must be at least {ge:g}",
    "less_than": "it must be below {lt:,}",
    "less_than_equal": "it must be at most {le:,}",
    "literal_error": "it must be {expected}",
    **dict.fromkeys(("too_short", "string_too_short"), "it must not be empty"),
    "string_pattern_mismatch": "it must match `{pattern}`",
    "json_invalid": "it is not JSON: {error}",
}
"""What pydantic found, by its own names."""
Syntax = Literal["toml", "json", "python"]
_TABLES: dict[Syntax, str] = {
    "toml": "a section, or a table as in `{key = value}`",
    "json": 'an object as in `{"key": value}`',
    "python": "a dictionary",
}
"""What a mapping is called in a file of each syntax; `python` is that of checkpoints."""


def in_our_words(problem: Mapping[str, Any], syntax: Syntax) -> str:
    """What one of pydantic's errors says.

    syntax   of the file that holds the value

    >>> problem = {"type": "greater_than", "ctx": {"gt": 0}, "msg": "Input should be…"}
    >>> in_our_words(problem, "toml")
    'it must be above 0'
    """
    rule = _RULES.get(problem["type"])
    if rule is not None:
        return rule.format(**problem.get("ctx", {}), table=_TABLES[syntax])
    return str(problem["msg"]).removeprefix("Value error, ")


def first_problem(error: ValidationError, syntax: Syntax) -> tuple[str, str]:
    """Where the first thing stands that pydantic found wrong, as `a.b`, and what it is.

    syntax   of the file that holds it
    """
    problem = error.errors(include_url=False, include_input=False)[0]
    return ".".join(map(str, problem["loc"])) or "its top level", in_our_words(problem, syntax)


def from_os_error(error: OSError, path: Path | str) -> DemotoolsError:
    """An operating-system failure (disk full, read-only, missing) in three parts."""
    fixes = {
        errno.ENOSPC: "free some space, or name another folder with --data-dir (or -o)",
        errno.EDQUOT: "free some of your quota, or name another folder with --data-dir (or -o)",
        errno.EROFS: "name a writable folder with --data-dir (or -o)",
        errno.EACCES: "check the permissions, or name another folder with --data-dir (or -o)",
        errno.EPERM: "check the permissions, or name another folder with --data-dir (or -o)",
        errno.ENOENT: "check the spelling of the path",
        errno.EISDIR: "name a file, not a folder",
        errno.ENOTDIR: "part of this path is a file, not a folder; name another folder",
    }
    what = (error.strerror or str(error)).lower()
    where = error.filename if error.filename is not None else path
    fix = fixes.get(error.errno or 0, "check the path and try again")
    return DemotoolsError(what, path=str(where), fix=fix)


@contextmanager
def os_refusals(path: Path | str) -> Iterator[None]:
    """What the operating system refuses inside becomes a DemotoolsError."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, path) from error


def installing(extra: str) -> str:
    """How to install the packages of an extra: demotools is not on PyPI."""
    return f"in your checkout of demotools, run pip install -c constraints.txt '.[{extra}]'"


def optional_package(name: str, extra: str, *parts: str) -> Any:
    """The package `name`, which the extra EXTRA installs.

    parts   modules of it that it does not import by itself

    DemotoolsError  it, or something that it needs, is not installed
    """
    try:
        for part in parts:
            import_module(f"{name}.{part}")
        return import_module(name)
    except ImportError as error:
        raise DemotoolsError(
            f"the package {error.name or name} is not installed",
            path=name,
            fix=installing(extra),
        ) from error


@contextmanager
def exit_with_message() -> Iterator[None]:
    """For the two command lines: a failure becomes its message and exit code 1, Ctrl-C 130.

    The notes of a KeyboardInterrupt say what is kept of the work.
    """
    _prepare_streams()
    try:
        yield
    except BrokenPipeError:
        # the reader of our output (`| head`) has gone: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (DemotoolsError, OSError, MemoryError, RecursionError) as error:
        if not isinstance(error, DemotoolsError) and hasattr(error, "__notes__"):
            raise  # of the user's own code, which a note names
        sys.stderr.write(f"error: {_in_three_parts(error)}\n")
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        line = "; ".join(["interrupted", *getattr(error, "__notes__", [])])
        sys.stderr.write(f"\n{line}\n")
        raise SystemExit(130) from None


def _in_three_parts(error: BaseException) -> DemotoolsError:
    if isinstance(error, DemotoolsError):
        return error
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if isinstance(error, OSError):
        return from_os_error(error, command)
    if isinstance(error, MemoryError):
        what = f"out of memory: {error}".removesuffix(": ")
        fix = "close other programs or use fewer workers; a damaged file can also ask for too much"
    else:
        what = f"the data are nested too deeply to be read: {error}"
        fix = "get the file again; demotools writes no file that is nested this deeply"
    return DemotoolsError(what, path=command, fix=fix)


def _prepare_streams() -> None:
    """Let every text be printed, whatever the encoding; give a closed stream a place to go."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            # the shell closed it (`2>&-`); it stays open as long as the process: nothing to close
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            # the bytes of a file name that are no UTF-8 are lone surrogates here
            stream.reconfigure(errors="backslashreplace")
