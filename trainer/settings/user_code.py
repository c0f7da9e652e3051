"""Things named in settings: ours by a short name, the user's by `package.module:Name`.

Names of code in settings that somebody else may have written: told, and not imported.

A recipe that the user names is their own program. The settings in a checkpoint, and a run's
`settings.toml`, may come from anybody: what they name beyond our own parts is imported only where
the user says that they trust it.
"""

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

import gymnasium

from demotools.errors import CheckpointError, DemotoolsError, LevelError, SettingsError
from demotools.recording.environment import Environment, make_environment
from trainer.settings.models import LEVELS, SETTINGS_FILE, Settings, setting_leaves

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
    if Path(__file__).parents[1] in file.parents or isinstance(error, SyntaxError | ImportError):
        return text  # our own call, or the text says where
    return f"{text} ({file.name}, line {frames[-1].lineno})"


_OURS: dict[str, Callable[[str], object]] = {LEVELS: make_environment, GYMNASIUM: gymnasium.make}


def made_environment(make: str, level: str) -> Environment:
    """The environment of a level.

    make   `package.module:function` from a level to a gymnasium environment

    SettingsError  there is no such function, it fails, or gives something else
    LevelError     it knows no such level
    """
    maker: Callable[[str], object] = find("environment", make, _OURS)
    try:
        environment = maker(level)
    except DemotoolsError:
        raise
    except gymnasium.error.Error as error:
        raise LevelError(
            f"there is no environment for the level `{level}`: {error}",
            path=f"environment = {make!r}",
            fix="correct run.level, or on_policy.environment",
        ) from error
    except FOREIGN as error:
        raise SettingsError(
            f"the environment of `{level}` cannot be made: {told(error)}",
            path=f"environment = {make!r}",
            fix="correct that function: it is called with the level alone",
        ) from error
    return demand("environment", make, environment, gymnasium.Env)


# Every other text that could be imported counts as a name of code, also in settings yet to come.
_PLAIN_TEXT = re.compile(r"run\.\w+|stages\.\d+\.(off_policy\.store|early_stopping\.hold_out)")
_MINIGRID_LEVEL = re.compile(r"(BabyAI|MiniGrid)-[A-Za-z0-9-]+-v[0-9]+")


def foreign_names(settings: Settings) -> list[str]:
    """The settings that name code which is neither ours nor torch's, as `key = "module:Name"`."""
    tree = settings.model_dump(exclude_none=True, mode="json", by_alias=True)
    return [
        f'{key} = "{name}"'
        for key, name in setting_leaves(tree).items()
        if isinstance(name, str)
        and is_importable(name)
        and not _PLAIN_TEXT.fullmatch(key)
        and not _is_known(key, name, settings.run.level)
    ]


def check_trusted(settings: Settings, path: Path, *, trust: bool) -> None:
    """Refuse settings that name somebody's code, unless the user trusts them.

    CheckpointError, SettingsError  by what `path` is; the message says what would be imported
    """
    names = foreign_names(settings)
    if trust or not names:
        return
    kind = SettingsError if path.name == SETTINGS_FILE else CheckpointError
    raise kind(
        f"this names code that is not the trainer's, which was not imported: {', '.join(names)}",
        path=path,
        fix="only if you know that code, and who gave you the file: add --trust "
        "(in Python, trust=True), and it is imported and run",
    )


def _is_known(key: str, name: str, level: str) -> bool:
    if key == "on_policy.environment":
        # gymnasium itself would import the module in a level such as `module:Level-v0`
        minigrid = _MINIGRID_LEVEL.fullmatch(level) is not None
        return name == LEVELS or (name == GYMNASIUM and minigrid)
    return key in ("optimizer.type", "optimizer.schedule.type") and torch_class(name) is not None
