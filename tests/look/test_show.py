"""What `demotools show` draws and prints, and that it shows a room only where a replay agrees."""

from __future__ import annotations

import io
import json
import os
import re
import select
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from demotools.babyai.cells import ACTIONS, packed_cells
from demotools.cli import main
from demotools.errors import DemotoolsError, StoreError
from demotools.look.pictures import view_picture
from demotools.look.show import (
    chosen_episode,
    episode_gif,
    episode_png,
    scenes,
    shown_episode,
    step_pictures,
)
from demotools.look.terminal import LETTERS, Scene, page_lines, scene_lines, step_through
from demotools.recording.bot import Episode, record_episode
from demotools.recording.environment import make_environment
from demotools.store.reading import Episodes, Store, open_store
from tests.conftest import MISSIONS, build_store, make_episodes
from tests.terminal import in_terminal

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def bot_store(path: Path, level: str, seeds: range, shift: int = 0) -> Store:
    """A store of episodes of the bot, `shift` added to the seeds that it names."""
    environment = make_environment(level)
    found = [record_episode(environment, seed) for seed in seeds]
    episodes = [episode for episode in found if isinstance(episode, Episode)]
    part = Episodes(
        length=np.array([len(episode.action) for episode in episodes]),
        mission=[episode.mission for episode in episodes],
        seed=np.array([episode.seed + shift for episode in episodes]),
        view=np.concatenate([episode.cells for episode in episodes]),
        direction=np.concatenate([episode.direction for episode in episodes]),
        action=np.concatenate([episode.action for episode in episodes]),
    )
    return build_store(path, part, level=level)


