import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from typing import Any

import numpy as np
import pytest

from demotools.errors import DemotoolsError, LevelError, SettingsError
from demotools.recording.bot import BotError, Expert, record_episode
from demotools.recording.environment import Environment, make_environment, observed_cells
from trainer.acting.vector import EnvironmentKind, EnvironmentStep, VectorEnvironment, seed_streams

GOTO = EnvironmentKind("GoToLocal", expert=True)
NAMES = (
    *("cells", "direction", "mask", "seed", "expert_action", "active"),
    *("reward", "terminated", "truncated"),
)


def test_levels_whose_views_no_batch_makes_are_spread_over_the_processes() -> None:
    kind = EnvironmentKind("GoToObj", view=(7, 7, 3))
    with VectorEnvironment(kind, 2, processes=2) as vector:
        assert len(vector._workers) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_closed_environments_do_not_show_their_last_step_again(processes: int) -> None:
    with VectorEnvironment(GOTO, 2, processes=processes) as vector:
        if processes == 1:
            vector.reset(seed_streams(range(9), 2))
    with pytest.raises(LevelError, match="are closed") as refused:
        vector.step(np.zeros(2, dtype=np.int64))
    assert refused.value.path == "GoToLocal"
    with pytest.raises(LevelError, match="are closed"):
        vector.reset(seed_streams(range(9), 2))


def make_fragile(level: str) -> Environment:
    """An environment whose process ends, without a word, at the action `done`."""
    environment = make_environment(level)
    step = environment.step

    def fragile_step(action: int) -> Any:
        if action == 6 and multiprocessing.parent_process() is not None:
            os._exit(3)
        return step(action)

    environment.step = fragile_step  # type: ignore[method-assign]
    return environment


def make_sleepy(level: str) -> Environment:
    """An environment whose process sleeps for a minute at the action `done`."""
    environment = make_environment(level)
    step = environment.step

    def sleepy_step(action: int) -> Any:
        if action == 6:
            time.sleep(60)
        return step(action)

    environment.step = sleepy_step  # type: ignore[method-assign]
    return environment


def make_raising(level: str) -> Environment:
    """An environment whose `step` raises at the action `done`, and `reset` at the seed 13."""
    environment = make_environment(level)
    step, reset = environment.step, environment.reset

    def raising_step(action: int) -> Any:
        if action == 6:
            raise ZeroDivisionError("nothing is left")
        return step(action)

    def raising_reset(*, seed: int) -> Any:
        if seed == 13:
            sys.exit("unlucky")
        return reset(seed=seed)

    environment.step = raising_step  # type: ignore[method-assign]
    environment.reset = raising_reset  # type: ignore[method-assign,assignment]
    return environment


def make_wide(level: str) -> Environment:
    """An environment whose views are 9 cells wide."""
    import gymnasium
    from minigrid.wrappers import ViewSizeWrapper

    del level
    view: Any = ViewSizeWrapper
    wide: Environment = view(gymnasium.make("MiniGrid-Empty-5x5-v0"), agent_view_size=9)
    return wide


def make_broken(level: str) -> Environment:
    """An environment that fails with a message as soon as it is made."""
    raise LevelError("this level is closed today", path=level, fix="come back tomorrow")


def advised(expert: Expert, taken: int | None) -> int:
    try:
        return expert.action(taken)
    except BotError:
        return -1


