"""How often a policy succeeds, on a fixed list of seeds that no store may use.

Success is reward > 0 within the level's step limit (DESIGN section 6). Episodes are dealt out to
environments in a fixed way, so the figures depend on the policy and the level, not on how many
environments or processes there are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS
from demotools.babyai.levels import EVALUATION_SEED, MOST_EPISODES
from demotools.errors import SettingsError, printable_text
from demotools.output import progress_bar
from trainer.acting.vector import EnvironmentKind, EnvironmentStep, VectorEnvironment, seed_streams

_Z = 1.959963984540054  # 97.5% point of the normal distribution
_DONE = ACTIONS.index("done")


class Policy(Protocol):
    """What chooses the actions of a batch of B environments."""

    def reset(self, count: int) -> None:
        """Forget everything; from now on the batch is `count` environments."""

    def act(
        self,
        cells: NDArray[np.uint8],
        direction: NDArray[np.uint8],
        missions: Sequence[str],
        masks: NDArray[np.uint8],
    ) -> NDArray[np.int64]:
        """The actions int64 [B], 0..6.

        cells       uint8 [B, 7, 7], packed views
        direction   uint8 [B]
        missions    B texts
        masks       uint8 [B], 0 where an episode begins: memory of row b must be forgotten
        """


class RandomPolicy:
    """Uniform actions, each episode from its own random stream: a reference from below.

    Row b of a batch of n plays the episodes b, b + n, b + 2n, ... (see `evaluate_policy`).
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._next_episode: list[int] = []
        self._streams: list[np.random.PCG64] = []

    def reset(self, count: int) -> None:
        """Forget everything; from now on the batch is `count` environments."""
        self._next_episode = list(range(count))
        self._streams = [np.random.PCG64() for _ in range(count)]

    def act(
        self,
        cells: NDArray[np.uint8],  # noqa: ARG002
        direction: NDArray[np.uint8],  # noqa: ARG002
        missions: Sequence[str],  # noqa: ARG002
        masks: NDArray[np.uint8],
    ) -> NDArray[np.int64]:
        """Random actions int64 [B], 0..6."""
        for row in np.flatnonzero(masks == 0).tolist():
            self._streams[row] = np.random.PCG64([self._seed, self._next_episode[row]])
            self._next_episode[row] += len(masks)
        drawn = [stream.random_raw() % len(ACTIONS) for stream in self._streams]
        return np.array(drawn, dtype=np.int64)


