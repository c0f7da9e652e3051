"""Loads a trained network from its checkpoint, as a policy for the user's own loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from demotools.babyai.cells import VIEW_SIZE
from demotools.errors import SettingsError
from demotools.recording.environment import seen_as
from trainer.acting.policy import NetworkPolicy, Sample


class LoadedPolicy:
    """A checkpoint's policy for your own loop; see `load_policy`.

    It has a memory of the current episode, so it must know when the next one begins: call `reset`
    whenever you reset the environment. `play` does both.

    settings   the settings it was trained with, as TOML text
    """

    def __init__(
        self,
        model: nn.Module,
        words: Sequence[str],
        settings: str,
        *,
        sample: Sample = False,
        view: tuple[int, ...] = (VIEW_SIZE, VIEW_SIZE),
    ) -> None:
        self._model, self._view = model, view
        self._policy = NetworkPolicy(model, words)
        self._sample = sample
        self._missions: list[str] = []
        self.settings = settings

    def __repr__(self) -> str:
        weights = list(self._model.parameters())
        count, device = sum(one.numel() for one in weights), weights[0].device if weights else "cpu"
        return f"<policy: {type(self._model).__name__}, {count:,} parameters on {device}>"

    def reset(self) -> None:
        """Forget everything: the next observations begin new episodes."""
        self._missions = []

    def play(
        self, environment: Any, *, seed: int | None = None, sample: Sample | None = None
    ) -> float:
        """Play one episode of a gymnasium environment from its reset to its end.

        seed      of the environment; None: its next random one
        sample    see `act`
        returns   the sum of the rewards: above 0 if the mission was done
        """
        observation, _ = environment.reset(seed=seed)
        self.reset()
        total, done = 0.0, False
        while not done:
            action = self.act(observation, sample=sample)
            observation, reward, terminated, truncated, _ = environment.step(action)
            total, done = total + float(reward), terminated or truncated
        return total

    def act(
        self,
        observation: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        first: bool | Sequence[bool] | NDArray[np.bool_] | None = None,
        *,
        sample: Sample | None = None,
    ) -> Any:
        """The action for one observation (an int), or the actions for several (int64 [B]).

        observation      a dict of `image` uint8 [7, 7, 3], `direction` and `mission`; a list of
                         them; or one dict of arrays [B, ...], as vector environments give
        first            which observations begin an episode, [B]; None: those right after
                         `reset`, those with another mission than before, and all where the number
                         of observations has changed. Two episodes running can have the same
                         mission: only `reset` or `first` tells them apart
        sample           draw the actions, or take the most probable ones; "loops": draw only where
                         the same view has come up several times in the episode; None: as loaded

        SettingsError    this is not an observation
        CheckpointError  a mission has a word that is not in the vocabulary
        LevelError       the images are not views of the kind that the network has learned
        """
        image, direction, missions, single = _columns(observation)
        count = len(missions)
        if len(self._missions) != count:
            self._policy.reset(count)
            begins = np.ones(count, dtype=np.bool_)
        elif first is None:
            begins = np.array(
                [new != old for new, old in zip(missions, self._missions, strict=True)]
            )
        else:
            begins = np.asarray(first, dtype=np.bool_)
            begins = np.full(count, begins) if begins.ndim == 0 else begins.reshape(count)
        masks = (~begins).astype(np.uint8)
        self._missions = missions
        self._policy.sample = self._sample if sample is None else sample
        actions = self._policy.act(seen_as(image, self._view), direction, missions, masks)
        return int(actions[0]) if single else actions


def load_policy(
    checkpoint: Path | str, device: str = "cpu", *, sample: Sample = False, trust: bool = False
) -> LoadedPolicy:
    """The policy of a checkpoint, or of the folder of a run, ready to act.

    sample  sample actions from the network's probabilities, with torch's random numbers; else take
            the most probable one. "loops": sample only if the policy walks in circles, that is,
            from the third time that it meets the same view in an episode
    trust   whether to run code that its settings name, such as a custom network

    CheckpointError  there is no checkpoint, it is damaged, of another network, or it names code
                     from outside the trainer that is not trusted

    Usage:

        policy = trainer.load_policy("runs/small")
        environment = gymnasium.make("BabyAI-GoToLocal-v0")
        for seed in range(10):
            observation, _ = environment.reset(seed=seed)
            policy.reset()
            done = False
            while not done:
                action = policy.act(observation)
                observation, reward, terminated, truncated, _ = environment.step(action)
                done = terminated or truncated

    The same in one line: `for seed in range(10): policy.play(environment, seed=seed)`.
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
    single = isinstance(observation, Mapping) and isinstance(observation.get("mission"), str)
    many: Any = [observation] if single else observation
    try:
        if isinstance(many, Mapping):
            image, direction, missions = many["image"], many["direction"], many["mission"]
        else:
            image = np.stack([one["image"] for one in many])
            direction = [one["direction"] for one in many]
            missions = [one["mission"] for one in many]
    except (LookupError, TypeError, ValueError) as error:
        raise _no_observation(observation) from error
    return (
        np.asarray(image, dtype=np.uint8),
        np.asarray(direction, dtype=np.uint8).reshape(-1),
        [str(mission) for mission in missions],
        single,
    )


def _no_observation(given: object) -> SettingsError:
    what: object = type(given).__name__
    if isinstance(given, np.ndarray):
        what = f"an array of shape {given.shape}"
    elif isinstance(given, Mapping):
        what = f"a dict of {', '.join(map(str, given)) or 'nothing'}"
    return SettingsError(
        f"this is not an observation but {what}",
        path="policy.act(observation)",
        fix="pass the whole dict with `image`, `direction` and `mission`, as returned by "
        "`observation, info = environment.reset()`, or a list of such dicts",
    )
