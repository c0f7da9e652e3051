"""Things named in settings: ours by a short name, the user's by `package.module:Name`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from demotools.errors import DemotoolsError, SettingsError

T = TypeVar("T")
FOREIGN = (Exception, SystemExit)
"""What code that is not ours may raise: anything, and none of it is a bug of the trainer."""

GYMNASIUM = "gymnasium:make"
"""What makes any environment that gymnasium knows, by its id."""
_DOTTED = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
_OF_TORCH = {"torch.optim": "Optimizer", "torch.optim.lr_scheduler": "LRScheduler"}
_recipe_folders: list[str] = []


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
    if not is_importable(name):
        raise SettingsError(
            f"`{name}` names nothing that can be imported",
            path=f"type = {name!r}",
            fix="write it as `package.module:Name`",
        )
    try:
        found: Any = torch_class(name) or _imported(module, attributes)
    except FOREIGN as error:
        raise SettingsError(
            f"the {kind} cannot be imported: {told(error)}",
            path=f"type = {name!r}",
            fix="install the package, put the module beside the recipe, or correct the name",
        ) from error
    if not callable(found):
        raise SettingsError(
            f"the {kind} is not callable but {type(found).__name__}",
            path=f"type = {name!r}",
            fix="name a function or a class",
        )
    maker: Callable[..., T] = found
    return maker


def is_importable(text: str) -> bool:
    """Whether this has the form `package.module:Name`."""
    return re.fullmatch(f"{_DOTTED}:{_DOTTED}", text) is not None


def torch_class(name: str) -> type | None:
    """The optimizer or schedule of torch that `name` is, by its public name; else None."""
    module, _, attribute = name.partition(":")
    if module not in _OF_TORCH:
        return None
    # only here: processes of environments do without torch
    public = vars(importlib.import_module(module))
    found = public.get(attribute)
    is_one = isinstance(found, type) and issubclass(found, public[_OF_TORCH[module]])
    return found if is_one else None


def recipe_folders() -> list[str]:
    """Where modules of the user are looked for, besides the working directory."""
    return list(_recipe_folders)


def search_recipe_folders(folders: list[str]) -> None:
    """From now on, modules of the user are looked for in these folders too."""
    _recipe_folders[:] = folders


def _imported(module: str, attributes: str) -> Any:
    with _users_folders_first():
        found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


@contextmanager
def _users_folders_first() -> Iterator[None]:
    """Inside, the recipe's folder and the working directory come first in the search.

    Only inside: a file that lies there by chance must not stand in for a library's own module.
    """
    before = list(sys.path)
    sys.path[:0] = [*_recipe_folders, str(Path.cwd())]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


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
