"""The memory of a run: kept between updates, released if it is much, and what if it runs out."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from demotools.errors import SettingsError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt, as malloc.h has them."""
_KEPT_BYTES = 1 << 30
# What glibc sets by itself once a program has freed arrays so large, as every one of torch does;
# what was set before cannot be asked for.
_USUAL_BYTES = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
_MOST_FREE_BYTES = 256 << 20
_SAID_BY_TORCH = ("can't allocate memory", "not enough memory", "out of memory")


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, freed memory stays in this process, up to `return_memory`, where glibc is there.

    It would hand large arrays back at once, and ask for pages anew, each filled with zeros, for the
    next: a tenth of an update of `maze`. Afterwards it does so again, and what is free goes back.
    """
    option, trim = _of_glibc("mallopt"), _of_glibc("malloc_trim")
    if option is None or trim is None:
        yield
        return
    # an older glibc refuses more than 32 MiB for what is not a mapping of its own
    if not option(_MMAP_THRESHOLD, _KEPT_BYTES):
        option(_MMAP_THRESHOLD, _USUAL_BYTES[_MMAP_THRESHOLD])
    option(_TRIM_THRESHOLD, _KEPT_BYTES)
    try:
        yield
    finally:
        for which, size_bytes in _USUAL_BYTES.items():
            option(which, size_bytes)
        trim(0)


class _Counts(ctypes.Structure):
    """`struct mallinfo2`; the ninth of the counts is what is free, in bytes."""

    _fields_ = (("counts", ctypes.c_size_t * 10),)


def return_memory() -> None:
    """Give memory that is free inside this process back to the system, where it is much.

    Temporary arrays whose sizes differ from batch to batch leave holes, which glibc keeps: `maze`
    grew by half a gigabyte in a million steps.
    """
    trim, counts = _of_glibc("malloc_trim"), _of_glibc("mallinfo2")
    if counts is not None:  # since glibc 2.33
        counts.restype = _Counts
        if counts().counts[8] < _MOST_FREE_BYTES:
            return
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def resident_mib() -> dict[str, float]:
    """`resident_mib`: the memory that this process holds now; empty where no system file tells."""
    status = Path("/proc/self/statm")
    if not status.is_file():
        return {}
    pages = int(status.read_text("ascii").split()[1])
    return {"resident_mib": pages * mmap.PAGESIZE / 2**20}


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
            f"out of memory: {text or type(error).__name__}",
            path="the batches of this run",
            fix="reduce off_policy.rollouts, on_policy.environments or their rollout_len, "
            "or use more minibatches",
        ) from error
