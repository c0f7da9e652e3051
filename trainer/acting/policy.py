"""Policies that choose the actions of many environments at once: networks, or at random."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from demotools.babyai.cells import ACTIONS
from demotools.babyai.vocabulary import mission_words, word_ids
from demotools.errors import CheckpointError
from trainer.learning.networks.base import Output, Step, acting, memory_of

_MOST_KNOWN = 1 << 16
_FAMILIAR = 2
"""So many times a policy may meet a view in an episode before it is taken to walk in a loop.

Chosen on validation seeds (docs/log.md).
"""


Sample = bool | Literal["loops"]
"""Whether actions are drawn: always, never, or only in loops (see `NetworkPolicy`)."""


class Policy(Protocol):
    """What chooses the actions of a batch of B environments.

    on_cpu   whether it is a network on a CPU, of which each process may have its own
    """

    @property
    def on_cpu(self) -> bool:  # noqa: D102
        ...

    def reset(self, count: int) -> None:
        """Forget everything; from now on the batch is `count` environments."""

    def keep(self, rows: NDArray[np.int64]) -> None:
        """From now on the batch is these environments of it, in this order."""

    def act(
        self,
        cells: NDArray[np.uint8],
        direction: NDArray[np.uint8],
        missions: Sequence[str],
        masks: NDArray[np.uint8],
        seeds: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """The actions int64 [B], 0..6.

        cells       uint8 [B, 7, 7], packed views
        direction   uint8 [B]
        missions    B texts
        masks       uint8 [B], 0 where an episode begins: memory of row b must be forgotten
        seeds       int64 [B], of the episodes, for what is drawn at random in them
        """


class EpisodeStreams:
    """Random numbers for B environments, each episode's from its own seed.

    So what is drawn in an episode depends on no other one, nor on how many are played at once.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._streams: dict[int, np.random.Generator] = {}

    def uniform(self, masks: NDArray[np.uint8], seeds: NDArray[np.int64]) -> NDArray[np.float64]:
        """One number from [0, 1) for every environment: float64 [B].

        masks   uint8 [B], 0 where an episode begins
        seeds   int64 [B], of the episodes
        """
        for row, (mask, seed) in enumerate(zip(masks.tolist(), seeds.tolist(), strict=True)):
            if not mask:
                self._streams[row] = np.random.Generator(np.random.PCG64([self._seed, seed]))
        return np.array([self._streams[row].random() for row in range(len(masks))])

    def keep(self, rows: NDArray[np.int64]) -> None:
        """From now on these environments are meant, in this order; each has begun."""
        kept = [self._streams[row] for row in rows.tolist() if row in self._streams]
        self._streams = dict(enumerate(kept))


class Encounters:
    """How often each of B environments has shown its present view in the present episode."""

    def __init__(self) -> None:
        self._met: list[Counter[bytes]] = []

    def counts(
        self,
        cells: NDArray[np.uint8],
        direction: NDArray[np.uint8],
        masks: NDArray[np.uint8],
    ) -> NDArray[np.int64]:
        """One for a view that is new: int64 [B]; the arguments are those of `Policy.act`."""
        if len(self._met) != len(masks):
            self._met = [Counter() for _ in masks]
        counts = np.empty(len(masks), np.int64)
        for row, mask in enumerate(masks.tolist()):
            if not mask:
                self._met[row] = Counter()
            view = cells[row].tobytes() + direction[row].tobytes()
            self._met[row][view] += 1
            counts[row] = self._met[row][view]
        return counts

    def keep(self, rows: NDArray[np.int64]) -> None:
        """From now on there are these environments, in this order."""
        self._met = [self._met[row] for row in rows.tolist()] if self._met else []


