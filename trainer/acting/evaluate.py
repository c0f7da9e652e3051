"""Measures how often a policy succeeds, on a fixed list of seeds that no store may use.

Success is reward > 0 within the level's step limit (DESIGN section 6). An environment that has
ended its episode takes the next seed. What is drawn at random in an episode follows from its seed,
so the figures depend on the policy and the level, not on how many environments or processes there
are.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS, COLOURS
from demotools.babyai.levels import EVALUATION_SEED, MOST_EPISODES
from demotools.errors import SettingsError, printable_text
from demotools.output import progress_bar
from demotools.recording.environment import make_environment
from demotools.workers.processes import opened_workers
from trainer.acting.group import steps_as_batch
from trainer.acting.vector import EnvironmentKind, EnvironmentStep, VectorEnvironment
from trainer.settings.models import LEVELS
from trainer.settings.user_code import (
    recipe_folders,
    search_recipe_folders,
    users_folders_first,
)

if TYPE_CHECKING:
    from trainer.acting.policy import Policy, Sample

_Z = 1.959963984540054  # 97.5% point of the normal distribution
_DONE = ACTIONS.index("done")
_ACTIONS = {False: "", True: ", sampled actions", "loops": ", sampled in loops"}
_OBJECT = r"\b(?:object|door|key|ball|box)\b"
_DESCRIPTION = (
    rf"(?:a|the) (?:(?:{'|'.join(COLOURS)}) )?{_OBJECT}"
    r"(?: in front of you| behind you| on your left| on your right)?"
)
_CLAUSE = re.compile(
    rf"(?:go to|pick up|open) {_DESCRIPTION}|put {_DESCRIPTION} next to {_DESCRIPTION}"
)
_MOST_MISSIONS = 20
"""So many different missions beyond BabyAI's are told apart by their texts."""
_LONG_STEPS, _SECONDS_TO_LOOK = 400_000, 0.2
ENVIRONMENTS = 256
"""How many play at once by default: enough for the fixed cost of a network's call to matter little
(docs/log.md)."""


@dataclass(frozen=True, order=True)
class Outcome:
    """What became of one episode.

    total_reward   of all its steps: its return
    """

    seed: int
    mission: str
    success: bool
    length: int
    total_reward: float

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        total_reward, shown = self.total_reward, asdict(self)
        del shown["total_reward"]
        return {**shown, "return": total_reward}


@dataclass(frozen=True)
class Kind:
    """The episodes of one kind of mission (see `mission_kind`)."""

    episodes: int
    successes: int


