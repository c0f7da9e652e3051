"""The search expert: it solves minigrid's levels from wherever a policy has wandered."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from demotools.errors import LevelError, SettingsError
from demotools.recording.bot import Style, can_play, expert_of
from demotools.recording.environment import environment_words, make_environment
from demotools.recording.record import generate, planned_recording
from demotools.recording.replay import replay_check
from demotools.recording.search import SearchExpert
from demotools.store.reading import open_store
from demotools.store.verify import verify_store

LEVELS = [
    *("Empty-Random-6x6", "DoorKey-5x5", "DoorKey-8x8", "MultiRoom-N2-S4", "MultiRoom-N6"),
    *("KeyCorridorS3R1", "KeyCorridorS6R3", "Fetch-5x5-N2", "Fetch-8x8-N3", "Unlock"),
    *("UnlockPickup", "BlockedUnlockPickup", "FourRooms", "LavaCrossingS9N3", "LavaGapS5"),
]


@pytest.mark.parametrize("level", LEVELS)
def test_every_episode_is_solved_with_and_without_wandering(level: str) -> None:
    environment = make_environment(f"MiniGrid-{level}-v0")
    assert can_play(environment)
    for seed in range(8):
        environment.reset(seed=seed)
        expert, draw, taken = expert_of(environment), Random(seed), None
        assert isinstance(expert, SearchExpert)
        over, reward, steps = False, 0.0, 0
        while not over:
            taken = expert.action(taken)
            # turns, drops and toggles harm nobody; picking up ends an episode of Fetch
            if seed % 2 and steps < 20 and draw.random() < 0.5:
                taken = draw.choice([0, 1, 4, 5])
            _, got, terminated, truncated, _ = environment.step(taken)
            over, reward, steps = terminated or truncated, float(got), steps + 1
        assert reward > 0, (seed, steps)


def test_the_shortest_way_is_taken_where_nothing_stands_on_it() -> None:
    environment = make_environment("MiniGrid-Empty-16x16-v0")
    environment.reset(seed=0)
    expert, steps, terminated = expert_of(environment), 0, False
    while not terminated:
        terminated = environment.step(expert.action())[2]
        steps += 1
    assert steps == 13 + 1 + 13  # along one wall, a turn, along the other


def test_what_has_no_goal_for_a_search_is_refused_before_anything_is_written() -> None:
    with pytest.raises(LevelError, match="no expert can play this level"):
        planned_recording("MiniGrid-GoToDoor-5x5-v0", 5)
    with pytest.raises(SettingsError, match="no subgoals"):
        planned_recording("MiniGrid-DoorKey-5x5-v0", 5, style=Style(subgoals=True))


def test_a_recorded_level_is_a_store_like_any_other(tmp_path: Path) -> None:
    recording = planned_recording("MiniGrid-DoorKey-5x5-v0", 12, style=Style(noise=0.2))
    path = tmp_path / "DoorKey.zarr"
    generate(recording, path, workers=1, quiet=True)
    store = open_store(path)
    assert all(check.passed for check in verify_store(path, quiet=True))
    assert store.episodes == 12 and store.level == "MiniGrid-DoorKey-5x5-v0"
    assert store.attributes.source["bot"] == "demotools.recording.search.SearchExpert"
    check = replay_check(store, 12, quiet=True)
    assert not check.problems and not check.skipped, check


def test_the_words_of_a_level_are_gathered_from_its_mission_space_and_its_episodes() -> None:
    fetch = make_environment("MiniGrid-Fetch-5x5-N2-v0")
    assert environment_words(fetch) == ("get", "fetch", "must")
    door = make_environment("MiniGrid-DoorKey-5x5-v0")
    assert environment_words(door) == ("use", "get", "goal")
    assert environment_words(make_environment("GoToObj")) == ()
