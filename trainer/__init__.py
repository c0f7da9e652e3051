"""A thin PyTorch trainer for demonstrations: behaviour cloning, PPO, DAgger.

ExpertTrajectoryIterator   yields batches from demo stores, for your own training loop
Source                     a store with its proportion in a mixture
load_policy                loads a trained network as a policy, a LoadedPolicy
train                      trains a run by its settings, and returns its folder
"""

from __future__ import annotations

# Whatever is imported here, Ctrl-C would find without anybody to answer it.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from trainer.data.iterator import ExpertTrajectoryIterator
    from trainer.data.sources import Source
    from trainer.run.loading import LoadedPolicy, load_policy
    from trainer.run.session import train

__all__ = ["ExpertTrajectoryIterator", "LoadedPolicy", "Source", "load_policy", "train"]

_PLACES = {
    "ExpertTrajectoryIterator": "trainer.data.iterator",
    "LoadedPolicy": "trainer.run.loading",
    "Source": "trainer.data.sources",
    "load_policy": "trainer.run.loading",
    "train": "trainer.run.session",
}


def __dir__() -> list[str]:
    return [name for name in globals() if name.startswith("__")] + list(_PLACES)


def __getattr__(name: str) -> Any:
    # imported when it is asked for: `trainer --help` does not wait for torch
    if name in _PLACES:
        from importlib import import_module

        from demotools.errors import optional_package

        optional_package("torch", "train")
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
