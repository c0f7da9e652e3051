"""Things named in settings: ours by a short name, the user's by `package.module:Name`.

Names of code in settings that somebody else may have written: listed, and not imported.

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
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from demotools.errors import CheckpointError, DemotoolsError, LevelError, SettingsError
from demotools.output import read_regular
from trainer.settings.built_in import kind_of
from trainer.settings.models import LEVELS, SETTINGS_FILE, Settings, setting_leaves
from trainer.settings.refusals import unknown_key, unknown_type

if TYPE_CHECKING:
    from demotools.recording.environment import Environment

T = TypeVar("T")
FOREIGN = (Exception, SystemExit)
"""What code that is not ours may raise: anything, and none of it is a bug of the trainer."""

GYMNASIUM = "gymnasium:make"
"""What makes any environment that gymnasium knows, by its id."""
_DOTTED = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
_OF_TORCH = {"torch.optim": "Optimizer", "torch.optim.lr_scheduler": "LRScheduler"}
_PACKAGES = {Path(__file__).parents[1], Path(inspect.getfile(DemotoolsError)).parent}
_NOTE = "# its modules lie in: "
_REQUIRED, _KEYWORD_ONLY = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
_CALLED = {
    "loss": "`Name(**keys)`, whose result is then called as `loss(model, batch, memory)`",
    "network": "`Name(vocabulary_size, **keys)`",
    "optimizer": "`Name(weights, lr=…, **keys)`",
    "schedule": "`Name(optimizer, **keys)`",
    "iterator": "`Name(**keys)`, plus those of stores, rollouts, rollout_len, seed, rank, world "
    "and words that it has parameters for",
}
"""How the user's parts are called."""
_recipe_folders: list[str] = []


def build(
    key: str,
    name: str,
    options: Mapping[str, Any],
    ours: Mapping[str, Callable[..., T]],
    *arguments: object,
    wanted: type | None = None,
) -> T:
    """What `name` makes of `arguments` and `options`.

    key        the setting that has this name, as `losses.ce.type`
    name       a key of `ours`, else `package.module:Name`
    arguments  what we hand over; `options` are the user's keys
    wanted     the class of what it makes; None: something that can be called

    SettingsError  nothing of that name, an option that it does not take or refuses, another class
    """
    maker, kind = find(key, name, ours), kind_of(key)
    with accepted_settings(key, name):
        parameters = inspect.signature(maker).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        given = list(parameters)[len(arguments) :]
        strange = [option for option in options if option not in given and not anything]
        if strange:
            hint = unknown_key([strange[0]], given).fix if given else "it takes no keys: remove it"
            if is_users(name):
                hint += " (the recipe's section [tiny] may have set it)"
            raise SettingsError(f"unknown key `{strange[0]}`", path=f"{kind} {name}", fix=hint)
        lacking = [
            f"`{one}`"
            for one in given
            if parameters[one].kind in (parameters[one].POSITIONAL_OR_KEYWORD, _KEYWORD_ONLY)
            and parameters[one].default is _REQUIRED
            and one not in options
        ]
        if lacking and is_users(name):
            called = f"it is called as {_CALLED[kind]}: " if kind in _CALLED else ""
            raise SettingsError(
                f"the {kind} requires {', '.join(lacking)}, which nothing provides",
                path=f"{key} = {name!r}{_file_of(name)}",
                fix=f"{called}correct that, set the key in its section, or give it a default",
            )
        made = maker(*arguments, **options)
    if isinstance(made, wanted) if wanted else callable(made):
        return made
    what = f"not a {wanted.__module__}.{wanted.__name__}" if wanted else "which is not callable"
    fix = f"; it is called as {_CALLED[kind]}" if kind in _CALLED else ""
    raise SettingsError(
        f"the {kind} returns {type(made).__name__}, {what}",
        path=f"{key} = {name!r}",
        fix=f"correct what it returns{fix}",
    )


