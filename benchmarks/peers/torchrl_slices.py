"""TorchRL: `SliceSampler` over `LazyMemmapStorage`, from PyPI.

The nearest thing it does: slices of fixed length drawn at random with replacement. A slice never
crosses into the next episode, so slices are short (4 steps, where episodes have 5 on average),
shorter episodes are left out, memory starts anew at every slice, and there is no epoch, no resume.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tensordict import TensorDict
from torch import Tensor
from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers import SliceSampler

SLICE = 4


def slice_buffer(
    folder: Path, steps: int, columns: Iterable[dict[str, Tensor]], batch: int, cached: bool
) -> TensorDictReplayBuffer:
    """A buffer of so many steps, whose columns come in pieces; `episode` is one of them."""
    # not strict, it takes a slower way where a single episode, the last one say, is short
    sampler = SliceSampler(
        slice_len=SLICE, traj_key="episode", cache_values=cached, strict_length=True
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(steps, scratch_dir=folder),
        sampler=sampler,
        batch_size=batch,
    )
    for piece in columns:
        buffer.extend(TensorDict(piece, batch_size=[len(piece["episode"])]))
    return buffer
