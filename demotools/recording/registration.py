"""Registers the levels with gymnasium: `gymnasium.make("demotools/GoToLocal-v0")`.

Gymnasium does not discover packages: each registers its environments when it is imported, as
minigrid does. `import demotools` must not load gymnasium, which reading stores does not need, and
most programs import it only later; so if it is not loaded yet, `demotools/__init__.py` imports this
module once it is.

Levels of the user's own are registered by their modules, which are imported only where the user
names them: as `module:Level` to a command, or in $DEMOTOOLS_LEVELS. A store names no module.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from demotools.errors import LevelError

NAMESPACE = "demotools"
OWN_LEVELS_VARIABLE = "DEMOTOOLS_LEVELS"

_log = logging.getLogger(__name__)


def environment_name(level: str) -> str:
    """The name under which gymnasium makes a level.

    >>> environment_name("GoToLocal")
    'demotools/GoToLocal-v0'
    """
    return f"{NAMESPACE}/{level}-v0"


def own_level(level: str) -> str:
    """The level in `module:Level`, whose module may be imported; other names as they are.

    The module is one that the user names, and holds for this process and those that it starts.

    LevelError  there is no such module, or importing it fails
    """
    module, colon, name = level.rpartition(":")
    if colon:
        named = [*_own_modules(), module]
        os.environ[OWN_LEVELS_VARIABLE] = ",".join(dict.fromkeys(named))
        import_own_levels()
    return name


def import_own_levels() -> None:
    """Import the modules that $DEMOTOOLS_LEVELS lists, from the working directory first.

    LevelError  there is no such module, or importing it fails
    """
    for module in _own_modules():
        if module in sys.modules:
            continue
        here = str(Path.cwd())
        sys.path.insert(0, here)
        try:
            importlib.import_module(module)
        except Exception as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is not None and f"{module}.".startswith(f"{missing}."):
                fix = "install the package, change to the folder of the module, or correct the name"
            else:
                fix = f"correct the module; `python -c 'import {module}'` shows the whole error"
            raise LevelError(
                f"the module of a level cannot be imported: {type(error).__name__}: {error}",
                path=f"{module}, named by the level or ${OWN_LEVELS_VARIABLE}",
                fix=fix,
            ) from error
        finally:
            sys.path.remove(here)


def _own_modules() -> list[str]:
    return [name for name in os.environ.get(OWN_LEVELS_VARIABLE, "").split(",") if name]


def register_levels(registry: ModuleType) -> None:
    """Register every level with gymnasium, whose loaded registry this is."""
    from demotools.babyai.levels import all_level_names
    from demotools.errors import DemotoolsError

    try:
        levels = all_level_names()
    except DemotoolsError as error:  # a manifest of the user's: no reason for gymnasium to fail
        _log.warning("the levels could not be registered with gymnasium: %s", error.what)
        return
    for level in levels:
        name = environment_name(level)
        if name not in registry.registry:
            registry.register(
                id=name,
                entry_point="demotools.recording.environment:make_environment",
                # only a name: whoever asks for many environments has the trainer
                vector_entry_point="trainer.acting.gymnasium_vector:GymnasiumVector",
                kwargs={"level": level},
            )


def registering_spec(name: str) -> ModuleSpec | None:
    """The spec of gymnasium's registry, whose loader registers the levels at its end."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.loader is not None:
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register_levels(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
    return spec