def takes(maker: Callable[..., object], option: str) -> bool:
    """Whether something is built with an option of this name."""
    parameters = inspect.signature(maker).parameters
    return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def find(key: str, name: str, ours: Mapping[str, Callable[..., T]]) -> Callable[..., T]:
    """What makes the thing that the setting `key` names; SettingsError where there is none."""
    if name in ours:
        return ours[name]
    kind = kind_of(key)
    if ":" not in name:
        raise SettingsError(
            f"there is no {kind} named `{name}`",
            path=f"{key} = {name!r}",
            fix=unknown_type(name, ours),
        )
    if not is_importable(name):
        raise SettingsError(
            f"`{name}` is not a name that can be imported",
            path=f"{key} = {name!r}",
            fix="write it as `package.module:Name`",
        )
    found: Any = torch_class(name) or _imported(key, name)
    if not callable(found):
        raise SettingsError(
            f"the {kind} is {type(found).__name__}, which is not callable",
            path=f"{key} = {name!r}",
            fix="name a function or a class",
        )
    maker: Callable[..., T] = found
    return maker


@contextmanager
def users_code(key: str, name: str, batch: Mapping[str, object] | None = None) -> Iterator[None]:
    """Where code of the user's raises inside, a note says which setting named it.

    A check of ours that finds it wrong, or a call that it does not take, becomes a SettingsError;
    where that may as well be a mistake of ours, it says so, with the line.

    key, name   the setting, and what it names
    batch       what it was given, to name its arrays where it looks for another
    """
    try:
        yield
    except DemotoolsError:
        raise
    except (Exception, SystemExit) as error:
        if not is_users(name):
            raise
        if batch is not None and _is_of_missing_array(error, batch):
            error.add_note(f"the batch holds {', '.join(batch)}")
        line = _last_line(error)
        note = f"raised by your own code, named by the setting {key} = {name!r}"
        if line is not None:
            if isinstance(error, TypeError | ValueError | AttributeError):
                raise _not_as_it_must_be(key, name, error, line) from error
            note = f"raised in {_place(line)}, while using {note.removeprefix('raised by ')}"
        if isinstance(error, SystemExit):  # it would end the program as if all were well
            failure = RuntimeError(f"this code ended the program: exit({error.code!r})")
            failure.add_note(note)
            raise failure from error
        if note not in getattr(error, "__notes__", []):
            error.add_note(note)
        raise


def _last_line(error: BaseException) -> traceback.FrameSummary | None:
    """Where this was raised, if no line of the user's, or of a library, was under way."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = all(_PACKAGES.intersection(Path(frame.filename).parents) for frame in frames)
    return frames[-1] if ours and frames else None


def _not_as_it_must_be(
    key: str, name: str, error: Exception, line: traceback.FrameSummary
) -> SettingsError:
    kind = kind_of(key)
    what = f"the {kind} does not follow its interface: {error}"
    fix = "correct it; docs/own_parts.md says what it receives and must return"
    if not (line.line or "").startswith("raise "):  # no check: our own mistake looks like this too
        what = f"using the {kind} fails: {_said(error)} ({_place(line)})"
        fix += "; if it already follows that, this is a bug in the trainer: please report it"
    return SettingsError(what, path=f"{key} = {name!r}{_file_of(name)}", fix=fix)


def _place(line: traceback.FrameSummary) -> str:
    """A line of ours.

    >>> import traceback
    >>> _place(traceback.FrameSummary(f"{Path(__file__).parents[1]}/run/loop.py", 7, "step"))
    'trainer/run/loop.py, line 7'
    """
    file = Path(line.filename)
    package = next(one for one in file.parents if one in _PACKAGES)
    return f"{package.name}/{file.relative_to(package).as_posix()}, line {line.lineno}"


def _said(error: BaseException) -> str:
    # a ValueError says it in words, of other errors the class is half of what they say
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def _file_of(name: str) -> str:
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    return f" in {file}" if file else ""


@contextmanager
def naming_users_code(settings: Settings) -> Iterator[None]:
    """Where a backward pass fails inside, a note says which settings name code of the user's."""
    try:
        yield
    except Exception as error:
        names = foreign_names(settings)
        if names and not isinstance(error, DemotoolsError) and not hasattr(error, "__notes__"):
            error.add_note(f"raised by your own code, named by a setting: {', '.join(names)}")
        raise


