"""Our vector environment, seen through gymnasium's interface."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.performance import benchmark_vector_step
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

import demotools  # noqa: F401 - it registers the levels
from demotools.errors import SettingsError
from demotools.recording.environment import make_environment
from trainer.acting.gymnasium_vector import GymnasiumVector

N = 5


def made(**options: Any) -> Any:
    return gymnasium.make_vec("demotools/GoToObj-v0", num_envs=N, **options)


def equal(ours: Any, theirs: Any) -> bool:
    return (
        np.array_equal(ours["image"], theirs["image"])
        and np.array_equal(ours["direction"], theirs["direction"])
        and np.array_equal(ours["mission"], theirs["mission"])
    )


def test_it_gives_what_gymnasiums_own_gives_up_to_the_end_of_each_episode() -> None:
    ours = made()
    theirs = SyncVectorEnv(
        [lambda: make_environment("GoToObj")] * N, autoreset_mode=AutoresetMode.SAME_STEP
    )
    assert isinstance(ours, GymnasiumVector) and ours.metadata["autoreset_mode"].value == "SameStep"
    assert ours.action_space == theirs.action_space
    seen, _ = ours.reset(seed=3)
    expected, _ = theirs.reset(seed=3)
    assert seen in ours.observation_space and equal(seen, expected)
    random = np.random.default_rng(0)
    ended = np.zeros(N, dtype=bool)
    ends = 0
    for _ in range(70):
        actions = random.integers(0, 3, N)
        before, (seen, reward, terminated, truncated, infos) = ended.copy(), ours.step(actions)
        expected, their_reward, *their_ends, their_infos = theirs.step(actions)
        assert seen in ours.observation_space
        for number in np.flatnonzero(~before).tolist():
            assert reward[number] == np.float32(their_reward[number])
            assert [terminated[number], truncated[number]] == [end[number] for end in their_ends]
            if terminated[number] or truncated[number]:
                ends += 1
                assert infos["_final_obs"][number]
                assert equal(infos["final_obs"][number], their_infos["final_obs"][number])
            else:
                row = [{k: v[number] for k, v in one.items()} for one in (seen, expected)]
                assert equal(*row)
        ended |= terminated | truncated
    assert ends == N
    ours.close()
    theirs.close()


def test_gymnasiums_wrappers_and_benchmark_take_it() -> None:
    environments = DictInfoToList(RecordEpisodeStatistics(made()))
    environments.reset(seed=1)
    lengths = []
    for _ in range(70):
        *_, infos = environments.step(environments.action_space.sample())
        lengths += [info["episode"]["l"] for info in infos if "episode" in info]
    assert len(lengths) >= N and min(lengths) > 0
    environments.close()
    fast = made()
    assert benchmark_vector_step(fast, target_duration=0, seed=1) > 0
    fast.close()


def test_seeds_say_which_episodes_are_played() -> None:
    environments = made()
    one, infos = environments.reset(seed=[9, 8, 7, 6, 5])
    assert infos["seed"].tolist() == [9, 8, 7, 6, 5]
    assert one["mission"][0] == make_environment("GoToObj").reset(seed=9)[0]["mission"]
    drawn = [environments.reset()[1]["seed"].tolist() for _ in range(2)]
    assert drawn[0] != drawn[1] and max(map(max, drawn)) < 2_000_000_100
    environments.reset(seed=4)
    first = environments.reset()[1]["seed"].tolist()
    environments.reset(seed=4)
    assert environments.reset()[1]["seed"].tolist() == first
    with pytest.raises(SettingsError, match="not 5 seeds"):
        environments.reset(seed=[1, 2])
    environments.close()
