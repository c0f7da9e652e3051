"""A store in figures: one pass over its episodes, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demotools.digest import block_digests, blocks, mission_digests
from demotools.grid import ACTIONS, COLOURS, OBJECTS, STATES
from demotools.info import store_info
from demotools.metadata import damaged
from demotools.store import Store

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
        raise damaged(store.path, "its missions have words that its vocabulary has not")
    result = np.zeros(words + 1, dtype=np.int64)
    tokens = store.mission_tokens
    for column in range(tokens.shape[1]):
        # once an episode: not where the word already stood before in the mission
        token = tokens[:, column]
        again = (tokens[:, :column] == token[:, None]).any(axis=1)
        weight = np.where(again, 0, mission_episodes)
        result += np.bincount(token, weights=weight, minlength=words + 1).astype(np.int64)
    return result[1:]
