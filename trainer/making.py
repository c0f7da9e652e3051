"""Environments by the name of what makes them, ours or the user's."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium

from demotools.environment import Environment, make_environment
from demotools.errors import DemotoolsError, LevelError, SettingsError
from trainer.config import LEVELS
from trainer.named import FOREIGN, GYMNASIUM, demand, find, told

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
