"""Episodes of many environments, counted in the order in which they began.

In any stretch of time the short episodes end first, and those are the successes: what has ended by
then flatters. So an episode counts only once all that began before it have ended, at most a step
limit later; how it went has no part in whether it counts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class _Episode:
    """Of environment `row`; its length in steps is 0 as long as it goes on."""

    row: int
    length: int = 0
    reward: float = 0.0
    counts: bool = True


class Tally:
    """The episodes of `count` environments that step together, all beginning now."""

    def __init__(self, count: int) -> None:
        self._steps = np.zeros(count, dtype=np.int64)
        self._begun: deque[_Episode] = deque()
        self._present: list[_Episode] = []
        for row in range(count):
            self._present.append(self._begin(row))

    def spoil(self) -> None:
        """Let no episode count that is under way: the expert may act in it."""
        for episode in self._present:
            episode.counts = False

    def note(self, reward: NDArray[np.float32], ended: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Note a step of every environment; the episodes that are to be counted now.

        reward    [count], of this step
        ended     [count], whether the episode did, and the next one has begun
        returns   float64 [n, 2], reward of the last step and length in steps
        """
        self._steps += 1
        for row in np.flatnonzero(ended).tolist():
            episode = self._present[row]
            episode.length, episode.reward = int(self._steps[row]), float(reward[row])
            self._present[row] = self._begin(row)
        self._steps[ended] = 0
        counted = []
        while self._begun[0].length:
            episode = self._begun.popleft()
            if episode.counts:
                counted.append((episode.reward, episode.length))
        return np.array(counted, dtype=np.float64).reshape(-1, 2)

    def _begin(self, row: int) -> _Episode:
        self._begun.append(episode := _Episode(row))
        return episode

    def state(self) -> dict[str, Any]:
        """What must survive a resume: plain values."""
        return {
            "steps": self._steps.tolist(),
            "begun": [astuple(episode) for episode in self._begun],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._steps = np.array(state["steps"], dtype=np.int64)
        self._begun = deque(_Episode(*values) for values in state["begun"])
        present = {episode.row: episode for episode in self._begun if not episode.length}
        self._present = [present[row] for row in range(len(self._steps))]
