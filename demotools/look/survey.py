"""A store in figures, and a number for each episode: one pass, in bounded memory.

A number for each episode: equal where an agent saw, did and was told the same.

64 bits: among ten million episodes that all differ, two get the same number once in four hundred
thousand stores. Seeds and directions do not count, since neither stands in what the agent is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from demotools.babyai.cells import ACTIONS, COLOURS, OBJECTS, STATES
from demotools.errors import printable_text
from demotools.look.info import store_info
from demotools.store.reading import Store, damaged, reopened

_CELL_SHAPE = (len(OBJECTS), len(COLOURS), len(STATES))


@dataclass(frozen=True)
class Survey:
    """What is counted in a store.

    store             the store
    info              what `demotools info --json` prints
    digest            uint64 [E], equal for equal episodes (see digest.py)
    action_steps      int64 [7], steps with each action
    cell_counts       int64 [11, 6, 3], cells of all views; None where views are not packed
    mission_episodes  int64 [M], episodes with each mission
    mission_length    int64 [M], words of each mission
    word_episodes     int64 [N], episodes whose mission contains each word of the vocabulary
    """

    store: Store
    info: dict[str, Any]
    digest: NDArray[np.uint64]
    action_steps: NDArray[np.int64]
    cell_counts: NDArray[np.int64] | None
    mission_episodes: NDArray[np.int64]
    mission_length: NDArray[np.int64]
    word_episodes: NDArray[np.int64]

    @property
    def name(self) -> str:
        """The store's name."""
        return self.store.name

    @property
    def length(self) -> NDArray[np.int64]:
        """Steps of each episode: int64 [E]."""
        return np.diff(self.store.episode_offset)

    def missions(self, rows: Iterable[int]) -> list[str]:
        """The texts of a few missions; a million at once would take too much memory."""
        return self.store.missions(rows)

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        length = self.length
        percent = (0, 25, 50, 75, 100)
        quartiles = np.percentile(length, percent).tolist()
        objects = {}
        if self.cell_counts is not None:
            objects = dict(zip(OBJECTS, self.cell_counts.sum(axis=(1, 2)).tolist(), strict=True))
        return {
            **self.info,
            "length_quartiles": dict(zip(map(str, percent), quartiles, strict=True)),
            "action_steps": dict(zip(ACTIONS, self.action_steps.tolist(), strict=True)),
            "object_cells": objects,
            "word_episodes": {
                word: int(number)
                for word, number in zip(
                    self.store.attributes.vocabulary, self.word_episodes, strict=True
                )
                if number
            },
        }


def store_survey(store: Store, *, quiet: bool = False) -> Survey:
    """Count what there is in a store; every byte of its views and actions is read once."""
    missions = mission_digests(store)[store.episode_mission]
    digest = np.empty(store.episodes, dtype=np.uint64)
    actions = np.zeros(256, dtype=np.int64)
    codes = np.zeros(256, dtype=np.int64)
    for block in blocks(store, quiet=quiet):
        chosen = slice(block.episodes.start, block.episodes.stop)
        digest[chosen] = block_digests(block, missions[chosen])
        actions += np.bincount(block.action, minlength=256)
        if store.packed:
            codes += _code_counts(block.view)
    mission_episodes = np.bincount(store.episode_mission, minlength=len(store.mission_tokens))
    return Survey(
        store=store,
        info=store_info(store.path),
        digest=digest,
        action_steps=actions[: len(ACTIONS)],
        cell_counts=codes[: int(np.prod(_CELL_SHAPE))].reshape(_CELL_SHAPE)
        if store.packed
        else None,
        mission_episodes=mission_episodes,
        mission_length=np.count_nonzero(store.mission_tokens, axis=1),
        word_episodes=_word_episodes(store, mission_episodes),
    )


def _code_counts(view: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each cell code occurs: int64 [256]. Two cells at once take half the time."""
    flat = view.reshape(-1)
    even = len(flat) // 2 * 2
    pairs = np.bincount(flat[:even].view("<u2"), minlength=1 << 16).reshape(256, 256)
    counts: NDArray[np.int64] = pairs.sum(axis=0) + pairs.sum(axis=1)
    return counts + np.bincount(flat[even:], minlength=256)


def _word_episodes(store: Store, mission_episodes: NDArray[np.int64]) -> NDArray[np.int64]:
    words = len(store.attributes.vocabulary)
    if store.mission_tokens.max(initial=0) > words:
        raise damaged(store.path, "its missions have words that are not in its vocabulary")
    result = np.zeros(words + 1, dtype=np.int64)
    tokens = store.mission_tokens
    for column in range(tokens.shape[1]):
        # once an episode: not where the word already stood before in the mission
        token = tokens[:, column]
        again = (tokens[:, :column] == token[:, None]).any(axis=1)
        weight = np.where(again, 0, mission_episodes)
        result += np.bincount(token, weights=weight, minlength=words + 1).astype(np.int64)
    return result[1:]


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