@pytest.fixture(scope="module")
def boss(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return bot_store(tmp_path_factory.mktemp("boss") / "BossLevel.zarr", "BossLevel", range(5))


def show(store: Store, *options: str, **environment: str | None) -> Result:
    arguments = ["show", str(store.path), "-q", *options]
    return CliRunner(env=environment).invoke(main, arguments, color=True)


def test_an_episode_outside_the_store_is_refused_with_the_range(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=[3, 2, 4])
    for episode in (-1, 3):
        with pytest.raises(StoreError) as error:
            chosen_episode(store, episode=episode)
        assert error.value.fix == "choose an episode with 0 <= episode < 3"
    result = show(store, "--episode", "3")
    assert result.exit_code == 1
    assert "0 <= episode < 3" in result.output


def test_episodes_are_chosen_by_mission_by_length_and_at_random(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=[3, 2, 9, 4, 5, 1])
    assert chosen_episode(store) == 0
    assert chosen_episode(store, longest=True) == 2
    assert chosen_episode(store, mission="GREEN key") == 1
    assert chosen_episode(store, mission="green key", longest=True) == 4
    seen = {chosen_episode(store, mission="green", random=True) for _ in range(100)}
    assert seen == {1, 4}
    with pytest.raises(StoreError, match="no mission contains 'lamp'") as error:
        chosen_episode(store, mission="lamp")
    assert repr(MISSIONS[0]) in error.value.fix


def test_how_an_episode_ended_is_shown_and_asked_for(
    tmp_path: Path, make_store: Callable[..., Store]
) -> None:
    reward, terminated = np.zeros(9, np.float32), np.zeros(9, np.uint8)
    reward[2], terminated[[2, 4]] = 0.9, 1  # a success, a failure, a truncation
    episodes = replace(
        make_episodes([3, 2, 4]), optional={"reward": reward, "terminated": terminated}
    )
    store = build_store(tmp_path / "A.zarr", episodes)
    for number, end in enumerate(("success", "failure", "truncation")):
        assert chosen_episode(store, ended=[end]) == number
        shown = shown_episode(store, number)
        assert shown.title.endswith(f", ended by {end}") and shown.as_json()["end"] == end
    result = show(store, "--ended", "failed,truncated", "--longest")
    assert result.exit_code == 0 and "episode 2, 4 steps" in result.output
    assert "ended by truncation" in result.output
    with pytest.raises(StoreError, match="none of these episodes ended in failure") as error:
        chosen_episode(store, mission=MISSIONS[0], ended=["failure"])
    assert error.value.fix == "choose from success"
    plain = make_store(lengths=[3])  # nothing is known but that it is a demonstration
    assert "ended" not in shown_episode(plain, 0).title
    assert "end" not in shown_episode(plain, 0).as_json()
    assert show(store, "--ended", "lost").exit_code == 2


def test_options_that_exclude_each_other_are_wrong_usage(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=[3])
    assert show(store, "--episode", "0", "--longest").exit_code == 2
    assert show(store, "--random", "--longest").exit_code == 2


def test_views_and_rooms_of_a_recorded_episode_are_minigrids_own_pictures(boss: Store) -> None:
    shown = shown_episode(boss, 2)
    assert shown.note == ""
    environment: Any = make_environment("BossLevel")
    environment.reset(seed=shown.seed)
    for action, (view, room) in zip(shown.action, step_pictures(shown, 14), strict=True):
        assert np.array_equal(view, environment.get_pov_render(14))
        assert np.array_equal(room, environment.get_full_render(highlight=True, tile_size=7))
        environment.step(int(action))


def test_the_animation_and_the_sheet_hold_the_views(boss: Store) -> None:
    shown = shown_episode(boss, 2)
    with Image.open(io.BytesIO(episode_gif(shown))) as gif:
        assert getattr(gif, "n_frames") == len(shown.action)  # noqa: B009
        for step in (0, len(shown.action) - 1):
            gif.seek(step)
            picture = np.asarray(gif.convert("RGB"))
            view = view_picture(shown.view[step], 32)
            top = (22 * 16 - 7 * 32) // 2  # in the middle beside a room of 22 cells of 16 pixels
            assert np.array_equal(picture[top : top + 7 * 32, : 7 * 32], view)
    with Image.open(io.BytesIO(episode_png(shown))) as png:
        assert png.size[0] > 500


def test_a_seed_whose_replay_differs_shows_no_room_and_says_where(tmp_path: Path) -> None:
    store = bot_store(tmp_path / "GoToLocal.zarr", "GoToLocal", range(2), shift=100)
    shown = shown_episode(store, 1)
    assert shown.environment is None
    assert "replaying the seed differs from the store at step 0: the view differs" in shown.note
    assert all(len(pictures) == 1 for pictures in step_pictures(shown, 8))
    assert "no room: replaying" in show(store).output


def test_an_unknown_seed_shows_no_room_and_says_so(tmp_path: Path) -> None:
    unknown = np.array([-1, 5])
    store = build_store(tmp_path / "GoToLocal.zarr", replace(make_episodes([2, 2]), seed=unknown))
    assert shown_episode(store, 0).note == "no room: the seed of this episode is unknown"


def test_real_episodes_of_2018_say_why_they_have_no_room(real_demos: Path, tmp_path: Path) -> None:
    pickle = real_demos / "BabyAI-GoToLocal-v0_agent.pkl"
    folder = ["--data-dir", str(tmp_path), "-q"]
    converted = CliRunner().invoke(main, ["convert", str(pickle), *folder])
    assert converted.exit_code == 0, converted.output
    (path,) = tmp_path.glob("*.zarr")
    store = open_store(path)
    assert shown_episode(store, 3).note.startswith("no room: ")
    ahead = 0
    for episode in range(50):
        shown = shown_episode(store, episode)
        if ACTIONS[shown.action[-1]] == "forward":
            # then the object that the mission names stands two cells ahead of the last view
            colour, kind = shown.mission.split()[-2:]
            named = {"ball": "o", "key": "k", "box": "x"}[kind] + LETTERS[colour]
            row = scene_lines(Scene(shown.view[-1], (3, 6)), coloured=False)[4]
            assert row[6:8] == named
            ahead += 1
    assert ahead > 10


def test_every_step_is_printed_with_its_mission_and_action(boss: Store) -> None:
    shown = shown_episode(boss, 1)
    output = show(boss, "--episode", "1", COLUMNS="80").output
    assert "\x1b" not in output
    steps = re.findall(r"^step (\d+) \(last (\d+)\)   (\w+)$", output, re.M)
    last = str(len(shown.action) - 1)
    assert steps == [(str(step), last, ACTIONS[action]) for step, action in enumerate(shown.action)]
    # walls of the room: its lowest row stands once on each page, beside nothing
    assert output.count("#" * 44) >= len(shown.action)


def test_ansi_is_coloured_unless_the_user_or_the_terminal_is_without_colours(boss: Store) -> None:
    coloured = show(boss, "--ansi", NO_COLOR=None, TERM="xterm").output
    assert "\x1b[31m" in coloured
    for variables in ({"NO_COLOR": "1", "TERM": "xterm"}, {"NO_COLOR": None, "TERM": "dumb"}):
        plain = show(boss, "--ansi", **variables).output
        assert "\x1b" not in plain
        assert plain == ESCAPE.sub("", coloured)


def test_symbols_tell_doors_keys_balls_boxes_and_colours_apart() -> None:
    things = [(4, 0, 0), (4, 1, 1), (4, 2, 2), (5, 3, 0), (6, 4, 0), (7, 5, 0), (1, 0, 0)]
    image = np.zeros((7, 2, 3), dtype=np.uint8)
    image[:, 0] = things
    image[3, 1] = (6, 0, 0)
    scene = Scene(packed_cells(image), (3, 1))
    top, lowest = scene_lines(scene, coloured=False)
    assert top == "/r+g%bkpoyxe ."
    assert lowest == "      o^      "  # the agent carries a ball
    assert ESCAPE.sub("", "\n".join(scene_lines(scene, coloured=True))) == f"{top}\n{lowest}"


def test_a_room_that_does_not_fit_the_terminal_is_left_out_and_its_size_said(boss: Store) -> None:
    view, room = scenes(shown_episode(boss, 0))[0]
    assert room is not None
    small = "\n".join(page_lines(["x"], view, room, size=(60, 24), coloured=False))
    assert "the room needs a terminal of 62 columns" in small
    assert "the room needs" not in "\n".join(
        page_lines(["x"], view, room, size=(62, 40), coloured=False)
    )


def test_arrow_keys_move_and_do_not_leave_the_episode(capsys: pytest.CaptureFixture[str]) -> None:
    keys = iter(["\x1b[C", "\x1bOC\x1b[C", "\x1b[D", "?", "\x1b[F", "l", "\x1b[H", "\x1b[A", "q"])
    seen: list[int] = []

    def page(number: int) -> list[str]:
        seen.append(number)
        return [f"page {number}"]

    step_through(5, page, key=lambda: next(keys))
    assert seen == [0, 1, 3, 2, 2, 4, 4, 0, 0]
    assert "page 4" in capsys.readouterr().out


def test_json_tells_the_actions_by_name(boss: Store) -> None:
    found = json.loads(show(boss, "--episode", "1", "--json").output)
    assert found["seed"] == 1
    assert found["replay_agrees"] is True
    assert found["actions"] == [ACTIONS[action] for action in shown_episode(boss, 1).action]


def test_a_file_is_not_replaced_unasked_and_a_folder_that_is_not_there_is_said(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    store, tmp_path = make_store(lengths=[3, 2]), tmp_path / "pictures"
    tmp_path.mkdir()
    file = tmp_path / "episode.gif"
    assert show(store, "--gif", str(file)).exit_code == 0
    before = file.read_bytes()
    result = show(store, "--gif", str(file), "--episode", "1")
    assert (result.exit_code, file.read_bytes()) == (1, before)
    assert "add --overwrite" in result.output
    assert show(store, "--gif", str(file), "--episode", "1", "--overwrite").exit_code == 0
    assert file.read_bytes() != before
    missing = show(store, "--png", str(tmp_path / "no" / "episode.png"))
    assert missing.exit_code == 1
    assert "there is no such folder" in missing.output
    assert [path.name for path in tmp_path.iterdir()] == ["episode.gif"]


def test_views_that_are_pixels_are_drawn_but_not_written_as_text(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 56, 56, 3), dtype=np.uint8)
    episodes = replace(make_episodes([3, 2]), view=pixels, seed=np.array([-1, -1]))
    store = build_store(tmp_path / "GoToLocal.zarr", episodes)
    with pytest.raises(DemotoolsError, match="are pixel images") as error:
        scenes(shown_episode(store, 0))
    assert "--gif" in error.value.fix
    assert show(store, "--gif", str(tmp_path / "pixels.gif")).exit_code == 0


def type_until(terminal: int, key: bytes, until: str) -> str:
    """What a program writes while a key is pressed again and again, until a text appears.

    A key that comes before the program listens is lost: hence again and again.
    """
    seen = ""
    for _attempt in range(100):
        if until in seen:
            return seen
        os.write(terminal, key)
        while select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 65536).decode()
    raise AssertionError(seen)


def test_in_a_real_terminal_one_steps_with_the_arrow_keys(boss: Store) -> None:
    last = len(shown_episode(boss, 1).action) - 1
    arguments = ["show", str(boss.path), "--episode", "1"]
    with in_terminal("demotools", *arguments) as (program, terminal):
        assert "\x1b[90m\x1b[100m##" in type_until(terminal, b"\x1b[F", f"step {last} (last ")
        type_until(terminal, b"\x1b[D", f"step {last - 1} (last ")
        os.write(terminal, b"q")
        assert program.wait(timeout=120) == 0
