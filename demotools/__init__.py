"""BabyAI demonstrations as memory-mapped Zarr stores.

open_store         a store, to read from
Store              what it gives
make_environment   the environment of a level
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demotools.recording.environment import make_environment
    from demotools.store.reading import Store, open_store

__all__ = ["Store", "make_environment", "open_store"]

_PLACES = {
    "Store": "demotools.store.reading",
    "open_store": "demotools.store.reading",
    "make_environment": "demotools.recording.environment",
}


def __getattr__(name: str) -> Any:
    # imported when it is asked for: `demotools --help` waits for neither zarr nor minigrid
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
