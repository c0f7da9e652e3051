from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trainer
from demotools.babyai.cells import EMPTY
from demotools.babyai.vocabulary import WORDS
from demotools.errors import CheckpointError, DemotoolsError, LevelError, SettingsError
from demotools.recording.environment import make_environment
from trainer.acting.policy import NetworkPolicy, Sample, Tokenizer
from trainer.learning.building import build_network
from trainer.learning.networks.small import SmallNetwork
from trainer.run.checkpoint import read_checkpoint, write_checkpoint
from trainer.run.folder import CHECKPOINT_FILE as FILE_NAME
from trainer.run.loading import LoadedPolicy
from trainer.settings.models import read_settings, toml_of

ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "benchmarks" / "weights" / "GoToLocal-1000.pt"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The folder of a run whose network knows nothing yet."""
    torch.manual_seed(5)
    write_checkpoint(
        tmp_path / FILE_NAME,
        settings=toml_of(read_settings("bc_small_cpu")),
        words=WORDS,
        model=SmallNetwork(len(WORDS)).state_dict(),
        training={},
    )
    return tmp_path


def observations(count: int, steps: int) -> list[list[dict[str, Any]]]:
    """What `count` environments show under a fixed sequence of actions, step by step."""
    environments = [make_environment("GoToLocal") for _ in range(count)]
    shown = [[env.reset(seed=seed)[0] for seed, env in enumerate(environments)]]
    for step in range(steps - 1):
        shown.append([env.step((step + seed) % 3)[0] for seed, env in enumerate(environments)])
    return shown


def test_one_observation_gives_an_action_and_several_give_the_same_ones(checkpoint: Path) -> None:
    shown = observations(count=3, steps=5)
    together, alone = trainer.load_policy(checkpoint), trainer.load_policy(checkpoint / FILE_NAME)
    batched = [together.act(step) for step in shown]
    for row in range(3):
        alone.reset()
        single = [alone.act(step[row]) for step in shown]
        assert all(type(action) is int for action in single)
        assert single == [actions[row] for actions in batched]


def test_a_dict_of_arrays_is_a_batch_too(checkpoint: Path) -> None:
    (step,) = observations(count=2, steps=1)
    stacked = {
        "image": np.stack([one["image"] for one in step]),
        "direction": np.array([one["direction"] for one in step]),
        "mission": [one["mission"] for one in step],
    }
    policy = trainer.load_policy(checkpoint)
    np.testing.assert_array_equal(policy.act(stacked), trainer.load_policy(checkpoint).act(step))


def test_first_makes_one_row_forget_and_no_other(checkpoint: Path) -> None:
    shown = observations(count=2, steps=4)
    policy, fresh = trainer.load_policy(checkpoint), trainer.load_policy(checkpoint)
    kept = trainer.load_policy(checkpoint)
    for step in shown[:3]:
        policy.act(step)
        kept.act(step)
    policy.act(shown[3], first=[True, False])
    kept.act(shown[3])
    fresh.act(shown[3])
    memory, of_kept, of_fresh = (one._policy.memory for one in (policy, kept, fresh))
    assert torch.equal(memory[0], of_fresh[0]) and not torch.equal(memory[0], of_kept[0])
    assert torch.equal(memory[1], of_kept[1]) and not torch.equal(memory[1], of_fresh[1])


def test_a_policy_acts_outside_inference_mode_after_it_has_acted_inside(checkpoint: Path) -> None:
    policy, other = trainer.load_policy(checkpoint), trainer.load_policy(checkpoint)
    shown = observations(count=2, steps=40)
    for number, step in enumerate(shown):
        with torch.inference_mode(mode=number % 2 == 0):
            actions = policy.act(step)
        np.testing.assert_array_equal(actions, other.act(step))


def step_of(network: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer(network.parameters(), lr=0.01).step()


def by_hand(network: nn.Module) -> None:
    with torch.no_grad():
        next(iter(network.parameters())).mul_(2)


def loaded(network: nn.Module) -> None:
    network.load_state_dict({name: 2 * one for name, one in network.state_dict().items()})


@pytest.mark.parametrize(
    "change",
    [
        # torch counts no changes by its fused optimizers
        partial(step_of, optimizer=partial(torch.optim.Adam, fused=True)),
        partial(step_of, optimizer=torch.optim.SGD),
        by_hand,
        loaded,
    ],
)
@pytest.mark.parametrize("name", ["small", "maze"])
def test_a_policy_acts_by_the_weights_of_now_whoever_changed_them(
    name: str, change: Callable[[nn.Module], None]
) -> None:
    torch.manual_seed(0)
    network = build_network(name, {}, len(WORDS))
    policy = NetworkPolicy(network, WORDS)
    policy.reset(2)
    shown = np.full((2, 7, 7), 18, np.uint8), np.zeros(2, np.uint8), ["go to a box"] * 2
    begins = np.zeros(2, np.uint8)
    policy.act(*shown, begins)
    before = policy.logits
    change(network)
    policy.act(*shown, begins)
    fresh = NetworkPolicy(network, WORDS)
    fresh.reset(2)
    fresh.act(*shown, begins)
    assert torch.equal(policy.logits, fresh.logits) and not torch.equal(policy.logits, before)


def test_the_documented_loop_plays_every_episode_as_a_policy_fresh_from_its_file_does(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    example = example.replace("build/demo/run/last.pt", str(checkpoint))
    assert "policy.reset()" in example and "for seed in" in example
    exec(example, {})
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    environment = make_environment("GoToLocal")
    assert len(shown) > 1
    for seed, reward in shown:
        fresh = trainer.load_policy(checkpoint)
        assert float(reward) == fresh.play(environment, seed=int(seed))


def played(policy: trainer.LoadedPolicy, seed: int, *, reset: bool) -> list[int]:
    """The actions of one episode of GoToLocal."""
    environment, actions, done = make_environment("GoToLocal"), [], False
    observation, _ = environment.reset(seed=seed)
    if reset:
        policy.reset()
    while not done:
        actions.append(policy.act(observation))
        observation, _reward, terminated, truncated, _ = environment.step(actions[-1])
        done = bool(terminated or truncated)
    return actions


def test_an_episode_with_another_mission_is_noticed_without_a_reset() -> None:
    policy, told = trainer.load_policy(TRAINED), trainer.load_policy(TRAINED)
    environment = make_environment("GoToLocal")
    missions = [environment.reset(seed=seed)[0]["mission"] for seed in range(8)]
    assert all(one != other for one, other in pairwise(missions))  # else nobody could notice
    for seed in range(8):
        assert played(policy, seed, reset=False) == played(told, seed, reset=True)


def test_an_episode_with_the_same_mission_is_told_by_first_and_by_play() -> None:
    environment = make_environment("GoToRedBallGrey")
    policy, fresh = trainer.load_policy(TRAINED), trainer.load_policy(TRAINED)
    observation, _ = environment.reset(seed=1)
    for _ in range(3):
        policy.act(observation)
    assert policy.act(observation, first=True) == fresh.act(observation)
    assert torch.equal(policy._policy.memory, fresh._policy.memory)
    rewards = [policy.play(environment, seed=seed) for seed in range(5)]
    again = [trainer.load_policy(TRAINED).play(environment, seed=seed) for seed in range(5)]
    assert rewards == again


def test_what_is_no_observation_is_refused_with_what_one_is(checkpoint: Path) -> None:
    policy = trainer.load_policy(checkpoint)
    observation, info = make_environment("GoToLocal").reset(seed=1)
    for given in (
        observation["image"],
        (observation, info),
        {"image": observation["image"]},
        observation["mission"],
        None,
    ):
        with pytest.raises(SettingsError, match="this is not an observation") as refusal:
            policy.act(given)  # type: ignore[arg-type]
        assert "environment.reset()" in refusal.value.fix
    with pytest.raises(SettingsError, match=r"an array of shape \(7, 7, 3\)"):
        policy.act(observation["image"])


def test_a_policy_shows_itself_in_a_line(checkpoint: Path) -> None:
    shown = repr(trainer.load_policy(checkpoint))
    assert re.fullmatch(r"<policy: SmallNetwork, [\d,]+ parameters on cpu>", shown)


def test_a_word_that_was_never_learned_is_refused_by_name(checkpoint: Path) -> None:
    ((observation,),) = observations(count=1, steps=1)
    with pytest.raises(CheckpointError, match="does not have the word `lamp`") as refusal:
        trainer.load_policy(checkpoint).act({**observation, "mission": "go to the red lamp"})
    assert refusal.value.path == "mission `go to the red lamp`"


def test_a_view_of_another_size_is_refused(checkpoint: Path) -> None:
    ((observation,),) = observations(count=1, steps=1)
    image = np.zeros((5, 5, 3), dtype=np.uint8)
    with pytest.raises(LevelError, match="do not pack"):
        trainer.load_policy(checkpoint).act({**observation, "image": image})


def test_tokens_of_missions_are_listed_once_and_an_empty_mission_is_all_padding() -> None:
    row, tokens = Tokenizer(WORDS)(["go to a box", "", "go to a box"])
    assert row.tolist() == [0, 1, 0]
    assert tokens.tolist() == [[1, 2, 13, 24], [0, 0, 0, 0]]
    assert Tokenizer(WORDS)([""])[1].tolist() == [[0]]


def test_drawn_actions_follow_the_networks_distribution() -> None:
    torch.manual_seed(0)
    network = SmallNetwork(len(WORDS))
    rows = 4000
    cells = np.zeros((rows, 7, 7), dtype=np.uint8)
    zeros = np.zeros(rows, dtype=np.uint8)
    policy = NetworkPolicy(network, WORDS, sample=True)
    policy.reset(rows)
    drawn = np.bincount(policy.act(cells, zeros, ["go to a box"] * rows, zeros), minlength=7)
    batch = {
        "cells": torch.zeros(1, 1, 7, 7, dtype=torch.uint8),
        "masks": torch.zeros(1, 1),
        "mission": torch.zeros(1, 1, dtype=torch.int64),
        "mission_tokens": torch.tensor([[1, 2, 13, 24]]),
    }
    expected = network(batch, network.initial_memory(1)).logits[0, 0].softmax(0)
    # four standard deviations of a share of 4,000 draws
    assert np.abs(drawn / rows - expected.detach().numpy()).max() < 4 * 0.5 / rows**0.5


def test_in_loops_actions_are_drawn_from_the_third_time_that_a_view_comes_up() -> None:
    torch.manual_seed(0)
    rows = 2000
    policy = NetworkPolicy(SmallNetwork(len(WORDS)), WORDS, sample="loops")
    policy.reset(rows)
    other = np.arange(rows) % 2 == 1
    cells = np.full((rows, 7, 7), EMPTY * 18, dtype=np.uint8)
    begins, goes_on = np.zeros(rows, dtype=np.uint8), np.ones(rows, dtype=np.uint8)
    east = np.zeros(rows, dtype=np.uint8)

    def draws(direction: Any, masks: Any) -> Any:
        """Where an action was not the most probable one; many that are drawn are not."""
        actions = policy.act(cells[: len(masks)], direction, ["go to a box"] * len(masks), masks)
        return actions != policy.logits.argmax(1).numpy()

    assert not draws(east, begins).any()
    assert not draws(east, goes_on).any()
    # half of them look elsewhere now, which is another view
    third = draws(np.where(other, 1, 0).astype(np.uint8), goes_on)
    assert third[~other].mean() > 0.5 and not third[other].any()
    # a new episode, in half of them, begins without encounters
    fourth = draws(east, np.where(other, 1, 0).astype(np.uint8))
    assert fourth[other].mean() > 0.5 and not fourth[~other].any()
    kept = np.flatnonzero(other)
    policy.keep(kept)
    assert draws(east[kept], goes_on[kept]).mean() > 0.5


def test_a_view_that_came_up_in_another_episode_is_not_a_loop() -> None:
    torch.manual_seed(0)
    network, rows = SmallNetwork(len(WORDS)), 200
    policy, greedy = (LoadedPolicy(network, WORDS, "") for _ in range(2))
    view = np.full((rows, 7, 7, 3), 1, dtype=np.uint8)

    def draws(first: bool, sample: Sample) -> bool:
        """Whether any action was not the most probable one: of so many drawn ones some are."""
        shown = {"image": view, "direction": np.zeros(rows), "mission": ["go to a box"] * rows}
        likeliest = greedy.act(shown, first=first)
        return bool((policy.act(shown, first=first, sample=sample) != likeliest).any())

    assert not draws(True, "loops")
    assert not draws(False, "loops")
    # the next episode is not sampled at first: nothing of it is counted, nor of the one before
    assert not draws(True, False)
    assert not draws(False, "loops")
    assert not draws(False, "loops")
    assert draws(False, "loops")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.pt"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a checkpoint, or a damaged one"):
        read_checkpoint(file)


def test_a_checkpoint_cut_short_is_refused(checkpoint: Path) -> None:
    file = checkpoint / FILE_NAME
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(checkpoint)


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched"),)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "model": Evil()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "x.pt")
    assert not Path("touched").exists()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    torch.save({"format": 99}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="format 99"):
        read_checkpoint(tmp_path / "x.pt")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path / FILE_NAME,
        settings=toml_of(read_settings("bc_small_cpu", ["model.memory=64"])),
        words=WORDS,
        model=SmallNetwork(len(WORDS)).state_dict(),
        training={},
    )
    with pytest.raises(CheckpointError, match="do not fit the network `small`"):
        trainer.load_policy(tmp_path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (checkpoint / FILE_NAME).read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DemotoolsError, match="no space left"):
        write_checkpoint(checkpoint / FILE_NAME, settings="", words=WORDS, model={}, training={})
    assert (checkpoint / FILE_NAME).read_bytes() == before
    assert [path.name for path in checkpoint.iterdir()] == [FILE_NAME]


def test_a_loaded_policy_draws_its_actions_where_it_is_asked_to(checkpoint: Path) -> None:
    (shown,) = observations(count=1, steps=1)
    greedy, drawing = (trainer.load_policy(checkpoint, sample=sample) for sample in (False, True))
    torch.manual_seed(1)
    assert len({greedy.act(shown[0], first=[True]) for _ in range(20)}) == 1
    assert len({drawing.act(shown[0], first=[True]) for _ in range(20)}) > 1
    assert len({greedy.act(shown[0], first=[True], sample=True) for _ in range(20)}) > 1
    assert len({drawing.act(shown[0], first=[True], sample=False) for _ in range(20)}) == 1


def test_what_is_drawn_in_an_episode_follows_from_its_seed_alone(checkpoint: Path) -> None:
    saved = read_checkpoint(checkpoint)
    policy = NetworkPolicy(saved.network(), saved.words, sample=True)
    cells, zeros = np.zeros((3, 7, 7), np.uint8), np.zeros(3, np.uint8)
    seeds = np.array([8, 9, 8])
    policy.reset(3)
    steps = [
        policy.act(cells, zeros, ["go to a box"] * 3, zeros + (step > 0), seeds)
        for step in range(12)
    ]
    assert all(step[0] == step[2] for step in steps)
    assert any(step[0] != step[1] for step in steps)
