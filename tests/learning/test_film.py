from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from demotools.babyai.cells import CELL_CODES, UNPACKING_TABLE
from demotools.errors import SettingsError
from tests.learning.test_networks import WORDS, random_batch
from trainer.batch import Batch
from trainer.learning.building import build_network
from trainer.learning.networks.base import FilmBlock, lstm_by_steps, parameter_count
from trainer.learning.networks.film import BagOfWords, FilmNetwork


def normed(view: Tensor, norm: nn.Module) -> Tensor:
    """Each group of 8 channels of each step with mean 0 and variance 1, scaled and shifted."""
    assert isinstance(norm, nn.GroupNorm)
    groups = view.reshape(len(view), -1, 8, *view.shape[2:])
    variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
    even = ((groups - mean) / (variance + norm.eps).sqrt()).flatten(1, 2)
    return torch.addcmul(norm.bias[:, None, None], even, norm.weight[:, None, None])


def by_steps(network: FilmNetwork, batch: Batch, memory: Tensor) -> tuple[Tensor, Tensor]:
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
        features.append(torch.nn.functional.max_pool2d(view, 7).flatten(1))
    hidden, after = lstm_by_steps(network.cell, torch.stack(features), batch["masks"], memory)
    return network.actor(hidden), after


def little() -> FilmNetwork:
    torch.manual_seed(0)
    return FilmNetwork(WORDS, channels=16, memory=24, instruction=16)


def test_the_film_network_equals_the_loop_over_steps_in_two_batches() -> None:
    network = little()
    reference = copy.deepcopy(network)
    memory = expected_memory = network.initial_memory(4)
    for number in range(2):
        batch = random_batch(7, 4, 3, seed=number)
        output = network(batch, memory)
        logits, expected_memory = by_steps(reference, batch, expected_memory)
        memory = output.memory
        torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(memory, expected_memory, rtol=1e-5, atol=1e-5)
        output.logits.square().sum().backward()
        logits.square().sum().backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_cell_is_the_sum_of_its_object_its_colour_and_its_state() -> None:
    cells = BagOfWords(5)
    object_, colour, state = torch.from_numpy(UNPACKING_TABLE[:CELL_CODES]).int().unbind(1)
    expected = cells.objects(object_) + cells.colours(colour) + cells.states(state)
    torch.testing.assert_close(cells(torch.arange(CELL_CODES, dtype=torch.uint8)), expected)


def test_the_film_network_has_about_1_2_million_parameters_and_is_named_film() -> None:
    assert 1_150_000 < parameter_count(build_network("film", {}, 60)) < 1_250_000


def test_channels_that_do_not_make_whole_groups_are_refused() -> None:
    with pytest.raises(SettingsError, match="multiple of 8"):
        build_network("film", {"channels": 20}, WORDS)
