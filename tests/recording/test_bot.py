from typing import Any

import numpy as np
import pytest

from demotools.babyai.cells import ACTIONS
from demotools.recording.bot import BotError, Episode, Expert, Failure, record_episode
from demotools.recording.environment import make_environment, observed_cells

TOGGLE = ACTIONS.index("toggle")


def recorded(level: str, seed: int) -> Episode:
    episode = record_episode(make_environment(level), seed)
    assert isinstance(episode, Episode)
    return episode


def assert_equal(left: Episode, right: Episode) -> None:
    assert (left.mission, left.seed) == (right.mission, right.seed)
    for name in ("cells", "direction", "action"):
        assert np.array_equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize("level", ["GoToLocal", "PutNextLocal", "Unlock"])
@pytest.mark.parametrize("seed", [0, 1, 2_000_000])
def test_an_episode_replays_from_its_seed(level: str, seed: int) -> None:
    episode = recorded(level, seed)
    environment = make_environment(level)
    observation, _ = environment.reset(seed=seed)
    reward, terminated = 0.0, False
    for step, action in enumerate(episode.action.tolist()):
        assert not terminated
        assert observation["mission"] == episode.mission
        assert observation["direction"] == episode.direction[step]
        assert np.array_equal(observed_cells(observation["image"]), episode.cells[step])
        observation, value, terminated, _, _ = environment.step(action)
        reward = float(value)
    assert terminated
    assert reward > 0


@pytest.mark.parametrize("level", ["GoToLocal", "UnblockPickup", "BossLevel"])
def test_an_episode_does_not_depend_on_those_played_before(level: str) -> None:
    environment = make_environment(level)
    for seed in (5, 6, 7):
        again = record_episode(environment, seed)
        assert isinstance(again, Episode)
        assert_equal(again, recorded(level, seed))


def test_a_plan_without_end_is_a_failure_after_a_counted_number_of_looks() -> None:
    # on this seed minigrid's bot plans for ever
    results = [record_episode(make_environment("GoToImpUnlock"), 6) for _ in range(2)]
    assert results == [Failure(6, "replan limit")] * 2


def is_solvable(level: Any) -> bool:
    """Whether a target, or a key to a locked door, can be reached without opening a lock.

    Things that can be moved are no obstacle.
    """
    reached = {tuple(map(int, level.agent_pos))}
    waiting, colours = list(reached), set()
    while waiting:
        x, y = waiting.pop()
        for place in {(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)} - reached:
            cell = level.grid.get(*place)
            if cell and cell.type == "door" and cell.is_locked:
                colours.add(cell.color)
            elif not cell or cell.type != "wall":
                reached.add(place)
                waiting.append(place)
    _, targets = level.instrs.desc.find_matching_objs(level)
    keys = [
        place
        for place in reached
        if (cell := level.grid.get(*place)) and cell.type == "key" and cell.color in colours
    ]
    return bool(keys) or any(tuple(map(int, place)) in reached for place in targets)


@pytest.mark.slow
@pytest.mark.parametrize(("level", "unsolvable"), [("Unlock", 18), ("GoToImpUnlock", 20)])
def test_the_bot_solves_what_can_be_solved_of_the_evaluation(level: str, unsolvable: int) -> None:
    environment = make_environment(level)
    failed, without_a_way = [], []
    for seed in range(2_000_000_000, 2_000_001_000):
        environment.reset(seed=seed)
        if not is_solvable(environment.unwrapped):
            without_a_way.append(seed)
        if isinstance(record_episode(environment, seed), Failure):
            failed.append(seed)
    assert failed == without_a_way
    assert len(failed) == unsolvable


def test_a_bot_that_gives_up_is_a_failure_with_its_reason() -> None:
    import gymnasium
    import minigrid  # noqa: F401  (registers the environments)

    environment = gymnasium.make("BabyAI-PutNextS5N2Carrying-v0").unwrapped
    failure = record_episode(environment, 0)
    assert failure == Failure(0, "AssertionError: 0nothing left to explore")


