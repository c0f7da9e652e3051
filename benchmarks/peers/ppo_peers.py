"""PPO by sb3-contrib and by torch-ac (babyai's own PPO is an early copy of it), from PyPI.

Their networks have our sizes behind the view: 128 features, an LSTM of 128, heads of 64. In front
of it is one linear layer over the flat view and a bag of the mission's words, less work than our
embeddings and instruction encoder. The numbers of the recipe ppo.toml are given to both. Each is a
function from (maker of an environment, level, environments, rollout length, processes, turn) that
trains for ever and calls `turn` between two cycles.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import gymnasium
import minigrid  # noqa: F401, registers the levels
import numpy as np
import torch
import torch_ac
from gymnasium.spaces import Box
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from torch import nn
from torch.distributions import Categorical

from demotools.babyai.levels import read_manifest
from demotools.babyai.vocabulary import WORDS, mission_words
from demotools.recording.environment import make_environment

Turn = Callable[[], None]
FEATURES = MEMORY = 128
HEAD = 64
REPEATS, MINIBATCHES = 4, 2
SIZE = 7 * 7 * 3 + 4 + len(WORDS)


@cache
def bag(mission: str) -> np.ndarray:
    return np.isin(WORDS, list(mission_words(mission))).astype(np.float32)


class Flat(gymnasium.ObservationWrapper):
    """View, direction and the words of the mission as one row of numbers."""

    observation_space = Box(0, 255, (SIZE,), np.float32)

    def observation(self, observation):
        row = np.zeros(SIZE, np.float32)
        row[:147] = observation["image"].reshape(-1)
        row[147 + observation["direction"]] = 1
        row[151:] = bag(observation["mission"])
        return row


def stock(level: str) -> Flat:
    return Flat(gymnasium.make(read_manifest(level).environment_id))


def fast(level: str) -> Flat:
    """The peer with our environments under it."""
    return Flat(make_environment(level))


MAKERS = {"stock": stock, "ours": fast}


class Features(BaseFeaturesExtractor):
    def __init__(self, space: Box) -> None:
        super().__init__(space, FEATURES)
        self.linear = nn.Linear(SIZE, FEATURES)

    def forward(self, rows):
        return torch.relu(self.linear(rows))


class Turns(BaseCallback):
    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.turn = turn

    def _on_rollout_start(self) -> None:
        self.turn()

    def _on_step(self) -> bool:
        return True


def recurrent_ppo(
    make: Callable[[str], Flat], level: str, count: int, length: int, processes: int, turn: Turn
) -> None:
    makers = [lambda: make(level)] * count
    # torch_ac, imported above, fixes how processes start
    many = processes != 1
    vector = SubprocVecEnv(makers, start_method="fork") if many else DummyVecEnv(makers)
    model = RecurrentPPO(
        "MlpLstmPolicy",
        vector,
        learning_rate=2.5e-4,
        n_steps=length,
        batch_size=count * length // MINIBATCHES,
        n_epochs=REPEATS,
        gae_lambda=1.0,
        clip_range=0.1,
        clip_range_vf=0.1,
        ent_coef=0.01,
        policy_kwargs={
            "features_extractor_class": Features,
            "lstm_hidden_size": MEMORY,
            "shared_lstm": True,
            "enable_critic_lstm": False,
            "net_arch": {"pi": [HEAD], "vf": [HEAD]},
        },
        device="cpu",
        seed=1,
    )
    model.learn(1 << 40, callback=Turns(turn))


class Rows(torch_ac.RecurrentACModel, nn.Module):
    memory_size = 2 * MEMORY

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.linear = nn.Linear(SIZE, FEATURES)
        self.cell = nn.LSTMCell(FEATURES, MEMORY)
        self.actor = nn.Sequential(nn.Linear(MEMORY, HEAD), nn.Tanh(), nn.Linear(HEAD, 7))
        self.critic = nn.Sequential(nn.Linear(MEMORY, HEAD), nn.Tanh(), nn.Linear(HEAD, 1))

    def forward(self, observation, memory):
        features = torch.relu(self.linear(observation.rows))
        hidden, state = self.cell(features, memory.chunk(2, dim=1))
        logits = self.actor(hidden).log_softmax(dim=1)
        value = self.critic(hidden).squeeze(1)
        return Categorical(logits=logits), value, torch.cat([hidden, state], dim=1)


def rows(observations, device=None):
    values = torch.from_numpy(np.stack(observations)).to(device)
    return torch_ac.DictList({"rows": values})


def ppo_of_torch_ac(
    make: Callable[[str], Flat], level: str, count: int, length: int, _processes: int, turn: Turn
) -> None:
    """It has a process for every environment, however many are asked for.

    Every second of its epochs begins its stretches half a stretch later, and leaves out those that
    would not end within the rollout: with stretches as long as the rollout, all of them. So twice
    as many epochs are as many updates on every step as the others make.
    """
    torch.manual_seed(1)
    # the means of its epochs without updates
    warnings.filterwarnings("ignore", "Mean of empty slice|invalid value", RuntimeWarning)
    algorithm = torch_ac.PPOAlgo(
        [make(level) for _ in range(count)],
        Rows(),
        num_frames_per_proc=length,
        lr=2.5e-4,
        gae_lambda=1.0,
        recurrence=length,
        clip_eps=0.1,
        epochs=2 * REPEATS,
        batch_size=count * length // MINIBATCHES,
        preprocess_obss=rows,
    )
    while True:
        turn()
        experiences, _ = algorithm.collect_experiences()
        algorithm.update_parameters(experiences)
