"""Which episodes count, and when."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainer.acting.collect import EpisodeCounter

LIMIT = 12


class Played:
    """Environments whose episodes have these lengths in turn; the reward is the length."""

    def __init__(self, lengths: list[list[int]]) -> None:
        self.begun: list[int] = []
        self._streams = [iter(row) for row in lengths]
        self._left = [self._next(stream) for stream in self._streams]
        self._length = list(self._left)

    def _next(self, stream: object) -> int:
        length = next(stream, 10**6)  # type: ignore[call-overload]
        self.begun.append(length)
        return int(length)

    def step(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        self._left = [left - 1 for left in self._left]
        ended = np.array([left == 0 for left in self._left])
        reward = np.where(ended, self._length, 0).astype(np.float32)
        for row in np.flatnonzero(ended).tolist():
            self._left[row] = self._length[row] = self._next(self._streams[row])
        return reward, ended


rows = st.lists(st.lists(st.integers(1, LIMIT), max_size=9), min_size=1, max_size=5)


@given(rows, st.integers(0, 60))
def test_what_counts_are_the_first_episodes_that_began_whatever_came_of_them(
    lengths: list[list[int]], steps: int
) -> None:
    counter, played = EpisodeCounter(len(lengths)), Played(lengths)
    counted = np.concatenate(
        [np.zeros((0, 2)), *(counter.step(*played.step()) for _ in range(steps))]
    )
    assert counted[:, 0].tolist() == counted[:, 1].tolist() == played.begun[: len(counted)]


@given(rows, st.integers(0, 60))
def test_a_counter_goes_on_from_its_state(lengths: list[list[int]], steps: int) -> None:
    counter, played = EpisodeCounter(len(lengths)), Played(lengths)
    for _ in range(steps):
        counter.step(*played.step())
    again = EpisodeCounter(len(lengths))
    again.load_state(counter.state())
    for _ in range(LIMIT):
        step = played.step()
        assert np.array_equal(counter.step(*step), again.step(*step))


def test_a_step_limit_after_the_beginning_the_share_of_successes_is_right() -> None:
    # half of the episodes succeed within 2 steps, half fail at the limit
    random = np.random.default_rng(0)
    lengths = np.where(random.random((200, 50)) < 0.5, 2, LIMIT)
    counter, played = EpisodeCounter(200), Played(lengths.tolist())
    ended, counted = [], []
    for _ in range(LIMIT):
        reward, over = played.step()
        ended.extend(reward[over] == 2)
        counted.extend(counter.step(reward, over)[:, 0] == 2)
    assert np.mean(ended) > 0.6
    # 3 standard deviations of 200 episodes
    assert len(counted) >= 200 and abs(np.mean(counted) - 0.5) < 0.11


def test_episodes_under_way_when_the_expert_may_act_never_count_and_later_ones_do() -> None:
    counter, played = EpisodeCounter(2), Played([[1, 2, 2], [3, 3]])
    assert counter.step(*played.step()).tolist() == [[1, 1]]
    counter.exclude_present()
    counted = [counter.step(*played.step()).tolist() for _ in range(5)]
    assert counted == [[], [], [], [[2, 2]], [[3, 3]]]
