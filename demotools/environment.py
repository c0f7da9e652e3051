"""A level's environment, quiet and without wrappers; and which seeds belong to which split.

Minigrid prints a line to stdout for every level layout that it rejects. `make_environment` gives
the one module that does so a `print` that says nothing; nobody's stdout is redirected.

Minigrid and gymnasium are imported where an environment is made: others need the seeds only.
"""

from __future__ import annotations

import logging
from copy import copy
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from demotools.errors import LevelError
from demotools.grid import fits_cells, packed_cells
from demotools.manifest import Split, read_manifest

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.envs.registration import EnvSpec

Observation = dict[str, Any]
"""`image` uint8 [7, 7, 3], `direction` 0 right, 1 down, 2 left, 3 up, `mission` text."""

Environment: TypeAlias = "gymnasium.Env[Observation, int]"

_log = logging.getLogger(__name__)

# Source: babyai's make_agent_demos counts train seeds from 0 and valid seeds from 1e9.
SEEDS: dict[Split, range] = {
    "train": range(0, 1_000_000_000),
    "valid": range(1_000_000_000, 2_000_000_000),
}
EVALUATION_SEED = 2_000_000_000
"""First seed of evaluation, [2e9, 2e9 + n): no store may use them."""
MOST_EPISODES = 10_000_000
"""The largest n of one evaluation."""


def make_environment(
    level: str, manifests: Path | None = None, *, stock: bool = False
) -> Environment:
    """The environment of a level, by the level's name or its environment id.

    manifests       a folder of manifests that adds to those that ship
    stock           minigrid's own views, also where ours are proven to be the same (fastview)

    ManifestError   there is no such level
    LevelError      the level has no environment in the installed minigrid
    """
    environment_id = level_environment_id(level, manifests)
    import gymnasium
    from minigrid.envs.babyai.core import roomgrid_level

    # a module's own global is found before the builtin, by this module only
    vars(roomgrid_level)["print"] = _print_nothing
    try:
        spec = _specification(environment_id, stock)
    except gymnasium.error.Error as error:
        raise LevelError(
            f"the installed minigrid has no environment {environment_id}",
            path=level,
            fix="install a newer minigrid, or correct the level's manifest",
        ) from error
    # the level itself, without the wrappers that check every step
    environment: Environment = spec.make(disable_env_checker=True).unwrapped
    return environment


@cache
def _specification(environment_id: str, stock: bool) -> EnvSpec:
    """How gymnasium makes the environment; with fast views where they are proven."""
    import gymnasium
    from gymnasium.envs.registration import load_env_creator
    from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel

    from demotools.fastview import PROVEN_VERSIONS, with_fast_views

    spec = copy(gymnasium.spec(environment_id))
    if stock:
        return spec
    maker: Any = spec.entry_point
    level: Any = load_env_creator(maker) if isinstance(maker, str) else maker
    is_level = isinstance(level, type) and issubclass(level, RoomGridLevel)
    proven = is_level and level.__module__.startswith("minigrid.envs.babyai.")
    if proven and version("minigrid") in PROVEN_VERSIONS:
        spec.entry_point = with_fast_views(level)
    else:
        known = ", ".join(PROVEN_VERSIONS)
        _log.warning(
            "%s: stock views, three times as slow; fast ones are proven for BabyAI's levels in "
            "minigrid %s only",
            environment_id,
            known,
        )
    return spec


def level_environment_id(level: str, manifests: Path | None = None) -> str:
    """The gymnasium id of a level; ManifestError or LevelError as `make_environment`."""
    manifest = read_manifest(level, manifests)
    if manifest.environment_id is None:
        reason = manifest.no_environment or "minigrid has no environment for it"
        raise LevelError(
            f"this level cannot be played: {reason}",
            path=manifest.level,
            fix="use the published files: `demotools fetch` or `demotools convert`",
        )
    return manifest.environment_id


def observed_cells(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Packed cells of images that an environment gave.

    image     uint8 [..., 7, 7, 3]
    returns   uint8 [..., 7, 7]

    LevelError  the views do not pack: another size, or values outside today's encoding
    """
    if not fits_cells(image):
        raise LevelError(
            f"the views of this environment do not pack into cells (shape {image.shape[-3:]})",
            path="observation",
            fix="use an environment with egocentric 7 x 7 views in minigrid's encoding",
        )
    return packed_cells(image)


def _print_nothing(*_args: object, **_kwargs: object) -> None:
    """In the place of `print`."""
