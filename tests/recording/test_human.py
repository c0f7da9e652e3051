"""What people play: solved episodes are added to a store of their own, and nothing else is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demotools.errors import SettingsError, StoreError
from demotools.output import acquired_lock
from demotools.recording.bot import Expert, expert_of
from demotools.recording.environment import Environment, Observation
from demotools.recording.human import FIRST_SEED, QUIT, SKIP, add_episode, play
from demotools.recording.record import generate, planned_recording
from demotools.recording.replay import replay_check
from demotools.recording.search import SearchExpert
from demotools.store.building import StoreBuilder, write_part
from demotools.store.reading import open_store
from demotools.store.verify import verify_store
from tests.conftest import make_episodes, set_aside


class Somebody:
    """Plays as well as the bot, but gives up or only turns in some episodes.

    plan   of each episode: "solve", "give up", "turn" or "quit"
    """

    def __init__(self, *plan: str) -> None:
        self._plan = list(plan)
        self._expert: Expert | SearchExpert | None = None
        self.notes: list[str] = []

    def action(self, environment: Environment, observation: Observation, note: str) -> int:
        del observation
        world: Any = environment.unwrapped
        if world.step_count == 0:
            self._now = self._plan.pop(0)
            self._expert = expert_of(environment)
            self.notes.append(note)
        assert self._expert is not None
        return {"give up": SKIP, "quit": QUIT, "turn": 0}.get(self._now) or (
            0 if self._now == "turn" else self._expert.action()
        )


def test_solved_episodes_are_kept_and_those_of_the_next_sitting_added(tmp_path: Path) -> None:
    path = tmp_path / "GoToLocal-human.zarr"
    somebody = Somebody("solve", "give up", "turn", "solve", "quit")
    played = play("GoToLocal", path, somebody)
    assert (played.episodes, played.solved, played.left_out) == (2, 2, 2)
    assert somebody.notes == [
        "",
        "solved; 1 episode in GoToLocal-human.zarr",
        "skipped",
        "not solved, so not kept",
        "solved; 2 episodes in GoToLocal-human.zarr",
    ]
    first = open_store(path)
    again = play("GoToLocal", path, Somebody("solve"), episodes=1)
    assert (again.episodes, again.solved) == (3, 1)
    store = open_store(path)
    assert store.episode_seed.tolist() == [FIRST_SEED, FIRST_SEED + 3, FIRST_SEED + 4]
    assert np.array_equal(store.view.span(0, first.steps), first.view.span(0, first.steps))
    assert store.attributes.source["kind"] == "human"
    checks = verify_store(path, replay=partial(replay_check, episodes=9, quiet=True), quiet=True)
    assert all(check.passed for check in checks)
    assert checks[-1].note == "3 of 3 episodes"
    set_aside(open_store(path))  # an overwrite was killed between its renames
    with pytest.raises(StoreError, match="not a store of demonstrations of GoToObj by people"):
        play("GoToObj", path, Somebody("quit"))


def test_episodes_of_a_level_of_minigrids_own_are_kept_too(tmp_path: Path) -> None:
    level, path = "MiniGrid-Empty-5x5-v0", tmp_path / "Empty-human.zarr"
    for episodes in (1, 2):
        assert play(level, path, Somebody("solve"), episodes=1).episodes == episodes
    assert open_store(path).level == level


def test_nothing_solved_makes_no_store(tmp_path: Path) -> None:
    played = play("GoToObj", tmp_path / "x.zarr", Somebody("give up", "quit"))
    assert played.text() == "no episode was solved, so no store was made"
    assert not list(tmp_path.iterdir())


def test_no_other_store_is_added_to(tmp_path: Path) -> None:
    bot, mine = tmp_path / "GoToObj.zarr", tmp_path / "mine.zarr"
    generate(planned_recording("GoToObj", 2), bot, workers=1, quiet=True)
    play("GoToObj", mine, Somebody("solve"), episodes=1)
    before = open_store(bot).attributes.fingerprint, open_store(mine).attributes.fingerprint
    for level, path in (("GoToObj", bot), ("GoToLocal", mine)):
        with pytest.raises(StoreError, match="not a store of demonstrations"):
            play(level, path, Somebody("solve"), episodes=1)
    with pytest.raises(SettingsError, match="does not belong to the training split"):
        play("GoToObj", mine, Somebody("solve"), first_seed=2 * 10**9)
    lock = acquired_lock(mine)
    with pytest.raises(StoreError, match="another process"):
        play("GoToObj", mine, Somebody("solve"), episodes=1)
    lock.release()
    assert before == (
        open_store(bot).attributes.fingerprint,
        open_store(mine).attributes.fingerprint,
    )


def test_an_unfinished_store_of_that_name_is_neither_thrown_away_nor_played_over(
    tmp_path: Path,
) -> None:
    path = tmp_path / "GoToObj.zarr"
    episode = make_episodes([3])
    for costly in (True, False):  # a recording, a conversion
        with StoreBuilder(path, {"seed": 1}, overwrite=True, costly=costly) as builder:
            write_part(builder.parts, 0, episode, {})
        somebody = Somebody("solve")
        with pytest.raises(StoreError, match="an unfinished store") as refused:
            play("GoToObj", path, somebody, episodes=1)
        assert not somebody.notes  # it was refused before anything was played
        assert refused.value.path == str(builder.folder)
        assert "--name" in refused.value.fix and "its 1 finished part" in refused.value.fix
        with pytest.raises(StoreError, match="an unfinished store"):  # begun during the sitting
            add_episode(path, "GoToObj", episode)
        assert builder.finished_parts() == [0]


def test_what_a_killed_sitting_left_is_not_in_the_store(tmp_path: Path) -> None:
    path = tmp_path / "GoToObj.zarr"
    with StoreBuilder(path, {"command": "play"}, update=True) as builder:
        for number in range(3):
            write_part(builder.parts, number, make_episodes([3]), {})
    assert play("GoToObj", path, Somebody("solve"), episodes=1).episodes == 1
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f".{path.name}.lock"}
