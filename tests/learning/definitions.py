"""What networks compute by their definitions, every step on its own, and batches at random.

Tests hold the networks against it, and benchmarks measure how much slower it is: without pytest.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.learning.networks.base import FilmBlock, lstm_by_steps
from trainer.learning.networks.big import BigNetwork, present_words
from trainer.learning.networks.film import FilmNetwork
from trainer.learning.networks.small import SmallNetwork

WORDS = 20


def random_batch(T: int, B: int, missions: int, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    tokens = random.integers(1, WORDS + 1, (missions, 5))
    tokens[0, 3:] = 0
    return {
        "cells": torch.from_numpy(random.integers(0, 198, (T, B, 7, 7), dtype=np.uint8)),
        "direction": torch.zeros(T, B, dtype=torch.uint8),
        "masks": torch.from_numpy((random.random((T, B)) > 0.3).astype(np.uint8)),
        "mission": torch.from_numpy(random.integers(0, missions, (T, B))),
        "mission_tokens": torch.from_numpy(tokens),
        "expert_action": torch.from_numpy(random.integers(0, 7, (T, B), dtype=np.uint8)),
    }


def small_by_steps(network: SmallNetwork, batch: Batch, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The network as its docstring says it: every step on its own, nothing shared or sorted."""
    features = []
    for cells, missions in zip(batch["cells"], batch["mission"], strict=True):
        instruction = network.instruction(batch["mission_tokens"][missions])
        scale, shift = network.film(instruction).chunk(2, dim=1)
        embedded = network.codes(cells.flatten(1).long())
        seen = torch.relu(embedded * (1 + scale[:, None]) + shift[:, None])
        features.append(torch.relu(network.view(seen.flatten(1))))
    hidden, after = lstm_by_steps(network.cell, torch.stack(features), batch["masks"], memory)
    return network.actor(hidden), after


def normed(view: Tensor, norm: nn.Module) -> Tensor:
    """Each group of 8 channels of each step with mean 0 and variance 1, scaled and shifted."""
    assert isinstance(norm, nn.GroupNorm)
    groups = view.reshape(len(view), -1, 8, *view.shape[2:])
    variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
    even = ((groups - mean) / (variance + norm.eps).sqrt()).flatten(1, 2)
    return torch.addcmul(norm.bias[:, None, None], even, norm.weight[:, None, None])


def film_by_steps(network: FilmNetwork, batch: Batch, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and memory of the network step by step, every block written out: its definition."""
    features = []
    for cells, mission in zip(batch["cells"], batch["mission"], strict=True):
        instruction = network.instruction(batch["mission_tokens"][mission])
        view = network.sight.cells(cells).permute(0, 3, 1, 2)
        for first in (0, 3):
            convolution, norm, _relu = network.sight.stem[first : first + 3].children()
            view = normed(convolution(view), norm).clamp(min=0)
        for block in network.sight.blocks:
            assert isinstance(block, FilmBlock)
            scale, shift = block.film(instruction).chunk(2, dim=1)
            inner = normed(block.first(view), block.norm_first).clamp(min=0)
            inner = block.second(inner)
            inner = (1 + scale[:, :, None, None]) * inner + shift[:, :, None, None]
            view = view + normed(inner, block.norm_film).clamp(min=0)
        features.append(nn.functional.max_pool2d(view, 7).flatten(1))
    hidden, after = lstm_by_steps(network.cell, torch.stack(features), batch["masks"], memory)
    return network.actor(hidden), after


def big_by_steps(
    network: BigNetwork, batch: Batch, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, values and memory of the network step by step, with masks: its definition."""
    hidden, state = memory.detach().chunk(2, dim=1)
    logits, values = [], []
    for cells, mission, mask in zip(batch["cells"], batch["mission"], batch["masks"], strict=True):
        tokens = batch["mission_tokens"][mission]
        hidden, state = hidden * mask[:, None], state * mask[:, None]
        words = network.words(tokens)
        query = network.query(torch.cat([hidden, state], dim=1))
        score = (words * query[:, None]).sum(2).masked_fill(~present_words(tokens), -torch.inf)
        instruction = (words * score.softmax(1)[..., None]).sum(1)
        view = network.seen(cells)
        for block in network.blocks:
            view = block(view, instruction)
        hidden, state = network.cell(view.amax((2, 3)), (hidden, state))
        logits.append(network.actor(hidden))
        values.append(network.critic(hidden).squeeze(1))
    return torch.stack(logits), torch.stack(values), torch.cat([hidden, state], dim=1).detach()
