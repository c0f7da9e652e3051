"""A trained network, out of its checkpoint, as something that acts in a user's own loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from demotools.babyai.cells import VIEW_SIZE
from demotools.recording.environment import seen_as
from trainer.acting.policy import NetworkPolicy


class LoadedPolicy:
    """A checkpoint's policy for a user's own loop; see `load_policy`.

    settings   the settings it was trained with, as TOML text
    """

    def __init__(
        self,
        model: nn.Module,
        words: Sequence[str],
        settings: str,
        *,
        sample: bool = False,
        view: tuple[int, ...] = (VIEW_SIZE, VIEW_SIZE),
    ) -> None:
        self._view = view
        self._policy = NetworkPolicy(model, words)
        self._sample = sample
        self._count = 0
        self.settings = settings

    def reset(self) -> None:
        """Forget everything: the next observations begin new episodes."""
        self._count = 0

    def act(
        self,
        observation: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        first: Sequence[bool] | NDArray[np.bool_] | None = None,
        *,
        sample: bool | None = None,
    ) -> Any:
        """The action for one observation (an int), or the actions for several (int64 [B]).

        observation      a dict of `image` uint8 [7, 7, 3], `direction` and `mission`; a list of
                         them; or one dict of arrays [B, ...], as vector environments give
        first            which observations begin an episode, [B]; None: those right after
                         `reset`, and all where the number of observations has changed
        sample           draw the actions, or take the most probable ones; None: as it was loaded

        CheckpointError  a mission has a word that is not in the vocabulary
        LevelError       the images are not views of the kind that the network has learned
        """
        image, direction, missions, single = _columns(observation)
        count = len(missions)
        masks = np.ones(count, dtype=np.uint8)
        if self._count != count:
            self._policy.reset(count)
            masks[:] = 0
            self._count = count
        elif first is not None:
            masks = (~np.asarray(first, dtype=bool).reshape(count)).astype(np.uint8)
        self._policy.sample = self._sample if sample is None else sample
        actions = self._policy.act(seen_as(image, self._view), direction, missions, masks)
        return int(actions[0]) if single else actions


def load_policy(
    checkpoint: Path | str, device: str = "cpu", *, sample: bool = False, trust: bool = False
) -> LoadedPolicy:
    """The policy of a checkpoint, or of the folder of a run, ready to act.

    sample  draw actions from the network's probabilities, by torch's random numbers; else take the
            most probable one
    trust   whether code that its settings name, such as a network of somebody's own, is run

    CheckpointError  there is no checkpoint, it is damaged, of another network, or it names code
                     that is not the trainer's and is not trusted

    Usage:

        policy = trainer.load_policy("runs/small")
        environment = gymnasium.make("BabyAI-GoToLocal-v0")
        observation, _ = environment.reset(seed=1)
        policy.reset()
        done = False
        while not done:
            observation, reward, terminated, truncated, _ = environment.step(
                policy.act(observation)
            )
            done = terminated or truncated
    """
    from trainer.run.checkpoint import named_checkpoint

    saved = named_checkpoint(Path(checkpoint), trust=trust)
    return LoadedPolicy(
        saved.network().to(device),
        saved.words,
        saved.settings,
        sample=sample,
        view=saved.parsed().model.view,
    )


def _columns(
    observation: Mapping[str, Any] | Sequence[Mapping[str, Any]],
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[str], bool]:
    """Images [B, ...], directions [B], missions, and whether it was a single observation."""
    single = isinstance(observation, Mapping) and isinstance(observation["mission"], str)
    many: Any = [observation] if single else observation
    if isinstance(many, Mapping):
        image, direction, missions = many["image"], many["direction"], many["mission"]
    else:
        image = np.stack([one["image"] for one in many])
        direction = [one["direction"] for one in many]
        missions = [one["mission"] for one in many]
    return (
        np.asarray(image, dtype=np.uint8),
        np.asarray(direction, dtype=np.uint8).reshape(-1),
        [str(mission) for mission in missions],
        single,
    )
