"""The symmetries, checked against environments that are transformed in the same way.

Every level that declares symmetries in its manifest is played here, those of the folder
$DEMOTOOLS_MANIFESTS too: the slow tests are how a user's own level is proven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from minigrid.core.grid import Grid
from minigrid.core.world_object import Wall
from minigrid.envs.babyai.goto import GoToLocal
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS, AGENT_COLUMN, AGENT_ROW, VIEW_SIZE, visible
from demotools.babyai.levels import Symmetry, all_level_names, level_names, read_manifest
from demotools.babyai.vocabulary import WORDS, mission_tokens, mission_words
from demotools.recording.bot import Episode, Style, record_episode
from demotools.recording.environment import Environment, make_environment, observed_cells
from demotools.recording.subgoals import SUBGOALS
from demotools.store.reading import Store
from tests.transformed import solved_episodes, transformed_environment
from trainer.batch import Batch, batch_missions
from trainer.data.augment import (
    PERMUTATIONS,
    TYPE_PERMUTATIONS,
    Augmenter,
    draws_rephrasing,
    episode_draws,
    exchanged_codes,
    exchanged_subgoals,
    exchanged_words,
    rephrased_missions,
    toggles_thing,
)
from trainer.data.iterator import ExpertTrajectoryIterator

TURN_LEFT = ACTIONS.index("left")
IN_ORDER = (", then ", " after you ")
ROLLOUT, EPISODE = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
DECLARING = [level for level in all_level_names() if read_manifest(level).symmetries]
OF_THE_PAPER = [level for level in level_names() if level in DECLARING]


class Drawn(NamedTuple):
    """What an episode draws: new colours int64 [6], new types int64 [3], and what is done to it."""

    colours: NDArray[np.int64]
    types: NDArray[np.int64]
    mirrored: bool
    rephrased: bool


def drawn(seed: int) -> Drawn:
    """What the first episode of the first rollout draws."""
    draw = int(episode_draws(seed, ROLLOUT, EPISODE)[0])
    types, colours = divmod(draw // 2, len(PERMUTATIONS))
    rephrased = bool(draws_rephrasing(seed, ROLLOUT, EPISODE)[0])
    return Drawn(PERMUTATIONS[colours], TYPE_PERMUTATIONS[types], draw % 2 == 1, rephrased)


def is_telling(draw: Drawn) -> bool:
    """Whether it mirrors and rephrases, and leaves no colour and no type as it is."""
    moved = [all(some != np.arange(len(some))) for some in (draw.colours, draw.types)]
    return draw.mirrored and draw.rephrased and all(moved)


def telling_seed(number: int) -> int:
    """The seeds with a telling draw, from number 0 on."""
    return next(islice((seed for seed in count() if is_telling(drawn(seed))), number, None))


def native(episode: Episode) -> Batch:
    """A native batch of one rollout, which plays this episode."""
    masks = np.ones((len(episode.action), 1), dtype=np.uint8)
    masks[0] = 0
    return {
        "cells": torch.from_numpy(episode.cells[:, None]),
        "direction": torch.from_numpy(episode.direction[:, None]),
        "expert_action": torch.from_numpy(episode.action[:, None]),
        "masks": torch.from_numpy(masks),
        "mission": torch.zeros(masks.shape, dtype=torch.int32),
    }


def text(tokens: torch.Tensor | NDArray[np.uint16]) -> list[str]:
    return [WORDS[token - 1] for token in tokens.tolist() if token]


def check_symmetry(level: str, episode: Episode, symmetries: Sequence[Symmetry], seed: int) -> None:
    """The augmented episode is what the equally transformed environment shows and rewards."""
    tokens = torch.from_numpy(mission_tokens([episode.mission]).astype(np.int64))
    batch = Augmenter(symmetries, WORDS, seed=seed)(native(episode), tokens, np.zeros(1, int))
    environment = transformed_environment(
        level,
        drawn(seed).colours if "recolor" in symmetries else PERMUTATIONS[0],
        drawn(seed).types if "retype" in symmetries else TYPE_PERMUTATIONS[0],
        mirrored="mirror" in symmetries,
        rephrased="rephrase" in symmetries,
    )
    observation, _ = environment.reset(seed=episode.seed)
    mission = str(observation["mission"])
    assert mission_words(mission) == text(batch["mission_tokens"][batch["mission"][0, 0]])
    assert len(batch["mission_tokens"]) == 1
    images, directions, rewards, over = [], [], [], False
    for action in batch["expert_action"][:, 0].tolist():
        assert not over
        images.append(observation["image"])
        directions.append(observation["direction"])
        observation, reward, terminated, truncated, _ = environment.step(action)
        rewards.append(float(reward))
        over = terminated or truncated
    np.testing.assert_array_equal(observed_cells(np.stack(images)), batch["cells"][:, 0])
    np.testing.assert_array_equal(directions, batch["direction"][:, 0])
    assert rewards[-1] > 0 and not any(rewards[:-1])
    manifest = read_manifest(level)
    if not {*symmetries} & {*manifest.widened_by}:
        assert manifest.matches_mission(mission)


def choices(level: str) -> list[tuple[Symmetry, ...]]:
    """What a recipe may ask for: each declared symmetry alone, and all of them."""
    declared = read_manifest(level).symmetries
    return [*((symmetry,) for symmetry in declared), *([declared] if len(declared) > 1 else [])]


@cache
def first_episode(level: str) -> Episode:
    """One in which the agent turns, with two tasks in order where the level has such."""
    phrases = IN_ORDER if "rephrase" in read_manifest(level).symmetries else ("",)
    return next(
        each
        for each in solved_episodes(level)
        if TURN_LEFT in each.action and any(phrase in each.mission for phrase in phrases)
    )


@pytest.mark.parametrize(
    ("level", "symmetries"),
    [(level, symmetries) for level in OF_THE_PAPER for symmetries in choices(level)],
)
def test_an_augmented_episode_is_played_and_solved_in_the_transformed_environment(
    level: str, symmetries: tuple[Symmetry, ...]
) -> None:
    number = OF_THE_PAPER.index(level)
    check_symmetry(level, first_episode(level), symmetries, telling_seed(number))


@pytest.mark.slow
@pytest.mark.parametrize("level", DECLARING)
def test_many_augmented_episodes_are_solved_in_the_transformed_environment(level: str) -> None:
    episodes = 30 if level in OF_THE_PAPER else 5
    for number, episode in enumerate(islice(solved_episodes(level, first_seed=100), episodes)):
        for symmetries in choices(level):
            if "retype" in symmetries and toggles_thing(episode.cells, episode.action).any():
                continue  # such a store is refused; only random episodes do it
            check_symmetry(level, episode, symmetries, telling_seed(number))


@pytest.mark.parametrize(
    "phrase",
    [
        *("on your left", "on your right", "behind you", "in front of you"),
        *(" after you ", ", then ", " and ", " next to "),
    ],
)
def test_every_kind_of_mission_is_transformed_as_the_instructions_are(phrase: str) -> None:
    environment = make_environment("BossLevel")
    seed = next(seed for seed in count() if phrase in environment.reset(seed=seed)[0]["mission"])
    episode = record_episode(environment, seed)
    assert isinstance(episode, Episode) and phrase in episode.mission
    for symmetries in (("recolor", "mirror"), ("rephrase",)):
        check_symmetry("BossLevel", episode, symmetries, telling_seed(seed))


@pytest.mark.parametrize(
    ("level", "symmetries"), [("BossLevel", ("recolor", "mirror")), ("PutNextLocal", ("retype",))]
)
def test_augmented_subgoals_are_those_of_a_bot_that_sees_the_transformed_environment(
    level: str, symmetries: tuple[Symmetry, ...]
) -> None:
    def played(environment: Environment) -> Episode:
        episode = record_episode(environment, 4, Style(subgoals=True))
        assert isinstance(episode, Episode)
        return episode

    plain, seed = played(make_environment(level)), telling_seed(0)
    batch = {**native(plain), "subgoal": torch.from_numpy(plain.optional["subgoal"][:, None])}
    tokens = torch.from_numpy(mission_tokens([plain.mission]).astype(np.int64))
    augmenter = Augmenter(symmetries, WORDS, seed=seed, subgoals=SUBGOALS)
    found = augmenter(batch, tokens, np.zeros(1, int))["subgoal"][:, 0].numpy()
    changed = played(
        transformed_environment(
            level,
            drawn(seed).colours if "recolor" in symmetries else PERMUTATIONS[0],
            drawn(seed).types if "retype" in symmetries else TYPE_PERMUTATIONS[0],
            mirrored=False,  # the bot may go another way then
        )
    )
    assert found.tolist() == changed.optional["subgoal"].tolist() != batch["subgoal"][:, 0].tolist()


def test_the_bot_plays_a_rephrased_mission_as_it_plays_the_mission() -> None:
    rephrased = transformed_environment(
        "BossLevel", PERMUTATIONS[0], TYPE_PERMUTATIONS[0], mirrored=False, rephrased=True
    )
    one = first_episode("BossLevel")
    other = record_episode(rephrased, one.seed)
    assert isinstance(other, Episode) and other.mission != one.mission
    assert other.action.tolist() == one.action.tolist()


def test_a_subgoal_for_which_the_store_has_no_code_becomes_unknown() -> None:
    table = exchanged_subgoals(["unknown", "explore", "go to the red ball", "go to the blue ball"])
    rows = {tuple(row) for row in table[:, :4].tolist()}
    kept, lost = {(0, 1, 2, 3), (0, 1, 3, 2)}, {(0, 1, 0, 0)}
    one_of_two = {(0, 1, 2, 0), (0, 1, 3, 0), (0, 1, 0, 2), (0, 1, 0, 3)}
    assert rows == kept | lost | one_of_two


class OneHanded(GoToLocal):
    """Nobody can turn right here."""

    def step(self, action: Any) -> Any:
        allowed = self.actions.done if action == self.actions.right else action
        return super().step(allowed)  # type: ignore[no-untyped-call]


class RedOnly(GoToLocal):
    """Going to anything that is not red earns nothing."""

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)  # type: ignore[no-untyped-call]
        return observation, reward if "red" in self.mission else 0, *rest


@pytest.fixture
def declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Registers a level class of ours, whose manifest declares both symmetries; gives its name."""
    names = []

    def declare(level: type[GoToLocal]) -> str:
        names.append(f"BabyAI-{level.__name__}-v0")
        gymnasium.register(names[-1], entry_point=level)
        (tmp_path / f"{level.__name__}.toml").write_text(
            f'level = "{level.__name__}"\nenvironment_id = "{names[-1]}"\n'
            'mission_pattern = "go to .*"\nsymmetries = ["recolor", "mirror"]\n'
        )
        return level.__name__

    monkeypatch.setenv("DEMOTOOLS_MANIFESTS", str(tmp_path))
    yield declare
    for name in names:
        del gymnasium.registry[name]


