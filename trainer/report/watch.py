"""Watch a policy play: what it sees, the room, and how probable it holds each action.

The policy plays first, then its actions are played again for the pictures; so an episode can be
judged by its end before its first picture is drawn, and pictures are those of `demotools show`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS
from demotools.babyai.levels import EVALUATION_SEED
from demotools.errors import LevelError
from demotools.look.pictures import animation, bar_picture, equally_large, panel, wrapped
from demotools.look.show import Shown, scenes, step_pictures
from demotools.look.terminal import Scene, page_lines, step_through
from demotools.output import progress_bar
from demotools.recording.environment import Environment, seen_as
from trainer.acting.evaluate import check_episodes
from trainer.acting.policy import NetworkPolicy
from trainer.acting.vector import check_playable
from trainer.run.checkpoint import named_checkpoint
from trainer.run.success import environment_of
from trainer.settings.models import LEVELS, OF_EXPERTS, Settings
from trainer.settings.user_code import made_environment

CANDIDATES = 100
"""So many episodes are played to find the worst."""
_TILE = 24
_BAR_CHARACTERS = 20
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


def watched_episodes(
    checkpoint: Path,
    *,
    level: str | None = None,
    episodes: int = 4,
    first_seed: int = EVALUATION_SEED,
    worst: bool = False,
    sample: bool = False,
    trust: bool = False,
    quiet: bool = True,
) -> list[Watched]:
    """Episodes that the policy of a checkpoint plays.

    checkpoint   its file, or the folder of its run
    level        None: the one that it was trained on
    first_seed   of the environments: episode e has the seed `first_seed + e`
    sample       draw actions, as `trainer evaluate --sample` does; else the most probable ones
    worst        of at least a hundred episodes, those that went worst, the worst first
    trust        whether code that its settings name is run; see `named_checkpoint`

    CheckpointError   the checkpoint cannot be read, or has not learned a word of a mission
    LevelError        the level has no environment, or its views do not pack
    """
    check_episodes(episodes)
    saved = named_checkpoint(checkpoint, trust=trust)
    settings = saved.parsed()
    level, make = level or settings.run.level, environment_of(settings)
    if make == LEVELS:
        check_playable(level)
    if settings.model.actions > len(ACTIONS):
        raise LevelError(
            f"it has {settings.model.actions} actions, of which only {len(ACTIONS)} have names",
            path=level,
            fix="measure it with `trainer evaluate`",
        )
    environment: Environment = made_environment(make, level)
    policy = NetworkPolicy(saved.network(), saved.words, sample=sample)
    critic = _has_critic(settings)
    count = max(episodes, CANDIDATES) if worst else episodes
    bar = progress_bar(count, "play", "episodes", quiet=quiet, items=range(count))
    played = [
        _played(
            *(policy, environment, level, number, first_seed + number),
            critic=critic,
            view=settings.model.view,
        )
        for number in bar
    ]
    if worst:
        played.sort(key=lambda one: (one.success, -len(one.shown.action)))
    return played[:episodes]


def _has_critic(settings: Settings) -> bool:
    """Whether any loss of the run trains the critic: all but ours that learn from an expert do."""
    used = {
        name
        for stage in settings.stages
        for name in (*stage.losses, *(stage.off_policy.losses if stage.off_policy else ()))
    }
    return any(settings.losses[name].type not in OF_EXPERTS for name in used)


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
        probabilities.append(policy.logits[0].softmax(0).numpy())
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


def watched_gif(episodes: list[Watched], *, quiet: bool = True) -> bytes:
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


def _page(
    episode: Watched,
    scene: tuple[Scene, Scene | None],
    step: int,
    *,
    size: tuple[int, int | None],
    coloured: bool,
) -> list[str]:
    """The lines of one step: heading, view and room, then the actions."""
    shown = episode.shown
    heading = [shown.mission, episode.title, episode.step_text(step), *filter(None, [shown.note])]
    bars = bar_lines(episode.bars(step), int(shown.action[step]), coloured=coloured)
    columns, rows = size
    left = (columns, None if rows is None else rows - len(bars) - 1)
    return [*page_lines(heading, *scene, size=left, coloured=coloured), "", *bars]


def bar_lines(bars: list[tuple[str, float]], marked: int, *, coloured: bool) -> list[str]:
    """Shares as lines of text; one of them is marked.

    >>> bar_lines([("left", 0.25), ("forward", 0.75)], 1, coloured=False)
    ['left    ===== 25.0%', 'forward =============== 75.0% <']
    """
    width = max(len(name) for name, _share in bars)
    lines = []
    for number, (name, share) in enumerate(bars):
        bar = "=" * round(_BAR_CHARACTERS * share)
        text = " ".join(filter(None, [f"{name:{width}}", bar, f"{share:.1%}"]))
        if number == marked:
            text = click.style(f"{text} <", fg="blue", bold=True) if coloured else f"{text} <"
        lines.append(text)
    return lines


def watch_in_terminal(episodes: list[Watched], *, coloured: bool) -> None:
    """Step through the episodes with the arrow keys, one after another."""
    steps = list(_steps(episodes))

    def page(number: int) -> list[str]:
        columns, lines = shutil.get_terminal_size()
        # one line is for the keys
        episode, step, scene = steps[number]
        return _page(episode, scene, step, size=(columns, lines - 1), coloured=coloured)

    step_through(len(steps), page)


def watched_text(episodes: list[Watched], *, coloured: bool) -> Iterator[str]:
    """Every step of the episodes, one after another."""
    size = (shutil.get_terminal_size().columns, None)
    for episode, step, scene in _steps(episodes):
        yield "\n".join([*_page(episode, scene, step, size=size, coloured=coloured), ""])


def _steps(
    episodes: list[Watched],
) -> Iterator[tuple[Watched, int, tuple[Scene, Scene | None]]]:
    for episode in episodes:
        for step, scene in enumerate(scenes(episode.shown)):
            yield episode, step, scene
