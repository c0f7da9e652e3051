"""BabyAI demonstrations as memory-mapped Zarr stores.

open_store         opens a store for reading; `open` is the same function
Store              an open store
EpisodeDataset     a subset of its episodes
pad_episodes       collates episodes of different lengths into a batch
list_stores        lists the names of the existing stores
make_environment   makes the environment of a level, like `gymnasium.make("demotools/GoToLocal-v0")`
"""

from __future__ import annotations

import sys

# Whatever is imported here, Ctrl-C would find without anybody to answer it.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from demotools.recording.environment import make_environment
    from demotools.store.episodes import EpisodeDataset, pad_episodes
    from demotools.store.reading import Store, list_stores, open_store

    open = open_store

__all__ = [
    "EpisodeDataset",
    "Store",
    "list_stores",
    "make_environment",
    "open_store",
    "pad_episodes",
]
# `open` is not among them: `import *` would hide Python's own

_PLACES = {
    "EpisodeDataset": "demotools.store.episodes",
    "Store": "demotools.store.reading",
    "list_stores": "demotools.store.reading",
    "make_environment": "demotools.recording.environment",
    "open": "demotools.store.reading",
    "open_store": "demotools.store.reading",
    "pad_episodes": "demotools.store.episodes",
}


def __dir__() -> list[str]:
    return [name for name in globals() if name.startswith("__")] + list(_PLACES)


def __getattr__(name: str) -> Any:
    # imported when it is asked for: `demotools --help` waits for neither zarr nor minigrid
    if name in _PLACES:
        from importlib import import_module

        place = import_module(_PLACES[name])
        return place.open_store if name == "open" else getattr(place, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _AfterGymnasium:
    """Has the levels registered as soon as gymnasium's registry is loaded: nobody waits for it."""

    registry = "gymnasium.envs.registration"

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> Any:
        if name != self.registry:
            return None
        sys.meta_path.remove(self)
        from demotools.recording.registration import registering_spec

        return registering_spec(name)


if hasattr(sys.modules.get(_AfterGymnasium.registry), "register"):
    from demotools.recording.registration import register_levels

    register_levels(sys.modules[_AfterGymnasium.registry])
else:
    sys.meta_path.insert(0, _AfterGymnasium())
