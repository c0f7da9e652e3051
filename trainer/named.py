"""Things named in settings: ours by a short name, the user's by `package.module:Name`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from demotools.errors import DemotoolsError, SettingsError

T = TypeVar("T")
FOREIGN = (Exception, SystemExit)
"""What code that is not ours may raise: anything, and none of it is a bug of the trainer."""

_DOTTED = r"[^\W\d]\w*(\.[^\W\d]\w*)*"


def build(
    kind: str,
    name: str,
    options: Mapping[str, Any],
    ours: Mapping[str, Callable[..., T]],
    *arguments: object,
) -> T:
    """What `name` makes of `arguments` and `options`.

    kind       what it is, for messages: "loss", "network"
    name       a key of `ours`, else `package.module:Name`
    arguments  what we hand over; `options` are the user's keys

    SettingsError  nothing of that name, an option it does not take, or it fails
    """
    maker = find(kind, name, ours)
    try:
        parameters = inspect.signature(maker).parameters
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"the {kind} does not say what it takes: {told(error)}",
            path=f"type = {name!r}",
            fix="name a function or class that is written in Python",
        ) from error
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = list(parameters)[len(arguments) :]
    for option in options:
        if option not in given and not anything:
            near = difflib.get_close_matches(option, given, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(given) or 'none'}"
            raise SettingsError(f"unknown key `{option}`", path=f"{kind} {name}", fix=hint)
    try:
        return maker(*arguments, **options)
    except DemotoolsError:
        raise
    except FOREIGN as error:
        raise SettingsError(
            f"the {kind} refuses its settings: {told(error)}",
            path=f"{kind} {name}",
            fix="correct the keys beside its type",
        ) from error


def find(kind: str, name: str, ours: Mapping[str, Callable[..., T]]) -> Callable[..., T]:
    """What makes the thing of this name; SettingsError where there is none."""
    if name in ours:
        return ours[name]
    module, colon, attributes = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, ours, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"ours are {', '.join(ours)}"
        raise SettingsError(
            f"there is no {kind} of the name `{name}`",
            path=f"type = {name!r}",
            fix=f"{hint}; your own is named as `package.module:Name`",
        )
    if not re.fullmatch(_DOTTED, module) or not re.fullmatch(_DOTTED, attributes):
        raise SettingsError(
            f"`{name}` names nothing that can be imported",
            path=f"type = {name!r}",
            fix="write it as `package.module:Name`",
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # a module that lies where the command is run
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except FOREIGN as error:
        raise SettingsError(
            f"the {kind} cannot be imported: {told(error)}",
            path=f"type = {name!r}",
            fix="install the package, run the command in the folder of the module, or correct it",
        ) from error
    if not callable(found):
        raise SettingsError(
            f"the {kind} is not callable but {type(found).__name__}",
            path=f"type = {name!r}",
            fix="name a function or a class",
        )
    maker: Callable[..., T] = found
    return maker


def demand(kind: str, name: str, thing: object, wanted: type[T]) -> T:
    """What `name` made; SettingsError where it is not of the class that is wanted."""
    if isinstance(thing, wanted):
        return thing
    raise SettingsError(
        f"the {kind} gives {type(thing).__name__}, not a {wanted.__module__}.{wanted.__name__}",
        path=f"type = {name!r}",
        fix="correct what it returns",
    )


def told(error: BaseException) -> str:
    """The class and text of an error in code that is not ours, and where it was raised."""
    text = f"{type(error).__name__}: {error}".strip().removesuffix(":").replace("\n", " ")
    frames = traceback.extract_tb(error.__traceback__)
    file = Path(frames[-1].filename) if frames else Path(__file__)
    if file.parent == Path(__file__).parent or isinstance(error, SyntaxError | ImportError):
        return text  # our own call, or the text says where
    return f"{text} ({file.name}, line {frames[-1].lineno})"