def test_the_expert_leads_a_wandering_agent_to_success() -> None:
    environment = make_environment("GoToLocal")
    random = np.random.default_rng(0)
    for seed in range(20):
        environment.reset(seed=seed)
        expert = Expert(environment)
        advice, ended, value = expert.action(), False, 0.0
        for step in range(60):
            wanders = step < 6 and random.random() < 0.5
            action = int(random.integers(0, 3)) if wanders else advice
            _, reward, terminated, truncated, _ = environment.step(action)
            value, ended = float(reward), terminated or truncated
            if ended:
                break
            advice = expert.action(action)
        assert ended
        assert value > 0


def test_the_expert_has_no_advice_once_a_box_was_opened() -> None:
    environment = make_environment("GoToObj")
    for seed in range(50):
        observation, _ = environment.reset(seed=seed)
        if observation["mission"].endswith("box"):
            break
    expert = Expert(environment)
    # walk to the box: the last step faces it, and the episode ends there
    action, facing = expert.action(), False
    world = environment.unwrapped
    while not facing:
        environment.step(action)
        ahead = world.grid.get(*world.front_pos)  # type: ignore[attr-defined]
        facing = ahead is not None and ahead.type == "box"
        action = expert.action(action)
    environment.step(TOGGLE)
    with pytest.raises(BotError, match="DisappearedBoxError"):
        expert.action(TOGGLE)
    # the mission's own box is gone: beginning anew does not help either
    assert expert.advice() == -1


def test_advice_leads_to_success_after_a_hundred_random_actions() -> None:
    environment = make_environment("BossLevel")
    successes = 0
    for seed in range(30):
        environment.reset(seed=seed)
        expert, random = Expert(environment), np.random.default_rng(seed)
        advice, ended, value, step, unknown = expert.advice(), False, 0.0, 0, 0
        while not ended:
            action = int(random.integers(0, 6)) if step < 100 else advice
            if action < 0:
                break  # an object that the mission needs is gone
            _, reward, terminated, truncated, _ = environment.step(action)
            value, ended, step = float(reward), terminated or truncated, step + 1
            advice = expert.advice(action)
            unknown += advice < 0 and not ended
        successes += value > 0
        assert value == 0 or not unknown  # what can be done has advice at every step
    assert successes >= 28


def test_an_expert_that_begins_anew_knows_what_it_has_seen() -> None:
    environment = make_environment("GoToObjMaze")
    environment.reset(seed=1)
    expert, taken = Expert(environment), None
    for _ in range(20):
        taken = expert.advice(taken)
        assert not any(environment.step(taken)[2:4])
    seen = expert._bot.vis_mask.copy()
    expert._begin_anew()
    assert expert._bot.vis_mask[seen].all()
    assert seen.sum() > Expert(environment)._bot.vis_mask.sum()  # than what is in sight


def test_there_is_no_advice_where_a_later_part_of_the_mission_cannot_be_done() -> None:
    environment: Any = make_environment("PutNextLocal")
    world = environment.unwrapped
    seed = 0
    while environment.reset(seed=seed)[0]["mission"].split()[-1] != "box":
        seed += 1
    (box,) = world.instrs.desc_fixed.obj_set
    x, y = box.cur_pos
    for direction, (beside_x, beside_y) in enumerate(((-1, 0), (0, -1), (1, 0), (0, 1))):
        if world.grid.get(x + beside_x, y + beside_y) is None:
            world.agent_pos, world.agent_dir = (x + beside_x, y + beside_y), direction
    assert world.grid.get(*world.front_pos) is box
    expert = Expert(environment)
    assert expert.advice() >= 0
    environment.step(TOGGLE)
    # what is to be put beside it could still be picked up
    assert expert.advice(TOGGLE) == -1