@pytest.mark.parametrize(
    ("level", "lacking", "kept"), [(OneHanded, "mirror", "recolor"), (RedOnly, "recolor", "mirror")]
)
def test_a_level_that_declares_a_symmetry_it_lacks_fails_the_proof(
    declared: Callable[..., str], level: type[GoToLocal], lacking: Symmetry, kept: Symmetry
) -> None:
    name = declared(level)
    turning = (episode for episode in solved_episodes(name) if TURN_LEFT in episode.action)
    for number, episode in enumerate(islice(turning, 3)):
        check_symmetry(name, episode, [kept], telling_seed(number))
        with pytest.raises(AssertionError):
            check_symmetry(name, episode, [lacking], telling_seed(number))


def symmetries_of(level: str, seeds: int) -> list[str]:
    """What the first steps of a level allow.

    Recolor and mirror; retype where no door is locked, which a key opens, and no box holds a thing;
    rephrase where two tasks are put in order.
    """
    environment = make_environment(level)
    babyai: Any = environment.unwrapped
    matter = ordered = False
    for seed in range(seeds):
        mission = environment.reset(seed=seed)[0]["mission"]
        ordered |= any(phrase in mission for phrase in IN_ORDER)
        for thing in filter(None, babyai.grid.grid):
            matter |= bool(getattr(thing, "is_locked", False) or getattr(thing, "contains", None))
    return ["recolor", "mirror", *["retype"][matter:], *["rephrase"][not ordered :]]


