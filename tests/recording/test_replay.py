"""Stored episodes are played again: what differs is found, what cannot be known is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from demotools.cli import main
from demotools.recording.bot import Style
from demotools.recording.environment import make_environment
from demotools.recording.record import generate, planned_recording
from demotools.recording.replay import evenly_spread, replay_check, replayed_episode
from demotools.store.reading import Store, open_store
from demotools.store.verify import Check, verify_store
from tests.conftest import build_store, make_episodes
from tests.store.test_store import edit_attributes
from tests.store.test_verify import edit_array

EPISODES = 12


@pytest.fixture
def recorded(tmp_path: Path) -> Store:
    path = tmp_path / "GoToLocal.zarr"
    generate(planned_recording("GoToLocal", EPISODES), path, workers=1, quiet=True)
    return open_store(path)


def edit_source(store: Store, **values: object) -> None:
    source = {**store.attributes.source, **values}
    edit_attributes(store.path, lambda attributes: attributes.update(source=source))


def checked_replay(path: Path, episodes: int = 1000) -> Check:
    return verify_store(path, replay=partial(replay_check, episodes=episodes, quiet=True))[-1]


def test_recorded_episodes_replay_exactly(recorded: Store) -> None:
    check = checked_replay(recorded.path)
    assert check.name == "episodes played again in the environment"
    assert (check.passed, check.note) == (True, "12 of 12 episodes")


def test_the_last_observation_and_the_reward_are_those_of_the_environment(recorded: Store) -> None:
    environment = make_environment("GoToLocal")
    result = replayed_episode(environment, recorded, 3)
    observation, _ = environment.reset(seed=int(recorded.episode_seed[3]))
    start, stop = recorded.episode_offset[3:5]
    for action in recorded.action.span(int(start), int(stop)):
        observation, reward, *_ = environment.step(int(action))
    assert result.difference == ""
    assert result.reward == float(reward) > 0
    assert result.observation is not None
    assert np.array_equal(result.observation["image"], observation["image"])


def other_cell(cells: NDArray[Any]) -> None:
    cells[0, 3, 5] ^= 1


def other_direction(directions: NDArray[Any]) -> None:
    directions[0] = (directions[0] + 1) % 4


def other_mission(rows: NDArray[Any]) -> None:
    rows[0] = (rows[0] + 1) % (rows.max() + 1)


def other_seed(seeds: NDArray[Any]) -> None:
    seeds[0] = 999_999


@pytest.mark.parametrize(
    ("array", "edit", "found"),
    [
        ("cells", other_cell, "step 0: the view differs"),
        ("direction", other_direction, "step 0: the direction differs"),
        ("episode_mission", other_mission, "step 0: the mission differs"),
        ("episode_seed", other_seed, "step 0: the"),
    ],
)
def test_one_changed_value_is_found_with_its_episode_and_step(
    recorded: Store, array: str, edit: Callable[[NDArray[Any]], None], found: str
) -> None:
    edit_array(recorded.path, array, edit)
    (problem,) = checked_replay(recorded.path).problems
    assert problem.startswith(f"episode 0, {found}")


@pytest.mark.parametrize(
    ("array", "found"),
    [
        ("action", "the stored action is"),
        ("subgoal", "the stored subgoal is"),
        ("taken", "the view differs"),
    ],
)
def test_changed_advice_subgoals_and_noise_are_found(
    tmp_path: Path, array: str, found: str
) -> None:
    path = tmp_path / "GoToLocal.zarr"
    style = Style(noise=0.2, subgoals=True)
    generate(planned_recording("GoToLocal", 3, style=style), path, workers=1, quiet=True)
    assert "the bot's advice" in checked_replay(path).note

    def other(values: NDArray[Any]) -> None:
        values[0] = 1 + values[0] % 2

    edit_array(path, array, other)
    (problem,) = checked_replay(path).problems
    assert problem.startswith(f"episode 0, step {int(array == 'taken')}: {found}")


def test_another_last_action_brings_no_reward(recorded: Store) -> None:
    last = int(recorded.episode_offset[1]) - 1

    def other_action(actions: NDArray[Any]) -> None:
        assert actions[last] == 2  # forward: towards the object of the mission
        actions[last] = 4

    edit_array(recorded.path, "action", other_action)
    (problem,) = checked_replay(recorded.path).problems
    assert problem == f"episode 0, step {last}: the last action gave no reward"


def test_an_episode_that_ends_before_its_last_stored_action_is_found(recorded: Store) -> None:
    episodes = recorded.take(np.array([0]))
    longer = type(episodes)(
        length=episodes.length + 1,
        mission=episodes.mission,
        seed=episodes.seed,
        view=np.concatenate([episodes.view, episodes.view[-1:]]),
        direction=np.concatenate([episodes.direction, episodes.direction[-1:]]),
        action=np.concatenate([episodes.action, episodes.action[-1:]]),
    )
    store = build_store(recorded.path.with_name("Longer.zarr"), longer)
    result = replayed_episode(make_environment("GoToLocal"), store, 0)
    step = int(episodes.length[0]) - 1
    assert result.difference == f"step {step}: the episode ended early, after forward"


def test_a_store_of_an_old_pickle_is_not_played(recorded: Store) -> None:
    edit_source(recorded, kind="pickle")
    check = checked_replay(recorded.path)
    assert check.passed
    assert check.note == (
        "not replayed: the store comes from an old pickle, whose seeds and environment are unknown"
    )


def test_a_store_without_seeds_is_not_played(recorded: Store) -> None:
    edit_array(recorded.path, "episode_seed", lambda seeds: seeds.fill(-1))
    check = checked_replay(recorded.path)
    assert (check.passed, check.note) == (True, "not replayed: no episode has a known seed")


def test_episodes_without_a_seed_are_left_out_and_counted(recorded: Store) -> None:
    def forget(seeds: NDArray[Any]) -> None:
        seeds[:5] = -1

    edit_array(recorded.path, "episode_seed", forget)
    assert checked_replay(recorded.path).note == "7 of 12 episodes; 5 have no known seed"


def test_differences_from_another_version_of_the_environment_are_told_not_blamed(
    recorded: Store,
) -> None:
    edit_array(recorded.path, "direction", other_direction)
    edit_source(recorded, minigrid="2.3.1")
    check = checked_replay(recorded.path)
    assert check.passed
    versions = f"recorded with minigrid 2.3.1, and {version('minigrid')} is installed; the first is"
    assert f"1 differ, as expected: they were {versions} episode " in check.note


def test_a_level_without_an_environment_is_not_played(tmp_path: Path) -> None:
    store = build_store(tmp_path / "PutNext.zarr", make_episodes([2, 3]), level="PutNext")
    check = replay_check(store, 10, quiet=True)
    assert check.skipped and check.passed
    assert check.note.startswith("not replayed: this level cannot be played: minigrid does not")


def test_the_command_plays_as_many_episodes_as_asked_for(recorded: Store) -> None:
    arguments = ["verify", str(recorded.path), "--replay", "--episodes", "5", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[-1]["note"] == "5 of 12 episodes"


def test_a_number_of_episodes_without_replay_is_wrong_usage(recorded: Store) -> None:
    result = CliRunner().invoke(main, ["verify", str(recorded.path), "--episodes", "5"])
    assert result.exit_code == 2
    assert "--episodes needs --replay" in result.output


def test_rows_are_spread_evenly_and_never_twice() -> None:
    rows = np.arange(100, 1100)
    chosen = evenly_spread(rows, 7)
    assert len(set(chosen.tolist())) == 7
    assert chosen[0] == 100
    assert set(np.diff(chosen)) <= {142, 143}
    assert evenly_spread(rows, 5000) is rows
