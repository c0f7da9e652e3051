"""Registers the levels with gymnasium: `gymnasium.make("demotools/GoToLocal-v0")`.

Gymnasium does not discover packages: each registers its environments when it is imported, as
minigrid does. `import demotools` must not load gymnasium, which reading stores does not need, and
most programs import it only later; so if it is not loaded yet, `demotools/__init__.py` imports this
module once it is.
"""

from __future__ import annotations

import importlib.util
import logging
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMESPACE = "demotools"

_log = logging.getLogger(__name__)


def environment_name(level: str) -> str:
    """The name under which gymnasium makes a level.

    >>> environment_name("GoToLocal")
    'demotools/GoToLocal-v0'
    """
    return f"{NAMESPACE}/{level}-v0"


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
