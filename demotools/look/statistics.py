"""Statistics of a store, and a hash for each episode: one pass, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS, COLOURS, OBJECTS, STATES
from demotools.look.info import store_info
from demotools.store.duplicates import episode_hashes, mission_hashes, step_blocks
from demotools.store.format import damaged
from demotools.store.reading import Store, reopened

_CELL_SHAPE = (len(OBJECTS), len(COLOURS), len(STATES))


@dataclass(frozen=True)
class StoreStatistics:
    """What is counted in a store.

    store             the store
    info              what `demotools info --json` prints
    episode_hash      uint64 [E]
    mission_hash      uint64 [M]
    action_steps      int64 [7], steps with each action
    cell_counts       int64 [11, 6, 3], cells of all views; None where views are not packed
    mission_episodes  int64 [M], episodes with each mission
    mission_length    int64 [M], words of each mission
    word_episodes     int64 [N], episodes whose mission contains each word of the vocabulary
    """

    store: Store
    info: dict[str, Any]
    episode_hash: NDArray[np.uint64]
    mission_hash: NDArray[np.uint64]
    action_steps: NDArray[np.int64]
    cell_counts: NDArray[np.int64] | None
    mission_episodes: NDArray[np.int64]
    mission_length: NDArray[np.int64]
    word_episodes: NDArray[np.int64]

    @property
    def name(self) -> str:
        """The store's name."""
        return self.store.name

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        percent = (0, 25, 50, 75, 100)
        quartiles = np.percentile(self.store.lengths, percent).tolist()
        objects = {}
        if self.cell_counts is not None:
            objects = dict(zip(OBJECTS, self.cell_counts.sum(axis=(1, 2)).tolist(), strict=True))
        words = zip(self.store.attributes.vocabulary, self.word_episodes.tolist(), strict=True)
        return {
            **self.info,
            "length_quartiles": dict(zip(map(str, percent), quartiles, strict=True)),
            "action_steps": dict(zip(ACTIONS, self.action_steps.tolist(), strict=True)),
            "object_cells": objects,
            "word_episodes": {word: number for word, number in words if number},
        }


def store_statistics(store: Store, *, quiet: bool = False) -> StoreStatistics:
    """Count what there is in a store; every byte of its views and actions is read once.

    StoreError  the store was replaced meanwhile, or a value is not in its range
    """
    missions = mission_hashes(store)
    found = []
    actions = np.zeros(len(ACTIONS), dtype=np.int64)
    codes = np.zeros(256, dtype=np.int64)
    for episodes, offset, view, action in step_blocks(store, quiet=quiet):
        mission = missions[store.episode_mission[episodes]]
        found.append(episode_hashes(mission, offset, view, action))
        actions += np.bincount(action, minlength=len(ACTIONS))
        codes += np.bincount(view.reshape(-1), minlength=256) if store.packed else 0
    mission_episodes = np.bincount(store.episode_mission, minlength=len(store.mission_tokens))
    # the folder's details must be those of the store that was counted
    reopened(store.path, store.attributes.fingerprint)
    cells = codes[: int(np.prod(_CELL_SHAPE))].reshape(_CELL_SHAPE)
    return StoreStatistics(
        store=store,
        info=store_info(store.path),
        episode_hash=np.concatenate(found),
        mission_hash=missions,
        action_steps=actions,
        cell_counts=cells if store.packed else None,
        mission_episodes=mission_episodes,
        mission_length=np.count_nonzero(store.mission_tokens, axis=1),
        word_episodes=_word_episodes(store, mission_episodes),
    )


def _word_episodes(store: Store, mission_episodes: NDArray[np.int64]) -> NDArray[np.int64]:
    words = len(store.attributes.vocabulary)
    if store.mission_tokens.max(initial=0) > words:
        raise damaged(store.path, "its missions contain words that are not in its vocabulary")
    result = np.zeros(words + 1, dtype=np.int64)
    tokens = store.mission_tokens
    for column in range(tokens.shape[1]):
        # once an episode: not where the word already stood before in the mission
        token = tokens[:, column]
        again = (tokens[:, :column] == token[:, None]).any(axis=1)
        weight = np.where(again, 0, mission_episodes)
        result += np.bincount(token, weights=weight, minlength=words + 1).astype(np.int64)
    return result[1:]
