"""Two symmetries of the task, applied to whole native batches; and the missions of a batch.

`recolor` permutes the six colours of doors, keys, balls and boxes, in the cells and in the
mission's words alike; `mirror` exchanges left and right in the view, the direction, the actions
and the mission's words. Each episode keeps its draw from its first step to its last, across
batches. A draw is a pure function of the seed, the rollout and how many episodes the rollout has
begun, so a resumed run draws the same, and so does any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demotools.grid import BALL, BOX, COLOURS, DOOR, KEY, UNPACKING_TABLE
from trainer.rollouts import Batch

Symmetry = Literal["recolor", "mirror"]
PERMUTATIONS: NDArray[np.int64] = np.array(list(permutations(range(len(COLOURS)))))
"""int64 [720, 6]: the new colour of each colour; row 0 changes nothing."""
MIRRORED_ACTION = torch.tensor([1, 0, 2, 3, 4, 5, 6], dtype=torch.uint8)
MIRRORED_DIRECTION = torch.tensor([2, 1, 0, 3], dtype=torch.uint8)


def recoloured_codes() -> Tensor:
    """The code of a cell under every permutation: uint8 [720, 256].

    Only doors, keys, balls and boxes change: walls are always grey, and empty and unseen cells
    have no colour.
    """
    codes = np.arange(256)
    kind, colour, state = UNPACKING_TABLE.astype(np.int64).T
    changed = kind * 18 + PERMUTATIONS[:, colour % len(COLOURS)] * 3 + state
    movable = np.isin(kind, (DOOR, KEY, BALL, BOX))
    return torch.from_numpy(np.where(movable, changed, codes).astype(np.uint8))


def exchanged_words(words: Sequence[str]) -> Tensor:
    """The id of a word under every draw (permutation * 2 + mirrored): int64 [1440, N + 1].

    words   the N words of the vocabulary; id 0 is padding
    """
    ids = {word: number for number, word in enumerate(words, start=1)}
    table = np.tile(np.arange(len(words) + 1), (len(PERMUTATIONS), 2, 1))
    for colour, word in enumerate(COLOURS):
        new = np.array([ids[name] for name in COLOURS])
        table[:, :, ids[word]] = new[PERMUTATIONS[:, colour]][:, None]
    table[:, 1, ids["left"]], table[:, 1, ids["right"]] = ids["right"], ids["left"]
    return torch.from_numpy(table.reshape(-1, len(words) + 1))


class Augmenter:
    """Applies symmetries to the native batches of one iterator, in their order.

    first_rollout   the number of the first row over all processes
    """

    def __init__(
        self,
        symmetries: Sequence[Symmetry],
        words: Sequence[str],
        *,
        rollouts: int,
        seed: int,
        first_rollout: int = 0,
    ) -> None:
        self._recolor, self._mirror = "recolor" in symmetries, "mirror" in symmetries
        self._codes = recoloured_codes()
        self._words = exchanged_words(words)
        self._seed = seed
        self._rollout = np.arange(first_rollout, first_rollout + rollouts)
        self._begun = np.zeros(rollouts, dtype=np.int64)

    def __call__(self, batch: Batch, tokens: Tensor) -> Batch:
        """The batch under each episode's draw, with the token ids of the missions in it.

        tokens    int64 [M, L]
        returns   as `batch_missions`
        """
        if not (self._recolor or self._mirror):
            return batch_missions(batch, tokens)
        draw = torch.from_numpy(self._draws(batch["masks"].numpy()))
        permutation, mirrored = draw // 2, draw % 2 == 1
        cells = torch.take(self._codes, permutation[..., None, None] * 256 + batch["cells"])
        if self._mirror:
            cells = torch.where(mirrored[..., None, None], cells.flip(-2), cells)
            turned = MIRRORED_ACTION[batch["action"].int()]
            faced = MIRRORED_DIRECTION[batch["direction"].int()]
            batch = {
                **batch,
                "action": torch.where(mirrored, turned, batch["action"]),
                "direction": torch.where(mirrored, faced, batch["direction"]),
            }
        key, place = torch.unique(batch["mission"].long() * 1440 + draw, return_inverse=True)
        exchanged = torch.gather(self._words[key % 1440], 1, tokens[key // 1440])
        return batch_missions({**batch, "cells": cells, "mission": place}, exchanged)

    def _draws(self, masks: NDArray[np.uint8]) -> NDArray[np.int64]:
        """permutation * 2 + mirrored of every step: int64 [T, B]."""
        begun = self._begun + np.cumsum(masks == 0, axis=0)
        self._begun = begun[-1]
        bits = _mixed(
            _mixed(_mixed(np.uint64(self._seed)) + self._rollout.astype(np.uint64))
            + begun.astype(np.uint64)
        )
        permutation = (bits >> np.uint64(1)) % np.uint64(len(PERMUTATIONS))
        mirrored = bits & np.uint64(1)
        draw = permutation * np.uint64(2 * self._recolor) + mirrored * np.uint64(self._mirror)
        return draw.astype(np.int64)

    def state(self) -> dict[str, Any]:
        """Where the draws stand, as a JSON value."""
        return {"begun": self._begun.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._begun = np.array(state["begun"], dtype=np.int64)


def batch_missions(batch: Batch, tokens: Tensor) -> Batch:
    """The batch with the distinct missions in it, so that a network reads each only once.

    tokens    int64 [M, L]
    returns   the batch, `mission` int64 [T, B] now a row of its `mission_tokens` int64 [M', L]
    """
    row, place = torch.unique(batch["mission"], return_inverse=True)
    distinct, again = torch.unique(tokens[row.long()], dim=0, return_inverse=True)
    return {**batch, "mission": again[place], "mission_tokens": distinct}


def _mixed(values: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """Well-mixed bits of integers. Source: splitmix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        z = np.asarray(values) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))
