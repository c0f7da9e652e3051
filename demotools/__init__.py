"""BabyAI demonstrations as memory-mapped Zarr stores.

open_store         a store, to read from; `open` is the same
Store              what it gives
EpisodeDataset     some of its episodes
pad_episodes       a batch of episodes of different lengths
list_stores        the names of the stores that there are
make_environment   the environment of a level; `gymnasium.make("demotools/GoToLocal-v0")` too
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from demotools.recording.registration import register_levels

if TYPE_CHECKING:
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
        place = import_module(_PLACES[name])
        return place.open_store if name == "open" else getattr(place, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_levels()
