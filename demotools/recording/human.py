"""Demonstrations by people: each episode that somebody plays and solves is added to a store.

The player, a keyboard (`demotools.look.play`) or a program, is asked for one action at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.levels import SEEDS
from demotools.errors import SettingsError, StoreError, printable_text
from demotools.output import counted
from demotools.recording.environment import (
    Environment,
    Observation,
    make_environment,
    observed_cells,
    playable_manifest,
)
from demotools.store.building import StoreBuilder, part_file, write_part
from demotools.store.format import store_exists
from demotools.store.reading import Episodes, Store, open_store

HUMAN = "human"
"""The kind of source of such stores."""
FIRST_SEED = 900_000_000
"""Far from the seeds that recordings of the bot begin with, so that both can be merged."""
SKIP, QUIT = -1, -2
"""What a player says instead of an action: the next episode, or no more."""
_EPISODES_A_PART = 4096


class Player(Protocol):
    """Who plays."""

    def action(self, environment: Environment, observation: Observation, note: str) -> int:
        """The action to take, 0..6, or SKIP or QUIT.

        note   what has become of the episodes before, for the player to see
        """


@dataclass(frozen=True)
class Played:
    """What became of one sitting.

    path       of the store; there may be none yet
    episodes   in it now
    solved     of them, in this sitting
    left_out   episodes that were given up or not solved
    """

    path: Path
    episodes: int
    solved: int
    left_out: int

    def text(self) -> str:
        """What was played, for a person."""
        if not self.episodes:
            return "no episode was solved, so no store was made"
        return (
            f"{printable_text(self.path)}: {counted(self.episodes, 'episode')}, "
            f"{self.solved:,} of them new; {self.left_out:,} unsolved episodes were not kept"
        )


def play(
    level: str,
    path: Path,
    player: Player,
    *,
    first_seed: int | None = None,
    episodes: int | None = None,
) -> Played:
    """Let somebody play, and add each episode that is solved to the store at `path` at once.

    first_seed   of the environment; None: behind those in the store
    episodes     solved ones to stop after; None: when the player quits

    ManifestError, LevelError   there is no such level, or it cannot be played
    SettingsError               the seed is not one of the training split
    StoreError                  the store at `path` is not of this level, or not of people; an
                                unfinished one of another command lies there
    """
    environment = make_environment(level)
    if (builder := _builder(path)).folder.exists():
        with builder:  # which refuses now what it would refuse once an episode is solved
            pass
    store = _own_store(path, level)
    known = set() if store is None else set(store.episode_seed.tolist())
    first = first_seed if first_seed is not None else max(known, default=FIRST_SEED - 1) + 1
    if first not in SEEDS["train"]:
        raise SettingsError(
            f"seed {first} does not belong to the training split",
            path="--seed",
            fix=f"use {SEEDS['train'].start} <= seed < {SEEDS['train'].stop}",
        )
    solved = left_out = 0
    note = "" if store is None else f"{counted(store.episodes, 'episode')} in {path.name}"
    for seed in (seed for seed in count(first) if seed not in known):
        episode = _played(environment, seed, player, note)
        if isinstance(episode, Episodes):
            store = add_episode(path, level, episode)
            solved += 1
            note = f"solved; {counted(store.episodes, 'episode')} in {path.name}"
        elif episode == QUIT:
            break
        else:
            left_out += 1
            note = "skipped" if episode == SKIP else "not solved, so not kept"
        if solved == episodes:
            break
    return Played(path, 0 if store is None else store.episodes, solved, left_out)


def _own_store(path: Path, level: str) -> Store | None:
    """The store that is added to, if there is one."""
    if not store_exists(path):
        return None
    store = open_store(path)
    if (
        store.attributes.source.get("kind") != HUMAN
        or store.level != playable_manifest(level).level
    ):
        raise StoreError(
            f"this is not a store of demonstrations of {level} by people",
            path=path,
            fix="choose another --name; `demotools merge` can combine the two later",
        )
    return store


def _played(environment: Environment, seed: int, player: Player, note: str) -> Episodes | int:
    """The episode if it was solved; SKIP, QUIT, or 0 where it ended otherwise."""
    observation, _ = environment.reset(seed=seed)
    mission = str(observation["mission"])
    images: list[NDArray[np.uint8]] = []
    directions: list[int] = []
    actions: list[int] = []
    while True:
        action = player.action(environment, observation, note)
        if action in (SKIP, QUIT):
            return action
        images.append(observation["image"])
        directions.append(observation["direction"])
        actions.append(action)
        observation, reward, terminated, truncated, _ = environment.step(action)
        if terminated or truncated:
            break
    if float(reward) <= 0:
        return 0
    cells, direction = observed_cells(np.stack(images)), np.array(directions, np.uint8)
    return Episodes.one(mission, seed, cells, direction, np.array(actions, np.uint8), {})


def add_episode(path: Path, level: str, episode: Episodes) -> Store:
    """The store at `path` with one episode more; made where there is none.

    StoreError  another process is writing to it, or has left an unfinished store there
    """
    manifest = playable_manifest(level)
    source: dict[str, Any] = {"kind": HUMAN, "minigrid": version("minigrid")}
    with _builder(path) as builder:
        for number in builder.finished_parts():  # of an earlier call that was killed
            part_file(builder.parts, number).unlink()
        for number, part in enumerate([*_parts(_own_store(path, level)), episode]):
            write_part(builder.parts, number, part, {})
        whose = {"licence": "not specified (recorded by a person)", "citation": "none"}
        builder.finish(**manifest.store_attributes(split="train", **whose), source=source)
    return open_store(path)


def _builder(path: Path) -> StoreBuilder:
    return StoreBuilder(path, {"command": "play"}, update=True)


def _parts(store: Store | None) -> Iterator[Episodes]:
    for start in range(0, 0 if store is None else store.episodes, _EPISODES_A_PART):
        assert store is not None
        yield store.take(np.arange(start, min(start + _EPISODES_A_PART, store.episodes)))