@dataclass(frozen=True, order=True)
class Outcome:
    """What became of one episode."""

    seed: int
    mission: str
    success: bool
    length: int


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
    kinds                      by kind of mission
    """

    level: str
    episodes: int
    first_seed: int
    successes: int
    success: float
    interval: tuple[float, float]
    mean_length: float
    mean_length_of_successes: float | None
    kinds: dict[str, Kind]

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)

    def text(self) -> str:
        """All of it for a person."""
        low, high = self.interval
        of_successes = self.mean_length_of_successes
        lines = [
            f"{printable_text(self.level)}: success {self.success:.1%} "
            f"of {self.episodes:,} episodes (95% interval {low:.1%} to {high:.1%})",
            f"  mean length {self.mean_length:.1f} steps"
            + ("" if of_successes is None else f", of successes {of_successes:.1f}"),
        ]
        width = max(map(len, self.kinds), default=0)
        for name, kind in self.kinds.items():
            share = kind.successes / kind.episodes
            lines.append(f"  {name:{width}}  {share:6.1%} of {kind.episodes:,}")
        return "\n".join(lines)


def evaluate_policy(
    policy: Policy | Literal["bot"],
    level: str,
    episodes: int = 1000,
    *,
    environments: int = 64,
    processes: int = 1,
    first_seed: int = EVALUATION_SEED,
    make: str = EnvironmentKind.make,
    quiet: bool = True,
) -> Evaluation:
    """Play the episodes of seeds [first_seed, first_seed + episodes), each once.

    policy   or "bot": the expert of each environment
    make     `package.module:function` from the level to an environment
    quiet    no progress bar

    SettingsError  no episodes or too many, or no environments, asked for
    """
    check_episodes(episodes)
    if episodes < 1 or environments < 1:
        raise SettingsError(
            f"cannot play {episodes} episodes in {environments} environments",
            path="--episodes",
            fix="ask for at least one of each",
        )
    count = min(environments, episodes)
    kind = EnvironmentKind(level, make, expert=policy == "bot")
    seeds = range(first_seed, first_seed + episodes)
    outcomes: list[Outcome] = []
    with (
        VectorEnvironment(kind, count, processes=processes) as vector,
        progress_bar(episodes, "evaluation", "episodes", quiet=quiet) as bar,
    ):
        if not isinstance(policy, str):
            policy.reset(count)
        length = np.zeros(count, dtype=np.int64)
        step = vector.reset(seed_streams(seeds, count))
        while step.active.any():
            before = step
            step = vector.step(_actions(policy, before))
            length += 1
            ended = np.flatnonzero(step.terminated | step.truncated)
            for row in ended.tolist():
                success = bool(step.reward[row] > 0)
                seed, mission = int(before.seed[row]), before.missions[row]
                outcomes.append(Outcome(seed, mission, success, int(length[row])))
            length[ended] = 0
            bar.update(len(ended))
    return evaluation(level, first_seed, sorted(outcomes))


def check_episodes(count: int) -> None:
    """SettingsError where nobody can wait for so many episodes, and no seeds are left for them."""
    if count > MOST_EPISODES:
        raise SettingsError(
            f"{count} episodes are too many",
            path="--episodes",
            fix=f"ask for at most {MOST_EPISODES:,}; 1,000 tell the success to within 3%",
        )


def _actions(policy: Policy | Literal["bot"], step: EnvironmentStep) -> NDArray[np.int64]:
    if isinstance(policy, str):
        # a bot that gave up stands still until the step limit
        return np.where(step.expert_action < 0, _DONE, step.expert_action)
    return policy.act(step.cells, step.direction, step.missions, step.mask)


def evaluation(level: str, first_seed: int, outcomes: Sequence[Outcome]) -> Evaluation:
    """The figures of these outcomes, at least one."""
    lengths = np.array([outcome.length for outcome in outcomes])
    success = np.array([outcome.success for outcome in outcomes])
    kinds: dict[str, Kind] = {}
    for outcome in outcomes:
        kind = mission_kind(outcome.mission)
        so_far = kinds.get(kind, Kind(0, 0))
        kinds[kind] = Kind(so_far.episodes + 1, so_far.successes + outcome.success)
    return Evaluation(
        level=level,
        episodes=len(outcomes),
        first_seed=first_seed,
        successes=int(success.sum()),
        success=float(success.mean()),
        interval=wilson_interval(int(success.sum()), len(outcomes)),
        mean_length=float(lengths.mean()),
        mean_length_of_successes=float(lengths[success].mean()) if success.any() else None,
        kinds=dict(sorted(kinds.items())),
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


def mission_kind(mission: str) -> str:
    """The verb and objects of a mission of one clause; the joints of a longer one.

    >>> mission_kind("put the red ball next to a box on your left")
    'put ball next to box'
    >>> mission_kind("open a door and pick up the key, then go to the grey object")
    'a and b, then c'
    """
    clauses = re.split(r"(, then | after you | and )", mission)
    if len(clauses) == 1:
        verb = re.match(r"go to|pick up|open|put", mission)
        objects = re.findall(r"\b(?:object|door|key|ball|box)\b", mission)
        return " ".join([verb[0] if verb else "other", " next to ".join(objects)]).strip()
    letters = iter("abcdefgh")
    return "".join(
        next(letters, "…") if index % 2 == 0 else joint for index, joint in enumerate(clauses)
    )
