"""Things named in settings: ours by a short name, the user's by `package.module:Name`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from demotools.errors import SettingsError

T = TypeVar("T")


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

    SettingsError  nothing of that name, an option it does not take, or it refuses one
    """
    maker = find(kind, name, ours)
    parameters = inspect.signature(maker).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = list(parameters)[len(arguments) :]
    for option in options:
        if option not in given and not anything:
            near = difflib.get_close_matches(option, given, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(given) or 'none'}"
            raise SettingsError(f"unknown key `{option}`", path=f"{kind} {name}", fix=hint)
    try:
        return maker(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"the {kind} refuses its settings: {error}",
            path=f"{kind} {name}",
            fix="correct the keys beside its type",
        ) from error


def find(kind: str, name: str, ours: Mapping[str, Callable[..., T]]) -> Callable[..., T]:
    """What makes the thing of this name; SettingsError where there is none."""
    if name in ours:
        return ours[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, ours, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"ours are {', '.join(ours)}"
        raise SettingsError(
            f"there is no {kind} of the name `{name}`",
            path=f"type = {name!r}",
            fix=f"{hint}; your own is named as `package.module:Name`",
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # a module that lies where the command is run
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"the {kind} cannot be imported: {error}",
            path=f"type = {name!r}",
            fix="install the package, or run the command in the folder of the module",
        ) from error
    maker: Callable[..., T] = found
    return maker