def actions(count: int, steps: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Random actions [steps, count] that depend on the environment's number, not on `count`."""
    columns = [np.random.default_rng(number).integers(0, 7, steps) for number in range(count)]
    return np.stack(columns, axis=1).astype(np.int64)


def played(processes: int, count: int, steps: int = 80) -> list[EnvironmentStep]:
    with VectorEnvironment(GOTO, count, processes=processes) as vector:
        shown = [vector.reset([range(100 * n, 10**6) for n in range(count)])]
        shown.extend(vector.step(row) for row in actions(count, steps))
    return shown


@pytest.mark.parametrize(("processes", "count"), [(0, 4), (2, 4), (3, 4), (1, 2), (9, 2)])
def test_what_environments_do_depends_on_neither_their_number_nor_the_processes(
    processes: int, count: int
) -> None:
    for step, ours in zip(played(1, 4), played(processes, count), strict=True):
        for name in NAMES:
            assert np.array_equal(getattr(step, name)[:count], getattr(ours, name)), name
        assert step.missions[:count] == ours.missions


def test_a_vector_shows_what_the_environment_itself_shows() -> None:
    environment = make_environment("GoToLocal")
    shown = played(1, 1, steps=200)
    rows = actions(1, 200)[:, 0].tolist()
    seed = 0
    observation, _ = environment.reset(seed=seed)
    begins, reward, terminated, truncated = True, 0.0, False, False
    expert = Expert(environment)
    advice = advised(expert, None)
    for step, action in zip(shown, [*rows, 0], strict=True):
        assert np.array_equal(step.cells[0], observed_cells(observation["image"]))
        assert step.direction[0] == observation["direction"]
        assert step.missions[0] == observation["mission"]
        assert step.mask[0] == (not begins)
        assert step.seed[0] == seed
        assert step.reward[0] == np.float32(reward)
        assert (step.terminated[0], step.truncated[0]) == (terminated, truncated)
        assert step.expert_action[0] == advice
        observation, value, terminated, truncated, _ = environment.step(action)
        reward, begins = float(value), terminated or truncated
        if begins:
            seed += 1
            observation, _ = environment.reset(seed=seed)
            expert = Expert(environment)
        advice = advised(expert, None if begins else action) if advice >= 0 or begins else -1
    assert seed >= 2


def test_every_seed_of_a_stream_is_played_once_and_then_nothing() -> None:
    with VectorEnvironment(GOTO, 3) as vector:
        step = vector.reset(seed_streams(range(50, 57), 3))
        ended = []
        while step.active.any():
            before = step
            step = vector.step(step.expert_action)
            done = step.terminated | step.truncated
            assert not (done & ~before.active).any()
            ended.extend(before.seed[done].tolist())
            assert (step.reward[done] > 0).all()
    assert sorted(ended) == list(range(50, 57))


def test_the_experts_advice_followed_is_the_recorded_episode() -> None:
    with VectorEnvironment(GOTO, 1) as vector:
        step = vector.reset([range(7, 8)])
        advice = []
        while step.active.any():
            advice.append(int(step.expert_action[0]))
            step = vector.step(step.expert_action)
    episode = record_episode(make_environment("GoToLocal"), 7)
    assert advice == episode.action.tolist()  # type: ignore[union-attr]


def test_an_expert_that_gave_up_advises_nothing_until_the_next_episode() -> None:
    kind = EnvironmentKind("GoToImpUnlock", expert=True)
    with VectorEnvironment(kind, 1) as vector:
        # the bot plans for ever at some step of seed 6
        step = vector.reset([range(6, 8)])
        gave_up = False
        while step.seed[0] == 6:
            gave_up = gave_up or bool(step.expert_action[0] < 0)
            assert (step.expert_action[0] < 0) == gave_up
            step = vector.step(np.where(step.expert_action < 0, 6, step.expert_action))
        assert gave_up
        assert step.expert_action[0] >= 0


def test_a_process_that_dies_is_reported_with_what_to_do() -> None:
    kind = EnvironmentKind("GoToLocal", make="tests.acting.test_vector:make_fragile")
    with VectorEnvironment(kind, 4, processes=2) as vector:
        vector.reset(seed_streams(range(100), 4))
        vector.step(np.array([0, 0, 1, 1]))
        with pytest.raises(LevelError, match=r"died \(exit code 3\) at seed 2 or 3") as error:
            vector.step(np.array([0, 0, 6, 1]))
    assert "fewer environments" in error.value.fix


def test_a_process_that_hangs_is_reported_and_ended() -> None:
    kind = EnvironmentKind("GoToLocal", make="tests.acting.test_vector:make_sleepy")
    with VectorEnvironment(kind, 2, processes=2) as vector:
        vector.reset(seed_streams(range(40, 100), 2))
        vector._answer_seconds = 1.0
        with pytest.raises(LevelError, match="did not answer for 1 seconds at seed 41"):
            vector.step(np.array([0, 6]))
        processes = [worker.process for worker in vector._workers]
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_state_taken_anywhere_is_reached_again_from_seeds_and_actions(processes: int) -> None:
    rows = actions(2, 120)
    with VectorEnvironment(GOTO, 2) as vector:
        streams = [range(100 * n, 10**6) for n in range(2)]
        step = vector.reset(streams)
        for row in rows[:90]:
            step = vector.step(row)
        state = vector.state()
        expected = [vector.step(row) for row in rows[90:]]
    assert any(state["taken"])
    with VectorEnvironment(GOTO, 2, processes=processes) as vector:
        again = vector.reset([range(seed, 10**6) for seed in state["seed"]], state["taken"])
        for name in ("cells", "direction", "mask", "seed", "expert_action", "active"):
            assert np.array_equal(getattr(step, name), getattr(again, name)), name
        for row, wanted in zip(rows[90:], expected, strict=True):
            ours = vector.step(row)
            for name in NAMES:
                assert np.array_equal(getattr(wanted, name), getattr(ours, name)), name


def test_the_last_observation_of_a_truncated_episode_is_kept() -> None:
    environment = make_environment("GoToLocal")
    environment.reset(seed=3)
    with VectorEnvironment(EnvironmentKind("GoToLocal"), 1) as vector:
        vector.reset([range(3, 5)])
        turns, truncated = 0, False
        while not truncated:
            observation, _, _, truncated, _ = environment.step(turns % 2)
            step = vector.step(np.array([turns % 2]))
            turns += 1
    assert step.truncated[0]
    assert np.array_equal(step.final_cells[0], observed_cells(observation["image"]))
    assert step.final_direction[0] == observation["direction"]
    assert not np.array_equal(step.cells[0], step.final_cells[0])


@pytest.mark.parametrize("processes", [1, 2])
def test_an_environment_that_cannot_be_made_says_why_whatever_the_process(processes: int) -> None:
    kind = EnvironmentKind("GoToLocal", make="tests.acting.test_vector:make_broken")
    with (
        pytest.raises(LevelError, match="closed today"),
        VectorEnvironment(kind, 2, processes=processes) as vector,
    ):
        vector.reset(seed_streams(range(10), 2))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("make", "seed", "call", "where", "error"),
    [
        ("raising", 20, "step(6)", "seed 21", "ZeroDivisionError: nothing is left"),
        (
            "raising",
            12,
            "reset(seed=13)",
            "seed 13",
            "ended the program: exit('unlucky')",
        ),
    ],
)
def test_what_an_environment_raises_is_shown_with_its_traceback_seed_and_action(
    make: str, seed: int, call: str, where: str, error: str, processes: int
) -> None:
    kind = EnvironmentKind("GoToLocal", make=f"tests.acting.test_vector:make_{make}")
    with (
        pytest.raises(Exception) as caught,
        VectorEnvironment(kind, 2, processes=processes) as vector,
    ):
        vector.reset(seed_streams(range(seed, 100), 2))
        vector.step(np.array([0, 1]))
        vector.step(np.array([1, 6]))
    assert not isinstance(caught.value, DemotoolsError)
    shown = "".join(traceback.format_exception(caught.value))
    assert error in shown
    assert f"at `{call}` in the episode of {where}" in shown
    assert f"environment = 'tests.acting.test_vector:make_{make}'" in shown
    assert f"in raising_{call.partition('(')[0]}" in shown


@pytest.mark.parametrize("processes", [1, 2])
def test_what_an_environment_gives_in_another_shape_is_told_with_its_seed(processes: int) -> None:
    kind = EnvironmentKind("GoToLocal", make="tests.acting.test_vector:make_wide")
    with (
        pytest.raises(SettingsError, match=r"the environment fails: .* shape \(9,9,3\)") as caught,
        VectorEnvironment(kind, 2, processes=processes) as vector,
    ):
        vector.reset(seed_streams(range(20, 100), 2))
    assert "environment = 'tests.acting.test_vector:make_wide' in " in str(caught.value)
    assert "at `reset(seed=20)` in the episode of seed 20" in str(caught.value)


def test_environment_processes_do_not_load_torch() -> None:
    code = "import sys, trainer.acting.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_closing_ends_the_processes() -> None:
    with VectorEnvironment(GOTO, 2, processes=2) as vector:
        vector.reset(seed_streams(range(10), 2))
        processes = [worker.process for worker in vector._workers]
        assert all(process.is_alive() for process in processes)
    assert [process.exitcode for process in processes] == [0, 0]