@contextmanager
def accepted_settings(key: str, name: str) -> Iterator[None]:
    """SettingsError where what is ours or torch's refuses its options; else as `users_code`."""
    try:
        with users_code(key, name):
            yield
    except DemotoolsError:
        raise
    except Exception as error:
        if is_users(name) or hasattr(error, "__notes__"):  # of the user's, or a function of theirs
            raise
        raise SettingsError(
            f"the {kind_of(key)} rejects its settings: {_said(error)}",
            path=f"{key} = {name!r}",
            fix="correct the other keys of its section, or choose another type",
        ) from error


def is_users(name: str) -> bool:
    """Whether a `type` names code that is neither ours nor torch's.

    It decides what messages say, never what is trusted: that is for `foreign_names`.
    """
    ours = name.startswith(tuple(f"{package.name}." for package in _PACKAGES))
    return ":" in name and not ours and torch_class(name) is None


def named_in(key: str, value: Any) -> Any:
    """The value of an argument, with the functions in it that `package.module:function` names."""
    if isinstance(value, list):
        return [named_in(key, item) for item in value]
    if not isinstance(value, str) or not is_importable(value):
        return value
    function: Callable[..., Any] = find(key, value, {})

    def called(*arguments: Any) -> Any:
        with users_code(key, value):
            return function(*arguments)

    return called


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


def _users_folders() -> list[str]:
    return [*_recipe_folders, str(Path.cwd())]


def recipe_note(settings: Settings) -> str:
    """Comments for a run's settings.toml: where the modules that it names were looked for."""
    folders = dict.fromkeys(_users_folders()) if foreign_names(settings) else ()
    return "".join(f"{_NOTE}{folder}\n" for folder in folders if folder.isprintable())


def search_noted_folders(run: Path) -> None:
    """Look for modules also where the settings.toml in the folder of a trusted run says they lie.

    So they are found from any working directory.
    """
    try:
        lines = read_regular(run / SETTINGS_FILE).decode("utf-8", "replace").splitlines()
    except DemotoolsError:
        return  # a checkpoint that was moved: the working directory is left
    noted = [line.removeprefix(_NOTE) for line in lines if line.startswith(_NOTE)]
    _recipe_folders.extend(folder for folder in noted if folder not in _recipe_folders)


def _is_of_missing_array(error: BaseException, batch: Mapping[str, object]) -> bool:
    """Whether a user's code may have looked for an array that the batch lacks."""
    if not isinstance(error, KeyError) or not error.args:
        return False
    return isinstance(error.args[0], str) and error.args[0] not in batch


def _imported(key: str, name: str) -> Any:
    """What `package.module:Name` names; SettingsError where there is no such module or name."""
    found: Any = _module(key, name)
    try:
        for attribute in name.partition(":")[2].split("."):
            found = getattr(found, attribute)
    except AttributeError as error:
        # all that it has would be too many to list
        near = difflib.get_close_matches(attribute, dir(found), n=2, cutoff=0.5)
        fix = f"correct the name; did you mean {' or '.join(near)}?" if near else ""
        raise _not_there(key, name, error, fix) from error
    return found


def _module(key: str, name: str) -> ModuleType:
    """The module in `package.module:Name`; SettingsError where there is none."""
    module = name.partition(":")[0]
    try:
        with users_code(key, name), users_folders_first():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            raise _not_there(key, name, error) from error
        raise  # the module is there, and lacks another one


def _not_there(key: str, name: str, error: Exception, fix: str = "") -> SettingsError:
    module, _, attribute = name.partition(":")
    if module.endswith(".py"):
        fix = f"write it without .py: `{module.removesuffix('.py')}:{attribute}`"
    return SettingsError(
        f"the {kind_of(key)} cannot be imported: {error}",
        path=f"{key} = {name!r}",
        fix=fix or "install the package, put the module next to the recipe, or correct the name",
    )


