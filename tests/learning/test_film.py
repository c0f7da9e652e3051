from __future__ import annotations

import copy

import pytest
import torch

from demotools.babyai.cells import CELL_CODES, UNPACKING_TABLE
from demotools.errors import SettingsError
from tests.learning.definitions import WORDS, film_by_steps, random_batch
from trainer.learning.building import build_network
from trainer.learning.networks.base import parameter_count
from trainer.learning.networks.film import BagOfWords, FilmNetwork


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
        logits, expected_memory = film_by_steps(reference, batch, expected_memory)
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
