import json
import os
from collections.abc import Sequence
from dataclasses import replace
from math import comb, isclose
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from demotools.babyai.cells import BALL, BOX, KEY, WALL, unpacked_cells
from demotools.babyai.levels import EVALUATION_SEED
from demotools.babyai.vocabulary import WORDS
from demotools.errors import DemotoolsError, SettingsError
from demotools.recording.environment import make_environment
from trainer.acting.evaluate import (
    Evaluation,
    Outcome,
    _pickled,
    evaluate_policy,
    evaluation,
    mission_kind,
    wilson_interval,
)
from trainer.acting.policy import NetworkPolicy, RandomPolicy, Sample
from trainer.learning.networks.small import SmallNetwork
from trainer.settings.user_code import find, search_recipe_folders


class Wanderer:
    """Goes forward, turns left at a wall or a ball, picks up a key or a box: needs no memory."""

    on_cpu = False

    def reset(self, count: int) -> None:
        self.count = count

    def keep(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        assert (np.diff(rows) > 0).all()
        assert rows[-1] < self.count
        self.count = len(rows)

    def act(
        self, cells: Any, direction: Any, missions: Sequence[str], masks: Any, seeds: Any
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        assert cells.shape == (self.count, 7, 7)
        assert cells.dtype == masks.dtype == direction.dtype == np.uint8
        assert len(missions) == len(masks) == len(direction) == len(seeds) == self.count
        ahead = unpacked_cells(cells)[:, 3, 5, 0]
        turns, picks = (ahead == WALL) | (ahead == BALL), (ahead == KEY) | (ahead == BOX)
        return np.where(turns, 0, np.where(picks, 3, 2)).astype(np.int64)


# in the second one, an episode ends without reward when the wrong object is picked up
@pytest.mark.parametrize("level", ["GoToLocal", "PickupDistDebug"])
def test_figures_equal_those_of_a_plain_loop_over_the_evaluation_seeds(level: str) -> None:
    environment = make_environment(level)
    policy = Wanderer()
    policy.reset(1)
    successes, lengths = 0, []
    for seed in range(2_000_000_000, 2_000_000_040):
        observation, _ = environment.reset(seed=seed)
        over, length, reward = False, 0, 0.0
        while not over:
            o, c, s = (observation["image"][..., channel] for channel in range(3))
            cells = (o * 18 + c * 3 + s)[None]
            action = policy.act(cells, np.zeros(1, np.uint8), [""], *np.zeros((2, 1), np.uint8))
            observation, value, terminated, truncated, _ = environment.step(int(action[0]))
            over, length, reward = terminated or truncated, length + 1, float(value)
        successes += reward > 0
        lengths.append(length)
    found = evaluate_policy(Wanderer(), level, 40, environments=7)
    assert found.first_seed == EVALUATION_SEED
    assert (found.episodes, found.successes) == (40, successes)
    assert 0 < successes < 40
    assert isclose(found.mean_length, np.mean(lengths))
    assert sum(kind.episodes for kind in found.kinds.values()) == 40
    assert sum(kind.successes for kind in found.kinds.values()) == successes


def untrained(*, sample: Sample) -> NetworkPolicy:
    torch.manual_seed(3)
    return NetworkPolicy(SmallNetwork(len(WORDS)), WORDS, sample=sample)


@pytest.mark.parametrize(
    "policy",
    [
        RandomPolicy(seed=3),
        "bot",
        Wanderer(),
        pytest.param(untrained(sample=True), marks=pytest.mark.slow),
        pytest.param(untrained(sample="loops"), marks=pytest.mark.slow),
    ],
)
def test_the_result_depends_on_neither_environments_nor_processes(policy: Any) -> None:
    results = [
        evaluate_policy(policy, "GoToLocal", 30, environments=environments, processes=processes)
        for environments, processes in ((1, 1), (64, 1), (7, 2))
    ]
    assert results[0] == results[1] == results[2]


def test_more_processes_than_episodes_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.acting.evaluate._LONG_STEPS", 0)
    assert evaluate_policy(untrained(sample=False), "GoToObj", 1, processes=8).episodes == 1


@pytest.mark.slow
@pytest.mark.parametrize("sample", [False, True, "loops"])
def test_processes_that_play_their_shares_find_what_one_finds(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = evaluate_policy(untrained(sample=sample), "GoToObj", 31, sampled=sample)
    monkeypatch.setattr("trainer.acting.evaluate._LONG_STEPS", 31 * 64)
    policy = untrained(sample=sample)
    shared = evaluate_policy(policy, "GoToObj", 31, processes=2, sampled=sample)
    assert shared == alone
    assert not len(policy.memory)  # others have played, each with its own


@pytest.mark.slow
def test_a_network_that_lies_beside_the_recipe_is_found_where_shares_are_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from trainer.learning.networks.small import SmallNetwork\n\n\nclass Own(SmallNetwork): ..."
    )
    (tmp_path / "own_beside.py").write_text(code, "utf-8")
    search_recipe_folders([str(tmp_path)])
    try:
        network: nn.Module = find("model.type", "own_beside:Own", {})(len(WORDS))
        monkeypatch.setattr("trainer.acting.evaluate._LONG_STEPS", 0)
        result = evaluate_policy(NetworkPolicy(network, WORDS), "GoToObj", 4, processes=2)
    finally:
        search_recipe_folders([])
    assert len(result.outcomes) == 4


class Deadly(Wanderer):
    """Ends the process in which it acts, without a word."""

    on_cpu = True

    def act(self, *_shown: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
        os._exit(3)


@pytest.mark.slow
def test_a_share_whose_process_dies_is_reported_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer.acting.evaluate._LONG_STEPS", 0)
    with pytest.raises(DemotoolsError, match="died") as error:
        evaluate_policy(Deadly(), "GoToObj", 31, processes=2)
    assert error.value.fix == "run it again, with fewer --workers to use less memory"


def test_a_policy_that_does_not_pickle_plays_here() -> None:
    policy = untrained(sample=False)
    policy.hook = lambda: None  # type: ignore[attr-defined]
    assert _pickled(policy) is None
    assert _pickled(untrained(sample=False)) is not None


@pytest.mark.slow
def test_sampled_actions_are_drawn_by_the_probabilities_and_greedy_ones_are_not() -> None:
    results = {}
    choices: tuple[Sample, ...] = (False, True, "loops")
    for sample in choices:
        results[sample] = evaluate_policy(untrained(sample=sample), "GoToLocal", 40)
        again = evaluate_policy(untrained(sample=sample), "GoToLocal", 40)
        assert again.outcomes == results[sample].outcomes
    # untrained, it turns on the spot for ever; at random it comes upon some of the objects
    assert results[False].successes < results[True].successes
    assert results[False].successes < results["loops"].successes


def test_each_listed_seed_is_played_once_and_the_reward_of_all_steps_is_its_return() -> None:
    seeds = [7, 2_000_000_005, 3]
    played = evaluate_policy("bot", "GoToLocal", seeds=seeds, environments=2).outcomes
    assert [outcome.seed for outcome in played] == sorted(seeds)
    for outcome in played:  # minigrid gives 1 - 0.9 * steps / limit for success, once
        assert isclose(outcome.total_reward, 1 - 0.9 * outcome.length / 64, rel_tol=1e-6)


def test_an_environment_that_is_free_takes_the_next_seed() -> None:
    # were seeds dealt out beforehand, one of two would play all that go to the step limit
    class StandsOnEvenSeeds(Wanderer):
        def act(self, *shown: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
            self.asked = getattr(self, "asked", 0) + 1
            actions = super().act(*shown)
            actions[shown[4] % 2 == 0] = 6
            return actions

    policy = StandsOnEvenSeeds()
    found = evaluate_policy(policy, "GoToLocal", 12, environments=2)
    assert found.outcomes[0].length == 64
    lengths = [outcome.length for outcome in found.outcomes]
    bound = (sum(lengths) + max(lengths)) / 2  # of playing in turn on two, whatever the order
    assert policy.asked <= bound < max(sum(lengths[0::2]), sum(lengths[1::2]))


def test_the_bot_always_succeeds_and_random_actions_seldom() -> None:
    assert evaluate_policy("bot", "GoToLocal", 50).success == 1.0
    low = evaluate_policy(RandomPolicy(), "GoToLocal", 50)
    assert low.success < 0.5
    assert low.mean_length > (low.mean_length_of_successes or 0)


def test_another_seed_gives_other_random_actions() -> None:
    first, second = (evaluate_policy(RandomPolicy(seed), "GoToLocal", 20) for seed in (0, 1))
    assert first.mean_length != second.mean_length


@pytest.mark.parametrize(("episodes", "environments"), [(0, 1), (1, 0)])
def test_nothing_to_play_is_refused(episodes: int, environments: int) -> None:
    with pytest.raises(SettingsError, match="at least 1"):
        evaluate_policy("bot", "GoToLocal", episodes, environments=environments)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_the_interval_are_the_rates_at_which_the_score_test_turns(
    case: tuple[int, int],
) -> None:
    successes, episodes = case
    rate = successes / episodes
    low, high = wilson_interval(successes, episodes)
    assert 0 <= low <= rate + 1e-12
    assert rate - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            score = (rate - end) / (end * (1 - end) / episodes) ** 0.5
            assert isclose(abs(score), 1.959964, rel_tol=1e-6)


def test_the_interval_covers_the_true_rate_about_95_times_in_100() -> None:
    episodes, rate = 200, 0.9
    covered = sum(
        comb(episodes, hits) * rate**hits * (1 - rate) ** (episodes - hits)
        for hits in range(episodes + 1)
        if wilson_interval(hits, episodes)[0] <= rate <= wilson_interval(hits, episodes)[1]
    )
    assert abs(covered - 0.95) < 0.02  # the interval is approximate


@pytest.mark.parametrize(
    ("mission", "kind"),
    [
        ("go to the red ball", "go to ball"),
        ("pick up a object on your left", "pick up object"),
        ("open the door in front of you", "open door"),
        ("put the red ball next to the grey box", "put ball next to box"),
        ("go to a door and open the red door", "a and b"),
        ("go to a door, then open the red door", "a, then b"),
        ("pick up a key and go to a box after you open a door", "a and b after you c"),
        ("sing", None),
        ("go to the green goal square", None),
        ("open the door and the window", None),
    ],
)
def test_missions_are_counted_by_kind(mission: str, kind: str | None) -> None:
    assert mission_kind(mission) == kind


def test_missions_of_other_environments_are_counted_by_their_texts_unless_these_are_many() -> None:
    def of(*missions: str) -> list[str]:
        outcomes = [
            Outcome(seed, text, success=True, length=1, total_reward=1.0)
            for seed, text in enumerate(missions)
        ]
        return list(evaluation("mine:Own-v0", outcomes).kinds)

    assert of("go to the shop", "go to the ball", "go to the shop") == [
        "go to ball",
        "go to the shop",
    ]
    assert of(*(f"count to {number}" for number in range(21))) == ["other"]


def small_evaluation() -> Evaluation:
    outcomes = [
        Outcome(5, "go to the red ball", success=True, length=4, total_reward=0.9),
        Outcome(6, "go to the red box", success=False, length=64, total_reward=0.0),
    ]
    return evaluation("GoToLocal", outcomes)


def test_an_evaluation_is_json_and_text() -> None:
    found = small_evaluation()
    assert json.loads(json.dumps(found.as_json())) == {
        "level": "GoToLocal",
        "episodes": 2,
        "first_seed": 5,
        "successes": 1,
        "success": 0.5,
        "interval": pytest.approx([0.0945, 0.9055], abs=1e-4),
        "mean_length": 34.0,
        "mean_length_of_successes": 4.0,
        "mean_return": 0.45,
        "sampled": False,
        "kinds": {
            "go to ball": {"episodes": 1, "successes": 1},
            "go to box": {"episodes": 1, "successes": 0},
        },
    }
    assert found.text().splitlines() == [
        "GoToLocal: success 50.0% of 2 episodes (95% interval 9.5% to 90.5%)",
        "  mean length 34.0 steps, of successes 4.0; mean return 0.450",
        "  go to ball  100.0% of 1",
        "  go to box     0.0% of 1",
    ]


def test_without_any_success_there_is_no_mean_length_of_successes() -> None:
    failed = replace(small_evaluation().outcomes[0], success=False)
    found = evaluation("GoToLocal", [failed])
    assert found.mean_length_of_successes is None
    assert "of successes" not in found.text()
