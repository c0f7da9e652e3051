"""A number for each episode: equal where an agent saw, did and was told the same.

64 bits: among ten million episodes that all differ, two get the same number once in four hundred
thousand stores. Seeds and directions do not count, since neither stands in what the agent is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from demotools.errors import printable_text
from demotools.store import Store, reopened

_BLOCK_BYTES = 1 << 20
_MAPPED_BYTES = 1 << 25
_MISSIONS = 1 << 14
# The constants of the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Block:
    """Consecutive whole episodes, some megabytes of them.

    episodes   their numbers
    length     int64 [number of episodes]
    view       uint8 [steps, ...]
    action     uint8 [steps]
    """

    episodes: range
    length: NDArray[np.int64]
    view: NDArray[np.uint8]
    action: NDArray[np.uint8]


def blocks(store: Store, *, quiet: bool = False) -> Iterator[Block]:
    """All episodes of a store in blocks, with a progress bar, in bounded memory.

    StoreError  the store was replaced meanwhile, or a value is not in its range
    """
    offset = store.episode_offset
    step_bytes = int(np.prod(store.view.shape[1:]))
    steps = max(1, _BLOCK_BYTES // step_bytes)
    with tqdm(
        desc=printable_text(f"read {store.name}"),
        total=store.steps,
        unit=" steps",
        disable=quiet or None,
    ) as bar:
        first, mapped = 0, _MAPPED_BYTES
        while first < store.episodes:
            if mapped >= _MAPPED_BYTES:
                # what was read stays in memory for as long as its map lives: not the caller's map
                store, mapped = reopened(store.path, store.attributes.fingerprint), 0
            last = int(np.searchsorted(offset, offset[first] + steps, side="right")) - 1
            last = min(max(last, first + 1), store.episodes)
            start, stop = int(offset[first]), int(offset[last])
            view, action = store.view.span(start, stop), store.action.span(start, stop)
            store.check_values(view=view, action=action)
            yield Block(range(first, last), np.diff(offset[first : last + 1]), view, action)
            bar.update(stop - start)
            first, mapped = last, mapped + (stop - start) * step_bytes


def mission_pieces(store: Store) -> Iterator[tuple[int, list[str]]]:
    """The mission texts piece by piece, each with the row of its first."""
    start = 0
    for texts in store.text_chunks():
        for first in range(0, len(texts), _MISSIONS):
            yield start + first, texts[first : first + _MISSIONS]
        start += len(texts)
        del texts  # before the next are read


def text_digests(texts: Iterable[str]) -> NDArray[np.uint64]:
    """A number for each text: uint64 [number of texts]."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def mission_digests(store: Store) -> NDArray[np.uint64]:
    """A number for each mission of a store: uint64 [M]."""
    return np.concatenate([text_digests(texts) for _start, texts in mission_pieces(store)])


def block_digests(block: Block, mission: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A number for each episode of a block.

    mission   uint64 [number of episodes], see `text_digests`
    returns   uint64 [number of episodes]
    """
    steps = len(block.action)
    flat = block.view.reshape(steps, -1)
    # odd factors, one a cell: two views that differ in any cell give different sums
    factors = np.random.default_rng(0).integers(1 << 63, size=flat.shape[1] + 2, dtype=np.uint64)
    factors = factors * np.uint64(2) + np.uint64(1)
    start = np.cumsum(block.length) - block.length
    position = np.arange(steps) - np.repeat(start, block.length)
    number = flat.astype(np.uint64) @ factors[:-2]
    number += block.action * factors[-2]
    number += position.astype(np.uint64) * factors[-1]
    return _mixed(np.add.reduceat(_mixed(number), start) + mission)


def _mixed(number: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, factor in _MIX:
        number = (number ^ (number >> np.uint64(shift))) * np.uint64(factor)
    return number ^ (number >> np.uint64(31))


def episode_digests(store: Store, *, quiet: bool = False) -> NDArray[np.uint64]:
    """A number for each episode of a store: uint64 [E]."""
    mission = mission_digests(store)[store.episode_mission]
    result = np.empty(store.episodes, dtype=np.uint64)
    for block in blocks(store, quiet=quiet):
        chosen = slice(block.episodes.start, block.episodes.stop)
        result[chosen] = block_digests(block, mission[chosen])
    return result
