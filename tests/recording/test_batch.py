"""Levels that step together against stock minigrid's, one by one: every bit."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from minigrid.core.world_object import Box, Goal, Key
from minigrid.envs.babyai.core import verifier

from demotools.babyai.cells import packed_cells
from demotools.recording.batch import Batch, _is_known, can_be_batched
from demotools.recording.bot import BotError, Expert
from demotools.recording.environment import cell_code, make_environment
from tests.recording.test_fast import LEVELS, twins
from tests.recording.test_generation import ALL


class Pair:
    """A batch, and as many stock environments that take the same steps."""

    def __init__(self, fast: list[Any], stock: list[Any]) -> None:
        assert all(can_be_batched(level) for level in fast)
        self.batch, self.stock = Batch(fast), stock
        self.rows = np.arange(len(stock))
        self.observations: list[Any] = [None] * len(stock)
        self.over = np.zeros(len(stock), dtype=np.bool_)

    def reset(self, number: int, seed: int) -> None:
        mission = self.batch.reset(number, seed)
        self.observations[number], _ = self.stock[number].reset(seed=seed)
        assert mission == self.observations[number]["mission"]

    def step(self, rows: np.ndarray[Any, Any], actions: list[int]) -> None:
        reward, terminated, truncated = self.batch.step(rows, np.array(actions))
        for index, (number, action) in enumerate(zip(rows.tolist(), actions, strict=True)):
            self.observations[number], *wanted, _ = self.stock[number].step(action)
            ours = [reward[index], bool(terminated[index]), bool(truncated[index])]
            assert ours == [np.float32(wanted[0]), *wanted[1:]], (number, action)
            self.over[number] = wanted[1] or wanted[2]

    def compare(self) -> None:
        views = self.batch.views(self.rows)
        for number, observation in enumerate(self.observations):
            assert np.array_equal(views[number], packed_cells(observation["image"])), number
            assert self.batch.direction[number] == observation["direction"]


def pair_of(names: list[str]) -> Pair:
    fast = [make_environment(name) for name in names]
    return Pair(fast, [make_environment(name, stock=True) for name in names])


def play(pair: Pair, advisers: list[Any], steps: int, seed: int, share: float) -> int:
    """Steps of a bot that is drunk: each action is its advice or, at a share of them, by chance.

    advisers   the same levels again, for the bot
    returns    how many episodes the bot ended
    """
    random = np.random.default_rng(seed)
    experts: list[Any] = [None] * len(advisers)
    taken: list[int | None] = [None] * len(advisers)
    ended = 0
    for number, adviser in enumerate(advisers):
        pair.reset(number, seed + number)
        adviser.reset(seed=seed + number)
        experts[number] = Expert(adviser)
    for step in range(steps):
        pair.compare()
        actions = []
        for number, expert in enumerate(experts):
            try:
                advice = expert.action(taken[number])
            except BotError:
                advice = int(random.integers(7))
            chance = random.random() < share
            actions.append(int(random.integers(7)) if chance else advice)
        pair.step(pair.rows, actions)
        for number, action in enumerate(actions):
            taken[number] = action
            advisers[number].step(action)
            if pair.over[number]:
                ended += 1
                again = seed + 1000 * (step + 1) + number
                pair.reset(number, again)
                advisers[number].reset(seed=again)
                experts[number], taken[number] = Expert(advisers[number]), None
    pair.compare()
    return ended


@settings(max_examples=12)
@given(
    st.lists(st.sampled_from(LEVELS), min_size=1, max_size=4),
    st.integers(0, 2**20),
    st.sampled_from([0.1, 0.5, 1.0]),
)
def test_any_levels_step_together_as_each_by_itself(
    names: list[str], seed: int, share: float
) -> None:
    play(pair_of(names), [make_environment(name) for name in names], 60, seed, share)


@given(
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), min_size=1, max_size=60),
)
@settings(max_examples=25)
def test_any_rows_step_while_others_stand_still(seed: int, script: list[tuple[int, int]]) -> None:
    for number in range(3):
        THREE.reset(number, seed + number)
    for row, action in script:
        THREE.step(np.array([row]), [action])
        THREE.compare()
        if THREE.over[row]:
            THREE.reset(row, seed + 100)


THREE = pair_of(["PutNextLocal", "BossLevel", "GoToObj"])


@pytest.mark.slow
@pytest.mark.parametrize("identifier", ALL)
def test_steps_of_every_level_are_those_of_stock(identifier: str) -> None:
    if not can_be_batched(twins(identifier)[0]):
        pytest.skip("its reset may change what it made, so it is stepped alone")
    made = [twins(identifier) for _ in range(6)]
    pair = Pair([fast for fast, _ in made], [stock for _, stock in made])
    advisers = [twins(identifier)[0] for _ in range(6)]
    for share in (0.05, 0.3, 1.0):
        play(pair, advisers, 700, 7, share)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_30_000_steps_of_a_batch_are_those_of_stock(level: str) -> None:
    pair = pair_of([level] * 10)
    assert play(pair, [make_environment(level) for _ in range(10)], 2000, 3, 0.1) > 10
    play(pair, [make_environment(level) for _ in range(10)], 1000, 5, 1.0)


def put(pair: Pair, thing: Any) -> None:
    """Put it in front of the agent of the first level of both, whose aim it is not."""
    fast, stock = pair.batch._levels[0], pair.stock[0]
    for level in (fast, stock):
        level.agent_pos, level.agent_dir = (3, 3), 0
        level.grid.set(4, 3, thing)
    batch = pair.batch
    batch._at[0], batch.direction[0] = batch._place(0, (3, 3)), 0
    batch._cells[batch._place(0, (4, 3))] = cell_code(thing)


def test_a_goal_ends_an_episode_and_an_unknown_action_is_refused_as_by_minigrid() -> None:
    pair = pair_of(["GoToObj"])
    pair.reset(0, 0)
    put(pair, Goal())
    pair.step(pair.rows, [2])
    assert pair.over[0]
    for action in (7, -1):
        with pytest.raises(ValueError, match=f"Unknown action: {action}"):
            pair.batch.step(pair.rows, np.array([action]))


def test_a_box_that_was_opened_is_no_longer_gone_to_after_the_next_drop() -> None:
    # minigrid looks for the mission's objects again when the agent drops, even where it cannot
    pair = pair_of(["GoToObj"])
    pair.reset(0, 0)
    box = Box("red")
    put(pair, box)
    for level in (pair.batch._levels[0], pair.stock[0]):
        box.cur_pos = (4, 3)
        level.instrs.desc.obj_set, level.instrs.desc.obj_poss = [box], [(4, 3)]
    # not aimed at by the batch: the episode goes on until it looks again
    pair.batch._aim(0)
    aims = pair.batch._aims.copy()
    pair.step(pair.rows, [5])
    assert pair.over[0]
    assert np.array_equal(pair.batch._aims, aims)
    # the box is gone, and so has the agent turned
    pair.step(pair.rows, [0])
    assert np.array_equal(pair.batch._aims, aims)
    pair.step(pair.rows, [4])
    assert not pair.batch._aims.any()
    pair.step(pair.rows, [1])
    assert not pair.over[0]


def test_strict_instructions_are_looked_at_after_every_step() -> None:
    ball = verifier.ObjDesc("ball")  # type: ignore[no-untyped-call]
    strict = verifier.PickupInstr(ball, strict=True)  # type: ignore[no-untyped-call]
    lax = verifier.PickupInstr(ball)  # type: ignore[no-untyped-call]
    assert _is_known(lax)
    assert not _is_known(strict)
    assert not _is_known(verifier.AndInstr(lax, strict))  # type: ignore[no-untyped-call]
    assert not _is_known(object())
    pair = pair_of(["GoToObj"])
    pair.reset(0, 0)
    key = Key("red")
    put(pair, key)
    for level in (pair.batch._levels[0], pair.stock[0]):
        level.instrs = verifier.PickupInstr(ball, strict=True)  # type: ignore[no-untyped-call]
        level.instrs.reset_verifier(level)
    pair.batch._watched[0] = not _is_known(pair.batch._levels[0].instrs)
    pair.step(pair.rows, [3])
    assert pair.over[0]


def test_only_what_does_as_minigrid_does_is_batched() -> None:
    level: Any = make_environment("GoToLocal")
    assert can_be_batched(level)
    assert not can_be_batched(make_environment("GoToLocal", stock=True))
    assert not can_be_batched(make_environment("GoToLocal", render_mode="rgb_array"))
    assert not can_be_batched(make_environment("BabyAI-PutNextS5N2Carrying-v0"))
    assert not can_be_batched(gymnasium.make("MiniGrid-Empty-5x5-v0"))

    class Own(type(level)):  # type: ignore[misc]
        """A level that somebody derived from it."""

    assert not can_be_batched(Own())
    vars(level)["step"] = level.step
    assert not can_be_batched(level)