def check_declaration(level: str, seeds: int) -> None:
    """A level declares what it allows, wherever there is an environment."""
    manifest = read_manifest(level)
    expected = symmetries_of(level, seeds) if manifest.environment_id is not None else []
    assert list(manifest.symmetries) == expected


@pytest.mark.parametrize("level", level_names())
def test_levels_of_the_paper_declare_all_symmetries_that_they_have(level: str) -> None:
    check_declaration(level, 40)


@pytest.mark.slow
@pytest.mark.parametrize("level", all_level_names())
def test_levels_declare_all_symmetries_that_they_have(level: str) -> None:
    check_declaration(level, 200)


@given(arrays(np.bool_, (VIEW_SIZE, VIEW_SIZE), elements=st.booleans()))
def test_what_is_seen_of_mirrored_things_is_what_was_seen_mirrored(
    opaque: NDArray[np.bool_],
) -> None:
    def seen(opaque: NDArray[np.bool_]) -> NDArray[np.bool_]:
        grid = Grid(VIEW_SIZE, VIEW_SIZE)
        for column, row in np.argwhere(opaque).tolist():
            grid.set(column, row, Wall())
        return np.array(grid.process_vis((AGENT_COLUMN, AGENT_ROW)))

    np.testing.assert_array_equal(seen(opaque[::-1]), seen(opaque)[::-1])
    # files of 2018 are read by the rule of that time
    np.testing.assert_array_equal(visible(opaque[None, ::-1]), visible(opaque[None])[:, ::-1])


