"""Episodes that a policy plays, recorded step by step for drawing.

The policy plays first, then its actions are replayed for the pictures; so episodes can be chosen by
their outcome before anything is drawn, and the pictures are those of `demotools show`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS
from demotools.look.pictures import animation, bar_picture, equally_large, panel, wrapped
from demotools.look.show import Shown, step_pictures
from demotools.output import progress_bar
from demotools.recording.environment import Environment, seen_as
from trainer.acting.policy import NetworkPolicy
from trainer.acting.vector import EnvironmentKind
from trainer.settings.user_code import made_environment

_TILE = 24
_PICTURES_OF_THE_END = 4


@dataclass(frozen=True)
class Watched:
    """One episode of T steps that a policy played.

    shown         its views, actions and environment
    probability   float32 [T, actions], of each action
    value         float32 [T], what the critic expects; None where nothing has trained it
    reward        of the last action
    """

    shown: Shown
    probability: NDArray[np.float32]
    value: NDArray[np.float32] | None
    reward: float

    @property
    def success(self) -> bool:
        """Whether the last action brought a reward."""
        return self.reward > 0

    @property
    def title(self) -> str:
        """Which episode this is, and how it ended."""
        end = f"success, reward {self.reward:.2f}" if self.success else "failure"
        return f"{self.shown.title}: {end}"

    def step_text(self, step: int) -> str:
        """The number of a step, its action and its value."""
        value = "" if self.value is None else f"   value {self.value[step]:.2f}"
        return self.shown.step_text(step) + value

    def bars(self, step: int) -> list[tuple[str, float]]:
        """The actions and their probabilities at a step."""
        return list(zip(ACTIONS, self.probability[step].tolist(), strict=False))

    def as_json(self) -> dict[str, Any]:
        """The episode without its views, as JSON values."""
        return {
            "seed": self.shown.seed,
            "mission": self.shown.mission,
            "success": self.success,
            "reward": self.reward,
            "steps": len(self.shown.action),
            "actions": [ACTIONS[action] for action in self.shown.action],
            "probabilities": self.probability.tolist(),
            "values": None if self.value is None else self.value.tolist(),
        }


def played_episodes(
    policy: NetworkPolicy,
    level: str,
    seeds: Sequence[int],
    *,
    make: str = EnvironmentKind.make,
    view: tuple[int, ...] = EnvironmentKind.view,
    critic: bool,
    quiet: bool = True,
) -> list[Watched]:
    """The episodes of these seeds, one after another, as `evaluate_policy` plays them.

    make     `package.module:function` from the level to an environment
    view     what the environments show (see `EnvironmentKind`)
    critic   whether the values of the network are trained, and to be kept
    """
    environment: Environment = made_environment(make, level)
    bar = progress_bar(len(seeds), "play", "episodes", quiet=quiet, items=enumerate(seeds))
    return [
        _played(policy, environment, level, number, seed, critic=critic, view=view)
        for number, seed in bar
    ]


def _played(
    policy: NetworkPolicy,
    environment: Environment,
    level: str,
    number: int,
    seed: int,
    *,
    critic: bool,
    view: tuple[int, ...],
) -> Watched:
    observation, _ = environment.reset(seed=seed)
    mission = str(observation["mission"])
    policy.reset(1)
    cells, directions, probabilities, values = [], [], [], []
    actions: list[int] = []
    over, reward = False, 0.0
    while not over:
        cells.append(seen_as(observation["image"], view))
        directions.append(np.uint8(observation["direction"]))
        mask = np.array([len(actions) > 0], dtype=np.uint8)
        direction = np.array(directions[-1:])
        action = policy.act(cells[-1][None], direction, [mission], mask, np.array([seed]))
        actions.append(int(action[0]))
        probabilities.append(policy.logits[0].softmax(0).cpu().numpy())
        values.append(float(policy.values[0]))
        observation, received, terminated, truncated, _ = environment.step(actions[-1])
        over, reward = terminated or truncated, float(received)
    # only minigrid's own environments have a room to be drawn
    drawable = hasattr(environment, "get_full_render")
    shown = Shown(
        store=level,
        episode=number,
        mission=mission,
        seed=seed,
        view=np.stack(cells),
        direction=np.array(directions, dtype=np.uint8),
        action=np.array(actions, dtype=np.uint8),
        environment=environment if drawable else None,
        note="" if drawable else "no room: the environment is not one of minigrid's own",
    )
    value = np.array(values, dtype=np.float32) if critic else None
    return Watched(shown, np.stack(probabilities), value, reward)


def watched_gif(episodes: Iterable[Watched], *, quiet: bool = True) -> bytes:
    """An animation of the episodes, one after another; the last picture of each stays longer."""
    pictures = []
    for episode in episodes:
        shown = episode.shown
        for step, drawn in enumerate(step_pictures(shown, _TILE, quiet=quiet)):
            action = int(shown.action[step])
            bars = bar_picture(episode.bars(step), len(drawn[0]), marked=action)
            parts = [*drawn, bars]
            width = sum(picture.shape[1] for picture in parts)
            texts = [shown.mission, episode.title, episode.step_text(step), shown.note]
            lines = [line for text in texts for line in wrapped(text, width)]
            pictures.append(panel(parts, lines))
        pictures += [pictures[-1]] * _PICTURES_OF_THE_END
    return animation(equally_large(pictures))
