"""Minari: `sample_episodes` of an HDF5 dataset, from PyPI.

The nearest thing it does: whole episodes drawn at random with replacement, one HDF5 group each,
as separate arrays of their own length. It does not stack them, carry anything from one draw to
the next, count epochs or resume.
"""

from __future__ import annotations

import os
from pathlib import Path

import gymnasium
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer


def minari_dataset(
    folder: Path, images: np.ndarray, actions: np.ndarray, lengths: np.ndarray
) -> minari.MinariDataset:
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    stop = np.cumsum(lengths)
    episodes = [
        EpisodeBuffer(
            observations=images[last - length : last],
            actions=actions[last - length : last].astype(np.int64),
            rewards=[0.0] * int(length),
            terminations=[False] * int(length),
            truncations=[False] * int(length),
        )
        for length, last in zip(lengths, stop, strict=True)
    ]
    return minari.create_dataset_from_buffers(
        dataset_id="bench/rollouts-v0",
        buffer=episodes,
        observation_space=gymnasium.spaces.Box(0, 255, images.shape[1:], np.uint8),
        action_space=gymnasium.spaces.Discrete(7),
        algorithm_name="none",
        author="bench",
        author_email="bench@example.org",
        code_permalink="none",
        description="random episodes",
        eval_env=None,
    )