@dataclass(frozen=True)
class Evaluation:
    """How often a policy succeeded, and how long it took.

    interval                   Wilson's 95% interval of the success rate
    mean_length                steps, over all episodes
    mean_length_of_successes   steps; None where there was no success
    mean_return                of the sum of an episode's rewards
    kinds                      by kind of mission
    sampled                    whether actions were drawn, always or only in "loops"; else the most
                               probable ones were taken
    outcomes                   of the episodes, by seed
    levels                     of each level, where these are the figures of several together
    """

    level: str
    episodes: int
    first_seed: int
    successes: int
    success: float
    interval: tuple[float, float]
    mean_length: float
    mean_length_of_successes: float | None
    mean_return: float
    kinds: dict[str, Kind]
    sampled: Sample
    outcomes: tuple[Outcome, ...]
    levels: tuple[Evaluation, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """All of it but the single episodes, as JSON values."""
        shown = {key: value for key, value in vars(self).items() if key != "outcomes"}
        shown["kinds"] = {name: asdict(kind) for name, kind in self.kinds.items()}
        shown["levels"] = [level.as_json() for level in self.levels]
        if not self.levels:
            del shown["levels"]
        return shown

    def scalars(self) -> dict[str, float]:
        """What a run's log holds of it."""
        low, high = self.interval
        return {
            "success": self.success,
            "interval_low": low,
            "interval_high": high,
            "episode_length": self.mean_length,
            "return": self.mean_return,
            "episodes": self.episodes,
            **{
                f"{level.level}/{name}": value
                for level in self.levels
                for name, value in level.scalars().items()
            },
        }

    def text(self) -> str:
        """All of it for a person."""
        low, high = self.interval
        of_successes = self.mean_length_of_successes
        actions = _ACTIONS[self.sampled]
        lines = [
            *(level.text() for level in self.levels),
            f"{printable_text(self.level)}{actions}: success {self.success:.1%} "
            f"of {self.episodes:,} episodes (95% interval {low:.1%} to {high:.1%})",
            f"  mean length {self.mean_length:.1f} steps"
            + ("" if of_successes is None else f", of successes {of_successes:.1f}")
            + f"; mean return {self.mean_return:.3f}",
        ]
        kinds = {} if self.levels else self.kinds
        width = max(map(len, kinds), default=0)
        for name, kind in kinds.items():
            share = kind.successes / kind.episodes
            lines.append(f"  {name:{width}}  {share:6.1%} of {kind.episodes:,}")
        return "\n".join(lines)


def evaluate_policy(
    policy: Policy | Literal["bot"],
    level: str,
    episodes: int = 1000,
    *,
    environments: int = ENVIRONMENTS,
    processes: int = 1,
    seeds: Sequence[int] | None = None,
    sampled: Sample = False,
    make: str = EnvironmentKind.make,
    view: tuple[int, ...] = EnvironmentKind.view,
    quiet: bool = True,
) -> Evaluation:
    """Play the episodes of seeds [2e9, 2e9 + episodes), each once.

    policy    or "bot": the expert of each environment
    seeds     of the environment, to be played instead
    sampled   whether the policy draws its actions, which the result says
    view      what the environments show (see `EnvironmentKind`)
    make      `package.module:function` from the level to an environment
    processes  at most; where many steps are to come each plays its share, network included
    quiet     no progress bar

    SettingsError  no episodes or too many, or no environments, asked for
    """
    check_episodes(episodes)
    if seeds is None:
        seeds = range(EVALUATION_SEED, EVALUATION_SEED + episodes)
    if not seeds or environments < 1:
        raise SettingsError(
            f"cannot play {len(seeds)} episodes in {environments} environments",
            path="--episodes",
            fix="use at least 1 of each",
        )
    processes = min(processes, len(seeds))
    kind = EnvironmentKind(level, make, expert=policy == "bot", view=view)
    shared = None
    if processes > 1 and not isinstance(policy, str) and policy.on_cpu and _is_long(kind, seeds):
        shared = _pickled(policy)
    with progress_bar(len(seeds), "evaluation", "episodes", quiet=quiet) as bar:
        how = kind, seeds, environments, processes, bar.update
        outcomes = _played(policy, *how) if shared is None else _played_in_shares(shared, *how)
    return evaluation(level, sorted(outcomes), sampled=sampled)


def _played(
    policy: Policy | Literal["bot"],
    kind: EnvironmentKind,
    seeds: Sequence[int],
    environments: int,
    processes: int,
    tell: Callable[[int], object],
) -> list[Outcome]:
    """The episodes of these seeds, in the order in which they ended.

    tell   what is called with how many have ended, as they do
    """
    count = min(environments, len(seeds))
    outcomes: list[Outcome] = []
    with VectorEnvironment(kind, count, processes=processes) as vector:
        if not isinstance(policy, str):
            policy.reset(count)
        rows = np.arange(count)
        length, total = np.zeros(count, dtype=np.int64), np.zeros(count)
        step = vector.play(seeds)
        while step.active.any():
            before = step
            rows = _still_playing(policy, step, rows)
            actions = np.full(count, _DONE)
            actions[rows] = _actions(policy, before, rows)
            step = vector.step(actions)
            length += 1
            total += step.reward
            ended = np.flatnonzero(step.terminated | step.truncated)
            for row in ended.tolist():
                outcomes.append(
                    Outcome(
                        seed=int(before.seed[row]),
                        mission=before.missions[row],
                        success=bool(step.reward[row] > 0),
                        length=int(length[row]),
                        total_reward=float(total[row]),
                    )
                )
            length[ended], total[ended] = 0, 0
            tell(len(ended))
    return outcomes


def _is_long(kind: EnvironmentKind, seeds: Sequence[int]) -> bool:
    """Whether so many episodes of a level of ours may take longer than starting processes does."""
    if kind.make != LEVELS:
        return False
    levels = [make_environment(kind.level_of(0))]
    levels[0].reset(seed=seeds[0])
    return steps_as_batch(levels, kind) and len(seeds) * levels[0].max_steps >= _LONG_STEPS


def _pickled(policy: Policy) -> bytes | None:
    """The policy for another process; None where it holds what is not for others."""
    try:
        return pickle.dumps(policy)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def _played_in_shares(
    policy: bytes,
    kind: EnvironmentKind,
    seeds: Sequence[int],
    environments: int,
    processes: int,
    tell: Callable[[int], object],
) -> list[Outcome]:
    """As `_played`, each process its share of the seeds: with the network, on a thread of its own.

    Two processes are then twice as fast, as two threads for one network would not be.
    """
    told = 0
    with (
        TemporaryDirectory(prefix="trainer-evaluation-") as name,
        opened_workers(processes, Path(name), resumes=False) as workers,
    ):
        waiting = {
            workers.submit(
                _play_share, policy, recipe_folders(), kind, seeds[first::processes], environments
            )
            for first in range(processes)
        }
        outcomes: list[Outcome] = []
        while waiting:
            done, waiting = wait(waiting, timeout=_SECONDS_TO_LOOK, return_when=FIRST_COMPLETED)
            outcomes += [outcome for share in done for outcome in share.result()]
            ended = sum(path.stat().st_size for path in Path(name).iterdir())
            tell(ended - told)
            told = ended
    return outcomes


def _play_share(
    folder: Path,
    policy: bytes,
    folders: list[str],
    kind: EnvironmentKind,
    seeds: Sequence[int],
    environments: int,
) -> list[Outcome]:
    """One process's share; a file in `folder` is as long as many of its episodes have ended.

    folders   see `recipe_folders`
    """
    search_recipe_folders(folders)
    import torch  # not what steps environments alone

    torch.set_num_threads(1)
    with users_folders_first():  # a network of the user's lies beside the recipe
        own: Policy = pickle.loads(policy)
    with (folder / str(os.getpid())).open("ab", buffering=0) as ended:
        return _played(own, kind, seeds, environments, 1, lambda n: ended.write(bytes(n)))


def evaluate_levels(
    policy: Policy | Literal["bot"], levels: Sequence[str], *arguments: Any, **settings: Any
) -> Evaluation:
    """As `evaluate_policy`, of each of the levels; of several, all of their episodes together."""
    each = [evaluate_policy(policy, level, *arguments, **settings) for level in levels]
    if len(each) == 1:
        return each[0]
    outcomes = sorted(outcome for one in each for outcome in one.outcomes)
    whole = evaluation(" + ".join(levels), outcomes, sampled=each[0].sampled)
    return replace(whole, levels=tuple(each))


def check_episodes(count: int) -> None:
    """SettingsError where nobody can wait for so many episodes, and no seeds are left for them."""
    if count > MOST_EPISODES:
        raise SettingsError(
            f"{count} episodes are too many",
            path="--episodes",
            fix=f"use at most {MOST_EPISODES:,}; 1,000 give the success rate to within 3%",
        )


def _still_playing(
    policy: Policy | Literal["bot"], step: EnvironmentStep, rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The rows that the policy is asked for: at the end, when no seeds are left, ever fewer.

    It forgets the others when they are a quarter of its batch.
    """
    active = step.active[rows]
    if 4 * np.count_nonzero(active) > 3 * len(rows):
        return rows
    if not isinstance(policy, str):
        policy.keep(np.flatnonzero(active))
    return rows[active]


def _actions(
    policy: Policy | Literal["bot"], step: EnvironmentStep, rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    if isinstance(policy, str):
        # a bot that gave up stands still until the step limit
        advised = step.expert_action[rows]
        return np.where(advised < 0, _DONE, advised)
    missions = [step.missions[row] for row in rows.tolist()]
    return policy.act(
        step.cells[rows], step.direction[rows], missions, step.mask[rows], step.seed[rows]
    )


def evaluation(level: str, outcomes: Sequence[Outcome], *, sampled: Sample = False) -> Evaluation:
    """The figures of these outcomes, at least one, by seed."""
    lengths = np.array([outcome.length for outcome in outcomes])
    success = np.array([outcome.success for outcome in outcomes])
    kinds: dict[str, Kind] = {}
    others = {one.mission for one in outcomes if mission_kind(one.mission) is None}
    for outcome in outcomes:
        text = outcome.mission if len(others) <= _MOST_MISSIONS else "other"
        kind = mission_kind(outcome.mission) or printable_text(text)
        so_far = kinds.get(kind, Kind(0, 0))
        kinds[kind] = Kind(so_far.episodes + 1, so_far.successes + outcome.success)
    return Evaluation(
        level=level,
        episodes=len(outcomes),
        first_seed=outcomes[0].seed,
        successes=int(success.sum()),
        success=float(success.mean()),
        interval=wilson_interval(int(success.sum()), len(outcomes)),
        mean_length=float(lengths.mean()),
        mean_length_of_successes=float(lengths[success].mean()) if success.any() else None,
        mean_return=float(np.mean([outcome.total_reward for outcome in outcomes])),
        kinds=dict(sorted(kinds.items())),
        sampled=sampled,
        outcomes=tuple(outcomes),
    )


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """The 95% score interval of a success rate.

    source  E. B. Wilson, Probable Inference, JASA 22 (1927)

    >>> low, high = wilson_interval(990, 1000)
    >>> f"{low:.4f} {high:.4f}"
    '0.9817 0.9946'
    """
    rate, weight = successes / episodes, _Z**2 / episodes
    middle = (rate + weight / 2) / (1 + weight)
    reach = (rate * (1 - rate) * weight + weight**2 / 4) ** 0.5 / (1 + weight)
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def mission_kind(mission: str) -> str | None:
    """The verb and objects of a mission of one clause; the joints of a longer one.

    None where it is no mission of BabyAI's grammar, as of an environment of somebody's own.

    >>> mission_kind("put the red ball next to a box on your left")
    'put ball next to box'
    >>> mission_kind("open a door and pick up the key, then go to the grey object")
    'a and b, then c'
    >>> mission_kind("go to the lamp")
    """
    clauses = re.split(r"(, then | after you | and )", mission)
    if not all(_CLAUSE.fullmatch(clause) for clause in clauses[::2]):
        return None
    if len(clauses) == 1:
        verb = re.match(r"go to|pick up|open|put", mission)
        assert verb is not None
        return f"{verb[0]} {' next to '.join(re.findall(_OBJECT, mission))}"
    letters = iter("abcdefgh")
    return "".join(
        next(letters, "…") if index % 2 == 0 else joint for index, joint in enumerate(clauses)
    )
