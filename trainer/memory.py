"""What becomes of a run that the memory is not enough for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from demotools.errors import SettingsError

_SAID_BY_TORCH = ("can't allocate memory", "not enough memory", "out of memory")


@contextmanager
def enough_memory() -> Iterator[None]:
    """SettingsError, naming the settings that lower it, where the memory is used up."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).partition("\n")[0]
        # on the CPU torch raises no class of its own
        spent = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not spent and not any(said in text for said in _SAID_BY_TORCH):
            raise
        raise SettingsError(
            f"the memory is used up: {text or type(error).__name__}",
            path="the batches of this run",
            fix="lower off_policy.rollouts, on_policy.environments or their rollout_len, "
            "or give more minibatches",
        ) from error