def test_left_and_right_are_exchanged_in_mirrored_missions_and_only_there() -> None:
    tokens = mission_tokens(["pick up the key on your left", "go to a door on your right"])
    words, identity = exchanged_words(WORDS), 0
    assert [text(words[identity * 2 + 1][row])[-1] for row in tokens] == ["right", "left"]
    assert [text(words[identity * 2][row])[-1] for row in tokens] == ["left", "right"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "go to the key on your left and open a door, then pick up the box in front of you",
            "pick up the box in front of you after you go to the key on your left and open a door",
        ),
        (
            "go to a ball behind you after you open a door",
            "open a door, then go to a ball behind you",
        ),
        ("go to the key and open a door behind you", "go to the key and open a door behind you"),
        ("go to a, then go to b, then go to c", "go to a, then go to b, then go to c"),
    ],
)
def test_a_rephrased_mission_says_the_same_and_rephrased_again_it_is_what_it_was(
    one: str, other: str
) -> None:
    vocabulary = (*WORDS, "b", "c")
    tokens = mission_tokens([one, other, "open a door"], vocabulary).astype(np.uint16)
    both = np.ones(3, dtype=np.bool_)
    once = rephrased_missions(tokens, vocabulary, both)
    width = tokens.shape[1]
    for row, kept in ((0, 1), (1, 0), (2, 2)):
        assert once[row].tolist()[:width] == tokens[kept].tolist()
    assert np.array_equal(rephrased_missions(once, vocabulary, both)[:, :width], tokens)
    assert np.array_equal(rephrased_missions(tokens, vocabulary, ~both)[:, :width], tokens)
    # without these words nothing is said in order
    assert np.array_equal(rephrased_missions(tokens, ("go",), both)[:, :width], tokens)


def test_a_vocabulary_without_colours_or_sides_has_nothing_to_exchange() -> None:
    assert set(map(tuple, exchanged_words(("go", "lamp")).tolist())) == {(0, 1, 2)}


def test_walls_and_what_has_no_colour_keep_their_codes() -> None:
    for code in (0, 18, 2 * 18 + 5 * 3):  # unseen, empty, a grey wall
        assert set(exchanged_codes()[:, code].tolist()) == {code}


def test_no_two_cells_become_one() -> None:
    assert all(len(set(row)) == 256 for row in exchanged_codes()[::37].tolist())