class RandomPolicy:
    """Uniform actions, each episode from its own random stream: a reference from below.

    actions   how many there are
    """

    on_cpu = False

    def __init__(self, seed: int = 0, actions: int = len(ACTIONS)) -> None:
        self._seed, self._actions = seed, actions
        self._streams = EpisodeStreams(seed)

    def reset(self, count: int) -> None:  # noqa: ARG002
        """Forget everything; from now on the batch is `count` environments."""
        self._streams = EpisodeStreams(self._seed)

    def keep(self, rows: NDArray[np.int64]) -> None:
        """From now on the batch is these environments of it, in this order."""
        self._streams.keep(rows)

    def act(
        self,
        cells: NDArray[np.uint8],  # noqa: ARG002
        direction: NDArray[np.uint8],  # noqa: ARG002
        missions: Sequence[str],  # noqa: ARG002
        masks: NDArray[np.uint8],
        seeds: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Random actions int64 [B]."""
        return (self._streams.uniform(masks, seeds) * self._actions).astype(np.int64)


class NetworkPolicy:
    """A network that acts in many environments at once and remembers.

    words    the vocabulary that the network's token ids mean
    sample   draw actions from the distribution; else take the most probable one. "loops": draw
             only where the policy has met the same view several times in the episode
    """

    def __init__(self, model: nn.Module, words: Sequence[str], *, sample: Sample = False) -> None:
        self._model = model
        self._step: Step | None = None
        self.tokenised = Tokenizer(words)
        """Of the network's vocabulary."""
        self.sample = sample
        self._streams = EpisodeStreams()
        self._encounters = Encounters()
        self.memory: Tensor = torch.zeros(0, 0)
        """[B, memory size] after the last observation."""
        self.logits: Tensor = torch.zeros(0, 0)
        """Of the last observation, [B, 7]."""
        self.values: Tensor = torch.zeros(0)
        """Of the last observation, the critic's, [B]."""

    @property
    def on_cpu(self) -> bool:
        """Whether the network is on a CPU."""
        return all(weight.device.type == "cpu" for weight in self._model.parameters())

    def reset(self, count: int) -> None:
        """Forget everything; from now on there are `count` environments."""
        self.prepare_anew()
        self.memory = memory_of(self._model, count)
        self._streams, self._encounters = EpisodeStreams(), Encounters()

    def prepare_anew(self) -> None:
        """Begin as a new policy would: so a run that is resumed rounds as one that was not.

        Weights that have changed are noticed without it, unless through `weight.data`, of which
        torch keeps no count.
        """
        self._step = None

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which prepares its steps itself."""
        return {**vars(self), "_step": None}

    def keep(self, rows: NDArray[np.int64]) -> None:
        """From now on there are these environments, in this order."""
        self.memory = self.memory[torch.from_numpy(rows).to(self.memory.device)]
        self._streams.keep(rows)
        self._encounters.keep(rows)

    def act(
        self,
        cells: NDArray[np.uint8],
        direction: NDArray[np.uint8],
        missions: Sequence[str],
        masks: NDArray[np.uint8],
        seeds: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]:
        """Actions for B observations: int64 [B].

        cells            uint8 [B, 7, 7]
        direction        uint8 [B]
        missions         B texts
        masks            uint8 [B], 0 where the observation begins an episode
        seeds            int64 [B], of the episodes, which actions are drawn from; None: they are
                         drawn from torch's own random numbers

        CheckpointError  a mission has a word that is not in the vocabulary
        """
        output = self.output(cells, direction, missions, masks, self.memory)
        self.logits, self.values = output.logits[0], output.values[0]
        action = self._drawn(masks, seeds) if self.sample else self.logits.argmax(1)
        if self.sample != "loops":
            self._encounters = Encounters()  # those of other episodes, by the time that they count
        else:
            loops = self._encounters.counts(cells, direction, masks) > _FAMILIAR
            likeliest = self.logits.argmax(1).cpu()
            action = torch.where(torch.from_numpy(loops), action.cpu(), likeliest)
        self.memory = output.memory
        return cast(NDArray[np.int64], action.cpu().numpy())

    def _drawn(self, masks: NDArray[np.uint8], seeds: NDArray[np.int64] | None) -> Tensor:
        if seeds is None:
            return torch.multinomial(self.logits.softmax(1), 1).squeeze(1)
        reached = self.logits.cpu().double().softmax(1).cumsum(1)
        drawn = torch.from_numpy(self._streams.uniform(masks, seeds))[:, None]
        # the last sum may be a little less than 1
        return (reached[:, :-1] <= drawn).sum(1)

    def output(
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
        row, tokens = self.tokenised(missions)
        device = memory.device
        batch = {
            "cells": torch.from_numpy(cells)[None].to(device),
            "direction": torch.from_numpy(direction)[None].to(device),
            "masks": torch.from_numpy(masks)[None].to(device),
            "mission": row[None].to(device),
            "mission_tokens": tokens.to(device),
        }
        # what a step keeps serves calls inside and outside a user's inference_mode
        with torch.inference_mode(mode=False), torch.no_grad():
            if self._step is None:
                self._step = acting(self._model)
            return self._step(batch, memory)


class Tokenizer:
    """The tokens of missions, each mission read once.

    words    the vocabulary
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._ids = word_ids(words)
        self._known: dict[str, NDArray[np.int64]] = {}

    def __call__(self, missions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Each mission's row among the distinct ones, int64 [B], and their tokens, int64 [M, L].

        CheckpointError  a mission has a word that is not in the vocabulary
        """
        rows = {mission: row for row, mission in enumerate(dict.fromkeys(missions))}
        known = self._known
        new = [mission for mission in rows if mission not in known]
        if new:
            if len(known) > _MOST_KNOWN:
                known.clear()
                new = list(rows)
            known |= {mission: self._read(mission) for mission in new}
        tokens = [known[mission] for mission in rows]
        # only empty missions: one column of padding
        table = np.zeros((len(rows), max(1, *map(len, tokens))), dtype=np.int64)
        for row, ids in enumerate(tokens):
            table[row, : len(ids)] = ids
        return torch.tensor([rows[mission] for mission in missions]), torch.from_numpy(table)

    def _read(self, mission: str) -> NDArray[np.int64]:
        try:
            ids = [self._ids[word] for word in mission_words(mission)]
            return np.array(ids, dtype=np.int64)
        except KeyError as error:
            raise CheckpointError(
                f"the network's vocabulary does not have the word `{error.args[0]}`",
                path=f"mission `{mission}`",
                fix="train on a store whose missions have this word, list it in model.words, or "
                "use another mission",
            ) from error
