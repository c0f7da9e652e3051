"""What `trainer watch` shows is what the policy did, and pictures and text say the same."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import trainer.report.watch
from demotools.babyai.cells import ACTIONS
from demotools.babyai.levels import EVALUATION_SEED
from demotools.babyai.vocabulary import WORDS
from demotools.look.pictures import bar_picture, equally_large
from demotools.look.show import step_pictures
from demotools.recording.environment import make_environment
from tests.look.test_show import type_until
from tests.terminal import in_terminal
from trainer.acting.evaluate import evaluate_policy
from trainer.acting.policy import NetworkPolicy
from trainer.acting.watched import Watched, watched_gif
from trainer.cli import main
from trainer.learning.building import build_network
from trainer.report.watch import watched_episodes, watched_text
from trainer.run.checkpoint import read_checkpoint, write_checkpoint
from trainer.run.loading import load_policy
from trainer.settings.models import read_settings, toml_of

SMALL = ("model.type=small", "run.device=cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`checkpoint()` is one of random weights, whose policy turns and goes, and mostly fails."""

    def make(*overrides: str, recipe: str = "bc_small_cpu", words: Any = WORDS) -> Path:
        settings = read_settings(recipe, (*SMALL, *overrides))
        torch.manual_seed(29)
        model = build_network("small", {}, len(words)).state_dict()
        model = {name: 3 * weights for name, weights in model.items()}
        model["actor.2.bias"] = torch.tensor([0.0, 0, 1, -9, -9, -9, -9])
        path, text = tmp_path / "last.pt", toml_of(settings)
        write_checkpoint(path, settings=text, words=tuple(words), model=model, training={})
        return path

    return make


@pytest.fixture
def watched(checkpoint: Callable[..., Path]) -> list[Watched]:
    return watched_episodes(checkpoint(), episodes=2)


def test_actions_views_and_ends_are_those_of_the_policy_in_a_plain_loop(
    checkpoint: Callable[..., Path],
) -> None:
    path = checkpoint()
    (_, episode) = watched_episodes(path, episodes=2, first_seed=41)
    policy, environment = load_policy(path), make_environment("GoToLocal")
    observation, _ = environment.reset(seed=42)
    assert episode.shown.mission == observation["mission"]
    for view, action in zip(episode.shown.view, episode.shown.action, strict=True):
        o, c, s = (observation["image"][..., channel] for channel in range(3))
        assert np.array_equal(view, o * 18 + c * 3 + s)
        assert action == policy.act(observation)
        observation, reward, terminated, truncated, _ = environment.step(int(action))
    assert terminated or truncated
    assert episode.reward == reward
    assert episode.success == (reward > 0)


def test_as_many_succeed_as_evaluation_counts_on_the_same_seeds(
    checkpoint: Callable[..., Path],
) -> None:
    path = checkpoint()
    found = watched_episodes(path, episodes=24)
    saved = read_checkpoint(path)
    measured = evaluate_policy(NetworkPolicy(saved.network(), saved.words), "GoToLocal", 24)
    assert 0 < measured.successes < 24
    assert sum(one.success for one in found) == measured.successes
    assert np.mean([len(one.shown.action) for one in found]) == pytest.approx(measured.mean_length)
    assert found[0].shown.seed == EVALUATION_SEED


