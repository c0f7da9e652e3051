"""A trained network as something that acts: for evaluation, collection, and a user's own loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from demotools.environment import observed_cells
from demotools.errors import CheckpointError
from demotools.vocabulary import mission_tokens, mission_words
from trainer.foreign import memory_of, output_of
from trainer.networks import Output


class NetworkPolicy:
    """A network that acts in many environments at once and remembers.

    words    the vocabulary that the network's token ids mean
    sample   draw actions from the distribution; else take the most probable one
    """

    def __init__(self, model: nn.Module, words: Sequence[str], *, sample: bool = False) -> None:
        self._model = model
        self._words = words
        self._sample = sample
        self.memory: Tensor = torch.zeros(0, 0)
        """[B, memory size] after the last observation."""
        self.logits: Tensor = torch.zeros(0, 0)
        """[B, 7] of the last observation; so are"""
        self.values: Tensor = torch.zeros(0)
        """[B], the critic's."""

    def reset(self, count: int) -> None:
        """Forget everything; from now on there are `count` environments."""
        self.memory = memory_of(self._model, count)

    def act(
        self,
        cells: NDArray[np.uint8],
        direction: NDArray[np.uint8],
        missions: Sequence[str],
        masks: NDArray[np.uint8],
    ) -> NDArray[np.int64]:
        """Actions for B observations: int64 [B].

        cells            uint8 [B, 7, 7]
        direction        uint8 [B]
        missions         B texts
        masks            uint8 [B], 0 where the observation begins an episode

        CheckpointError  a mission has a word that is not in the vocabulary
        """
        output = self.look(cells, direction, missions, masks, self.memory)
        self.logits, self.values = output.logits[0], output.values[0]
        if self._sample:
            action = torch.multinomial(self.logits.softmax(1), 1).squeeze(1)
        else:
            action = self.logits.argmax(1)
        self.memory = output.memory
        return cast(NDArray[np.int64], action.cpu().numpy())

    def look(
        self,
        cells: NDArray[np.uint8],
        direction: NDArray[np.uint8],
        missions: Sequence[str],
        masks: NDArray[np.uint8],
        memory: Tensor,
    ) -> Output:
        """What the network says of B observations after `memory`; the policy's own is left alone.

        CheckpointError  a mission has a word that is not in the vocabulary
        """
        row, tokens = tokenised(missions, self._words)
        device = memory.device
        batch = {
            "cells": torch.from_numpy(cells)[None].to(device),
            "direction": torch.from_numpy(direction)[None].to(device),
            "masks": torch.from_numpy(masks)[None].to(device),
            "mission": row[None].to(device),
            "mission_tokens": tokens.to(device),
        }
        with torch.no_grad():
            return output_of(self._model, batch, memory)


class LoadedPolicy:
    """A checkpoint's policy for a user's own loop; see `load_policy`.

    settings   the settings it was trained with, as TOML text
    """

    def __init__(self, model: nn.Module, words: Sequence[str], settings: str) -> None:
        self._policy = NetworkPolicy(model, words)
        self._count = 0
        self.settings = settings

    def reset(self) -> None:
        """Forget everything: the next observations begin new episodes."""
        self._count = 0

    def act(
        self,
        observation: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        first: Sequence[bool] | NDArray[np.bool_] | None = None,
    ) -> Any:
        """The action for one observation (an int), or the actions for several (int64 [B]).

        observation      a dict of `image` uint8 [7, 7, 3], `direction` and `mission`; a list of
                         them; or one dict of arrays [B, ...], as vector environments give
        first            which observations begin an episode, [B]; None: those right after
                         `reset`, and all where the number of observations has changed

        CheckpointError  a mission has a word that is not in the vocabulary
        LevelError       the images are not egocentric 7 x 7 views of minigrid
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
        actions = self._policy.act(observed_cells(image), direction, missions, masks)
        return int(actions[0]) if single else actions


def load_policy(
    checkpoint: Path | str, device: str = "cpu", *, trust: bool = False
) -> LoadedPolicy:
    """The policy of a checkpoint, or of the folder of a run, ready to act.

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
    from trainer.checkpoint import read_checkpoint

    saved = read_checkpoint(Path(checkpoint), trust=trust)
    return LoadedPolicy(saved.network().to(device), saved.words, saved.settings)


def tokenised(missions: Sequence[str], words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Each mission's row among the distinct ones, int64 [B], and their tokens, int64 [M, L].

    CheckpointError  a mission has a word that is not among `words`
    """
    rows = {mission: number for number, mission in enumerate(dict.fromkeys(missions))}
    try:
        tokens = mission_tokens(list(rows), words)
    except KeyError as error:
        unknown = error.args[0]
        mission = next(text for text in rows if unknown in mission_words(text))
        raise CheckpointError(
            f"the network has never learned the word `{unknown}`",
            path=f"mission `{mission}`",
            fix="train on a store whose missions have this word, or give another mission",
        ) from error
    table = torch.from_numpy(tokens.astype(np.int64))
    if not table.shape[1]:  # only empty missions: one column of padding
        table = torch.zeros(len(rows), 1, dtype=torch.int64)
    return torch.tensor([rows[mission] for mission in missions]), table


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