@contextmanager
def users_folders_first() -> Iterator[None]:
    """Inside, the recipe's folder and the working directory come first in the search.

    Only inside: a file that lies there by chance must not stand in for a library's own module.
    """
    before = list(sys.path)
    sys.path[:0] = _users_folders()
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def error_text(error: BaseException) -> str:
    """The class and text of an error in code that is not ours, and where it was raised."""
    text = f"{type(error).__name__}: {error}".strip().removesuffix(":").replace("\n", " ")
    frames = traceback.extract_tb(error.__traceback__)
    file = Path(frames[-1].filename) if frames else Path(__file__)
    if _PACKAGES.intersection(file.parents) or isinstance(error, SyntaxError | ImportError):
        return text  # our own call, or the text says where
    return f"{text} ({file.name}, line {frames[-1].lineno})"


def made_environment(make: str, level: str) -> Environment:
    """The environment of a level.

    level  as `make` takes it; where that is ours, `package.module:Id-v0` is what a module registers
    make   `package.module:function` from a level to a gymnasium environment

    SettingsError  there is no such function, or it gives something else
    LevelError     it knows no such level
    """
    # only here: what never plays does not wait for minigrid
    import gymnasium

    from demotools.recording.environment import make_environment

    key = "on_policy.environment"
    ours: dict[str, Callable[[str], object]] = {LEVELS: make_environment, GYMNASIUM: gymnasium.make}
    maker = find(key, make, ours)
    if ":" in level and make in ours:
        _module("run.level", level)  # which registers what gymnasium then knows
        level = level.partition(":")[2]
    try:
        with users_code(key, make):
            environment = maker(level)
    except gymnasium.error.Error as error:
        raise LevelError(
            f"there is no environment for the level `{level}`: {error}",
            path=f"{key} = {make!r}",
            fix="correct run.level or on_policy.environment",
        ) from error
    if isinstance(environment, gymnasium.Env):
        return environment
    raise SettingsError(
        f"the environment is {type(environment).__name__}, not a gymnasium.Env",
        path=f"{key} = {make!r}",
        fix="correct what it returns",
    )


# Every other text that could be imported counts as a name of code, also in settings yet to come.
_PLAIN_TEXT = re.compile(
    r"run\.\w+(\.\d+\.name)?|stages\.\d+\.(off_policy\.store(\.\d+\.(name|mission))?|early_stopping\.hold_out)"
)
_MINIGRID_LEVEL = re.compile(r"(BabyAI|MiniGrid)-[A-Za-z0-9-]+-v[0-9]+")


def foreign_names(settings: Settings) -> list[str]:
    """The settings that name code which is neither ours nor torch's, as `key = "module:Name"`."""
    tree = settings.tree()
    registered = [level for level in settings.run.level_names if ":" in level]
    return [f'run.level = "{level}"' for level in registered] + [
        f'{key} = "{name}"'
        for key, name in setting_leaves(tree).items()
        if isinstance(name, str)
        and is_importable(name)
        and not _PLAIN_TEXT.fullmatch(key)
        and not all(_is_known(key, name, level) for level in settings.run.level_names)
    ]


def check_trusted(settings: Settings, path: Path, *, trust: bool, of: str = "") -> None:
    """Refuse settings that name somebody's code, unless the user trusts them.

    of   only what settings whose keys begin so name

    CheckpointError, SettingsError  by what `path` is; the message says what would be imported
    """
    names = [name for name in foreign_names(settings) if name.startswith(of)]
    if trust or not names:
        return
    kind = SettingsError if path.name == SETTINGS_FILE else CheckpointError
    raise kind(
        f"this names code from outside the trainer, which was not imported: {', '.join(names)}",
        path=path,
        fix="if you know that code and trust the source of the file, add --trust "
        "(in Python, trust=True) to import and run it",
    )


def _is_known(key: str, name: str, level: str) -> bool:
    if key == "on_policy.environment":
        # gymnasium itself would import the module in a level such as `module:Level-v0`
        minigrid = _MINIGRID_LEVEL.fullmatch(level) is not None
        return name == LEVELS or (name == GYMNASIUM and minigrid)
    return key in ("optimizer.type", "optimizer.schedule.type") and torch_class(name) is not None
