"""Identical episodes, and episodes that belong together: a hash for each, in bounded memory.

Two hashes are equal if the agent saw, did and was told the same. They have 64 bits: among ten
million different episodes, two get the same hash once in four hundred thousand stores. Seeds and
directions do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demotools.output import progress_bar
from demotools.store.reading import Store, remapped

_BLOCK_BYTES = 1 << 20
_MAPPED_BYTES = 1 << 25


def episode_hashes(
    mission: NDArray[np.uint64],
    offset: NDArray[np.int64],
    view: NDArray[np.uint8],
    action: NDArray[np.uint8],
) -> NDArray[np.uint64]:
    """The hashes of some episodes in columns.

    mission   the hashes of their missions, see `hashes`
    """
    return hashes(
        text.tobytes() + action[start:stop].tobytes() + view[start:stop].tobytes()
        for text, (start, stop) in zip(mission, pairwise(offset.tolist()), strict=True)
    )


def hashes(contents: Iterable[bytes]) -> NDArray[np.uint64]:
    """A hash for each content."""
    whole = b"".join(blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(whole, dtype="<u8").astype(np.uint64)


def step_blocks(
    store: Store, *, quiet: bool
) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint8]]]:
    """All episodes in blocks of some megabytes: numbers, offsets in the block, view, action."""
    offset = store.episode_offset
    step_bytes = int(np.prod(store.view.shape[1:]))
    steps = max(1, _BLOCK_BYTES // step_bytes)
    with progress_bar(store.steps, f"read {store.name}", "steps", quiet=quiet) as bar:
        first, mapped = 0, _MAPPED_BYTES
        while first < store.episodes:
            if mapped >= _MAPPED_BYTES:
                store, mapped = remapped(store), 0
            last = int(np.searchsorted(offset, offset[first] + steps, side="right")) - 1
            last = min(max(last, first + 1), store.episodes)
            start, stop = int(offset[first]), int(offset[last])
            view, action = store.view.span(start, stop), store.action.span(start, stop)
            store.check_values(view=view, action=action)
            yield slice(first, last), offset[first : last + 1] - start, view, action
            bar.update(stop - start)
            first, mapped = last, mapped + (stop - start) * step_bytes


def mission_hashes(store: Store) -> NDArray[np.uint64]:
    """The hash of each distinct mission: uint64 [M]."""
    return np.concatenate([hashes(map(str.encode, texts)) for texts in store.text_chunks()])


def store_hashes(store: Store, *, quiet: bool = False) -> NDArray[np.uint64]:
    """The hash of each episode; every byte of its views and actions is read once: uint64 [E].

    StoreError  the store was replaced meanwhile, or a value is not in its range
    """
    missions = mission_hashes(store)
    found = [
        episode_hashes(missions[store.episode_mission[episodes]], offset, view, action)
        for episodes, offset, view, action in step_blocks(store, quiet=quiet)
    ]
    return np.concatenate(found)


def repeats(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which episodes repeat one before them.

    >>> repeats(np.array([7, 5, 7, 7], np.uint64)).tolist()
    [False, False, True, True]
    """
    again = np.ones(len(hashes), np.bool_)
    again[np.unique(hashes, return_index=True)[1]] = False
    return again


def joined_groups(keys: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Groups of what is the same by one key or by another, and so on from one to the next.

    keys     [E] each
    returns  int64 [E], the first of each one's group

    >>> joined_groups([np.array([1, 1, 2, 3, 4]), np.array([5, 6, 6, 7, 8])]).tolist()
    [0, 0, 0, 3, 4]
    """
    places = [np.unique(key, return_inverse=True)[1].reshape(-1) for key in keys]
    group = np.arange(len(keys[0]))
    while True:
        before = group
        for place in places:
            first = np.full(len(group), len(group))
            np.minimum.at(first, place, group)
            group = first[place]
        if np.array_equal(group, before):
            return group
