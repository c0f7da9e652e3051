"""TorchRL: `SliceSampler` over `LazyMemmapStorage`, from PyPI.

The nearest thing it does: slices of fixed length drawn at random with replacement. A slice never
crosses into the next episode, so slices are short (4 steps, where episodes have 5 on average),
shorter episodes are left out, memory starts anew at every slice, and there is no epoch, no resume.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers import SliceSampler

SLICE = 4


def slice_buffer(
    folder: Path,
    images: np.ndarray,
    actions: np.ndarray,
    lengths: np.ndarray,
    batch: int,
    cached: bool,
) -> TensorDictReplayBuffer:
    sampler = SliceSampler(
        slice_len=SLICE, traj_key="episode", cache_values=cached, strict_length=True
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(len(actions), scratch_dir=folder),
        sampler=sampler,
        batch_size=batch,
    )
    episode = np.repeat(np.arange(len(lengths)), lengths)
    buffer.extend(
        TensorDict(
            {
                "image": torch.from_numpy(images),
                "action": torch.from_numpy(actions),
                "episode": torch.from_numpy(episode),
            },
            batch_size=[len(actions)],
        )
    )
    return buffer
