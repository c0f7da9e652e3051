import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from minigrid.utils.baby_ai_bot import BabyAIBot

from demotools.cli import main
from demotools.errors import LevelError, ManifestError, SettingsError, StoreError
from demotools.recording.bot import Episode, Failure, Style, random_actions, record_episode
from demotools.recording.environment import make_environment
from demotools.recording.record import Recording, generate, planned_recording, play_part
from demotools.recording.replay import replay_check
from demotools.store.building import StoreBuilder
from demotools.store.reading import Store, open_store
from demotools.store.verify import verify_store
from demotools.workers.processes import bounded_workers, processor_count
from tests.store.test_verify import edit_array

START = "from demotools.cli import main; main()"


def contents(store: Path) -> dict[str, bytes]:
    files = (file for file in store.rglob("*") if file.is_file())
    return {str(file.relative_to(store)): file.read_bytes() for file in files}


def command(folder: Path, episodes: int, workers: int) -> list[str]:
    asked = ["generate", "GoToLocal", "--episodes", str(episodes), "--workers", str(workers)]
    return [sys.executable, "-c", START, *asked, "--data-dir", str(folder)]


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, 600, workers=2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_parts(folder: Path, number: int) -> None:
    parts = folder / ".GoToLocal.zarr.building" / "parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.npy"))) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr, once every process that holds the stderr has ended, workers too."""
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    recording = planned_recording("GoToLocal", 150)
    stores = []
    for workers in (1, 2, 3):
        path = tmp_path / str(workers) / "GoToLocal.zarr"
        generate(recording, path, workers=workers, quiet=True)
        stores.append(contents(path))
    assert stores[0]
    assert stores[0] == stores[1] == stores[2]


def test_the_first_solved_seeds_are_recorded_and_the_others_counted(tmp_path: Path) -> None:
    recorded = generate(
        planned_recording("GoToImpUnlock", 9), tmp_path / "x.zarr", workers=1, quiet=True
    )
    store = open_store(recorded.path)
    environment = make_environment("GoToImpUnlock")
    results = [record_episode(environment, seed) for seed in range(recorded.seeds.stop)]
    solved = [result for result in results if isinstance(result, Episode)]
    failed = [result for result in results if isinstance(result, Failure)]
    assert len(solved) == store.episodes == 9
    assert isinstance(results[-1], Episode)
    assert store.episode_seed.tolist() == [episode.seed for episode in solved]
    assert [failure.seed for failure in failed] == [6]
    assert recorded.failures == {failed[0].reason: 1}
    assert np.array_equal(
        store.view.span(0, store.steps), np.concatenate([e.cells for e in solved])
    )
    assert np.array_equal(
        store.action.span(0, store.steps), np.concatenate([e.action for e in solved])
    )


def test_the_store_says_where_it_came_from_and_nothing_of_workers_or_time(tmp_path: Path) -> None:
    plan = planned_recording("GoToLocal", 3, split="valid")
    recorded = generate(plan, tmp_path / "GoToLocal-valid.zarr", workers=1, quiet=True)
    attributes = open_store(recorded.path).attributes
    assert attributes.split == "valid"
    assert attributes.environment_id == "BabyAI-GoToLocal-v0"
    assert set(attributes.source) == {
        *("kind", "bot", "minigrid", "numpy", "replans", "seeds", "failures"),
    }
    assert attributes.source["kind"] == "bot"
    assert attributes.source["seeds"] == [10**9, 10**9 + 3]


@pytest.mark.parametrize("episodes", [0, -5])
def test_no_episodes_are_refused(episodes: int) -> None:
    with pytest.raises(SettingsError, match="at least 1"):
        planned_recording("GoToLocal", episodes)


@pytest.mark.parametrize("command", ["generate Open", "shrink Open", "play Open"])
def test_no_episodes_are_wrong_usage_of_every_command(command: str) -> None:
    done = CliRunner().invoke(main, [*command.split(), "-n", "0"])
    assert done.exit_code == 2 and "0 is not in the range x>=1" in done.stderr


@pytest.mark.parametrize(
    ("split", "seed"),
    [("train", -1), ("train", 10**9 - 5), ("valid", 0), ("valid", 2 * 10**9 - 5)],
)
def test_seeds_of_another_split_are_refused(split: str, seed: int) -> None:
    with pytest.raises(SettingsError, match="are not all in the"):
        planned_recording("GoToLocal", 10, split=split, first_seed=seed)  # type: ignore[arg-type]


def test_an_unknown_level_and_one_without_environment_are_refused() -> None:
    with pytest.raises(ManifestError, match="GoToLocal"):
        planned_recording("GoToLocl", 10)
    with pytest.raises(LevelError, match="cannot be played"):
        planned_recording("PutNext", 10)


def test_a_level_that_the_bot_cannot_solve_is_refused_with_its_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "KeyInBox.toml").write_text(
        'level = "KeyInBox"\nenvironment_id = "BabyAI-KeyInBox-v0"\nmission_pattern = ".*"\n'
    )
    monkeypatch.setenv("DEMOTOOLS_MANIFESTS", str(tmp_path))
    folder = tmp_path / "data"
    with pytest.raises(LevelError, match=r"cannot solve this level: 0\.0% of 208 episodes"):
        generate(planned_recording("KeyInBox", 10), folder / "KeyInBox.zarr", workers=1, quiet=True)
    assert [file.name for file in folder.iterdir()] == [".KeyInBox.zarr.lock"]


def test_ctrl_c_ends_a_recording_without_workers_at_once(tmp_path: Path) -> None:
    asked = command(tmp_path, 100_000, workers=1)  # in parts of 500 episodes
    process = subprocess.Popen(asked, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / ".GoToLocal.zarr.building" / "job.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, errors = ended(process)
    assert code == 130
    assert "Traceback" not in errors
    assert not list((tmp_path / ".GoToLocal.zarr.building" / "parts").iterdir())


def test_recording_needs_no_torch() -> None:
    code = "import sys, demotools.recording.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_existing_store_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "GoToLocal.zarr"
    generate(planned_recording("GoToLocal", 2), path, workers=1, quiet=True)
    before = contents(path)
    with pytest.raises(StoreError, match="--overwrite"):
        generate(planned_recording("GoToLocal", 3), path, workers=1, quiet=True)
    assert contents(path) == before
    generate(planned_recording("GoToLocal", 3), path, workers=1, overwrite=True, quiet=True)
    assert open_store(path).episodes == 3


@pytest.mark.parametrize("episodes", [1, 1000, 10**6])
def test_parts_cover_the_seeds_without_gap_or_overlap(episodes: int) -> None:
    recording = Recording("GoToLocal", "BabyAI-GoToLocal-v0", "train", episodes, 7)
    assert recording.seeds(0)[0] == 7
    for part in range(3):
        assert recording.seeds(part)[-1] + 1 == recording.seeds(part + 1)[0]


def test_ctrl_c_ends_every_process_quietly_and_leaves_no_store(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for_parts(tmp_path, 1)
    os.killpg(process.pid, signal.SIGINT)  # to the workers as well, as a terminal does
    code, errors = ended(process)
    assert code == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "GoToLocal.zarr").exists()


def finished(folder: Path) -> dict[str, bytes]:
    """Run the command to its end; the bytes of its store."""
    if not (folder / "GoToLocal.zarr").exists():
        subprocess.run(command(folder, 600, workers=2), check=True, capture_output=True)
    assert sorted(file.name for file in folder.iterdir()) == [
        ".GoToLocal.zarr.lock",
        "GoToLocal.zarr",
    ]
    return contents(folder / "GoToLocal.zarr")


def whole_store(folder: Path) -> dict[str, bytes]:
    path = folder / "GoToLocal.zarr"
    generate(planned_recording("GoToLocal", 600), path, workers=1, quiet=True)
    return contents(path)


def test_a_recording_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    for parts in (1, 8):
        process = start(folder)
        wait_for_parts(folder, parts)
        process.kill()
        assert ended(process)[0] == -signal.SIGKILL
    assert finished(folder) == whole_store(tmp_path / "whole")


def test_a_worker_that_is_killed_ends_the_command_with_what_to_do(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for_parts(tmp_path, 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not list the children of a process")
    for child in map(int, children.read_text().split()):
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)
            break
    code, errors = ended(process)
    assert code == 1
    assert "a worker process died" in errors
    assert "run it again" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    begun = time.monotonic()
    whole = finished(tmp_path / "undisturbed")
    # moments of a whole run on this machine, so that the kills come while it is at work
    delays = np.random.default_rng().uniform(0.1, 0.7, 20) * (time.monotonic() - begun)
    print("delays", delays.tolist())  # noqa: T201  (shown where the test fails)
    killed = 0
    for number in range(10):
        folder = tmp_path / str(number)
        for delay in delays[2 * number : 2 * number + 2]:
            process = start(folder)
            time.sleep(delay)
            process.kill()
            killed += ended(process)[0] == -signal.SIGKILL
        assert finished(folder) == whole
    assert killed >= 10


def test_no_more_processes_are_started_than_can_help(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    most = 4 * processor_count()
    assert bounded_workers(3) == 3
    assert bounded_workers(100_000, parts=3) == 3
    assert not caplog.messages
    assert bounded_workers(100_000) == most
    assert caplog.messages == [
        f"using {most} processes instead of 100000: more than 4 per processor do not help"
    ]
    # two parts of sixteen seeds: were a thousand processes begun, this would take minutes
    recorded = generate(
        planned_recording("GoToLocal", 20), tmp_path / "x.zarr", workers=100_000, quiet=True
    )
    assert recorded.episodes == 20


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of a process")
def test_a_helper_process_that_cannot_be_started_is_a_message(tmp_path: Path) -> None:
    limited = ["sh", "-c", 'ulimit -n 24; exec "$@"', "sh", *command(tmp_path, 600, workers=8)]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "too many open files" in done.stderr
    assert "where: -" not in done.stderr


NOISY = Style(noise=0.1, burst=4, subgoals=True)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("noisy") / "UnblockPickup.zarr"
    generate(planned_recording("UnblockPickup", 20, style=NOISY), path, workers=1, quiet=True)
    return open_store(path)


def test_a_noisy_recording_holds_the_bots_advice_in_the_states_that_were_reached(
    noisy: Store,
) -> None:
    """By stock minigrid and its bot, step by step."""
    environment = make_environment("UnblockPickup", stock=True)
    differing = 0
    for episode in range(noisy.episodes):
        start, stop = noisy.bounds(episode)
        observation, _ = environment.reset(seed=int(noisy.episode_seed[episode]))
        bot, before, reward = BabyAIBot(environment), None, 0.0  # type: ignore[no-untyped-call]
        for step in range(start, stop):
            assert np.array_equal(observation["image"], noisy.images(step, step + 1)[0])
            advice = int(bot.replan(before))  # type: ignore[no-untyped-call]
            assert advice == noisy.action.span(step, step + 1)[0]
            before = int(noisy.taken.span(step, step + 1)[0])
            differing += advice != before
            observation, value, *_ = environment.step(before)
            reward = float(value)
        assert reward > 0
    assert 0.1 < differing / noisy.steps < 0.3


def test_random_actions_come_in_bursts_of_every_length_and_kind() -> None:
    found = list(islice(random_actions(7, Style(noise=0.05, burst=3)), 20_000))
    runs = [len(list(run)) for random, run in groupby(found, lambda it: it is not None) if random]
    counts = np.bincount(runs)
    assert counts[1:4].min() > 200  # of some 880 bursts
    assert counts[4:].sum() < 0.1 * len(runs)  # those that follow each other at once
    kinds = np.bincount([action for action in found if action is not None])
    assert len(kinds) == 6 and kinds.min() > 0.7 * kinds.max()
    assert found == list(islice(random_actions(7, Style(noise=0.05, burst=3)), 20_000))
    assert found != list(islice(random_actions(8, Style(noise=0.05, burst=3)), 20_000))


def test_subgoals_say_what_the_bot_is_about(noisy: Store) -> None:
    names = noisy.attributes.subgoals
    array = noisy.optional["subgoal"].span(0, noisy.steps)
    advice = noisy.action.span(0, noisy.steps)
    texts = [names[code] for code in array]
    assert "unknown" not in texts
    for act, action in (("pick up", 3), ("drop", 4), ("open", 5)):
        places = [place for place, text in enumerate(texts) if text.startswith(act)]
        assert places or act == "open"
        assert set(advice[places].tolist()) <= {action}
    assert {"go to", "explore"} <= {" ".join(text.split()[:2]) for text in texts}


def test_noise_and_subgoals_are_shown_and_belong_together(noisy: Store) -> None:
    shown = CliRunner().invoke(main, ["show", str(noisy.path), "--json"])
    found = json.loads(shown.stdout)
    assert found["replay_agrees"]
    assert len(found["taken"]) == len(found["subgoals"]) == found["steps"]
    assert noisy.attributes.source["noise"] == 0.1
    wrong = CliRunner().invoke(main, ["generate", "GoToObj", "-n", "1", "--burst", "3"])
    assert wrong.exit_code == 2
    assert "--burst needs --noise" in wrong.output


def test_unsolved_episodes_are_kept_with_every_reward(tmp_path: Path) -> None:
    """On seed 6 the bot plans for ever, after some steps."""
    path = tmp_path / "GoToImpUnlock.zarr"
    plan = planned_recording("GoToImpUnlock", 9, style=Style(failures=True))
    recorded = generate(plan, path, workers=1, quiet=True)
    assert recorded.failures == {"replan limit": 1}
    assert "not solved 1 seed: replan limit" in recorded.text()
    store = open_store(path)
    assert store.episode_seed.tolist() == list(range(9))
    reward = store.optional["reward"].span(0, store.steps)
    environment = make_environment("GoToImpUnlock", stock=True)
    for episode in store:
        environment.reset(seed=episode.seed)
        played = [environment.step(action) for action in episode.actions.tolist()]
        received = [step[1] for step in played]
        start, stop = store.bounds(episode.number)
        assert reward[start:stop].tolist() == np.array(received, np.float32).tolist()
        assert (reward[stop - 1] > 0) == (episode.seed != 6)
        ended = store.optional["terminated"].span(start, stop).tolist()
        assert ended == [bool(step[2]) for step in played]
        assert episode.end == ("truncation" if episode.seed == 6 else "success")
    assert np.array_equal(np.array(zarr.open_array(path / "reward", mode="r")), reward)
    checks = verify_store(path, replay=partial(replay_check, episodes=9, quiet=True), quiet=True)
    assert all(check.passed for check in checks) and checks[-1].note.startswith("9 of 9")
    edit_array(path, "reward", lambda values: values.__setitem__(2, 0.5))
    checks = verify_store(path, replay=partial(replay_check, episodes=9, quiet=True), quiet=True)
    assert checks[-1].problems == ("episode 0, step 2: the reward is 0, but 0.5 is stored",)
    edit_array(path, "reward", lambda values: values.__setitem__(2, 0))
    number, last = 6, store.bounds(6)[1] - 1
    edit_array(path, "terminated", lambda values: values.__setitem__(last, 1))
    checks = verify_store(path, replay=partial(replay_check, episodes=9, quiet=True), quiet=True)
    step = last - store.bounds(number)[0]
    told = f"episode {number}, step {step}: stored terminated, replayed not terminated"
    assert checks[-1].problems == (told,)
    edit_array(path, "terminated", lambda values: values.__setitem__(last, 0))
    solved = store.bounds(1)[1] - 1
    edit_array(path, "terminated", lambda values: values.__setitem__(solved, 0))
    failed = [check for check in verify_store(path, quiet=True) if not check.passed]
    assert failed[0].problems == ("episode 1 is solved, but not terminated",)
    edit_array(path, "terminated", lambda values: values.__setitem__(solved, 1))
    edit_array(path, "terminated", lambda values: values.__setitem__(2, 1))
    failed = [check for check in verify_store(path, quiet=True) if not check.passed]
    assert failed[0].problems == ("step 2 is terminated, but not its episode's last",)
    edit_array(path, "terminated", lambda values: values.__setitem__(2, 0))
    edit_array(path, "reward", lambda values: values.__setitem__(2, np.nan))
    failed = [check for check in verify_store(path, quiet=True) if not check.passed]
    assert failed[0].problems == ("the reward of step 2 is not in 0..1",)


def test_a_failed_mission_is_told_from_the_step_limit(tmp_path: Path) -> None:
    plan = planned_recording("OpenDoorsOrderN2Debug", 6, style=Style(failures=True))
    path = generate(plan, tmp_path / "A.zarr", workers=1, quiet=True).path
    ends = open_store(path).ends.tolist()
    assert {*ends} == {"success", "failure"}
    told = CliRunner().invoke(main, ["info", str(path)]).output
    assert (
        f"  ended       {ends.count('failure')} by failure, {ends.count('success')} by success"
        in (told)
    )


def test_another_recording_throws_no_unfinished_one_away(tmp_path: Path) -> None:
    recording, path = planned_recording("GoToObj", 20), tmp_path / "GoToObj.zarr"
    with StoreBuilder(path, recording.job(), costly=True) as builder:
        play_part(builder.parts, recording, 0)
    (part,) = builder.parts.iterdir()
    options = ["generate", "GoToObj", "-n", "30", "--workers", "1", "--data-dir", str(tmp_path)]
    refused = CliRunner().invoke(main, options)
    assert refused.exit_code == 1
    assert "started with different options: episodes was 20, is 30" in " ".join(
        refused.output.split()
    )
    assert part.exists()
    assert CliRunner().invoke(main, [*options, "-n", "20"]).exit_code == 0
    assert open_store(path).episodes == 20 and not part.exists()


def test_listed_seeds_are_played_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "seeds.txt"
    file.write_text("900-902, 7\n3 100-129\n6\n")
    seeds = [3, 6, 7, *range(100, 130), 900, 901, 902]
    arguments = ["generate", "GoToImpUnlock", "--seeds", str(file), "--data-dir", str(tmp_path)]
    result = CliRunner().invoke(main, [*arguments, "--workers", "1"])
    assert result.exit_code == 0, result.output
    store = open_store(tmp_path / "GoToImpUnlock.zarr")
    assert f"{store.episodes} episodes, seeds 3 <= seed < 903" in result.output
    environment = make_environment("GoToImpUnlock")
    solved = [seed for seed in seeds if isinstance(record_episode(environment, seed), Episode)]
    assert 6 not in solved
    assert store.episode_seed.tolist() == solved
    recording = planned_recording("GoToLocal", seeds=[4, 9, 2], episodes=2)
    recorded = generate(recording, tmp_path / "two.zarr", workers=1, quiet=True)
    assert open_store(recorded.path).episode_seed.tolist() == [2, 4]
    for options, found in [
        (["--seeds", "2000000000"], "are not all in the"),
        (["--seeds", "1,1"], "a seed is listed twice"),
        (["--seeds", "1", "--seed", "1"], "cannot be combined"),
        ([], "say how many episodes"),
    ]:
        result = CliRunner().invoke(main, ["generate", "GoToObj", *options])
        assert result.exit_code and found in " ".join(result.output.split())