@pytest.mark.parametrize("symmetries", [["recolor"], ["mirror"], ["retype"], ["rephrase"]])
def test_a_batch_is_left_as_it_is(symmetries: list[Symmetry]) -> None:
    episode = first_episode("PickupLoc")
    batch, tokens = native(episode), torch.ones(1, 3, dtype=torch.int64)
    before = {name: values.clone() for name, values in batch.items()}
    Augmenter(symmetries, WORDS, seed=telling_seed(0))(batch, tokens, np.zeros(1, int))
    assert all(torch.equal(batch[name], before[name]) for name in before)


def test_an_episode_keeps_its_draw_across_batches_and_a_resumed_stream_draws_the_same(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=[5, 9, 4, 12, 7, 3])
    words = store.attributes.vocabulary

    def batches(rollout_len: int, count: int, resume_at: int | None = None) -> torch.Tensor:
        def begun() -> ExpertTrajectoryIterator:
            augmenter = Augmenter(["recolor", "mirror", "retype"], words, seed=7)
            return ExpertTrajectoryIterator(
                store, rollouts=2, rollout_len=rollout_len, layout="native", augmenter=augmenter
            )

        stream, cells = begun(), []
        for number in range(count):
            if number == resume_at:
                state, stream = stream.state(), begun()
                stream.load_state(state)
            cells.append(next(stream)["cells"].clone())
        return torch.cat(cells)

    whole = batches(rollout_len=60, count=1)
    assert torch.equal(batches(rollout_len=4, count=15), whole)
    assert torch.equal(batches(rollout_len=4, count=15, resume_at=6), whole)


def test_rollouts_shared_out_to_two_processes_draw_what_one_would(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=[2] * 40)
    words = store.attributes.vocabulary

    def cells(rank: int, world: int) -> torch.Tensor:
        augmenter = Augmenter(["recolor", "mirror", "retype"], words, seed=1)
        kinds: dict[str, Any] = {"layout": "native", "rank": rank, "world": world}
        stream = ExpertTrajectoryIterator(
            store, rollouts=4, rollout_len=9, augmenter=augmenter, **kinds
        )
        return next(stream)["cells"]

    assert torch.equal(torch.cat([cells(0, 2), cells(1, 2)], dim=1), cells(0, 1))


def test_every_permutation_is_drawn_about_equally_often() -> None:
    rollout, begun = np.meshgrid(np.arange(200), np.arange(1, 721))
    draws = episode_draws(3, rollout, begun).reshape(-1)
    types, permutation = np.divmod(draws // 2, 720)
    counts = np.bincount(permutation, minlength=720)
    assert counts.min() > 140 and counts.max() < 270  # mean 200, standard deviation 14
    for other, choices in ((draws % 2, 2), (types, 6)):
        for choice in range(choices):
            share = np.bincount(permutation, weights=other == choice, minlength=720) / counts
            # standard deviation at most 0.035
            assert abs(share - 1 / choices).max() < 0.2


@given(st.data())
def test_missions_are_listed_once_and_in_the_same_order_with_and_without_symmetries(
    data: st.DataObject,
) -> None:
    steps, rollouts = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    words = tuple(f"w{number}" for number in range(data.draw(st.sampled_from([5, 300]))))
    table = data.draw(arrays(np.int64, (4, 3), elements=st.integers(0, len(words))))
    masks = data.draw(arrays(np.uint8, (steps, rollouts), elements=st.integers(0, 1)))
    masks[0] = 0
    episode = np.cumsum(masks == 0, axis=0) + 10 * np.arange(rollouts)
    batch = {
        "masks": torch.from_numpy(masks),
        "mission": torch.from_numpy((episode * 7 % 4).astype(np.int32)),
    }
    begun = np.zeros(rollouts, dtype=np.int64)
    listed = Augmenter([], words, seed=0)(batch, torch.from_numpy(table), begun)
    expected = batch_missions(batch, torch.from_numpy(table))
    assert all(torch.equal(listed[name], expected[name]) for name in expected)


def test_the_missions_of_a_batch_are_listed_once() -> None:
    tokens = torch.tensor([[1, 2], [3, 0], [1, 2], [4, 4]])
    batch = batch_missions({"mission": torch.tensor([[0, 2], [1, 0]])}, tokens)
    assert batch["mission_tokens"].tolist() == [[1, 2], [3, 0]]
    assert batch["mission"].tolist() == [[0, 0], [1, 0]]
