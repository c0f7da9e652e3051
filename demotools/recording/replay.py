"""Replay stored actions from the stored seeds, and compare the result with the store."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS
from demotools.errors import LevelError, ManifestError
from demotools.output import progress_bar
from demotools.recording.bot import Expert, expert_of
from demotools.recording.environment import Environment, Observation, make_environment
from demotools.recording.search import ExpertError, SearchExpert
from demotools.recording.subgoals import SUBGOALS, UNKNOWN
from demotools.store.format import MERGED
from demotools.store.reading import Store
from demotools.store.verify import Check

_SHOWN = 5


def replay_check(store: Store, episodes: int, *, quiet: bool = False) -> Check:
    """The check for `verify_store`: up to `episodes` episodes, played again in the environment.

    They are evenly spread over those whose seed is known. Where they differ in a store that another
    version of minigrid recorded, that is noted, but it says nothing against the store.
    """
    name = "episodes played again in the environment"
    if reason := reason_against(store):
        return Check(name, (), f"not replayed: {reason}", skipped=True)
    environments, _ = _environments(store)
    playable = np.isin(store.episode_level, list(environments))
    chosen = evenly_spread(np.flatnonzero((store.episode_seed >= 0) & playable), episodes)
    # what no replay shows: advice that was not followed, and what it was for
    advised = bool(store.optional) and said_of_sources(store, "kind") == {"bot"}
    differences = []
    bar = progress_bar(len(chosen), f"replay {store.name}", "episodes", quiet=quiet, items=chosen)
    for episode in bar:
        environment = environments[int(store.episode_level[episode])]
        played = replayed_episode(environment, store, int(episode), advised=advised)
        if difference := played.difference:
            differences.append(f"episode {episode}, {difference}")
    notes = [f"{len(chosen):,} of {store.episodes:,} episodes"]
    if advised:
        notes.append("including the bot's advice at each step")
    if unknown := int((store.episode_seed < 0).sum()):
        notes.append(f"{unknown:,} have no known seed")
    if not playable.all():
        notes.append(f"{(~playable).sum():,} belong to a level that cannot be played")
    recorded, installed = said_of_sources(store, "minigrid"), version("minigrid")
    if differences and recorded != {installed}:
        versions = " or ".join(sorted(str(one or "(version unknown)") for one in recorded))
        notes.append(
            f"{len(differences):,} differ, as expected: they were recorded with minigrid "
            f"{versions}, and {installed} is installed; the first is "
            f"{differences[0]}"
        )
        differences = []
    return Check(name, tuple(differences[:_SHOWN]), "; ".join(notes), skipped=not len(chosen))


@dataclass(frozen=True)
class Replay:
    """What became of one episode that was played again.

    difference    the first difference from the store; empty where there is none
    reward        of the last action played
    observation   after the last action; None where the episode was not played to its end
    """

    difference: str
    reward: float = 0.0
    observation: Observation | None = None


def reason_against(store: Store) -> str:
    """Why the episodes of a store cannot be played again; empty where they can."""
    if said_of_sources(store, "kind") == {"pickle"}:
        return "the store comes from an old pickle, whose seeds and environment are unknown"
    if not (store.episode_seed >= 0).any():
        return "no episode has a known seed"
    environments, reason = _environments(store)
    return "" if environments else reason


def _environments(store: Store) -> tuple[dict[int, Environment], str]:
    """The environments of the levels that can be played, by their places in `store.levels`.

    Also returns why the first of the other levels cannot be played.
    """
    found, reason = {}, ""
    for number, level in enumerate(store.levels):
        try:
            found[number] = make_environment(level)
        except (LevelError, ManifestError) as error:
            reason = reason or error.what
    return found, reason


def said_of_sources(store: Store, key: str) -> set[Any]:
    """What the sources of a store say under this key, those of merged stores too; None if nothing.

    >>> said_of_sources(open_store(path), "kind")  # doctest: +SKIP
    {'bot'}
    """
    found, waiting = set(), [store.attributes.source]
    while waiting:
        source = waiting.pop()
        stores = source.get("stores") if source.get("kind") == MERGED else None
        if not stores:
            found.add(str(source[key]) if key in source else None)
        waiting += [one["source"] for one in stores or []]
    return found


def evenly_spread(rows: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """At most `number` of these rows, evenly spread, the first among them.

    >>> evenly_spread(np.arange(10), 4)
    array([0, 2, 5, 7])
    """
    if len(rows) <= number:
        return rows
    return rows[np.arange(number) * len(rows) // number]


def replayed_episode(
    environment: Environment, store: Store, episode: int, *, advised: bool = False
) -> Replay:
    """Play one stored episode again, step by step, up to the first difference.

    Compared at every step: view, direction, mission, reward and whether it was terminated; then
    that the episode goes on until its last action, and ends there with a reward > 0, where no
    rewards are stored.

    advised   compare the expert's actions with the bot's, and its subgoals where there are any
    """
    one = store[episode]
    start, stop = store.bounds(episode)
    images, directions, actions = one.images, one.directions, one.taken
    stored = {name: store.optional[name].span(start, stop) for name in store.optional}
    rewards, ends = stored.get("reward"), stored.get("terminated")
    observation, _ = environment.reset(seed=one.seed)
    expert, taken = expert_of(environment) if advised else None, None
    for step, action in enumerate(actions.tolist()):
        if not np.array_equal(observation["image"], images[step]):
            return Replay(f"step {step}: the view differs")
        if int(observation["direction"]) != directions[step]:
            found = f"stored {directions[step]}, replayed {observation['direction']}"
            return Replay(f"step {step}: the direction differs, {found}")
        if observation["mission"] != one.mission:
            found = f"stored {one.mission!r}, replayed {observation['mission']!r}"
            return Replay(f"step {step}: the mission differs, {found}")
        if expert and (wrong := _other_advice(expert, taken, store, start + step)):
            return Replay(f"step {step}: {wrong}")
        taken = action
        observation, reward, terminated, truncated, _ = environment.step(action)
        if rewards is not None and np.float32(reward) != rewards[step]:
            return Replay(f"step {step}: the reward is {reward}, but {rewards[step]} is stored")
        if ends is not None and terminated != ends[step]:
            words = [("not ", "")[bool(it)] + "terminated" for it in (ends[step], terminated)]
            return Replay(f"step {step}: stored {words[0]}, replayed {words[1]}")
        if (terminated or truncated) and step < len(actions) - 1:
            return Replay(f"step {step}: the episode ended early, after {ACTIONS[action]}")
    if rewards is None and float(reward) <= 0:
        return Replay(f"step {step}: the last action gave no reward")
    return Replay("", float(reward), observation)


def _other_advice(expert: Expert | SearchExpert, taken: int | None, store: Store, row: int) -> str:
    """How the bot's advice differs from what step `row` of a store holds; empty where it does not.

    taken   the action of the step before; None at the first
    """
    stored = int(store.action.span(row, row + 1)[0])
    try:
        advice = expert.action(taken)
    except ExpertError as error:
        return f"the bot has no action ({error})"
    if advice != stored:
        return f"the stored action is {ACTIONS[stored]}, but the bot advises {ACTIONS[advice]}"
    if subgoals := store.optional.get("subgoal"):
        code, found = int(subgoals.span(row, row + 1)[0]), expert.subgoal()
        if code not in (found, UNKNOWN):
            texts = store.attributes.subgoals
            return f"the stored subgoal is {texts[code]!r}, but the bot's is {SUBGOALS[found]!r}"
    return ""