def test_sampled_actions_are_those_that_evaluation_draws(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint()
    found = watched_episodes(path, episodes=6, sample=True)
    saved = read_checkpoint(path)
    policy = NetworkPolicy(saved.network(), saved.words, sample=True)
    lengths = [one.length for one in evaluate_policy(policy, "GoToLocal", 6).outcomes]
    assert [len(one.shown.action) for one in found] == lengths
    taken = [one.probability.argmax(axis=1) == one.shown.action for one in found]
    assert 0 < np.concatenate(taken).mean() < 1


def test_every_action_taken_is_the_most_probable_one(watched: list[Watched]) -> None:
    for episode in watched:
        assert episode.probability.shape == (len(episode.shown.action), len(ACTIONS))
        assert np.allclose(episode.probability.sum(axis=1), 1, atol=1e-5)
        assert np.array_equal(episode.probability.argmax(axis=1), episode.shown.action)


def test_the_worst_come_first_out_of_more_episodes_than_are_shown(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.report.watch, "CANDIDATES", 24)
    path = checkpoint()
    everything = watched_episodes(path, episodes=24)
    worst = watched_episodes(path, episodes=23, worst=True)
    assert not worst[0].success and worst[-1].success

    def badness(one: Watched) -> tuple[bool, int]:
        return one.success, -len(one.shown.action)

    assert [badness(one) for one in worst] == sorted(map(badness, everything))[:23]


def test_a_value_is_shown_only_where_a_loss_has_trained_the_critic(
    checkpoint: Callable[..., Path],
) -> None:
    (cloned,) = watched_episodes(checkpoint(), episodes=1)
    assert cloned.value is None
    assert "value" not in cloned.step_text(0)
    (reinforced,) = watched_episodes(checkpoint(recipe="ppo"), episodes=1)
    assert reinforced.value is not None
    assert f"value {reinforced.value[3]:.2f}" in reinforced.step_text(3)


def test_the_animation_shows_every_step_of_every_episode_in_one_size(
    watched: list[Watched],
) -> None:
    content = watched_gif(watched)
    with Image.open(io.BytesIO(content)) as gif:
        sizes, seconds, blue = set(), 0.0, set()
        for number in range(getattr(gif, "n_frames")):  # noqa: B009
            gif.seek(number)
            sizes.add(gif.size)
            seconds += gif.info["duration"] / 1000
            picture = np.asarray(gif.convert("RGB"))[: 7 * 24]
            rows = np.flatnonzero((picture == (59, 130, 246)).all(axis=2).any(axis=1))
            blue |= set((rows // 24).tolist())
        assert len(sizes) == 1
        gif.seek(0)
        first = np.asarray(gif.convert("RGB"))
    # equal pictures are joined into one that stays longer
    steps = sum(len(episode.shown.action) for episode in watched)
    assert seconds == pytest.approx(0.3 * (steps + 4 * len(watched) - 1) + 1.5, abs=0.01)
    view, room = next(step_pictures(watched[0].shown, 24))
    assert np.array_equal(first[: len(view), : view.shape[1]], view)
    left = view.shape[1] + 8
    below = (len(view) - len(room)) // 2
    assert np.array_equal(first[below : below + len(room), left : left + room.shape[1]], room)
    # the blue bars are those of the actions taken
    taken = {int(action) for episode in watched for action in episode.shown.action}
    assert blue == taken and len(taken) > 1


def test_bars_are_as_long_as_their_shares_and_one_stands_out() -> None:
    shares = [0.0, 0.25, 0.5, 1.0]
    picture = bar_picture(list(zip("abcd", shares, strict=True)), 160, marked=2)
    middles = [picture[20 + 40 * number].astype(int) for number in range(4)]
    blue = [int((row == (59, 130, 246)).all(axis=1).sum()) for row in middles]
    plain = [int((row == (82, 82, 91)).all(axis=1).sum()) for row in middles]
    assert plain[0] == 0 and blue[0] == blue[1] == blue[3] == 0
    assert plain[1] == pytest.approx(plain[3] / 4, abs=2)
    assert blue[2] == pytest.approx(plain[3] / 2, abs=2)


def test_pictures_made_equally_large_keep_their_pixels() -> None:
    one, other = np.full((2, 5, 3), 7, np.uint8), np.full((4, 3, 3), 9, np.uint8)
    first, second = equally_large([one, other])
    assert np.array_equal(first[:2, :5], one)
    assert np.array_equal(second[:4, :3], other)


def test_text_tells_mission_end_action_and_probabilities_of_every_step(
    watched: list[Watched],
) -> None:
    pages = list(watched_text(watched, coloured=False))
    assert len(pages) == sum(len(episode.shown.action) for episode in watched)
    shown = watched[0].shown
    assert shown.mission in pages[0]
    assert ("success" if watched[0].success else "failure") in pages[0]
    taken = ACTIONS[shown.action[0]]
    share = f"{watched[0].probability[0].max():.1%} <"
    assert any(line.startswith(taken) and line.endswith(share) for line in pages[0].splitlines())
    assert "\x1b" not in "".join(pages)
    assert "\x1b" in next(watched_text(watched, coloured=True))


def test_in_a_terminal_one_steps_through_all_episodes_with_the_arrow_keys(
    checkpoint: Callable[..., Path],
) -> None:
    path = checkpoint("run.level=['GoToObj', 'GoToLocal']")
    *_, last = watched_episodes(path, episodes=2)
    arguments = ["watch", str(path), "--episodes", "2", "-q"]
    with in_terminal("trainer", *arguments) as (program, terminal):
        number = len(last.shown.action) - 1
        shown = type_until(terminal, b"\x1b[F", f"step {number} (last ")
        assert "GoToObj, episode 1," in shown
        assert "--level plays another of its levels: GoToLocal" in shown
        assert "\x1b[34m" in shown
        type_until(terminal, b"\x1b[H", "step 0 (last ")
        os.write(terminal, b"q")
        assert program.wait(timeout=120) == 0


def wrapped_level(level: str) -> Any:
    return gymnasium.wrappers.TimeLimit(make_environment(level), 5)


def test_an_environment_of_the_users_own_is_played_and_its_room_left_out(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("users_own")
    vars(module)["wrapped"] = wrapped_level
    monkeypatch.setitem(sys.modules, "users_own", module)
    path = checkpoint("on_policy.environment=users_own:wrapped")
    (episode,) = watched_episodes(path, episodes=1, trust=True)
    assert len(episode.shown.action) <= 5
    assert "no room" in next(watched_text([episode], coloured=False))
    assert watched_gif([episode]).startswith(b"GIF")


def watch(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["watch", *map(str, arguments)])


def test_the_command_writes_an_animation_and_does_not_replace_it_unasked(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path, file = checkpoint("run.level=GoToObj"), tmp_path / "agent.gif"
    result = watch(path, "--gif", file, "--episodes", "1")
    assert result.exit_code == 0, result.output
    assert "of 1 episodes succeeded" in result.output
    before = file.read_bytes()
    assert before.startswith(b"GIF")
    again = watch(path, "--gif", file, "--episodes", "1")
    assert again.exit_code == 1
    assert "add --overwrite" in again.output
    assert file.read_bytes() == before


def test_json_tells_the_level_and_seed_that_were_asked_for(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint()
    result = watch(
        path, "--level", "GoToRedBallGrey", "--seed", "5", "--episodes", "2", "--json", "-q"
    )
    found = json.loads(result.output)
    assert [one["seed"] for one in found] == [5, 6]
    assert {one["mission"] for one in found} == {"go to the red ball"}
    assert len(found[0]["probabilities"]) == found[0]["steps"] == len(found[0]["actions"])


def test_it_is_said_which_of_several_levels_is_played_unless_one_is_named(
    checkpoint: Callable[..., Path],
) -> None:
    levels = [
        "GoToObj",
        *(f"GoTo{size}" for size in ("Local", "RedBall", "ObjMaze", "Seq", "Door")),
    ]
    path, played = checkpoint(f"run.level={levels}"), ("--episodes", "1", "--json")
    said = "playing GoToObj; --level plays another of its levels: GoToLocal, GoToRedBall, "
    assert said + "GoToObjMaze, GoToSeq, …\n" in watch(path, *played).stderr
    assert "--level" not in watch(path, *played, "--level", "GoToObj").stderr
    assert watch(path, *played, "-q").stderr == ""
    assert "--level" not in watch(checkpoint(), *played).stderr


def test_what_cannot_be_watched_is_said_in_three_parts(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    nowhere = watch(tmp_path / "none")
    assert "there is no checkpoint" in nowhere.output
    foreign = watch(checkpoint(words=WORDS[:2]))
    assert "the network's vocabulary does not have the word" in foreign.output
    gone = watch(checkpoint(), "--level", "PutNext")
    assert "this level cannot be played" in gone.output
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    damaged = watch(tmp_path / "bad.pt")
    assert "not a checkpoint, or a damaged one" in damaged.output
    for result in (nowhere, foreign, gone, damaged):
        assert result.exit_code == 1
        assert "  where: " in result.output and "  next:  " in result.output
